"""A cluster that grows from its head alone to what a run needs, and goes back to the head alone.

The nodes are processes of this machine, started and ended by Ray's autoscaler. The driver is the
real one; only the teacher's engine is synthetic, so that its pace and the student's can be set.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.end_to_end import ROOT, RunFiles
from tests.support.fake_nodes import HEAD, Nodes, autoscaled_cluster
from tests.support.synthetic_run import write_run_file

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(600)]

MOST_TEACHERS = 3
ROWS_PER_STEP = 8
GROUPS_EACH = 2
PATIENCE_S = 300.0
GONE_AFTER_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with autoscaled_cluster({"teacher": MOST_TEACHERS, "student": 1}) as nodes:
        yield nodes


def run_on(
    nodes: Nodes, folder: Path, delay_s: float, tokens: int, upscale_delay_s: float, **changes: Any
) -> RunFiles:
    """The driver on the cluster, to its end and until only the head is left."""
    run_file = write_run_file(
        folder,
        teacher={
            "synthetic": {"vocab_size": 49152, "response_tokens": tokens, "delay_s": delay_s},
            "sampling": {"max_tokens": tokens},
            "max_model_len": 2048,
            "target_ongoing_requests": GROUPS_EACH,
            "num_replicas": {
                "min": 1,
                "max": MOST_TEACHERS,
                "upscale_delay_s": upscale_delay_s,
            },
            "resources_per_replica": {"teacher": 1},
        },
        evaluation={"held_out_rows": 0},
        cluster={"shared_filesystem": True},
        **changes,
    )
    nodes.begin_anew()
    assert nodes.now() == {HEAD: 1}
    environment = {**os.environ, "RAY_ADDRESS": nodes.address}
    result = subprocess.run(
        [sys.executable, str(ROOT / "driver.py"), "run", str(run_file)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert result.returncode == 0, f"{result.stdout}{result.stderr}\nnodes: {nodes}"
    nodes.wait_for_head_alone(GONE_AFTER_S)
    print(f"{folder.name}: {nodes}")
    return RunFiles(folder / "run")


def training(num_rows: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompts": {"limit": num_rows},
        "training": {
            "rows_per_step": ROWS_PER_STEP,
            "resources_per_worker": {"student": 1},
            "checkpoint_every_steps": 0,
            **changes,
        },
    }


def test_a_fast_student_drives_the_pool_to_its_maximum(cluster: Nodes, tmp_path: Path) -> None:
    """One replica answers 8 rows in 3 seconds; the student eats them in a tenth of one."""
    folder = tmp_path / "fast"
    files = run_on(cluster, folder, delay_s=3.0, tokens=8, upscale_delay_s=2.0, **training(320))
    summary = files.json("summary.json")
    assert summary["rows_trained"] == summary["rows_asked"] == 320
    assert (cluster.most("teacher"), cluster.most("student")) == (MOST_TEACHERS, 1), str(cluster)
    teachers = [counts["teacher"] for _, counts in cluster.seen if "teacher" in counts]
    assert teachers[0] == 1, f"one replica comes first: {cluster}"
    assert max(w["replicas"] for w in files.lines("timeline.jsonl")) == MOST_TEACHERS


def test_a_slow_student_keeps_it_at_its_minimum_and_outlasts_it(
    cluster: Nodes, tmp_path: Path
) -> None:
    """One replica answers 8 rows a second; the student takes several for them, in two epochs.

    The buffer of rows ahead takes longer to fill than replicas take to be added. The second epoch
    replays from the store: nobody needs the teacher, and its node is given back.
    """
    files = run_on(
        cluster,
        tmp_path / "slow",
        delay_s=1.0,
        tokens=1024,
        upscale_delay_s=4.0,
        **training(96, epochs=2, schedule="constant"),
    )
    summary = files.json("summary.json")
    assert (summary["rows_trained"], summary["rows_asked"]) == (192, 96)
    assert (cluster.most("teacher"), cluster.most("student")) == (1, 1), str(cluster)
    assert max(w["replicas"] for w in files.lines("timeline.jsonl")) == 1
    came = next(second for second, counts in cluster.seen if "teacher" in counts)
    alone = [second for second, c in cluster.seen if c == {HEAD: 1, "student": 1} and second > came]
    end = cluster.seen[-1][0]
    assert alone and end - alone[-1] > 10, f"the student went on without a teacher: {cluster}"
