"""The untrained student as a Hugging Face model: loaded as it is, or a part of the teacher.

The worker calls ``build_student`` on every rank before `sharding.place_student` puts the model on
its device. ``num_classes`` says which ids the student and the teacher are compared on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from raystill.config.run import RunConfig
from raystill.train.start.precision import cast_weights
from raystill.train.start.read import read_layers
from raystill.train.start.shape import Shape

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def build_student(
    config: RunConfig,
    teacher_folder: str,
    seed: int,
    choose: Callable[[nn.Module], Shape] | None = None,
    known: Shape | None = None,
    rest: Callable[[], str] | None = None,
) -> nn.Module:
    """The untrained student on the CPU, in the dtype it is trained in; the same on every rank.

    With ``student.lora`` it is in the dtype of its files, and has no adapters yet (`lora.attach`).

    teacher_folder: on this node. seed: for weights that the source model does not have. choose:
    what to keep of the whole teacher, where the run file leaves it to the run; known: what it has
    chosen before. rest: brings the teacher's other files too, where the folder has only what is
    kept, and they are needed after all. Raises ValueError where a layer that the teacher does not
    have is to be kept, or a width that it cannot have.
    """
    student = config.student
    own_code = student.trust_remote_code
    torch.manual_seed(seed)
    if student.init == "from_teacher":
        own_code = own_code or config.teacher.trust_remote_code
        model = _from_teacher(config, teacher_folder, own_code, choose, known, rest)
    else:
        model = _read_whole(student.model, own_code, student.revision)
    if student.lora is None:
        cast_weights(model, DTYPES[config.training.weights_dtype])
    model.config.use_cache = False  # Training reads each sequence once.
    freeze_unreached(model)
    return model


def _from_teacher(
    config: RunConfig,
    folder: str,
    own_code: bool,
    choose: Callable[[nn.Module], Shape] | None,
    known: Shape | None,
    rest: Callable[[], str] | None,
) -> Any:
    """What the student keeps of the teacher: read alone where it is known before."""
    student = config.student
    if known is None and student.chosen_by_run:
        assert choose is not None, "the run file leaves the choice to whoever builds"
        teacher = _read_whole(folder, own_code)
        return choose(teacher).cut(teacher)
    if known is None:
        told: Any = AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
        known = Shape(student.kept_layers(told.get_text_config().num_hidden_layers))
    if not own_code and (model := read_layers(folder, known.layers)) is not None:
        return known.finish(model)
    return known.cut(_read_whole(rest() if rest else folder, own_code))


def _read_whole(source: str | None, own_code: bool, revision: str | None = None) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        source,
        revision=revision,
        dtype="auto",
        use_safetensors=True,  # Nothing is unpickled.
        trust_remote_code=own_code,
    )


@dataclass(frozen=True)
class Outline:
    """A model without its weights, by which another rank makes one that is just like it.

    kind: its class. parameters: shape, dtype and whether it is trained, by name. buffers: whole,
    also those that no file has, such as the frequencies of rotary positions.
    """

    kind: type[Any]
    config: Any
    generation_config: Any
    parameters: dict[str, tuple[torch.Size, torch.dtype, bool]]
    buffers: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: Any) -> "Outline":
        """The outline of a model on the host."""
        parts = {
            name: (one.shape, one.dtype, one.requires_grad)
            for name, one in model.named_parameters()
        }
        buffers = dict(model.named_buffers())
        return cls(type(model), model.config, model.generation_config, parts, buffers)

    def hollow(self) -> nn.Module:
        """A model of this outline whose parameters are zeros, in pages that nobody has touched."""
        with torch.device("meta"):
            model = self.kind(self.config)
        for name, (shape, dtype, trained) in self.parameters.items():
            size = math.prod(shape) * dtype.itemsize
            zeros = torch.from_numpy(np.zeros(size, np.uint8))  # torch.zeros would write them.
            _put(model, name, nn.Parameter(zeros.view(dtype).view(shape), requires_grad=trained))
        model.tie_weights()
        for name, buffer in self.buffers.items():
            _put(model, name, buffer)
        model.generation_config = self.generation_config
        hollow: nn.Module = model
        return hollow


def _put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def read_by_one_rank(config: RunConfig, world_size: int) -> bool:
    """Whether rank 0 alone reads the student, and the others get their shards from it.

    Not where each worker needs all of it, nor where its class is the model folder's own code or has
    adapters inside.
    """
    student = config.student
    own_code = student.trust_remote_code or config.teacher.trust_remote_code
    sharded = config.training.strategy == "fsdp" and world_size > 1
    return sharded and student.lora is None and not own_code


def freeze_unreached(model: nn.Module) -> None:
    """No gradients for what the text decoder and its head do not read, such as a vision tower.

    Rows are text. A parameter that waits for a gradient which never comes stops DDP, and has no
    moments that a checkpoint could hold.
    """
    whole: Any = model
    parts = (whole.get_decoder(), whole.get_input_embeddings(), whole.get_output_embeddings())
    reached = {id(p) for part in parts for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)


def num_classes(model: nn.Module, teacher_folder: str) -> int:
    """The number of ids that have a class of their own; all others are counted in the tail.

    An id has one if the student's head has a row for it and the tokenizer a token.
    """
    head = int(model.get_output_embeddings().weight.shape[0])
    tokenizer = Path(teacher_folder) / "tokenizer.json"
    if not tokenizer.exists():
        return head
    named = Tokenizer.from_file(str(tokenizer)).get_vocab(with_added_tokens=True)
    return min(head, max(named.values()) + 1)
