"""vLLM serves a student with adapters both ways: merged as a model, and base with its adapter.

Run as a script this file is one engine in a process of its own (see `served`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raystill.base.run_folder import RunFolder
from raystill.config.student import LoraConfig
from raystill.train.student import lora
from raystill.train.student.export import Base, ExportSettings, export_adapter, export_student
from tests.support.end_to_end import ROOT, TEACHER

pytestmark = [pytest.mark.vllm, pytest.mark.faults]

ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
LOGPROB_TOLERANCE = 1e-3  # nats, float32 against float32


class Sampling:
    temperature, top_p, top_k, min_p, stop_token_ids = 1.0, 1.0, 0, 0.0, (2,)


def served(asked: dict[str, Any]) -> list[list[float]]:
    """What vLLM says of each token of ``ids`` but the first: of the base plainly and with each of
    the adapters, then of the merged model.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(asked)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def logprobs_of(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0, :-1].double()
    log_q = torch.log_softmax(logits, dim=1)
    return log_q.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).numpy()


def test_vllm_serves_the_merged_model_and_the_adapter_beside_its_base(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    plain_model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    lora.inject(model, LoraConfig(rank=8), torch.float32)
    ids = np.random.default_rng(0).integers(3, 400, 40).tolist()
    settings, runs, expected = ExportSettings("float32", str(TEACHER), Sampling()), [], []
    for version in (1, 2):  # Two versions of one adapter, each in a folder of its own.
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in lora.trained_tensors(model).values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        runs.append(RunFolder(str(tmp_path / str(version))).ensure())
        export_adapter(model, runs[-1], settings, Base(None))
        expected.append(logprobs_of(model, ids))
    lora.merge(model)
    export_student(model, runs[1], settings)

    folders = {
        "base": str(tmp_path / "1" / "base"),
        "adapters": [str(tmp_path / str(version) / "adapter") for version in (1, 2)],
        "merged": str(tmp_path / "2" / "student"),
    }
    plain, first, second, merged = map(np.array, served(folders | {"ids": ids}))
    assert np.abs(plain - logprobs_of(plain_model, ids)).max() < LOGPROB_TOLERANCE
    assert np.abs(first - expected[0]).max() < LOGPROB_TOLERANCE
    assert np.abs(second - expected[1]).max() < LOGPROB_TOLERANCE
    assert np.abs(merged - expected[1]).max() < LOGPROB_TOLERANCE
    assert np.abs(plain - second).max() > 0.05 and np.abs(first - second).max() > 0.05


def main(asked: dict[str, Any]) -> None:
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    ids, adapters = asked["ids"], asked["adapters"]
    requests = [LoRARequest(f"version-{i}", i, path) for i, path in enumerate(adapters, start=1)]

    def told(folder: str, adapters: list[Any], **more: Any) -> list[list[float]]:
        engine = LLM(folder, dtype="float32", max_model_len=128, max_num_seqs=2, **ENGINE, **more)
        found = []
        for adapter in adapters:
            parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
            (output,) = engine.generate(
                {"prompt_token_ids": ids}, parameters, lora_request=adapter, use_tqdm=False
            )
            said = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            found.append([each[token].logprob for token, each in said])
        return found

    limits = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    found = told(asked["base"], [None, *requests], **limits)
    found += told(asked["merged"], [None])
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
