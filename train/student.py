"""The student as a Hugging Face model: made before training, saved after it.

``build_student`` loads a model, or keeps some layers of the teacher. ``save_student`` writes the
finished model as a folder that ``transformers`` and vLLM load: weights in the export precision,
the teacher's tokenizer and chat template, and a generation configuration with the teacher's stop
ids and sampling defaults, which is how a served student knows when to stop.
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from raystill.cluster.config import RunConfig
from raystill.cluster.run_folder import STUDENT, RunFolder
from raystill.train.pieces import whole

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
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
# Configuration fields with one entry for each layer, and those that list layer numbers.
PER_LAYER_FIELDS = ("layer_types", "no_rope_layers", "layers_block_type", "mlp_layer_types")
LAYER_NUMBER_FIELDS = ("mlp_only_layers", "no_rope_layer_indices")


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


def build_student(config: RunConfig, teacher_folder: str, seed: int) -> nn.Module:
    """The untrained student in ``training.param_dtype`` on the CPU; equal on every rank.

    ``seed`` draws the weights that the source does not bring.
    """
    student = config.student
    torch.manual_seed(seed)
    from_teacher = student.init == "from_teacher"
    source = teacher_folder if from_teacher else student.model
    model = AutoModelForCausalLM.from_pretrained(
        source,
        revision=None if from_teacher else student.revision,
        dtype="auto",
        trust_remote_code=student.trust_remote_code
        or (from_teacher and config.teacher.trust_remote_code),
    )
    if from_teacher:
        keep_layers(model, kept_layers(config, model.config.get_text_config().num_hidden_layers))
    model.to(DTYPES[config.training.param_dtype])
    model.config.use_cache = False
    return model


def kept_layers(config: RunConfig, num_layers: int) -> list[int]:
    """Numbers of the teacher layers the student keeps, out of ``num_layers``, in order."""
    student = config.student
    if student.layer_stride is not None:
        return list(range(0, num_layers, student.layer_stride))
    layers = list(student.layers or ())
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise ValueError(
            f"student.layers names {outside}, but the teacher has layers 0 to {num_layers - 1}; "
            "name layers of the teacher"
        )
    return layers


def keep_layers(model: nn.Module, layers: list[int]) -> None:
    """Cut ``model`` to these decoder layers, in this order; a layer named twice is copied.

    The configuration's layer count and per-layer lists follow, and each layer's own index: the
    key-value cache is addressed by it.
    """
    text: Any = model.config.get_text_config()
    num_layers = text.num_hidden_layers
    owner, name, old = layer_list(model)
    kept = []
    for index, layer in enumerate(layers):
        block = old[layer] if layer not in layers[:index] else copy.deepcopy(old[layer])
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = index
        kept.append(block)
    setattr(owner, name, nn.ModuleList(kept))
    for field in PER_LAYER_FIELDS:
        value = getattr(text, field, None)
        if isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(text, field, [value[layer] for layer in layers])
    for field in LAYER_NUMBER_FIELDS:
        value = getattr(text, field, None)
        if isinstance(value, list | tuple):
            setattr(text, field, [i for i, layer in enumerate(layers) if layer in value])
    text.num_hidden_layers = len(layers)


def layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The one list of decoder layers: its owner, its name there, itself."""
    config: Any = model.config
    num_layers = config.get_text_config().num_hidden_layers
    found = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and name in ("layers", "h", "blocks")
        if len(child) == num_layers
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of {num_layers} layers where "
            "student.init: from_teacher and training.strategy: fsdp expect one; make the student "
            "as a folder of its own and use init: model with strategy: ddp"
        )
    return found[0]


def num_outcomes(model: nn.Module, teacher_folder: str) -> int:
    """V: ids that the student's head scores and the tokenizer names; all others are tail."""
    head = int(model.get_output_embeddings().weight.shape[0])
    tokenizer = Path(teacher_folder) / "tokenizer.json"
    if not tokenizer.exists():
        return head
    named = Tokenizer.from_file(str(tokenizer)).get_vocab(with_added_tokens=True)
    return min(head, max(named.values()) + 1)


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
