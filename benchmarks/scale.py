"""What one driver can feed: synthetic teachers (delays, not compute) at 1 to 32 replicas.

    python -m benchmarks.scale [--replicas 1 2 4 8 16 32] [--output benchmarks/results/scale.json]

Each case is a Ray session of its own in a child process: so many replicas, each with eight groups
of eight rows in flight that take four seconds, the stream of a run, and a consumer that takes every
block at once. Measured over whole flights of the full stream: rows/s against the ideal (replicas x
groups in flight x rows a group / delay), and from /proc the cores that each part keeps busy. The
parts that there is one of, whatever the number of replicas, are the limits; docs/performance.md
works out from their cost a group, a token and a replica where each of them is reached.

The rows of the sweep are short, so that two cores hold 32 replicas. ``long rows`` has 512 tokens
with K = 64, which gives the cost a token; ``no delay`` finds what this machine moves at most.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import Sampler
from benchmarks.results import machine, write_result
from benchmarks.steady import whole_flights

REPLICAS = (1, 2, 4, 8, 16, 32)
GROUP_ROWS, GROUPS_EACH, TOP_K = 8, 8, 64
DELAY_S = 4.0
SHORT, LONG = 16, 512
FLIGHTS, FLIGHTS_WITHOUT_DELAY = 5, 40
FILLING, EMPTYING = 2, 1
POLL_S = 0.5
LOOKS_A_STATUS = 20


def case(name: str, replicas: int, tokens: int = SHORT, delay_s: float = DELAY_S) -> dict[str, Any]:
    """Settings of one child."""
    return {"name": name, "replicas": replicas, "tokens": tokens, "delay_s": delay_s}


def run_config(settings: dict[str, Any], folder: str) -> Any:
    """A run of synthetic teachers, each with a logical CPU of its own."""
    from raystill.config.run import RunConfig

    replicas, tokens = settings["replicas"], settings["tokens"]
    synthetic = {"vocab_size": 49152, "response_tokens": tokens, "delay_s": settings["delay_s"]}
    return RunConfig.model_validate(
        {
            "teacher": {
                "model": folder,
                "engine": "synthetic",
                "synthetic": synthetic,
                "sampling": {"max_tokens": tokens, "stop_token_ids": [2]},
                "num_replicas": replicas,
                "target_ongoing_requests": GROUPS_EACH,
            },
            "student": {"layers": [0]},
            "prompts": {"path": "unused"},
            "signal": {"top_k": TOP_K},
            "stream": {"group_rows": GROUP_ROWS},
            "cluster": {"num_cpus": replicas + 2},
        }
    )


def measure(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """In a child, which stands for the driver: serve and stream; the steady time and its rows.

    Steady are whole flights while the stream is full: the first ones start one after the other, and
    at the end there is nothing left to start. Times are those of ``time.time``.
    """
    import ray

    from raystill.base.run_folder import RunFolder
    from raystill.cluster.coordinator.actor import start_coordinator
    from raystill.cluster.job import connect
    from raystill.datasets.rows.signal import signal_of
    from raystill.datasets.stream.spec import StreamSpec
    from raystill.model.on_node import ModelSource
    from raystill.run import Run
    from raystill.serve.deploy import TeacherApp

    config = run_config(settings, folder)
    flight = settings["replicas"] * GROUPS_EACH
    flights = FLIGHTS if settings["delay_s"] else FLIGHTS_WITHOUT_DELAY
    num_rows = (flights + FILLING + EMPTYING) * flight * GROUP_ROWS
    write_prompts(folder, num_rows)
    connect.connect(config.cluster, None)
    coordinator = start_coordinator("bench", config.rows_ahead, num_rows, 0.0)
    began = time.monotonic()
    run = Run(
        config=config,
        folder=RunFolder(folder),
        id="benchmark",
        teacher=ModelSource.of(config.teacher.model, folder),
        teacher_identity="synthetic",
        store_path=str(Path(folder) / "store"),
        num_rows=num_rows,
        coordinator=coordinator,
    )
    teacher = TeacherApp(run.app, config, run.teacher, coordinator)
    teacher.deploy()
    teacher.wait()
    up_s = time.monotonic() - began
    spec = StreamSpec.of(run, signal_of(config.signal, {}))
    consumer = ray.remote(num_cpus=0)(Consumer).remote()
    taking, looks = consumer.take.remote(spec, coordinator), 0
    while not ray.wait([taking], timeout=POLL_S)[0]:  # As the driver's main thread does.
        ray.get(coordinator.snapshot.remote())
        looks += 1
        if looks % LOOKS_A_STATUS == 0:
            teacher.num_replicas()
    arrivals = ray.get(taking)
    connect.disconnect()
    window = whole_flights(len(arrivals) - EMPTYING * flight, FILLING * flight, flight)
    return {
        "start": arrivals[window.start - 1][0],
        "end": arrivals[window.stop - 1][0],
        "rows": sum(rows for _, rows in arrivals[window]),
        "teachers_up_s": up_s,
    }


def figures(settings: dict[str, Any], told: dict[str, Any], sampler: Sampler) -> dict[str, Any]:
    """Rates and busy cores of the steady time that the child has told."""
    start, end, rows = told["start"], told["end"], told["rows"]
    flight = settings["replicas"] * GROUPS_EACH
    ideal = flight * GROUP_ROWS / settings["delay_s"] if settings["delay_s"] else None
    rate = rows / (end - start)
    memory = sampler.driver_mb(start, end)
    parts = {
        role: {"cores": cores, "processes": processes}
        for role, (cores, processes) in sampler.busy_cores(start, end).items()
    }
    return settings | {
        "rows": rows,
        "seconds": end - start,
        "teachers_up_s": told["teachers_up_s"],
        "rows_per_s": rate,
        "groups_per_s": rate / GROUP_ROWS,
        "tokens_per_s": rate * settings["tokens"],
        "ideal_rows_per_s": ideal,
        "of_ideal": None if ideal is None else rate / ideal,
        "driver_mb": {"first": memory[0], "last": memory[1]},
        "parts": parts,
        "cores_in_all": sum(part["cores"] for part in parts.values()),
    }


class Consumer:
    """Takes every block at once, as a student that costs nothing; named for the sampler."""

    def take(self, spec: Any, coordinator: Any) -> list[tuple[float, int]]:
        """When each group arrived (time.time), and its rows."""
        import ray

        from raystill.datasets.stream.ledger import Ledger
        from raystill.datasets.stream.stream import build_stream, iterate_groups, uneven_shares

        ledger = Ledger(spec.num_rows).to_dict()
        attempt = ray.get(coordinator.publish.remote(0, 0, ledger))
        [shard] = uneven_shares(build_stream(spec), 1)
        arrivals = []
        for table in iterate_groups(shard):
            coordinator.taken.remote(attempt, len(table))
            arrivals.append((time.time(), len(table)))
        return arrivals


def write_prompts(folder: str, num_rows: int) -> None:
    """Write a prompt table of two ids a row."""
    import pyarrow as pa

    from raystill.base.run_folder import RunFolder
    from raystill.datasets.rows.schema import PROMPT_SCHEMA

    columns = {
        "row": list(range(num_rows)),
        "key": [row.to_bytes(16, "big") for row in range(num_rows)],
        "prompt_ids": [[5 + row % 40_000, 7 + row // 40_000] for row in range(num_rows)],
        "source": ["s"] * num_rows,
        "response_ids": [None] * num_rows,
    }
    run = RunFolder(folder).ensure()
    run.write_table("prompts/train.parquet", pa.table(columns, schema=PROMPT_SCHEMA))
    return run.join("prompts/train.parquet")


def in_child(settings: dict[str, Any]) -> dict[str, Any]:
    """One case in a process of its own; its last line of output is the result."""
    words = ["-m", "benchmarks.scale", "--child", json.dumps(settings)]
    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as folder:
        output = Path(folder) / "output"
        with output.open("w") as file:
            command = [sys.executable, *words, "--folder", folder]
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            with Sampler(child.pid) as sampler:
                child.wait()
        said = output.read_text()
    lines = [line for line in said.splitlines() if line.startswith("{")]
    if child.returncode != 0 or not lines:
        raise SystemExit(f"{settings['name']} failed:\n{said}")
    told = figures(settings, json.loads(lines[-1]), sampler)
    ideal = "" if told["of_ideal"] is None else f" ({told['of_ideal']:.2f} of ideal)"
    parts = ", ".join(f"{name} {part['cores']:.2f}" for name, part in told["parts"].items())
    print(
        f"{told['name']:<12} {told['rows_per_s']:7.1f} rows/s{ideal}; driver "
        f"{told['driver_mb']['first']:.0f} to {told['driver_mb']['last']:.0f} MB\n  cores: {parts}",
        flush=True,
    )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scale.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child), arguments.folder)))
        return
    sweep = [in_child(case(f"{n} replicas", n)) for n in arguments.replicas]
    most = max(arguments.replicas)
    long = in_child(case("long rows", 4, LONG))
    quick = in_child(case("no delay", min(4, most), SHORT, 0.0))
    settings = {
        "group_rows": GROUP_ROWS,
        "groups_in_flight_a_replica": GROUPS_EACH,
        "top_k": TOP_K,
        "delay_s": DELAY_S,
    }
    result = {"machine": machine(), "settings": settings, "sweep": sweep}
    write_result(arguments.output, result | {"long_rows": long, "no_delay": quick})


if __name__ == "__main__":
    main()
