"""Put answers that others have into a teacher store, under a teacher that is stated.

The keys are those of a run of that teacher with its sampling settings, so that such a run finds the
answers as if it had paid for them. An answer's text becomes ids as an API teacher's does: control
tokens in it are plain text, and the stop token is added, unless the row says that the answer was
cut. Ids and logprobs of an exported data set are taken as they are, where this teacher's tokenizer
gives the same prompt ids.

Rows are read, keyed and published in batches; a segment appears whole or not at all. An answer that
the store serves already is passed over, so an import that was broken off can be made again; another
answer to the same prompt gets the key of a further sample.

Imports neither Ray nor torch.

Legend: P prompt tokens, T response tokens, K teacher ids kept for each token.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill import __version__
from raystill.datasets.exchange.given import GivenAnswer
from raystill.datasets.prompts.formats import BrokenRow
from raystill.datasets.prompts.read import RawPrompt
from raystill.datasets.prompts.select import teacher_view
from raystill.datasets.prompts.tokenise import PromptTokeniser, TemplateRefusal
from raystill.datasets.rows.answers import Answer, answers_table, tail_logprob
from raystill.datasets.rows.keys import KeyedEngine, answer_keys, prompt_digest
from raystill.datasets.rows.schema import KEY_BYTES
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.catalogue import words_of
from raystill.datasets.store.footer import Origin, Provenance
from raystill.datasets.store.reading import UnusableSegment
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.store.values import impossible_rows

BATCH_ROWS = 256
KEY = np.dtype(f"S{KEY_BYTES}")
"""Of keys in an array, to be compared; reading one drops zero bytes at its end."""
LONGEST_TOKEN = 32
"""Characters a token, by which the text of an answer without end is cut before it is tokenised."""
TEXT = Signal("text")
RUN = "import"
"""The run in the footer of imported groups."""


@dataclass(frozen=True)
class StatedTeacher:
    """Whose answers they are: what keys are made of, and what a response becomes.

    keyed: the arguments of ``answer_keys`` before the prompts. longest_prompt: a prompt of more
    tokens has no room for an answer. vocab_size: V of the teacher's logprobs. has_signal: whether
    logprobs of this teacher can be had, which is not so of a service.
    """

    name: str
    keyed: tuple[str, str, str | None, Mapping[str, Any]]
    engine: KeyedEngine
    tokeniser: PromptTokeniser
    longest_prompt: int
    vocab_size: int
    has_signal: bool

    def as_read(self, prompt: RawPrompt) -> RawPrompt:
        """The prompt as the teacher reads it, whom the run file may give another system message."""
        prompts = self.tokeniser.prompts
        return teacher_view(prompt, prompts) if prompts.teacher_sees_more else prompt

    def origin(self, signal: Signal) -> Origin:
        """What the footer of imported segments says."""
        identity, dtype = self.keyed[:2]
        return Origin(identity, self.name, "import", __version__, dtype, self.vocab_size, signal)


@dataclass
class Imported:
    """Rows by signal, rows that the store had, rows that were cut at the limit of an answer, and
    rows left out by reason, with the place of the first of each."""

    rows: Counter[str] = field(default_factory=Counter)
    there: int = 0
    cut: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def leave_out(self, reason: str, where: str) -> None:
        """Count a row that cannot be used."""
        self.left_out[reason] += 1
        self.first.setdefault(reason, where)


class Importer:
    """One import into one store."""

    def __init__(self, store: TeacherStore, teacher: StatedTeacher) -> None:
        self._store, self._teacher = store, teacher
        self._catalogue = store.catalogue()
        self._served: dict[Signal, NDArray[np.bytes_]] = {}  # keys [S], sorted
        self._used: dict[bytes, set[int]] = {}
        """Sample numbers of this import's answers to each prompt."""
        self._stored: dict[bytes, NDArray[np.int32] | None] = {}
        known = words_of(self._catalogue.keys).view(KEY).ravel()
        self._places = np.argsort(known, kind="stable")  # Of equal keys the first row.
        self._known = known[self._places]
        self._plain = teacher.tokeniser.plain_text()
        self._tokenizer = teacher.tokeniser.tokenizer
        self._stops = [int(i) for i in teacher.keyed[3]["stop_token_ids"]]
        self._most = int(teacher.keyed[3]["max_tokens"])
        self.done = Imported()

    def take(self, rows: Iterable[tuple[str, GivenAnswer | BrokenRow]]) -> Imported:
        """Import all rows. Raises OSError where a segment cannot be written."""
        usable = self._usable(rows)
        while batch := list(islice(usable, BATCH_ROWS)):
            asked = [self._teacher.as_read(row.prompt) for row in batch]
            prompts = self._teacher.tokeniser.encode_many(asked)
            self._look_up(prompts)
            by_signal: dict[Signal, list[tuple[bytes, NDArray[np.int32], Answer]]] = {}
            for row, ids in zip(batch, prompts, strict=True):
                answer, signal = self._answer(row, ids)
                if answer is None:
                    continue
                key = self._key_of(ids, answer)
                by_signal.setdefault(signal, []).append((key, ids, answer))
            for signal, answers in by_signal.items():
                self._publish(signal, answers)
        return self.done

    def _look_up(self, prompts: Sequence[NDArray[np.int32]]) -> None:
        """Read at once what the store has under the first keys of these prompts."""
        self._stored = {}
        with suppress(UnusableSegment):  # Then one by one.
            self._read(answer_keys(*self._teacher.keyed, prompts, 0, self._teacher.engine))

    def _read(self, keys: Sequence[bytes]) -> None:
        """Note which answer is stored under each of these keys, or that none is."""
        sought = np.array(keys, KEY)
        at = np.minimum(np.searchsorted(self._known, sought), max(0, len(self._known) - 1))
        there = self._known[at] == sought if len(self._known) else np.zeros(len(keys), bool)
        found: dict[bytes, NDArray[np.int32] | None] = dict.fromkeys(keys)
        if there.any():
            rows = self._places[at[there]]
            stored = self._store.read(self._catalogue, rows, ["response_ids"])["response_ids"]
            named = [key for key, is_there in zip(keys, there, strict=True) if is_there]
            found |= {
                key: np.array(ids, np.int32)
                for key, ids in zip(named, stored.to_pylist(), strict=True)
            }
        self._stored |= found

    def _key(self, ids: NDArray[np.int32], sample: int) -> bytes:
        (key,) = answer_keys(*self._teacher.keyed, [ids], sample, self._teacher.engine)
        return key

    def _key_of(self, ids: NDArray[np.int32], answer: Answer) -> bytes:
        """The key of the prompt's first sample that the store has this answer for, or none.

        Each row of the import has a sample of its own.
        """
        used = self._used.setdefault(prompt_digest(ids), set())
        for sample in count():
            if sample in used:
                continue
            key = self._key(ids, sample)
            if self._may_be(key, answer):
                used.add(sample)
                return key
        raise AssertionError("there is no last number")

    def _may_be(self, key: bytes, answer: Answer) -> bool:
        """Whether the store has no other answer under a key."""
        if key not in self._stored:
            try:
                self._read([key])
            except UnusableSegment:  # A run that needs it asks for it again.
                return True
        stored = self._stored[key]
        return stored is None or np.array_equal(stored, answer.response_ids)

    def _usable(self, rows: Iterable[tuple[str, GivenAnswer | BrokenRow]]) -> Iterator[GivenAnswer]:
        """Rows whose prompt the template takes."""
        for where, row in rows:
            if isinstance(row, BrokenRow):
                self.done.leave_out(str(row), where)
                continue
            try:
                self._teacher.tokeniser.render(self._teacher.as_read(row.prompt))
            except TemplateRefusal:
                self.done.leave_out("the chat template refuses the prompt", where)
                continue
            yield row

    def _answer(self, row: GivenAnswer, ids: NDArray[np.int32]) -> tuple[Answer | None, Signal]:
        """The row's answer and its signal; None for a row that is left out."""
        if not 0 < len(ids) <= self._teacher.longest_prompt:
            self.done.leave_out(
                "the prompt is empty, or leaves no room for an answer", row.prompt.where
            )
            return None, TEXT
        theirs = row.arrays.get("prompt_ids")
        if theirs is not None and np.array_equal(theirs, ids) and "completion_ids" in row.arrays:
            answer, signal = self._in_their_ids(row)
        else:
            answer, signal = self._in_ids(row), TEXT
        if answer.error is not None:
            self.done.leave_out(answer.error, row.prompt.where)
            return None, TEXT
        if len(answer.response_ids) > self._most:
            self.done.cut += 1
            answer = _first_tokens(answer, self._most)
        return answer, signal

    def _in_ids(self, row: GivenAnswer) -> Answer:
        """The text in this teacher's ids; control tokens in it stay text."""
        text, reason = row.response, row.finish_reason or "stop"
        begin = text[: LONGEST_TOKEN * self._most]
        ids = self._plain.encode(begin)
        if len(begin) < len(text):
            if len(ids) > self._most + 1:  # Enough of it: the end would be cut off.
                text, reason = begin, "length"
            else:
                ids = self._plain.encode(text)
        if self._tokenizer.decode(ids, skip_special_tokens=False) != text:
            return Answer(error="the tokenizer does not give the text back")
        if reason == "stop" and self._stops:
            ids.append(self._stops[0])
        return Answer(np.array(ids, np.int32), reason)

    def _in_their_ids(self, row: GivenAnswer) -> tuple[Answer, Signal]:
        """The ids and the signal of an exported row, or why they contradict themselves."""
        ids = row.arrays["completion_ids"]
        known = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if ids.dtype != np.int32 or not len(ids) or ids.min() < 0 or ids.max() >= known:
            return Answer(error="completion_ids are no ids of this teacher"), TEXT
        stopped = bool(int(ids[-1]) in self._stops) and row.finish_reason != "length"
        if row.finish_reason == "stop" and not stopped:
            return Answer(error="completion_ids do not end as this teacher's answers do"), TEXT
        said = ids[:-1] if stopped else ids
        if self._tokenizer.decode(said.tolist(), skip_special_tokens=False) != row.response:
            return Answer(error="completion_ids are not the ids of the response"), TEXT
        reason = "stop" if stopped else "length"
        if not self._teacher.has_signal:
            return Answer(ids, reason), TEXT
        answer, signal = self._with_signal(Answer(ids, reason), row.arrays)
        table = answers_table([answer], signal)
        if impossible_rows(table, signal, self._teacher.vocab_size).any():
            return Answer(error="logprobs that no teacher has"), TEXT
        return answer, signal

    def _with_signal(
        self, answer: Answer, arrays: Mapping[str, NDArray[Any]]
    ) -> tuple[Answer, Signal]:
        """The answer with the richest signal that is there in full."""
        ids, length = answer.response_ids, len(answer.response_ids)
        drawn = arrays.get("sampled_logprobs")
        best, of = arrays.get("logprobs"), arrays.get("logprob_token_ids")
        if drawn is None or drawn.shape != (length,) or drawn.dtype != np.float32:
            return answer, TEXT
        whole = best is not None and of is not None and best.shape == of.shape
        tail = arrays.get("tail_logprob")
        if not whole or tail is None or best is None or of is None or len(best) != length:
            return Answer(ids, answer.finish_reason, drawn), Signal("sampled")
        width = best.shape[1]
        is_topk = best.dtype == np.float32 and of.dtype == np.int32
        if not is_topk or not 0 < width <= self._teacher.vocab_size:
            return Answer(ids, answer.finish_reason, drawn), Signal("sampled")
        # Of the logprobs themselves, as in an engine, and not what the file says.
        tail = tail_logprob(best, self._teacher.vocab_size)
        return Answer(ids, answer.finish_reason, drawn, of, best, tail), Signal("topk", width)

    def _publish(
        self, signal: Signal, answers: list[tuple[bytes, NDArray[np.int32], Answer]]
    ) -> None:
        """Publish the answers that the store does not serve yet."""
        keys = np.array([key for key, _, _ in answers], KEY)
        if signal not in self._served:
            catalogue = self._catalogue
            rows = np.flatnonzero(catalogue.serves(signal))
            buffer = catalogue.keys.take(pa.array(rows)).buffers()[1] if len(rows) else b""
            self._served[signal] = np.sort(np.frombuffer(buffer, KEY, len(rows)))
        known = self._served[signal]
        at = np.searchsorted(known, keys)
        served = np.zeros(len(keys), bool)
        served[at < len(known)] = known[at[at < len(known)]] == keys[at < len(known)]
        self.done.there += int(served.sum())
        missing = [one for one, there in zip(answers, served, strict=True) if not there]
        if not missing:
            return
        table = answers_table([answer for _, _, answer in missing], signal)
        ids = pa.array([ids.tolist() for _, ids, _ in missing], pa.list_(pa.int32()))
        stated = pa.array([key for key, _, _ in missing], pa.binary(KEY_BYTES))
        table = table.append_column("key", stated)
        table = table.append_column("prompt_ids", ids)
        self._store.publish(self._teacher.origin(signal), Provenance(RUN, "training"), table)
        self.done.rows[str(signal)] += len(missing)


def _first_tokens(answer: Answer, most: int) -> Answer:
    """The answer cut after ``most`` tokens, with their signal."""
    arrays = (answer.sampled_logprobs, answer.topk_ids, answer.topk_logprobs, answer.tail_logprob)
    cut = [None if values is None else values[:most] for values in arrays]
    return Answer(answer.response_ids[:most], "length", *cut)  # type: ignore[arg-type]
