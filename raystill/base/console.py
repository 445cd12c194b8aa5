"""The end of a command: an error that has no sentence of its own, an output that nobody reads."""

import select
import tempfile
import traceback
from typing import TextIO

from raystill.base.errors import shown
from raystill.base.redact import redact


def unexpected(error: Exception) -> str:
    """A sentence on an error that has none; its traceback is in a file that the sentence names."""
    text = redact("".join(traceback.format_exception(error)))
    with tempfile.NamedTemporaryFile(
        "w", prefix="raystill-", suffix=".log", delete=False, errors="backslashreplace"
    ) as file:
        file.write(text)
    reason = shown(f"{type(error).__name__}: {error}")
    return f"unexpected: {reason}; the whole story is in {file.name}, please report it"


def nobody_reads(stream: TextIO) -> bool:
    """Whether the stream is a pipe whose reader has closed it, as ``| head -1`` does."""
    try:
        descriptor = stream.fileno()
    except OSError:  # A test's stand-in.
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # Of no event: an error is reported always.
    return bool(poll.poll(0))
