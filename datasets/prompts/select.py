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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raystill.base.errors import ConfigError, Problem, config_error
from raystill.config.prompts import PromptsConfig
from raystill.datasets.prompts.read import MAX_PROBLEMS_PER_FILE, SYSTEM_ROLES, RawPrompt
from raystill.datasets.prompts.screen import is_blank
from raystill.datasets.spool.equal import Digests, Named, digest_of, group_numbers, is_first
from raystill.datasets.spool.progress import Meter
from raystill.datasets.spool.spool import NoTokens, Spool, TokenLists
from raystill.model.sampling import resolve_sampling

if TYPE_CHECKING:
    from raystill.config.run import RunConfig
    from raystill.datasets.prompts.tokenise import PromptTokeniser

UNBOUNDED = 2**31 - 1
LONGEST_PROMPT = 4_000_000
"""Characters of a prompt that is read at all: about a million tokens."""
REASONS = ("", "empty", "too_long", "empty_response", "response_too_long")
"""Why prompts are left out, by number."""
ROWS_AT_ONCE = 10_000
"""Rows of which more than a few bytes are in memory."""


@dataclass(frozen=True)
class Facts:
    """What is known of all prompts [n] without their ids. ``given``: whether a response came."""

    source: Named
    teacher: Named
    blank: NDArray[np.bool_]
    given: NDArray[np.bool_]


def facts_of(raws: Spool[RawPrompt]) -> Facts:
    """Look at all prompts once."""
    sources: dict[str | None, int] = {}
    teachers: dict[str | None, int] = {}
    found = [
        (
            np.array([sources.setdefault(raw.source, len(sources)) for raw in raws], np.int32),
            np.array([teachers.setdefault(raw.teacher, len(teachers)) for raw in raws], np.int32),
            np.array([is_blank(raw) for raw in raws], np.bool_),
            np.array([raw.response is not None for raw in raws], np.bool_),
        )
        for raws in raws.chunks()
    ]
    source, teacher, blank, given = (
        np.concatenate([part[i] for part in found] or [np.zeros(0, np.int32)]) for i in range(4)
    )
    named = Named(source, list(sources)), Named(teacher, list(teachers))
    return Facts(*named, blank.astype(np.bool_), given.astype(np.bool_))


@dataclass
class UsablePrompts:
    """The prompts that were read, tokenised; sequences have an item for each, in the order read.

    ``ids``: the teacher's prompt tokens, int32 [P]. ``student_ids``: the student's; the same
    sequence where the teacher sees no more. ``responses``: int32 [T] where one is given, else None.
    ``kept``: numbers of the prompts that are usable and no duplicates, ascending. ``digests``: of
    each of these, a hash of the student's prompt, equal where these are equal. ``dropped``
    counts the unusable ones by reason, and ``first_dropped`` says where the first of each is.
    """

    raws: Spool[RawPrompt]
    facts: Facts
    ids: TokenLists
    student_ids: TokenLists
    responses: TokenLists | NoTokens
    digests: Digests = field(default_factory=lambda: np.empty((0, 2), np.uint64))
    kept: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0

    def longest(self) -> int:
        """Tokens of the longest kept prompt, of either."""
        both = (lists.lengths()[self.kept] for lists in (self.ids, self.student_ids))
        return max(int(lengths.max(initial=0)) for lengths in both)

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
    raws: Spool[RawPrompt],
    facts: Facts,
    config: "RunConfig",
    tokeniser: "PromptTokeniser",
    limits: tuple[int, int],
) -> UsablePrompts:
    """Tokenise the prompts and leave out unusable ones and duplicates. Raises ConfigError.

    limits: tokens of a prompt, and of a prompt with its given response. Dropped are: as
    ``too_long`` a prompt of more than the first, as ``empty`` one of no
    tokens, or of blank text, as ``empty_response`` a given response without text, and as
    ``response_too_long`` one that has more than the second together with its prompt.

    A duplicate has the prompt, the given response and the teacher of an earlier row, or its prompt
    is in a held-out source too: that must not be trained on, whichever is read first and whatever
    response is given. Where the teacher sees more, rows with the same prompt of the teacher's are
    duplicates, held out are prompts of the student's, and both must be within the limits.
    """
    own = _encode(raws, tokeniser, lambda raw: raw)
    ids = own
    if config.prompts.teacher_sees_more:
        ids = _encode(raws, tokeniser, lambda raw: teacher_view(raw, config.prompts))
    responses = _encode_responses(raws, facts, config, tokeniser)
    digests = _digests(own)
    usable = UsablePrompts(raws, facts, ids, own, responses)
    may_be_kept = _leave_out(usable, limits)
    num_usable = int(may_be_kept.sum())
    sources = set(config.evaluation.held_out_sources)
    of_source = np.array([name in sources for name in facts.source.names], np.bool_)
    trained = ~of_source[facts.source.number]
    if not trained.all():
        # Held out are the prompts of these sources, whether they are usable or not.
        group = group_numbers(digests)
        held_out = np.zeros(len(group), np.bool_)
        held_out[group[~trained]] = True
        may_be_kept &= ~(trained & held_out[group])
    asked = digests if ids is own and not facts.given.any() else _digests(ids, responses)
    teacher = facts.teacher.number if len(facts.teacher.names) > 1 else None
    candidates = np.flatnonzero(may_be_kept)
    if len(candidates) < len(asked):
        asked = asked[candidates]
        teacher = None if teacher is None else teacher[candidates]
    usable.kept = candidates[is_first(asked, teacher)]
    usable.digests = digests if len(usable.kept) == len(digests) else digests[usable.kept]
    usable.duplicates = num_usable - len(usable.kept)
    return usable


def _leave_out(usable: UsablePrompts, limits: tuple[int, int]) -> NDArray[np.bool_]:
    """Which prompts are usable, [n]; notes the others."""
    facts, responses = usable.facts, usable.responses.lengths()
    different = {id(lists): lists for lists in (usable.ids, usable.student_ids)}
    lengths = [lists.lengths() for lists in different.values()]
    reason = np.zeros(len(responses), np.int8)
    for start in range(0, len(responses), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        for prompts in lengths:
            together = prompts[rows].astype(np.int64) + responses[rows]
            of_prompt = np.select(
                [
                    prompts[rows] == 0,
                    prompts[rows] > limits[0],
                    facts.given[rows] & (responses[rows] == 0),
                    facts.given[rows] & (together > limits[1]),
                ],
                [1, 2, 3, 4],
            )
            reason[rows] = np.where(reason[rows], reason[rows], of_prompt)
    reason[facts.blank] = REASONS.index("empty")
    masks = ((name, reason == number) for number, name in enumerate(REASONS) if name)
    found = [(int(mask.argmax()), name, int(mask.sum())) for name, mask in masks if mask.any()]
    for first, name, count in sorted(found):
        tokens = max(int(prompts[first]) for prompts in lengths) + int(responses[first])
        usable.dropped[name] = count
        usable.first_dropped[name] = f"{usable.raws[first].where}: {tokens} tokens"
    return np.asarray(reason == 0, np.bool_)


def _encode(
    raws: Spool[RawPrompt], tokeniser: "PromptTokeniser", view: Callable[[RawPrompt], RawPrompt]
) -> TokenLists:
    """Token ids of all prompts, as ``view`` shows them. Raises ConfigError."""
    lists, encoder, endless = TokenLists(), tokeniser.encoder(len(raws)), list[Problem]()
    for chunk in raws.chunks():
        viewed = [view(raw) for raw in chunk]
        endless += [problem for raw in viewed if (problem := _why_endless(raw)) is not None]
        if not endless and (encoded := encoder.encode(viewed)):
            lists.append(encoded)
    if endless:
        raise ConfigError(endless)
    encoder.finish()
    return lists


def _why_endless(raw: RawPrompt) -> Problem | None:
    """Why a prompt is not even tokenised, which would take from seconds to minutes."""
    contents = [raw.text] if raw.messages is None else [m.get("content") for m in raw.messages]
    length = sum(len(text) for text in contents if isinstance(text, str))
    if length <= LONGEST_PROMPT:
        return None
    return Problem(
        raw.where,
        f"has {length:,} characters, and no context is so long; expected at most "
        f"{LONGEST_PROMPT:,}: shorten or remove it",
    )


def _digests(prompts: TokenLists, responses: TokenLists | NoTokens | None = None) -> Digests:
    """`digest_of` of all prompts, and of their responses where given."""
    every = zip(prompts, responses if responses is not None else repeat(None), strict=False)
    made = np.empty((len(prompts), 2), np.uint64)
    for start in range(0, len(made), ROWS_AT_ONCE):
        some = b"".join(_digest(*both) for both in islice(every, ROWS_AT_ONCE))
        made[start : start + ROWS_AT_ONCE] = np.frombuffer(some, np.uint64).reshape(-1, 2)
    return made


def _digest(prompt: np.ndarray | None, response: np.ndarray | None) -> bytes:
    assert prompt is not None
    return digest_of(prompt, response)


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
    raws: Spool[RawPrompt], facts: Facts, config: "RunConfig", tokeniser: "PromptTokeniser"
) -> TokenLists | NoTokens:
    num_given = int(facts.given.sum())
    if not num_given:
        return NoTokens(len(raws))
    stop_ids = resolve_sampling(config.teacher, tokeniser.folder).stop_token_ids
    if not stop_ids:
        raise config_error(
            "teacher.sampling.stop_token_ids",
            "is empty, and prompts.response_field is set: a response ends with a stop token; set "
            "it to the ids that end an answer of the teacher",
        )
    lists, meter = TokenLists(), Meter(tokeniser.progress, "tokenising responses", num_given)
    for chunk in raws.chunks():
        texts = [raw.response for raw in chunk if raw.response is not None]
        encoded = iter(tokeniser.encode_responses(texts, stop_ids, meter))
        lists.append([None if raw.response is None else next(encoded) for raw in chunk])
    return lists


def samples_asked(
    prompts: PromptsConfig,
    seed: int,
    ids: Sequence[np.ndarray | None],
    sources: Sequence[str] | NDArray[np.object_],
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
            hashes = b"".join(_rank(seed, source.name, ids[int(index)]) for index in of_source)
            ranks = np.frombuffer(hashes, ">u8").reshape(-1, 2)
            first = np.lexsort((ranks[:, 1], ranks[:, 0]))[:rest]
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
    rows = np.empty(int(samples.sum()), np.int64)
    numbers = np.empty(len(rows), np.int64)
    start = 0
    for number in range(samples.max(initial=0)):
        of_pass = np.flatnonzero(samples > number)
        stop = start + len(of_pass)
        rows[start:stop], numbers[start:stop] = of_pass, number
        start = stop
    return rows, numbers


def _rank(seed: int, name: str, prompt: np.ndarray | None) -> bytes:
    """A hash by which the prompts of a source are ordered; the lowest are chosen first."""
    assert prompt is not None
    digest = blake2b(f"{seed} {name}".encode() + b"\0", digest_size=16)
    digest.update(np.ascontiguousarray(prompt, dtype="<i4").tobytes())
    return digest.digest()


def require_teachers(
    raws: Spool[RawPrompt], teachers: Named, names: Sequence[str], prompts: PromptsConfig
) -> None:
    """Raise ConfigError for rows whose teacher is none of ``names``."""
    problems = []
    unknown = np.array([name not in names for name in teachers.names], np.bool_)
    for number in np.flatnonzero(unknown[teachers.number])[:MAX_PROBLEMS_PER_FILE]:
        raw = raws[int(number)]
        if raw.teacher is None:
            field = prompts.teacher_field
            said = "names no teacher" + (f" in its field {field!r}" if field else "")
            said += ", and its source has none"
        else:
            near = difflib.get_close_matches(raw.teacher, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            said = f"names the teacher {raw.teacher[:60]!r}, which the run does not have{hint}"
        problems.append(Problem(raw.where, f"{said}; expected one of {', '.join(names)}"))
    if len(problems) == MAX_PROBLEMS_PER_FILE:
        setting = prompts.files_setting
        problems.append(Problem(setting, "further rows without a teacher are not listed"))
    if problems:
        raise ConfigError(problems)


def in_order_of(
    teachers: Named, prompts: NDArray[np.int64], names: Sequence[str]
) -> NDArray[np.int64]:
    """A stable order, int64 [N], of the prompts in which those of each teacher stand together.

    So a group of the stream has rows of one teacher, but for those at the seams.
    """
    place = {name: number for number, name in enumerate(names)}
    of_name = np.array([place.get(name or "", -1) for name in teachers.names], np.int64)
    return np.argsort(of_name[teachers.number[prompts]], kind="stable")
