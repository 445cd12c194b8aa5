"""Writes ``requirements/hashed/NAME.txt`` anew: the pins of a list, each with its file's SHA-256.

``python requirements/hash.py [cpu dev gpu ...]``, on Linux x86-64 with Python 3.11. pip names the
files that it would install, and their hashes; nothing is installed, but what no index describes is
downloaded (of gpu.txt some gigabytes). Where an index of one's own has other builds of a version,
pip is to ask PyPI alone: ``PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= python requirements/hash.py``.

What it cannot name in general is left out, and installed by version alone: the CPU build of torch,
which is another file under the same version at PyPI than at PyTorch's own index. That of gpu.txt is
PyPI's.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
LISTS = ("cpu", "dev", "gpu", "tasks", "trackers", "rivals")
BY_VERSION = {"cpu": ("torch",)}


def pins(name: str) -> list[str]:
    """The lines ``name==version`` of a list that are hashed."""
    lines = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").split("\n")
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [pin for pin in found if pin.partition("==")[0] not in BY_VERSION.get(name, ())]


def chosen_files(wanted: list[str]) -> list[dict[str, Any]]:
    """What pip would install for these pins: an item of its report for each."""
    with tempfile.TemporaryDirectory() as folder:
        listed, report = Path(folder) / "pins.txt", Path(folder) / "report.json"
        listed.write_text("\n".join(wanted), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
        subprocess.run(
            [*pip, "--ignore-installed", "--report", str(report), "-r", str(listed)], check=True
        )
        items: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
    return items


def hashed_lines(wanted: list[str], items: list[dict[str, Any]]) -> list[str]:
    """``name==version --hash=sha256:...`` for each pin. Raises SystemExit where one has no hash."""
    hashes = {}
    for item in items:
        archive = item["download_info"].get("archive_info", {})
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if "+" in version:
            raise SystemExit(
                f"{name} {version} would be taken, a build of another index; ask PyPI alone: "
                "PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= python requirements/hash.py NAME"
            )
        if digest := archive.get("hashes", {}).get("sha256"):
            hashes[normalised(name)] = digest
    lacking = [pin for pin in wanted if normalised(pin.partition("==")[0]) not in hashes]
    if lacking:
        raise SystemExit(f"no hash is known of {', '.join(lacking)}; ask an index that has them")
    return [f"{pin} --hash=sha256:{hashes[normalised(pin.partition('==')[0])]}" for pin in wanted]


def normalised(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(names: list[str]) -> None:
    """Write the hashed lists of these names."""
    for name in names:
        wanted = pins(name)
        lines = hashed_lines(wanted, chosen_files(wanted))
        head = f"# Written by requirements/hash.py: {name}.txt with the SHA-256 of each file."
        text = "\n".join([head, *lines, ""])
        (FOLDER / "hashed" / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"requirements/hashed/{name}.txt: {len(lines)} pins")


if __name__ == "__main__":
    main(sys.argv[1:] or list(LISTS))
