"""The files that the sampler is sent: loaded by plain libraries they are the trained student."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raystill.config.run import RunConfig
from raystill.config.student import LoraConfig
from raystill.model.sampling import ResolvedSampling
from raystill.train.evaluation.measure import LocalStudent
from raystill.train.step.ranks import Ranks
from raystill.train.student import lora
from raystill.train.student.module import StudentModule
from raystill.train.worker.policy import PolicyPublisher
from tests.support.tiny_student import VOCAB, parallel, tiny_module
from tests.support.workers import run_workers

IDS = torch.arange(4, 30)[None]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
WEIGHTS = "model.safetensors"
# name: (student.lora, policy.merge_adapters, whether the adapter is sent alone)
CASES = {
    "no adapters": (None, False, False),
    "adapters": ({"rank": 5}, False, True),
    "merged on request": ({"rank": 5}, True, False),
    "a norm trained whole": ({"rank": 5, "modules_to_save": ["norm"]}, False, False),
}


def student_of(case: str, strategy: str = "alone") -> tuple[RunConfig, StudentModule]:
    """A student whose adapters change what it says, and its run."""
    adapters, merged, _ = CASES[case]
    student = {"layers": [0]} | ({"lora": adapters} if adapters else {})
    config = RunConfig.model_validate(
        {
            "teacher": {"model": "t"},
            "student": student,
            "prompts": {"path": "p"},
            "policy": {"student_share": 1, "merge_adapters": merged, "dtype": "float32"},
            "stream": {"order": "fixed"},
        }
    )
    module = tiny_module()
    if adapters:
        lora.inject(module.model, LoraConfig(**adapters), torch.float32)
        generator = torch.Generator().manual_seed(5)
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(0.05 * noise)
    if strategy != "alone":
        parallel(module, strategy)
    return config, module


def sent(case, folder, strategy="alone", ranks=None):
    """The files of a first version and of a later one; a publisher without Ray."""
    config, module = student_of(case, strategy)
    sampling = ResolvedSampling(1.0, 1.0, 0, 0.0, 8, (2,))
    ranks = ranks or Ranks()
    student = LocalStudent(module, VOCAB, torch.device("cpu"), ranks, str(folder), sampling)
    run = SimpleNamespace(config=config, coordinator=None)
    publisher = PolicyPublisher(run, student, sampling)
    return publisher.files(restored=True), publisher.files(restored=False)


def loaded(files, folder):
    """The model in these files, by transformers and PEFT."""
    for name, content in files.items():
        part = folder / ("adapter" if name in ADAPTER else "base")
        part.mkdir(exist_ok=True)
        content.tofile(part / name)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if (folder / "adapter").exists():
        model = PeftModel.from_pretrained(model, folder / "adapter")
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_what_is_sent_is_the_student_that_is_trained(tmp_path, case):
    alone = CASES[case][2]
    (changed, same), (later, nothing) = sent(case, tmp_path)
    assert changed.keys() == later.keys() == (ADAPTER if alone else {WEIGHTS})
    assert (WEIGHTS in same) == alone and "config.json" in same and nothing == {}
    assert all((changed[name] == later[name]).all() for name in changed)
    expected = student_of(case)[1].model.eval()(IDS).logits
    found = loaded(same | changed, tmp_path)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if CASES[case][0]:
        plain = tiny_module().model.eval()(IDS).logits
        assert (plain - expected).abs().max() > 2e-3, "the adapter has to matter"


def worker_main(rank, folder):
    place = folder / str(rank)
    place.mkdir()
    (changed, same), _ = sent("adapters", place, "fsdp", Ranks(rank, 2))
    return {n: torch.from_numpy(content) for n, content in (same | changed).items()}


def test_two_workers_with_shards_send_it_once(tmp_path):
    first, second = run_workers(worker_main, tmp_path)
    assert second == {}
    files = {name: content.numpy() for name, content in first.items()}
    expected = student_of("adapters")[1].model.eval()(IDS).logits
    found = loaded(files, tmp_path)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
