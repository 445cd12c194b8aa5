"""Check a run against the connected cluster: resources, shared paths, engine arguments.

Nodes that an autoscaler can still add count as if they were there.
"""

import ast
import contextlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raystill.base.errors import Problem
from raystill.cluster.check.teachers import of_teacher
from raystill.config.run import RunConfig
from raystill.placement import requests
from raystill.placement.nodes import Node, require_nodes, what_is_asked
from raystill.serve.engine.arguments import engine_argument_problems

NODE_GROUP_LABEL = "ray.io/node-group"


@dataclass(frozen=True)
class NodeGroup:
    """A node type of an autoscaler, and the most nodes that it may have of it."""

    name: str
    resources: requests.Resources
    max_count: int
    labels: dict[str, str] = field(default_factory=dict)


def check_cluster(config: RunConfig, tell: Callable[[str], None] | None = None) -> list[Problem]:
    """All problems of the run on the connected cluster.

    ``tell`` is called with one line: the resources that the run requests, and those available.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    running = [Node(dict(node["Resources"]), node.get("Labels") or {}) for node in alive]
    groups = autoscaler_groups(ray.get_runtime_context().gcs_address)
    growth = reachable_nodes(alive, groups, config) if groups is not None else []
    nodes = [*running, *growth]
    if tell is not None:
        tell(what_is_asked(config, nodes))
    grows_unseen = groups is None and _grows_unseen(alive)
    problems: list[Problem] = []
    if not grows_unseen:  # Else more may come than is known here, so that anything may fit.
        problems = requests.require(config, requests.add_up(node.resources for node in nodes))
        if not problems:
            problems = require_nodes(config, nodes)
    machines = {node["NodeManagerAddress"] for node in alive}
    problems += check_paths(config, num_machines=len(machines) + len(growth))
    has_gpus = any(node.resources.get("GPU", 0) > 0 for node in nodes)
    problems += check_gpu_shares(config)
    for name, one in config.by_teacher.items():
        of_one: list[Problem] = []
        if not has_gpus_now(running) and (has_gpus or grows_unseen):
            of_one += check_gpus_are_said(one)
        if groups is not None:
            of_one += check_parallel(one, has_gpus)
        of_one += check_engine_args(one)
        if not (has_gpus or grows_unseen):
            of_one += check_draft_on_cpu(one)
        problems += of_teacher(name, of_one)
    return list(dict.fromkeys(problems))


def has_gpus_now(nodes: Sequence[Node]) -> bool:
    """Whether any of the nodes has a GPU."""
    return any(node.resources.get("GPU", 0) > 0 for node in nodes)


def check_gpus_are_said(config: RunConfig) -> list[Problem]:
    """On a cluster that starts GPU nodes only on request, the run file must set the GPUs.

    By default a run uses GPUs if the cluster has any when it starts. Here it has none yet, and the
    run would go on without.
    """
    unset = []
    teacher, training = config.teacher, config.training
    if teacher.gpus_per_replica is None and teacher.engine == "vllm":
        ranks = teacher.tensor_parallel_size * teacher.pipeline_parallel_size
        unset.append(("teacher.gpus_per_replica", ranks))
    if training.gpus_per_worker is None:
        unset.append(("training.gpus_per_worker", 1))
    return [
        Problem(
            where,
            "is unset, and the cluster has no GPU now but may add some, which only start when they "
            f"are asked for; set it to {number}, or to 0 for CPUs",
        )
        for where, number in unset
    ]


def autoscaler_groups(gcs_address: str) -> list[NodeGroup] | None:
    """The node types of the cluster's autoscaler: [] without one, None if unknown on this machine.

    Ray keeps no list of node types in the cluster itself. On the head node, where the drivers of
    ``ray up`` and of submitted jobs run, the command line of the autoscaler's process has the path
    of its configuration file.
    """
    monitors = [
        command
        for command in _commands_on_this_machine()
        if any(part.endswith("monitor.py") for part in command)
        and f"--gcs-address={gcs_address}" in command
    ]
    if not monitors:
        return None
    prefix = "--autoscaling-config="
    paths = [part.removeprefix(prefix) for part in monitors[0] if part.startswith(prefix)]
    if not paths:
        return []
    cluster = yaml.safe_load(Path(paths[0]).expanduser().read_text())
    return [
        NodeGroup(
            name, dict(kind.get("resources") or {}), most, {**kind.get("labels", {}), **_own(name)}
        )
        for name, kind in cluster["available_node_types"].items()
        if name != cluster["head_node_type"]
        and (most := int(kind.get("max_workers", cluster.get("max_workers", 0)))) > 0
    ]


def reachable_nodes(
    alive: Sequence[dict[str, Any]], groups: Sequence[NodeGroup], config: RunConfig
) -> list[Node]:
    """Nodes that the autoscaler can still add, of each type at most as many as the run can use."""
    useful = sum(len(r.bundles) for r in requests.requests(config, has_gpus=True))
    counts = Counter(node.get("Labels", {}).get(NODE_GROUP_LABEL) for node in alive)
    nodes: list[Node] = []
    for group in groups:
        more = min(useful, max(0, group.max_count - counts[group.name]))
        nodes += [Node(dict(group.resources), group.labels, is_here=False)] * more
    return nodes


def _own(group: str) -> dict[str, str]:
    """The label that Ray gives every node of a group."""
    return {NODE_GROUP_LABEL: group}


def _grows_unseen(alive: Sequence[dict[str, Any]]) -> bool:
    """Whether nodes belong to an autoscaler's types, whose limits only the head node knows."""
    return any(NODE_GROUP_LABEL in node.get("Labels", {}) for node in alive)


def _commands_on_this_machine() -> Iterator[list[str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # A process that has ended meanwhile.
            yield (folder / "cmdline").read_text(errors="replace").split("\0")


def check_paths(config: RunConfig, num_machines: int) -> list[Problem]:
    """On several machines, local paths need ``cluster.shared_filesystem``.

    Otherwise the path is another folder on each of them.
    """
    if num_machines <= 1 or config.cluster.shared_filesystem:
        return []
    remedy = (
        "use a URI (s3://, gs://), or put it on storage that all machines see under the same "
        "path and set cluster.shared_filesystem: true"
    )
    problems = []
    output = config.output.path
    if output is None or "://" not in output:
        problems.append(
            Problem(
                where="output.path",
                message=(
                    f"{output or 'the default runs/<name>'} is a local path, and the cluster has "
                    f"or can grow to {num_machines} machines; {remedy}"
                ),
            )
        )
    models = {
        f"teachers.{name}.model" if name else "teacher.model": one.teacher.model
        for name, one in config.by_teacher.items()
    } | {"student.model": config.student.model}
    for where, model in models.items():
        if model is not None and Path(model).is_dir():
            problems.append(
                Problem(
                    where=where,
                    message=(
                        f"{model} is a folder of this machine, and the cluster has or can grow "
                        f"to {num_machines} machines; name a Hugging Face id, or {remedy}"
                    ),
                )
            )
    return problems


def check_engine_args(config: RunConfig) -> list[Problem]:
    """Does vLLM know all names in ``teacher.engine_args``?"""
    wanted = config.teacher.engine_args
    if not wanted or config.teacher.engine != "vllm":
        return []
    known = engine_arg_names() or _ask_a_node()
    if not known:
        return [
            Problem(
                where="teacher.engine",
                message=(
                    "is vllm, but vLLM is installed neither here nor on the node that was asked; "
                    "install requirements/cpu.txt or requirements/gpu.txt on every node"
                ),
            )
        ]
    return [
        Problem(where=f"teacher.engine_args.{name}", message=message)
        for name, message in engine_argument_problems(config.teacher, known).items()
    ]


def check_draft_on_cpu(config: RunConfig) -> list[Problem]:
    """A teacher on a CPU that samples must not have a draft model.

    vLLM's CPU build spreads the temperature of a request over its drafted tokens by a function that
    drops its result (``_expand_kernel_impl`` in vLLM 0.32.0): what it samples is not the teacher's.
    """
    teacher = config.teacher
    speculative = teacher.engine == "vllm" and teacher.engine_args.get("speculative_config")
    if not speculative or teacher.sampling.temperature == 0:
        return []
    message = (
        "is set for a teacher on CPUs that samples, and vLLM's CPU build samples wrong tokens with "
        "a draft; leave it out, or set teacher.sampling.temperature: 0"
    )
    return [Problem("teacher.engine_args.speculative_config", message)]


def check_parallel(config: RunConfig, has_gpus: bool) -> list[Problem]:
    """A parallel teacher needs GPUs: on CPUs a replica is one process."""
    teacher = config.teacher
    ranks = teacher.tensor_parallel_size * teacher.pipeline_parallel_size
    if ranks == 1 or has_gpus or teacher.engine != "vllm":
        return []
    return [
        Problem(
            where="teacher.tensor_parallel_size",
            message=(
                f"times pipeline_parallel_size is {ranks}, but the cluster has no GPU and cannot "
                "grow to one; set both to 1 and use num_replicas on CPUs"
            ),
        )
    ]


def check_gpu_shares(config: RunConfig) -> list[Problem]:
    """Is ``gpus_per_worker`` a share that Ray and NCCL accept when the workers start?"""
    gpus, workers = config.training.gpus_per_worker or 0.0, config.training.max_workers
    if gpus > 1 and gpus != int(gpus):
        expected = "; expected whole GPUs, or a share of one below 1"
    elif 0 < gpus < 1 and workers > 1:
        expected = (
            f" with {workers} workers, and NCCL refuses two ranks on one GPU; set "
            "training.num_workers: 1, or gpus_per_worker: 1"
        )
    else:
        return []
    return [Problem("training.gpus_per_worker", f"is {gpus:g}{expected}")]


def engine_arg_names() -> set[str]:
    """Names of vLLM's engine arguments; empty if vLLM is not installed.

    They are read from its source code, because importing vLLM takes 20 s.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return set()
    source = Path(spec.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    if not source.exists():
        return set()
    return {
        item.target.id
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def _ask_a_node() -> set[str]:
    """:func:`engine_arg_names` on a node of the cluster, for a driver's machine without vLLM."""
    import ray

    task = ray.remote(num_cpus=0.01)(engine_arg_names)
    try:
        return ray.get(task.remote(), timeout=60)
    except ray.exceptions.GetTimeoutError:
        return set()
