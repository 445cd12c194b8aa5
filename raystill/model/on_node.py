"""The teacher's files on whatever node needs them: replicas, workers, the probe, a calibration.

The driver finds the folder and tells the others its files and, where they came from the Hugging
Face Hub, the commit. A node takes the same folder where it has it (one machine, a shared disk),
and else fetches what it lacks of that very commit into its own cache. A node that did without
would sample by neutral settings and never stop. Imports neither torch nor Ray.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raystill.base.errors import RunError
from raystill.config.run import RunConfig
from raystill.model.files import ALL_FILES, ModelFolder

WEIGHTS = ".safetensors"
Weights = Literal["none", "head", "all"]


@dataclass(frozen=True)
class ModelSource:
    """A model as the driver found it.

    folder: absolute, on the driver's machine. files: names in it. commit: of the Hub's repository;
    None for a folder that is no download.
    """

    name: str
    folder: str
    files: tuple[str, ...] = ()
    commit: str | None = None

    @classmethod
    def of(cls, name: str, folder: str | os.PathLike[str]) -> "ModelSource":
        """Look at ``folder``, which is here; the model's ``name`` is what a run file says."""
        path = Path(os.path.abspath(folder))
        files = sorted({file.name for pattern in ALL_FILES for file in path.glob(pattern)})
        # The cache's layout: models--owner--name/snapshots/<commit>.
        is_download = path.parent.name == "snapshots"
        return cls(name, str(path), tuple(files), path.name if is_download else None)

    def on_this_node(self, weights: Weights) -> str:
        """A folder with the driver's files: without weights, with the head's, or with all of them.

        Raises RunError where they are not here and cannot be fetched.
        """
        folder = self._with([file for file in self.files if not file.endswith(WEIGHTS)])
        shards = [file for file in self.files if file.endswith(WEIGHTS)]
        if weights == "head":
            shards = [file for file in shards if file in self._head_files(folder)]
        return folder if weights == "none" else self._with(shards)

    def _with(self, files: Sequence[str]) -> str:
        """The folder that has ``files``, the driver's or this node's."""
        missing = lacking(self.folder, files)
        if not missing:
            return self.folder
        if self.commit is None:
            raise RunError(
                f"{self._where()} has no {missing[0]} in {self.folder}, where the driver found the "
                f"model {self.name!r}; put it on a disk that all nodes share, under the same path, "
                "or name it by its Hugging Face id, so that each node fetches it"
            )
        from huggingface_hub import snapshot_download

        try:
            here = snapshot_download(self.name, revision=self.commit, allow_patterns=list(files))
        except Exception as error:
            raise RunError(
                f"{self._where()} cannot fetch {self.name!r} at {self.commit}: {error}"
            ) from error
        if missing := lacking(here, files):
            raise RunError(
                f"{self._where()} has {self.name!r} in {here} without {missing[0]}, and it could "
                "not be fetched now; unset HF_HUB_OFFLINE there, or fetch the model once more"
            )
        return here

    def _head_files(self, folder: str) -> set[str]:
        """The files that hold the output head, by the index; all where there is none."""
        from raystill.model.head import INDEX, find_head

        if not (Path(folder) / INDEX).exists():
            return set(self.files)
        head = find_head(ModelFolder(self.name, Path(folder)))
        return {part.file.name for part in (head.weight, head.bias) if part is not None}

    @staticmethod
    def _where() -> str:
        return f"the node {platform.node()}"


def student_needs(config: RunConfig) -> Weights:
    """What a student's worker needs of the teacher's weights."""
    if config.student.init == "from_teacher":
        return "all"
    return "head" if config.signal.kind == "hidden" else "none"


def lacking(folder: str, files: Sequence[str]) -> list[str]:
    """Those of ``files`` that are not in ``folder``."""
    return [file for file in files if not (Path(folder) / file).exists()]
