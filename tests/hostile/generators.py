"""Generators of hostile cases: YAML trees, prompt files, paths, models, run folders, stores.

The tests draw a few examples of each with a fixed seed, ``fuzz.py`` as many as there is time for.
`KINDS` has a strategy of whole cases by kind; the parts are for tests of their own.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

import yaml
from hypothesis import strategies as st

from raystill.config.describe import fields
from tests.hostile.judge import OTHERS, SECRET, Case
from tests.support.end_to_end import TEACHER
from tests.support.sound_run import SOUND

SECTIONS = ("teacher", "student", "prompts", "signal", "objective", "stream", "store", "training")
FIELDS = sorted({field.name for field in fields() if "[]" not in field.name})
READ = frozenset({0, 1})
REFUSED = frozenset({0, 2})

NASTY = st.sampled_from(
    [
        *("", " ", "\0", "\x1b[2J", "\x1b]0;x\x07", "\x9b1m", "\u202e", "\u2028", "\ufffe", "\r"),
        *("[/red]", "[bold]", "{{ x }}", "{% for %}", "%s%n", "$(id)", "`id`", "../..", "~", "~x"),
        *("-", "--", "-1", "0", "null", "true", "1e400", "NaN", "0x10", "1_0", "٣", "1:2:3"),
        *("<|im_end|>", "<|im_start|>", "\U000f0000", "\U0001f600", "a\u0300", "ﬁ", "İ", "ß"),
        *("x" * 300, "x" * 5000, "/" * 300, "a/" * 200, "\\", "'", '"', "'\"\\", "\n", "a\nb"),
        *(SECRET, f"x{SECRET}y", f"s3://me:{SECRET}@bucket/x", f"hf_token={SECRET}"),
    ]
)
TEXTS = NASTY | st.text(max_size=12) | st.lists(NASTY, min_size=1, max_size=3).map("".join)
HALVES = st.sampled_from(["\ud800", "\udfff", "a\udcffb"])
INTEGERS = st.integers() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, -(2**63), 10**400])
NUMBERS = INTEGERS | st.floats() | st.sampled_from([1e308, -0.0, 5e-324, 1e18, True, False])
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
JSON_TREES = st.recursive(
    PLAIN | HALVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | HALVES, inner, max_size=4),
    max_leaves=12,
)
PATHS = st.one_of(
    TEXTS,
    HALVES,
    st.sampled_from(
        [
            *(".", "..", "/", "//", "/dev/null", "/dev/zero", "/proc/self/mem", "/proc", "/dev/fd"),
            *(
                "sound.yaml",
                "prompts.jsonl",
                OTHERS,
                f"{OTHERS}/letter.txt",
                "~nobody/x",
                "missing",
            ),
            *(
                "file:///",
                "file://x",
                "file://\0",
                "x://",
                "://",
                "hf://x",
                "s3://",
                "gs://",
                "C:",
            ),
            *("sound.yaml/x", "./run/../run/", "x?y=1", "*", "[", "**", "{a,b}", "run", "store"),
        ]
    ),
)
"""Also of schemes that no file system has; none that asks a network."""


def yaml_of(value: Any) -> bytes:
    """A value as YAML, which half a surrogate pair leaves no room for."""
    return yaml.safe_dump(value, allow_unicode=False).encode("utf-8", "replace")


def json_of(value: Any) -> bytes:
    """A value as JSON, with NaN and halves of surrogate pairs as Python writes them."""
    return json.dumps(value).encode()


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with one thing wrong: cut, doubled, a byte changed, or others in their place."""
    way = draw(st.sampled_from(["cut", "byte", "double", "front", "other"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if way == "cut":
        return content[:place]
    if way == "byte":
        return content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place + 1 :]
    if way == "double":
        return content + content[place:]
    if way == "front":
        return draw(st.binary(min_size=1, max_size=9)) + content
    return draw(OTHER_BYTES)


OTHER_BYTES = st.one_of(
    st.binary(max_size=40),
    JSON_TREES.map(json_of),
    st.sampled_from(
        [
            *(
                b"",
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b'"' + b"x" * 3_000_000 + b'"',
                b"\xef\xbb\xbf{}",
            ),
            *(
                b"\0" * 4096,
                b"PAR1",
                b"PAR1" * 3,
                b"\x1f\x8b\x08\0",
                b"9" * 5000,
                b"<html>",
                b"{}{}",
            ),
            *(
                b"\xff\xfe{\0}\0",
                b'{"a": 1, "a": 2}',
                b"NaN",
                *(b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b'{"a": 1, "a": 2}', b"NaN", b"[1e999]"),
                *(b"\n" * 9999, b"null\n" * 99),
                b"\n" * 9999,
                b"null\n" * 99,
            ),
        ]
    ),
)
ODD_FILES = OTHER_BYTES | st.sampled_from(
    ["folder", "pipe", "link nowhere", "link .", "link /dev/zero", f"link {OTHERS}"]
)


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


MODEL_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
"""The tokenizer itself, of 3.5 MB, is spoilt by the tests of prompts."""
MODEL_KEYS = sorted(json.loads((TEACHER / "config.json").read_text()))


@st.composite
def models(draw: st.DrawFn) -> Case:
    """A model's folder with one file that is not what it says."""
    name = draw(st.sampled_from([*MODEL_FILES, "model.safetensors", "special_tokens_map.json"]))
    if name == "model.safetensors":
        content: bytes | str = draw(ODD_FILES | safetensors())
    elif draw(st.booleans()) and (TEACHER / name).exists():
        whole = json.loads((TEACHER / name).read_text())
        key = draw(st.sampled_from([*MODEL_KEYS, "text_config", "auto_map", "chat_template"]))
        content = json_of({**whole, key: draw(JSON_TREES)})
    else:
        content = draw(ODD_FILES)
    run_file = draw(st.sampled_from(["student.yaml", "teacher.yaml"]))
    words = ("check", "--static", run_file, *draw(st.sampled_from([(), ("--json",)])))
    return Case(words, {f"model/{name}": content}, "model", REFUSED)


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    """A safetensors file of which the header says anything."""
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "F4", "X"]) | TEXTS,
            "shape": st.lists(INTEGERS, max_size=3) | JSON_TREES,
            "data_offsets": st.lists(INTEGERS, max_size=3) | JSON_TREES,
        }
    )
    header = json_of(draw(st.dictionaries(TEXTS, entry | JSON_TREES, max_size=4) | JSON_TREES))
    length = draw(st.sampled_from([len(header), 0, len(header) + 9, 2**63, 10**9]))
    return struct.pack("<Q", length) + header + draw(st.binary(max_size=16))


RUN_FILES = ("summary.json", "evaluation.jsonl", "answers.jsonl", "metrics.jsonl", "config.yaml")
RUN_FILES += ("manifest.json", "status.json", "draft.json", "tasks.json", "timeline.jsonl")
RUN_FILES += ("layers.json", "probe.json", "student/lineage.json", "held_out.parquet")
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
            st.sampled_from([json_of(tree), b"\n".join(map(json_of, lines))]) | ODD_FILES
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
