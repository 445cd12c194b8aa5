"""Generators of hostile cases: YAML trees, prompt files, paths, models, run folders, stores.

The tests draw a few examples of each with a fixed seed, ``fuzz.py`` as many as there is time for.
`KINDS` has a strategy of whole cases by kind; the parts are for tests of their own.
"""

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from raystill.config.describe import fields
from tests.hostile.judge import Case
from tests.hostile.model_cases import models
from tests.hostile.parts import (
    JSON_TREES,
    NUMBERS,
    ODD_FILES,
    PATHS,
    PLAIN,
    TABLES,
    TEXTS,
    TREES,
    json_of,
    spoilt,
    yaml_of,
)
from tests.support.end_to_end import TEACHER
from tests.support.sound_run import SOUND

SECTIONS = ("teacher", "student", "prompts", "signal", "objective", "stream", "store", "training")
FIELDS = sorted({field.name for field in fields() if "[]" not in field.name})
READ = frozenset({0, 1})
REFUSED = frozenset({0, 2})


@st.composite
def run_files(draw: st.DrawFn) -> Case:
    """A run file of which sections, fields or the text itself are hostile, for ``check``."""
    config: dict[str, Any] = {**SOUND}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*SECTIONS, "seed", "evaluation", "cluster", "output"]) | TEXTS)
        leaf, tree = draw(st.sampled_from(FIELDS) | TEXTS), draw(TREES)
        inner = leaf.rpartition(".")[2]
        section = config.get(name)
        whole = {**section, inner: tree} if isinstance(section, dict) else {inner: tree}
        config[name] = draw(st.sampled_from([whole, tree]))
    text = yaml_of(config)
    if draw(st.integers(0, 4)) == 0:
        text = draw(spoilt(text))
    words = ["check", "--static", "bad.yaml", *draw(st.sampled_from([[], ["--json"]]))]
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(FIELDS) | TEXTS)
        words += ["--set", f"{key}={draw(TEXTS | PLAIN.map(str))}"]
    return Case(tuple(words), {"bad.yaml": text}, statuses=REFUSED)


@st.composite
def prompts(draw: st.DrawFn) -> Case:
    """Prompt files of every format, with rows of any shape."""
    form = draw(st.sampled_from(["jsonl", "json", "csv", "txt", "parquet", "jsonl.gz"]))
    names = st.sampled_from(["prompt", "messages", "response", "source"]) | TEXTS
    message = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]) | TEXTS}) | TREES
    chat = st.lists(st.tuples(message, TEXTS).map(_said), max_size=3)
    row = st.dictionaries(names, JSON_TREES | chat | TEXTS, max_size=3)
    rows = draw(st.lists(row | JSON_TREES, max_size=4))
    lines = b"".join(json_of(one) + b"\n" for one in rows)
    sound = b"".join(json_of({"prompt": f"Say {i}."}) + b"\n" for i in range(8))
    whole = {"json": json_of(rows), "csv": b"prompt,source\n" + lines}.get(form, sound + lines)
    content = draw(spoilt(whole)) if draw(st.booleans()) else whole
    words = ["check", "--static", "sound.yaml", "--set", f"prompts.path=p.{form}"]
    if draw(st.booleans()):
        words += ["--set", f"prompts.{draw(st.sampled_from(['system', 'response_field']))}=x"]
    words += ["--json"] if draw(st.booleans()) else []
    return Case(tuple(words), {f"p.{form}": content}, statuses=REFUSED)


def _said(parts: tuple[Any, str]) -> Any:
    message, text = parts
    return {**message, "content": text} if isinstance(message, dict) else message


RUN_FILES = ("summary.json", "evaluation.jsonl", "answers.jsonl", "metrics.jsonl", "config.yaml")
RUN_FILES += ("manifest.json", "status.json", "draft.json", "tasks.json", "timeline.jsonl")
RUN_FILES += ("layers.json", "probe.json", "student/lineage.json", "held_out.parquet")
RUN_FILES += ("prompts/train.parquet", "prompts/held_out.parquet", "speed.json")
RUN_KEYS = ("wall_s", "status", "dropped", "rows_trained", "filtered", "restarts", "baselines")
RUN_KEYS += ("step", "row", "prompt", "teacher", "student", "checks", "size", "api", "models")
RUN_KEYS += ("student_answers_by_position", "token_kl", "state", "terms", "raystill_lineage")
READERS = (
    *(("report", "run"), ("report", "--json", "run"), ("report", "run", "run")),
    *(
        ("report", "run", "--html", "there/x.html"),
        ("lineage", "run"),
        ("lineage", "--json", "run"),
    ),
    *(("draft", "run"), ("draft", "--json", "run"), ("check", "--static", "sound.yaml")),
    *(("check", "--static", "--json", "sound.yaml"), ("lineage", "--json", "run")),
)


@st.composite
def runs(draw: st.DrawFn) -> Case:
    """A run folder of which one or two files hold anything, for every reader of such."""
    files: dict[str, bytes | str] = {}
    for name in draw(st.lists(st.sampled_from(RUN_FILES), min_size=1, max_size=2)):
        tree = draw(st.dictionaries(st.sampled_from(RUN_KEYS) | TEXTS, JSON_TREES, max_size=6))
        lines = draw(st.lists(st.just(tree) | JSON_TREES, min_size=1, max_size=3))
        files[f"run/{name}"] = draw(
            st.sampled_from([json_of(tree), b"\n".join(map(json_of, lines))]) | ODD_FILES | TABLES
        )
    words = draw(st.sampled_from(READERS))
    return Case(words, files, "run", frozenset({0, 1, 2}))


ANSWERS = st.dictionaries(
    st.sampled_from(["prompt", "messages", "completion", "response", "finish_reason"]) | TEXTS,
    JSON_TREES | TEXTS,
    max_size=4,
)
ON_A_STORE = (
    *((verb, "store") for verb in ("list", "verify", "compact", "prune")),
    *((verb, "store", "--json") for verb in ("list", "verify", "compact", "prune")),
    *(("prune", "store", "--dry-run"), ("prune", "store", "--teacher", "abab")),
    ("export", "store", "out", "--model", str(TEACHER)),
    ("export", "store", "out", "--format", "distillkit", "--json"),
    ("import", "store", "given.jsonl", "--teacher", "sound.yaml"),
    ("import", "store", "given.jsonl", "--teacher", "sound.yaml", "--json"),
)


BATCH = "store/batches/" + "c" * 32
PLANS = st.fixed_dictionaries(
    {
        "run": st.just("runs/x") | PATHS,
        "service": st.just("http://service") | JSON_TREES,
        "model": st.just("m") | JSON_TREES,
        "keys": st.lists(st.just("0" * 32) | JSON_TREES, max_size=3) | JSON_TREES,
        "most": NUMBERS | JSON_TREES,
        "name": st.just("c" * 32) | PATHS | JSON_TREES,
        "created": NUMBERS | JSON_TREES,
    },
    optional={"batch": JSON_TREES},
)
"""Of batches, in a store's journal, each with a value or two that none has."""


@st.composite
def stores(draw: st.DrawFn) -> Case:
    """A store with foreign and broken files in its folder, for every command on one."""
    names = [f"{'0' * 32}.parquet", f"{'f' * 32}.parquet", "a.parquet", ".gitkeep", "merged"]
    places = [f"store/segments/{name}" for name in names] + ["store/merged", "store/lease"]
    files = draw(st.dictionaries(st.sampled_from(places), ODD_FILES, max_size=3))
    if draw(st.booleans()):
        files[f"{BATCH}.plan.json"] = draw(PLANS.map(json_of) | ODD_FILES)
        for name in draw(st.sets(st.sampled_from(["batch", "end"]))):
            text = st.fixed_dictionaries({"batch": TEXTS, "status": TEXTS}).map(json_of)
            files[f"{BATCH}.{name}.json"] = draw(text | ODD_FILES)
    rows = draw(st.lists(ANSWERS | JSON_TREES, max_size=4))
    files["given.jsonl"] = b"".join(json_of(row) + b"\n" for row in rows)
    if draw(st.booleans()):
        words = ("store", *draw(st.sampled_from(ON_A_STORE)))
    else:
        teacher = draw(st.sampled_from(["abab", "ab", "models/teacher"]) | TEXTS)
        more = draw(st.sampled_from([(), ("--json",), ("--dry-run",)]))
        words = ("revoke", "store", f"--teacher={teacher}", f"--runs={draw(PATHS)}", *more)
    return Case(words, files, "store", frozenset({0, 1, 2, 3, 4, 5}))


@st.composite
def command_lines(draw: st.DrawFn) -> Case:
    """Paths, names and options that nobody would type, for every command that starts no Ray."""
    path = draw(PATHS)
    other = draw(PATHS)
    words = draw(
        st.sampled_from(
            [
                *(("report", path), ("report", path, other), ("report", "--json", path)),
                *(("report", ".", f"--html={path}"), ("lineage", path), ("draft", path)),
                *(
                    ("fields", path if path != "--" else "."),
                    ("fields", "--json", path),
                    ("check", "--static", path),
                ),
                *(("store", "list", path), ("store", "verify", path), ("store", "prune", path)),
                *(("store", "compact", path), ("store", "export", path, other)),
                ("store", "export", ".", path, f"--format={other}"),
                ("store", "import", path, other, "--teacher", "sound.yaml"),
                ("store", "import", "s", "prompts.jsonl", f"--teacher={path}"),
                ("revoke", path, f"--teacher={other}"),
                ("submit", "sound.yaml", f"--address={path}"),
                ("submit", "sound.yaml", f"--address=http://127.0.0.1:9/{other}"),
                ("submit", path, f"--address={other}", f"--working-dir={other}"),
                ("submit", "sound.yaml", "--address=http://127.0.0.1:9", f"--env={path}"),
                *((path,), (path, other), ("store", path), (f"--{path}",), ("check", f"--{path}")),
                ("check", "--static", "sound.yaml", "--set", path),
                ("calibrate", "sound.yaml", "--set", "seed=x", f"--output={path}"),
                ("calibrate", "sound.yaml", f"--positions={path}", f"--cosine={other}", "--x"),
                ("tasks", path, f"--task={other}"),
                *(("push", path), ("push", path, f"--to={other}"), ("speed", path)),
                *(("calibrate", path), ("calibrate", "sound.yaml", f"--output={path}", "--x")),
            ]
        )
    )
    return Case(tuple(words), statuses=frozenset({0, 1, 2}))


KINDS: Mapping[str, st.SearchStrategy[Case]] = {
    "run_files": run_files(),
    "prompts": prompts(),
    "models": models(),
    "runs": runs(),
    "stores": stores(),
    "command_lines": command_lines(),
}
