"""What is kept of each response token, and which signal another follows from.

Imports neither Ray nor torch.

Legend: K teacher ids kept for each token, D the teacher's hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raystill.config.stream import SignalConfig

KINDS = ("text", "sampled", "topk", "hidden")
WIDE = ("topk", "hidden")
HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class Signal:
    """``kind``, and its ``width``: K of ``topk``, D of ``hidden``, 0 of ``text`` and ``sampled``.

    What serves what is a partial order: everything serves ``text``; all but ``text`` serve
    ``sampled``; ``topk`` serves fewer ids; ``hidden`` serves itself. It does not serve ``topk``:
    logprobs worked out from rounded states are not those the teacher would have named.
    """

    kind: str
    width: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"signal kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        width = int(self.width) if self.kind in WIDE else 0
        if width < 1 and self.kind in WIDE:
            raise ValueError(f"the width of a {self.kind} signal is {width}; expected 1 or more")
        object.__setattr__(self, "width", width)

    @property
    def richness(self) -> tuple[int, int]:
        """A total order that holds the partial one: what serves another is as rich, or richer."""
        return KINDS.index(self.kind), self.width

    def serves(self, wanted: "Signal") -> bool:
        """Whether ``wish`` follows from this signal without asking the teacher."""
        if wanted.kind in ("text", "sampled"):
            return self.richness >= wanted.richness
        narrower = (
            self.width == wanted.width if wanted.kind == "hidden" else self.width >= wanted.width
        )
        return self.kind == wanted.kind and narrower

    def __str__(self) -> str:
        return f"{self.kind} {self.width}" if self.kind in WIDE else self.kind


def signal_of(signal: SignalConfig, teacher_config: Mapping[str, Any]) -> Signal:
    """The signal a run file asks for; D is what the teacher's ``config.json`` says it is.

    Raises ValueError where the kind is ``hidden`` and the configuration names no hidden size.
    """
    if signal.kind == "topk":
        return Signal("topk", signal.top_k)
    if signal.kind == "hidden":
        return Signal("hidden", hidden_size(teacher_config))
    return Signal(signal.kind)


def hidden_size(teacher_config: Mapping[str, Any]) -> int:
    """D of a model's configuration; of its language part where it has several."""
    told = {**teacher_config, **(teacher_config.get("text_config") or {})}
    for name in HIDDEN_SIZES:
        if told.get(name):
            return int(told[name])
    raise ValueError(
        "signal.kind is 'hidden', but the teacher's config.json names no "
        f"{', '.join(HIDDEN_SIZES)}; set signal.kind: topk"
    )
