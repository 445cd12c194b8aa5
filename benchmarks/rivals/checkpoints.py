"""The student of each checkpoint of a Raystill run, for the evaluator, and the seconds until it.

    python -m benchmarks.rivals.checkpoints WORK        (in this project's environment)

From ``students/raystill-own`` makes ``students/raystill-own-curve``: ``checkpoint-<step>`` for each
checkpoint, in float32, and ``seconds.json``, from the command to the end of that step.
"""

import sys
from datetime import datetime
from pathlib import Path

from benchmarks.rivals.settings import Folder, read_json, read_lines, write_json
from raystill.base.run_folder import RunFolder
from raystill.config.load import load_config
from raystill.train.checkpoint.checkpoint import KINDS, read_snapshot
from raystill.train.checkpoint.tensors import file_names, model_tensors, read_slices
from raystill.train.start.shape import recorded_shape
from raystill.train.student.build import build_student


def main() -> None:
    """Make all of them."""
    folder = Folder(Path(sys.argv[1]))
    run, made = folder.student("raystill", "own"), folder.student("raystill-own", "curve")
    record = read_json(folder.part("own-raystill-run"))
    began = datetime.fromisoformat(record["date"]).timestamp() - record["wall_s"]
    config = load_config(run / "config.yaml", [])
    model = build_student(
        config, config.teacher.model, 0, known=recorded_shape(RunFolder(str(run)))
    )
    ended = {line["step"]: line["time"] for line in read_lines(run / "metrics.jsonl")}
    seconds = {}
    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        snapshot = read_snapshot(checkpoint)
        files = [checkpoint / name for name in file_names(KINDS[0], snapshot.num_files)]
        read_slices(files, model_tensors(model))
        model.save_pretrained(made / f"checkpoint-{snapshot.step}")
        seconds[str(snapshot.step)] = round(ended[snapshot.step] - began, 1)
    write_json(made / "seconds.json", seconds)


if __name__ == "__main__":
    main()
