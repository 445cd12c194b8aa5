"""The signal: what is kept of the teacher's distribution for each response token.

Imports neither Ray nor torch. Which columns a signal has is in ``schema.py``; how a poorer signal
is derived from a richer one is in ``answers.py``.

Legend: K teacher ids kept for each token, D the teacher's hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raystill.config.objective import SignalConfig
from raystill.config.run import RunConfig

KINDS = ("text", "sampled", "topk", "hidden")  # From the poorest to the richest.
KINDS_WITH_WIDTH = ("topk", "hidden")
HIDDEN_SIZE_NAMES = ("hidden_size", "n_embd", "d_model")  # In the order they are looked for.


@dataclass(frozen=True)
class Signal:
    """A kind of signal and its ``width``: K of ``topk``, D of ``hidden``, 0 of the other kinds.

    ``text`` keeps the response ids alone, ``sampled`` also their logprobs, ``topk`` also the K
    most probable ids and their logprobs, ``hidden`` the hidden state after the final norm.

    Raises:
        ValueError: the kind is unknown, or a kind that needs a width has none.
    """

    kind: str
    width: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"signal kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        width = int(self.width) if self.kind in KINDS_WITH_WIDTH else 0
        if width < 1 and self.kind in KINDS_WITH_WIDTH:
            raise ValueError(f"the width of a {self.kind} signal is {width}; expected 1 or more")
        object.__setattr__(self, "width", width)

    @property
    def richness(self) -> tuple[int, int]:
        """Sort key: a signal that can serve another is never less rich than the other."""
        return KINDS.index(self.kind), self.width

    def serves(self, wanted: "Signal", scored: bool = False) -> bool:
        """Whether ``wanted`` can be derived from this signal without asking the teacher.

        Every signal serves ``text``; all but ``text`` serve ``sampled``; ``topk`` serves ``topk``
        of the same or a smaller K; ``hidden`` serves ``hidden`` of the same D. ``hidden`` does not
        serve ``topk``: logprobs computed from states rounded to bfloat16 differ from the teacher's.

        scored: the teacher was given the response, and did not generate it. To score ``hidden`` it
        does not run its output head, so the logprobs of such a row are NaN: ``sampled`` is not
        served.
        """
        if wanted.kind in ("text", "sampled"):
            no_logprobs = scored and self.kind == "hidden" and wanted.kind == "sampled"
            return self.richness >= wanted.richness and not no_logprobs
        if self.kind != wanted.kind:
            return False
        return self.width == wanted.width if self.kind == "hidden" else self.width >= wanted.width

    def __str__(self) -> str:
        return f"{self.kind} {self.width}" if self.kind in KINDS_WITH_WIDTH else self.kind


def signal_of(signal: SignalConfig, teacher_config: Mapping[str, Any]) -> Signal:
    """The signal that a run file asks for. ``teacher_config``: the teacher's ``config.json``.

    Raises:
        ValueError: ``signal.kind`` is ``hidden`` and ``config.json`` has no hidden size.
    """
    if signal.kind == "topk":
        return Signal("topk", signal.top_k)
    if signal.kind == "hidden":
        return Signal("hidden", hidden_size(teacher_config))
    return Signal(signal.kind)


def held_out_signal(config: RunConfig) -> Signal:
    """The signal of the held-out rows: the K best ids, or the text where a service has no more."""
    if config.teacher.gives_text_only:
        return Signal("text")
    return Signal("topk", config.evaluation.top_k)


def hidden_size(teacher_config: Mapping[str, Any]) -> int:
    """D from a model's ``config.json``.

    A multimodal model's language part (``text_config``) comes before the top level.

    Raises:
        ValueError: none of ``HIDDEN_SIZE_NAMES`` is there.
    """
    values = {**teacher_config, **(teacher_config.get("text_config") or {})}
    for name in HIDDEN_SIZE_NAMES:
        if values.get(name):
            return int(values[name])
    raise ValueError(
        "signal.kind is 'hidden', but the teacher's config.json names no "
        f"{', '.join(HIDDEN_SIZE_NAMES)}; set signal.kind: topk"
    )
