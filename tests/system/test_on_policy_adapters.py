"""A student with adapters writes half of a run on real vLLM, which is stopped and resumed.

Two workers share it (FSDP). Its sampler gets the frozen weights once and then the adapter of each
step alone. What reaches it is compared with ``transformers`` in tests/serve/test_sampler.py.
"""

import signal

import pytest
import torch

from tests.support.end_to_end import RunFiles, load
from tests.support.on_policy import (
    DEADLINE_S,
    NUM_STEPS,
    STALENESS,
    finish,
    oldest_age,
    proofs,
    require_trained_once_and_paid_once,
    write_run_file,
)
from tests.support.synthetic_run import started, wait_for_step

pytestmark = [pytest.mark.vllm, pytest.mark.faults, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """The finished run, which was stopped after two steps and asked for once more."""
    place = tmp_path_factory.mktemp("adapters")
    lora = {"rank": 4, "alpha": 16}
    run_file = write_run_file(
        place,
        student={"lora": lora},
        policy={"merge_adapters": False},
        training={
            "learning_rate": 1e-2,
            "export_dtype": "float32",
            "num_workers": 2,
            "cpus_per_worker": 0.5,
            "strategy": "fsdp",
        },
    )
    files = RunFiles(place / "run")
    with started(run_file) as process:
        wait_for_step(process, files, 2, deadline_s=DEADLINE_S)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, stdout + stderr
    assert len(files.steps()) < NUM_STEPS
    finish(run_file)
    return files


def test_each_row_was_trained_once_and_nothing_was_paid_twice(adapted: RunFiles) -> None:
    require_trained_once_and_paid_once(adapted)
    assert oldest_age(adapted) <= STALENESS


def test_the_sampler_had_the_adapter_of_each_step(adapted: RunFiles) -> None:
    told = proofs(adapted)
    assert {version for version, _ in told} >= set(range(NUM_STEPS - 1))
    assert all(gap <= 1e-3 for _, gap in told)


def test_the_student_learned(adapted: RunFiles) -> None:
    before, *_, after = adapted.lines("evaluation.jsonl")
    assert after["kl_nats_per_token"] < before["kl_nats_per_token"]


def test_the_adapter_on_its_base_is_the_merged_student(adapted: RunFiles) -> None:
    from peft import PeftModel

    ids = torch.arange(5, 45)[None]
    base = load(adapted.folder / "base")
    with torch.no_grad():
        plain = base(ids).logits
        merged = load(adapted.folder / "student")(ids).logits
        model = PeftModel.from_pretrained(base, adapted.folder / "adapter").eval()
        most = 1e-5 * float(merged.abs().max())
    torch.testing.assert_close(model(ids).logits, merged, atol=most, rtol=0)
    assert (merged - plain).abs().max() > 1e-3, "the adapter has to matter"
