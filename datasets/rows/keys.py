"""Keys of the teacher store: a 16-byte hash of what was asked of which teacher.

A key covers what decides the teacher's distribution over answers: teacher, precision, sampling
settings, prompt and sample number. It does not cover how the answer is fetched or stored: signal,
K, engine version, parallelism, seed. A response that came with its prompt was not sampled, so its
key covers the response in place of the sampling settings.
"""

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from raystill.datasets.rows.schema import KEY_BYTES

KEY_VERSION = 1
"""Part of every key: raising it makes all stored answers unreachable."""


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
) -> list[bytes]:
    """The ``answer_key`` of each of many prompts of one teacher."""
    request = {
        "version": KEY_VERSION,
        "teacher": teacher_identity,
        "dtype": dtype,
        "quantization": quantization,
        "sampling": {name: _canonical(value) for name, value in sampling.items()},
        "sample": sample,
    }
    return _keys(request, (_bytes(ids) for ids in prompts))


def given_keys(
    teacher_identity: str,
    dtype: str,
    quantization: str | None,
    prompts: Iterable[np.ndarray],
    responses: Iterable[np.ndarray],
) -> list[bytes]:
    """Keys of responses ``[T]`` that came with their prompts ``[P]`` and are to be scored."""
    request = {
        "version": KEY_VERSION,
        "teacher": teacher_identity,
        "dtype": dtype,
        "quantization": quantization,
        "response": "given",
    }
    pairs = zip(prompts, responses, strict=True)
    # The prompt's length comes first: else moving a token from prompt to response kept the key.
    return _keys(request, (len(p).to_bytes(8, "little") + _bytes(p) + _bytes(r) for p, r in pairs))


def _keys(request: dict[str, Any], contents: Iterable[bytes]) -> list[bytes]:
    """Hash of the request that all share, then of each content; the shared part is hashed once."""
    text = json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False)
    common = blake2b(text.encode() + b"\0", digest_size=KEY_BYTES)
    keys = []
    for content in contents:
        key = common.copy()
        key.update(content)
        keys.append(key.digest())
    return keys


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
