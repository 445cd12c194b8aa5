"""The static check: everything that can be known before Ray, torch or vLLM are imported.

``driver.py check`` prints what it finds; ``driver.py run`` refuses on it, and goes on with the
``Prepared`` run: tokenised prompts and resolved folders.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from raystill.base.errors import ConfigError, Problem
from raystill.base.run_folder import RunFolder, resolve_output, resolve_store
from raystill.cluster.check.models import check_student, check_teacher, tokenizer_notices
from raystill.cluster.check.output import (
    check_output,
    check_same_prompts,
    check_space,
    check_store,
    space_needed,
    store_space_notices,
)
from raystill.cluster.check.prepared import Prepared as Prepared
from raystill.config.load import load_leniently
from raystill.config.run import RunConfig
from raystill.datasets.prompts.read import read_prompts
from raystill.datasets.prompts.select import UNBOUNDED
from raystill.datasets.prompts.tables import PromptTables, build_prompt_tables
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.model.files import ModelFolder, find_model


@dataclass
class Checked:
    """A run file after loading and the static check.

    ``notices`` do not keep the run from starting. ``prepared`` is there if the rows are known.
    ``file_is_wrong`` says that the run file or an override is itself in error (not YAML, an unknown
    key, a wrong value): a check ends there, since a cluster would be asked about another run than
    the one that is meant.
    """

    problems: list[Problem]
    notices: list[str] = field(default_factory=list)
    config: RunConfig | None = None
    folder: RunFolder | None = None
    prepared: Prepared | None = None
    file_is_wrong: bool = False


def check_run_file(path: str, overrides: Sequence[str] = ()) -> Checked:
    """Load a run file and check it: a wrong key does not hide a missing prompt file."""
    loaded = load_leniently(path, overrides)
    problems, config, folder = loaded.problems, loaded.config, None
    file_is_wrong = bool(problems)
    if config is None:
        return Checked(problems, file_is_wrong=True)
    try:
        folder = RunFolder(resolve_output(config.output.path, path))
    except ConfigError as error:
        problems = problems + error.problems
    check = StaticCheck(config, folder, loaded.refused)
    prepared = check.run()
    problems = problems + check.problems
    return Checked(problems, check.notices, config, folder, prepared, file_is_wrong)


def check_static(
    config: RunConfig, output: RunFolder | None
) -> tuple[list[Problem], Prepared | None]:
    """Everything wrong with a whole configuration that needs no cluster.

    ``Prepared`` comes back whenever the prompts could be tokenised.
    """
    check = StaticCheck(config, output)
    prepared = check.run()
    return check.problems, prepared


class StaticCheck:
    """One pass over a run: each step adds to ``problems`` and ``notices``.

    ``refused`` names settings (dotted) whose value in ``config`` is a stand-in: what depends on
    them is left unjudged. Imports no ray, torch, vllm or transformers.
    """

    def __init__(
        self, config: RunConfig, output: RunFolder | None, refused: frozenset[str] = frozenset()
    ) -> None:
        self.config = config
        self.output = output
        self.refused = refused
        self.problems: list[Problem] = []
        self.notices: list[str] = []
        self.store_path = ""

    def run(self) -> Prepared | None:
        """Every step; None where there is no teacher or no prompts to go on with."""
        if self.known("stream", "training", "teacher"):
            self.problems += check_rows_ahead(self.config)
        if self.known("training"):
            self.notices += sharding_notices(self.config)
        self.look_at_output()
        teacher, student = self.look_at_models()
        tables = self.look_at_prompts(teacher, student)
        if teacher is None or tables is None:
            return None
        space = space_needed(self.config, student, tables) if student is not None else None
        if self.store_path:
            self.notices += store_space_notices(self.config, self.store_path, tables, teacher)
        if self.output is not None and not any(p.where == "output.path" for p in self.problems):
            self.problems += check_space(self.output, space)
            if not self.refused:
                setting = self.config.prompts.files_setting
                self.problems += check_same_prompts(self.output, tables.train, setting)
        return Prepared(self.config, tables, teacher, student, self.store_path, space, self.notices)

    def known(self, *names: str) -> bool:
        """Whether all these settings, and what is in them, are the writer's."""
        return not any(
            f"{name}.".startswith(f"{bad}.") or f"{bad}.".startswith(f"{name}.")
            for bad in self.refused
            for name in names
        )

    def look_at_output(self) -> None:
        """Can the run folder be written, and is it this run's?"""
        if self.output is None or not self.known("output"):
            return
        problems, notices = check_output(self.config, self.output, compare=not self.refused)
        self.problems += problems
        self.notices += notices
        if self.known("store") and (self.config.store.path is not None or not problems):
            try:
                self.store_path = resolve_store(self.config.store.path, self.output)
                self.problems += check_store(self.store_path)
            except ConfigError as error:
                self.problems += error.problems

    def look_at_models(self) -> tuple[ModelFolder | None, ModelFolder | None]:
        """Teacher and student (the teacher again with ``init: from_teacher``), and their fit."""
        config, teacher, student = self.config, None, None
        if self.known("teacher.model"):
            teacher = self.find("teacher.model", config.teacher.model, config.teacher.revision)
        if self.known("student.init", "student.model"):
            student = teacher
            if config.student.model is not None:
                name, revision = config.student.model, config.student.revision
                student = self.find("student.model", name, revision)
        if teacher is not None:
            self.problems += check_teacher(config, teacher)
            if student is not None:
                self.problems += check_student(config, teacher, student)
                if student is not teacher:
                    self.notices += tokenizer_notices(teacher, student)
        return teacher, student

    def find(self, where: str, name: str, revision: str | None) -> ModelFolder | None:
        """The model's folder, or None with the reason noted."""
        found = find_model(name, revision)
        if found.problem is not None:
            self.problems.append(Problem(where, found.problem))
        if found.notice is not None and where == "student.model":
            self.notices.append(f"{where}: {found.notice}")
        elif found.notice is not None:  # without its tokenizer nothing can be asked
            self.problems.append(Problem(where, f"{found.notice}; try again, or name a folder"))
        return found.model

    def look_at_prompts(
        self, teacher: ModelFolder | None, student: ModelFolder | None
    ) -> PromptTables | None:
        """The tokenised rows; without a teacher the files are still read through."""
        config = self.config
        if not self.known("prompts"):
            return None
        try:
            if teacher is None:
                read_prompts(config.prompts)
                return None
            tokeniser = PromptTokeniser(teacher.path, config.prompts)
        except ConfigError as error:
            self.problems += error.problems
            return None
        context = context_tokens(config, teacher)
        longest = min(context - 1, config.prompts.max_prompt_tokens or context)
        try:
            tables = build_prompt_tables(config, tokeniser, longest, context)
        except ConfigError as error:
            self.problems += error.problems
            return None
        self.problems += check_dropped(config, tables, longest, context)
        self.problems += check_answers_fit(config, tables, student)
        self.notices += cut_answers(config, tables, teacher)
        self.notices += tokeniser.notices()
        return tables


def sharding_notices(config: RunConfig) -> Iterator[str]:
    """What sharding does not do here."""
    training = config.training
    if training.strategy == "fsdp" and training.min_workers == 1:
        yield (
            "training.strategy is fsdp, but training.num_workers allows one worker: that one holds "
            "the whole student and its optimizer's state"
        )


def check_rows_ahead(config: RunConfig) -> Iterator[Problem]:
    """The bounds under which a step could not fill, or replicas would idle (design 5 and 6)."""
    rows, needed, advised = config.rows_ahead, config.min_rows_ahead, config.advised_rows_ahead
    bound = max(needed, advised)
    if rows < needed:
        yield Problem(
            "stream.max_rows_ahead",
            f"({rows}) is less than rows_per_step + 2 * num_workers * group_rows ({needed}), so a "
            f"step could wait for ever; set it to {bound} or more, or lower these",
        )
    elif rows < advised:
        yield Problem(
            "stream.max_rows_ahead",
            f"({rows}) is less than max replicas * target_ongoing_requests * group_rows + 2 * "
            f"rows_per_step ({advised}), so the teacher would idle; set it to {bound} or more, or "
            "lower teacher.target_ongoing_requests",
        )


def context_tokens(config: RunConfig, teacher: ModelFolder) -> int:
    """Longest prompt and answer together. A prompt that is asked leaves room for one token."""
    limits = [config.teacher.max_model_len, teacher.context_tokens]
    return min((limit for limit in limits if limit is not None), default=UNBOUNDED)


def check_dropped(
    config: RunConfig, tables: PromptTables, longest: int, context: int
) -> Iterator[Problem]:
    """Are more prompts unusable than the run file allows?"""
    allowed = config.stream.max_drop_fraction
    if tables.num_dropped <= allowed * tables.num_read:
        return
    meanings = {
        "too_long": f"longer than {longest} tokens",
        "empty": "without any token",
        "response_too_long": f"longer than {context} tokens with their response",
        "empty_response": "without a response",
    }
    shorten = "shorten them, raise teacher.max_model_len where the model allows, "
    remedies = {"too_long": shorten, "response_too_long": shorten}
    for reason, count in sorted(tables.dropped.items()):
        yield Problem(
            config.prompts.files_setting,
            f"{count} of {tables.num_read} prompts are {meanings[reason]} (the first is "
            f"{tables.first_dropped[reason]}); {remedies.get(reason, 'remove them, ')}or let them "
            f"be dropped with stream.max_drop_fraction ({allowed}, needs "
            f"{tables.num_dropped / tables.num_read:.4f} or more)",
        )


def check_answers_fit(
    config: RunConfig, tables: PromptTables, student: ModelFolder | None
) -> Iterator[Problem]:
    """Prompt and answer must fit a student with a context of its own."""
    if student is None or config.student.init == "from_teacher":
        return
    limit = student.context_tokens
    longest = tables.longest_row(config.teacher.sampling.max_tokens)
    if config.teacher.max_model_len is not None:
        longest = min(longest, config.teacher.max_model_len)
    if limit is not None and longest > limit:
        yield Problem(
            "student.model",
            f"{student.name} takes at most {limit} tokens, but a prompt with its answer can have "
            f"{longest}; set teacher.max_model_len: {limit}, or lower prompts.max_prompt_tokens or "
            "teacher.sampling.max_tokens",
        )


def cut_answers(config: RunConfig, tables: PromptTables, teacher: ModelFolder) -> Iterator[str]:
    """A notice where the context can cut answers before ``max_tokens`` does."""
    context, longest = context_tokens(config, teacher), tables.longest_asked_prompt
    max_tokens = config.teacher.sampling.max_tokens
    if longest is not None and longest + max_tokens > context:
        yield (
            f"the longest prompt ({longest} tokens) leaves its answer {context - longest} of "
            f"{max_tokens} tokens in a context of {context}"
        )
