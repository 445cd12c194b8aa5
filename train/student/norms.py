"""RMS norms of a student on a GPU as one kernel of PyTorch each, where that is what they compute.

transformers writes a norm as six operations in float32, and each keeps what its gradient needs: 12
bytes a number in bfloat16 with the result. The kernel keeps its input, which is kept anyway, and
one number a token. On a CPU PyTorch has no such kernel.

`sharding.place_student` calls `fuse_norms` on whole weights. Whether a norm is the plain one is
tried out: Gemma's adds 1 to its weight, others leave their heads apart.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILONS = ("variance_epsilon", "eps", "epsilon")


def fuse_norms(model: nn.Module, device: torch.device) -> int:
    """Makes the plain RMS norms of ``model`` one kernel each on a GPU; returns how many."""
    if device.type != "cuda":
        return 0
    return replace_plain_norms(model)


def replace_plain_norms(model: nn.Module) -> int:
    """Has the plain RMS norms computed by ``F.rms_norm``; returns how many.

    Where input and weight differ in their dtypes a norm stays what it was: there is no kernel.
    """
    count = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and _is_plain(module):
            # On the object: its class may have other objects that are not plain.
            module.forward = partial(_forward, module, type(module).forward)
            count += 1
    return count


def _forward(module: Any, other: Any, hidden: Tensor) -> Tensor:
    if hidden.dtype != module.weight.dtype:
        whole: Tensor = other(module, hidden)
        return whole
    return F.rms_norm(hidden, module.weight.shape, module.weight, _epsilon(module))


def _epsilon(module: Any) -> float | None:
    return next((getattr(module, name) for name in EPSILONS if hasattr(module, name)), None)


@torch.no_grad()
def _is_plain(module: Any) -> bool:
    """Whether it gives what the kernel gives, for numbers of any size."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or _epsilon(module) is None:
        return False
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([[1e-3], [1.0], [30.0]])
    tried = scale * torch.randn(3, len(weight), generator=generator)
    tried = tried.to(weight.device, weight.dtype)
    # A weight of ones would not show whether 1 is added, or it is left out.
    own, module.weight.data = weight.data, torch.linspace(0.5, 2.0, len(weight)).to(weight)
    try:
        expected = F.rms_norm(tried, weight.shape, module.weight, _epsilon(module))
        given = module(tried)
    except (TypeError, RuntimeError):  # It takes more, or something else.
        return False
    finally:
        module.weight.data = own
    near = 2e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return isinstance(given, Tensor) and torch.allclose(given, expected, rtol=near, atol=near)
