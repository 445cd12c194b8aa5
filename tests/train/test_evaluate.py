"""Evaluation: teacher-forced figures against a slow reference, answers, count models by hand."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from raystill.base.records import read_lines
from raystill.base.run_folder import HELD_OUT_PROMPTS, TRAIN_PROMPTS, RunFolder
from raystill.config.run import RunConfig
from raystill.config.student import CheckConfig
from raystill.datasets.rows.schema import PROMPT_SCHEMA, row_schema
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.plan import epoch_order
from raystill.train.batch.rows import Row
from raystill.train.evaluation import baselines, free_running, pairs
from raystill.train.evaluation.baselines import HeldOutTokens, PairCounts, measure_baselines
from raystill.train.evaluation.free_running import (
    FreeRunning,
    HeldOutPrompt,
    choose_rows,
    generate,
    repeated_ngrams,
    run_free,
    write_free,
)
from raystill.train.evaluation.measure import (
    MOST_TOKENS_BY_TOKEN,
    LocalStudent,
    Measurer,
    tokens_of,
)
from raystill.train.evaluation.own_contexts import measure_own_contexts
from raystill.train.evaluation.teacher_forced import TokenKl, evaluate
from raystill.train.step.ranks import Ranks
from raystill.train.student.module import StudentModule
from tests.datasets.test_store import keys_of, publish, segment
from tests.support.runs import run_of

VOCAB, K = 32, 4
CPU = torch.device("cpu")


@dataclass
class FakeSampling:
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = (2,)


def tiny_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():  # Far from uniform, so that the figures mean something.
        model.lm_head.weight.mul_(20)
    return model


def teacher_row(number, prompt, response, rng):
    """A row with the top K of random distributions over the vocabulary."""
    p = rng.dirichlet(np.full(VOCAB, 0.3), size=len(response))
    ids = np.argsort(-p, axis=1)[:, :K]
    top = np.take_along_axis(p, ids, axis=1)
    return Row(
        position=number,
        row=number,
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
        finish_reason="stop",
        sampled_logprobs=np.log(p[np.arange(len(response)), response]).astype(np.float32),
        topk_ids=ids.astype(np.int32),
        topk_logprobs=np.log(top).astype(np.float32),
        tail_logprob=np.log(1 - top.sum(axis=1)).astype(np.float32),
    )


def some_rows():
    rng = np.random.default_rng(3)
    prompts = [[5, 6, 7], [9], [4, 4, 8, 1, 3], [], [11, 12]]
    responses = [[8, 9, 2], [3, 2], [30], [7, 6, 2], [10, 11, 12, 13, 14, 2]]
    return [
        teacher_row(i, p, r, rng) for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
    ]


def slow_reference(model, rows):
    """Token by token, row by row, in plain float64 probabilities."""
    sums, tokens = dict.fromkeys(("kl", "top1", "acceptance", "nll"), 0.0), 0
    for row in rows:
        ids = [*row.prompt_ids.tolist(), *row.response_ids.tolist()]
        with torch.no_grad():
            q_all = model(torch.tensor([ids])).logits[0].double().softmax(-1)
        for t, target in enumerate(row.response_ids):
            at = len(row.prompt_ids) + t - 1
            if at < 0:
                continue  # Nothing stands before it.
            q_vocab = q_all[at].numpy()
            p = np.exp([*row.topk_logprobs[t].astype(float), float(row.tail_logprob[t])])
            p = p / p.sum()
            q = [q_vocab[i] for i in row.topk_ids[t]]
            q = np.array([*q, 1 - sum(q)])
            sums["kl"] += float((p * np.log(p / q)).sum())
            sums["acceptance"] += float(np.minimum(p, q).sum())
            sums["top1"] += int(q_vocab.argmax()) == int(row.topk_ids[t][0])
            sums["nll"] += -math.log(q_vocab[target])
            tokens += 1
    return {name: value / tokens for name, value in sums.items()}, tokens


@pytest.mark.parametrize("tokens_budget", [1, 9, 4096])
def test_teacher_forced_figures_equal_a_slow_reference(tokens_budget):
    model, rows = tiny_model(), some_rows()
    expected, tokens = slow_reference(model, rows)
    figures = evaluate(
        StudentModule(model),
        rows,
        tokens_budget=tokens_budget,
        student_vocab=VOCAB,
        device=CPU,
        ranks=Ranks(),
    )
    assert figures["num_tokens"] == tokens == 14
    assert figures["kl_nats_per_token"] == pytest.approx(expected["kl"], rel=1e-5)
    assert figures["acceptance"] == pytest.approx(expected["acceptance"], rel=1e-5)
    assert figures["top1_agreement"] == pytest.approx(expected["top1"])
    assert figures["perplexity"] == pytest.approx(math.exp(expected["nll"]), rel=1e-6)
    assert "lower" in figures["bound"]


@pytest.mark.parametrize("tokens_budget", [1, 9, 4096])
def test_the_kl_of_single_tokens_is_kept_of_the_rows_that_are_wanted(tokens_budget):
    model, rows = tiny_model(), some_rows()
    tokens = TokenKl(frozenset([rows[1].row, rows[3].row]))
    settings = {"tokens_budget": tokens_budget, "student_vocab": VOCAB, "device": CPU}
    evaluate(StudentModule(model), rows, **settings, ranks=Ranks(), tokens=tokens)
    assert set(tokens.nats) == tokens.rows
    for row in (rows[1], rows[3]):
        alone, count = slow_reference(model, [row])
        assert len(tokens.nats[row.row]) == count == row.num_targets
        assert sum(tokens.nats[row.row]) / count == pytest.approx(alone["kl"], rel=1e-5)
    assert tokens.nats[rows[1].row] != tokens.nats[rows[3].row]


def test_an_answer_is_told_token_by_token():
    def text(ids):  # 9 is a special token; 7 and 8 are the two bytes of one character.
        return b"".join({7: b"\xc3", 8: b"\xa9", 9: b""}.get(i, b"%d " % i) for i in ids).decode(
            errors="replace"
        )

    told = tokens_of("teacher", [1, 7, 8, 2, 9], [0.1, 0.2, 0.30001, 4.0, 0.5], text)
    assert told["teacher_tokens"] == ["1 ", "", "é", "2 ", ""]
    assert told["teacher_kl"] == [0.1, 0.2, 0.3, 4.0, 0.5]
    # Without a prompt the first token has no loss.
    assert tokens_of("student", [1, 2], [0.5], text) == {
        "student_tokens": ["2 "],
        "student_kl": [0.5],
    }
    assert tokens_of("student", [1, 2], None, text) == {}
    many = tokens_of("student", [1] * 2000, [0.5] * 2000, text)
    assert len(many["student_tokens"]) == len(many["student_kl"]) == MOST_TOKENS_BY_TOKEN


class OneOfMany(Ranks):
    """A rank whose sums are not added up, so that a test can add them."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size, self.sums = rank, world_size, {}

    def sum(self, values):
        self.sums = values
        return values


def test_the_ranks_slices_add_up_to_the_whole():
    module, rows = StudentModule(tiny_model()), some_rows()
    settings = {"tokens_budget": 64, "student_vocab": VOCAB, "device": CPU}
    whole = evaluate(module, rows, **settings, ranks=Ranks())
    parts = [OneOfMany(rank, 3) for rank in range(3)]
    for part in parts:
        evaluate(module, rows, **settings, ranks=part)
    tokens = sum(part.sums["tokens"] for part in parts)
    kl = sum(part.sums["kl"] for part in parts) / tokens
    assert tokens == whole["num_tokens"]
    assert kl == pytest.approx(whole["kl_nats_per_token"], rel=1e-12)


def test_held_out_rows_without_a_token_are_an_error_that_says_so():
    with pytest.raises(ValueError, match="hold no response token"):
        evaluate(
            StudentModule(tiny_model()),
            [],
            tokens_budget=64,
            student_vocab=VOCAB,
            device=CPU,
            ranks=Ranks(),
        )


def test_repeated_4grams_by_hand():
    # 4-grams of 1 2 3 4 1 2 3 4 1: 1234 2341 3412 4123 1234 2341; the last two repeat.
    assert repeated_ngrams([1, 2, 3, 4, 1, 2, 3, 4, 1]) == (2, 6)
    # 7 7 7 7 7 7: 7777 three times, two of them repeats.
    assert repeated_ngrams([7] * 6) == (2, 3)
    assert repeated_ngrams([1, 2, 3, 4, 5]) == (0, 2)
    assert repeated_ngrams([1, 2, 3]) == (0, 0)


def free(rows=3, max_tokens=6, **sampling):
    return FreeRunning(rows, max_tokens, FakeSampling(**sampling), seed=5)


def test_padding_on_the_left_does_not_change_a_greedy_answer():
    model = tiny_model()
    prompts = [np.array(p, dtype=np.int32) for p in ([5, 6, 7], [9], [4, 4, 8, 1, 3])]
    settings = free(temperature=0.0)
    together = generate(model, prompts, settings, CPU)
    alone = [generate(model, [prompt], settings, CPU)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_drawn_without_the_settings_of_the_students_folder(temperature):
    """As the teacher's are: it ignores the penalties of its own folder."""
    plain, other = tiny_model(), tiny_model()
    own = transformers.GenerationConfig(
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[5, 6, 7, 8, 9],
        bad_words_ids=[[10], [11]],
        min_new_tokens=6,
        forced_eos_token_id=2,
        num_beams=2,
        renormalize_logits=True,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        typical_p=0.2,
        eos_token_id=list(range(12, 32)),
        begin_suppress_tokens=list(range(3, 20)),
        sequence_bias=[[[4], 50.0]],
    )
    other.generation_config = own
    prompts = [np.array(p, dtype=np.int32) for p in ([5, 6, 7], [9], [4, 4, 8, 1, 3])]
    settings = free(max_tokens=20, temperature=temperature)
    expected = generate(plain, prompts, settings, CPU)
    assert generate(other, prompts, settings, CPU) == expected
    assert other.generation_config is own and own.repetition_penalty == 9.0
    assert any(len(set(answer)) < len(answer) for answer in expected), "nothing to penalise"


def test_free_running_is_repeatable_and_leaves_the_random_state_alone():
    model, rows = tiny_model().train(), some_rows()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, pairs = run_free(model, rows, free(), CPU, Ranks())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    second, again = run_free(model, rows, free(), CPU, Ranks())
    assert first == second
    assert [answer for _, answer in pairs] == [answer for _, answer in again]


def test_free_running_figures_compare_the_student_with_the_teacher_on_the_same_rows():
    rows = some_rows()
    figures, pairs = run_free(tiny_model(), rows, free(rows=5, max_tokens=4), CPU, Ranks())
    answered = [row.row for row, _ in pairs]
    assert answered == [0, 1, 2, 4]  # Row 3 has no prompt to go on from.
    # Teacher, cut to 4 tokens: 3 + 2 + 1 + 4 tokens; rows 0 and 1 end with the stop id.
    tokens = sum(len(answer) for _, answer in pairs)
    assert figures["length_ratio"] == pytest.approx(tokens / 10)
    assert figures["teacher_stop_rate"] == 0.5
    stopped = sum(answer[-1] == 2 for _, answer in pairs)
    assert figures["stop_rate"] == stopped / 4
    assert all(2 not in answer[:-1] and len(answer) <= 4 for _, answer in pairs)


def test_answers_that_were_written_ahead_are_used_where_they_are_all_there(monkeypatch):
    model, rows = tiny_model(), some_rows()
    prompts = [HeldOutPrompt(row.row, row.prompt_ids) for row in rows]
    ahead = write_free(model, prompts, free(rows=5), CPU, Ranks())
    expected = run_free(model, rows, free(rows=5), CPU, Ranks())
    short = {row: ids for row, ids in ahead.items() if row != rows[0].row}
    assert run_free(model, rows, free(rows=5), CPU, Ranks(), short) == expected
    monkeypatch.setattr(free_running, "generate", None)  # Writing again would fail.
    assert run_free(model, rows, free(rows=5), CPU, Ranks(), ahead) == expected


def test_the_same_rows_are_chosen_at_every_evaluation():
    rows = some_rows()
    chosen = [row.row for row in choose_rows(rows, 3, seed=1)]
    assert chosen == [row.row for row in choose_rows(rows, 3, seed=1)]
    assert len(set(chosen)) == 3
    assert [row.row for row in choose_rows(rows, 9, seed=1)] == [0, 1, 2, 4]  # 3 has no prompt.


def toy_counts():
    """V = 4. Prompt 0, answer 1 2 1 2; no prompt, answer 3 1: pairs 01 12 21 12 31."""
    counts = PairCounts(vocab_size=4)
    counts.add([(np.array([3, 0]), np.array([1, 2, 1, 2]))])
    counts.add([(np.array([], dtype=np.int64), np.array([3, 1]))])
    return counts


def test_pairs_are_counted(monkeypatch):
    counts = toy_counts()
    assert counts.arrays()["pair_codes"].tolist() == [1, 6, 9, 13]  # before * 4 + token
    assert counts.arrays()["pair_counts"].tolist() == [1, 2, 1, 1]
    monkeypatch.setattr(baselines, "MERGE_PAIRS", 1)  # Merged after each call.
    counts.add([(np.array([1]), np.array([0, 1]))])
    assert counts.arrays()["pair_codes"].tolist() == [1, 4, 6, 9, 13]
    assert counts.arrays()["pair_counts"].tolist() == [2, 1, 2, 1, 1]


def test_pairs_are_those_of_the_stored_answers_to_the_rows_that_were_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "ROWS_AT_ONCE", 3)
    folder, store = RunFolder(str(tmp_path / "run")).ensure(), TeacherStore(str(tmp_path / "store"))
    answered = [0, 1, 2, 3, 5, 6, 7]
    publish(store, answered[:4])
    publish(store, answered[4:])
    columns = {"row": list(range(8)), "key": keys_of(list(range(8))), "source": ["s"] * 8}
    columns |= {"prompt_ids": [[row, 1] for row in range(8)], "response_ids": [None] * 8}
    folder.write_table(TRAIN_PROMPTS, pa.table(columns, schema=PROMPT_SCHEMA))
    config = RunConfig.model_validate(
        {
            "teacher": {"model": "unused"},
            "student": {"init": "model", "model": "unused"},
            "prompts": {"path": "unused"},
            "stream": {"group_rows": 4},
        }
    )
    run = run_of(config, folder, store_path=store.path, num_rows=8)
    order = epoch_order(8, config.section_seeds()["order"], 1, 4).tolist()
    expected = PairCounts(VOCAB)
    responses = segment([0, 1, 2, 5, 6, 7])["response_ids"].to_pylist()
    expected.add((np.array([1]), np.array(response)) for response in responses)
    found = pairs.count_pairs(run, VOCAB, 1, {order.index(3): "filtered"})
    assert len(expected.arrays()["pair_codes"]) > 3
    for name, values in expected.arrays().items():
        assert found.arrays()[name].tolist() == values.tolist()
    monkeypatch.setattr(pairs, "MOST_ROWS", 2)  # The first and the last.
    assert pairs.count_pairs(run, VOCAB, 0, {}).arrays()["pair_counts"].sum() == len(
        segment([0])["response_ids"][0]
    ) + len(segment([7])["response_ids"][0])


def test_baselines_against_hand_worked_numbers():
    # One held-out token after 1: the teacher gives id 2 a half, id 0 a quarter, a quarter is tail.
    p = np.array([0.5, 0.25, 0.25])
    part = HeldOutTokens(np.array([1]), np.array([[2, 0]]), np.log(p)[None].astype(np.float32))
    figures = measure_baselines([part], toy_counts())

    def kl(q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    # Uniform: 1/4 1/4 and 1/2 for the two others; a guess is right once in four.
    assert figures["uniform"]["kl_nats_per_token"] == pytest.approx(kl([1 / 4, 1 / 4, 1 / 2]))
    assert figures["uniform"]["top1_agreement"] == 0.25
    # Unigram: token counts 0 3 2 0 of 5, add one of 9: 1/9 4/9 3/9 1/9; its best is 1, not 2.
    assert figures["unigram"]["kl_nats_per_token"] == pytest.approx(kl([3 / 9, 1 / 9, 5 / 9]))
    assert figures["unigram"]["top1_agreement"] == 0.0
    # Bigram after 1: c(1) = 2, d(1) = 1. q(2) = (2 + 3/9) / 3 = 7/9, q(0) = (1/9) / 3 = 1/27,
    # the rest 1 - 7/9 - 1/27 = 5/27; its best is 2.
    assert figures["bigram"]["kl_nats_per_token"] == pytest.approx(kl([7 / 9, 1 / 27, 5 / 27]))
    assert figures["bigram"]["top1_agreement"] == 1.0


def test_a_context_never_seen_falls_back_to_the_unigram_and_empty_slots_count_nothing():
    counts = PairCounts(vocab_size=4)
    counts.add([(np.array([0]), np.array([1, 1]))])
    p = np.array([0.75, 0.0, 0.25])
    with np.errstate(divide="ignore"):
        log_p = np.log(p)[None]
    part = HeldOutTokens(np.array([3]), np.array([[1, -1]]), log_p)
    figures = measure_baselines([part, part], counts)
    # Unigram: 1 3 1 1 of 6: q(1) = 1/2, the tail the other half.
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    for name in ("unigram", "bigram"):
        assert figures[name]["kl_nats_per_token"] == pytest.approx(expected)
        assert figures[name]["top1_agreement"] == 1.0


def test_without_any_training_answer_all_three_models_are_uniform():
    p = np.log(np.array([[0.5, 0.5]]))
    part = HeldOutTokens(np.array([0]), np.array([[1]]), p)
    figures = measure_baselines([part], PairCounts(vocab_size=4))
    values = [figures[name]["kl_nats_per_token"] for name in ("uniform", "unigram", "bigram")]
    assert values == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)] * 3)


def scored_by(teacher, written):
    """Rows as the teacher's ``score`` gives them, from a model here."""
    rows = []
    for row, ids in written:
        inputs = torch.tensor([[*row.prompt_ids.tolist(), *ids]])
        with torch.no_grad():
            logprobs = teacher(inputs).logits[0].log_softmax(dim=-1)
        best = logprobs[len(row.prompt_ids) - 1 : -1].topk(K)
        tail = torch.log1p(-best.values.exp().sum(dim=1))
        rows.append(
            Row(
                row.position,
                row.row,
                row.prompt_ids,
                np.array(ids, np.int32),
                topk_ids=best.indices.numpy().astype(np.int32),
                topk_logprobs=best.values.numpy().astype(np.float32),
                tail_logprob=tail.numpy().astype(np.float32),
            )
        )
    return rows


@pytest.mark.parametrize("same", [True, False])
def test_the_teacher_judges_what_the_student_wrote(measured_run, same):
    _, measurer = measured_run
    teacher = tiny_model(seed=0 if same else 1)
    free = measurer._config.evaluation.free_running.model_copy(update={"teacher_scores": True})
    evaluation = measurer._config.evaluation.model_copy(update={"free_running": free})
    measurer._config = measurer._config.model_copy(update={"evaluation": evaluation})
    written = []
    measurer._score = lambda pairs: written.extend(pairs) or scored_by(teacher, pairs)
    record = measurer.measure(0, "before", "in training precision")
    assert record["student_answer_tokens"] == sum(len(ids) for _, ids in written) > 0
    if same:
        assert abs(record["kl_on_student_answers"]) < 1e-6
        assert abs(record["reverse_kl_on_student_answers"]) < 1e-6
    else:
        assert record["kl_on_student_answers"] > 0.1
        assert record["reverse_kl_on_student_answers"] > 0.1


def by_hand(model, row):
    """KL(p || q) and KL(q || p) at each token of a row, over its K ids and the tail, float64."""
    ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64))
    logits = model(ids[None]).logits[0, len(row.prompt_ids) - 1 : -1]
    q = torch.softmax(logits, dim=1).gather(1, torch.from_numpy(row.topk_ids).long())
    q = torch.cat([q, 1 - q.sum(dim=1, keepdim=True)], dim=1)
    tail = torch.from_numpy(row.tail_logprob)[:, None]
    p = torch.cat([torch.from_numpy(row.topk_logprobs), tail], dim=1).double().exp()
    return (p * (p / q).log()).sum(dim=1), (q * (q / p).log()).sum(dim=1)


class HalfOf(Ranks):
    """One of two ranks, which keeps its sums instead of adding the other's."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.world_size = rank, 2

    def sum(self, values):
        self.kept = values
        return values


@torch.no_grad()
def test_kl_on_own_contexts_is_told_by_position_and_added_over_ranks():
    rng, model = np.random.default_rng(3), tiny_model()
    lengths = (70, 5, 33, 0, 32)
    rows = [teacher_row(i, [3, 4], rng.integers(3, VOCAB, n), rng) for i, n in enumerate(lengths)]
    settings = dict(tokens_budget=80, student_vocab=VOCAB, device=CPU)
    kept = TokenKl(frozenset({1}))
    got = measure_own_contexts(StudentModule(model), rows, ranks=Ranks(), tokens=kept, **settings)
    values = [by_hand(model, row) for row in rows if len(row.response_ids)]
    assert [(part["from"], part["to"]) for part in got["student_answers_by_position"]] == [
        (0, 32),
        (32, 64),
        (64, 128),
    ]
    for part in got["student_answers_by_position"]:
        for name, which in (("kl", 0), ("reverse_kl", 1)):
            tokens = torch.cat([value[which][part["from"] : part["to"]] for value in values])
            assert part["tokens"] == len(tokens)
            assert part[name] == pytest.approx(tokens.mean().item(), rel=1e-5)
    everything = torch.cat([value[1] for value in values])
    assert got["reverse_kl_on_student_answers"] == pytest.approx(everything.mean().item(), rel=1e-5)
    assert got["student_answer_tokens"] == sum(lengths)
    assert kept.nats[1] == pytest.approx(values[1][0].tolist(), rel=1e-5)
    halves = [HalfOf(rank) for rank in range(2)]
    for half in halves:
        measure_own_contexts(StudentModule(model), rows, ranks=half, tokens=TokenKl(), **settings)
    both = {name: halves[0].kept[name] + halves[1].kept[name] for name in halves[0].kept}
    assert halves[0].kept.keys() == halves[1].kept.keys()
    assert both["kl 64"] == pytest.approx(
        got["student_answers_by_position"][1]["kl"] * both["tokens 64"], rel=1e-9
    )


def test_without_an_answer_there_is_no_figure_on_own_contexts():
    settings = dict(tokens_budget=80, student_vocab=VOCAB, device=CPU, ranks=Ranks())
    got = measure_own_contexts(StudentModule(tiny_model()), [], tokens=TokenKl(), **settings)
    assert got["kl_on_student_answers"] is None
    assert got["student_answers_by_position"] == []


@pytest.fixture
def measured_run(tmp_path):
    """A run folder with held-out rows, and a measurer of a tiny student."""
    folder = RunFolder(str(tmp_path / "run")).ensure()
    columns = {name: [] for name in row_schema(Signal("topk", K)).names}
    for row in some_rows():
        for name in columns:
            value = {"epoch": -1, "source": "s"}.get(name, getattr(row, name, None))
            columns[name].append(value.tolist() if isinstance(value, np.ndarray) else value)
    folder.write_table("held_out.parquet", pa.table(columns, schema=row_schema(Signal("topk", K))))
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = RunConfig.model_validate(
        {
            "teacher": {"model": "unused", "sampling": {"max_tokens": 5}},
            "student": {"init": "model", "model": "unused"},
            "prompts": {"path": "unused"},
            "evaluation": {"held_out_rows": 5, "free_running": {"rows": 2}},
        }
    )
    module = StudentModule(tiny_model())
    student = LocalStudent(module, VOCAB, CPU, Ranks(), str(tmp_path), FakeSampling())
    return folder, Measurer(run_of(config, folder), student)


def test_an_evaluation_writes_its_figures_and_the_students_answers(measured_run):
    folder, measurer = measured_run
    assert not measurer.is_measured(0)
    counts = PairCounts(VOCAB)
    counts.add((row.prompt_ids, row.response_ids) for row in some_rows())
    record = measurer.measure(0, "before", "in training precision", counts)
    assert measurer.is_measured(0)
    assert read_lines(folder, "evaluation.jsonl") == [json.loads(json.dumps(record))]
    assert record["step"] == 0
    assert record["num_tokens"] == 14
    assert set(record["baselines"]) == {"uniform", "unigram", "bigram"}
    answers = read_lines(folder, "answers.jsonl")
    assert len(answers) == 2
    texts = {"step", "row", "prompt", "teacher", "student"}
    assert set(answers[0]) == {*texts, "teacher_tokens", "teacher_kl"}
    for answer in answers:
        assert "".join(answer["teacher_tokens"]) == answer["teacher"]
    expected, _ = slow_reference(tiny_model(), some_rows())
    assert record["kl_nats_per_token"] == pytest.approx(expected["kl"], rel=1e-5)


def test_the_student_may_answer_before_the_teacher_has(measured_run, monkeypatch):
    folder, measurer = measured_run
    expected = measurer.measure(0, "before", "in training precision")
    answers = read_lines(folder, "answers.jsonl")
    rows = some_rows()
    prompts = {
        "row": [row.row for row in rows],
        "key": [bytes(16)] * len(rows),
        "prompt_ids": [row.prompt_ids.tolist() for row in rows],
        "source": ["s"] * len(rows),
        "response_ids": [None] * len(rows),
    }
    folder.write_table(HELD_OUT_PROMPTS, pa.table(prompts, schema=PROMPT_SCHEMA))
    measurer.write_ahead()
    generated = free_running.generate
    monkeypatch.setattr(free_running, "generate", None)  # Nothing is written a second time.
    assert measurer.measure(0, "before", "in training precision") == expected
    assert read_lines(folder, "answers.jsonl") == answers
    monkeypatch.setattr(free_running, "generate", generated)
    measurer.measure(4, "after", "in training precision")  # Other weights: what is written anew.


def test_measuring_a_step_again_replaces_its_answers_and_a_resumption_discards_later_ones(
    measured_run,
):
    folder, measurer = measured_run
    for step in (0, 4, 4):
        measurer.measure(step, "after", "in training precision")
    assert [line["step"] for line in read_lines(folder, "answers.jsonl")] == [0, 0, 4, 4]
    measurer.measure(8, "during", "in training precision")  # Its own answers are not due then.
    assert read_lines(folder, "answers.jsonl")[-1]["step"] == 4
    assert "stop_rate" not in read_lines(folder, "evaluation.jsonl")[-1]
    measurer.discard_beyond(2)
    assert [line["step"] for line in read_lines(folder, "answers.jsonl")] == [0, 0]
    assert [line["step"] for line in read_lines(folder, "evaluation.jsonl")] == [0]


def test_an_evaluation_records_what_checks_say_of_the_answers(measured_run):
    folder, measurer = measured_run
    rows = range(len(some_rows()))
    asked = {"row": rows, "prompt": [f"p{n}" for n in rows], "fields": ["{}" for _ in rows]}
    folder.write_table("prompts/held_out_fields.parquet", pa.table(asked))
    folder.write_text("checks/words.py", "def words(p, a, r): return len(a.split())")
    check = CheckConfig(function="anything.py:words")
    evaluation = measurer._config.evaluation.model_copy(update={"checks": (check,)})
    measurer._config = measurer._config.model_copy(update={"evaluation": evaluation})
    record = measurer.measure(0, "before", "in training precision")
    (line,) = read_lines(folder, "evaluation.jsonl")
    assert line["checks"] == json.loads(json.dumps(record["checks"]))
    answers = list(read_lines(folder, "answers.jsonl"))
    for who in ("student", "teacher"):
        counted = [len(one[who].split()) for one in answers]
        assert [one["checks"]["words"][who] for one in answers] == counted
        assert record["checks"]["words"][who]["mean"] == pytest.approx(np.mean(counted))
        assert record["checks"]["words"][who]["answers"] == 2
