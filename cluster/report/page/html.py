"""HTML as text that cannot be mixed up with data: what is no ``Html`` is escaped.

``element`` makes every tag of the page. Text from prompts, answers and configurations reaches the
page only as a child or an attribute of it, so a ``</style>`` in an answer is four visible letters
more. Characters that act instead of being read (terminal escapes, overrides of the writing
direction) are shown as their names.
"""

import html
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

LONGEST_TEXT = 4_000
"""Characters of one text that the page shows; what is longer says how long it is."""

_VOID = frozenset({"meta", "br"})
# Controls but tab and line feed; line and paragraph separators; embeddings, overrides and isolates
# of the writing direction; halves of a surrogate pair, which UTF-8 cannot hold; byte order mark.
_ACTS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_CONTROL_PICTURES = 0x2400
_DELETE_PICTURE = "\u2421"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = Html | str | int | float | None


def readable(text: str) -> str:
    """``text`` with a visible name for each character that acts: ``␛``, ``⟨U+202E⟩``."""
    return _ACTS.sub(_name, text.replace("\r\n", "\n"))


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """``text``, or its start with its length where it has more than ``longest`` characters."""
    if len(text) <= longest:
        return text
    return f"{text[: max(longest // 2, longest - 40)]} … ({len(text):,} characters in all)"


def escape(text: Any) -> Html:
    """Text of any origin as HTML, safe as content and inside a quoted attribute."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(readable(str(text)), quote=True))


def element(name: str, /, *children: Child, **attributes: Any) -> Html:
    """A tag with its children; None is no child, and no attribute.

    Attribute names: ``class_`` is ``class``, ``aria_label`` is ``aria-label``. The casing of
    ``viewBox`` and the like is kept.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{said}>")
    return Html(f"<{name}{said}>{join(children)}</{name}>")


def join(children: Iterable[Child], between: str = "") -> Html:
    """Children one behind the other; None is left out, a text is cut to ``LONGEST_TEXT``."""
    made = (
        child if isinstance(child, Html) else escape(shortened(str(child)))
        for child in children
        if child is not None
    )
    return Html(between.join(made))


def table(
    caption: str, headings: Iterable[Child], rows: Iterable[Iterable[Child]], class_: str = ""
) -> Html:
    """A table whose first column heads the rows; it scrolls by itself where it is too wide."""
    head = element("tr", *(element("th", heading, scope="col") for heading in headings))
    body = []
    for row in rows:
        first, *others = row
        cells = (element("td", cell) for cell in others)
        body.append(element("tr", element("th", first, scope="row"), *cells))
    whole = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *body),
        class_=class_ or None,
    )
    return element("div", whole, class_="scrolls", tabindex=0, role="region", aria_label=caption)


def _name(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(_CONTROL_PICTURES + code)
    if code == 0x7F:
        return _DELETE_PICTURE
    if unicodedata.category(match[0]) == "Cs":
        return "\ufffd"
    return f"⟨U+{code:04X}⟩"
