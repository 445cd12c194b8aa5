"""The cluster file is what Ray accepts, and the cluster run file fits on the cluster it makes."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RUN_FILE = ROOT / "configs" / "cluster_8b_from_70b.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict:
    return yaml.safe_load((ROOT / "ray_config.yaml").read_text())


@pytest.fixture(scope="module")
def run_config():
    from raystill.config.run import RunConfig

    return RunConfig.model_validate(yaml.safe_load(RUN_FILE.read_text()))


def nodes_at_most(cluster: dict) -> list[dict[str, float]]:
    kinds = cluster["available_node_types"]
    return [
        dict(kind["resources"])
        for name, kind in kinds.items()
        for _ in range(1 if name == cluster["head_node_type"] else kind["max_workers"])
    ]


def test_the_cluster_file_satisfies_rays_schema(cluster: dict) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_ray_accepts_the_cluster_file_once_defaults_are_filled_in(
    cluster: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(ROOT)  # File mounts are named from the project's folder.
    prepared = prepare_config(dict(cluster))
    validate_config(prepared)
    assert prepared["setup_commands"] == cluster["setup_commands"]


def test_a_misspelt_key_would_be_refused(cluster: dict) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_worker": 3}, schema)


def test_teacher_and_student_groups_start_empty_and_give_idle_nodes_back(cluster: dict) -> None:
    for name in ("teacher", "student"):
        kind = cluster["available_node_types"][name]
        assert kind["min_workers"] == 0
        assert kind["max_workers"] >= 1
        assert kind["idle_timeout_s"] > 0
        assert kind["labels"] == {"role": name}
    groups = [cluster["available_node_types"][name] for name in ("teacher", "student")]
    assert sum(group["max_workers"] for group in groups) <= cluster["max_workers"]


def test_teachers_run_on_spot_and_the_head_computes_nothing(cluster: dict) -> None:
    kinds = cluster["available_node_types"]
    assert kinds["teacher"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in kinds["student"]["node_config"]
    assert kinds["head"]["resources"]["CPU"] == 0


def test_every_node_gets_the_pinned_gpu_packages(cluster: dict) -> None:
    assert any("requirements/gpu.txt" in command for command in cluster["setup_commands"])
    for folder in cluster["file_mounts"].values():
        assert (ROOT / folder).is_dir()


def test_the_cluster_run_file_fits_on_the_cluster(cluster: dict, run_config) -> None:
    from raystill.placement import requests
    from raystill.placement.nodes import Node, require_nodes

    nodes = nodes_at_most(cluster)
    assert requests.require(run_config, requests.add_up(nodes)) == []
    assert require_nodes(run_config, [Node(node) for node in nodes]) == []


def test_all_replicas_the_run_file_allows_fit_in_the_teacher_group(
    cluster: dict, run_config
) -> None:
    from raystill.placement import requests

    teacher = cluster["available_node_types"]["teacher"]
    bundles = requests.teacher_bundles(run_config, has_gpus=True)
    assert requests.add_up(bundles)["GPU"] == teacher["resources"]["GPU"]
    assert requests.add_up(bundles)["teacher"] == teacher["resources"]["teacher"]
    assert run_config.teacher.max_replicas == teacher["max_workers"]
    assert run_config.teacher.gpus_per_replica == teacher["resources"]["GPU"]  # None at the start.


def test_the_cluster_run_file_keeps_the_bounds_on_rows_ahead(run_config) -> None:
    assert run_config.rows_ahead == 3584
    assert run_config.rows_ahead >= run_config.min_rows_ahead
    assert run_config.rows_ahead >= run_config.advised_rows_ahead
