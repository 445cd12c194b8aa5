"""Acceptance counted along an answer, the engine's own steps, and the speed that follows."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from raystill.serve.bench.acceptance import (
    MOST_DRAFTED,
    Acceptance,
    best_k,
    count,
    first_difference,
    speed_up,
    steps_of,
    walk,
)


def geometric_length(rate: float, k: int) -> float:
    """The mean acceptance length if every drafted token is accepted at ``rate``, independently."""
    return float(k + 1) if rate == 1 else (1 - rate ** (k + 1)) / (1 - rate)


def test_a_walk_worked_by_hand():
    # T = 9. The first token is read off the prompt. k = 2 from position 1: tokens 1, 2 are the
    # student's, so both are accepted and 3 is the teacher's own. From 4: accepted, then 5 is not,
    # and the teacher's own is 5. From 6: not. From 7: accepted, and 8 too, which is the last.
    matches = [False, True, True, False, True, False, False, True, True]
    found = walk(matches, 2)
    assert found == [(1, 2), (4, 1), (6, 0), (7, 2)]
    # The last one has its two drafts within the answer, but not the teacher's own token (T = 9).
    acceptance = count([(9, found)], 2)
    assert acceptance == Acceptance(k=2, verifications=4, windows=3, accepted=(2, 1))
    assert acceptance.rates == [2 / 3, 1 / 3]
    assert acceptance.mean_length == pytest.approx(2.0)


def speculative_decoding(teacher, student, prompt, k, length):
    """Greedy speculative decoding as the algorithm is defined: draft k, read, accept, add one."""
    answer, accepted = [teacher(prompt)], []
    while len(answer) < length:
        draft = []
        for _ in range(k):
            draft.append(student(prompt + answer + draft))
        number = 0
        while number < k and draft[number] == teacher(prompt + answer + draft[:number]):
            number += 1
        answer += [*draft[:number], teacher(prompt + answer + draft[:number])]
        accepted.append(number)
    return answer[:length], accepted


@pytest.mark.parametrize("k", range(1, MOST_DRAFTED + 1))
def test_the_walk_is_what_speculative_decoding_does(k):
    generator = random.Random(k)
    teacher_says: dict[tuple[int, ...], int] = {}
    student_says: dict[tuple[int, ...], int] = {}

    def teacher(context):
        return teacher_says.setdefault(tuple(context[-4:]), generator.randrange(50))

    def student(context):
        agrees = generator.random() < 0.7
        own = teacher(context) if agrees else generator.randrange(50)
        return student_says.setdefault(tuple(context[-4:]), own)

    for length in (1, 2, k + 1, k + 2, 60):
        prompt = [generator.randrange(50) for _ in range(5)]
        answer, accepted = speculative_decoding(teacher, student, prompt, k, length)
        alone = []
        while len(alone) < length:
            alone.append(teacher(prompt + alone))
        assert answer == alone, "speculative decoding changes no answer"
        matches = [student(prompt + alone[:t]) == alone[t] for t in range(length)]
        walked, of_engine = walk(matches, k), steps_of(accepted, length)
        assert of_engine is not None
        assert [v.start for v in walked] == [v.start for v in of_engine]
        assert count([(length, walked)], k) == count([(length, of_engine)], k)


@pytest.mark.parametrize(
    ("accepted", "num_tokens", "adds_up"),
    [
        ((), 1, True),  # One token, read off the prompt.
        ((), 2, False),  # The second token has no verification.
        ((0,), 2, True),
        ((3,), 2, True),  # Beyond the end: the engine reads on before it sees the stop token.
        ((0, 0), 2, False),  # One too many.
        ((1, 0), 4, True),
        ((1,), 4, False),
    ],
)
def test_engine_steps_that_do_not_add_up_are_not_counted(accepted, num_tokens, adds_up):
    assert (steps_of(accepted, num_tokens) is not None) is adds_up


def test_only_whole_windows_give_rates():
    # A student that always agrees. Answers too short for k + 1 tokens after the first say nothing.
    everything = count([(5, walk([True] * 5, 8))], 8)
    assert (everything.windows, everything.mean_length) == (0, None)
    assert everything.rates == [None] * 8
    long = count([(100, walk([True] * 100, 8))], 8)
    assert long.mean_length == 9 and long.rates == [1.0] * 8
    # Counting the cut verification at the end too would make it less than 9.
    assert long.verifications == long.windows == 11
    assert count([(98, walk([True] * 98, 8))], 8).mean_length == 9


def test_no_answers_and_empty_answers_are_nothing():
    assert walk([], 3) == walk([True], 3) == []
    assert count([], 3) == Acceptance(3, 0, 0, (0, 0, 0))


def test_independent_acceptance_gives_the_length_of_the_paper():
    generator, rate = random.Random(1), 0.6
    matches = [generator.random() < rate for _ in range(200_000)]
    for k in (1, 3, 8):
        measured = count([(len(matches), walk(matches, k))], k)
        assert measured.mean_length == pytest.approx(geometric_length(rate, k), rel=0.01)
        for position, share in enumerate(measured.rates, start=1):
            assert share == pytest.approx(rate**position, abs=0.01)
    assert geometric_length(1.0, 4) == 5 and geometric_length(0.0, 4) == 1


def test_speed_worked_by_hand():
    # a = 0.8, k = 4: (1 - 0.8^5) / 0.2 = 3.3616 tokens; c = 0.02: 3.3616 / 1.08 = 3.1126.
    length = geometric_length(0.8, 4)
    assert length == pytest.approx(3.3616)
    assert speed_up(length, 4, 0.02) == pytest.approx(3.11259, abs=1e-5)
    # A draft that costs 0.7 of its teacher slows it: k = 1, a = 0.4: 1.4 / 1.7.
    lengths = {k: geometric_length(0.4, k) for k in range(1, 9)}
    assert speed_up(lengths[1], 1, 0.7) == pytest.approx(0.823529, abs=1e-6)
    assert best_k(lengths, 0.7) == (0, 1.0)
    k, speed = best_k(lengths, 0.02)
    assert speed == max(speed_up(length, n, 0.02) for n, length in lengths.items()) > 1.5
    assert speed == speed_up(lengths[k], k, 0.02)
    assert best_k({}, 0.02) == (0, 1.0)


@pytest.mark.parametrize(
    ("one", "other", "position"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([], [], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [1, 2], 2),
        ([], [4], 0),
    ],
)
def test_the_first_difference_of_two_answers(one, other, position):
    assert first_difference(one, other) == first_difference(other, one) == position


def test_the_engine_drafts_with_the_teachers_ranks_and_leaves_the_settings_alone():
    from raystill.config.teacher import TeacherConfig
    from raystill.model.sampling import ResolvedSampling
    from raystill.serve.bench.engine import greedy
    from raystill.serve.engine.arguments import EngineSettings, engine_arguments
    from raystill.serve.engine.speculative import with_draft

    sampling = greedy(ResolvedSampling(0.7, 0.9, 40, 0.05, 64, (2,)))
    assert sampling == ResolvedSampling(0.0, 1.0, 0, 0.0, 64, (2,))
    teacher = TeacherConfig(model="m", tensor_parallel_size=4, engine_args={"block_size": 32})
    plain = EngineSettings(teacher, "m", sampling, seed=1, max_top_k=2)
    arguments = engine_arguments(with_draft(plain, "/student", 3))
    assert arguments["speculative_config"] == {
        "method": "draft_model",
        "model": "/student",
        "num_speculative_tokens": 3,
        "draft_tensor_parallel_size": 4,
    }
    assert arguments["block_size"] == 32
    assert "speculative_config" not in engine_arguments(plain)


def bench(outputs, k=2, at_once=2, times=lambda _, wanted: [float(i) for i in range(wanted)]):
    """A bench whose engine answers with ``outputs``; its tokens come at ``times``."""
    from raystill.serve.bench.draft import DraftBench

    async def given(*_):
        return outputs

    async def token_times(prompt, wanted):
        return times(prompt, wanted)

    made = DraftBench.__new__(DraftBench)
    made._k = k
    made._engine = SimpleNamespace(sample=given, sample_drafted=given, token_times=token_times)
    teacher = SimpleNamespace(max_num_seqs=at_once)
    made._settings = SimpleNamespace(config=SimpleNamespace(teacher=teacher))
    return made


def drafted(ids, accepted, error=None):
    from raystill.serve.engine.speculative import Drafted

    return Drafted(np.array(ids, np.int32), accepted, error)


def test_answers_are_compared_token_by_token_and_a_near_tie_is_named():
    import asyncio

    from raystill.serve.bench.draft import TeacherAnswers

    ids = [np.array([5, 6, 7, 8], np.int32), None, np.array([5, 6, 7, 8], np.int32)]
    margins = [np.full(4, 3.0, np.float32), None, np.array([2, 1e-6, 2, 2], np.float32)]
    outputs = [drafted([5, 6, 7, 8], (2,)), drafted([5, 9, 7], (0,))]
    prompts = [np.array([1], np.int32)] * 3
    found = asyncio.run(bench(outputs).drafted(prompts, TeacherAnswers(ids, margins)))
    assert (found["tokens"], found["identical_answers"], found["k"]) == (7, 1, 2)
    (difference,) = found["differences"]
    assert (difference["row"], difference["position"]) == (2, 1)
    assert difference["margin_nats"] == pytest.approx(1e-6)
    assert found["answers_not_counted"] == 1, "(0,) does not add up to three tokens"
    assert found["verifications"] == 1


def test_prompts_without_an_answer_are_left_out_and_counted():
    import asyncio

    from raystill.base.errors import RunError
    from raystill.datasets.rows.answers import Answer

    prompts = [np.array([], np.int32), np.array([1], np.int32)]
    answers = [Answer(error="empty"), Answer(np.array([5, 6], np.int32), "length")]
    found = asyncio.run(bench(answers).alone(prompts))
    assert (found["tokens"], found["dropped"], found["token_s"]) == (2, 1, 1.0)
    with pytest.raises(RunError, match="none of 1 prompts was answered: empty"):
        asyncio.run(bench(answers[:1]).alone(prompts[:1]))


def test_a_failed_answer_ends_the_measurement():
    import asyncio

    from raystill.base.errors import RunError
    from raystill.serve.bench.draft import TeacherAnswers

    answers = TeacherAnswers([np.array([5], np.int32)], [np.ones(1, np.float32)])
    engine = bench([drafted([], (), error="engine_died")])
    with pytest.raises(RunError, match="1 answers failed with the draft: engine_died"):
        asyncio.run(engine.drafted([np.array([1], np.int32)], answers))


def answers_of(lengths):
    from raystill.datasets.rows.answers import Answer

    return [Answer(np.zeros(length, np.int32), "stop") for length in lengths]


@pytest.mark.parametrize(("lengths", "reading"), [([60, 60, 60], 3.0), ([20, 512, 1], 0.0)])
def test_the_time_of_a_token_knows_neither_lengths_nor_the_reading_of_prompts(lengths, reading):
    """Tokens come every 10 ms, whatever a model writes by itself and however long it reads."""
    import asyncio

    def times(_, wanted):
        return [reading + 0.01 * i for i in range(wanted)]

    prompts = [np.array([i], np.int32) for i in range(3)]
    found = asyncio.run(bench(answers_of(lengths), times=times).alone(prompts))
    assert found["token_s"] == pytest.approx(0.01)


def test_the_time_of_a_token_is_measured_with_as_many_answers_at_once_as_are_served():
    """An answer of one token tells no time."""
    import asyncio

    events = []

    async def token_times(prompt, wanted):
        number = int(prompt[0])
        events.append(f"asked {number}")
        await asyncio.sleep(0)
        events.append(f"done {number}")
        return [1.0] if number == 1 else [0.5 * i for i in range(wanted)]

    made = bench(answers_of([4] * 3), at_once=2)
    made._engine.token_times = token_times
    prompts = [np.array([i], np.int32) for i in range(3)]
    assert asyncio.run(made.alone(prompts))["token_s"] == 0.5
    once = ["asked 0", "asked 1", "done 0", "done 1", "asked 2", "done 2"]
    assert events == once * 6, "two batches, until there are twelve"


def test_tokens_that_come_while_other_prompts_are_read_have_no_part_in_the_time():
    """The first answer's second token waits for a prompt; from then on each takes 10 ms."""
    from raystill.serve.bench.draft import paces

    waits = [0.0, 0.3, 0.31, 0.32]
    assert paces([waits, [0.3, 0.31, 0.32, 0.33]]) == pytest.approx([0.01, 0.01])
    assert paces([[0.0, 0.1], [0.3, 0.32]]) == pytest.approx([0.02]), "the first had ended"
    assert paces([[1.0]]) == []


def test_prompts_without_room_for_two_tokens_end_the_measurement():
    import asyncio

    from raystill.base.errors import RunError

    made = bench(answers_of([1]), times=lambda *_: [1.0])
    with pytest.raises(RunError, match=r"raise teacher\.max_model_len"):
        asyncio.run(made.alone([np.array([1], np.int32)]))
