"""A narrower student: hidden units, attention heads and feed-forward neurons that matter most.

By the activations of the teacher on a few texts (Minitron, arXiv 2407.14679, section 2.2): a neuron
counts by the size of what it passes on, a head by the norm of its output, a hidden unit by the
output of the norms. The chosen rows and columns of each weight make the smaller model, which its
own configuration describes: it is saved, loaded and served like every other.

Dense decoders whose parts have the names of ``PARTS`` can be narrowed, with tied heads or not;
others are refused by name.

Legend: L layers, D hidden size, F feed-forward size, H heads, G key-value heads, d size of a head,
V vocabulary, B texts, S tokens.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raystill.model.sizes import PARTS, Sizes
from raystill.train.start.cut import layer_list
from raystill.train.start.precision import cast_weights
from raystill.train.start.rms import (
    factor,
    keep_embedding_scale,
    offset_of,
    scale_norms,
    unit_shares,
)
from raystill.train.start.texts import Texts


@dataclass(frozen=True)
class Widths:
    """What is kept, ascending. None: all.

    hidden: units of the residual stream, the same in every layer. ffn, heads: neurons and query
    heads, for each layer. norms: what the outputs of norms of the hidden units are multiplied by
    (`rms`), by the norms' names in the student; None: what is kept stays as it is.
    """

    hidden: list[int] | None = None
    ffn: list[list[int]] | None = None
    heads: list[list[int]] | None = None
    norms: dict[str, float] | None = None


def choose_widths(
    model: nn.Module,
    texts: Texts,
    *,
    hidden: int | None = None,
    ffn: int | None = None,
    heads: int | None = None,
) -> Widths:
    """The so many hidden units, neurons and heads of ``model`` that matter most on ``texts``.

    Raises ValueError for a model that cannot be narrowed, or not to these sizes.
    """
    sizes = Sizes.of(_text_config(model).to_dict())
    for problem in sizes.problems(hidden, ffn, heads):
        raise ValueError(str(problem))
    with torch.no_grad(), _activations(model, texts, sizes) as seen:
        model(**texts.inputs(model), use_cache=False)
    units = None if hidden is None else _best(seen.hidden, hidden)
    return Widths(
        hidden=units,
        ffn=None if ffn is None else [_best(score, ffn) for score in seen.ffn],
        heads=None if heads is None else [_best_heads(s, heads, sizes) for s in seen.heads],
        norms=None if units is None else {n: factor(q, units) for n, q in seen.norms.items()},
    )


def narrow(model: nn.Module, widths: Widths) -> nn.Module:
    """A model of these widths, with the weights of ``model``; its configuration describes it.

    Raises ValueError for a model that has a part with another name than in ``PARTS``.
    """
    sizes = Sizes.of(_text_config(model).to_dict())
    config = copy.deepcopy(model.config)
    kept_kv = None if widths.heads is None else [_kv_of(h, sizes) for h in widths.heads]
    config.head_dim = sizes.head_size
    if widths.hidden is not None:
        config.hidden_size = len(widths.hidden)
    if widths.ffn is not None:
        config.intermediate_size = len(widths.ffn[0])
    if widths.heads is not None and kept_kv is not None:
        config.num_attention_heads = len(widths.heads[0])
        config.num_key_value_heads = len(kept_kv[0])
    _require_valid(config)
    prefix = _layers_prefix(model)
    state = {}
    for name, tensor in model.state_dict().items():
        layer = int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None
        rows = {"hidden": widths.hidden}
        if layer is not None and widths.ffn is not None:
            rows["ffn"] = widths.ffn[layer]
        if layer is not None and widths.heads is not None and kept_kv is not None:
            rows["heads"] = _rows_of_heads(widths.heads[layer], sizes.head_size)
            rows["kv_heads"] = _rows_of_heads(kept_kv[layer], sizes.head_size)
        state[name] = _sliced(name, tensor, rows, sizes)
    smaller: nn.Module = cast_weights(type(model)(config), next(model.parameters()).dtype)
    try:
        smaller.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be narrowed, since its configuration describes other "
            f"shapes ({str(error).splitlines()[-1].strip()}); leave student.hidden_size, ffn_size "
            "and num_heads unset"
        ) from None
    if widths.norms is not None:
        scale_norms(smaller, widths.norms)
        keep_embedding_scale(smaller, model)
    smaller.generation_config = model.generation_config
    return smaller.train(model.training)


def _require_valid(config: Any) -> None:
    """ValueError where the model would be saved, and its configuration not loaded again."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # Each architecture has validators of its own.
        reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
        raise ValueError(
            f"{type(config).__name__} does not take these widths together ({reason}); choose "
            "others (student.hidden_size, ffn_size, num_heads)"
        ) from None


def _sliced(name: str, tensor: Tensor, rows: dict[str, list[int] | None], sizes: Sizes) -> Tensor:
    """The kept rows and columns of one weight."""
    dimensions = sizes.axes(name, tensor.shape)
    if dimensions is None:
        raise ValueError(
            f"{name} has no part that can be narrowed; expected the parts {', '.join(PARTS)} and "
            "norms: leave student.hidden_size, ffn_size and num_heads unset for this model"
        )
    for axis, dimension in enumerate(dimensions):
        kept = rows.get(dimension)
        if kept is not None:
            tensor = tensor.index_select(axis, torch.tensor(kept, device=tensor.device))
    return tensor.clone()


def _rows_of_heads(heads: list[int], size: int) -> list[int]:
    """Rows of a projection that belong to these heads."""
    return [head * size + i for head in heads for i in range(size)]


def _kv_of(heads: list[int], sizes: Sizes) -> list[int]:
    """The key-value heads that these query heads read, ascending."""
    return sorted({head // (sizes.heads // sizes.kv_heads) for head in heads})


def _best(score: Tensor, count: int) -> list[int]:
    """Indices of the ``count`` largest scores, ascending."""
    return sorted(score.topk(count).indices.tolist())


def _best_heads(score: Tensor, count: int, sizes: Sizes) -> list[int]:
    """So many query heads [H]: equally many of each key-value head, else whole groups of them."""
    group = sizes.heads // sizes.kv_heads
    by_group = score.view(sizes.kv_heads, group)
    if count % sizes.kv_heads == 0:
        inside = by_group.topk(count // sizes.kv_heads, dim=1).indices
        return sorted(g * group + i for g, row in enumerate(inside.tolist()) for i in row)
    groups = by_group.sum(1).topk(count // group).indices.tolist()
    return sorted(g * group + i for g in groups for i in range(group))


@dataclass
class _Seen:
    """Sums over the tokens of the texts: hidden [D], and for each layer ffn [F] and heads [H].

    norms: `unit_shares` [D] of each RMS norm of the hidden units, by its name.
    """

    hidden: Tensor
    ffn: list[Tensor]
    heads: list[Tensor]
    norms: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def _activations(model: nn.Module, texts: Texts, sizes: Sizes) -> Iterator[_Seen]:
    """Collects the activations of what ``model`` is given inside the context."""
    _, _, layers = layer_list(model)
    present, count = texts.present, texts.count[texts.present][:, None]
    zeros = torch.zeros(sizes.hidden, device=present.device)
    seen = _Seen(
        zeros,
        [zeros.new_zeros(sizes.ffn) for _ in layers],
        [zeros.new_zeros(sizes.heads) for _ in layers],
    )

    def neurons(index: int) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            seen.ffn[index] += (args[0][present].float().abs() * count).sum(0)

        return hook

    def heads(index: int) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            by_head = args[0][present].float().unflatten(-1, (sizes.heads, sizes.head_size))
            seen.heads[index] += (by_head.norm(dim=-1) * count).sum(0)

        return hook

    def units(_: nn.Module, __: Any, output: Tensor) -> None:
        seen.hidden += (output[present].float().abs() * count).sum(0)

    def shares(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            if not args:  # Given by name, as no known decoder does: it stays as it is.
                return
            found = unit_shares(args[0][present], count)
            seen.norms[name] = seen.norms[name] + found if name in seen.norms else found

        return hook

    hooks = []
    for name, part in model.named_modules():
        last = name.rpartition(".")[2]
        if sizes.axes(last, _weight_shape(part)) == ("hidden",) and offset_of(part) is not None:
            hooks.append(part.register_forward_pre_hook(shares(name)))
    for index, layer in enumerate(layers):
        for name, part in layer.named_modules():
            last = name.rpartition(".")[2]
            if last == "down_proj":
                hooks.append(part.register_forward_pre_hook(neurons(index)))
            elif last == "o_proj":
                hooks.append(part.register_forward_pre_hook(heads(index)))
            elif "norm" in last and sizes.axes(last, _weight_shape(part)) == ("hidden",):
                hooks.append(part.register_forward_hook(units))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _weight_shape(part: nn.Module) -> tuple[int, ...]:
    weight = getattr(part, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _layers_prefix(model: nn.Module) -> str:
    """``model.layers.``, or whatever the names of the layers' weights begin with."""
    owner, name, _ = layer_list(model)
    return next(
        f"{path}.{name}." if path else f"{name}."
        for path, module in model.named_modules()
        if module is owner
    )


def _text_config(model: nn.Module) -> Any:
    """The configuration; ValueError for a model of more than text."""
    config: Any = model.config
    if config.get_text_config() is not config:
        raise ValueError(
            f"{type(model).__name__} is more than a text decoder and cannot be narrowed; leave "
            "student.hidden_size, ffn_size and num_heads unset"
        )
    return config
