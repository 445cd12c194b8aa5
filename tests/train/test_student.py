"""The student as a Hugging Face model: made from the teacher, saved, loaded again."""

import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from raystill.config.run import RunConfig
from raystill.model.sampling import ResolvedSampling
from raystill.train.start.cut import keep_layers
from raystill.train.start.precision import cast_weights
from raystill.train.start.shape import Shape
from raystill.train.start.width import Widths
from raystill.train.student import lora
from raystill.train.student.build import Outline, build_student, num_classes
from raystill.train.student.export import (
    ExportSettings,
    export_student,
    generation_config,
    round_weights,
    save_student,
)

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SETTINGS = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 24}
SETTINGS |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}


def settings_of(teacher, temperature=0.7, dtype="bfloat16"):
    """What a student of this teacher is exported with."""
    sampling = ResolvedSampling(temperature, 0.9, 0, 0.0, max_tokens=8, stop_token_ids=(2, 5))
    return ExportSettings(dtype, str(teacher), sampling)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A four-layer random teacher with a tokenizer of 37 names and a chat template."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SETTINGS, tie_word_embeddings=True, eos_token_id=2)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(37)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"}
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2, "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def run_config(teacher, student=None, **training) -> RunConfig:
    return RunConfig.model_validate(
        {
            "teacher": {"model": str(teacher)},
            "student": student or {"init": "from_teacher", "layers": [0, 2, 3]},
            "prompts": {"path": "unused.jsonl"},
            "training": training,
        }
    )


def layer_tensors(model, index):
    return {n: p for n, p in model.model.layers[index].named_parameters()}


@pytest.mark.parametrize(
    ("chosen", "layers"), [({"layers": [0, 2, 3]}, [0, 2, 3]), ({"layer_stride": 2}, [0, 2])]
)
def test_a_student_from_the_teacher_keeps_the_named_layers_bit_for_bit(teacher, chosen, layers):
    source = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    student = build_student(run_config(teacher, chosen), str(teacher), seed=1)
    assert student.config.num_hidden_layers == len(layers)
    for index, layer in enumerate(layers):
        assert student.model.layers[index].self_attn.layer_idx == index
        ours, theirs = layer_tensors(student, index), layer_tensors(source, layer)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == torch.float32
            assert torch.equal(ours[name], theirs[name])
    assert torch.equal(student.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_the_cut_student_generates_with_its_cache_as_without(teacher):
    student = build_student(run_config(teacher), str(teacher), seed=1).eval()
    ids = torch.tensor([[3, 4, 9]])
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    cached, plain = (
        student.generate(ids, **settings, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_a_layer_named_twice_is_a_copy_and_per_layer_settings_follow(teacher):
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model.config.layer_types = ["a", "b", "c", "d"]
    keep_layers(model, [3, 1, 1])
    assert model.config.layer_types == ["d", "b", "b"]
    first, second = model.model.layers[1], model.model.layers[2]
    assert torch.equal(first.mlp.up_proj.weight, second.mlp.up_proj.weight)
    assert first.mlp.up_proj.weight is not second.mlp.up_proj.weight
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 0}


@pytest.mark.parametrize(
    ("config", "kept", "words"),
    [
        (transformers.FalconH1Config(**SETTINGS), [0, 2], None),  # All of its layers are alike.
        (transformers.JambaConfig(**SETTINGS, **JAMBA), [0, 1], None),
        (
            transformers.JambaConfig(**SETTINGS, **JAMBA),
            [1, 3],
            "describes these layers: layer_types would",
        ),
        (transformers.HunYuanDenseV1Config(**SETTINGS, head_dim=8), [0, 2], None),
    ],
)
def test_a_kind_of_layer_that_is_worked_out_from_its_number_is_held_to_it(config, kept, words):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if words is not None:
        with pytest.raises(ValueError, match=words):
            keep_layers(model, kept)
        return
    keep_layers(model, kept)
    assert model.config.num_hidden_layers == 2


def test_a_layer_the_teacher_lacks_is_refused(teacher):
    config = run_config(teacher, {"layers": [0, 4]})
    with pytest.raises(ValueError, match=r"names \[4\], but the teacher has layers 0 to 3"):
        build_student(config, str(teacher), seed=1)


def test_a_student_from_a_model_folder_is_that_model(teacher):
    config = run_config(teacher, {"init": "model", "model": str(teacher)}, param_dtype="float64")
    student = build_student(config, "unused", seed=1)
    assert student.config.num_hidden_layers == 4
    assert {p.dtype for p in student.parameters()} == {torch.float64}


def test_classes_are_the_ids_that_head_and_tokenizer_both_have(teacher, tmp_path):
    student = build_student(run_config(teacher), str(teacher), seed=1)
    assert num_classes(student, str(teacher)) == 37
    assert num_classes(student, str(tmp_path)) == 40


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_saved_student_loads_with_transformers_as_it_was_measured(teacher, tmp_path, dtype):
    student = build_student(run_config(teacher), str(teacher), seed=1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    round_weights(student, getattr(torch, dtype))
    save_student(student, tmp_path / "student", settings_of(teacher, dtype=dtype))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.config.use_cache
    own = dict(student.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.float(), own[name])
    ids = torch.tensor([[3, 4, 9, 11]])
    with torch.no_grad():
        assert torch.equal(loaded.float()(ids).logits, student(ids).logits)


POSITIONS, LORA = 1000, {"rank": 4, "base_dtype": "bfloat16"}
ROUNDED = {
    "16-bit weights": ({"init": "model"}, {"optimizer": "adamw_bf16"}, None),
    "16-bit frozen weights": ({"init": "model", "lora": LORA}, {}, None),
    "narrower": ({"ffn_size": 16}, {"optimizer": "adamw_bf16"}, Widths(ffn=[list(range(16))] * 4)),
    "narrower, trained in float32": ({"ffn_size": 16}, {}, Widths(ffn=[list(range(16))] * 4)),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_late_positions_are_those_that_the_exported_student_has(tmp_path, case):
    fields, training, widths = ROUNDED[case]
    place, exact = tmp_path / "teacher", transformers.LlamaConfig(**SETTINGS, initializer_range=0.5)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(exact).to(torch.bfloat16).save_pretrained(place)
    student = fields | ({"model": str(place)} if "init" in fields else {})
    config = run_config(place, student, **training)
    known = widths and Shape([0, 1, 2, 3], widths)
    model = build_student(config, str(place), 1, known=known).eval()
    lora.attach(model, config, torch.device("cpu"))
    dtype = model.dtype
    lora.merge(model)
    save_student(model, tmp_path / "student", settings_of(place, dtype=str(dtype)[6:]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto").eval()
    ids = torch.randint(0, 40, (1, POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = (one(ids).logits for one in (model, loaded))
    assert loaded.dtype == dtype and expected[0, -1].std() > 0.1
    assert torch.equal(found, expected)


def test_casting_weights_leaves_what_a_loaded_model_computes_for_itself():
    model = torch.nn.Linear(2, 2)
    model.weight = torch.nn.Parameter(model.weight.double())
    model.register_buffer("stored", torch.full((2,), 0.1))
    model.register_buffer("derived", torch.full((2,), 0.1), persistent=False)
    model.register_buffer("narrow", torch.full((2,), 0.1).bfloat16(), persistent=False)
    model.register_buffer("counts", torch.arange(2))
    assert cast_weights(model, torch.float16) is model
    found = {name: one.dtype for name, one in (*model.named_parameters(), *model.named_buffers())}
    f16, bf16 = torch.float16, torch.bfloat16
    assert found == {
        **{"weight": f16, "bias": f16, "stored": f16, "derived": torch.float32, "narrow": bf16},
        "counts": torch.int64,
    }
    assert {b.dtype for b in cast_weights(model, torch.float32).buffers()} == {
        torch.float32,
        torch.int64,
    }


def test_the_saved_student_brings_the_teachers_tokenizer_template_and_stop_ids(teacher, tmp_path):
    config = run_config(teacher)
    student = build_student(config, str(teacher), seed=1)
    folder = tmp_path / "student"
    save_student(student, folder, settings_of(teacher))
    save_student(student, folder, settings_of(teacher))  # Replaces the first.
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == (
        "<user>x"
    )
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [2, 5]
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.7, 0.9)
    assert generation.pad_token_id == 2
    assert generation.max_new_tokens is None
    assert GenerationConfig.from_model_config(student.config) is not None
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.generation_config.eos_token_id == [2, 5]


def test_the_saved_student_has_none_of_the_teachers_penalties(teacher, tmp_path, caplog):
    penalties = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [4]}
    penalties |= {"min_new_tokens": 5, "bad_words_ids": [[7]], "num_beams": 4, "max_length": 9}
    source = tmp_path / "teacher"
    source.mkdir()
    own = {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": 2} | penalties
    (source / "generation_config.json").write_text(json.dumps(own))
    caplog.set_level("INFO")
    written = generation_config(source, settings_of(source).sampling)
    assert not written.keys() & penalties.keys()
    assert (written["bos_token_id"], written["pad_token_id"]) == (1, 2)
    assert written["eos_token_id"] == [2, 5]
    assert "repetition_penalty 1.3" in caplog.text and "max_length" not in caplog.text


def test_a_greedy_teachers_student_is_greedy(teacher, tmp_path):
    config = run_config(teacher)
    student = build_student(config, str(teacher), seed=1)
    save_student(student, tmp_path / "student", settings_of(teacher, temperature=0.0))
    generation = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert generation["do_sample"] is False
    assert "temperature" not in generation


def test_a_student_is_exported_into_the_run_folder(teacher, tmp_path):
    from raystill.base.run_folder import RunFolder

    config = run_config(teacher)
    student = build_student(config, str(teacher), seed=1)
    folder = RunFolder(str(tmp_path / "run")).ensure()
    export_student(student, folder, settings_of(teacher))
    assert folder.exists("student/config.json")
    assert student.config.use_cache is False  # Exporting changes only what is written.


def test_a_model_without_weights_takes_no_memory() -> None:
    sizes = dict(hidden_size=512, intermediate_size=64, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=16)
    small = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=200_000, **sizes))
    outline = replace(Outline.of(model), buffers=dict(small.named_buffers()))
    before = psutil.Process().memory_info().rss
    hollow = outline.hollow()
    assert psutil.Process().memory_info().rss - before < 40 << 20
    assert sum(one.nbytes for one in hollow.parameters()) > 800_000_000
    assert torch.equal(hollow.model.rotary_emb.inv_freq, small.model.rotary_emb.inv_freq)
    assert hollow(torch.tensor([[1, 2]])).logits.eq(0).all()
