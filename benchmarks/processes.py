"""CPU time and memory of a run's processes by role, from /proc; what a benchmark of parts counts.

A role is what a process calls itself (Ray names its workers after their actors). Another process
than the driver looks, so that looking costs the driver nothing.
"""

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
ROLES = {
    "ray::ServeController": "serve controller",
    "ray::Coordinator": "coordinator",
    "ray::MapWorker(MapBatches(AnswerGroup))": "answer stage",
    "ray::SplitCoordinator": "splitter",
    "ray::ReadPlan": "source",
    "ray::ServeReplica:teacher": "replicas",
    "ray::Consumer": "consumer",
}
NATIVE = {"gcs_server": "gcs", "raylet": "raylet"}
OTHER = "others"


@dataclass(frozen=True)
class Sample:
    """One look: CPU seconds so far of each process, and its role; the driver's resident memory."""

    at: float
    cpu_s: dict[int, float]
    role: dict[int, str]
    driver_mb: float


@dataclass
class Sampler:
    """Looks at a driver and all its descendants every ``every_s``; a context manager."""

    driver: int
    every_s: float = 1.0
    samples: list[Sample] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Sampler":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self.every_s):
            self.samples.append(look(self.driver))

    def busy_cores(self, start: float, end: float) -> dict[str, tuple[float, int]]:
        """Cores each role kept busy between two moments (time.time), and its processes."""
        inside = [s for s in self.samples if start <= s.at <= end]
        if len(inside) < 2:
            raise SystemExit(f"{len(inside)} samples in {end - start:.1f} s; measure for longer")
        first, last = inside[0], inside[-1]
        spent: dict[str, float] = {}
        count: dict[str, int] = {}
        for pid, cpu_s in last.cpu_s.items():
            role = last.role[pid]
            spent[role] = spent.get(role, 0.0) + cpu_s - first.cpu_s.get(pid, 0.0)
            count[role] = count.get(role, 0) + 1
        return {role: (s / (last.at - first.at), count[role]) for role, s in sorted(spent.items())}

    def driver_mb(self, start: float, end: float) -> tuple[float, float]:
        """Resident memory of the driver at the first and the last look between two moments."""
        inside = [s.driver_mb for s in self.samples if start <= s.at <= end]
        return inside[0], inside[-1]


def look(driver: int) -> Sample:
    """CPU seconds of a process and its descendants, now."""
    stats: dict[int, tuple[int, float]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        stats[int(folder.name)] = int(words[1]), (int(words[11]) + int(words[12])) / TICKS_PER_S
    mine, front = {driver}, {driver}
    while front:
        front = {pid for pid, (parent, _) in stats.items() if parent in front} - mine
        mine |= front
    roles = {pid: "driver" if pid == driver else role_of(pid) for pid in mine}
    cpu_s = {pid: stats[pid][1] for pid in mine if pid in stats}
    return Sample(time.time(), cpu_s, roles, resident_mb(driver))


def resident_mb(pid: int) -> float:
    """Resident memory; 0 of a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MB
    except OSError:
        return 0.0


def role_of(pid: int) -> str:
    """What a process is in a run."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return OTHER
    program = os.path.basename(title.partition("\0")[0])
    if program in NATIVE:
        return NATIVE[program]
    return next((role for start, role in ROLES.items() if title.startswith(start)), OTHER)
