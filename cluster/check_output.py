"""The static check of the run folder: can it be written, is it this run's, is there space?"""

import os
import tempfile
import threading
from pathlib import Path

import pyarrow as pa

from raystill.cluster.config import RunConfig
from raystill.cluster.load import compare_identity, validate_leniently
from raystill.cluster.problems import Problem
from raystill.cluster.run_folder import CONFIG, TOP_LEVEL_NAMES, TRAIN_PROMPTS, RunFolder
from raystill.cluster.strict_yaml import parse_yaml

REMOTE_WAIT_S = 4.0
WRITE_TEST = ".raystill-write-test"


def check_output(
    config: RunConfig, folder: RunFolder, compare: bool = True
) -> tuple[list[Problem], list[str]]:
    """Problems with the run folder, and notices; writes nothing that stays.

    ``compare``: whether ``config`` is whole, so that it can be held against an earlier run's.
    """
    if folder.is_local:
        problem = why_not_writable(Path(folder.path), "output.path")
        if problem is not None:
            return [Problem("output.path", problem)], []
        return check_earlier_run(config, folder) if compare else [], []
    outcome: list[list[Problem]] = []
    thread = threading.Thread(
        target=lambda: outcome.append(_check_remote(config, folder, compare)),
        name="output",
        daemon=True,
    )
    thread.start()
    thread.join(REMOTE_WAIT_S)
    if not outcome:
        return [], [f"output.path: {folder.path} did not answer in {REMOTE_WAIT_S:.0f} s"]
    return outcome[0], []


def check_store(path: str) -> list[Problem]:
    """Can the teacher store be written? One on an object store is tried when it is first used."""
    problem = why_not_writable(Path(path), "store.path") if "://" not in path else None
    return [Problem("store.path", problem)] if problem is not None else []


def why_not_writable(path: Path, setting: str) -> str | None:
    """Why the folder cannot be made or written, or None."""
    existing = path
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        return f"{path} cannot be made: {existing} is a file; name another folder"
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".raystill-"):
            return None
    except OSError as error:
        return (
            f"{path} cannot be written: {existing}: {error.strerror}; make it writable or set "
            f"{setting} to another folder"
        )


def check_earlier_run(config: RunConfig, folder: RunFolder) -> list[Problem]:
    """An existing folder must be of this very run."""
    names = folder.names()
    if CONFIG not in names:
        strange = [n for n in names if n not in TOP_LEVEL_NAMES and not n.startswith(".")]
        if not strange:
            return []
        listed = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
        message = f"{folder.path} is no run folder, but has {listed}; name a new or empty folder"
        return [Problem("output.path", message)]
    earlier = validate_leniently(parse_yaml(folder.read_text(CONFIG)) or {}, []).config
    if earlier is None:
        message = f"{folder.path}/{CONFIG} cannot be read by this version; set another output.path"
        return [Problem("output.path", message)]
    differences = compare_identity(earlier, config)
    was, now = earlier.training.epochs, config.training.epochs
    if now < was or (now > was and config.training.schedule != "constant"):
        differences.append(
            f"training.epochs was {was}, is {now}: they may only grow, and with training.schedule: "
            "constant, since the others end with the epochs"
        )
    if not differences:
        return []
    listed = "; ".join(differences)
    return [
        Problem(
            "output.path",
            f"{folder.path} holds a run of another configuration ({listed}); set these back to "
            "resume it, or set output.path to a new folder",
        )
    ]


def check_same_prompts(folder: RunFolder, train: pa.Table, setting: str) -> list[Problem]:
    """A resumed run must find the rows it began with: its ledger counts them by number.

    ``setting`` names the prompts' files. Where all rows are there, the date in them may be another.
    """
    if not folder.exists(TRAIN_PROMPTS):
        return []
    before = folder.read_table(TRAIN_PROMPTS)
    shared = [n for n in ("prompt_ids", "source", "response_ids") if n in before.column_names]
    if before.select(shared).combine_chunks().equals(train.select(shared).combine_chunks()):
        return []
    dated = ""
    if before["source"].combine_chunks().equals(train["source"].combine_chunks()):
        dated = (
            "if the teacher's chat template prints the date, set prompts.template_date to the day "
            f"of the first start ({TRAIN_PROMPTS} is of {_day_of(folder, TRAIN_PROMPTS)}), else "
        )
    return [
        Problem(
            setting,
            f"the prompts are not those that {folder.path} began with ({before.num_rows} rows, now "
            f"{train.num_rows}); {dated}restore the files, or set output.path to a new folder",
        )
    ]


def _day_of(folder: RunFolder, name: str) -> str:
    """The day, here, on which a file of the run was last written."""
    written = folder.filesystem().get_file_info(f"{folder.root}/{name}").mtime
    return "an unknown day" if written is None else f"{written.astimezone():%Y-%m-%d}"


def _check_remote(config: RunConfig, folder: RunFolder, compare: bool) -> list[Problem]:
    try:
        folder.write_bytes(WRITE_TEST, b"")
        folder.filesystem().delete_file(f"{folder.root}/{WRITE_TEST}")
        return check_earlier_run(config, folder) if compare else []
    except Exception as error:  # every object store has its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"{folder.path} cannot be written ({reason}); check the name and your credentials"
        return [Problem("output.path", message)]
