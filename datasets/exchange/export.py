"""Write a teacher store's answers as a Hugging Face data set: Parquet files and a data set card.

``trl``: ``messages`` as TRL's trainers take them, and what the teacher said of each token under the
names of TRL's own generation server and client (``trl/scripts/vllm_serve.py``): ``prompt_ids``,
``completion_ids``, ``logprobs`` and ``logprob_token_ids``.

``distillkit``: ``input_ids``, ``labels``, ``attention_mask``, ``token_ids`` and ``top_values``,
which DistillKit's ``LogprobCompressor.decompress_to_sparse`` takes without any compression. Row t
of ``token_ids`` and ``top_values`` is of the token at t + 1, and its loss counts where ``labels``
of t is not negative. So the last token, after which nothing is said, is left out, and the last
token of the prompt has a label.

Groups are read, changed and written one after the other, in the order of the store's segments: the
memory does not grow with the store, apart from its keys, and the same store gives the same bytes.
Imports neither Ray nor torch.

Legend: P prompt tokens, T response tokens, K teacher ids kept for each token.
"""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raystill.base.errors import RunError
from raystill.datasets.exchange.chats import ChatReader
from raystill.datasets.rows.schema import JUDGING, REASONING
from raystill.datasets.store.catalogue import Catalogue
from raystill.datasets.store.footer import Origin
from raystill.datasets.store.reading import GoneSegment, UnusableSegment
from raystill.datasets.store.segment import SegmentFile
from raystill.datasets.store.store import TeacherStore

FORMATS = ("trl", "distillkit")
SPLITS = {"training": "train", "evaluation": "test"}
"""Rows that a run held out for its evaluation are a split of their own."""
ATTEMPTS = 4
"""How often a store is read from the start at most, where segments are merged meanwhile."""
FLUSH_BYTES = 32 << 20
SHARD_BYTES = 400 << 20
"""A Parquet row group, and a file, are ended when they hold this much (uncompressed)."""

LISTS = pa.list_(pa.int32())
TOP_IDS, TOP_VALUES = pa.list_(pa.list_(pa.int32())), pa.list_(pa.list_(pa.float32()))
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
ABOUT = {name: pa.string() for name in ("teacher", "teacher_identity", "finish_reason", "key")}
SCHEMAS: Mapping[str, pa.Schema] = {
    "trl": pa.schema(
        {
            "messages": MESSAGES,
            "prompt_ids": LISTS,
            "completion_ids": LISTS,
            "logprobs": TOP_VALUES,
            "logprob_token_ids": TOP_IDS,
            "sampled_logprobs": pa.list_(pa.float32()),
            "tail_logprob": pa.list_(pa.float32()),
            **ABOUT,
        }
    ),
    "distillkit": pa.schema(
        {
            "input_ids": LISTS,
            "labels": LISTS,
            "attention_mask": pa.list_(pa.int8()),
            "token_ids": TOP_IDS,
            "top_values": TOP_VALUES,
        }
    ),
}


@dataclass
class Exported:
    """What was written: rows by split and by teacher, rows left out by reason, unusable segments.

    control_tokens: responses in whose text a control token stands. A reader that tokenises
    ``messages`` again takes it for one.
    """

    rows: Counter[str] = field(default_factory=Counter)
    teachers: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    control_tokens: int = 0
    refused: dict[str, UnusableSegment] = field(default_factory=dict)


def export(
    store: TeacherStore,
    out: str,
    form: str,
    teacher: str | None,
    reader_of: Callable[[Origin], ChatReader],
) -> Exported:
    """Write the store's answers into the new folder ``out``; one row for each answer.

    teacher: the first digits of a teacher's identity, to write its answers alone. reader_of: reads
    the chats of a teacher's prompts (``trl`` only). The folder appears whole or not at all. Raises
    RunError where ``out`` is there already, or nothing is to be written.
    """
    folder = Path(out)
    if "://" in out or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise RunError(f"{out} must be a local folder that is new or empty; name another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in reversed(range(ATTEMPTS)):
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
        try:
            part.chmod(0o755)
            done = _write(store, part, form, teacher, reader_of)
            os.replace(part, folder)
            return done
        except GoneSegment as error:  # Merged into another since the catalogue was read.
            if not left:
                raise RunError(
                    f"{store.path} changed {ATTEMPTS} times while it was read (last: {error}); "
                    "export it when no 'store compact' or 'prune' is at work"
                ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    raise AssertionError("the last attempt returns or raises")


def _write(
    store: TeacherStore,
    part: Path,
    form: str,
    teacher: str | None,
    reader_of: Callable[[Origin], ChatReader],
) -> Exported:
    """Write the whole data set into the folder ``part``. Raises GoneSegment, RunError."""
    catalogue = store.catalogue()
    done = Exported(refused=dict(catalogue.refused))
    chosen = _chosen(catalogue, form, teacher)
    shards = Shards(part, SCHEMAS[form])
    change = _Trl(reader_of, done) if form == "trl" else _DistillKit()
    for split, origin, rows in _groups(store, catalogue, chosen, form, done):
        table = change(origin, rows)
        shards.add(split, table)
        done.rows[split] += len(table)
        done.teachers[f"{origin.teacher} {origin.teacher_identity}"] += len(table)
    if not sum(done.rows.values()):
        raise RunError(_why_nothing(store, form, teacher, done))
    shards.end()
    (part / "README.md").write_text(_card(form, done), encoding="utf-8")
    return done


def _chosen(catalogue: Catalogue, form: str, teacher: str | None) -> NDArray[np.int64]:
    """Stored rows to be written: of each key one, which has the most that the format can hold.

    In the order of segments, groups and places.
    """
    kinds = ("topk",) if form == "distillkit" else ("text", "hidden", "sampled", "topk")
    origins = [entry.footer.origin for entry in catalogue.entries]
    rank = [
        kinds.index(o.signal.kind)
        if o.signal.kind in kinds and o.teacher_identity.startswith(teacher or "")
        else -1
        for o in origins
    ]
    of_row = np.array([*rank, -1])[catalogue.segment]
    rows = np.flatnonzero(of_row >= 0)
    # Stable: of equal kinds the wider one comes first in the catalogue.
    rows = rows[np.argsort(-of_row[rows], kind="stable")]
    codes = catalogue.keys.take(pa.array(rows)).dictionary_encode().indices.to_numpy()
    rows = rows[np.unique(codes, return_index=True)[1]]
    places = (catalogue.place[rows], catalogue.group[rows], catalogue.segment[rows])
    return np.asarray(rows[np.lexsort(places)], np.int64)


def _groups(
    store: TeacherStore, catalogue: Catalogue, chosen: NDArray[np.int64], form: str, done: Exported
) -> Iterator[tuple[str, Origin, pa.Table]]:
    """The chosen rows, a group of a segment at a time: their split, origin and stored columns."""
    at = np.stack([catalogue.segment[chosen], catalogue.group[chosen]])
    ends = np.flatnonzero(np.any(np.diff(at) != 0, axis=0)) + 1
    opened: dict[str, SegmentFile] = {}
    for rows in np.split(chosen, ends) if len(chosen) else ():
        entry = catalogue.entries[catalogue.segment[rows[0]]]
        group = int(catalogue.group[rows[0]])
        origin, about = entry.footer.origin, entry.footer.groups[group]
        if about.purpose == JUDGING:
            done.left_out["verdict of a judge"] += len(rows)
            continue
        if about.purpose == REASONING:  # The answers that it led to are rows of their own.
            done.left_out["reasoning apart from an answer"] += len(rows)
            continue
        if entry.name not in opened:
            opened.clear()  # One file is open at a time.
        names = ["key", "prompt_ids", "response_ids", "finish_reason"]
        if origin.signal.kind == "topk":
            names += ["topk_ids", "topk_logprobs"]
        if form == "trl":
            names += ["tail_logprob"] if origin.signal.kind == "topk" else []
            has_logprobs = origin.signal.kind in ("sampled", "topk") or (
                origin.signal.kind == "hidden" and not about.scored
            )
            names += ["sampled_logprobs"] if has_logprobs else []
        try:
            table = store.read_group(entry.name, group, names, opened)
        except GoneSegment:
            raise
        except UnusableSegment as error:
            done.refused[entry.name] = error
            continue
        split = SPLITS.get(about.purpose, "train")
        yield split, origin, table.take(pa.array(catalogue.place[rows])).combine_chunks()


class _Trl:
    """Stored rows in TRL's columns."""

    def __init__(self, reader_of: Callable[[Origin], ChatReader], done: Exported) -> None:
        self._reader_of = reader_of
        self._readers: dict[Origin, ChatReader] = {}
        self._done = done

    def __call__(self, origin: Origin, rows: pa.Table) -> pa.Table:
        if origin not in self._readers:
            self._readers[origin] = self._reader_of(origin)
        reader = self._readers[origin]
        chats = reader.read([ids.values.to_numpy() for ids in rows["prompt_ids"]])
        readable = pa.array([chat is not None for chat in chats])
        if left_out := len(rows) - int(pc.sum(readable).as_py() or 0):
            self._done.left_out["prompt is no chat of the template"] += left_out
        rows = rows.filter(readable).combine_chunks()
        said = zip(rows["response_ids"], rows["finish_reason"].to_pylist(), strict=True)
        messages = [
            [*chat, {"role": "assistant", "content": self._text(reader, ids.values, reason)}]
            for chat, (ids, reason) in zip([c for c in chats if c is not None], said, strict=True)
        ]
        return _table("trl", {"messages": messages, **_signal(rows), **_about(origin, rows)})

    def _text(self, reader: ChatReader, ids: pa.Array, reason: str | None) -> str:
        """A response as text, without the token that ended it."""
        said = ids.to_numpy()
        text = reader.text(said[:-1] if reason == "stop" else said)
        self._done.control_tokens += any(token in text for token in reader.control_tokens)
        return text


def _signal(rows: pa.Table) -> dict[str, Any]:
    """TRL's columns of ids and logprobs; absent ones are null."""
    columns: dict[str, Any] = {
        "prompt_ids": rows["prompt_ids"],
        "completion_ids": rows["response_ids"],
        "sampled_logprobs": rows["sampled_logprobs"]
        if "sampled_logprobs" in rows.column_names
        else None,
    }
    if "topk_ids" in rows.column_names:
        columns["logprobs"] = rows["topk_logprobs"].cast(TOP_VALUES)
        columns["logprob_token_ids"] = rows["topk_ids"].cast(TOP_IDS)
        columns["tail_logprob"] = rows["tail_logprob"]
    elif columns["sampled_logprobs"] is not None:
        columns["logprobs"] = _one_each(rows["sampled_logprobs"], TOP_VALUES)
        columns["logprob_token_ids"] = _one_each(rows["response_ids"], TOP_IDS)
    return columns


def _one_each(lists: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """Lists [T] as lists [T][1]."""
    lists = lists.combine_chunks()
    values = lists.flatten()
    inner = pa.ListArray.from_arrays(pa.array(np.arange(len(values) + 1, dtype=np.int32)), values)
    offsets = lists.offsets.to_numpy()
    return pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), inner).cast(kind)


def _about(origin: Origin, rows: pa.Table) -> dict[str, Any]:
    """Who said it, and under which key it is stored."""
    return {
        "teacher": [origin.teacher] * len(rows),
        "teacher_identity": [origin.teacher_identity] * len(rows),
        "finish_reason": rows["finish_reason"],
        "key": [key.hex() for key in rows["key"].to_pylist()],
    }


class _DistillKit:
    """Stored rows in DistillKit's columns."""

    def __call__(self, origin: Origin, rows: pa.Table) -> pa.Table:
        width = origin.signal.width
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMAS["distillkit"].names}
        # Of a prompt's tokens nothing is known: K ids, equally probable, which labels leave out.
        nothing = np.full(width, -np.log(origin.vocab_size), np.float32)
        for row in range(len(rows)):
            prompt, said = (rows[n][row].values.to_numpy() for n in ("prompt_ids", "response_ids"))
            before = len(prompt) - 1
            ids = np.concatenate([prompt, said])[:-1]
            best = rows["topk_ids"][row].values.flatten().to_numpy().reshape(-1, width)
            values = rows["topk_logprobs"][row].values.flatten().to_numpy().reshape(-1, width)
            known = slice(max(0, -before), None)  # A prompt of no tokens: the first is not said.
            before = max(0, before)
            filler = np.tile(np.arange(width, dtype=np.int32), (before, 1))
            columns["input_ids"].append(ids)
            columns["labels"].append(np.where(np.arange(len(ids)) < before, -100, ids))
            columns["attention_mask"].append(np.ones(len(ids), np.int8))
            columns["token_ids"].append(list(np.concatenate([filler, best[known]])))
            columns["top_values"].append(
                list(np.concatenate([np.tile(nothing, (before, 1)), values[known]]))
            )
        return _table("distillkit", columns)


def _table(form: str, columns: Mapping[str, Any]) -> pa.Table:
    """The columns in the format's schema; a column that is None or not there is null."""
    schema = SCHEMAS[form]
    length = max(len(values) for values in columns.values() if values is not None)
    arrays = []
    for one in schema:
        values = columns.get(one.name)
        if isinstance(values, list):
            values = pa.array(values, one.type)
        elif isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        arrays.append(pa.nulls(length, one.type) if values is None else values.cast(one.type))
    return pa.Table.from_arrays(arrays, schema=schema)


class Shards:
    """Parquet files of a data set, as ``datasets`` names them: ``train-00000-of-00002.parquet``."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder, self._schema = folder, schema
        self._waiting: dict[str, list[pa.Table]] = {}
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._bytes: Counter[str] = Counter()
        self._files: Counter[str] = Counter()

    def add(self, split: str, table: pa.Table) -> None:
        """Add rows to a split."""
        waiting = self._waiting.setdefault(split, [])
        waiting.append(table)
        if sum(part.nbytes for part in waiting) >= FLUSH_BYTES:
            self._flush(split)

    def end(self) -> None:
        """Write what waits, and give the files the names that they keep."""
        for split in list(self._waiting):
            self._flush(split)
        for writer in self._writers.values():
            writer.close()
        for split, number in self._files.items():
            for i in range(number):
                name = f"{split}-{i:05d}-of-{number:05d}.parquet"
                os.rename(self._folder / f"{split}-{i}", self._folder / name)

    def _flush(self, split: str) -> None:
        table = pa.concat_tables(self._waiting.pop(split, []))
        if not len(table):
            return
        if split not in self._writers:
            path = str(self._folder / f"{split}-{self._files[split]}")
            self._writers[split] = pq.ParquetWriter(path, self._schema, compression="zstd")
            self._files[split] += 1
        self._writers[split].write_table(table, row_group_size=len(table))
        self._bytes[split] += table.nbytes
        if self._bytes[split] >= SHARD_BYTES:
            self._writers.pop(split).close()
            self._bytes[split] = 0


def _card(form: str, done: Exported) -> str:
    """The data set's card: what is in it, and whose words these are."""
    taught = "\n".join(
        f"- {name.rpartition(' ')[0]} (identity `{name.rpartition(' ')[2]}`): {rows} rows"
        for name, rows in sorted(done.teachers.items())
    )
    return (
        "---\ntags:\n- synthetic\n- distillation\n---\n\n# Answers of a teacher\n\n"
        f"Written by `raystill store export`, in the format `{form}`. Who wrote the responses:\n\n"
        f"{taught}\n\nThe terms of these models, and of the services they were asked by, say "
        "whether another model may learn from this data set, and be handed on.\n"
    )


def _why_nothing(store: TeacherStore, form: str, teacher: str | None, done: Exported) -> str:
    if done.left_out:
        return (
            f"none of the {sum(done.left_out.values())} prompts of {store.path} can be read as a "
            "chat with the teacher's tokenizer and template; name its folder with --model, or "
            "export with --format distillkit, which needs ids only"
        )
    what = "answers with a topk signal" if form == "distillkit" else "answers"
    of = f" of a teacher {teacher}" if teacher else ""
    return f"{store.path} has no {what}{of} to export; 'store list' shows what it has"
