"""vLLM's async engine as a teacher: token ids in, token ids and their distributions out.

Where it sits: inside one Serve replica; the only module that imports vllm, and only once the
replica's process has been prepared for it. *Consumes* groups of prompt ids from ``Teacher``;
*waits for* the engine's decoding; the signal is taken from decoding itself, with no second pass.

Legend: P prompt tokens, T response tokens, K teacher ids kept for each token.
"""

import asyncio
import difflib
import itertools
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raystill.serve.answers import Answer, refusal, tail_logprob
from raystill.serve.config import TeacherConfig
from raystill.serve.sampling import ResolvedSampling

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingParams

GIB = 2**30
CPU_KV_CACHE_GIB = 2.0
PROBE_TIMEOUT_S = 60.0
SHUTDOWN_TIMEOUT_S = 5.0

OWNED = {
    "model": "teacher.model",
    "tokenizer": "teacher.model, whose tokenizer is used",
    "revision": "teacher.revision",
    "tokenizer_revision": "teacher.revision",
    "trust_remote_code": "teacher.trust_remote_code",
    "dtype": "teacher.dtype",
    "quantization": "teacher.quantization",
    "max_model_len": "teacher.max_model_len",
    "tensor_parallel_size": "teacher.tensor_parallel_size",
    "pipeline_parallel_size": "teacher.pipeline_parallel_size",
    "data_parallel_size": "teacher.num_replicas",
    "distributed_executor_backend": "teacher.tensor_parallel_size and pipeline_parallel_size",
    "gpu_memory_utilization": "teacher.gpu_memory_utilization",
    "kv_cache_memory_bytes": "teacher.kv_cache_gib",
    "max_num_seqs": "teacher.max_num_seqs",
    "max_num_batched_tokens": "teacher.max_num_batched_tokens",
    "enforce_eager": "teacher.enforce_eager",
    "seed": "teacher.seed",
    "max_logprobs": "signal.top_k and evaluation.top_k",
    "logprobs_mode": "nothing: the signal is always of the untempered teacher",
    "generation_config": "teacher.sampling",
    "override_generation_config": "teacher.sampling",
    "runner": "nothing: a teacher generates",
    "convert": "nothing: a teacher generates",
    "model_weights": "teacher.model",
    "hf_overrides": "another teacher.model: they change what the identity is taken of",
    "skip_tokenizer_init": "nothing: vLLM's start needs the tokenizer",
}
"""Engine arguments that a typed setting (named here) or this module decides."""


@dataclass(frozen=True)
class EngineSettings:
    """What one engine needs to know; ``cores`` is None where GPUs do the work."""

    teacher: TeacherConfig
    model: str  # local folder, or Hub id where the node has no such folder
    sampling: ResolvedSampling
    seed: int
    max_top_k: int
    cores: tuple[int, ...] | None = None


def engine_argument_problems(teacher: TeacherConfig, known: Set[str]) -> dict[str, str]:
    """What is wrong with ``teacher.engine_args``, by name; ``known``: vLLM's own argument names."""
    problems = {}
    for name in teacher.engine_args:
        if name in OWNED:
            problems[name] = f"is not passed through; set {OWNED[name]} instead"
        elif name not in known:
            near = difflib.get_close_matches(name, known - OWNED.keys(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see vLLM's AsyncEngineArgs"
            problems[name] = f"is not an engine argument of the installed vLLM; {hint}"
    return problems


def prepare_process(cores: Sequence[int] | None) -> None:
    """Set this process up for vLLM: cores, threads, telemetry. Must come before vllm is imported.

    The replica's own threads are moved to the engine's cores too, so that its event loop does not
    take turns with the student on the student's. Children inherit both.
    """
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    if cores is None:
        return
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:
            continue  # the thread has ended
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    # One process less to start and to hold in memory: the engine core runs the model itself.
    # vLLM then binds no threads on its own; the mask inherited from here does.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Keyword arguments of vLLM's ``AsyncEngineArgs``."""
    teacher, on_cpu = settings.teacher, settings.cores is not None
    kv_cache_gib = teacher.kv_cache_gib or (CPU_KV_CACHE_GIB if on_cpu else None)
    eager = teacher.enforce_eager if teacher.enforce_eager is not None else on_cpu
    arguments: dict[str, Any] = {
        "model": settings.model,
        "trust_remote_code": teacher.trust_remote_code,
        "dtype": teacher.dtype,
        "quantization": teacher.quantization,
        "max_model_len": teacher.max_model_len,
        "tensor_parallel_size": teacher.tensor_parallel_size,
        "pipeline_parallel_size": teacher.pipeline_parallel_size,
        "gpu_memory_utilization": teacher.gpu_memory_utilization,
        # An explicit size lets the CPU build skip its warm-up.
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * GIB),
        # One place more than rows are let in: the health probe must never queue behind them.
        "max_num_seqs": teacher.max_num_seqs + 1,
        "max_num_batched_tokens": teacher.max_num_batched_tokens,
        "enforce_eager": eager,
        "seed": settings.seed,
        "max_logprobs": settings.max_top_k,
        "disable_log_stats": True,
    }
    if not os.path.isdir(settings.model):
        arguments["revision"] = teacher.revision
    if teacher.pipeline_parallel_size > 1 and not on_cpu:
        arguments["distributed_executor_backend"] = "ray"
    return {**arguments, **teacher.engine_args}


class VllmEngine:
    """One vLLM engine; at most ``teacher.max_num_seqs`` rows decode at a time, others queue."""

    name = "vllm"

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.teacher.max_num_seqs)
        self._numbers = itertools.count()
        self._rows_finished = 0
        self._engine: Any = None

    async def start(self) -> None:
        """Load the model; ``prepare_process`` must have run. Takes the event loop until done."""
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**engine_arguments(self._settings))
        self._engine = AsyncLLM.from_engine_args(arguments)
        model = self._engine.model_config
        self.version = vllm.__version__
        self.vocab_size = int(model.get_vocab_size())
        self.max_model_len = int(model.max_model_len)
        self.dtype = str(model.dtype).removeprefix("torch.")

    async def sample(
        self, prompt_ids: Sequence[NDArray[np.int32]], kind: str, top_k: int
    ) -> list[Answer]:
        """Answer a group; see ``Answer`` for shapes. ``text`` and ``sampled`` ignore ``top_k``.

        Raises:
            EngineDeadError: the engine's process has ended; nothing more will come from it.
        """
        parameters = self._parameters(kind, top_k)
        return list(
            await asyncio.gather(*(self._row(ids, kind, top_k, parameters) for ids in prompt_ids))
        )

    async def probe(self) -> None:
        """One token from the engine, within a time limit: sees a dead engine and a hung one.

        Rows that finish meanwhile count as life too: the probe itself may wait for cache blocks.
        """
        await self._engine.check_health()
        before = self._rows_finished
        try:
            await asyncio.wait_for(self._one_token(), PROBE_TIMEOUT_S)
        except TimeoutError:
            if self._rows_finished == before:
                raise RuntimeError(
                    f"the engine gave no token within {PROBE_TIMEOUT_S:.0f} s"
                ) from None

    def close(self) -> None:
        """End the engine's processes."""
        if self._engine is not None:
            self._engine.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
            self._engine = None

    def _parameters(self, kind: str, top_k: int, **changes: Any) -> "SamplingParams":
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = self._settings.sampling
        settings: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_tokens": sampling.max_tokens,
            # Only the resolved ids stop an answer: vLLM's own eos rule reads other files.
            "ignore_eos": True,
            "stop_token_ids": list(sampling.stop_token_ids),
            "logprobs": {"text": None, "sampled": 0, "topk": top_k}[kind],
            "flat_logprobs": True,
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        # No seed here: a request's own seed crashes the CPU build under chunked prefill.
        return SamplingParams(**{**settings, **changes})

    async def _row(
        self, prompt_ids: NDArray[np.int32], kind: str, top_k: int, parameters: "SamplingParams"
    ) -> Answer:
        reason = refusal(prompt_ids, self.max_model_len, self.vocab_size)
        if reason is not None:
            return Answer(error=reason)
        async with self._slots:
            output = await self._generate(prompt_ids.tolist(), parameters)
            self._rows_finished += 1
        if output.finish_reason not in ("stop", "length"):
            return Answer(error=f"engine_{output.finish_reason}")
        return answer_of(output, kind, top_k, self.vocab_size)

    async def _one_token(self) -> None:
        parameters = self._parameters("text", 0, max_tokens=1, temperature=0.0, min_p=0.0)
        await self._generate([0], parameters)

    async def _generate(
        self, token_ids: list[int], parameters: "SamplingParams"
    ) -> "CompletionOutput":
        """The finished output of one request; a cancelled caller aborts it in the engine."""
        request = f"row-{next(self._numbers)}"
        prompt = {"prompt_token_ids": token_ids}
        async for output in self._engine.generate(prompt, parameters, request_id=request):
            final = output
        return final.outputs[0]


def answer_of(output: "CompletionOutput", kind: str, top_k: int, vocab_size: int) -> Answer:
    """vLLM's finished output as arrays, straight from its flat lists.

    A position's K + 1 entries are the drawn token's, then the K best in descending order.
    """
    num_tokens = len(output.token_ids)
    ids = np.fromiter(output.token_ids, np.int32, num_tokens)
    if kind == "text":
        return Answer(ids, output.finish_reason)
    flat, width = output.logprobs, 1 + (top_k if kind == "topk" else 0)
    size = num_tokens * width
    logprobs = np.fromiter(flat.logprobs, np.float32, size).reshape(num_tokens, width)
    sampled = logprobs[:, 0].copy()
    if kind == "sampled":
        return Answer(ids, output.finish_reason, sampled)
    token_ids = np.fromiter(flat.token_ids, np.int32, size).reshape(num_tokens, width)
    best = logprobs[:, 1:].copy()
    return Answer(
        ids,
        output.finish_reason,
        sampled,
        topk_ids=token_ids[:, 1:].copy(),
        topk_logprobs=best,
        tail_logprob=tail_logprob(best, vocab_size),
    )


def engine_is_dead(error: BaseException) -> bool:
    """Whether the error means that the engine's process has ended."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)
