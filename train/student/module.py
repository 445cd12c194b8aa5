"""The student as a training step uses it: a micro-batch in, the sums of its objective out.

`StudentModule` wraps a Hugging Face causal language model. The body runs on all positions, the
output head only on those that predict a response token, one chunk of them after the other
(`loss.head_loss`). So neither a [B, S, V] nor an [N, V] tensor exists.

DDP wraps this module, and FSDP has it as the root, not the Hugging Face model inside: both handle
the parameters that a forward pass of their module uses, and the head is used in this one's.

Legend: B rows, S length of a sequence, D hidden size, N response tokens with a loss, n of a chunk,
V vocabulary.
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
from raystill.train.loss.log_probs import sum_dtype
from raystill.train.loss.objective import ObjectiveSums, TokenObjective
from raystill.train.loss.router import router_balance
from raystill.train.loss.teacher_head import TeacherHead
from raystill.train.student.masks import ROWS, tell_transformers
from raystill.train.student.row_by_row import ROW_BY_ROW, first_places


class StudentModule(nn.Module):
    """A causal language model whose forward pass returns the sums of an objective.

    Attributes:
        model: The Hugging Face model.
        param_dtype: dtype of the parameters that are trained.
        compute_dtype: dtype of matrix products (autocast); that of frozen weights in 16 bits, which
            would be converted for each product otherwise.
        stream_dtype: dtype of what goes from layer to layer; `narrow_stream` sets it.
        packed: Whether micro-batches are packed; `sharding.place_student` sets it.
        transform: Scale and cap of the logits.
    """

    def __init__(
        self,
        model: Any,
        compute_dtype: torch.dtype | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        """Wraps ``model``.

        compute_dtype: None: that of the parameters. activation_checkpointing: compute activations
        again in the backward pass instead of keeping them. Raises ValueError as
        `require_known_head` does.
        """
        super().__init__()
        tell_transformers()
        if has_attention_cap(model) and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation("eager")  # SDPA leaves the cap out, without a warning.
        self.model = model
        trained = (p for p in model.parameters() if p.requires_grad)
        self.param_dtype = next(trained, next(model.parameters())).dtype
        self.compute_dtype = compute_dtype or self.param_dtype
        narrow = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
        mixed = bool(narrow) and self.param_dtype not in narrow  # Frozen beside trained weights.
        if mixed:
            self.compute_dtype = min(narrow, key=str)
        self.stream_dtype = self.param_dtype
        self.packed = False
        self.transform = logit_transform(model.config.get_text_config().to_dict())
        # Frozen and trained weights of different dtypes meet under autocast only.
        with self._autocast(model.device.type) if mixed else nullcontext():
            require_known_head(model, self.head(self.param_dtype))
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def narrow_stream(self) -> None:
        """From now on what goes from layer to layer is in the dtype of products.

        Nothing changes where weights of both dtypes are there already (adapters), or no two dtypes.
        """
        if {p.dtype for p in self.model.parameters()} != {torch.float32}:
            return
        self.stream_dtype = self.compute_dtype
        embeddings = self.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda _module, _ids, made: made.to(self.compute_dtype))

    @property
    def shared(self) -> bool:
        """Whether what several rows of a micro-batch begin with is in it once."""
        return self.packed and self.model.config._attn_implementation == ROW_BY_ROW

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the output head."""
        return self.model.get_output_embeddings().weight.shape[0]

    def forward(
        self, batch: MicroBatch, objective: ObjectiveConfig, teacher: TeacherHead | None = None
    ) -> ObjectiveSums:
        """The sums of the objective over the N tokens; their total is differentiable.

        teacher: the teacher's head, with a ``hidden`` signal only.
        """
        tokens: ChunkObjective
        if teacher is None:
            tokens = TokenObjective(objective, batch)
        else:
            tokens = HiddenObjective(objective, batch, teacher)
        if objective.router_balance == 0:
            return head_loss(self._decoded(batch)[0], self.head(), tokens)
        hidden, routers = self._decoded(batch, output_router_logits=True)
        return self._with_balance(head_loss(hidden, self.head(), tokens), batch, objective, routers)

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """The input of the head, [N, D], at the positions that predict a response token."""
        return self._decoded(batch)[0]

    def _decoded(self, batch: MicroBatch, **more: bool) -> tuple[Tensor, Any]:
        """The input of the head, [N, D], and the logits of all routers, where ``more`` asks."""
        ROWS.packed = batch.packed
        ROWS.positions = batch.position_ids if batch.packed else None
        try:
            with self._autocast(batch.input_ids.device.type):
                output = self.model.get_decoder()(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    # Only where they say more than the model's own, which count from 0.
                    position_ids=batch.position_ids if batch.packed else None,
                    use_cache=False,
                    **self._row_bounds(batch),
                    **more,
                )
                hidden = output.last_hidden_state.flatten(0, 1)
                routers = getattr(output, "router_logits", None)
                return hidden.index_select(0, batch.logit_index), routers
        finally:
            ROWS.packed = ROWS.positions = None

    def _with_balance(
        self, sums: ObjectiveSums, batch: MicroBatch, objective: ObjectiveConfig, routers: Any
    ) -> ObjectiveSums:
        """The sums with the load-balancing loss of this pass, times the weight of its tokens."""
        if not routers:
            raise self._without_routers(objective)
        top_k = experts_per_token(self.model)
        balance = router_balance(routers, top_k, real_positions(batch)) * batch.weights.sum()
        total = sums.total + objective.router_balance * balance
        terms = sums.terms | {"router_balance": balance.detach()}
        return sums._replace(total=total, terms=terms)

    def require_routers(self, objective: ObjectiveConfig) -> None:
        """Raises ValueError where the objective balances experts, and the model has none."""
        if objective.router_balance and not experts_per_token(self.model):
            raise self._without_routers(objective)

    def _without_routers(self, objective: ObjectiveConfig) -> ValueError:
        return ValueError(
            f"objective.router_balance is {objective.router_balance:g}, but "
            f"{type(self.model).__name__} has no routers that say their logits; set it to 0"
        )

    def head(self, compute_dtype: torch.dtype | None = None) -> OutputHead:
        """The output head with the parameters of this moment; compute_dtype None: the module's.

        The parameters of a sharded module are whole only within its forward pass.
        """
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return OutputHead(head.weight, bias, self.transform, compute_dtype or self.compute_dtype)

    def logit_chunks(self, batch: MicroBatch) -> Iterator[tuple[slice, Tensor]]:
        """The logits [n, V] of all N tokens, one chunk after the other, without gradient.

        The head's products are in float32 (float64 for float64) whatever the training's: bfloat16
        logits differ from themselves by 1e-4 nats, which a figure must not show.
        """
        with torch.no_grad():
            head = self.head(sum_dtype(self.compute_dtype))
            return head.logit_chunks(self.hidden_states(batch))

    def logits(self, batch: MicroBatch) -> Tensor:
        """The logits [N, V] of all tokens at once, without gradient; for small vocabularies."""
        return torch.cat([z for _, z in self.logit_chunks(batch)])

    def _row_bounds(self, batch: MicroBatch) -> dict[str, Any]:
        """Arguments that tell FlashAttention, or `row_by_row`, where the rows of a packed sequence
        begin.

        Without them FlashAttention finds the bounds from the positions, which waits for the device
        once a layer.
        """
        kernel = self.model.config._attn_implementation
        single = len(batch.input_ids) == 1 and batch.row_starts is not None
        if not single or not ("flash" in kernel or kernel == ROW_BY_ROW):
            return {}
        bounds = {f"cu_seq_lens_{side}": batch.row_starts for side in ("q", "k")}
        bounds |= {f"max_length_{side}": batch.longest for side in ("q", "k")}
        if batch.row_places is None:
            return bounds
        firsts = first_places(batch.row_places)
        return bounds | {"row_places": batch.row_places, "row_firsts": firsts}

    def _autocast(self, device_type: str) -> Any:
        if self.compute_dtype == self.param_dtype:
            return nullcontext()
        if self.stream_dtype != self.param_dtype and isinstance(self, FSDPModule):
            return nullcontext()  # All weights are gathered in the dtype of products.
        return torch.autocast(device_type, dtype=self.compute_dtype)


def real_positions(batch: MicroBatch) -> Tensor | None:
    """Which positions hold a token, [B, S], 1 or 0; None: all.

    Each row ends with a position that predicts a token: what is behind it is padding.
    """
    if batch.input_tokens == batch.padded_tokens:
        return None
    marks = torch.zeros_like(batch.input_ids).flatten().index_fill_(0, batch.logit_index, 1)
    return marks.view_as(batch.input_ids).flip(1).cummax(dim=1).values.flip(1)


def experts_per_token(model: Any) -> int:
    """How many experts of a layer each token goes through; 0 for a dense model."""
    return getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 0


def has_attention_cap(model: Any) -> bool:
    """Whether the model caps its attention logits with tanh, as Gemma 2 does."""
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


@torch.no_grad()
def require_known_head(model: Any, head: OutputHead) -> None:
    """Raises ValueError where the model's own logits of four tokens differ from those of ``head``.

    Some architectures scale hidden states or logits by settings of their own. Training without
    these would train another model than the one that is exported.
    """
    was_training = model.training
    model.eval()
    try:
        ids = torch.arange(4, device=head.weight.device)[None]
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    except (AttributeError, TypeError) as error:  # Of classes that do not take what others take.
        raise ValueError(
            f"{type(model).__name__} has no decoder and output head that can be run apart, as "
            f"training runs them ({error}); choose another student"
        ) from error
    finally:
        model.train(was_training)
    logits = torch.cat([z.float() for _, z in head.logit_chunks(hidden)])
    allowed = 0.03 if head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-3
    difference = (logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if difference > allowed:
        raise ValueError(
            f"the logits of {type(model).__name__} differ from its output head's by "
            f"{float(difference):.2g} of the largest logit; expected at most {allowed}: the model "
            "changes hidden states or logits in a way that is not supported; choose another student"
        )


def parallel_module(
    student: StudentModule, device: torch.device, world_size: int, compiled: bool
) -> nn.Module:
    """The module that a step runs: the student, in DDP where several workers hold all of it.

    compiled: whether to use torch.compile.
    """
    # dynamic: each micro-batch has a shape of its own, and must not be compiled anew.
    module: Any = torch.compile(student, dynamic=True) if compiled else student
    if world_size > 1 and not isinstance(student, FSDPModule):
        ids = [device.index] if device.type == "cuda" else None
        # The bucket view saves a second copy of all gradients.
        module = DistributedDataParallel(
            module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return module


def resolve_compute_dtype(name: str, device: torch.device, param_dtype: str) -> torch.dtype:
    """The dtype of matrix products for ``training.compute_dtype``.

    ``auto`` is bfloat16 where the device multiplies it faster than float32: on GPUs, and on CPUs
    with AMX or AVX512-BF16. Another CPU emulates it at a quarter of the speed. float64 and bfloat16
    parameters are always multiplied in their own dtype.
    """
    if param_dtype in ("float64", "bfloat16"):
        return getattr(torch, param_dtype)
    if name == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and cpu_has_bfloat16())
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16."""
    # Private functions of torch, which a later version may rename: then there are none.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)
