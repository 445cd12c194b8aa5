"""A student that counts: one float64 weight a row, and each step adds 1 to those of its rows.

Plain SGD, learning rate 1, loss -w[row] summed, so the weights that survive all faults say how
often each row was stepped over, whatever the ledger says. Everything else is the real worker:
stream, shares, epochs, checkpoints, restarts.
"""

import json
import time

import torch
import torch.distributed as dist
from torch import nn

from raystill.run import Run
from raystill.train.step.micro_batches import BatchMaker
from raystill.train.step.step import NUM_FIXED_FIGURES, GlobalStep
from raystill.train.worker.worker import Worker, run_worker

COUNTS = "counts.json"
SECONDS_PER_STEP = 0.2
"""So that there is a step to be in the middle of."""


class CountingStep(GlobalStep):
    """The real step around another loss: the gradients of all ranks are summed, not averaged."""

    def _accumulate(self, groups: list, num_passes: int) -> torch.Tensor:
        time.sleep(SECONDS_PER_STEP)
        self.optimizer.zero_grad()
        rows = torch.tensor([row.row for group in groups for row in group], dtype=torch.int64)
        loss = -self.module[rows].sum()
        loss.backward()
        if self.world_size > 1:
            dist.all_reduce(self.module.grad)
        sums = torch.zeros(len(self._term_names) + NUM_FIXED_FIGURES, dtype=torch.float64)
        sums[-1] = 1  # Padded tokens, which the padding fraction is divided by.
        return sums

    def _update(self, step: int, weight: float, lr: float) -> float:
        self.optimizer.step()
        return 0.0


class CountingWorker(Worker):
    """The real worker, whose student also holds the counts, and trains nothing else."""

    def restore(self) -> None:
        counts = nn.Parameter(torch.zeros(self.run.num_rows, dtype=torch.float64))
        self.student.model.counts = counts  # So that checkpoints carry it.
        self.optimizer = torch.optim.SGD([counts], lr=1.0)
        super().restore()

    def finish(self) -> None:
        if self.ranks.first:
            self.progress.require_all_done()
            counts = self.student.model.counts.tolist()
            self.run.folder.write_text(COUNTS, json.dumps(counts))

    def _build_step(self) -> GlobalStep:
        step = CountingStep.__new__(CountingStep)
        step.module = self.student.model.counts
        step.optimizer = self.optimizer
        step.training = self.config.training
        step.objective = self.config.objective
        step.signal_kind = self.config.signal.kind
        step.total_steps = self.progress.total_steps
        step.device = self.device
        step.world_size = self.ranks.world_size
        step.teacher = None
        step.batches = BatchMaker(
            step.training,
            step.objective,
            signal_kind=step.signal_kind,
            student_vocab=self.vocab,
            device=self.device,
        )
        step._warned_at = 0
        step._term_names = sorted(step.objective.weights)
        return step


def counting_worker(settings: dict[str, Run]) -> None:
    """What each Ray Train worker runs."""
    run_worker(CountingWorker(settings["run"]))
