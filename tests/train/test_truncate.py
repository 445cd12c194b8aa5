"""Poorer signals worked out from the full distribution: by hand, and to the whole vocabulary."""

import math

import pytest
import torch

from raystill.train.calibration.positions import truncate
from raystill.train.loss.teacher_head import TeacherHead

LOGITS = torch.tensor([[0.5, 2.0, -1.0, 1.0], [1.0, 0.25, 3.0, -0.5]])
HEAD = TeacherHead(torch.eye(4, dtype=torch.float64), compute_dtype=torch.float64, num_classes=4)


def test_a_small_case_by_hand() -> None:
    head = TeacherHead(
        torch.full((4, 1), 1.0, dtype=torch.float64) * torch.arange(4)[:, None],
        compute_dtype=torch.float64,
        num_classes=4,
    )  # Logits 0, h, 2 h, 3 h: with h = 1 exact in bfloat16.
    signal = truncate(head, torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([1]), [1, 2, 4])
    total = sum(math.exp(i) for i in range(4))
    assert signal.drawn.item() == pytest.approx(math.log(math.e / total), abs=1e-12)
    assert signal.topk[2].ids.tolist() == [[3, 2]]
    expected = [3 - math.log(total), 2 - math.log(total)]
    assert signal.topk[2].logprobs[0].tolist() == pytest.approx(expected, abs=1e-12)
    outside = {1: 1 + math.e + math.e**2, 2: 1 + math.e}
    for size, mass in outside.items():
        assert signal.topk[size].tail.item() == pytest.approx(math.log(mass / total), abs=1e-12)
    assert signal.topk[4].tail.item() == -math.inf  # K = V: nothing is outside.


def test_every_k_is_the_first_of_a_larger_and_its_masses_sum_to_one() -> None:
    sizes = [1, 2, 3, 4]
    signal = truncate(HEAD, LOGITS.bfloat16(), torch.tensor([1, 2]), sizes)
    for size in sizes:
        ids, logprobs, tail = signal.topk[size]
        assert torch.equal(ids, signal.topk[4].ids[:, :size])
        total = logprobs.exp().sum(dim=1) + tail.exp()
        torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64))


def test_a_tail_of_almost_nothing_keeps_its_digits() -> None:
    # exp(-30) beside 1: 1 minus the sum of the K would be 0 in float32.
    logits = torch.tensor([[0.0, -30.0, -30.0, -30.0]])
    head = TeacherHead(torch.eye(4), num_classes=4)
    tail = truncate(head, logits.bfloat16(), torch.tensor([0]), [1]).topk[1].tail
    assert tail.item() == pytest.approx(math.log(3) - 30, abs=1e-5)


@pytest.mark.parametrize("sizes", [[0], [5]])
def test_k_beyond_the_vocabulary_is_refused(sizes) -> None:
    with pytest.raises(ValueError, match="expected 1 to 4"):
        truncate(HEAD, LOGITS.bfloat16(), torch.tensor([1, 2]), sizes)
