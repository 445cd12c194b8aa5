"""Configuration of the stream of rows and the filters."""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raystill.config.base import ConfigModel, PositiveInt, identity, operational, why_no_pattern
from raystill.config.prompts import FunctionConfig, PersonalFilterConfig, Phrase
from raystill.config.teacher import JudgeConfig


class StreamConfig(ConfigModel):
    """The stream of rows from teacher to student: group size, back-pressure, order, drops."""

    group_rows: PositiveInt = identity(
        8,
        description="Rows of a group: one request to a replica and one block of Ray Data. Larger "
        "groups have less overhead; smaller ones wait less for their longest answer.",
    )
    max_rows_ahead: PositiveInt | None = operational(
        None,
        description="Most rows requested from the teacher and not yet taken by a student worker. "
        "It bounds the memory for rows that wait. Default: twice the rows that all replicas answer "
        "at a time, and two steps.",
    )
    order: Literal["fixed", "arrival"] = identity(
        "fixed",
        description="Order of training. fixed: a step trains the same rows at any number of "
        "workers and in any run with the same seed. arrival: rows are trained in the order in "
        "which their answers arrive.",
    )
    on_truncated: Literal["keep", "drop"] = identity(
        "keep",
        description="What becomes of answers that max_tokens cuts off; see max_drop_fraction.",
    )
    max_drop_fraction: float = operational(
        0.0,
        ge=0,
        le=1,
        description="Share of an epoch's rows that may be dropped; the run stops if more are.",
    )
    max_attempts: PositiveInt = operational(
        4,
        description="Attempts to have a group answered, if replicas fail. The run stops after the "
        "last.",
    )


REFUSALS = (
    *("i can't help with", "i cannot help with", "i can't assist", "i cannot assist"),
    *("i'm unable to", "i am unable to", "i can't provide", "i cannot provide"),
    *("i can't fulfill", "i cannot fulfill", "i won't be able to", "i'm not able to"),
    *("i am not able to", "i'm sorry, but i can", "i am sorry, but i can"),
    *("i apologize, but i can", "as an ai", "as a language model"),
)
"""How answers that refuse begin in English, in lower case and with plain apostrophes."""


class LengthConfig(ConfigModel):
    """Rejects answers that are too short or too long. The stop token does not count."""

    min_tokens: int = identity(0, ge=0, description="Fewest tokens of an answer.")
    max_tokens: PositiveInt | None = identity(
        None, description="Most tokens of an answer. Default: no limit."
    )

    @model_validator(mode="after")
    def _leaves_some(self) -> "LengthConfig":
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"has max_tokens ({self.max_tokens}) below min_tokens ({self.min_tokens}), which "
                "rejects every answer; raise max_tokens or lower min_tokens"
            )
        return self


class RepetitionConfig(ConfigModel):
    """Rejects answers that repeat themselves, judged by their n-grams of tokens."""

    ngram: PositiveInt = identity(4, le=64, description="Tokens n of an n-gram.")
    max_share: float = identity(
        0.5,
        ge=0,
        lt=1,
        description="Largest share of an answer's n-grams that occurred in it before.",
    )


class RegexConfig(ConfigModel):
    """Rejects answers by regular expressions in RE2's syntax, searched for anywhere in the text.

    RE2 needs time in proportion to the text, whatever the expression; it has no look-around and no
    back-references.
    """

    must_match: Phrase | None = identity(
        None, description="Regular expression that an answer must match. Default: none."
    )
    must_not_match: Phrase | None = identity(
        None, description="Regular expression that an answer must not match. Default: none."
    )
    ignore_case: bool = identity(False, description="Whether upper and lower case are the same.")

    @field_validator("must_match", "must_not_match")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None and (reason := why_no_pattern(pattern)):
            raise ValueError(
                f"is {pattern!r}, which is no regular expression of RE2 ({reason}); look-around "
                "and back-references are not among them"
            )
        return pattern

    @model_validator(mode="after")
    def _says_something(self) -> "RegexConfig":
        if self.must_match is None and self.must_not_match is None:
            raise ValueError("has neither must_match nor must_not_match; set one of them")
        return self


class RefusalConfig(ConfigModel):
    """Rejects answers that refuse, by phrases near their beginning."""

    phrases: tuple[Annotated[str, Field(pattern=r"\S")], ...] = identity(
        REFUSALS,
        min_length=1,
        description="Phrases that mark a refusal. Upper and lower case and the form of the "
        "apostrophe make no difference. Default: usual English ones.",
    )
    within_chars: PositiveInt = identity(
        200, description="Characters of the answer's beginning in which a phrase is looked for."
    )


class LanguageConfig(ConfigModel):
    """Rejects answers in another language than these, by py3langid (extra language)."""

    allowed: tuple[Phrase, ...] = identity(
        min_length=1, description="Languages by their codes in ISO 639-1, for example [en, de]."
    )
    min_probability: float = identity(
        0.5, gt=0, le=1, description="Least probability of another language at which it rejects."
    )


class AnswerConfig(ConfigModel):
    """Rejects answers that differ from a reference, which the prompt file has in a column.

    What counts of a text is its last \\boxed{...}, else its last number. Numbers are compared by
    value, other contents of a box as text.
    """

    column: Phrase = identity(
        "answer", description="Field of the prompt files with the reference, as text or number."
    )
    by: Literal["value", "text"] = identity(
        "value",
        description="value: the last \\boxed{...}, else the last number, of answer and reference "
        "is compared. text: the whole of both, without case and surplus spaces.",
    )
    tolerance: float = identity(
        0.0,
        ge=0,
        lt=1,
        description="Largest difference of two numbers, as a share of the reference.",
    )


class SimilarConfig(ConfigModel):
    """Rejects answers that say nearly the same as another one that passed: of the n-grams of tokens
    that either has, both have too large a share (Jaccard).
    """

    ngram: PositiveInt = identity(3, le=64, description="Tokens n of an n-gram.")
    max_similarity: float = identity(
        0.7, ge=0, lt=1, description="Largest similarity to an answer that passed."
    )
    over: Literal["prompt", "run"] = identity(
        "prompt",
        description="What is compared. prompt: the answers to one prompt; it needs whole groups "
        "as best does. run: all answers of an epoch, by MinHash, an estimate of the similarity.",
    )
    min_tokens: int | None = identity(
        None,
        ge=0,
        description="Answers with fewer tokens pass and are compared with none. Default: 0 within "
        "a prompt, 32 over a run, in which short answers may well be equal.",
    )

    @property
    def least_tokens(self) -> int:
        """Fewest tokens of an answer that is compared."""
        return self.min_tokens if self.min_tokens is not None else 32 * (self.over == "run")


class BestConfig(ConfigModel):
    """Rejects all but the best answers to each prompt, of those that passed the filters before it.

    It needs prompts.samples_per_prompt above keep, in whole groups: stream.group_rows is a
    multiple of it, and no source has a weight. All answers to a prompt are then in one group.
    """

    keep: PositiveInt = identity(1, description="Most answers to a prompt that pass.")
    score: FunctionConfig | None = identity(
        None,
        description="Function whose score decides; the earlier sample of equal ones passes, and "
        "none below min_score. Default: the first samples pass.",
    )
    by: str | None = identity(
        None,
        description="Name of an earlier filter whose figure decides, in place of score: the "
        "highest score of a judge or a function, the smallest share of repetition. Default: none.",
    )

    @model_validator(mode="after")
    def _goes_by_one(self) -> "BestConfig":
        if self.score is not None and self.by is not None:
            raise ValueError(f"has score and by ({self.by!r}), but one decides; remove the other")
        return self


class FilterConfig(ConfigModel):
    """One filter: exactly one of the settings besides name and sources."""

    name: str | None = identity(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$",
        description="Name under which its rejected rows are counted. Default: the kind of filter.",
    )
    sources: tuple[str, ...] | None = identity(
        None,
        min_length=1,
        description="Names of the sources whose rows it looks at. Default: all.",
    )
    length: LengthConfig | None = identity(None, description="Rejects answers by their length.")
    repetition: RepetitionConfig | None = identity(
        None, description="Rejects answers that repeat themselves."
    )
    regex: RegexConfig | None = identity(None, description="Rejects answers by what they match.")
    refusal: RefusalConfig | None = identity(None, description="Rejects answers that refuse.")
    language: LanguageConfig | None = identity(
        None, description="Rejects answers in other languages."
    )
    finished: bool = identity(
        False, description="Rejects answers that do not end with a stop token."
    )
    answer: AnswerConfig | None = identity(
        None, description="Rejects answers that differ from a reference."
    )
    function: FunctionConfig | None = identity(
        None, description="Rejects answers to which a function of your own gives a low score."
    )
    judge: JudgeConfig | None = identity(
        None, description="Rejects answers to which another teacher gives a low score."
    )
    personal_data: PersonalFilterConfig | None = identity(
        None, description="Rejects or masks answers that hold personal data or keys."
    )
    similar: SimilarConfig | None = identity(None, description="Rejects near-duplicates.")
    best: BestConfig | None = identity(
        None, description="Rejects all but the best answers to each prompt."
    )

    @model_validator(mode="after")
    def _is_one_filter(self) -> "FilterConfig":
        if len(self._set) != 1:
            kinds = ", ".join(self._kinds())
            raise ValueError(
                f"sets {' and '.join(self._set) or 'no filter'}; an entry is one filter, so set "
                f"one of {kinds}, and list others as entries of their own"
            )
        return self

    @property
    def _set(self) -> list[str]:
        return [name for name in self._kinds() if getattr(self, name) not in (None, False)]

    @classmethod
    def _kinds(cls) -> list[str]:
        return [name for name in cls.model_fields if name not in ("name", "sources")]

    @property
    def kind(self) -> str:
        """Name of the setting that says which filter it is."""
        return self._set[0]

    @property
    def label(self) -> str:
        """Name under which its rejected rows are counted."""
        return self.name or self.kind

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields of the prompt files that it reads."""
        own: tuple[str, ...] = () if self.answer is None else (self.answer.column,)
        own += () if self.judge is None else self.judge.columns
        return own + tuple(name for _, f in self.functions for name in f.columns)

    @property
    def functions(self) -> list[tuple[str, FunctionConfig]]:
        """Functions that it calls, each after the name of its setting."""
        score = None if self.best is None else self.best.score
        named = (("function", self.function), ("best.score", score))
        return [(name, function) for name, function in named if function is not None]


class FiltersConfig(ConfigModel):
    """Filters of answers. A bare list is short for ``{rules: [...]}``.

    A rejected row is not trained on. Its answer stays in the teacher store, and no key depends on
    filters: another run with other filters reads it without asking again.
    """

    rules: tuple[FilterConfig, ...] = identity(
        (),
        description="List of filters. Each sees the answers that those before it have passed.",
    )
    max_rejected_fraction: float = operational(
        0.5,
        ge=0,
        le=1,
        description="Share of an epoch's rows that filters may reject; the run stops if more are. "
        "They do not count for stream.max_drop_fraction.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, section: Any) -> Any:
        return spell_out_filters(section)

    function_processes: PositiveInt = operational(
        1, description="Rows that functions of your own score at a time, a process each."
    )

    @field_validator("rules")
    @classmethod
    def _can_be_told_apart(cls, rules: tuple[FilterConfig, ...]) -> tuple[FilterConfig, ...]:
        name, number = Counter(rule.label for rule in rules).most_common(1)[0] if rules else ("", 0)
        if number > 1:
            raise ValueError(
                f"has {number} filters that are counted as {name!r}; give each a name of its own"
            )
        if sum(rule.best is not None for rule in rules) > 1:
            raise ValueError("has best more than once; give one of them, with the score to go by")
        for number, rule in enumerate(rules):
            if rule.best is not None and rule.best.by is not None:
                require_figure(rule, rule.best.by, rules[:number])
        return rules

    @property
    def judges(self) -> frozenset[str]:
        """Names of the teachers that judge."""
        return frozenset(rule.judge.teacher for rule in self.rules if rule.judge is not None)

    @property
    def best(self) -> BestConfig | None:
        """The settings of best, if a filter has them."""
        return next((rule.best for rule in self.rules if rule.best is not None), None)

    @property
    def compares_samples(self) -> bool:
        """Whether a filter needs all answers to a prompt in one group."""
        return any(r.best or (r.similar and r.label not in self.over_run) for r in self.rules)

    @property
    def over_run(self) -> dict[str, SimilarConfig]:
        """Filters that compare all answers of an epoch, by their names."""
        found = ((rule.label, rule.similar) for rule in self.rules if rule.similar is not None)
        return {name: similar for name, similar in found if similar.over == "run"}

    @property
    def columns(self) -> list[str]:
        """Fields of the prompt files that any filter reads, each once."""
        return list(dict.fromkeys(name for rule in self.rules for name in rule.columns))


FIGURES = ("judge", "function", "repetition")
"""Filters that have a figure for each answer."""


def require_figure(best: FilterConfig, by: str, earlier: tuple[FilterConfig, ...]) -> None:
    """ValueError where ``best`` is to go by a filter that has no figure for its answers."""
    found = next((rule for rule in earlier if rule.label == by), None)
    able = [rule.label for rule in earlier if rule.kind in FIGURES]
    if found is None or found.kind not in FIGURES:
        raise ValueError(
            f"best.by is {by!r}, which is no earlier filter with a figure (has {able or 'none'}); "
            f"name one of the kinds {', '.join(FIGURES)} that stands before it"
        )
    if found.sources is not None and not set(best.sources or [""]) <= set(found.sources):
        raise ValueError(
            f"best.by is {by!r}, which looks at the sources {', '.join(found.sources)} alone; "
            "give best the same sources"
        )


def spell_out_filters(section: Any) -> Any:
    """Return the long form of a filters section; a bare list becomes ``{rules: [...]}``."""
    return {"rules": section} if isinstance(section, list | tuple) else section
