"""Filters: which published answers the student learns from.

Where it sits: the answer stage asks ``AnswerFilters.rejected`` after a group's answers are
published and before they go to a worker. The store keeps what is rejected, and no key depends on a
filter. Each filter decides by the answer alone, so that it decides the same in every epoch and
after every restart; only what compares all answers of an epoch is decided elsewhere (``near.py``).
Imports neither Ray nor torch.

Legend: N rows, T response tokens.
"""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.config.stream import (
    FIGURES,
    AnswerConfig,
    BestConfig,
    FilterConfig,
    FiltersConfig,
    LengthConfig,
    RefusalConfig,
    RegexConfig,
    SimilarConfig,
)
from raystill.datasets.filters.answers import Answers, Decode, Int32Array
from raystill.datasets.filters.function import Function, code_of
from raystill.datasets.filters.language import by_language
from raystill.datasets.filters.personal import Encode, by_personal_data
from raystill.datasets.filters.reference import agrees
from raystill.datasets.rows.schema import FILTERED
from raystill.model.on_node import ModelSource

Mask = NDArray[np.bool_]
Deciding = Generator[tuple[FilterConfig, Answers], Sequence[Any], pa.Array]
"""Filters at work: `AnswerFilters.deciding`."""
APOSTROPHES = str.maketrans("\u2019\u2018\u02bc", "'''")


class AnswerFilters:
    """The filters of a run file, in order."""

    def __init__(self, config: FiltersConfig, texts: Mapping[str, str] | None = None) -> None:
        """texts: those of the files with functions (`read_functions`)."""
        configs = [function for rule in config.rules for _, function in rule.functions]
        self._functions = {one: Function(one, code_of(one, texts or {})) for one in configs}
        self._rules = config.rules

    def close(self) -> None:
        """End the processes of functions."""
        for function in self._functions.values():
            function.close()

    def rejected(self, answers: Answers, kept: Mask) -> pa.Array:
        """`deciding` where each filter decides by the group alone."""
        return next_of(self.deciding(answers, kept))

    def deciding(self, answers: Answers, kept: Mask) -> Deciding:
        """Gives ``filtered: NAME`` for each row that a filter rejects, string [N]; null for others.

        kept: the rows to look at, bool [N]. A filter sees the rows of its sources that those before
        it have passed. Where there is no score, why not is in brackets after NAME. Yields a judge's
        rule with the answers that it is to look at, and is sent a score or why there is none each;
        and one that compares all answers of the epoch, also without any, whose turn may be waited
        for: it is sent "" for each answer that is near to another one, else None.
        """
        reasons = np.full(len(answers), None, object)
        left = np.flatnonzero(kept)
        figures: dict[str, dict[int, float | str]] = {}  # by filter and row
        for rule in self._rules:
            left_answers = answers.take(left)
            looked_at = np.flatnonzero(left_answers.of_sources(rule.sources))
            over_run = rule.similar is not None and rule.similar.over == "run"
            if not len(looked_at) and not over_run:
                continue
            seen = left_answers.take(looked_at)
            told: Sequence[Any]
            if over_run:
                told = yield rule, seen
            elif rule.kind in FIGURES:
                scores = (yield rule, seen) if rule.judge else self._figures(rule, seen)
                figures[rule.label] = dict(zip(seen.rows.tolist(), scores, strict=True))
                told = by_figure(rule, scores)
            elif rule.best is not None:
                told = by_rank(rule.best, self._ranked(rule.best, seen, figures), seen)
            else:
                mask = FILTERS[rule.kind](getattr(rule, rule.kind), seen)
                told = ["" if bad else None for bad in mask]
            bad = []
            for place, why in zip(looked_at, told, strict=True):
                if why is not None:
                    reasons[left[place]] = FILTERED + rule.label + (f" ({why})" if why else "")
                    bad.append(place)
            left = np.delete(left, bad)
        return pa.array(reasons, pa.string())

    def _figures(self, rule: FilterConfig, answers: Answers) -> Sequence[float | str]:
        """A function's score, or the share of repeated n-grams below 0: higher is better."""
        if rule.function is not None:
            return scores_of(self._functions[rule.function], answers)
        assert rule.repetition is not None, f"{rule.kind} has no figure"
        return [-repeated_share(ids, rule.repetition.ngram) for ids in answers.tokens]

    def _ranked(
        self, best: BestConfig, answers: Answers, figures: Mapping[str, Mapping[int, float | str]]
    ) -> Sequence[float | str]:
        """What ``best`` goes by; figures: of earlier filters, by row."""
        if best.score is not None:
            return scores_of(self._functions[best.score], answers)
        if best.by is None:
            return [0.0] * len(answers)
        return [figures[best.by][row] for row in answers.rows.tolist()]


def next_of(deciding: Deciding) -> pa.Array:
    """The reasons of filters that decide by the group alone."""
    try:
        next(deciding)
    except StopIteration as done:
        return done.value
    raise AssertionError("a filter asks others, and nobody is here to ask them")


def by_figure(rule: FilterConfig, figures: Sequence[float | str]) -> list[str | None]:
    """Rejects what has too low a figure, or none and a reason instead."""
    one = rule.judge or rule.function
    least = -rule.repetition.max_share if rule.repetition else one.min_score if one else 0.0
    return [f if isinstance(f, str) else None if f >= least else "" for f in figures]


def text_of(teacher: ModelSource) -> Decode:
    """Decodes with the teacher's tokenizer, which is loaded when the first text is wanted."""
    loaded: list[Decode] = []

    def decode(ids: Sequence[Int32Array]) -> list[str]:
        if not loaded:
            from pathlib import Path

            from raystill.model.tokenizer import read_settings, shared_tokenizer

            folder = Path(teacher.on_this_node("none"))
            tokenizer = shared_tokenizer(folder, read_settings(folder)).tokenizer
            loaded.append(lambda rows: [tokenizer.decode(row.tolist()) for row in rows])
        return loaded[0](ids)

    return decode


def ids_of(teacher: ModelSource) -> Encode:
    """Encodes with the teacher's tokenizer, for which control tokens in a text are text."""
    loaded: list[Encode] = []

    def encode(text: str) -> Sequence[int]:
        if not loaded:
            from pathlib import Path

            from raystill.model import tokenizer as models

            folder = Path(teacher.on_this_node("none"))
            settings = models.read_settings(folder)
            shared = models.shared_tokenizer(folder, settings)
            template = models.chat_template(folder, settings)
            control = models.control_tokens(shared.tokenizer, settings, folder, template)
            loaded.append(shared.plain_text(control.always).encode)
        return loaded[0](text)

    return encode


def by_length(config: LengthConfig, answers: Answers) -> Mask:
    """Rejects what has fewer than ``min_tokens`` or more than ``max_tokens`` tokens."""
    lengths = np.array([len(ids) for ids in answers.tokens], np.int64)
    most = np.inf if config.max_tokens is None else config.max_tokens
    return (lengths < config.min_tokens) | (lengths > most)


def repeated_share(ids: Int32Array, ngram: int) -> float:
    """Share of the n-grams of ids [T] that occurred before; 0 where there is none.

    Of M = T - n + 1 n-grams with D distinct ones it is (M - D) / M.
    """
    seen = ngrams(ids, ngram)
    return (len(seen) - len(np.unique(seen))) / len(seen) if len(seen) else 0.0


def ngrams(ids: Int32Array, ngram: int) -> NDArray[np.void]:
    """The n-grams of ids [T], [T - n + 1], each one opaque value, which sorts and hashes fast."""
    if len(ids) < ngram:
        return np.empty(0, np.dtype((np.void, 4 * ngram)))
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype("<i4"), ngram)
    return np.ascontiguousarray(windows).view(np.dtype((np.void, 4 * ngram))).reshape(-1)


def by_regex(config: RegexConfig, answers: Answers) -> Mask:
    """Rejects what lacks ``must_match`` or has ``must_not_match``, by RE2 in linear time."""
    texts = pa.array(answers.texts, pa.string())

    def matches(pattern: str) -> Mask:
        found = pc.match_substring_regex(texts, pattern, ignore_case=config.ignore_case)
        return found.to_numpy(zero_copy_only=False).astype(bool)

    rejected = np.zeros(len(answers), bool)
    if config.must_match is not None:
        rejected |= ~matches(config.must_match)
    if config.must_not_match is not None:
        rejected |= matches(config.must_not_match)
    return rejected


def by_refusal(config: RefusalConfig, answers: Answers) -> Mask:
    """Rejects where a phrase is near the beginning of the answer."""
    phrases = [plain_text(phrase) for phrase in config.phrases]
    beginnings = [plain_text(text.lstrip()[: config.within_chars]) for text in answers.texts]
    return np.array([any(p in text for p in phrases) for text in beginnings], bool)


def plain_text(text: str) -> str:
    """The text in lower case, with plain apostrophes and single spaces."""
    return " ".join(text.translate(APOSTROPHES).casefold().split())


def by_answer(config: AnswerConfig, answers: Answers) -> Mask:
    """Rejects what agrees with none of its references: a text, a number, or a list of them."""

    def right(text: str, reference: Any) -> bool:
        meant = reference if isinstance(reference, list) else [reference]
        return any(agrees(text, str(one), config.by, config.tolerance) for one in meant)

    pairs = zip(answers.texts, answers.values(config.column), strict=True)
    return np.array([not right(*pair) for pair in pairs], bool)


def scores_of(function: Function, answers: Answers) -> list[float | str]:
    """What a function says of each answer; text where it gave no score."""
    columns = {name: answers.values(name) for name in function.config.columns}
    given = zip(
        answers.texts, answers.finish_reasons.to_pylist(), answers.sources.to_pylist(), strict=True
    )
    return [
        function.score(
            {
                "response": text,
                "finish_reason": end,
                "source": source,
                "columns": {name: values[row] for name, values in columns.items()},
            }
        )
        for row, (text, end, source) in enumerate(given)
    ]


def by_rank(
    config: BestConfig, scores: Sequence[float | str], answers: Answers
) -> list[str | None]:
    """Rejects all but the ``keep`` answers to each prompt with the highest score.

    scores: of the answers, [N]; a text where there is none. The earlier sample goes first among
    equals. The answers to a prompt must all be here, but for those that were decided on before: a
    row that passed then passes again, since it is alone.
    """
    told: list[str | None] = [score if isinstance(score, str) else "" for score in scores]
    least = -np.inf if config.score is None else config.score.min_score
    usable = [(row, s) for row, s in enumerate(scores) if not isinstance(s, str) and s >= least]
    passed: Counter[int] = Counter()
    for row, _ in sorted(usable, key=lambda pair: (-pair[1], answers.rows[pair[0]])):
        prompt = int(answers.prompts[row])
        if passed[prompt] < config.keep:
            passed[prompt] += 1
            told[row] = None
    return told


def by_similarity(config: SimilarConfig, answers: Answers) -> Mask:
    """Rejects what is too similar to an earlier sample for the same prompt that passes."""
    rejected = np.zeros(len(answers), bool)
    passed: dict[int, list[set[bytes]]] = {}
    for row in np.argsort(answers.rows):
        ids = answers.tokens[row]
        if len(ids) < config.least_tokens:
            continue
        # Of an answer shorter than an n-gram the whole counts.
        mine = set(ngrams(ids, config.ngram).tolist()) or {ids.tobytes()}
        others = passed.setdefault(int(answers.prompts[row]), [])
        rejected[row] = any(similarity(mine, other) > config.max_similarity for other in others)
        if not rejected[row]:
            others.append(mine)
    return rejected


def similarity(one: set[bytes], other: set[bytes]) -> float:
    """Jaccard's: the share of what both have, of all that either has."""
    return len(one & other) / len(one | other)


def by_end(_: bool, answers: Answers) -> Mask:
    """Rejects what does not end with a stop token."""
    return ~answers.finished


FILTERS: dict[str, Callable[..., Mask]] = {
    "length": by_length,
    "regex": by_regex,
    "refusal": by_refusal,
    "finished": by_end,
    "answer": by_answer,
    "similar": by_similarity,
    "personal_data": by_personal_data,
    "language": by_language,
}
"""Filters by the setting of an entry of ``filters``; each gets that setting and the answers."""
