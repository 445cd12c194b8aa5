"""The base of every configuration model, and the two marks a field can carry."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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
