"""Attention of packed rows on a CPU: PyTorch's SDPA of one row after the other.

SDPA alone would need padded rows, or for packed ones a mask [N, N]. Here it gets the rows by
themselves, as FlashAttention on a GPU does, so linear layers see no padding. What several rows of a
micro-batch begin with is in it once (`batch.beginnings`): its queries, keys and values are read
again for each of these rows, everything else of it is computed once.

Rows in 16 bits of up to ``FLOAT32_ROW`` tokens are multiplied in float32: SDPA's backward pass in
bfloat16 takes two and a half times as long on rows of a hundred tokens, and as long on rows of 512
(docs/decisions.md).

Legend: H query heads, G key and value heads, N positions of a micro-batch, M tokens of its rows one
behind the other, D size of a head, B rows.
"""

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from raystill.train.student.masks import ROWS

ROW_BY_ROW = "raystill_row_by_row"
FLOAT32_ROW = 512
"""Tokens of the longest row that is multiplied in float32 though the model is in 16 bits."""


class OwnMaskError(ValueError):
    """A layer gives a mask for packed rows, for which transformers was told to make none."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    row_places: Tensor | None = None,
    row_firsts: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it: query [B, H, N, D], key and value [B, G, N, D] to
    [B, N, H, D].

    cu_seq_lens_q: int [B + 1], where each row begins among the M tokens, and the end; without it
    this is SDPA with ``attention_mask``; a mask for several rows raises OwnMaskError. row_places:
    int64 [M], the position of each of these tokens; None: they are in order, and M is N.
    row_firsts: as `first_places` gives them.
    """
    if cu_seq_lens_q is None or (attention_mask is not None and len(cu_seq_lens_q) == 2):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **more
        )
    if attention_mask is not None:
        raise OwnMaskError(
            f"{type(module).__name__} makes a mask of its own, which attention row by row would "
            "leave out"
        )
    rows = list(pairwise(cu_seq_lens_q.tolist()))
    dtype, parts = value.dtype, [query, key, value]
    if row_places is not None:
        parts = [part.index_select(2, row_places) for part in parts]
    longest = max(end - start for start, end in rows)
    precision: Any = nullcontext()
    if dtype.itemsize == 2 and longest <= FLOAT32_ROW:
        parts = [part.float() for part in parts]
        precision = torch.autocast(query.device.type, enabled=False)
    with precision:
        made = []
        for start, end in rows:
            q, k, v = (part[:, :, start:end] for part in parts)
            grouped = q.shape[1] != k.shape[1]
            made.append(
                scaled_dot_product_attention(
                    q, k, v, None, dropout, is_causal=True, scale=scaling, enable_gqa=grouped
                )
            )
    found = torch.cat(made, dim=2).to(dtype)
    if row_firsts is not None:
        found = found.index_select(2, row_firsts)
    return found.transpose(1, 2).contiguous(), None


def first_places(row_places: Tensor) -> Tensor:
    """For each of the N positions the first of the M tokens that is there, int64 [N]."""
    return torch.from_numpy(np.unique(row_places.numpy(), return_index=True)[1])


def _mask(*given: Any, **more: Any) -> Tensor | None:
    """SDPA's mask, but none for packed rows: `attend` takes them apart."""
    return None if ROWS.packed else sdpa_mask(*given, **more)


def why_not_row_by_row(model: Any, device: torch.device, compiled: bool) -> str | None:
    """The reason why this model's attention cannot be computed so here; None: it can."""
    config = model.config.get_text_config()
    if device.type != "cpu" or compiled:
        return "it is for a CPU and a student that is not compiled"
    if model.config._attn_implementation != "sdpa":
        return f"{type(model).__name__} does not attend by SDPA"
    window = getattr(config, "sliding_window", None)
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if other or (window and getattr(config, "use_sliding_window", True)):
        return f"{type(model).__name__} has layers that do not attend to the whole row"
    return None


AttentionInterface.register(ROW_BY_ROW, attend)
AttentionMaskInterface.register(ROW_BY_ROW, _mask)
