"""Base class of every configuration model, and the two kinds of field.

An `identity` field decides what a run computes: an existing run folder refuses another value. An
`operational` field decides where and how fast, and may change between restarts of one run.
"""

import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Kind = Literal["identity", "operational"]


class ConfigModel(BaseModel):
    """A configuration section. Unknown keys are errors; values cannot be changed once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def identity(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field whose change makes another run; an existing run folder refuses it."""
    return Field(default, json_schema_extra={"kind": "identity"}, **kwargs)


def operational(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field that may change between restarts of the same run."""
    return Field(default, json_schema_extra={"kind": "operational"}, **kwargs)


def day_of(value: Any) -> str | None:
    """``value`` as YYYY-MM-DD. ValueError where it is no day."""
    if value is None:
        return None
    try:  # YAML reads an unquoted 2025-01-31 as a date, and --set reads it as text.
        return date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError(f"is {value!r}; expected a day as YYYY-MM-DD, or null") from None


PositiveInt = Annotated[int, Field(gt=0)]


_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY = re.compile(rf"(?:[a-zA-Z0-9.-]{{1,253}}/)?{_LABEL}")
_LABEL_VALUE = re.compile(rf"!?(?:{_LABEL}|in\({_LABEL}(?:, ?{_LABEL})*\))")


def require_selector(selector: dict[str, str]) -> dict[str, str]:
    """Return the selector if Ray accepts it, else raise ValueError.

    Ray knows four forms of a value: ``x``, ``!x``, ``in(x, y)`` and ``!in(x, y)``. It would refuse
    another form only when the actor is placed.
    """
    for key, value in selector.items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
            raise ValueError(
                f"has {key}: {value!r}; expected a label (letters, digits, - _ . between them) and "
                "value, !value, in(a, b) or !in(a, b)"
            )
    return selector


LabelSelector = Annotated[dict[str, str], AfterValidator(require_selector)]
