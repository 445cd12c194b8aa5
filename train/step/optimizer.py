"""The optimizer and its learning rate, which depends on the step alone.

A restart, another number of workers or another cut into micro-batches leaves the rate of a step
what it was.
"""

import math

import torch
from torch import nn

from raystill.config.training import TrainingConfig


def build_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices (2 or more axes) only.

    Parameters keep the module's order within each group, so that a saved state fits again.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``total_steps``.

    Linear from peak / warmup_steps to the peak over the warm-up; then constant, or a half cosine
    that starts at the peak and reaches ``min_learning_rate_ratio`` x peak at the last step.
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
