"""Compares an answer with a reference: the last box, else the last number, or the whole text.

Numbers are exact fractions, so 0.5, .50, 1/2 and \\frac{1}{2} are equal, and so are 1,000 and 1000.
Signs of currency and percent and units are ignored: 50% equals 50 and not 0.5. What an answer can
make slow or large is bounded: only its end is read, and a number of many digits is text.
"""

import re
from fractions import Fraction
from typing import Literal

END_CHARS = 20_000
"""Characters of a text's end that are searched."""
MOST_DIGITS, LARGEST_EXPONENT = 60, 99
"""Of a number; a longer one is compared as text."""

NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![)\]}])[-+])?"  # A sign, unless it is between two numbers.
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?"
    r"(?:\s?/\s?\d+(?![\d/]|\.\d))?"
    r"(?!\.?\d)"  # Not the beginning of 1.2.3.
)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"[{}]")
FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
MIXED = re.compile(
    r"(?<![\w.,/^])(\d{1,30})\s*\\[dtc]?frac\s*\{\s*(\d{1,30})\s*\}\s*\{\s*(\d{1,30})\s*\}"
)
"""A number and a fraction that are one: 3 1/2."""
NOTATION = re.compile(r"\\(?:left|right|text|mathrm|mathbf|,|;|!|\s)|[${}\s]|\\%|%|\\\$")
MINUS = str.maketrans("\u2212\u2013", "--")


def agrees(
    answer: str, reference: str, by: Literal["value", "text"], tolerance: float = 0.0
) -> bool:
    """Whether an answer says what the reference says.

    tolerance: largest difference of two numbers, as a share of the reference.
    """
    if by == "text":
        return plain(answer) == plain(reference)
    said, meant = value_of(answer), value_of(reference)
    if said is None or meant is None:  # Without box and number the words of a reference count.
        return meant is None and plain(answer) == plain(reference)
    if isinstance(said, Fraction) and isinstance(meant, Fraction):
        return abs(said - meant) <= Fraction(tolerance) * abs(meant)
    return said == meant


def plain(text: str) -> str:
    """The text without case, surplus spaces, and a full stop at its end."""
    return " ".join(text.casefold().split()).removesuffix(".")


def value_of(text: str) -> Fraction | str | None:
    """What a text gives as its result: a number, the text of a box, or None."""
    end = text[-END_CHARS:].translate(MINUS)
    boxed = last_box(end)
    if boxed is not None:
        number = number_of(boxed)
        return NOTATION.sub("", boxed).casefold() if number is None else number
    numbers = [match[0] for match in NUMBER.finditer(_without_frac(end))]
    if not numbers:
        return None
    number = _parsed(numbers[-1])
    return numbers[-1].replace(",", "").lower() if number is None else number


def last_box(text: str) -> str | None:
    r"""Contents of the last ``\boxed{...}`` whose braces are closed; None without one."""
    boxes = {match.end() - 1 for match in BOX.finditer(text)}
    open_braces: list[int] = []
    start, end = -1, -1
    for brace in BRACE.finditer(text):
        place = brace.start()
        if brace[0] == "{":
            open_braces.append(place)
        elif open_braces and (opened := open_braces.pop()) in boxes and opened > start:
            start, end = opened, place
    return None if start < 0 else text[start + 1 : end]


def number_of(text: str) -> Fraction | None:
    """The number that the whole text is, in plain or LaTeX notation; None where it is none."""
    plain_text = NOTATION.sub("", _without_frac(text)).replace("\\", "")
    match = NUMBER.fullmatch(plain_text)
    return None if match is None else _parsed(match[0])


def _without_frac(text: str) -> str:
    r"""The text with a/b for ``\frac{a}{b}``, and 7/2 for ``3\frac{1}{2}``."""

    def improper(match: re.Match[str]) -> str:
        whole, above, below = (int(part) for part in match.groups())
        return f"{whole * below + above}/{below}"

    return FRACTION.sub(r"\1/\2", MIXED.sub(improper, text))


def _parsed(number: str) -> Fraction | None:
    """A match of NUMBER as a fraction; None where it has too many digits, or a divisor of 0."""
    number = number.replace(",", "").replace(" ", "")
    exponent = re.search(r"[eE]([-+]?\d+)", number)
    if len(number) > MOST_DIGITS or (exponent and abs(int(exponent[1])) > LARGEST_EXPONENT):
        return None
    whole, _, divisor = number.partition("/")
    if divisor and int(divisor) == 0:
        return None
    return Fraction(whole) / int(divisor or 1)
