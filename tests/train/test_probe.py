"""The served teacher against the plain model: they agree, or the figures say that they do not."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raystill.base.errors import RunError
from raystill.base.run_folder import PROBE, RunFolder
from raystill.config.run import RunConfig
from raystill.train.batch.rows import Row
from raystill.train.evaluation.agreement import Agreement, agreement, disagreements
from raystill.train.evaluation.probe import is_due
from raystill.train.worker import worker
from tests.support.end_to_end import TEACHER as TINY_TEACHER
from tests.support.runs import run_of

TOP_K, VOCAB = 8, 49_152


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_TEACHER, dtype=torch.float32)


def served(model, changed=lambda logits: logits, shift=0):
    """Rows as a server of this model would give them, after what it does to its logits."""
    rows = []
    for number, (prompt_size, size) in enumerate([(5, 9), (3, 1), (7, 4)]):
        ids = torch.randint(
            3, 4000, (prompt_size + size,), generator=torch.Generator().manual_seed(number)
        )
        with torch.no_grad():
            logits = changed(model(ids[None]).logits[0].double())
        logprobs = logits.log_softmax(dim=-1)[prompt_size - 1 - shift : len(ids) - 1 - shift]
        best = logprobs.topk(TOP_K)
        response = ids[prompt_size:]
        tail = torch.log(-torch.expm1(torch.logsumexp(best.values, dim=1)))
        rows.append(
            Row(
                number,
                number,
                ids[:prompt_size].numpy().astype(np.int32),
                response.numpy().astype(np.int32),
                "length",
                logprobs.gather(1, response[:, None])[:, 0].numpy().astype(np.float32),
                best.indices.numpy().astype(np.int32),
                best.values.numpy().astype(np.float32),
                tail.numpy().astype(np.float32),
            )
        )
    return rows


def test_a_server_that_runs_the_model_as_it_is_agrees(model) -> None:
    found = agreement(model, served(model), VOCAB)
    assert found.tokens == 14
    assert found.drawn_max < 1e-4 and found.topk_max < 1e-4 and found.self_distillation < 1e-6
    assert disagreements(found, "float32", quantised=False) == []


@pytest.mark.parametrize(
    ("changed", "shift"),
    [(lambda z: z / 0.7, 0), (lambda z: z, 1), (lambda z: z.roll(1, dims=-1), 0)],
    ids=["its temperature applied", "a token late", "ids off by one"],
)
def test_a_server_that_does_something_else_is_told_with_figures(model, changed, shift) -> None:
    wrong = disagreements(agreement(model, served(model, changed, shift), VOCAB), "float32", False)
    assert any("drawn token's logprob" in line and "expected at most" in line for line in wrong)


def test_the_allowance_goes_by_the_engines_precision_and_nan_never_passes() -> None:
    of_bfloat16 = Agreement(100, 0.07, 0.5, 0.8, 0.003)
    assert disagreements(of_bfloat16, "bfloat16", False) == []
    assert len(disagreements(of_bfloat16, "float32", False)) == 4
    assert disagreements(Agreement(100, 0.3, 4.0, 6.0, 0.1), "bfloat16", True) == []
    assert disagreements(Agreement(1, float("nan"), 0, 0, 0), "bfloat16", True)


def test_rows_without_a_token_are_refused(model) -> None:
    with pytest.raises(ValueError, match="no response token to compare"):
        agreement(model, [], VOCAB)


def test_a_probe_is_due_once_for_a_run_with_held_out_rows_and_a_real_engine(tmp_path: Path) -> None:
    def config(engine: str = "vllm", held_out: int = 4) -> RunConfig:
        return RunConfig.model_validate(
            {
                "teacher": {"model": str(TINY_TEACHER), "engine": engine},
                "student": {"init": "from_teacher", "layer_stride": 2},
                "prompts": {"path": "prompts.jsonl"},
                "evaluation": {"held_out_rows": held_out},
            }
        )

    folder, teacher = RunFolder(str(tmp_path)), str(TINY_TEACHER)
    assert is_due(run_of(config(), folder, teacher))
    assert not is_due(run_of(config("synthetic"), folder, teacher))
    assert not is_due(run_of(config(held_out=0), folder, teacher))
    # No weights here: each node fetches its own.
    assert not is_due(run_of(config(), folder, str(tmp_path)))
    folder.write_text(PROBE, "{}")
    assert not is_due(run_of(config(), folder, teacher))


def test_no_checkpoint_is_begun_before_the_teacher_is_found_sound(monkeypatch) -> None:
    """What was learned from a teacher that is not what it should be is nowhere stored."""
    told: list[str] = []

    class Coordinator:
        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *_: name)

    def wait(name: str) -> list[int]:
        told.append(name)
        if len(told) == 1:
            raise RunError("the served teacher disagrees")
        return []

    monkeypatch.setattr(worker.ray, "get", wait)
    monkeypatch.setattr(worker.ckpt, "random_state", lambda _: None)
    monkeypatch.setattr(worker.ckpt, "Part", SimpleNamespace(copied=lambda *_: "part"))
    one = SimpleNamespace(
        checkpointer=SimpleNamespace(last_step=0, begin=lambda *_: told.append("begun")),
        progress=SimpleNamespace(step=3, hand_over=dict),
        coordinator=Coordinator(),
        device="cpu",
        ranks=SimpleNamespace(gather=lambda _: None),
        student=SimpleNamespace(model=None),
        optimizer=None,
        _take_before=lambda *, wait: told.append("untrained measured") if not wait else None,
    )
    with pytest.raises(RunError, match="disagrees"):
        worker.Worker.checkpoint(one)
    assert told == ["wait_may_save"]
    worker.Worker.checkpoint(one)
    assert told == ["wait_may_save", "wait_may_save", "begun"]
