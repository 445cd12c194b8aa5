"""Which weights of the student wrote which tokens of an answer.

A version is the number of optimizer steps that the weights had finished. It is kept in the answer's
``finish_reason``, since stored segments have no other column for it and stay readable to earlier
releases: ``stop/12`` where one version wrote all tokens, ``stop/12+40:13`` where version 13 wrote
those from token 40 on, because newer weights came while the answer was being written.

Legend: T response tokens.
"""

import numpy as np
import pyarrow as pa

Spans = tuple[tuple[int, int], ...]
"""First token and version of each span, ascending; the first one begins at token 0."""
SEPARATOR, NEXT, FROM = "/", "+", ":"


def with_spans(reason: str, spans: Spans) -> str:
    """The reason with the versions that wrote the answer."""
    (_, first), *later = spans
    return SEPARATOR.join([reason, NEXT.join([str(first), *(f"{t}{FROM}{v}" for t, v in later)])])


def split_reason(text: str | None) -> tuple[str | None, Spans]:
    """The plain reason, and the spans; no spans where the teacher wrote the answer."""
    reason, separator, told = (text or "").partition(SEPARATOR)
    if not separator:
        return text, ()
    first, *later = told.split(NEXT)
    spans = [tuple(map(int, part.split(FROM))) for part in later]
    return reason, ((0, int(first)), *((token, version) for token, version in spans))


def versions_of(spans: Spans, num_tokens: int) -> np.ndarray:
    """The version that wrote each token, int32 [T]; [0] without spans."""
    if not spans:
        return np.empty(0, np.int32)
    starts, versions = np.array(spans, np.int64).T
    lengths = np.diff(np.append(np.minimum(starts, num_tokens), num_tokens))
    return np.repeat(versions, lengths).astype(np.int32)


def token_versions(spans: list[Spans], response_ids: pa.ChunkedArray) -> pa.Array:
    """The version of each token of each answer, int32 [T] lists; empty where the teacher wrote."""
    lengths = response_ids.combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    versions = [versions_of(each, int(n)) for each, n in zip(spans, lengths, strict=True)]
    return pa.array(versions, pa.list_(pa.int32()))
