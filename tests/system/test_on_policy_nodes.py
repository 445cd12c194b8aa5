"""A mixed run on several nodes, of which the sampler's and the worker's are lost; on real vLLM.

Teacher, sampler and student have a node each, and the latter two a spare one. The publications are
owned by the coordinator, which lives with the driver on the head, so the weights outlast the node
that trained them.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.support.end_to_end import named
from tests.support.nodes import Watched, cluster_of_nodes, on_node
from tests.support.on_policy import (
    DEADLINE_S,
    NUM_STEPS,
    STALENESS,
    oldest_age,
    proofs,
    require_trained_once_and_paid_once,
    write_run_file,
)

pytestmark = [pytest.mark.vllm, pytest.mark.faults, pytest.mark.timeout(1800)]

TITLES = {
    "teacher": "ray::ServeReplica:teacher-",
    "sampler": "ray::ServeReplica:sampler-",
    "student": "ray::RayTrainWorker",
}
PATIENCE_S = 2 * DEADLINE_S


def holds(node: Any, kind: str) -> bool:
    """Whether a process of the kind is on a node."""
    return bool(named(on_node(node), TITLES[kind]))


def test_a_sampler_and_a_worker_whose_nodes_are_lost_go_on_elsewhere(tmp_path: Path) -> None:
    run_file = write_run_file(
        tmp_path,
        teacher={"resources_per_replica": {"teacher": 1}},
        policy={"resources_per_replica": {"sampler": 1}},
        training={"resources_per_worker": {"student": 1}, "checkpoint_every_steps": 1},
        cluster={"shared_filesystem": True},
    )
    with cluster_of_nodes() as add:
        nodes = {kind: add(kind) for kind in TITLES}
        run = Watched(run_file, add.cluster.address, PATIENCE_S)
        try:
            run.wait_for_step(2)
            assert all(holds(node, kind) for kind, node in nodes.items())
            for kind in ("sampler", "student"):
                spare = add(kind)
                step = run.files.steps()[-1]
                assert step + 2 < NUM_STEPS, "lost too late to say anything"
                add.cluster.remove_node(nodes[kind], allow_graceful=False)
                run.wait_for_step(step + 2)
                assert holds(spare, kind)
            run.finish()
        finally:
            run.end()
    require_trained_once_and_paid_once(run.files)
    assert oldest_age(run.files) <= STALENESS
    assert all(gap <= 1e-3 for _, gap in proofs(run.files))
    assert run.files.json("summary.json")["restarts"] >= 1
