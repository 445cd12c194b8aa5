"""vLLM's logprobs kept as arrays: the same numbers as its own flat lists."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raystill.datasets.rows.signal import Signal
from raystill.serve.engine.outputs import gather_logprobs, keep_arrays, sampled_answer

pytestmark = pytest.mark.vllm

VOCAB = 50


@pytest.mark.parametrize(
    ("kind", "asked", "sent"), [("topk", 4, 4), ("topk", 4, 7), ("sampled", 0, 7)]
)
def test_arrays_hold_what_the_flat_lists_would(kind: str, asked: int, sent: int) -> None:
    """``sent`` > ``asked``: rows of a batch are as wide as the one that asks for most."""
    from vllm.logprobs import FlatLogprobs
    from vllm.v1.engine import logprobs as module
    from vllm.v1.outputs import LogprobsLists

    keep_arrays()
    keep_arrays()  # Twice is the same as once.
    made, flat = module.create_sample_logprobs(True), FlatLogprobs()
    generator = np.random.default_rng(5)
    drawn = []
    for _ in range(6):
        ids = generator.integers(0, VOCAB, (1, 1 + sent))
        values = np.sort(-generator.random((1, 1 + sent)).astype(np.float32))[:, ::-1]
        drawn.append(int(ids[0, 0]))
        for kept in (made, flat):
            processor = module.LogprobsProcessor(None, kept, None, 0.0, asked, None)
            processor._update_sample_logprobs(LogprobsLists(ids, values, np.zeros(1, np.int64)))
    output = SimpleNamespace(token_ids=drawn, finish_reason="stop", logprobs=made)
    answer = sampled_answer(output, Signal(kind, asked), VOCAB)
    expected = np.array(flat.logprobs, np.float32).reshape(6, 1 + asked)
    np.testing.assert_array_equal(answer.response_ids, drawn)
    np.testing.assert_array_equal(answer.sampled_logprobs, expected[:, 0])
    if kind == "topk":
        ids = np.array(flat.token_ids).reshape(6, 1 + asked)
        np.testing.assert_array_equal(answer.topk_ids, ids[:, 1:])
        np.testing.assert_array_equal(answer.topk_logprobs, expected[:, 1:])


@pytest.mark.parametrize("top_k", [0, 5])
def test_logprobs_are_gathered_as_vllm_gathers_them_but_for_the_ranks(top_k: int) -> None:
    from vllm.v1.sample.sampler import Sampler

    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    drawn, logprobs = torch.tensor([3, 0, 49, 7]), logits.log_softmax(dim=-1)
    theirs = Sampler.gather_logprobs(logprobs, top_k, drawn)
    ours = gather_logprobs(logprobs, top_k, drawn)
    assert torch.equal(ours.logprob_token_ids, theirs.logprob_token_ids)
    assert torch.equal(ours.logprobs, theirs.logprobs)
    assert ours.logprob_token_ids.dtype == theirs.logprob_token_ids.dtype == torch.int32
