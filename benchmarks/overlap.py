"""How much of the slower side's speed the whole keeps: teacher alone, student alone, both.

    python -m benchmarks.overlap [--rows 320] [--output benchmarks/results/overlap.json]

One run measures, with the same core lists, batches, rows and lengths:

1. the teacher alone: the real deployment and stream, a consumer that takes every block at once;
2. the student alone, at several depths, on the rows that came out of 1, held in memory;
3. the whole, as ``driver.py run`` does it, at the depths whose alone speed comes nearest to twice,
   once and half the teacher's; with it the driver's peak memory.

Steady state: of 1 and 3 the rows between the filling of the pipeline and the moment the teacher
has nothing left to start. overlap = whole / min(teacher alone, student alone), in rows/s.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.parts import (
    Side,
    measure_student_alone,
    measure_teacher_alone,
    run_whole,
)
from benchmarks.results import machine, write_result

RUN_FILE = "configs/quickstart.yaml"
DEPTHS = (1, 10, 20, 30)
MEMORY_ROWS = 240
RATIOS = {"teacher : student = 1 : 2": 2.0, "1 : 1": 1.0, "2 : 1": 0.5}


def nearest_depth(speeds: dict[int, float], wanted: float) -> int:
    """The number of layers whose time a row, linear in depth, comes nearest to 1 / wanted."""
    shallow, deep = min(speeds), max(speeds)
    per_layer = (1 / speeds[deep] - 1 / speeds[shallow]) / (deep - shallow)
    depth = shallow + (1 / wanted - 1 / speeds[shallow]) / per_layer
    return int(min(deep, max(1, round(depth))))


def layers_of(depth: int, teacher_layers: int) -> list[int]:
    """``depth`` of the teacher's layers, evenly spread, first and last among them."""
    if depth == 1:
        return [0]
    return [round(i * (teacher_layers - 1) / (depth - 1)) for i in range(depth)]


def settings(arguments: argparse.Namespace, layers: list[int]) -> list[str]:
    """Overrides that make the quickstart a benchmark: no evaluation, no checkpoints on the way."""
    return [
        f"prompts.limit={arguments.rows}",
        "evaluation.held_out_sources=[]",
        "evaluation.held_out_rows=0",
        "training.checkpoint_every_steps=0",
        f"teacher.sampling.max_tokens={arguments.max_tokens}",
        f"student.layers={json.dumps(layers)}",
        *arguments.set,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=320, help="prompts of each part")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--teacher-layers", type=int, default=30)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overlap.json"))
    arguments = parser.parse_args()
    total = arguments.teacher_layers

    def overrides(depth: int) -> list[str]:
        return settings(arguments, layers_of(depth, total))

    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as scratch:
        rows = str(Path(scratch) / "rows.parquet")
        teacher = measure_teacher_alone(RUN_FILE, overrides(1), rows)
        print(f"teacher alone        {teacher}", flush=True)
        alone: dict[int, Side] = {}
        for depth in DEPTHS:
            alone[depth] = measure_student_alone(RUN_FILE, overrides(depth), rows)
            print(f"student alone, {depth:>2} layers  {alone[depth]}", flush=True)
        cases = [
            measure_case(name, ratio, teacher, alone, overrides, rows, scratch)
            for name, ratio in RATIOS.items()
        ]
        memory = {
            k: run_whole(
                RUN_FILE,
                [*overrides(1), f"signal.top_k={k}", f"prompts.limit={MEMORY_ROWS}"],
                f"{scratch}/memory-{k}",
            ).driver_peak_mb
            for k in (8, 64)
        }
    print(f"driver's peak memory: {memory[8]:.0f} MB at K = 8, {memory[64]:.0f} MB at K = 64")
    worst = min(case["overlap"] for case in cases)
    print(f"worst overlap: {worst:.2f}")
    result = {
        "machine": machine(),
        "settings": {"run_file": RUN_FILE, "overrides": overrides(1), "rows": arguments.rows},
        "teacher_alone": teacher.figures(),
        "student_alone": {depth: side.figures() for depth, side in alone.items()},
        "cases": cases,
        "driver_peak_mb": memory,
        "worst_overlap": worst,
    }
    write_result(arguments.output, result)


def measure_case(
    name: str,
    ratio: float,
    teacher: Side,
    alone: dict[int, Side],
    overrides: Any,
    rows: str,
    scratch: str,
) -> dict[str, Any]:
    """One ratio: the student of the right depth alone again, then the whole."""
    speeds = {depth: side.rows_per_s for depth, side in alone.items()}
    depth = nearest_depth(speeds, ratio * teacher.rows_per_s)
    student = measure_student_alone(RUN_FILE, overrides(depth), rows)
    whole = run_whole(RUN_FILE, overrides(depth), f"{scratch}/whole-{depth}")
    overlap = whole.side.rows_per_s / min(teacher.rows_per_s, student.rows_per_s)
    print(
        f"{name} (student of {depth} layers, {student.rows_per_s / teacher.rows_per_s:.2f} times "
        f"the teacher)\n  student alone  {student}\n  whole          {whole.side}\n"
        f"  overlap {overlap:.2f}; student waited {whole.wait_share:.0%} of the steady time",
        flush=True,
    )
    return {
        "name": name,
        "student_layers": depth,
        "student_over_teacher": student.rows_per_s / teacher.rows_per_s,
        "student_alone": student.figures(),
        "whole": whole.side.figures(),
        "overlap": overlap,
        "student_wait_share": whole.wait_share,
        "driver_peak_mb": whole.driver_peak_mb,
    }


if __name__ == "__main__":
    main()
