"""A student that counts: one float64 weight a row, and each step adds 1 to those of its rows.

Plain SGD, learning rate 1, loss -w[row] summed, so the weights that survive all faults say how
often each row was stepped over, whatever the ledger says. Everything else is the real worker:
stream, shares, epochs, checkpoints, restarts.
"""

import json
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raystill.run import Run
from raystill.train.step.step import NUM_FIXED_FIGURES, GlobalStep
from raystill.train.worker.worker import Worker, run_worker

COUNTS = "counts.json"
SECONDS_PER_STEP = 0.2
"""So that there is a step to be in the middle of."""


class CountingStep(GlobalStep):
    """The real step around another loss: the gradients of all ranks are summed, not averaged."""

    def __init__(self, counts: nn.Parameter, *args: Any, world_size: int, **options: Any) -> None:
        super().__init__(*args, **options)  # One rank: the student is in neither DDP nor FSDP.
        self.world_size = world_size
        self.counts = counts

    def _accumulate(self, groups: list, num_passes: int) -> torch.Tensor:
        time.sleep(SECONDS_PER_STEP)
        self.optimizer.zero_grad()
        rows = torch.tensor([row.row for group in groups for row in group], dtype=torch.int64)
        loss = -self.counts[rows].sum()
        loss.backward()
        if self.world_size > 1:
            dist.all_reduce(self.counts.grad)
        sums = torch.zeros(len(self._term_names) + NUM_FIXED_FIGURES, dtype=torch.float64)
        sums[-1] = 1  # Padded tokens, which the padding fraction is divided by.
        return sums

    def _update(self, weight: float, lr: float) -> float:
        self.optimizer.step()
        return 0.0


class CountingWorker(Worker):
    """The real worker, whose student also holds the counts, and trains nothing else."""

    def load(self) -> None:
        super().load()
        counts = nn.Parameter(torch.zeros(self.run.num_rows, dtype=torch.float64))
        self.student.model.counts = counts  # So that checkpoints carry it.
        self.optimizer = torch.optim.SGD([counts], lr=1.0)

    def finish(self) -> None:
        if self.ranks.first:
            self.progress.require_all_done()
            counts = self.student.model.counts.tolist()
            self.run.folder.write_text(COUNTS, json.dumps(counts))

    def _build_step(self) -> GlobalStep:
        return CountingStep(
            self.student.model.counts,
            self.student.model,
            self.optimizer,
            self._build_batches(),
            total_steps=self.progress.total_steps,
            world_size=self.ranks.world_size,
        )


def counting_worker(settings: dict[str, Run]) -> None:
    """What each Ray Train worker runs."""
    run_worker(CountingWorker(settings["run"]))
