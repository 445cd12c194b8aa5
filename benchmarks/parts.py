"""The parts a whole run is compared with: the teacher alone, the student alone, the whole.

Each part is a Ray session of its own in a child process, so that none inherits another's memory,
caches or threads; all read the same run file with the same overrides.
"""

import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.steady import Side, steady_arrivals, whole_flights
from raystill.placement.requests import CPU_STUDENT_ENVIRONMENT

POLL_S = 0.2
WARM_UP_STEPS = 1
STUDENT_STEPS = 10
REPLAY_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Whole:
    """A whole run: its steady speed, the student's waiting in it, the driver's peak memory."""

    side: Side
    wait_share: float
    driver_peak_mb: float


def measure_teacher_alone(run_file: str, overrides: list[str], rows_path: str) -> Side:
    """The deployment and stream of the run with a consumer that takes every block at once."""
    return Side(**_child("teacher", run_file, overrides, rows_path))


def measure_student_alone(run_file: str, overrides: list[str], rows_path: str) -> Side:
    """The run's steps on rows held in memory, in one process on the student's cores."""
    return Side(**_child("student", run_file, overrides, rows_path))


def measure_side_by_side(run_file: str, overrides: list[str], rows_path: str) -> tuple[Side, Side]:
    """Teacher alone and student alone at the same time, with nothing between them.

    What they lose against being alone is the machine's doing (shared caches, memory, hardware
    threads, Ray's own processes), not the stream's.
    """
    until = Path(f"{rows_path}.beside.done")
    until.unlink(missing_ok=True)
    with ThreadPoolExecutor(1) as pool:
        student = pool.submit(_child, "student", run_file, overrides, rows_path, str(until))
        try:
            fresh = f"{rows_path}.{time.monotonic_ns()}"  # With a store that holds nothing yet.
            teacher = _child("teacher", run_file, overrides, fresh)
        finally:
            until.touch()
        return Side(**teacher), Side(**student.result())


def run_whole(run_file: str, overrides: list[str], folder: str, bursts: bool = True) -> Whole:
    """``driver.py run`` with the overrides; figures from its metrics and its process.

    ``bursts``: rows come from a teacher; else from the store, where all steps but the first few are
    steady.
    """
    command = [sys.executable, "driver.py", "run", run_file, "--set", f"output.path={folder}"]
    command += ["--set", f"store.path={folder}-store"]  # Nothing is reused from another part.
    for override in overrides:
        command += ["--set", override]
    log = Path(f"{folder}.log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak_kb = 0
        while process.poll() is None:
            peak_kb = max(peak_kb, _peak_kb(process.pid))
            time.sleep(POLL_S)
    if process.returncode != 0:
        raise SystemExit(f"the whole run failed with {process.returncode}:\n{log.read_text()}")
    config = _config(run_file, overrides)
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    per_step = config.training.rows_per_step
    filled = math.ceil(config.rows_ahead / per_step)
    window = slice(REPLAY_WARM_UP_STEPS, len(lines))
    if bursts:
        window = whole_flights(len(lines) - filled, filled, config.rows_in_flight // per_step)
    steady = lines[window]
    seconds = steady[-1]["time"] - lines[window.start - 1]["time"]
    side = Side(
        rows=sum(line["rows"] for line in steady),
        tokens=sum(line["tokens"] for line in steady),
        seconds=seconds,
    )
    waited = sum(line["data_wait_s"] for line in steady)
    return Whole(side, waited / seconds, peak_kb / 1024)


def _peak_kb(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(s.split()[1]) for s in status.splitlines() if s.startswith("VmHWM")), 0)


def _child(
    part: str, run_file: str, overrides: list[str], rows_path: str, until: str = ""
) -> dict[str, Any]:
    """Run one part in a process of its own; its last line of output is the result."""
    words = [part, run_file, rows_path, until, *overrides]
    command = [sys.executable, "-m", "benchmarks.parts", *words]
    environment = CPU_STUDENT_ENVIRONMENT if part == "student" else {}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode != 0:
        raise SystemExit(f"{part} alone failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _config(run_file: str, overrides: list[str]) -> Any:
    from raystill.config.load import load_config

    return load_config(run_file, overrides)


def teacher_part(run_file: str, rows_path: str, overrides: list[str]) -> dict[str, Any]:
    """In a child: serve, stream, take; write the rows for the student alone."""
    import ray

    from raystill.base.run_folder import RunFolder
    from raystill.cluster.check.static import check_run_file
    from raystill.cluster.job import connect, run
    from raystill.serve.deploy import TeacherApp

    written = [f"output.path={rows_path}.teacher", f"store.path={rows_path}.store"]
    checked = check_run_file(run_file, [*overrides, *written])
    config, prepared = checked.config, checked.prepared
    if checked.problems or config is None or prepared is None:
        raise SystemExit("\n".join(map(str, checked.problems)))
    folder = RunFolder(f"{rows_path}.teacher")
    connect.connect(config.cluster, folder.logs)
    measured = run.begin(config, folder, prepared)
    teacher = TeacherApp.of(measured)
    teacher.deploy()
    teacher.wait()
    spec = run.stream(measured, prepared)
    take = ray.remote(num_cpus=0)(_take_everything)
    result = ray.get(take.remote(spec, measured.coordinator, rows_path))
    connect.disconnect()
    return result


def _take_everything(spec: Any, coordinator: Any, rows_path: str) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    import ray

    from raystill.datasets.stream.ledger import Ledger
    from raystill.datasets.stream.stream import build_stream, iterate_groups, uneven_shares

    ledger = Ledger(spec.num_rows).to_dict()
    attempt = ray.get(coordinator.publish.remote(0, 0, ledger))
    [shard] = uneven_shares(build_stream(spec), 1)
    arrivals: list[tuple[float, int, int]] = []
    tables = []
    for table in iterate_groups(shard):
        coordinator.taken.remote(attempt, len(table))
        tokens = pc.sum(pc.list_value_length(table["response_ids"])).as_py()
        arrivals.append((time.perf_counter(), len(table), tokens))
        tables.append(table)
    pq.write_table(pa.concat_tables(tables), rows_path)
    return asdict(steady_arrivals(arrivals, spec.groups_in_flight))


def student_part(run_file: str, rows_path: str, overrides: list[str], until: str) -> dict[str, Any]:
    """In a child, on the student's cores: optimizer steps on rows in memory.

    ``until``: a file; where it is named, the steps go on, on the same rows, until it is there.
    """
    import pyarrow.parquet as pq
    import torch

    from raystill.placement.requests import student_cores
    from raystill.train.batch.rows import rows_from_table
    from raystill.train.step.micro_batches import BatchMaker
    from raystill.train.step.optimizer import build_optimizer
    from raystill.train.step.step import GlobalStep
    from raystill.train.student.build import build_student, num_classes
    from raystill.train.student.module import StudentModule, resolve_compute_dtype

    config = _config(run_file, overrides)
    cores = student_cores(config, sorted(os.sched_getaffinity(0)))
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    training = config.training
    dtype = resolve_compute_dtype(training.compute_dtype, torch.device("cpu"), training.param_dtype)
    student = StudentModule(build_student(config, config.teacher.model, 0), dtype)
    student.train()
    batches = BatchMaker(
        training,
        config.objective,
        signal_kind=config.signal.kind,
        student_vocab=num_classes(student.model, config.teacher.model),
    )
    step = GlobalStep(student, build_optimizer(student, training), batches, total_steps=100)
    rows = rows_from_table(pq.read_table(rows_path).combine_chunks())
    per_step = training.rows_per_step
    in_rows = len(rows) // per_step
    trained = tokens = number = 0
    while not os.path.exists(until) if until else number < WARM_UP_STEPS + STUDENT_STEPS:
        if number == WARM_UP_STEPS:
            started = time.perf_counter()
        first = number % in_rows * per_step
        result = step.run(number, rows[first : first + per_step], True, False)
        number += 1
        if number > WARM_UP_STEPS:
            trained += result.rows
            tokens += result.tokens
    return {"rows": trained, "tokens": tokens, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    part, run_file, rows_path, until, *overrides = sys.argv[1:]
    if part == "teacher":
        told = teacher_part(run_file, rows_path, overrides)
    else:
        told = student_part(run_file, rows_path, overrides, until)
    print(json.dumps(told))
