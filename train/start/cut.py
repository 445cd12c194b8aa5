"""Cuts a model down to some of its decoder layers, in place, with a configuration that fits."""

import copy
from typing import Any

import torch
from torch import nn

PER_LAYER_FIELDS = ("layer_types", "no_rope_layers", "layers_block_type", "mlp_layer_types")
"""Fields of a model's configuration that have one entry for each layer."""
LAYER_NUMBER_FIELDS = (
    "mlp_only_layers",
    "moe_layers",
    "no_rope_layer_indices",
    "first_k_dense_replace",
    "decoder_sparse_step",
)
"""Fields of a model's configuration that say by their numbers which layers are of a kind."""
KEEP_OTHERS = (
    "keep other layers (student.layers), such as all of the first ones in their order, or set "
    "student.init: model"
)


def keep_layers(model: nn.Module, layers: list[int]) -> None:
    """Cuts ``model`` down to these decoder layers, in this order, in place.

    A layer that is named twice is copied. The number of layers and the fields of the configuration
    that are about single layers change with it, and so does the index that each layer has of
    itself, since the key-value cache is addressed by that index. Raises ValueError where no such
    configuration describes these layers.
    """
    text: Any = model.config.get_text_config()
    num_layers = text.num_hidden_layers
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise ValueError(
            f"student.layers names {outside}, but the teacher has layers 0 to {num_layers - 1}; "
            "name layers of the teacher"
        )
    owner, name, old = layer_list(model)
    kept = []
    for index, layer in enumerate(layers):
        block = old[layer] if layer not in layers[:index] else copy.deepcopy(old[layer])
        for part in block.modules():
            if getattr(part, "layer_idx", None) is not None:  # Some are made without one.
                part.layer_idx = index
        kept.append(block)
    setattr(owner, name, nn.ModuleList(kept))
    _describe_layers(text, layers)
    require_described(model)


def _describe_layers(text: Any, layers: list[int]) -> None:
    """Changes the configuration of a model of which these layers are kept, in place.

    Raises ValueError where it works out a layer's kind by the layer's number, as another one.
    """
    derived: dict[str, list[Any]] = {}
    for field in PER_LAYER_FIELDS:
        value = getattr(text, field, None)
        if isinstance(value, list | tuple) and len(value) == text.num_hidden_layers:
            kept = [value[layer] for layer in layers]
            try:
                setattr(text, field, kept)
            except AttributeError:  # A property without a setter.
                derived[field] = kept
    step = getattr(text, "decoder_sparse_step", None)
    if isinstance(step, int) and step > 1 and hasattr(text, "mlp_only_layers"):
        # Every step-th layer has experts. The kept ones need not be evenly spaced: name the others.
        dense = [layer for layer in range(text.num_hidden_layers) if (layer + 1) % step]
        text.mlp_only_layers = sorted({*(text.mlp_only_layers or ()), *dense})
        text.decoder_sparse_step = 1
    for field in LAYER_NUMBER_FIELDS:
        value = getattr(text, field, None)
        if isinstance(value, list | tuple):
            setattr(text, field, [i for i, layer in enumerate(layers) if layer in value])
    num_dense = getattr(text, "first_k_dense_replace", None)
    if isinstance(num_dense, int):
        text.first_k_dense_replace = sum(layer < num_dense for layer in layers)
    text.num_hidden_layers = len(layers)
    for field, kept in derived.items():
        if (by_number := list(getattr(text, field))) != kept:
            raise ValueError(
                f"no {type(text).__name__} describes these layers: {field} would be {kept}, but it "
                f"works out {by_number} from their numbers; {KEEP_OTHERS}"
            )


def require_described(model: nn.Module) -> None:
    """Raises ValueError where the configuration describes another model than this one.

    Such a model would be exported and load again, with some weights missing, as another one.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        described = type(model)(copy.deepcopy(model.config))
    differences = [
        f"{name}: {here.get(name, 'nothing')}, by its configuration {there.get(name, 'nothing')}"
        for here, there in zip(_details(model), _details(described), strict=True)
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    ]
    if differences:
        raise ValueError(
            f"no configuration of {type(model).__name__} describes these layers: "
            f"{'; '.join(differences[:3])} ({len(differences)} differences); {KEEP_OTHERS}"
        )


def _details(model: nn.Module) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """The shape of each tensor of a model, and the settings of each module of its layers."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    settings = {
        f"layer {name}.{key}": value
        for name, module in layer_list(model)[2].named_modules()
        for key, value in vars(module).items()
        if key != "training" and not key.startswith("_")
        if isinstance(value, bool | int | float | str | None)
    }
    return shapes, settings


def layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of the model's decoder layers: the module that owns it, its name there, the list.

    Raises ValueError where there is none, or more than one.
    """
    config: Any = model.config
    num_layers = config.get_text_config().num_hidden_layers
    lists = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and name in ("layers", "h", "blocks")
        if len(child) == num_layers
    ]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(lists)} lists of {num_layers} layers; expected one, "
            "which student.init: from_teacher and training.strategy: fsdp need; save the student "
            "as a model folder, and set student.init: model and training.strategy: ddp"
        )
    return lists[0]
