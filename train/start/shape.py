"""What a student keeps of its teacher: chosen with the teacher's weights, recorded, applied.

A run records it in ``layers.json``, and the weights that were fitted anew beside it, so that every
rank and every later start begins with the same student.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn

from raystill.base.errors import RunError
from raystill.base.run_folder import LAYERS, REFIT, RunFolder
from raystill.config.student import LayerChoice, StudentConfig
from raystill.train.start.cut import keep_layers, layer_list
from raystill.train.start.importance import ChosenLayers, choose_layers, only_layers
from raystill.train.start.refit import Refit, projection_of, refit, stream_after
from raystill.train.start.texts import Texts, packed_for
from raystill.train.start.width import Widths, choose_widths, narrow

NUM_JUDGED = 6
"""The layers are chosen by the first so many texts; all of them are for widths and fits."""


@dataclass(frozen=True)
class Shape:
    """What a student keeps of its teacher.

    layers: in this order. widths: of all its layers. fitted: new weights [D, F] of feed-forward
    networks' last projections, by the layer's number in the student (`refit`).
    """

    layers: list[int]
    widths: Widths | None = None
    fitted: dict[int, Tensor] = field(default_factory=dict)

    def kept_layers(self, num_layers: int) -> list[int]:
        """The layers, as `StudentConfig.kept_layers` says them."""
        return self.layers

    def cut(self, teacher: nn.Module) -> nn.Module:
        """The student of this shape. ``teacher``, whole, is changed, and must not be used again."""
        keep_layers(teacher, self.layers)
        return self.finish(teacher)

    def finish(self, model: nn.Module) -> nn.Module:
        """The student, from a model that has these layers alone, which must not be used again."""
        if self.widths is not None:
            model = narrow(model, self.widths)
        for number, weight in self.fitted.items():
            projection_of(model, number).weight.data.copy_(weight)
        return model


@dataclass(frozen=True)
class Chosen:
    """A shape and its reasons: of the choice of layers, and of each fitted layer."""

    shape: Shape
    layers: ChosenLayers | None = None
    fits: dict[int, Refit] = field(default_factory=dict)


def choose_shape(student: StudentConfig, model: nn.Module, texts: Texts) -> Chosen:
    """What the student is to keep of ``model``, the whole teacher, judged on ``texts``."""
    texts = packed_for(model, texts)
    chosen = None
    if isinstance(student.layers, LayerChoice) and student.layers.needs_model:
        search = student.layers.by == "importance"
        chosen = choose_layers(model, texts.first(NUM_JUDGED), student.layers.keep, search)
        layers = chosen.layers
    else:
        config: Any = model.config
        layers = student.kept_layers(config.get_text_config().num_hidden_layers)
    widths = None
    if student.narrowed:
        with only_layers(model, layers):
            widths = choose_widths(
                model,
                texts.first(NUM_JUDGED),
                hidden=student.hidden_size,
                ffn=student.ffn_size,
                heads=student.num_heads,
            )
    fits = _fits(model, texts, Shape(layers, widths)) if student.refit else {}
    fitted = {number: one.weight for number, one in fits.items()}
    return Chosen(Shape(layers, widths, fitted), chosen, fits)


def _fits(model: nn.Module, texts: Texts, shape: Shape) -> dict[int, Refit]:
    """New weights of the layers whose stream would be another one than the teacher's.

    Those are the layers before a gap; all of them where they are narrower than the teacher's. No
    layer after the last of them is run.
    """
    num_layers = len(layer_list(model)[2])
    after = [*(layer - 1 for layer in shape.layers[1:]), num_layers - 1]
    targets = {
        number: end
        for number, (layer, end) in enumerate(zip(shape.layers, after, strict=True))
        if end > layer or shape.widths is not None
    }
    if not targets:
        return {}
    with only_layers(model, list(range(max(targets.values()) + 1))):
        streams = stream_after(model, texts, list(targets.values()))
    wanted = {number: streams[end] for number, end in targets.items()}
    needed = shape.layers if shape.widths else shape.layers[: max(targets) + 1]
    with only_layers(model, needed):
        if shape.widths is None:
            return refit(model, texts, wanted)
        if (units := shape.widths.hidden) is not None:
            wanted = {number: stream[:, units] for number, stream in wanted.items()}
        narrower = narrow(model, shape.widths).to(texts.text.device).eval()
        return refit(narrower, texts, wanted)


def record_shape(folder: RunFolder, chosen: Chosen, layers: object) -> None:
    """Write what was chosen into a run folder. layers: ``student.layers`` of the run file."""
    shape, record = chosen.shape, {"layers": chosen.shape.layers}
    more: dict[str, Any] = {}
    if chosen.layers is not None and isinstance(layers, LayerChoice):
        more["by"] = layers.by
        more["kl_nats_per_token"] = chosen.layers.kl
        more["influence"] = chosen.layers.influence
    if shape.widths is not None:
        more["widths"] = asdict(shape.widths)
    if chosen.fits:
        data = save({str(number): weight for number, weight in shape.fitted.items()})
        folder.write_bytes(REFIT, data)
        more["refit_sha256"] = hashlib.sha256(data).hexdigest()
        more["refit"] = {
            str(number): {
                "error_before": fit.error_before,
                "error_after": fit.error_after,
                "strength": fit.strength,
            }
            for number, fit in chosen.fits.items()
        }
    indent = None if shape.widths else 2
    folder.write_text(LAYERS, json.dumps({**record, **more}, indent=indent) + "\n")


def recorded_shape(folder: RunFolder) -> Shape:
    """What a run's student keeps, as the run recorded it.

    Raises RunError where the fitted weights are not those that were recorded.
    """
    record = json.loads(folder.read_text(LAYERS))
    widths, digest = record.get("widths"), record.get("refit_sha256")
    fitted: dict[int, Tensor] = {}
    if digest is not None:
        data = folder.read_bytes(REFIT) if folder.exists(REFIT) else b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise RunError(
                f"{folder.join(REFIT)} is not the file that {LAYERS} names; put it back, or remove "
                f"{LAYERS} before the first checkpoint, so that the run chooses again"
            )
        fitted = {int(name): tensor for name, tensor in load(data).items()}
    return Shape(record["layers"], Widths(**widths) if widths else None, fitted)
