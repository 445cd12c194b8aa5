"""A whole run of a model in vLLM and a service that is asked in words, each for rows of its own.

The service answers nothing before the other teacher's answers are in the store: who waits for one
must not hold the other back.
"""

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from raystill.base.run_folder import RunFolder
from raystill.datasets.store.store import TeacherStore
from tests.support.end_to_end import ROOT, TEACHER, RunFiles, drive
from tests.support.json_service import JsonHandler, Server, completion_of, serving

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.faults]

ROWS, HELD_OUT = 16, 4  # of each teacher
STOP, TOP_K = 2, 4
USAGE = (10, 5)
PRICES = {"input": 1.0, "output": 4.0}
GIVES_UP_S = 300.0
BESIDE = {" blue": 0.25, " green": 0.1}
"""What the service names beside each token of its answers, which has 0.5."""


class Service(Server):
    """Tells the log probabilities of its answers in words."""

    def __init__(self, other: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
        self.other = other
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()

    def answer(self, question: str) -> dict[str, Any]:
        with self.lock:
            self.asked[question] += 1
        text = answer_to(question)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        content = [named(self.tokenizer.decode([index])) for index in ids]
        return completion_of(text, USAGE, logprobs={"content": content})

    def wait(self) -> None:
        """Until the other teacher has answers in the store."""
        deadline = time.monotonic() + GIVES_UP_S
        while not any(self.other.glob("segments/*")) and time.monotonic() < deadline:
            time.sleep(0.1)


class Handler(JsonHandler):
    server: Service

    def do_POST(self) -> None:
        question = json.loads(self.body())["messages"][-1]["content"]
        if question != "Say a word.":
            self.server.wait()
        self.send(200, self.server.answer(question))


def answer_to(question: str) -> str:
    return f"The answer to {question} is red"


def named(token: str) -> dict[str, Any]:
    """What is told of a drawn token."""
    told = {name: math.log(p) for name, p in ({token: 0.5} | BESIDE).items()}
    entries = [{"token": t, "bytes": list(t.encode()), "logprob": p} for t, p in told.items()]
    return entries[0] | {"top_logprobs": entries}


def run_file(place: Path, service: Service) -> Path:
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    url = f"http://127.0.0.1:{service.server_address[1]}/v1"
    api = {"base_url": url, "model": "m", "api_key_env": None, "top_logprobs": 20, "prices": PRICES}
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 32}
    config["teachers"] = {
        "own": config.pop("teacher"),
        "service": {"model": str(TEACHER), "engine": "api", "api": api, "sampling": sampling},
    }
    config["teachers"]["own"]["model"] = str(TEACHER)
    sources = []
    for name in config["teachers"]:
        path = place / f"{name}.jsonl"
        rows = [{"prompt": f"question {i} of {name}"} for i in range(ROWS + HELD_OUT)]
        path.write_text("\n".join(map(json.dumps, rows)))
        sources.append({"name": f"of {name}", "path": str(path), "teacher": name})
    config["prompts"] = {"sources": sources}
    config["signal"] = {"kind": "topk", "top_k": TOP_K}
    config["stream"] = {"group_rows": 4, "order": "arrival"}
    config["evaluation"] = {
        "held_out_rows": 2 * HELD_OUT,
        "top_k": TOP_K,
        "free_running": {"rows": 2},
    }
    config["cluster"] = {"num_cpus": 4}
    config["output"] = {"path": str(place / "run")}
    config["store"] = {"path": str(place / "store")}
    config["terms"] = {"teacher_licences": {"service": "apache-2.0"}}
    file = place / "two.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with serving(Service(tmp_path / "store")) as server:
        yield server


def test_each_row_is_answered_by_its_own_teacher_and_neither_waits_for_the_other(
    service: Service, tmp_path: Path
) -> None:
    done = drive("run", run_file(tmp_path, service))
    assert done.returncode == 0, done.stdout + done.stderr
    files = RunFiles(tmp_path / "run")
    summary, manifest = files.json("summary.json"), files.json("manifest.json")
    assert (summary["status"], summary["rows_trained"]) == ("completed", 2 * ROWS)
    identities = {name: one["identity"] for name, one in manifest["teachers"].items()}
    folder = RunFolder(str(files.folder))
    prompts = [
        row
        for name in ("train", "held_out")
        for row in folder.read_table(f"prompts/{name}.parquet").to_pylist()
    ]
    assert Counter(row["teacher"] for row in prompts) == dict.fromkeys(identities, ROWS + HELD_OUT)

    store, said = TeacherStore(str(tmp_path / "store")), {}
    columns = ["key", "response_ids", "topk_ids", "topk_logprobs"]
    for name in store.names():
        segment = store.open(name)
        for group in range(len(segment.footer.groups)):
            for row in segment.read(group, columns).to_pylist():
                assert row["key"] not in said, "an answer was paid twice"
                said[row["key"]] = segment.footer.origin, row
    assert {key: origin.teacher_identity for key, (origin, _) in said.items()} == {
        row["key"]: identities[row["teacher"]] for row in prompts
    }
    engines = {row["teacher"]: said[row["key"]][0].engine for row in prompts}
    assert engines == {"own": "vllm", "service": "api"}

    own = {f"question {i} of service" for i in range(ROWS + HELD_OUT)}
    service.asked.pop("Say a word.")
    assert service.asked == dict.fromkeys(own, 1)
    told = [said[row["key"]][1] for row in prompts if row["teacher"] == "service"]
    texts = {service.tokenizer.decode(row["response_ids"]) for row in told}
    assert texts == {answer_to(question) for question in own}
    for row in told:
        first = dict(zip(row["topk_ids"][0], row["topk_logprobs"][0], strict=True))
        best = sorted(first.values(), reverse=True)[:3]
        assert best == pytest.approx([math.log(p) for p in (0.5, 0.25, 0.1)], abs=1e-6)
        assert row["response_ids"][-1] == STOP
    rows = len(own)
    each = (USAGE[0] * PRICES["input"] + USAGE[1] * PRICES["output"]) / 1e6
    asked_before = summary["api"]["requests"] - rows  # For whether it tells log probabilities.
    assert asked_before in (1, 2)
    assert summary["api"]["cost"] == pytest.approx((rows + asked_before) * each)
    assert summary["teachers"]["service/api_cost"] == pytest.approx(summary["api"]["cost"])
    assert summary["teachers"]["own/rows"] == rows == summary["teachers"]["service/rows"]
    assert (files.folder / "spending-service.jsonl").is_file()
