"""Rows of a step that change workers, so that each has about as many tokens.

The stream gives each worker its rows before their lengths are known. In every pass the workers wait
for the one with the most tokens: for a layer that all gather, or for the gradients. So before a
step each worker tells the lengths of its rows, all work out the same moves from them, and the rows
that move are sent from host to host, with their signal. Moves are few: from the worker with the
most tokens to the one with the fewest, and only where that brings both nearer to each other. A row
that moves is trained in the same step, and belongs to the records of the worker that it came to.

A token counts the same wherever it stands in its row: attention, whose time grows with the square
of a row, is not weighed.

Waits for: the lengths of all other workers' rows, which are known once they have their rows; then
the rows that come here. Unblocked by: every worker calling `share_out`. Imports no Ray.
"""

import pickle
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raystill.train.batch.rows import Row
from raystill.train.step.ranks import Ranks

NEAR = 0.02
"""How much more than the mean a worker may have before rows are moved for it."""


class Move(NamedTuple):
    """Row number ``row`` of worker ``source`` goes to worker ``target``."""

    source: int
    row: int
    target: int


def plan_moves(shares: Sequence[Sequence[int]]) -> list[Move]:
    """The moves after which no worker has many more tokens than another.

    shares: by worker, the tokens of each of its rows. In the end the worker with the most has at
    most ``NEAR`` more than the mean, or more than the one with the fewest by at most its shortest
    row. The same lengths give the same moves.
    """
    rows = [
        [(tokens, source, index) for index, tokens in enumerate(share) if tokens > 0]
        for source, share in enumerate(shares)
    ]
    loads = [sum(share) for share in shares]
    most_wanted = (1 + NEAR) * sum(loads) / max(1, len(loads))
    while max(loads, default=0) > most_wanted:
        high, low = loads.index(max(loads)), loads.index(min(loads))
        change = _best_change(rows[high], rows[low], loads[high] - loads[low])
        if change is None:
            break
        # Each change makes the sum of the squares of all loads smaller, so this ends.
        for here, there, which in ((high, low, change[0]), (low, high, change[1])):
            if which is not None:
                row = rows[here].pop(which)
                rows[there].append(row)
                loads[here] -= row[0]
                loads[there] += row[0]
    placed = ((s, i, target) for target, share in enumerate(rows) for _, s, i in share)
    return sorted(Move(*move) for move in placed if move[0] != move[2])


def _best_change(
    more: list[tuple[int, int, int]], fewer: list[tuple[int, int, int]], apart: int
) -> tuple[int, int | None] | None:
    """Which row of the worker with more goes to the other, and which comes back, if any.

    apart: by how many tokens they differ. The change that comes nearest to halving it; None where
    none brings them nearer to each other.
    """
    given = np.array([row[0] for row in more], dtype=np.int64)
    # Row 0 stands for nothing that comes back: of equal changes the one that sends less is taken.
    back = np.array([0, *(row[0] for row in fewer)], dtype=np.int64)
    moved = given[:, None] - back[None, :]
    miss = np.where((moved > 0) & (moved < apart), np.abs(2 * moved - apart), apart)
    if not miss.size or miss.min() >= apart:
        return None
    nothing_back = int(miss[:, 0].argmin())
    if miss[nothing_back, 0] <= miss.min() + apart // 8:
        return nothing_back, None
    which, other = divmod(int(miss.argmin()), len(back))
    return which, other - 1


def share_out(rows: Sequence[Row], ranks: Ranks) -> list[Row]:
    """The rows that this worker trains in a step to which it brings ``rows``. Collective.

    Over all workers they are the same rows.
    """
    shares = ranks.all_gather([row.num_inputs if row.num_targets else 0 for row in rows])
    moves = plan_moves(shares)
    parcels: dict[int, list[Row]] = defaultdict(list)
    for move in moves:
        if move.source == ranks.rank:
            parcels[move.target].append(rows[move.row])
    gone = {move.row for move in moves if move.source == ranks.rank}
    senders = sorted({move.source for move in moves if move.target == ranks.rank})
    outgoing = {target: pickle.dumps(some, protocol=5) for target, some in parcels.items()}
    received = ranks.exchange(outgoing, senders)
    kept = [row for index, row in enumerate(rows) if index not in gone]
    return kept + [row for source in senders for row in pickle.loads(received[source])]


def idle_share(passes: Sequence[Sequence[float]], together: bool) -> float:
    """The share of the workers' time in a step's passes for which they wait for each other.

    passes: by worker, the positions of each of its passes, in their order; a position takes the
    same time everywhere. together: whether all wait for each other in every pass, as they do where
    layers are gathered; else once a step.
    """
    table = np.asarray(passes, dtype=np.float64)
    longest = table.max(axis=0).sum() if together else table.sum(axis=1).max()
    return float(1.0 - table.sum() / (len(table) * longest)) if longest else 0.0
