"""Brings the teacher's files to a node that needs them: of a replica, a worker, the probe.

The driver finds the model's folder, and sends the names of its files and, if they came from the
Hugging Face Hub, the commit. A node that has the same folder (one machine, a shared disk) uses it.
Another node downloads the missing files of that commit into its own cache.

A missing file is an error: without ``generation_config.json``, say, a replica would sample with
neutral settings and never stop. Imports neither torch nor Ray.
"""

import os
import platform
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raystill.base.errors import RunError
from raystill.config.run import RunConfig
from raystill.model.files import ALL_FILES, ModelFolder

WEIGHTS = ".safetensors"
Weights = Literal["none", "head", "all"]
Keep = Callable[[int], Collection[int]]


@dataclass(frozen=True)
class ModelSource:
    """A model as the driver found it.

    name: what the run file says. folder: absolute path on the driver's machine. files: their names
    in it. commit: that of the Hub's repository; None for a folder that was not downloaded.
    """

    name: str
    folder: str
    files: tuple[str, ...] = ()
    commit: str | None = None

    @classmethod
    def of(cls, name: str, folder: str | os.PathLike[str]) -> "ModelSource":
        """Describe the model ``name`` by its ``folder`` on this machine."""
        path = Path(os.path.abspath(folder))
        files = sorted({file.name for pattern in ALL_FILES for file in path.glob(pattern)})
        # Layout of the Hub's cache: models--owner--name/snapshots/<commit>.
        is_download = path.parent.name == "snapshots"
        return cls(name, str(path), tuple(files), path.name if is_download else None)

    def on_this_node(self, weights: Weights, keep: Keep | None = None) -> str:
        """Return a folder on this node with the driver's files; downloads those that are missing.

        weights: which of the safetensors files are needed, none, those with the output head, or
        all. keep: of all, a file is not needed if the index says that it has other decoder layers
        alone; the layers' numbers by how many there are. Raises RunError if a file is neither here
        nor can be downloaded.
        """
        folder = self._with([file for file in self.files if not file.endswith(WEIGHTS)])
        shards = [file for file in self.files if file.endswith(WEIGHTS)]
        if weights == "head":
            shards = [file for file in shards if file in self._head_files(folder)]
        elif keep is not None:
            needed = self._files_to_keep(folder, keep)
            shards = [file for file in shards if needed is None or file in needed]
        return folder if weights == "none" else self._with(shards)

    def _with(self, files: Sequence[str]) -> str:
        """Return a folder that has ``files``: the driver's, or one in this node's cache."""
        missing = missing_files(self.folder, files)
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
        # With HF_HUB_OFFLINE the Hub's client returns a snapshot that was downloaded in part.
        if missing := missing_files(here, files):
            raise RunError(
                f"{self._where()} has {self.name!r} in {here} without {missing[0]}, and it could "
                "not be fetched now; unset HF_HUB_OFFLINE there, or fetch the model once more"
            )
        return here

    def _head_files(self, folder: str) -> set[str]:
        """Return the files with the output head, by the index; all files if there is no index."""
        from raystill.model.head import find_head
        from raystill.model.weights import INDEX

        if not (Path(folder) / INDEX).exists():
            return set(self.files)
        head = find_head(ModelFolder(self.name, Path(folder)))
        return {part.file.name for part in (head.weight, head.bias) if part is not None}

    def _files_to_keep(self, folder: str, keep: Keep) -> set[str] | None:
        """The files that ``keep`` needs; None: all."""
        from raystill.model.weights import files_of_layers

        number = ModelFolder(self.name, Path(folder)).num_layers
        if not isinstance(number, int) or "model.safetensors" in self.files:
            return None
        return files_of_layers(Path(folder), number, keep(number))

    @staticmethod
    def _where() -> str:
        return f"the node {platform.node()}"


def student_needs(config: RunConfig, reads: bool = True) -> Weights:
    """Return which of the teacher's weights a student's worker needs.

    reads: whether it reads the untrained student, and does not get it from another worker.
    """
    if reads and config.student.init == "from_teacher":
        return "all"  # Its layers are copied from the teacher's.
    # With hidden states the workers compute the teacher's logits themselves.
    return "head" if config.signal.kind == "hidden" else "none"


def missing_files(folder: str, files: Sequence[str]) -> list[str]:
    """Return those of ``files`` that are not in ``folder``."""
    return [file for file in files if not (Path(folder) / file).exists()]
