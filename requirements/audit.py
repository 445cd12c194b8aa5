"""Says which pins have known faults: asks OSV (https://osv.dev) about every list in this folder.

``python requirements/audit.py [cpu dev ...]``, standard library only. It needs the network: names
and versions of the pins go to OSV's service, which has the advisories of PyPI, GitHub and others.
Without an answer nothing is known, and it says so: exit status 2, never 0. 1: a pin has a fault.
``OSV_URL`` names another server that speaks OSV's protocol, such as a mirror.
"""

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
SERVICE = "https://api.osv.dev"
MOST_QUERIES = 1000
"""That one request may hold (https://google.github.io/osv.dev/post-v1-querybatch/)."""
TIMEOUT_S = 30


def pins(path: Path) -> list[tuple[str, str]]:
    """Name and version of each line ``name==version`` of a list."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, rest = line.partition("#")[0].strip().partition("==")
        if equals:
            version = rest.split(";")[0].split()[0]
            found.append((name.partition("[")[0].strip(), version.partition("+")[0]))
    return found


def known_faults(wanted: list[tuple[str, str]], service: str) -> dict[tuple[str, str], list[str]]:
    """Ids of the advisories of each pin that has any.

    Raises OSError where the service cannot be reached, ValueError for an answer that is none.
    """
    faults: dict[tuple[str, str], list[str]] = {}
    for start in range(0, len(wanted), MOST_QUERIES):
        part = wanted[start : start + MOST_QUERIES]
        queries = [
            {"package": {"ecosystem": "PyPI", "name": name}, "version": version}
            for name, version in part
        ]
        request = urllib.request.Request(
            f"{service}/v1/querybatch",
            json.dumps({"queries": queries}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            results = _results(json.load(answer), len(part))
        for pin, result in zip(part, results, strict=True):
            if found := [str(fault["id"]) for fault in (result or {}).get("vulns") or ()]:
                faults[pin] = found
    return faults


def _results(answer: Any, number: int) -> list[Any]:
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or len(results) != number:
        raise ValueError(f"expected {number} results")
    return results


def main(names: list[str]) -> int:
    """Ask about these lists, or all of them; the exit status."""
    paths = [FOLDER / f"{name}.txt" for name in names] or sorted(FOLDER.glob("*.txt"))
    lists = {path.stem: pins(path) for path in paths}
    wanted = sorted({pin for one in lists.values() for pin in one})
    service = os.environ.get("OSV_URL", SERVICE).rstrip("/")
    try:
        faults = known_faults(wanted, service)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "reason", None) or error
        print(
            f"nothing is known of the {len(wanted)} pins: {service} gave no answer ({reason}); run "
            "this where the network reaches it, or set OSV_URL to a mirror",
            file=sys.stderr,
        )
        return 2
    for (name, version), ids in faults.items():
        where = ", ".join(stem for stem, one in lists.items() if (name, version) in one)
        print(f"{name}=={version} ({where}): {', '.join(ids)}")
    told = f"{len(faults)} of {len(wanted)} pins have known faults" if faults else "no known fault"
    print(f"{told} in {', '.join(lists)}, by {service}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
