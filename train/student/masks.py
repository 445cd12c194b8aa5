"""What transformers is told of a micro-batch, so that it makes a mask [S, S] only for packed rows.

Without a mask, plain causal attention has a kernel of its own, whose memory does not grow with the
square of S. transformers finds out by itself whether rows are packed: it looks into the positions.
The host waits for a GPU meanwhile, and a compiled graph cannot look, so it always makes the mask. A
`StudentModule` knows beforehand.

Legend: S length of a sequence.
"""

from typing import Any

from torch import Tensor
from transformers import masking_utils

_find_packed_rows: Any = getattr(masking_utils, "find_packed_sequence_indices", None)


class KnownRows:
    """What is known of the rows of the forward pass that runs; ``packed`` None: nothing."""

    packed: bool | None = None


ROWS = KnownRows()


def tell_transformers() -> None:
    """From now on transformers asks ``ROWS`` first. Other versions than the one known go on alone.

    Also, torch below version 2.14 says of each compilation that it is an export, for which
    transformers always makes a mask; in this process nothing is exported.
    """
    if _find_packed_rows is not None and hasattr(masking_utils, "is_torchdynamo_exporting"):
        masking_utils.find_packed_sequence_indices = _packed_rows
        masking_utils.is_torchdynamo_exporting = _is_exporting


def _packed_rows(position_ids: Tensor) -> Tensor | None:
    known_apart = ROWS.packed is not None and not ROWS.packed
    return None if known_apart else _find_packed_rows(position_ids)


def _is_exporting() -> bool:
    return False
