"""Removes secrets from text: passwords in URIs, signed query values, values of secret variables.

Errors, lines of the driver, log records and stored copies of the configuration pass through it.
It is the only module that decides what a secret is. Imports the standard library only.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

HIDDEN = "***"
SHORTEST_SECRET = 8
"""Characters. A shorter value of an environment variable would match inside ordinary words."""

_USER = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
# ID:SECRET@ with a "/" in the secret that was not percent-encoded, as AWS keys have. The look-ahead
# leaves HOST:PORT/path@x alone.
_RAW_SECRET = re.compile(r"(?<=://)[^/\s:@'\"]+:(?!\d{1,5}(?:[/\s'\"]|$))[^\s'\"]+?(?=@)")
_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|secret|password|signature|credential|access_?key|api_?key|sig)=)"
    r"[^&\s'\"#]+",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|APIKEY)(?:$|_(?!PATH$|FILE$|DIR$|ENV$))"
)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return ``text`` without secrets.

    Credentials in a URI become ``***``; the value of a secret variable becomes ``$NAME``. Redacting
    a redacted text changes nothing.
    """
    secrets = {
        value: name
        for name, value in environment.items()
        if len(value) >= SHORTEST_SECRET and is_secret_name(name) and value in text
        if not os.path.exists(value)  # SSL_KEY=/etc/... names where the secret is.
    }
    # The longest first: one secret may be part of another.
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, f"${secrets[value]}")
    if "://" in text:
        text = _QUERY.sub(rf"\g<1>{HIDDEN}", _RAW_SECRET.sub(HIDDEN, _USER.sub(HIDDEN, text)))
    return text


def redacted(value: Any) -> Any:
    """Redact every text in nested mappings and lists; hide a text whose key names a secret."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {
            key: HIDDEN
            if isinstance(item, str) and isinstance(key, str) and is_secret_name(key)
            else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(redacted(item) for item in value)
    return value


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting with this name is a secret: ``HF_TOKEN``, ``hf_token``."""
    return _SECRET_NAME.search(name.upper()) is not None


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
