"""Personal data and keys in texts: found by their forms, counted by kind, and masked.

E-mail addresses, telephone numbers, public IP addresses, bank accounts and credit cards (both with
their check digits), and keys of services by the forms that these publish. A form is all that is
looked at: names, street addresses and what is written in words stay unseen. No text that is found
is told to anybody; callers get kinds, places and counts.

A first look by RE2 over many texts at once passes few of them on to the expressions here. Each
expression takes time in proportion to the text: what may repeat has a bound, or begins where no
match of it can have begun before.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import NamedTuple

BATCH_TEXTS = 1_000


class Found(NamedTuple):
    """A place in a text: its kind, first character, and the one after its last."""

    kind: str
    start: int
    end: int


_IBANS = """
AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29
ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20
LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25
QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"""
IBAN_LENGTHS = {code[:2]: int(code[2:]) for code in _IBANS.split()}
"""Characters of an account's number by its country, of the IBAN registry (ISO 13616)."""
CARDS = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|"
    r"7[01][0-9]|720)[0-9]{12}|3[47][0-9]{13}|6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}|"
    r"3(?:0[0-5]|[68][0-9])[0-9]{11}|35(?:2[89]|[3-8][0-9])[0-9]{12}|62[0-9]{14,17}"
)
"""First digits and lengths of Visa, Mastercard, American Express, Discover, Diners Club, JCB and
UnionPay."""
LEAST_ENTROPY, HIGH_ENTROPY = 3.3, 4.0
"""Bits a character of a value that counts as random: with two digits or more, and with one. Words
and names in code have less, or no digits; 16 random hexadecimal digits have 3.2 to 3.7."""


def _is_card(text: str) -> bool:
    digits = re.sub(r"[ -]", "", text)
    if CARDS.fullmatch(digits) is None:
        return False
    # Luhn's sum: from the right, every second digit doubled, and the digits of the result added.
    doubled = (sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _is_public(text: str) -> bool:
    """Whether it is an address that names somebody: not private, loopback or for examples."""
    try:
        return ip_address(text).is_global
    except ValueError:
        return False


def entropy(text: str) -> float:
    """Shannon's entropy of a text's characters, in bits a character."""
    counts = Counter(text).values()
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts) if text else 0.0


def _is_random(text: str) -> bool:
    """Whether a value looks drawn by chance: letters, digits, and many different ones."""
    digits = sum(c in "0123456789" for c in text)
    least = LEAST_ENTROPY if digits > 1 else HIGH_ENTROPY
    return 0 < digits < len(text) and entropy(text) >= least


def _has_key(text: str) -> bool:
    return re.search(r"[A-Za-z0-9+/]{20}", text) is not None


def _anything(text: str) -> bool:
    return True


class Form(NamedTuple):
    """One form. ``value``: what a match has to be; its group ``it`` is the place, else all."""

    kind: str
    pattern: re.Pattern[str]
    value: Callable[[str], bool]


def _form(kind: str, pattern: str, value: Callable[[str], bool] = _anything) -> Form:
    return Form(kind, re.compile(pattern, re.ASCII | re.DOTALL), value)


_TOKEN = r"[A-Za-z0-9_-]"
FORMS = (
    _form(
        "private_key",
        r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:(?!-----BEGIN).){20,20000}?(?:-----END [A-Z0-9 ]{0,40}-----|\Z)",
        _has_key,
    ),
    _form("aws_key", r"(?<![A-Za-z0-9])(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    _form("anthropic_key", rf"(?<!{_TOKEN})sk-ant-{_TOKEN}{{20,200}}"),
    _form("openai_key", rf"(?<!{_TOKEN})sk-(?!ant-){_TOKEN}{{20,200}}", _is_random),
    _form(
        "github_token",
        r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{30,255}|github_pat_[A-Za-z0-9_]{22,255})",
    ),
    _form(
        "slack_token",
        r"(?<![A-Za-z0-9])(?:xox[abeoprs]|xapp)-[A-Za-z0-9-]{10,250}"
        r"|hooks\.slack\.com/services/[A-Z0-9]{6,20}/[A-Z0-9]{6,20}/[A-Za-z0-9]{16,40}",
        lambda text: any(c.isdigit() for c in text),
    ),
    _form("huggingface_token", r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,60}"),
    _form("google_key", rf"(?<![A-Za-z0-9])AIza{_TOKEN}{{35}}"),
    _form("stripe_key", r"(?<![A-Za-z0-9])[sr]k_(?:live|test)_[0-9A-Za-z]{16,250}"),
    _form("gitlab_token", rf"(?<![A-Za-z0-9])glpat-{_TOKEN}{{20,60}}"),
    _form(
        "jwt",
        rf"(?<!{_TOKEN})eyJ{_TOKEN}{{8,4000}}\.eyJ{_TOKEN}{{4,8000}}\.{_TOKEN}{{16,2000}}",
    ),
    _form("url_password", r"(?<=://)[^/\s:@]{1,64}:[^/\s@]{3,128}(?=@)"),
    _form(
        "assigned_secret",
        r"(?i:(?:api|access|account|auth|client|encryption|private|secret|shared|signing)[_ -]?"
        r"(?:key|token|secret)|passw(?:or)?d|passphrase|secret|token)['\"]?\s{0,4}(?:=|:|:=|=>)"
        r"\s{0,4}['\"]?(?P<it>[A-Za-z0-9+/=_~-]{16,200})(?![A-Za-z0-9+/=_~.(\[-])",
        _is_random,
    ),
    _form(
        "email",
        r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
        r"[A-Za-z]{2,24}(?![A-Za-z0-9-])",
    ),
    _form(
        "credit_card",
        r"(?<![\w.,-])(?:[0-9]{13,19}|[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{1,3})?"
        r"|[0-9]{4}([ -])[0-9]{6}\2[0-9]{4,5})(?![\w-]|[.,][0-9])",
        _is_card,
    ),
    _form(
        "ip_address",
        r"(?<![\w.:])(?:(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w]|\.[0-9])"
        r"|[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:]))",
        _is_public,
    ),
    _form(
        "phone",
        r"(?<![\w+])\+[1-9](?:[ ()./-]{0,2}[0-9]){7,14}(?![0-9])"
        r"|(?<![\w.+-])(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[.-])[2-9][0-9]{2}[.-][0-9]{4}(?![\w-])"
        r"|(?<![A-Za-z])(?i:tel|telephone|telefon|phone|mobile|cell|fax)\.?(?i: (?:number|no\.?))?"
        r"(?: is)?[ ]?[:=]?[ ]?(?P<it>\(?[0-9](?:[ ()./-]{0,2}[0-9]){6,14})(?![0-9])",
    ),
)
KINDS = (*(form.kind for form in FORMS), "iban")
"""All kinds, as they are counted."""
KEYS = KINDS[: KINDS.index("email")]
"""The kinds that give access to something."""
SERVICE_KEYS = tuple(k for k in KEYS if k not in ("private_key", "url_password", "assigned_secret"))
"""The kinds that are known by how they begin, whatever stands around them."""
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?= ?[A-Z0-9]{4})", re.ASCII)
SUSPICIOUS = (
    r"[\w.%+-]@[A-Za-z0-9]|(?:[0-9][ ()./-]{0,2}){7}|(?:[0-9]{1,3}\.){3}[0-9]"
    r"|[23][0-9A-Fa-f]{3}:|[A-Z]{2}[0-9]{2} ?[A-Z0-9]{4}|PRIVATE KEY|A(?:KI|SI|BI|CC)A[A-Z0-9]{16}"
    r"|sk-[A-Za-z0-9_-]{20}|gh[pousr]_|github_pat_|xox[abeoprs]-|xapp-|hooks\.slack\.com|hf_[A-Za-z]"
    r"|AIza|k_(?:live|test)_|glpat-|eyJ|://[^/\s:@]{1,64}:"
    r"|(?i:key|token|secret|passw(?:or)?d|passphrase)['\"]?\s{0,4}[=:]"
)
"""By RE2: what every text matches in which anything can be found."""


def find(text: str) -> list[Found]:
    """All places in a text, in order; of two that overlap the one that begins first."""
    places = [*_places(text), *_ibans(text)]
    found: list[Found] = []
    for place in sorted(places, key=lambda one: (one.start, -one.end)):
        if not found or place.start >= found[-1].end:
            found.append(place)
    return found


def mask(text: str, kinds: Sequence[str] = KINDS) -> str:
    """The text with a mark in each place, ``[EMAIL]`` for example; ``kinds``: those to mask.

    Masking a masked text changes nothing.
    """
    while found := [place for place in find(text) if place.kind in kinds]:
        parts, end = [], 0
        for place in found:
            parts += [text[end : place.start], mark(place.kind)]
            end = place.end
        text = "".join(parts) + text[end:]
    return text


def mark(kind: str) -> str:
    """What stands in a masked text for a place of this kind."""
    return f"[{kind.upper()}]"


def kinds_in(texts: Sequence[str]) -> list[frozenset[str]]:
    """The kinds of what each text holds; most hold nothing, which RE2 tells of many at once."""
    return [frozenset(place.kind for place in found) for found in find_many(texts)]


def find_many(texts: Sequence[str]) -> Iterator[list[Found]]:
    """`find` for each text."""
    import pyarrow as pa  # Late: commands that look at no text need not pay for it.
    import pyarrow.compute as pc

    for start in range(0, len(texts), BATCH_TEXTS):
        batch = texts[start : start + BATCH_TEXTS]
        looked_at = pa.array([text.encode("utf-8", "replace") for text in batch], pa.large_binary())
        suspicious = pc.match_substring_regex(looked_at, SUSPICIOUS).to_pylist()
        for text, look in zip(batch, suspicious, strict=True):
            yield find(text) if look else []


def told(counts: Mapping[str, int]) -> str:
    """``email 3, phone 1``, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{kind} {count:,}" for kind, count in ordered)


def _places(text: str) -> Iterator[Found]:
    for form in FORMS:
        for match in form.pattern.finditer(text):
            group: int | str = "it" if match.re.groupindex and match["it"] is not None else 0
            if form.value(match[group]):
                yield Found(form.kind, *match.span(group))


def _ibans(text: str) -> Iterator[Found]:
    """Account numbers: as long as their country has them, single spaces between, 97 divides."""
    for match in _IBAN.finditer(text):
        start, left = match.start(), IBAN_LENGTHS.get(match[0][:2], 0)
        characters, end = "", start
        while end < len(text) and len(characters) < left:
            character = text[end]
            if character in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789":
                characters += character
            elif character != " " or text[end - 1] == " ":
                break
            end += 1
        ends = not re.match(r"[A-Za-z0-9]", text[end : end + 1])
        if left and len(characters) == left and ends:
            # ISO 7064: the first four characters go to the end, letters count from A = 10.
            number = "".join(str(int(c, 36)) for c in characters[4:] + characters[:4])
            if int(number) % 97 == 1:
                yield Found("iban", start, end)


def is_kind(name: str) -> str:
    """ValueError for a name that is no kind of personal data."""
    if name not in KINDS:
        raise ValueError(f"is {name!r}; expected one of {', '.join(KINDS)}")
    return name
