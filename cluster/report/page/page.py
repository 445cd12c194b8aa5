"""The page of a run, ``report.html``: one file without scripts and without anything from outside.

Consumes run folders (`read.RunReader`), one or several. Written by the driver while a run goes on
and at its end, however it ends, and by ``raystill report`` at any time later:

    raystill report runs/quickstart
    raystill report runs/a runs/b --html both.html
"""

import os
import stat
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raystill import __version__
from raystill.base import formatting
from raystill.base.errors import RunError
from raystill.base.records import number
from raystill.base.redact import redact
from raystill.base.run_folder import (
    COMPARISON,
    CONFIG,
    MANIFEST,
    METRICS,
    REPORT,
    SUMMARY,
    RunFolder,
    split_query,
)
from raystill.cluster.report.page.answers import answers
from raystill.cluster.report.page.facts import configuration, data, lineage
from raystill.cluster.report.page.html import Child, Html, element, join, shortened
from raystill.cluster.report.page.learned import figure, learned
from raystill.cluster.report.page.read import RunData, RunReader
from raystill.cluster.report.page.spent import spent

BEGIN = "<!doctype html>"
RELOAD_S = 60
"""Seconds after which a browser loads the page of a running run again."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SECTIONS = (
    ("learned", "What was learned", learned),
    ("spent", "Where the time went", spent),
    ("answers", "Answers to held-out prompts", answers),
    ("data", "Data", data),
    ("lineage", "Lineage", lineage),
    ("configuration", "Configuration", configuration),
)
STATES = {
    "running": "running",
    "completed": "finished",
    "stopped": "stopped; the same command resumes it",
    "failed": "failed; the same command resumes it",
    "lost": "broken off: its driver is gone; the same command resumes it",
    "unknown": "no end recorded",
}


def write_page(folders: Sequence[RunFolder], target: str | None = None) -> str:
    """Write the page of one run, or of several side by side; its path or URI.

    target: where to; by default ``report.html`` in the run's folder, ``comparison.html`` in the
    first of several. Raises RunError for a folder without a run, OSError where the page cannot be
    written.
    """
    for folder in folders:
        if not any(folder.exists(name) for name in (CONFIG, MANIFEST, SUMMARY, METRICS)):
            raise RunError(
                f"{folder.path} has no {SUMMARY}, and no {CONFIG}: it is not the folder of a run; "
                "name the folder of one, e.g. runs/quickstart"
            )
    if target is None:
        place, name = folders[0], REPORT if len(folders) == 1 else COMPARISON
    else:
        plain, query = split_query(target if "://" in target else os.path.abspath(target))
        parent, _, name = plain.rpartition("/")
        place = RunFolder(parent + query)
        if place.is_local:
            _require_free(Path(plain))
    text = page([RunReader(folder).read() for folder in folders])
    place.write_text(name, text)
    return place.join(name)


def _require_free(path: Path) -> None:
    """RunError for what is there and is no page: a report is not to take its place."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise RunError(f"{path} is a folder, device or pipe; name a file for the page")
        with path.open("rb") as file:
            begin = file.read(len(BEGIN))
    except OSError:  # Nothing is there, or writing says why.
        return
    if begin and begin.lower() != BEGIN.encode():
        raise RunError(f"{path} is there and is no page; name another file for it")


def page_anew(folder: RunFolder) -> str:
    """Make a run's page anew after a command has measured more; the end of a sentence about it."""
    try:
        return f" and {formatting.path(write_page([folder]))}"
    except OSError as error:
        return f"; the page cannot be written ({error})"


def page(runs: Sequence[RunData], now: float | None = None) -> str:
    """The whole document. ``now``: seconds since 1970 at which it is written."""
    runs = _told_apart(runs)
    names = " and ".join(run.name for run in runs)
    title = f"{names} · Raystill" if len(runs) == 1 else f"{names} compared · Raystill"
    reload_s = RELOAD_S if any(run.state == "running" for run in runs) else None
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", http_equiv="refresh", content=str(reload_s)) if reload_s else None,
        element("title", shortened(title, 200)),
        element("style", Html(_style())),
    )
    links = (element("a", heading, href=f"#{key}") for key, heading, _ in SECTIONS)
    sections = (
        element("section", element("h2", heading, id=key), make(runs))
        for key, heading, make in SECTIONS
    )
    written = _moment(time.time() if now is None else now)
    body = element(
        "body",
        element("header", _heading(runs), element("nav", *links, aria_label="Sections")),
        element("main", *sections),
        element("footer", f"Written by Raystill {__version__} on {written} from ", _folders(runs)),
    )
    return f"{BEGIN}\n{element('html', head, body, lang='en')}\n"


def _told_apart(runs: Sequence[RunData]) -> Sequence[RunData]:
    """The runs; those of one name are named by more of their paths (``a/tiny``, ``b/tiny``)."""
    parts = [split_query(run.path)[0].rstrip("/").split("/") for run in runs]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len({run.path for run in runs}):
            return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    return runs


def _style() -> str:
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def _heading(runs: Sequence[RunData]) -> Html:
    if len(runs) > 1:
        named = join((element("bdi", run.name) for run in runs), ", ")
        lines = (
            element("p", element("bdi", run.name), " ", _badge(run), _failure(run)) for run in runs
        )
        return join([element("h1", named), *lines])
    run = runs[0]
    parts: list[Child] = [
        element("h1", element("bdi", run.name), " ", _badge(run)),
        element("p", _course(run), class_="lead"),
        _failure(run),
        element("dl", *_tiles(run), class_="tiles"),
    ]
    return join(parts)


def _badge(run: RunData) -> Html:
    state = run.state if run.state in STATES else "unknown"
    return element("span", STATES[state], class_=f"state {state}")


def _failure(run: RunData) -> Html | None:
    if run.state != "failed":
        return None
    return element("p", shortened(redact(str(run.status.get("error") or ""))), class_="failure")


def _course(run: RunData) -> str:
    """When it began, how far it is, and since when nothing is known."""
    parts = []
    if run.windows and (ended := number(run.windows[0].get("time"))):
        parts.append(f"began {_moment(ended - run.windows[0]['seconds'])}")
    at = number(run.status.get("time"))
    if run.state == "running" and at is not None:
        parts.append(f"this start began {_moment(at)}; the page reloads every {RELOAD_S} seconds")
    elif at is not None:
        parts.append(f"ended {_moment(at)}")
    if teacher := run.manifest.get("teacher"):
        parts.append(f"teacher {shortened(str(teacher), 200)}")
    if run.broken_lines:
        parts.append(f"{formatting.plural(run.broken_lines, 'unreadable line')} left out")
    return " · ".join(parts)


def _tiles(run: RunData) -> list[Html]:
    before, after = run.before, run.after
    newest = after or before
    tiles: list[tuple[str, str, str]] = []
    for name, label in (
        ("kl_nats_per_token", "held-out KL, nats/token"),
        ("top1_agreement", "held-out top-1 agreement"),
    ):
        if newest:
            was = f"before {figure(before, name)}" if after else "before training"
            tiles.append((label, figure(newest, name), was))
    total = number(run.summary.get("rows_total"))
    rows = run.metrics["rows"].total if "rows" in run.metrics else 0.0
    of_all = f"of {formatting.count(total)} rows" if total else "rows"
    tiles.append(("trained", formatting.count(rows), f"{of_all}, {run.step:,} steps"))
    wall = number(run.summary.get("wall_s")) or sum(w["seconds"] for w in run.windows)
    resumed = int(number(run.summary.get("restarts")) or 0)
    said = f"resumed {formatting.plural(resumed, 'time')}" if resumed else "in one go"
    tiles.append(("time", formatting.duration(wall), said if run.summary else "so far"))
    return [
        element(
            "div",
            element("dt", label),
            element("dd", value, element("small", small)),
            class_="tile",
        )
        for label, value, small in tiles
    ]


def _folders(runs: Sequence[RunData]) -> Html:
    return join((element("code", formatting.path(run.path)) for run in runs), ", ")


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, OSError, ValueError):
        return formatting.NOTHING
