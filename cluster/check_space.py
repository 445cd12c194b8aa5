"""Will what a run writes fit: the run folder on its disk, the teacher's answers on the store's."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from raystill.cluster.check_models import count_parameters, kept_layers
from raystill.cluster.config import RunConfig
from raystill.cluster.find_model import ModelFolder
from raystill.cluster.problems import Problem
from raystill.cluster.run_folder import CHECKPOINTS, HELD_OUT, STUDENT, RunFolder
from raystill.datasets.prompt_table import PromptTables
from raystill.datasets.signal import signal_of

ADAMW_BYTES = {"float32": 12, "float64": 24}  # a parameter and its two moments
EXPORT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SIGNAL_BYTES = 8  # an id and a logprob
HIDDEN_BYTES = 2  # of a component of a state; noise in its low bits hardly compresses
STORED_TOKEN_BYTES = 6.1  # the same compressed, as benchmarks/results/store.json has it
ESTIMATED = (CHECKPOINTS, STUDENT, HELD_OUT)  # what of the run folder space_needed counts


def space_needed(config: RunConfig, student: ModelFolder, tables: PromptTables) -> int | None:
    """Bytes the run folder will take: checkpoints (one more while writing), export, held-out."""
    kept = kept_layers(config, student) if config.student.init == "from_teacher" else None
    parameters = count_parameters(student, kept)
    if parameters is None:
        return None
    training = config.training
    checkpoints = (training.num_checkpoints_to_keep + 1) * ADAMW_BYTES[training.param_dtype]
    tokens = tables.response_tokens("held_out", config.teacher.sampling.max_tokens)
    held_out = tokens * config.evaluation.top_k * SIGNAL_BYTES
    return parameters * (checkpoints + EXPORT_BYTES[training.export_dtype]) + held_out


def check_space(folder: RunFolder, needed_bytes: int | None) -> list[Problem]:
    """Is there room for what the run has yet to write? Object stores are taken to have it."""
    free = free_bytes(folder)
    if needed_bytes is None or free is None:
        return []
    written = sum(_file_bytes(Path(folder.path, name)) for name in ESTIMATED)
    if free >= needed_bytes - written:
        return []
    return [
        Problem(
            "output.path",
            f"{folder.path} will need about {(needed_bytes - written) / 2**30:.1f} GiB"
            f"{' more' if written else ''}, but its disk has {free / 2**30:.1f} GiB free; free "
            "some, lower training.num_checkpoints_to_keep, or set another output.path",
        )
    ]


def store_space_notices(
    config: RunConfig, store_path: str, tables: PromptTables, teacher: ModelFolder
) -> Iterator[str]:
    """Where the store's disk might fill: if no answer is stored yet and all are of full length."""
    train, held_out = (
        tables.response_tokens(name, config.teacher.sampling.max_tokens)
        for name in ("train", "held_out")
    )
    most = train * _stored_token_bytes(config, teacher)
    most += held_out * STORED_TOKEN_BYTES * (1 + config.evaluation.top_k)
    free = free_bytes(RunFolder(store_path))
    if free is not None and free < most:
        yield (
            f"the teacher's answers may take up to {most / 2**30:.1f} GiB in {store_path}, which "
            f"has {free / 2**30:.1f} GiB free; a full disk stops the run, what is stored stays"
        )


def _stored_token_bytes(config: RunConfig, teacher: ModelFolder) -> float:
    """Bytes a response token of a training row takes in the store."""
    if config.signal.kind == "topk":
        return STORED_TOKEN_BYTES * (1 + config.signal.top_k)
    if config.signal.kind == "hidden":
        with suppress(ValueError):  # Which another check reports.
            return (
                STORED_TOKEN_BYTES + HIDDEN_BYTES * signal_of(config.signal, teacher.config).width
            )
    return STORED_TOKEN_BYTES


def _file_bytes(path: Path) -> int:
    """Size of a file, or of all files below a folder; 0 where there is none."""
    found = 0
    below = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    for file in below if path.is_dir() else [path]:
        with suppress(OSError):  # A checkpoint that is removed meanwhile.
            found += os.lstat(file).st_size
    return found


def free_bytes(folder: RunFolder) -> int | None:
    """Room on the disk where a folder is or will be; None for an object store."""
    if not folder.is_local:
        return None
    existing = Path(folder.path)
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
