"""Arrow schemas of prompts, answers and streamed rows: the one place that names their columns.

Legend: P prompt tokens, T response tokens, K teacher ids kept for each token, D the teacher's
hidden size.
"""

from collections.abc import Collection

import pyarrow as pa

from raystill.datasets.rows.signal import Signal

SCHEMA_VERSION = 1
"""Version of a stored segment; a reader refuses every other one. Raise it when columns change."""
KEY_BYTES = 16

JUDGING = "judging"
"""Purpose of what is asked of a judge: a stored reply with it is no answer to a prompt."""
REASONING = "reasoning"
"""Purpose of what a service sent apart from an answer, before it: no answer either."""
FATAL = "stop: "
"""How the ``error`` of a row begins that is to end the run, with the rest of it as the reason, once
the other answers of its group are stored."""

LOST = "engine_died"
"""Error of a row that was in an engine when it died: it is asked again, with suspicion. It is what
killed the engine where it was asked `ONE_BY_ONE`."""
NOT_STARTED = "engine_died_before"
"""Error of a row that waited for the engine that died: it is asked again, as if it had not been."""
GIVEN_UP = "engine_gave_up"
"""Error of a row that an engine gave up by itself, and went on: it is asked again like a LOST one.
"""
TIMED_OUT = "timed_out"
"""Error of a row that took longer than ``teacher.request_timeout_s``: it is dropped."""
FILTERED = "filtered: "
"""How the reason of a row begins that a filter has rejected, with the filter's name as the rest."""

TOKEN_IDS = pa.list_(pa.int32())
TOKEN_FLOATS = pa.list_(pa.float32())

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("prompt_ids", TOKEN_IDS, nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("response_ids", TOKEN_IDS),
    ]
)
"""A prompt of the run. ``prompt_ids``: [P]; ``key``: see ``rows/keys.py``.

``response_ids`` [T] is null, or the response that came with the prompt: the teacher then scores it
and does not write one of its own.
"""

STUDENT_PROMPT = "student_prompt_ids"
"""Column of prompts that the student reads otherwise than the teacher, whose is ``prompt_ids``: [P]
ids. Only tables of runs whose teacher sees more have it."""
CONTEXT_SCHEMA = PROMPT_SCHEMA.append(pa.field(STUDENT_PROMPT, TOKEN_IDS, nullable=False))
"""PROMPT_SCHEMA of such a run."""


def student_prompts(prompts: pa.Table) -> pa.ChunkedArray:
    """The prompt that the student reads, of each row of a prompt table or of a group."""
    if STUDENT_PROMPT not in prompts.column_names:
        return prompts["prompt_ids"]
    own = prompts[STUDENT_PROMPT]
    return prompts["prompt_ids"] if own.null_count == len(own) else own


TEACHER = "teacher"
"""Column of prompt tables in runs with several teachers: the name of the one that answers a row."""


def prompt_schema(names: Collection[str]) -> pa.Schema:
    """The schema of a prompt table that has these columns, perhaps but for its keys."""
    schema = CONTEXT_SCHEMA if STUDENT_PROMPT in names else PROMPT_SCHEMA
    named = pa.field(TEACHER, pa.string(), nullable=False)
    return schema.append(named) if TEACHER in names else schema


def of_one(teacher: str, counter: str) -> str:
    """Name of a counter of one of several teachers: ``teachers/NAME/rows`` for teacher_rows."""
    return f"teachers/{teacher}/{counter.removeprefix('teacher_')}"


def signal_fields(signal: Signal) -> list[pa.Field]:
    """Columns that a signal adds to an answer. Each is a list of T entries.

    ``sampled_logprobs`` float32: the response token's logprob, in nats of the full vocabulary.
    ``topk_ids`` int32 and ``topk_logprobs`` float32, [T][K]: the teacher's K most probable ids,
    in descending order, in nats of the full vocabulary; never renormalised over the K.
    ``tail_logprob`` float32: log(1 - sum of the K probabilities), the mass outside the K ids.
    ``hidden``, 2 D bytes a token: the bfloat16 bits (little endian) of the hidden state after the
    final norm, at the position the response token was drawn from.
    """
    if signal.kind == "text":
        return []
    fields = [pa.field("sampled_logprobs", TOKEN_FLOATS)]
    if signal.kind == "topk":
        fields += [
            pa.field("topk_ids", pa.list_(pa.list_(pa.int32(), signal.width))),
            pa.field("topk_logprobs", pa.list_(pa.list_(pa.float32(), signal.width))),
            pa.field("tail_logprob", TOKEN_FLOATS),
        ]
    if signal.kind == "hidden":
        # One binary a token, not a list of D numbers: Parquet would store a definition and a
        # repetition level for each number.
        fields.append(pa.field("hidden", pa.list_(pa.binary(2 * signal.width))))
    return fields


def answer_schema(signal: Signal) -> pa.Schema:
    """What the teacher's ``sample`` and ``score`` return: one row a prompt, in the prompts' order.

    ``error`` is null for a usable row. Otherwise it is the reason why the row is dropped, and the
    row's lists are empty. ``response_ids`` [T] ends with the stop token, unless the answer was cut
    (``finish_reason`` ``length``).
    """
    return pa.schema(
        [
            pa.field("response_ids", TOKEN_IDS),
            pa.field("finish_reason", pa.string()),
            pa.field("error", pa.string()),
            *signal_fields(signal),
        ]
    )


POLICY_VERSION = "policy_version"
"""Column of rows in runs whose student writes some of them: int64, the optimizer steps that the
weights had finished which began the response; null: the teacher wrote it."""
AT_LEAST = "at_least"
"""Column of what the student's sampler is asked: int64, the oldest weights that may answer."""
ONE_BY_ONE = "one_by_one"
"""Column of what a teacher or sampler is asked: where it is there, one row after the other is put
into the engine, each with no other row in it."""
TOKEN_VERSIONS = "token_versions"
"""Column beside `POLICY_VERSION`: int32 [T], the same for the weights that wrote each token. They
are other than the first where newer weights came while the response was written. Empty: the teacher
wrote it."""


def row_schema(signal: Signal, policy: bool = False) -> pa.Schema:
    """What the stream delivers to a training worker: columns of the plan, prompt and answer.

    policy: with the columns `POLICY_VERSION` and `TOKEN_VERSIONS`.
    """
    schema = pa.schema(
        [
            pa.field("row", pa.int64()),
            pa.field("position", pa.int64()),
            pa.field("epoch", pa.int32()),
            pa.field("source", pa.string()),
            pa.field("prompt_ids", TOKEN_IDS),
            pa.field("response_ids", TOKEN_IDS),
            pa.field("finish_reason", pa.string()),
            *signal_fields(signal),
        ]
    )
    if not policy:
        return schema
    return schema.append(pa.field(POLICY_VERSION, pa.int64())).append(
        pa.field(TOKEN_VERSIONS, TOKEN_IDS)
    )


ENGINE = b"raystill.engine"
"""Schema metadata of a table of answers: JSON with engine, version, dtype and vocab_size."""
