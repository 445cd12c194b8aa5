"""How the student's rows attend: which kernel, and whether a micro-batch is one packed sequence.

`sharding.place_student` resolves both once, when model, device and precision are known. Packed, the
rows of a micro-batch stand one behind the other in a single sequence, each with positions from 0,
and no row sees another: FlashAttention is told where rows begin and works row by row; the others
get a mask of S x S, which costs time and memory with the square of the whole micro-batch, so that
there padded rows of like length are the cheaper form.

Legend: B rows, S length of the sequence, D hidden size.
"""

from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from raystill.train.batch import Row, collate
from raystill.train.student_module import StudentModule, has_attention_cap

FLASH = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
}
HALF = (torch.bfloat16, torch.float16)
UNPACKABLE = ("chunked_attention", "linear_attention", "mamba", "conv")
"""Layer types whose state or bounds run through the sequence, not the row."""
LEAK = 0.03
"""Share of a hidden state's size that rounding to bfloat16 may change in a packed pass."""


def resolve_attention(name: str, model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """The ``attn_implementation`` that transformers is told.

    auto: FlashAttention where it is installed and can run, else what the model in a `StudentModule`
    has (SDPA, or eager where a cap needs it). Raises ValueError where the named one cannot run
    here.
    """
    if name == "auto":
        runs = device.type == "cuda" and dtype in HALF and model._supports_flash_attn
        installed = [kernel for kernel, is_available in FLASH.items() if is_available()]
        return installed[-1] if runs and installed else model.config._attn_implementation
    if name == "sdpa" and has_attention_cap(model):
        raise ValueError(
            f"training.attention is sdpa, which leaves out the cap that {type(model).__name__} "
            "puts on its attention's logits; set training.attention: auto"
        )
    if name in FLASH:
        if device.type != "cuda" or dtype not in HALF:
            raise ValueError(
                f"training.attention is {name}, but the student runs on {device.type} in {dtype}; "
                "FlashAttention needs a GPU and bfloat16; set training.attention: auto"
            )
        if not FLASH[name]():
            raise ValueError(
                f"training.attention is {name}, but its package does not import on this worker; "
                "install flash-attn in the workers' environment, or set training.attention: auto"
            )
    return name


def resolve_packing(packing: bool | str, attention: str, model: Any) -> bool:
    """Whether micro-batches are packed; auto: where FlashAttention makes that the cheaper form.

    Raises ValueError where it is wanted and the model's layers would mix rows.
    """
    if packing == "auto":
        packing = attention.startswith("flash") and not _mixing_layers(model)
    elif packing and (mixing := _mixing_layers(model)):
        raise ValueError(
            f"training.packing is true, but {type(model).__name__} has layers of type "
            f"{', '.join(mixing)}, which carry state across packed rows; set training.packing: auto"
        )
    return bool(packing)


@torch.no_grad()
def require_separate_rows(student: StudentModule, device: torch.device) -> None:
    """Compares two rows packed with the same rows alone; ValueError where they differ."""
    rows = [_row(0, [1, 2, 3]), _row(1, [3, 1, 2, 0])]
    packed, *alone = (
        student.hidden_states(collate(part, "text", student.vocab_size, packed=True).to(device))
        for part in (rows, rows[:1], rows[1:])
    )
    expected = torch.cat(alone)
    difference = (packed - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not difference <= LEAK:
        raise ValueError(
            f"hidden states of packed rows differ from those of the rows alone by "
            f"{float(difference):.2g} of their size; expected at most {LEAK}: "
            f"{type(student.model).__name__} lets packed rows see each other; set "
            "training.packing: false"
        )


def _mixing_layers(model: Any) -> list[str]:
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return sorted(kinds & set(UNPACKABLE))


def _row(number: int, ids: list[int]) -> Row:
    tokens = torch.tensor(ids, dtype=torch.int32).numpy()
    return Row(number, number, tokens[:1], tokens[1:])
