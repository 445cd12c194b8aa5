"""`Run`: one distillation run, as each of its processes is given it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
        teacher_name: Name of the teacher among several; "" where there is one.
        teachers: Files and identity of each of several teachers by name; the first one's are
            ``teacher`` and ``teacher_identity`` too. Empty where there is one.
        paces: Handle of the actor with the pace of shared services, by each teacher that asks it.
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
    teacher_name: str = ""
    teachers: Mapping[str, tuple[ModelSource, str]] = field(default_factory=dict)
    paces: Mapping[str, Any] = field(default_factory=dict)

    def by_teacher(self) -> "dict[str, Run]":
        """The run as each of its teachers has it, by name; "" for a single one.

        Configuration, files, identity and application are those of the one teacher.
        """
        if not self.teachers:
            return {"": self}
        configs = self.config.by_teacher
        return {
            name: replace(
                self,
                config=configs[name],
                teacher=model,
                teacher_identity=identity,
                teacher_name=name,
                teachers={},
            )
            for name, (model, identity) in self.teachers.items()
        }

    @property
    def app(self) -> str:
        """Name of the teacher's Serve application. Runs may share a cluster, never a teacher.

        A run that is started again finds what a lost driver left under it, and replaces it.
        """
        return f"teacher-{self.id}" + (f"-{self.teacher_name}" if self.teacher_name else "")

    @property
    def sampler_app(self) -> str:
        """Name of the Serve application of the student's sampler."""
        return f"sampler-{self.id}"
