"""The dtype of a model's weights, without what a loaded model computes for itself.

``Module.to(dtype)`` also rounds the buffers that no file has, such as the frequencies of rotary
positions. transformers computes those anew in float32 when it loads the exported model, in
whatever dtype: a student that was trained with rounded ones would be another than the one exported.
"""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def cast_weights(model: Model, dtype: torch.dtype) -> Model:
    """Converts parameters and persistent buffers with fractions to ``dtype``, in place; the model.

    Other buffers are converted only where ``dtype`` holds each of their numbers.
    """
    weights = set(model.state_dict(keep_vars=True).keys())
    for parameter in model.parameters():  # Each once: tied weights stay tied.
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        exact = torch.promote_types(buffer.dtype, dtype) == dtype
        if buffer.is_floating_point() and (exact or name in weights):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(dtype))
    return model
