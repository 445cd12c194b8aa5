"""A segment's footer: who answered which rows, and the checksums by which that is verified.

It is JSON in the Parquet metadata, with a checksum of its own. What holds that checksum and is not
what this version writes was written by a newer one, and is left alone.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import pyarrow as pa

from raystill.datasets.rows.schema import KEY_BYTES, SCHEMA_VERSION, TOKEN_IDS, signal_fields
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.reading import NewerSegment
from raystill.datasets.store.values import CHECKSUM_BYTES

FOOTER = b"raystill.segment"
AFTER_FINAL_NORM = "after the final norm"
WITH_TOKENIZER = " (tokenizer "
"""In the name of a teacher behind a service, before the model whose tokenizer reads its answers."""


def name_of_teacher(model: str, served: str | None = None) -> str:
    """A teacher's name in a store. served: the model of a service, which has written the answers;
    ``model`` is then the one whose tokenizer makes ids of them.
    """
    return model if served is None else f"{served}{WITH_TOKENIZER}{model})"


@dataclass(frozen=True)
class Origin:
    """The teacher and engine that answered, and the signal: the same for all rows of a segment.

    ``teacher`` is for people: its model, as `name_of_teacher` writes it.
    ``vocab_size`` is V of the teacher's logprobs, needed to compute the tail of a smaller K.
    ``hidden_is`` says which hidden state was stored; None for signals other than ``hidden``.
    """

    teacher_identity: str
    teacher: str
    engine: str
    engine_version: str
    dtype: str
    vocab_size: int
    signal: Signal
    hidden_is: str | None = None

    @property
    def tokenizer(self) -> str:
        """The model whose tokenizer the ids are of."""
        return self.teacher.partition(WITH_TOKENIZER)[2].removesuffix(")") or self.teacher

    def __post_init__(self) -> None:
        if self.signal.kind != "hidden":
            return
        if self.hidden_is not in (None, AFTER_FINAL_NORM):
            raise ValueError(
                f"its hidden states are those {self.hidden_is}; expected {AFTER_FINAL_NORM}"
            )
        object.__setattr__(self, "hidden_is", AFTER_FINAL_NORM)


@dataclass(frozen=True)
class Provenance:
    """The run that requested a group, and its purpose.

    ``scored``: the teacher scored responses that were there, and did not generate them.
    """

    run: str
    purpose: str  # "training" or "evaluation"
    scored: bool = False


@dataclass(frozen=True)
class Group:
    """One row group as the footer describes it: its origin run, row count and checksums."""

    run: str
    purpose: str
    rows: int
    checksums: dict[str, str]  # by column
    scored: bool = False

    @property
    def provenance(self) -> Provenance:
        """The run that requested it, and its purpose."""
        return Provenance(self.run, self.purpose, self.scored)


@dataclass(frozen=True)
class Footer:
    """A segment's description: its origin and its groups, in the order of the row groups."""

    origin: Origin
    groups: tuple[Group, ...]

    @property
    def rows(self) -> int:
        """Number of rows of all groups."""
        return sum(group.rows for group in self.groups)


@lru_cache(maxsize=64)
def segment_schema(signal: Signal) -> pa.Schema:
    """Columns of a segment: the key, the prompt, the answer, the signal."""
    return pa.schema(
        [
            pa.field("key", pa.binary(KEY_BYTES)),
            pa.field("prompt_ids", TOKEN_IDS),
            pa.field("response_ids", TOKEN_IDS),
            pa.field("finish_reason", pa.string()),
            *signal_fields(signal),
        ]
    )


def footer_of(metadata: dict[bytes, bytes], name: str) -> Footer:
    """The footer in a file's metadata.

    Raises NewerSegment, or one of READ_ERRORS if it is not what was written.
    """
    if FOOTER not in metadata:
        raise ValueError("it has no footer of a segment")
    footer = json.loads(metadata[FOOTER])
    # Checked before the checksum, which another version may compute in another way.
    version = footer.get("schema_version")
    if version != SCHEMA_VERSION:
        ours = {key: footer[key] for key in ("origin", "groups") if key in footer}
        ours["schema_version"] = SCHEMA_VERSION
        if footer.get("footer_checksum") == footer_checksum(ours):
            raise ValueError(
                f"its schema version was altered: all else of its footer is of {SCHEMA_VERSION}"
            )
        raise NewerSegment(
            name, f"it has schema version {version!r}; this version reads {SCHEMA_VERSION}"
        )
    if not _is_as_written(metadata[FOOTER], footer.pop("footer_checksum"), footer):
        raise ValueError("its footer is not what was written (checksum)")
    try:  # The checksum holds: an unknown field or value was written by a newer version.
        return _parse_footer(footer)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NewerSegment(
            name,
            f"its footer, of schema version {version}, says what this version does not know: "
            f"{reason_of(error)}",
        ) from error


def _is_as_written(text: bytes, written: Any, footer: dict[str, Any]) -> bool:
    """Whether a footer has the checksum that its text says; ``footer``: the text without it."""
    # `encode` has hashed this very text. Making it again takes longer than parsing it.
    hashed = text.replace(f'"footer_checksum": {json.dumps(written)}, '.encode(), b"", 1)
    return written == _hash(hashed) or written == footer_checksum(footer)


def footer_checksum(footer: dict[str, Any]) -> str:
    """Checksum (blake2b-64, hexadecimal) of a footer, which it does not contain yet."""
    return _hash(json.dumps(footer, sort_keys=True).encode())


def _hash(text: bytes) -> str:
    return blake2b(text, digest_size=CHECKSUM_BYTES).hexdigest()


def _parse_footer(footer: dict[str, Any]) -> Footer:
    """The footer as objects. Raises ValueError, KeyError or TypeError at anything unknown."""
    origin, signal = footer["origin"], footer["origin"].pop("signal")
    # Segments from before ``hidden`` was added have ``top_k`` in place of ``width``.
    width = signal.get("width", signal.get("top_k", 0))
    parsed = Footer(
        origin=Origin(signal=Signal(signal["kind"], width), **origin),
        groups=tuple(Group(**group) for group in footer["groups"]),
    )
    known = set(segment_schema(parsed.origin.signal).names)
    _require_types(parsed)
    for group in parsed.groups:
        if unexpected := known ^ set(group.checksums):
            raise ValueError(f"it has other columns ({', '.join(sorted(unexpected))})")
    return parsed


def _require_types(footer: Footer) -> None:
    """Raises TypeError for a value that would be none of its kind where it is used."""
    origin = footer.origin
    texts = [origin.teacher_identity, origin.teacher, origin.engine]
    texts += [origin.engine_version, origin.dtype]
    numbers = [origin.vocab_size, origin.signal.width]
    for group in footer.groups:
        texts += [group.run, group.purpose, *group.checksums.values()]
        numbers.append(group.rows)
        if type(group.scored) is not bool:
            raise TypeError(f"scored is {str(group.scored)[:80]!r}")
    for text in texts:
        if type(text) is not str:
            raise TypeError(f"{str(text)[:80]!r} is no text")
    for number in numbers:
        if type(number) is not int or not 0 <= number < 2**63:
            raise TypeError(f"{str(number)[:80]!r} is no number of rows, ids or columns")


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or its class where there is none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
