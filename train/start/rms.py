"""RMS norms of a student with fewer hidden units, so that they pass on what the teacher's do.

A norm divides by the root mean square of its input. The units that are kept are those with the
larger values: their mean square is above that of all of them, and what is left comes out too small.
So the norm's weight is multiplied by

    sqrt(mean over the kept units of q / mean over all units of q)
    q of a unit: sum over the texts' tokens of the square of its value / the token's mean square

which is measured in the pass by which the units are chosen (`width.choose_widths`). Gemma also
multiplies its embeddings by the root of the hidden size, which then is another.

Legend: D hidden units, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NEAR = 2e-2
"""How far a norm's output may be from the formula's, of numbers of about 1, also in 16 bits."""


@torch.no_grad()
def offset_of(norm: Any) -> float | None:
    """What an RMS norm adds to its weight: 1 in Gemma, else 0; None: it computes something else."""
    own = norm.weight
    tried = torch.linspace(-1.0, 2.0, len(own), device=own.device)[None].to(own.dtype)
    wide = tried.float()
    plain = wide * wide.square().mean().rsqrt()
    made, kept = [], own.data
    try:
        for value in (0.0, 1.0):
            own.data = torch.full_like(kept, value)
            made.append(norm(tried).float())
    except (TypeError, RuntimeError):  # It takes more than states.
        return None
    finally:
        own.data = kept
    for offset in (0.0, 1.0):
        expected = [(offset + value) * plain for value in (0.0, 1.0)]
        if all(
            torch.allclose(one, wanted, rtol=NEAR, atol=NEAR)
            for one, wanted in zip(made, expected, strict=True)
        ):
            return offset
    return None


def unit_shares(states: Tensor, count: Tensor) -> Tensor:
    """q of each unit [D]. states: inputs of a norm [T, D]; count: how often each occurs [T, 1]."""
    squares = states.float().square()
    means = squares.mean(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (squares / means * count).sum(0)


def factor(shares: Tensor, kept: list[int]) -> float:
    """By which a norm's weight is multiplied, where these units are kept. shares: `unit_shares`."""
    return float((shares[kept].mean() / shares.mean()).sqrt())


@torch.no_grad()
def scale_norms(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Multiplies what these norms, by their names in ``model``, pass on; in place."""
    for name, by in factors.items():
        norm: Any = model.get_submodule(name)
        offset = offset_of(norm)
        assert offset is not None, "only RMS norms are measured"
        norm.weight.copy_((norm.weight.float() + offset) * by - offset)


@torch.no_grad()
def keep_embedding_scale(smaller: Any, teacher: Any) -> None:
    """Makes up for another factor of the embeddings, by their weights, in place.

    Where the output head has the same weights, the norm before it takes that back.
    """
    embeddings = smaller.get_input_embeddings()
    own = getattr(embeddings, "embed_scale", None)
    final = getattr(smaller.get_decoder(), "norm", None)
    if not isinstance(own, Tensor) or final is None:
        return
    by = float(teacher.get_input_embeddings().embed_scale) / float(own)
    embeddings.weight.mul_(by)
    if smaller.get_output_embeddings().weight is embeddings.weight:
        name = next(name for name, module in smaller.named_modules() if module is final)
        scale_norms(smaller, {name: 1 / by})
