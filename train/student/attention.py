"""The student's attention kernel, and whether its micro-batches are packed into one sequence.

`sharding.place_student` chooses both once, when model, device and dtype are known.

In a packed micro-batch the rows follow each other in a single sequence, each with positions from
0, and no row may attend to another. FlashAttention gets the bounds of the rows and works row by
row, and so does SDPA on a CPU (`row_by_row`). FlexAttention, which also caps attention's logits and
knows sinks, gets a mask of blocks and leaves out those between rows. The other kernels need a mask
[S, S], whose time and memory grow with the square of the whole micro-batch; for them padded rows of
similar length are cheaper.

Legend: S length of the packed sequence, D hidden size.
"""

import importlib
import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raystill.train.batch.batch import collate
from raystill.train.batch.rows import Row
from raystill.train.student.module import StudentModule, has_attention_cap
from raystill.train.student.row_by_row import ROW_BY_ROW, OwnMaskError, why_not_row_by_row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """One version of FlashAttention.

    Attributes:
        module: The Python module it is imported from.
        capabilities: Major compute capabilities of the GPUs it runs on.
        has_dropout: Whether it can drop attention weights.
    """

    module: str
    capabilities: range
    has_dropout: bool


FLASH = {
    "flash_attention_3": Kernel("flash_attn_interface", range(9, 10), has_dropout=False),
    "flash_attention_2": Kernel("flash_attn", range(8, 100), has_dropout=True),
}
"""By the name that transformers uses, the faster first."""
FLEX = "flex_attention"
HALF = (torch.bfloat16, torch.float16)
UNPACKABLE = (
    *("chunked_attention", "linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"),
    *("indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
    "minimax_m3_sparse",
)
"""Layer types that go over the whole sequence and not row by row: a recurrent state, chunk bounds,
or a choice of tokens."""
MOST_LEAK = 0.03
"""How far a row's hidden states may differ after another row, as a share of the largest component:
rounding, and experts that are chosen differently because of it."""
MOST_SHIFT = 1e-3
"""How far a packed row's hidden states may differ from those of the row alone, as a share of the
largest component; checked where matrix products are in float32 or float64."""


def use_attention(
    name: str, model: Any, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> str:
    """Sets the attention kernel of the model, and returns the name of the one that it now has.

    name: ``training.attention``. ``auto`` is the first FlashAttention that can run here, otherwise
    the kernel that the model has in a `StudentModule`: SDPA, on a CPU row by row, or where SDPA
    would leave out a cap or sinks FlexAttention, on a CPU eager. dtype: of the matrix products.
    compiled: whether the student will be. Raises ValueError where the named kernel cannot run here.
    """
    current = model.config._attn_implementation
    wanted = name
    if name == "auto":
        wanted = _fastest(model, device, dtype, compiled) or current
    if name == FLEX and (reason := why_no_flex(model, device)):
        raise ValueError(
            f"training.attention is {name}, but {reason}; set training.attention: auto"
        )
    if name in FLASH and (reason := why_not(name, model, device, dtype)):
        raise ValueError(
            f"training.attention is {name}, but {reason}; set training.attention: auto"
        )
    if name == "sdpa" and has_attention_cap(model):
        raise ValueError(
            f"training.attention is sdpa, which leaves out the cap that {type(model).__name__} "
            "puts on its attention logits; set training.attention: auto"
        )
    if wanted != current:
        model.set_attn_implementation(wanted)
    chosen = str(model.config._attn_implementation)  # The model may have kept its own.
    if chosen != wanted and name != "auto":
        raise ValueError(
            f"training.attention is {name}, but {type(model).__name__} keeps using {chosen}; "
            "set training.attention: auto"
        )
    return chosen


def why_not(name: str, model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why this FlashAttention cannot run for this model on this device; None: it can.

    name: a key of ``FLASH``. dtype: of the matrix products.
    """
    kernel, kind = FLASH[name], type(model).__name__
    if device.type != "cuda" or dtype not in HALF:
        return f"the student runs on {device.type} in {dtype}; it needs a GPU and bfloat16"
    compatible = getattr(model, "_compatible_flash_implementations", None)
    if not model._supports_flash_attn or (compatible and name not in compatible):
        return f"{kind} does not support it"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in kernel.capabilities:
        return f"the GPU has compute capability {major}.{minor}, on which it does not run"
    try:
        attend = importlib.import_module(kernel.module).flash_attn_varlen_func
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{kernel.module} cannot be imported on this worker ({error!r})"
    if has_attention_cap(model) and "softcap" not in inspect.signature(attend).parameters:
        return f"the installed {kernel.module} leaves out the cap on {kind}'s attention logits"
    if not kernel.has_dropout and getattr(model.config, "attention_dropout", None):
        return f"it has no dropout, and {kind} has attention_dropout"
    return None


def why_no_flex(model: Any, device: torch.device) -> str | None:
    """The reason why FlexAttention cannot train this model on this device; None: it can."""
    if device.type != "cuda":
        return f"the student runs on {device.type}, where PyTorch has no gradient of it"
    if not getattr(model, "_supports_flex_attn", False):
        return f"{type(model).__name__} does not support it"
    if getattr(model.config.get_text_config(), "attention_dropout", None):
        return f"it has no dropout, and {type(model).__name__} has attention_dropout"
    return None


def _fastest(
    model: Any, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> str | None:
    """The first FlashAttention that can run here, FlexAttention in the place of eager, or SDPA row
    by row; logs why another one cannot.
    """
    if device.type != "cuda":
        return ROW_BY_ROW if why_not_row_by_row(model, device, compiled) is None else None
    for name in FLASH if dtype in HALF else ():
        if (reason := why_not(name, model, device, dtype)) is None:
            return name
        logger.info("no %s: %s", name, reason)
    if model.config._attn_implementation != "eager":
        return None
    if (reason := why_no_flex(model, device)) is None:
        return FLEX
    logger.info("no %s: %s", FLEX, reason)
    return None


def wants_packing(packing: bool | str, attention: str) -> bool:
    """Whether rows should be packed, if the model allows it.

    packing: ``training.packing``. attention: the name of the kernel.
    """
    blocks = "flash" in attention or attention in (FLEX, ROW_BY_ROW)
    return packing is True or (packing == "auto" and blocks)


def use_packing(
    packing: bool | str, student: StudentModule, attention: str, device: torch.device
) -> bool:
    """Whether micro-batches are packed; ``auto``: with FlashAttention, FlexAttention and row by
    row, where it is cheaper.

    Runs the model on two packed rows, to see whether one changes the other. A sharded model is run
    in `sharding.gathering_passes`, by all ranks. Where rows change each other, ``auto`` pads them,
    and true raises ValueError.
    """
    if not wants_packing(packing, attention):
        return False
    reason = _mixing_layers(student.model) or _mixing_rows(student, device)
    if reason is None:
        return True
    problem = f"the rows of {type(student.model).__name__} cannot be packed: {reason}"
    if packing == "auto":
        logger.warning("%s; rows are padded", problem)
        return False
    raise ValueError(f"training.packing is true, but {problem}; set training.packing: auto")


def _mixing_layers(model: Any) -> str | None:
    """The reason why rows cannot be packed, from the types of the model's layers; None: none."""
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    mixing = sorted(types & set(UNPACKABLE))
    return f"its layers of type {', '.join(mixing)} reach across rows" if mixing else None


@torch.no_grad()
def _mixing_rows(student: StudentModule, device: torch.device) -> str | None:
    """The reason why rows cannot be packed, from a trial of the model; None: they can.

    A row's hidden states must not depend on the row before it, nor on being packed. ``other``
    begins as ``row`` does: row by row, that beginning is computed once.
    """
    first, other, row = ([1, 2, 3], [3, 1, 1], [3, 1, 2, 0])
    shared = student.model.config._attn_implementation == ROW_BY_ROW

    def states_of_last(*rows: list[int]) -> Tensor:
        made, vocab = [_row(ids) for ids in rows], student.vocab_size
        batch = collate(made, "text", vocab, packed=True, shared=shared)
        return student.hidden_states(batch.to(device))[1 - len(row) :]

    was_training = student.training
    student.eval()  # Dropout would make the same row differ.
    try:
        packed = states_of_last(first, row)
        after_other, alone = states_of_last(other, row), states_of_last(row)
    except OwnMaskError as error:
        return str(error)
    finally:
        student.train(was_training)
    if (leak := _distance(packed, after_other)) > MOST_LEAK:
        return f"a row's hidden states change by {leak:.2g} of their size with the row before it"
    exact = student.compute_dtype not in HALF
    if exact and (shift := _distance(packed, alone)) > MOST_SHIFT:
        return (
            f"a packed row's hidden states differ by {shift:.2g} of their size from those of the "
            "row alone"
        )
    return None


def _distance(states: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest component; infinity where one is NaN."""
    size = expected.abs().max().clamp_min(1e-6)
    return float(((states - expected).abs().max() / size).nan_to_num(torch.inf))


def _row(ids: list[int]) -> Row:
    """A row whose prompt is the first id."""
    tokens = torch.tensor(ids, dtype=torch.int32).numpy()
    return Row(0, 0, tokens[:1], tokens[1:])
