"""A teacher behind an OpenAI-compatible API: messages in, the text as the student's ids out.

Where it sits: in a Serve replica like every engine, so that stream, store, credits and figures are
the same; one replica is the one limiter of its service. The stream carries token ids, so the chat
of each prompt is looked up by its ids in ``prompts/messages.parquet``, which the driver wrote.
*Waits for* the service, as `service.Service` asks it.

An answer's text becomes ids with the student's tokenizer, never by rendering the chat again, and
special tokens in it are plain text. The stop token is added only where the service says that it is
complete. An answer whose ids do not give back its text is dropped. Reasoning that came apart goes
beside the answer, as the ids that would stand before it. With ``top_logprobs`` the ids are those of
the tokens that the service names, with what it says of them (``told.py``).

A failure that more patience does not mend (no credit, no such model, the budget) ends the run after
what is paid has been stored: the row's error begins with ``FATAL``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from raystill.base.errors import RunError
from raystill.config.base import ApiConfig
from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.answers import Answer, Int32Array
from raystill.datasets.rows.keys import prompt_digest
from raystill.datasets.rows.reasoning import NO_ANSWER, TAIL_IDS, Markers, ids_before
from raystill.datasets.rows.schema import FATAL
from raystill.datasets.rows.signal import Signal
from raystill.datasets.rows.token_bytes import NoBytes
from raystill.model.sampling import ResolvedSampling
from raystill.model.tokenizer import PlainText
from raystill.serve.api.failures import Unread
from raystill.serve.api.parsed import CUT_OFF, Drawn, Endings, chat_completion, content_of
from raystill.serve.api.service import Request, Service, answers_of, posted, usage_of
from raystill.serve.api.told import (
    NO_LOGPROBS,
    OTHER_TOKENS,
    UNMAPPED,
    Reader,
    first_of,
    most_apart,
    of_text,
)
from raystill.serve.api.vocabulary import Vocabulary

UNBOUNDED = 2**31 - 1
TEXT = Signal("text")
APART_NATS = 0.05
"""Between what a service tells of a token at two temperatures, at most; it rounds otherwise."""
A_QUESTION = [{"role": "user", "content": "Say a word."}]
CHATS = "/chat/completions"
CHARACTERS_EACH = 256
"""Of the longest token of any tokenizer, with room to spare: rows of spaces."""
SURROGATE = re.compile("[\ud800-\udfff]")
QUESTION_TOKENS = 64
"""At most, by any template."""


@dataclass(frozen=True)
class TextReader:
    """What text becomes ids with: the tokenizer, and that for which its control tokens are text.

    markers: of reasoning; inside: within them, where markers are text too. None: it has none.
    """

    tokenizer: Tokenizer
    plain: PlainText
    control: frozenset[int]
    markers: Markers | None = None
    inside: PlainText | None = None


class ApiEngine:
    """One service, asked for one chat completion a row."""

    name = "api"
    dtype = "unknown"

    def __init__(
        self,
        teacher: TeacherConfig,
        sampling: ResolvedSampling,
        reader: TextReader,
        messages: pa.Table,
        service: Service,
        cut: int | None = None,
    ) -> None:
        """messages: columns ``digest`` and ``messages`` (JSON). cut: most tokens of a prompt and
        its answer, as keys have it. RunError: the tokenizer cannot have the signal that is wanted.
        """
        self.version = service.version
        self._api: ApiConfig = teacher.api
        self._sampling = sampling
        # Text that looks like a control token stays text: nobody but the template ends a turn.
        self._tokenizer, self._plain = reader.tokenizer, reader.plain
        self._markers, self._inside = reader.markers, reader.inside or reader.plain
        self._messages: dict[bytes, str] = dict(
            zip(messages["digest"].to_pylist(), messages["messages"].to_pylist(), strict=True)
        )
        self.service = service
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.max_model_len = teacher.max_model_len or UNBOUNDED
        self._context = cut
        few = {"top_k": sampling.top_k, "min_p": sampling.min_p}  # Which few services know.
        stated = teacher.sampling.model_dump(exclude_none=True)
        self._few = {name: value for name, value in few.items() if value or name in stated}
        self._endings = Endings(str(self._api.base_url))
        self._told: Reader | None = None
        if self._api.top_logprobs is not None:
            self._told = _told_reader(teacher, reader, sampling.stop_token_ids)

    async def start(self) -> None:
        """Makes the client. Where log probabilities are wanted, asks for two words; RunError: the
        service does not tell them.
        """
        self.service.start()
        if self._told is not None:
            problem = await self._not_raw()
            if problem is not None:
                raise RunError(problem.removeprefix(FATAL))

    async def sample(self, prompt_ids: Sequence[Int32Array], signal: Signal) -> list[Answer]:
        """Answer a group of prompts, in order. Prompts that cannot be answered have an error."""
        chats = [self._messages.get(prompt_digest(ids)) for ids in prompt_ids]
        return await self.sample_chats(prompt_ids, chats, signal)

    async def sample_chats(
        self, prompt_ids: Sequence[Int32Array], chats: Sequence[str | None], signal: Signal
    ) -> list[Answer]:
        """As `sample`, with each prompt's chat as JSON; None: it is not known."""
        self._require(signal)
        both = zip(prompt_ids, chats, strict=True)
        return await answers_of(self._answer(*pair, signal) for pair in both)

    async def score(
        self,
        prompt_ids: Sequence[Int32Array],
        response_ids: Sequence[Int32Array],
        signal: Signal,
        at: Sequence[Int32Array] | None = None,
    ) -> list[Answer]:
        """A given response is its own text; other signals of it cannot be had, which ends a run."""
        if signal.kind == "text" and at is None:
            return [Answer(ids, "length") for ids in response_ids]
        why = (
            f"{FATAL}{self._api.base_url} cannot say {signal} of an answer that it has given "
            "before, or that came with its prompt; set a signal that is stored (raystill store "
            "list), another store.path, or signal.kind: text"
        )
        return [Answer(error=why) for _ in response_ids]

    async def probe(self) -> None:
        """Does nothing: the replica is healthy, whatever the service is."""

    def close(self) -> None:
        """Writes down what is spent; the client ends with the process."""
        self.service.close()

    def _require(self, signal: Signal) -> None:
        named = self._api.top_logprobs
        if signal.kind == "hidden" or (signal.kind != "text" and named is None):
            raise ValueError(f"an API teacher gives text only, not {signal.kind}")
        if named is not None and signal.width > named:
            raise ValueError(f"{signal} is wanted, but teacher.api.top_logprobs is {named}")

    async def _answer(self, prompt_ids: Int32Array, text: str | None, signal: Signal) -> Answer:
        if text is None:
            return Answer(error=f"{FATAL}a prompt has no messages in prompts/messages.parquet")
        most = self._most(prompt_ids)
        if most < 1:
            return Answer(error="too_long")
        body = self.body(json.loads(text), signal, most)
        answer = await self.service.ask(
            Request(
                send=lambda client: _sent(client, body),
                read=lambda completion: self._read(completion, signal, prompt_ids),
                written=self._written,
                prompt_tokens=len(prompt_ids),
                max_tokens=most,
                named=self._named(signal),
            )
        )
        return Answer(error=answer) if isinstance(answer, str) else answer

    def _most(self, prompt_ids: Int32Array) -> int:
        """Most tokens of a prompt's answer; 0 or less where there is no room for one."""
        most = self._sampling.max_tokens
        return most if self._context is None else min(most, self._context - len(prompt_ids))

    def body(
        self, messages: list[dict[str, Any]], signal: Signal = TEXT, most: int | None = None
    ) -> dict[str, Any]:
        """The JSON of one request. most: tokens of the answer."""
        sampling = self._sampling
        return {
            "model": self._api.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._api.max_tokens_field: most or sampling.max_tokens,
            **({} if signal.kind == "text" else self._wide),
            **self._api.extra_body,
            **self._few,
        }

    @property
    def _longest(self) -> int:
        """Characters of an answer that are read: no ``max_tokens`` tokens have more."""
        return CHARACTERS_EACH * self._sampling.max_tokens

    def _named(self, signal: Signal) -> int:
        """Tokens named for each token of an answer, itself among them."""
        return 0 if signal.kind == "text" else 1 + (self._api.top_logprobs or 0)

    @property
    def _wide(self) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": self._api.top_logprobs}

    def _written(self, completion: Any) -> int:
        """Tokens of the text and of reasoning, by this tokenizer, and the end."""
        choice = completion["choices"][0]
        text = (choice["message"]["content"] or "") + _reasoning_of(choice["message"])
        ended = bool(text) and self._endings.complete(choice.get("finish_reason"))
        start = text[: self._longest]
        times = len(text) / len(start) if start else 1
        return round(len(self._plain.encode(start)) * times) + ended

    def _read(self, completion: Any, signal: Signal, prompt_ids: Int32Array) -> Answer | str:
        """The answer, or why it cannot be used; raises one of UNREADABLE."""
        choices = completion.get("choices")
        if not choices:
            return "broken_answer" if choices is None else "empty_answer"
        choice = choices[0]
        finish, message = choice.get("finish_reason"), choice["message"]
        if finish in ("content_filter", "error"):  # OpenRouter's word for one that broke off.
            return "broken_answer" if finish == "error" else "content_filter"
        if message.get("refusal"):
            return "refusal"
        text, reasoning = message.get("content"), _reasoning_of(message)
        if not isinstance(text, str) or not text.strip():
            # Another attempt would be as long, and cost as much.
            thought = finish in CUT_OFF and (reasoning or _has_thought(completion))
            return NO_ANSWER if thought else "empty_answer"
        complete = self._endings.complete(finish)
        if signal.kind == "text":
            answer = self._in_ids(text, complete)
        else:
            content = content_of(choice)
            if not content:
                return NO_LOGPROBS
            if reasoning:  # Some services tell its tokens in the same list.
                content = of_text(content, text)
            answer = self._as_told(content, text, complete, signal)
        if isinstance(answer, str):
            return answer
        return self._after(reasoning, answer, prompt_ids, apart=not text.startswith("\n"))

    def _after(self, reasoning: str, answer: Answer, prompt_ids: Int32Array, apart: bool) -> Answer:
        """The answer with the ids of what came apart from it, if they can stand before it.

        apart: the answer does not bring the empty line between them.
        """
        if self._markers is None or not reasoning.strip():
            return answer
        prompt = self._decoded(prompt_ids[-TAIL_IDS:].tolist())
        within = (self._markers, self._inside.encode, self._decoded)
        ids = ids_before(reasoning[: self._longest], prompt, *within, apart)
        return answer if ids is None else replace(answer, reasoning_ids=np.array(ids, np.int32))

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def _as_told(
        self, content: list[Drawn], text: str, complete: bool, signal: Signal
    ) -> Answer | str:
        assert self._told is not None, "logprobs were asked for without top_logprobs"
        if len(text) > self._longest:  # Of no tokens that were asked for.
            return OTHER_TOKENS
        told = self._told.read(content, text, complete, signal)
        if isinstance(told, str):
            return told
        tokens = len(told.answer.response_ids)
        self.service.limits.told(tokens, told.unmapped * tokens)
        if told.unmapped > self._api.max_unmapped_mass:
            return UNMAPPED
        return _cut(told.answer, self._sampling.max_tokens)

    async def _not_raw(self) -> str | None:
        """Why the service's log probabilities are not the model's own; None where they are.

        They must be there, and must not depend on how tokens are sampled.
        """
        api = self._api
        own = {**self.body(A_QUESTION, Signal("sampled")), api.max_tokens_field: 1}
        few = {"top_k", "min_p"} - api.extra_body.keys()
        plain = {n: v for n, v in own.items() if n not in few} | {"temperature": 1.0, "top_p": 1.0}
        bodies = [plain] if plain == own else [plain, own]
        told = [await self._first_token(body) for body in bodies]
        for each in told:
            if isinstance(each, str) and each.startswith(FATAL):
                return each
            if isinstance(each, str):
                return (
                    f"{api.base_url} tells no log probabilities of {api.model} ({each}), which "
                    "teacher.api.top_logprobs asks for; leave that out and set signal.kind: text"
                )
        apart = most_apart([each for each in told if isinstance(each, dict)])
        if apart <= APART_NATS:
            return None
        return (
            f"{api.base_url} tells log probabilities that change with teacher.sampling, by "
            f"{apart:.2f} nats, and so are not the model's own; set temperature: 1 and top_p: 1 "
            "there, with which they are, or signal.kind: text"
        )

    async def _first_token(self, body: dict[str, Any]) -> dict[bytes, float] | str:
        """Log probabilities of the tokens that an answer may begin with; else a row's error."""
        return await self.service.ask(
            Request(
                send=lambda client: _sent(client, body),
                read=first_of,
                written=lambda completion: 1,
                prompt_tokens=QUESTION_TOKENS,
                max_tokens=1,
                named=self._named(Signal("sampled")),
            )
        )

    def _in_ids(self, text: str, complete: bool) -> Answer | str:
        """An answer of any length takes no longer to read than one that keeps to ``max_tokens``."""
        complete, text = complete and len(text) <= self._longest, text[: self._longest]
        ids = self._plain.encode(text)
        if self._decoded(ids) != text:
            return "not_exact"
        stops = self._sampling.stop_token_ids
        if complete and stops:
            ids = [*ids, stops[0]]
        most = self._sampling.max_tokens
        if len(ids) > most:  # The service's own tokens are longer, or it keeps to no limit.
            ids, complete = ids[:most], False
        return Answer(np.array(ids, np.int32), "stop" if complete else "length")


def _reasoning_of(message: Mapping[str, Any]) -> str:
    """What a service sent apart from the answer, in the field of vLLM, DeepSeek or OpenRouter; ""
    where it sent nothing, or no Unicode.
    """
    told = [message.get(name) for name in ("reasoning_content", "reasoning")]
    text = next((one for one in told if isinstance(one, str) and one), "")
    return "" if SURROGATE.search(text) else text


def _has_thought(completion: Any) -> bool:
    """Whether a service charges for reasoning that it does not show."""
    usage = usage_of(completion)
    return usage is not None and usage.reasoning > 0


async def _sent(client: Any, body: Mapping[str, Any]) -> Any:
    """What came. Raises Unread for an error that says of itself that all is well (status 200)."""
    came = chat_completion(await posted(client, CHATS, body))
    if isinstance(came, Mapping) and came.get("error") and not came.get("choices"):
        raise Unread("broken_answer", f"the service answered with an error: {came['error']}")
    return came


def _told_reader(teacher: TeacherConfig, reader: TextReader, stops: Sequence[int]) -> Reader:
    try:
        vocabulary = Vocabulary(reader.tokenizer, reader.control)
    except NoBytes as error:
        raise RunError(
            f"teacher.api.top_logprobs needs a tokenizer whose ids stand for bytes, but that of "
            f"{teacher.model} has {error}; leave it out and set signal.kind: text"
        ) from None
    return Reader(vocabulary, reader.plain, stops)


def _cut(answer: Answer, most: int) -> Answer:
    """The answer's first tokens; one that is cut has no end."""
    if len(answer.response_ids) <= most:
        return answer
    arrays: dict[str, Any] = {
        name: values[:most]
        for name, values in vars(answer).items()
        if isinstance(values, np.ndarray)
    }
    return replace(answer, finish_reason="length", **arrays)
