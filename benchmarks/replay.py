"""A replayed epoch: rows/s of a run whose answers are all stored, against the student alone.

    python -m benchmarks.replay [--rows 320] [--output benchmarks/results/replay.json]

A synthetic teacher fills the store with answers of 32 tokens and K = 64. Then, in turn and on the
same core: the student on those rows held in memory, and the whole run, which starts no teacher and
reads every row from the store. The student alone is measured before and after, since shared
machines drift. Aim: 0.95 of the student alone.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.overlap import RUN_FILE, layers_of
from benchmarks.parts import measure_student_alone, measure_teacher_alone, run_whole
from benchmarks.results import machine, write_result

DEPTHS = (1, 7, 20)
TEACHER_LAYERS = 30


def settings(rows: int, depth: int) -> list[str]:
    """Overrides that make the quickstart a replay: a synthetic teacher, no evaluation."""
    return [
        f"prompts.limit={rows}",
        "evaluation.held_out_sources=[]",
        "evaluation.held_out_rows=0",
        "training.checkpoint_every_steps=0",
        "teacher.engine=synthetic",
        "teacher.synthetic.vocab_size=49152",
        "teacher.synthetic.response_tokens=32",
        f"student.layers={layers_of(depth, TEACHER_LAYERS)}",
        "student.refit=false",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=320, help="prompts of each run")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/replay.json"))
    arguments = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as scratch:
        rows = f"{scratch}/rows.parquet"
        stream = measure_teacher_alone(RUN_FILE, settings(arguments.rows, 1), rows)
        print(f"the stream alone, asking and storing   {stream}", flush=True)
        for depth in DEPTHS:
            overrides = settings(arguments.rows, depth)
            before = measure_student_alone(RUN_FILE, overrides, rows)
            stored = [*overrides, f"store.path={rows}.store"]
            whole = run_whole(RUN_FILE, stored, f"{scratch}/replay-{depth}", bursts=False)
            student = before + measure_student_alone(RUN_FILE, overrides, rows)
            ratio = whole.side.rows_per_s / student.rows_per_s
            print(
                f"{depth:>2} layers  student alone {student}\n"
                f"           replayed      {whole.side}\n"
                f"           ratio {ratio:.2f}; student waited {whole.wait_share:.0%}",
                flush=True,
            )
            cases.append(
                {
                    "student_layers": depth,
                    "student_alone": student.figures(),
                    "replayed": whole.side.figures(),
                    "ratio": ratio,
                    "student_wait_share": whole.wait_share,
                }
            )
    result = {
        "machine": machine(),
        "settings": {"run_file": RUN_FILE, "overrides": settings(arguments.rows, 1)},
        "stream_alone": stream.figures(),
        "cases": cases,
    }
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
