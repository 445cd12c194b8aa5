"""Which rows the student writes, under which keys they are stored, and how old weights may be.

Pure arithmetic over positions, for the source of the stream (credits), the answer stage (whom to
ask) and tests. Imports neither Ray nor torch.

Legend: N rows of the epoch, n positions of a group. A version is the number of optimizer steps that
the weights have finished.
"""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.config.objective import PolicyConfig
from raystill.config.run import RunConfig
from raystill.datasets.rows.schema import KEY_BYTES

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class PolicyPlan:
    """The rows that the student writes, in ``fixed`` order.

    num_rows: N. seed: of the choice of positions. run: id of the run, part of the rows' keys.
    """

    config: PolicyConfig
    num_rows: int
    rows_per_step: int
    seed: int
    run: str

    @classmethod
    def of(cls, config: RunConfig, num_rows: int, run: str) -> "PolicyPlan | None":
        """The plan of a run; None where the student writes nothing."""
        if not config.policy.enabled:
            return None
        seed = config.section_seeds()["policy"]
        return cls(config.policy, num_rows, config.training.rows_per_step, seed, run)

    def step_of(self, epoch: int, position: int) -> int:
        """The optimizer step of the whole run, from 0, that trains a position of an epoch."""
        steps = -(-self.num_rows // self.rows_per_step)
        return epoch * steps + position // self.rows_per_step

    def by_student(self, epoch: int, positions: Positions) -> NDArray[np.bool_]:
        """Which of ``positions`` [n] the student writes, bool [n]; depends on the seed alone."""
        steps = [self.step_of(epoch, int(position)) for position in positions]
        shares = np.array([self.config.share_at(step) for step in steps])
        return _draws(self.num_rows, self.seed, epoch)[positions] < shares

    def oldest_version(self, epoch: int, positions: Positions) -> int | None:
        """Version of the weights that a group needs at least; None: the student writes none of it.

        With weights of that version or newer, no row of the group is older than
        ``policy.max_staleness_steps`` when it is trained.
        """
        written = positions[self.by_student(epoch, positions)]
        if not len(written):
            return None
        return self.step_of(epoch, int(written.max())) - self.config.staleness_bound

    def keys(self, epoch: int, prompt_keys: pa.ChunkedArray) -> pa.ChunkedArray:
        """Keys [N] of the student's answers in an epoch, from the table's own key column.

        They are the run's own: the answers of another run's student are never taken for these.
        """
        shared = blake2b(f"written by the student {self.run} {epoch}\0".encode(), digest_size=16)
        keys = []
        for key in prompt_keys.to_pylist():
            one = shared.copy()
            one.update(key)
            keys.append(one.digest())
        return pa.chunked_array([pa.array(keys, pa.binary(KEY_BYTES))])


@lru_cache(maxsize=2)
def _draws(num_rows: int, seed: int, epoch: int) -> NDArray[np.float64]:
    return np.random.default_rng([seed, epoch]).random(num_rows)
