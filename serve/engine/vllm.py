"""vLLM's async engine as a teacher: prompt ids in, response ids with their signal out.

Where it sits: in a Serve replica (``replica.py``), whose process has been set up by
``arguments.prepare_process``. vllm is imported when the engine starts. *Consumes* groups of prompt
ids from ``Teacher``; *waits for* vLLM. The signal of a sampled response comes from decoding itself,
the signal of a scored response from one prefill.

Legend: P prompt tokens, T response tokens, K teacher ids kept for each token, D hidden size.
"""

import asyncio
import itertools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raystill.datasets.rows.answers import Answer, why_unanswerable, why_unscorable
from raystill.datasets.rows.schema import LOST, NOT_STARTED, TIMED_OUT
from raystill.datasets.rows.signal import Signal
from raystill.serve.engine.arguments import PROBE_TIMEOUT_S, EngineSettings, engine_arguments
from raystill.serve.engine.capture import CaptureRequest
from raystill.serve.engine.outputs import hidden_states, keep_arrays, sampled_answer, scored_answer

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingParams


Ids = NDArray[np.int32]

SHUTDOWN_TIMEOUT_S = 5.0


class VllmEngine:
    """One vLLM engine. At most ``teacher.max_num_seqs`` rows are in it at a time; others wait."""

    name = "vllm"

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.teacher.max_num_seqs)
        self._numbers = itertools.count()
        self._rows_finished = 0
        self.died = False
        self._engine: Any = None

    async def start(self) -> None:
        """Load the model and start vLLM. ``prepare_process`` must have run before.

        The event loop is blocked until the engine is ready.
        """
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        keep_arrays()
        arguments = AsyncEngineArgs(**engine_arguments(self._settings))
        self._engine = AsyncLLM.from_engine_args(arguments)
        await self._engine.collective_rpc(
            "raystill_capture", args=(os.getpid(), socket.gethostname())
        )
        model = self._engine.model_config
        self.version = vllm.__version__
        self.vocab_size = int(model.get_vocab_size())
        self.hidden_size = int(model.get_hidden_size())
        self.max_model_len = int(model.max_model_len)
        self.dtype = str(model.dtype).removeprefix("torch.")

    async def sample(self, prompt_ids: Sequence[Ids], signal: Signal) -> list[Answer]:
        """Answer a group of prompts, in order. Prompts that cannot be answered have an error.

        Raises:
            EngineDeadError: the engine's process has ended with the hidden states it had captured.
        """
        parameters = self._parameters(_num_logprobs(signal))
        captures: list[CaptureRequest | None] = [None] * len(prompt_ids)
        if signal.kind == "hidden":
            captures = [CaptureRequest(self._tag(), len(ids) - 1, "hidden") for ids in prompt_ids]
        reasons = [why_unanswerable(ids, self.max_model_len, self.vocab_size) for ids in prompt_ids]
        with self._capturing(captures) as take:
            outputs = await self._run(prompt_ids, reasons, captures, parameters)
            # Off the event loop, which all rows' tokens pass.
            answers = await asyncio.to_thread(self._sampled, outputs, signal)
            if signal.kind != "hidden":
                return answers
            blobs = await take([len(answer.response_ids) for answer in answers])
        return [
            hidden_states(a, blob, self.hidden_size) for a, blob in zip(answers, blobs, strict=True)
        ]

    def _sampled(self, outputs: "list[CompletionOutput | str]", signal: Signal) -> list[Answer]:
        """The answers in what `_run` gave."""
        return [
            Answer(error=output)
            if isinstance(output, str)
            else sampled_answer(output, signal, self.vocab_size)
            for output in outputs
        ]

    async def score(
        self,
        prompt_ids: Sequence[Ids],
        response_ids: Sequence[Ids],
        signal: Signal,
        at: Sequence[Ids] | None = None,
    ) -> list[Answer]:
        """The signal of given responses, by prefill. The caller sets ``finish_reason``.

        at: for ``topk``, int32 [T, K] of each row: the ids whose logprobs are returned in place of
        the K best, in this order; distinct within a token. For ``hidden`` the output head is not
        applied, so ``sampled_logprobs`` are NaN. Raises EngineDeadError as ``sample`` does.
        """
        named: Sequence[Ids | None] = [None] * len(prompt_ids) if at is None else at
        pairs = list(zip(prompt_ids, response_ids, named, strict=True))
        reasons = [why_unscorable(p, r, self.max_model_len, self.vocab_size) for p, r, _ in pairs]
        outputs: list[Any] = reasons
        blobs = [b""] * len(pairs)
        if signal.kind != "text":
            captures = [self._score_request(*pair, signal) for pair in pairs]
            # The last response token is not put in: its distribution is read one position before.
            inputs = [np.concatenate([prompt, response[:-1]]) for prompt, response, _ in pairs]
            parameters = self._parameters(None, max_tokens=1, temperature=0.0, min_p=0.0)
            # Tokens from the prefix cache are not computed, so nothing could be captured of them.
            parameters.skip_reading_prefix_cache = True
            with self._capturing(captures) as take:
                outputs = await self._run(inputs, reasons, captures, parameters)
                usable = [not isinstance(output, str) for output in outputs]
                lengths = [len(r) * ok for (_, r, _), ok in zip(pairs, usable, strict=True)]
                blobs = await take(lengths)
        sizes = {"vocab_size": self.vocab_size, "hidden_size": self.hidden_size}
        return [
            Answer(error=output)
            if isinstance(output, str)
            else scored_answer(response, blob, signal, ids, **sizes)
            for (_, response, ids), output, blob in zip(pairs, outputs, blobs, strict=True)
        ]

    async def token_times(self, prompt_ids: Ids, num_tokens: int) -> list[float]:
        """When each token of an answer came, ``time.perf_counter``; it never ends early."""
        from vllm.sampling_params import RequestOutputKind

        parameters = self._parameters(
            None,
            max_tokens=num_tokens,
            stop_token_ids=[],
            output_kind=RequestOutputKind.DELTA,
        )
        request, times = f"row-{next(self._numbers)}", list[float]()
        prompt = {"prompt_token_ids": prompt_ids.tolist()}
        async with self._slots:
            async for output in self._engine.generate(prompt, parameters, request_id=request):
                times += [time.perf_counter()] * len(output.outputs[0].token_ids)
        return times

    async def probe(self) -> None:
        """Generate one token within ``PROBE_TIMEOUT_S``: detects a dead engine and a hung one.

        Raises:
            RuntimeError: no token came in time, of the probe or of any row. (A full engine may let
                the probe wait for cache blocks, for longer than its rows take to finish.)
            EngineDeadError: the engine's process has ended.
        """
        await self._engine.check_health()
        finished, before = self._rows_finished, self._tokens()
        try:
            await asyncio.wait_for(self._one_token(), PROBE_TIMEOUT_S)
        except TimeoutError:
            grown = any(tokens > before.get(row, 0) for row, tokens in self._tokens().items())
            if self._rows_finished == finished and not grown:
                raise RuntimeError(
                    f"the engine gave no token within {PROBE_TIMEOUT_S:.0f} s"
                ) from None

    async def reload(self, path: str) -> None:
        """Take new weights from a safetensors file on this node, with Hugging Face names.

        Its settings must name `weights.EXTENSION`. Requests in flight are held back meanwhile;
        their tokens so far stay, and what they attend to is computed again with the new weights.
        """
        await self._engine.pause_generation(mode="keep", clear_cache=True)
        try:
            await self._engine.collective_rpc("raystill_reload", args=(path,))
            await self._engine.reset_prefix_cache()
        finally:
            await self._engine.resume_generation()

    def _tokens(self) -> dict[str, int]:
        """Response tokens so far of each row in the engine, by vLLM's name of its request."""
        states = self._engine.output_processor.request_states
        return {
            name: 0 if state.detokenizer is None else state.detokenizer.num_output_tokens()
            for name, state in states.items()
        }

    def close(self) -> None:
        """End the engine's processes. Calling it twice does no harm."""
        if self._engine is not None:
            self._engine.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
            self._engine = None

    def _tag(self) -> str:
        return f"capture-{next(self._numbers)}"

    def _score_request(
        self, prompt: Ids, response: Ids, at: Ids | None, signal: Signal
    ) -> CaptureRequest:
        targets = np.ascontiguousarray(response, "<i4").tobytes()
        first = len(prompt) - 1
        if at is None:
            width = signal.width if signal.kind == "topk" else 0
            return CaptureRequest(self._tag(), first, signal.kind, width, targets)
        ids = np.ascontiguousarray(at, "<i4").tobytes()
        return CaptureRequest(self._tag(), first, "at", signal.width, targets, ids)

    def _parameters(self, num_logprobs: int | None, **changes: Any) -> "SamplingParams":
        """vLLM's parameters from ``teacher.sampling``, with these logprobs and changes."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = self._settings.sampling
        settings: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_tokens": sampling.max_tokens,
            # Only the resolved ids end an answer; vLLM's own end-of-sequence id may be another.
            "ignore_eos": True,
            "stop_token_ids": list(sampling.stop_token_ids),
            "logprobs": num_logprobs,
            "flat_logprobs": True,
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        # No seed here: a seed in a request crashes vLLM's CPU build under chunked prefill.
        return SamplingParams(**{**settings, **changes})

    async def _run(
        self,
        inputs: Sequence[Ids],
        reasons: Sequence[str | None],
        captures: Sequence[CaptureRequest | None],
        parameters: "SamplingParams",
    ) -> "list[CompletionOutput | str]":
        """The finished output of each row, or the reason why it has none (a row's ``error``).

        ``reasons``: known beforehand; such rows are not sent to the engine. Where the engine dies,
        what it had finished is kept: the rows in it are LOST, and those that waited NOT_STARTED.
        """
        limit = self._settings.teacher.request_timeout_s

        async def run_row(ids: Ids, reason: str | None, capture: CaptureRequest | None) -> Any:
            if reason is not None:
                return reason
            row_parameters = parameters
            if capture is not None:
                row_parameters = parameters.clone()
                row_parameters.extra_args = capture.extra_args()
            async with self._slots:
                if self.died:
                    return NOT_STARTED
                try:  # A row's time begins here, and not where it waited for a place.
                    answered = self._generate(ids.tolist(), row_parameters)
                    output = await asyncio.wait_for(answered, limit)
                except TimeoutError:
                    return TIMED_OUT
                except Exception as error:
                    if not engine_is_dead(error):
                        raise
                    self.died = True
                    return LOST
                self._rows_finished += 1
            ended = output.finish_reason in ("stop", "length")
            return output if ended else f"engine_{output.finish_reason}"

        return list(await asyncio.gather(*map(run_row, inputs, reasons, captures)))

    @contextmanager
    def _capturing(self, captures: Sequence[CaptureRequest | None]) -> Iterator[Any]:
        """Gives a coroutine function that takes the captured bytes; its argument: each row's T.

        If it was not called when the block ends (a cancelled call, an error), the workers are told
        to drop what they have captured.
        """
        tags = [capture.tag for capture in captures if capture is not None]
        taken = False

        async def take(lengths: list[int]) -> list[bytes]:
            nonlocal taken
            results = await self._engine.collective_rpc("raystill_take", args=(tags, lengths))
            taken = True
            return next(blobs for blobs in results if blobs is not None)

        try:
            yield take
        finally:
            if tags and not taken:
                drop = self._engine.collective_rpc("raystill_drop", args=(tags,))
                # Not awaited: the caller may be cancelled. The reference keeps the task alive.
                self._dropping = asyncio.ensure_future(drop)

    async def _one_token(self) -> None:
        parameters = self._parameters(None, max_tokens=1, temperature=0.0, min_p=0.0)
        await self._generate([0], parameters)

    async def _generate(
        self, token_ids: list[int], parameters: "SamplingParams"
    ) -> "CompletionOutput":
        """The finished output of one request; vLLM aborts it if the caller is cancelled."""
        request = f"row-{next(self._numbers)}"
        prompt = {"prompt_token_ids": token_ids}
        async for output in self._engine.generate(prompt, parameters, request_id=request):
            final = output
        return final.outputs[0]


def _num_logprobs(signal: Signal) -> int | None:
    """vLLM's ``logprobs`` setting: ids beside the sampled token; None for no logprobs at all."""
    if signal.kind == "text":
        return None
    return signal.width if signal.kind == "topk" else 0


def engine_is_dead(error: BaseException) -> bool:
    """Whether the error says that the engine's process has ended."""
    return any(kind.__name__ == "EngineDeadError" for kind in type(error).__mro__)
