"""``driver.py calibrate``: which signal this run needs, measured before it is paid for.

Where it sits: the driver checks the run file, then calls `calibrate_command`, which has the run's
own teacher answer some of its prompts (or reads the store), ends it, and compares what each signal
would teach in processes that are placed as the student workers. *Waits for* the teacher, then for
those processes. The driver sees figures, never a row.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import ray

from raystill.base.console import open_named
from raystill.base.errors import ConfigError, Problem, RunError
from raystill.base.formatting import plural
from raystill.base.run_folder import CALIBRATION, STUDENT, RunFolder, resolve_input
from raystill.cluster.check.ahead.student_memory import pass_tokens, student_sizes
from raystill.cluster.check.models import check_teacher, check_tokenizers
from raystill.cluster.check.prepared import Prepared
from raystill.cluster.check.static import Checked
from raystill.cluster.commands.calibrators import Calibrators, result_of
from raystill.config.run import RunConfig
from raystill.datasets.lookup.view import StoreView
from raystill.datasets.prompts.tables import PromptTables
from raystill.datasets.rows.signal import Signal, hidden_size
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.answers import answer_prompts
from raystill.model.files import ModelFolder, find_model
from raystill.model.on_node import ModelSource
from raystill.placement import memory
from raystill.run import Run
from raystill.serve.deploy import TeacherApp
from raystill.train.calibration.calibrator import POSITIONS_PER_ROW, require_answers
from raystill.train.calibration.compare import objectives_to_compare

INITIAL, TRAINED = "initial", "trained"
SPARE_ROWS = 1.25  # Some answers are shorter than the positions wanted of them.
FLATTERS = (
    "only the untrained student was compared: one that was cut out of its teacher puts so little "
    "mass where the teacher does that a few ids tell it nearly all, which flatters forward_kl; "
    "compare a trained one too (--student FOLDER) before you settle on a signal"
)


@dataclass(frozen=True)
class CalibrationOptions:
    """What is asked for.

    ``student``: Folder of a trained one; on the command line None stands for the run's own, in a
    comparison for none.
    """

    positions: int
    cosine: float
    all_objectives: bool
    student: str | None


def trained_student(folder: RunFolder, asked: str | None) -> str | None:
    """The folder that was named, else the run's own finished student, else None."""
    if asked is not None:
        return os.path.abspath(resolve_input(asked))
    own = f"{STUDENT}/config.json"
    return str(folder.local / STUDENT) if folder.local and folder.exists(own) else None


def unfit(config: RunConfig, prepared: Prepared, student: str | None) -> list[Problem]:
    """What keeps this run's signals from being compared, beyond what a check finds."""
    if config.teachers is not None:
        message = "names several teachers, and a calibration is of one; set teacher to it instead"
        return [Problem("teachers", message)]
    if config.teacher.engine != "vllm":
        message = (
            f"is {config.teacher.engine!r}, which has no hidden states, and all signals are worked "
            "out from these; set it to vllm"
        )
        return [Problem("teacher.engine", message)]
    hidden = config.signal.model_copy(update={"kind": "hidden"})
    problems = list(check_teacher(config.model_copy(update={"signal": hidden}), prepared.teacher))
    if student is not None and not Path(student).is_dir():
        message = f"there is no folder {student!r}; name that of a trained student"
        problems.append(Problem("--student", f"{message}, as a run leaves it in {STUDENT}/"))
    elif student is not None:
        found = find_model(student)
        if found.model is None:
            return [*problems, Problem("--student", str(found.problem))]
        mismatches = check_tokenizers(prepared.teacher, found.model)
        problems += [Problem("--student", problem.message) for problem in mismatches]
    return problems


def calibration_memory(
    config: RunConfig, student: ModelFolder, tables: PromptTables
) -> tuple[list[Problem], str | None]:
    """What comparing signals needs in each of its processes, and has there; None: not known."""
    if (sizes := student_sizes(config, student)) is None:
        return [], None
    training, tokens = config.training, pass_tokens(config, tables)
    kind, share = training.accelerator_type, training.gpus_per_worker
    on_gpu = share != 0 and (bool(share) or kind is not None)
    workers = training.min_workers
    again = training.activation_checkpointing
    needed = memory.calibration_need(*sizes, tokens, on_gpu, workers, again)
    where = memory.describe(needed, "on its GPU" if on_gpu else "of memory")
    processes = "in one process" if workers == 1 else f"in each of {workers} processes"
    told = f"comparing signals takes about {where} {processes}, for passes of {tokens:,} tokens"
    has = memory.GPU_BYTES.get(kind or "") if on_gpu else None
    if has is None:
        return [], told
    has *= min(1.0, share or 1.0)
    if needed.device <= has:
        return [], f"{told}; {kind} has {has / 1e9:.0f} GB"
    row = tables.longest_prompt_tokens + config.max_response_tokens
    remedy = fitting(sizes, workers, tokens, row, has, again)
    return [Problem("training", f"{told}, but {kind} has {has / 1e9:.0f} GB; {remedy}")], None


def fitting(
    sizes: tuple[memory.Parts, memory.Decoder],
    workers: int,
    tokens: int,
    row: int,
    has: float,
    again: bool = False,
) -> str:
    """What to set so that a comparison fits ``has`` bytes of a GPU; row: tokens of the longest.

    again: whether activations are computed again already.
    """
    for more in (1, 2, 4, 8, 16, 32):
        for recompute, passes in ((again, tokens), (True, tokens), (True, row)):
            needed = memory.calibration_need(
                *sizes, passes, workers=workers * more, recompute=recompute
            ).device
            if needed <= has:
                settings = [f"training.num_workers={workers * more}"] if more > 1 else []
                if recompute and not again:
                    settings.append("training.activation_checkpointing=true")
                settings += [f"training.tokens_per_micro_batch={row}"] if passes < tokens else []
                return f"set {' and '.join(settings)} ({needed / 1e9:.1f} GB)"
    return "calibrate a smaller student of the same kind, or name a GPU with more memory"


def calibrate(
    config: RunConfig,
    prepared: Prepared,
    options: CalibrationOptions,
    output: RunFolder,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All figures, as `calibrate_report` takes them; connected to the cluster. Raises RunError."""
    rows = ask_teacher(config, prepared, options.positions, output, say)
    objectives = objectives_to_compare(config.objective, options.all_objectives)
    students = {INITIAL: None} | ({TRAINED: options.student} if options.student else {})
    found: dict[str, Any] = {"costs": {}, "students": {}}
    source = ModelSource.of(config.teacher.model, prepared.teacher_folder)
    with Calibrators(config, source, rows, options.positions) as calibrators:
        for name, folder in students.items():
            parameters = calibrators.all("load", folder)
            if name == INITIAL:
                found |= calibrators.first("describe")
            compared = {}
            for objective, terms in objectives.items():
                say(f"comparing signals for {objective}, {name} student")
                compared[objective] = calibrators.all("compare", terms)
                if name == INITIAL:
                    found["costs"][objective] = calibrators.all("costs", terms)
            found["students"][name] = {
                "folder": folder,
                "parameters": parameters,
                "objectives": compared,
            }
    teacher = {"teacher": config.teacher.model, "teacher_identity": prepared.teacher_identity}
    notes = [] if options.student else [FLATTERS]
    if config.objective.temperature != 1.0:
        notes.append(
            f"objective.temperature is {config.objective.temperature:g}, for which only hidden "
            "will do; the signals were compared at temperature 1"
        )
    return {**teacher, "cosine": options.cosine, "notes": notes, **found}


def ask_teacher(
    config: RunConfig,
    prepared: Prepared,
    positions: int,
    output: RunFolder,
    say: Callable[[str], None],
) -> Any:
    """A reference to answers of some training prompts with their hidden states (row_schema).

    They are chosen by the run's seed, so that a second calibration finds them in the store. The
    teacher is deployed only where the store lacks some, and has ended when this returns.
    """
    train, per_row = prepared.train, POSITIONS_PER_ROW
    count = min(len(train), max(1, round(SPARE_ROWS * positions / per_row)))
    random = np.random.default_rng(config.section_seeds()["evaluation"])
    chosen = np.sort(random.permutation(len(train))[:count])
    prompts = train.take(pa.array(chosen)).combine_chunks()
    signal = Signal("hidden", hidden_size(prepared.teacher.config))
    run = Run(
        config=config,
        folder=output,
        id=f"calibration-{uuid4().hex}",
        teacher=ModelSource.of(config.teacher.model, prepared.teacher_folder),
        teacher_identity=prepared.teacher_identity,
        store_path=prepared.store_path,
        num_rows=len(prompts),
    )
    teacher = TeacherApp.of(run)
    missing = num_missing(run.store_path, prompts, signal)
    say(f"{plural(count, 'answer')} with hidden states, {missing} of them from the teacher")
    try:
        if missing:
            teacher.deploy()
            teacher.wait()
        rows, done = answer_rows.remote(run, prompts, signal)
        result_of(done)
        return rows
    finally:
        if missing:
            teacher.shutdown()


def num_missing(store_path: str, prompts: pa.Table, signal: Signal) -> int:
    """How many of the prompts (PROMPT_SCHEMA) the teacher must answer or score."""
    view = StoreView(TeacherStore(store_path), prompts["key"], signal)
    given = prompts["response_ids"].combine_chunks()
    found = view.look_up(np.arange(len(prompts)), given)
    return len(found.to_ask) + len(found.to_score[0])


@ray.remote(num_cpus=0, num_returns=2)
def answer_rows(run: Run, prompts: pa.Table, signal: Signal) -> tuple[pa.Table, int]:
    """Answers (row_schema) of prompts (PROMPT_SCHEMA), from the store or the deployed teacher.

    And how many there are, which a caller can wait for without fetching them.
    """
    rows = answer_prompts(run, prompts, signal, "calibration")
    require_answers(rows, len(prompts))
    return rows, len(rows)


EXIT_INTERRUPTED = 130


def _made(path: str) -> RunFolder:
    """The folder for the report. Raises RunError where it cannot be made."""
    folder = open_named(path)
    try:
        return folder.ensure()
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise RunError(f"{path} cannot be made ({reason}); name another --output") from None


def calibrate_command(
    checked: Checked, options: CalibrationOptions, output: str | None, say: Callable[[str], None]
) -> int:
    """Compare, write, print; the exit status. Raises ConfigError and RunError.

    ``checked``: a run file without problems. ``output``: a folder; None: in the run's own.
    """
    config, folder, prepared = checked.config, checked.folder, checked.prepared
    if checked.problems or config is None or folder is None or prepared is None:
        raise ConfigError(checked.problems)

    from raystill.cluster.commands import calibrate_report
    from raystill.cluster.job import run

    options = replace(options, student=trained_student(folder, options.student))
    problems, told = unfit(config, prepared, options.student), None
    if prepared.student is not None:
        too_large, told = calibration_memory(config, prepared.student, prepared.tables)
        problems += too_large
    if problems:
        raise ConfigError(problems)
    if told is not None:
        say(told)
    written = _made(output or folder.join(CALIBRATION))
    prepared.fetch_models()
    with run.connected(config, written):
        if problems := run.check_on_cluster(config):
            raise ConfigError(problems)
        try:
            found = calibrate(config, prepared, options, written, say)
        except KeyboardInterrupt:
            say("stopped; what the teacher has answered is kept in the store")
            return EXIT_INTERRUPTED
    calibrate_report.write_calibration(written, found)
    calibrate_report.print_calibration(found)
    say(f"\nwritten to {written.path}")
    return 0
