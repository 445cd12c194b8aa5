"""Line charts, bars and the timeline as SVG text.

The shapes are stretched to the width there is (``preserveAspectRatio="none"``), strokes are not
(``vector-effect``), and every word stands beside them as HTML: so text has one size on a phone, on
a wide screen and on paper, and follows the page's colours in light and dark.

What is drawn is bounded already: `curves.Curve` thins the points, `spent` joins the windows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raystill.base import formatting
from raystill.cluster.report.page.curves import Point
from raystill.cluster.report.page.html import Html, element, join

NUM_COLOURS = 6
WIDTH, HEIGHT = 1000, 200
"""Units of the drawing, not pixels."""
SMALLEST, LARGEST = 1e-300, 1e300
"""Heights between which floats have all their digits, and sums of them an end."""
SAME = 1e-9
"""Share of the larger of two heights by which they must differ to be two."""
LONG = 1e12
"""Height from which on a figure is written with an exponent."""


@dataclass(frozen=True)
class Series:
    """One curve. ``colour`` counts from 0; ``style`` is line, faint, level or dots."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    style: str = "line"


def line_chart(
    title: str, series: Sequence[Series], *, unit: str = "", x_name: str = "step", note: str = ""
) -> Html:
    """A figure with curves over one x axis, a legend, and what the curves say in a sentence."""
    points = [p for s in series for p in s.points if _finite(p[1])]
    if not points:
        return element("figure", _caption(title, "nothing recorded yet"), class_="chart")
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    ticks = nice_ticks(*_range(series))
    scale = _Scale(left, right, ticks[0], ticks[-1])
    grid = join(
        element("path", d=f"M0 {scale.y(tick):.1f}H{WIDTH}", class_="grid") for tick in ticks
    )
    curves = join(_curve(s, scale) for s in series)
    digits = _digits(ticks)
    labels = (
        element("span", _label(tick, digits), style=f"top:{100 * scale.y(tick) / HEIGHT:.2f}%")
        for tick in ticks
    )
    said = note or "; ".join(_said(s) for s in series if s.style not in ("faint", "level"))
    return element(
        "figure",
        _caption(title, unit),
        element(
            "div",
            element("div", *labels, class_="y-axis", aria_hidden="true"),
            _drawing(join([grid, curves]), f"{title}: {said}", "plot"),
            class_="frame",
        ),
        _x_axis(f"{x_name} {_number(left)}", _number(right)),
        _legend(series),
        element("p", said, class_="said"),
        class_="chart",
    )


def bar_chart(title: str, bars: Sequence[tuple[str, float]], note: str) -> Html:
    """A histogram: neighbouring bars of (label, height)."""
    most = max((height for _, height in bars), default=0) or 1.0
    width = WIDTH / max(1, len(bars))
    shapes = join(
        element(
            "rect",
            element("title", f"{label}: {height:,.0f}"),
            x=f"{number * width:.1f}",
            y=f"{HEIGHT * (1 - height / most):.1f}",
            width=f"{max(1.0, width - 3):.1f}",
            height=f"{HEIGHT * height / most:.1f}",
            class_="c1",
        )
        for number, (label, height) in enumerate(bars)
    )
    first, last = (bars[0][0], bars[-1][0]) if bars else ("", "")
    return element(
        "figure",
        _caption(title, "rows by length in tokens"),
        _drawing(shapes, f"{title}: {note}", "plot low"),
        _x_axis(first, last),
        element("p", note, class_="said"),
        class_="chart",
    )


def strip(name: str, shapes: Sequence[Html], said: str) -> Html:
    """One row of a timeline: a name, a stretched drawing, and what it says."""
    return element(
        "div",
        element("div", name, class_="strip-name"),
        _drawing(join(shapes), f"{name}: {said}", "strip"),
        element("div", said, class_="strip-said"),
        class_="strip-row",
    )


def area(edges: Sequence[float], heights: Sequence[float], bases: Sequence[float], c: str) -> Html:
    """Steps between ``bases`` and ``bases + heights`` (shares 0 to 1) over ``edges`` (0 to 1)."""
    parts = []
    for number, (base, height) in enumerate(zip(bases, heights, strict=True)):
        if height > 0:
            x, end = WIDTH * edges[number], WIDTH * edges[number + 1]
            top, bottom = HEIGHT * (1 - base - height), HEIGHT * (1 - base)
            parts.append(f"M{x:.1f} {bottom:.0f}V{top:.0f}H{end:.1f}V{bottom:.0f}Z")
    return element("path", d="".join(parts), class_=c)


def upright(x: float, title: str, c: str) -> Html:
    """A line from top to bottom at ``x`` (0 to 1)."""
    return element(
        "path", element("title", title), d=f"M{WIDTH * x:.1f} 0V{HEIGHT}", class_=f"line {c}"
    )


def swatch(colour: int, style: str = "line") -> Html:
    """The sample of a curve or an area in a legend."""
    if style == "area":
        shape = element("rect", width=18, height=10, y=1, class_=fill(colour))
    else:
        shape = element("path", d="M0 6H18", class_=_class(Series("", (), colour, style)))
    return element("svg", shape, class_="swatch", viewBox="0 0 18 12", aria_hidden="true")


def fill(colour: int) -> str:
    """The class of an area; colours that come a second time are paler."""
    return f"c{colour % NUM_COLOURS + 1}" + (" again" if colour >= NUM_COLOURS else "")


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``; from 0 where that costs little.

    Values that differ by rounding alone are one level; those that no axis has a place for are cut.
    """
    low, high = (min(max(end, -LARGEST), LARGEST) for end in (low, high))
    if max(-low, high) < SMALLEST:
        low = high = 0.0
    if 0 < low <= 0.75 * high:
        low = 0.0
    if high - low <= SAME * max(-low, high):
        low, high = min(low, 0.0), max(high, 0.0) if low else 1.0
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _range(series: Sequence[Series]) -> tuple[float, float]:
    """What the y axis has to hold: all values, but of faint curves not their rarest ones.

    A single spike would press all the rest into a line; it is drawn to the edge.
    """
    heights = [_height(p) for s in series if s.style != "faint" for p in s.points if _finite(p[1])]
    for one in (s for s in series if s.style == "faint"):
        values = sorted(_height(p) for p in one.points if _finite(p[1]))
        if values:
            cut = len(values) // 50
            heights += [values[cut], values[-1 - cut]]
    return min(heights), max(heights)


@dataclass(frozen=True)
class _Scale:
    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        span = self.right - self.left
        return WIDTH * ((value - self.left) / span if span else 0.5)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT * (1 - min(1.0, max(0.0, share)))


def _curve(series: Series, scale: _Scale) -> Html:
    known = [(x, y) for x, y in series.points if y is not None and _finite(y)]
    if series.style == "level" and known:
        return element("path", d=f"M0 {scale.y(known[0][1]):.1f}H{WIDTH}", class_=_class(series))
    path, pen_down = [], False
    for x, y in series.points:
        if y is None or not math.isfinite(y):
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{scale.x(x):.1f} {scale.y(y):.1f}")
        pen_down = True
    curve = element("path", d="".join(path), class_=_class(series))
    if len(known) > 12 and series.style != "dots":
        return curve
    # A line of no length with a round end is a dot that stretching leaves round.
    dots = "".join(f"M{scale.x(x):.1f} {scale.y(y):.1f}h0" for x, y in known)
    return join([curve, element("path", d=dots, class_=f"{_class(series)} dots")])


def _class(series: Series) -> str:
    return f"line s{series.colour % NUM_COLOURS + 1} {series.style}"


def _drawing(shapes: Html, label: str, class_: str) -> Html:
    return element(
        "svg",
        shapes,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        class_=class_,
    )


def _caption(title: str, unit: str) -> Html:
    return element("figcaption", title, element("span", unit, class_="unit") if unit else None)


def _x_axis(left: str, right: str) -> Html:
    return element("div", element("span", left), element("span", right), class_="x-axis")


def _legend(series: Sequence[Series]) -> Html | None:
    named = [s for s in series if s.name]
    if len(named) < 2:
        return None
    return element(
        "ul",
        *(element("li", swatch(s.colour, s.style), element("bdi", s.name)) for s in named),
        class_="legend",
    )


def _said(series: Series) -> str:
    known = [(x, y) for x, y in series.points if y is not None and _finite(y)]
    if not known:
        return f"{series.name}: nothing recorded"
    first, last = known[0][1], known[-1][1]
    if len(known) == 1:
        return f"{series.name} {_short(first)}"
    said = f"{series.name} {_short(first)} → {_short(last)}"
    least, greatest = min(map(_height, known)), max(map(_height, known))
    if least < min(first, last) or greatest > max(first, last):
        said += f", between {_short(least)} and {_short(greatest)}"
    return said


def _short(value: float) -> str:
    is_plain = not value or 1e-3 <= abs(value) < LONG
    return formatting.figure(value) if is_plain else f"{value:.2e}"


def _label(tick: float, digits: int) -> str:
    return f"{tick:,.{digits}f}" if abs(tick) < LONG else f"{tick:.2e}"


def _digits(ticks: Sequence[float]) -> int:
    step = ticks[1] - ticks[0]
    exact = next((d for d in range(8) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 8)
    return exact


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2f}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _height(point: Point) -> float:
    return point[1] if point[1] is not None else math.nan
