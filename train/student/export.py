"""The student as a Hugging Face model: made before training, saved after it.

``build_student`` loads a model, or keeps some layers of the teacher. ``save_student`` writes the
finished model as a folder that ``transformers`` and vLLM load: weights in the export precision,
the teacher's tokenizer and chat template, and a generation configuration with the teacher's stop
ids and sampling defaults, which is how a served student knows when to stop.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs
import torch
from torch import nn
from transformers import GenerationConfig

from raystill.base.run_folder import STUDENT, RunFolder
from raystill.config.run import RunConfig
from raystill.train.student.build import DTYPES
from raystill.train.student.sharding import whole

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Sampling(Protocol):
    """The teacher's resolved sampling (serve/sampling.py), as far as the student inherits it."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every floating-point weight, in place, the value it has in ``dtype``.

    Evaluating after this measures the model as it is exported, not the one before rounding.
    """
    for tensor in model.state_dict().values():  # Derived buffers (rotary tables) are not in it.
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


def exported_state(model: nn.Module, dtype: torch.dtype, keep: bool) -> dict[str, torch.Tensor]:
    """The state dict on the host in ``dtype``, gathered where it is sharded; collective then.

    Tensors that are one in the model still are. keep: whether this rank wants it; else empty.
    """
    converted: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in converted:
            gathered = whole(tensor.detach())
            if not keep:
                gathered = gathered.new_empty(0)
            target = dtype if gathered.is_floating_point() else gathered.dtype
            converted[id(tensor)] = gathered.to("cpu", target)
        if keep:
            state[name] = converted[id(tensor)]
    return state


def save_student(
    model: nn.Module,
    folder: str | Path,
    config: RunConfig,
    teacher_folder: str,
    sampling: Sampling,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write ``model`` as a Hugging Face folder; an older one there is replaced only when whole.

    state: its ``exported_state``, which a sharded model's ranks have gathered before.
    """
    if state is None:
        state = exported_state(model, DTYPES[config.training.export_dtype], keep=True)
    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    exported: Any = model
    kept = exported.generation_config
    exported.generation_config = GenerationConfig()  # The file is written below.
    try:
        exported.save_pretrained(part, state_dict=state)
    finally:
        exported.generation_config = kept
    _describe_weights(part / "config.json", config.training.export_dtype)
    for name in TOKENIZER_FILES:
        source = Path(teacher_folder) / name
        if source.exists():
            shutil.copyfile(source, part / name)
    generation = generation_config(Path(teacher_folder), sampling)
    (part / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def export_student(
    model: nn.Module,
    run: RunFolder,
    config: RunConfig,
    teacher_folder: str,
    sampling: Sampling,
    *,
    first: bool = True,
) -> None:
    """``save_student`` into the run folder's ``student/``, also where that is an object store.

    Called on all ranks, since a sharded model is gathered; rank 0 (``first``) writes.
    """
    state = exported_state(model, DTYPES[config.training.export_dtype], first)
    if not first:
        return
    if run.local is not None:
        save_student(model, run.local / STUDENT, config, teacher_folder, sampling, state)
        return
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary) / STUDENT
        save_student(model, local, config, teacher_folder, sampling, state)
        filesystem, target = run.filesystem(), f"{run.root}/{STUDENT}"
        filesystem.create_dir(target, recursive=True)
        pafs.copy_files(str(local), target, destination_filesystem=filesystem)


def generation_config(teacher_folder: Path, sampling: Sampling) -> dict[str, Any]:
    """``generation_config.json`` of the student: the teacher's, with the sampling of this run.

    A length limit is left out: servers would apply it to every request.
    """
    path = teacher_folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "max_length"):
        settings.pop(name, None)
    settings["eos_token_id"] = list(sampling.stop_token_ids)
    settings["do_sample"] = sampling.temperature > 0
    if settings["do_sample"]:
        settings["temperature"] = sampling.temperature
        settings["top_p"] = sampling.top_p
        settings["top_k"] = max(0, sampling.top_k)
        if sampling.min_p > 0:
            settings["min_p"] = sampling.min_p
    return settings


def _describe_weights(path: Path, dtype: str) -> None:
    """Name the written precision in a ``config.json``, where transformers put the trained one."""
    settings = json.loads(path.read_text())
    for part in (settings, *(v for v in settings.values() if isinstance(v, dict))):
        if "dtype" in part or part is settings:
            part["dtype"] = dtype
    settings["use_cache"] = True
    path.write_text(json.dumps(settings, indent=2) + "\n")
