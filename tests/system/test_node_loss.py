"""Nodes that come and go under a run: the workers' group follows, and no row is lost or repeated.

Several Ray nodes on this machine, each with an address of its own, and the driver as a process on
the head. The teacher is synthetic and slow; everything else is the real thing. The student is
float64, so that its weights can be held against those of a run that nothing happened to.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raystill.config.training import TrainingConfig
from raystill.datasets.store.store import TeacherStore
from raystill.train.step.optimizer import learning_rate
from tests.support.end_to_end import RunFiles, drive, named
from tests.support.nodes import PATIENCE_S, Watched, cluster_of_nodes, on_node
from tests.support.synthetic_run import write_run_file

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(900)]

NUM_ROWS, ROWS_PER_STEP = 320, 8
NUM_STEPS = NUM_ROWS // ROWS_PER_STEP
SECONDS_PER_GROUP = 3.0
REPLICA, WORKER = "ray::ServeReplica:teacher", "ray::RayTrainWorker"
SAME = 1e-10  # relative, float64: other cuts of the same steps


def write_slow_run(folder: Path, num_workers: Any, **changes: Any) -> Path:
    """A run of 40 steps whose answers take about two minutes from one replica."""
    synthetic = {"vocab_size": 49152, "response_tokens": 8, "delay_s": SECONDS_PER_GROUP}
    training = {
        "num_workers": num_workers,
        "resize_every_s": 2.0,
        "rows_per_step": ROWS_PER_STEP,
        "warmup_steps": 2,
        "checkpoint_every_steps": 2,
        "param_dtype": "float64",
        # Rows packed with their common beginnings once would be summed before a norm, which is
        # float32, rounds them: 1e-7, and others with each cut of a step.
        "attention": "sdpa",
        "num_checkpoints_to_keep": 1,
        **changes.pop("training", {}),
    }
    teacher = {"synthetic": synthetic, "target_ongoing_requests": 2, **changes.pop("teacher", {})}
    return write_run_file(
        folder,
        teacher=teacher,
        prompts={"limit": NUM_ROWS},
        training=training,
        evaluation={"held_out_rows": 0},
        **changes,
    )


def test_workers_follow_the_nodes_that_come_and_go(
    tmp_path: Path, quiet: dict[str, torch.Tensor]
) -> None:
    """One worker, a node comes, two workers; the replica's node goes, then a worker's node goes."""
    run_file = write_slow_run(
        tmp_path / "nodes",
        [1, 2],
        teacher={"resources_per_replica": {"teacher": 1}},
        training={"resources_per_worker": {"student": 1}},
        cluster={"shared_filesystem": True},
    )
    with cluster_of_nodes() as add:
        teacher, _ = add("teacher"), add("student")
        run = Watched(run_file, add.cluster.address)
        try:
            run.wait_for_workers(1)
            second = add("student")
            run.wait_for_workers(2)
            add("teacher")
            step = run.files.steps()[-1]
            add.cluster.remove_node(teacher, allow_graceful=False)
            run.wait("steps from another replica", lambda lines: lines[-1]["step"] >= step + 6)
            add.cluster.remove_node(second, allow_graceful=False)
            run.wait_for_workers(1)
            code = run.process.wait(timeout=PATIENCE_S)
        finally:
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait()
    assert code == 0, run.output.read_text()
    check(run.files, quiet)
    assert run.files.json("summary.json")["restarts"] >= 2


def test_three_nodes_share_the_work_and_two_go_on_when_one_is_lost(
    tmp_path: Path, quiet: dict[str, torch.Tensor]
) -> None:
    """A replica and a worker on each node: every step's rows and gradients cross the nodes."""
    synthetic = {"vocab_size": 49152, "response_tokens": 8, "delay_s": 2 * SECONDS_PER_GROUP}
    run_file = write_slow_run(
        tmp_path / "three",
        [1, 3],
        teacher={
            "num_replicas": 3,
            "resources_per_replica": {"teacher": 1},
            "synthetic": synthetic,
        },
        training={"resources_per_worker": {"student": 1}},
        cluster={"shared_filesystem": True},
    )
    with cluster_of_nodes() as add:
        nodes = [add("teacher", "student") for _ in range(3)]
        run = Watched(run_file, add.cluster.address)
        try:
            run.wait_for_workers(3)
            for title in (REPLICA, WORKER):
                assert [len(named(on_node(node), title)) for node in nodes] == [1, 1, 1], title
            add.cluster.remove_node(nodes[-1], allow_graceful=False)
            run.wait_for_workers(2)
            for title in (REPLICA, WORKER):
                assert [len(named(on_node(node), title)) for node in nodes[:2]] == [1, 1], title
            code = run.process.wait(timeout=PATIENCE_S)
        finally:
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait()
    assert code == 0, run.output.read_text()
    check(run.files, quiet)
    assert run.files.json("summary.json")["restarts"] >= 1


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run of one worker that nothing happened to."""
    folder = tmp_path_factory.mktemp("quiet")
    result = drive("run", write_slow_run(folder, 1), "--set", "teacher.synthetic.delay_s=0")
    assert result.returncode == 0, result.stderr
    return weights(RunFiles(folder / "run"))


def check(files: RunFiles, quiet: dict[str, torch.Tensor]) -> None:
    """Every step is there once, whole, at its learning rate; the weights are the quiet run's."""
    lines = files.lines("metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert [line["rows"] for line in lines] == [ROWS_PER_STEP] * NUM_STEPS
    training = TrainingConfig(learning_rate=1e-3, warmup_steps=2, rows_per_step=ROWS_PER_STEP)
    expected = [learning_rate(step, NUM_STEPS, training) for step in range(NUM_STEPS)]
    assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-12)
    summary = files.json("summary.json")
    assert summary["rows_trained"] == summary["rows_asked"] == NUM_ROWS
    catalogue = TeacherStore(str(files.folder.parent / "teacher_store")).catalogue()
    assert (catalogue.rows, catalogue.duplicates, catalogue.refused) == (NUM_ROWS, 0, {})
    mine = weights(files)
    assert mine.keys() == quiet.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, quiet[name], rtol=SAME, atol=SAME)


def weights(files: RunFiles) -> dict[str, torch.Tensor]:
    """The last checkpoint's tensors, in the training precision."""
    folder = files.folder / "checkpoints" / f"step-{NUM_STEPS:08d}"
    pieces = [load_file(path) for path in sorted(folder.glob("model-*.safetensors"))]
    return {name: tensor for piece in pieces for name, tensor in piece.items()}
