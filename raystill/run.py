"""`Run`: one distillation run, as each of its processes is given it."""

from dataclasses import dataclass
from typing import Any

from raystill.base.run_folder import RunFolder
from raystill.config.run import RunConfig
from raystill.model.on_node import ModelSource


@dataclass(frozen=True)
class Run:
    """One run of the driver. The driver makes it; replicas, stages and workers are given it whole.

    Attributes:
        config: The resolved run file.
        folder: Where the run writes.
        id: Names the run in the teacher store and on the cluster, over all its starts.
        teacher: The teacher's files; a node that lacks them fetches the same ones.
        teacher_identity: The teacher's identity, by the content of its files.
        store_path: Path or URI of the teacher store.
        num_rows: Training rows of one epoch.
        num_ids: Token ids that the student can take: those below it; None: not known.
        coordinator: Handle of the run's coordinator actor; None where nobody counts.
    """

    config: RunConfig
    folder: RunFolder
    id: str
    teacher: ModelSource
    teacher_identity: str
    store_path: str
    num_rows: int
    num_ids: int | None = None
    coordinator: Any = None

    @property
    def app(self) -> str:
        """Name of the teacher's Serve application. Runs may share a cluster, never a teacher.

        A run that is started again finds what a lost driver left under it, and replaces it.
        """
        return f"teacher-{self.id}"

    @property
    def sampler_app(self) -> str:
        """Name of the Serve application of the student's sampler."""
        return f"sampler-{self.id}"
