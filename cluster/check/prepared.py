"""A run that passed the static check: its rows, its models, and what it will need."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.base import formatting
from raystill.base.run_folder import RunFolder
from raystill.cluster.check.output import free_bytes
from raystill.config.run import RunConfig
from raystill.datasets.filters.minhash import bytes_of_row
from raystill.datasets.lookup.keeping import StoreIndex
from raystill.datasets.prompts.tables import PromptTables
from raystill.datasets.rows.keys import Asked, KeyedEngine
from raystill.datasets.rows.schema import TEACHER
from raystill.datasets.rows.signal import Signal, held_out_signal, signal_of
from raystill.datasets.store.store import TeacherStore
from raystill.model.files import ModelFolder, fetch_model
from raystill.serve.engine.arguments import keyed_arguments

HIDDEN_BYTES = 2  # of a component of a state; noise in its low bits hardly compresses
STORED_TOKEN_BYTES = 6.1  # of an id and a logprob, compressed; see benchmarks/results/store.json


@dataclass(frozen=True)
class Stored:
    """Numbers of rows that the teacher need not answer, because their answers are there already.

    ``train_rows`` and ``held_out_rows``: the store has an answer with the signal of the run.
    ``given``: a response is given, and the run needs no signal of it. ``to_score``: an answer is
    stored or given, but its signal is still to be asked. ``asked``: names of the teachers that a
    row needs ("": the only one); ``covers_all``: none.
    """

    train_rows: int
    held_out_rows: int
    given: int
    to_score: int
    asked: frozenset[str]

    @property
    def covers_all(self) -> bool:
        """Whether no row needs a teacher."""
        return not self.asked


@dataclass
class Prepared:
    """A run that passed the static check.

    The keys of its rows contain a hash of the teacher's weights, which ``check`` has no time to
    read. So ``teacher_identity``, ``train``, ``held_out`` and ``stored`` are made when they are
    first used.
    """

    config: RunConfig
    tables: PromptTables
    teacher: ModelFolder
    student: ModelFolder | None
    store_path: str
    space_needed_bytes: int | None = None
    notices: list[str] = field(default_factory=list)
    teachers: dict[str, ModelFolder] = field(default_factory=dict)
    """Folders of several teachers by name, of which ``teacher`` is the first; {} for one."""

    @cached_property
    def by_teacher(self) -> "dict[str, Prepared]":
        """The run as each of its teachers has it, by name; "" for a single one."""
        if not self.teachers:
            return {"": self}
        return {
            name: Prepared(
                config, self.tables.of_teacher(name), self.teachers[name], None, self.store_path
            )
            for name, config in self.config.by_teacher.items()
        }

    @property
    def num_train_rows(self) -> int:
        """Rows of one epoch."""
        return self.tables.train.num_rows

    @property
    def num_held_out_rows(self) -> int:
        """Rows on which the student is evaluated."""
        return self.tables.held_out.num_rows

    @property
    def dropped(self) -> Counter[str]:
        """Unusable prompts by reason."""
        return self.tables.dropped

    @property
    def duplicates(self) -> int:
        """Prompts that are equal to an earlier or to a held-out one."""
        return self.tables.duplicates

    @property
    def teacher_folder(self) -> str:
        """The teacher's folder on this machine."""
        return str(self.teacher.path)

    @property
    def student_folder(self) -> str | None:
        """The student's folder on this machine; None with ``init: from_teacher``."""
        if self.student is None or self.student is self.teacher:
            return None
        return str(self.student.path)

    def fetch_models(self) -> None:
        """Download the weights that are not on this machine yet. Raises RunError."""
        for one in self.config.by_teacher.values():
            fetch_model(one.teacher.model, one.teacher.revision)
        if self.config.student.model is not None:
            fetch_model(self.config.student.model, self.config.student.revision)

    @cached_property
    def teacher_identity(self) -> str:
        """sha256 over the teacher's weights, configuration and tokenizer.

        With the synthetic engine it is over the engine's settings.
        """
        from raystill.model.identity import identity_of_teacher

        return identity_of_teacher(self.config.teacher, self.teacher_folder)

    @property
    def num_ids(self) -> int:
        """Ids below this one are tokens, and have a row of the student's embedding.

        A model may have rows beyond its tokenizer's tokens, and draw one of them.
        """
        from raystill.cluster.check.models import vocabulary_of

        named = max(vocabulary_of(self.teacher).values(), default=-1) + 1
        rows = (self.student or self.teacher).vocab_size
        return named if rows is None else min(named, rows)

    @cached_property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings, with the model's own defaults where the run file has none."""
        from raystill.model.sampling import resolve_sampling

        return resolve_sampling(self.config.teacher, self.teacher_folder).keyed()

    @cached_property
    def signal(self) -> Signal:
        """The signal of the training rows."""
        return signal_of(self.config.signal, self.teacher.config)

    @cached_property
    def keyed(self) -> PromptTables:
        """The prompt tables with their keys."""
        return self.tables.with_keys_of({n: one.asked for n, one in self.by_teacher.items()})

    @property
    def asked(self) -> Asked:
        """What the keys of the teacher's answers share."""
        from raystill.model.identity import keyed_dtype

        teacher = self.config.teacher
        return Asked(
            self.teacher_identity,
            keyed_dtype(teacher, self.teacher_folder),
            teacher.quantization,
            self.sampling,
            keyed_engine(self.config, self.teacher),
        )

    @cached_property
    def stored(self) -> Stored:
        """How many rows have an answer in the teacher store, or in the prompt files themselves."""
        index = StoreIndex(TeacherStore(self.store_path)).look_through()
        num_served, num_given, num_to_score = [], 0, 0
        asked: set[str] = set()
        for table, wanted in (
            (self.train, self.signal),
            (self.held_out, held_out_signal(self.config)),
        ):
            is_stored, is_served = index.find_many(table["key"], wanted)
            is_given = table["response_ids"].is_valid().to_numpy() & ~is_served
            num_served.append(int(is_served.sum()))
            needs_one = ~(is_served | is_given) if wanted.kind == "text" else ~is_served
            asked |= _teachers_of(table, needs_one)
            if wanted.kind == "text":
                num_given += int(is_given.sum())
            else:
                num_to_score += int(((is_stored & ~is_served) | is_given).sum())
        return Stored(
            train_rows=num_served[0],
            held_out_rows=num_served[1],
            given=num_given,
            to_score=num_to_score,
            asked=frozenset(asked),
        )

    @property
    def train(self) -> pa.Table:
        """The training rows, in ``PROMPT_SCHEMA``."""
        return self.keyed.train

    @property
    def held_out(self) -> pa.Table:
        """The held-out rows, in ``PROMPT_SCHEMA``."""
        return self.keyed.held_out

    def describe_stored(self) -> str:
        """A line on the rows that are answered already, for a person."""
        stored = self.stored
        line = (
            f"teacher store: {self.store_path} has {stored.train_rows} of {self.num_train_rows} "
            f"rows to train on, {stored.held_out_rows} of {self.num_held_out_rows} held out"
        )
        if stored.given:
            line += f"; {stored.given} came with their response"
        return line + (f"; {stored.to_score} answers are to be scored" if stored.to_score else "")

    def describe(self) -> str:
        """Rows, steps, what is left out, and all notices, for a person."""
        per_step = self.config.training.rows_per_step
        steps = -(-self.num_train_rows // per_step)
        lines = [
            f"prompts: {self.num_train_rows} to train on ({steps} steps of {per_step} rows"
            f"{_times(self.config.training.epochs)}), "
            f"{self.num_held_out_rows} held out; longest {self.tables.longest_prompt_tokens} tokens"
        ]
        lines += self._describe_sources()
        left_out = [f"{count} {reason}" for reason, count in sorted(self.dropped.items())]
        if self.duplicates:
            left_out.append(f"{self.duplicates} duplicates")
        if left_out:
            lines.append(f"left out: {', '.join(left_out)}")
        if (found := self.tables.personal) is not None and found.num_prompts:
            lines.append(found.line())
        asked = bool(self.config.prompts.overlap.path)
        lines += [one.line() for one in self.tables.overlap if one.contained or asked]
        if rules := self.config.filters.rules:
            most = self.config.max_rejected_fraction
            named = formatting.some([rule.label for rule in rules])
            lines.append(f"filters: {named}; at most {most:.1%} of the rows may be rejected")
            lines += self._describe_duplicates()
        if self.space_needed_bytes is not None:
            lines.append(f"space needed: about {self.space_needed_bytes / 2**30:.2f} GiB")
        return "\n".join(lines + [f"note: {notice}" for notice in self.notices])

    def _describe_duplicates(self) -> list[str]:
        """A line for each filter that compares all answers of an epoch: the memory it needs."""
        lines = []
        for name, similar in self.config.filters.over_run.items():
            gib = self.num_train_rows * bytes_of_row(similar.max_similarity) / 2**30
            needs = f"up to {gib:.2f} GiB of memory on the driver's node"
            lines.append(f"filters: {name} compares all answers of an epoch, and needs {needs}")
        return lines

    def _describe_sources(self) -> list[str]:
        """A line for each source, if there are several."""
        sources = self.config.prompts.sources or ()
        if len(sources) < 2:
            return []
        train, held_out = (
            dict(zip(counts.field("values").to_pylist(), counts.field("counts"), strict=True))
            for counts in (
                table["source"].value_counts()
                for table in (self.tables.train, self.tables.held_out)
            )
        )
        return [
            f"  {source.name}: {train.get(source.name, 0)} to train on (weight "
            f"{source.weight:g}), {held_out.get(source.name, 0)} held out"
            for source in sources
        ]


def store_space_notices(
    config: RunConfig, store_path: str, tables: PromptTables, teacher: ModelFolder
) -> Iterator[str]:
    """A notice if the store's disk is too small for the most that the answers can take.

    That is: no answer is stored yet, and all are ``max_tokens`` long.
    """
    train, held_out = (
        tables.response_tokens(name, config.max_response_tokens) for name in ("train", "held_out")
    )
    most = train * _stored_token_bytes(config, teacher)
    most += held_out * STORED_TOKEN_BYTES * (1 + config.evaluation.top_k)
    free = free_bytes(RunFolder(store_path))
    if free is not None and free < most:
        yield (
            f"the teacher's answers may take up to {most / 2**30:.1f} GiB in {store_path}, which "
            f"has {free / 2**30:.1f} GiB free; a full disk stops the run, what is stored stays"
        )


def _stored_token_bytes(config: RunConfig, teacher: ModelFolder) -> float:
    """Bytes in the store of one response token of a training row."""
    if config.signal.kind == "topk":
        return STORED_TOKEN_BYTES * (1 + config.signal.top_k)
    if config.signal.kind == "hidden":
        with suppress(ValueError):  # Another check reports it.
            return (
                STORED_TOKEN_BYTES + HIDDEN_BYTES * signal_of(config.signal, teacher.config).width
            )
    return STORED_TOKEN_BYTES


def _teachers_of(table: pa.Table, rows: NDArray[np.bool_]) -> set[str]:
    """The teachers of these rows, bool [N], of a prompt table."""
    if TEACHER in table.column_names:
        return set(table[TEACHER].filter(pa.array(rows)).unique().to_pylist())
    return {""} if rows.any() else set()


def keyed_engine(config: RunConfig, teacher: ModelFolder) -> KeyedEngine:
    """Settings of the engine that are part of the keys.

    ``teacher.max_model_len`` is where it is less than the model's own context; the synthetic engine
    does not cut its answers by it.
    """
    cut = teacher.shorter_context(config.teacher.max_model_len)
    cuts = config.teacher.engine != "synthetic"
    return KeyedEngine(keyed_arguments(config.teacher), cut if cuts else None)


def _times(epochs: int) -> str:
    return f", {epochs} times" if epochs > 1 else ""
