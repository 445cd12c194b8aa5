"""What transformers is told of a micro-batch, so that it makes a mask [S, S] only for packed rows.

Without a mask, plain causal attention has a kernel of its own, whose memory does not grow with the
square of S. transformers finds out by itself whether rows are packed: it looks into the positions.
The host waits for a GPU meanwhile, and a compiled graph cannot look, so it always makes the mask. A
`StudentModule` knows beforehand. Some models do not show the positions to what makes the mask
(gpt-oss): packed rows would attend to each other.

Legend: S length of a sequence.
"""

import inspect
from typing import Any

from torch import Tensor
from transformers import masking_utils

_find_packed_rows: Any = getattr(masking_utils, "find_packed_sequence_indices", None)
_prepare: Any = getattr(masking_utils, "_preprocess_mask_arguments", None)


class KnownRows:
    """What is known of the rows of the forward pass that runs; ``packed`` None: nothing.

    positions: of packed rows, [1, S].
    """

    packed: bool | None = None
    positions: Tensor | None = None


ROWS = KnownRows()


def tell_transformers() -> None:
    """From now on transformers asks ``ROWS`` first. Other versions than the one known go on alone.

    Also, torch below version 2.14 says of each compilation that it is an export, for which
    transformers always makes a mask; in this process nothing is exported.
    """
    if _find_packed_rows is not None and hasattr(masking_utils, "is_torchdynamo_exporting"):
        masking_utils.find_packed_sequence_indices = _packed_rows
        masking_utils.is_torchdynamo_exporting = _is_exporting
    if _prepare is not None and list(inspect.signature(_prepare).parameters)[4] == "position_ids":
        masking_utils._preprocess_mask_arguments = _prepare_with_positions


def _packed_rows(position_ids: Tensor) -> Tensor | None:
    known_apart = ROWS.packed is not None and not ROWS.packed
    return None if known_apart else _find_packed_rows(position_ids)


def _prepare_with_positions(
    config: Any, embeds: Any, mask: Any, past: Any, position_ids: Tensor | None, *more: Any
) -> Any:
    positions = ROWS.positions if position_ids is None else position_ids
    return _prepare(config, embeds, mask, past, positions, *more)


def _is_exporting() -> bool:
    return False
