"""What a poorer signal does to the gradient: by hand, at both ends of the ladder and between."""

import math

import numpy as np
import pytest
import torch

from raystill.config.objective import ObjectiveConfig
from raystill.datasets.rows.answers import answers_table
from raystill.datasets.rows.signal import Signal
from raystill.train.batch.batch import FILLER_ID
from raystill.train.batch.rows import Row
from raystill.train.calibration import compare
from raystill.train.calibration.calibrator import recompute_in_eval
from raystill.train.calibration.cost import bytes_per_token, cost_of
from raystill.train.calibration.positions import RowPositions, read_positions, sample_positions
from raystill.train.loss.head_loss import OutputHead
from raystill.train.loss.teacher_head import TeacherHead
from tests.support.slow_objective import DIVERGENCES
from tests.support.tiny_student import TEACHER_HIDDEN, VOCAB, flat, make_hidden_row, tiny_module

FORWARD_KL = ObjectiveConfig(forward_kl=1.0)
HIDDEN = Signal("hidden", TEACHER_HIDDEN)


def teacher_of(dtype=torch.float32):
    """A head without padding, so that K can be the whole vocabulary."""
    generator = torch.Generator().manual_seed(7)
    weight = 0.7 * torch.randn(VOCAB, TEACHER_HIDDEN, generator=generator)
    return TeacherHead(weight.to(dtype), compute_dtype=dtype, num_classes=VOCAB)


def positions_of(teacher, signals, count=40, budget=1000):
    rows = [make_hidden_row(number, tokens=6 + number) for number in range(6)]
    sampled = sample_positions(rows, count, 8, seed=0)
    return read_positions(sampled, teacher, signals, budget, VOCAB)


def ladder(*sizes):
    return [Signal("text"), Signal("sampled"), *(Signal("topk", k) for k in sizes), HIDDEN]


def test_a_small_case_by_hand() -> None:
    # Teacher (1/2, 1/4, 1/8, 1/8), student (1/4, 1/4, 1/4, 1/4), the drawn token is id 0.
    p = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8], dtype=torch.float64)
    teacher = TeacherHead(p.log()[:, None], compute_dtype=torch.float64, num_classes=4)
    one = torch.ones(1, 1, dtype=torch.bfloat16).view(torch.uint16).numpy()
    row = Row(0, 0, np.ones(1, np.int32), np.zeros(1, np.int32), "stop", hidden=one)
    signals = [Signal("text"), Signal("topk", 1), Signal("topk", 4), Signal("hidden", 1)]
    positions = read_positions([RowPositions(row, np.array([0]))], teacher, signals, 100, 4)
    head = OutputHead(torch.zeros(4, 2, dtype=torch.float64), compute_dtype=torch.float64)
    hidden = torch.ones(1, 2, dtype=torch.float64)
    compared = compare.compare_logits(hidden, head, positions, FORWARD_KL, teacher)
    # Full: q - p = (-1/4, 0, 1/8, 1/8). topk 1: -1/4 at id 0, and 1/4 - 1/2 * 1/3 elsewhere.
    # text: q less 1 at id 0. Their products with the full one are 1/12 and 1/4, their cosine is
    # the same.
    cosine = (1 / 12) / math.sqrt(3 / 32 * 1 / 12)
    full = math.log(2) / 4
    expected = {
        Signal("text"): (math.log(4), cosine, None),
        Signal("topk", 1): (0.5 * math.log(2) + 0.5 * math.log(2 / 3), cosine, 0.25),
        Signal("topk", 4): (full, 1.0, 1.0),
        Signal("hidden", 1): (full, 1.0, 1.0),
    }
    for signal, figures in expected.items():
        assert compared[signal] == pytest.approx(figures, abs=1e-6), signal


@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_ids_are_the_full_signal_and_fewer_show_less_of_the_loss(name) -> None:
    teacher, module = teacher_of(), tiny_module()
    positions = positions_of(teacher, ladder(1, 2, 4, 8, 16, 32, VOCAB))
    objective = ObjectiveConfig(**{name: 1.0})
    hidden = compare.hidden_states(module, positions)
    compared = compare.compare_logits(hidden, module.head(), positions, objective, teacher)
    whole, full = compared[Signal("topk", VOCAB)], compared[HIDDEN]
    assert whole.loss == pytest.approx(full.loss, rel=1e-5)
    assert whole.cosine == pytest.approx(1.0, abs=1e-5)
    losses = [figures.loss for signal, figures in compared.items() if signal.kind == "topk"]
    # The last of them differ by rounding, which is not the same on every processor.
    assert losses == pytest.approx(sorted(losses), rel=1e-6)
    assert losses[0] > 0 and losses[-1] <= full.loss * (1 + 1e-5)
    parameters = compare.compare_parameters(module, positions, objective, teacher)
    assert parameters[Signal("topk", VOCAB)] == pytest.approx(1.0, abs=1e-5)
    assert parameters[HIDDEN] == pytest.approx(1.0, abs=1e-6)
    assert all(-1 <= cosine < 1.00001 for cosine in parameters.values())


def test_the_angle_at_the_parameters_is_that_of_whole_gradients_however_rows_are_cut() -> None:
    teacher = teacher_of(torch.float64)
    signals, results = ladder(4), []
    for budget in (20, 1000):
        module = tiny_module(torch.float64)
        positions = positions_of(teacher, signals, budget=budget)
        cosines = compare.compare_parameters(module, positions, FORWARD_KL, teacher)
        assert all(p.grad is None for p in module.parameters())
        results.append([cosines[signal] for signal in signals])
        full, four = (
            flat(compare.gradient_of(module, positions, signal, FORWARD_KL, teacher))
            for signal in (HIDDEN, Signal("topk", 4))
        )
        expected = torch.nn.functional.cosine_similarity(full, four, dim=0).item()
        assert cosines[Signal("topk", 4)] == pytest.approx(expected, abs=1e-9)
    assert len(positions.batches) == 1
    assert results[0] == pytest.approx(results[1], abs=1e-9)


def test_chunks_of_the_logits_change_nothing(monkeypatch) -> None:
    teacher, module = teacher_of(torch.float64), tiny_module(torch.float64)
    positions, results = positions_of(teacher, ladder(1, 4)), []
    hidden = compare.hidden_states(module, positions)
    for tokens in (3, 1000):
        monkeypatch.setattr("raystill.train.loss.head_loss.CPU_CHUNK_BYTES", tokens * VOCAB * 8)
        inputs = (positions, ObjectiveConfig(jsd=1.0), teacher)
        results.append(compare.compare_logits(hidden, module.head(), *inputs))
    for signal, figures in results[0].items():
        assert figures == pytest.approx(results[1][signal], abs=1e-9)


def test_a_student_that_is_the_teacher_has_no_cosine() -> None:
    teacher = teacher_of(torch.float64)
    positions = positions_of(teacher, ladder(4))
    hidden = positions.tokens.teacher_hidden.double()
    head = OutputHead(teacher.weight, compute_dtype=torch.float64)
    objective = ObjectiveConfig(total_variation=1.0)
    compared = compare.compare_logits(hidden, head, positions, objective, teacher)
    assert compared[HIDDEN].loss == 0
    assert compared[HIDDEN].cosine is None and compared[Signal("topk", 4)].cosine is None


def test_positions_are_sampled_by_seed_within_their_bounds() -> None:
    rows = [make_hidden_row(number, tokens=6 + number) for number in range(6)]
    rows[0].prompt_ids = rows[0].prompt_ids[:0]  # Its first token has no context.
    sampled = sample_positions(rows, 30, 7, seed=3)
    assert sum(len(p.indices) for p in sampled) == 30
    assert all(len(p.indices) <= 7 and (np.diff(p.indices) > 0).all() for p in sampled)
    everything = sample_positions(rows, 1000, 100, seed=3)
    assert sum(len(p.indices) for p in everything) == sum(row.num_targets for row in rows)
    assert all(p.indices[0] == (len(p.row.prompt_ids) == 0) for p in everything)
    for one, other in zip(sampled, sample_positions(rows, 30, 7, seed=3), strict=True):
        assert one.row is other.row and np.array_equal(one.indices, other.indices)
    with pytest.raises(ValueError, match="none of the 0 rows has a response token"):
        sample_positions([], 30, 7, seed=3)


@pytest.mark.parametrize("budget", [20, 1000])
def test_tokens_keep_their_rows_signal_and_context(budget) -> None:
    teacher, rows = teacher_of(), [make_hidden_row(n, tokens=6 + n) for n in range(6)]
    sampled = sample_positions(rows, 20, 5, seed=1)
    positions = read_positions(sampled, teacher, ladder(4), budget, VOCAB)
    expected = {
        (int(p.row.response_ids[t]), p.row.hidden[t].tobytes()) for p in sampled for t in p.indices
    }
    states = positions.tokens.teacher_hidden.view(torch.uint16).numpy()
    tokens = zip(positions.tokens.targets.tolist(), states, strict=True)
    assert {(target, state.tobytes()) for target, state in tokens} == expected
    assert sum(positions.lengths) == positions.tokens.num_tokens == 20
    signal = Signal("topk", 4)
    parts = [batch.partition.ids for batch in positions.micro_batches(signal)]
    assert torch.equal(torch.cat(parts), positions.all_tokens(signal).partition.ids)
    for batch in positions.batches:
        # The token that follows the position is the sampled one, where it is put in at all.
        inside = (batch.logit_index + 1) % batch.input_ids.shape[1] != 0
        following = batch.input_ids.flatten()[batch.logit_index[inside] + 1]
        put_in = following != FILLER_ID
        assert torch.equal(following[put_in], batch.targets[inside][put_in])


def test_bytes_are_measured_as_stored() -> None:
    positions = positions_of(teacher_of(), ladder(1, 8))
    sizes = {
        signal: bytes_per_token(answers_table(positions.answers(signal), signal), signal)
        for signal in positions.partitions
    }
    text, sampled, one, eight, hidden = (sizes[signal] for signal in ladder(1, 8))
    assert 0 < text < sampled < one < eight
    assert hidden > 2 * TEACHER_HIDDEN


def test_the_objectives_are_the_runs_own_or_all() -> None:
    both = ObjectiveConfig(forward_kl=1.0, jsd=0.5, jsd_beta=0.2, temperature=2.0)
    objectives = compare.objectives_to_compare(both, False)
    assert list(objectives) == ["forward_kl", "jsd", compare.ALL_TERMS]
    assert objectives["jsd"].weights == {"jsd": 1.0} and objectives["jsd"].jsd_beta == 0.2
    assert objectives[compare.ALL_TERMS].weights == both.weights
    assert all(objective.temperature == 1.0 for objective in objectives.values())
    assert set(compare.objectives_to_compare(FORWARD_KL, True)) == set(DIVERGENCES)
    text = ObjectiveConfig(cross_entropy=2.0)
    assert list(compare.objectives_to_compare(text, False)) == ["cross_entropy"]


def test_the_ladder_ends_with_the_vocabulary_and_has_the_runs_own_k() -> None:
    signals = compare.signals_to_compare(100, 576, [20])
    assert [str(signal) for signal in signals] == [
        *("text", "sampled", "topk 1", "topk 8", "topk 16", "topk 20", "topk 64", "hidden 576")
    ]


def test_a_cost_is_a_time_and_a_peak() -> None:
    weight = torch.randn(1 << 20).requires_grad_()
    cost = cost_of(lambda: (weight * 2).square().sum(), torch.device("cpu"))
    assert 0 < cost.seconds < 60
    assert cost.peak_bytes is None or cost.peak_bytes >= 0


def test_activations_are_computed_again_in_eval_mode_and_gradients_stay() -> None:
    teacher = teacher_of()
    positions = positions_of(teacher, ladder(4), budget=40)
    found, calls = [], []
    for again in (False, True):
        module = tiny_module(activation_checkpointing=again)
        module.model.config.attention_dropout = 0.0
        module.eval()
        if again:
            assert recompute_in_eval(module.model)
        layer = module.model.model.layers[1]
        assert not layer.self_attn.training
        calls.append(0)
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
        found.append(compare.gradient_of(module, positions, HIDDEN, FORWARD_KL, teacher))
    assert calls[1] == 2 * calls[0] > 2
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    module.eval()
    module.model.config.attention_dropout = 0.1
    assert not recompute_in_eval(module.model) and not module.model.model.layers[1].training
