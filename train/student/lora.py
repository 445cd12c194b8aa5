"""LoRA: adapters beside the frozen weights of the student, through ``peft``.

The worker calls `attach` after `build.build_student` and before `sharding.place_student`. From then
on the adapters, and the modules of ``student.lora.modules_to_save``, are the only parameters with
gradients: the optimizer, the checkpoints (`trained_tensors`) and DDP see nothing else. Everybody
else sees a plain model through `plain_state`, in which the adapters are added to the weights:

    W' = W + (alpha / rank) B A      W [out, in], A [rank, in], B [out, rank]

Dtypes. The adapters are in ``training.param_dtype``. The sum is in the wider of both dtypes, and is
rounded once. Imports peft only where a student gets adapters: its import takes seconds.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raystill.base.errors import RunError
from raystill.config.run import RunConfig
from raystill.config.student import LoraConfig
from raystill.model.adapters import (
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    lora_problems,
    names,
)
from raystill.train.start.precision import cast_weights
from raystill.train.student.build import DTYPES, freeze_unreached
from raystill.train.student.module import resolve_compute_dtype
from raystill.train.student.sharding import own_rows, whole

ADAPTER = "default"
"""peft's name of the only adapter."""
PREFIX = "base_model.model."
"""With which the names of tensors begin in an adapter's file."""
HALF = (torch.bfloat16, torch.float16)


def attach(model: Any, config: RunConfig, device: torch.device) -> None:
    """Gives ``model`` adapters that change nothing yet, in place, and freezes all else.

    device: on which it will be trained; it decides the dtype of the frozen weights. Does nothing
    without ``student.lora``. Raises RunError where it
    names modules that the model lacks.
    """
    lora = config.student.lora
    if lora is None:
        return
    cast_weights(model, base_dtype(model.dtype, lora, config, device))
    model.base_identity = base_identity(model)  # Before peft renames the modules.
    torch.manual_seed(config.section_seeds()["student"])  # Whatever loading has drawn.
    inject(model, lora, DTYPES[config.training.weights_dtype])


def base_dtype(
    own: torch.dtype, lora: LoraConfig, config: RunConfig, device: torch.device
) -> torch.dtype:
    """The dtype of the frozen weights, whose files are in ``own``; see ``student.lora.base_dtype``.

    A 16-bit weight in a float32 product would be converted at every step.
    """
    training = config.training
    if training.param_dtype == "float64":
        return torch.float64
    if lora.base_dtype != "auto":
        return DTYPES[lora.base_dtype]
    compute = resolve_compute_dtype(training.compute_dtype, device, training.weights_dtype)
    return compute if own in HALF else own


def inject(model: Any, lora: LoraConfig, dtype: torch.dtype) -> None:
    """Gives ``model`` its adapters, trained in ``dtype``. Raises RunError as `attach` does."""
    peft = _peft()
    linear = {n: (m.out_features, m.in_features) for n, m in _linear_modules(model).items()}
    modules = {n for n, m in model.named_modules() if getattr(m, "weight", None) is not None}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    problems = list(lora_problems(type(model).__name__, lora, linear, modules, tied))
    if problems:
        raise RunError("; ".join(f"student.lora.{field} {text}" for field, text in problems))
    saved = [n for n in sorted(modules) if any(names(s, n) for s in lora.modules_to_save)]
    chosen = lora.target_modules
    targets = [
        n for n in linear if chosen == "all-linear" or any(names(target, n) for target in chosen)
    ]
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[n for n in targets if n not in saved],
        modules_to_save=saved or None,
        task_type="CAUSAL_LM",
    )
    peft.inject_adapter_in_model(settings, model)
    freeze_unreached(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _peft() -> Any:
    """The package. Raises RunError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise RunError(
            f"student.lora needs the package peft, which cannot be imported here ({error}); "
            "install it on all nodes with student workers (pip install 'raystill[lora]')"
        ) from error
    return peft


def _linear_modules(model: Any) -> dict[str, nn.Linear]:
    """The linear modules of the text decoder, by their names in the model."""
    inside = {id(m) for m in model.get_decoder().modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    }


def has_adapters(model: nn.Module) -> bool:
    """Whether `attach` has given this model adapters."""
    return hasattr(model, "peft_config")


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model with adapters that training changes, by their names in the model."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def base_identity(model: nn.Module) -> str:
    """A sha256 over the names, dtypes, shapes and numbers of a model's weights, before `inject`."""

    def digest(entry: tuple[str, Tensor]) -> list[Any]:
        name, tensor = entry
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(numbers).hexdigest()]

    with ThreadPoolExecutor(4) as threads:  # hashlib lets other threads run.
        digests = list(threads.map(digest, sorted(model.state_dict().items())))
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def identity_of_base(model: Any) -> str:
    """`base_identity` of the weights that `attach` has frozen; empty for a model without adapters.

    It stays what it was when the files were read: `merge` changes the weights.
    """
    return str(getattr(model, "base_identity", ""))


def dtype_of_base(model: nn.Module) -> str:
    """Name of the dtype of the weights that `attach` has frozen; it is part of their identity."""
    frozen = {
        str(p.dtype).removeprefix("torch.") for p in model.parameters() if not p.requires_grad
    }
    return " and ".join(sorted(frozen))


def require_same_base(identities: list[str] | None) -> None:
    """Raises RunError where the ranks have frozen different weights; None: another rank looks."""
    if identities and len(set(identities)) > 1:
        other = next(rank for rank, one in enumerate(identities) if one != identities[0])
        raise RunError(
            f"the student's frozen weights differ between the workers: worker 0 has the identity "
            f"{identities[0]}, worker {other} has {identities[other]}; give all nodes the same "
            "files, or name the model by its Hugging Face id and a revision; where devices differ, "
            "also name student.lora.base_dtype, which auto chooses by the device"
        )


def plain_state(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The state of a model as it is without peft: name, tensor, and what the adapter adds to it.

    The tensor may be a shard; what is added is whole, and all ranks of a sharded model must iterate
    together. Of a model without adapters: its state dict. Tied tensors are the same object.
    """
    state = model.state_dict(keep_vars=True)
    layers = dict(_lora_layers(model)) if has_adapters(model) else {}
    for name, tensor in state.items():
        plain = plain_name(name)
        if plain is None:
            continue
        module = name.removesuffix(".base_layer.weight")
        added = delta(layers[module]) if name != module and module in layers else None
        yield plain, tensor, added


def plain_name(name: str) -> str | None:
    """The name that a tensor has in a model without peft; None: it is an adapter's, or replaced."""
    if ".lora_" in name or ".original_module." in name:
        return None
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")


@torch.no_grad()
def delta(layer: Any) -> Tensor:
    """What the adapter adds to the weight of a layer, [out, in], in the adapter's dtype. Collective
    for a sharded model.
    """
    a, b = (whole(side[ADAPTER].weight) for side in (layer.lora_A, layer.lora_B))
    return (b @ a).mul_(layer.scaling[ADAPTER])


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds the adapters to the frozen weights, in place, and sets them to change nothing further.

    The sums are rounded to the weights' own dtype; `export.state_before_merging` has them as they
    are where the model is exported in a wider one. Does nothing to a model without adapters.
    Collective for a sharded model.
    """
    if not has_adapters(model):
        return
    for _, layer in _lora_layers(model):
        weight, added = layer.get_base_layer().weight, delta(layer)
        local, start = own_rows(weight)
        # On the host where shards are there (cpu_offload), while the sum is on the device.
        mine = added[start : start + len(local)].to(local.device)
        local.copy_(local + mine)
        layer.lora_B[ADAPTER].weight.zero_()


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules with an adapter, by their names in the model."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def adapter_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The adapter's tensors on the host by their names in PEFT's file.

    Those of a sharded model are gathered: all its ranks must call this. keep: whether this rank
    needs the result; the others get an empty one.
    """
    state = {}
    for name, tensor in trained_tensors(model).items():
        gathered = whole(tensor)
        if keep:
            plain = name.replace(f".modules_to_save.{ADAPTER}.", ".")
            state[PREFIX + plain.replace(f".{ADAPTER}.", ".")] = gathered.to("cpu", copy=True)
    return state


@torch.no_grad()
def base_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The frozen weights on the host, in their own dtype, by their names in a model without peft.

    All ranks of a sharded model must call this. keep: as in `adapter_state`.
    """
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}  # Tied tensors stay tied.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        if id(tensor) not in copies:
            gathered = whole(tensor.detach())
            copies[id(tensor)] = gathered.to("cpu") if keep else gathered.new_empty(0)
        if keep:
            plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            state[plain] = copies[id(tensor)]
    return state


def save_adapter(
    model: Any, state: dict[str, Tensor], folder: Path, base: str, revision: str | None = None
) -> None:
    """Writes the adapter as a folder that peft and vLLM load.

    A folder that is there already is replaced when the new one is complete. state:
    `adapter_state`. base: folder or Hub id of the model that it belongs to.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    settings = model.peft_config[ADAPTER]
    written = settings.to_dict() | {
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "target_modules": sorted(settings.target_modules),
    }
    text = json.dumps(written, indent=2, sort_keys=True, default=str) + "\n"
    (part / ADAPTER_SETTINGS).write_text(text)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, part / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
