"""What an engine captured of its rows reaches the replica, whole, in memory that has a bound."""

import asyncio
import random
import threading

import numpy as np
import pytest
import torch

from raystill.datasets.rows.signal import Signal
from raystill.placement.memory import captured_bytes
from raystill.serve.engine import blocks as blocks_module
from raystill.serve.engine.blocks import BLOCK_BYTES, BlockReader, BlocksHandle, BlockWriter
from raystill.serve.engine.capture import CaptureRequest
from raystill.serve.engine.outputs import scored_answer
from raystill.serve.engine.takes import Takes
from tests.support.capturing_worker import (
    VOCAB,
    CapturingWorker,
    Row,
    captures_alone,
    states_of,
)

SIZE = 96  # D


def never_dead() -> None:
    """The engine lives."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    captures_alone(monkeypatch)


def expected(row: Row, length: int, size: int = SIZE) -> np.ndarray:
    """uint8 [T, 2 D]: the states that predict a row's response tokens."""
    places = np.arange(row.prompt - 1, row.prompt - 1 + length)
    return states_of(row.number, places, size).view(torch.uint8).numpy()


def hidden_row(number: int, prompt: int, response: int, most: int = 4096) -> Row:
    wanted = CaptureRequest(f"capture-{number}", prompt - 1, most, "hidden")
    return Row(number, prompt, response, wanted)


@pytest.mark.parametrize("as_bytes", [False, True], ids=["shared memory", "calls"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "copied late"])
def test_rows_that_come_go_are_preempted_and_dropped_get_their_own_states(
    monkeypatch: pytest.MonkeyPatch, as_bytes: bool, late: bool
) -> None:
    dice = random.Random(7)
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 4 * 2 * SIZE + 10)  # 4 rows, and a rest.
    if as_bytes:
        monkeypatch.setattr(blocks_module.os, "open", refuse)
    if late:
        monkeypatch.setattr(blocks_module, "_to_host", slow_copy)
    worker = CapturingWorker(SIZE)

    async def run() -> None:
        takes, numbers, got = Takes(worker.call, never_dead), iter(range(10_000)), 0
        await takes.start()
        while got < 60:
            if len(worker.rows) < 9:
                chosen = hidden_row(next(numbers), dice.randint(1, 20), dice.randint(1, 30), 31)
                if dice.random() < 0.2:
                    chosen.wanted = None
                worker.add(chosen)
            if worker.rows and dice.random() < 0.1:  # Preempted: it starts again.
                dice.choice(worker.rows).computed = 0
            if worker.rows and dice.random() < 0.05:
                row = dice.choice(worker.rows)
                if row.wanted:
                    takes.drop(row.wanted.tag)
                    await asyncio.sleep(0)  # Dropped while it is in the engine, for a step more.
                    worker.step(4)
                worker.leave(row)
            dice.shuffle(worker.rows)
            ended = worker.step(dice.choice([4, 100])) if worker.rows else []
            for row in ended:
                if row.wanted:
                    length = dice.randint(1, row.response)
                    array = await takes.take(row.wanted.tag, length)
                    assert array.tobytes() == expected(row, length).tobytes()
                    got += 1
                worker.leave(row)
        for row in list(worker.rows):
            if row.wanted:
                takes.drop(row.wanted.tag)
        await asyncio.sleep(0.05)
        assert worker.worker._raystill.blocks.used_blocks == 0, "every block was given back"
        takes.close()

    asyncio.run(run())


def refuse(*arguments: object) -> int:
    """The worker is on another machine."""
    raise FileNotFoundError("no such process")


def slow_copy(values: torch.Tensor) -> tuple[torch.Tensor, object]:
    """As from a GPU: the values are there only when the copy has been waited for."""
    host = torch.full_like(values, 255)

    def wait() -> None:
        threading.Event().wait(0.0005)
        host.copy_(values)

    return host, wait


def test_a_short_rows_step_is_not_held_by_a_long_row() -> None:
    """Of 63 rows that end early beside a long one, nothing but their blocks stays; once."""
    size, slots, long = 512, 16, 1600
    worker = CapturingWorker(size)
    row_bytes = 2 * size

    async def run() -> int:
        takes = Takes(worker.call, never_dead)
        await takes.start()
        worker.add(hidden_row(0, 4, long))
        numbers = iter(range(1, 100_000))
        while worker.rows:
            while len(worker.rows) < slots and worker.rows[0].computed < long:
                worker.add(hidden_row(next(numbers), 4, 100))
            for row in worker.step():
                assert row.wanted is not None
                array = await takes.take(row.wanted.tag, row.response)
                assert array.tobytes() == expected(row, row.response, size).tobytes()
                worker.leave(row)
        takes.close()
        return worker.worker._raystill.blocks.held_bytes

    held = asyncio.run(run())
    blocks_of_long = -(-long * row_bytes // BLOCK_BYTES)
    # Another block for each place; the flags; and a place's next row before its block is back.
    assert held <= (blocks_of_long + 2 * slots) * BLOCK_BYTES + (1 << 20), f"{held >> 20} MiB"
    assert held < long * slots * row_bytes / 2, "as much as all steps"


@pytest.mark.parametrize(("size", "tokens"), [(512, 700), (4096, 100), (1000, 300)])
def test_what_a_full_engine_holds_is_within_what_check_tells(size: int, tokens: int) -> None:
    """All slots have rows of the most tokens, and nobody reads before all have ended."""
    slots = 16
    worker = CapturingWorker(size)

    async def run() -> int:
        takes = Takes(worker.call, never_dead)
        await takes.start()
        for number in range(slots):
            worker.add(hidden_row(number, 4, tokens))
        while worker.rows[0].computed < 4 + tokens - 1:
            worker.step()
        takes.close()
        return worker.worker._raystill.blocks.held_bytes

    held, told = asyncio.run(run()), captured_bytes(slots, tokens, size, on_gpu=False)
    assert told / 2 < held <= told + (1 << 20), f"{held >> 10} KiB, told {told >> 10}"


def test_a_batch_of_prompts_leaves_what_is_asked_for() -> None:
    """One row of 64 of each prompt in a batch."""
    worker = CapturingWorker(512)

    async def run() -> int:
        takes = Takes(worker.call, never_dead)
        await takes.start()
        for number in range(32):
            worker.add(hidden_row(number, 64, 1))
        worker.step()
        held = worker.worker._raystill.blocks.held_bytes
        takes.close()
        return held

    # Of each block the pages that were written: one of 4 KiB.
    assert asyncio.run(run()) <= 32 * 2 * 4096 + (1 << 20)


def test_what_a_cancelled_caller_asked_for_is_given_back() -> None:
    worker = CapturingWorker(SIZE)

    async def run() -> None:
        takes = Takes(worker.call, never_dead)
        await takes.start()
        row = hidden_row(1, 3, 2)
        worker.add(row)
        worker.step(), worker.step()
        asked = asyncio.create_task(takes.take("capture-1", 2))
        await asyncio.sleep(0)  # It waits for the answer of the call.
        asked.cancel()
        await asyncio.sleep(0.05)
        assert worker.worker._raystill.blocks.used_blocks == 0
        takes.close()

    asyncio.run(run())


def test_a_row_of_which_positions_are_missing_fails_alone() -> None:
    worker = CapturingWorker(SIZE)

    async def run() -> list[object]:
        takes = Takes(worker.call, never_dead)
        await takes.start()
        for number in (1, 2):
            worker.add(hidden_row(number, 3, 2))
        worker.rows[0].computed = 3  # The prompt came from the prefix cache.
        worker.step(), worker.step()
        asked = [takes.take("capture-1", 2), takes.take("capture-2", 2)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert worker.worker._raystill.blocks.used_blocks == 0
        takes.close()
        return results

    missing, whole = asyncio.run(run())
    assert isinstance(missing, RuntimeError) and "skip_reading_prefix_cache" in str(missing)
    assert isinstance(whole, np.ndarray)


def test_a_copy_that_fails_is_told_to_who_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(values: torch.Tensor) -> tuple[torch.Tensor, object]:
        def wait() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return values, wait

    monkeypatch.setattr(blocks_module, "_to_host", broken)
    worker = CapturingWorker(SIZE)

    async def run() -> None:
        takes = Takes(worker.call, never_dead)
        await takes.start()
        worker.add(hidden_row(1, 3, 1))
        worker.step()
        await asyncio.wait_for(takes.take("capture-1", 1), 10)

    # The engine itself ends by it where it sees it first.
    with pytest.raises(RuntimeError, match=r"could not be copied from the GPU|CUDA error"):
        asyncio.run(run())


def test_another_files_memory_is_not_taken_for_the_workers() -> None:
    first, second = BlockWriter(), BlockWriter()
    with pytest.raises(OSError, match="another process's file"):
        BlockReader(BlocksHandle(first.handle.path, second.handle.name))
    first.close(), second.close()


@pytest.mark.parametrize("kind", ["sampled", "topk", "at"])
def test_scores_of_given_tokens_come_in_the_columns_they_are_read_from(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from raystill.serve.engine import capture

    monkeypatch.setattr(capture, "CPU_LOGIT_BYTES", 4 * VOCAB * 3)  # Three tokens at a time.
    dice, worker, width = np.random.default_rng(3), CapturingWorker(SIZE), 4
    responses = {n: dice.integers(0, VOCAB, n + 2).astype(np.int32) for n in range(5)}
    named = {
        n: np.argsort(dice.random((len(r), VOCAB)), axis=1)[:, :width].astype(np.int32)
        for n, r in responses.items()
    }

    async def run() -> dict[int, np.ndarray]:
        takes = Takes(worker.call, never_dead)
        await takes.start()
        for n, response in responses.items():
            at = named[n].tobytes() if kind == "at" else b""
            size = 0 if kind == "sampled" else width
            tag = f"capture-{n}"
            wanted = CaptureRequest(tag, 2, len(response), kind, size, response.tobytes(), at)
            # The given response but its last token is put in with the prompt.
            worker.add(Row(n, 3 + len(response) - 1, 1, wanted))
        while not all(row.computed >= row.end for row in worker.rows):
            worker.step(4)
        worker.step()  # One step too many, as vLLM may run.
        asked = [takes.take(f"capture-{n}", len(r)) for n, r in responses.items()]
        results = dict(zip(responses, await asyncio.gather(*asked), strict=True))
        takes.close()
        return results

    results = asyncio.run(run())
    signal = Signal("sampled" if kind == "sampled" else "topk", width)
    for n, response in responses.items():
        at = named[n] if kind == "at" else None
        answer = scored_answer(response, results[n], signal, at, vocab_size=VOCAB, hidden_size=SIZE)
        states = states_of(n, np.arange(2, 2 + len(response)), SIZE)
        logprobs = (states.float() @ worker.head).log_softmax(-1).numpy()
        tokens = np.arange(len(response))
        np.testing.assert_allclose(answer.sampled_logprobs, logprobs[tokens, response], atol=1e-5)
        if kind == "sampled":
            continue
        ids = answer.topk_ids
        assert ids is not None and answer.topk_logprobs is not None
        best = -np.sort(-logprobs, axis=1)[:, :width]
        listed = np.take_along_axis(logprobs, ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(answer.topk_logprobs, listed, atol=1e-5)
        if kind == "topk":
            np.testing.assert_allclose(answer.topk_logprobs, best, atol=1e-5)
        tail = np.log1p(-np.exp(listed).sum(axis=1))
        np.testing.assert_allclose(answer.tail_logprob, tail, atol=1e-3)
