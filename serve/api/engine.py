"""A teacher behind an OpenAI-compatible API: messages in, the text as the student's ids out.

Where it sits: in a Serve replica like every engine, so that stream, store, credits and figures are
the same; one replica is the one limiter of its service. The stream carries token ids, so the chat
of each prompt is looked up by its ids in ``prompts/messages.parquet``, which the driver wrote.
*Waits for* the service, as `service.Service` asks it.

An answer's text becomes ids with the student's tokenizer, never by rendering the chat again, and
special tokens in it are plain text. The stop token is added only where the service says that it is
complete. An answer whose ids do not give back its text is dropped.

A failure that more patience does not mend (no credit, no such model, the budget) ends the run after
what is paid has been stored: the row's error begins with ``FATAL``.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from raystill.config.base import ApiConfig
from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.answers import Answer, Int32Array
from raystill.datasets.rows.keys import prompt_digest
from raystill.datasets.rows.schema import FATAL
from raystill.datasets.rows.signal import Signal
from raystill.model.sampling import ResolvedSampling
from raystill.model.tokenizer import PlainText
from raystill.serve.api.service import Request, Service

UNBOUNDED = 2**31 - 1


class ApiEngine:
    """One service, asked for one chat completion a row."""

    name = "api"
    dtype = "unknown"

    def __init__(
        self,
        teacher: TeacherConfig,
        sampling: ResolvedSampling,
        reader: tuple[Tokenizer, PlainText],
        messages: pa.Table,
        service: Service,
    ) -> None:
        """reader: the tokenizer, and that for which control tokens are text. messages: columns
        ``digest`` and ``messages`` (JSON).
        """
        self.version = service.version
        self._api: ApiConfig = teacher.api
        self._sampling = sampling
        # Text that looks like a control token stays text: nobody but the template ends a turn.
        self._tokenizer, self._plain = reader
        self._messages: dict[bytes, str] = dict(
            zip(messages["digest"].to_pylist(), messages["messages"].to_pylist(), strict=True)
        )
        self.service = service
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.max_model_len = teacher.max_model_len or UNBOUNDED

    async def start(self) -> None:
        """Makes the client; the service is asked nothing yet."""
        self.service.start()

    async def sample(self, prompt_ids: Sequence[Int32Array], signal: Signal) -> list[Answer]:
        """Answer a group of prompts, in order. Prompts that cannot be answered have an error."""
        chats = [self._messages.get(prompt_digest(ids)) for ids in prompt_ids]
        return await self.sample_chats(prompt_ids, chats, signal)

    async def sample_chats(
        self, prompt_ids: Sequence[Int32Array], chats: Sequence[str | None], signal: Signal
    ) -> list[Answer]:
        """As `sample`, with each prompt's chat as JSON; None: it is not known."""
        if signal.kind != "text":
            raise ValueError(f"an API teacher gives text only, not {signal.kind}")
        return list(await asyncio.gather(*map(self._answer, prompt_ids, chats)))

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

    async def _answer(self, prompt_ids: Int32Array, text: str | None) -> Answer:
        if text is None:
            return Answer(error=f"{FATAL}a prompt has no messages in prompts/messages.parquet")
        body = self.body(json.loads(text))
        answer = await self.service.ask(
            Request(
                send=lambda client: client.chat.completions.create(**body),
                read=self._read,
                written=self._written,
                prompt_tokens=len(prompt_ids),
                max_tokens=self._sampling.max_tokens,
            )
        )
        return Answer(error=answer) if isinstance(answer, str) else answer

    def body(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The client's arguments of one request."""
        sampling = self._sampling
        more: dict[str, Any] = dict(self._api.extra_body)
        if sampling.top_k:
            more["top_k"] = sampling.top_k
        if sampling.min_p:
            more["min_p"] = sampling.min_p
        return {
            "model": self._api.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._api.max_tokens_field: sampling.max_tokens,
            "extra_body": more or None,
        }

    def _written(self, completion: Any) -> int:
        """Tokens of the text, by this tokenizer."""
        text = completion.choices[0].message.content or ""
        return len(self._plain.encode(text)) + 1

    def _read(self, completion: Any) -> Answer | str:
        """The answer, or why it cannot be used; raises one of UNREADABLE."""
        choices = getattr(completion, "choices", None)
        if not choices:
            return "broken_answer" if choices is None else "empty_answer"
        choice = choices[0]
        message = choice.message
        if choice.finish_reason == "content_filter":
            return "content_filter"
        if getattr(message, "refusal", None):
            return "refusal"
        text = message.content
        if not isinstance(text, str) or not text.strip():
            return "empty_answer"
        return self._in_ids(text, complete=choice.finish_reason == "stop")

    def _in_ids(self, text: str, complete: bool) -> Answer | str:
        ids = self._plain.encode(text)
        if self._tokenizer.decode(ids, skip_special_tokens=False) != text:
            return "not_exact"
        stops = self._sampling.stop_token_ids
        if complete and stops:
            ids = [*ids, stops[0]]
        most = self._sampling.max_tokens
        if len(ids) > most:  # The service's own tokens are longer.
            ids, complete = ids[:most], False
        return Answer(np.array(ids, np.int32), "stop" if complete else "length")
