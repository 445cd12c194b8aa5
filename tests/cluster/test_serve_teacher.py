"""The teacher's thread: it hears what the held-out rows end with, whenever that is."""

from types import SimpleNamespace
from typing import Any

import pytest

from raystill.base.errors import RunError
from raystill.cluster.job import run as job

ERROR = RunError("the teacher answered none of the 4 held-out prompts")


class Ref:
    """A task's result, or its error; ended from some look on."""

    def __init__(self, error: Exception | None = None, ended: bool = True) -> None:
        self.error, self.ended = error, ended


class Ray:
    """As Ray has it: a failed task has ended, and its error is raised where it is got."""

    def wait(self, refs: list[Ref], num_returns: int = 1, timeout: float | None = None) -> Any:
        return [r for r in refs if r.ended], [r for r in refs if not r.ended]

    def get(self, refs: Any) -> Any:
        for ref in refs if isinstance(refs, list) else [refs]:
            if ref.error is not None:
                raise ref.error


class Coordinator:
    """Notes the phases; answers nothing else."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def remote(self, *words: Any, **_: Any) -> Ref:
        self.phases += [word for word in words if isinstance(word, str) and word]
        return Ref()

    def __getattr__(self, name: str) -> Any:
        return self


@pytest.mark.parametrize("errors", [[ERROR], [None, ERROR], [ERROR, None]])
@pytest.mark.parametrize("ended", [True, False])
def test_an_error_of_the_held_out_rows_is_heard_before_and_after_the_teacher_is_up(
    monkeypatch: pytest.MonkeyPatch, errors: list[Exception | None], ended: bool
) -> None:
    """Unheard, the student would wait for these rows for ever."""
    monkeypatch.setattr(job, "ray", Ray())
    settings = SimpleNamespace(enabled=False)
    config = SimpleNamespace(
        policy=settings, evaluation=settings, training=SimpleNamespace(epochs=1)
    )
    coordinator = Coordinator()
    run: Any = SimpleNamespace(coordinator=coordinator, config=config, teacher_name="")
    teacher: Any = SimpleNamespace(deploy=lambda: None, wait=lambda: None, end=lambda: None)
    held_out = [Ref(error, ended) for error in errors]
    with pytest.raises(RunError, match="none of the 4"):
        job.serve_teacher(run, teacher, held_out, needed=True, probe=False)
    job.serve_teacher(run, teacher, [Ref(ended=ended)], needed=True, probe=False)
    assert (job.ASKING in coordinator.phases) == (not ended)
