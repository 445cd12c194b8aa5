"""How much of the slower side's speed the whole keeps: teacher alone, student alone, both.

    python -m benchmarks.overlap [--rows 512] [--output benchmarks/results/overlap.json]

One run measures, with the same core lists, batches, rows and lengths:

1. the teacher alone: the real deployment and stream, a consumer that takes every block at once;
2. the student alone, at several depths, on the rows that came out of 1, held in memory;
3. the whole, as ``driver.py run`` does it, at the depths whose alone speed comes nearest to twice,
   once and half the teacher's; with it the driver's peak memory.

On two cores no student of this width is twice as fast as the teacher with all its slots, so the
case 1 : 2 gives the engine four slots (``teacher.max_num_seqs``) and measures it alone again.

Steady state: of 1 and 3 whole flights (the rows answered at once, which come in bursts), in 1
without the first and the last, in 3 between the filling of the stream and the moment the teacher
has nothing left to start. The student alone is measured before and after the whole, since shared
machines drift.
overlap = whole / min(teacher alone, student alone), in rows/s. Beside it stands the same against
both run at the same time with nothing between them: what they lose there is the machine's doing.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.parts import (
    Side,
    measure_side_by_side,
    measure_student_alone,
    measure_teacher_alone,
    run_whole,
)
from benchmarks.results import machine, write_result

RUN_FILE = "configs/quickstart.yaml"
DEPTHS = (1, 12, 30)
FEW_ROWS = 208
FEW_SLOTS = [
    "teacher.max_num_seqs=4",
    "teacher.target_ongoing_requests=2",
    f"prompts.limit={FEW_ROWS}",
]
CLOSE = 0.1
CASES: dict[str, tuple[float, list[str]]] = {
    "teacher : student = 2 : 1": (0.5, []),
    "teacher : student = 1 : 1": (1.0, []),
    "teacher : student = 1 : 2": (2.0, FEW_SLOTS),
}


def nearest_depth(speeds: dict[int, float], wanted: float) -> int:
    """The number of layers whose time a row comes nearest to 1 / wanted.

    Time is taken as linear in depth between the two measured depths around it.
    """
    depths = sorted(speeds, key=lambda depth: (abs(1 / speeds[depth] - 1 / wanted), depth))
    shallow, deep = sorted(depths[:2])
    per_layer = (1 / speeds[deep] - 1 / speeds[shallow]) / (deep - shallow)
    depth = shallow + (1 / wanted - 1 / speeds[shallow]) / per_layer
    return int(min(max(speeds), max(1, round(depth))))


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
        "student.refit=false",
        *arguments.set,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512, help="prompts of each part")
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
        teachers = {"all slots": measure_teacher_alone(RUN_FILE, overrides(1), rows)}
        print(f"teacher alone              {teachers['all slots']}", flush=True)
        alone: dict[int, Side] = {}
        for depth in DEPTHS:
            alone[depth] = measure_student_alone(RUN_FILE, overrides(depth), rows)
            print(f"student alone, {depth:>2} layers   {alone[depth]}", flush=True)
        cases = []
        for name, (ratio, slots) in CASES.items():
            if slots and "few slots" not in teachers:
                few = measure_teacher_alone(RUN_FILE, [*overrides(1), *slots], f"{rows}.few")
                teachers["few slots"] = few
                print(f"teacher alone, four slots  {few}", flush=True)
            teacher = teachers["few slots" if slots else "all slots"]
            depth = find_depth(alone, ratio * teacher.rows_per_s, overrides, rows)
            case = measure_case(name, depth, teacher, [*overrides(depth), *slots], rows, scratch)
            cases.append(case)
        narrow = run_whole(RUN_FILE, [*overrides(1), "signal.top_k=8"], f"{scratch}/narrow")
    memory = {8: narrow.driver_peak_mb, 64: max(case["driver_peak_mb"] for case in cases)}
    print(f"driver's peak memory: {memory[8]:.0f} MB at K = 8, {memory[64]:.0f} MB at K = 64")
    worst = min(case["overlap"] for case in cases)
    print(f"worst overlap: {worst:.2f}")
    result = {
        "machine": machine(),
        "settings": {"run_file": RUN_FILE, "overrides": overrides(1), "few_slots": FEW_SLOTS},
        "teacher_alone": {name: side.figures() for name, side in teachers.items()},
        "student_alone": {depth: side.figures() for depth, side in alone.items()},
        "cases": cases,
        "driver_peak_mb": memory,
        "worst_overlap": worst,
    }
    write_result(arguments.output, result)


def find_depth(
    alone: dict[int, Side], wanted: float, overrides: Callable[[int], list[str]], rows: str
) -> int:
    """A depth whose student alone runs at ``wanted`` rows/s; those tried are added to ``alone``."""
    while True:
        depth = nearest_depth({d: side.rows_per_s for d, side in alone.items()}, wanted)
        if depth in alone or abs(alone_nearest(alone, wanted) / wanted - 1) < CLOSE / 2:
            return min(alone, key=lambda d: abs(alone[d].rows_per_s - wanted))
        alone[depth] = measure_student_alone(RUN_FILE, overrides(depth), rows)
        print(f"student alone, {depth:>2} layers   {alone[depth]}", flush=True)


def alone_nearest(alone: dict[int, Side], wanted: float) -> float:
    """The measured speed nearest to ``wanted``, rows/s."""
    return min((side.rows_per_s for side in alone.values()), key=lambda s: abs(s - wanted))


def measure_case(
    name: str, depth: int, teacher: Side, overrides: list[str], rows: str, scratch: str
) -> dict[str, Any]:
    """One ratio: the student of this depth alone, the whole, the student alone once more."""
    before = measure_student_alone(RUN_FILE, overrides, rows)
    whole = run_whole(RUN_FILE, overrides, f"{scratch}/whole-{depth}-{teacher.rows}")
    student = before + measure_student_alone(RUN_FILE, overrides, rows)
    overlap = whole.side.rows_per_s / min(teacher.rows_per_s, student.rows_per_s)
    beside = measure_side_by_side(RUN_FILE, overrides, rows)
    of_machine = whole.side.rows_per_s / min(side.rows_per_s for side in beside)
    print(
        f"{name} (student of {depth} layers, {student.rows_per_s / teacher.rows_per_s:.2f} times "
        f"the teacher)\n  student alone  {student}\n  whole          {whole.side}\n"
        f"  side by side   {beside[0]} (teacher)\n                 {beside[1]} (student)\n"
        f"  overlap {overlap:.2f}, of the slower side by side {of_machine:.2f}; "
        f"student waited {whole.wait_share:.0%} of the steady time",
        flush=True,
    )
    return {
        "name": name,
        "student_layers": depth,
        "student_over_teacher": student.rows_per_s / teacher.rows_per_s,
        "student_alone": student.figures(),
        "whole": whole.side.figures(),
        "side_by_side": {"teacher": beside[0].figures(), "student": beside[1].figures()},
        "overlap": overlap,
        "overlap_of_side_by_side": of_machine,
        "student_wait_share": whole.wait_share,
        "driver_peak_mb": whole.driver_peak_mb,
    }


if __name__ == "__main__":
    main()
