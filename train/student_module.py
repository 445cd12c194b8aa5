"""The student as the step sees it: token ids in, logits of the response positions out.

Wraps a Hugging Face causal language model: the body runs on all positions, the output head only
on those that predict a response token, so no [B, S, V] tensor exists. This module (not the
Hugging Face model) is what DDP wraps.

Legend: B rows, S padded length, D hidden size, N response tokens, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Each scales or bends the logits after the head, which this module would leave out.
LOGIT_TRANSFORMS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


def resolve_compute_dtype(name: str, device: torch.device, param_dtype: str) -> torch.dtype:
    """The precision of matrix products; float64 parameters are always multiplied in float64.

    ``auto`` is bfloat16 where the device multiplies it faster: on GPUs and on CPUs with AMX. A
    CPU without AMX emulates it, at a quarter of float32's speed.
    """
    if param_dtype == "float64":
        return torch.float64
    if name == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and _has_amx())
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


class StudentModule(nn.Module):
    """A causal language model whose forward returns logits [N, V] at chosen positions only."""

    def __init__(
        self,
        model: Any,
        compute_dtype: torch.dtype | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        """compute_dtype: precision of matrix products (autocast); None: that of the parameters.

        Raises ValueError for a model that transforms its logits after the head.
        """
        super().__init__()
        for name, neutral in LOGIT_TRANSFORMS.items():
            value = getattr(model.config, name, None)
            if value not in (None, neutral):
                raise ValueError(
                    f"the student's {name} is {value}; students whose logits are transformed "
                    "after the head are not supported; choose another student"
                )
        self.model = model
        self.param_dtype = next(model.parameters()).dtype
        self.compute_dtype = compute_dtype or self.param_dtype
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.model.get_output_embeddings().weight.shape[0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        logit_index: Tensor,
    ) -> Tensor:
        """Logits [N, V] in the compute precision, which the objective widens chunk by chunk.

        input_ids, position_ids int64 [B, S]; attention_mask None for right-padded rows;
        logit_index int64 [N] into the B * S flattened positions.
        """
        with self._autocast(input_ids.device.type):
            hidden = self.model.get_decoder()(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state
            chosen = hidden.flatten(0, 1).index_select(0, logit_index)
            return self.model.get_output_embeddings()(chosen)

    def _autocast(self, device_type: str) -> Any:
        if self.compute_dtype == self.param_dtype:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.compute_dtype)


def parallel_module(
    student: StudentModule, device: torch.device, world_size: int, compiled: bool
) -> nn.Module:
    """The student as a step runs it: compiled if asked, in DDP where there are several workers."""
    module: Any = torch.compile(student, dynamic=True) if compiled else student
    if world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        module = DistributedDataParallel(
            module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return module
