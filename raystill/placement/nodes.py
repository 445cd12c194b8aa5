"""Checks whether the nodes of a cluster have room for a run.

A sum of resources is not enough: a bundle is never split between nodes, and a share of a GPU is
never split between two GPUs. Pure arithmetic over resources and labels; imports no Ray.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from raystill.base.errors import Problem
from raystill.config.run import RunConfig
from raystill.placement.requests import SLACK, Request, Resources, add_up, describe, requests

RAYS_OWN = "ray.io/"
"""Prefix of the labels that Ray itself gives a node."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster, or one that an autoscaler may add (``is_here=False``).

    Ray sets its own labels when a node starts, such as ``ray.io/accelerator-type``. Of a node that
    may be added they are not known.
    """

    resources: Resources
    labels: Mapping[str, str] = field(default_factory=dict)
    is_here: bool = True

    def has(self, selector: Mapping[str, str]) -> bool:
        """Whether the labels fit the selector, or may fit it once the node has started."""
        return all(
            (not self.is_here and key.startswith(RAYS_OWN) and key not in self.labels)
            or matches(value, self.labels.get(key, ""))
            for key, value in selector.items()
        )


class FreeResources:
    """The resources of a node that are still free while bundles are placed; each GPU by itself."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._free = {n: amount for n, amount in node.resources.items() if n != "GPU"}
        self._gpus = [1.0] * int(node.resources.get("GPU", 0))

    def holds(self, bundle: Resources) -> bool:
        """Whether the bundle fits into what is free."""
        others = ((name, amount) for name, amount in bundle.items() if name != "GPU")
        if any(amount > self._free.get(name, 0.0) + SLACK for name, amount in others):
            return False
        gpus = bundle.get("GPU", 0.0)
        if gpus < 1:
            return gpus == 0 or any(free + SLACK >= gpus for free in self._gpus)
        return sum(free + SLACK >= 1 for free in self._gpus) >= gpus

    def take(self, bundle: Resources) -> None:
        """Place the bundle here. A share of a GPU goes to the GPU with the least that is enough."""
        for name, amount in bundle.items():
            if name != "GPU":
                self._free[name] = self._free.get(name, 0.0) - amount
        gpus = bundle.get("GPU", 0.0)
        self._gpus.sort()
        if 0 < gpus < 1:
            chosen = next(i for i, free in enumerate(self._gpus) if free + SLACK >= gpus)
            self._gpus[chosen] -= gpus
        elif gpus:
            del self._gpus[-int(gpus) :]  # Sorted, so the unused GPUs are the last.

    @property
    def size(self) -> tuple[float, float]:
        """GPUs and CPUs that are free, by which the fullest node is chosen."""
        return sum(self._gpus), self._free.get("CPU", 0.0)


def matches(selector_value: str, label: str) -> bool:
    """Whether a label fits a value of a selector: ``x``, ``!x``, ``in(x, y)`` or ``!in(x, y)``.

    As Ray evaluates them. ``label`` is '' if the node does not have that label.
    """
    text = selector_value.removeprefix("!")
    if text.startswith("in(") and text.endswith(")"):
        values = {value.strip() for value in text[3:-1].split(",")}
    else:
        values = {text}
    return (label in values) != selector_value.startswith("!")


def require_nodes(config: RunConfig, nodes: Sequence[Node]) -> list[Problem]:
    """Return the problem of a run that fits into the sum of ``nodes`` but cannot be placed on them.

    Best fit decreasing: the largest bundles first, each on the fullest node that has room. That is
    not always the best placement, so it can refuse a run that would just fit.
    """
    has_gpus = any(node.resources.get("GPU", 0) > 0 for node in nodes)
    wanted = requests(config, has_gpus)
    if problems := _require_labels(wanted, nodes):
        return problems
    free = [FreeResources(node) for node in nodes]
    bundles = [(request, bundle) for request in wanted for bundle in request.bundles]
    # Large bundles first: small ones fit into what is left, and not the other way round.
    bundles.sort(key=lambda item: (-item[1].get("GPU", 0), -item[1].get("CPU", 0)))
    unplaced = []
    for request, bundle in bundles:
        selector = request.label_selector
        fitting = [one for one in free if one.node.has(selector) and one.holds(bundle)]
        if fitting:
            min(fitting, key=lambda one: one.size).take(bundle)
        else:
            unplaced.append((request, bundle))
    if not unplaced:
        return []
    request, bundle = unplaced[0]
    return [
        Problem(
            where=request.section,
            message=(
                f"{len(unplaced)} of {len(bundles)} parts of the run fit on no node; the first is "
                f"a {request.who} that asks for {describe(bundle)}{_on(request.label_selector)}; "
                f"the nodes have {_listed(nodes, request.label_selector)}; ask for less for each "
                "replica or worker, run fewer of them, or add larger nodes"
            ),
        )
    ]


def what_is_asked(config: RunConfig, nodes: Iterable[Node]) -> str:
    """Return a sentence with what a run asks for, what the cluster has, and how it can grow."""
    nodes = list(nodes)
    here = [node.resources for node in nodes if node.is_here]
    more = [node.resources for node in nodes if not node.is_here]
    has_gpus = any(node.resources.get("GPU", 0) > 0 for node in nodes)
    wanted = requests(config, has_gpus)
    parts = []
    for who in dict.fromkeys(request.who for request in wanted):
        alike = [request for request in wanted if request.who == who]
        plural = "s" if len(alike) > 1 else ""
        on = _on(alike[0].label_selector)
        parts.append(f"{len(alike)} {who}{plural} of {describe(alike[0].total)}{on}")
    plural = "" if len(here) == 1 else "s"
    growth = f", and can grow by {describe(add_up(more))}" if more else ""
    return (
        f"asked for: {', '.join(parts)}; the cluster has {describe(add_up(here))} on {len(here)} "
        f"node{plural}{growth}"
    )


def _require_labels(wanted: Sequence[Request], nodes: Sequence[Node]) -> list[Problem]:
    """Return a problem for each label selector that no node fits."""
    problems = {}
    for request in wanted:
        if not any(node.has(request.label_selector) for node in nodes):
            where = f"{request.section}.label_selector"
            problems[where] = Problem(
                where,
                f"asks for nodes{_on(request.label_selector)}, and no node has these labels or "
                f"will have them; the nodes have {_listed(nodes, request.label_selector)}; "
                "correct the selector, or start nodes with such labels",
            )
    return list(problems.values())


def _on(selector: Mapping[str, str]) -> str:
    if not selector:
        return ""
    return f" on {', '.join(f'{key}: {value}' for key, value in selector.items())}"


def _listed(nodes: Sequence[Node], selector: Mapping[str, str]) -> str:
    """List the nodes' resources, equal nodes once; with their labels if there is a selector."""
    counts: dict[str, int] = {}
    for node in nodes:
        text = describe(node.resources)
        if selector:
            labels = [
                f"{key}: {label}"
                for key, label in sorted(node.labels.items())
                if key in selector or not key.startswith(RAYS_OWN)
            ]
            text += f" ({', '.join(labels) or 'no labels'})"
        counts[text] = counts.get(text, 0) + 1
    return "; ".join(f"{count} x {text}" if count > 1 else text for text, count in counts.items())
