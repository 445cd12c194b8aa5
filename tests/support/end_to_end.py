"""What end-to-end tests share: the driver as a process, a run's files, and its figures worked out
again with numpy and ``transformers`` alone.
"""

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "models" / "tiny-teacher"


@dataclass(frozen=True)
class RunFiles:
    """A run folder, read as any program would."""

    folder: Path

    def json(self, name: str) -> Any:
        """A whole JSON file."""
        return json.loads((self.folder / name).read_text())

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a JSONL file; none where it is not there yet."""
        path = self.folder / name
        if not path.exists():
            return []
        whole, _, _ = path.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def steps(self) -> list[int]:
        """The steps that have a line of metrics, in the order they were written."""
        return [line["step"] for line in self.lines("metrics.jsonl")]


def drive(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """``python driver.py ARGUMENTS`` in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "driver.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
    )


@dataclass(frozen=True)
class KeptRow:
    """One row of ``held_out.parquet``: T response tokens, K ids and a tail at each.

    ``ids`` [T, K]; ``log_p`` [T, K + 1]: the teacher's outcomes, normalised, the tail last.
    """

    prompt: list[int]
    response: list[int]
    ids: np.ndarray
    log_p: np.ndarray


def status_of(pid: int) -> list[str]:
    """State, parent and so on of a process; OSError where there is none."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def children_of(pid: int) -> set[int]:
    """All living descendants of a process."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int(status_of(int(folder.name))[1])
    found: set[int] = set()
    front = {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front} - found
        found |= front
    return found


def wait_until_gone(pids: set[int], within_s: float = 200.0) -> None:
    """Until none of the processes is alive."""
    deadline = time.monotonic() + within_s
    while any(map(_is_alive, pids)):
        assert time.monotonic() < deadline, "processes go on whose driver was killed"
        time.sleep(0.2)


def _is_alive(pid: int) -> bool:
    try:
        return status_of(pid)[0] != "Z"
    except OSError:
        return False


def named(pids: set[int], title: str) -> list[int]:
    """Those of the processes whose command line begins with ``title``, ascending."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_text().startswith(title):
                found.append(pid)
    return sorted(found)


def kept_rows(path: Path) -> list[KeptRow]:
    """The held-out rows a run was measured on."""
    rows = []
    for row in pq.read_table(path).to_pylist():
        best = np.array(row["topk_logprobs"], np.float64)
        tail = np.array(row["tail_logprob"], np.float64)
        log_p = log_softmax(np.concatenate([best, tail[:, None]], axis=1))
        ids = np.array(row["topk_ids"])
        rows.append(KeptRow(row["prompt_ids"], row["response_ids"], ids, log_p))
    return rows


def load(folder: Path) -> Any:
    """A Hugging Face model in float32, for reading."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_probabilities(model: Any, row: KeptRow) -> np.ndarray:
    """The model's distributions of the response tokens, [T, V]: logits from P - 1 on."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([[*row.prompt, *row.response]])).logits[0].double().numpy()
    start = len(row.prompt) - 1
    return log_softmax(logits[start : start + len(row.response)])


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The model's best next token, ``count`` times, without a cache."""
    import torch

    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Log of the normalised exponentials over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def partition(log_q: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Log probabilities of ``ids`` [T, K] and of everything else, [T, K + 1]."""
    outside = log_q.copy()
    np.put_along_axis(outside, ids, -np.inf, axis=1)
    tail = np.log(np.exp(outside).sum(-1, keepdims=True))
    return np.concatenate([np.take_along_axis(log_q, ids, axis=1), tail], axis=1)


def divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats at each token, [T]."""
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def store_hidden_states(store: Any, model: Any, keys: Any) -> None:
    """Publish a hidden signal beside the stored answers of these keys, from the plain model.

    What a teacher that scores them would have stored; its own logprobs are not known then.
    """
    import pyarrow as pa
    import torch

    from raystill.datasets.rows.schema import TOKEN_FLOATS, TOKEN_IDS
    from raystill.datasets.rows.signal import Signal
    from raystill.datasets.store.footer import Origin, Provenance

    catalogue = store.catalogue()
    columns = ["prompt_ids", "response_ids", "finish_reason"]
    rows = store.read(catalogue, catalogue.locate(keys), columns)
    width, states, unknown = model.config.hidden_size, [], []
    for row in rows.to_pylist():
        with torch.no_grad():
            ids = torch.tensor([[*row["prompt_ids"], *row["response_ids"]]])
            found = model.get_decoder()(ids).last_hidden_state[0, len(row["prompt_ids"]) - 1 : -1]
        states.append([state.view(torch.int16).numpy().tobytes() for state in found.bfloat16()])
        unknown.append([float("nan")] * len(found))
    signal = {
        "sampled_logprobs": pa.array(unknown, TOKEN_FLOATS),
        "hidden": pa.array(states, pa.list_(pa.binary(2 * width))),
    }
    table = pa.table(
        {
            "key": keys,
            **{name: rows[name].cast(TOKEN_IDS) for name in columns[:2]},
            "finish_reason": rows["finish_reason"],
            **signal,
        }
    )
    told = catalogue.entries[0].footer.origin
    names = ("teacher_identity", "teacher", "engine", "engine_version", "dtype", "vocab_size")
    origin = Origin(**{n: getattr(told, n) for n in names}, signal=Signal("hidden", width))
    store.publish(origin, Provenance("a test", "training", scored=True), table)
