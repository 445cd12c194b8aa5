"""Packed texts: each token sees what it sees in its own text, or the texts stay padded."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from raystill.model.sampling import ResolvedSampling
from raystill.train.evaluation import free_running
from raystill.train.evaluation.free_running import FreeRunning, generate
from raystill.train.start import texts as module
from raystill.train.start.importance import block_influence, judged_log_probs
from raystill.train.start.texts import NOTHING, SHARED, Texts, packed_for, shared_beginning
from raystill.train.start.width import choose_widths
from tests.train.test_family_table import FAMILIES, teacher_of
from tests.train.test_refit import teacher

CPU = torch.device("cpu")
BEGINNING = [3, 9, 4, 9, 5, 9, 6, 9, 7, 9]
STAY_PADDED = {family for family, more in FAMILIES.items() if "sliding_window" in more}
"""The windows of the table's families are shorter than the texts."""


def prompts(count: int, vocab: int = 60, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 12, size=count)
    return [np.array([*BEGINNING, *draw.integers(3, vocab, size=n)], np.int32) for n in lengths]


def some(count: int = 9, vocab: int = 60) -> Texts:
    draw = np.random.default_rng(1)
    answers = [draw.integers(3, vocab, size=n) for n in draw.integers(1, 9, size=count)]
    return Texts.of(prompts(count, vocab), answers)


def by_text(texts: Texts, values: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    """Of all judged positions: the value of each, by its text and its position in it."""
    text, position = texts.text[texts.judged].tolist(), texts.positions[texts.judged].tolist()
    return dict(zip(zip(text, position, strict=True), values, strict=True))


def test_the_beginning_is_there_once_a_row_and_stands_for_all_its_tokens() -> None:
    padded = some()
    packed = Texts.packed(padded.parts)
    assert len(packed.text) == 1 and (packed.text == SHARED).sum() == len(BEGINNING)
    assert float(packed.count.sum()) == float(padded.count.sum()) == int(padded.present.sum())
    assert packed.present.sum() == padded.present.sum() - 8 * len(BEGINNING)
    for i, (prompt, answer) in enumerate(padded.parts):
        mine = packed.text == i
        assert packed.input_ids[mine].tolist() == [*prompt, *answer][len(BEGINNING) :]
        assert packed.positions[mine].tolist() == list(
            range(len(BEGINNING), len(prompt) + len(answer))
        )
    assert set(by_text(packed, packed.input_ids[packed.judged])) == set(
        by_text(padded, padded.input_ids[padded.judged])
    )


def test_rows_are_filled_up_to_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_TOKENS", 40)
    packed = Texts.packed(some(30).parts)
    assert packed.text.shape[1] <= 40
    assert sorted(set(packed.text.flatten().tolist())) == [NOTHING, SHARED, *range(30)]
    assert packed.present.float().mean() > 0.75
    assert float(packed.count.sum()) == pytest.approx(int(some(30).present.sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("given", "shared"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2]], 1), ([[1], [1, 2]], 0), ([[5, 6]], 1)],
)
def test_a_prompts_last_token_is_never_shared(given: list[list[int]], shared: int) -> None:
    assert shared_beginning([np.array(ids) for ids in given]) == shared


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_the_same_of_packed_texts_or_gets_padded_ones(family: str) -> None:
    model, padded = teacher_of(family).eval().float(), some(vocab=30)
    packed = packed_for(model, padded)
    assert packed.one_a_row == (family in STAY_PADDED)
    with torch.no_grad():
        wanted = by_text(padded, judged_log_probs(model, padded))
        found = by_text(packed, judged_log_probs(model, packed))
    assert wanted.keys() == found.keys()
    for place, log_p in wanted.items():
        torch.testing.assert_close(found[place], log_p, rtol=2e-3, atol=2e-3)


def test_influence_and_widths_count_the_beginning_as_often_as_it_is_there() -> None:
    model, padded = teacher(), some(24)
    packed = packed_for(model, padded)
    assert not packed.one_a_row
    influence = block_influence(model, padded)
    assert block_influence(model, packed) == pytest.approx(influence, rel=1e-4)
    sizes: dict[str, Any] = {"hidden": 24, "ffn": 30, "heads": 2}
    found, expected = (choose_widths(model, texts, **sizes) for texts in (packed, padded))
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    assert replace(found, norms=None) == replace(expected, norms=None)


def test_a_window_that_is_shorter_than_the_texts_keeps_them_padded() -> None:
    config = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    for window, padded in ((4, True), (64, False)):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**config, sliding_window=window)).eval()
        assert packed_for(model, some()).one_a_row == padded


def test_a_convolution_over_the_row_keeps_texts_padded() -> None:
    config = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(Lfm2Config(**config, full_attn_idxs=[1])).eval()
    given = prompts(200)
    assert packed_for(model, some()).one_a_row
    assert free_running._beginning(model, given, CPU) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_where_the_beginning_is_computed_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = teacher_of(family).eval().float(), prompts(7, 30)
    model.generation_config = GenerationConfig()
    settings = FreeRunning(7, 6, greedy(), seed=1, rows_per_batch=3)
    alone = [generate(model, [prompt], settings, CPU)[0] for prompt in given]
    monkeypatch.setattr(free_running, "LEAST_SAVED", 8)
    began = free_running._beginning(model, given, CPU)
    assert began is None or began.get_seq_length() == len(BEGINNING)
    assert generate(model, given, settings, CPU) == alone


def greedy() -> ResolvedSampling:
    return ResolvedSampling(
        temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=6, stop_token_ids=()
    )
