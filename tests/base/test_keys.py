"""Which settings change the keys of stored answers, and which old keys must be found again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raystill.cluster.check.prepared import Prepared
from raystill.config.run import RunConfig
from raystill.datasets.prompts.tables import PromptTables
from raystill.datasets.rows.keys import KeyedEngine, answer_key, answer_keys, given_keys
from raystill.datasets.rows.schema import PROMPT_SCHEMA
from raystill.model.files import ModelFolder
from raystill.model.sampling import ResolvedSampling

IDS = np.array([1, 2, 3], np.int32)
SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "max_tokens": 512,
    "stop_token_ids": (2,),
}
PROMPTS = [[1, 2, 3], list(range(30)), [4, 5]]
RESPONSES = [None, None, [6, 7]]
OWN_CONTEXT = 64


def model_folder(folder: Path, **config: Any) -> Path:
    """A teacher of a few bytes, in bfloat16 with a context of ``OWN_CONTEXT``."""
    folder.mkdir(exist_ok=True)
    content = {"dtype": "bfloat16", "max_position_embeddings": OWN_CONTEXT, **config}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return model_folder(tmp_path / "m")


def run_of(folder: Path, **teacher: Any) -> Prepared:
    """A run of three rows, the last with a given response; answers have at most 16 tokens."""
    config = RunConfig.model_validate(
        {
            "teacher": {"model": str(folder), "sampling": {"max_tokens": 16}, **teacher},
            "student": {"layers": [0]},
            "prompts": {"path": "p.jsonl"},
        }
    )
    rows = {
        "row": range(len(PROMPTS)),
        "prompt_ids": PROMPTS,
        "source": ["s"] * len(PROMPTS),
        "response_ids": RESPONSES,
    }
    schema = pa.schema([field for field in PROMPT_SCHEMA if field.name != "key"])
    train = pa.table({name: pa.array(list(v), schema.field(name).type) for name, v in rows.items()})
    train = train.cast(schema)
    tables = PromptTables(
        train=train,
        held_out=train.slice(0, 1),
        dropped=None,  # type: ignore[arg-type]
        duplicates=0,
        first_dropped={},
        num_read=len(PROMPTS),
        longest_prompt_tokens=30,
        samples=np.zeros(len(PROMPTS), np.int64),
    )
    return Prepared(config, tables, ModelFolder("m", folder), None, "store")


def keys_of(folder: Path, **teacher: Any) -> list[bytes]:
    return run_of(folder, **teacher).train["key"].to_pylist()


WARM = {**SAMPLING, "temperature": 0.7, "stop_token_ids": (7, 2)}
OLD_KEYS: list[tuple[str, str | None, dict[str, Any], int, str]] = [
    ("bfloat16", None, SAMPLING, 0, "237921ed946e764325cff4b9b3b6633a"),
    ("auto", None, SAMPLING, 0, "af0deffdcc68454208a9140b434a774e"),
    ("float32", "fp8", WARM, 3, "9b93eae5887e281e4b5c6891860d3eeb"),
]
"""dtype, quantization, sampling and sample of ``IDS``, and the key by the code before."""
OLD_RUN = [
    "19b377c455a661d4419b8b7efc32adf1",
    "261d28c213569751488d2d16863ebfe5",
    "ac92973d06ba02a1e0a4bd28e94d195d",
]
"""Keys of ``run_of(folder)`` by the same code."""


@pytest.mark.parametrize(("dtype", "quantization", "sampling", "sample", "key"), OLD_KEYS)
def test_keys_of_the_version_before_are_found_again(
    dtype: str, quantization: str | None, sampling: dict[str, Any], sample: int, key: str
) -> None:
    assert answer_key("t", dtype, quantization, sampling, IDS, sample).hex() == key
    for engine in (KeyedEngine(), KeyedEngine({}, max_model_len=len(IDS) + 512)):
        made = answer_keys("t", dtype, quantization, sampling, [IDS], sample, engine)
        assert made[0].hex() == key


def test_an_old_key_of_a_given_response_is_found_again() -> None:
    (key,) = given_keys("t", "bfloat16", None, [IDS], [IDS[:2]])
    assert key.hex() == "46b32f5ee9ff54d642831456edc87c82"


def test_a_run_with_default_settings_has_the_keys_of_the_version_before(folder: Path) -> None:
    assert [key.hex() for key in keys_of(folder)] == OLD_RUN


UNCHANGED, ANSWERS, ALL = "no key", "keys of answers", "all keys"
SETTINGS = [
    # Neutral: parallelism, memory, scheduling, graphs, loading, logs, dice.
    ({"engine_args": {"enable_prefix_caching": False}}, UNCHANGED),
    ({"engine_args": {"block_size": 32, "swap_space": 4}}, UNCHANGED),
    ({"engine_args": {"num_gpu_blocks_override": 100, "cpu_offload_gb": 2}}, UNCHANGED),
    ({"engine_args": {"enable_expert_parallel": True}}, UNCHANGED),
    ({"engine_args": {"async_scheduling": True, "disable_log_stats": False}}, UNCHANGED),
    ({"engine_args": {"hf_token": "secret", "download_dir": "/d"}}, UNCHANGED),
    ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, UNCHANGED),
    ({"gpu_memory_utilization": 0.5, "kv_cache_gib": 1.0, "enforce_eager": True}, UNCHANGED),
    ({"max_num_seqs": 8, "max_num_batched_tokens": 99, "seed": 5}, UNCHANGED),
    # vLLM's defaults, and the model's own, spelled out.
    ({"engine_args": {"kv_cache_dtype": "auto", "load_format": "auto"}}, UNCHANGED),
    ({"engine_args": {"disable_sliding_window": False, "logits_processors": None}}, UNCHANGED),
    ({"dtype": "bfloat16"}, UNCHANGED),
    ({"max_model_len": OWN_CONTEXT}, UNCHANGED),
    ({"max_model_len": 30 + 16}, UNCHANGED),
    # What changes answers.
    ({"engine_args": {"kv_cache_dtype": "fp8"}}, ALL),
    ({"engine_args": {"load_format": "dummy"}}, ALL),
    ({"engine_args": {"hf_config_path": "elsewhere"}}, ALL),
    ({"engine_args": {"disable_sliding_window": True}}, ALL),
    ({"engine_args": {"logits_processors": ["a:B"]}}, ALL),
    ({"engine_args": {"quantization_config": {"linear": {"bits": 4}}}}, ALL),
    ({"engine_args": {"speculative_config": {"method": "ngram"}}}, ALL),
    ({"engine_args": {"attention_backend": "TRITON_ATTN"}}, ALL),
    ({"engine_args": {"an_argument_of_tomorrow": 1}}, ALL),
    ({"dtype": "float32"}, ALL),
    ({"quantization": "fp8"}, ALL),
    ({"sampling": {"max_tokens": 15}}, ANSWERS),
    ({"sampling": {"max_tokens": 16, "min_p": 0.1}}, ANSWERS),
]


@pytest.mark.parametrize(("teacher", "changes"), SETTINGS, ids=str)
def test_which_settings_change_which_keys(
    folder: Path, teacher: dict[str, Any], changes: str
) -> None:
    before, after = keys_of(folder), keys_of(folder, **teacher)
    differ = [one != other for one, other in zip(before, after, strict=True)]
    assert (
        differ == {UNCHANGED: [False] * 3, ALL: [True] * 3, ANSWERS: [True, True, False]}[changes]
    )


def test_engine_arguments_are_told_apart_by_value_and_order() -> None:
    values: list[Any] = [
        1,
        1.5,
        True,
        "1",
        None,
        [1, 2],
        [2, 1],
        {"a": 1},
        {"a": [1]},
        float("inf"),
    ]
    keys = {
        answer_keys("t", "d", None, {}, [IDS], 0, KeyedEngine({"x": value}))[0] for value in values
    }
    assert len(keys) == len(values)

    def key(value: Any) -> bytes:
        return answer_keys("t", "d", None, {}, [IDS], 0, KeyedEngine({"x": value}))[0]

    assert key({"a": 1, "b": 2.0}) == key({"b": 2, "a": 1.0})
    assert key({1: "x"}) == key({"1": "x"}) and key({1: 0, "b": 0}) != key({1: 0})


def test_an_answer_that_a_short_context_cuts_is_not_served_to_a_longer_run(folder: Path) -> None:
    whole = keys_of(folder)
    short, shorter = keys_of(folder, max_model_len=40), keys_of(folder, max_model_len=36)
    # The prompt of 30 tokens is left 10 and 6 of 16; that of 3 and the given response are whole.
    assert [short[row] == whole[row] for row in range(3)] == [True, False, True]
    assert len({keys[1] for keys in (whole, short, shorter)}) == 3
    # 10 tokens of room and max_tokens of 10 cut at the same token.
    assert short[1] == keys_of(folder, sampling={"max_tokens": 10})[1]


def test_where_the_models_own_context_cuts_the_old_key_stands(folder: Path) -> None:
    long = {"sampling": {"max_tokens": 50}}  # 30 + 50 tokens are more than OWN_CONTEXT
    own, stated = keys_of(folder, **long), keys_of(folder, **long, max_model_len=OWN_CONTEXT)
    assert own == stated
    shorter = keys_of(folder, **long, max_model_len=60)
    assert [shorter[row] == own[row] for row in range(3)] == [True, False, True]


def test_auto_of_a_float32_checkpoint_shares_no_key_with_float32_or_bfloat16(
    folder: Path,
) -> None:
    model_folder(folder, dtype="float32")
    asked = [keys_of(folder, dtype=d) for d in ("auto", "float32", "bfloat16", "float16")]
    assert len({keys[0] for keys in asked}) == len({keys[2] for keys in asked}) == 4
    model_folder(folder, dtype=None, torch_dtype="float32")
    assert keys_of(folder)[0] != keys_of(folder, dtype="float32")[0]
    model_folder(folder, dtype=None, torch_dtype="float16")
    assert keys_of(folder) == keys_of(folder, dtype="float16")
    model_folder(folder, dtype=None)  # vLLM looks into the weights then
    asked = [keys_of(folder, dtype=d) for d in ("auto", "float32", "bfloat16")]
    assert len({keys[0] for keys in asked}) == 3


def test_the_precision_of_a_multimodal_model_is_the_one_that_vllm_reads(folder: Path) -> None:
    model_folder(folder, dtype="bfloat16", text_config={"dtype": "float16"})
    assert keys_of(folder) == keys_of(folder, dtype="bfloat16")
    model_folder(folder, dtype=None, text_config={"torch_dtype": "float16"})
    assert keys_of(folder) == keys_of(folder, dtype="float16")


def test_the_synthetic_engines_keys_know_neither_precision_nor_context(folder: Path) -> None:
    model_folder(folder, dtype="float32")
    plain = keys_of(folder, engine="synthetic")
    assert plain == keys_of(folder, engine="synthetic", max_model_len=31)
    assert plain == keys_of(folder, engine="synthetic", engine_args={"kv_cache_dtype": "fp8"})


@dataclass(frozen=True)
class SamplingOfTomorrow(ResolvedSampling):
    """One more field, with a default that samples as before."""

    repetition_penalty: float = 1.0
    banned_ids: tuple[int, ...] = ()


@settings(deadline=None, max_examples=50)
@given(
    temperature=st.floats(0, 2),
    top_p=st.floats(0.1, 1),
    top_k=st.integers(0, 50),
    max_tokens=st.integers(1, 4096),
    stop=st.lists(st.integers(0, 99), max_size=3),
    penalty=st.sampled_from([1.0, 1, 1.1]),
)
def test_a_new_setting_at_its_default_changes_no_key(
    temperature: float, top_p: float, top_k: int, max_tokens: int, stop: list[int], penalty: float
) -> None:
    today = ResolvedSampling(temperature, top_p, top_k, 0.0, max_tokens, tuple(stop))
    tomorrow = SamplingOfTomorrow(temperature, top_p, top_k, 0.0, max_tokens, tuple(stop), penalty)
    keys = [answer_key("t", "d", None, s.keyed(), IDS) for s in (today, tomorrow)]
    assert (keys[0] == keys[1]) == (penalty == 1)


def test_todays_sampling_settings_are_all_in_the_key() -> None:
    """A field without default would be new in every key: an added one must have a default."""
    assert list(ResolvedSampling(**SAMPLING).keyed()) == list(SAMPLING)
