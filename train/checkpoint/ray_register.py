"""Ray Train's register: the file that lists the checkpoints it may resume from.

Ray Train's controller writes the file into the run folder, in place. A run resumes only from a
checkpoint that is listed there. The newest checkpoint folder may not be listed yet. The worker
deletes folders that are not listed when it starts, since their steps will be trained again.

The file may be damaged, because the disk was full or the machine failed while it was written, it
may be from another Ray version, or name a folder that a person has removed, which Ray refuses; or
it may have been removed itself. ``fit`` then has it written anew from the folders that are
complete.
"""

import json
import re
from collections.abc import Iterator
from importlib import metadata

import pyarrow.fs as pafs

from raystill.base.run_folder import CHECKPOINTS, RunFolder

SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
FOLDER_NAME = re.compile(r"^step-\d{8,}$")
PART_NAME = re.compile(r"^\.step-\d{8,}\.part$")
STATE_FILE = "state.json"
"""Written last: a checkpoint folder that has it is complete."""


def registered_names(folder: RunFolder) -> set[str]:
    """Names of the checkpoint folders that the register lists; empty before the first."""
    name = f"{CHECKPOINTS}/{SNAPSHOT_FILE}"
    if not folder.exists(name):
        return set()
    state = json.loads(folder.read_text(name))
    results = [*state.get("checkpoint_results", []), state.get("latest_checkpoint_result")]
    return {result["checkpoint_dir_name"] for result in results if result}


def remove_unregistered(folder: RunFolder) -> list[str]:
    """Deletes checkpoint folders that are not registered or not complete; returns their names."""
    registered = registered_names(folder)
    removed = []
    for info in _folders(folder):
        stray = FOLDER_NAME.match(info.base_name) and info.base_name not in registered
        if stray or PART_NAME.match(info.base_name):
            folder.filesystem().delete_dir(info.path)
            removed.append(info.base_name)
    return sorted(removed)


def repair_register(folder: RunFolder) -> str | None:
    """Writes the register anew if Ray Train would refuse it; returns the reason, None if not.

    Called before Ray Train starts.
    """
    name = f"{CHECKPOINTS}/{SNAPSHOT_FILE}"
    complete = sorted(
        info.base_name
        for info in _folders(folder)
        if FOLDER_NAME.match(info.base_name)
        and folder.exists(f"{CHECKPOINTS}/{info.base_name}/{STATE_FILE}")
    )
    if (reason := _why_refused(folder, name, complete)) is not None:
        folder.write_text(name, json.dumps(_register_of(complete)))
    return reason


def _why_refused(folder: RunFolder, name: str, complete: list[str]) -> str | None:
    """Why Ray Train would not go on by the register as it is; None: it would."""
    if not folder.exists(name):
        return "it is not there" if complete else None
    try:
        version = json.loads(folder.read_text(name))["ray_version"]
        missing = sorted(registered_names(folder) - set(complete))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    if version != metadata.version("ray"):
        return f"it is from Ray {version}, and this is Ray {metadata.version('ray')}"
    return f"it names {missing[0]}, which is not there whole" if missing else None


def _register_of(names: list[str]) -> dict[str, object]:
    """The register of these checkpoints, the newest last.

    The fields are those of ``_CheckpointManagerState``, which Ray Train 2.60 writes.
    """
    results = [
        {"version": 0, "checkpoint_dir_name": n, "metrics": {"step": int(n.split("-")[1])}}
        for n in names
    ]
    return {
        "ray_version": metadata.version("ray"),
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(names))),
        "latest_checkpoint_result": results[-1] if results else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(names),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def _folders(folder: RunFolder) -> Iterator[pafs.FileInfo]:
    """All folders under ``checkpoints/``, complete or not."""
    root = f"{folder.root}/{CHECKPOINTS}"
    for info in folder.filesystem().get_file_info(pafs.FileSelector(root, allow_not_found=True)):
        if info.type == pafs.FileType.Directory:
            yield info
