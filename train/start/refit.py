"""Weights for the layers before a gap, fitted so that they do what the left-out layers did.

A student without some of its teacher's layers computes another residual stream from the first gap
on. The last projection of a feed-forward network adds its output to that stream, so its weight W
has a best value in closed form (ridge regression) for the stream that the teacher has after the
gap:

    W = argmin sum_n w_n |x_n W' + a_n - t_n|^2 + lambda |W - W_teacher|^2

with x_n the projection's input in the student, a_n the rest of the layer's output, t_n the stream
of the teacher, w_n = 1 / mean(t_n^2) since norms divide by that size, times the tokens that n
stands for. Layers are fitted from the first to the last, each on the stream that the fitted ones
before it give. No gradient is taken, and the architecture stays what it is. ReplaceMe (arXiv
2505.02819) fits a linear map [D, D] of the network's output instead, which is a part of what W can
express.

Legend: N tokens of the texts, D hidden size, F feed-forward size, L layers of the teacher.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raystill.model.sizes import FFN_OUTPUT, is_ffn_output
from raystill.train.start.cut import layer_list
from raystill.train.start.texts import Texts

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Values of lambda that are tried, as multiples of the mean of the inputs' second moments."""
USUAL_STRENGTH = 1.0
"""Where there are too few texts to try."""
ASIDE = 4
"""One text of so many is left out of the fits that choose lambda, and judges them."""


@dataclass(frozen=True)
class Refit:
    """A layer's new weight.

    weight: [D, F], float32, on the host. error_before, error_after: mean of
    w_n |output - t_n|^2 / D on the texts, 0 for the teacher's own stream. strength: the chosen
    lambda, as in ``STRENGTHS``.
    """

    weight: Tensor
    error_before: float
    error_after: float
    strength: float


@torch.no_grad()
def stream_after(model: nn.Module, texts: Texts, layers: Sequence[int]) -> dict[int, Tensor]:
    """The residual stream [N, D] after each of these layers of the whole teacher, float32."""
    _, _, blocks = layer_list(model)
    present, found = texts.present, {}

    def note(layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[layer] = _stream(output)[present].float()

        return hook

    hooks = [blocks[layer].register_forward_hook(note(layer)) for layer in set(layers)]
    try:
        _run(model, texts)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def refit(model: nn.Module, texts: Texts, targets: dict[int, Tensor]) -> dict[int, Refit]:
    """New weights of the layers in ``targets``, by their number in ``model``, which stays as it is.

    model: the untrained student. targets: for a layer the stream [N, D] that it should give. A
    layer that no weight brings nearer to its target gets none. Raises ValueError where a layer has
    no projection that can be fitted.
    """
    _, _, blocks = layer_list(model)
    fits: dict[int, Refit] = {}
    hooks = []
    for number, target in targets.items():
        fitter = _Fitter(projection_of(model, number), texts, target, number, fits)
        hooks.append(fitter.projection.register_forward_hook(fitter.see))
        hooks.append(blocks[number].register_forward_hook(fitter.fit, with_kwargs=True))
    try:
        _run(model, texts)
    finally:
        for hook in hooks:
            hook.remove()
    return fits


def projection_of(model: nn.Module, number: int) -> nn.Linear:
    """The projection of a layer that can be fitted; ValueError where it is not the only one."""
    _, _, blocks = layer_list(model)
    found = [
        part
        for name, part in blocks[number].named_modules()
        if is_ffn_output(f"{number}.{name}.weight") and isinstance(part, nn.Linear)
    ]
    if len(found) != 1:
        raise ValueError(
            f"layer {number} of {type(model).__name__} has {len(found)} linear modules named "
            f"{FFN_OUTPUT}; student.refit needs one in each layer, as dense decoders have: "
            "set student.refit: false"
        )
    return found[0]


class _Fitter:
    """Fits one layer's projection while the texts go through the model."""

    def __init__(
        self,
        projection: nn.Linear,
        texts: Texts,
        target: Tensor,
        number: int,
        fits: dict[int, Refit],
    ) -> None:
        self.projection = projection
        self._present = texts.present
        text = texts.text[self._present]
        self._aside = (text % ASIDE == ASIDE - 1) & (text >= 0)
        self._target, self._number, self._fits = target, number, fits
        self._count = texts.count[self._present]
        self._weights = self._count / target.pow(2).mean(-1)
        self._inputs: Tensor | None = None
        self._output: Tensor | None = None
        self._fitting = False

    def see(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook of the projection: its input and output."""
        self._inputs, self._output = args[0][self._present], output[self._present]

    def fit(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Hook of the layer: the output that it has with the best weight."""
        if self._fitting:
            return None  # The pass below, which this very hook asks for.
        before = self._error(output)
        assert self._inputs is not None and self._output is not None
        missing = self._target - _stream(output)[self._present].float()
        inputs = self._inputs.float()
        if not all(bool(part.isfinite().all()) for part in (inputs, missing, self._weights)):
            return None
        change, strength = _ridge(inputs, missing, self._weights, self._aside)
        own = self.projection.weight.data
        weight = own.float() + change.T
        self.projection.weight.data = weight.to(own.dtype)
        self._fitting = True
        try:
            fitted = layer(*args, **kwargs)
        finally:
            self.projection.weight.data, self._fitting = own, False
        after = self._error(fitted)
        self._inputs = self._output = None
        if not after < before:  # Its output is not added to the stream as it is, or is not finite.
            return None
        self._fits[self._number] = Refit(weight.cpu(), before, after, strength)
        return fitted

    def _error(self, output: Any) -> float:
        apart = _stream(output)[self._present].float() - self._target
        return float((apart.pow(2).mean(-1) * self._weights).sum() / self._count.sum())


def _ridge(inputs: Tensor, missing: Tensor, weights: Tensor, aside: Tensor) -> tuple[Tensor, float]:
    """The change [F, D] of a weight that adds ``missing`` [N, D], and the lambda that was chosen.

    inputs: [N, F]. weights: [N]. aside: bool [N], the tokens that judge each lambda; then all are
    fitted with the best. Products of tokens are float32, which lambda makes accurate enough (3e-7
    of the solution), what is solved float64.
    """
    root = weights.sqrt()[:, None]
    scaled, wanted = inputs * root, missing * root
    few = len(scaled) < scaled.shape[1]
    if not bool(aside.any()) or bool(aside.all()):
        return _solver(scaled, wanted, few)(USUAL_STRENGTH).float(), USUAL_STRENGTH
    rest, judges = (scaled[~aside], wanted[~aside]), (scaled[aside], wanted[aside])
    moments = None if few else _moments(*rest)
    solve, errors = _solver(*rest, few, moments), {}
    for strength in STRENGTHS:
        errors[strength] = float((judges[1] - judges[0] @ solve(strength).float()).norm())
    best = min(errors, key=lambda strength: errors[strength])
    if moments is not None:  # Those of all tokens, without multiplying the rest's again.
        moments = tuple(a + b for a, b in zip(moments, _moments(*judges), strict=True))
    return _solver(scaled, wanted, few, moments)(best).float(), best


def _moments(inputs: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
    """inputs' inputs [F, F] and inputs' wanted [F, D], float64."""
    return (inputs.T @ inputs).double(), (inputs.T @ wanted).double()


def _solver(
    inputs: Tensor, wanted: Tensor, few: bool, moments: tuple[Tensor, ...] | None = None
) -> Callable[[float], Tensor]:
    """By lambda: argmin |inputs C - wanted|^2 + lambda |C|^2, [F, D], float64.

    Solved with one Gram matrix, which all lambdas share: of the tokens [N, N] where they are
    ``few``, else of the inputs [F, F], which ``moments`` may give.
    """
    unit = float(inputs.pow(2).sum(0).mean()) + torch.finfo(torch.float64).tiny
    if few:
        gram, right = (inputs @ inputs.T).double(), wanted.double()
    else:
        gram, right = moments or _moments(inputs, wanted)

    def solve(strength: float) -> Tensor:
        penalty = torch.full_like(gram.diagonal(), strength * unit).diag()
        solution = torch.cholesky_solve(right, torch.linalg.cholesky(gram + penalty))
        return inputs.T.double() @ solution if few else solution

    return solve


def _stream(output: Any) -> Tensor:
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream


def _run(model: Any, texts: Texts) -> None:
    """All layers over the texts, without the output head."""
    decoder = model.get_decoder()
    decoder(**texts.inputs(model), use_cache=False)
