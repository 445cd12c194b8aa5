"""The parts of hostile cases: texts, numbers, trees, paths, and bytes that no reader expects."""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st

from tests.hostile.judge import OTHERS, SECRET

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


def table_of(columns: dict[str, list[Any]]) -> bytes:
    """A Parquet file of columns of one length."""
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


COLUMN = st.sampled_from(
    [[1, 2], ["a", None], [[1, 2], [3]], [[], None], [1.5, 2.0], [b"x", b"\xff"]]
)
NAMES = st.sampled_from(["key", "prompt_ids", "response_ids", "source", "id", "row", "logprobs"])
TABLES = st.dictionaries(NAMES | st.text(max_size=3), COLUMN, max_size=4).map(table_of)
ODD_FILES = OTHER_BYTES | st.sampled_from(
    ["folder", "pipe", "link nowhere", "link .", "link /dev/zero", f"link {OTHERS}"]
)
