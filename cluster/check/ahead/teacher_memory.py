"""Whether a teacher can be split as the run file says, and its weights fit on the GPUs it names.

From the run file, ``config.json`` and the headers of weight files: no weights, no torch, no vLLM.
"""

import difflib
import math
from collections.abc import Iterator

from raystill.base.errors import Problem
from raystill.config.run import RunConfig
from raystill.config.teacher import TeacherConfig
from raystill.model.files import ModelFolder
from raystill.model.head import read_header, stored_tensors
from raystill.model.weights import PLAIN
from raystill.placement import memory

OF_WEIGHTS = ("cpu_offload", "dtype", "load_", "offload", "quantization")
"""How engine arguments begin by which weights take other room on a GPU."""
GIB = 1 << 30
MOST_RANKS = 1024


def check_replicas(config: RunConfig, teacher: ModelFolder) -> Iterator[Problem]:
    """Can vLLM split the teacher so, and has each GPU of a replica room for its weights?

    What is found not to fit cannot: key-value cache and activations are not counted.
    """
    settings = config.teacher
    ranks = settings.tensor_parallel_size
    heads = teacher.config.get("num_attention_heads")
    if settings.engine != "vllm" or overrides_config(settings):
        return
    if type(heads) is int and heads > 0 and heads % ranks:
        fits = [str(n) for n in range(1, min(heads, 64) + 1) if heads % n == 0]
        yield Problem(
            "teacher.tensor_parallel_size",
            f"is {ranks}, but {teacher.name} has {heads} attention heads, which vLLM splits "
            f"evenly; set it to one of {', '.join(fits)}",
        )
        return
    needed, has = weight_bytes(settings, teacher), room(settings)
    if needed is None or has is None or needed <= has * ranks * settings.pipeline_parallel_size:
        return
    stages = settings.pipeline_parallel_size
    kind, use = settings.accelerator_type, settings.gpu_memory_utilization
    each = f"{needed / 1e9 / ranks / stages:.0f} GB of weights on each of {ranks * stages} GPUs"
    wider = ""
    if has > 0 and (settings.gpus_per_replica or 1.0) >= 1:
        more = range(math.ceil(needed / has / stages), MOST_RANKS)
        fits = [str(n) for n in more if type(heads) is not int or heads % n == 0]
        wider = f"tensor_parallel_size: {fits[0]}, " if fits else ""
    others = "an accelerator_type with more memory, or a quantised model"
    yield Problem(
        "teacher.accelerator_type",
        f"has no room for it: {teacher.name} has {each}, but they may use "
        f"{max(0, has) / 1e9:.0f} GB of {kind} (gpu_memory_utilization {use:g}"
        + (f", kv_cache_gib {settings.kv_cache_gib:g}" if settings.kv_cache_gib else "")
        + f"); set {wider}{others}",
    )


def overrides_config(settings: TeacherConfig) -> bool:
    """Whether vLLM reads another configuration than ``config.json`` as it is."""
    return bool(settings.engine_args.keys() & {"hf_overrides", "config_format"})


def replica_notices(config: RunConfig) -> Iterator[str]:
    """Where the name of a GPU is none that is known here, so that nothing is compared with it."""
    kind = config.teacher.accelerator_type
    if config.teacher.engine == "vllm" and kind is not None and kind not in memory.GPU_BYTES:
        yield unknown_gpu("teacher.accelerator_type", kind)


def unknown_gpu(setting: str, kind: str) -> str:
    """What is said of a name that is none of Ray's for a GPU of known memory."""
    near = difflib.get_close_matches(kind.upper(), memory.GPU_BYTES, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    known = ", ".join(memory.GPU_BYTES)
    return f"{setting} is {kind!r}, whose memory is not known here ({known}){guess}"


def room(settings: TeacherConfig) -> float | None:
    """Bytes of a GPU that an engine has for weights; None where the GPU is not named."""
    has = memory.GPU_BYTES.get(settings.accelerator_type or "")
    if has is None or settings.gpus_per_replica == 0:
        return None
    return has * settings.gpu_memory_utilization - GIB * (settings.kv_cache_gib or 0.0)


def weight_bytes(settings: TeacherConfig, teacher: ModelFolder) -> float | None:
    """Bytes of all weights as the engine holds them, at least; None where they are not here.

    Floats are converted to ``teacher.dtype``; of ``auto`` to two bytes at most. With a
    ``quantization`` that is not the files' own, or engine arguments about it, it is not known.
    """
    files = sorted({file for file in stored_tensors(teacher.path).values() if file.exists()})
    quantised = "quantization_config" in teacher.config
    told = any(name.startswith(OF_WEIGHTS) for name in settings.engine_args)
    if not files or told or (settings.quantization and not quantised):
        return None
    width = 4 if settings.dtype == "float32" else 2
    total = 0.0
    for file in files:
        for entry in read_header(file).values():
            begin, end = entry["data_offsets"]
            convert = entry["dtype"] in PLAIN and not quantised
            total += math.prod(entry["shape"]) * width if convert else end - begin
    return total
