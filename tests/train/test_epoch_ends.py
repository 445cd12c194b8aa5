"""What is due at the last step of an epoch is done there, and what never came is counted."""

from types import SimpleNamespace
from typing import Any

import pytest

from raystill.datasets.stream.ledger import Ledger
from raystill.datasets.stream.plan import num_steps
from raystill.train.step.rows import StepRows
from raystill.train.worker import worker as worker_module
from raystill.train.worker.progress import Progress


class Answer:
    """What a coordinator's method gives."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def remote(self, *_: Any, **__: Any) -> "Answer":
        return self


class Coordinator:
    """Answers nothing, but whether a stop is asked for, and what was dropped."""

    def __init__(self, dropped: dict[int, str]) -> None:
        self.stop_requested: Any = None
        self.dropped_positions = Answer(dropped)

    def __getattr__(self, name: str) -> Answer:
        return Answer()


class Run(worker_module.Worker):
    """A worker's loop over real rows and progress; its steps and what is due only note."""

    def __init__(
        self, rows: int, per_step: int, epochs: int, every: int, dropped: set[int]
    ) -> None:
        training = SimpleNamespace(
            rows_per_step=per_step,
            epochs=epochs,
            skip_non_finite=0,
            checkpoint_every_steps=every,
        )
        evaluation = SimpleNamespace(enabled=True, every_steps=every)
        self.config = SimpleNamespace(  # type: ignore[assignment]
            training=training,
            evaluation=evaluation,
            stream=SimpleNamespace(order="fixed"),
        )
        self.coordinator = Coordinator(dict.fromkeys(dropped, "truncated"))
        run = SimpleNamespace(
            config=self.config, folder=None, num_rows=rows, coordinator=self.coordinator
        )
        self.ranks = SimpleNamespace(first=False, world_size=1, gather=lambda one: [one])  # type: ignore[assignment]
        self.progress = Progress(run, self.ranks)  # type: ignore[arg-type]
        self.ranks.first = True  # type: ignore[misc]
        self.policy = self.cores = self.untrained = None
        self.checkpointer = SimpleNamespace(poll=lambda: None)  # type: ignore[assignment]
        self.coordinator.stop_requested = self
        self.stops_at = -1
        self.dropped, self.rows = dropped, rows
        self.made: list[int] = []
        self.measured: list[int] = []
        self.global_step = SimpleNamespace(run=self.step)  # type: ignore[assignment]

    def remote(self) -> Answer:
        """Whether a stop is asked for, before the next step."""
        return Answer(int(self.progress.step + 1 >= self.stops_at > 0))

    def step(self, number: int, mine: list[Any], more: bool, stop: bool) -> Any:
        result = SimpleNamespace(rows=len(mine), any_more=more, any_stop=stop, trained=True)
        vars(result).update(student_s=0.0, others_wait_s=0.0, idle_share=0.0, not_finite=None)
        return result

    def checkpoint(self) -> None:
        self.made.append(self.progress.step)

    def _measure(self, when: str, weights: str, step: int | None = None) -> None:
        self.measured.append(self.progress.step)

    def open(self) -> StepRows[Any]:
        left = [p for p in range(self.rows) if p not in self.dropped]
        blocks = [[SimpleNamespace(position=p)] for p in left]
        ledger: Ledger = self.progress.ledger
        return StepRows(
            blocks,
            order="fixed",
            rows_per_step=self.config.training.rows_per_step,
            rank=0,
            world_size=1,
            ledger=ledger,
            to_rows=lambda block: block,
        )

    def all(self) -> bool:
        stopped = self.train(self.open())
        while not stopped and self.next_epoch():
            stopped = self.train(self.open())
        return stopped


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(worker_module.ray, "get", lambda answer: answer.value)

    def of(rows: int, per_step: int, epochs: int, every: int, dropped: set[int] = set()) -> Run:  # noqa: B006
        return Run(rows, per_step, epochs, every, dropped)

    return of


@pytest.mark.parametrize("every", [1, 2, 5, 10, 20])
def test_a_checkpoint_and_an_evaluation_fall_on_each_step_they_are_due_at(
    run: Any, every: int
) -> None:
    """Ten steps an epoch; what follows the last step of all is the last checkpoint and figure."""
    one = run(40, 4, 4, every)
    assert not one.all()
    assert one.made == one.measured == [s for s in range(every, 40, every)]


@pytest.mark.parametrize("stop", range(1, 13))
def test_a_stop_is_heard_at_every_step_but_the_last_of_all(run: Any, stop: int) -> None:
    one = run(16, 4, 3, 0)
    one.stops_at = stop
    assert one.all() == (stop < 12)
    assert one.progress.step == stop


@pytest.mark.parametrize("dropped", [{16}, {12, 13, 14, 15, 16}, set(range(17))])
def test_steps_without_a_row_at_an_epochs_end_are_counted(run: Any, dropped: set[int]) -> None:
    """The plan of who writes which row counts them, and waits for weights of that many steps."""
    one = run(17, 4, 3, 0, dropped)
    begun = []
    stopped = one.train(one.open())
    while not stopped and one.next_epoch():
        begun.append(one.progress.step)
        stopped = one.train(one.open())
    assert begun == [num_steps(17, 4) * epoch for epoch in (1, 2)]


def test_a_checkpoint_of_a_run_that_lagged_is_resumed_in_step(run: Any) -> None:
    one = run(17, 4, 4, 0)
    ledger = Ledger(17)
    one.progress.restore(
        9, 2, ledger.to_dict(), {"epoch_step": 1, "rows_trained": 0, "skipped_steps": 0}
    )
    assert one.progress.step == 2 * 5 + 1


@pytest.mark.parametrize(("there", "asked"), [(2, [1, 2]), (99, [1, 2, 3])])
def test_the_untrained_student_is_measured_when_it_can_be_and_before_any_other_figure(
    run: Any, there: int, asked: list[int]
) -> None:
    one = run(32, 4, 1, 3)
    tried: list[tuple[int, bool]] = []

    def take(*, wait: bool) -> bool:
        assert not one.measured, "an evaluation came before it"
        step = one.progress.step
        tried.append((step, wait))
        return wait or step >= there

    written: list[int] = []
    one.untrained = SimpleNamespace(take=take, write=lambda: written.append(one.progress.step))
    one.phase = lambda name: None
    assert not one.all()
    assert tried == [(step, step == 3) for step in asked]
    assert one.measured == [3, 6] and one.untrained is None
    assert written == asked[:-1], "meanwhile it may write"


def test_a_checkpoint_waits_for_the_figures_of_the_untrained_student(run: Any) -> None:
    one = run(32, 4, 1, 0)
    order: list[str] = []
    one.untrained = SimpleNamespace(take=lambda *, wait: order.append(f"measured {wait}") or True)
    one.phase = lambda name: None
    one.checkpointer = SimpleNamespace(last_step=-1, begin=lambda *_: order.append("written"))
    one.coordinator.wait_may_save = SimpleNamespace(remote=lambda: order.append("asked"))
    one.ranks.gather = lambda mine: order.append("gathered")
    one.student, one.optimizer, one.device = SimpleNamespace(model=None), None, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_module.ckpt, "random_state", lambda device: {})
        patch.setattr(worker_module.ckpt.Part, "copied", lambda *_: None)
        patch.setattr(worker_module.ray, "get", lambda answer: answer)
        worker_module.Worker.checkpoint(one)
    assert order == ["measured True", "asked", "gathered", "written"]
