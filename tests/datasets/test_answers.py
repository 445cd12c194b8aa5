"""The tail, the answers' table, the sampling settings and the identity, without any engine."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.answers import (
    Answer,
    answers_table,
    tail_logprob,
    why_unanswerable,
    why_unscorable,
)
from raystill.datasets.rows.schema import answer_schema
from raystill.datasets.rows.signal import Signal
from raystill.model.identity import identity_of_teacher, teacher_identity
from raystill.model.sampling import resolve_sampling

KINDS = ["text", "sampled", "topk", "hidden"]


def descending(probabilities: list[float]) -> np.ndarray:
    return np.log(np.array([probabilities], np.float64)).astype(np.float32)


def test_a_tail_worked_out_by_hand() -> None:
    # K = 2 of V = 4 with p = 1/2, 1/4: 1/4 is left, and the bound (4 - 2) * 1/4 = 1/2 is not hit.
    tail = tail_logprob(descending([0.5, 0.25]), vocab_size=4)
    np.testing.assert_allclose(tail, [np.log(0.25)], rtol=1e-6)


@pytest.mark.parametrize("mass", [1e-3, 1e-6, 1e-9])
def test_small_tails_keep_their_digits_where_one_id_holds_the_mass(mass: float) -> None:
    # log(1 - 2 m) and log(m) survive float32 to 1e-7 relative; 1 - sum(p) in float32 would be 0.
    tail = tail_logprob(descending([1 - 2 * mass, mass]), vocab_size=100)
    np.testing.assert_allclose(tail, [np.log(mass)], atol=1e-5)


def test_a_tail_is_at_most_what_its_ids_could_hold_at_the_kth_probability() -> None:
    # Rounded logprobs leave 0.1, but the one other id has at most p_K = 0.01.
    tail = tail_logprob(descending([0.89, 0.01]), vocab_size=3)
    np.testing.assert_allclose(tail, [np.log(0.01)], rtol=1e-6)


def test_no_tail_where_k_is_the_whole_vocabulary_or_nothing_is_left() -> None:
    assert tail_logprob(descending([0.7, 0.2]), vocab_size=2)[0] == -np.inf
    assert tail_logprob(descending([0.7, 0.4]), vocab_size=9)[0] == -np.inf
    assert tail_logprob(np.zeros((1, 1), np.float32), vocab_size=9)[0] == -np.inf
    assert tail_logprob(np.empty((0, 4), np.float32), vocab_size=9).shape == (0,)


def test_more_ids_than_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"K \(3\) is more than the vocabulary \(2\)"):
        tail_logprob(descending([0.5, 0.3, 0.2]), vocab_size=2)


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30), min_size=4, max_size=40),
    top_k=st.integers(1, 3),
)
def test_the_tail_is_the_mass_of_the_other_ids(logits: list[float], top_k: int) -> None:
    logprobs = np.sort(np.array(logits) - np.logaddexp.reduce(logits))[::-1]
    tail = tail_logprob(logprobs[None, :top_k].astype(np.float32), len(logits))
    outside = np.exp(logprobs[top_k:]).sum()
    assert tail.dtype == np.float32 and not np.isnan(tail[0])
    np.testing.assert_allclose(np.exp(tail[0].astype(np.float64)), outside, atol=3e-7)
    bound = np.log(len(logits) - top_k) + logprobs[top_k - 1]
    assert tail[0] <= bound + 1e-4


def an_answer(num_tokens: int, top_k: int, seed: int = 0) -> Answer:
    rng = np.random.default_rng(seed)
    return Answer(
        rng.integers(0, 99, num_tokens).astype(np.int32),
        "stop",
        -rng.random(num_tokens).astype(np.float32),
        rng.integers(0, 99, (num_tokens, top_k)).astype(np.int32),
        -rng.random((num_tokens, top_k)).astype(np.float32),
        -rng.random(num_tokens).astype(np.float32),
        rng.integers(0, 2**16, (num_tokens, top_k)).astype(np.uint16),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_holds_each_answer_in_order_with_empty_lists_for_errors(kind: str) -> None:
    answers = [an_answer(3, 4, 1), Answer(error="too_long"), an_answer(5, 4, 2)]
    table = answers_table(answers, Signal(kind, 4))
    assert table.schema == answer_schema(Signal(kind, 4))
    assert table["error"].to_pylist() == [None, "too_long", None]
    assert table["finish_reason"].to_pylist() == ["stop", None, "stop"]
    for name in table.schema.names:
        if name in ("error", "finish_reason"):
            continue
        rows = table[name].to_pylist()
        assert rows[1] == []
        if name == "hidden":
            rows = [[np.frombuffer(state, "<u2") for state in row] for row in rows]
        np.testing.assert_array_equal(np.array(rows[0], np.float32), getattr(answers[0], name))
        np.testing.assert_array_equal(np.array(rows[2], np.float32), getattr(answers[2], name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_nothing_but_errors_keeps_its_schema(kind: str) -> None:
    signal = Signal(kind, 4)
    table = answers_table([Answer(error="empty")], signal)
    assert table.schema == answer_schema(signal) and table.num_rows == 1
    assert answers_table([], signal).schema == answer_schema(signal)


def test_a_signal_of_another_length_than_its_tokens_is_refused() -> None:
    good = an_answer(3, 4)
    bad = Answer(good.response_ids, "stop", good.sampled_logprobs[:2])
    with pytest.raises(ValueError, match="sampled_logprobs of an answer has shape"):
        answers_table([bad], Signal("sampled"))


def test_prompts_that_cannot_be_answered_name_their_reason() -> None:
    ids = np.array([1, 2, 3], np.int32)
    assert why_unanswerable(ids, max_model_len=4, vocab_size=4) is None
    assert why_unanswerable(ids[:0], 4, 4) == "empty"
    assert why_unanswerable(ids, 3, 4) == "too_long"  # no place for a single response token
    assert why_unanswerable(ids, 4, 3) == "invalid_ids"
    assert why_unanswerable(np.array([-1], np.int32), 4, 4) == "invalid_ids"


def write_model(folder: Path, files: dict[str, dict], weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    for name, content in {"config.json": {}, **files}.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def teacher(**fields: object) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": "m", **fields})


def test_open_sampling_settings_come_from_the_generation_config(tmp_path: Path) -> None:
    own = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [7, 8]}
    folder = write_model(tmp_path / "m", {"generation_config.json": own})
    resolved = resolve_sampling(teacher(sampling={"top_p": 0.5, "max_tokens": 9}), folder)
    assert (resolved.temperature, resolved.top_p, resolved.top_k) == (0.6, 0.5, 20)
    assert (resolved.min_p, resolved.max_tokens) == (0.0, 9)
    assert resolved.stop_token_ids == (7, 8)
    assert json.loads(json.dumps(resolved.to_dict())) == resolved.to_dict()


def test_settings_nobody_names_are_neutral(tmp_path: Path) -> None:
    resolved = resolve_sampling(teacher(), write_model(tmp_path / "m", {}))
    assert (resolved.temperature, resolved.top_p, resolved.top_k, resolved.min_p) == (1, 1, 0, 0)
    assert resolved.stop_token_ids == ()


def test_stop_ids_are_the_models_own_and_its_tokenizers_unless_set(tmp_path: Path) -> None:
    files = {
        "config.json": {"text_config": {"eos_token_id": 1}},
        "tokenizer_config.json": {"eos_token": "<end>"},
        "tokenizer.json": {"added_tokens": [{"id": 5, "content": "<end>"}]},
    }
    folder = write_model(tmp_path / "m", files)
    assert resolve_sampling(teacher(), folder).stop_token_ids == (1, 5)
    asked = teacher(sampling={"stop_token_ids": [3]})
    assert resolve_sampling(asked, folder).stop_token_ids == (3,)


def test_the_synthetic_engine_needs_no_folder(tmp_path: Path) -> None:
    config = teacher(engine="synthetic", synthetic={"vocab_size": 50})
    assert resolve_sampling(config, tmp_path / "none").stop_token_ids == (49,)


def test_identity_follows_content_and_not_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one = write_model(tmp_path / "one", {"tokenizer.json": {"a": 1}})
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    assert teacher_identity(one) == teacher_identity(copy)
    assert teacher_identity(one) == teacher_identity(one)  # from the cache this time
    (copy / "model.safetensors").write_bytes(b"weightz")  # same size, one number differs
    assert teacher_identity(one) != teacher_identity(copy)
    other_tokenizer = write_model(tmp_path / "other", {"tokenizer.json": {"a": 2}})
    assert teacher_identity(one) != teacher_identity(other_tokenizer)


def test_weights_in_the_hub_cache_are_named_by_their_hash_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = write_model(tmp_path / "plain", {})
    linked = write_model(tmp_path / "snapshot", {})
    blob = tmp_path / "blobs" / hashlib.sha256(b"weights").hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(b"never read")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(blob)
    assert teacher_identity(linked) == teacher_identity(plain)


@pytest.mark.parametrize(
    ("model", "identity"),
    [
        ("tiny-teacher", "10424e55382625e93b39837ca784434667a458991c3ff0a89afcee5c01dccfae"),
        (
            "SmolLM2-135M-Instruct",
            "82023295dc845806e03fbceaf92e028576b082edc325a251ff634fcece23be9c",
        ),
    ],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_the_shipped_models_keep_their_identity(model: str, identity: str, trusted: bool) -> None:
    folder = Path(__file__).resolve().parents[2] / "models" / model
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"{folder} is not there")
    assert identity_of_teacher(teacher(trust_remote_code=trusted), folder) == identity


def test_code_beside_the_weights_is_in_the_identity_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_model(tmp_path / "m", {})

    def identities() -> list[str]:
        kinds = (teacher(), teacher(trust_remote_code=True))
        return [identity_of_teacher(kind, folder) for kind in kinds]

    plain, trusted = identities()
    assert plain == trusted  # there is no code
    seen = {plain}
    for name, code in (("modeling.py", "a = 1"), ("modeling.py", "a = 22"), ("more.py", "")):
        (folder / name).write_text(code)
        unused, trusted = identities()
        assert unused == plain and trusted not in seen
        seen.add(trusted)


def test_files_that_say_how_weights_are_quantised_are_in_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inside = {"quantization_config": {"quant_method": "gptq"}}
    for kind, config, names in (
        ("beside", {}, ("hf_quant_config.json", "quantize_config.json", "quant_config.json")),
        ("inside", inside, ("hf_quant_config.json",)),
    ):
        folder = write_model(tmp_path / kind, {"config.json": config})
        seen = [teacher_identity(folder)]
        for name in names:
            for content in ({"bits": 4}, {"bits": 16}):
                (folder / name).write_text(json.dumps(content))
                seen.append(teacher_identity(folder))
        assert len(set(seen)) == len(seen)
    (folder / "quantize_config.json").write_text("{}")  # vLLM does not read it here
    assert teacher_identity(folder) == seen[-1]


def test_a_folder_without_weights_has_no_identity(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no weights .* set teacher\.model"):
        teacher_identity(tmp_path)


def test_the_synthetic_teachers_identity_is_its_answers_and_not_its_speed(tmp_path: Path) -> None:
    fast = teacher(engine="synthetic")
    slow = teacher(engine="synthetic", synthetic={"delay_s": 1.0})
    longer = teacher(engine="synthetic", synthetic={"response_tokens": 17})
    assert identity_of_teacher(fast, tmp_path) == identity_of_teacher(slow, tmp_path)
    assert identity_of_teacher(fast, tmp_path) != identity_of_teacher(longer, tmp_path)


def test_lists_of_a_table_are_flat_buffers() -> None:
    table = answers_table([an_answer(2, 3), an_answer(4, 3)], Signal("topk", 3))
    column = table["topk_ids"].combine_chunks()
    assert isinstance(column, pa.ListArray)
    assert column.flatten().flatten().to_numpy(zero_copy_only=True).shape == (18,)


def test_given_responses_that_cannot_be_scored_name_their_reason() -> None:
    ids = np.array([1, 2, 3], np.int32)
    assert why_unscorable(ids, ids, max_model_len=6, vocab_size=4) is None
    assert why_unscorable(ids, ids, 5, 4) == "too_long"
    assert why_unscorable(ids, ids[:0], 6, 4) == why_unscorable(ids[:0], ids, 6, 4) == "empty"
    assert why_unscorable(ids[:2], ids, 6, 3) == "invalid_ids"
