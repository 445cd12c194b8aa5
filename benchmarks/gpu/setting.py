"""What the parts share: the device, the sizes, the bars, and how something is timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from raystill.config.objective import ObjectiveConfig

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TOP_K = 64
FORWARD_KL = ObjectiveConfig(forward_kl=1.0)


@dataclass
class Bars:
    """What was wanted and what was found; ``held`` of a bar is None where it is only printed."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def most(self, name: str, value: float, bound: float, held: bool = True) -> None:
        """A figure that should be at most ``bound``; infinity and NaN are not."""
        self._add(name, value, f"<= {bound:g}", value <= bound, held)

    def least(self, name: str, value: float, bound: float, held: bool = True) -> None:
        """A figure that should be at least ``bound``."""
        self._add(name, value, f">= {bound:g}", value >= bound, held)

    def _add(self, name: str, value: float, wanted: str, fits: bool, held: bool) -> None:
        line = {"name": name, "value": value, "wanted": wanted, "held": fits if held else None}
        self.lines.append(line)
        word = ("ok" if fits else "FAILS") if held else "not held here"
        print(f"  {name:<58} {value:10.4g}  {wanted:<10} {word}", flush=True)

    @property
    def failed(self) -> list[str]:
        """Names of the bars that fail."""
        return [line["name"] for line in self.lines if line["held"] is False]


@dataclass(frozen=True)
class Sizes:
    """Of the loss, and of the student."""

    vocab: int
    hidden: int
    tokens: int
    student: dict[str, int]
    micro_batch: int
    rows: int
    row_tokens: int


LARGE = Sizes(
    vocab=151_936,
    hidden=4096,
    tokens=8192,
    student={
        **{"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192},
        **{"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    },
    micro_batch=16_384,
    rows=64,
    row_tokens=1024,
)
SMALL = Sizes(
    vocab=2048,
    hidden=64,
    tokens=256,
    student={
        **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    },
    micro_batch=256,
    rows=8,
    row_tokens=48,
)
SIZES = LARGE if GPU else SMALL


def timed(work: Callable[[], Any], rounds: int = 5) -> tuple[float, float]:
    """Seconds of the fastest round, and bytes at the peak above those before (0 on a CPU)."""
    work()
    best, peak = float("inf"), 0.0
    for _ in range(rounds):
        if GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        work()
        if GPU:
            torch.cuda.synchronize()
            peak = float(torch.cuda.max_memory_allocated() - before)
        best = min(best, time.perf_counter() - started)
    return best, peak
