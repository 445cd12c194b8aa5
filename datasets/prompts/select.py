"""Which of the prompts that were read can become rows, and why the others cannot.

Legend: P prompt tokens, T response tokens.

Weights of sources: how many samples of each training prompt an epoch asks for.

Plain arithmetic between the split of the prompts and their table. A source of weight w has
round(w x ``samples_per_prompt`` x its prompts) rows an epoch: whole passes over its prompts, one
for each sample number from 0, and for the rest one further sample of some of them. Which these are
follows from the root seed, the source's name and the prompt alone, so a larger weight asks for
everything a smaller one does, and a further prompt hardly changes the choice.

Legend: P training prompts, N training rows.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raystill.base.errors import ConfigError, Problem, config_error
from raystill.config.prompts import PromptsConfig
from raystill.datasets.prompts.read import RawPrompt
from raystill.model.sampling import resolve_sampling

if TYPE_CHECKING:
    from raystill.config.run import RunConfig
    from raystill.datasets.prompts.tokenise import PromptTokeniser


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


def samples_asked(
    prompts: PromptsConfig, seed: int, ids: Sequence[np.ndarray], sources: Sequence[str]
) -> NDArray[np.int64]:
    """Samples to ask of each training prompt, int64 [P]; ``ids`` and ``sources`` are theirs.

    Raises ConfigError where a source has prompts and its weight makes no row of them.
    """
    samples = np.full(len(ids), prompts.samples_per_prompt, dtype=np.int64)
    names = np.array(sources, dtype=object)
    problems = []
    for number, source in enumerate(prompts.sources or ()):
        mine = np.flatnonzero(names == source.name)
        if not len(mine):
            continue
        each = source.weight * prompts.samples_per_prompt
        num_rows = math.floor(each * len(mine) + 0.5)
        if num_rows == 0:
            problems.append(
                Problem(
                    f"prompts.sources.{number}.weight",
                    f"is {source.weight:g}, which makes no row of the {len(mine)} training prompts "
                    f"of {source.name!r}; raise it, or remove the source",
                )
            )
        samples[mine], rest = divmod(num_rows, len(mine))
        if rest:
            ranks = [_rank(seed, source.name, ids[index]) for index in mine]
            first = sorted(range(len(mine)), key=ranks.__getitem__)[:rest]
            samples[mine[first]] += 1
    if problems:
        raise ConfigError(problems)
    return samples


def list_rows(samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The prompt and the sample number of each row, int64 [N]: all first samples, all second..."""
    passes = [np.flatnonzero(samples > number) for number in range(samples.max(initial=0))]
    numbers = [np.full(len(rows), number) for number, rows in enumerate(passes)]
    none = np.zeros(0, dtype=np.int64)
    return np.concatenate([none, *passes]), np.concatenate([none, *numbers])


def _rank(seed: int, name: str, prompt: np.ndarray) -> bytes:
    """Where a prompt stands among those of its source: the lowest are chosen first."""
    digest = blake2b(f"{seed} {name}".encode() + b"\0", digest_size=16)
    digest.update(np.ascontiguousarray(prompt, dtype="<i4").tobytes())
    return digest.digest()
