"""The widths of a decoder as ``config.json`` names them, and which narrower ones it can have; the
number of a model's parameters.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raystill.base.errors import Problem
from raystill.model.files import ModelFolder, read_object
from raystill.model.head import read_header
from raystill.model.weights import layer_of

PARTS: dict[str, tuple[str, str]] = {
    "embed_tokens": ("vocabulary", "hidden"),
    "lm_head": ("vocabulary", "hidden"),
    "q_proj": ("heads", "hidden"),
    "k_proj": ("kv_heads", "hidden"),
    "v_proj": ("kv_heads", "hidden"),
    "o_proj": ("hidden", "heads"),
    "gate_proj": ("ffn", "hidden"),
    "up_proj": ("ffn", "hidden"),
    "down_proj": ("hidden", "ffn"),
}
"""What the rows and the columns of a weight are, by the name of its module. A bias has the rows."""
HEAD_NORMS = {"q_norm": "heads", "k_norm": "kv_heads"}
"""Norms of all queries or keys of a token together (OLMo 2), or of each head alone (Qwen 3)."""
FFN_OUTPUT = "down_proj"
"""The projection that adds a feed-forward network's output to the residual stream."""
_FFN_OUTPUT_WEIGHT = re.compile(rf"(^|\.)\d+\.\w+\.{FFN_OUTPUT}\.weight$")


def is_ffn_output(name: str) -> bool:
    """Whether a weight of this name is a layer's only such projection, not one of an expert."""
    return _FFN_OUTPUT_WEIGHT.search(name) is not None


PLAIN_TYPES = frozenset(
    {
        *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        *("olmo", "olmo2", "olmo3", "smollm3", "granite", "cohere"),
    }
)
"""Values of ``model_type`` whose every layer has each of `PARTS` once, of the sizes in
``config.json`` (no experts, no joined projections, no layers of another kind)."""
EVEN_TYPES = frozenset(
    {
        *("llama", "arcee", "cwm", "eurobert", "gemma2", "gemma3_text", "gemma3n_text"),
        *("hyperclovax", "jais2", "minicpm3", "vaultgemma"),
    }
)
"""Values of ``model_type`` whose configuration transformers refuses where the hidden units are no
multiple of the heads, also where it names the size of a head."""
_IN_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+\.(?:weight|bias))")


@dataclass(frozen=True)
class Sizes:
    """Widths of a decoder: hidden units, neurons, query heads, key-value heads, size of a head."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Sizes":
        """The sizes in a text decoder's ``config.json``; ValueError where it does not name them."""
        names = ("num_attention_heads", "hidden_size", "intermediate_size")
        if missing := [name for name in names if config.get(name) is None]:
            raise ValueError(
                f"the teacher's configuration has no {', '.join(missing)}, so that its widths "
                "cannot be chosen; leave student.hidden_size, ffn_size and num_heads unset"
            )
        others = ("num_key_value_heads", "head_dim")
        if by_layer := [n for n in (*names, *others) if isinstance(config.get(n), list)]:
            raise ValueError(
                f"the teacher's layers differ in {', '.join(by_layer)}, so that its widths "
                "cannot be chosen; leave student.hidden_size, ffn_size and num_heads unset"
            )
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        size = config.get("head_dim") or config["hidden_size"] // heads
        return cls(config["hidden_size"], config["intermediate_size"], heads, kv_heads, size)

    def narrowed(self, hidden: int | None, ffn: int | None, heads: int | None) -> "Sizes":
        """The sizes of a student that keeps so many; None: all of them.

        Query heads go evenly from all groups where that is possible, else whole groups go.
        """
        kv_heads = self.kv_heads
        if heads is not None and heads % kv_heads:
            kv_heads = heads // (self.heads // kv_heads)
        return Sizes(
            hidden or self.hidden, ffn or self.ffn, heads or self.heads, kv_heads, self.head_size
        )

    def config(self) -> dict[str, int]:
        """The fields of ``config.json`` that say them."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
        }

    def reshaped(self, name: str, shape: Sequence[int], narrow: "Sizes") -> tuple[int, ...]:
        """The shape that a tensor of a model of these sizes has in a student of ``narrow`` ones."""
        axes, widths = self.axes(name, shape), narrow.widths
        if axes is None:
            return tuple(shape)
        whole = ("",) * (len(shape) - len(axes))
        return tuple(
            widths.get(axis, size) for axis, size in zip((*axes, *whole), shape, strict=True)
        )

    @property
    def widths(self) -> dict[str, int]:
        """The number of rows or columns that each word of `PARTS` stands for."""
        return {
            "hidden": self.hidden,
            "ffn": self.ffn,
            "heads": self.heads * self.head_size,
            "kv_heads": self.kv_heads * self.head_size,
        }

    def axes(self, name: str, shape: Sequence[int]) -> tuple[str, ...] | None:
        """What the rows and columns of a weight of this model are, in the words of `PARTS`; empty
        where it is the same in a narrower student; None where it has no part that can be narrowed.
        """
        module = name.split(".")[-2] if "." in name else name
        if module in PARTS:
            return PARTS[module][: len(shape)]
        if len(shape) != 1 or "norm" not in module:
            return None
        if shape[0] == self.head_size and (module in HEAD_NORMS or shape[0] != self.hidden):
            return ()
        axis = HEAD_NORMS.get(module, "hidden")
        return (axis,) if shape[0] == self.widths[axis] else None

    def unfit(self, shapes: Mapping[str, Sequence[int]]) -> Iterator[str]:
        """What weights with these names and shapes have that no narrower student can be made of."""
        for name, shape in shapes.items():
            if not name.endswith((".weight", ".bias")):
                continue  # A derived table, which nobody loads.
            axes = None if ".experts." in name else self.axes(name, shape)
            if axes is None:
                yield f"has {name}, which is no part that can be narrowed"
                continue
            for axis, size in zip(axes, shape, strict=False):
                if size != self.widths.get(axis, size):
                    yield f"has {name} of {list(shape)}, expected {self.widths[axis]} {axis} units"

    def problems(self, hidden: int | None, ffn: int | None, heads: int | None) -> list[Problem]:
        """Why a student of a teacher with these sizes cannot have those."""
        found = [
            Problem(
                f"student.{name}", f"is {wanted}, but the teacher has {there}; name at most {there}"
            )
            for name, wanted, there in (
                ("hidden_size", hidden, self.hidden),
                ("ffn_size", ffn, self.ffn),
            )
            if wanted is not None and wanted > there
        ]
        group = self.heads // self.kv_heads
        possible = [n for n in range(1, self.heads + 1) if n % self.kv_heads == 0 or n % group == 0]
        if heads is not None and heads not in possible:
            found.append(
                Problem(
                    "student.num_heads",
                    f"is {heads}, but of the teacher's {self.heads} heads {group} share a "
                    f"key-value head; possible are {', '.join(map(str, possible))}",
                )
            )
        return found


def uneven_widths(model_type: object, whole: Sizes, few: Sizes) -> Iterator[Problem]:
    """Whether a student of ``few`` sizes of a teacher of ``whole`` ones is none that transformers
    loads, though it has no more of anything.
    """
    even = few.hidden % few.heads == 0
    if even or not isinstance(model_type, str) or model_type not in EVEN_TYPES:
        return
    where = "hidden_size" if few.hidden != whole.hidden else "num_heads"
    wanted = few.hidden if where == "hidden_size" else few.heads
    below = few.hidden // few.heads * few.heads
    possible = [n for n in (below, below + few.heads) if 0 < n <= whole.hidden]
    yield Problem(
        f"student.{where}",
        f"is {wanted}, so that the student would have {few.hidden} hidden units and {few.heads} "
        f"heads, but {model_type} takes a multiple of the heads only; set student.hidden_size: "
        f"{' or '.join(map(str, possible))}",
    )


def wrong_tensors(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], *, whole: bool
) -> Iterator[str]:
    """What weights of a plain decoder lack, or have in other shapes than its settings say.

    transformers leaves such a weight random, after a warning alone. Of types other than
    `PLAIN_TYPES`, and of quantised weights, nothing is said. ``whole``: ``shapes`` has all tensors.
    """
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    counts = [config.get(name) for name in names]
    counts += [config.get(name) or 1 for name in ("num_key_value_heads", "head_dim")]
    plain = config.get("model_type") in PLAIN_TYPES and not config.get("quantization_config")
    if not plain or not all(type(n) is int and n > 0 for n in counts):
        return
    sizes = Sizes.of(config)
    for name, shape in shapes.items():
        expected = _expected_shape(name, sizes, config.get("vocab_size"))
        if expected is not None and tuple(shape) != expected:
            yield f"has {name} of {list(shape)}, but by config.json it would be {list(expected)}"
            return
    layers: dict[str, set[str]] = {}
    for found in filter(None, map(_IN_LAYER.fullmatch, shapes)):
        layers.setdefault(found[1], set()).add(found[2])
    every = set().union(*layers.values())
    if not whole:
        return
    if not layers:
        yield f"has no tensor of a layer, but for instance {min(shapes, default='none')!r}"
        return
    for number, there in layers.items():
        if missing := sorted(every - there):
            yield f"has no {missing[0]} in layer {number}, which other layers have"
            return
    outside = {name.removeprefix("model.") for name in shapes if not _IN_LAYER.fullmatch(name)}
    for needed in ("embed_tokens.weight", "norm.weight"):
        if needed not in outside and config["model_type"] != "olmo":  # Its norms have no weights.
            yield f"has no {needed}"
    if config.get("tie_word_embeddings") is False and "lm_head.weight" not in outside:
        yield "has no lm_head.weight, and by tie_word_embeddings the embeddings are not the head"


def _expected_shape(name: str, sizes: Sizes, rows: int | None) -> tuple[int, ...] | None:
    """The shape of a weight of a plain decoder of these sizes; None where they do not say it.

    rows: ids of its vocabulary; None: not known.
    """
    found = _IN_LAYER.fullmatch(name)
    module, _, kind = (found[2] if found else name.removeprefix("model.")).rpartition(".")
    module = module.rpartition(".")[2]
    if kind != "weight":
        return None
    if module.endswith("layernorm") or (module == "norm" and not found):
        return (sizes.hidden,)
    if not found and module in ("embed_tokens", "lm_head"):
        return None if rows is None else (rows, sizes.hidden)
    if not found or module not in PARTS:
        return None
    return sizes.reshaped(f"{module}.weight", (0, 0), sizes)


def count_parameters(model: ModelFolder, layers: list[int] | None = None) -> int | None:
    """Number of parameters by the safetensors headers; None if it cannot be known.

    ``layers``: count only these layers, and what is outside of layers. Where the files are still to
    be downloaded, their total size tells the number.

    ``safetensors.safe_open`` would refuse a file with a data type of a newer version.
    """
    files = sorted(model.path.glob("*.safetensors"))
    if not files:
        index = read_object(model.path / "model.safetensors.index.json")
        total = index.get("metadata", {}).get("total_size")
        width = 4 if model.config.get("dtype", model.config.get("torch_dtype")) == "float32" else 2
        if total is None:
            return None
        kept = 1.0 if layers is None else len(layers) / max(1, model.num_layers or len(layers))
        return round(total / width * kept)
    total = 0
    for file in files:
        for name, entry in read_header(file).items():
            layer = layer_of(name)
            if layers is None or layer is None or layer in layers:
                total += math.prod(entry["shape"])
    return total
