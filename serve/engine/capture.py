"""Hidden states and scores of given tokens, captured in vLLM's own forward pass.

Where it sits: vLLM adds `Capture` to the class of its workers (``worker_extension_cls``, set in
``arguments.py``). A request with a `CaptureRequest` in its ``extra_args`` has the hidden states or
the scores of its response positions kept, step by step, in memory shared with the replica
(``blocks.py``), until ``takes.py`` asks where they are. A hidden state is therefore the very one
from which the token was sampled. Hidden states are stored for all requests of a step at once:
the work in Python does not grow with the tokens.

*Consumes* the hidden states of all tokens of a step, after the model's final norm, as the output
head receives them. *Unblocks* ``VllmEngine``, which takes a row when its request has ended, before
another request gets its place. So no more than ``max_num_seqs`` rows are held, each of at most the
tokens that its request may have.

It relies on the first model runner of vLLM 0.32 (``vllm/v1/worker/gpu_model_runner.py``, which the
CPU build's runner extends). `Capture.raystill_capture` fails if the parts it uses are missing.

Legend: T response positions of a request, m requests and n tokens of a step, D hidden size,
V vocabulary, K ids named for each token. Logprobs are nats of the full vocabulary, at
temperature 1.
"""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystill.serve.engine.blocks import BlockTable, BlockWriter, Indices, consecutive
from raystill.serve.engine.lifetime import end_with, end_with_replica
from raystill.serve.engine.outputs import gather_logprobs

EXTRA_ARGS = "raystill"
RUNNER_PARTS = ("_model_forward", "input_batch", "requests", "query_start_loc", "model", "sampler")
CPU_LOGIT_BYTES = 32 << 20
DEVICE_LOGIT_BYTES = 512 << 20
"""Largest size of the float32 logits [n, V] that scoring computes at once."""

end_with_replica()  # An engine's process imports this module before it loads its model.


@dataclass(frozen=True)
class CaptureRequest:
    """What to capture of one vLLM request, which carries it in ``extra_args``.

    tag: unique name, by which `Capture.raystill_take` asks for the result.
    first: the input position whose hidden state predicts the first response token: P - 1.
    length: the most response positions that are wanted; those after it are not kept.
    kind: ``hidden`` (states), ``sampled`` (logprobs of the targets), ``topk`` (also the K best
    ids; K = width) or ``at`` (also logprobs at ``ids``; K = width).
    targets: int32 [T] as bytes, the given response. ids: int32 [T, K] as bytes.
    """

    tag: str
    first: int
    length: int
    kind: str
    width: int = 0
    targets: bytes = b""
    ids: bytes = b""

    def extra_args(self) -> dict[str, Any]:
        """The value of ``SamplingParams.extra_args``."""
        return {EXTRA_ARGS: asdict(self)}


@dataclass(frozen=True)
class _CapturedSpan:
    """Consecutive tokens of one scored request in a step.

    Rows [begin, end) of the step's hidden states are its response positions from ``position`` on.
    """

    wanted: CaptureRequest
    slot: int
    begin: int
    end: int
    position: int

    @property
    def num_rows(self) -> int:
        return self.end - self.begin

    @property
    def positions(self) -> slice:
        return slice(self.position, self.position + self.num_rows)


@dataclass(frozen=True)
class _Batch:
    """The requests of a step that ask for a capture. Steps with the same requests share it.

    request_ids: of all requests of the step. wanted [m], and of each: its ``slots`` in the
    `BlockTable`, ``rows`` its number in vLLM's batch, ``first`` and ``length`` as it asks,
    ``states`` whether it asks for hidden states.
    """

    request_ids: list[str]
    wanted: list[CaptureRequest]
    slots: Indices
    rows: Indices
    first: Indices
    length: Indices
    states: NDArray[np.bool_]

    def spans(self, computed: Indices, starts: Indices) -> tuple[Indices, Indices, Indices]:
        """For each request [m]: its first row in the step's hidden states, position, and rows.

        computed: int [batch], tokens of each request computed before this step. starts: int
        [batch + 1], where its tokens begin in the step.
        """
        done = computed[self.rows].astype(np.int64)
        # Prompt positions before the first response token's are not needed.
        begin = starts[self.rows] + np.maximum(0, self.first - done)
        position = np.maximum(0, done - self.first)
        count = np.minimum(starts[self.rows + 1] - begin, self.length - position)
        return begin, position, np.maximum(0, count)


class Capture:
    """Methods added to vLLM's worker; ``collective_rpc`` calls each on all ranks."""

    model_runner: Any
    _raystill: "_Recorder"

    def raystill_capture(self, replica: int, host: str) -> dict[str, str] | None:
        """Start capturing: wrap the model runner's forward pass.

        replica: the process on ``host`` with which this one is to end. Returns the fields of the
        `blocks.BlocksHandle`; None from all ranks but one.

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
        return recorder.blocks.handle.plain() if recorder.answers else None

    def raystill_count_ranks(self, wanted: bool) -> None:
        """Turn vLLM's counting of the sampled tokens' ranks on or off. It is off while capturing.

        Nothing reads the ranks; a benchmark turns them on to compare with vLLM as it is.
        """
        sampler = self.model_runner.sampler
        sampler.gather_logprobs = type(sampler).gather_logprobs if wanted else gather_logprobs

    def raystill_take(
        self, tags: list[str], lengths: list[int], as_bytes: bool
    ) -> list[list[Any]] | None:
        """Hand over what was captured for each tag, of response length T in ``lengths``.

        For each tag a list of job, blocks and width, as in `blocks.TakenBlocks`: the caller reads
        the array and gives the blocks back. ``as_bytes``: a list of the array's bytes instead. A
        list of one text says why there is no array. None from all ranks but one.

        The rows of an array: ``hidden`` uint16 [D]; else the float32 logprob of the target, then
        for ``topk`` int32 ids [K] and float32 logprobs [K], for ``at`` float32 logprobs [K] and
        the log of the mass outside the ids.
        """
        return self._raystill.take(tags, lengths, as_bytes)

    def raystill_drop(self, tags: list[str]) -> None:
        """Forget requests that will not be taken, and ignore what they still produce."""
        self._raystill.drop(tags)


class _Recorder:
    """All that one worker process has captured."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._slots: dict[str, int] = {}
        self._dropped: set[str] = set()
        self._batch: _Batch | None = None
        self._is_last_stage = _is_last_stage()
        self.answers = self._is_last_stage and _is_first_rank()
        self.blocks = BlockWriter()
        self._table = BlockTable(self.blocks)

    def record(self, output: Any) -> None:
        """Capture what the requests of this step ask for. ``output``: the model's, [n.., D]."""
        batch, runner = self._current_batch(), self._runner
        if not batch.wanted or not self._is_last_stage:
            return
        begin, position, count = batch.spans(
            runner.input_batch.num_computed_tokens_cpu, runner.query_start_loc.np
        )
        if not count.any():
            return
        if not isinstance(output, Tensor):
            raise RuntimeError(
                f"the model gave {type(output).__name__}, expected a tensor of hidden states; "
                "leave speculative_config out of teacher.engine_args"
            )
        states = batch.states & (count > 0)
        if states.any() and self.answers:  # All ranks of the last stage have the same.
            rows = _row_numbers(begin[states], count[states], output.device)
            values = output.index_select(0, rows).to(torch.bfloat16)
            self._table.put(values, batch.slots[states], position[states], count[states])
        spans = [
            _CapturedSpan(
                batch.wanted[i],
                int(batch.slots[i]),
                int(begin[i]),
                int(begin[i] + count[i]),
                int(position[i]),
            )
            for i in np.flatnonzero(~batch.states & (count > 0))
        ]
        for chunk in _score_chunks(spans, output, runner.input_batch.vocab_size):
            self._score(chunk, output)

    def take(self, tags: list[str], lengths: list[int], as_bytes: bool) -> list[list[Any]] | None:
        """See `Capture.raystill_take`."""
        self._batch = None
        slots = [self._slots.pop(tag, None) for tag in tags]
        if not self.answers:
            for slot in slots:
                if slot is not None:
                    self._table.drop(slot)
            return None
        return [
            self._taken(tag, slot, length, as_bytes)
            for tag, slot, length in zip(tags, slots, lengths, strict=True)
        ]

    def _taken(self, tag: str, slot: int | None, length: int, as_bytes: bool) -> list[Any]:
        covered = 0 if slot is None else self._table.covered(slot)
        if slot is None or covered < length:
            if slot is not None:
                self._table.drop(slot)
            return [
                f"request {tag} has hidden states of {covered} positions, expected {length}; was "
                "it given skip_reading_prefix_cache?"
            ]
        taken = self._table.take(slot, length)
        if not as_bytes:
            return [taken.job, taken.blocks, taken.width]
        data = self.blocks.read(taken)
        self.blocks.free(taken.blocks)
        return [data]

    def drop(self, tags: list[str]) -> None:
        """See `Capture.raystill_drop`."""
        self._batch = None
        for tag in tags:
            if (slot := self._slots.pop(tag, None)) is not None:
                self._table.drop(slot)
        # An aborted request may still be in a step; its tag is kept until the runner forgets it.
        requests = map(_capture_request, self._runner.requests.values())
        alive = {wanted.tag for wanted in requests if wanted}
        self._dropped = (self._dropped | set(tags)) & alive

    def _current_batch(self) -> _Batch:
        """The requests of this step; made anew only when others have joined or left."""
        request_ids = self._runner.input_batch.req_ids
        if self._batch is not None and self._batch.request_ids == request_ids:
            return self._batch
        rows, wanted = list[int](), list[CaptureRequest]()
        for i, request_id in enumerate(request_ids):
            request = _capture_request(self._runner.requests[request_id])
            if request is not None and request.tag not in self._dropped:
                rows.append(i)
                wanted.append(request)
                if request.tag not in self._slots:
                    self._slots[request.tag] = self._table.add()
        self._batch = _Batch(
            list(request_ids),
            wanted,
            np.array([self._slots[request.tag] for request in wanted], np.int64),
            np.array(rows, np.int64),
            np.array([request.first for request in wanted], np.int64),
            np.array([request.length for request in wanted], np.int64),
            np.array([request.kind == "hidden" for request in wanted], np.bool_),
        )
        return self._batch

    def _score(self, spans: list[_CapturedSpan], output: Tensor) -> None:
        """Compute and store logprobs of the targets, and of the best or the named ids."""
        begin, position, count, slots = (
            np.array([getattr(span, name) for span in spans], np.int64)
            for name in ("begin", "position", "num_rows", "slot")
        )
        states = output.index_select(0, _row_numbers(begin, count, output.device))
        logits = self._runner.model.compute_logits(states)  # Collective: every rank is here.
        if logits is None or not self.answers:
            return
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        targets = _request_values(spans, "targets", logits.device)
        columns = [logprobs.gather(1, targets)]
        wanted = spans[0].wanted
        if wanted.kind == "topk":
            best, ids = logprobs.topk(wanted.width, dim=1)
            columns += [ids.to(torch.int32).view(torch.float32), best]
        elif wanted.kind == "at":
            ids = _request_values(spans, "ids", logits.device)
            columns.append(logprobs.gather(1, ids))
            # In place: nothing reads these logprobs afterwards.
            columns.append(logprobs.scatter_(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True))
        self._table.put(torch.cat(columns, dim=1), slots, position, count)


def _capture_request(request: Any) -> CaptureRequest | None:
    """The CaptureRequest of one of the runner's requests; None if it has none."""
    parameters = request.sampling_params
    extra = None if parameters is None else parameters.extra_args
    return CaptureRequest(**extra[EXTRA_ARGS]) if extra and EXTRA_ARGS in extra else None


def _row_numbers(begin: Indices, count: Indices, device: torch.device) -> Tensor:
    """The rows of all requests in the step's hidden states: ``count`` [m] from ``begin`` [m] on."""
    return torch.from_numpy(consecutive(begin, count)).to(device, non_blocking=True)


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
            part = replace(span, begin=begin, end=end, position=span.position + begin - span.begin)
            groups.setdefault((span.wanted.kind, span.wanted.width), []).append(part)
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
        wanted = span.wanted
        # A copy as bytearray, since torch.frombuffer warns of a read-only buffer.
        values = torch.frombuffer(bytearray(getattr(wanted, name)), dtype=torch.int32)
        width = wanted.width if name == "ids" else 1
        parts.append(values.view(-1, width)[span.positions])
    return torch.cat(parts).long().to(device, non_blocking=True)


def _is_last_stage() -> bool:
    """Whether this rank has the last pipeline stage, which computes the final hidden states."""
    from vllm.distributed.parallel_state import get_pp_group

    return bool(get_pp_group().is_last_rank)


def _is_first_rank() -> bool:
    """Whether this rank is the first of its stage: the one that answers for all of them."""
    from vllm.distributed.parallel_state import get_tp_group

    return bool(get_tp_group().rank_in_group == 0)
