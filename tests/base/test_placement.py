"""Core lists, resource requests, and what is refused because no cluster could hold it."""

import re
from pathlib import Path

import pytest
import yaml

from raystill.cluster.check import cluster
from raystill.config.run import RunConfig
from raystill.placement import requests
from raystill.placement.nodes import Node, matches, require_nodes, what_is_asked

ROOT = Path(__file__).resolve().parents[2]


def config(**sections: dict) -> RunConfig:
    base: dict = {
        "teacher": {"model": "models/tiny-teacher"},
        "student": {"init": "from_teacher", "layers": [0]},
        "prompts": {"path": "prompts.jsonl"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return RunConfig.model_validate(base)


def big() -> RunConfig:
    text = (ROOT / "configs" / "cluster_8b_from_70b.yaml").read_text()
    return RunConfig.model_validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("available", "teacher", "student"),
    [
        ([0, 1], (0,), (1,)),
        ([5, 3], (3,), (5,)),
        ([0, 1, 2, 3], (0, 1), (2, 3)),
        ([0, 1, 2], (0,), (1, 2)),
        ([4], (4,), (4,)),
    ],
)
def test_teacher_and_student_halve_the_cores(available, teacher, student) -> None:
    assert requests.teacher_cores(config(), available) == teacher
    assert requests.student_cores(config(), available) == student


def test_configured_cores_are_taken_as_they_are() -> None:
    chosen = config(teacher={"cpu_cores": [3]}, training={"cpu_cores": [0, 2]})
    assert requests.teacher_cores(chosen, range(4)) == (3,)
    assert requests.student_cores(chosen, range(4)) == (0, 2)
    everything = config(training={"cpu_cores": "all"})
    assert requests.student_cores(everything, range(4)) == (0, 1, 2, 3)


def test_a_core_that_the_node_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"teacher\.cpu_cores names cores \[7\]"):
        requests.teacher_cores(config(teacher={"cpu_cores": [0, 7]}), [0, 1])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("num_cores", [4, 5, 8])
def test_shares_of_cores_cover_them_once(num_cores: int, count: int) -> None:
    cores = list(range(num_cores))
    shares = [requests.share_of_cores(cores, i, count) for i in range(count)]
    assert sorted(core for share in shares for core in share) == cores
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_cores_share_them() -> None:
    assert [requests.share_of_cores([2, 3], i, 5) for i in range(5)] == [
        (2,), (3,), (2,), (3,), (2,),
    ]  # fmt: skip


def test_a_replica_on_gpus_has_a_bundle_for_each() -> None:
    bundles = requests.teacher_bundles(big(), has_gpus=True)
    assert bundles == [{"CPU": 1.0, "GPU": 1.0, "teacher": 1.0}] * 4


def test_a_replica_on_a_cpu_node_has_one_bundle() -> None:
    parallel = config(teacher={"tensor_parallel_size": 2, "resources_per_replica": {"teacher": 1}})
    assert requests.teacher_bundles(parallel, has_gpus=False) == [{"CPU": 1.0, "teacher": 1.0}]


def test_a_replica_without_pipeline_stages_needs_one_node_for_all_its_gpus() -> None:
    four = {"tensor_parallel_size": 4}
    pairs = [Node({"CPU": 8.0, "GPU": 2.0}) for _ in range(3)]
    (problem,) = require_nodes(config(teacher=four), pairs)
    assert "a teacher replica that asks for CPU: 4, GPU: 4" in problem.message
    whole = [*pairs, Node({"CPU": 8.0, "GPU": 4.0})]
    assert require_nodes(config(teacher=four), whole) == []
    staged = config(teacher={"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    assert require_nodes(staged, pairs) == []


def test_the_synthetic_teacher_takes_no_gpu() -> None:
    synthetic = config(teacher={"engine": "synthetic"})
    assert requests.teacher_bundles(synthetic, has_gpus=True) == [{"CPU": 1.0}]


def test_a_worker_takes_a_gpu_where_there_are_any() -> None:
    assert requests.student_resources(config(), has_gpus=True) == {"CPU": 1.0, "GPU": 1.0}
    assert requests.student_resources(config(), has_gpus=False) == {"CPU": 1.0}
    none = config(training={"gpus_per_worker": 0})
    assert requests.student_resources(none, has_gpus=True) == {"CPU": 1.0}


def test_a_run_that_fits_has_no_problem() -> None:
    assert requests.require(config(), {"CPU": 2.0}) == []


def test_more_workers_than_the_cluster_has_are_refused_with_both_numbers() -> None:
    problems = requests.require(config(training={"num_workers": 64}), {"CPU": 2.0})
    assert [problem.where for problem in problems] == ["training.num_workers"]
    message = problems[0].message
    assert "CPU: 65" in message
    assert "64 student workers of 1" in message
    assert "the cluster has 2" in message
    assert "training.num_workers" in message


def test_every_short_resource_is_reported() -> None:
    problems = requests.require(big(), {"CPU": 16.0, "GPU": 8.0})
    assert {p.where for p in problems} == {
        "teacher.resources_per_replica", "training.resources_per_worker", "training.num_workers",
    }  # fmt: skip


def test_each_sampler_of_a_student_that_writes_takes_a_gpu() -> None:
    writes = config(policy={"student_share": 0.5, "num_replicas": 3}, stream={"order": "fixed"})
    assert requests.require(writes, {"CPU": 8.0, "GPU": 5.0}) == []
    (problem,) = requests.require(writes, {"CPU": 8.0, "GPU": 4.0})
    assert "3 student samplers of 1" in problem.message
    assert "policy.num_replicas" in problem.message
    assert requests.require(writes, {"CPU": 2.0}) == [], "without GPUs they share the teacher's"
    never = config(policy={"num_replicas": 3})
    assert requests.require(never, {"CPU": 2.0, "GPU": 2.0}) == []


def test_samplers_have_nodes_and_resources_of_their_own() -> None:
    policy = {
        "student_share": 0.5,
        "num_replicas": {"min": 2, "max": 5},
        "label_selector": {"role": "sampler"},
        "resources_per_replica": {"slot": 1},
        "accelerator_type": "L4",
    }
    writes = config(policy=policy, stream={"order": "fixed"})
    samplers = [r for r in requests.requests(writes, False) if r.who == "student sampler"]
    assert len(samplers) == 2, "the fewest, as of the teacher"
    asked = {"CPU": 1.0, "GPU": 1.0, "slot": 1.0, "accelerator_type:L4": 0.001}
    assert samplers[0].total == asked and samplers[0].label_selector == {"role": "sampler"}
    problems = requests.require(writes, {"CPU": 8.0, "GPU": 8.0, "accelerator_type:L4": 1.0})
    assert [problem.where for problem in problems] == ["policy.resources_per_replica"]
    here = machines({"CPU": 8.0, "GPU": 8.0, "slot": 2.0, "accelerator_type:L4": 1.0})
    (problem,) = require_nodes(writes, here)
    assert problem.where == "policy.label_selector" and "role: sampler" in problem.message
    there = machines(
        {"CPU": 4.0, "GPU": 4.0, "slot": 2.0, "accelerator_type:L4": 1.0}, role="sampler"
    )
    assert require_nodes(writes, [*here, *there]) == []


def test_a_pool_that_may_shrink_to_nothing_still_needs_one_replica() -> None:
    elastic = config(teacher={"num_replicas": {"min": 0, "max": 3}})
    assert requests.require(elastic, {"CPU": 2.0}) == []
    assert requests.require(elastic, {"CPU": 1.0}) != []


def machines(*resources: dict[str, float], **labels: str) -> list[Node]:
    return [Node(dict(one), labels) for one in resources]


def test_gpus_that_are_enough_in_sum_but_on_no_node_are_refused() -> None:
    wide = config(training={"gpus_per_worker": 4})
    pieces = [{"CPU": 8.0, "GPU": 2.0}] * 3
    assert requests.require(wide, requests.add_up(pieces)) == []
    problems = require_nodes(wide, machines(*pieces))
    assert len(problems) == 1
    assert "student worker" in problems[0].message
    assert "3 x CPU: 8, GPU: 2" in problems[0].message
    assert require_nodes(wide, machines(*pieces, {"CPU": 8.0, "GPU": 4.0})) == []


def shared(teacher: float, student: float, **training: object) -> RunConfig:
    return config(
        teacher={"gpus_per_replica": teacher, "gpu_memory_utilization": teacher * 0.9},
        training={"gpus_per_worker": student, **training},
    )


def test_teacher_and_student_share_a_gpu_by_fractions() -> None:
    one = machines({"CPU": 4.0, "GPU": 1.0})
    both = shared(0.6, 0.4)
    assert requests.teacher_bundles(both, has_gpus=True) == [{"CPU": 1.0, "GPU": 0.6}]
    assert requests.require(both, one[0].resources) == []
    assert require_nodes(both, one) == []
    (problem,) = requests.require(shared(0.6, 0.5), one[0].resources)
    assert "needs GPU: 1.1 (1 teacher replica of 0.6, 1 student worker of 0.5)" in problem.message
    assert "the cluster has 1" in problem.message


def test_a_share_is_of_one_gpu_and_never_of_two() -> None:
    three = config(
        teacher={"num_replicas": 3, "gpus_per_replica": 0.6, "gpu_memory_utilization": 0.5},
        training={"gpus_per_worker": 0},
    )
    two = machines({"CPU": 8.0, "GPU": 2.0})
    assert requests.require(three, two[0].resources) == []  # 1.8 of 2.
    (problem,) = require_nodes(three, two)
    assert problem.message.startswith("1 of 4 parts of the run fit on no node; the first is a")
    assert "asks for CPU: 1, GPU: 0.6; the nodes have CPU: 8, GPU: 2;" in problem.message
    assert require_nodes(three, machines({"CPU": 8.0, "GPU": 3.0})) == []


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"gpus_per_replica": 0.5}, "gpu_memory_utilization (0.9) is more than gpus_per_replica"),
        ({"gpus_per_replica": 2}, "tensor_parallel_size x pipeline_parallel_size is 1"),
        ({"gpus_per_replica": 0.5, "tensor_parallel_size": 2}, "set gpus_per_replica to 2"),
        ({"label_selector": {"role": "!!teacher"}}, "has role: '!!teacher'; expected a label"),
    ],
)
def test_shares_and_selectors_that_cannot_be_are_refused(teacher: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        config(teacher=teacher)


@pytest.mark.parametrize(("gpus", "workers"), [(0.5, 2), (1.5, 1)])
def test_shares_that_workers_cannot_have_are_refused(gpus: float, workers: int) -> None:
    wrong = config(training={"gpus_per_worker": gpus, "num_workers": workers})
    (problem,) = cluster.check_gpu_shares(wrong)
    assert problem.where == "training.gpus_per_worker"
    assert f"is {gpus:g}" in problem.message
    assert cluster.check_gpu_shares(config(training={"gpus_per_worker": 0.5})) == []


def test_gpus_that_are_asked_for_count_before_there_are_any() -> None:
    wanted = config(teacher={"gpus_per_replica": 4, "tensor_parallel_size": 4})
    assert requests.teacher_bundles(wanted, has_gpus=False) == [{"CPU": 1.0, "GPU": 1.0}] * 4
    none = config(teacher={"gpus_per_replica": 0})
    assert requests.teacher_bundles(none, has_gpus=True) == [{"CPU": 1.0}]
    assert [p.where for p in cluster.check_gpus_are_said(config())] == [
        "teacher.gpus_per_replica", "training.gpus_per_worker",
    ]  # fmt: skip
    assert cluster.check_gpus_are_said(big()) == []


def test_parts_go_only_to_nodes_with_their_labels() -> None:
    apart = config(
        teacher={"label_selector": {"role": "teacher"}},
        training={"label_selector": {"role": "!teacher"}},
    )
    teachers = machines({"CPU": 4.0}, role="teacher")
    students = machines({"CPU": 4.0}, role="student")
    assert require_nodes(apart, [*teachers, *students]) == []
    (problem,) = require_nodes(apart, teachers)
    assert problem.where == "training.label_selector"
    assert "asks for nodes on role: !teacher, and no node has these labels" in problem.message
    assert "the nodes have CPU: 4 (role: teacher)" in problem.message
    crowded = [*machines({"CPU": 0.5}, role="teacher"), *students]
    (problem,) = require_nodes(apart, crowded)
    assert problem.where == "teacher"
    assert "asks for CPU: 1 on role: teacher" in problem.message


@pytest.mark.parametrize(
    ("value", "label", "fits"),
    [
        ("spot", "spot", True), ("spot", "", False), ("!spot", "", True), ("!spot", "spot", False),
        ("in(a, b)", "b", True), ("in(a,b)", "c", False), ("!in(a, b)", "a", False),
        ("!in(a, b)", "", True),
    ],
)  # fmt: skip
def test_selectors_are_read_as_ray_reads_them(value: str, label: str, fits: bool) -> None:
    assert matches(value, label) is fits


def test_labels_that_ray_sets_are_not_known_before_a_node_has_started() -> None:
    selector = {"ray.io/accelerator-type": "H100", "role": "teacher"}
    assert Node({}, {"role": "teacher"}, is_here=False).has(selector)
    assert not Node({}, {"role": "teacher"}).has(selector)
    assert not Node({}, {"role": "student"}, is_here=False).has(selector)


def test_what_is_asked_for_is_shown_beside_what_there_is() -> None:
    nodes = [*machines({"CPU": 8.0}), Node({"CPU": 48.0, "GPU": 4.0}, is_here=False)]
    wanted = config(teacher={"label_selector": {"role": "teacher"}}, training={"num_workers": 2})
    assert what_is_asked(wanted, nodes) == (
        "asked for: 1 teacher replica of CPU: 1, GPU: 1 on role: teacher, 2 student workers of "
        "CPU: 1, GPU: 1; the cluster has CPU: 8 on 1 node, and can grow by CPU: 48, GPU: 4"
    )


def node(address: str, group: str | None = None) -> dict:
    labels = {} if group is None else {cluster.NODE_GROUP_LABEL: group}
    return {"NodeManagerAddress": address, "Labels": labels, "Resources": {}}


def test_what_an_autoscaler_may_still_add_counts_but_running_nodes_only_once() -> None:
    groups = [cluster.NodeGroup("gpu", {"GPU": 8.0}, 3)]
    grown = cluster.reachable_nodes([node("a", "gpu"), node("b")], groups, config())
    assert grown == [Node({"GPU": 8.0}, is_here=False)] * 2


def test_the_autoscalers_groups_are_read_from_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bootstrap.yaml"
    file.write_text((ROOT / "ray_config.yaml").read_text())
    command = ["python", "/x/monitor.py", "--gcs-address=1:6379", f"--autoscaling-config={file}"]
    monkeypatch.setattr(cluster, "_commands_on_this_machine", lambda: iter([command]))
    groups = cluster.autoscaler_groups("1:6379")
    assert groups is not None
    assert {group.name: group.max_count for group in groups} == {"teacher": 4, "student": 1}
    assert groups[0].labels == {"role": "teacher", cluster.NODE_GROUP_LABEL: "teacher"}
    assert cluster.autoscaler_groups("2:6379") is None


def test_a_cluster_without_autoscaling_can_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["python", "/x/monitor.py", "--gcs-address=1:6379"]
    monkeypatch.setattr(cluster, "_commands_on_this_machine", lambda: iter([command]))
    assert cluster.autoscaler_groups("1:6379") == []


def test_a_local_path_is_refused_on_several_machines(tmp_path: Path) -> None:
    local = config(teacher={"model": str(tmp_path)})
    assert cluster.check_paths(local, num_machines=1) == []
    problems = cluster.check_paths(local, num_machines=2)
    assert [p.where for p in problems] == ["output.path", "teacher.model"]
    assert "shared_filesystem" in problems[0].message
    shared = config(cluster={"shared_filesystem": True})
    assert cluster.check_paths(shared, num_machines=2) == []
    assert cluster.check_paths(big(), num_machines=6) == []


def test_an_unknown_engine_argument_is_refused_with_the_near_miss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"max_num_partial_prefills", "swap_space"}
    monkeypatch.setattr(cluster, "engine_arg_names", lambda: known)
    wrong = config(teacher={"engine_args": {"swap_spce": 4, "swap_space": 1}})
    problems = cluster.check_engine_args(wrong)
    assert [p.where for p in problems] == ["teacher.engine_args.swap_spce"]
    assert "'swap_space'" in problems[0].message
    assert cluster.check_engine_args(config()) == []


@pytest.mark.parametrize(
    ("teacher", "refused"),
    [
        ({"engine_args": {"speculative_config": {"method": "ngram"}}}, True),
        (
            {
                "engine_args": {"speculative_config": {"method": "ngram"}},
                "sampling": {"temperature": 0},
            },
            False,
        ),
        ({"engine_args": {"speculative_config": None}}, False),
        ({}, False),
    ],
)
def test_a_sampling_teacher_on_cpus_has_no_draft_model(
    teacher: dict[str, object], refused: bool
) -> None:
    problems = cluster.check_draft_on_cpu(config(teacher=teacher))
    assert [p.where for p in problems] == ["teacher.engine_args.speculative_config"] * refused
    assert all("teacher.sampling.temperature: 0" in p.message for p in problems)


def test_engine_arguments_are_read_from_the_installed_vllm() -> None:
    known = {"max_num_seqs", "kv_cache_dtype", "enable_log_requests"}
    assert known <= cluster.engine_arg_names()
