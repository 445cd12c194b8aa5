"""Base class of every configuration model, and the two kinds of field.

An `identity` field decides what a run computes: an existing run folder refuses another value. An
`operational` field decides where and how fast, and may change between restarts of one run.
"""

import math
import re
from datetime import date
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from raystill.base.redact import SECRETS

Kind = Literal["identity", "operational"]


class ConfigModel(BaseModel):
    """A configuration section. Unknown keys are errors; values cannot be changed once validated."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_plain(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and not _takes_bool(annotation):
            raise ValueError(f"is {str(value).lower()}; expected no yes or no here")
        # A section looks at its own values, and names them; of a number that is not finite pydantic
        # says what was expected.
        section = isinstance(value, dict | list | tuple) and inner_model(annotation) is not None
        if not section and not (isinstance(value, float) and not math.isfinite(value)):
            require_plain(value)
        return value

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        SECRETS.learn(state.get("__dict__"))  # Unpickled, in a process that validates nothing.


def identity(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field whose change makes another run; an existing run folder refuses it."""
    return Field(default, json_schema_extra={"kind": "identity"}, **kwargs)


def operational(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field that may change between restarts of the same run."""
    return Field(default, json_schema_extra={"kind": "operational"}, **kwargs)


LARGEST_INTEGER, LARGEST_NUMBER = 2**63 - 1, 1e18


def require_plain(value: Any) -> None:
    """ValueError for a value that no setting has, however deep it lies in lists and mappings.

    Numbers are finite and of a size that 64 bits and a person can tell; text has no NUL and no half
    of a surrogate pair, which neither a file name nor UTF-8 can hold.
    """
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        elif isinstance(one, float) and not abs(one) <= LARGEST_NUMBER:  # NaN is in no order.
            raise ValueError(f"is {one:g}; expected a finite number up to {LARGEST_NUMBER:g}")
        elif isinstance(one, int) and abs(one) > LARGEST_INTEGER:
            raise ValueError("is an integer of more than 64 bits; expected a smaller one")
        elif isinstance(one, str) and ("\0" in one or any("\ud800" <= c <= "\udfff" for c in one)):
            raise ValueError("has a character that no text may have (NUL or half a surrogate pair)")


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """The section that a value of this type may be, or be a list of; None where it is neither."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(inner_model, get_args(annotation)) if m is not None), None)


def _takes_bool(annotation: Any) -> bool:
    """Whether true and false are values of a type."""
    if annotation in (bool, Any):
        return True
    parts = () if get_origin(annotation) in (dict, list, tuple) else get_args(annotation)
    return any(_takes_bool(part) for part in parts)


def day_of(value: Any) -> str | None:
    """``value`` as YYYY-MM-DD. ValueError where it is no day."""
    if value is None:
        return None
    try:  # YAML reads an unquoted 2025-01-31 as a date, and --set reads it as text.
        return date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError(f"is {value!r}; expected a day as YYYY-MM-DD, or null") from None


def why_no_pattern(pattern: str) -> str | None:
    """Why RE2 does not take a regular expression; None if it does."""
    import pyarrow as pa  # Late: a tenth of a second that most run files do not need.
    import pyarrow.compute as pc

    try:
        pc.match_substring_regex(pa.array([""]), pattern)
    except pa.ArrowException as error:
        return str(error).removeprefix("Invalid regular expression: ")
    return None


PositiveInt = Annotated[int, Field(gt=0)]
Resources = dict[Annotated[str, Field(min_length=1)], Annotated[float, Field(ge=0)]]
"""Custom Ray resources by name."""
Cores = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
"""Ids of CPU cores."""


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
