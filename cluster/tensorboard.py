"""The run's figures as TensorBoard events, where ``output.tensorboard`` asks for them.

Consumes the coordinator's snapshots in the driver, so of steps shorter than its look (half a
second) some are left out; ``metrics.jsonl`` has them all. Shown by any TensorBoard:

    tensorboard --logdir runs/quickstart/logs/tensorboard
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes the newest step's figures under ``train/``, an evaluation's under ``held_out/``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._step = self._evaluated = -1
        self._writer: Any = None

    def update(self, snapshot: Mapping[str, Any]) -> None:
        """Write what is new. Steps that are trained again after a restart replace the lost ones."""
        progress = snapshot.get("progress") or {}
        step = int(progress.get("step") or 0)
        if progress and step != self._step:
            if self._writer is None or step < self._step:
                self._open(step)
            self._step = step
            self._write("train", progress, step)
        evaluation = snapshot.get("evaluation") or {}
        at = int(evaluation.get("step") or 0)
        if evaluation and at != self._evaluated:
            if self._writer is None:
                self._open(at)
            self._evaluated = at
            self._write("held_out", evaluation, at)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, step: int) -> None:
        from tensorboardX import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=step, flush_secs=10)

    def _write(self, group: str, figures: Mapping[str, Any], step: int) -> None:
        for name, value in figures.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and math.isfinite(value) and name not in ("step", "time"):
                self._writer.add_scalar(f"{group}/{name}", value, step)
