"""The name of an answer: what was asked of which teacher under which sampling, in 16 bytes.

A key holds everything that decides what an answer may be, and nothing that only decides how it
is fetched or stored (signal, K, engine version, parallelism, seed). A response that came with its
prompt was not drawn: its key holds the response in place of the sampling.
"""

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from raystill.datasets.rows.schema import KEY_BYTES

KEY_VERSION = 1


def answer_key(
    teacher_identity: str,
    dtype: str,
    quantization: str | None,
    sampling: Mapping[str, Any],
    prompt_ids: np.ndarray,
    sample: int = 0,
) -> bytes:
    """blake2b-128 of the teacher, its precision, the sampling, the prompt ``[P]`` and the sample.

    ``dtype`` and ``sampling`` are the resolved ones (no ``auto``, no unset value), so that a
    default that is spelled out names the same answer.
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
    """:func:`answer_key` of many prompts of one teacher."""
    asked = {
        "version": KEY_VERSION,
        "teacher": teacher_identity,
        "dtype": dtype,
        "quantization": quantization,
        "sampling": {name: _canonical(value) for name, value in sampling.items()},
        "sample": sample,
    }
    return _keys(asked, (_bytes(ids) for ids in prompts))


def given_keys(
    teacher_identity: str,
    dtype: str,
    quantization: str | None,
    prompts: Iterable[np.ndarray],
    responses: Iterable[np.ndarray],
) -> list[bytes]:
    """Keys of responses ``[T]`` that were given with their prompts ``[P]``, to be scored."""
    asked = {
        "version": KEY_VERSION,
        "teacher": teacher_identity,
        "dtype": dtype,
        "quantization": quantization,
        "response": "given",
    }
    pairs = zip(prompts, responses, strict=True)
    return _keys(asked, (len(p).to_bytes(8, "little") + _bytes(p) + _bytes(r) for p, r in pairs))


def _keys(asked: dict[str, Any], contents: Iterable[bytes]) -> list[bytes]:
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"), allow_nan=False)
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
    """One spelling of equal settings: 1 and 1.0 are the same, a list of ids has no order."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float | np.number):
        number = float(value)
        return int(number) if number.is_integer() else number
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return sorted(_canonical(item) for item in value)
    return value
