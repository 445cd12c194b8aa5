"""A teacher behind an API whose answers come in batches, at a lower price and hours later.

As `ApiEngine`, but for the way there and back: a row's question waits for its batch, and its answer
is a line of the batch's files. The row's key in the teacher store names it there.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raystill.base.errors import RunError
from raystill.datasets.rows.answers import Answer, Int32Array
from raystill.datasets.rows.keys import prompt_digest
from raystill.datasets.rows.schema import FATAL
from raystill.datasets.rows.signal import Signal
from raystill.serve.api.engine import TEXT, ApiEngine
from raystill.serve.api.failures import CREDIT_CODES, FILTER_CODES, LENGTH_CODES
from raystill.serve.api.limits import Usage
from raystill.serve.api.parsed import LEAST_BYTES
from raystill.serve.api.service import UNUSABLE, Request, Unanswered, answers_of, understood
from raystill.serve.batch.batches import Batches, Question
from raystill.serve.batch.journal import Line

MAX_BATCHES = 4
"""Batches that one row may be in before it is given up."""
NOT_ANSWERED = "not_answered"
"""A row that its batch brought nothing for: the batch expired or was cancelled, a line is missing,
or the service failed for it."""
HEAD_BYTES, MEAN_OF_MOST = 65_536, 4
"""Of a line beside its answer; and how many times less than the most an answer has in the mean."""
NO_IDS = np.empty(0, np.int32)
LATER_CODES = frozenset({"batch_expired", "batch_cancelled"})


class BatchEngine(ApiEngine):
    """One service, asked for many chat completions at a time."""

    batches: Batches

    async def start(self) -> None:
        """Makes the client, and takes up the batches of earlier starts. Raises RunError."""
        self.service.start()
        try:
            await self.batches.start(self._usage, self._line_bytes)
        except Unanswered as error:
            raise RunError(str(error).removeprefix(FATAL)) from None

    def close(self) -> None:
        """Ends the tasks; the batches go on at the service."""
        self.batches.close()
        self.service.close()

    async def sample_keyed(
        self, prompt_ids: Sequence[Int32Array], keys: Sequence[bytes], signal: Signal
    ) -> list[Answer]:
        """As ``sample``. keys: of the answers in the teacher store."""
        self._require(signal)
        pairs = zip(prompt_ids, keys, strict=True)
        rows = (self._row(ids, key.hex(), signal) for ids, key in pairs)
        return await answers_of(rows)

    async def _row(self, prompt_ids: Int32Array, key: str, signal: Signal) -> Answer:
        text = self._messages.get(prompt_digest(prompt_ids))
        if text is None:
            return Answer(error=f"{FATAL}a prompt has no messages in prompts/messages.parquet")
        most = self._most(prompt_ids)
        if most < 1:
            return Answer(error="too_long")
        body = self.body(json.loads(text), signal, most)
        cost = Usage(input=len(prompt_ids), output=most).cost(self._api.prices)
        question = Question(body, cost, len(prompt_ids))
        for _ in range(MAX_BATCHES):
            line = await self.batches.line(key, question)
            if isinstance(line, str):
                return Answer(error=line)
            answer = NOT_ANSWERED if line is None else self._of_line(line, signal, prompt_ids)
            if isinstance(answer, Answer):
                return answer
            if not answer.startswith(FATAL):
                self.service.limits.count(answer)
            if answer not in (*UNUSABLE, NOT_ANSWERED):
                return Answer(error=answer)
            self.batches.forget(key)
        if answer in UNUSABLE:
            return Answer(error=answer)
        return Answer(
            error=f"{FATAL}{self._api.base_url} left a row unanswered in {MAX_BATCHES} batches; "
            "start the run again later: what is answered is kept"
        )

    def _of_line(self, line: Line, signal: Signal, prompt_ids: Int32Array = NO_IDS) -> Answer | str:
        """The answer in a line, or why it has none that can be used."""
        if line.status == 200:
            return understood(self._request(signal, prompt_ids), line.body)
        if line.code in LENGTH_CODES:
            return "too_long"
        if line.code in FILTER_CODES:
            return "content_filter"
        status = line.status
        if status is None or line.code in LATER_CODES or status >= 500:
            return NOT_ANSWERED
        if status in (408, 409, 425, 429) and line.code not in CREDIT_CODES:
            return NOT_ANSWERED
        told = f"{status} {line.code} {line.message}".strip()
        return f"{FATAL}the service refuses a request of a batch: {told[:300]}; see teacher.api"

    def _usage(self, line: Line, prompt_tokens: int) -> Usage:
        return self.service.charged(
            replace(self._request(TEXT), prompt_tokens=prompt_tokens), line.body
        )

    @property
    def _line_bytes(self) -> int:
        signal = TEXT if self._api.top_logprobs is None else Signal("sampled")
        return HEAD_BYTES + (self._request(signal).most_bytes - LEAST_BYTES) // MEAN_OF_MOST

    def _request(self, signal: Signal, prompt_ids: Int32Array = NO_IDS) -> Request[Answer]:
        """How an answer is read. prompt_ids: what was asked."""

        async def nothing(client: Any) -> None:
            return None

        def read(completion: Any) -> Answer | str:
            return self._read(completion, signal, prompt_ids)

        most, named = self._sampling.max_tokens, self._named(signal)
        return Request(nothing, read, self._written, len(prompt_ids), most, named=named)
