"""The part of the check that needs the cluster's answer: room for the run, shared paths, engine.

Runs after ``connect``. What an autoscaler could still add counts as there.
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
from raystill.config.run import RunConfig
from raystill.placement import requests
from raystill.placement.nodes import Node, require_nodes, what_is_asked
from raystill.serve.engine.arguments import engine_argument_problems

NODE_GROUP_LABEL = "ray.io/node-group"


@dataclass(frozen=True)
class NodeGroup:
    """A kind of node that an autoscaler may add, and how many of it at most."""

    name: str
    resources: requests.Resources
    max_count: int
    labels: dict[str, str] = field(default_factory=dict)


def check_cluster(config: RunConfig, tell: Callable[[str], None] | None = None) -> list[Problem]:
    """Everything the connected cluster says against the run, all at once.

    ``tell`` is given one line: what is asked for beside what there is.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    here = [Node(dict(node["Resources"]), node.get("Labels") or {}) for node in alive]
    groups = autoscaler_groups(ray.get_runtime_context().gcs_address)
    growth = reachable_nodes(alive, groups, config) if groups is not None else []
    nodes = [*here, *growth]
    if tell is not None:
        tell(what_is_asked(config, nodes))
    grows_out_of_sight = groups is None and _scales_out_of_sight(alive)
    problems: list[Problem] = []
    if not grows_out_of_sight:
        problems = requests.require(config, requests.add_up(node.resources for node in nodes))
        if not problems:
            problems = require_nodes(config, nodes)
    machines = {node["NodeManagerAddress"] for node in alive}
    problems += check_paths(config, num_machines=len(machines) + len(growth))
    has_gpus = any(node.resources.get("GPU", 0) > 0 for node in nodes)
    if not has_gpus_now(here) and (has_gpus or grows_out_of_sight):
        problems += check_gpus_are_said(config)
    if groups is not None:
        problems += check_parallel(config, has_gpus)
    problems += check_gpu_shares(config)
    problems += check_engine_args(config)
    return problems


def has_gpus_now(nodes: Sequence[Node]) -> bool:
    """Whether a GPU is there already."""
    return any(node.resources.get("GPU", 0) > 0 for node in nodes)


def check_gpus_are_said(config: RunConfig) -> list[Problem]:
    """Where GPUs may come only when they are asked for, the run file must ask.

    By default a run takes GPUs if the cluster has some when it starts; here it has none yet, and
    would go on without.
    """
    unsaid = []
    teacher, training = config.teacher, config.training
    if teacher.gpus_per_replica is None and teacher.engine == "vllm":
        ranks = teacher.tensor_parallel_size * teacher.pipeline_parallel_size
        unsaid.append(("teacher.gpus_per_replica", ranks))
    if training.gpus_per_worker is None:
        unsaid.append(("training.gpus_per_worker", 1))
    return [
        Problem(
            where,
            "is unset, and the cluster has no GPU now but may grow to some, which only start when "
            f"they are asked for; set it to {number}, or to 0 for CPUs",
        )
        for where, number in unsaid
    ]


def autoscaler_groups(gcs_address: str) -> list[NodeGroup] | None:
    """What the cluster's autoscaler may add; [] without one, None where it cannot be known here.

    Ray keeps no list of node types in the cluster itself. On the head node, where ``ray up`` and
    submitted jobs run their drivers, the autoscaler's process names its configuration file.
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
    """Nodes the autoscaler may still add that the run could have a use for."""
    useful = sum(len(r.bundles) for r in requests.requests(config, has_gpus=True))
    running = Counter(node.get("Labels", {}).get(NODE_GROUP_LABEL) for node in alive)
    nodes: list[Node] = []
    for group in groups:
        more = min(useful, max(0, group.max_count - running[group.name]))
        nodes += [Node(dict(group.resources), group.labels, is_here=False)] * more
    return nodes


def _own(group: str) -> dict[str, str]:
    """The label that Ray gives every node of a group."""
    return {NODE_GROUP_LABEL: group}


def _scales_out_of_sight(alive: Sequence[dict[str, Any]]) -> bool:
    """Whether nodes are of autoscaled groups, while their bounds are on another machine."""
    return any(NODE_GROUP_LABEL in node.get("Labels", {}) for node in alive)


def _commands_on_this_machine() -> Iterator[list[str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield (folder / "cmdline").read_text(errors="replace").split("\0")


def check_paths(config: RunConfig, num_machines: int) -> list[Problem]:
    """On several machines a local path is another folder on each, unless said otherwise."""
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
    models = {"teacher.model": config.teacher.model, "student.model": config.student.model}
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
    """Names in ``teacher.engine_args`` that this vLLM does not know."""
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


def check_parallel(config: RunConfig, has_gpus: bool) -> list[Problem]:
    """A teacher spread over GPUs needs GPUs: on CPUs one process holds a replica."""
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
    """Shares of a GPU that Ray or NCCL would refuse when the workers start."""
    gpus, workers = config.training.gpus_per_worker or 0.0, config.training.max_workers
    if gpus > 1 and gpus != int(gpus):
        wish = "; expected whole GPUs, or a share of one below 1"
    elif 0 < gpus < 1 and workers > 1:
        wish = (
            f" with {workers} workers, and NCCL refuses two ranks on one GPU; set "
            "training.num_workers: 1, or gpus_per_worker: 1"
        )
    else:
        return []
    return [Problem("training.gpus_per_worker", f"is {gpus:g}{wish}")]


def engine_arg_names() -> set[str]:
    """Fields of vLLM's engine arguments, read from its source: importing vLLM takes 20 s.

    Empty where vLLM is not installed.
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
    """The same from a node of the cluster, for a driver whose machine has no vLLM."""
    import ray

    task = ray.remote(num_cpus=0.01)(engine_arg_names)
    try:
        return ray.get(task.remote(), timeout=60)
    except ray.exceptions.GetTimeoutError:
        return set()
