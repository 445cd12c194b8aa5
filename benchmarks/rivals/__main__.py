"""Raystill beside what one would use instead: the same job, in alternation, on the same cores.

    make rivals                                          (environment, then this; all of it)
    python -m benchmarks.rivals [--rows N] [--held-out N] [--only TEXT] [--own] [--policy]
        [--table FILE]

Sides: Hugging Face ``generate`` then TRL's GKD; vLLM's offline engine, a file, then TRL's GKD
(``lmbda=0``); TRL on-policy by GKD (``lmbda=1``); Raystill. ``--policy`` adds two whose student
writes each row: TRL's ``DistillationTrainer``, and Raystill. Every part is a process and leaves a
record (``parts/NAME.json``), so a second call goes on where the first has stopped. ``--lock`` names
a file that is locked around each part, for a machine that others use too. The records say how many
cores all other processes took meanwhile. ``--table`` writes the table of what is finished.
"""

import argparse
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.processes import Sampler, look
from benchmarks.results import machine
from benchmarks.rivals.parts import Part, environment, mechanics, own_means, rival
from benchmarks.rivals.settings import Folder, Settings, write_json
from benchmarks.rivals.table import tables

MORE_ON_POLICY = ("policy-distill", "policy-raystill")
"""Sides that are compared among those on-policy alone, and asked for by name."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Hold the lock of that file, if one is named."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def busy_s() -> float:
    """CPU seconds of the whole machine since it was started, idle and waiting left out."""
    words = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:8]]
    return (sum(words) - words[3] - words[4]) / TICKS_PER_S


def spent_s(sampler: Sampler) -> float:
    """CPU seconds of all processes of a part that were seen: the most seen of each."""
    most: dict[int, float] = {}
    for sample in sampler.samples:
        for pid, seconds in sample.cpu_s.items():
            most[pid] = max(most.get(pid, 0.0), seconds)
    return sum(most.values())


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and all its descendants: an engine's workers outlive their parent."""
    tree = look(process.pid).role
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in tree:
        if pid != process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def run_part(part: Part, folder: Folder, settings: Settings, limit_s: float) -> dict[str, Any]:
    """Run one part to its end; its record.

    Raises SystemExit, with the end of its log, where it fails or needs longer than ``limit_s``.
    """
    log = folder.work / "logs" / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    busy, began = busy_s(), time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen(
            part.command, stdout=file, stderr=subprocess.STDOUT, env=environment(settings)
        )
        with Sampler(process.pid, every_s=0.5) as sampler:
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                end_tree(process)
                code = -1
    wall_s = time.monotonic() - began
    if code != 0:
        why = f"exceeded --limit {limit_s:.0f} s" if code == -1 else f"ended with status {code}"
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{part.name} {why}; its log is {log} and ends with:\n{end}")
    own_s = spent_s(sampler)
    return {
        "part": part.name,
        "side": part.side,
        "which": part.which,
        "counts": part.counts,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_s": round(wall_s, 1),
        "own_cores": round(own_s / wall_s, 2),
        "other_cores": round(max(0.0, busy_s() - busy - own_s) / wall_s, 2),
        "load": round(os.getloadavg()[0], 2),
        "figures": part.read(part.figures) if part.figures else {},
    }


def main() -> None:
    """Run what is missing, then tell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--rows", type=int, default=Settings.rows)
    parser.add_argument("--held-out", type=int, default=Settings.held_out)
    parser.add_argument("--students", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--cores", type=int, default=2, help="cores that every side is given")
    parser.add_argument("--own", action="store_true", help="also: each with its own means")
    parser.add_argument("--policy", action="store_true", help="also: two more sides on-policy")
    parser.add_argument("--only", default="", help="parts whose names contain this text")
    parser.add_argument("--lock", type=Path, help="file to lock around each part")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for one part")
    parser.add_argument("--table", type=Path, help="file for the table of what is finished")
    given = parser.parse_args()
    settings = Settings(given.rows, given.held_out, cores=given.cores)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    given.work = given.work.absolute()
    folder = Folder(given.work)
    settings.save(given.work)
    first = Part("material", rival("material", given.work), counts=False)
    parts = [first]
    for number, one in enumerate(wanted(first, folder, settings, given)):
        parts.append(one) if number else None
        record = folder.part(one.name)
        if record.exists():
            continue
        with locked(given.lock):
            print(f"{datetime.now():%H:%M:%S} {one.name}", flush=True)
            done = run_part(one, folder, settings, given.limit)
        write_json(record, done)
        print(f"    {done['wall_s']} s, others {done['other_cores']} cores {done['figures']}")
    text = tables(folder, settings, machine())
    print(text)
    if given.table:
        given.table.write_text(text)


def wanted(
    first: Part, folder: Folder, settings: Settings, given: argparse.Namespace
) -> Iterator[Part]:
    """The parts to run: what they start from first, which later ones read."""
    yield first
    parts = list(mechanics(settings, folder))
    if given.own:
        parts += own_means(settings, folder)
    for part in parts:
        late = part.which.isdigit() and int(part.which) > given.students
        more = part.side in MORE_ON_POLICY and not (given.policy or "policy" in given.only)
        if given.only in part.name and not late and not more:
            yield part


if __name__ == "__main__":
    sys.exit(main())
