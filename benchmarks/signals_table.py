"""What `benchmarks.signals` found, as a table and a plot.

    python -m benchmarks.signals_table [benchmarks/results/signals.json] [--plot docs/signals.svg]

does both again from its file.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and spread over the seeds of the last figures; differences are of the same seed."""
    last = {(run["signal"], run["seed"]): run["curve"][-1] for run in runs}
    found = {}
    for name in dict.fromkeys(run["signal"] for run in runs):
        mine = {seed: figures for (signal, seed), figures in last.items() if signal == name}
        kl = [figures["kl"] for figures in mine.values()]
        more = [f["kl"] - last["hidden", seed]["kl"] for seed, f in mine.items()
                if ("hidden", seed) in last]  # fmt: skip
        found[name] = {
            "kl_mean": statistics.mean(kl),
            "kl_min": min(kl),
            "kl_max": max(kl),
            "over_hidden_mean": statistics.mean(more) if more else float("nan"),
            "over_hidden_min": min(more, default=float("nan")),
            "over_hidden_max": max(more, default=float("nan")),
            **{
                n: statistics.mean(f[n] for f in mine.values())
                for n in ("acceptance", "top1", "outside")
            },
        }
    return found


def table(summary: dict[str, dict[str, float]]) -> str:
    """The summary as Markdown."""
    lines = [
        "| signal | held-out KL, nats/token (least to most) | more than `hidden`, same seed | "
        "acceptance | top-1 | student's mass outside the teacher's 8 best |",
        "|---|---|---|---|---|---|",
    ]
    for name, f in summary.items():
        more = "-"
        if name != "hidden":
            more = f"{f['over_hidden_mean']:+.3f} ({f['over_hidden_min']:+.3f} to "
            more += f"{f['over_hidden_max']:+.3f})"
        lines.append(
            f"| {name} | {f['kl_mean']:.3f} ({f['kl_min']:.3f} to {f['kl_max']:.3f}) | {more} | "
            f"{f['acceptance']:.3f} | {f['top1']:.3f} | {f['outside']:.3f} |"
        )
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], before: dict[str, float], path: Path) -> None:
    """Held-out KL over the steps: the mean of the seeds, with all of them as a band."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "raystill"  # The same figure is the same file.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(run["signal"] for run in runs):
        curves = [run["curve"] for run in runs if run["signal"] == name]
        steps = [0] + [point["step"] for point in curves[0]]
        kl = np.array([[before["kl"]] + [point["kl"] for point in curve] for curve in curves])
        (line,) = axes.plot(steps, kl.mean(axis=0), marker="o", markersize=3, label=name)
        axes.fill_between(steps, kl.min(axis=0), kl.max(axis=0), color=line.get_color(), alpha=0.2)
    axes.set(xlabel="optimizer step", ylabel="held-out KL(teacher || student), nats/token")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3, which="both")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", default="benchmarks/results/signals.json")
    parser.add_argument("--plot", type=Path, default=Path("docs/signals.svg"))
    arguments = parser.parse_args()
    found = json.loads(Path(arguments.result).read_text())
    print(table(found["summary"]))
    plot(found["runs"], found["before"], arguments.plot)


if __name__ == "__main__":
    main()
