"""The prompt tables of a run: tokenised, without duplicates, split into training and held out.

Made once, before anything is spent, by ``check`` and ``run`` alike; ``run`` adds the answers'
keys and writes the tables into the run folder, where the stream reads them.
"""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raystill.cluster.problems import ConfigError, Problem
from raystill.cluster.run_folder import HELD_OUT_PROMPTS, TRAIN_PROMPTS, RunFolder
from raystill.datasets.keys import answer_keys
from raystill.datasets.read_prompts import RawPrompt, read_prompts
from raystill.datasets.schema import PROMPT_SCHEMA, TOKEN_IDS
from raystill.datasets.weights import list_rows, samples_asked

if TYPE_CHECKING:
    from raystill.cluster.config import RunConfig
    from raystill.datasets.tokenise import PromptTokeniser

MIN_ROW_GROUP = 1024  # rows; smaller ones make a long footer
ROWS_PER_CHUNK = 100_000  # list offsets are 32 bits; a chunk stays far below


@dataclass(frozen=True)
class PromptTables:
    """The rows a run may ask for, and what was left out.

    ``train`` and ``held_out`` number their rows from 0 and have the columns of ``PROMPT_SCHEMA``
    but ``key``, which :meth:`with_keys` adds once the teacher's identity is known.
    ``dropped`` counts by reason; ``first_dropped`` says where the first of each was. ``train``
    holds a prompt once for each sample that is asked of it, and ``samples`` the sample number of
    each of its rows: first all rows of sample 0, then those of sample 1, and so on.
    """

    train: pa.Table
    held_out: pa.Table
    dropped: Counter[str]
    duplicates: int
    first_dropped: Mapping[str, str]
    num_read: int
    longest_prompt_tokens: int
    samples: NDArray[np.int64]

    @property
    def num_dropped(self) -> int:
        """Rows left out as unusable (duplicates apart)."""
        return sum(self.dropped.values())

    def with_keys(
        self, teacher_identity: str, dtype: str, quantization: str | None, sampling: dict[str, Any]
    ) -> "PromptTables":
        """The tables with their ``key`` column: exactly ``PROMPT_SCHEMA``."""
        asked = (teacher_identity, dtype, quantization, sampling)
        return replace(
            self,
            train=_with_keys(self.train, asked, self.samples),
            held_out=_with_keys(self.held_out, asked, np.zeros(len(self.held_out), np.int64)),
        )

    def write(self, folder: RunFolder, group_rows: int) -> None:
        """Write both tables, in row groups that are whole stream groups and can be read alone."""
        size = max(group_rows, MIN_ROW_GROUP // group_rows * group_rows)
        for name, table in ((TRAIN_PROMPTS, self.train), (HELD_OUT_PROMPTS, self.held_out)):
            assert table.schema.equals(PROMPT_SCHEMA), f"{name} has no keys yet: call with_keys"
            folder.write_table(name, table, row_group_size=size)


def build_prompt_tables(
    config: "RunConfig", tokeniser: "PromptTokeniser", max_prompt_tokens: int
) -> PromptTables:
    """Read, tokenise, drop, and split. Raises ConfigError with everything that is wrong.

    A prompt of more than ``max_prompt_tokens`` is dropped as ``too_long``, one of no tokens as
    ``empty``; of equal prompts the first stays. Weights count for what is not held out.
    """
    raws = read_prompts(config.prompts)
    ids = tokeniser.encode_many(raws)
    kept: list[int] = []
    seen: set[bytes] = set()
    dropped: Counter[str] = Counter()
    first_dropped: dict[str, str] = {}
    duplicates = 0
    for index, prompt in enumerate(ids):
        reason = _why_unusable(prompt, max_prompt_tokens)
        if reason is not None:
            dropped[reason] += 1
            first_dropped.setdefault(reason, f"{raws[index].where}: {len(prompt)} tokens")
            continue
        digest = blake2b(prompt.tobytes(), digest_size=16).digest()
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        kept.append(index)
    train, held_out = split_rows(config, [raws[index].source for index in kept], raws)
    asked = samples_asked(
        config.prompts,
        config.section_seeds()["weights"],
        [ids[kept[i]] for i in train],
        [raws[kept[i]].source for i in train],
    )
    rows, samples = list_rows(asked)
    return PromptTables(
        train=_table([kept[i] for i in train[rows]], ids, raws),
        held_out=_table([kept[i] for i in held_out], ids, raws),
        dropped=dropped,
        duplicates=duplicates,
        first_dropped=first_dropped,
        num_read=len(raws),
        longest_prompt_tokens=max((len(ids[i]) for i in kept), default=0),
        samples=samples,
    )


def split_rows(
    config: "RunConfig", sources: Sequence[str], raws: Sequence[RawPrompt]
) -> tuple[np.ndarray, np.ndarray]:
    """Indices into ``sources`` of the training and of the held-out rows, each ascending.

    Whole sources by name, then so many rows by seed; of all these at most ``max_rows`` are
    measured, and the others are used for nothing. Raises ConfigError.
    """
    evaluation, problems = config.evaluation, []
    names = {raw.source for raw in raws}
    for source in evaluation.held_out_sources:
        if source not in names:
            problems.append(Problem("evaluation.held_out_sources", _no_source(source, names)))
    held = np.isin(np.array(sources, dtype=object), list(evaluation.held_out_sources))
    random = np.random.default_rng(config.section_seeds()["held_out"])
    free = np.flatnonzero(~held)
    if evaluation.held_out_rows:
        held[random.permutation(free)[: evaluation.held_out_rows]] = True
    train, held_out = np.flatnonzero(~held), np.flatnonzero(held)
    if not len(train) and not problems:
        problems.append(
            Problem(
                "evaluation",
                f"{len(held_out)} of {len(sources)} usable rows are held out, which leaves none to "
                "train on; hold out fewer (held_out_rows, held_out_sources)",
            )
        )
    if problems:
        raise ConfigError(problems)
    return train, np.sort(random.permutation(held_out)[: evaluation.max_rows])


def _why_unusable(prompt: np.ndarray, max_prompt_tokens: int) -> str | None:
    if len(prompt) == 0:
        return "empty"
    return "too_long" if len(prompt) > max_prompt_tokens else None


def _no_source(source: str, names: set[str]) -> str:
    near = difflib.get_close_matches(source, sorted(names), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "use one of them"
    listed = ", ".join(sorted(names)[:30]) + (", ..." if len(names) > 30 else "")
    return f"{source!r} is no source of these prompts ({listed}); {hint}"


def _table(indices: Sequence[int], ids: list[np.ndarray], raws: list[RawPrompt]) -> pa.Table:
    chunks = [indices[i : i + ROWS_PER_CHUNK] for i in range(0, len(indices), ROWS_PER_CHUNK)]
    columns = {
        "row": pa.array(np.arange(len(indices)), pa.int64()),
        "prompt_ids": pa.chunked_array(
            [_token_lists([ids[i] for i in chunk]) for chunk in chunks], TOKEN_IDS
        ),
        "source": pa.array([raws[i].source for i in indices], pa.string()),
    }
    without_key = pa.schema([field for field in PROMPT_SCHEMA if field.name != "key"])
    return pa.table(columns, schema=without_key)


def _token_lists(prompts: list[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(prompts) + 1, dtype=np.int32)
    np.cumsum([len(prompt) for prompt in prompts], out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, np.concatenate(prompts), type=TOKEN_IDS)


def _with_keys(
    table: pa.Table,
    asked: tuple[str, str, str | None, dict[str, Any]],
    samples: NDArray[np.int64],
) -> pa.Table:
    keys: list[bytes] = []
    for run in np.split(np.arange(len(table)), np.flatnonzero(np.diff(samples)) + 1):
        if not len(run):
            continue
        rows = table["prompt_ids"].slice(run[0], len(run))
        sample = int(samples[run[0]])
        keys += answer_keys(*asked, (row.values.to_numpy() for row in rows), sample)
    column = pa.array(keys, PROMPT_SCHEMA.field("key").type)
    return table.append_column(PROMPT_SCHEMA.field("key"), column).select(PROMPT_SCHEMA.names)
