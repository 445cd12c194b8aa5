"""Several teachers: who answers a row, what is refused, and whose answer lies in the store."""

import asyncio
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder
from raystill.cluster.check.prepared import Prepared
from raystill.cluster.check.static import Checked, check_run_file
from raystill.cluster.coordinator.actor import Coordinator
from raystill.cluster.job import run as job
from raystill.cluster.job.manifest import check_teacher_of
from raystill.cluster.report.summary import teacher_lines
from raystill.config.load import (
    config_text,
    identity_fields,
    load_config,
    named_teacher,
    parse_yaml,
)
from raystill.config.run import RunConfig
from raystill.datasets.rows.answers import Answer, answers_table
from raystill.datasets.rows.schema import ENGINE
from raystill.datasets.rows.signal import Signal
from raystill.datasets.store.store import TeacherStore
from raystill.datasets.stream.answers import RoutedAnswers, answers_of
from raystill.datasets.stream.spec import Requester
from raystill.datasets.stream.teacher_calls import TeacherCalls
from raystill.model.on_node import ModelSource
from raystill.placement.requests import requests
from raystill.run import Run
from raystill.serve.deploy import TeacherApps

MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
SOURCES = [
    {"name": "a", "path": "a.jsonl", "teacher": "one"},
    {"name": "b", "path": "b.jsonl", "teacher": "two"},
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSTILL_HOME", raising=False)
    for name in "ab":
        rows = [{"prompt": f"{name} {i}", "who": ["one", "two"][i % 2]} for i in range(6)]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run_file(**changes: Any) -> dict[str, Any]:
    teacher = {"model": str(MODEL), "engine": "synthetic"}
    settings: dict[str, Any] = {
        "teachers": {
            "one": teacher,
            "two": teacher | {"synthetic": {"response_tokens": 5}, "num_replicas": 2},
        },
        "student": {"layers": [0]},
        "prompts": {"sources": SOURCES, "chat_template": False},
        "signal": {"kind": "text"},
        "objective": {"cross_entropy": 1.0},
        "training": {"rows_per_step": 4},
        "stream": {"group_rows": 2},
        "evaluation": {"held_out_rows": 3},
        "store": {"path": "store"},
    }
    settings |= changes
    return {name: value for name, value in settings.items() if value is not None}


def checked(**changes: Any) -> Checked:
    Path("run.yaml").write_text(json.dumps(run_file(**changes)))
    return check_run_file("run.yaml")


def prepared(**changes: Any) -> Prepared:
    found = checked(**changes)
    assert found.problems == []
    assert found.prepared is not None
    return found.prepared


def rows_of(run: Prepared) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [*run.train.to_pylist(), *run.held_out.to_pylist()]
    return rows


def test_a_source_says_who_answers_its_rows_and_they_stand_together() -> None:
    run = prepared()
    assert {(row["source"], row["teacher"]) for row in rows_of(run)} == {("a", "one"), ("b", "two")}
    for table in (run.train, run.held_out):
        names = table["teacher"].to_pylist()
        assert names == sorted(names) and table["row"].to_pylist() == list(range(len(table)))
    assert run.stored.asked == {"one", "two"}


@pytest.mark.parametrize("sources", [None, SOURCES[:1]])
def test_a_field_says_who_answers_a_row_and_counts_more_than_the_source(sources: Any) -> None:
    prompts = {"teacher_field": "who", "chat_template": False}
    prompts |= {"path": "a.jsonl"} if sources is None else {"sources": sources}
    rows = rows_of(prepared(prompts=prompts))
    tokens = {tuple(row["prompt_ids"]): row["teacher"] for row in rows}
    assert len(tokens) == 6 and sorted(tokens.values()) == ["one"] * 3 + ["two"] * 3


def test_a_key_is_that_of_a_run_with_this_teacher_alone() -> None:
    several = {
        tuple(row["prompt_ids"]): (row["teacher"], row["key"]) for row in rows_of(prepared())
    }
    for name, teacher in run_file()["teachers"].items():
        sources = [{key: one[key] for key in ("name", "path")} for one in SOURCES]
        prompts = {"sources": sources, "chat_template": False}
        alone = prepared(teachers=None, teacher=teacher, prompts=prompts)
        assert "teacher" not in alone.train.column_names
        of_one = {tuple(row["prompt_ids"]): row["key"] for row in rows_of(alone)}
        mine = {ids: key for ids, (who, key) in several.items() if who == name}
        assert mine and all(of_one[ids] == key for ids, key in mine.items())


def test_two_teachers_may_answer_one_prompt_each_in_a_row_of_its_own() -> None:
    Path("b.jsonl").write_text(Path("a.jsonl").read_text())
    rows = rows_of(run := prepared())
    asked = {(tuple(row["prompt_ids"]), row["teacher"]) for row in rows}
    assert len(rows) == len(asked) == 12 and run.duplicates == 0
    train, held_out = (
        {tuple(ids) for ids in t["prompt_ids"].to_pylist()} for t in (run.train, run.held_out)
    )
    assert not train & held_out, "a held-out prompt is trained on by the other teacher's answer"


def test_each_teachers_settings_count_for_its_own_rows() -> None:
    teachers = run_file()["teachers"]
    teachers["one"] |= {"sampling": {"max_tokens": 8192}, "target_ongoing_requests": 3}
    found = checked(teachers=teachers, stream={"group_rows": 2, "max_rows_ahead": 16})
    assert found.prepared is not None
    assert found.prepared.config.max_response_tokens == 8192
    (problem,) = found.problems
    assert problem.where == "stream.max_rows_ahead"
    assert problem.message.endswith("or lower teachers.one.target_ongoing_requests")
    (cut,) = [one for one in found.notices if "leaves its answer" in one]
    assert cut.startswith("one: ") and "of 8192 tokens" in cut


LICENCES: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"two": "llama3.1"}, "terms: llama-3.1 is read as conditional"),
    ({"two": "apache-2.0"}, ""),
]


@pytest.mark.parametrize(("stated", "rule"), LICENCES)
def test_a_licence_is_stated_for_each_teacher(stated: dict[str, str], rule: str) -> None:
    teacher = {"model": str(MODEL)}
    teachers = {"one": teacher, "two": teacher | {"max_num_seqs": 4}}
    found = checked(teachers=teachers, terms={"teacher_licences": stated})
    assert found.prepared is not None and found.problems == []
    views = found.prepared.config.by_teacher
    assert [views[name].terms.teacher_licence for name in views] == [None, stated.get("two")]
    terms = [one for one in found.notices if one.startswith("terms: ")]
    assert terms[0].startswith(rule) if rule else not terms


def test_given_responses_need_one_stop_token_for_all() -> None:
    teachers = run_file()["teachers"]
    teachers["two"] |= {"sampling": {"stop_token_ids": [5]}}
    prompts = {"sources": SOURCES, "chat_template": False}
    assert not checked(teachers=teachers, prompts=prompts).problems
    found = checked(teachers=teachers, prompts={**prompts, "response_field": "who"})
    assert "teachers.two.sampling.stop_token_ids: are [5]" in " ".join(map(str, found.problems))


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"teacher": {"model": "m"}}, "both teacher and teachers"),
    ({"teachers": {}}, "is empty; name one or more teachers"),
    ({"teachers": {"../up": {"model": "m"}, "one": {"model": "m"}}}, r"names a teacher '\.\./up'"),
    ({"teachers": {"one": {"modl": "m"}}}, "unknown key; did you mean teachers.one.model"),
    ({"teachers": {"one": {"model": "m"}}}, "'two', which is none of the teachers"),
    ({"prompts": {"path": "a.jsonl"}}, "prompts.path has no teacher"),
    ({"prompts": {"sources": [*SOURCES, {"name": "c", "path": "a.jsonl"}]}}, "'c' has no teacher"),
    ({"teachers": None, "teacher": {"model": str(MODEL)}}, "the run file has no teachers"),
    ({"signal": {"kind": "hidden"}}, "read by the head of one teacher"),
    ({"terms": {"teacher_licence": "mit"}}, r"state it as terms.teacher_licences: \{NAME: mit"),
    ({"terms": {"teacher_licences": {"tow": "mit"}}}, "'tow', which is none of the teachers"),
    ({"prompts": {"path": "bad.jsonl", "teacher_field": "who"}}, "names no teacher"),
    ({"prompts": {"path": "bad.jsonl", "teacher_field": "who"}}, "did you mean 'two'"),
    ({"prompts": {"path": "bad.jsonl", "teacher_field": "who"}}, "expected a teacher's name"),
]


@pytest.mark.parametrize(("changes", "words"), HOSTILE)
def test_what_names_no_teacher_or_two_is_refused(changes: dict[str, Any], words: str) -> None:
    bad = [{"prompt": "x"}, {"prompt": "y", "who": "twoo"}]
    if words == "expected a teacher's name":
        bad = [{"prompt": "z", "who": {"one": "two"}}]  # type: ignore[dict-item]
    Path("bad.jsonl").write_text("\n".join(map(json.dumps, bad)))
    problems = " | ".join(map(str, checked(**changes).problems))
    assert re.search(words, problems), problems


def test_another_tokenizer_is_refused_with_both_names() -> None:
    other = Path("other")
    other.mkdir()
    for file in MODEL.iterdir():
        if file.name != "tokenizer.json":
            (other / file.name).symlink_to(file)
    tokens = json.loads((MODEL / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    first, second = [token for token, index in vocabulary.items() if index in (1000, 1001)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    teachers = run_file()["teachers"]
    teachers["two"] |= {"model": "other"}
    problems = " ".join(map(str, checked(teachers=teachers).problems))
    assert "teachers.two.model: two (other) has another tokenizer than one" in problems


@pytest.mark.parametrize("both", [False, True])
def test_one_teacher_of_a_run_may_work_in_batches(both: bool) -> None:
    service = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
    in_batches = service | {"batch": {}}
    teachers = {
        name: {"model": str(MODEL), "engine": "api", "api": api}
        for name, api in {"one": in_batches, "two": in_batches if both else service}.items()
    }
    problems = " ".join(map(str, checked(teachers=teachers).problems))
    told = "teachers.two.api.batch: is set, and one works in batches already"
    assert (told in problems) == both


def test_who_shares_the_limits_of_one_key_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_API_KEY", "planted-key-5521")
    monkeypatch.setenv("TWO_API_KEY", "planted-key-5521")

    def told(**api: Any) -> list[str]:
        one = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "api_key_env": "ONE_API_KEY"}
        one |= {"requests_per_minute": 60}
        two = {**one, "base_url": "http://127.0.0.1:1/v1/", "api_key_env": "TWO_API_KEY", **api}
        model = {"model": str(MODEL), "engine": "api"}
        teachers = {"one": {**model, "api": one}, "two": {**model, "api": two}}
        stated = {"teacher_licences": dict.fromkeys(teachers, "apache-2.0")}
        found = checked(teachers=teachers, terms=stated)
        assert not found.problems
        return [notice for notice in found.notices if "with one key" in notice]

    (same,) = told()
    assert same == (
        "one and two ask http://127.0.0.1:1/v1 with one key, and keep its limits together: "
        "60 requests a minute, no limit of tokens a minute"
    )
    (smaller,) = told(requests_per_minute=20, tokens_per_minute=5000)
    assert smaller.endswith(
        "20 requests a minute, 5,000 tokens a minute, of what each sets the smallest"
    )
    assert told(base_url="http://127.0.0.1:2/v1") == []
    monkeypatch.setenv("TWO_API_KEY", "another-planted-key")
    assert told() == []


def test_a_resolved_run_file_loads_to_the_same_and_a_run_of_one_has_no_new_identity() -> None:
    Path("run.yaml").write_text(json.dumps(run_file()))
    config = load_config("run.yaml")
    assert RunConfig.model_validate(parse_yaml(config_text(config))) == config
    assert "teachers.two.synthetic.response_tokens" in identity_fields(config)
    assert not any(name.startswith("teacher.") for name in identity_fields(config))


def test_each_teacher_asks_for_its_own_replicas() -> None:
    Path("run.yaml").write_text(json.dumps(run_file()))
    config = load_config("run.yaml")
    who = [one.who for one in requests(config, has_gpus=False)]
    assert who == ["one teacher replica"] + ["two teacher replica"] * 2 + ["student worker"]
    views = config.by_teacher.values()
    each = [view.groups_per_replica * view.teacher.max_replicas for view in views]
    assert config.groups_in_flight == sum(each)


class Answering(TeacherCalls):
    """A teacher in this process: it answers with its own number, once ``there`` is set."""

    def __init__(self, number: int) -> None:
        super().__init__("nowhere", Signal("text"), 1, None)
        self.number, self.there, self.asked = number, asyncio.Event(), 0

    async def sample(self, prompt_ids: pa.Array, keys: pa.Array | None = None) -> pa.Table:
        await self.there.wait()
        self.asked += len(prompt_ids)
        answers = [Answer(np.array([self.number], np.int32), "stop") for _ in prompt_ids]
        facts = {"engine": "e", "version": "1", "dtype": "float32", "vocab_size": 9}
        table = answers_table(answers, Signal("text"))
        return table.replace_schema_metadata({ENGINE: json.dumps(facts)})


def test_each_row_is_published_as_its_own_teachers_and_one_that_is_gone_holds_no_other_back() -> (
    None
):
    run = prepared()
    table, store = run.train, TeacherStore("store")
    who = table["teacher"].to_pylist()

    async def ask() -> None:
        calls = {"one": Answering(1), "two": Answering(2)}
        asked = {name: (Requester("run", "training", name, name), c) for name, c in calls.items()}
        answers = answers_of(store, table, Signal("text"), asked)  # type: ignore[arg-type]
        calls["two"].there.set()
        mixed = np.array([who.index("two"), who.index("one"), who.index("two") + 1])
        group = table.take(pa.array(mixed))
        waiting = asyncio.ensure_future(answers.get(mixed, group["prompt_ids"].combine_chunks()))
        while not calls["two"].asked or not store.names():
            await asyncio.sleep(0.01)
            assert not waiting.done() or waiting.result()  # An error is raised here.
        assert not waiting.done() and calls["one"].asked == 0
        calls["one"].there.set()
        answered, counters = await waiting
        assert [ids[0] for ids in answered["response_ids"].to_pylist()] == [2, 1, 2]
        own = {"teachers/one/rows_asked": 1, "teachers/two/rows_asked": 2}
        assert {name: n for name, n in counters.items() if n} == {"rows_asked": 3, **own}
        again, counters = await answers.get(mixed, group["prompt_ids"].combine_chunks())
        assert again["response_ids"].equals(answered["response_ids"])
        assert counters["rows_reused"] == 3 and calls["one"].asked == 1

    asyncio.run(ask())
    owner = dict(zip(table["key"].to_pylist(), who, strict=True))
    for name in store.names():
        with_origin = store.open(name)
        keys = with_origin.read(0, ["key"])["key"].to_pylist()
        assert {owner[key] for key in keys} == {with_origin.footer.origin.teacher_identity}


def test_one_teacher_is_let_go_and_wanted_without_the_other() -> None:
    async def live() -> None:
        c = Coordinator(8, 8, 0.0)
        assert await c.want_teacher("one") == 1
        await c.teacher_gone("two")
        assert await c.teacher_served()
        wanted = asyncio.ensure_future(c.wait_teacher_wanted("two"))
        await asyncio.sleep(0)
        assert not wanted.done()
        await c.want_teacher("two")
        assert await wanted
        await c.hold_saving()
        await c.hold_saving()
        await c.release_saving()
        held = asyncio.ensure_future(c.wait_may_save())
        await asyncio.sleep(0)
        assert not held.done(), "the other teacher is still being probed"
        await c.release_saving()
        await held
        await c.close()
        assert not await c.wait_teacher_wanted("three")

    asyncio.run(live())


def test_one_that_is_not_needed_does_not_make_the_others_look_gone() -> None:
    async def live() -> bool:
        c = Coordinator(8, 8, 0.0)
        await c.want_teacher("two")  # As the driver says before it deploys it.
        await c.teacher_gone("one")
        return await c.teacher_served()

    assert asyncio.run(live())


class Quiet:
    """A coordinator that hears all and says nothing."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *words, **named: None)


def test_the_error_of_any_teacher_is_raised_also_of_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def serve_one(one: Any, *rest: Any) -> None:
        time.sleep(0.3 if one == "slow" else 0.0)
        if one == "slow":
            raise RunError("its engine is gone")

    monkeypatch.setattr(job, "JOIN_S", 0.01)
    monkeypatch.setattr(job, "serve_teacher", serve_one)
    apps = SimpleNamespace(by_name={"slow": None, "fast": None})
    monkeypatch.setattr(job, "TeacherApps", lambda run: apps)
    run: Any = SimpleNamespace(
        coordinator=Quiet(), by_teacher=lambda: {"slow": "slow", "fast": "fast"}
    )
    rows: Any = SimpleNamespace(num_held_out_rows=0)
    with pytest.raises(RunError, match="its engine is gone"):
        job.serve_teachers(run, rows, {"slow", "fast"}, set())


def test_a_replica_is_given_the_pace_that_its_teacher_shares() -> None:
    config = RunConfig.model_validate(run_file())
    model = (ModelSource.of("m", str(MODEL)), "identity")
    run = Run(
        config=config,
        folder=RunFolder("run"),
        id="abc",
        teacher=model[0],
        teacher_identity=model[1],
        store_path="store",
        num_rows=1,
        teachers={"one": model, "two": model},
        paces={"two": "actor"},
    )
    apps = TeacherApps(run).by_name
    assert (apps["one"]._pace, apps["two"]._pace) == (None, ("actor", "abc"))


def test_only_teachers_that_compute_on_the_same_cores_share_them() -> None:
    Path("run.yaml").write_text(json.dumps(run_file()))
    config = load_config("run.yaml")
    assert config.teachers is not None
    vllm = {"engine": "vllm", "num_replicas": 2}
    service = {"engine": "api", "api": {"base_url": "http://x/v1", "model": "m"}}
    changes = {"one": service, "two": vllm, "three": vllm, "four": {**vllm, "cpu_cores": (0,)}}
    teachers = {
        name: config.teachers["one"].model_validate({"model": "m", **change})
        for name, change in changes.items()
    }
    config = config.model_copy(update={"teachers": teachers})
    source = ModelSource("m", "nowhere")
    run = Run(
        config=config,
        folder=RunFolder("run"),
        id="r",
        teacher=source,
        teacher_identity="i",
        store_path="store",
        num_rows=1,
        teachers={name: (source, name) for name in teachers},
    )
    apps = TeacherApps(run).by_name
    assert {name: app._others for name, app in apps.items()} == {
        "one": (0, 0),
        "two": (0, 2),
        "three": (2, 2),
        "four": (0, 0),
    }


def test_the_rows_of_each_teacher_are_counted_by_what_became_of_them() -> None:
    run = prepared()
    who = run.train["teacher"].to_pylist()
    asked = {name: (Requester("run", "training", name, name), Answering(1)) for name in set(who)}
    answers = answers_of(TeacherStore("store"), run.train, Signal("text"), asked)  # type: ignore[arg-type]
    assert isinstance(answers, RoutedAnswers)
    two = who.index("two")
    reasons = pa.array([None, None, "filtered: length", "poison", None], pa.string())
    rows = np.array([0, two, two + 1, two + 2, two + 3])
    if len(who) <= two + 3:
        rows, reasons = rows[:4], reasons[:4]
    counters = answers.decided(rows, reasons)
    accepted = len(rows) - 3
    assert counters == {
        "teachers/one/rows_accepted": 1,
        "teachers/one/rows_rejected": 0,
        "teachers/one/rows_dropped": 0,
        "teachers/two/rows_accepted": accepted,
        "teachers/two/rows_rejected": 1,
        "teachers/two/rows_dropped": 1,
    }


def test_which_teacher_is_meant_is_asked_where_several_answer_rows() -> None:
    several = RunConfig.model_validate(run_file())
    single = {k: v for k, v in run_file().items() if k not in ("teachers", "prompts")}
    teacher = run_file()["teachers"]["one"]
    alone = RunConfig.model_validate(single | {"teacher": teacher, "prompts": {"path": "a.jsonl"}})
    assert named_teacher(alone, None) == "" and named_teacher(several, "two") == "two"
    for config, name, message in (
        (several, None, "no teacher is named, and the run has one, two"),
        (several, "three", "'three' is none of the teachers, and the run has one, two"),
        (alone, "one", "the run has one; leave it out"),
    ):
        with pytest.raises(RunError, match=message):
            named_teacher(config, name)
    rule = {"judge": {"teacher": "two", "rubric": "?"}}
    judged = run_file(prompts={"sources": SOURCES[:1]}, filters=[rule])
    assert named_teacher(RunConfig.model_validate(judged), None) == "one"


def test_a_finished_runs_teacher_is_compared_with_its_own_identity() -> None:
    run, folder = prepared(), RunFolder("run").ensure()
    two = run.by_teacher["two"]
    content = {"teacher_identity": "first", "teachers": {"two": {"identity": two.teacher_identity}}}
    folder.write_text("manifest.json", json.dumps(content))
    teacher = two.config.teacher
    assert check_teacher_of(folder, teacher, two.teacher_folder, "two") == []
    assert "are not those that" in str(check_teacher_of(folder, teacher, two.teacher_folder))
    assert "is not the JSON object" in str(check_teacher_of(folder, teacher, "-", "three"))


def test_a_teachers_line_says_what_became_of_its_rows_and_what_it_cost() -> None:
    figures = {
        **{"code/rows": 30, "code/rows_accepted": 20, "code/rows_rejected": 8},
        **{"code/rows_dropped": 0, "code/response_tokens": 1234, "code/busy_s": 61.0},
        **{"code/api_cost": 0.25, "prose/rows": 1, "prose/busy_s": 0.5},
    }
    lines = teacher_lines(figures)
    assert list(lines) == ["code", "prose"]
    assert lines["code"].startswith("30 answers, 20 accepted, 8 rejected, 1,234 tokens written")
    assert lines["code"].endswith("cost 0.25") and "dropped" not in lines["code"]
    assert lines["prose"].startswith("1 answers, 0 tokens") or "accepted" not in lines["prose"]
    assert teacher_lines({}) == teacher_lines(None) == {}
