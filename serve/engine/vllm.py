"""vLLM's async engine as a teacher: prompt ids in, response ids with their signal out.

Where it sits: in a Serve replica (``replica.py``), whose process has been set up by
``arguments.prepare_process``. vllm is imported when the engine starts. *Consumes* groups of prompt
ids from ``Teacher``; *waits for* vLLM. The signal of a sampled response comes from decoding itself,
the signal of a scored response from one prefill.

Legend: P prompt tokens, T response tokens, K teacher ids kept for each token, D hidden size.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from raystill.datasets.rows.answers import Answer, why_unanswerable, why_unscorable
from raystill.datasets.rows.schema import GIVEN_UP, LOST, NOT_STARTED, TIMED_OUT
from raystill.datasets.rows.signal import Signal
from raystill.datasets.rows.turns import Turns
from raystill.serve.engine.arguments import PROBE_TIMEOUT_S, EngineSettings, engine_arguments
from raystill.serve.engine.capture import CaptureRequest
from raystill.serve.engine.lifetime import engine_is_dead, has_ended, unless_dead
from raystill.serve.engine.outputs import (
    hidden_states,
    keep_arrays,
    num_logprobs,
    sampled_answer,
    scored_answer,
)
from raystill.serve.engine.takes import Bytes, Takes
from raystill.serve.engine.weights import Adapters, name_version, one_span, reload_whole

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")
Ids = NDArray[np.int32]

SHUTDOWN_TIMEOUT_S = 5.0
NOTHING: Bytes = np.empty((0, 0), np.uint8)
"""What is captured for a row that asks for nothing, or has no answer."""


class VllmEngine:
    """One vLLM engine. At most ``teacher.max_num_seqs`` rows are in it at a time; others wait,
    and all but one while rows are asked one by one."""

    name = "vllm"

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.teacher.max_num_seqs)
        self._turns = Turns()
        self._numbers = itertools.count()
        self._rows_finished = 0
        self._adapters = Adapters()
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
        self._takes = Takes(self._engine.collective_rpc, self._raise_if_dead)
        await self._takes.start()
        model = self._engine.model_config
        self.version = vllm.__version__
        self.vocab_size = int(model.get_vocab_size())
        self.hidden_size = int(model.get_hidden_size())
        self.max_model_len = int(model.max_model_len)
        self.dtype = str(model.dtype).removeprefix("torch.")

    async def sample(
        self, prompt_ids: Sequence[Ids], signal: Signal, one_by_one: bool = False
    ) -> list[Answer]:
        """Answer a group of prompts, in order. Prompts that cannot be answered have an error.

        one_by_one: each with no other row in the engine, so that it dies of no other.
        """
        parameters = self._parameters(num_logprobs(signal))
        captures: list[CaptureRequest | None] = [None] * len(prompt_ids)
        if signal.kind == "hidden":
            most = self._settings.sampling.max_tokens
            captures = [
                CaptureRequest(self._tag(), len(ids) - 1, most, "hidden") for ids in prompt_ids
            ]
        reasons = [why_unanswerable(ids, self.max_model_len, self.vocab_size) for ids in prompt_ids]
        outputs, arrays = await self._run(prompt_ids, reasons, captures, parameters, one_by_one)
        # Off the event loop, which all rows' tokens pass.
        answers = await asyncio.to_thread(self._sampled, outputs, signal)
        if signal.kind != "hidden":
            return answers
        return [
            hidden_states(answer, array, self.hidden_size)
            for answer, array in zip(answers, arrays, strict=True)
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
        one_by_one: bool = False,
        ahead: bool = False,
    ) -> list[Answer]:
        """The signal of given responses, by prefill. The caller sets ``finish_reason``.

        at: for ``topk``, int32 [T, K] of each row: the ids whose logprobs are returned in place of
        the K best, in this order; distinct within a token. For ``hidden`` the output head is not
        applied: ``sampled_logprobs`` are NaN. one_by_one: as for `sample`. ahead: of waiting rows.
        """
        named: Sequence[Ids | None] = [None] * len(prompt_ids) if at is None else at
        pairs = list(zip(prompt_ids, response_ids, named, strict=True))
        reasons = [why_unscorable(p, r, self.max_model_len, self.vocab_size) for p, r, _ in pairs]
        outputs: list[Any] = reasons
        arrays: Sequence[Bytes] = [NOTHING] * len(pairs)
        if signal.kind != "text":
            captures = [self._score_request(*pair, signal) for pair in pairs]
            # The last response token is not put in: its distribution is read one position before.
            inputs = [np.concatenate([prompt, response[:-1]]) for prompt, response, _ in pairs]
            parameters = self._parameters(None, max_tokens=1, temperature=0.0, min_p=0.0)
            # Tokens from the prefix cache are not computed, so nothing could be captured of them.
            parameters.skip_reading_prefix_cache = True
            how = one_by_one, ahead
            outputs, arrays = await self._run(inputs, reasons, captures, parameters, *how)
        sizes = {"vocab_size": self.vocab_size, "hidden_size": self.hidden_size}
        return [
            Answer(error=output)
            if isinstance(output, str)
            else scored_answer(response, array, signal, ids, **sizes)
            for (_, response, ids), output, array in zip(pairs, outputs, arrays, strict=True)
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
        finished, before = self._rows_finished, self._tokens()
        try:
            await self._engine.check_health()
            await asyncio.wait_for(self._while_alive(self._one_token()), PROBE_TIMEOUT_S)
        except TimeoutError:
            grown = any(tokens > before.get(row, 0) for row, tokens in self._tokens().items())
            if self._rows_finished == finished and not grown:
                raise RuntimeError(
                    f"the engine gave no token within {PROBE_TIMEOUT_S:.0f} s"
                ) from None
        except Exception as error:
            self.died |= engine_is_dead(error)  # It takes no row from now on.
            raise

    async def name_weights(self, version: int) -> None:
        """Tokens from now on are those of this version of the weights: `Answer.spans`."""
        await name_version(self._engine, version)

    async def reload(self, path: str, version: int) -> None:
        """Take new weights from a safetensors file on this node, with Hugging Face names.

        Its settings must name `weights.EXTENSION`. Requests in flight are held back meanwhile;
        their tokens so far stay, and what they attend to is computed again with the new weights.
        A row that is alone is waited for: if the engine died of the weights it would be suspected.
        """
        async with self._turns.beside():
            await self._while_alive(reload_whole(self._engine, path, version))

    async def take_adapter(self, number: int, folder: str, version: int) -> None:
        """Answer with the adapter in ``folder``, in PEFT's format, from now on.

        Its settings must allow adapters (``adapters``). number: of this adapter alone, from 1;
        the folder too must be its own, and is deleted when no request needs it any more. Requests
        in flight are finished with the adapter that they began with.
        """
        async with self._turns.beside():
            await self._while_alive(self._adapters.take(self._engine, number, folder, version))

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
            self._takes.close()
            self._engine.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
            self._engine = None

    def _raise_if_dead(self) -> None:
        if self._engine is None:
            raise RuntimeError("the engine was closed")
        if has_ended(self._engine):
            raise self._engine.dead_error

    def _while_alive(self, work: Awaitable[T]) -> Awaitable[T]:
        return unless_dead(work, self._raise_if_dead)

    def _tag(self) -> str:
        return f"capture-{next(self._numbers)}"

    def _score_request(
        self, prompt: Ids, response: Ids, at: Ids | None, signal: Signal
    ) -> CaptureRequest:
        targets = np.ascontiguousarray(response, "<i4").tobytes()
        first = len(prompt) - 1
        if at is None:
            width = signal.width if signal.kind == "topk" else 0
            return CaptureRequest(self._tag(), first, len(response), signal.kind, width, targets)
        ids = np.ascontiguousarray(at, "<i4").tobytes()
        return CaptureRequest(self._tag(), first, len(response), "at", signal.width, targets, ids)

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
        one_by_one: bool = False,
        ahead: bool = False,
    ) -> "tuple[list[CompletionOutput | str], list[Bytes]]":
        """The finished output of each row, or the reason why it has none (a row's ``error``).

        The second list has the array captured for each. ``reasons``: known beforehand; such rows
        are not sent to the engine. Where the engine dies, what it had finished is kept: the rows in
        it are LOST, and those that waited NOT_STARTED; one_by_one: the row that was in it alone is
        LOST, those after it NOT_STARTED. One that it gives up by itself is GIVEN_UP.
        """

        async def run_row(
            ids: Ids, reason: str | None, capture: CaptureRequest | None
        ) -> "tuple[CompletionOutput | str, Bytes]":
            if reason is not None:
                return reason, NOTHING
            row_parameters = parameters
            if capture is not None:
                row_parameters = parameters.clone()
                row_parameters.extra_args = capture.extra_args()
            async with self._place(one_by_one, ahead):
                if self.died:
                    return NOT_STARTED, NOTHING
                try:  # A row's time begins here, and not where it waited for a place.
                    output, array = await self._answered(ids, row_parameters, capture)
                except TimeoutError:
                    return TIMED_OUT, NOTHING
                except Exception as error:
                    if is_of_one_request(error):
                        logger.warning("vLLM gave a row up: %r", error.__cause__ or error)
                        return GIVEN_UP, NOTHING
                    if not engine_is_dead(error):
                        raise
                    self.died = True
                    return LOST, NOTHING
                self._rows_finished += 1
            ended = output.finish_reason in ("stop", "length")
            return output if ended else f"engine_{output.finish_reason}", array

        asked = map(run_row, inputs, reasons, captures)
        rows = [await row for row in asked] if one_by_one else await asyncio.gather(*asked)
        return [output for output, _ in rows], [array for _, array in rows]

    @asynccontextmanager
    async def _place(self, alone: bool, ahead: bool) -> AsyncIterator[None]:
        """A row's place in the engine; alone: with no other row in it, which gives a token first.

        The token proves that what was there before did no harm that shows only now: a row that was
        cancelled or timed out may be in the step that runs. Then ``died`` is set.
        """
        if not alone:
            async with nullcontext() if ahead else self._slots, self._turns.beside():
                yield
            return
        async with self._turns.alone():
            if not self.died:
                try:
                    await self.probe()
                except Exception as error:
                    if not (engine_is_dead(error) or isinstance(error, RuntimeError)):
                        raise
                    logger.warning("the engine has no row in it and gives no token: %s", error)
                    self.died = True
            yield

    async def _answered(
        self, ids: Ids, parameters: "SamplingParams", capture: CaptureRequest | None
    ) -> "tuple[CompletionOutput, Bytes]":
        """The finished output of one row within its time, and the array captured for it.

        The array is taken before the row's place is free, which bounds what the workers hold; they
        are told to forget it where there is no answer.
        """
        taken = False
        try:
            answer = self._while_alive(self._generate(ids.tolist(), parameters))
            output = await asyncio.wait_for(answer, self._settings.teacher.request_timeout_s)
            if capture is None or output.finish_reason not in ("stop", "length"):
                return output, NOTHING
            length = capture.length if capture.targets else len(output.token_ids)
            array = await self._takes.take(capture.tag, length)
            taken = True
            return output, array
        finally:
            if capture is not None and not taken:
                self._takes.drop(capture.tag)

    async def _one_token(self) -> None:
        await self._generate([0], self._parameters(None, max_tokens=1, temperature=0.0, min_p=0.0))

    async def _generate(
        self, token_ids: list[int], parameters: "SamplingParams"
    ) -> "CompletionOutput":
        """The finished output of one request; vLLM aborts it if the caller is cancelled."""
        given: dict[str, Any] = {"request_id": f"row-{next(self._numbers)}"}
        prompt = {"prompt_token_ids": token_ids}
        with self._adapters.used() as (adapter, version):
            if adapter is not None:
                given["lora_request"] = adapter
            async for output in self._engine.generate(prompt, parameters, **given):
                final = output
        answer: CompletionOutput = final.outputs[0]
        if adapter is not None:  # vLLM names the versions of whole weights alone.
            answer.weight_versions = one_span(version, len(answer.token_ids))
        return answer


def is_of_one_request(error: BaseException) -> bool:
    """Whether the error has ended one request, and the engine goes on."""
    return type(error).__name__ == "EngineGenerateError"
