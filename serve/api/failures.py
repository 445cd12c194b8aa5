"""What a failed request to a service means: try again, drop the row, or end the run.

*Consumes* the errors of the OpenAI client. `Service` acts on the verdict.
"""

import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from raystill.base.redact import redact
from raystill.datasets.rows.schema import FATAL

LONGEST_PAUSE_S = 60.0
LENGTH_CODES = {"context_length_exceeded", "string_above_max_length"}
FILTER_CODES = {"content_filter", "content_policy_violation", "moderation_blocked"}
NOT_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout"}
"""Failures of the HTTP client before it had a connection."""
CREDIT_CODES = {
    *("insufficient_quota", "billing_hard_limit_reached", "exceeded_current_quota_error"),
    *("insufficient_balance", "insufficient_credits", "payment_required"),
}
"""Codes and types of errors by which services say that the credit is used up."""
LATE = (408, 502, 504, 524)
"""Status where something before the model gave up; it may answer all the same, and be charged."""


class Unread(Exception):
    """The body of a response that is not read to its end. name: under which it is counted."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name, self.why = name, why

    def __str__(self) -> str:
        return self.why


class Verdict:
    """What to do about a failure that may pass.

    name: under which it is counted. retry_after_s: what the service asks for. too_fast: whether
    waiting is all it takes; then it is no attempt (``counts`` 0). lost: whether the service may
    have answered, and charges for it.
    """

    def __init__(
        self,
        name: str,
        retry_after_s: float | None = None,
        too_fast: bool = False,
        lost: bool = False,
    ) -> None:
        self.name = name
        self.lost = lost
        self.retry_after_s = retry_after_s
        self.too_fast = too_fast
        self.counts = 0 if too_fast else 1


def judge(error: BaseException) -> Verdict | str:
    """What a failed request means: to be tried again, or the row's error.

    Raises the error itself where it is a mistake of ours.
    """
    import httpx2
    import openai

    unread = unread_of(error)
    if unread is not None:
        return Verdict(unread.name, lost=True)
    if isinstance(error, TimeoutError):
        return Verdict("timeout", lost=True)
    if isinstance(error, httpx2.TransportError):  # While a file is read.
        timeout = isinstance(error, httpx2.TimeoutException)
        return Verdict("timeout" if timeout else "connection", lost=True)
    if isinstance(error, openai.APIConnectionError):  # Timeouts are a kind of these.
        sent = type(error.__cause__).__name__ not in NOT_SENT
        name = "timeout" if isinstance(error, openai.APITimeoutError) else "connection"
        return Verdict(name, lost=sent)
    # Not JSON, not UTF-8, or nested without end.
    if isinstance(error, openai.APIResponseValidationError | ValueError | RecursionError):
        return Verdict("broken_answer", lost=True)
    if not isinstance(error, openai.APIStatusError):
        raise error
    status, codes = error.status_code, {str(error.code or ""), str(error.type or "")}
    if status == 429 and not codes & CREDIT_CODES:
        return Verdict("too_many_requests", retry_after(error.response.headers), too_fast=True)
    if status >= 500 or status in (408, 409, 425):
        lost = status in LATE
        return Verdict(f"status_{status}", retry_after(error.response.headers), lost=lost)
    if codes & LENGTH_CODES or _is_too_long(error):
        return "too_long"
    if codes & FILTER_CODES:
        return "content_filter"
    return f"{FATAL}the service refuses the request: {describe(error)}; see teacher.api"


def _is_too_long(error: Any) -> bool:
    """Whether a prompt is refused for its length, by vLLM's words, or by a gateway's (413)."""
    asked = error.response.request.url.path.endswith("completions")
    named = error.param == "input_tokens" or "maximum context length" in str(error)
    return asked and (error.status_code == 413 or (error.status_code == 400 and named))


def unread_of(error: BaseException | None) -> Unread | None:
    """The body that was not read, of an error of the client; None where it failed otherwise."""
    for one in (error, getattr(error, "__cause__", None)):
        if isinstance(one, Unread):
            return one
    return None


def refuses_everybody(error: BaseException) -> bool:
    """Whether the next row would fare the same: the key, the model, or the credit is refused."""
    codes = {str(getattr(error, name, "")) for name in ("code", "type")}
    return getattr(error, "status_code", None) in (401, 402, 404) or bool(codes & CREDIT_CODES)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the service asks to wait for, by its headers; None: it does not say."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except KeyError:
            continue
        except ValueError:
            seconds = _seconds_until(headers[name])
        if 0 <= seconds < float("inf"):
            return seconds
    return None


def _seconds_until(day: str) -> float:
    """Seconds until an HTTP date, 0 if it has passed; infinity for a text that is no date."""
    try:
        return max(0.0, parsedate_to_datetime(day).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return float("inf")


def describe(error: BaseException | None) -> str:
    """A failure in a line, without secrets."""
    error = unread_of(error) or error
    text = " ".join(str(error).split())
    return redact(f"{type(error).__name__}: {text}")[:400]


def pause_s(attempt: int) -> float:
    """Seconds before the next attempt: doubled each time, with jitter so that rows do not meet."""
    longest: float = min(LONGEST_PAUSE_S, 0.5 * 2**attempt)
    return longest * random.uniform(0.5, 1.0)
