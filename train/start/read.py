"""Reads from the teacher's files only what a student with some of its layers keeps.

The kept layers' tensors get the numbers that they have in the student, and transformers loads them
into a model of the student's configuration: what it does with a family's names (joins experts,
renames, ties) it does as for the whole teacher. `build.build_student` calls this where the layers
are known before the weights are read.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from raystill.model.head import stored_tensors
from raystill.model.weights import INDEX, LAYER, layer_prefixes
from raystill.train.start.cut import keep_layers, layer_list

logger = logging.getLogger(__name__)


def read_layers(folder: str, layers: list[int]) -> Any | None:
    """The teacher in ``folder`` with these layers alone; None where it has to be read whole.

    The same as `keep_layers` of the whole teacher, bit for bit, and the same errors. None for
    quantised weights, for a folder of adapters, where the files do not say which tensors are a
    decoder layer's, and where they lack a tensor, or have one that the model does not know.
    """
    config = AutoConfig.from_pretrained(folder)
    files = _files_of(Path(folder))
    quantised = getattr(config, "quantization_config", None) is not None
    if files is None or quantised or config.dtype is None:
        return None
    num_layers = config.get_text_config().num_hidden_layers
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            outline: Any = AutoModelForCausalLM.from_config(config)
        owner, leaf, _ = layer_list(outline)
        path = next(name for name, module in outline.named_modules() if module is owner)
        before = _layers_prefix(files, f"{path}.{leaf}.".removeprefix("."), num_layers)
        keep_layers(outline, layers)
        if before is None or len(set(layers)) == num_layers:
            return None
        model = _load(outline, folder, _renumbered(files, before, layers))
    if model is not None:
        _part_copies(layer_list(model)[2], layers)
    return model


def _files_of(folder: Path) -> dict[str, Path] | None:
    """The file of each tensor; None where transformers would choose the files in another way."""
    whole, index = (folder / "model.safetensors").exists(), (folder / INDEX).exists()
    if whole == index or (folder / "adapter_config.json").exists():
        return None
    return stored_tensors(folder)


def _layers_prefix(files: dict[str, Path], own: str, num_layers: int) -> str | None:
    """What the names of the decoder layers' tensors begin with; None where that is not certain.

    own: what they begin with in the model.
    """
    possible = layer_prefixes(files, num_layers)
    if own in possible:
        return own
    return possible[0] if len(possible) == 1 else None


def _renumbered(files: dict[str, Path], before: str, layers: list[int]) -> dict[str, Any]:
    """The tensors that are kept, not read yet, by the names that a folder of the student has."""
    places: dict[int, list[int]] = {}
    for place, layer in enumerate(layers):
        places.setdefault(layer, []).append(place)
    opened: dict[Path, Any] = {}
    kept: dict[str, Any] = {}
    for name, file in files.items():
        found = LAYER.fullmatch(name)
        if found is not None and found[1] == before:
            new = [f"{before}{place}{found[3]}" for place in places.get(int(found[2]), [])]
        else:
            new = [name]
        for one in new:
            if file not in opened:
                opened[file] = safe_open(file, framework="pt")
            kept[one] = opened[file].get_slice(name)
    return kept


def _load(outline: Any, folder: str, tensors: dict[str, Any]) -> Any | None:
    """A model like ``outline`` with these tensors; None unless each has its place, and all come."""
    model, report = type(outline).from_pretrained(
        None,
        config=outline.config,
        state_dict=tensors,
        dtype="auto",
        output_loading_info=True,
    )
    if wrong := [name for names in report.values() for name in names]:
        logger.info("reads the whole teacher, since %s does not match by name", wrong[0])
        return None
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:  # There is none; as transformers does for a whole folder.
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
    for part in (model.config, *model.modules()):
        if getattr(part, "name_or_path", None) == "None":  # What a state of no folder has.
            part.name_or_path = folder
    return model


def _part_copies(blocks: Any, layers: list[int]) -> None:
    """Gives a layer that is kept twice weights of its own: tensors of one file share its pages."""
    for place, layer in enumerate(layers):
        if layer in layers[:place]:
            for tensor in (*blocks[place].parameters(), *blocks[place].buffers()):
                tensor.data = tensor.data.clone()
