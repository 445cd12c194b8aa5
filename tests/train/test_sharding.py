"""Sharded students (FSDP2) on two gloo workers: they train as DDP and as one worker do."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from raystill.base.errors import RunError
from raystill.config.objective import ObjectiveConfig
from raystill.train.checkpoint.checkpoint import (
    load_tensors,
    read_snapshot,
)
from raystill.train.checkpoint.tensors import model_tensors
from raystill.train.evaluation.free_running import FreeRunning, generate
from raystill.train.step.ranks import Ranks
from raystill.train.student.build import num_classes
from raystill.train.student.export import (
    ExportSettings,
    exported_state,
    round_weights,
    save_student,
)
from raystill.train.student.sharding import whole_weights
from tests.support.tiny_student import (
    STOP_ID,
    VOCAB,
    flat,
    make_hidden_row,
    make_row,
    make_step,
    parallel,
    relative_error,
    tiny_module,
    tiny_teacher,
    training_config,
    write_checkpoint,
)
from tests.support.workers import run_workers

# Rows of each step held by rank 0 and rank 1: uneven, rank 1 empty at step 1, rank 0 at step 2.
SHARES = [(range(0, 9), range(9, 12)), (range(12, 17), ()), ((), range(17, 20))]
CPU, F64 = torch.device("cpu"), torch.float64
# name: (student, training, signal)
CASES = {
    "tied": (dict(dtype=F64), {}, "topk"),
    "untied": (dict(dtype=F64, tied=False), {}, "topk"),
    "tied, hidden": (dict(dtype=F64), {}, "hidden"),
    "untied, hidden": (dict(dtype=F64, tied=False), {}, "hidden"),
    "clipped": (dict(dtype=F64), dict(max_grad_norm=0.3), "topk"),
    "recomputed": (dict(dtype=F64, activation_checkpointing=True), {}, "topk"),
    "float32": (dict(), {}, "topk"),
    "bfloat16": (dict(compute_dtype=torch.bfloat16, activation_checkpointing=True), {}, "topk"),
}
IN_DDP = ("tied",)  # That DDP trains as one worker does is in test_step.py and test_hidden_step.py.
# What rank 1 runs while rank 0 runs three: where there are fewer rows than workers, nothing.
PASSES = {"tied": 1, "untied": 0}
SAMPLING = SimpleNamespace(
    temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, stop_token_ids=(STOP_ID,)
)


def start(case):
    """The untrained student; its norms are no powers of two, which bfloat16 would keep."""
    module = tiny_module(**CASES[case][0]).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * noise.to(parameter.dtype))
    return module


class Training:
    """A student of one of CASES under way, alone or as one of two workers."""

    def __init__(self, case, strategy="alone", rank=0):
        _, training, self.signal = CASES[case]
        self.rank = None if strategy == "alone" else rank
        self.inner = start(case)
        module = self.inner if strategy == "alone" else parallel(self.inner, strategy)
        settings = {}
        if self.signal == "hidden":
            settings = dict(
                signal_kind="hidden",
                teacher=tiny_teacher(self.inner.param_dtype),
                objective=ObjectiveConfig(jsd=1.0, cross_entropy=0.3),
            )
        config = training_config(**({"max_grad_norm": None} | training))
        self.step = make_step(module, config, 1 if strategy == "alone" else 2, **settings)
        self.model, self.optimizer = self.inner.model, self.step.optimizer

    def run(self, number):
        """Step ``number`` of SHARES, or this rank's part of it: its figures."""
        share = SHARES[number]
        numbers = [*share[0], *share[1]] if self.rank is None else share[self.rank]
        row = make_hidden_row if self.signal == "hidden" else make_row
        result = self.step.run(number, [row(i) for i in numbers], has_more=True, stop=False)
        return torch.tensor([result.loss, result.grad_norm, result.rows, result.tokens])

    def parameters(self):
        return flat(self.inner.parameters())


def train(case, strategy="alone", rank=0):
    """Trains all of SHARES: figures of the steps, gradients of the first, the parameters."""
    training = Training(case, strategy, rank)
    figures = [training.run(0)]
    grads = flat(p.grad for p in training.inner.parameters())
    figures += [training.run(number) for number in range(1, len(SHARES))]
    parameters = list(training.inner.parameters())
    own = [p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters]
    return {
        "grads": grads,
        "parameters": training.parameters(),
        "figures": torch.stack(figures),
        "own_share": sum(own) / sum(p.numel() for p in parameters),
    }


def write_in_vain(folder, ranks):
    """The message that every rank gets when rank 1's file cannot be written."""
    part = folder / "torn" / "checkpoints" / ".step-00000001.part"
    (part / "model-00002-of-00002.safetensors").mkdir(parents=True, exist_ok=True)
    training = Training("tied", "fsdp", ranks.rank)
    try:
        write_checkpoint(training, folder / "torn", ranks)
    except RunError as error:
        return str(error)


def resume(folder, case, strategy="alone", rank=0):
    """The student of a checkpoint, after it was measured, and after the other steps."""
    training = Training(case, strategy, rank)
    load_tensors(folder, read_snapshot(folder).num_files, training.model, training.optimizer)
    results = measure(training.inner, passes=PASSES[case] if rank else 3)
    for number in range(1, len(SHARES)):
        training.run(number)
    return results | {"parameters": training.parameters()}


def measure(module, passes):
    """Logits and greedy answers, of other numbers of passes on every rank, perhaps none."""
    batch = make_step(module).batches.make([make_row(i) for i in range(4)])
    prompts = [make_row(i).prompt_ids for i in range(3)][:passes]
    settings = FreeRunning(3, 4 * passes, SAMPLING, seed=1)
    with whole_weights(module):
        logits = [module.logits(batch) for _ in range(passes)]
        answers = generate(module.model, prompts, settings, CPU)
    return {"logits": logits[-1:], "answers": [answer[:4] for answer in answers]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the workers write, with a checkpoint of each case that one worker wrote."""
    folder = tmp_path_factory.mktemp("workers")
    for case in ("tied", "untied"):
        training = Training(case)
        training.run(0)
        write_checkpoint(training, folder / "alone" / case, Ranks())
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return run_workers(worker_main, folder)


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_student_trains_as_ddp_and_as_one_worker(ranks, case):
    alone = train(case)
    exact = CASES[case][0].get("dtype") == F64
    # In bfloat16 the layers' norms are too, which they are not without sharding.
    bound = 1e-10 if exact else 1e-2 if case == "bfloat16" else 2e-6
    for rank in ranks:
        sharded, others = rank[case]["fsdp"], [alone]
        assert sharded["own_share"] == 0.5
        if case in IN_DDP:
            others.append(rank[case]["ddp"])
            assert others[1]["own_share"] == 1
        for other in others:
            assert relative_error(sharded["grads"], other["grads"]) < bound
            assert relative_error(sharded["figures"], other["figures"]) < max(bound, 1e-6)
            if exact:  # AdamW steers what is tiny in float32 by its noise.
                assert (sharded["parameters"] - other["parameters"]).abs().max() < 1e-10
    assert (alone["parameters"] - flat(start(case).parameters())).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_a_checkpoint_is_read_by_other_numbers_of_workers_and_other_strategies(ranks, folder, case):
    whole_run = train(case)["parameters"]
    one = next((folder / "alone" / case / "checkpoints").iterdir())
    two = next((folder / "fsdp" / case / "checkpoints").iterdir())
    assert (read_snapshot(one).num_files, read_snapshot(two).num_files) == (1, 2)
    sizes = [path.stat().st_size for path in two.glob("*-of-00002.safetensors")]
    largest = max(path.stat().st_size for path in one.glob("optimizer-*"))
    assert len(sizes) == 4 and max(sizes) < 0.7 * largest
    resumed = [resume(two, case), resume(one, case)]
    resumed += [rank[case][f"resumed {strategy}"] for rank in ranks for strategy in ("fsdp", "ddp")]
    for each in resumed:
        assert (each["parameters"] - whole_run).abs().max() < 1e-10


def test_a_checkpoint_that_one_rank_cannot_write_is_published_by_none(ranks, folder):
    for rank in ranks:
        assert "checkpoint of step 1 could not be written" in rank["in vain"]
    assert list((folder / "torn" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_ranks_measure_a_sharded_student_in_passes_of_their_own(ranks, folder, case):
    expected = resume(next((folder / "alone" / case / "checkpoints").iterdir()), case)
    for rank in ranks:
        resumed = rank[case]["resumed fsdp"]
        for mine, other in zip(resumed["logits"], expected["logits"], strict=False):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
        answers = resumed["answers"]
        assert answers == expected["answers"][: len(answers)]
    for name, most in (("answers", 3), ("logits", 1)):
        num_passes = [len(rank[case]["resumed fsdp"][name]) for rank in ranks]
        assert num_passes == [most, min(most, PASSES[case])]


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_a_sharded_student_is_exported_whole(ranks, folder, case):
    loaded = AutoModelForCausalLM.from_pretrained(folder / "student" / case, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    alone = Training(case)
    for number in range(len(SHARES)):
        alone.run(number)
    round_weights(alone.model, torch.bfloat16)
    expected = model_tensors(alone.model)
    assert model_tensors(loaded).keys() == expected.keys()
    for name, tensor in model_tensors(loaded).items():
        torch.testing.assert_close(tensor.to(F64), expected[name], rtol=2**-8, atol=1e-9)
    for rank in ranks:
        assert rank[case]["rounded"]


def export(training, folder, rank):
    """Rank 0 writes the student; whether its weights are those in memory, rounded."""
    round_weights(training.model, torch.bfloat16)
    assert num_classes(training.model, "no tokenizer there") == VOCAB
    state = exported_state(training.model, torch.bfloat16, keep=rank == 0)
    assert bool(state) == (rank == 0)
    if rank == 0:
        settings = ExportSettings("bfloat16", "no folder", SAMPLING)
        save_student(training.model, folder, settings, state)
    parameters = training.parameters()
    return torch.equal(parameters, parameters.bfloat16().to(F64))


def worker_main(rank, folder):
    results = {case: {"fsdp": train(case, "fsdp", rank)} for case in CASES}
    results |= {case: results[case] | {"ddp": train(case, "ddp", rank)} for case in IN_DDP}
    ranks = Ranks(rank, 2)
    for case in ("tied", "untied"):
        training = Training(case, "fsdp", rank)
        training.run(0)
        write_checkpoint(training, folder / "fsdp" / case, ranks)
        for number in range(1, len(SHARES)):
            training.run(number)
        (folder / "student").mkdir(exist_ok=True)
        results[case]["rounded"] = export(training, folder / "student" / case, rank)
        one = next((folder / "alone" / case / "checkpoints").iterdir())
        for strategy in ("fsdp", "ddp"):
            results[case][f"resumed {strategy}"] = resume(one, case, strategy, rank)
    results["in vain"] = write_in_vain(folder, ranks)
    return results
