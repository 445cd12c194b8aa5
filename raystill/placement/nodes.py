"""Whether the nodes of a cluster can hold a run: no bundle is split, no share of a GPU spans two.

Pure arithmetic over resources and labels; imports no Ray.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from raystill.base.errors import Problem
from raystill.config.run import RunConfig
from raystill.placement.requests import SLACK, Request, Resources, add_up, describe, requests

RAYS_OWN = "ray.io/"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, or one that an autoscaler may add (``is_here: False``).

    Ray labels a node itself when it starts (``ray.io/accelerator-type`` and the like), so those of
    a node that is not there yet are not known.
    """

    resources: Resources
    labels: Mapping[str, str] = field(default_factory=dict)
    is_here: bool = True

    def has(self, selector: Mapping[str, str]) -> bool:
        """Whether the labels are what the selector asks for, or may come to be."""
        return all(
            (not self.is_here and key.startswith(RAYS_OWN) and key not in self.labels)
            or matches(wish, self.labels.get(key, ""))
            for key, wish in selector.items()
        )


class Room:
    """What is free on a node while bundles are put there; GPUs one by one."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._free = {n: amount for n, amount in node.resources.items() if n != "GPU"}
        self._gpus = [1.0] * int(node.resources.get("GPU", 0))

    def holds(self, bundle: Resources) -> bool:
        """Whether the bundle would fit beside what is there."""
        others = ((name, amount) for name, amount in bundle.items() if name != "GPU")
        if any(amount > self._free.get(name, 0.0) + SLACK for name, amount in others):
            return False
        wish = bundle.get("GPU", 0.0)
        if wish < 1:
            return wish == 0 or any(free + SLACK >= wish for free in self._gpus)
        return sum(free + SLACK >= 1 for free in self._gpus) >= wish

    def take(self, bundle: Resources) -> None:
        """Put the bundle here; a share goes to the GPU that it fills best."""
        for name, amount in bundle.items():
            if name != "GPU":
                self._free[name] = self._free.get(name, 0.0) - amount
        wish = bundle.get("GPU", 0.0)
        self._gpus.sort()
        if 0 < wish < 1:
            chosen = next(i for i, free in enumerate(self._gpus) if free + SLACK >= wish)
            self._gpus[chosen] -= wish
        elif wish:
            del self._gpus[-int(wish) :]  # The whole ones are the last.

    @property
    def size(self) -> tuple[float, float]:
        """GPUs and CPUs that are free, to choose the fullest by."""
        return sum(self._gpus), self._free.get("CPU", 0.0)


def matches(wish: str, label: str) -> bool:
    """Ray's selector values: ``x``, ``!x``, ``in(x, y)``, ``!in(x, y)``; '' where no label is."""
    text = wish.removeprefix("!")
    if text.startswith("in(") and text.endswith(")"):
        values = {value.strip() for value in text[3:-1].split(",")}
    else:
        values = {text}
    return (label in values) != wish.startswith("!")


def require_nodes(config: RunConfig, nodes: Sequence[Node]) -> list[Problem]:
    """What fits in the sum of ``nodes`` but on no set of them.

    Greedy, largest bundles first, each on the node it fills best.
    """
    has_gpus = any(node.resources.get("GPU", 0) > 0 for node in nodes)
    wanted = requests(config, has_gpus)
    if problems := _require_labels(wanted, nodes):
        return problems
    rooms = [Room(node) for node in nodes]
    bundles = [(request, bundle) for request in wanted for bundle in request.bundles]
    bundles.sort(key=lambda item: (-item[1].get("GPU", 0), -item[1].get("CPU", 0)))
    unplaced = []
    for request, bundle in bundles:
        fitting = [
            room for room in rooms if room.node.has(request.label_selector) and room.holds(bundle)
        ]
        if fitting:
            min(fitting, key=lambda room: room.size).take(bundle)
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
                f"the nodes have {_listed(nodes, request.label_selector)}; ask for less a replica "
                "or worker, run fewer of them, or add larger nodes"
            ),
        )
    ]


def what_is_asked(config: RunConfig, nodes: Iterable[Node]) -> str:
    """What a run asks for beside what there is and may come, for a person."""
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
    """Selectors that no node answers."""
    problems = {}
    for request in wanted:
        if not any(node.has(request.label_selector) for node in nodes):
            where = f"{request.section}.label_selector"
            problems[where] = Problem(
                where,
                f"asks for nodes{_on(request.label_selector)}, and no node has these labels or can "
                f"come to have them; the nodes have {_listed(nodes, request.label_selector)}; "
                "correct the selector, or start nodes with such labels",
            )
    return list(problems.values())


def _on(selector: Mapping[str, str]) -> str:
    if not selector:
        return ""
    return f" on {', '.join(f'{key}: {wish}' for key, wish in selector.items())}"


def _listed(nodes: Sequence[Node], selector: Mapping[str, str]) -> str:
    """The nodes' resources, alike ones once; with labels where a selector looks at them."""
    told: dict[str, int] = {}
    for node in nodes:
        text = describe(node.resources)
        if selector:
            labels = [
                f"{key}: {label}"
                for key, label in sorted(node.labels.items())
                if key in selector or not key.startswith(RAYS_OWN)
            ]
            text += f" ({', '.join(labels) or 'no labels'})"
        told[text] = told.get(text, 0) + 1
    return "; ".join(f"{count} x {text}" if count > 1 else text for text, count in told.items())
