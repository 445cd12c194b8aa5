"""Attention from one token by two matrix products is that of PyTorch's kernel, in every family."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raystill.model.sampling import ResolvedSampling
from raystill.train.evaluation import free_running, one_query
from raystill.train.evaluation.free_running import FreeRunning, generate
from raystill.train.evaluation.one_query import attend_from_one, quick_writing
from raystill.train.student.sharding import place_student
from tests.support.tiny_student import training_config
from tests.train.test_family_table import FAMILIES, teacher_of
from tests.train.test_texts import prompts

CPU = torch.device("cpu")
GREEDY = FreeRunning(9, 8, ResolvedSampling(0.0, 1.0, 0, 0.0, 8, (2,)), 0, rows_per_batch=4)
ROWS, KEYS, SIZE = 3, 7, 8


def masks(heads: int) -> dict[str, torch.Tensor | None]:
    seen = torch.rand(ROWS, 1, 1, KEYS) < 0.6
    seen[..., -1] = True
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {
        "none": None,
        "bool": seen,
        "one for all rows": seen[:1],
        "added": added,
        "infinite": added.masked_fill(~seen, -torch.inf),
        "by head": torch.randn(ROWS, heads, 1, KEYS),
    }


@pytest.mark.parametrize("mask", masks(1))
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("scaling", [None, 0.3])
@torch.no_grad()
def test_one_query_attends_as_it_does_in_sdpa(
    mask: str, heads: int, groups: int, queries: int, scaling: float | None
) -> None:
    torch.manual_seed(0)
    module: Any = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    query = torch.randn(ROWS, heads, queries, SIZE)
    key, value = torch.randn(ROWS, groups, KEYS, SIZE), torch.randn(ROWS, groups, KEYS, SIZE + 1)
    given = query, key, value, masks(heads)[mask]
    wanted, _ = sdpa_attention_forward(module, *given, scaling=scaling)
    found, _ = attend_from_one(module, *given, scaling=scaling)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    half = (query.bfloat16(), key.bfloat16(), value.bfloat16())
    seen = given[3] if mask in ("none", "bool", "one for all rows") else None
    found, _ = attend_from_one(module, *half, seen, scaling=scaling)
    exact, _ = attend_from_one(module, *(part.float() for part in half), seen, scaling=scaling)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("family", [f for f in FAMILIES if "vision" not in f])
def test_a_family_writes_what_it_does_with_its_own_kernel(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = teacher_of(family).eval()
    given = [np.asarray(ids, np.int32) for ids in prompts(9)]
    asked: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[1].shape[2])
        return attend_from_one(*args, **kwargs)

    with monkeypatch.context() as counting:
        counting.setattr(one_query, "attend_from_one", counted)
        written = generate(model, given, GREEDY, CPU)
    monkeypatch.setattr(free_running, "quick_writing", lambda device: nullcontext())
    assert generate(model, given, GREEDY, CPU) == written
    uses = model.config._attn_implementation == "sdpa"
    assert (asked.count(1) > 0) is uses, "the kernel was used where the model has SDPA"


def test_a_student_that_trains_row_by_row_writes_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    student = place_student(teacher_of("Llama"), training_config(), CPU, 1)
    assert student.shared
    given = [np.asarray(ids, np.int32) for ids in prompts(9)]
    asked: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[1].shape[2])
        return attend_from_one(*args, **kwargs)

    monkeypatch.setattr(one_query, "attend_from_one", counted)
    written = generate(student.model, given, GREEDY, CPU)
    assert asked.count(1) > 0 and student.shared
    plain = place_student(student.model, training_config(attention="sdpa"), CPU, 1)
    assert generate(plain.model, given, GREEDY, CPU) == written


def test_sdpa_is_transformers_own_again_however_the_writing_ends() -> None:
    with quick_writing(CPU):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend_from_one
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    with pytest.raises(RuntimeError, match="oh"), quick_writing(CPU):
        raise RuntimeError("oh")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    with quick_writing(torch.device("cuda")):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
