"""What a model does to its logits after the output head, by its configuration.

`cluster.check_models` asks before anything is started, `student_module` when the student is built.
Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Cohere, Falcon H1 and Muse Glimmer multiply the logits by theirs."""


@dataclass(frozen=True)
class LogitTransform:
    """logits = cap(scale x (hidden W^T + bias)), where cap(z) = softcap tanh(z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


UNCHANGED = LogitTransform()


def logit_transform(config: Mapping[str, Any]) -> LogitTransform:
    """The transform of a (text) model with this ``config.json``.

    Raises ValueError where a setting is none that logits can be transformed by.
    """
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _positive(config, name) or 1.0
    scaling = _positive(config, "logits_scaling") or 1.0
    # Granite divides by what HyperCLOVA X multiplies by.
    multiplies = str(config.get("model_type", "")).startswith("hyperclovax")
    scale = scale * scaling if multiplies else scale / scaling
    return LogitTransform(scale, _positive(config, "final_logit_softcapping"))


def _positive(config: Mapping[str, Any], name: str) -> float | None:
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ValueError(
            f"{name} is {value!r}; expected a number above 0, by which logits are scaled or capped "
            "after the head; choose another model"
        )
    return float(value)
