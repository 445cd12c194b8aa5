"""What the engine's workers kept (`capture`), as the signal of an ``Answer``.

Legend: T response tokens, K ids named for each token, D hidden size, V vocabulary.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from raystill.serve.answers import Answer, tail_logprob


def hidden_states(answer: Answer, blob: bytes, hidden_size: int) -> Answer:
    """A sampled answer with its hidden states: bfloat16 bits, uint16 [T, D]."""
    if answer.error is not None:
        return answer
    states = np.frombuffer(blob, "<u2").reshape(-1, hidden_size)
    assert len(states) == len(answer.response_ids)
    return replace(answer, hidden=states)


def scored_answer(
    response_ids: NDArray[np.int32],
    blob: bytes,
    kind: str,
    at: NDArray[np.int32] | None,
    *,
    width: int,
    vocab_size: int,
    hidden_size: int,
) -> Answer:
    """The signal of a given response; ``at``: the ids that were asked for, int32 [T, K]."""
    num_tokens = len(response_ids)
    answer = Answer(np.asarray(response_ids, np.int32))
    if kind == "text":
        return answer
    if kind == "hidden":
        unknown = np.full(num_tokens, np.nan, np.float32)
        return hidden_states(replace(answer, sampled_logprobs=unknown), blob, hidden_size)
    values = np.frombuffer(blob, "<f4")
    sampled, rest = values[:num_tokens], values[num_tokens:]
    if kind == "sampled":
        return replace(answer, sampled_logprobs=sampled)
    size = num_tokens * width
    if at is None:
        ids = rest[:size].view("<i4").reshape(num_tokens, width)
        logprobs = rest[size:].reshape(num_tokens, width)
        tail = tail_logprob(logprobs, vocab_size)
    else:
        ids, logprobs, tail = at, rest[:size].reshape(num_tokens, width), rest[size:]
    return replace(
        answer,
        sampled_logprobs=sampled,
        topk_ids=ids,
        topk_logprobs=logprobs,
        tail_logprob=tail,
    )
