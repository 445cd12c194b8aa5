"""The base of every configuration model, and the two marks a field can carry."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Kind = Literal["identity", "operational"]


class ConfigModel(BaseModel):
    """A configuration section: unknown keys are refused, values are frozen once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def identity(default: Any = ..., **kwargs: Any) -> Any:
    """A field whose change makes another run (refused in an existing run folder)."""
    return Field(default, json_schema_extra={"kind": "identity"}, **kwargs)


def operational(default: Any = ..., **kwargs: Any) -> Any:
    """A field that may change between restarts of the same run."""
    return Field(default, json_schema_extra={"kind": "operational"}, **kwargs)


PositiveInt = Annotated[int, Field(gt=0)]


_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY = re.compile(rf"(?:[a-zA-Z0-9.-]{{1,253}}/)?{_LABEL}")
_LABEL_WISH = re.compile(rf"!?(?:{_LABEL}|in\({_LABEL}(?:, ?{_LABEL})*\))")


def require_selector(selector: dict[str, str]) -> dict[str, str]:
    """The selector, if Ray would take it: a value, ``!value``, ``in(a, b)`` or ``!in(a, b)``."""
    for key, wish in selector.items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_WISH.fullmatch(wish):
            raise ValueError(
                f"has {key}: {wish!r}; expected a label (letters, digits, - _ . between them) and "
                "value, !value, in(a, b) or !in(a, b)"
            )
    return selector


LabelSelector = Annotated[dict[str, str], AfterValidator(require_selector)]
