"""New weights while an answer is being written, on a real engine: who wrote which of its tokens.

Each test is one engine in a process of its own, without Ray. Run as a script this file is that
process (see `told`).
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raystill.config.student import LoraConfig
from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.answers import Answer
from raystill.datasets.rows.signal import Signal
from raystill.datasets.rows.versions import versions_of
from raystill.model.sampling import ResolvedSampling
from raystill.serve.engine.arguments import AdapterLimits, EngineSettings, prepare_process
from raystill.serve.engine.weights import EXTENSION
from raystill.train.student import lora
from raystill.train.student.export import exported_state
from raystill.train.worker.policy import without_ties
from tests.support.end_to_end import ROOT, TEACHER, greedy, load

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

PROMPT = [5, 17, 240, 9]
LONG, SHORT = 96, 12
FOLLOWED = 24
"""Tokens of the long answer after which new weights come."""
TOLERANCE = 1e-3  # nats, float32 against float32


def told(asked: dict[str, Any]) -> dict[str, Any]:
    """What the engine said; see `main`."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(asked)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def logprobs_of(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        log_q = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), dim=1)
    return log_q.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).numpy()


def continued(models: list[Any], versions: list[int]) -> list[int]:
    """Greedy tokens, each by the model of its version, from what the others wrote before."""
    ids = list(PROMPT)
    for version in versions:
        ids += greedy(models[version], ids, 1)
    return ids[len(PROMPT) :]


def test_an_answer_goes_on_with_new_weights_and_says_from_which_token(tmp_path: Path) -> None:
    models, files = [], []
    for version in (0, 1):
        model = load(TEACHER)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.02 * version * noise)
        files.append(str(tmp_path / f"{version}.safetensors"))
        save_file(without_ties(exported_state(model, torch.float32, keep=True)), files[-1])
        models.append(model)
    found = told({"adapters": False, "new": [[0, files[0]], [1, files[1]]]})
    versions = versions_of(tuple(map(tuple, found["long_spans"])), LONG).tolist()
    assert versions == sorted(versions) and set(versions) == {0, 1}
    assert found["long"] == continued(models, versions)
    assert found["short_spans"] == [[0, 1]]
    assert found["short"] == greedy(models[1], PROMPT, SHORT)


def test_an_answer_ends_with_the_adapter_that_it_began_with(tmp_path: Path) -> None:
    model = load(TEACHER)
    lora.inject(model, LoraConfig(rank=5), torch.float32)
    folders, expected, scores = [], [], []
    ids = np.random.default_rng(0).integers(3, 400, 40).tolist()
    for version in (0, 1):
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for tensor in lora.trained_tensors(model).values():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        folder = tmp_path / f"adapter-{version}"
        lora.save_adapter(model, lora.adapter_state(model, True), folder, base="")
        folders.append(str(folder))
        model.eval()
        expected.append(greedy(model, PROMPT, LONG))
        scores.append(logprobs_of(model, ids))
    new = [[3 + version, folder] for version, folder in enumerate(folders)]
    found = told({"adapters": True, "new": new, "ids": ids})
    assert (found["long_spans"], found["long"]) == ([[0, 3]], expected[0])
    assert (found["short_spans"], found["short"]) == ([[0, 4]], expected[1][:SHORT])
    for said, wanted in zip(found["scores"], scores, strict=True):
        assert np.abs(np.array(said) - wanted).max() < TOLERANCE
    assert np.abs(scores[0] - scores[1]).max() > 0.05
    assert found["left"] == [folders[1]], "the folder of the first is of no more use"


async def main(asked: dict[str, Any]) -> dict[str, Any]:
    """A long answer with the first weights, the next ones on its way, and a short one after it."""
    from raystill.serve.engine.vllm import VllmEngine

    teacher = TeacherConfig.model_validate(
        {
            "model": str(TEACHER),
            "dtype": "float32",
            "max_model_len": 160,
            "max_num_seqs": 4,
            "kv_cache_gib": 0.1,
        }
    )
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    limits = AdapterLimits(8, modules, at_a_time=3) if asked["adapters"] else None
    sampling = ResolvedSampling(0.0, 1.0, 0, 0.0, LONG, ())
    engine = VllmEngine(
        EngineSettings(
            teacher, str(TEACHER), sampling, 1, 1, (0,), extension=EXTENSION, adapters=limits
        )
    )
    await engine.start()
    scores = []

    async def take(number: int) -> None:
        version, path = asked["new"][number]
        if asked["adapters"]:
            await engine.take_adapter(number + 1, path, version)
            scores.append(await scored(engine, asked["ids"]))
        else:
            await engine.reload(path, version)

    async def written() -> Answer:
        (answer,) = await engine.sample([np.array(PROMPT, np.int32)], Signal("text"))
        return answer

    await take(0)
    answering = asyncio.ensure_future(written())
    while max(engine._tokens().values(), default=0) < FOLLOWED:
        assert not answering.done(), "the long answer was over before new weights came"
        await asyncio.sleep(0.001)
    await take(1)
    long, short = await answering, await written()
    left = [path for _, path in asked["new"] if asked["adapters"] and os.path.exists(path)]
    return {
        "long": long.response_ids.tolist(),
        "long_spans": long.spans,
        "short": short.response_ids[:SHORT].tolist(),
        "short_spans": short.spans,
        "scores": scores,
        "left": left,
    }


async def scored(engine: Any, ids: list[int]) -> list[float]:
    """The logprob of each id but the first."""
    given = np.array(ids, np.int32)
    (answer,) = await engine.score([given[:1]], [given[1:]], Signal("sampled"))
    return [float(value) for value in answer.sampled_logprobs]


if __name__ == "__main__":
    prepare_process((0,))
    found = asyncio.run(main(json.loads(sys.argv[1])))
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)
