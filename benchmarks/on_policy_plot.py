"""What `benchmarks.on_policy` found, as a picture: each seed a dot, each arm's mean a line.

python -m benchmarks.on_policy_plot [benchmarks/results/on_policy.json] [--plot FILE]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.on_policy import ARMS

PANELS = {
    "reverse_kl": "KL(student || teacher)\non its own writing, nats/token",
    "repeated_4grams": "repeated 4-grams,\nshare",
    "held_out_kl": "KL(teacher || student)\non the teacher's text, nats/token",
}


def columns(results: list[dict[str, Any]], name: str) -> dict[str, list[float]]:
    """One figure of every seed: before (once a seed), then after, by arm in their order."""
    before = {result["seed"]: result["before"][name] for result in results}
    found = {"before": [before[seed] for seed in sorted(before)]}
    for arm in ARMS:
        mine = sorted((r["seed"], r["after"][name]) for r in results if r["arm"] == arm)
        if mine:
            found[arm] = [value for _, value in mine]
    return found


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Three panels beside each other."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "raystill"  # The same figure is the same file.
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        found = columns(results, name)
        for place, values in enumerate(found.values()):
            color = "0.5" if place == 0 else f"C{place - 1}"
            axes.plot([place] * len(values), values, "o", color=color, markersize=4, alpha=0.7)
            mean = sum(values) / len(values)
            axes.plot([place - 0.3, place + 0.3], [mean, mean], color=color)
        axes.set(ylabel=title, ylim=(0, None))
        axes.set_xticks(range(len(found)), list(found))
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", default="benchmarks/results/on_policy.json")
    parser.add_argument("--plot", type=Path, default=Path("docs/on-policy.svg"))
    given = parser.parse_args()
    plot(json.loads(Path(given.result).read_text())["results"], given.plot)


if __name__ == "__main__":
    main()
