"""The arguments of vLLM's engine, and the process in which it starts.

Where it sits: ``replica.py`` prepares the process and ``vllm.py`` starts the engine with the
arguments; ``driver.py check`` asks which arguments a user may pass through. Imports no vllm, so
that it can run before vllm is imported.
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
"""KV cache on a CPU where ``teacher.kv_cache_gib`` is not set."""

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
    "generation_config": "teacher.sampling",
    "override_generation_config": "teacher.sampling",
    "model_weights": "teacher.model",
    "hf_overrides": "teacher.model to a folder with the changed config.json",
}
"""Engine arguments that are set from the run file; the value names the setting."""

FIXED = {
    "logprobs_mode": "the signal is always the teacher's distribution at temperature 1",
    "runner": "a teacher always generates",
    "convert": "a teacher always generates",
    "skip_tokenizer_init": "vLLM needs the tokenizer to start",
    "worker_extension_cls": "hidden states and scores are captured through it",
}
"""Engine arguments that cannot be changed; the value is the reason."""


@dataclass(frozen=True)
class EngineSettings:
    """The settings of one engine."""

    teacher: TeacherConfig
    model: str  # A local folder, or a Hub id if other nodes load the model too.
    sampling: ResolvedSampling
    seed: int
    max_top_k: int  # The largest K that is ever asked for.
    cores: tuple[int, ...] | None = None  # CPU cores of the engine; None: it runs on GPUs.
    revision: str | None = None  # The commit of a Hub id.


def engine_argument_problems(teacher: TeacherConfig, known: Set[str]) -> dict[str, str]:
    """Problems of ``teacher.engine_args``, by argument name. ``known``: vLLM's argument names."""
    problems = {}
    for name in teacher.engine_args:
        if name in OWNED:
            problems[name] = f"is not passed through; set {OWNED[name]} instead"
        elif name in FIXED:
            problems[name] = f"cannot be changed: {FIXED[name]}; leave it out"
        elif name not in known:
            near = difflib.get_close_matches(name, known - OWNED.keys() - FIXED.keys(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see vLLM's AsyncEngineArgs"
            problems[name] = f"is not an engine argument of the installed vLLM; {hint}"
    return problems


def label_replica(run: str, number: int) -> None:
    """Begin each of vLLM's log lines with the run and the replica's number.

    Must run before vllm is imported, which reads VLLM_LOGGING_PREFIX then.
    """
    os.environ["VLLM_LOGGING_PREFIX"] = f"{say_where(run=run, role=f'teacher-{number}')} "


def prepare_process(cores: Sequence[int] | None) -> None:
    """Set this process up for vLLM: cores, threads, telemetry. Must run before vllm is imported.

    ``cores``: the engine's CPU cores; None if it runs on GPUs. The replica's own threads are moved
    to these cores too, so that its event loop does not compete with the student on the student's
    cores. Child processes inherit the cores and the environment.
    """
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # ``capture.py`` relies on the first one.
    if cores is None:
        # FlashInfer's sampler is compiled by nvcc when the engine starts. Machines that have only
        # CUDA's libraries lack nvcc; vLLM's own sampler does not need it.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        return
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:
            continue  # the thread has ended
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    # The engine core then runs the model in its own process: one process less to start and to keep
    # in memory. vLLM binds no threads in this mode, so they keep the cores that are set above.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Weights and KV cache in huge pages take 5 % less time a token. (A student's steps get slower,
    # so it is not set there.) glibc reads the variable when the engine's process starts.
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
        # One more than ``VllmEngine`` admits rows: the health probe must not queue behind rows.
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
