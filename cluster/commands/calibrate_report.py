"""What a calibration found, for a person: tables, the cheapest signal that will do, and a plot.

Consumes what `calibrate` returns (and calibration.json holds).
"""

import io
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from raystill.base import formatting
from raystill.base.run_folder import RunFolder

RESULT, PLOT = "calibration.json", "calibration.svg"
WIDTH = 110
HEADINGS = (
    "bytes/token",
    "teacher's\nmass",
    "student's\nmass",
    "loss of\nthe full",
    "cosine,\nlogits",
    "cosine,\nparameters",
    "loss,\nms",
    "loss,\nMB",
)


def cheapest(found: dict[str, Any], student: str, objective: str) -> str | None:
    """The signal of fewest bytes whose cosine at the parameters is the wanted one or more."""
    figures = found["students"][student]["objectives"][objective]["signals"]
    enough = [
        name
        for name, of in figures.items()
        if of["cosine_parameters"] is not None and of["cosine_parameters"] >= found["cosine"]
    ]
    return min(enough, key=lambda n: found["signals"][n]["bytes_per_token"], default=None)


def conclusions(found: dict[str, Any]) -> list[str]:
    """A line for each student and objective: the cheapest signal that will do."""
    lines = []
    for objective in next(iter(found["students"].values()))["objectives"]:
        for student, of in found["students"].items():
            name = cheapest(found, student, objective)
            text = "no signal: its gradient is 0"
            if name is not None:
                figures = of["objectives"][objective]["signals"][name]
                size = found["signals"][name]["bytes_per_token"]
                text = f"{name} (cosine {figures['cosine_parameters']:.4f}, {size:,.0f} bytes)"
            lines.append(f"{objective}, {student} student: {text}")
    return lines


def print_calibration(found: dict[str, Any], console: Console | None = None) -> None:
    """A table for each student and objective, then the conclusions and what to keep in mind."""
    console = console or Console(
        width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False
    )
    with console.capture() as captured:
        for student, of in found["students"].items():
            for objective, compared in of["objectives"].items():
                loss = compared["full_loss"]
                console.print(
                    f"\n{objective}, {student} student: {loss:.3f} a token over the whole "
                    f"vocabulary, {formatting.count(found['positions'])} positions of "
                    f"{formatting.plural(found['rows'], 'row')}"
                )
                console.print(_table(found, objective, compared))
        console.print(
            f"\nCheapest signal whose gradient at the parameters has a cosine of "
            f"{found['cosine']:g} or more with the whole vocabulary's:"
        )
        for line in conclusions(found):
            console.print(f"  {line}")
        console.print(
            "\ntext has no probabilities, so it stands for cross entropy on the drawn tokens; loss "
            "time and memory are of the head and the loss alone, forward and backward, with the "
            "gradients they leave"
        )
        for note in found["notes"]:
            console.print(f"note: {note}")
    for line in captured.get().splitlines():  # Tables pad their last column; nobody needs that.
        console.file.write(line.rstrip() + "\n")


def write_calibration(output: RunFolder, found: dict[str, Any]) -> None:
    """calibration.json and calibration.svg."""
    cheap = {
        student: {objective: cheapest(found, student, objective) for objective in of["objectives"]}
        for student, of in found["students"].items()
    }
    output.write_text(RESULT, json.dumps(found | {"cheapest": cheap}, indent=2) + "\n")
    output.write_bytes(PLOT, plot(found))


def plot(found: dict[str, Any]) -> bytes:
    """An SVG: for each student, 1 - cosine at the parameters against bytes a token."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "raystill"  # The same figure is the same file.
    students = found["students"]
    figure = Figure(figsize=(1 + 5 * len(students), 4.2), layout="constrained")
    panels = figure.subplots(1, len(students), sharey=True, squeeze=False)[0]
    size = {name: of["bytes_per_token"] for name, of in found["signals"].items()}
    full = max(size, key=lambda name: found["signals"][name]["kind"] == "hidden")
    for axes, (student, of) in zip(panels, students.items(), strict=True):
        for objective, compared in of["objectives"].items():
            cosines = {n: f["cosine_parameters"] for n, f in compared["signals"].items()}
            points = [
                (size[n], 1 - c, n) for n, c in cosines.items() if c is not None and n != full
            ]
            axes.plot(
                [x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=objective
            )
        lowest = {name: min(y for x, y, n in points if n == name) for _, _, name in points}
        for name, y in lowest.items():
            axes.annotate(
                name, (size[name], y), textcoords="offset points", xytext=(4, 4), fontsize=7
            )
        axes.axvline(size[full], color="grey", linestyle=":", label=f"{full}: the reference")
        axes.axhline(1 - found["cosine"], color="grey", linestyle="--", label="wanted")
        axes.set(xscale="log", yscale="log", title=f"{student} student")
        axes.set_xlabel("bytes a response token, as stored")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("1 - cosine with the full gradient, parameters")
    panels[-1].legend(frameon=False, fontsize=8)
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def _table(found: dict[str, Any], objective: str, compared: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim")
    table.add_column("signal")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for name, of in compared["signals"].items():
        signal, cost = found["signals"][name], found["costs"][objective][name]
        peak = cost["peak_bytes"]
        table.add_row(
            name,
            formatting.figure(signal["bytes_per_token"], 1),
            formatting.figure(signal["teacher_mass"], 4),
            formatting.figure(of["student_mass"], 4),
            formatting.figure(of["loss_ratio"], 4),
            formatting.figure(of["cosine_logits"], 4),
            formatting.figure(of["cosine_parameters"], 4),
            formatting.figure(1000 * cost["seconds"], 0),
            formatting.figure(None if peak is None else peak / 1e6, 0),
        )
    return table
