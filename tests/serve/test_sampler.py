"""The student's sampler on real vLLM: each version of the weights reaches it, and it says so.

It is placed by Serve as in a run and pulls what `PolicyPublisher` publishes, whole weights or the
adapter alone; what it then writes is compared with what ``transformers`` writes with the same.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
import yaml
from ray import serve
from ray.exceptions import RayActorError

from raystill.base.run_folder import RunFolder
from raystill.cluster.coordinator.actor import start_coordinator
from raystill.config.run import RunConfig
from raystill.datasets.rows.schema import AT_LEAST
from raystill.datasets.rows.signal import Signal
from raystill.datasets.rows.versions import split_reason
from raystill.model.identity import teacher_identity
from raystill.model.on_node import ModelSource
from raystill.model.sampling import resolve_sampling
from raystill.run import Run
from raystill.serve.sampler_app import SamplerApp
from raystill.train.evaluation.measure import LocalStudent
from raystill.train.step.ranks import Ranks
from raystill.train.student import lora
from raystill.train.student.build import build_student, num_classes
from raystill.train.student.module import StudentModule
from raystill.train.worker.policy import PolicyPublisher

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "models" / "tiny-teacher"
PROMPTS = [[5, 17, 240, 9], [1033, 8], [77, 78, 79, 80, 81, 82]]
MAX_TOKENS = 12
WEIGHTS = re.compile(r"weights of step (\d+): (\S+) nats from the student's")
ENGINE_PID = re.compile(r"EngineCore pid=(\d+)")
PATIENCE_S = 600


def wait_until(holds: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {PATIENCE_S} s: {what}")


@dataclass
class Followed:
    """A student that is trained by nobody, its publisher, and the sampler that follows it."""

    run: Run
    student: Any
    publisher: PolicyPublisher
    change: float

    def change_weights(self, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.student.parameters():
                if parameter.requires_grad:
                    parameter.add_(self.change * torch.randn_like(parameter))

    def publish(self, version: int) -> None:
        self.publisher.publish(version)
        wait_until(lambda: version in dict(self.proofs()), f"version {version} arrives")

    def sent(self) -> set[str]:
        """The names of the files that were sent last."""
        newest = ray.get(self.run.coordinator.newer_policy.remote(0))
        return set(ray.get(newest["weights"][0]))

    def log(self, number: int = 0) -> str:
        return (self.run.folder.logs / f"sampler-{number}.log").read_text()

    def proofs(self, number: int = 0) -> list[tuple[int, float]]:
        """Version and difference (nats) of each proof of a replica, in order."""
        return [(int(version), float(gap)) for version, gap in WEIGHTS.findall(self.log(number))]

    def ask(self, at_least: int | None = None) -> Any:
        """Serve's response to come."""
        columns = {"prompt_ids": pa.array(PROMPTS, pa.list_(pa.int32()))}
        if at_least is not None:
            columns[AT_LEAST] = pa.array([at_least] * len(PROMPTS), pa.int64())
        handle = serve.get_app_handle(self.run.sampler_app)
        return handle.sample.remote(pa.table(columns), Signal("text"))

    def write(self, asked: Any = None) -> tuple[int, list[list[int]]]:
        """The version that answers, and its responses."""
        table = (asked or self.ask()).result(timeout_s=PATIENCE_S)
        if errors := table["error"].drop_null().to_pylist():  # Of an engine that has died.
            raise RuntimeError(f"rows without an answer: {errors}")
        spans = [split_reason(reason)[1] for reason in table["finish_reason"].to_pylist()]
        ((version,),) = {tuple(version for _, version in each) for each in spans}
        return version, table["response_ids"].to_pylist()

    @torch.no_grad()
    def greedy(self) -> list[list[int]]:
        """What transformers writes with the student's weights."""
        answers = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            for _ in range(MAX_TOKENS):
                logits = self.student(input_ids=ids, use_cache=False).logits[0, -1]
                ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
            answers.append(ids[0, len(prompt) :].tolist())
        return answers


SENT = {
    "whole weights": {"model.safetensors"},
    "adapters": {"adapter_model.safetensors", "adapter_config.json"},
    "merged adapters": {"model.safetensors"},
}


@pytest.fixture(
    scope="module",
    params=[*list(SENT)[:2], pytest.param("merged adapters", marks=pytest.mark.faults)],
)
def followed(
    ray_serve: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Followed]:
    with following(request.param, tmp_path_factory.mktemp("sampler")) as one:
        yield one


@contextmanager
def following(kind: str, place: Path, num_replicas: Any = 1) -> Iterator[Followed]:
    """A student of one of the kinds in SENT, and its sampler."""
    adapters = "adapters" in kind
    written = yaml.safe_load((ROOT / "configs" / "on_policy.yaml").read_text())
    written["teacher"] |= {"model": str(TEACHER), "max_num_seqs": 4}
    written["policy"] |= {"max_tokens": MAX_TOKENS, "sampling": {"temperature": 0.0}}
    written["policy"] |= {"merge_adapters": kind != "adapters"}
    written["policy"] |= {"num_replicas": num_replicas}
    if adapters:
        written["student"]["lora"] = {"rank": 5, "alpha": 20}
    config = RunConfig.model_validate(written)
    folder = RunFolder(str(place / "run")).ensure()
    folder.logs.mkdir(exist_ok=True)
    run = Run(
        config=config,
        folder=folder,
        id=f"{kind.replace(' ', '-')}-{config.policy.min_replicas}-{config.policy.max_replicas}",
        teacher=ModelSource.of(str(TEACHER), TEACHER),
        teacher_identity=teacher_identity(str(TEACHER)),
        store_path=str(folder.logs / "store"),
        num_rows=8,
        coordinator=start_coordinator(f"{kind}-{config.policy.max_replicas}", 8, 8, 0.0),
    )
    model = build_student(config, str(TEACHER), seed=0).float()
    lora.attach(model, config, torch.device("cpu"))
    # No answer ends before its last token, so that all can be compared.
    sampling = replace(resolve_sampling(config.teacher, TEACHER), stop_token_ids=())
    module = StudentModule(model)
    student = LocalStudent(
        module,
        num_classes(model, str(TEACHER)),
        torch.device("cpu"),
        Ranks(),
        str(TEACHER),
        sampling,
    )
    publisher = PolicyPublisher(run, student, sampling)
    publisher.publish(0, restored=True)
    app = SamplerApp(run)
    app.deploy()
    app.wait()
    yield Followed(run, module.model, publisher, change=0.1 if adapters else 0.02)
    app.end()
    ray.kill(run.coordinator)


def test_it_writes_what_the_student_of_each_version_would(
    followed: Followed, request: pytest.FixtureRequest
) -> None:
    before = followed.write()
    assert before == (0, followed.greedy())
    for version in (1, 2):
        followed.change_weights(seed=version)
        followed.publish(version)
        assert followed.write() == (version, followed.greedy())
    assert followed.greedy() != before[1], "the weights have to matter"
    assert followed.sent() == SENT[request.node.callspec.params["followed"]]
    assert [version for version, _ in followed.proofs()] == [0, 1, 2]
    assert all(gap <= 1e-3 for _, gap in followed.proofs())


def test_a_killed_engine_begins_again_with_the_newest_weights(followed: Followed) -> None:
    pid = int(ENGINE_PID.findall(followed.log())[-1])
    os.kill(pid, signal.SIGKILL)
    followed.change_weights(seed=3)
    followed.publisher.publish(3)

    def answer() -> Any:
        try:
            return followed.write()
        except (RayActorError, RuntimeError):  # Serve has no replica until the next one is ready.
            return None

    found = wait_until(lambda: (a := answer()) and a[0] == 3 and a, "another engine answers")
    assert found == (3, followed.greedy())
    assert len(set(ENGINE_PID.findall(followed.log()))) == 2
    text = followed.log()
    first = WEIGHTS.search(text[text.rindex("EngineCore pid=") :])
    assert first is not None and int(first[1]) == 3, "it began with weights that are not the newest"


def test_weights_that_are_not_the_students_stop_the_run(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = followed.publisher._probe_logprobs()
    followed.change_weights(seed=4)
    monkeypatch.setattr(followed.publisher, "_probe_logprobs", lambda: told)  # Those of version 3.
    followed.publish(4)
    error = wait_until(
        lambda: ray.get(followed.run.coordinator.snapshot.remote()).error, "the run is told"
    )
    assert "does not follow the student: with the weights of step 4" in error
    assert "policy.max_logprob_gap" in error


@pytest.fixture(scope="module")
def pair(ray_serve: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    with following("whole weights", tmp_path_factory.mktemp("pair"), num_replicas=2) as two:
        yield two


@pytest.mark.faults
def test_two_replicas_follow_and_one_that_dies_in_an_update_begins_with_the_newest(
    pair: Followed,
) -> None:
    pair.change_weights(seed=11)
    killed = int(ENGINE_PID.findall(pair.log(1))[-1])
    pair.publisher.publish(1)
    os.kill(killed, signal.SIGKILL)  # While it loads them, or just before or after.
    pair.change_weights(seed=12)
    pair.publisher.publish(2)
    for number in (0, 1):
        wait_until(
            lambda number=number: 2 in dict(pair.proofs(number)), f"replica {number} has version 2"
        )
    log = pair.log(1)
    assert len(set(ENGINE_PID.findall(log))) == 2
    reborn = WEIGHTS.search(log[log.rindex("EngineCore pid=") :])
    assert reborn is not None and int(reborn[1]) == 2
    assert all(gap <= 1e-3 for number in (0, 1) for _, gap in pair.proofs(number))
    asked = [pair.ask(at_least=2) for _ in range(12)]
    assert [pair.write(one) for one in asked] == [(2, pair.greedy())] * len(asked)


def test_a_replica_waits_for_weights_that_another_was_the_first_to_have(pair: Followed) -> None:
    asked = [pair.ask(at_least=3) for _ in range(4)]
    before = pair.write(pair.ask(at_least=0))
    assert before[0] < 3, "who needs no newer ones is not held up"
    pair.change_weights(seed=13)
    pair.publisher.publish(3)
    assert [pair.write(one) for one in asked] == [(3, pair.greedy())] * len(asked)


@pytest.mark.faults
def test_a_replica_that_serve_adds_has_the_newest_adapter_and_leaves_when_it_is_idle(
    ray_serve: None, tmp_path: Path
) -> None:
    """Questions that wait for weights to come are in flight meanwhile: more than one replica's."""
    bounds = {"min": 1, "max": 2, "upscale_delay_s": 0.5, "downscale_delay_s": 5.0}
    with following("adapters", tmp_path, num_replicas=bounds) as grown:
        grown.change_weights(seed=21)
        grown.publish(1)
        assert not (grown.run.folder.logs / "sampler-1.log").exists()
        asked = [grown.ask(at_least=2) for _ in range(6)]
        added = grown.run.folder.logs / "sampler-1.log"
        wait_until(lambda: added.exists() and grown.proofs(1), "a second replica is ready")
        assert grown.proofs(1)[0][0] == 1, "it began with weights that are not the newest"
        grown.change_weights(seed=22)
        grown.publish(2)
        assert [grown.write(one) for one in asked] == [(2, grown.greedy())] * len(asked)
        asked = [grown.ask(at_least=2) for _ in range(12)]
        assert [grown.write(one) for one in asked] == [(2, grown.greedy())] * len(asked)
        assert all(gap <= 1e-3 for number in (0, 1) for _, gap in grown.proofs(number))
        wait_until(lambda: replicas_of(grown.run) == {"RUNNING": 1}, "one of them leaves")
        grown.change_weights(seed=23)
        grown.publisher.publish(3)
        assert grown.write(grown.ask(at_least=3)) == (3, grown.greedy())


def replicas_of(run: Run) -> dict[str, int]:
    """Serve's count of the sampler's replicas by their state."""
    deployments = serve.status().applications[run.sampler_app].deployments
    return {str(state): n for state, n in deployments["Sampler"].replica_states.items() if n}
