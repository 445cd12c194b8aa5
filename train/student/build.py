"""The student as a Hugging Face model: made before training, saved after it.

``build_student`` loads a model, or keeps some layers of the teacher. ``save_student`` writes the
finished model as a folder that ``transformers`` and vLLM load: weights in the export precision,
the teacher's tokenizer and chat template, and a generation configuration with the teacher's stop
ids and sampling defaults, which is how a served student knows when to stop.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from raystill.config.run import RunConfig

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Configuration fields with one entry for each layer, and those that list layer numbers.
PER_LAYER_FIELDS = ("layer_types", "no_rope_layers", "layers_block_type", "mlp_layer_types")
LAYER_NUMBER_FIELDS = ("mlp_only_layers", "no_rope_layer_indices")


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
        keep_layers(model, student.kept_layers(model.config.get_text_config().num_hidden_layers))
    model.to(DTYPES[config.training.param_dtype])
    model.config.use_cache = False
    return model


def keep_layers(model: nn.Module, layers: list[int]) -> None:
    """Cut ``model`` to these decoder layers, in this order; a layer named twice is copied.

    The configuration's layer count and per-layer lists follow, and each layer's own index: the
    key-value cache is addressed by it.
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


def num_classes(model: nn.Module, teacher_folder: str) -> int:
    """V: ids that the student's head scores and the tokenizer names; all others are tail."""
    head = int(model.get_output_embeddings().weight.shape[0])
    tokenizer = Path(teacher_folder) / "tokenizer.json"
    if not tokenizer.exists():
        return head
    named = Tokenizer.from_file(str(tokenizer)).get_vocab(with_added_tokens=True)
    return min(head, max(named.values()) + 1)
