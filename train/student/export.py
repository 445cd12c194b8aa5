"""The trained student as a folder that ``transformers`` and vLLM load.

It holds the weights in ``training.export_dtype``, the teacher's tokenizer and chat template, and a
generation configuration with the teacher's stop ids and sampling defaults: a served student reads
there when to stop. The worker calls ``round_weights`` before the last evaluation, and
``export_student`` after it; before both ``export_adapter``, where only adapters were trained.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch
from torch import nn
from transformers import GenerationConfig

from raystill.base.run_folder import ADAPTER, BASE, STUDENT, RunFolder
from raystill.model.sampling import ResolvedSampling
from raystill.train.student import lora
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
"""What makes up a tokenizer; those of these that the teacher has are copied."""
SPECIAL_IDS = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
"""Fields of the teacher's generation configuration that the student's has too."""
SAMPLING_FIELDS = frozenset(
    {
        *("do_sample", "temperature", "top_p", "top_k", "min_p", "eos_token_id"),
        *("max_new_tokens", "max_length", "transformers_version", "_from_model_config"),
    }
)
"""Fields that this run sets in their place, or that are about the file alone."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportSettings:
    """What a student is written with, beside its weights.

    Attributes:
        dtype: Name of the weights' dtype, ``training.export_dtype``.
        teacher_folder: The teacher's folder on this node: tokenizer and generation configuration.
        sampling: The teacher's sampling: defaults and stop ids of the student.
    """

    dtype: str
    teacher_folder: str
    sampling: ResolvedSampling


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to: a folder or Hub id, and its revision on the Hub.

    name: None where it is a part of the teacher that is in no folder.
    """

    name: str | None
    revision: str | None = None


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds every floating-point weight to ``dtype``, in place; the weights keep their own dtype.

    An evaluation after this measures the model as it is exported.
    """
    # Not `parameters()` and `buffers()`: the state dict leaves out derived buffers, such as rotary
    # tables, which a loaded model computes anew and does not round.
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


def exported_state(model: nn.Module, dtype: torch.dtype, keep: bool) -> dict[str, torch.Tensor]:
    """The model's state dict on the host in ``dtype``; of a sharded model, gathered.

    Adapters are added to the weights that they belong to, and the sum is rounded once.

    All ranks of a sharded model must call this. keep: whether this rank needs the result; the
    others get an empty one. Tensors that the model shares are shared in the result.
    """
    converted: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor, added in lora.plain_state(model):
        if id(tensor) not in converted:
            gathered = whole(tensor.detach())
            if added is not None:
                gathered = gathered + added
            if not keep:
                gathered = gathered.new_empty(0)  # Frees the whole tensor before the next one.
            target = dtype if gathered.is_floating_point() else gathered.dtype
            converted[id(tensor)] = gathered.to("cpu", target)
        if keep:
            state[name] = converted[id(tensor)]
    return state


def state_before_merging(
    model: nn.Module, dtype: torch.dtype, keep: bool
) -> dict[str, torch.Tensor] | None:
    """The `exported_state`, where `lora.merge` would round more than it; None: it would not.

    It does where adapters belong to frozen weights that are narrower than ``dtype``: merging in
    place leaves them in their own. Collective, as `exported_state` is.
    """
    if not lora.has_adapters(model):
        return None
    frozen = [p.dtype for p in model.parameters() if not p.requires_grad]
    if all(torch.promote_types(own, dtype) == own for own in frozen):
        return None
    return exported_state(model, dtype, keep)


def save_student(
    model: nn.Module,
    folder: str | Path,
    settings: ExportSettings,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes ``model`` as a Hugging Face folder.

    A folder that is there already is replaced when the new one is complete. state: the model's
    ``exported_state``, needed for a sharded model; None: computed here.
    """
    if state is None:
        state = exported_state(model, DTYPES[settings.dtype], keep=True)
    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    exported: Any = model
    own_generation = exported.generation_config
    # An empty one: `save_pretrained` would write, and check, the settings that training ignores.
    exported.generation_config = GenerationConfig()
    try:
        exported.save_pretrained(part, state_dict=state)
    finally:
        exported.generation_config = own_generation
    _describe_weights(part / "config.json", settings.dtype)
    for name in TOKENIZER_FILES:
        source = Path(settings.teacher_folder) / name
        if source.exists():
            shutil.copyfile(source, part / name)
    generation = generation_config(Path(settings.teacher_folder), settings.sampling)
    (part / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    # If the process ends between these two, the new student is complete in `part`.
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def export_student(
    model: nn.Module,
    run: RunFolder,
    settings: ExportSettings,
    *,
    state: dict[str, torch.Tensor] | None = None,
    first: bool = True,
) -> None:
    """Writes the student to ``student/`` of the run folder, which may be in an object store.

    All ranks must call this, since a sharded model is gathered. state: `state_before_merging`;
    None: the model's state of now. first: whether this is rank 0, which alone writes.
    """
    if state is None:
        state = exported_state(model, DTYPES[settings.dtype], first)
    if first:
        _leave(run, STUDENT, lambda folder: save_student(model, folder, settings, state))


def export_adapter(
    model: nn.Module, run: RunFolder, settings: ExportSettings, base: Base, *, first: bool = True
) -> None:
    """Writes the student's adapter to ``adapter/`` of the run folder, in PEFT's format.

    Where the weights that it belongs to are those of no folder, they are written too, to ``base/``,
    in their own dtype. All ranks must call this, before `lora.merge`. first: whether this is rank
    0, which alone writes. Does nothing to a student without adapters.
    """
    if not lora.has_adapters(model):
        return
    adapter = lora.adapter_state(model, first)
    name, revision = base.name, base.revision
    if name is None:
        weights = lora.base_state(model, first)
        name = run.join(BASE)
        if first:
            dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
            own = replace(settings, dtype=dtype)
            _leave(run, BASE, lambda folder: save_student(model, folder, own, weights))
    if first:
        write = partial(lora.save_adapter, model, adapter, base=name, revision=revision)
        _leave(run, ADAPTER, write)


def _leave(run: RunFolder, name: str, save: Callable[[Path], None]) -> None:
    """Saves a folder as ``name`` of the run folder, which may be in an object store."""
    if run.local is not None:
        save(run.local / name)
        return
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary) / name
        save(local)
        filesystem, target = run.filesystem(), f"{run.root}/{name}"
        filesystem.create_dir(target, recursive=True)
        pafs.copy_files(str(local), target, destination_filesystem=filesystem)


def generation_config(teacher_folder: Path, sampling: ResolvedSampling) -> dict[str, Any]:
    """The contents of the student's ``generation_config.json``: the sampling and the stop ids of
    this run, and the teacher's other special ids.

    All else of the teacher's own file is left out, and named in the log: the student has learned
    from answers without its penalties, and servers would apply a length limit to every request.
    """
    path = teacher_folder / "generation_config.json"
    theirs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    settings = {name: theirs[name] for name in SPECIAL_IDS if name in theirs}
    left_out = sorted(theirs.keys() - settings.keys() - SAMPLING_FIELDS)
    if left_out:
        named = ", ".join(f"{name} {theirs[name]!r}" for name in left_out)
        logger.info("left out of the student's generation_config.json: %s", named)
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
    """Writes the exported dtype into ``config.json``, where transformers put the trained one.

    Also allows the key-value cache again, which was off during training.
    """
    settings = json.loads(path.read_text())
    for part in (settings, *(v for v in settings.values() if isinstance(v, dict))):
        if "dtype" in part or part is settings:
            part["dtype"] = dtype
    settings["use_cache"] = True
    path.write_text(json.dumps(settings, indent=2) + "\n")
