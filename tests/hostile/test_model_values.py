"""Values in the files of a model that no file of one holds: each is refused with file and key.

Numbers that are not finite or that 64 bits do not hold, whole numbers with a fraction, texts that
are no Unicode, lists without end in each other, tokens and replacements that need time or memory
without end. Nothing of them reaches the tokenizer, the chat template or arithmetic.
"""

import json
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from raystill.base.errors import ConfigError
from raystill.base.records import natural
from raystill.cluster.report.summary import student_written_line
from raystill.config.describe import value_at
from raystill.model.files import DEEPEST, NO_LIMIT, read_object, unfit
from raystill.model.sizes import Sizes
from raystill.model.tokenizer import check_tokenizer, load_tokenizer
from raystill.model.weights import header_of, layer_of, size_of
from raystill.placement.memory import Decoder
from tests.hostile.judge import PARTS, SECRET, Told, call, faults, inside, write
from tests.hostile.parts import JSON_TREES
from tests.hostile.places import Bases
from tests.support.end_to_end import TEACHER

HALF = "\ud800"
CONFIG, TOKENS = "config.json", "tokenizer_config.json"
ALL = (CONFIG, "generation_config.json", TOKENS, "special_tokens_map.json", "chat_template.json")
ALL += ("hf_quant_config.json", "quantize_config.json", "preprocessor_config.json")
ODD: dict[str, tuple[Any, str]] = {
    "half a pair": (HALF, "no Unicode"),
    "half a pair among others": ([{"a": f"b{HALF}c"}], "no Unicode"),
    "half a pair in a key": ({f"b{HALF}": 1}, "no Unicode"),
    "57 digits": (10**57, "64 bits"),
    "400 digits": ({"a": [10**400]}, "an integer of 1,329 bits"),
    "below 64 bits": (-(2**63) - 1, "64 bits"),
    "NaN": (math.nan, "nan"),
    "infinity": ([math.inf], "inf"),
    "1e308": (1e308, "float32"),
    "deep": (json.loads("[" * 200 + "]" * 200), "deep"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("models"))


def checked(bases: Bases, files: dict[str, bytes], run_file: str, *more: str) -> Told:
    """``check --static`` with files of a model changed; its answer has no fault of its own."""
    place = bases.fresh("model")
    write(place, {f"model/{name}": content for name, content in files.items()})
    with inside(place):
        told = call(("check", "--static", run_file, *more))
    assert not list(faults(told, frozenset({0, 2}), False))
    return told


def refused(bases: Bases, files: dict[str, bytes], run_file: str, *words: str) -> str:
    told = checked(bases, files, run_file)
    text = told.out + told.err
    assert told.status == 2, text
    for word in words:
        assert word in text
    return text


def changed(name: str, **values: Any) -> dict[str, bytes]:
    """A file of the sound model with other values; None takes one out."""
    path = TEACHER / name
    whole = (json.loads(path.read_text()) if path.exists() else {}) | values
    return {name: json.dumps({k: v for k, v in whole.items() if v is not None}).encode()}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ODD)
def test_no_file_of_a_model_has_such_a_value(bases: Bases, kind: str, name: str) -> None:
    value, word = ODD[kind]
    refused(bases, changed(name, unheard_of=value), "teacher.yaml", name, word, "unheard_of")


@pytest.mark.parametrize("run_file", ["teacher.yaml", "student.yaml"])
@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((TOKENS, "chat_template", value) for value in (HALF, [{"name": "default", "a": HALF}])),
        *(
            (TOKENS, f"{one}_token", value)
            for one in ("bos", "eos")
            for value in (HALF, {"a": HALF})
        ),
        (TOKENS, "added_tokens_decoder", {"1": {"content": HALF}}),
        (TOKENS, "additional_special_tokens", [HALF]),
        *((CONFIG, name, 10**60) for name in ("head_dim", "vocab_size", "hidden_size", "x")),
        (CONFIG, "architectures", [HALF]),
    ],
)
def test_what_the_fuzzer_found(
    bases: Bases, name: str, key: str, value: Any, run_file: str
) -> None:
    refused(bases, changed(name, **{key: value}), run_file, name, key)


WRONG: list[tuple[str, Any]] = [
    *((name, 2.5) for name in ("vocab_size", "num_hidden_layers", "intermediate_size", "head_dim")),
    *((name, 2.0) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")),
    *(("intermediate_size", value) for value in ([128], [128, 128], [])),
    *(("num_experts_per_tok", value) for value in (-1, 2.5, "2", True, {})),
    *(("initializer_range", value) for value in (-1, "x", [], True)),
    *(("sliding_window", value) for value in (-2, 1.5, "x", True)),
    *((name, value) for name in ("vision_config", "quantization_config") for value in ([], "x", 0)),
    ("is_encoder_decoder", "no"),
    *(("rope_parameters", {"rope_theta": value}) for value in (0, -1, "x", True)),
    ("rope_parameters", {"full_attention": {"rope_type": "nosuch"}}),
    ("rope_scaling", {"type": "yarn", "factor": 2, "original_max_position_embeddings": "x"}),
    ("rope_scaling", {"type": "longrope", "long_factor": [1, "x"]}),
    ("num_key_value_heads", 3),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_settings_that_are_none(bases: Bases, key: str, value: Any) -> None:
    refused(bases, changed(CONFIG, **{key: value}), "student.yaml", CONFIG, key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("temperature", -1), ("temperature", 1e9), ("top_p", 0), ("top_p", 2), ("min_p", 1.5)),
        *(("top_k", -2), ("top_k", 10**12), ("bos_token_id", "x"), ("pad_token_id", 0.5)),
    ],
)
def test_sampling_that_is_none(bases: Bases, key: str, value: Any) -> None:
    name = "generation_config.json"
    refused(bases, changed(name, **{key: value}), "teacher.yaml", name, key)


def test_what_real_models_have_is_read(bases: Bases) -> None:
    """Lengths without a limit, ranges without an end, the least number of float32, and -1."""
    files = changed(TOKENS, model_max_length=NO_LIMIT, note="a\U0001f600")
    files |= changed("generation_config.json", top_k=-1, temperature=0, pad_token_id=-1)
    files |= changed(
        CONFIG,
        time_step_limit=[0.0, math.inf],
        mask=-3.4028234663852886e38,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
    )
    assert checked(bases, files, "teacher.yaml").status == 0


TEMPLATES = {
    "an escape": "{{ '\\ud800' }}",
    "a number": "{{ '%c' % 55296 }}",
    "what it raises": "{{ raise_exception('\\ud800') }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_that_writes_no_unicode(bases: Bases, kind: str) -> None:
    """No file has such a character: the template makes it."""
    files = changed(TOKENS, chat_template=TEMPLATES[kind])
    refused(bases, files, "teacher.yaml", "prompts.jsonl", "chat template")


def test_what_stands_around_half_a_pair_is_not_told(bases: Bases) -> None:
    """A part of a secret is not known to be one."""
    files = changed(TOKENS, chat_template=SECRET + "{{ '\\ud800' }}")
    told = refused(bases, files, "teacher.yaml", "half of a surrogate pair")
    assert "whose character" in told and not [part for part in PARTS if part in told]


def tokenizer_with(**parts: Any) -> bytes:
    """The sound tokenizer with other parts; of ``model`` those that are given."""
    whole = json.loads((TEACHER / "tokenizer.json").read_text())
    model = whole["model"] | parts.pop("model", {})
    return json.dumps(whole | parts | {"model": model}).encode()


def longer(times: int) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "o"}, "content": "o" * times}


TOKENIZERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a normaliser that makes texts longer": (
        lambda: tokenizer_with(normalizer={"type": "Sequence", "normalizers": [longer(1000)] * 3}),
        "for a text of",
    ),
    "a prefix of a book": (
        lambda: tokenizer_with(normalizer={"type": "Prepend", "prepend": "x" * 100_000}),
        "for a text of",
    ),
    "a table that is none": (
        lambda: tokenizer_with(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "is not a tokenizer (Precompiled",
    ),
    "a table of 8 GB": (
        lambda: tokenizer_with(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "////////"}],
            }
        ),
        "says 4,294,967,295 bytes and has 6",
    ),
    "a table of 8 GB, spelt otherwise": (
        lambda: tokenizer_with(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "////////"}
        ).replace(b"Precompiled", b"Pre\\u0063ompiled"),
        "says 4,294,967,295 bytes and has 6",
    ),
    "a reading that differs each time": (
        lambda: tokenizer_with(model={"dropout": 0.5}),
        "has a dropout",
    ),
    "ids of no token": (
        lambda: tokenizer_with(
            post_processor={
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "zz", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": n, "type_id": 0}} for n in "AB"],
                "special_tokens": {"zz": {"id": "zz", "ids": [4 * 10**9], "tokens": ["zz"]}},
            }
        ),
        "none of its 49152 tokens",
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_cannot_read(
    bases: Bases, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A library in Rust ends in a panic, whose stack it would write beside the sentence."""
    make, word = TOKENIZERS[kind]
    refused(bases, {"tokenizer.json": make()}, "teacher.yaml", "tokenizer.json", word)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("mask_token", "x" * 1001, "characters"),
        ("extra_special_tokens", "x" * 100_000, "a str"),
        ("additional_special_tokens", {"a": 3}, "form"),
        ("additional_special_tokens", [f"{i:0999}" for i in range(2000)], "characters"),
    ],
    ids=["a long token", "a text of tokens", "a number", "two million characters"],
)
def test_added_tokens_without_bounds(bases: Bases, name: str, value: Any, word: str) -> None:
    """How a template can make one is tried at each of its characters."""
    refused(bases, changed(TOKENS, **{name: value}), "teacher.yaml", word, "save")


def test_a_sound_tokenizer_is_read() -> None:
    check_tokenizer(TEACHER, {})
    assert load_tokenizer(TEACHER, {"mask_token": "x" * 1000}).token_to_id("x" * 1000) == 49152


def tensors(path: Path, entries: Any, data: bytes = b"") -> Path:
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        (
            {"a": {"dtype": "X", "shape": [2**62] * 200_000, "data_offsets": [0, 0]}},
            "200,000 sizes",
        ),
        ({HALF: {"dtype": "X", "shape": [], "data_offsets": [0, 0]}}, "no text"),
        ({"a": {"dtype": HALF, "shape": [], "data_offsets": [0, 0]}}, "no text"),
        ({"a": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}, "no text"),
    ],
    ids=["sizes", "name", "type", "type of a list"],
)
def test_a_header_without_bounds(tmp_path: Path, entries: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        header_of(tensors(tmp_path / "x.safetensors", entries))


@pytest.mark.parametrize("digits", ["²", "٣", "9" * 5000, "-1", ""])
def test_names_of_layers_are_numbers_of_ascii(tmp_path: Path, digits: str) -> None:
    """``isdigit`` holds for a raised two, of which ``int`` makes an error."""
    assert layer_of(f"model.layers.{digits}.mlp.weight") is None
    assert layer_of("model.layers.12.mlp.weight") == 12


@pytest.mark.parametrize("digits", ["²", "9" * 5000, "-1", "1.5", "x", ""])
def test_keys_that_are_no_numbers_are_left_out(digits: str) -> None:
    assert natural(digits) is None and natural("12") == 12
    written = {"rows": 2, "staleness": {digits: 1, "3": 1}}
    assert student_written_line(written) == "2 rows, by weights at most 3 steps old"
    assert value_at({"a": [{"b": 1}]}, f"a.{digits}") is None
    assert value_at({"a": [{"b": 1}]}, "a.0.b") == 1


def test_an_index_of_no_files_is_no_index(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    tensors(tmp_path / "one.safetensors", {"a": entry}, b"x" * 8)
    index = {"weight_map": {"a": f"{HALF}.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert size_of(tmp_path) == {"parameters": 2, "bytes": 8}


def test_sizes_by_layer_are_the_largest_or_none() -> None:
    by_layer = {"hidden_size": 8, "num_attention_heads": [2, 4], "intermediate_size": [16, 32]}
    decoder = Decoder.of({**by_layer, "architectures": ["A"], "odd": [1, "x"]})
    assert decoder is not None
    assert (decoder.ffn, decoder.queries) == (32, 8)
    with pytest.raises(ValueError, match="differ in num_attention_heads, intermediate_size"):
        Sizes.of(by_layer)


@given(JSON_TREES)
@settings(max_examples=300, deadline=None)
def test_what_is_left_is_written_and_counted(tmp_path_factory: Any, value: Any) -> None:
    """Of any tree: what is read is Unicode, and each of its numbers is one of float32."""
    path = tmp_path_factory.getbasetemp() / "tree.json"
    path.write_text(json.dumps({"a": value}))
    try:
        found = read_object(path, strict=True)
    except ConfigError as error:
        assert "tree.json" in str(error) and read_object(path) == {}
        return
    text = json.dumps(found, ensure_ascii=False, allow_nan=False)
    text.encode()
    waiting: list[Any] = [found]
    while waiting:
        one = waiting.pop()
        waiting += (
            [*one.values()] if isinstance(one, dict) else one if isinstance(one, list) else []
        )
        assert not isinstance(one, int | float) or math.isfinite(float(one))


def test_the_deepest_that_is_read() -> None:
    for depth, is_read in ((DEEPEST, True), (DEEPEST + 1, False), (sys.getrecursionlimit(), False)):
        value: Any = 0
        for _ in range(depth):
            value = [value]
        assert (unfit(value) is None) is is_read
