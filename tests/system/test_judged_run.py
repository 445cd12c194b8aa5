"""A whole run with a judge and the best of four answers, and one whose filter was changed."""

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.end_to_end import TEACHER, RunFiles, drive
from tests.support.json_service import JsonHandler, Server, completion_of, serving
from tests.support.synthetic_run import write_run_file

pytestmark = [pytest.mark.ray, pytest.mark.faults]

PROMPTS, HELD_OUT, SAMPLES = 10, 2, 4
ASKS_FOR_A_WORD = "Reply with one of these words alone"


class Service(Server):
    """Writes another answer to each question that it is asked, and judges answers by a hash."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.written: dict[str, list[str]] = defaultdict(list)  # by prompt
        self.judged: list[str] = []

    def reply(self, question: str) -> str:
        with self.lock:
            if ASKS_FOR_A_WORD in question:
                self.judged.append(question)
                answer = question.rpartition("<answer-")[2].partition("\n")[2].partition("\n</")[0]
                return "Yes." if is_good(answer) else "no"
            answers = self.written[question]
            answers.append(f"answer {len(answers)} to {question[:20]}".strip())
            return answers[-1]


class Handler(JsonHandler):
    server: Service

    def do_POST(self) -> None:
        question = json.loads(self.body())["messages"][-1]["content"]
        self.send(200, completion_of(self.server.reply(question)))


def is_good(answer: str) -> bool:
    """What this judge thinks of an answer."""
    return blake2b(answer.encode()).digest()[0] % 2 == 0


@pytest.fixture
def service() -> Iterator[Service]:
    with serving(Service()) as server:
        yield server


def judged_run(folder: Path, store: Path, service: Service, filters: list[Any]) -> Path:
    """A run file whose writer and judge are this service."""
    file = write_run_file(folder)
    config = yaml.safe_load(file.read_text())
    config.pop("teacher")
    url = f"http://127.0.0.1:{service.server_address[1]}/v1"
    api = {"base_url": url, "model": "m", "api_key_env": None}
    one = {"model": str(TEACHER), "engine": "api", "api": api, "max_model_len": 1024}
    config["teachers"] = {
        "writer": one | {"sampling": {"max_tokens": 64}},
        "judge": one | {"sampling": {"max_tokens": 4}},
    }
    path = folder / "prompts.jsonl"
    rows = [{"prompt": f"question {i}", "source": "s"} for i in range(PROMPTS + HELD_OUT)]
    path.write_text("\n".join(map(json.dumps, rows)))
    config["prompts"] = {
        "samples_per_prompt": SAMPLES,
        "sources": [{"name": "s", "path": str(path), "teacher": "writer"}],
    }
    config |= {"signal": {"kind": "text"}, "objective": {"cross_entropy": 1.0}}
    config["filters"] = {"rules": filters, "max_rejected_fraction": 1.0}
    config["evaluation"] = {"held_out_rows": HELD_OUT, "free_running": {"rows": 2}}
    config["store"] = {"path": str(store)}
    config["terms"] = {"teacher_licences": dict.fromkeys(("writer", "judge"), "apache-2.0")}
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def test_the_best_of_four_by_a_judge_is_kept_and_another_filter_pays_nothing(
    service: Service, tmp_path: Path
) -> None:
    rule = {"teacher": "judge", "rubric": "Is it good?"}
    store, best = tmp_path / "store", {"best": {"keep": 1, "by": "judge"}}
    file = judged_run(tmp_path / "first", store, service, [{"judge": rule}, best])
    done = drive("run", file)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = RunFiles(tmp_path / "first" / "run").json("summary.json")
    held_out = {question for question, answers in service.written.items() if len(answers) == 1}
    assert len(held_out) == HELD_OUT, "held-out prompts have one answer each"
    asked = {q: a for q, a in service.written.items() if q not in held_out}
    assert len(asked) == PROMPTS and all(len(a) == SAMPLES for a in asked.values())
    good = [sum(map(is_good, answers)) for answers in asked.values()]
    rejected = {"judge": SAMPLES * PROMPTS - sum(good), "best": sum(n - 1 for n in good if n)}
    assert {n: r for n, r in summary["filtered"].items() if r} == {
        n: r for n, r in rejected.items() if r
    }
    assert summary["rows_trained"] == sum(n > 0 for n in good)
    assert summary["accepted_fraction"] == pytest.approx(summary["rows_trained"] / 40)
    assert len(service.judged) == SAMPLES * PROMPTS == len(set(service.judged))
    assert summary["judged"] == {"verdicts": 40, "verdicts_asked": 40}
    assert "40 answers; 40 questions asked" in done.stdout

    paid = (len(service.judged), sum(map(len, service.written.values())))
    milder = [{"length": {"min_tokens": 1}}, {"judge": rule | {"min_score": 0.0}}, best]
    done = drive("run", judged_run(tmp_path / "second", store, service, milder))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = RunFiles(tmp_path / "second" / "run").json("summary.json")
    assert paid == (len(service.judged), sum(map(len, service.written.values())))
    assert summary["rows_trained"] == PROMPTS and summary["filtered"] == {"best": 3 * PROMPTS}
    assert summary["judged"] == {"verdicts": 40, "verdicts_asked": 0}
