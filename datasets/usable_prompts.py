"""Which of the prompts that were read can become rows, and why the others cannot.

Legend: P prompt tokens, T response tokens.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from raystill.cluster.problems import config_error
from raystill.datasets.read_prompts import RawPrompt
from raystill.serve.sampling import resolve_sampling

if TYPE_CHECKING:
    from raystill.cluster.config import RunConfig
    from raystill.datasets.tokenise import PromptTokeniser

UNBOUNDED = 2**31 - 1


@dataclass
class UsablePrompts:
    """What was read, tokenised, and sorted. Lists are by prompt, in the order read.

    ``ids``: int32 [P]. ``responses``: int32 [T] where the prompt came with a response, else None.
    ``kept``: which prompts are usable and no duplicates. ``dropped`` counts the unusable ones by
    reason; ``first_dropped`` says where the first of each was.
    """

    raws: list[RawPrompt]
    ids: list[np.ndarray]
    responses: Sequence[np.ndarray | None]
    kept: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0


def sort_prompts(
    raws: list[RawPrompt],
    config: "RunConfig",
    tokeniser: "PromptTokeniser",
    max_prompt_tokens: int,
    context_tokens: int = UNBOUNDED,
) -> UsablePrompts:
    """Tokenise and sort. Raises ConfigError with everything that is wrong.

    A prompt of more than ``max_prompt_tokens`` is dropped as ``too_long``, one of no tokens as
    ``empty``. A response that came with its prompt is dropped as ``empty_response`` if nothing is
    in it, as ``response_too_long`` if both together are more than ``context_tokens``. A duplicate
    asks the same as an earlier row, or has a prompt that a held-out source has too: that must not
    be trained on, whichever was read first and whatever response it came with.
    """
    ids = tokeniser.encode_many(raws)
    found = UsablePrompts(raws, ids, _encode_responses(raws, config, tokeniser))
    sources = set(config.evaluation.held_out_sources)
    held_out = {digest_of(ids[i]) for i, raw in enumerate(raws) if raw.source in sources}
    seen: set[bytes] = set()
    for index, (prompt, response) in enumerate(zip(ids, found.responses, strict=True)):
        reason = _why_unusable(prompt, response, max_prompt_tokens, context_tokens)
        if reason is not None:
            found.dropped[reason] += 1
            tokens = len(prompt) + (0 if response is None else len(response))
            found.first_dropped.setdefault(reason, f"{raws[index].where}: {tokens} tokens")
            continue
        digest = digest_of(prompt, response)
        trained = raws[index].source not in sources
        if digest in seen or (held_out and trained and digest_of(prompt) in held_out):
            found.duplicates += 1
            continue
        seen.add(digest)
        found.kept.append(index)
    return found


def _encode_responses(
    raws: list[RawPrompt], config: "RunConfig", tokeniser: "PromptTokeniser"
) -> Sequence[np.ndarray | None]:
    responses: list[np.ndarray | None] = [None] * len(raws)
    given = [index for index, raw in enumerate(raws) if raw.response is not None]
    if not given:
        return responses
    stop_ids = resolve_sampling(config.teacher, tokeniser.folder).stop_token_ids
    if not stop_ids:
        raise config_error(
            "teacher.sampling.stop_token_ids",
            "is empty, and prompts.response_field is set: a response ends with a stop token; set "
            "it to the ids that end an answer of the teacher",
        )
    texts = [raws[index].response or "" for index in given]
    for index, ids in zip(given, tokeniser.encode_responses(texts, stop_ids), strict=True):
        responses[index] = ids
    return responses


def _why_unusable(
    prompt: np.ndarray, response: np.ndarray | None, max_prompt_tokens: int, context_tokens: int
) -> str | None:
    if len(prompt) == 0:
        return "empty"
    if len(prompt) > max_prompt_tokens:
        return "too_long"
    if response is None:
        return None
    if len(response) == 0:
        return "empty_response"
    return "response_too_long" if len(prompt) + len(response) > context_tokens else None


def digest_of(prompt: np.ndarray, response: np.ndarray | None = None) -> bytes:
    """What two rows that ask the same have in common; without a response: of the same prompt."""
    digest = blake2b(prompt.tobytes(), digest_size=16)
    if response is not None:
        digest.update(b"\0" + len(prompt).to_bytes(8, "little") + response.tobytes())
    return digest.digest()
