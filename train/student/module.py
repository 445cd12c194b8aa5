"""The student as the step sees it: a micro-batch in, the sums of its objective out.

Wraps a Hugging Face causal language model: the body runs on all positions, the output head only
on those that predict a response token, and there chunk by chunk (`head_loss`), so neither a
[B, S, V] nor an [N, V] tensor exists. This module (not the Hugging Face model) is what DDP wraps
and FSDP's root: they reduce, or gather, what its forward pass uses, and the head's loss is in it.

Legend: B rows, S padded length, D hidden size, N response tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from raystill.config.objective import ObjectiveConfig
from raystill.model.head import logit_transform
from raystill.train.batch.batch import MicroBatch
from raystill.train.loss.full_vocabulary import HiddenObjective
from raystill.train.loss.head_loss import ChunkObjective, OutputHead, head_loss
from raystill.train.loss.objective import ObjectiveSums, TokenObjective
from raystill.train.loss.teacher_head import TeacherHead


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
    """A causal language model whose forward pass returns the sums of an objective."""

    def __init__(
        self,
        model: Any,
        compute_dtype: torch.dtype | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        """compute_dtype: precision of matrix products (autocast); None: that of the parameters.

        Raises ValueError for a model whose logits are not those of its head, as far as is known.
        """
        super().__init__()
        if has_attention_cap(model) and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation("eager")  # SDPA leaves the cap out, without a word.
        self.model = model
        self.param_dtype = next(model.parameters()).dtype
        self.compute_dtype = compute_dtype or self.param_dtype
        self.packed = False  # `sharding.place_student` decides.
        self.transform = logit_transform(model.config.get_text_config().to_dict())
        require_known_head(model, self.head(self.param_dtype))
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.model.get_output_embeddings().weight.shape[0]

    def forward(
        self, batch: MicroBatch, objective: ObjectiveConfig, teacher: TeacherHead | None = None
    ) -> ObjectiveSums:
        """The sums over the micro-batch's N tokens; their total is differentiable.

        teacher: the head that a ``hidden`` signal's states belong to.
        """
        tokens: ChunkObjective
        if teacher is None:
            tokens = TokenObjective(objective, batch)
        else:
            tokens = HiddenObjective(objective, batch, teacher)
        return head_loss(self.hidden_states(batch), self.head(), tokens)

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """What the head is given, [N, D], at the positions that predict a response token."""
        with self._autocast(batch.input_ids.device.type):
            hidden = self.model.get_decoder()(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
                **self._row_bounds(batch),
            ).last_hidden_state
            return hidden.flatten(0, 1).index_select(0, batch.logit_index)

    def head(self, compute_dtype: torch.dtype | None = None) -> OutputHead:
        """The output head with the parameters it has now (sharded ones are gathered in forward)."""
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return OutputHead(head.weight, bias, self.transform, compute_dtype or self.compute_dtype)

    def logit_chunks(self, batch: MicroBatch) -> Iterator[tuple[slice, Tensor]]:
        """Logits [n, V] of all N tokens, chunk by chunk, for measuring: no gradient."""
        with torch.no_grad():
            return self.head().logit_chunks(self.hidden_states(batch))

    def logits(self, batch: MicroBatch) -> Tensor:
        """Logits [N, V] of all tokens at once, for small vocabularies: no gradient."""
        return torch.cat([z for _, z in self.logit_chunks(batch)])

    def _row_bounds(self, batch: MicroBatch) -> dict[str, Any]:
        """Where a sequence's rows begin, or FlashAttention asks the device in each layer."""
        one = len(batch.input_ids) == 1 and batch.row_starts is not None
        if not one or "flash" not in self.model.config._attn_implementation:
            return {}
        bounds = {f"cu_seq_lens_{side}": batch.row_starts for side in ("q", "k")}
        return bounds | {f"max_length_{side}": batch.longest for side in ("q", "k")}

    def _autocast(self, device_type: str) -> Any:
        if self.compute_dtype == self.param_dtype:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.compute_dtype)


def has_attention_cap(model: Any) -> bool:
    """Whether the model caps the logits of its attention, as Gemma 2 does."""
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


@torch.no_grad()
def require_known_head(model: Any, head: OutputHead) -> None:
    """Compares the model's own logits of four tokens with the head's; ValueError if they differ.

    Some architectures scale hidden states or logits by settings of their own: leaving that out
    would train another model than the one that is exported.
    """
    was_training = model.training
    model.eval()
    try:
        ids = torch.arange(4, device=head.weight.device)[None]
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    finally:
        model.train(was_training)
    found = torch.cat([z.float() for _, z in head.logit_chunks(hidden)])
    allowed = 0.03 if head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-3
    difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if difference > allowed:
        raise ValueError(
            f"the logits of {type(model).__name__} differ from its output head's by "
            f"{float(difference):.2g} of their size; expected at most {allowed}: it changes hidden "
            "states or logits in a way that is not known here; choose another student"
        )


def parallel_module(
    student: StudentModule, device: torch.device, world_size: int, compiled: bool
) -> nn.Module:
    """The student as a step runs it: compiled if asked, in DDP unless it is alone or sharded."""
    module: Any = torch.compile(student, dynamic=True) if compiled else student
    if world_size > 1 and not isinstance(student, FSDPModule):
        ids = [device.index] if device.type == "cuda" else None
        module = DistributedDataParallel(
            module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return module
