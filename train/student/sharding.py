"""FSDP2: parameters, gradients and optimizer state of the student, sharded over its workers.

The worker calls `place_student` before the optimizer is made. With ``training.strategy: fsdp``, the
step, the checkpoint and the export then see DTensors in place of tensors. A decoder layer is
gathered when its forward or backward pass needs it, and freed after it. Everything outside the
layers (embeddings, final norm, output head) belongs to the root: it is gathered once a micro-batch,
before the forward pass, and freed after the backward pass. So `head_loss` multiplies with a plain
tensor, and the gradient of the head is reduced like any other.

Dtypes. A layer is gathered in the compute dtype: autocast would round its matrices to it anyway,
and half as many bytes are sent. The root is gathered in the dtype of the parameters, so that the
residual stream and the gradient of the head are in float32, as they are without sharding. Gradients
are summed over the ranks in the dtype of the parameters, after every backward pass, and *averaged*,
as in DDP. Reducing only once a step would send less, but every worker would need a full copy of
the gradients, which sharding is there to avoid.

Waits for: the other ranks, whenever parameters are gathered or gradients reduced. So all ranks must
run equally many passes. Imports no Ray.
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
from raystill.train.student.cut import layer_list
from raystill.train.student.module import StudentModule, resolve_compute_dtype

logger = logging.getLogger(__name__)


def place_student(
    model: nn.Module, training: TrainingConfig, device: torch.device, world_size: int
) -> StudentModule:
    """The student in training mode on ``device``: all of it, or with FSDP this worker's shards.

    With FSDP all ranks must call this. A single worker is not sharded. Raises ValueError where the
    configured attention kernel or packing does not fit the model.
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
    """Shards ``student`` over the process group, in place. All ranks must call this.

    The student may be on the host, so that the device never holds all of it: one layer at a time is
    copied to the device and then sharded.
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
    # The module that is called first becomes FSDP's root, and measuring calls `model` inside. So a
    # dummy goes through the whole student now.
    with torch.no_grad():
        student(dummy_micro_batch("text").to(device), ObjectiveConfig(cross_entropy=1.0))
    _parts(student)[0].reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether ``module``, or a module inside it, is sharded."""
    return bool(_parts(module))


@contextmanager
def whole_weights(module: StudentModule) -> Iterator[None]:
    """A context in which every rank has all weights and may run any number of forward passes.

    It is for measuring, where the ranks generate answers of different lengths. All ranks must enter
    and leave it. It needs the memory of all weights, of layers in the compute dtype. Does nothing
    for a module that is not sharded.
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
            # FSDP gathers ahead in the order of past passes, which differed between the ranks here.
            # Without this the next backward pass would gather other layers on some ranks.
            parts[0].reset_iter_state()


def _parts(module: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters are gathered together: the root first, then the layers."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, gathered from all ranks if it is sharded; then all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
