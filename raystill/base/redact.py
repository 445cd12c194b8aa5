"""Removes secrets from text: passwords in URIs, signed query values, values of secret variables.

Errors, lines of the driver, log records and stored copies of the configuration pass through it.
It is the only module that decides what a secret of the run is; by which forms a service's keys are
known, in whatever text, is in ``personal.py``. Imports the standard library only.
"""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any
from urllib.parse import quote, quote_plus

from raystill.base.personal import FORMS, SERVICE_KEYS

HIDDEN = "***"
SHORTEST_SECRET = SHORTEST_PART = 8
"""Characters. A shorter value of an environment variable would match inside ordinary words."""
LONGEST_NAME = 100
"""Characters. Of names up to so many the answer is kept: they are those of settings."""
DEEPEST = 50
"""Levels of nested values that are searched for secrets; deeper ones are hidden whole."""

# Data of any length passes through these expressions, so that a repetition which could begin anew
# within itself has a bound: without one, 20 KB of "a-a-a-" take a minute.

# All up to the last "@" of the authority: a password may hold one.
_USER = re.compile(
    r"(?<=://)[^/\s]+(?=@)"
    # With a slash or the scheme forgotten, which is then told as a path that is not there.
    r"|(?:(?<=:/)|(?<=//))[^/\s:@'\"]{1,200}:[^/\s'\"]{1,400}(?=@)"
)
# ID:SECRET@ with a "/" in the secret that was not percent-encoded, as AWS keys have. The look-ahead
# leaves HOST:PORT/path@x alone.
_RAW_SECRET = re.compile(
    r"(?<=://)[^/\s:@'\"]{1,200}:(?!\d{1,5}(?:[/\s'\"]|$))[^\s'\"]{1,400}?(?=@)"
    r"(?:@[^/\s@'\"]{1,200}(?=@)){0,20}"
)
_SECRET_WORDS = (
    r"(?:token|secret|passw(?:or)?d|passphrase|pwd|signature|credentials?|auth|pass|jwt|"
    r"(?:access|account|api|secret|private|shared|subscription)[_-]?key|sig|sas)"
)
_QUERY = re.compile(
    rf"((?:[?&;#]|%3F|%26)(?:[\w.%-]{{0,100}}{_SECRET_WORDS}|key)(?:=|%3D))"
    r"(?:[^&\s'\"#]|['\"](?![\s,;:)\]}]|$))+",
    re.IGNORECASE,
)
# What stands after a name that holds a secret, in a text that is no mapping: "hf_token: x".
_ASSIGNED = re.compile(
    r"((?<![\w.-])[\w-]{0,100}?(?:(?:hf|auth|access|refresh|session|sas)[_-]?token|secret|"
    r"passw(?:or)?d|passphrase|pwd(?!['\"]?\s*[=:]\s*['\"]?/)|(?:access|account|api|private)[_-]?key)"
    r"['\"]?(?:\s*[=:]\s*|\s+(?=['\"]))['\"]?)"
    r"(?![\s'\"]|\*\*\*|\$[A-Z_]|is |are )[^\s'\",;}\]]+",
    re.IGNORECASE,
)
# A word after an option, and all of a header that has several values.
_GIVEN = re.compile(
    r"((?<![\w-])--[\w-]{0,60}?(?:token|secret|passw(?:or)?d|passphrase|api-key)\s+['\"]?)"
    r"(?!\*\*\*)[^\s'\",;}\]]{8,}",
    re.IGNORECASE,
)
_COOKIE = re.compile(r"(\b(?:set-)?cookie:\s*)(?!\*\*\*)[^\s'\"][^\r\n'\"]+", re.IGNORECASE)
_KNOWN_FORMS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
    r"|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|\b(?:npm|gsk|r8|dckr_pat|lin_api|do[opr]_v1|shp(?:at|ca|pa|ss))_[\w-]{30,}"
    r"|\b(?:pypi|xai|nvapi|tskey)-[\w-]{30,}|\b(?:SG|hvs|ya29)\.[\w-]{20,}(?:\.[\w-]{20,})?"
    r"|\bAGE-SECRET-KEY-1[0-9A-Z]{40,}|(?<=\b[Bb]earer )[\w.~+/=-]{16,}"
    r"|(?<=\b[Bb]asic )(?=[A-Za-z+/]{0,200}[\d=])[\w+/=-]{12,}",
    re.DOTALL,
)
"""Private keys, and tokens that are known by how they begin."""
_SERVICE_KEYS = re.compile(
    "|".join(form.pattern.pattern for form in FORMS if form.kind in SERVICE_KEYS),
    re.ASCII | re.DOTALL,
)
_SECRET_NAME = re.compile(
    r"(?!.*_(?:PATH|FILE|DIR|ENV)$)(?:.*_)?(?:(?:TOKEN|KEY|\w*(?:SECRET|PASSWORD|PASSWD|PASSPHRASE)S?|"
    r"APIKEY|(?:ACCESS|AUTH|API)_?TOKENS?)\d{0,3}(?:$|_)|(?:AUTH|AUTHORIZATION|BEARER|COOKIE|PASS|"
    r"PGPASS|PWD|PAT|SAS|DSN|JWT|CREDS?|MNEMONIC|CREDENTIALS?(?:_JSON)?|"
    r"CONNECTION_STRING|(?:WEBHOOK|SAS)(?:_URL)?)$)"
)
_SECRET_END = re.compile(
    r"(?:(?:TOKEN|KEY|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE)\d{0,3}|AUTH|AUTHORIZATION|BEARER|COOKIE|"
    r"JWT|CREDS?|CREDENTIALS?|CONNECTION_STRING)$"
)
_BREAKS = re.compile(r"[- .]|(?<=[a-z0-9])(?=[A-Z])")
_FOLDER_NAMES = frozenset({"PWD", "OLDPWD"})


class Secrets:
    """Values that no text may hold, in all the spellings that a text can give them.

    The settings of a run file are `learnt` as they are read, before any message is made of them. A
    value is hidden whole: of a part of it nobody would know that it is one.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def learn(self, value: Any) -> None:
        """Learn each text that a mapping, however deep in ``value``, has under a secret's name."""
        waiting = [(value, False, 0)]
        while waiting:
            one, secret, depth = waiting.pop()
            if depth > DEEPEST:
                continue
            if isinstance(one, dict):
                for name, inner in one.items():
                    text = isinstance(inner, str) and isinstance(name, str)
                    named = is_secret_name(name) if text else _holds_secrets(name)
                    waiting.append((inner, secret or named, depth + 1))
            elif isinstance(one, list | tuple):
                waiting += [(inner, secret, depth + 1) for inner in one]
            elif secret and (
                _is_long_number(one) or (isinstance(one, str) and len(one) >= SHORTEST_SECRET)
            ):
                self._names[str(one)] = HIDDEN

    def hide(self, text: str, environment: Mapping[str, str]) -> str:
        """``text`` without the learnt values and those of the environment's secret variables."""
        return _without(text, self.spelt(environment))

    def spelt(self, environment: Mapping[str, str]) -> list[tuple[str, str]]:
        """Every spelling of these values, with what is shown in its place, for many texts.

        The longest come first: one secret may be part of another.
        """
        values = dict(self._names)
        for name, value in environment.items():
            if len(value) < SHORTEST_SECRET or not is_secret_name(name) or name in _FOLDER_NAMES:
                continue
            if not (os.sep in value and _names_a_file(value)):  # SSL_KEY=/etc/... names where.
                values[value] = f"${name}"
        found = {s: shown for value, shown in values.items() for s in spellings(value)}
        return sorted(found.items(), key=lambda pair: len(pair[0]), reverse=True)


def _without(text: str, spelt: Sequence[tuple[str, str]]) -> str:
    for spelling, shown in spelt:
        text = text.replace(spelling, shown)
    return text


@lru_cache(maxsize=512)
def spellings(value: str) -> frozenset[str]:
    """How a text may spell ``value``: plain, quoted by Python, JSON or a URI, on one line, by line.

    Python's and JSON's quotes are taken twice, as in the text of an error about an error.
    """
    once = {value, repr(value)[1:-1], json.dumps(value)[1:-1], ascii(value)[1:-1]}
    once |= {json.dumps(value, ensure_ascii=False)[1:-1], value.replace("'", "''")}
    once |= {value.replace("'", "\\'"), value.replace('"', '\\"')}
    twice = {repr(text)[1:-1] for text in once} | {json.dumps(text)[1:-1] for text in once}
    whole = value.encode("utf-8", "surrogatepass")
    others = {quote(whole), quote(whole, safe=""), quote_plus(whole), " ".join(value.split())}
    lines = set(value.splitlines()) | {line.strip() for line in value.splitlines()}
    return frozenset(s for s in once | twice | others | lines if len(s) >= SHORTEST_SECRET)


def _names_a_file(value: str) -> bool:
    try:
        return os.path.exists(value)
    except ValueError:  # A NUL.
        return False


SECRETS = Secrets()
"""Those of this process."""


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return ``text`` without secrets.

    Credentials in a URI become ``***``; the value of a secret variable becomes ``$NAME``. Redacting
    a redacted text changes nothing.
    """
    return _redact(text, SECRETS.spelt(environment))


def _redact(text: str, spelt: Sequence[tuple[str, str]]) -> str:
    text = _without(text, spelt)
    if ":/" in text or "//" in text:
        text = _QUERY.sub(rf"\g<1>{HIDDEN}", _RAW_SECRET.sub(HIDDEN, _USER.sub(HIDDEN, text)))
    text = _SERVICE_KEYS.sub(HIDDEN, _KNOWN_FORMS.sub(HIDDEN, text))
    for form in (_ASSIGNED, _GIVEN, _COOKIE):
        text = form.sub(rf"\g<1>{HIDDEN}", text)
    return text


def redacted(value: Any) -> Any:
    """Redact every text in nested mappings and lists, keys too; hide texts below a secret's name.

    Of a value this makes another value, so that no text of it (``repr``, JSON, a shortened one) can
    hold a part of a secret.
    """
    # The environment is read once: of some 50 variables it takes as long as a hundred texts.
    return _redacted(value, SECRETS.spelt(os.environ), 0)


def _redacted(value: Any, spelt: Sequence[tuple[str, str]], depth: int) -> Any:
    if isinstance(value, str):
        return _redact(value, spelt)
    if depth > DEEPEST:
        return HIDDEN
    if isinstance(value, dict):
        return {
            _redact(key, spelt) if isinstance(key, str) else key: _hidden(item)
            if _holds_secrets(key)
            or (isinstance(item, str) and isinstance(key, str) and is_secret_name(key))
            else _redacted(item, spelt, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_redacted(item, spelt, depth + 1) for item in value)
    return value


def _hidden(value: Any) -> Any:
    """A value under a secret's name: texts and long numbers are hidden, others stay (an id)."""
    if isinstance(value, list | tuple):
        telling = any(isinstance(v, str | dict | list) or _is_long_number(v) for v in value)
        return HIDDEN if telling else value
    return HIDDEN if isinstance(value, str | dict) or _is_long_number(value) else value


def _is_long_number(value: Any) -> bool:
    """Whether it is an integer with as many digits as a secret has characters: a password."""
    return isinstance(value, int) and 10 ** (SHORTEST_SECRET - 1) <= value < 10**100


def shown_value(value: Any, longest: int = 200) -> str:
    """A value as Python writes it, for a message: no secrets, at most so many characters."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write it.
        return f"an integer of {value.bit_length():,} bits"
    text = repr(redacted(value))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def holds_part(text: str) -> bool:
    """Whether eight characters of a secret are in a text, such as one that was cut within it."""
    return any(
        spelling[i : i + SHORTEST_PART] in text
        for spelling, _ in SECRETS.spelt(os.environ)
        for i in range(len(spelling) - SHORTEST_PART + 1)
    )


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting with this name is a secret: ``HF_TOKEN``, ``hf_token``."""
    if len(name) <= LONGEST_NAME:
        return _is_secret_name(name)
    return _is_secret_name.__wrapped__(name)  # A key of a megabyte, which is not to be kept.


@lru_cache(maxsize=4096)
def _is_secret_name(name: str) -> bool:
    return _SECRET_NAME.match(_in_capitals(name)) is not None


def _holds_secrets(name: Any) -> bool:
    """Whether all texts below this name are secrets: ``hf_token``, but not ``token_weights``."""
    if not isinstance(name, str) or not is_secret_name(name):
        return False
    return _SECRET_END.search(_in_capitals(name)) is not None


def _in_capitals(name: str) -> str:
    """``accessKey``, ``access-key`` and ``access key`` as ``ACCESS_KEY``."""
    return _BREAKS.sub("_", name).upper()


def redact_log_records() -> Callable[[], None]:
    """Redact every record that this process logs from now on. Returns a function that undoes it."""
    # By the record factory: a filter would have to be on every handler, also on later ones.
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return lambda: None

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # Arguments that do not fit: the handler reports them.
            return record
        if (clean := redact(message)) != message:
            record.msg, record.args = clean, ()
        return record

    make_redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_redacted)

    def undo() -> None:
        if logging.getLogRecordFactory() is make_redacted:
            logging.setLogRecordFactory(make)

    return undo


def redact_uncaught_errors() -> None:
    """Redact the traceback of an exception that ends this process."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr)

    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = show
