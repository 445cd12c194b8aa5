"""A copy of the project as a clone has it: what git tracks, links as links."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "serve", "train", "datasets")


def tracked_files() -> list[Path]:
    """What git tracks, relative to the project's folder, but for what was deleted since."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    names = listed.stdout.decode().rstrip("\0").split("\0")
    return [Path(name) for name in names if os.path.lexists(ROOT / name)]


def copy_project(target: Path) -> Path:
    """Copy what git tracks into a folder, which is made."""
    for name in tracked_files():
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy, follow_symlinks=False)
    return target


def package_modules() -> set[str]:
    """The package's modules, by their paths in an installed one."""
    modules = [name for name in tracked_files() if name.suffix == ".py"]
    rooms = {f"raystill/{name}" for name in modules if name.parts[0] in ROOMS}
    return rooms | {str(name) for name in modules if name.parts[0] == "raystill"}
