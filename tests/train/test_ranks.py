"""Random numbers of the ranks: dropout differs by rank, and one worker draws what it always did."""

import pytest
import torch

from raystill.train.step.ranks import Ranks


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_ranks_drop_different_units_and_the_first_what_it_would_alone(num_ranks: int) -> None:
    drawn = []
    for rank in range(num_ranks):
        torch.manual_seed(11)  # As `build_student` does on every rank.
        ranks = Ranks(rank)
        ranks.draw_apart(11)
        drawn.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
    torch.manual_seed(11)
    assert torch.equal(drawn[0], torch.nn.functional.dropout(torch.ones(64), 0.5))
    assert len({tuple(each.tolist()) for each in drawn}) == num_ranks
