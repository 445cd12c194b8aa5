"""The arguments of vLLM's engine, and the process in which it starts.

Where it sits: ``replica.py`` prepares the process and ``vllm.py`` starts the engine with the
arguments; ``driver.py check`` asks which arguments a user may pass through, and which of them are
part of the answers' keys. Imports no vllm, so that it can run before vllm is imported.
"""

import difflib
import os
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raystill.base.logs import say_where
from raystill.config.teacher import TeacherConfig
from raystill.model.sampling import ResolvedSampling

GIB = 2**30
CPU_KV_CACHE_GIB = 2.0
"""KV cache on a CPU where ``teacher.kv_cache_gib`` is not set."""
PROBE_TIMEOUT_S = 60.0
"""Within which a sound engine gives one token."""

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
    "hf_config_path": "teacher.model to a folder with the changed config.json",
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

NEUTRAL = {
    "parallelism: who computes which part of the same sums": (
        "tensor_parallel_size pipeline_parallel_size distributed_executor_backend master_addr "
        "master_port nnodes node_rank distributed_timeout_seconds cpu_distributed_timeout_seconds "
        "numa_bind numa_bind_nodes numa_bind_cpus device_ids decode_context_parallel_size "
        "prefill_context_parallel_size enable_expert_parallel expert_placement_strategy "
        "enable_eplb eplb_config disable_custom_all_reduce ray_workers_use_nsight"
    ),
    "memory: where the same weights and cache blocks lie, and how many there are": (
        "gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override block_size "
        "swap_space cpu_offload_gb cpu_offload_params offload_backend offload_group_size "
        "offload_num_in_group offload_prefetch_step offload_params kv_offloading_size "
        "kv_offloading_backend enable_sleep_mode sleep_mode_offload_cudagraph "
        "enable_cumem_allocator disable_hybrid_kv_cache_manager watermark enable_shm_tensor_arena"
    ),
    "scheduling: which rows are in a step, and how much of a prompt": (
        "max_num_seqs max_num_batched_tokens max_num_scheduled_tokens max_num_active_seqs "
        "max_num_queued_reqs max_num_queued_tokens long_prefill_token_threshold "
        "long_prefill_token_threshold_adaptive enable_chunked_prefill enable_prefix_caching "
        "prefix_caching_hash_algo scheduling_policy scheduler_reserve_full_isl "
        "prefill_schedule_interval async_scheduling stream_interval"
    ),
    "CUDA graphs: the same kernels, started together": (
        "enforce_eager cudagraph_capture_sizes max_cudagraph_capture_size"
    ),
    "loading: how the same files are fetched and read": (
        "download_dir hf_token safetensors_load_strategy safetensors_prefetch_num_threads "
        "safetensors_prefetch_block_size max_parallel_loading_workers use_tqdm_on_load"
    ),
    "logs and figures": (
        "disable_log_stats aggregate_engine_logging enable_log_requests disable_log_requests "
        "logging_config log_level log_config_file served_model_name otlp_traces_endpoint "
        "show_hidden_metrics_for_version collect_detailed_traces per_request_spec_decode_metrics "
        "kv_cache_metrics kv_cache_metrics_sample custom_histogram_buckets cudagraph_metrics "
        "enable_layerwise_nvtx_tracing enable_mfu_metrics enable_logging_iteration_details "
        "jit_monitor_mode jit_monitor_verbose enable_mm_processor_stats profiler_config "
        "kv_events_config shutdown_timeout"
    ),
    "the dice: answers are drawn from the same distribution": "seed",
    "the signal's width, which the store tells apart itself": "max_logprobs",
}
"""Engine arguments that do not decide the teacher's distribution over answers, by reason.

They may change in which order numbers are added, as another batch or another GPU does. Every other
argument is in the keys of the answers: `keyed_arguments`. An argument whose effect is in doubt
(kernels, formats, compilation) does not belong here.
"""
NEUTRAL_NAMES = frozenset(name for names in NEUTRAL.values() for name in names.split())

DEFAULTS: dict[str, Any] = {
    "kv_cache_dtype": "auto",
    "load_format": "auto",
    "config_format": "auto",
    "tokenizer_mode": "auto",
    "model_impl": "auto",
    "moe_backend": "auto",
    "mamba_cache_dtype": "auto",
    "mamba_ssm_cache_dtype": "auto",
    "disable_sliding_window": False,
    "enable_lora": False,
    "use_fp64_gumbel": False,
    "quantization_config": None,
    "speculative_config": None,
    "logits_processors": None,
    "scheduler_cls": None,
    "attention_backend": None,
    "code_revision": None,
}
"""vLLM's defaults of arguments that are in the keys: spelled out, they change no key.

A missing one costs no more than asking again.
"""


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
    extension: str = "raystill.serve.engine.capture.Capture"  # Class that vLLM's workers extend.
    adapters: "AdapterLimits | None" = None  # What its adapters are like; None: it takes none.


@dataclass(frozen=True)
class AdapterLimits:
    """What vLLM makes room for: the largest rank, the modules that may have an adapter, and the
    adapters that requests of one step may use; those of another wait.

    modules: the last parts of their names. Named, since vLLM would otherwise put the output head
    among them, whose logits it then computes for the rows of a step's sampling alone; scoring asks
    for those of other rows.
    """

    rank: int
    modules: tuple[str, ...]
    at_a_time: int


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


def keyed_arguments(teacher: TeacherConfig) -> dict[str, Any]:
    """Those of ``teacher.engine_args`` that are part of the answers' keys.

    All that are not in NEUTRAL, and differ from vLLM's default. An engine without arguments, the
    synthetic one, has none.
    """
    if teacher.engine == "synthetic":
        return {}
    return {
        name: value
        for name, value in teacher.engine_args.items()
        if name not in NEUTRAL_NAMES and not (name in DEFAULTS and DEFAULTS[name] == value)
    }


def label_replica(run: str, number: int, role: str = "teacher") -> None:
    """Begin each of vLLM's log lines with the run and the replica's number.

    Must run before vllm is imported, which reads VLLM_LOGGING_PREFIX then.
    """
    os.environ["VLLM_LOGGING_PREFIX"] = f"{say_where(run=run, role=f'{role}-{number}')} "


def prepare_process(cores: Sequence[int] | None, load_on: Sequence[int] | None = None) -> None:
    """Set this process up for vLLM: cores, threads, telemetry. Must run before vllm is imported.

    ``cores``: the engine's CPU cores; None if it runs on GPUs. The replica's own threads are moved
    to these cores too, so that its event loop does not compete with the student on the student's
    cores. Child processes inherit the cores and the environment. ``load_on``: cores to be on until
    the caller has `move_threads`, where others than the engine's are idle while it is loaded.
    """
    from raystill.serve.engine.lifetime import name_replica  # Here, as in `move_threads`.

    name_replica()
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # ``capture.py`` relies on the first one.
    if cores is None:
        # FlashInfer's sampler is compiled by nvcc when the engine starts. Machines that have only
        # CUDA's libraries lack nvcc; vLLM's own sampler does not need it.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        return
    move_threads(cores if load_on is None else load_on)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    # The engine core then runs the model in its own process: one process less to start and to keep
    # in memory. vLLM binds no threads in this mode, so they keep the cores that are set above.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Weights and KV cache in huge pages take 5 % less time a token. (A student's steps get slower,
    # so it is not set there.) glibc reads the variable when the engine's process starts.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


def move_threads(cores: Sequence[int]) -> None:
    """Move every thread of this process, and of the processes that it started, to these cores."""
    import psutil  # Here: ``check`` imports this module, and may run without it.

    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            for thread in process.threads():
                with suppress(ProcessLookupError):  # It has ended.
                    os.sched_setaffinity(thread.id, cores)


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
        "worker_extension_cls": settings.extension,
    }
    if settings.adapters is not None:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": settings.adapters.rank,
            "lora_target_modules": list(settings.adapters.modules),
            "max_loras": settings.adapters.at_a_time,
        }
    if settings.revision is not None:
        arguments |= {"revision": settings.revision, "tokenizer_revision": settings.revision}
    if teacher.pipeline_parallel_size > 1 and not on_cpu:
        arguments["distributed_executor_backend"] = "ray"
    return {**arguments, **teacher.engine_args}
