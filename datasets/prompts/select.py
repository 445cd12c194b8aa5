"""Choose which prompts become rows, and how many samples an epoch asks of each.

First, :func:`sort_prompts` tokenises what was read and leaves out what is unusable or a duplicate.
Then, once training and held-out prompts are split, :func:`samples_asked` applies the weights of
the sources: a source of weight w has round(w x ``samples_per_prompt`` x its prompts) rows an epoch.
That is whole passes over its prompts, one for each sample number from 0, and one further sample of
some of them for the rest. The root seed, the source's name and the prompt alone decide which, so
that a larger weight asks for everything a smaller one does, and a new prompt hardly changes the
choice: answers in the teacher store stay useful.

The teacher may see more than the student: a system message, or documents. The student is then
trained on its own prompt, and its responses are those to the teacher's. A row's signal belongs to
response tokens, so nothing else changes: token t of the response has one distribution of the
teacher's after its prompt, and one of the student's after its own. `prompt_ids` of the prompt
tables are the teacher's, since the keys of answers are made of them, and what is stored is an
answer to them; `student_prompt_ids` is a further column.

Legend: P prompts or prompt tokens, T response tokens, N training rows.
"""

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raystill.base.errors import ConfigError, Problem, config_error
from raystill.config.prompts import PromptsConfig
from raystill.datasets.prompts.read import MAX_PROBLEMS_PER_FILE, RawPrompt
from raystill.model.sampling import resolve_sampling

if TYPE_CHECKING:
    from raystill.config.run import RunConfig
    from raystill.datasets.prompts.tokenise import PromptTokeniser

SYSTEM_ROLES = ("system", "developer")
UNBOUNDED = 2**31 - 1


@dataclass
class UsablePrompts:
    """The prompts that were read, tokenised; lists have an item for each, in the order read.

    ``ids``: the teacher's prompt tokens, int32 [P]. ``student_ids``: the student's; the same list
    where the teacher sees no more. ``views``: the prompts as the teacher reads them.
    ``responses``: int32 [T] where one is given, else None.
    ``kept``: indices of the prompts that are usable and no duplicates. ``dropped`` counts the
    unusable ones by reason, and ``first_dropped`` says where the first of each is.
    """

    raws: list[RawPrompt]
    views: list[RawPrompt]
    ids: list[np.ndarray]
    student_ids: list[np.ndarray]
    responses: Sequence[np.ndarray | None]
    kept: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0

    def why_none(self, max_prompt_tokens: int) -> str:
        """That no prompt is usable, why each was left out, and where the first of each kind is."""
        reasons = ", ".join(
            f"{number} {reason} (the first is {self.first_dropped[reason]})"
            for reason, number in sorted(self.dropped.items())
        )
        return (
            f"none of the {len(self.raws)} prompts can be used: {reasons}; a prompt has some text "
            f"and at most {max_prompt_tokens} tokens; correct them, or name other files"
        )


def sort_prompts(
    raws: list[RawPrompt],
    config: "RunConfig",
    tokeniser: "PromptTokeniser",
    max_prompt_tokens: int,
    context_tokens: int = UNBOUNDED,
) -> UsablePrompts:
    """Tokenise the prompts and leave out unusable ones and duplicates. Raises ConfigError.

    Dropped are: as ``too_long`` a prompt of more than ``max_prompt_tokens``, as ``empty`` one of no
    tokens, or of blank text, as ``empty_response`` a given response without text, and as
    ``response_too_long`` one that has more than ``context_tokens`` together with its prompt.

    A duplicate has the prompt, the given response and the teacher of an earlier row, or its prompt
    is in a held-out source too: that must not be trained on, whichever is read first and whatever
    response is given. Where the teacher sees more, rows with the same prompt of the teacher's are
    duplicates, held out are prompts of the student's, and both must be within the limits.
    """
    own = tokeniser.encode_many(raws)
    views, ids = raws, own
    if config.prompts.teacher_sees_more:
        views = [teacher_view(raw, config.prompts) for raw in raws]
        ids = tokeniser.encode_many(views)
    usable = UsablePrompts(raws, views, ids, own, _encode_responses(raws, config, tokeniser))
    sources = set(config.evaluation.held_out_sources)
    held_out = {digest_of(own[i]) for i, raw in enumerate(raws) if raw.source in sources}
    seen: set[tuple[bytes, str | None]] = set()
    for index, (prompt, response) in enumerate(zip(ids, usable.responses, strict=True)):
        limits = (max_prompt_tokens, context_tokens)
        reason = _why_unusable(prompt, response, *limits)
        reason = reason or _why_unusable(own[index], response, *limits)
        reason = "empty" if _is_blank(raws[index]) else reason
        if reason is not None:
            usable.dropped[reason] += 1
            tokens = max(len(prompt), len(own[index])) + (0 if response is None else len(response))
            usable.first_dropped.setdefault(reason, f"{raws[index].where}: {tokens} tokens")
            continue
        digest = digest_of(prompt, response)
        trained = raws[index].source not in sources
        asked = (digest, raws[index].teacher)
        if asked in seen or (held_out and trained and digest_of(own[index]) in held_out):
            usable.duplicates += 1
            continue
        seen.add(asked)
        usable.kept.append(index)
    return usable


def teacher_view(raw: RawPrompt, prompts: PromptsConfig) -> RawPrompt:
    """The prompt as the teacher reads it.

    The row's own ``teacher_messages``, else the student's prompt, whose system message
    ``prompts.teacher_system`` replaces. It does not replace that of ``teacher_messages``.
    """
    messages: list[dict[str, Any]] = (
        raw.teacher_messages or raw.messages or [{"role": "user", "content": raw.text}]
    )
    system = prompts.teacher_system
    if system is not None:
        has_own = messages[0].get("role") in SYSTEM_ROLES
        if has_own and raw.teacher_messages is None:
            messages, has_own = messages[1:], False
        if not has_own:
            messages = [{"role": "system", "content": system}, *messages]
    return replace(raw, text=None, messages=messages)


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


def _is_blank(raw: RawPrompt) -> bool:
    """Whether the prompt asks nothing: blank text, or messages of the user that all are blank."""
    if raw.messages is None:
        return not (raw.text or "").strip()
    asked = [message["content"] for message in raw.messages if message["role"] == "user"]
    return bool(asked) and all(isinstance(text, str) and not text.strip() for text in asked)


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
    """A hash that is equal for equal prompts (and responses, where given).

    The prompt's length is in it too: else the same ids, cut elsewhere, would have the same hash.
    """
    digest = blake2b(prompt.tobytes(), digest_size=16)
    if response is not None:
        digest.update(b"\0" + len(prompt).to_bytes(8, "little") + response.tobytes())
    return digest.digest()


def samples_asked(
    prompts: PromptsConfig, seed: int, ids: Sequence[np.ndarray], sources: Sequence[str]
) -> NDArray[np.int64]:
    """Samples to ask of each training prompt, int64 [P].

    ``ids`` and ``sources`` have an item for each of these prompts. Raises ConfigError where a
    source has prompts, but its weight is too small to make a row of them.
    """
    samples = np.full(len(ids), prompts.samples_per_prompt, dtype=np.int64)
    names = np.array(sources, dtype=object)
    problems = []
    for number, source in enumerate(prompts.sources or ()):
        of_source = np.flatnonzero(names == source.name)
        if not len(of_source):
            continue
        each = source.weight * prompts.samples_per_prompt
        num_rows = math.floor(each * len(of_source) + 0.5)
        if num_rows == 0:
            problems.append(
                Problem(
                    f"prompts.sources.{number}.weight",
                    f"is {source.weight:g}, which makes no row of the {len(of_source)} training "
                    f"prompts of {source.name!r}; raise it, or remove the source",
                )
            )
        samples[of_source], rest = divmod(num_rows, len(of_source))
        if rest:
            ranks = [_rank(seed, source.name, ids[index]) for index in of_source]
            first = sorted(range(len(of_source)), key=ranks.__getitem__)[:rest]
            samples[of_source[first]] += 1
    if problems:
        raise ConfigError(problems)
    return samples


def list_rows(
    samples: NDArray[np.int64], by_prompt: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The prompt and the sample number of each row, both int64 [N].

    First come the rows of sample 0 of all prompts, then those of sample 1, and so on; with
    ``by_prompt`` first all samples of the first prompt, then those of the second.
    """
    if by_prompt:
        firsts = np.repeat(np.cumsum(samples) - samples, samples)
        return np.repeat(np.arange(len(samples)), samples), np.arange(samples.sum()) - firsts
    passes = [np.flatnonzero(samples > number) for number in range(samples.max(initial=0))]
    numbers = [np.full(len(rows), number) for number, rows in enumerate(passes)]
    none = np.zeros(0, dtype=np.int64)
    return np.concatenate([none, *passes]), np.concatenate([none, *numbers])


def _rank(seed: int, name: str, prompt: np.ndarray) -> bytes:
    """A hash by which the prompts of a source are ordered; the lowest are chosen first."""
    digest = blake2b(f"{seed} {name}".encode() + b"\0", digest_size=16)
    digest.update(np.ascontiguousarray(prompt, dtype="<i4").tobytes())
    return digest.digest()


def teachers_of(
    raws: Sequence[RawPrompt], names: Sequence[str] | None, setting: str
) -> list[str] | None:
    """The name of each prompt's teacher; None where the run has one, without a name.

    setting: that lists the files. Raises ConfigError for rows whose teacher is none of ``names``.
    """
    if names is None:
        return None
    problems = []
    known = set(names)
    for raw in raws:
        if raw.teacher in known:
            continue
        if raw.teacher is None:
            said = "names no teacher, and its source has none"
        else:
            near = difflib.get_close_matches(raw.teacher, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            said = f"names the teacher {raw.teacher[:60]!r}, which the run does not have{hint}"
        problems.append(Problem(raw.where, f"{said}; expected one of {', '.join(names)}"))
        if len(problems) == MAX_PROBLEMS_PER_FILE:
            problems.append(Problem(setting, "further rows without a teacher are not listed"))
            break
    if problems:
        raise ConfigError(problems)
    return [raw.teacher or "" for raw in raws]


def in_order_of(teachers: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """A stable order, int64 [N], in which the rows of each teacher stand together.

    So a group of the stream has rows of one teacher, but for those at the seams.
    """
    place = {name: number for number, name in enumerate(names)}
    return np.argsort([place[name] for name in teachers], kind="stable")
