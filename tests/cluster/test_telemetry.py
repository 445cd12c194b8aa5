"""Ray metrics of a run: every figure of ``metrics.jsonl``, exported by a real Ray, and a dashboard
whose panels name just these.
"""

import json
import re
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raystill.base.run_folder import RunFolder
from raystill.cluster.coordinator.snapshot import Snapshot
from raystill.cluster.report.exporters import CATALOGUE, STEP, Figure, Telemetry, store_hit_rate
from raystill.config.run import RunConfig
from tests.support.runs import run_of

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "cluster" / "grafana" / "raystill.json"
OF_SERVE = {"ray_serve_deployment_queued_queries", "ray_serve_replica_processing_queries"}
PROGRESS = {"step": 7, "loss": 2.5, "grad_norm": None, "objective/forward_kl": 2.25, "workers": 2}
SNAPSHOT = Snapshot(
    progress=PROGRESS,
    evaluation={"kl_nats_per_token": 1.5, "bound": "lower"},
    counters={
        **{"rows_asked": 6, "rows_reused": 3, "rows_scored": 3, "teacher_rows": 6},
        **{"teachers/code/rows_accepted": 5, "teachers/code/unheard_of": 1},
    },
    dropped={"too_long": 2},
    rows_ahead=12,
    lives=1,
)


class Kept:
    """A metric that keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, dict[str, str]]] = []

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("set", value, tags))

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("inc", value, tags))


def recorded() -> tuple[Telemetry, dict[str, Kept]]:
    kept: dict[str, Kept] = {}

    def make(figure: Figure) -> Kept:
        return kept.setdefault(figure.name, Kept())

    return Telemetry("demo", make), kept


def test_a_snapshot_is_recorded_with_the_run_and_what_it_is_of() -> None:
    telemetry, kept = recorded()
    telemetry.update(SNAPSHOT, replicas=3)
    run = {"run": "demo"}
    assert kept["loss"].calls == [("set", 2.5, run)]
    assert kept["objective"].calls == [("set", 2.25, run | {"term": "forward_kl"})]
    assert kept["held_out_kl_nats_per_token"].calls == [("set", 1.5, run)]
    assert kept["rows_dropped"].calls == [("set", 2.0, run | {"reason": "too_long"})]
    assert kept["of_teacher_rows_accepted"].calls == [("set", 5.0, run | {"teacher": "code"})]
    assert not any("unheard_of" in name for name in kept)
    assert kept["store_hit_rate"].calls == [("set", 0.25, run)]
    assert kept["teacher_replicas"].calls == [("set", 3.0, run)]
    assert kept["teacher_rows"].calls == [("inc", 6, run)]
    assert "grad_norm" not in kept  # A step that was skipped has none.


def test_counters_grow_by_what_is_new() -> None:
    telemetry, kept = recorded()
    for rows in (6, 6, 10):
        telemetry.update(Snapshot(counters={"teacher_rows": rows}), replicas=0)
    assert [value for _, value, _ in kept["teacher_rows"].calls] == [6, 4]


def test_the_hit_rate_is_of_all_rows_the_stream_passed_on() -> None:
    assert store_hit_rate({}) is None
    assert store_hit_rate({"rows_reused": 5}) == 1.0
    assert store_hit_rate({"rows_asked": 3, "rows_reused": 1}) == 0.25


def test_every_figure_of_a_metrics_line_is_exported(tmp_path: Path) -> None:
    from raystill.train.step.ranks import Ranks
    from raystill.train.step.step import StepResult
    from raystill.train.worker.progress import Progress

    told: list[dict[str, Any]] = []
    coordinator = SimpleNamespace(
        add=SimpleNamespace(remote=lambda _: None), progress=SimpleNamespace(remote=told.append)
    )
    config = RunConfig.model_validate(
        {"teacher": {"model": "x"}, "student": {"layers": [0]}, "prompts": {"path": "x"}}
    )
    folder = RunFolder(str(tmp_path)).ensure()
    progress = Progress(run_of(config, folder, coordinator=coordinator), Ranks())
    result = StepResult(
        step=0,
        trained=True,
        rows=0,
        tokens=3,
        any_more=False,
        any_stop=False,
        lr=0.1,
        objective={"forward_kl": 1.0},
        floored_tokens=1,
    )
    rows: Any = SimpleNamespace(blocked_s=1.0, total_s=2.0)
    progress.account(result, [], rows)
    (line,) = told
    names = {key for key in line if not key.startswith("objective/")} - {"time"}
    assert names == set(STEP)


def metrics_of(dashboard: dict[str, Any]) -> set[str]:
    """Every metric that a panel's expression names."""
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    return set(re.findall(r"\bray_[a-z0-9_]+", "\n".join(expressions)))


def test_the_dashboard_shows_just_what_is_exported_and_serves_queue() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert metrics_of(dashboard) - OF_SERVE == {figure.exported for figure in CATALOGUE}
    assert metrics_of(dashboard) >= OF_SERVE


def test_serves_own_metrics_are_those_of_the_installed_ray() -> None:
    import ray

    serve = Path(ray.__file__).parent / "serve" / "_private"
    source = "\n".join(path.read_text() for path in serve.glob("*.py"))
    for name in OF_SERVE:
        assert f'"{name.removeprefix("ray_")}"' in source


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) - {"__rate_interval", "__all"} == (
        names
    )


@pytest.mark.ray
def test_ray_exports_them_under_these_names(ray_cluster: None) -> None:
    import ray

    Telemetry("demo").update(SNAPSHOT, replicas=3)
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    wanted = {
        r'ray_raystill_loss\{.*run="demo".*\} 2\.5',
        r'ray_raystill_objective\{.*term="forward_kl".*\} 2\.25',
        r'ray_raystill_teacher_rows_total\{.*run="demo".*\} 6\.0',
        r'ray_raystill_rows_dropped\{.*reason="too_long".*\} 2\.0',
    }
    deadline = time.monotonic() + 60
    while wanted:
        assert time.monotonic() < deadline, wanted
        time.sleep(1)
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
        wanted = {pattern for pattern in wanted if not re.search(pattern, text)}
