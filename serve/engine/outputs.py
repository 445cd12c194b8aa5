"""From vLLM's outputs to ``Answer``: logprobs as arrays, hidden states and scores from bytes.

vLLM's front end turns every logprob into a Python number, K + 1 a token. `keep_arrays` changes that
for requests that need no text: they keep the arrays that the engine core sent. This replaces parts
of vLLM 0.32 (``vllm/v1/engine/logprobs.py``) and fails if another version has other parts.

What ``capture.py`` kept in the workers arrives as an array of bytes for each row (``takes.py``);
`hidden_states` and `scored_answer` read it.

Legend: T response tokens, K ids named for each token, D hidden size, V vocabulary.
"""

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raystill.datasets.rows.answers import Answer, tail_logprob
from raystill.datasets.rows.signal import Signal
from raystill.datasets.rows.versions import Spans

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.outputs import CompletionOutput

# The parameters of the two functions that ``keep_arrays`` replaces.
UPDATE_PARAMETERS = ["self", "logprobs_lists"]
CREATE_PARAMETERS = ["flat_logprobs"]


def keep_arrays() -> None:
    """Make this process's vLLM keep sampled logprobs as arrays. Calling it twice does no harm.

    Raises:
        RuntimeError: the functions to be replaced have other parameters than in vLLM 0.32.
    """
    import vllm
    from vllm.logprobs import FlatLogprobs
    from vllm.v1.engine import logprobs as module

    processor, create = module.LogprobsProcessor, module.create_sample_logprobs
    if getattr(create, "keeps_arrays", False):
        return
    update = processor._update_sample_logprobs
    parameters = [list(inspect.signature(f).parameters) for f in (update, create)]
    if parameters != [UPDATE_PARAMETERS, CREATE_PARAMETERS]:
        raise RuntimeError(
            f"vLLM {vllm.__version__} collects logprobs by functions with the parameters "
            f"{parameters}, expected {[UPDATE_PARAMETERS, CREATE_PARAMETERS]}; install the pinned "
            "vllm"
        )

    class Arrays(FlatLogprobs):
        """For every position, ids and logprobs as arrays [1, K + 1]."""

        def __init__(self) -> None:
            super().__init__()
            self.arrays: list[tuple[np.ndarray, np.ndarray]] = []

    def create_sample_logprobs(flat_logprobs: bool) -> Any:
        return Arrays() if flat_logprobs else create(flat_logprobs)

    def update_sample_logprobs(self: Any, logprobs_lists: Any) -> None:
        # A request with a tokenizer wants the tokens' text too, which vLLM's own code adds.
        if isinstance(self.logprobs, Arrays) and self.tokenizer is None:
            lists = logprobs_lists
            self.logprobs.arrays.append((lists.logprob_token_ids, lists.logprobs))
        else:
            update(self, logprobs_lists)

    create_sample_logprobs.keeps_arrays = True  # type: ignore[attr-defined]
    module.create_sample_logprobs = create_sample_logprobs
    processor._update_sample_logprobs = update_sample_logprobs


def gather_logprobs(logprobs: "Tensor", num_logprobs: int, token_ids: "Tensor") -> Any:
    """A faster ``Sampler.gather_logprobs`` (``vllm/v1/sample/sampler.py``): all ranks are 0.

    vLLM counts for each sampled token how many tokens are more probable; nothing here reads it.

    logprobs: float32 [n, V], nats. token_ids: int64 [n], the sampled tokens.
    Returns LogprobsTensors: ids int32 and logprobs float32, both [n, K + 1], the sampled token
    first and then the K best in descending order; ranks int64 [n].
    """
    import torch
    from vllm.v1.outputs import LogprobsTensors

    best, ids = logprobs.topk(num_logprobs, dim=-1)
    drawn = token_ids.unsqueeze(-1)
    return LogprobsTensors(
        torch.cat([drawn, ids], dim=1).to(torch.int32),
        torch.cat([logprobs.gather(-1, drawn), best], dim=1),
        torch.zeros_like(token_ids),
    )


def num_logprobs(signal: Signal) -> int | None:
    """vLLM's ``logprobs`` setting: ids beside the sampled token; None for no logprobs at all."""
    if signal.kind == "text":
        return None
    return signal.width if signal.kind == "topk" else 0


def sampled_answer(output: "CompletionOutput", signal: Signal, vocab_size: int) -> Answer:
    """The answer in vLLM's finished output. For ``hidden``, `hidden_states` adds the states.

    In each position's arrays the sampled token comes first, then the best ids in descending order.
    A batch has one K, its largest: there may be more than this signal's K.
    """
    num_tokens = len(output.token_ids)
    ids = np.fromiter(output.token_ids, np.int32, num_tokens)
    if signal.kind == "text":
        return Answer(ids, output.finish_reason, spans=spans_of(output))
    arrays = output.logprobs.arrays
    width = 1 + (signal.width if signal.kind == "topk" else 0)
    logprobs = _stacked([part for _, part in arrays], width)
    assert logprobs.shape == (num_tokens, width), f"{logprobs.shape} of {num_tokens} tokens"
    sampled = logprobs[:, 0].astype(np.float32)
    if signal.kind != "topk":
        return Answer(ids, output.finish_reason, sampled)
    best = logprobs[:, 1:].astype(np.float32)
    return Answer(
        ids,
        output.finish_reason,
        sampled,
        topk_ids=_stacked([part for part, _ in arrays], width)[:, 1:].astype(np.int32),
        topk_logprobs=best,
        tail_logprob=tail_logprob(best, vocab_size),
    )


def spans_of(output: "CompletionOutput") -> Spans:
    """First token and version of the weights that wrote each part of an answer.

    Empty for an engine whose weights were never named: vLLM calls them "default".
    """
    told = [span for span in output.weight_versions or () if span.end > span.start]
    if not all(span.version.isdigit() for span in told):
        return ()
    return tuple((span.start, int(span.version)) for span in told)


def _stacked(parts: list[NDArray[Any]], width: int) -> NDArray[Any]:
    """The first ``width`` columns of all tokens' arrays [1, K + 1], as [T, width]."""
    if all(part.shape == parts[0].shape for part in parts):
        return np.concatenate(parts)[:, :width]  # Not cut one by one, which takes longer.
    return np.concatenate([part[:, :width] for part in parts])


def hidden_states(answer: Answer, captured: NDArray[np.uint8], hidden_size: int) -> Answer:
    """The answer with its hidden states. ``captured``: uint8 [T, 2 D], bfloat16 bits."""
    if answer.error is not None:
        return answer
    states = captured.reshape(-1).view("<u2").reshape(-1, hidden_size)
    assert len(states) == len(answer.response_ids)
    return replace(answer, hidden=states)


def scored_answer(
    response_ids: NDArray[np.int32],
    captured: NDArray[np.uint8],
    signal: Signal,
    at: NDArray[np.int32] | None,
    *,
    vocab_size: int,
    hidden_size: int,
) -> Answer:
    """The signal of a given response; its ``finish_reason`` is not set.

    captured: uint8 [T, bytes of a row], see `Capture.raystill_take`. at: int32 [T, K], the ids at
    which logprobs were requested; None: the K best.
    """
    num_tokens = len(response_ids)
    answer = Answer(np.asarray(response_ids, np.int32))
    if signal.kind == "text":
        return answer
    if signal.kind == "hidden":
        unknown = np.full(num_tokens, np.nan, np.float32)
        return hidden_states(replace(answer, sampled_logprobs=unknown), captured, hidden_size)
    values = captured.view("<f4")
    assert len(values) == num_tokens, f"scores of {len(values)} positions, expected {num_tokens}"
    sampled = values[:, 0].copy()
    if signal.kind == "sampled":
        return replace(answer, sampled_logprobs=sampled)
    width = signal.width
    if at is None:
        ids = values[:, 1 : 1 + width].view("<i4").copy()
        logprobs = values[:, 1 + width :].copy()
        tail = tail_logprob(logprobs, vocab_size)
    else:
        ids, logprobs, tail = at, values[:, 1 : 1 + width].copy(), values[:, -1].copy()
    return replace(
        answer,
        sampled_logprobs=sampled,
        topk_ids=ids,
        topk_logprobs=logprobs,
        tail_logprob=tail,
    )
