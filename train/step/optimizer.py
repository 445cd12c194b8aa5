"""The optimizer, and the learning rate as a function of the step alone.

So the rate of a step is the same after a restart, with another number of workers, and with another
cut into micro-batches.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from raystill.config.training import TrainingConfig
from raystill.train.step.adamw import AdamW8bit, AdamWBf16


def build_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The AdamW that ``training.optimizer`` names over the trainable parameters, with weight decay
    on those with 2 or more axes only.

    Biases and the weights of norms have one axis. In each group the parameters are in the order of
    the module.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    # fused: one pass over parameters and state, instead of one for each operation.
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": partial(torch.optim.AdamW, fused=True),
        "adamw_bf16": AdamWBf16,
        "adamw_8bit": AdamW8bit,
    }
    return kinds[config.optimizer](
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=0.0,  # Each group has its own.
    )


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The learning rate of step ``step`` (from 0) of ``total_steps``.

    During the warm-up it rises linearly, from peak / warmup_steps in step 0 to the peak. After it,
    the rate is constant, or follows half a cosine from the peak down to
    ``min_learning_rate_ratio`` x peak in the last step, and stays there.
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    span = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    low = config.min_learning_rate_ratio
    return peak * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress)))
