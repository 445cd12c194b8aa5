"""The KubeRay manifests: fields that exist, read by Ray's own autoscaler, and the same numbers as
``ray_config.yaml`` and the run file. Nothing here asks a Kubernetes cluster.
"""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support import kuberay_fields

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster" / "kuberay"
RUN_FILE = ROOT / "configs" / "cluster_8b_from_70b.yaml"
GROUPS = ("teacher", "student")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.fixture
def manifest() -> dict[str, Any]:
    return read("raycluster.yaml")


@pytest.fixture(scope="module")
def machines() -> dict[str, Any]:
    """The node types of ray_config.yaml."""
    return yaml.safe_load((ROOT / "ray_config.yaml").read_text())["available_node_types"]


@pytest.fixture
def derived(manifest: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler makes of the RayCluster, checked by Ray's own schema on the way."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    stored = copy.deepcopy(manifest)
    stored["metadata"]["namespace"] = "default"
    return autoscaling_config._derive_autoscaling_config_from_ray_cr(stored)


def test_every_field_is_one_that_kuberay_knows(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, kuberay_fields.RAY_CLUSTER)
    jsonschema.validate(read("rayjob.yaml"), kuberay_fields.RAY_JOB)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("spec",), "rayVerison", "2.60.0"),
        (("spec", "headGroupSpec"), "replicas", 1),
        (("spec", "workerGroupSpecs", 0), "maxReplicas", "4"),
        (("spec", "workerGroupSpecs", 0, "resources"), "GPU", 4),
        (("spec", "autoscalerOptions"), "upscalingMode", "Fast"),
    ],
)
def test_a_wrong_field_would_be_found(
    manifest: dict[str, Any], path: tuple, key: str, value: object
) -> None:
    inner: Any = manifest
    for part in path:
        inner = inner[part]
    inner[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, kuberay_fields.RAY_CLUSTER)


def test_the_job_brings_the_very_same_cluster(manifest: dict[str, Any]) -> None:
    assert read("rayjob.yaml")["spec"]["rayClusterSpec"] == manifest["spec"]


def test_groups_are_those_of_the_cluster_file(
    derived: dict[str, Any], machines: dict[str, Any]
) -> None:
    kinds = derived["available_node_types"]
    assert set(kinds) == {"headgroup", *GROUPS}
    assert kinds["headgroup"]["resources"]["CPU"] == machines["head"]["resources"]["CPU"] == 0
    for name in GROUPS:
        ours, theirs = kinds[name], machines[name]
        assert {n: v for n, v in ours["resources"].items() if n != "memory"} == theirs["resources"]
        for key in ("min_workers", "max_workers", "idle_timeout_s", "labels"):
            assert ours[key] == theirs[key], (name, key)


def test_the_autoscaler_is_that_of_the_cluster_file(derived: dict[str, Any]) -> None:
    cluster = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    for key in ("max_workers", "idle_timeout_minutes", "upscaling_speed"):
        assert derived[key] == cluster[key], key


def test_pods_go_to_the_instance_types_of_the_cluster_file(
    manifest: dict[str, Any], machines: dict[str, Any]
) -> None:
    for group in manifest["spec"]["workerGroupSpecs"]:
        machine = machines[group["groupName"]]
        chosen = group["template"]["spec"]["nodeSelector"]
        assert chosen["node.kubernetes.io/instance-type"] == machine["node_config"]["InstanceType"]
        spot = "InstanceMarketOptions" in machine["node_config"]
        assert (chosen["karpenter.sh/capacity-type"] == "spot") == spot
        (container,) = group["template"]["spec"]["containers"]
        asked = container["resources"]
        assert asked["requests"] == asked["limits"]
        assert float(asked["requests"]["nvidia.com/gpu"]) == machine["resources"]["GPU"]
        assert float(asked["requests"]["cpu"]) <= machine["resources"]["CPU"]


def test_pods_ask_for_nearly_the_disk_of_the_cluster_file(
    manifest: dict[str, Any], machines: dict[str, Any]
) -> None:
    groups = {group["groupName"]: group for group in manifest["spec"]["workerGroupSpecs"]}
    for name, group in {"head": manifest["spec"]["headGroupSpec"], **groups}.items():
        (container,) = group["template"]["spec"]["containers"]
        asked = container["resources"]["requests"]["ephemeral-storage"]
        (disk,) = machines[name]["node_config"]["BlockDeviceMappings"]
        assert 0.85 <= float(asked.removesuffix("Gi")) / disk["Ebs"]["VolumeSize"] < 1


def test_the_run_file_fits_on_the_pods(derived: dict[str, Any]) -> None:
    from raystill.config.run import RunConfig
    from raystill.placement import requests
    from raystill.placement.nodes import Node, require_nodes

    config = RunConfig.model_validate(yaml.safe_load(RUN_FILE.read_text()))
    kinds = derived["available_node_types"]
    nodes = [
        dict(kinds[name]["resources"]) for name in GROUPS for _ in range(kinds[name]["max_workers"])
    ]
    assert requests.require(config, requests.add_up(nodes)) == []
    assert require_nodes(config, [Node(node) for node in nodes]) == []
    assert config.teacher.max_replicas == kinds["teacher"]["max_workers"]


def test_the_job_runs_the_run_file_with_time_for_a_checkpoint() -> None:
    spec = read("rayjob.yaml")["spec"]
    python, script, command, run_file = shlex.split(spec["entrypoint"])
    assert (python, command) == ("python", "run")
    for path in (script, run_file):
        assert (ROOT / Path(path).relative_to("/opt/raystill")).is_file()
    env = yaml.safe_load(spec["runtimeEnvYAML"])
    assert int(env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_no_pod_is_without_a_token_and_none_holds_one(manifest: dict[str, Any]) -> None:
    assert manifest["spec"]["authOptions"] == {"mode": "token"}
    assert manifest["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in (manifest["spec"]["headGroupSpec"], *manifest["spec"]["workerGroupSpecs"]):
        for variable in group["template"]["spec"]["containers"][0]["env"]:
            assert "value" not in variable


def test_the_image_has_the_pinned_packages_and_the_whole_project(manifest: dict[str, Any]) -> None:
    text = (FOLDER / "Dockerfile").read_text()
    for variant in ("cpu", "gpu"):
        pinned = (ROOT / "requirements" / f"{variant}.txt").read_text()
        assert f"\nray=={manifest['spec']['rayVersion']}\n" in pinned
        assert f"VARIANT={variant}" in text
    assert '"/tmp/requirements/${VARIANT}.txt"' in text
    copied = re.findall(r"^COPY (?:--chown=ray )?(.+) \S+$", text, re.MULTILINE)
    names = {name for group in copied for name in group.split()}
    assert names == {
        *("requirements", "driver.py", ".rayignore", "raystill"),
        *("cluster", "serve", "train", "datasets", "configs", "examples"),
    }
    assert all((ROOT / name).exists() for name in names)
