"""What `VllmEngine` does around vLLM: its event loop, and its health probe. No vLLM."""

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from raystill.datasets.rows.signal import Signal
from raystill.serve.engine import vllm as module
from raystill.serve.engine.outputs import sampled_answer
from raystill.serve.engine.speculative import SpeculativeEngine
from raystill.serve.engine.vllm import VllmEngine

VOCAB, WIDTH = 50, 4


class State:
    """vLLM's state of one request."""

    def __init__(self, tokens=0):
        self.tokens = tokens
        self.detokenizer = SimpleNamespace(num_output_tokens=lambda: self.tokens)


class Engine(VllmEngine):
    """The engine in front of a vLLM that answers with made-up tokens, or hangs."""

    vocab_size, max_model_len = VOCAB, 64

    def __init__(self, states=None, meanwhile=lambda: None):
        teacher = SimpleNamespace(request_timeout_s=None, max_num_seqs=4)
        super().__init__(SimpleNamespace(teacher=teacher))
        self.states, self.meanwhile = states, meanwhile
        processor = SimpleNamespace(request_states=states)
        self._engine = SimpleNamespace(output_processor=processor, check_health=self._alive)

    async def _alive(self):
        pass

    def _raise_if_dead(self):
        pass

    def _parameters(self, *_, **__):
        return None

    async def _generate(self, token_ids, parameters):
        if self.states is not None:  # The probe, which waits for cache blocks.
            self.states["probe"] = State()
            try:
                await asyncio.sleep(0.02)
                self.meanwhile()
                await asyncio.sleep(9)
            finally:
                del self.states["probe"]
        return output_of(np.random.default_rng(token_ids[0]), 6, WIDTH)


def output_of(generator, tokens, *widths):
    """vLLM's finished output, its arrays as wide as the batches of its steps were."""
    sent = [1 + widths[t % len(widths)] for t in range(tokens)]
    ids = [generator.integers(0, VOCAB, (1, n)) for n in sent]
    values = [np.sort(-generator.random((1, n)).astype(np.float32))[:, ::-1] for n in sent]
    arrays = SimpleNamespace(arrays=list(zip(ids, values, strict=True)))
    drawn = [int(i[0, 0]) for i in ids]
    return SimpleNamespace(token_ids=drawn, finish_reason="stop", logprobs=arrays)


def test_logprobs_are_packed_off_the_event_loop(monkeypatch):
    threads = set()

    def noted(*args):
        threads.add(threading.get_ident())
        return sampled_answer(*args)

    monkeypatch.setattr(module, "sampled_answer", noted)
    prompts = [np.array([n], np.int32) for n in range(3)]
    answers = asyncio.run(Engine().sample(prompts, Signal("topk", WIDTH)))
    assert [len(answer.response_ids) for answer in answers] == [6, 6, 6]
    assert threads and threading.get_ident() not in threads


class Drafting(Engine, SpeculativeEngine):
    """The same with a draft model, two of whose tokens were accepted, and then none."""

    async def _generate(self, token_ids, parameters):
        output = await super()._generate(token_ids, parameters)
        output.spec_decode_metrics = SimpleNamespace(per_step_accepted=[2, 0])
        return output


def test_an_engine_with_a_draft_tells_what_was_accepted_of_each_row():
    prompts = [np.array([n], np.int32) for n in (1, 2)]
    drafted = asyncio.run(Drafting().sample_drafted(prompts))
    assert [one.accepted for one in drafted] == [(2, 0)] * 2
    assert [len(one.response_ids) for one in drafted] == [6, 6]
    assert [one.error for one in drafted] == [None, None]


@pytest.mark.parametrize("widths", [(4,), (7,), (7, 4), (4, 9, 7)])
def test_batches_of_any_width_give_the_ids_that_were_asked_for(widths):
    output = output_of(np.random.default_rng(1), 8, *widths)
    answer = sampled_answer(output, Signal("topk", WIDTH), VOCAB)
    assert answer.topk_ids.shape == answer.topk_logprobs.shape == (8, WIDTH)
    for t, (ids, values) in enumerate(output.logprobs.arrays):
        assert answer.topk_ids[t].tolist() == ids[0, 1 : 1 + WIDTH].tolist()
        assert answer.topk_logprobs[t].tolist() == values[0, 1 : 1 + WIDTH].tolist()
        assert answer.sampled_logprobs[t] == values[0, 0]


def probe(states, meanwhile, monkeypatch):
    monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 0.1)
    asyncio.run(Engine(states, meanwhile).probe())


def test_a_full_engine_whose_rows_grow_is_alive_though_none_has_finished(monkeypatch):
    rows = {f"row-{n}": State(100 * n) for n in range(4)}
    probe(rows, lambda: setattr(rows["row-2"], "tokens", 201), monkeypatch)


def test_also_where_only_a_row_that_came_meanwhile_has_tokens(monkeypatch):
    rows = {"row-1": State(70)}

    def another():
        rows["row-2"] = State(1)

    probe(rows, another, monkeypatch)


@pytest.mark.parametrize("leaves", [None, "row-2"])
def test_an_engine_that_hangs_is_dead_whoever_gives_up_waiting(monkeypatch, leaves):
    rows = {f"row-{n}": State(100 * n) for n in range(4)}
    with pytest.raises(RuntimeError, match="gave no token"):
        probe(rows, lambda: rows.pop(leaves, None), monkeypatch)
