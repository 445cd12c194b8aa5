"""The student worker: what each Ray Train process does from its start to its end.

``train_worker`` is the run as this process lives it: restore, publish what was learned, take rows,
step, checkpoint, measure, finish or stop. Everything that is not order of events lives elsewhere:
the rows of a step in ``step.rows``, the arithmetic of a step in ``step.step``, what was learned in
``progress``, files in ``checkpoint``, figures in ``measure``.

Consumes: its shard of the stream, ``held_out.parquet``. Waits for: the stream's next block, the
other ranks. Unblocked by: the teacher's answers, the stream's end, a stop.
"""

import logging
from functools import partial
from typing import TYPE_CHECKING

import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from raystill.base.logs import say_where
from raystill.datasets.stream.stream import iterate_groups
from raystill.model.sampling import resolve_sampling
from raystill.run import Run
from raystill.train.batch.rows import Row, rows_from_table
from raystill.train.checkpoint import checkpoint as ckpt
from raystill.train.checkpoint.ray_register import remove_unregistered
from raystill.train.evaluation.baselines import PairCounts
from raystill.train.evaluation.free_running import score_answers
from raystill.train.evaluation.measure import LocalStudent, Measurer
from raystill.train.evaluation.pairs import count_pairs
from raystill.train.loss.teacher_head import head_of_signal
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.optimizer import build_optimizer
from raystill.train.step.ranks import Ranks
from raystill.train.step.rows import StepRows
from raystill.train.step.step import GlobalStep
from raystill.train.student import build, export, lora
from raystill.train.student.module import StudentModule, parallel_module
from raystill.train.student.sharding import place_student
from raystill.train.worker.process import last_checkpoint, report_final_errors, settle_process
from raystill.train.worker.progress import Progress
from raystill.train.worker.shape import base_of, read_student
from raystill.train.worker.untrained import Untrained

if TYPE_CHECKING:
    from raystill.train.worker.policy import PolicyPublisher

logger = logging.getLogger(__name__)

LOADING = "loading the student"
WAITING = "waiting for the held-out answers"
TRAINING_PRECISION = "in training precision"


def train_worker(run: Run) -> None:
    """Train this process's share of the run."""
    with report_final_errors(run):
        # A group that is started again as it leaves has nothing left to do.
        if ray.get(run.coordinator.snapshot.remote()).outcome is None:
            run_worker(Worker(run))


def run_worker(worker: "Worker") -> None:
    """The order of events: restore, all epochs or up to a stop, a last checkpoint, the student."""
    with last_checkpoint() as path:
        rows = worker.start(path)
    worker.measure_before(rows)
    stopped = worker.train(rows)
    while not stopped and worker.next_epoch():
        stopped = worker.train(worker.open_stream(restored=False))
    worker.checkpoint()
    worker.checkpointer.finish()  # What follows takes long, and may fail.
    if stopped:
        worker.leave("stopped")
    else:
        worker.finish()
        worker.leave("completed")


class Worker:
    """One rank of the run: the student, its optimizer, and what they have learned."""

    def __init__(self, run: Run) -> None:
        context = ray.train.get_context()
        self.run, self.config, self.coordinator = run, run.config, run.coordinator
        self.ranks = Ranks(context.get_world_rank(), context.get_world_size())
        self.device, self.cores = settle_process(run, context)
        self.progress = Progress(run, self.ranks)
        self.untrained: Untrained | None = None

    def start(self, checkpoint: str | None) -> StepRows[Row]:
        """Go back to a checkpoint, or to the beginning; this rank's share of the rows.

        The stream starts as soon as the teacher is up or this student is loaded, while the other
        is not yet. Where the student writes some of the rows, both have to be there first.
        """
        snapshot = None if checkpoint is None else ckpt.read_snapshot(checkpoint)
        if snapshot is not None:
            learned = snapshot.epoch, snapshot.ledger, snapshot.extra
            self.progress.restore(snapshot.step, *learned)
        rows = None if self.config.policy.enabled else self.open_stream(restored=True)
        self.load()
        if rows is not None and self.ranks.first:
            self.coordinator.release_stream.remote()
        self.phase(LOADING)
        # Before a checkpoint is loaded, which brings the random state of each rank.
        self.ranks.draw_apart(self.config.section_seeds()["student"])
        if self.ranks.first and (removed := remove_unregistered(self.run.folder)):
            logger.warning("deleted unregistered checkpoints %s", removed)
        lora.require_same_base(self.ranks.gather(lora.identity_of_base(self.student.model)))
        if checkpoint is not None and snapshot is not None:
            self._restore(checkpoint, snapshot)
        self.progress.discard_later_records()
        self.measurer.discard_beyond(self.progress.step)
        self.global_step = self._build_step()
        last_step = -1 if snapshot is None else self.progress.step
        self.checkpointer = ckpt.Checkpointer(self.run.folder, self.ranks, self._report, last_step)
        return rows or self.open_stream(restored=True)

    def load(self) -> None:
        """The untrained student, its optimizer, and what measures and publishes it."""
        self.student, self.teacher_folder = self._build_student()
        self.optimizer = build_optimizer(self.student, self.config.training)
        self.vocab = build.num_classes(self.student.model, self.teacher_folder)
        self.sampling = resolve_sampling(self.config.teacher, self.teacher_folder)
        measured = LocalStudent(
            module=self.student,
            vocab=self.vocab,
            device=self.device,
            ranks=self.ranks,
            teacher_folder=self.teacher_folder,
            sampling=self.sampling,
        )
        self.measurer = Measurer(self.run, measured, score=partial(score_answers, self.run))
        self.policy = self._policy_publisher(measured)

    def publish(self, restored: bool) -> int:
        """Publish what these weights have learned, for the source, before any rank iterates."""
        attempt = None
        if self.config.policy.enabled:  # Before credits are given, which depend on these weights.
            assert self.policy is not None
            self.policy.publish(self.progress.step, restored)
        if self.ranks.first:
            p = self.progress
            learned = (p.epoch, p.step, p.ledger.to_dict(), restored)
            attempt = ray.get(self.coordinator.publish.remote(*learned))
        return self.ranks.from_first(attempt)  # Also the barrier that holds the other ranks back.

    def open_stream(self, restored: bool) -> StepRows[Row]:
        """Publish what was learned, and start the stream; this rank's share of the rows."""
        attempt = self.publish(restored)
        rows = StepRows(
            iterate_groups(ray.train.get_dataset_shard("train")),
            order=self.config.stream.order,
            rows_per_step=self.config.training.rows_per_step,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            ledger=self.progress.ledger,
            to_rows=rows_from_table,
            taken=lambda rows: self.coordinator.taken.remote(attempt, rows),
        )
        rows.start(lambda: ray.get(self.coordinator.wait_may_stream.remote()))
        return rows

    def measure_before(self, rows: StepRows[Row]) -> None:
        """Figures of the untrained student, or what takes them once the teacher has answered.

        Where the student writes rows too, they come first: its sampler and its teacher are both up.
        """
        if not self.config.evaluation.enabled:
            return
        answered = self.coordinator.wait_held_out.remote()
        if self.progress.step == 0 and not self.measurer.is_measured(0):
            measure = partial(self._measure, "before", TRAINING_PRECISION, step=0)
            write = self.measurer.write_ahead
            self.untrained = Untrained(self.ranks, answered, write, measure)
            later = not self.config.policy.enabled
            if not (later and self.ranks.from_first(rows.begun)):
                self.untrained.write()
            if later and not self.untrained.take():
                self.untrained.keep(self.student.model)
                return
        if self.ranks.first:
            self.coordinator.phase.remote(WAITING, after=LOADING)
        ray.get(answered)
        self._take_before(wait=True)

    def train(self, rows: StepRows[Row]) -> bool:
        """Step until the rows end (False) or a stop is asked for (True); the same on all ranks."""
        self.phase("training")
        while True:
            asked = self.coordinator.stop_requested.remote() if self.ranks.first else None
            mine = rows.take(self.progress.epoch_step)
            self._follow_teacher()
            stop = asked is not None and ray.get(asked) != 0
            say_where(step=self.progress.step)
            result = self.global_step.run(self.progress.step, mine, rows.has_more, stop)
            if result.rows == 0 and not result.any_more:
                return result.any_stop and not self.progress.in_last_epoch
            self.progress.account(result, mine, rows)
            if not result.any_more and self.progress.in_last_epoch:
                return False
            if result.any_stop:
                return True
            self._between_steps(result.any_more)
            if not result.any_more:
                return False

    def next_epoch(self) -> bool:
        """Close the epoch whose rows have ended; False where it was the last. Collective."""
        if self.progress.in_last_epoch:
            return False
        parts = self.ranks.gather(self.progress.hand_over())
        if parts is not None:
            dropped = ray.get(self.coordinator.dropped_positions.remote())
            self.progress.take_over(parts, dropped)
            self.progress.require_all_done()
        self.progress.begin_epoch(self.progress.epoch + 1)
        return True

    def checkpoint(self) -> None:
        """Collect all ranks' state at this step and begin to write it, if its teacher is sound."""
        if self.checkpointer.last_step == self.progress.step:
            return
        self._take_before(wait=True)
        ray.get(self.coordinator.wait_may_save.remote())
        mine = {"random": ckpt.random_state(self.device), **self.progress.hand_over()}
        parts = self.ranks.gather(mine)
        snapshot = None
        part = ckpt.Part.copied(self.student.model, self.optimizer, self.ranks)
        if parts is not None:
            dropped = ray.get(self.coordinator.dropped_positions.remote())
            snapshot = ckpt.Snapshot(
                random=[each["random"] for each in parts],
                num_files=part.num_files,
                base=lora.identity_of_base(self.student.model),
                **self.progress.take_over(parts, dropped),
            )
        self.checkpointer.begin(self.progress.step, part, snapshot)

    def finish(self) -> None:
        """All rows are trained: measure the weights as exported, write the student."""
        export_dtype = self.config.training.export_dtype
        if self.ranks.first:
            self.progress.require_all_done()
        settings = export.ExportSettings(export_dtype, self.teacher_folder, self.sampling)
        model, folder, first = self.student.model, self.run.folder, self.ranks.first
        base = base_of(self.config.student, self.run.teacher, self.teacher_folder)
        export.export_adapter(model, folder, settings, base, first=first)
        state = export.state_before_merging(model, build.DTYPES[export_dtype], first)
        lora.merge(model)
        export.round_weights(model, build.DTYPES[export_dtype])
        if self.config.evaluation.enabled:
            rounded = "" if state is None else ", frozen weights merged in their own dtype"
            self._measure("after", f"as exported ({export_dtype}{rounded})")
        self.phase("saving the student")
        export.export_student(model, folder, settings, state=state, first=first)

    def leave(self, outcome: str) -> None:
        """The run is ``completed`` or ``stopped``."""
        if self.progress.metrics is not None:
            self.progress.metrics.upload()
            ray.get(self.coordinator.finished.remote(outcome))

    def phase(self, name: str) -> None:
        """What the run is doing now, for the live view."""
        logger.info("%s", name)
        if self.ranks.first:
            self.coordinator.phase.remote(name)

    def _between_steps(self, any_more: bool) -> None:
        """What is due after this step: an evaluation, a checkpoint, or publishing one.

        any_more: the epoch goes on; the next one publishes these weights as it begins.
        """
        step, evaluation = self.progress.step, self.config.evaluation
        every = self.config.training.checkpoint_every_steps
        during = evaluation.enabled and evaluation.every_steps
        during = during and step % evaluation.every_steps == 0
        self._take_before(wait=bool(during))
        if during:
            self._measure("during", TRAINING_PRECISION)
            self.phase("training")
        if every and step % every == 0:
            self.checkpoint()
        else:
            self.checkpointer.poll()
        if any_more and self.policy is not None and step % self.config.policy.sync_every_steps == 0:
            self.policy.publish(step)

    def _follow_teacher(self) -> None:
        """Take over the cores of a teacher that was let go, or give them back."""
        if self.cores is not None and self.cores.may_change:
            self.cores.follow(ray.get(self.coordinator.teacher_served.remote()))

    def _take_before(self, *, wait: bool) -> None:
        """The figures of the untrained student, if they are due and the teacher has answered.

        Until then its rows are few and far between: time for the student to write its answers.
        """
        if self.untrained is None:
            return
        if self.untrained.take(wait=wait):
            self.untrained = None
            self.phase("training")
        else:
            self.untrained.write()

    def _measure(self, when: str, weights: str, step: int | None = None) -> None:
        self.phase(f"measuring the student {when} training")
        self._follow_teacher()
        counts = self._pairs() if when == "after" else None
        step = self.progress.step if step is None else step
        figures = self.measurer.measure(step, when, weights, counts)
        if self.ranks.first:
            self.coordinator.evaluated.remote(figures)

    def _pairs(self) -> PairCounts | None:
        """On rank 0, where baselines are wanted: the token pairs of the trained answers."""
        if not self.ranks.first or not self.config.evaluation.baselines:
            return None
        dropped = ray.get(self.coordinator.dropped_positions.remote())
        return count_pairs(self.run, self.vocab, self.progress.epoch, dropped)

    def _build_student(self) -> tuple[StudentModule, str]:
        """The student on its device, and a folder on this node with the teacher's files."""
        training, world_size = self.config.training, self.ranks.world_size
        by_one = build.read_by_one_rank(self.config, world_size)
        model, folder = read_student(self.run, self.ranks, self.device)
        if by_one:
            outline = self.ranks.from_first(model and build.Outline.of(model))
            model = model or outline.hollow()
        assert model is not None, "each rank has read it, or has its outline"
        lora.attach(model, self.config, self.device)
        return place_student(model, training, self.device, world_size, by_one), folder

    def _policy_publisher(self, student: LocalStudent) -> "PolicyPublisher | None":
        """Where the student writes rows: what gives its sampler new weights."""
        if not self.config.policy.enabled:
            return None
        from raystill.train.worker.policy import PolicyPublisher

        return PolicyPublisher(self.run, student, self.sampling)

    def _build_step(self) -> GlobalStep:
        training, policy, world_size = (
            self.config.training,
            self.config.policy,
            self.ranks.world_size,
        )
        return GlobalStep(
            parallel_module(self.student, self.device, world_size, training.compile),
            self.optimizer,
            self._build_batches(),
            total_steps=self.progress.total_steps,
            world_size=world_size,
            num_ages=policy.staleness_bound + 2 if policy.enabled else 0,
            ranks=self.ranks,
        )

    def _build_batches(self) -> BatchMaker:
        dtype, folder = self.student.compute_dtype, self.teacher_folder
        return BatchMaker(
            self.config.training,
            self.config.objective,
            signal_kind=self.config.signal.kind,
            student_vocab=self.vocab,
            teacher=head_of_signal(self.config, folder, self.vocab, dtype, self.device),
            device=self.device,
            packed=self.student.packed,
            shared=self.student.shared,
            student_written=self.config.policy.objective if self.config.policy.enabled else None,
        )

    def _restore(self, path: str, snapshot: ckpt.Snapshot) -> None:
        model = self.student.model
        ckpt.require_base(snapshot, lora.identity_of_base(model), lora.dtype_of_base(model))
        ckpt.load_tensors(path, snapshot.num_files, model, self.optimizer)
        if len(snapshot.random) == self.ranks.world_size:
            ckpt.set_random_state(snapshot.random[self.ranks.rank], self.device)
        logger.info("restored step %d", snapshot.step)

    def _report(self, path: str | None) -> None:
        """Register a written checkpoint with Ray Train; a collective call."""
        checkpoint = None if path is None else Checkpoint(path, self.run.folder.filesystem())
        ray.train.report(
            {"step": self.checkpointer.last_step},
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
        if self.progress.metrics is not None:
            self.progress.metrics.upload()
