"""What the sampler is sent of a student with adapters, and when an adapter's folder may go."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from raystill.config.run import RunConfig
from raystill.config.student import LoraConfig
from raystill.model.adapters import served_rank
from raystill.serve.engine.weights import Adapters

ALONE = {"merge_adapters": False}


@dataclass(frozen=True)
class Request:
    """The fields of vLLM's `LoRARequest` that are read."""

    lora_int_id: int
    lora_path: str


def given(adapters: Adapters, number: int, place: Path) -> Path:
    """Another adapter, of version 10 + number, in a folder of its own."""
    folder = place / str(number)
    folder.mkdir()
    adapters.put(Request(number, str(folder)), 10 + number)  # type: ignore[arg-type]
    return folder


def test_a_request_keeps_its_adapter_and_the_folder_goes_with_the_last_of_them(
    tmp_path: Path,
) -> None:
    adapters = Adapters()
    with adapters.used() as (none, _):
        assert none is None
    first = given(adapters, 1, tmp_path)
    early, late = adapters.used(), adapters.used()
    assert early.__enter__()[1] == late.__enter__()[1] == 11
    second = given(adapters, 2, tmp_path)
    with adapters.used() as (adapter, version):
        assert adapter is not None and (adapter.lora_int_id, version) == (2, 12)
    early.__exit__(None, None, None)
    assert first.exists(), "one request still reads it"
    late.__exit__(None, None, None)
    assert not first.exists() and second.exists()
    third = given(adapters, 3, tmp_path)
    assert not second.exists() and third.exists(), "nobody was using the second"


def test_a_request_that_fails_gives_its_adapter_back(tmp_path: Path) -> None:
    adapters = Adapters()
    first = given(adapters, 1, tmp_path)
    with pytest.raises(RuntimeError), adapters.used():
        given(adapters, 2, tmp_path)
        raise RuntimeError("aborted")
    assert not first.exists()


@pytest.mark.parametrize(
    ("lora", "policy", "rank"),
    [
        (None, ALONE, None),
        ({"rank": 5}, ALONE, 8),
        ({"rank": 16}, ALONE, 16),
        ({"rank": 300}, ALONE, 320),
        ({"rank": 513}, ALONE, None),
        ({"rank": 5, "modules_to_save": ["norm"]}, ALONE, None),
        ({"rank": 5}, {}, None),
    ],
)
def test_the_adapter_alone_is_sent_where_vllm_can_take_it(
    lora: dict | None, policy: dict, rank: int | None
) -> None:
    config = RunConfig.model_validate(
        {
            "teacher": {"model": "t"},
            "student": {"layers": [0]},
            "prompts": {"path": "p"},
            "policy": policy,
        }
    )
    adapters = None if lora is None else LoraConfig(**lora)
    student = config.student.model_copy(update={"lora": adapters})
    assert served_rank(config.model_copy(update={"student": student})) == rank
