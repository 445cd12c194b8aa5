"""The load-balancing loss of a mixture of experts, as in Switch Transformers (Fedus et al., 2021).

Without it distillation alone may send ever more tokens to a few experts. `student.module` adds it
to the objective where ``objective.router_balance`` is above 0.

Legend: T tokens of a micro-batch, E experts of a layer, k experts of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def router_balance(logits: Sequence[Tensor], top_k: int, real: Tensor | None = None) -> Tensor:
    """E * sum over experts of (share of the tokens that it gets * its mean probability), the mean
    over layers, a scalar: k where all experts get the same, and up to E.

    logits: of each layer's router, [..., E] over all T tokens. real: which of the T tokens are no
    padding, [...]; None: all. The share has no gradient: which experts are the first k is a choice.
    """
    losses = []
    for layer in logits:
        p = layer.flatten(0, -2).softmax(dim=-1, dtype=torch.float32)
        chosen = torch.zeros_like(p).scatter_(1, p.topk(top_k, dim=1).indices, 1.0)
        if real is None:
            share, mean = chosen.mean(dim=0), p.mean(dim=0)
        else:
            weights = real.reshape(-1).to(p) / real.sum().clamp_min(1)  # A dummy has none.
            share, mean = weights @ chosen, weights @ p
        losses.append(p.shape[1] * (share * mean).sum())
    return torch.stack(losses).mean()
