"""The part of the check that needs the cluster's answer: room for the run, shared paths, engine.

Runs after ``connect``. What an autoscaler could still add counts as there.
"""

import ast
import contextlib
import importlib.util
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raystill.cluster import placement
from raystill.cluster.config import RunConfig
from raystill.cluster.problems import Problem
from raystill.serve.engine_arguments import engine_argument_problems

NODE_GROUP_LABEL = "ray.io/node-group"


@dataclass(frozen=True)
class NodeGroup:
    """A kind of node that an autoscaler may add, and how many of it at most."""

    name: str
    resources: placement.Resources
    max_count: int


def check_cluster(config: RunConfig) -> list[Problem]:
    """Everything the connected cluster says against the run, all at once."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [dict(node["Resources"]) for node in alive]
    groups = autoscaler_groups(ray.get_runtime_context().gcs_address)
    growth = reachable_nodes(alive, groups, config) if groups is not None else []
    problems: list[Problem] = []
    if groups is not None or not _scales_out_of_sight(alive):
        problems = placement.require(config, placement.add_up([*nodes, *growth]))
        if not problems:
            problems = placement.require_nodes(config, [*nodes, *growth])
    machines = {node["NodeManagerAddress"] for node in alive}
    problems += check_paths(config, num_machines=len(machines) + len(growth))
    has_gpus = any(node.get("GPU", 0) > 0 for node in [*nodes, *growth])
    if groups is not None:
        problems += check_parallel(config, has_gpus)
    problems += check_engine_args(config)
    return problems


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
        NodeGroup(name, dict(kind.get("resources") or {}), most)
        for name, kind in cluster["available_node_types"].items()
        if name != cluster["head_node_type"]
        and (most := int(kind.get("max_workers", cluster.get("max_workers", 0)))) > 0
    ]


def reachable_nodes(
    alive: Sequence[dict[str, Any]], groups: Sequence[NodeGroup], config: RunConfig
) -> list[placement.Resources]:
    """Nodes the autoscaler may still add that the run could have a use for, each as resources."""
    useful = sum(len(r.bundles) for r in placement.requests(config, has_gpus=True))
    running = Counter(node.get("Labels", {}).get(NODE_GROUP_LABEL) for node in alive)
    nodes: list[placement.Resources] = []
    for group in groups:
        more = min(useful, max(0, group.max_count - running[group.name]))
        nodes += [dict(group.resources) for _ in range(more)]
    return nodes


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
