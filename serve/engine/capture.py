"""Hidden states and scores of given tokens, taken from vLLM's own forward pass.

Where it sits: vLLM mixes `Capture` into each of its worker processes (``worker_extension_cls``).
A request that carries a `Wish` in its ``extra_args`` has what it wishes kept here, step by step,
until the replica's process takes it as bytes, one call a group. So a response position's hidden
state is the very one its token was drawn from, and nothing is an object per token.

*Consumes* the hidden states of all tokens of a step, after the model's final norm, as the output
head is given them. *Unblocks* `VllmEngine`, which takes what is kept once its requests have ended.

Pinned to vLLM 0.32's first model runner: `raystill_capture` fails where its parts have moved.

Legend: T response positions of a request, n tokens of a step, D hidden size, V vocabulary,
K ids named for each token. Logprobs are nats of the raw (untempered) full vocabulary.
"""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from raystill.serve.engine.outputs import gather_logprobs

EXTRA_ARGS = "raystill"
RUNNER_PARTS = ("_model_forward", "input_batch", "requests", "query_start_loc", "model", "sampler")
CPU_LOGIT_BYTES = 32 << 20
DEVICE_LOGIT_BYTES = 512 << 20


@dataclass(frozen=True)
class CaptureRequest:
    """What to keep of one request.

    tag: names it for `Capture.raystill_take`. first: the input position whose state predicts the
    first response token (P - 1). kind: ``hidden`` (states), ``sampled``, ``topk`` (width = K) or
    ``at`` (width = K, at ``ids``). targets int32 [T] and ids int32 [T, K], as bytes.
    """

    tag: str
    first: int
    kind: str
    width: int = 0
    targets: bytes = b""
    ids: bytes = b""

    def extra_args(self) -> dict[str, Any]:
        """As a request's ``extra_args``."""
        return {EXTRA_ARGS: asdict(self)}


@dataclass
class _Kept:
    """Parts of one request, by name, on the host; ``covered``: positions known from the first."""

    wanted: CaptureRequest
    parts: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)
    covered: int = 0


@dataclass(frozen=True)
class _CapturedSpan:
    """Rows [begin, end) of a step's tokens: positions from ``place`` of one request's response."""

    kept: _Kept
    begin: int
    end: int
    place: int

    @property
    def places(self) -> slice:
        return slice(self.place, self.place + self.end - self.begin)


class Capture:
    """Methods that vLLM's worker gains; all ranks run them together."""

    model_runner: Any
    _raystill: "_Keeper"

    def raystill_capture(self) -> None:
        """Begin to listen. RuntimeError where the model runner is not the one that is known."""
        runner = self.model_runner
        missing = [name for name in RUNNER_PARTS if not hasattr(runner, name)]
        if missing:
            import vllm

            raise RuntimeError(
                f"the model runner of vLLM {vllm.__version__} has no {', '.join(missing)}, from "
                "which hidden states are taken; install the pinned vllm"
            )
        self._raystill = keeper = _Keeper(runner)
        forward = runner._model_forward

        @functools.wraps(forward)
        def listening(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            keeper.listen(output)
            return output

        runner._model_forward = listening
        self.raystill_count_ranks(False)

    def raystill_count_ranks(self, wanted: bool) -> None:
        """Whether vLLM counts drawn tokens' ranks, which nobody reads: on for comparing with it."""
        sampler = self.model_runner.sampler
        sampler.gather_logprobs = type(sampler).gather_logprobs if wanted else gather_logprobs

    def raystill_take(self, tags: list[str], lengths: list[int]) -> list[bytes] | None:
        """What was kept for each tag, T = its length; None from ranks that do not answer."""
        return self._raystill.take(tags, lengths)

    def raystill_drop(self, tags: list[str]) -> None:
        """Forget requests that will not be taken, and what still comes for them."""
        self._raystill.drop(tags)


class _Keeper:
    """Everything kept by one worker process."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._kept: dict[str, _Kept] = {}
        self._gone: set[str] = set()

    def listen(self, output: Any) -> None:
        """Keep what the requests of this step wish; ``output``: the model's, [n.., D]."""
        pieces = list(self._pieces())
        if not pieces or not _is_last_stage():
            return
        if not isinstance(output, Tensor):
            raise RuntimeError(
                f"the model gave {type(output).__name__}, expected a tensor of hidden states; "
                "leave speculative_config out of teacher.engine_args"
            )
        states = [piece for piece in pieces if piece.kept.wanted.kind == "hidden"]
        if states:
            rows = output.index_select(0, _row_numbers(states, output.device))
            self._keep(states, {"hidden": rows.to(torch.bfloat16)})
        scored = [piece for piece in pieces if piece.kept.wanted.kind != "hidden"]
        for part in _within(scored, output, self._runner.input_batch.vocab_size):
            self._score(part, output)

    def take(self, tags: list[str], lengths: list[int]) -> list[bytes] | None:
        """See `Capture.raystill_take`."""
        taken = [self._kept.pop(tag, None) for tag in tags]
        if not _answers():
            return None
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # Copies to the host may be under way.
        return [
            b"" if length == 0 else _joined(kept, length, tag)
            for kept, length, tag in zip(taken, lengths, tags, strict=True)
        ]

    def drop(self, tags: list[str]) -> None:
        """See `Capture.raystill_drop`."""
        for tag in tags:
            self._kept.pop(tag, None)
        alive = {wanted.tag for wanted in map(_wish_of, self._runner.requests.values()) if wanted}
        self._gone = (self._gone | set(tags)) & alive

    def _pieces(self) -> Iterator[_CapturedSpan]:
        batch, starts = self._runner.input_batch, self._runner.query_start_loc.np
        for i, request_id in enumerate(batch.req_ids):
            wanted = _wish_of(self._runner.requests[request_id])
            if wanted is None or wanted.tag in self._gone:
                continue
            computed = int(batch.num_computed_tokens_cpu[i])
            begin, end = int(starts[i]), int(starts[i + 1])
            begin += max(0, wanted.first - computed)
            if begin < end:
                kept = self._kept.setdefault(wanted.tag, _Kept(wanted))
                yield _CapturedSpan(kept, begin, end, max(0, computed - wanted.first))

    def _score(self, pieces: list[_CapturedSpan], output: Tensor) -> None:
        """Logprobs of the given tokens, and of the best or the named ids."""
        states = output.index_select(0, _row_numbers(pieces, output.device))
        logits = self._runner.model.compute_logits(states)  # Collective: every rank is here.
        if logits is None:
            return
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        targets = _stacked(pieces, "targets", logits.device)
        figures = {"sampled": logprobs.gather(1, targets).squeeze(1)}
        wanted = pieces[0].kept.wanted
        if wanted.kind == "topk":
            best, ids = logprobs.topk(wanted.width, dim=1)
            figures |= {"ids": ids.to(torch.int32), "logprobs": best}
        elif wanted.kind == "at":
            ids = _stacked(pieces, "ids", logits.device)
            figures["logprobs"] = logprobs.gather(1, ids)
            figures["tail"] = logprobs.scatter_(1, ids, -torch.inf).logsumexp(dim=1)
        self._keep(pieces, figures)

    def _keep(self, pieces: list[_CapturedSpan], figures: dict[str, Tensor]) -> None:
        host = {name: _to_host(values) for name, values in figures.items()}
        start = 0
        for piece in pieces:
            rows = slice(start, start + piece.end - piece.begin)
            start = rows.stop
            mine = {name: values[rows] for name, values in host.items()}
            piece.kept.parts.append((piece.place, mine))
            # A preempted request begins again: what it says twice is the same.
            if piece.place <= piece.kept.covered:
                piece.kept.covered = max(piece.kept.covered, piece.places.stop)


def _wish_of(request: Any) -> CaptureRequest | None:
    parameters = request.sampling_params
    extra = None if parameters is None else parameters.extra_args
    return CaptureRequest(**extra[EXTRA_ARGS]) if extra and EXTRA_ARGS in extra else None


def _row_numbers(pieces: list[_CapturedSpan], device: torch.device) -> Tensor:
    rows = torch.cat([torch.arange(piece.begin, piece.end) for piece in pieces])
    return rows.to(device, non_blocking=True)


def _within(
    pieces: list[_CapturedSpan], output: Tensor, vocab: int
) -> Iterator[list[_CapturedSpan]]:
    """Pieces of one kind and width, cut so that their logits stay within the chunk size."""
    limit = CPU_LOGIT_BYTES if output.device.type == "cpu" else DEVICE_LOGIT_BYTES
    most = max(1, limit // (4 * vocab))
    groups: dict[tuple[str, int], list[_CapturedSpan]] = {}
    for piece in pieces:
        for begin in range(piece.begin, piece.end, most):
            end = min(begin + most, piece.end)
            wanted = piece.kept.wanted
            part = _CapturedSpan(piece.kept, begin, end, piece.place + begin - piece.begin)
            groups.setdefault((wanted.kind, wanted.width), []).append(part)
    for group in groups.values():
        chunk: list[_CapturedSpan] = []
        rows = 0
        for piece in group:
            if chunk and rows + piece.end - piece.begin > most:
                yield chunk
                chunk, rows = [], 0
            chunk.append(piece)
            rows += piece.end - piece.begin
        yield chunk


def _stacked(pieces: list[_CapturedSpan], name: str, device: torch.device) -> Tensor:
    """The pieces' share of what their wishes give for each position: int64 [n, 1] or [n, K]."""
    parts = []
    for piece in pieces:
        wanted = piece.kept.wanted
        given = torch.frombuffer(bytearray(getattr(wanted, name)), dtype=torch.int32)
        width = wanted.width if name == "ids" else 1
        parts.append(given.view(-1, width)[piece.places])
    return torch.cat(parts).long().to(device, non_blocking=True)


def _to_host(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def _joined(kept: _Kept | None, length: int, tag: str) -> bytes:
    """All parts of a request as bytes: each figure's [T, ...] in the order they were named."""
    covered = 0 if kept is None else kept.covered
    if kept is None or covered < length:
        raise ValueError(
            f"request {tag} has hidden states of {covered} positions, expected {length}; was it "
            "given skip_reading_prefix_cache?"
        )
    joined = []
    for name, first in kept.parts[0][1].items():
        whole = torch.empty(length, *first.shape[1:], dtype=first.dtype)
        for place, figures in kept.parts:
            values = figures[name][: max(0, length - place)]
            whole[place : place + len(values)] = values
        joined.append(whole.view(torch.uint8).numpy().tobytes())
    return b"".join(joined)


def _is_last_stage() -> bool:
    from vllm.distributed.parallel_state import get_pp_group

    return bool(get_pp_group().is_last_rank)


def _answers() -> bool:
    """Whether this rank hands over what all ranks of the last stage have kept alike."""
    from vllm.distributed.parallel_state import get_tp_group

    return _is_last_stage() and get_tp_group().rank_in_group == 0
