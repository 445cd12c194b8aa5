"""What must never be shown: passwords in URIs, signed query values, secrets of the environment.

The one place that knows what a secret looks like. Errors, the driver's own lines, log records and
the copies of the configuration pass through it; imports nothing but the standard library.
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
"""Characters; a shorter value of the environment would be found inside ordinary words."""

_USER = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
# ID:SECRET@ whose secret has a "/" that was not percent-encoded; HOST:PORT/... is none.
_RAW_SECRET = re.compile(r"(?<=://)[^/\s:@'\"]+:(?!\d{1,5}(?:[/\s'\"]|$))[^\s'\"]+?(?=@)")
_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|secret|password|signature|credential|access_?key|api_?key|sig)=)"
    r"[^&\s'\"#]+",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|APIKEY)(?:$|_(?!PATH$|FILE$|DIR$))"
)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """``text`` without credentials: URIs lose theirs, values of secret variables their place.

    Redacting twice changes nothing more.
    """
    secrets = {
        value: name
        for name, value in environment.items()
        if len(value) >= SHORTEST_SECRET and is_secret_name(name) and value in text
        if not os.path.exists(value)  # SSL_KEY=/etc/... names where the secret is.
    }
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, f"${secrets[value]}")
    if "://" in text:
        text = _QUERY.sub(rf"\g<1>{HIDDEN}", _RAW_SECRET.sub(HIDDEN, _USER.sub(HIDDEN, text)))
    return text


def redacted(value: Any) -> Any:
    """Mappings and lists with every text redacted, and texts under a secret's name hidden."""
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
    """Whether a variable or setting of that name holds a secret: ``HF_TOKEN``, ``hf_token``."""
    return _SECRET_NAME.search(name.upper()) is not None


def redact_log_records() -> Callable[[], None]:
    """Redact every record that this process logs from now on; returns the undoing."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return lambda: None

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            told = record.getMessage()
        except (TypeError, ValueError):  # Its handler will say what is wrong with it.
            return record
        if (clean := redact(told)) != told:
            record.msg, record.args = clean, ()
        return record

    make_redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_redacted)

    def undo() -> None:
        if logging.getLogRecordFactory() is make_redacted:
            logging.setLogRecordFactory(make)

    return undo


def redact_uncaught_errors() -> None:
    """Redact the traceback that ends this process, should one."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr)

    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = show
