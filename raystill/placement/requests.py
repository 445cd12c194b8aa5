"""CPU cores, GPUs and Ray resources that the teacher's replicas and the student's workers request.

On a node without GPUs the teacher's engines and the student's workers get disjoint lists of cores:
vLLM's own binding would put every engine on core 0, where all of them would take turns.

Pure arithmetic over the configuration and resource dictionaries; imports no Ray.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from raystill.base.errors import Problem
from raystill.config.run import RunConfig
from raystill.config.teacher import section_of

Resources = dict[str, float]
API_CPUS = 0.25
SLACK = 1e-6
"""Amount by which sums of fractions may be off: 0.6 + 0.4 must fit on one GPU."""
# By default glibc returns the memory of each freed tensor to the kernel, which has to clear the
# same pages for the next tensor: a fifth of a student's step on a CPU. With these settings, which
# glibc reads when a process starts, the heap keeps its largest size.
CPU_STUDENT_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_ARENA_MAX": "1",
}


def teacher_cores(config: RunConfig, available: Sequence[int]) -> tuple[int, ...]:
    """Return the cores for all teacher replicas on a node; by default the first half.

    ``available``: ids of the cores that this process may use, as ``os.sched_getaffinity(0)``.
    Raises ValueError if a configured core is not among them.
    """
    cores = sorted(available)
    if config.teacher.cpu_cores is not None:
        return _only_existing("teacher.cpu_cores", config.teacher.cpu_cores, cores)
    return tuple(cores[: max(1, len(cores) // 2)])


def student_cores(config: RunConfig, available: Sequence[int]) -> tuple[int, ...]:
    """Return the cores for all student workers on a node; by default the second half.

    ``available`` and errors: as for `teacher_cores`.
    """
    cores = sorted(available)
    if config.training.cpu_cores == "all":
        return tuple(cores)
    if config.training.cpu_cores is not None:
        return _only_existing("training.cpu_cores", config.training.cpu_cores, cores)
    if all(one.teacher.engine == "api" for one in config.by_teacher.values()):
        return tuple(cores)
    # On a node with one core the teacher has it, and the student shares it.
    return tuple(cores[max(1, len(cores) // 2) :]) or tuple(cores)


def share_of_cores(cores: Sequence[int], index: int, count: int) -> tuple[int, ...]:
    """Return the cores of process ``index`` of ``count`` on a node: at least one.

    Shares are contiguous and differ by at most one core; the larger ones come first. If there are
    fewer cores than processes, several processes share a core.
    """
    if len(cores) <= count:
        return (cores[index % len(cores)],)
    size, longer = divmod(len(cores), count)
    index %= count
    start = index * size + min(index, longer)
    return tuple(cores[start : start + size + (index < longer)])


@dataclass(frozen=True)
class Request:
    """The Ray resources of one teacher replica or one student worker.

    who: "teacher replica", "student sampler" or "student worker". section: the section of the run
    file that sets it. bundles: resources that must be together on one node, each. label_selector:
    labels that the nodes must have.
    """

    who: str
    section: str
    bundles: tuple[Resources, ...] = field(default_factory=tuple)
    label_selector: Mapping[str, str] = field(default_factory=dict)

    @property
    def total(self) -> Resources:
        """Sum over the bundles."""
        return add_up(self.bundles)


def teacher_bundles(config: RunConfig, has_gpus: bool) -> list[Resources]:
    """Return the placement group bundles of one replica: one for each rank, or one without GPUs.

    ``teacher.resources_per_replica`` is for the whole replica; its bundles share it equally.
    ``teacher.gpus_per_replica`` applies whether or not the cluster has GPUs yet.
    """
    teacher = config.teacher
    ranks = teacher.tensor_parallel_size * teacher.pipeline_parallel_size
    gpus = teacher.gpus_per_replica
    if gpus is None:
        gpus = ranks if has_gpus and teacher.engine == "vllm" else 0.0
    num_bundles = ranks if gpus else 1
    # A replica that asks a service only waits.
    bundle: Resources = {"CPU": API_CPUS if teacher.engine == "api" else 1.0}
    if gpus:
        bundle["GPU"] = gpus / num_bundles
    for name, amount in teacher.resources_per_replica.items():
        bundle[name] = amount / num_bundles
    if teacher.accelerator_type is not None:
        bundle[accelerator_resource(teacher.accelerator_type)] = 0.001  # As Ray itself asks.
    return [dict(bundle) for _ in range(num_bundles)]


def student_resources(config: RunConfig, has_gpus: bool) -> Resources:
    """Return the resources of one worker, as for ``ScalingConfig.resources_per_worker``."""
    training = config.training
    gpus = training.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if has_gpus else 0.0
    resources: Resources = {"CPU": training.cpus_per_worker, **training.resources_per_worker}
    if gpus:
        resources["GPU"] = gpus
    return resources


def sampler_resources(config: RunConfig, has_gpus: bool) -> Resources:
    """Return the resources of one of the student's samplers: a GPU, or no CPU without GPUs.

    There it runs on the teacher's cores: the two take turns. ``policy.accelerator_type`` asks for a
    GPU whether or not the cluster has any yet.
    """
    policy = config.policy
    resources: Resources = {"CPU": 0.0, **policy.resources_per_replica}
    if has_gpus or policy.accelerator_type is not None:
        resources |= {"CPU": 1.0, "GPU": 1.0}
    if policy.accelerator_type is not None:
        resources[accelerator_resource(policy.accelerator_type)] = 0.001
    return resources


def accelerator_resource(accelerator_type: str) -> str:
    """Return Ray's resource name of an accelerator type."""
    return f"accelerator_type:{accelerator_type}"


def requests(config: RunConfig, has_gpus: bool) -> list[Request]:
    """Return what must run at the same time for the run to make progress.

    That is the fewest replicas and workers that are configured. A teacher that may scale to 0
    replicas still needs one to answer.
    """
    student = student_resources(config, has_gpus)
    if config.training.accelerator_type is not None:
        student = {**student, accelerator_resource(config.training.accelerator_type): 0.001}
    replicas: list[Request] = []
    for name, one in config.by_teacher.items():
        replicas += _replicas(one, name, has_gpus)
    worker = Request("student worker", "training", (student,), config.training.label_selector)
    asked = (sampler_resources(config, has_gpus),)
    sampler = Request("student sampler", "policy", asked, config.policy.label_selector)
    samplers = [sampler] * (config.policy.min_replicas if config.policy.enabled else 0)
    return replicas + samplers + [worker] * config.training.min_workers


def _replicas(config: RunConfig, name: str, has_gpus: bool) -> list[Request]:
    """The fewest replicas of one teacher; name: among several, else ""."""
    replicas = config.teacher.num_replicas
    fewest = replicas if isinstance(replicas, int) else max(1, replicas.min)
    teacher = tuple(teacher_bundles(config, has_gpus))
    if config.teacher.pipeline_parallel_size == 1:
        teacher = (add_up(teacher),)  # One actor on one node, with vLLM's workers as its children.
    who = f"{name} teacher replica" if name else "teacher replica"
    return [Request(who, section_of(name), teacher, config.teacher.label_selector)] * fewest


def require(config: RunConfig, resources_total: Resources) -> list[Problem]:
    """Return a problem for each resource of which the run needs more than ``resources_total``."""
    wanted = requests(config, has_gpus=resources_total.get("GPU", 0) > 0)
    needed = add_up(request.total for request in wanted)
    short = [
        name for name, amount in needed.items() if amount > resources_total.get(name, 0.0) + SLACK
    ]
    return [
        Problem(
            where=_setting_behind(config, name),
            message=(
                f"the run needs {name}: {_number(needed[name])} ({_who_needs(wanted, name)}) but "
                f"the cluster has {_number(resources_total.get(name, 0.0))} and cannot grow to "
                f"more; {_remedy(name)}"
            ),
        )
        for name in short
    ]


def add_up(parts: Iterable[Resources]) -> Resources:
    """Add up resource dictionaries."""
    total: Resources = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def describe(resources: Resources) -> str:
    """Format resources for a person, without memory and Ray's markers of nodes and accelerators."""
    shown = {
        name: amount
        for name, amount in resources.items()
        if name not in ("memory", "object_store_memory")
        and not name.startswith(("node:", "accelerator_type:"))
    }
    return ", ".join(f"{name}: {_number(amount)}" for name, amount in sorted(shown.items())) or "-"


def _number(amount: float) -> str:
    return f"{amount:.3f}".rstrip("0").rstrip(".")


def _only_existing(where: str, cores: Sequence[int], available: Sequence[int]) -> tuple[int, ...]:
    missing = sorted(set(cores) - set(available))
    if missing or not cores:
        raise ValueError(
            f"{where} names cores {missing or list(cores)}, but on this node the run may use "
            f"{list(available)}; name some of those, or leave {where} unset"
        )
    return tuple(cores)


def _who_needs(wanted: Sequence[Request], name: str) -> str:
    """Say how much of a resource the parts of the run need: ``2 student workers of 1``."""
    parts = []
    for who in dict.fromkeys(request.who for request in wanted):
        amounts = [
            request.total[name] for request in wanted if request.who == who if name in request.total
        ]
        if amounts:
            plural = "s" if len(amounts) > 1 else ""
            parts.append(f"{len(amounts)} {who}{plural} of {_number(amounts[0])}")
    return ", ".join(parts)


def _setting_behind(config: RunConfig, name: str) -> str:
    """Return the setting to change first if there is too little of the resource ``name``."""
    for teacher, one in config.by_teacher.items():
        if name in one.teacher.resources_per_replica:
            return f"{section_of(teacher)}.resources_per_replica"
    if config.policy.enabled and name in config.policy.resources_per_replica:
        return "policy.resources_per_replica"
    if name in config.training.resources_per_worker:
        return "training.resources_per_worker"
    if config.training.min_workers > 1:
        return "training.num_workers"
    return f"{section_of(next(iter(config.by_teacher)))}.num_replicas"


def _remedy(name: str) -> str:
    if name == "CPU":
        return (
            "lower training.num_workers or teacher.num_replicas, or give the cluster more CPUs "
            "(a local one: cluster.num_cpus)"
        )
    if name == "GPU":
        return (
            "lower training.num_workers, policy.num_replicas or the teacher's replicas and "
            "parallel sizes, or add GPUs"
        )
    return f"start nodes with the resource {name}, or remove it from the run file"
