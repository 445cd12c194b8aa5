"""The teacher's head out of its folder: real models, shards, ties, biases, quantised or absent."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from raystill.base.errors import RunError
from raystill.config.run import RunConfig
from raystill.model.files import ModelFolder
from raystill.model.head import find_head, stored_tensors
from raystill.train.loss import teacher_head
from raystill.train.loss.teacher_head import head_of_signal, read_teacher_head

MODELS = Path(__file__).resolve().parents[2] / "models"
VOCAB = 40
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
)


def states_and_logits(model, ids):
    """What the head is given at each position [N, D], and the model's logits [N, V]."""
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1), model(input_ids=ids).logits.flatten(0, 1)


def rebuilt(head, hidden):
    return torch.cat([z for _, z in head.logit_chunks(hidden)])


@pytest.mark.parametrize("name", ["tiny-teacher", "SmolLM2-135M-Instruct"])
def test_the_logits_of_real_teachers_are_hugging_faces_own(name):
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    ids = torch.arange(100, 124).reshape(2, 12)
    hidden, logits = states_and_logits(model, ids)
    head = read_teacher_head(MODELS / name, 49_152)
    assert head.hidden_size == model.config.hidden_size and head.num_classes == 49_152
    torch.testing.assert_close(rebuilt(head, hidden), logits, rtol=1e-5, atol=2e-5)
    # What rounding the states to bfloat16 costs the log probability of an id, on average.
    ours = torch.log_softmax(rebuilt(head, hidden.bfloat16()), dim=1)
    theirs = torch.log_softmax(logits, dim=1)
    drawn = theirs.argmax(dim=1)
    gap = head.mean_gap(hidden.bfloat16(), drawn, theirs.gather(1, drawn[:, None]).squeeze(1))
    assert gap == pytest.approx((ours - theirs).gather(1, drawn[:, None]).abs().mean().item(), 1e-3)
    assert gap < 0.01


def build(kind):
    torch.manual_seed(0)
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=1.5))
    if kind == "cohere":
        return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=3.0))
    if kind == "phi":  # A head of its own, with a bias.
        model = PhiForCausalLM(PhiConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}))
        torch.nn.init.normal_(model.lm_head.bias)
        return model
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2))
    if kind == "gpt_neox":
        sizes = {k: SMALL[k] for k in ("vocab_size", "hidden_size", "intermediate_size")}
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
        )
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=kind == "tied"))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", ["tied", "untied", "gemma2", "cohere", "phi", "gpt2", "gpt_neox"])
def test_heads_of_every_kind_are_found_and_give_the_models_logits(tmp_path, kind, shards):
    model = build(kind).eval()
    model.save_pretrained(tmp_path, max_shard_size="4KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    hidden, logits = states_and_logits(model, torch.arange(3, 15).reshape(2, 6))
    head = read_teacher_head(tmp_path, VOCAB - 3, torch.float64)
    assert head.num_classes == VOCAB - 3 and len(head.weight) == VOCAB
    torch.testing.assert_close(rebuilt(head, hidden), logits.double(), rtol=1e-5, atol=1e-5)
    products = head.products(hidden.bfloat16()).clone()
    head.apply_transform(products)
    torch.testing.assert_close(products, rebuilt(head, hidden.bfloat16()))


def test_only_the_heads_tensors_are_read(tmp_path, monkeypatch):
    build("phi").save_pretrained(tmp_path)
    read = []
    one = teacher_head._read
    monkeypatch.setattr(
        teacher_head, "_read", lambda tensor: read.append(tensor.name) or one(tensor)
    )
    read_teacher_head(tmp_path, VOCAB)
    assert read == ["lm_head.weight", "lm_head.bias"]


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_found(tmp_path):
    save_model(tmp_path, {"model.embed_tokens.weight": 1.0, "lm_head.weight": 2.0}, tied=True)
    assert find_head(folder(tmp_path)).weight.name == "model.embed_tokens.weight"
    save_model(tmp_path, {"lm_head.weight": 2.0}, tied=True)
    assert find_head(folder(tmp_path)).weight.name == "lm_head.weight"
    names = {"model.embed_tokens.weight": 1.0, "model.layers.2.embed_tokens.weight": 3.0}
    save_model(tmp_path, names, tied=False)
    assert find_head(folder(tmp_path)).weight.name == "model.embed_tokens.weight"


def folder(path):
    return ModelFolder("the model", path)


def save_model(path, tensors, tied=False, dtype=torch.float32):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    made = {name: torch.full((VOCAB, 16), value).to(dtype) for name, value in tensors.items()}
    save_file(made, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))


@pytest.mark.parametrize(
    ("tensors", "dtype", "words"),
    [
        ({"model.norm.weight": 1.0}, torch.float32, "has 0 output heads"),
        ({"a.lm_head.weight": 1.0, "b.lm_head.weight": 1.0}, torch.float32, "has 2 output heads"),
        ({"lm_head.qweight": 1.0}, torch.int32, r"quantised output head \(lm_head.qweight\)"),
        ({"lm_head.weight": 1.0}, torch.float8_e4m3fn, r"lm_head.weight in F8_E4M3\)"),
        ({"lm_head.weight": 1.0, "lm_head.weight_scale": 1.0}, torch.float32, "weight_scale"),
    ],
)
def test_a_head_that_is_not_there_or_is_quantised_is_refused(tmp_path, tensors, dtype, words):
    save_model(tmp_path / "model", tensors, dtype=dtype)
    with pytest.raises(ValueError, match=words) as error:
        read_teacher_head(tmp_path / "model", VOCAB)
    assert "signal.kind: topk" in str(error.value)


def test_a_worker_reads_the_head_with_the_hidden_signal_only(tmp_path):
    config = RunConfig.model_validate(
        {
            "teacher": {"model": "m", "dtype": "float32"},
            "student": {"layers": [0]},
            "prompts": {"path": "p"},
            "signal": {"kind": "hidden"},
        }
    )
    cpu, signal = torch.device("cpu"), config.signal
    head = head_of_signal(config, str(MODELS / "tiny-teacher"), 49_000, torch.float32, cpu)
    assert (head.num_classes, len(head.weight), head.most_gap) == (49_000, 49_152, 0.02)
    topk = config.model_copy(update={"signal": signal.model_copy(update={"kind": "topk"})})
    assert head_of_signal(topk, str(tmp_path), 49_000, torch.float32, cpu) is None
    with pytest.raises(RunError, match=r"output head cannot be read: .* has 0 output heads"):
        head_of_signal(config, str(tmp_path), 49_000, torch.float32, cpu)


def test_without_weights_the_index_says_where_the_head_is(tmp_path):
    weight_map = {"lm_head.weight": "model-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(stored_tensors(tmp_path)) == {"lm_head.weight"}
    weight = find_head(folder(tmp_path)).weight
    assert weight.file == tmp_path / "model-00002.safetensors" and weight.shape is None


def test_another_teacher_than_the_one_that_answered_is_refused(tmp_path):
    model = build("untied").eval()
    model.save_pretrained(tmp_path)
    hidden, logits = states_and_logits(model, torch.arange(3, 35)[None])
    drawn = logits.argmin(dim=1)
    logprobs = torch.log_softmax(logits, dim=1).gather(1, drawn[:, None]).squeeze(1)
    head = read_teacher_head(tmp_path, VOCAB, engine_dtype="float32")
    head.require_agreement(head.mean_gap(hidden.bfloat16(), drawn, logprobs))
    with pytest.raises(RunError, match=r"by 3 nats on average; expected at most 0\.02.*teacher\.m"):
        head.require_agreement(head.mean_gap(hidden.bfloat16(), drawn, logprobs - 3))
    one = head.mean_gap(hidden[:1].bfloat16(), drawn[:1], logprobs[:1] - 1.6)
    assert one == pytest.approx(0.1, abs=0.01), "a token alone counts as one of sixteen"
    unknown = torch.full_like(logprobs, torch.nan)
    assert head.mean_gap(hidden.bfloat16(), drawn, unknown) == 0, "scored: no engine drew them"
    half = torch.where(torch.arange(32) < 16, logprobs - 2, unknown)
    assert head.mean_gap(hidden.bfloat16(), drawn, half) == pytest.approx(2, abs=0.02)
    with pytest.raises(RunError, match="by nan nats"):
        head.require_agreement(float("nan"))
    with pytest.raises(RunError, match=r"states have 8 components.*takes 16"):
        head.mean_gap(hidden[:, :8].bfloat16(), drawn, logprobs)
