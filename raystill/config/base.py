"""Base class of every configuration model, the two kinds of field, and the section of a service.

An `identity` field decides what a run computes: an existing run folder refuses another value. An
`operational` field decides where and how fast, and may change between restarts of one run.
"""

import math
import re
from collections.abc import Iterable
from datetime import date
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from raystill.base.records import require_plain, require_sized
from raystill.base.redact import SECRETS, is_secret_name

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
        inside: Iterable[Any] = value if isinstance(value, list | tuple) else ()
        if isinstance(value, dict) and not section:
            inside = value.values()
        if any(isinstance(one, bool) for one in inside) and not _takes_bool(
            annotation, inside=True
        ):
            raise ValueError("has true or false in it; expected no yes or no there")
        if not section and not (isinstance(value, float) and not math.isfinite(value)):
            require_plain(value)
        return value

    @field_validator("*")
    @classmethod
    def _is_sized(cls, value: Any) -> Any:
        if isinstance(value, float):  # After the bounds of its own, which say more.
            require_sized(value)
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


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """The section that a value of this type may be, or be a list of; None where it is neither."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(inner_model, get_args(annotation)) if m is not None), None)


def maps_sections(annotation: Any) -> bool:
    """Whether a value of this type is a mapping of sections by name, or may be one."""
    if get_origin(annotation) is dict:
        return inner_model(annotation) is not None
    return any(maps_sections(part) for part in get_args(annotation))


def _takes_bool(annotation: Any, inside: bool = False) -> bool:
    """Whether true and false are values of a type; or ``inside`` of its lists and mappings."""
    if _takes(bool, annotation) or _takes(Any, annotation):
        return True
    return inside and any(_takes_bool(part, inside) for part in get_args(annotation))


def _takes(kind: Any, annotation: Any) -> bool:
    """Whether values of a kind are values of a type, itself and not in its lists and mappings."""
    if annotation is kind:
        return True
    parts = () if get_origin(annotation) in (dict, list, tuple) else get_args(annotation)
    return any(_takes(kind, part) for part in parts)


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


class PricesConfig(ConfigModel):
    """What a service charges for a million tokens, in one currency."""

    input: float = operational(ge=0, allow_inf_nan=False, description="Prompt tokens.")
    output: float = operational(
        ge=0, allow_inf_nan=False, description="Response tokens, those of its reasoning included."
    )
    cached_input: float | None = operational(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Prompt tokens from the service's cache. Default: as input.",
    )
    as_of: str | None = operational(
        None, description="Day on which the prices were read, YYYY-MM-DD; check tells it."
    )

    def times(self, factor: float) -> "PricesConfig":
        """The same prices, each so many times as high."""
        cached = None if self.cached_input is None else self.cached_input * factor
        prices = {"input": self.input * factor, "output": self.output * factor}
        return self.model_copy(update={**prices, "cached_input": cached})

    @field_validator("as_of", mode="before")
    @classmethod
    def _is_a_day(cls, value: Any) -> Any:
        return day_of(value)


class BatchConfig(ConfigModel):
    """Answers in batches (``/v1/batches``): cheaper, and hours later."""

    price_factor: float = operational(
        0.5, gt=0, le=1, description="Share of the prices that an answer in a batch costs."
    )
    max_rows: PositiveInt = operational(
        2000,
        le=50_000,
        description="Most rows of one batch. So many are asked for at a time, where "
        "stream.max_rows_ahead has room for them.",
    )
    gather_s: float = operational(
        30.0,
        gt=0,
        le=86_400,
        description="Seconds without a new row after which a batch is submitted that is not full.",
    )
    poll_s: float = operational(
        60.0,
        ge=0.01,
        le=86_400,
        description="Seconds between two looks at a batch that is not done.",
    )
    window: str = operational(
        "24h",
        pattern="^[0-9A-Za-z]{1,20}$",
        description="Time that the service is given for a batch, by its own name.",
    )


SET_FOR_IT = frozenset(
    {
        *("model", "messages", "n", "stream", "temperature", "top_p", "max_tokens"),
        *("max_completion_tokens", "logprobs", "top_logprobs", "stop"),
    }
)
"""Fields of a request in words that the run file sets elsewhere, or that would make its answer
another: several of them, or a stream."""
SET_BY_IDS = SET_FOR_IT | frozenset(
    {
        *("best_of", "echo", "logprob_token_ids", "logit_bias", "max_tokens", "min_tokens", "n"),
        *("prompt", "prompt_logprobs", "stream", "suffix", "truncate_prompt_tokens"),
        *("use_beam_search", "allowed_token_ids", "bad_words", "stop_token_ids", "ignore_eos"),
        *("structured_outputs", "response_format", "return_token_ids", "top_k", "min_p"),
    }
)
"""Fields of a request by ids that are set for it, or would make its answer another."""


LONGEST_URL = 2000
_HOST = re.compile(r"[\w.-]*\w[\w.-]*|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*")
"""A name (in any alphabet) or an address."""


def is_service(url: str) -> bool:
    """Whether it is http(s)://host[:port]/path with a host and a port that there may be."""
    if not (re.fullmatch(r"https?://[^\s@?#\\]+", url) and url.isprintable()):
        return False
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # Brackets that hold no address, a port that is no number or too high.
        return False
    return len(url) <= LONGEST_URL and port != 0 and _HOST.fullmatch(host) is not None


class ApiConfig(ConfigModel):
    """A teacher behind an OpenAI-compatible API: where it is, how fast and for how much."""

    base_url: str | None = identity(
        None,
        description="URL of the service, e.g. https://api.example.com/v1. Required with engine: "
        "api.",
    )
    model: str | None = identity(
        None, description="Name of the model at the service. Required with engine: api."
    )
    api_key_env: str | None = operational(
        "OPENAI_API_KEY",
        description="Name of the environment variable that holds the key; the key itself belongs "
        "into no file. null: the service wants none.",
    )
    extra_body: dict[str, Any] = identity(
        {},
        description="Further fields of each request, by the service's own names, e.g. "
        "{reasoning_effort: low}.",
    )
    ids: bool = identity(
        False,
        description="Whether the service is a vLLM server that is asked by token ids and answers "
        "with ids and logprobs, so that signal.kind sampled and topk, and scoring, can be had. It "
        "must have the tokenizer of teacher.model, which is compared when the teacher starts.",
    )
    top_logprobs: int | None = identity(
        None,
        ge=1,
        le=20,
        description="Asks a service for the log probabilities of so many tokens beside each token "
        "of its answers, so that signal.kind sampled and topk can be had. They are used as far as "
        "the service names tokens that are ids of the tokenizer of teacher.model. Default: the "
        "text alone.",
    )
    max_unmapped_mass: float = operational(
        0.05,
        ge=0,
        le=1,
        description="Most probability, in the mean over an answer's tokens, of tokens that the "
        "service names under top_logprobs and that are no ids of the tokenizer. It is in the "
        "tail; an answer with more is dropped.",
    )
    batch: BatchConfig | None = operational(
        None,
        description="Asks for answers in batches of many rows, which most services do at half the "
        "price within a day; {} for the defaults. Default: each row is asked for by itself.",
    )
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = operational(
        "max_tokens", description="The service's name of teacher.sampling.max_tokens."
    )
    max_concurrency: PositiveInt = operational(
        16, description="Most requests at a time. Fewer go after the service said: too many."
    )
    requests_per_minute: PositiveInt | None = operational(
        None, description="Most requests a minute. Default: as many as the service takes."
    )
    tokens_per_minute: PositiveInt | None = operational(
        None,
        description="Most tokens a minute, prompts and the longest answers together. Default: as "
        "many as the service takes.",
    )
    prices: PricesConfig | None = operational(
        None, description="Prices of a million tokens, with which spending is counted."
    )
    max_cost: float | None = operational(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Most that the run may spend over all its starts, in the currency of the "
        "prices. The run then ends, with all that is paid stored, and can be resumed with a higher "
        "one. Default: no limit.",
    )

    @field_validator("base_url")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        if value is not None and not is_service(value):
            raise ValueError(
                "is not the plain URL of a service; expected http(s)://host[:port]/path without "
                "name, password or query; keys belong into the variable that api_key_env names"
            )
        return value

    @field_validator("model")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not (value.strip() and value.isprintable()):
            raise ValueError(
                f"is {value!r}, which is blank or has characters that cannot be printed; set it to "
                "the name that the service gives its model"
            )
        return value

    @field_validator("api_key_env")
    @classmethod
    def _names_a_secret(cls, value: str | None) -> str | None:
        if value is not None and not (value.isidentifier() and is_secret_name(value)):
            raise ValueError(
                "is not the name of an environment variable for a secret; expected a name with "
                "KEY, TOKEN or SECRET in it, such as MY_API_KEY (its value is then kept out of "
                "logs); the key itself belongs into no file"
            )
        return value

    @model_validator(mode="after")
    def _is_asked_plainly(self) -> "ApiConfig":
        wrong = sorted(set(self.extra_body) & (SET_BY_IDS if self.ids else SET_FOR_IT))
        if wrong:
            by_ids = "would change what comes back by ids"
            raise ValueError(
                f"extra_body sets {', '.join(wrong)}, which "
                f"{by_ids if self.ids else 'the run sets itself, or would change the answer'}; "
                "leave it out, and set teacher.api.model or teacher.sampling instead"
            )
        return self

    @model_validator(mode="after")
    def _logprobs_come_in_one_way(self) -> "ApiConfig":
        if self.ids and self.top_logprobs is not None:
            raise ValueError(
                "has both ids and top_logprobs, but by ids the signal comes without tokens in "
                "words; leave top_logprobs out"
            )
        return self

    @model_validator(mode="after")
    def _batches_are_of_chats(self) -> "ApiConfig":
        if self.ids and self.batch is not None:
            raise ValueError(
                "has both ids and batch, but a vLLM server answers at once; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _budget_has_prices(self) -> "ApiConfig":
        if self.max_cost is not None and self.prices is None:
            raise ValueError(
                f"max_cost is {self.max_cost:g}, but without prices nothing is known of the cost; "
                "set prices: {input: ..., output: ...}"
            )
        return self
