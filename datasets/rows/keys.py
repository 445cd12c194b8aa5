"""Keys of the teacher store: a 16-byte hash of what was asked of which teacher.

A key covers what decides the teacher's distribution over answers: teacher, precision, sampling
settings, engine arguments, prompt and sample number. It does not cover how the answer is fetched or
stored: signal, K, engine version, parallelism, seed. A response that came with its prompt was not
sampled, so its key covers the response in place of the sampling settings.

A setting that is new since version 1 of the keys is hashed only where it differs from its default.
So a run that leaves it alone finds the answers that were stored before the setting existed.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.datasets.rows.schema import KEY_BYTES, PROMPT_SCHEMA, TEACHER, prompt_schema

KEY_VERSION = 1
"""Part of every key: raising it makes all stored answers unreachable."""

ROWS_PER_BATCH = 10_000
ROWS_PER_CHUNK = 10_000
"""Rows of a table's columns that lie together. While they are made they are in memory twice, and a
list's offsets have 32 bits, so their tokens must be fewer."""


@dataclass(frozen=True)
class KeyedEngine:
    """Settings of the engine that change answers. With its defaults it changes no key.

    arguments: engine arguments that may change answers and differ from vLLM's defaults.
    max_model_len: most tokens of prompt and answer together, where the run allows fewer than the
    model does; None where the model's own context is the limit, which its identity covers.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    max_model_len: int | None = None

    def in_key(self) -> dict[str, Any]:
        """The part of a key's request that all prompts share; empty with the defaults."""
        return {"engine_args": _plain(self.arguments)} if self.arguments else {}


DEFAULT_ENGINE = KeyedEngine()


def answer_key(
    teacher_identity: str,
    dtype: str,
    quantization: str | None,
    sampling: Mapping[str, Any],
    prompt_ids: np.ndarray,
    sample: int = 0,
) -> bytes:
    """Key (blake2b-128) of one answer to the prompt ``[P]``.

    ``sample`` numbers several answers to the same prompt. ``dtype`` and ``sampling`` must be
    resolved (no ``auto``, no unset value): a default and the same value spelled out then give the
    same key.
    """
    keys = answer_keys(teacher_identity, dtype, quantization, sampling, [prompt_ids], sample)
    return keys[0]


def answer_keys(
    teacher_identity: str,
    dtype: str,
    quantization: str | None,
    sampling: Mapping[str, Any],
    prompts: Iterable[np.ndarray],
    sample: int = 0,
    engine: KeyedEngine = DEFAULT_ENGINE,
) -> list[bytes]:
    """The ``answer_key`` of each of many prompts of one teacher.

    Where ``engine.max_model_len`` leaves an answer fewer tokens than ``max_tokens``, these are the
    ``max_tokens`` of its key: the limits have the same effect, and an answer that either has cut
    must not be served to a run that allows more.
    """
    request: dict[str, Any] = {
        "version": KEY_VERSION,
        "teacher": teacher_identity,
        "dtype": dtype,
        "quantization": quantization,
        "sampling": {name: _canonical(value) for name, value in sampling.items()},
        "sample": sample,
        **engine.in_key(),
    }
    most = sampling.get("max_tokens", math.inf)
    context = math.inf if engine.max_model_len is None else engine.max_model_len
    hashes = {most: _shared(request)}  # by the most tokens of an answer
    keys = []
    for ids in prompts:
        limit = min(most, context - len(ids))
        if limit not in hashes:
            cut = {**request["sampling"], "max_tokens": limit}
            hashes[limit] = _shared({**request, "sampling": cut})
        keys.append(_key(hashes[limit], _bytes(ids)))
    return keys


def given_keys(
    teacher_identity: str,
    dtype: str,
    quantization: str | None,
    prompts: Iterable[np.ndarray],
    responses: Iterable[np.ndarray],
    engine: KeyedEngine = DEFAULT_ENGINE,
) -> list[bytes]:
    """Keys of responses ``[T]`` that came with their prompts ``[P]`` and are to be scored."""
    request = {
        "version": KEY_VERSION,
        "teacher": teacher_identity,
        "dtype": dtype,
        "quantization": quantization,
        "response": "given",
        **engine.in_key(),
    }
    shared = _shared(request)
    # The prompt's length comes first: else moving a token from prompt to response kept the key.
    return [
        _key(shared, len(prompt).to_bytes(8, "little") + _bytes(prompt) + _bytes(response))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


@dataclass(frozen=True)
class Asked:
    """What the keys of all rows of one teacher share; see `answer_keys`."""

    teacher_identity: str
    dtype: str
    quantization: str | None
    sampling: Mapping[str, Any]
    engine: KeyedEngine = field(default=DEFAULT_ENGINE)


def with_keys(table: pa.Table, asked: Mapping[str, Asked], samples: NDArray[np.int64]) -> pa.Table:
    """The table with its ``key`` column.

    asked: by the name of the teacher; a table without the column `TEACHER` has one, named "".
    samples: the sample number of each row, int64 [N].
    """
    keys = np.zeros((len(table), KEY_BYTES), np.uint8)
    done = np.zeros(len(table), np.bool_)
    for name, one in asked.items():
        mine = _rows_of(table, name)
        _add_keys(keys, table, one, samples, mine)
        done |= mine
    assert done.all(), "rows of a teacher that is not asked have no keys"
    buffers = [None, pa.py_buffer(keys)]
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(table), buffers)
    schema = prompt_schema(table.column_names)
    return table.append_column(PROMPT_SCHEMA.field("key"), column).select(schema.names)


def _rows_of(table: pa.Table, teacher: str) -> NDArray[np.bool_]:
    """Which rows a teacher answers, bool [N]."""
    if TEACHER not in table.column_names:
        return np.ones(len(table), np.bool_)
    mine: NDArray[np.bool_] = pc.equal(table[TEACHER], teacher).to_numpy()
    return mine


def _add_keys(
    keys: NDArray[np.uint8],
    table: pa.Table,
    asked: Asked,
    samples: NDArray[np.int64],
    mine: NDArray[np.bool_],
) -> None:
    """Put the keys of the rows that are ``mine``, bool [N], into ``keys`` [N, KEY_BYTES]."""
    request = (asked.teacher_identity, asked.dtype, asked.quantization)
    given = table["response_ids"].is_valid().to_numpy()
    for sample in range(int(samples.max(initial=-1)) + 1):
        of_sample = np.flatnonzero(mine & ~given & (samples == sample))
        for rows in _batches(of_sample):
            prompts = _ids(table["prompt_ids"], rows)
            made = answer_keys(*request, asked.sampling, prompts, sample, asked.engine)
            keys[rows] = _as_bytes(made)
    for rows in _batches(np.flatnonzero(mine & given)):
        prompts, responses = (_ids(table[name], rows) for name in ("prompt_ids", "response_ids"))
        keys[rows] = _as_bytes(given_keys(*request, prompts, responses, asked.engine))


def _batches(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), ROWS_PER_BATCH):
        yield rows[start : start + ROWS_PER_BATCH]


def _as_bytes(keys: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def _ids(column: pa.ChunkedArray, rows: NDArray[np.int64]) -> Iterator[np.ndarray]:
    """The token ids of these rows, one row after the other; ``rows`` ascend."""
    first = 0
    for chunk in column.chunks:  # Arrow's `take` would copy the whole column.
        start, stop = np.searchsorted(rows, (first, first + len(chunk)))
        if start < stop:
            values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
            for row in rows[start:stop] - first:
                yield values[offsets[row] : offsets[row + 1]]
        first += len(chunk)


def prompt_digest(prompt_ids: np.ndarray) -> bytes:
    """Names a prompt [P] by its ids alone, 16 bytes."""
    return blake2b(_bytes(prompt_ids), digest_size=KEY_BYTES).digest()


def _shared(request: dict[str, Any]) -> blake2b:
    """The hash after the request, which many keys share."""
    text = json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return blake2b(text.encode() + b"\0", digest_size=KEY_BYTES)


def _key(shared: blake2b, content: bytes) -> bytes:
    key = shared.copy()
    key.update(content)
    return key.digest()


def _bytes(ids: np.ndarray) -> bytes:
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


def _canonical(value: Any) -> Any:
    """The same value for equal settings: 1 and 1.0 are equal, and a list of ids has no order."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float | np.number):
        number = float(value)
        return int(number) if number.is_integer() else number
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return sorted(_canonical(item) for item in value)
    return value


def _plain(value: Any) -> Any:
    """An engine argument in JSON's types. Lists keep their order, which may have a meaning."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Set):
        return sorted((_plain(item) for item in value), key=repr)
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else value
    return repr(value)  # what JSON lacks: infinity, a date
