"""A teacher behind an OpenAI-compatible API: messages in, the text as the student's ids out.

Where it sits: in a Serve replica like every engine, so that stream, store, credits and figures are
the same; one replica is the one limiter of its service. The stream carries token ids, so the chat
of each prompt is looked up by its ids in ``prompts/messages.parquet``, which the driver wrote.
*Waits for* the service, as `limits.Limits` lets it.

An answer's text becomes ids with the student's tokenizer, never by rendering the chat again, and
special tokens in it are plain text. The stop token is added only where the service says that it is
complete. An answer whose ids do not give back its text is dropped.

A failure that more patience does not mend (no credit, no such model, the budget) ends the run after
what is paid has been stored: the row's error begins with ``FATAL``.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from raystill.base.redact import redact
from raystill.base.run_folder import MESSAGES, RunFolder
from raystill.config.teacher import ApiConfig, TeacherConfig
from raystill.datasets.rows.answers import Answer, Int32Array
from raystill.datasets.rows.keys import prompt_digest
from raystill.datasets.rows.schema import FATAL
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import ResolvedSampling
from raystill.serve.engine.limits import BudgetReached, Limits, Spending, Usage

MAX_TRANSIENT = 8
"""Attempts of one row at a service that fails by itself (5xx, cut connections, broken answers)."""
MAX_UNUSABLE = 3
"""Attempts of one row whose answer comes, and is paid for, without a text."""
LONGEST_PAUSE_S = 60.0
UNBOUNDED = 2**31 - 1
UNREADABLE = (AttributeError, TypeError, ValueError, IndexError, KeyError)
"""What an answer of an unexpected shape raises where it is read."""
LENGTH_CODES = {"context_length_exceeded", "string_above_max_length"}
FILTER_CODES = {"content_filter", "content_policy_violation", "moderation_blocked"}
CREDIT_CODES = {"insufficient_quota", "billing_hard_limit_reached"}


class ApiEngine:
    """One service, asked for one chat completion a row."""

    name = "api"
    dtype = "unknown"

    def __init__(
        self,
        teacher: TeacherConfig,
        sampling: ResolvedSampling,
        tokenizer: Tokenizer,
        messages: pa.Table,
        limits: Limits,
    ) -> None:
        """messages: columns ``digest`` and ``messages`` (JSON). limits: rates and budget."""
        import openai

        self.version = openai.__version__
        self._api: ApiConfig = teacher.api
        self._timeout_s = teacher.request_timeout_s
        self._sampling = sampling
        self._tokenizer = tokenizer
        # Text that looks like a special token stays text: nobody but the template ends a turn.
        self._tokenizer.encode_special_tokens = True
        self._messages: dict[bytes, str] = dict(
            zip(messages["digest"].to_pylist(), messages["messages"].to_pylist(), strict=True)
        )
        self._limits = limits
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.max_model_len = teacher.max_model_len or UNBOUNDED
        self._client: Any = None
        self._refused: str | None = None
        """Why the service answers nobody; rows that wait then do not ask it."""

    async def start(self) -> None:
        """Makes the client; the service is asked nothing yet."""
        import openai

        self._client = openai.AsyncOpenAI(
            base_url=self._api.base_url,
            api_key=os.environ.get(self._api.api_key_env or "", "") or "none",
            max_retries=0,  # A repeated request may be paid twice: each is counted here.
            timeout=self._timeout_s,
        )

    async def sample(self, prompt_ids: Sequence[Int32Array], signal: Signal) -> list[Answer]:
        """Answer a group of prompts, in order. Prompts that cannot be answered have an error."""
        if signal.kind != "text":
            raise ValueError(f"an API teacher gives text only, not {signal.kind}")
        return list(await asyncio.gather(*map(self._answer, prompt_ids)))

    async def score(
        self,
        prompt_ids: Sequence[Int32Array],
        response_ids: Sequence[Int32Array],
        signal: Signal,
        at: Sequence[Int32Array] | None = None,
    ) -> list[Answer]:
        """A given response is its own text; other signals cannot be had: ValueError."""
        if signal.kind != "text" or at is not None:
            raise ValueError("an API teacher cannot score responses; set signal.kind: text")
        return [Answer(ids, "length") for ids in response_ids]

    async def probe(self) -> None:
        """Does nothing: the replica is healthy, whatever the service is."""

    def close(self) -> None:
        """Does nothing: the client ends with the process."""

    async def _answer(self, prompt_ids: Int32Array) -> Answer:
        text = self._messages.get(prompt_digest(prompt_ids))
        if text is None:
            return Answer(error=f"{FATAL}a prompt has no messages in prompts/messages.parquet")
        messages = json.loads(text)
        transient = unusable = 0
        last: BaseException | None = None
        while transient < MAX_TRANSIENT and unusable < MAX_UNUSABLE:
            try:
                async with self._limits.turn(len(prompt_ids), self._sampling.max_tokens) as turn:
                    if self._refused is not None:
                        return Answer(error=self._refused)
                    completion = await self._ask(messages)
                    turn.paid(self._paid(completion, len(prompt_ids)))
            except BudgetReached as error:
                return Answer(error=f"{FATAL}{error}")
            except Exception as error:
                verdict = judge(error)
                if isinstance(verdict, str):
                    if refuses_everybody(error):
                        self._refused = verdict
                    return Answer(error=verdict)
                transient, last = transient + verdict.counts, error
                self._limits.failed(verdict.name, verdict.retry_after_s, verdict.too_fast)
                if not verdict.too_fast:
                    await asyncio.sleep(_pause(transient))
                continue
            answer = self._understood(completion)
            if answer.error not in ("empty_answer", "broken_answer"):
                if answer.error is not None:
                    self._limits.count(answer.error)
                return answer
            unusable += 1
            self._limits.count(answer.error)
        if unusable:
            return answer
        return Answer(
            error=f"{FATAL}{self._api.base_url} failed {transient} times for one row (last: "
            f"{describe(last)}); start the run again later: what is answered is kept"
        )

    async def _ask(self, messages: list[dict[str, Any]]) -> Any:
        sampling = self._sampling
        more: dict[str, Any] = dict(self._api.extra_body)
        if sampling.top_k:
            more["top_k"] = sampling.top_k
        if sampling.min_p:
            more["min_p"] = sampling.min_p
        return await self._client.chat.completions.create(
            model=self._api.model,
            messages=messages,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            **{self._api.max_tokens_field: sampling.max_tokens},
            extra_body=more or None,
        )

    def _paid(self, completion: Any, prompt_tokens: int) -> Usage:
        """What is charged; our own count where the service tells none that can be true.

        Without it a service that leaves ``usage`` out would be free, and ``max_cost`` no limit.
        """
        usage = usage_of(completion)
        if usage is not None:
            return usage
        self._limits.count("usage_estimated")
        try:
            text = completion.choices[0].message.content or ""
            written = len(self._tokenizer.encode(text, add_special_tokens=False).ids) + 1
        except UNREADABLE:
            written = self._sampling.max_tokens
        return Usage(input=prompt_tokens, output=written)

    def _understood(self, completion: Any) -> Answer:
        """The answer in a completion, or why there is none that can be used."""
        try:
            return self._read(completion)
        except UNREADABLE:  # Of another shape, or a text that is none: a lone surrogate.
            return Answer(error="broken_answer")

    def _read(self, completion: Any) -> Answer:
        """As :meth:`_understood`; raises one of UNREADABLE."""
        choices = getattr(completion, "choices", None)
        if not choices:
            return Answer(error="broken_answer" if choices is None else "empty_answer")
        choice = choices[0]
        message = choice.message
        if choice.finish_reason == "content_filter":
            return Answer(error="content_filter")
        if getattr(message, "refusal", None):
            return Answer(error="refusal")
        text = message.content
        if not isinstance(text, str) or not text.strip():
            return Answer(error="empty_answer")
        return self._in_ids(text, complete=choice.finish_reason == "stop")

    def _in_ids(self, text: str, complete: bool) -> Answer:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._tokenizer.decode(ids, skip_special_tokens=False) != text:
            return Answer(error="not_exact")
        stops = self._sampling.stop_token_ids
        if complete and stops:
            ids = [*ids, stops[0]]
        most = self._sampling.max_tokens
        if len(ids) > most:  # The service's own tokens are longer.
            ids, complete = ids[:most], False
        return Answer(np.array(ids, np.int32), "stop" if complete else "length")


def api_engine(
    teacher: TeacherConfig,
    folder: str,
    sampling: ResolvedSampling,
    run_folder: RunFolder,
    coordinator: Any,
) -> ApiEngine:
    """The engine of a run's service, which goes on with what earlier starts have spent.

    folder: that of the tokenizer. coordinator: is told the counters; None: nobody is.
    """
    spending = Spending(run_folder)

    def report(counters: dict[str, float]) -> None:
        spending.add(counters)
        if coordinator is not None:
            coordinator.add.remote(counters)

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    limits = Limits(teacher.api, spending.cost, report)
    return ApiEngine(teacher, sampling, tokenizer, run_folder.read_table(MESSAGES), limits)


class Verdict:
    """What to do about a failure that may pass.

    name: under which it is counted. retry_after_s: what the service asks for. too_fast: whether
    waiting is all it takes; then it is no attempt (``counts`` 0).
    """

    def __init__(self, name: str, retry_after_s: float | None = None, too_fast: bool = False):
        self.name = name
        self.retry_after_s = retry_after_s
        self.too_fast = too_fast
        self.counts = 0 if too_fast else 1


def judge(error: BaseException) -> Verdict | str:
    """What a failed request means: to be tried again, or the row's error.

    Raises the error itself where it is a mistake of ours.
    """
    import openai

    if isinstance(error, openai.APITimeoutError):
        return Verdict("timeout")
    if isinstance(error, openai.APIConnectionError):
        return Verdict("connection")
    # Not JSON, not UTF-8, or nested without end.
    if isinstance(error, openai.APIResponseValidationError | ValueError | RecursionError):
        return Verdict("broken_answer")
    if not isinstance(error, openai.APIStatusError):
        raise error
    status, code = error.status_code, str(error.code or "")
    if status == 429 and code not in CREDIT_CODES:
        return Verdict("too_many_requests", retry_after(error.response.headers), too_fast=True)
    if status >= 500 or status in (408, 409, 425):
        return Verdict(f"status_{status}", retry_after(error.response.headers))
    if code in LENGTH_CODES:
        return "too_long"
    if code in FILTER_CODES:
        return "content_filter"
    return f"{FATAL}the service refuses the request: {describe(error)}; see teacher.api"


def refuses_everybody(error: BaseException) -> bool:
    """Whether the next row would fare the same: the key, the model, or the credit is refused."""
    status, code = getattr(error, "status_code", None), str(getattr(error, "code", ""))
    return status in (401, 402, 404) or code in CREDIT_CODES


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
    text = " ".join(str(error).split())
    return redact(f"{type(error).__name__}: {text}")[:400]


def usage_of(completion: Any) -> Usage | None:
    """Tokens that a completion is charged for; None where the service does not say.

    A prompt of no tokens, a negative number or a sum that does not add up says nothing.
    """
    usage = getattr(completion, "usage", None)
    told = (getattr(usage, n, None) for n in ("prompt_tokens", "completion_tokens"))
    asked, answered = (n if type(n) is int and n >= 0 else None for n in told)
    if not asked or answered is None:
        return None
    if getattr(usage, "total_tokens", None) not in (None, asked + answered):
        return None

    def number(owner: Any, name: str) -> int:
        value = getattr(owner, name, None)
        return value if type(value) is int and value > 0 else 0

    read = getattr(usage, "prompt_tokens_details", None)
    written = getattr(usage, "completion_tokens_details", None)
    return Usage(
        input=asked,
        cached=number(read, "cached_tokens"),
        output=answered,
        reasoning=number(written, "reasoning_tokens"),
    )


def _pause(attempt: int) -> float:
    """Seconds before the next attempt: doubled each time, with jitter so that rows do not meet."""
    longest: float = min(LONGEST_PAUSE_S, 0.5 * 2**attempt)
    return longest * random.uniform(0.5, 1.0)
