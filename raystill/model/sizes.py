"""The widths of a decoder as ``config.json`` names them, and which narrower ones it can have."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raystill.base.errors import Problem

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
FFN_OUTPUT = "down_proj"
"""The projection that adds a feed-forward network's output to the residual stream."""
_FFN_OUTPUT_WEIGHT = re.compile(rf"(^|\.)\d+\.\w+\.{FFN_OUTPUT}\.weight$")


def is_ffn_output(name: str) -> bool:
    """Whether a weight of this name is a layer's only such projection, not one of an expert."""
    return _FFN_OUTPUT_WEIGHT.search(name) is not None


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
        module = name.split(".")[-2] if "." in name else name
        if (axes := PARTS.get(module)) is None:  # Norms.
            return tuple(narrow.hidden if size == self.hidden else size for size in shape)
        widths = {
            "hidden": narrow.hidden,
            "ffn": narrow.ffn,
            "heads": narrow.heads * narrow.head_size,
            "kv_heads": narrow.kv_heads * narrow.head_size,
        }
        return tuple(widths.get(axis, size) for axis, size in zip(axes, shape, strict=False))

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
