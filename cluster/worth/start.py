"""The student as it was before training, made again: the same layers, widths and weights.

Where it sits: ``tasks.py`` has it asked beside the finished student. torch is imported when the
start is made, in the process that asks.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from raystill.base.run_folder import LAYERS, RunFolder
from raystill.config.run import RunConfig
from raystill.model.on_node import ModelSource
from raystill.model.sampling import resolve_sampling


@dataclass(frozen=True)
class Start:
    """A start that is a part of the teacher (``student.init: from_teacher``).

    Attributes:
        config: The run's configuration, with its seeds.
        teacher: The teacher's files.
        folder: The run's, which records what was kept; None: the run file says it.
    """

    config: RunConfig
    teacher: ModelSource
    folder: RunFolder | None

    def identity(self, teacher: str | None) -> str | None:
        """What decides its weights; ``teacher``: the teacher's own identity."""
        if teacher is None:
            return None
        seed = self.config.section_seeds()["student"]
        student = self.config.student.model_dump(mode="json")
        record = None if self.folder is None else self.folder.read_text(LAYERS)
        dtypes = [self.config.training.weights_dtype, self.config.training.export_dtype]
        parts = json.dumps([teacher, student, record, seed, dtypes], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()

    @contextmanager
    def made(self) -> Iterator[Path]:
        """Make it in a temporary folder on this node. Raises RunError where the teacher is not
        here.
        """
        from raystill.train.start.shape import recorded_shape
        from raystill.train.student.build import build_student
        from raystill.train.student.export import ExportSettings, save_student

        seed, folder = self.config.section_seeds()["student"], self.folder
        known = None if folder is None else recorded_shape(folder)
        keep = self.config.student.kept_layers if known is None else known.kept_layers
        teacher = self.teacher.on_this_node("all", keep)
        rest = partial(self.teacher.on_this_node, "all")
        model = build_student(self.config, teacher, seed, known=known, rest=rest)
        sampling = resolve_sampling(self.config.teacher, teacher)
        settings = ExportSettings(self.config.training.export_dtype, teacher, sampling)
        with tempfile.TemporaryDirectory(prefix="raystill-start-") as place:
            save_student(model, Path(place) / "start", settings)
            del model
            yield Path(place) / "start"
