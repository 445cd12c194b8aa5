"""FSDP2: parameters, gradients and optimizer state of the student spread over its workers.

`worker` places the student through here before the optimizer is made; where `training.strategy` is
fsdp, step, checkpoint and export then see DTensors where they saw tensors. A decoder layer is
gathered when its forward or backward pass needs it and freed after it. What is outside the layers
(embeddings, final norm, output head) is the root's: gathered once a micro-batch, before the forward
pass, and kept until the backward pass has ended. So `head_loss` multiplies with a plain tensor,
and the head's gradient is reduced like any other.

Precision. A layer is gathered in the compute precision: autocast would round its matrices to it
anyway, and half as much travels. The root is gathered as it is, so that the residual stream and the
head's gradient are in float32 as they are without sharding. Every gradient is added up over the
ranks in the precision of the parameters, at every pass, and *averaged*, as DDP does. Adding up
unreduced gradients over the passes of a step would save traffic, but takes a whole copy of the
gradients on every worker, which is what sharding is to avoid.

Waits for: the other ranks, at every gathering, so all run equally many passes. Imports no Ray.

The tensors of a checkpoint, each in one piece or in one for each rank that holds a part of it.

A rank writes what it holds: a sharded tensor's rows, and on the first rank whatever every rank has
whole. It reads what it will hold, whatever the files were cut into: row ranges are intersected. So
a checkpoint of N workers is read by M, of ddp by fsdp and the other way round, and nobody ever has
more in memory than its own part.

Files are safetensors (numbers only, nothing that is executed), named ``<kind>-<rank + 1>-of-<n>``.
Their header says where each piece begins as PyTorch's distributed checkpoints (DCP) do, so that
`torch.distributed.checkpoint.HuggingFaceStorageReader` reads them too.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from raystill.config.objective import ObjectiveConfig
from raystill.config.training import TrainingConfig
from raystill.train.batch.batch import dummy_micro_batch
from raystill.train.student.attention import use_attention, use_packing, wants_packing
from raystill.train.student.build import layer_list
from raystill.train.student.module import StudentModule, resolve_compute_dtype

logger = logging.getLogger(__name__)


def place_student(
    model: nn.Module, training: TrainingConfig, device: torch.device, world_size: int
) -> StudentModule:
    """The student in training mode on its device: whole, or this worker's part; collective then.

    One worker has nobody to share with, and trains the whole under both strategies.
    """
    dtype = resolve_compute_dtype(training.compute_dtype, device, training.param_dtype)
    sharded = training.strategy == "fsdp" and world_size > 1
    placed = model if sharded else model.to(device)
    student = StudentModule(placed, dtype, training.activation_checkpointing).train()
    attention = use_attention(training.attention, model, device, dtype)
    if sharded:
        shard_student(student, device, world_size)
    if wants_packing(training.packing, attention):
        with whole_weights(student):
            student.packed = use_packing(training.packing, student, attention, device)
    logger.info("attention: %s; rows %s", attention, "packed" if student.packed else "padded")
    return student


def shard_student(student: StudentModule, device: torch.device, world_size: int) -> None:
    """Spread ``student`` over the process group, in place; collective.

    It may be on the host: one layer at a time is whole on the device, then cut.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    root = MixedPrecisionPolicy(cast_forward_inputs=False)
    layer_policy = root
    if student.compute_dtype != student.param_dtype:
        layer_policy = MixedPrecisionPolicy(
            student.compute_dtype, reduce_dtype=student.param_dtype, cast_forward_inputs=False
        )
    for layer in layer_list(student.model)[2]:
        fully_shard(layer, mesh=mesh, mp_policy=layer_policy)
    fully_shard(student, mesh=mesh, mp_policy=root, reshard_after_forward=False)
    # FSDP takes what is called first for the root, and measuring enters below it.
    with torch.no_grad():
        student(dummy_micro_batch("text").to(device), ObjectiveConfig(cross_entropy=1.0))
    _parts(student)[0].reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether ``module``, or a part of it, is spread over the workers."""
    return bool(_parts(module))


@contextmanager
def whole_weights(module: StudentModule) -> Iterator[None]:
    """Within it every rank has all weights and may run any number of passes; collective.

    For measuring, where ranks generate answers of different lengths. Takes the memory of all
    weights, layers in the compute precision. Nothing to do for a module that is not sharded.
    """
    parts = _parts(module)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for index, part in enumerate(parts):
            part.reshard()
            part.set_reshard_after_forward(index > 0, recurse=False)
        if parts:
            # FSDP fetches ahead by the order of past passes, which here were each rank's own: its
            # next backward pass would gather on some ranks what others do not.
            parts[0].reset_iter_state()


def _parts(module: nn.Module) -> list[FSDPModule]:
    """What is gathered together: the root first, then the layers."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` gathered from all ranks where it is spread over them; collective then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
