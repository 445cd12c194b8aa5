"""A teacher that reads more than its student: both prompts, keys, groups, and who is asked what."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from raystill.base.errors import ConfigError
from raystill.base.run_folder import TRAIN_PROMPTS, RunFolder
from raystill.cluster.check.static import check_answers_fit
from raystill.cluster.check.teachers import check_written_fit
from raystill.config.run import RunConfig
from raystill.datasets.policy.calls import StudentAnswers, with_versions
from raystill.datasets.prompts.read import RawPrompt
from raystill.datasets.prompts.select import teacher_view
from raystill.datasets.prompts.tables import build_prompt_tables
from raystill.datasets.prompts.tokenise import PromptTokeniser
from raystill.datasets.rows.keys import answer_keys, given_keys, prompt_digest
from raystill.datasets.rows.prompt_table import PromptReader
from raystill.datasets.rows.schema import (
    CONTEXT_SCHEMA,
    ENGINE,
    POLICY_VERSION,
    PROMPT_SCHEMA,
    STUDENT_PROMPT,
    TOKEN_IDS,
    answer_schema,
    row_schema,
)
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.answer_stage import AnswerGroup, get_from, unpack_group
from raystill.datasets.stream.answers import StoredAnswers, _rows_of
from raystill.datasets.stream.source import group_block
from raystill.datasets.stream.spec import Requester

MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
ASKED = ("t", "float32", None)
USER = {"role": "user", "content": "What is 2 + 3?"}
TERSE = {"role": "system", "content": "Be terse."}
SHOUT = {"role": "system", "content": "Answer in capitals."}


def config(**changes):
    settings = {
        "teacher": {"model": str(MODEL)},
        "student": {"layers": [0]},
        "training": {"rows_per_step": 2},
        "stream": {"group_rows": 2, "order": "fixed"},
        "evaluation": {},
    }
    for name, section in changes.items():
        settings[name] = {**settings.get(name, {}), **section}
    return RunConfig.model_validate(settings)


def tables(tmp_path, rows, longest=100, changes=None, **prompts):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    made = config(prompts={"path": str(path), **prompts}, **(changes or {}))
    return build_prompt_tables(made, PromptTokeniser(MODEL, made.prompts), longest, 2 * longest)


def ids_of(*messages):
    made = config(prompts={"path": "-"})
    return PromptTokeniser(MODEL, made.prompts).encode(RawPrompt(None, list(messages), "", "-"))


def view(raw, **prompts):
    return teacher_view(raw, config(prompts={"path": "-", **prompts}).prompts).messages


def test_the_teachers_system_message_replaces_the_prompts_and_not_that_of_the_teachers_chat():
    plain = RawPrompt(USER["content"], None, "s", "w")
    chat = RawPrompt(None, [TERSE, USER], "s", "w")
    own = RawPrompt(None, [USER], "s", "w", teacher_messages=[TERSE, USER])
    bare = RawPrompt(None, [USER], "s", "w", teacher_messages=[USER, USER])
    system = {"teacher_system": SHOUT["content"]}
    assert view(plain, **system) == [SHOUT, USER]
    assert view(chat, **system) == [SHOUT, USER]
    assert view(own, **system) == [TERSE, USER]
    assert view(bare, **system) == [SHOUT, USER, USER]
    assert view(own, teacher_messages_field="x") == [TERSE, USER]
    assert view(chat, teacher_messages_field="x") == [TERSE, USER], "null: the student's prompt"


def test_keys_are_of_the_teachers_prompt_and_the_student_keeps_its_own(tmp_path):
    rows = [{"prompt": "one"}, {"messages": [TERSE, USER]}]
    made = tables(tmp_path, rows, teacher_system=SHOUT["content"])
    one = {"role": "user", "content": "one"}
    read = [ids_of(SHOUT, one), ids_of(SHOUT, USER)]
    own = [ids_of(one), ids_of(TERSE, USER)]
    assert made.train["prompt_ids"].to_pylist() == [ids.tolist() for ids in read]
    assert made.train[STUDENT_PROMPT].to_pylist() == [ids.tolist() for ids in own]
    keyed = made.with_keys(*ASKED, {}).train
    assert keyed.schema.equals(CONTEXT_SCHEMA)
    assert keyed["key"].to_pylist() == answer_keys(*ASKED, {}, read)
    plain = tables(tmp_path, rows).with_keys(*ASKED, {}).train
    assert plain.schema.equals(PROMPT_SCHEMA)
    assert plain["key"].to_pylist() == answer_keys(*ASKED, {}, own)
    assert made.longest_prompt_tokens == max(map(len, read + own))


def test_an_api_teacher_is_asked_the_chat_that_it_alone_reads(tmp_path):
    api = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "api_key_env": None}
    changes = {
        "teacher": {"engine": "api", "api": api},
        "signal": {"kind": "text"},
        "objective": {"cross_entropy": 1},
    }
    made = tables(
        tmp_path,
        [{"prompt": USER["content"], "more": [SHOUT, USER]}],
        100,
        changes,
        teacher_messages_field="more",
    )
    assert made.messages["digest"].to_pylist() == [prompt_digest(ids_of(SHOUT, USER))]
    assert json.loads(made.messages["messages"][0].as_py()) == [SHOUT, USER]
    assert made.train[STUDENT_PROMPT].to_pylist() == [ids_of(USER).tolist()]


def test_given_responses_are_scored_after_the_teachers_prompt(tmp_path):
    rows = [{"prompt": "one", "answer": "ONE", "more": [SHOUT, USER]}]
    fields = {"response_field": "answer", "teacher_messages_field": "more"}
    made = tables(tmp_path, rows, **fields)
    response = np.array(made.train["response_ids"][0].as_py(), np.int32)
    keys = made.with_keys(*ASKED, {}).train["key"].to_pylist()
    assert keys == given_keys(*ASKED, [ids_of(SHOUT, USER)], [response])


def test_lengths_and_held_out_prompts_are_those_of_both(tmp_path):
    short = len(ids_of({"role": "user", "content": "a"}))
    long = {"role": "system", "content": "word " * 40}
    rows = [
        {"prompt": "a", "more": None},
        {"prompt": "b", "more": [long, USER]},  # Too long for the teacher.
        {"prompt": "word " * 40, "more": [USER]},  # Too long for the student.
        {"prompt": "c", "source": "held", "more": [SHOUT, USER]},
        {"prompt": "c", "more": [TERSE, USER]},  # The student would be trained on what is held out.
        {"prompt": "d", "more": [SHOUT, USER]},  # The teacher would be asked twice.
    ]
    made = tables(
        tmp_path,
        rows,
        longest=short + 12,
        changes={"evaluation": {"held_out_sources": ["held"]}},
        teacher_messages_field="more",
    )
    assert (len(made.train), len(made.held_out)) == (1, 1)
    assert dict(made.dropped) == {"too_long": 2}
    assert made.duplicates == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a"}, "has no 'more'"),
        ({"prompt": "a", "more": 7}, "'more': messages are 7"),
        ({"prompt": "a", "more": [TERSE]}, "'more': has a system message alone"),
        ({"prompt": "a", "more": [{"role": "user", "content": "\ud800"}]}, "half of a character"),
        ("just text", "expected an object"),
    ],
)
def test_a_row_whose_teachers_chat_is_broken_is_named(tmp_path, row, words):
    with pytest.raises(ConfigError, match=words):
        tables(tmp_path, [row], teacher_messages_field="more")


def test_without_a_chat_template_the_teacher_can_see_no_more():
    with pytest.raises(ValidationError, match="teacher_system, which needs a chat template"):
        config(prompts={"path": "-", "teacher_system": "x", "chat_template": False})


def test_a_group_on_its_way_has_both_prompts(tmp_path):
    rows = [{"prompt": "one", "more": [SHOUT, USER]}, {"prompt": "two", "more": None}]
    made = tables(tmp_path, rows, teacher_messages_field="more").with_keys(*ASKED, {})
    folder = RunFolder(str(tmp_path / "run")).ensure()
    made.write(folder, 2)
    for prompts in (made.train, made.train.drop_columns([STUDENT_PROMPT])):
        folder.write_table(TRAIN_PROMPTS, prompts)
        taken = PromptReader(folder.join(TRAIN_PROMPTS)).take(np.array([1, 0]))
        group = unpack_group(group_block(taken, np.array([0, 1]), 3, 0))
        asked = made.train["prompt_ids"].to_pylist()[::-1]
        assert group["prompt_ids"].to_pylist() == asked
        own = made.train[STUDENT_PROMPT].to_pylist()[::-1]
        kept = STUDENT_PROMPT in prompts.column_names
        assert group[STUDENT_PROMPT].to_pylist() == (own if kept else [None, None])


class Both:
    """Teacher and sampler in one: each says its first prompt id, and notes what it was asked."""

    def __init__(self):
        self.sampled, self.scored = [], []

    async def sample(self, prompt_ids, keys=None, *, at_least=None):
        self.sampled += prompt_ids.to_pylist()
        return self.answers([[ids[0], 2] for ids in prompt_ids.to_pylist()])

    async def score(self, prompt_ids, response_ids):
        self.scored += zip(prompt_ids.to_pylist(), response_ids.to_pylist(), strict=True)
        return self.answers(response_ids.to_pylist())

    def answers(self, tokens):
        columns = [
            tokens,
            ["stop/5"] * len(tokens),
            [None] * len(tokens),
            [[-0.5, -0.5]] * len(tokens),
        ]
        engine = {"engine": "e", "version": "1", "dtype": "float32", "vocab_size": 100}
        facts = {ENGINE: json.dumps(engine)}
        return pa.table(columns, schema=answer_schema(Signal("sampled")).with_metadata(facts))


@pytest.mark.parametrize("by_student", [False, True])
def test_who_writes_reads_its_own_prompt_and_the_teacher_scores_after_its_own(tmp_path, by_student):
    student, teacher = Both(), Both()
    store = TeacherStore(str(tmp_path / "store"))
    keys = pa.chunked_array([pa.array([bytes([i]) * 16 for i in range(2)], pa.binary(16))])
    requester = Requester("run", "training", "t", "teacher")
    calls = StudentAnswers(student, teacher) if by_student else teacher
    answers = StoredAnswers(store, keys, Signal("sampled"), requester, calls)
    group = pa.table(
        {
            "row": [0, 1],
            "prompt_ids": pa.array([[10, 11], [20, 21]], TOKEN_IDS),
            "response_ids": pa.nulls(2, TOKEN_IDS),
            STUDENT_PROMPT: pa.array([[12], [22]], TOKEN_IDS),
        }
    )
    got, _ = asyncio.run(get_from(answers, group))
    if by_student:
        assert student.sampled == [[12], [22]]
        assert teacher.scored == [([10, 11], [12, 2]), ([20, 21], [22, 2])]
        assert with_versions(got)[POLICY_VERSION].to_pylist() == [5, 5]
    else:
        assert teacher.sampled == [[10, 11], [20, 21]]
    located = store.catalogue().locate(keys.combine_chunks())
    kept = store.read(store.catalogue(), located, ["prompt_ids"])
    assert kept["prompt_ids"].to_pylist() == [[10, 11], [20, 21]], "what the teacher read"
    again, counters = asyncio.run(get_from(answers, group))
    assert again["response_ids"].equals(got["response_ids"])
    assert counters["rows_asked"] == 0


def test_each_model_must_have_room_for_its_own_prompt(tmp_path):
    class Student:
        name, context_tokens = "small", 30

    rows = [{"prompt": "a", "more": [{"role": "system", "content": "word " * 60}, USER]}]
    both = {
        "student": {"init": "model", "model": "small", "layers": None},
        "teacher": {"sampling": {"max_tokens": 4}},
    }
    made = tables(tmp_path, rows, 200, both, teacher_messages_field="more")
    run = config(prompts={"path": "-", "teacher_messages_field": "more"}, **both)
    short = len(ids_of({"role": "user", "content": "a"}))
    assert made.longest_row(4) == short + 4 and made.longest_prompt_tokens > 60
    Student.context_tokens = short + 4
    assert not list(check_answers_fit(run, made, Student()))
    Student.context_tokens -= 1
    assert [p.where for p in check_answers_fit(run, made, Student())] == ["student.model"]
    most = made.longest_prompt_tokens + 4
    assert made.longest_row(4, most - 3) == short + 1, "the teacher's prompt leaves one token"
    policy = {"policy": {"student_share": 0.5}}
    run = config(prompts={"path": "-", "teacher_messages_field": "more"}, **both, **policy)
    assert not list(check_written_fit(run, made, most))
    (problem,) = check_written_fit(run, made, most - 1)
    assert "policy.max_tokens: 3" in problem.message


def test_rows_that_are_delivered_have_the_students_prompt():
    group = pa.table(
        {
            "position": [0, 1],
            "row": [0, 1],
            "epoch": pa.array([0, 0], pa.int32()),
            "source": ["s", "s"],
            "prompt_ids": pa.array([[10, 11], [20, 21]], TOKEN_IDS),
            "response_ids": pa.nulls(2, TOKEN_IDS),
            STUDENT_PROMPT: pa.array([[12], [22]], TOKEN_IDS),
        }
    )
    signal = Signal("text")
    columns = [[[5], [6]], ["stop", "stop"], [None, None]]
    answers = pa.table(columns, schema=answer_schema(signal))
    stage = object.__new__(
        AnswerGroup
    )  # Without a coordinator and a store, which joining needs not.
    stage._schema = row_schema(signal)
    streamed = stage._join(group, answers, pa.nulls(2, pa.string()))
    for rows in (streamed, _rows_of(group, answers, signal, -1)):
        assert rows["prompt_ids"].to_pylist() == [[12], [22]]
        assert rows["response_ids"].to_pylist() == [[5], [6]]
