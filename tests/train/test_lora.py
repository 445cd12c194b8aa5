"""Adapters: they alone are trained and kept, alone, with DDP and with FSDP."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from raystill.base.errors import RunError
from raystill.base.run_folder import RunFolder
from raystill.config.run import RunConfig
from raystill.config.student import LoraConfig, StudentConfig
from raystill.config.training import TrainingConfig
from raystill.model.adapters import adapter_problems, trained_numbers
from raystill.model.files import ModelFolder
from raystill.model.on_node import ModelSource
from raystill.placement.memory import Adapters, Decoder, Parts, need
from raystill.train.checkpoint.checkpoint import (
    load_tensors,
    random_state,
    read_snapshot,
    require_base,
    set_random_state,
)
from raystill.train.checkpoint.tensors import model_tensors
from raystill.train.step.ranks import Ranks
from raystill.train.student import lora
from raystill.train.student.export import (
    Base,
    ExportSettings,
    export_adapter,
    export_student,
    exported_state,
    round_weights,
    state_before_merging,
)
from raystill.train.student.module import StudentModule
from raystill.train.student.sharding import shard_student
from raystill.train.worker.shape import base_of
from tests.support.tiny_student import (
    flat,
    make_row,
    make_step,
    parallel,
    relative_error,
    tiny_module,
    training_config,
    write_checkpoint,
)
from tests.support.workers import run_workers

# Rows of each step held by rank 0 and rank 1; rank 0 empty at step 1.
SHARES = [(range(0, 9), range(9, 12)), ((), range(12, 17))]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
NORM_IN_32 = "16-bit weights, a norm in 32"
NORM = LoraConfig(rank=5, modules_to_save=("norm",))
# name: (adapters, dtype of the frozen weights, dtype of what is trained)
CASES = {
    "tied": (LoraConfig(rank=5), F64, F64),
    "norm trained whole": (NORM, F64, F64),
    "two modules": (LoraConfig(rank=16, alpha=3.0, target_modules=("q_proj", "up_proj")), F64, F64),
    "16-bit weights": (LoraConfig(rank=5), BF16, F32),
    NORM_IN_32: (NORM, BF16, F32),
}
ON_TWO_WORKERS = [case for case in CASES if case != NORM_IN_32]


def start(case="tied", **kwargs):
    """A student with adapters that change nothing yet."""
    settings, base, trained = CASES[case] if isinstance(case, str) else (case, F64, F64)
    model = tiny_module(dtype=F64, **kwargs).model.to(base)
    model.base_identity = lora.base_identity(model)
    torch.manual_seed(3)
    lora.inject(model, settings, trained)
    return StudentModule(model).train()


class Training:
    """A student of one of CASES under way, alone or as one of two workers."""

    def __init__(self, case, strategy="alone", rank=0, **kwargs):
        self.rank = None if strategy == "alone" else rank
        self.inner = start(case, **kwargs)
        module = self.inner if strategy == "alone" else parallel(self.inner, strategy)
        self.step = make_step(module, training_config(), 1 if strategy == "alone" else 2)
        self.model, self.optimizer = self.inner.model, self.step.optimizer

    def run(self, *numbers):
        for number in numbers:
            share = SHARES[number]
            rows = [*share[0], *share[1]] if self.rank is None else share[self.rank]
            self.step.run(number, [make_row(i) for i in rows], has_more=True, stop=False)
        return self

    def trained(self):
        return flat(lora.trained_tensors(self.model).values())

    def logits(self):
        batch = self.step.batches.make([make_row(i) for i in range(4)])
        return self.inner.eval().logits(batch)


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_adapters_begin_without_effect_and_are_all_that_changes(case):
    settings, base, _ = CASES[case]
    training = Training(case)
    plain = StudentModule(tiny_module(dtype=F64).model.to(base), training.inner.compute_dtype)
    batch = training.step.batches.make([make_row(i) for i in range(4)])
    assert torch.equal(training.logits(), plain.eval().logits(batch))
    before, untrained = frozen(training.model), training.trained()
    training.inner.train()
    training.run(0, 1)
    after = frozen(training.model)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert (training.trained() - untrained).abs().max() > 1e-3
    assert not torch.equal(training.logits(), plain.logits(batch))
    names = lora.trained_tensors(training.model)
    whole = {n for n in names if "lora_" not in n}
    assert whole == ({"model.norm.modules_to_save.default.weight"} if settings is NORM else set())
    assert {t.dtype for t in names.values()} == {CASES[case][2]}


@pytest.mark.parametrize("case", CASES)
def test_the_exported_weights_have_the_adapters_in_them(case):
    training = Training(case).run(0, 1)
    plain = tiny_module(dtype=F64).model
    state = exported_state(training.model, F64, keep=True)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    batch = training.step.batches.make([make_row(i) for i in range(4)])
    merged = StudentModule(plain).eval().logits(batch)
    bound = 0.02 if CASES[case][1] == BF16 else 1e-10
    assert relative_error(training.logits(), merged) < bound


def test_what_is_merged_in_place_is_what_is_exported_and_measured():
    training = Training("norm trained whole").run(0, 1)
    expected, logits = exported_state(training.model, F64, keep=True), training.logits()
    lora.merge(training.model)
    assert relative_error(training.logits(), logits) < 1e-10
    for name, tensor in exported_state(training.model, F64, keep=True).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)
    round_weights(training.model, BF16)
    for name, tensor in exported_state(training.model, F64, keep=True).items():
        assert torch.equal(tensor, tensor.to(BF16).to(F64)), name


@pytest.mark.parametrize("wide", [F32, BF16], ids=["float32", "bfloat16"])
def test_an_export_wider_than_the_frozen_weights_has_what_merging_rounds(tmp_path, wide):
    model = Training("16-bit weights").model
    generator = torch.Generator().manual_seed(2)
    for name, tensor in lora.trained_tensors(model).items():
        if "lora_B" in name:
            tensor.normal_(0, 1e-4, generator=generator)
    layer = model.model.layers[1].mlp.up_proj
    expected = (layer.base_layer.weight.float() + lora.delta(layer)).to(wide).detach()
    state = state_before_merging(model, wide, keep=True)
    assert (state is not None) == (wide == F32)
    lora.merge(model)
    round_weights(model, wide)
    run = RunFolder(str(tmp_path / "run")).ensure()
    name = str(wide).removeprefix("torch.")
    export_student(model, run, ExportSettings(name, "no folder", Sampling()), state=state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student", dtype="auto")
    found = loaded.model.layers[1].mlp.up_proj.weight
    assert found.dtype == wide and torch.equal(found, expected)
    assert torch.equal(found, found.bfloat16().to(wide)) == (wide == BF16)


def test_weights_wider_than_their_adapters_are_not_rounded_to_them():
    model = start("tied").model
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    before = frozen(model)
    lora.merge(model)
    assert all(torch.equal(before[name], now) for name, now in frozen(model).items())


def test_a_checkpoint_has_the_adapters_alone_and_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    settings = LoraConfig(rank=5, dropout=0.3, modules_to_save=("norm",))
    torch.manual_seed(11)
    undisturbed = Training(settings).run(0)
    state = random_state()
    undisturbed.run(1)

    torch.manual_seed(11)
    stopped = Training(settings).run(0)
    write_checkpoint(stopped, tmp_path, Ranks())
    resumed = Training(settings)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    load_tensors(folder, 1, resumed.model, resumed.optimizer)
    set_random_state(state)
    resumed.run(1)
    assert torch.equal(resumed.trained(), undisturbed.trained())
    for one, other in zip(
        resumed.optimizer.state.values(), undisturbed.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all("lora_" in n or "modules_to_save" in n for n in model_tensors(resumed.model))
    without = Training(LoraConfig(rank=5)).run(0)
    with pytest.raises(ValueError, match="not this student"):
        load_tensors(folder, 1, without.model, without.optimizer)


def test_a_checkpoint_knows_the_weights_that_its_adapters_belong_to(tmp_path):
    training = Training("tied")
    identity = lora.identity_of_base(training.model)
    other = tiny_module(dtype=F64).model
    assert identity == lora.base_identity(other)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-15
    changed = lora.base_identity(other)
    assert changed != identity
    lora.merge(training.model)
    assert lora.identity_of_base(training.model) == identity
    write_checkpoint(training, tmp_path, Ranks())
    (folder,) = (tmp_path / "checkpoints").iterdir()
    snapshot = read_snapshot(folder)
    dtype = lora.dtype_of_base(training.model)
    require_base(snapshot, identity, dtype)
    with pytest.raises(RunError, match=r"weights in float64 with .* put back the files"):
        require_base(snapshot, changed, dtype)
    assert json.loads((folder / "state.json").read_text())["base"] == identity
    with pytest.raises(RunError, match="worker 1 has"):
        lora.require_same_base([identity, changed])
    lora.require_same_base(None)


class Sampling:
    temperature, top_p, top_k, min_p, stop_token_ids = 1.0, 1.0, 0, 0.0, (2,)


@pytest.mark.parametrize("case", ["tied", "norm trained whole", "two modules", "untied head"])
@pytest.mark.parametrize("cut", [True, False])
def test_adapter_and_merged_model_give_the_same_logits(tmp_path, case, cut):
    settings = LoraConfig(rank=5, modules_to_save=("lm_head", "norm"))
    settings = settings if case == "untied head" else CASES[case][0]
    model = tiny_module(tied=case != "untied head").model
    model.save_pretrained(tmp_path / "start")
    lora.inject(model, settings, F32)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.05 * noise)
    ids = torch.randint(3, 60, (2, 17), generator=generator)
    expected = model.eval()(ids).logits
    run = RunFolder(str(tmp_path / "run")).ensure()
    written = ExportSettings("float32", "no folder", Sampling())
    base = Base(None) if cut else Base(str(tmp_path / "start"))
    export_adapter(model, run, written, base)
    export_adapter(model, run, written, base)  # Again, as after a restart.
    lora.merge(model)
    export_student(model, run, written)

    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names - {"logs"} == {"adapter", "student"} | ({"base"} if cut else set())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    found = [m.eval()(ids).logits for m in (merged, adapted, adapted.merge_and_unload())]
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start").eval()(ids).logits
    assert (plain - expected).abs().max() > 2e-3
    told = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == (base.name or run.join("base"))


def test_the_base_of_an_adapter_is_a_folder_of_its_own_only_where_the_teacher_is_cut(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    teacher = ModelSource("teachers/four", str(tmp_path))
    cases = {
        Base("other/model", "v2"): dict(init="model", model="other/model", revision="v2"),
        Base(str(tmp_path)): dict(layer_stride=1),
        Base(None): dict(layers=(0, 2)),
    }
    for base, fields in cases.items():
        assert base_of(StudentConfig(**fields), teacher, str(tmp_path)) == base
    assert base_of(StudentConfig(layers=(3, 2, 1, 0)), teacher, str(tmp_path)) == Base(None)
    assert base_of(StudentConfig(layer_stride=1, ffn_size=8), teacher, str(tmp_path)) == Base(None)
    from_hub = ModelSource("teachers/four", str(tmp_path), commit="abc")
    student = StudentConfig(layer_stride=1)
    assert base_of(student, from_hub, str(tmp_path)) == Base("teachers/four", "abc")


@pytest.mark.parametrize("case", ["tied", "norm trained whole", "two modules"])
def test_the_number_of_trained_parameters_is_known_before(tmp_path, case):
    settings = CASES[case][0]
    model = tiny_module().model
    model.save_pretrained(tmp_path)
    lora.inject(model, settings, F32)
    numbers = {n: t.numel() for n, t in lora.trained_tensors(model).items()}
    folder = ModelFolder("tiny", tmp_path)
    assert trained_numbers(folder, settings) == sum(numbers.values())
    one = sum(count for name, count in numbers.items() if "layers.0." not in name)
    assert trained_numbers(folder, settings, [1]) == one
    assert trained_numbers(ModelFolder("none", tmp_path / "none"), settings) is None


def test_the_table_of_memory_counts_frozen_and_trained_numbers_as_they_are():
    model = start(NORM_IN_32).model
    every = dict(model.named_parameters())
    trained = [tensor for tensor in every.values() if tensor.requires_grad]
    frozen = [tensor for tensor in every.values() if not tensor.requires_grad]
    adapters = Adapters(sum(tensor.numel() for tensor in trained), 2)
    layers = (sum(tensor.numel() for tensor in frozen),)
    parts, decoder = Parts(layers, 0, 0, adapters), Decoder(16, 32, 16, 16)
    needed = need(TrainingConfig(), parts, decoder, workers=1, tokens=0, on_gpu=False)
    assert needed.weights == sum(tensor.nbytes for tensor in every.values())
    assert needed.gradients == sum(tensor.nbytes for tensor in trained)
    assert needed.optimizer == 2 * needed.gradients


def test_16_bit_weights_are_multiplied_in_16_bits_and_no_run_file_asks_for_more():
    assert start("16-bit weights").compute_dtype == BF16
    assert start("tied").compute_dtype == F64
    settings = {
        "teacher": {"model": "t"},
        "student": {"layer_stride": 1, "lora": {"base_dtype": "bfloat16"}},
        "prompts": {"path": "p.jsonl"},
    }
    RunConfig.model_validate(settings)
    with pytest.raises(ValueError, match="set base_dtype: float32"):
        RunConfig.model_validate(settings | {"training": {"compute_dtype": "float32"}})


WRONG = {
    "a name that no module has": (
        {"target_modules": ("q_prj", "v_proj")},
        "target_modules",
        "names q_prj, which no module is called; the linear modules of tiny are down_proj",
    ),
    "the output head": ({"target_modules": ("lm_head",)}, "target_modules", "modules_to_save"),
    "a rank above that of a matrix": ({"rank": 17}, "rank", "set rank: 16 or less"),
    "a tied head": ({"modules_to_save": ("lm_head",)}, "modules_to_save", "ties its embeddings"),
    "a tied embedding": (
        {"modules_to_save": ("model.embed_tokens",)},
        "modules_to_save",
        "ties its embeddings",
    ),
    "an unknown one to save": ({"modules_to_save": ("nrm",)}, "modules_to_save", "input_layernorm"),
    "half a name": ({"modules_to_save": ("layernorm",)}, "modules_to_save", "no module is called"),
    "one both whole and adapted": (
        {"target_modules": ("q_proj",), "modules_to_save": ("q_proj",)},
        "modules_to_save",
        "target_modules has too",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_the_model_is_said_before_and_after_it_is_loaded(tmp_path, wrong):
    fields, where, text = WRONG[wrong]
    model = tiny_module().model
    model.save_pretrained(tmp_path / "tiny")
    folder = ModelFolder("tiny", tmp_path / "tiny")
    settings = LoraConfig(**fields)
    ((field, message),) = adapter_problems(folder, settings)
    assert field == where and text in message
    with pytest.raises(RunError, match=rf"student\.lora\.{where}"):
        lora.inject(copy.deepcopy(model), settings, F32)


def test_what_fits_an_untied_model_has_no_problem(tmp_path):
    model = tiny_module(tied=False).model
    model.save_pretrained(tmp_path)
    settings = LoraConfig(rank=16, modules_to_save=("norm", "lm_head", "embed_tokens", "q_proj"))
    assert list(adapter_problems(ModelFolder("tiny", tmp_path), settings)) == []
    lora.inject(model, settings, F32)
    names = lora.trained_tensors(model)
    assert {"lm_head.modules_to_save.default.weight"} < names.keys()
    assert "model.layers.0.self_attn.q_proj.modules_to_save.default.weight" in names
    assert not any("q_proj.lora" in name for name in names)


def test_an_untied_head_that_is_trained_whole_is_the_one_that_the_loss_uses():
    settings = LoraConfig(rank=5, modules_to_save=("lm_head",))
    training = Training(settings, tied=False)
    head = training.inner.head().weight
    before = head.detach().clone()
    training.run(0)
    assert (head - before).abs().max() > 1e-3
    state = exported_state(training.model, F64, keep=True)
    assert torch.equal(state["lm_head.weight"], head)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    write_checkpoint(Training("tied").run(0), folder / "alone", Ranks())
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return run_workers(worker_main, folder)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", ON_TWO_WORKERS)
def test_two_workers_train_the_adapters_as_one_does(ranks, case, strategy):
    alone = Training(case).run(0, 1)
    state = exported_state(alone.model, F64, keep=True)
    bound = 0.05 if CASES[case][1] == BF16 else 1e-9
    for rank in ranks:
        result = rank[case][strategy]
        assert (result["trained"] - alone.trained()).abs().max() < bound
        assert relative_error(result["merged"], flat(state.values())) < bound
        assert result["exported"].keys() == (state.keys() if rank is ranks[0] else set())
    for name, tensor in ranks[0][case][strategy]["exported"].items():
        torch.testing.assert_close(tensor, state[name], rtol=bound, atol=bound)


def test_a_checkpoint_of_adapters_is_read_by_other_numbers_of_workers(ranks, folder):
    whole_run = Training("tied").run(0, 1).trained()
    (two,) = (folder / "fsdp" / "checkpoints").iterdir()
    resumed = Training("tied")
    load_tensors(two, read_snapshot(two).num_files, resumed.model, resumed.optimizer)
    assert (resumed.run(1).trained() - whole_run).abs().max() < 1e-10
    for rank in ranks:
        for strategy in ("ddp", "fsdp"):
            assert (rank["resumed"][strategy] - whole_run).abs().max() < 1e-10
    size = sum(path.stat().st_size for path in two.glob("model-*"))
    full = tiny_module(dtype=F64).model
    assert size < 0.6 * sum(p.numel() * 8 for p in full.parameters())


def test_copies_of_a_sharded_student_are_merged_as_one_that_is_whole(ranks):
    alone = noisy(start("tied").model)
    lora.merge(alone)
    expected = flat(exported_state(alone, F64, keep=True).values())
    for rank in ranks:
        for group in (1, 2):
            assert relative_error(rank["copies"][group], expected) < 1e-12


def noisy(model):
    """The model with adapters that change something."""
    generator = torch.Generator().manual_seed(5)
    for tensor in lora.trained_tensors(model).values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return model


def merged_in_groups(size):
    """What a worker of two has after merging, where so many ranks share a copy."""
    module = start("tied")
    noisy(module.model)
    training = TrainingConfig(strategy="fsdp", num_workers=2, shard_group_size=size)
    shard_student(module, torch.device("cpu"), 2, training)
    lora.merge(module.model)
    return flat(exported_state(module.model, F64, keep=True).values())


def after_training(case, strategy, rank):
    """What a worker has after all steps, as it is, exported, and merged in place."""
    training = Training(case, strategy, rank).run(0, 1)
    trained = training.trained()
    exported = exported_state(training.model, F64, keep=rank == 0)
    lora.merge(training.model)
    merged = flat(exported_state(training.model, F64, keep=True).values())
    return {"trained": trained, "exported": exported, "merged": merged}


def worker_main(rank, folder):
    strategies = ("ddp", "fsdp")
    results = {c: {s: after_training(c, s, rank) for s in strategies} for c in ON_TWO_WORKERS}
    write_checkpoint(Training("tied", "fsdp", rank).run(0), folder / "fsdp", Ranks(rank, 2))
    (one,) = (folder / "alone" / "checkpoints").iterdir()
    results["resumed"] = {}
    results["copies"] = {size: merged_in_groups(size) for size in (1, 2)}
    for strategy in strategies:
        training = Training("tied", strategy, rank)
        load_tensors(one, 1, training.model, training.optimizer)
        results["resumed"][strategy] = training.run(1).trained()
    return results
