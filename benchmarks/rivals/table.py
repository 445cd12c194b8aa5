"""The tables of what is finished, as Markdown: mechanics alone, and each with its own means."""

from collections.abc import Sequence
from typing import Any

from benchmarks.rivals.parts import SIDES
from benchmarks.rivals.settings import Folder, Settings, read_json

NAMES = {
    "hf": "(a) HF `generate`, then TRL GKD",
    "vllm": "(b) vLLM to a file, then TRL GKD",
    "policy": "(c) TRL GKD on-policy",
    "raystill": "(d) Raystill",
    "policy-distill": "(e) TRL DistillationTrainer, on-policy",
    "policy-raystill": "(f) Raystill, on-policy",
}
ON_POLICY = ("policy", "policy-distill", "policy-raystill")
AIMS = (0.9, 0.7)
"""Held-out KL, nats a token, to which the second table tells the time."""


def records(folder: Folder) -> dict[str, dict[str, Any]]:
    """The records of all finished parts, by name."""
    paths = sorted((folder.work / "parts").glob("*.json"))
    return {path.stem: read_json(path) for path in paths}


def parts_of(done: dict[str, Any], side: str, which: int | str) -> dict[str, Any]:
    """A side's finished parts for one student that count, by what follows the side's name."""
    mine = [p for p in done.values() if p["side"] == side and p["which"] == str(which)]
    before = f"{which}-{side}-"
    return {part["part"].removeprefix(before): part for part in mine if part["counts"]}


def is_whole(side: str, which: int, parts: dict[str, Any]) -> bool:
    """Whether nothing is missing of a side's time for one student."""
    wished = {"hf": {"sample", "train"}, "vllm": {"sample", "train"}, "raystill": {"run"}}
    wished["policy-raystill"] = {"run"}
    needed = wished.get(side, {"train"})
    return set(parts) >= (needed - {"sample"} if which > 1 else needed)


def time_of(done: dict[str, Any], side: str, which: int) -> float | None:
    """Seconds from prompts to a student; None while a part is missing."""
    parts = parts_of(done, side, which)
    if side == "hf" and which > 1:
        return time_of(done, "vllm", which)
    return sum(p["wall_s"] for p in parts.values()) if is_whole(side, which, parts) else None


def kl_of(done: dict[str, Any], side: str, which: int | str) -> float | None:
    """Held-out KL of one student by the evaluator."""
    judged = done.get(f"{which}-{side}-judge")
    return judged["figures"]["kl_nats_per_token"] if judged else None


def shown(value: float | None, digits: int = 0) -> str:
    """A figure, or a dash for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def ratio(theirs: float | None, ours: float | None) -> str:
    """How many times our time theirs is."""
    return "-" if theirs is None or not ours else f"{theirs / ours:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def mechanics(done: dict[str, Any], settings: Settings) -> str:
    """Time and KL of each side for each student, and of all students together."""
    count = range(1, len(settings.layers) + 1)
    ours = {n: time_of(done, "raystill", n) for n in count}
    rows = []
    for side in SIDES:
        cells, total, our_total = [NAMES[side]], 0.0, 0.0
        for n in count:
            seconds = time_of(done, side, n)
            kl = kl_of(done, side, n)
            star = "*" if side == "hf" and n > 1 and seconds is not None else ""
            cells.append(f"{shown(seconds)}{star} s, KL {shown(kl, 2)}")
            cells.append(ratio(seconds, ours[n]))
            total, our_total = total + (seconds or 0), our_total + (ours[n] or 0)
        whole = all(time_of(done, side, n) is not None and ours[n] is not None for n in count)
        cells += [f"{total:,.0f} s", ratio(total, our_total)] if whole else ["-", "-"]
        rows.append(cells)
    starts = ["start"]
    for n in count:
        starts += [f"KL {shown(kl_of(done, 'start', n), 2)}", ""]
    rows.append([*starts, "", ""])
    head = [""]
    for n in count:
        head += [f"student {n}, {settings.layers[n - 1]} layers", "/ (d)"]
    return table([*head, "all", "/ (d)"], rows)


def loops_of(done: dict[str, Any], side: str) -> dict[int, dict[str, float]]:
    """Tokens, seconds of the loop and of the whole, by student, of an on-policy side."""
    found = {}
    for part in done.values():
        if part["side"] == side and part["counts"] and "loop_s" in part["figures"]:
            found[int(part["which"])] = {**part["figures"], "wall_s": part["wall_s"]}
    return found


def rate(loops: Sequence[dict[str, float]], seconds: str) -> float:
    """Response tokens a second over some students."""
    return sum(one["tokens"] for one in loops) / sum(one[seconds] for one in loops)


def on_policy(done: dict[str, Any]) -> str:
    """Tokens a second of the sides whose student writes every row: in the loop, and in all."""
    loops = {side: loops_of(done, side) for side in ON_POLICY}
    ours = loops["policy-raystill"]
    students = sorted({n for one in loops.values() for n in one})
    rows = []
    for group in [*([n] for n in students), students] if len(students) > 1 else [students]:
        for side in ON_POLICY:
            if any(n not in loops[side] for n in group):
                continue
            mine = [loops[side][n] for n in group]
            name = str(group[0]) if len(group) == 1 else "all"
            cells = [name, NAMES[side], f"{sum(one['tokens'] for one in mine):,.0f}"]
            for seconds in ("loop_s", "wall_s"):
                cells.append(shown(sum(one[seconds] for one in mine)))
                cells.append(shown(rate(mine, seconds), 1))
                both = all(n in ours for n in group)
                us = rate([ours[n] for n in group], seconds) if both else None
                cells.append("-" if us is None else f"{us / rate(mine, seconds):.2f}")
            rows.append(cells)
    head = ["student", "on-policy", "tokens", "loop, s", "tokens/s", "(f) /"]
    return table([*head, "whole, s", "tokens/s", "(f) /"], rows)


def conditions(done: dict[str, Any]) -> str:
    """Where the time went, and what else the machine did meanwhile."""
    columns = {"wall_s": 0, "own_cores": 2, "other_cores": 2, "load": 1}
    rows = [
        [name, part["date"], *(shown(part[key], digits) for key, digits in columns.items())]
        for name, part in sorted(done.items(), key=lambda item: item[1]["date"])
        if part["counts"]
    ]
    return table(["part", "ended (UTC)", "s", "its cores", "others' cores", "load"], rows)


def until(curve: Sequence[tuple[float, float]], aim: float) -> float | None:
    """The first second at which a curve of (seconds, KL) is at the aim; None if it never is."""
    return next((seconds for seconds, kl in curve if kl <= aim), None)


def own_curves(done: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """(seconds from prompts, held-out KL) of each side with its own means."""
    curves: dict[str, list[tuple[float, float]]] = {}
    run, kl = done.get("own-raystill-run"), kl_of(done, "raystill", "own")
    ours = done.get("own-raystill-curve")
    if run and ours and kl is not None:
        points = ours["figures"]["curve"]
        curves["raystill"] = [(p["training_s"], p["kl_nats_per_token"]) for p in points]
        curves["raystill"].append((run["wall_s"], kl))
    trains = [p for name, p in sorted(done.items()) if name.startswith("own-trl-train")]
    judged = [p for name, p in sorted(done.items()) if name.startswith("own-trl-judge")]
    sample = done.get("own-trl-sample")
    if trains and judged and sample:
        curve = judged[-1]["figures"]["curve"]
        first = judged[0]["figures"]["curve"]
        loading = max(0.0, trains[0]["wall_s"] - first[-1]["training_s"])
        before = sample["wall_s"] + loading
        curves["trl"] = [(before + p["training_s"], p["kl_nats_per_token"]) for p in curve]
    return curves


def own_means(done: dict[str, Any]) -> str:
    """Seconds to each aim; where it was not reached, the seconds that were not enough."""
    curves = own_curves(done)
    rows = []
    for side, name in (("trl", "vLLM to a file, then TRL GKD"), ("raystill", "Raystill's demo")):
        curve = curves.get(side, [])
        cells = [name]
        for aim in AIMS:
            seconds = until(curve, aim)
            best = f"not in {curve[-1][0]:,.0f} s" if curve else "-"
            cells.append(f"{seconds:,.0f} s" if seconds is not None else best)
        cells.append(", ".join(f"{kl:.2f} at {seconds:,.0f} s" for seconds, kl in curve) or "-")
        rows.append(cells)
    return table(["", *(f"to KL {aim}" for aim in AIMS), "held-out KL by time"], rows)


def tables(folder: Folder, settings: Settings, machine: dict[str, Any]) -> str:
    """Everything that is finished."""
    done = records(folder)
    job = (
        f"{settings.rows} rows, {settings.steps} steps of {settings.rows_per_step}, answers of at "
        f"most {settings.max_tokens} tokens; {settings.held_out} held-out prompts; "
        f"{machine['cpu']}, {settings.cores} cores."
    )
    said = [job, mechanics(done, settings)]
    if any(loops_of(done, side) for side in ON_POLICY):
        said.append(on_policy(done))
    if any(name.startswith("own-") for name in done):
        said.append(own_means(done))
    said.append(conditions(done))
    return "\n\n".join(said)
