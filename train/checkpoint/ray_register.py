"""Ray Train's list of the checkpoints it may resume from, read and kept sound.

Ray Train's controller writes the list into the run folder, in place; only a checkpoint that it
names is ever resumed from. The newest *folder* may be ahead of it, and folders that it does not
name are deleted at start-up, since their step will be trained again. Where the list itself cannot
be read (a disk that was full, a machine that died while it was written) or is another Ray
version's, which Ray refuses, it is made anew from the folders, each of which is whole.
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
"""Written last: a folder that has it is whole."""


def registered_names(folder: RunFolder) -> set[str]:
    """Names of the checkpoint folders that Ray Train's manager knows; empty before the first."""
    name = f"{CHECKPOINTS}/{SNAPSHOT_FILE}"
    if not folder.exists(name):
        return set()
    state = json.loads(folder.read_text(name))
    results = [*state.get("checkpoint_results", []), state.get("latest_checkpoint_result")]
    return {result["checkpoint_dir_name"] for result in results if result}


def remove_unregistered(folder: RunFolder) -> list[str]:
    """Delete checkpoint folders that are not registered, and half-written ones; their names."""
    registered = registered_names(folder)
    removed = []
    for info in _folders(folder):
        stray = FOLDER_NAME.match(info.base_name) and info.base_name not in registered
        if stray or PART_NAME.match(info.base_name):
            folder.filesystem().delete_dir(info.path)
            removed.append(info.base_name)
    return sorted(removed)


def repair_register(folder: RunFolder) -> str | None:
    """Before a start: make the list anew if Ray would not take it; why, or None if it is sound."""
    name = f"{CHECKPOINTS}/{SNAPSHOT_FILE}"
    if not folder.exists(name):
        return None
    try:
        version = json.loads(folder.read_text(name))["ray_version"]
    except (ValueError, KeyError, TypeError) as error:
        why = f"it cannot be read ({error})"
    else:
        if version == metadata.version("ray"):
            return None
        why = f"it is of Ray {version}, and this is {metadata.version('ray')}"
    whole = sorted(
        info.base_name
        for info in _folders(folder)
        if FOLDER_NAME.match(info.base_name)
        and folder.exists(f"{CHECKPOINTS}/{info.base_name}/{STATE_FILE}")
    )
    folder.write_text(name, json.dumps(_register_of(whole)))
    return why


def _register_of(names: list[str]) -> dict[str, object]:
    """What Ray 2.60 writes for these checkpoints (``_CheckpointManagerState``), the newest last."""
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
    root = f"{folder.root}/{CHECKPOINTS}"
    for info in folder.filesystem().get_file_info(pafs.FileSelector(root, allow_not_found=True)):
        if info.type == pafs.FileType.Directory:
            yield info
