"""FSDP2: parameters, gradients and optimizer state of the student, sharded over its workers.

The worker calls `place_student` before the optimizer is made. With ``training.strategy: fsdp``, the
step, the checkpoint and the export then see DTensors in place of tensors. A decoder layer is
gathered when its forward or backward pass needs it, and freed after it. Everything outside the
layers (embeddings, final norm, output head) belongs to the root: it is gathered once a micro-batch,
before the forward pass, and freed after the backward pass. So `head_loss` multiplies with a plain
tensor, and the gradient of the head is reduced like any other.

Dtypes. A layer is gathered in the compute dtype: autocast would round its matrices to it anyway,
and half as many bytes are sent. So is the root where the residual stream is in the compute dtype
(``training.residual_dtype``), and there is no autocast. With a residual stream in float32 the root
is gathered in float32, and the gradient of the head is too, as without sharding. Gradients are
summed over the ranks in the dtype of the parameters, at least in float32, and *averaged*, as in
DDP: after every backward pass, or once a step (``training.reduce_gradients``), for which every rank
needs a full copy of the gradients.

``training.shard_group_size`` cuts the student over groups of ranks, each of which holds a copy
(HSDP): layers are gathered within a group only, and shards of gradients are summed over the groups
once a step. ``training.cpu_offload`` keeps the shards in host memory.

Waits for: the other ranks, whenever parameters are gathered or gradients reduced. So all ranks must
run equally many passes. Imports no Ray.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from raystill.config.objective import ObjectiveConfig
from raystill.config.training import TrainingConfig
from raystill.train.batch.batch import MicroBatch, dummy_micro_batch
from raystill.train.loss.log_probs import sum_dtype
from raystill.train.start.cut import layer_list
from raystill.train.student.attention import use_attention, use_packing, wants_packing
from raystill.train.student.module import StudentModule, resolve_compute_dtype
from raystill.train.student.norms import fuse_norms

logger = logging.getLogger(__name__)


def place_student(
    model: nn.Module,
    training: TrainingConfig,
    device: torch.device,
    world_size: int,
    from_first: bool = False,
) -> StudentModule:
    """The student in training mode on ``device``: all of it, or with FSDP this worker's shards.

    With FSDP all ranks must call this. A single worker is not sharded. from_first: the other ranks'
    models are hollow (`build.Outline`), they get their shards from rank 0. Raises ValueError where
    the configured attention kernel or packing does not fit the model.
    """
    dtype = resolve_compute_dtype(training.compute_dtype, device, training.weights_dtype)
    sharded = training.strategy == "fsdp" and world_size > 1
    placed = model if sharded else model.to(device)
    fused = fuse_norms(model, device)
    student = StudentModule(placed, dtype, training.activation_checkpointing).train()
    if training.narrow_residual(world_size):
        student.narrow_stream()
    dtype, compiled = student.compute_dtype, training.compile
    attention = use_attention(training.attention, model, device, dtype, compiled)
    if sharded:
        whole = {}  # Kept by nobody else: sharding frees a layer's weights as it goes.
        if from_first and dist.get_rank() == 0:
            whole = {name: one.detach() for name, one in student.named_parameters()}
        shard_student(student, device, world_size, training)
        if from_first:
            scatter_weights(student, whole, device)
    if wants_packing(training.packing, attention):
        with gathering_passes(student):
            student.packed = use_packing(training.packing, student, attention, device)
    rows = "packed" if student.packed else "padded"
    logger.info("attention: %s; rows %s; norms in one kernel: %d", attention, rows, fused)
    return student


def shard_student(
    student: StudentModule,
    device: torch.device,
    world_size: int,
    training: TrainingConfig | None = None,
) -> None:
    """Shards ``student`` over the process group, in place. All ranks must call this.

    training: over how many ranks, and where the shards are; None: over all, on the device.

    The student may be on the host, so that the device never holds all of it: one layer at a time is
    copied to the device and then sharded.
    """
    group = world_size if training is None else training.shard_group_size or world_size
    shape = (world_size // group, group) if group < world_size else (world_size,)
    # fully_shard wants names for two axes.
    names = ("copies", "shards")[-len(shape) :]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    offload = OffloadPolicy()
    if training is not None and training.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    # Gradients of many ranks are summed in float32 at least.
    wide = torch.float32 if student.param_dtype == torch.bfloat16 else None
    root = MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False)
    layer_policy = root
    if student.compute_dtype != student.param_dtype:
        layer_policy = MixedPrecisionPolicy(
            student.compute_dtype, reduce_dtype=student.param_dtype, cast_forward_inputs=False
        )
    if student.stream_dtype != student.param_dtype:
        root = layer_policy
    for layer in layer_list(student.model)[2]:
        fully_shard(layer, mesh=mesh, mp_policy=layer_policy, offload_policy=offload)
    fully_shard(
        student, mesh=mesh, mp_policy=root, offload_policy=offload, reshard_after_forward=False
    )
    # The module that is called first becomes FSDP's root, and measuring calls `model` inside. So a
    # dummy goes through the whole student now.
    with torch.no_grad():
        student(dummy_micro_batch("text").to(device), ObjectiveConfig(cross_entropy=1.0))
    _parts(student)[0].reshard()


@torch.no_grad()
def scatter_weights(student: StudentModule, whole: dict[str, Tensor], device: torch.device) -> None:
    """Give each rank its shards of rank 0's weights, one parameter after the other. Collective.

    whole: on rank 0, all parameters by their names in ``student``; the others need none. Each rank
    needs the device memory of the largest parameter.
    """
    for name, parameter in student.named_parameters():
        assert isinstance(parameter, DTensor), "all parameters of a sharded student are sharded"
        if whole:
            full = whole.pop(name).to(device)
        else:
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        shard = distribute_tensor(full, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(shard.to_local())


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


@contextmanager
def gathering_passes(module: StudentModule) -> Iterator[Callable[[MicroBatch], Tensor]]:
    """A context for forward passes without gradient that gather one layer after the other.

    Gives `StudentModule.hidden_states`, of which all ranks must run equally many passes, as of the
    model inside. Within the context ``module.head()`` is whole. All ranks must enter it; without
    shards it does nothing.
    """
    if not is_sharded(module):
        yield module.hidden_states
        return
    root = _parts(module)[0]
    register_fsdp_forward_method(module, "hidden_states")
    root.unshard()
    try:
        yield module.hidden_states
    finally:
        root.reshard()  # It would stay until a backward pass.
        root.reset_iter_state()
        del module.hidden_states  # Which refers to the module, and would keep it.


def room_for_whole(module: StudentModule, device: torch.device) -> bool:
    """Whether this rank's device has room for `whole_weights` now, and for as much again as a
    sixteenth of them. A host's memory is not looked at: true on a CPU, and without shards.
    """
    parts = _parts(module)
    if not parts or device.type != "cuda":
        return True
    numbers = sum(p.numel() for p in module.parameters())
    layers = sum(p.numel() for part in parts[1:] for p in part.parameters())
    wanted = layers * module.compute_dtype.itemsize
    wanted += (numbers - layers) * module.stream_dtype.itemsize
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept > wanted * 17 / 16


def _parts(module: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters are gathered together: the root first, then the layers."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, gathered from all ranks if it is sharded; then all ranks must call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Ranks send from the device, where shards in host memory (cpu_offload) are not.
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of ``tensor``, and the number of the first; of an unsharded one all rows."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, 0
    *copies, cut = tensor.placements
    assert cut == Shard(0) and all(isinstance(one, Replicate) for one in copies), (
        "parameters are cut by rows over the last axis of the mesh"
    )
    mesh, axis = tensor.device_mesh, tensor.device_mesh.ndim - 1
    size = -(-len(tensor) // mesh.size(axis))  # Rounded up.
    start = min(mesh.get_local_rank(axis) * size, len(tensor))
    local = tensor.to_local()
    assert len(local) == max(0, min(size, len(tensor) - start)), "FSDP cuts as torch.chunk does"
    return local, start


def num_shards(module: nn.Module) -> int:
    """Number of ranks that share one copy of the parameters; 1 for a module that is not sharded.

    Ranks 0 to this number less 1 share one.
    """
    mesh = next((p.device_mesh for p in module.parameters() if isinstance(p, DTensor)), None)
    return 1 if mesh is None else mesh.size(mesh.ndim - 1)


@contextmanager
def reduction(module: nn.Module, is_last: bool, once: bool) -> Iterator[None]:
    """A context for a pass of a sharded module, in which its gradients are added up over the ranks.

    is_last: whether it is the last pass of the step. once: only then; before, each rank keeps the
    whole gradient. Several copies (HSDP) are always added up in the last pass only: until then each
    rank keeps its shard of its copy's sum.
    """
    for part in _parts(module)[:1]:
        part.set_requires_gradient_sync(is_last or not once)
        part.set_requires_all_reduce(is_last)
    yield


def global_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The norm of all gradients together, on the device; of sharded ones over all their shards.

    At least in float32. All ranks must call this where one gradient is sharded.
    """
    total = torch.zeros((), dtype=sum_dtype(gradients[0].dtype), device=device)
    sharded = [one for one in gradients if isinstance(one, DTensor)]
    if sharded:
        # Not by DTensor, which would ask for a backend of the host's where shards are there.
        total += _sum_of_squares([one.to_local() for one in sharded]).to(device)
        mesh = sharded[0].device_mesh
        assert sharded[0].placements[-1] == Shard(0), "the last axis of the mesh is that of shards"
        dist.all_reduce(total, group=mesh.get_group(mesh.ndim - 1))
    plain = [one for one in gradients if not isinstance(one, DTensor)]
    return (total + _sum_of_squares(plain).to(device)).sqrt() if plain else total.sqrt()


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    dtype = sum_dtype(tensors[0].dtype)
    return torch.stack(torch._foreach_norm(tensors, 2.0, dtype)).square_().sum()
