"""The two prompt tables of a run: training and held-out rows, tokenised, without duplicates.

``check`` and ``run`` build them before anything is spent. ``run`` adds the keys of the answers and
writes the tables as Parquet files into the run folder; the stream reads them there by row number.
"""

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raystill.base.errors import ConfigError, Problem, config_error
from raystill.base.run_folder import (
    HELD_OUT_FIELDS,
    HELD_OUT_PROMPTS,
    MESSAGES,
    PROMPT_COLUMNS,
    TRAIN_PROMPTS,
    RunFolder,
)
from raystill.datasets.prompts.columns import filter_columns, held_out_fields, strings
from raystill.datasets.prompts.read import read_prompts
from raystill.datasets.prompts.screen import (
    Overlap,
    PersonalData,
    count_overlap,
    screen_personal,
)
from raystill.datasets.prompts.select import (
    UNBOUNDED,
    UsablePrompts,
    facts_of,
    in_order_of,
    list_rows,
    require_teachers,
    samples_asked,
    sort_prompts,
    teacher_view,
)
from raystill.datasets.rows.keys import (
    DEFAULT_ENGINE,
    ROWS_PER_CHUNK,
    Asked,
    KeyedEngine,
    prompt_digest,
    with_keys,
)
from raystill.datasets.rows.schema import (
    KEY_BYTES,
    STUDENT_PROMPT,
    TEACHER,
    TOKEN_IDS,
    prompt_schema,
    student_prompts,
)
from raystill.datasets.spool.equal import Digests, group_numbers
from raystill.datasets.spool.spool import NoTokens, Picked, Spool, TokenLists

if TYPE_CHECKING:
    from raystill.config.run import RunConfig
    from raystill.datasets.prompts.tokenise import PromptTokeniser

ROWS_PER_BLOCK = 100_000
MIN_ROW_GROUP = 1024  # rows; with smaller groups the footer of the Parquet file gets long


@dataclass(frozen=True)
class PromptTables:
    """The rows of a run, and what was left out.

    ``train`` and ``held_out`` number their rows from 0. They have the columns of ``PROMPT_SCHEMA``
    except ``key``, which :meth:`with_keys` adds once the teacher's identity is known.

    ``train`` has a row for each sample of a prompt: all rows of sample 0 first, then those of
    sample 1, and so on; where filters compare them, a prompt's samples stand together.
    ``samples``, int64 [N], is the sample number of each of them.

    ``messages`` has the chat of each prompt, as JSON, by the digest of its ids; with an API teacher
    only, which is asked in words.

    With ``prompts.teacher_sees_more`` the prompt ids are the teacher's, and there is the column
    ``student_prompt_ids``.

    ``columns`` has the fields that filters read, by training row; None where they read none.

    ``held_out_fields`` has words and fields of the held-out prompts; None without
    ``evaluation.checks``.

    ``dropped`` counts unusable prompts by reason; ``first_dropped`` says where the first of each
    is. ``personal``: what personal data was found; None where nobody looked.
    ``overlap``: held-out prompts and benchmarks that are contained in training prompts.
    """

    train: pa.Table
    held_out: pa.Table
    dropped: Counter[str]
    duplicates: int
    first_dropped: Mapping[str, str]
    num_read: int
    longest_prompt_tokens: int
    samples: NDArray[np.int64]
    messages: pa.Table | None = None
    columns: pa.Table | None = None
    held_out_fields: pa.Table | None = None
    personal: PersonalData | None = None
    overlap: Sequence[Overlap] = ()

    def response_tokens(self, name: str, max_tokens: int) -> int:
        """The most response tokens that the table ``name`` can have.

        A row has those of its given response, else at most ``max_tokens``.
        """
        blocks = _blocks(getattr(self, name))
        return sum(pc.sum(_lengths(table, max_tokens)[1]).as_py() or 0 for table in blocks)

    def longest_row(self, max_tokens: int, context_tokens: int = UNBOUNDED) -> int:
        """Tokens of the student's longest prompt with its given response, or with one of at most
        ``max_tokens``, which the teacher's prompt may leave less room in ``context_tokens``.
        """
        longest = 0
        for table in (*_blocks(self.train), *_blocks(self.held_out)):
            prompts, responses = _lengths(table, max_tokens)
            room = pc.subtract(pa.scalar(context_tokens, pa.int64()), prompts)
            own = pc.list_value_length(student_prompts(table)).cast(pa.int64())
            most = pc.add(own, pc.min_element_wise(responses, room))
            longest = max(longest, pc.max(most).as_py() or 0)
        return longest

    @property
    def longest_asked_prompt(self) -> int | None:
        """Tokens of the longest prompt that the teacher has to answer; None if it has none."""
        longest = (
            pc.max(_prompt_lengths(table).filter(table["response_ids"].is_null())).as_py()
            for whole in (self.train, self.held_out)
            for table in _blocks(whole)
        )
        return max((tokens for tokens in longest if tokens is not None), default=None)

    @property
    def num_dropped(self) -> int:
        """Prompts left out as unusable, not counting duplicates."""
        return sum(self.dropped.values())

    def with_keys(
        self,
        teacher_identity: str,
        dtype: str,
        quantization: str | None,
        sampling: dict[str, Any],
        engine: KeyedEngine = DEFAULT_ENGINE,
    ) -> "PromptTables":
        """The tables with their ``key`` column, in ``PROMPT_SCHEMA``."""
        one = Asked(teacher_identity, dtype, quantization, sampling, engine)
        return self.with_keys_of({"": one})

    def with_keys_of(self, asked: Mapping[str, Asked]) -> "PromptTables":
        """As `with_keys`, of several teachers by name."""
        return replace(
            self,
            train=with_keys(self.train, asked, self.samples),
            held_out=with_keys(self.held_out, asked, np.zeros(len(self.held_out), np.int64)),
        )

    def of_teacher(self, name: str) -> "PromptTables":
        """The tables as a run of this teacher alone has them; all for "", which has no name."""
        if not name:
            return self
        mine = pc.equal(self.train[TEACHER], name).combine_chunks()
        held_out = self.held_out.filter(pc.equal(self.held_out[TEACHER], name))
        return replace(
            self,
            train=self.train.filter(mine).drop_columns([TEACHER]),
            held_out=held_out.drop_columns([TEACHER]),
            samples=self.samples[mine.to_numpy(zero_copy_only=False)],
        )

    def write(self, folder: RunFolder, group_rows: int) -> None:
        """Write both tables; a Parquet row group holds a whole number of the stream's groups."""
        size = max(group_rows, MIN_ROW_GROUP // group_rows * group_rows)
        for name, table in ((TRAIN_PROMPTS, self.train), (HELD_OUT_PROMPTS, self.held_out)):
            schema = prompt_schema(table.column_names)
            assert table.schema.equals(schema), f"{name} has no keys yet: call with_keys"
            folder.write_table(name, table, row_group_size=size)
        if self.messages is not None:
            folder.write_table(MESSAGES, self.messages)
        if self.columns is not None:
            folder.write_table(PROMPT_COLUMNS, self.columns, row_group_size=size)
        if self.held_out_fields is not None:
            folder.write_table(HELD_OUT_FIELDS, self.held_out_fields)


def build_prompt_tables(
    config: "RunConfig",
    tokeniser: "PromptTokeniser",
    max_prompt_tokens: int,
    context_tokens: int = UNBOUNDED,
) -> PromptTables:
    """Read the prompts, tokenise them, leave out unusable ones, and split off the held-out rows.

    :func:`sort_prompts` says what is left out, also by ``max_prompt_tokens`` and
    ``context_tokens``. Of equal prompts the held-out one is kept, else the first. The weights of
    sources apply to training rows only. Raises ConfigError with all problems.
    """
    checks = bool(config.evaluation.checks)
    raws = read_prompts(config.prompts, tokeniser.progress, config.filters.columns, checks)
    raws, personal = screen_personal(raws, config.prompts.personal_data)
    names = None if config.teachers is None else list(config.teachers)
    facts = facts_of(raws)
    if names is not None:
        require_teachers(raws, facts.teacher, names, config.prompts)
    limits = max_prompt_tokens, context_tokens
    usable = sort_prompts(raws, facts, config, tokeniser, limits)
    kept = usable.kept
    if not len(kept):
        raise config_error(config.prompts.files_setting, usable.why_none(max_prompt_tokens))
    train, held_out = (kept[side] for side in split_rows(config, usable))
    usable.digests = np.empty((0, 2), np.uint64)  # They were for the split; tables need the room.
    sources = facts.source.of(train) if config.prompts.sources else ()
    ids = Picked(usable.ids, train)
    asked = samples_asked(config.prompts, config.section_seeds()["weights"], ids, sources)
    if names is not None:
        held_out = held_out[in_order_of(facts.teacher, held_out, names)]
    sides = Picked(raws, train), Picked(raws, held_out)
    overlap = count_overlap(config.prompts, *sides)
    rows, samples = list_rows(asked, by_prompt=config.filters.compares_samples)
    del asked, sources
    if names is not None:
        order = in_order_of(facts.teacher, train[rows], names)
        rows, samples = rows[order], samples[order]
    return PromptTables(
        train=_table(train[rows], usable, names is not None),
        held_out=_table(held_out, usable, names is not None),
        dropped=usable.dropped,
        duplicates=usable.duplicates,
        first_dropped=usable.first_dropped,
        num_read=len(raws),
        longest_prompt_tokens=usable.longest(),
        samples=samples,
        messages=_messages(config, tokeniser, usable) if config.asks_in_words else None,
        columns=filter_columns(config, sides[0], rows),
        held_out_fields=held_out_fields(sides[1]) if checks else None,
        personal=personal,
        overlap=overlap,
    )


def _messages(config: "RunConfig", tokeniser: "PromptTokeniser", usable: UsablePrompts) -> pa.Table:
    """The chats of the usable prompts, one for each different list of ids."""
    chats: Spool[str] = Spool()
    digests = bytearray()
    for raw, ids in zip(
        Picked(usable.raws, usable.kept), Picked(usable.ids, usable.kept), strict=True
    ):
        assert ids is not None
        of_row = config.by_teacher.get(raw.teacher or "", config)
        if raw.tools is not None and not of_row.teacher.scores:
            raise config_error(
                raw.where,
                "has tools, which a teacher that is asked in words is not sent; remove the field, "
                "or reach the teacher by vLLM or by its ids (api.ids)",
            )
        view = teacher_view(raw, config.prompts) if config.prompts.teacher_sees_more else raw
        chats.extend([json.dumps(tokeniser.messages(view))])
        digests += prompt_digest(ids)
    group = group_numbers(np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2))
    # The last chat of each, in the order of the first ones.
    last = len(group) - 1 - np.unique(group[::-1], return_index=True)[1]
    keys = np.frombuffer(bytes(digests), np.uint8).reshape(-1, KEY_BYTES)[last]
    buffers = [None, pa.py_buffer(np.ascontiguousarray(keys))]
    names = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(last), buffers)
    return pa.table([names, strings(Picked(chats, last))], names=["digest", "messages"])


def split_rows(
    config: "RunConfig", usable: UsablePrompts
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers among the kept prompts of the training and of the held-out ones, each ascending.

    Held out are whole sources by name, then ``held_out_rows`` more, drawn by seed. Of a drawn
    prompt all rows are held out, since it may have several with different responses. Of all
    held-out rows at most ``max_rows`` are measured; the others are not used at all. Raises
    ConfigError.
    """
    evaluation, problems, kept = config.evaluation, [], usable.kept
    source = usable.facts.source
    names = {str(name) for name in source.names}
    for one in evaluation.held_out_sources:
        if one not in names:
            problems.append(Problem("evaluation.held_out_sources", _no_source(one, names)))
    of_source = np.array([name in evaluation.held_out_sources for name in source.names], np.bool_)
    is_held_out = of_source[source.number[kept]]
    random = np.random.default_rng(config.section_seeds()["held_out"])
    if evaluation.held_out_rows:
        among = np.flatnonzero(~is_held_out)
        digests = usable.digests if len(among) == len(kept) else usable.digests[among]
        drawn = _draw_prompts(digests, evaluation.held_out_rows, random)
        is_held_out[among[drawn]] = True
    train, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    problems = problems or _empty_side(config, len(train), len(held_out))
    if problems:
        raise ConfigError(problems)
    return train, np.sort(random.permutation(held_out)[: evaluation.max_rows])


def _draw_prompts(
    digests: Digests, num_rows: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Rows of whole prompts, drawn at random until there are ``num_rows`` or more."""
    group = group_numbers(digests)
    order = random.permutation(int(group.max(initial=-1)) + 1)
    sizes = np.bincount(group)[order[:num_rows]]  # One row or more of each.
    enough = int(np.searchsorted(np.cumsum(sizes), num_rows)) + 1
    return np.flatnonzero(np.isin(group, order[:enough]))


def _empty_side(config: "RunConfig", num_train: int, num_held_out: int) -> list[Problem]:
    """A problem if no row is left to train on, or none to evaluate on."""
    evaluation, usable = config.evaluation, num_train + num_held_out
    if not num_train:
        message = (
            f"{num_held_out} of {usable} usable rows are held out, which leaves none to train on; "
            "hold out fewer (held_out_rows, held_out_sources)"
        )
        return [Problem("evaluation", message)]
    if evaluation.enabled and not num_held_out:
        named = ", ".join(repr(source) for source in evaluation.held_out_sources)
        message = (
            f"names {named}, but none of the {usable} usable rows is of these, so nothing could be "
            "measured; repair their prompts, name another source, or hold out none"
        )
        return [Problem("evaluation.held_out_sources", message)]
    return []


def _no_source(source: str, names: set[str]) -> str:
    near = difflib.get_close_matches(source, sorted(names), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "use one of them"
    listed = ", ".join(sorted(names)[:30]) + (", ..." if len(names) > 30 else "")
    return f"{source!r} is no source of these prompts ({listed}); {hint}"


def _blocks(table: pa.Table) -> Iterator[pa.Table]:
    """The rows of a table, ROWS_PER_BLOCK at a time, without a copy."""
    return (table.slice(i, ROWS_PER_BLOCK) for i in range(0, len(table), ROWS_PER_BLOCK))


def _prompt_lengths(table: pa.Table) -> pa.ChunkedArray:
    return pc.list_value_length(table["prompt_ids"])


def _lengths(table: pa.Table, max_tokens: int) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Tokens of each row's prompt, and the most that its response can have."""
    prompts, responses = (pc.list_value_length(table[n]) for n in ("prompt_ids", "response_ids"))
    return prompts.cast(pa.int64()), responses.fill_null(max_tokens).cast(pa.int64())


def _table(rows: NDArray[np.int64], usable: UsablePrompts, of_teachers: bool) -> pa.Table:
    """The table of these prompts, by their numbers. of_teachers: with the column `TEACHER`."""
    chunks = [rows[i : i + ROWS_PER_CHUNK] for i in range(0, len(rows), ROWS_PER_CHUNK)]

    def lists(ids: TokenLists | NoTokens) -> pa.ChunkedArray:
        if isinstance(ids, NoTokens):  # Chunks without any share their memory.
            of_length = {len(chunk): ids.take(chunk) for chunk in (*chunks[:1], *chunks[-1:])}
            return pa.chunked_array([of_length[len(chunk)] for chunk in chunks], TOKEN_IDS)
        return pa.chunked_array([ids.take(chunk) for chunk in chunks], TOKEN_IDS)

    columns = {
        "row": pa.array(np.arange(len(rows)), pa.int64()),
        "prompt_ids": lists(usable.ids),
        "source": usable.facts.source.strings(chunks),
        "response_ids": lists(usable.responses),
    }
    if usable.student_ids is not usable.ids:
        columns[STUDENT_PROMPT] = lists(usable.student_ids)
    if of_teachers:
        columns[TEACHER] = usable.facts.teacher.strings(chunks)
    schema = prompt_schema(columns)
    return pa.table(columns, schema=pa.schema([f for f in schema if f.name != "key"]))
