"""``ray up ray_config.yaml`` as far as SSH: Ray's AWS provider against a server that plays AWS.

moto plays EC2, IAM and SSM. What only AWS knows is not shown: quotas, capacity, images.
"""

import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.s3 import KEYS

pytestmark = [pytest.mark.ray, pytest.mark.faults]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": address, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    yield address
    server.stop()


def test_head_and_workers_are_made_with_keys_role_and_network(aws: str, tmp_path: Path) -> None:
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.autoscaler.tags import (
        NODE_KIND_HEAD,
        NODE_KIND_WORKER,
        TAG_RAY_NODE_KIND,
        TAG_RAY_USER_NODE_TYPE,
    )

    config = prepare_config(yaml.safe_load((ROOT / "ray_config.yaml").read_text()))
    validate_config(config)
    config = bootstrap_aws(config)
    assert Path(config["auth"]["ssh_private_key"]).is_file()
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        role = NODE_KIND_HEAD if name == config["head_node_type"] else NODE_KIND_WORKER
        tags = {TAG_RAY_NODE_KIND: role, TAG_RAY_USER_NODE_TYPE: name}
        number = 1 if role == NODE_KIND_HEAD else kind["max_workers"]
        for _ in range(number):  # moto starts the least number of a request, EC2 the most it can.
            provider.create_node(kind["node_config"], tags, 1)
    made = provider.non_terminated_nodes({})
    kinds = Counter(provider.node_tags(node)[TAG_RAY_USER_NODE_TYPE] for node in made)
    assert kinds == {"head": 1, "teacher": 4, "student": 1}
    ec2 = boto3.client("ec2", region_name="us-west-2")
    instances = [one for r in ec2.describe_instances()["Reservations"] for one in r["Instances"]]
    assert Counter(one["InstanceType"] for one in instances) == {
        "m7i.2xlarge": 1,
        "g6e.12xlarge": 4,
        "p5.48xlarge": 1,
    }
    for one in instances:
        assert one["KeyName"] and one["SubnetId"] and one["SecurityGroups"]
    profile = boto3.client("iam", region_name="us-west-2").get_instance_profile(
        InstanceProfileName="ray-autoscaler-v1"
    )
    assert [role["RoleName"] for role in profile["InstanceProfile"]["Roles"]]  # Not told of spot.
    socket.inet_aton(provider.internal_ip(made[0]))
    provider.terminate_nodes(made)
    assert provider.non_terminated_nodes({}) == []
