"""How the student's rows attend: which kernel, and whether a micro-batch is one packed sequence.

`sharding.place_student` asks both once, when model, device and precision are known. Packed, the
rows of a micro-batch stand one behind the other in a single sequence, each with positions from 0,
and no row sees another: FlashAttention is told where rows begin and works row by row; the others
get a mask of S x S, which costs time and memory with the square of the whole micro-batch, so that
there padded rows of like length are the cheaper form.

Legend: B rows, S length of the sequence, D hidden size.
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """A FlashAttention: the module it is imported from, the compute capabilities it runs on."""

    module: str
    capabilities: range
    has_dropout: bool


FLASH = {
    "flash_attention_3": Kernel("flash_attn_interface", range(9, 10), has_dropout=False),
    "flash_attention_2": Kernel("flash_attn", range(8, 100), has_dropout=True),
}
"""By transformers' name, the faster first."""
HALF = (torch.bfloat16, torch.float16)
UNPACKABLE = (
    *("chunked_attention", "linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"),
    *("indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
    "minimax_m3_sparse",
)
"""Layer types whose state, bounds or choice run through the sequence, not the row."""
LEAK = 0.03
"""Share of a hidden state's size that may change with another row: routing of experts, rounding."""
MISPLACED = 1e-3
"""The same against the row alone, where matrix products are in float32 or better."""


def use_attention(name: str, model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Lets the model attend as ``training.attention`` says; its ``attn_implementation`` then.

    auto: the first FlashAttention that can run here, else what the model in a `StudentModule` has
    (SDPA, or eager where a cap needs it). Raises ValueError where the named one cannot run here.
    """
    current = model.config._attn_implementation
    wanted = _fastest(model, device, dtype) or current if name == "auto" else name
    if name in FLASH and (why := why_not(name, model, device, dtype)):
        raise ValueError(f"training.attention is {name}, but {why}; set training.attention: auto")
    if name == "sdpa" and has_attention_cap(model):
        raise ValueError(
            f"training.attention is sdpa, which leaves out the cap that {type(model).__name__} "
            "puts on its attention's logits; set training.attention: auto"
        )
    if wanted != current:
        model.set_attn_implementation(wanted)
    taken = str(model.config._attn_implementation)
    if taken != wanted and name != "auto":
        raise ValueError(
            f"training.attention is {name}, but {type(model).__name__} stays with {taken}; "
            "set training.attention: auto"
        )
    return taken


def why_not(name: str, model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps this FlashAttention from computing this model's attention here; None: nothing."""
    kernel, kind = FLASH[name], type(model).__name__
    if device.type != "cuda" or dtype not in HALF:
        return f"the student runs on {device.type} in {dtype}; it needs a GPU and bfloat16"
    compatible = getattr(model, "_compatible_flash_implementations", None)
    if not model._supports_flash_attn or (compatible and name not in compatible):
        return f"{kind} cannot run with it"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in kernel.capabilities:
        return f"the GPU has compute capability {major}.{minor}, on which it does not run"
    try:
        attend = importlib.import_module(kernel.module).flash_attn_varlen_func
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{kernel.module} does not import on this worker ({error!r})"
    if has_attention_cap(model) and "softcap" not in inspect.signature(attend).parameters:
        return f"the installed {kernel.module} leaves out the cap on {kind}'s attention logits"
    if not kernel.has_dropout and getattr(model.config, "attention_dropout", None):
        return f"it has no dropout, and {kind} has attention_dropout"
    return None


def _fastest(model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """The first FlashAttention that can run here; says why one that is asked about cannot."""
    if device.type != "cuda" or dtype not in HALF:
        return None
    for name in FLASH:
        if (why := why_not(name, model, device, dtype)) is None:
            return name
        logger.info("no %s: %s", name, why)
    return None


def wants_packing(packing: bool | str, attention: str) -> bool:
    """Whether rows are to be packed if the model allows it."""
    return packing is True or (packing == "auto" and "flash" in attention)


def use_packing(
    packing: bool | str, student: StudentModule, attention: str, device: torch.device
) -> bool:
    """Whether micro-batches are packed; auto: where FlashAttention makes that the cheaper form.

    The model is tried on two packed rows: all ranks call this with whole weights. Where it would
    mix rows they stay padded with auto, and ValueError is raised where packing is wanted.
    """
    if not wants_packing(packing, attention):
        return False
    why = _mixing_layers(student.model) or _mixing_rows(student, device)
    if why is None:
        return True
    told = f"{type(student.model).__name__} cannot be packed: {why}"
    if packing == "auto":
        logger.warning("%s; rows are padded", told)
        return False
    raise ValueError(f"training.packing is true, but {told}; set training.packing: auto")


def _mixing_layers(model: Any) -> str | None:
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    mixing = sorted(kinds & set(UNPACKABLE))
    return f"its layers of type {', '.join(mixing)} reach across rows" if mixing else None


@torch.no_grad()
def _mixing_rows(student: StudentModule, device: torch.device) -> str | None:
    """How far one row's hidden states depend on the row packed before it, or on being packed."""
    first, other, row = ([1, 2, 3], [3, 1, 1], [3, 1, 2, 0])

    def states(*rows: list[int]) -> Tensor:
        batch = collate([_row(ids) for ids in rows], "text", student.vocab_size, packed=True)
        return student.hidden_states(batch.to(device))[1 - len(row) :]

    was_training = student.training
    student.eval()  # Dropout would make the same row differ.
    try:
        found, beside, alone = states(first, row), states(other, row), states(row)
    finally:
        student.train(was_training)
    if (leak := _distance(found, beside)) > LEAK:
        return f"a row's hidden states change by {leak:.2g} of their size with the row before it"
    exact = student.compute_dtype not in HALF
    if exact and (moved := _distance(found, alone)) > MISPLACED:
        return f"a packed row's hidden states differ by {moved:.2g} of their size from it alone"
    return None


def _distance(found: Tensor, expected: Tensor) -> float:
    size = expected.abs().max().clamp_min(1e-6)
    return float(((found - expected).abs().max() / size).nan_to_num(torch.inf))


def _row(ids: list[int]) -> Row:
    tokens = torch.tensor(ids, dtype=torch.int32).numpy()
    return Row(0, 0, tokens[:1], tokens[1:])
