"""What vLLM's engine is started with: its arguments, and the process it starts in.

Where it sits: `vllm_engine` uses both; `check` asks which arguments a user may pass through.
Imports no vllm.
"""

import difflib
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from raystill.base.logs import say_where
from raystill.config.teacher import TeacherConfig
from raystill.model.sampling import ResolvedSampling

GIB = 2**30
CPU_KV_CACHE_GIB = 2.0

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
    "worker_extension_cls": "nothing: hidden states and scores are taken through it",
}
"""Engine arguments that a typed setting (named here) or this module decides."""


@dataclass(frozen=True)
class EngineSettings:
    """What one engine needs to know; ``cores`` is None where GPUs do the work."""

    teacher: TeacherConfig
    model: str  # local folder, or Hub id where other nodes load it too
    sampling: ResolvedSampling
    seed: int
    max_top_k: int
    cores: tuple[int, ...] | None = None
    revision: str | None = None  # the Hub's commit, of a Hub id


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


def label_replica(run: str, number: int) -> None:
    """Lines of this process, and of vLLM, which reads it when it is imported, name the replica."""
    os.environ["VLLM_LOGGING_PREFIX"] = f"{say_where(run=run, role=f'teacher-{number}')} "


def prepare_process(cores: Sequence[int] | None) -> None:
    """Set this process up for vLLM: cores, threads, telemetry. Must come before vllm is imported.

    The replica's own threads are moved to the engine's cores too, so that its event loop does not
    take turns with the student on the student's. Children inherit both.
    """
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # The one that `capture` knows.
    if cores is None:
        # FlashInfer's sampler is compiled when the engine starts, by an nvcc that machines with
        # CUDA's libraries alone do not have; vLLM's own needs none.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
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
    # Weights and KV cache in huge pages: a twentieth less time a token. (A student's steps are
    # slower with them.) glibc reads it when the engine's process starts.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


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
        "worker_extension_cls": "raystill.serve.engine.capture.Capture",
    }
    if settings.revision is not None:
        arguments |= {"revision": settings.revision, "tokenizer_revision": settings.revision}
    if teacher.pipeline_parallel_size > 1 and not on_cpu:
        arguments["distributed_executor_backend"] = "ray"
    return {**arguments, **teacher.engine_args}
