"""From the command to the first optimizer step, by phase; teacher and student side by side or not.

    python -m benchmarks.startup [--run-file configs/quickstart.yaml]

Three starts, each from nothing:

1. the run as it is: when each phase had begun, from the driver's lines as they come, the logs of
   its parts and the first line of metrics.jsonl; stopped after that;
2. the teacher alone: deployed and waited for, with nothing beside it;
3. the student alone: the same run with a synthetic teacher, which is up at once.

A start of one after the other is worked out from these: the driver, the teacher alone, the held-out
answers, the student alone, and from there to the first step as in 1.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.results import machine, write_result

CHECKED = "teacher store:"
ON_CLUSTER = "asked for:"
LOADING = "loading the teacher and the student"
ASKING = "asking the teacher the held-out prompts"
MEASURING = "measuring the student before training"
PHASE_LINE = re.compile(r"^\[[ \d:]+\] (.+)$")
LOG_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\s.*?(?: -- |: )(.+)$")
RAY_STARTED = "Started a local Ray instance."
SYNTHETIC = [
    "teacher.engine=synthetic",
    "teacher.synthetic.vocab_size=49152",
    "teacher.synthetic.response_tokens=32",
]
POLL_S = 0.05


def watch_start(run_file: str, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Seconds from the command to what became known of its start; the run is then stopped."""
    command = [sys.executable, "-u", "driver.py", "run", run_file]
    for override in (f"output.path={folder}", f"store.path={folder}-store", *overrides):
        command += ["--set", override]
    log = Path(f"{folder}.log")
    began = time.time()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    seen: dict[str, float] = {}
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().endswith("\n")):
        for line in log.read_text().splitlines():
            match = PHASE_LINE.match(line)
            name = match.group(1) if match else line.partition(":")[0] + ":"
            seen.setdefault(name, time.time() - began)
        if process.poll() is not None:
            raise SystemExit(f"the driver ended before its first step:\n{log.read_text()}")
        time.sleep(POLL_S)
    first = json.loads(metrics.read_text().splitlines()[0])
    process.send_signal(signal.SIGINT)
    process.wait()
    driver, student = (logged(folder / "logs" / f"{name}.log") for name in ("driver", "student-0"))
    told = {
        "checked": seen[CHECKED],
        "ray started": driver[RAY_STARTED] - began,
        "checked on the cluster": seen[ON_CLUSTER],
        "teacher up": seen.get(ASKING),
        "student loaded": student["loading the student"] - began,
        "held-out answered": student.get(MEASURING, began) - began,
        "first evaluation and probe done": student["training"] - began,
        "first step": first["time"] - began,
    }
    probe = folder / "probe.json"
    if probe.exists():
        told["probe done"] = probe.stat().st_mtime - began
    return {name: seconds for name, seconds in told.items() if seconds is not None}


def logged(path: Path) -> dict[str, float]:
    """When each message of a log was first written (time.time)."""
    when: dict[str, float] = {}
    for line in path.read_text(errors="replace").splitlines():
        if match := LOG_LINE.match(line):
            moment = datetime.strptime(match.group(1), "%Y-%m-%d %H:%M:%S,%f")
            when.setdefault(match.group(2), moment.timestamp())
    return when


def teacher_alone(run_file: str, folder: Path) -> float:
    """Seconds from deploying the teacher to its first answer, with nothing beside it."""
    words = ["-m", "benchmarks.startup", "--run-file", run_file, "--teacher-alone", str(folder)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the teacher alone failed:\n{done.stdout}\n{done.stderr}")
    return float(done.stdout.strip().splitlines()[-1])


def deploy_and_wait(run_file: str, folder: str) -> float:
    """In a child: what ``teacher_alone`` tells."""
    from raystill.base.run_folder import RunFolder
    from raystill.cluster.check.static import check_run_file
    from raystill.cluster.job import connect
    from raystill.model.on_node import ModelSource
    from raystill.serve.deploy import TeacherApp

    checked = check_run_file(run_file, [f"output.path={folder}", f"store.path={folder}-store"])
    if checked.problems or checked.config is None or checked.prepared is None:
        raise SystemExit("\n".join(map(str, checked.problems)))
    config, logs = checked.config, RunFolder(folder).ensure().logs
    connect.connect(config.cluster, logs)
    began = time.monotonic()
    model = ModelSource.of(config.teacher.model, checked.prepared.teacher_folder)
    teacher = TeacherApp("teacher", config, model, logs=logs)
    teacher.deploy()
    teacher.wait()
    seconds = time.monotonic() - began
    teacher.shutdown()
    connect.disconnect()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-file", default="configs/quickstart.yaml")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/startup.json"))
    parser.add_argument("--teacher-alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.teacher_alone:
        print(deploy_and_wait(arguments.run_file, arguments.teacher_alone))
        return
    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as scratch:
        run = watch_start(arguments.run_file, Path(scratch) / "run", [])
        teacher_s = teacher_alone(arguments.run_file, Path(scratch) / "teacher")
        student = watch_start(arguments.run_file, Path(scratch) / "student", SYNTHETIC)
    result = {"machine": machine(), "settings": {"run_file": arguments.run_file}}
    write_result(arguments.output, result | compare(run, teacher_s, student))


def compare(run: dict[str, float], teacher_s: float, student: dict[str, float]) -> dict[str, Any]:
    """The start as it is, and one after the other; printed as well."""
    on_cluster = "checked on the cluster"
    student_s = student["student loaded"] - student[on_cluster]
    held_out_s = run["held-out answered"] - run["teacher up"]
    rest_s = run["first step"] - max(run["held-out answered"], run["student loaded"])
    serial = {
        "driver": run[on_cluster],
        "teacher alone": teacher_s,
        "held-out answers": held_out_s,
        "student alone": student_s,
        "first evaluation, probe, first step": rest_s,
    }
    print("side by side, seconds from the command:")
    for name, seconds in sorted(run.items(), key=lambda item: item[1]):
        print(f"  {seconds:6.1f}  {name}")
    print("one after the other, worked out:")
    for name, seconds in serial.items():
        print(f"  {seconds:6.1f}  {name}")
    print(f"  {sum(serial.values()):6.1f}  in all, against {run['first step']:.1f}")
    return {
        "side_by_side_s": run,
        "serial_s": serial | {"first step": sum(serial.values())},
        "student_with_a_synthetic_teacher_s": student,
    }


if __name__ == "__main__":
    main()
