"""Hidden states and scores of given tokens, captured in vLLM's own forward pass.

Where it sits: vLLM adds `Capture` to the class of its workers (``worker_extension_cls``, set in
``arguments.py``). A request with a `CaptureRequest` in its ``extra_args`` has the hidden states or
the scores of its response positions kept in the worker, step by step, until ``vllm.py`` takes them
as bytes with one call for a group. A hidden state is therefore the very one from which the token
was sampled, and no Python object is made for each token.

*Consumes* the hidden states of all tokens of a step, after the model's final norm, as the output
head receives them. *Unblocks* ``VllmEngine``, which takes the bytes when its requests have ended.

It relies on the first model runner of vLLM 0.32 (``vllm/v1/worker/gpu_model_runner.py``, which the
CPU build's runner extends). `Capture.raystill_capture` fails if the parts it uses are missing.

Legend: T response positions of a request, n tokens of a step, D hidden size, V vocabulary,
K ids named for each token. Logprobs are nats of the full vocabulary, at temperature 1.
"""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from raystill.serve.engine.lifetime import end_with
from raystill.serve.engine.outputs import gather_logprobs

EXTRA_ARGS = "raystill"
RUNNER_PARTS = ("_model_forward", "input_batch", "requests", "query_start_loc", "model", "sampler")
CPU_LOGIT_BYTES = 32 << 20
DEVICE_LOGIT_BYTES = 512 << 20
"""Largest size of the float32 logits [n, V] that scoring computes at once."""


@dataclass(frozen=True)
class CaptureRequest:
    """What to capture of one vLLM request, which carries it in ``extra_args``.

    tag: unique name, by which `Capture.raystill_take` asks for the result.
    first: the input position whose hidden state predicts the first response token: P - 1.
    kind: ``hidden`` (states), ``sampled`` (logprobs of the targets), ``topk`` (also the K best
    ids; K = width) or ``at`` (also logprobs at ``ids``; K = width).
    targets: int32 [T] as bytes, the given response. ids: int32 [T, K] as bytes.
    """

    tag: str
    first: int
    kind: str
    width: int = 0
    targets: bytes = b""
    ids: bytes = b""

    def extra_args(self) -> dict[str, Any]:
        """The value of ``SamplingParams.extra_args``."""
        return {EXTRA_ARGS: asdict(self)}


@dataclass
class _Captured:
    """The arrays captured for one request so far, in host memory.

    parts: (first response position, arrays by name). covered: the number of response positions
    from the first on that have been captured without a gap.
    """

    wanted: CaptureRequest
    parts: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)
    covered: int = 0


@dataclass(frozen=True)
class _CapturedSpan:
    """Consecutive tokens of one request in a step.

    Rows [begin, end) of the step's hidden states are its response positions from ``position`` on.
    """

    captured: _Captured
    begin: int
    end: int
    position: int

    @property
    def num_rows(self) -> int:
        return self.end - self.begin

    @property
    def positions(self) -> slice:
        return slice(self.position, self.position + self.num_rows)


class Capture:
    """Methods added to vLLM's worker; ``collective_rpc`` calls each on all ranks."""

    model_runner: Any
    _raystill: "_Recorder"

    def raystill_capture(self, replica: int, host: str) -> None:
        """Start capturing: wrap the model runner's forward pass.

        replica: the process on ``host`` with which this one is to end.

        Raises:
            RuntimeError: the model runner lacks one of ``RUNNER_PARTS``.
        """
        end_with(replica, host)
        runner = self.model_runner
        missing = [name for name in RUNNER_PARTS if not hasattr(runner, name)]
        if missing:
            import vllm

            raise RuntimeError(
                f"the model runner of vLLM {vllm.__version__} has no {', '.join(missing)}, from "
                "which hidden states are taken; install the pinned vllm"
            )
        self._raystill = recorder = _Recorder(runner)
        forward = runner._model_forward

        @functools.wraps(forward)
        def recorded_forward(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            recorder.record(output)
            return output

        runner._model_forward = recorded_forward
        self.raystill_count_ranks(False)

    def raystill_count_ranks(self, wanted: bool) -> None:
        """Turn vLLM's counting of the sampled tokens' ranks on or off. It is off while capturing.

        Nothing reads the ranks; a benchmark turns them on to compare with vLLM as it is.
        """
        sampler = self.model_runner.sampler
        sampler.gather_logprobs = type(sampler).gather_logprobs if wanted else gather_logprobs

    def raystill_take(self, tags: list[str], lengths: list[int]) -> list[bytes] | None:
        """Return and forget what was captured for each tag, of response length T in ``lengths``.

        The bytes are the arrays of a request one after another: ``hidden`` uint16 [T, D]; else
        float32 logprobs of the targets [T], then for ``topk`` int32 ids [T, K] and float32 logprobs
        [T, K], for ``at`` float32 logprobs [T, K] and the log of the mass outside the ids [T].
        Empty where the length is 0. None from all ranks but one.
        """
        return self._raystill.take(tags, lengths)

    def raystill_drop(self, tags: list[str]) -> None:
        """Forget requests that will not be taken, and ignore what they still produce."""
        self._raystill.drop(tags)


class _Recorder:
    """All that one worker process has captured."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._captured: dict[str, _Captured] = {}
        self._dropped: set[str] = set()

    def record(self, output: Any) -> None:
        """Capture what the requests of this step ask for. ``output``: the model's, [n.., D]."""
        spans = list(self._spans())
        if not spans or not _is_last_stage():
            return
        if not isinstance(output, Tensor):
            raise RuntimeError(
                f"the model gave {type(output).__name__}, expected a tensor of hidden states; "
                "leave speculative_config out of teacher.engine_args"
            )
        for_states = [span for span in spans if span.captured.wanted.kind == "hidden"]
        if for_states:
            rows = output.index_select(0, _row_numbers(for_states, output.device))
            self._store(for_states, {"hidden": rows.to(torch.bfloat16)})
        for_scores = [span for span in spans if span.captured.wanted.kind != "hidden"]
        for chunk in _score_chunks(for_scores, output, self._runner.input_batch.vocab_size):
            self._score(chunk, output)

    def take(self, tags: list[str], lengths: list[int]) -> list[bytes] | None:
        """See `Capture.raystill_take`."""
        taken = [self._captured.pop(tag, None) for tag in tags]
        if not _answers():
            return None
        if torch.cuda.is_available():
            # Copies to the host do not block: the last ones may not have ended.
            torch.cuda.current_stream().synchronize()
        return [
            b"" if length == 0 else _joined(captured, length, tag)
            for captured, length, tag in zip(taken, lengths, tags, strict=True)
        ]

    def drop(self, tags: list[str]) -> None:
        """See `Capture.raystill_drop`."""
        for tag in tags:
            self._captured.pop(tag, None)
        # An aborted request may still be in a step; its tag is kept until the runner forgets it.
        requests = map(_capture_request, self._runner.requests.values())
        alive = {wanted.tag for wanted in requests if wanted}
        self._dropped = (self._dropped | set(tags)) & alive

    def _spans(self) -> Iterator[_CapturedSpan]:
        """The response positions in this step of every request that asks for a capture."""
        batch, starts = self._runner.input_batch, self._runner.query_start_loc.np
        for i, request_id in enumerate(batch.req_ids):
            wanted = _capture_request(self._runner.requests[request_id])
            if wanted is None or wanted.tag in self._dropped:
                continue
            computed = int(batch.num_computed_tokens_cpu[i])
            begin, end = int(starts[i]), int(starts[i + 1])
            begin += max(0, wanted.first - computed)  # Prompt positions before it are not needed.
            if begin < end:
                captured = self._captured.setdefault(wanted.tag, _Captured(wanted))
                yield _CapturedSpan(captured, begin, end, max(0, computed - wanted.first))

    def _score(self, spans: list[_CapturedSpan], output: Tensor) -> None:
        """Compute and store logprobs of the targets, and of the best or the named ids."""
        states = output.index_select(0, _row_numbers(spans, output.device))
        logits = self._runner.model.compute_logits(states)  # Collective: every rank is here.
        if logits is None:
            return
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        targets = _request_values(spans, "targets", logits.device)
        arrays = {"sampled": logprobs.gather(1, targets).squeeze(1)}
        wanted = spans[0].captured.wanted
        if wanted.kind == "topk":
            best, ids = logprobs.topk(wanted.width, dim=1)
            arrays |= {"ids": ids.to(torch.int32), "logprobs": best}
        elif wanted.kind == "at":
            ids = _request_values(spans, "ids", logits.device)
            arrays["logprobs"] = logprobs.gather(1, ids)
            # In place: nothing reads these logprobs afterwards.
            arrays["tail"] = logprobs.scatter_(1, ids, -torch.inf).logsumexp(dim=1)
        self._store(spans, arrays)

    def _store(self, spans: list[_CapturedSpan], arrays: dict[str, Tensor]) -> None:
        """Copy arrays [n, ..] to the host and give each span its rows of them."""
        host = {name: _to_host(values) for name, values in arrays.items()}
        start = 0
        for span in spans:
            rows = slice(start, start + span.num_rows)
            start = rows.stop
            captured = span.captured
            part = {name: values[rows] for name, values in host.items()}
            captured.parts.append((span.position, part))
            # A preempted request starts again from its first token: positions may come twice.
            if span.position <= captured.covered:
                captured.covered = max(captured.covered, span.positions.stop)


def _capture_request(request: Any) -> CaptureRequest | None:
    """The CaptureRequest of one of the runner's requests; None if it has none."""
    parameters = request.sampling_params
    extra = None if parameters is None else parameters.extra_args
    return CaptureRequest(**extra[EXTRA_ARGS]) if extra and EXTRA_ARGS in extra else None


def _row_numbers(spans: list[_CapturedSpan], device: torch.device) -> Tensor:
    """The rows of all spans in the step's hidden states."""
    rows = torch.cat([torch.arange(span.begin, span.end) for span in spans])
    return rows.to(device, non_blocking=True)


def _score_chunks(
    spans: list[_CapturedSpan], output: Tensor, vocab: int
) -> Iterator[list[_CapturedSpan]]:
    """Spans of one kind and width, cut and grouped so that the logits of a group stay in bounds."""
    limit = CPU_LOGIT_BYTES if output.device.type == "cpu" else DEVICE_LOGIT_BYTES
    max_rows = max(1, limit // (4 * vocab))
    groups: dict[tuple[str, int], list[_CapturedSpan]] = {}
    for span in spans:
        for begin in range(span.begin, span.end, max_rows):
            end = min(begin + max_rows, span.end)
            wanted = span.captured.wanted
            part = _CapturedSpan(span.captured, begin, end, span.position + begin - span.begin)
            groups.setdefault((wanted.kind, wanted.width), []).append(part)
    for group in groups.values():
        chunk: list[_CapturedSpan] = []
        rows = 0
        for span in group:
            if chunk and rows + span.num_rows > max_rows:
                yield chunk
                chunk, rows = [], 0
            chunk.append(span)
            rows += span.num_rows
        yield chunk


def _request_values(spans: list[_CapturedSpan], name: str, device: torch.device) -> Tensor:
    """What the requests give for each position of the spans: int64 [n, 1] or, of ids, [n, K]."""
    parts = []
    for span in spans:
        wanted = span.captured.wanted
        # A copy as bytearray, since torch.frombuffer warns of a read-only buffer.
        values = torch.frombuffer(bytearray(getattr(wanted, name)), dtype=torch.int32)
        width = wanted.width if name == "ids" else 1
        parts.append(values.view(-1, width)[span.positions])
    return torch.cat(parts).long().to(device, non_blocking=True)


def _to_host(values: Tensor) -> Tensor:
    """The values in host memory. From a GPU the copy goes on after the call has returned."""
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def _joined(captured: _Captured | None, length: int, tag: str) -> bytes:
    """All parts of a request as bytes: each array [T, ...], in the order they were computed."""
    covered = 0 if captured is None else captured.covered
    if captured is None or covered < length:
        raise ValueError(
            f"request {tag} has hidden states of {covered} positions, expected {length}; was it "
            "given skip_reading_prefix_cache?"
        )
    joined = []
    for name, first in captured.parts[0][1].items():
        whole = torch.empty(length, *first.shape[1:], dtype=first.dtype)
        for position, arrays in captured.parts:
            values = arrays[name][: max(0, length - position)]
            whole[position : position + len(values)] = values
        # Through uint8, since numpy has no bfloat16.
        joined.append(whole.view(torch.uint8).numpy().tobytes())
    return b"".join(joined)


def _is_last_stage() -> bool:
    """Whether this rank has the last pipeline stage, which computes the final hidden states."""
    from vllm.distributed.parallel_state import get_pp_group

    return bool(get_pp_group().is_last_rank)


def _answers() -> bool:
    """Whether this rank returns the result. All ranks of the last stage have captured the same."""
    from vllm.distributed.parallel_state import get_tp_group

    return _is_last_stage() and get_tp_group().rank_in_group == 0
