"""The static check: what can be known of a run before Ray, torch or vLLM are imported.

``driver.py check`` prints the problems; ``driver.py run`` refuses to start with any, and else goes
on with the ``Prepared`` run: tokenised prompts and resolved folders.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from raystill.base.console import ReadingProgress
from raystill.base.errors import ConfigError, Problem
from raystill.base.run_folder import RunFolder, resolve_output, resolve_store
from raystill.cluster.check.ahead.effects import (
    check_effects,
    effect_notices,
    sharding_notices,
    tail_notices,
)
from raystill.cluster.check.ahead.student_memory import check_memory
from raystill.cluster.check.ahead.teacher_memory import check_replicas, replica_notices
from raystill.cluster.check.evaluation import check_evaluation, check_tasks
from raystill.cluster.check.folders import check_settings, code_notices
from raystill.cluster.check.models import (
    check_ids,
    check_student,
    check_teacher,
    refit_notices,
    tokenizer_notices,
    trusts_student,
)
from raystill.cluster.check.output import (
    check_apart,
    check_output,
    check_same_columns,
    check_same_functions,
    check_same_prompts,
    check_space,
    check_store,
    space_needed,
)
from raystill.cluster.check.prepared import Prepared as Prepared
from raystill.cluster.check.prepared import store_space_notices
from raystill.cluster.check.teachers import (
    capture_notices,
    check_alike,
    check_judges,
    check_reasoning,
    check_rows_ahead,
    check_written_fit,
    context_tokens,
    judge_notices,
    notices_of,
    of_teacher,
    reasoning_notices,
    shared_notices,
    slots_notices,
    truncation_notices,
)
from raystill.cluster.check.terms import check_terms
from raystill.cluster.check.trackers import api_notices, check_trackers
from raystill.cluster.lineage.hub import check_hub
from raystill.config.load import load_leniently
from raystill.config.run import RunConfig
from raystill.datasets.filters.function import check_functions, read_functions
from raystill.datasets.filters.language import check_languages
from raystill.datasets.prompts.read import read_prompts
from raystill.datasets.prompts.select import UNBOUNDED
from raystill.datasets.prompts.tables import PromptTables, build_prompt_tables
from raystill.datasets.prompts.template import check_template
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.spool.progress import Progress
from raystill.model.files import ModelFolder, find_model

OF_MEMORY = ("student", "teacher", "training")
"""Sections on whose soundness it rests what a worker needs of a GPU's memory."""


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
    """Load a run file and check it; a wrong key does not hide a missing prompt file.

    Shows on stderr how far the prompts are read, where that takes longer.
    """
    loaded = load_leniently(path, overrides)
    problems, config, folder = loaded.problems, loaded.config, None
    file_is_wrong = bool(problems)
    if config is None:
        return Checked(problems, file_is_wrong=True)
    try:
        folder = RunFolder(resolve_output(config.output.path, path))
    except ConfigError as error:
        problems = problems + error.problems
    with ReadingProgress() as progress:
        check = StaticCheck(config, folder, loaded.refused, progress)
        prepared = check.run()
    problems = problems + check.problems
    return Checked(problems, check.notices, config, folder, prepared, file_is_wrong)


class StaticCheck:
    """One pass over a run; each step adds to ``problems`` and ``notices``.

    ``refused`` has the dotted names of settings whose value in ``config`` is a stand-in, because
    that of the run file is wrong: whatever depends on them is not checked. Imports no ray, torch,
    vllm or transformers.
    """

    def __init__(
        self,
        config: RunConfig,
        output: RunFolder | None,
        refused: frozenset[str] = frozenset(),
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.output = output
        self.refused = refused
        self.progress = progress
        self.problems: list[Problem] = []
        self.notices: list[str] = []
        self.store_path = ""
        self.teachers: dict[str, ModelFolder] = {}

    def run(self) -> Prepared | None:
        """Take every step; None where the teacher or the prompts cannot be used."""
        if self.known("stream", "training", "teacher"):
            self.problems += check_rows_ahead(self.config)
            self.notices += [*slots_notices(self.config), *shared_notices(self.config)]
        if self.known("training", "policy", "signal"):
            self.notices += [*sharding_notices(self.config), *tail_notices(self.config)]
        if self.known("output"):
            self.problems += check_trackers(self.config.output)
        if self.known("output", "terms"):
            problems, notices = check_hub(self.config, self.output)
            self.problems += problems
            self.notices += notices
        if self.known("evaluation"):
            self.problems += check_evaluation(self.config.evaluation)
            if self.known("teacher"):
                self.problems += check_tasks(self.config, self.output)
        self.check_folders()
        if self.known("filters"):
            self.check_functions()
        mixed: list[Problem] = []
        if self.output is not None and self.known("output", "store", "prompts"):
            mixed = list(check_apart(self.config, self.output, self.store_path))
        self.problems += mixed
        teacher, student = self.find_models()
        if self.known("terms", "teacher", "student"):
            problems, notices = check_terms(self.config, teacher, student, self.teachers)
            self.problems += problems
            self.notices += notices
        tables = None if mixed else self.tokenise_prompts(teacher, student)
        if teacher is None or tables is None:
            return None
        space = space_needed(self.config, student, tables) if student is not None else None
        if student is not None:
            self.check_memory(student, teacher, tables)
        if not self.refused:
            self.problems += check_effects(self.config)
            self.notices += effect_notices(self.config, tables)
        if self.store_path:
            self.notices += store_space_notices(self.config, self.store_path, tables, teacher)
        if self.output is not None and not any(p.where == "output.path" for p in self.problems):
            self.problems += check_space(self.output, space)
            if not self.refused:
                setting = self.config.prompts.files_setting
                self.problems += check_same_prompts(self.output, tables.train, setting)
                self.problems += check_same_columns(self.output, tables.columns)
        return Prepared(
            config=self.config,
            tables=tables,
            teacher=teacher,
            student=student,
            store_path=self.store_path,
            space_needed_bytes=space,
            notices=self.notices,
            teachers=self.teachers,
        )

    def check_memory(
        self, student: ModelFolder, teacher: ModelFolder, tables: PromptTables
    ) -> None:
        """Check that a worker has the memory it needs, where nothing else is wrong with it."""
        wrong = any(problem.where.startswith(OF_MEMORY) for problem in self.problems)
        if wrong or not self.known("student", "training", "teacher"):
            return
        problems, notices = check_memory(self.config, student, tables)
        self.problems += problems
        self.notices += notices + capture_notices(self.config, self.teachers or {"": teacher})

    def known(self, *names: str) -> bool:
        """Whether all these settings, and those in them, have the values of the run file."""
        return not any(
            f"{name}.".startswith(f"{bad}.") or f"{bad}.".startswith(f"{name}.")
            for bad in self.refused
            for name in names
        )

    def check_folders(self) -> None:
        """Check that run folder and teacher store can be written, and are not another run's."""
        if self.output is None or not self.known("output"):
            return
        problems, notices = check_output(self.config, self.output, compare=not self.refused)
        self.problems += problems
        self.notices += notices
        if self.known("store") and (self.config.store.path is not None or not problems):
            try:
                self.store_path = resolve_store(self.config.store.path, self.output)
                problems, notices = check_store(self.store_path)
                self.problems += problems
                self.notices += notices
            except ConfigError as error:
                self.problems += error.problems

    def check_functions(self) -> None:
        """Check that the functions of filters can be read, and are those a run began with."""
        try:
            texts = read_functions(self.config.filters)
            self.problems += check_functions(self.config.filters, texts)
            self.problems += check_languages(self.config.filters)
            if self.output is not None and not self.refused:
                self.problems += check_same_functions(self.config, self.output)
        except ConfigError as error:
            self.problems += error.problems

    def find_models(self) -> tuple[ModelFolder | None, ModelFolder | None]:
        """Find teacher and student, and check that they fit the run and each other.

        With ``init: from_teacher`` the student is the teacher's folder.
        """
        config, teacher, student = self.config, None, None
        if config.teachers is not None:
            teacher = self.find_teachers()
        elif self.known("teachers", "teacher.model"):
            teacher = self.find("teacher.model", config.teacher.model, config.teacher.revision)
        if self.known("student.init", "student.model"):
            student = teacher
            if config.student.model is not None:
                name, revision = config.student.model, config.student.revision
                student = self.find("student.model", name, revision)
        if teacher is not None:
            if config.teachers is None:
                self.check_teacher("", config, teacher)
                trusted = config.teacher.trust_remote_code and config.teacher.engine == "vllm"
                self.notices += code_notices("teacher.model", teacher, trusted)
            if student is not None:
                self.problems += check_student(config, teacher, student)
                self.notices += refit_notices(config, teacher)
                if student is not teacher:
                    trusted = trusts_student(config)
                    self.notices += code_notices("student.model", student, trusted)
                    self.notices += tokenizer_notices(teacher, student)
        return teacher, student

    def find_teachers(self) -> ModelFolder | None:
        """Find and check several teachers; the first one, or None where any cannot be used."""
        for name, one in self.config.by_teacher.items():
            where = f"teachers.{name}.model"
            found = self.find(where, one.teacher.model, one.teacher.revision)
            if found is None:
                continue
            self.teachers[name] = found
            self.check_teacher(name, one, found)
            trusted = one.teacher.trust_remote_code and one.teacher.engine == "vllm"
            self.notices += code_notices(where, found, trusted)
        if len(self.teachers) < len(self.config.by_teacher):
            return None
        self.problems += check_alike(self.config, self.teachers)
        self.problems += check_judges(self.config, self.teachers)
        return next(iter(self.teachers.values()))

    def check_teacher(self, name: str, config: RunConfig, teacher: ModelFolder) -> None:
        """Check a teacher, by its name among several; its files are sound if they are measured."""
        problems = list(check_teacher(config, teacher)) or list(check_replicas(config, teacher))
        self.problems += of_teacher(name, problems)
        self.notices += notices_of(name, replica_notices(config))

    def find(self, where: str, name: str, revision: str | None) -> ModelFolder | None:
        """The model's folder, or None and a problem or notice that says why."""
        result = find_model(name, revision)
        if result.problem is not None:
            self.problems.append(Problem(where, result.problem))
        if result.notice is not None and where == "student.model":
            self.notices.append(f"{where}: {result.notice}")
        elif result.notice is not None:  # Prompts need the teacher's tokenizer.
            self.problems.append(Problem(where, f"{result.notice}; try again, or name a folder"))
        if result.model is not None and (broken := check_settings(where, result.model)):
            self.problems += broken  # Of which nothing else can be judged.
            return None
        return result.model

    def tokenise_prompts(
        self, teacher: ModelFolder | None, student: ModelFolder | None
    ) -> PromptTables | None:
        """The tokenised rows; without a teacher the files are read all the same, and checked."""
        config = self.config
        if not self.known("prompts"):
            return None
        try:
            if teacher is None:
                read_prompts(config.prompts, self.progress)
                return None
            check_template(teacher.path, config.prompts)
            tokeniser = PromptTokeniser(teacher.path, config.prompts, self.progress)
        except ConfigError as error:
            self.problems += error.problems
            return None
        if any(problem.where == "student.model" for problem in self.problems):
            fit = None  # Fewer ids would be the same problem again.
        else:
            fit = student
        self.problems += check_ids(tokeniser.num_ids, config, teacher, fit)
        self.problems += check_reasoning(config, self.teachers or {"": teacher})
        views = config.by_teacher
        contexts = [
            context_tokens(one, self.teachers.get(name, teacher))
            for name, one in views.items()
            if name not in config.only_judges
        ]
        context = min(contexts)
        # A prompt must leave room for one token of answer.
        longest = min(context - 1, config.prompts.max_prompt_tokens or context)
        try:
            tables = build_prompt_tables(config, tokeniser, longest, context)
        except ConfigError as error:
            self.problems += error.problems
            return None
        self.problems += check_dropped(config, tables, longest, context)
        self.problems += check_answers_fit(config, tables, student)
        self.problems += check_written_fit(config, tables, context)
        for name, one in views.items():
            mine, folder = tables.of_teacher(name), self.teachers.get(name, teacher)
            judges = name in config.only_judges
            notices = [] if judges else list(truncation_notices(one, mine, folder))
            notices += [*api_notices(one, mine), *judge_notices(config, name, folder, tables)]
            self.notices += notices_of(name, notices)
        self.notices += [*reasoning_notices(config, teacher, tables), *tokeniser.notices()]
        return tables


def check_dropped(
    config: RunConfig, tables: PromptTables, longest: int, context: int
) -> Iterator[Problem]:
    """A problem for each reason, if more prompts are unusable than the run file allows."""
    allowed = config.stream.max_drop_fraction
    if tables.num_dropped <= allowed * tables.num_read:
        return
    meanings = {
        "too_long": f"longer than {longest} tokens",
        "empty": "without any text",
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
    """Do the longest prompt and answer fit into the context of a student of its own?"""
    if student is None or config.student.init == "from_teacher":
        return
    limit = student.context_tokens
    for name, one in config.by_teacher.items():
        most = one.teacher.max_model_len or UNBOUNDED
        longest = tables.of_teacher(name).longest_row(one.teacher.sampling.max_tokens, most)
        if limit is not None and longest > limit:
            message = (
                f"{student.name} takes at most {limit} tokens, but a prompt with its answer can "
                f"have {longest}; set teacher.max_model_len: {limit}, or lower "
                "prompts.max_prompt_tokens or teacher.sampling.max_tokens"
            )
            yield from of_teacher(name, [Problem("student.model", message)])
