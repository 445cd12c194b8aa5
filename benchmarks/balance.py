"""How long workers wait for each other in a step, with rows as they come and with rows shared out.

    python -m benchmarks.balance

Lengths are lognormal (median 600 tokens, at most 4,096), passes of 8,192 positions, and a position
takes the same time everywhere: nothing is trained. FSDP's workers wait for each other in every
pass, DDP's once a step. Before: each worker cuts the rows that came to it, and runs dummies up to
the number of passes of the worker with the most. Printed: the mean over 200 steps (20 with
64 workers) of the share of the workers' time in which they wait, of the tokens that change workers,
and of the step's length and its number of passes, against before.
"""

import numpy as np

from raystill.config.objective import ObjectiveConfig
from raystill.config.training import TrainingConfig
from raystill.train.batch.rows import Row
from raystill.train.step.balance import idle_share, plan_moves
from raystill.train.step.micro_batches import BatchMaker

MEDIAN, SPREAD, LONGEST, BUDGET, STEPS = 600, 0.9, 4096, 8192, 200
CASES = ((8, 4), (8, 16), (8, 64), (64, 4), (64, 16))
"""Workers, and rows of each in a step."""


def rows_of(generator: np.random.Generator, workers: int, rows: int) -> list[list[Row]]:
    """The rows of each worker as the stream gives them."""
    lengths = generator.lognormal(np.log(MEDIAN), SPREAD, (workers, rows))
    lengths = np.clip(lengths, 2, LONGEST).astype(int)
    prompt = np.zeros(1, np.int32)
    return [
        [Row(w * rows + i, 0, prompt, np.zeros(n, np.int32)) for i, n in enumerate(share)]
        for w, share in enumerate(lengths)
    ]


def passes_of(maker: BatchMaker, shares: list[list[Row]], spread: bool) -> list[list[int]]:
    """Positions of each pass, by worker."""
    cuts = [maker.cut(share) for share in shares]
    most = max(map(len, cuts))
    if spread:
        pairs = zip(shares, cuts, strict=True)
        cuts = [maker.spread(share, groups, most) for share, groups in pairs]
    sizes = [[maker.positions(group) for group in groups] for groups in cuts]
    return [own + [0] * (most - len(own)) for own in sizes]


def shared_out(shares: list[list[Row]]) -> tuple[list[list[Row]], float]:
    """The rows once they have changed workers, and the share of the tokens that has."""
    tokens = [[row.num_inputs for row in share] for share in shares]
    moves = plan_moves(tokens)
    gone = {(move.source, move.row) for move in moves}
    after = [
        [row for i, row in enumerate(share) if (w, i) not in gone] for w, share in enumerate(shares)
    ]
    for move in moves:
        after[move.target].append(shares[move.source][move.row])
    return after, sum(tokens[w][i] for w, i in gone) / sum(map(sum, tokens))


def main() -> None:
    """Print the table."""
    print("workers rows packed | waiting %: fsdp before, after; ddp before, after | tokens moved %")
    print("                    | length of a step with fsdp, number of passes, % of before")
    for packed in (False, True):
        training = TrainingConfig(tokens_per_micro_batch=BUDGET)
        maker = BatchMaker(
            training,
            ObjectiveConfig(cross_entropy=1.0),
            signal_kind="text",
            student_vocab=10,
            packed=packed,
        )
        for workers, rows in CASES:
            generator = np.random.default_rng(0)
            found = []
            for _ in range(STEPS if workers < 64 else STEPS // 10):
                shares = rows_of(generator, workers, rows)
                after, moved = shared_out(shares)
                old, new = passes_of(maker, shares, False), passes_of(maker, after, True)
                waits = [idle_share(p, together) for together in (True, False) for p in (old, new)]
                longer = sum(map(max, zip(*new, strict=True))) / sum(
                    map(max, zip(*old, strict=True))
                )
                found.append([*waits, moved, longer, len(new[0]) / len(old[0])])
            mean = 100 * np.mean(found, axis=0)
            told = " ".join(f"{value:6.1f}" for value in mean)
            print(f"{workers:7d} {rows:4d} {packed!s:6s} | {told}", flush=True)


if __name__ == "__main__":
    main()
