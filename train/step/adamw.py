"""AdamW with less state: in bfloat16 with Kahan summation, or with moments in 8 bits.

`optimizer.build_optimizer` chooses. The update is that of PyTorch's AdamW, computed in float32;
only what is kept between steps is smaller. Nothing is random, and no number depends on how
parameters are sharded: so a run goes on from a checkpoint as if undisturbed, on any number of
workers. With g the gradient, t the step from 1, r the learning rate, d the weight decay:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w - r d w - r / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

Kahan summation: a weight in bfloat16 has 8 significant bits, so most updates round to nothing. What
rounding took is kept in a second bfloat16 number, the compensation, and added to the next update:
weight and compensation together have about 16 bits.

8 bits: a row of a matrix is cut into blocks of 256, each with its largest magnitude as scale. A
code is the logarithm of a number over that scale, so that its relative error is the same for large
and small ones: at most 3.9 %, over a range of 2^-14 for m and 2^-28 for v. Below it m becomes 0. v
becomes the smallest value and never 0, which would make a large step of a small gradient. Sharding
never cuts a row, so codes and scales are sharded as the parameter is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BLOCK = 256
"""Numbers that share a scale."""
M_RANGE, V_RANGE = 14.0, 28.0
"""Range of the codes, in powers of 2."""
SMALLEST_COLUMNS = 64
"""Rows shorter than this keep float32 moments, and so do vectors: a scale for each would cost as
much as it saves."""
CPU_BYTES, DEVICE_BYTES = 4 << 20, 256 << 20
"""Rows are updated in blocks of this many bytes in float32; there are five such at a time."""


class SmallAdamW(torch.optim.Optimizer):
    """What both have in common: the order of the update, and state that is made on the first step.

    State of a parameter: ``step``, a number on the host, and what `_new_moments` makes.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before the first step."""
        # On the host: the bias correction is computed there, without asking the device.
        state = {"step": torch.zeros((), dtype=torch.float32)}
        return state | self._new_moments(parameter.detach())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "the loss is not computed again"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of(parameter, group)

    def _step_of(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self.new_state(parameter))
        state["step"] += 1
        t, (beta1, beta2) = float(state["step"]), group["betas"]
        own = {name: local(tensor) for name, tensor in state.items() if name != "step"}
        weight, gradient = local(parameter), local(parameter.grad)
        for rows in _row_blocks(weight):
            part = {name: tensor[rows] for name, tensor in own.items()}
            m, v = self._moments(part)
            g = gradient[rows].float()
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            change = (v / (1 - beta2**t)).sqrt_().add_(group["eps"]).reciprocal_().mul_(m)
            change.mul_(-group["lr"] / (1 - beta1**t))
            change.add_(weight[rows], alpha=-group["lr"] * group["weight_decay"])
            self._keep(part, m, v)
            self._add(weight[rows], change, part)

    def _new_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _moments(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """m and v of some rows, float32, as new tensors."""
        m, v = (state[n].to(torch.float32, copy=True) for n in ("exp_avg", "exp_avg_sq"))
        return m, v

    def _keep(self, state: dict[str, Tensor], m: Tensor, v: Tensor) -> None:
        """Writes m and v back into the state of these rows."""
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)

    def _add(self, weight: Tensor, change: Tensor, state: dict[str, Tensor]) -> None:
        """Adds the change, float32, to these rows of the weight."""
        weight.add_(change)


class AdamWBf16(SmallAdamW):
    """AdamW on weights in bfloat16: 10 bytes a parameter, of which 2 are the gradient.

    Moments are rounded to the nearest, for which beta2 must leave the second moment to fall by more
    than a rounding: 0.99 or less.
    """

    def _new_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        names = ("exp_avg", "exp_avg_sq", "compensation")
        return {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in names}

    def _add(self, weight: Tensor, change: Tensor, state: dict[str, Tensor]) -> None:
        change.add_(state["compensation"])
        before = weight.float()
        weight.copy_(before + change)
        state["compensation"].copy_(change.sub_(weight.float() - before))


class AdamW8bit(SmallAdamW):
    """AdamW on weights in float32 with moments of matrices in 8 bits: 10 bytes a parameter."""

    def _new_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.ndim < 2 or parameter.shape[-1] < SMALLEST_COLUMNS:
            names = ("exp_avg", "exp_avg_sq")
            return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in names}
        return {
            "exp_avg": torch.zeros_like(parameter, dtype=torch.int8),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.uint8),
            "exp_avg_scale": _scales(parameter),
            "exp_avg_sq_scale": _scales(parameter),
        }

    def _moments(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if "exp_avg_scale" not in state:
            return super()._moments(state)
        m = decode_signed(state["exp_avg"], state["exp_avg_scale"])
        return m, decode_positive(state["exp_avg_sq"], state["exp_avg_sq_scale"])

    def _keep(self, state: dict[str, Tensor], m: Tensor, v: Tensor) -> None:
        if "exp_avg_scale" not in state:
            super()._keep(state, m, v)
            return
        codes, scale = encode_signed(m)
        state["exp_avg"].copy_(codes)
        state["exp_avg_scale"].copy_(scale)
        codes, scale = encode_positive(v)
        state["exp_avg_sq"].copy_(codes)
        state["exp_avg_sq_scale"].copy_(scale)


def encode_signed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 of the shape of x, and scales, float32 [..., blocks]; 0 for what is too small."""
    scale, level = _levels(x, 126 / M_RANGE)
    # A scale of 0 gives NaN, which no comparison keeps.
    magnitude = torch.where(level >= -126.5, level.round().clamp_(min=-126) + 127, 0.0)
    return (magnitude * x.sign()).to(torch.int8), scale


def decode_signed(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 of the shape of the codes; see `encode_signed`."""
    c = codes.float()
    return ((c.abs() - 127) * (M_RANGE / 126)).exp2_().mul_(c.sign()).mul_(_spread(scale, codes))


def encode_positive(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 of the shape of x, and scales, float32 [..., blocks]; the smallest is not 0."""
    scale, level = _levels(x, 255 / V_RANGE)
    return level.neg_().round_().nan_to_num_(255.0).clamp_(0, 255).to(torch.uint8), scale


def decode_positive(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 of the shape of the codes; see `encode_positive`."""
    return (codes.float() * (-V_RANGE / 255)).exp2_().mul_(_spread(scale, codes))


def _levels(x: Tensor, steps_per_octave: float) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each block, and the logarithm of each number over its block's."""
    columns = x.shape[-1]
    blocks = -(-columns // BLOCK)
    padded = torch.nn.functional.pad(x.abs(), (0, blocks * BLOCK - columns))
    scale = padded.unflatten(-1, (blocks, BLOCK)).amax(dim=-1)
    return scale, (x.abs() / _spread(scale, x)).log2_().mul_(steps_per_octave)


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    """The scale of each number, of the shape of ``like``."""
    return scale.repeat_interleave(BLOCK, dim=-1)[..., : like.shape[-1]]


def _scales(parameter: Tensor) -> Tensor:
    """Scales of 0 for the blocks of a parameter, sharded as it is."""
    own = local(parameter)
    blocks = -(-own.shape[-1] // BLOCK)
    scale = own.new_zeros((*own.shape[:-1], blocks), dtype=torch.float32)
    if not isinstance(parameter, DTensor):
        return scale
    shape = torch.Size((*parameter.shape[:-1], blocks))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        scale,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=stride,
    )


def _row_blocks(weight: Tensor) -> list[slice]:
    """Slices of the first axis, each of about the block's bytes in float32."""
    most = CPU_BYTES if weight.device.type == "cpu" else DEVICE_BYTES
    rows = max(1, most * max(1, len(weight)) // (4 * max(1, weight.numel())))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, with an axis at least; writing into it changes the tensor."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own if own.ndim else own.view(1)
