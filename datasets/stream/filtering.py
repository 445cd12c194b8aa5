"""Filters in the answer stage: what they need of a group's rows, beside the loop that answers them.

*Consumes* a group's prompts and published answers. Filters run in threads of their own, since they
may take long, and the store's look-ups must not wait behind them. *Waits for* judges, which are
teachers: their verdicts are published and looked up like all answers, so that each is paid once;
and for the process that compares all answers of an epoch.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from ray.exceptions import ActorDiedError

from raystill.base.errors import ConfigError, RunError
from raystill.base.run_folder import MESSAGES, RunFolder
from raystill.config.stream import FilterConfig
from raystill.config.teacher import JudgeConfig
from raystill.datasets.filters.answers import Answers
from raystill.datasets.filters.filters import AnswerFilters, Deciding, ids_of, text_of
from raystill.datasets.filters.minhash import signatures
from raystill.datasets.filters.personal import counts_of, masked_ids
from raystill.datasets.judging.question import Judging
from raystill.datasets.prompts.columns import PREFIX
from raystill.datasets.rows.answers import require_none_fatal
from raystill.datasets.rows.keys import answer_keys, prompt_digest
from raystill.datasets.rows.prompt_table import PromptReader
from raystill.datasets.rows.schema import JUDGING, KEY_BYTES, POLICY_VERSION, TOKEN_IDS
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.answers import StoredAnswers
from raystill.datasets.stream.spec import Requester
from raystill.datasets.stream.teacher_calls import InWords, TeacherCalls

if TYPE_CHECKING:
    from raystill.datasets.stream.spec import StreamSpec

logger = logging.getLogger(__name__)


class Filtered(NamedTuple):
    """A group's answers as the student gets them, why rows are dropped, string, and counters."""

    answers: pa.Table
    reasons: pa.Array
    counters: dict[str, float]


class GroupFilters:
    """The filters of a run, for groups of the stream; they also count personal data."""

    def __init__(self, spec: "StreamSpec") -> None:
        assert spec.teacher is not None, "there are filters, but no teacher whose tokenizer to use"
        rules = spec.filters.rules
        self._filters = AnswerFilters(spec.filters, spec.function_texts)
        self._decode = text_of(spec.teacher)
        self._encode = ids_of(spec.teacher)
        self._config = spec.filters
        self._counts_personal = spec.counts_personal
        self._masks = any(r.personal_data and r.personal_data.action == "mask" for r in rules)
        self._fields = spec.prompt_columns and PromptReader(spec.prompt_columns, None)
        self._judges = {rule.label: Judge(rule.judge, spec) for rule in rules if rule.judge}
        self._chats: dict[bytes, str] = {}
        if self._judges:
            run_folder = RunFolder(spec.prompt_table.rpartition("/prompts/")[0])
            table = run_folder.read_table(MESSAGES)
            chats = (table[name].to_pylist() for name in ("digest", "messages"))
            self._chats = dict(zip(*chats, strict=True))
        self._duplicates: Any = spec.duplicates if spec.filters.over_run else None
        self._reading = Lock()
        self._threads = ThreadPoolExecutor(spec.filters.function_processes, "filters")

    async def applied(
        self, prompts: pa.Table, answers: pa.Table, reasons: pa.Array, attempt: int = 0
    ) -> Filtered:
        """The answers, and ``reasons`` with those of filters where there was none."""
        seen, kept, deciding, counters = await self._thread(self._begun, prompts, answers, reasons)
        decided, asked = await self._decided(deciding, prompts, attempt)
        reasons = pc.coalesce(reasons, decided)
        kept &= pc.is_null(reasons).to_numpy(zero_copy_only=False).astype(np.bool_)
        if self._masks and kept.any():
            answers = await self._thread(self._masked, seen, kept, answers)
        return Filtered(answers, reasons, counters | asked)

    async def _thread(self, work: Any, *arguments: Any) -> Any:
        """Call in a thread of the filters."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, work, *arguments)

    def _begun(
        self, prompts: pa.Table, answers: pa.Table, reasons: pa.Array
    ) -> tuple[Answers, NDArray[np.bool_], Deciding, dict[str, float]]:
        """A group's answers as filters see them, those to look at, filters at work, counters."""
        ids, ends = (answers[n].combine_chunks() for n in ("response_ids", "finish_reason"))
        fields = {}
        if self._fields:
            with self._reading:
                table = self._fields.take(prompts["row"].to_numpy())
            fields = {
                name.removeprefix(PREFIX): column.combine_chunks().cast(pa.string())
                for name, column in zip(table.column_names, table.columns, strict=True)
                if name.startswith(PREFIX)
            }
        seen = Answers(
            ids,
            ends,
            prompts["row"].to_numpy(),
            numbered(prompts["prompt_ids"].combine_chunks()),
            prompts["source"].combine_chunks(),
            fields,
            self._decode,
        )
        kept = pc.is_null(reasons).to_numpy(zero_copy_only=False).astype(np.bool_)
        if POLICY_VERSION in answers.column_names:  # They judge what the teacher wrote.
            kept &= pc.is_null(answers[POLICY_VERSION]).to_numpy()
        counters = self._counted(seen.take(np.flatnonzero(kept)))
        return seen, kept, self._filters.deciding(seen, kept), counters

    async def _decided(
        self, deciding: Deciding, prompts: pa.Table, attempt: int
    ) -> tuple[pa.Array, dict[str, float]]:
        """Why filters reject rows, string [N], and counters of verdicts."""
        counters: Counter[str] = Counter()
        scores: Sequence[Any] | None = None
        while True:
            step = await self._thread(_next, deciding, scores)
            if not isinstance(step, tuple):
                return step, dict(counters)
            rule, looked_at = step
            if rule.similar is not None:
                scores = await self._near(rule, looked_at, prompts, attempt)
                continue
            judge = self._judges[rule.label]
            requests = self._requests(prompts, looked_at.rows)
            questions = await self._thread(judge.questions, requests, looked_at)
            replies, counted = await judge.replies(*questions)
            counters.update(counted)
            scores = await self._thread(judge.judging.scores, replies)

    async def _near(
        self, rule: FilterConfig, answers: Answers, prompts: pa.Table, attempt: int
    ) -> list[str | None]:
        """ "" for each answer that is near to another one of the epoch, else None.

        A group without answers asks as well: in ``fixed`` order those after it wait for it.
        """
        config = rule.similar
        assert config is not None
        long = np.array([len(ids) >= config.least_tokens for ids in answers.tokens], bool)
        made = await self._thread(signatures, list(compress(answers.tokens, long)), config.ngram)
        places = dict(zip(prompts["row"].to_pylist(), prompts["position"].to_pylist(), strict=True))
        positions = np.array([places[row] for row in answers.rows[long].tolist()], np.int64)
        group = prompts["position"][0].as_py()
        try:
            near = await self._duplicates.decide.remote(rule.label, attempt, group, positions, made)
        except ActorDiedError:
            raise RunError(
                f"the process that compares all answers for the filter {rule.label!r} died; it may "
                "have had too little memory on the driver's node (check says how much it needs): "
                "start the run again, which goes on from its checkpoint"
            ) from None
        told: list[str | None] = [None] * len(answers)
        for place, is_near in zip(np.flatnonzero(long), near or [False] * len(made), strict=True):
            told[place] = "" if is_near else None
        return told

    def _requests(self, prompts: pa.Table, rows: NDArray[np.int64]) -> list[str]:
        """The chats of these rows, as JSON."""
        ids = dict(zip(prompts["row"].to_pylist(), prompts["prompt_ids"], strict=True))
        return [self._chats[prompt_digest(ids[row].values.to_numpy())] for row in rows.tolist()]

    def _masked(self, seen: Answers, kept: NDArray[np.bool_], answers: pa.Table) -> pa.Table:
        """The answers with personal data masked where a filter asks for it."""
        masked = masked_ids(self._config, seen, self._encode, kept)
        place = answers.schema.get_field_index("response_ids")
        masked = masked.cast(answers.schema.field(place).type)
        return answers.set_column(place, answers.schema.field(place), masked)

    def _counted(self, answers: Answers) -> dict[str, float]:
        """Counters of personal data. A node that has no tokenizer to read answers counts none."""
        if not self._counts_personal or not len(answers):
            return {}
        try:
            return counts_of(answers)
        except (ConfigError, RunError, OSError) as error:
            self._counts_personal = False
            logger.warning("answers are not searched for personal data here: %s", error)
            return {}


class Judge:
    """A teacher that is asked about answers, each question once: its replies are in the store."""

    def __init__(self, config: JudgeConfig, spec: "StreamSpec") -> None:
        run, self._asked = spec.judges[config.teacher]
        self.judging = Judging(config, run.config, Path(run.teacher.on_this_node("none")))
        wanted, attempts = self.judging.signal, spec.stream.max_attempts
        self._calls = TeacherCalls(run.app, wanted, attempts, spec.coordinator, run.teacher_name)
        nobody = pa.chunked_array([], pa.binary(KEY_BYTES))
        store, requester = TeacherStore(spec.store_path), Requester.of(run, JUDGING)
        self._answers = StoredAnswers(store, nobody, wanted, requester, self._calls)

    def questions(
        self, requests: Sequence[str], answers: Answers
    ) -> tuple[list[bytes], dict[bytes, NDArray[np.int32]], dict[bytes, str]]:
        """The key of each answer's question; by key its token ids, and its chat as JSON.

        requests: what was answered, chats as JSON. Equal questions have one key.
        """
        fields = {name: answers.values(name) for name in self.judging.config.columns}
        keys, ids, chats = [], {}, {}
        for number, (request, text) in enumerate(zip(requests, answers.texts, strict=True)):
            of_row = {name: values[number] for name, values in fields.items()}
            chat = self.judging.chat(json.loads(request), text, of_row)
            encoded = self.judging.encode(chat)
            asked = self._asked
            (key,) = answer_keys(
                asked.teacher_identity,
                asked.dtype,
                asked.quantization,
                asked.sampling,
                [encoded],
                engine=asked.engine,
            )
            keys.append(key)
            ids[key], chats[key] = encoded, json.dumps([chat])
        return keys, ids, chats

    async def replies(
        self,
        keys: Sequence[bytes],
        ids: Mapping[bytes, NDArray[np.int32]],
        chats: Mapping[bytes, str],
    ) -> tuple[pa.Table, dict[str, float]]:
        """A reply (answer_schema) for each of ``keys``, and counters. RunError as for a teacher."""
        different = sorted(ids)
        answers = self._answers.over(pa.array(different), InWords(self._calls, chats))
        asked = pa.array([ids[key] for key in different], TOKEN_IDS)
        replies, counted = await answers.get(np.arange(len(different)), asked)
        require_none_fatal(replies)
        place = {key: number for number, key in enumerate(different)}
        counters = {"verdicts": len(keys), "verdicts_asked": counted["rows_asked"]}
        return replies.take(pa.array([place[key] for key in keys])), counters


def _next(
    deciding: Deciding, scores: Sequence[Any] | None
) -> tuple[FilterConfig, Answers] | pa.Array:
    """What filters wait for next, or their reasons at the end."""
    try:
        return next(deciding) if scores is None else deciding.send(scores)
    except StopIteration as done:
        return done.value


def numbered(prompt_ids: pa.ListArray) -> NDArray[np.int64]:
    """A number for each prompt [P] of N rows, equal where the prompts are, int64 [N]."""
    numbers: dict[bytes, int] = {}
    texts = (ids.values.to_numpy().tobytes() for ids in prompt_ids)
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
