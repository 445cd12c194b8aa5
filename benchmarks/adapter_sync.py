"""What a sampler gets of a student with adapters at each version: merged weights, or the adapter.

    python -m benchmarks.adapter_sync [MODEL] [--rank 16] [--dtype float32] [--cores 0]

Both ways in alternating turns, each with one engine in a process of its own: the files that rank 0
publishes (`PolicyPublisher`), their bytes, the seconds to make them, the seconds in which the
engine takes them, the logprobs of 48 ids held against the student's own, and tokens a second of the
answers that are written then. Ray's object store is left out: it copies the bytes.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.results import machine, write_result
from raystill.config.run import RunConfig
from raystill.config.teacher import TeacherConfig
from raystill.datasets.rows.signal import Signal
from raystill.model.adapters import ADAPTER_SETTINGS, adapted_modules
from raystill.model.files import WEIGHTS_FILE
from raystill.model.sampling import ResolvedSampling
from raystill.serve.engine.arguments import AdapterLimits, EngineSettings, prepare_process
from raystill.serve.engine.weights import EXTENSION
from raystill.train.evaluation.measure import LocalStudent
from raystill.train.step.ranks import Ranks
from raystill.train.student import lora
from raystill.train.student.module import StudentModule
from raystill.train.worker.policy import PolicyPublisher

WAYS = ("merged", "adapter")
VERSIONS = 4
"""The first is left out of the means: the engine's first answers are slower."""
NUM_PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 32, 40, 48


def publisher_of(given: argparse.Namespace, way: str) -> PolicyPublisher:
    """The publisher of an untrained student with adapters, without a run."""
    config = RunConfig.model_validate(
        {
            "teacher": {"model": given.model},
            "student": {"init": "model", "model": given.model, "lora": {"rank": given.rank}},
            "prompts": {"path": "-"},
            "policy": {
                "student_share": 1,
                "merge_adapters": way == "merged",
                "dtype": given.dtype,
            },
        }
    )
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    assert config.student.lora is not None
    lora.inject(model, config.student.lora, torch.float32)
    sampling = ResolvedSampling(1.0, 1.0, 0, 0.0, MAX_TOKENS, ())
    vocab, cpu = model.config.vocab_size, torch.device("cpu")
    student = LocalStudent(StudentModule(model), vocab, cpu, Ranks(), given.model, sampling)
    run: Any = SimpleNamespace(config=config, coordinator=None)
    return PolicyPublisher(run, student, sampling)


def change(publisher: PolicyPublisher, seed: int) -> None:
    """Another version of the adapters, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in publisher._student.module.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))


async def one_way(given: argparse.Namespace, way: str) -> list[dict[str, float]]:
    """Figures of each version, with one engine throughout."""
    from raystill.serve.engine.vllm import VllmEngine

    publisher, cores = publisher_of(given, way), tuple(given.cores)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        place = Path(name)
        changed, same = publisher.files(restored=True)
        for file, content in (same if way == "adapter" else same | changed).items():
            content.tofile(place / file)
        limits = None
        if way == "adapter":
            modules = adapted_modules(bytes(changed[ADAPTER_SETTINGS]))
            limits = AdapterLimits(max(8, given.rank), modules, at_a_time=6)
        teacher = TeacherConfig(
            model=name, dtype=given.dtype, max_model_len=256, max_num_seqs=32, kv_cache_gib=0.5
        )
        sampling = publisher._settings.sampling
        engine = VllmEngine(
            EngineSettings(
                teacher, name, sampling, 1, 1, cores, extension=EXTENSION, adapters=limits
            )
        )
        await engine.start()
        found = []
        for version in range(1, VERSIONS + 1):
            change(publisher, version)
            found.append(await one_version(engine, publisher, place, way, version))
        engine.close()
    return found


async def one_version(
    engine: Any, publisher: PolicyPublisher, place: Path, way: str, version: int
) -> dict[str, float]:
    """Make, write and take a version; prove it; write answers with it."""
    began = time.monotonic()
    files, _ = publisher.files(restored=False)
    made_s = time.monotonic() - began
    began = time.monotonic()
    folder = place / f"version-{version}" if way == "adapter" else place
    folder.mkdir(exist_ok=True)
    for file, content in files.items():
        content.tofile(folder / file)
    if way == "adapter":
        await engine.take_adapter(version, str(folder), version)
    else:
        await engine.reload(str(folder / WEIGHTS_FILE), version)
    taken_s = time.monotonic() - began
    probe = publisher._probe
    (answer,) = await engine.score([probe[:1]], [probe[1:]], Signal("sampled"))
    gap = float(np.abs(answer.sampled_logprobs - publisher._probe_logprobs()).mean())
    generator = np.random.default_rng(version)
    prompts = [
        generator.integers(100, 40_000, PROMPT_TOKENS).astype(np.int32) for _ in range(NUM_PROMPTS)
    ]
    began = time.monotonic()
    answers = await engine.sample(prompts, Signal("text"))
    seconds = time.monotonic() - began
    return {
        "bytes": sum(content.nbytes for content in files.values()),
        "made_s": made_s,
        "taken_s": taken_s,
        "gap_nats": gap,
        "tokens_per_s": sum(len(one.response_ids) for one in answers) / seconds,
    }


def mean_of(runs: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Means over all versions but each engine's first, and the range of the rate."""
    kept = [version for run in runs for version in run[1:]]
    rates = [version["tokens_per_s"] for version in kept]
    means = {name: float(np.mean([version[name] for version in kept])) for name in kept[0]}
    return {**means, "tokens_per_s_range": [min(rates), max(rates)]}


def main() -> None:
    """Both ways, so many turns; or one turn of one way, whose figures are printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--cores", type=int, nargs="+", default=[0])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/adapter_sync.json"))
    given = parser.parse_args()
    if given.way:
        prepare_process(tuple(given.cores))
        torch.set_num_threads(len(given.cores))
        print("\n" + json.dumps(asyncio.run(one_way(given, given.way))), flush=True)
        os._exit(0)
    runs: dict[str, list[list[dict[str, float]]]] = {way: [] for way in WAYS}
    for _ in range(given.turns):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.adapter_sync", *sys.argv[1:], "--way", way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    means = {way: mean_of(found) for way, found in runs.items()}
    print(json.dumps(means, indent=2))
    settings = {"model": given.model, "rank": given.rank, "dtype": given.dtype}
    write_result(given.output, {"machine": machine(), **settings, "means": means, "runs": runs})


if __name__ == "__main__":
    main()
