"""Fields that KubeRay since 1.5.1 and Kubernetes give the objects we use, as a JSON schema.

For the parts we use, held once against KubeRay's CRDs and Go types (1.5 to 1.7); stricter than
they are in places. What it can find is a misspelt, misplaced or mistyped field. What it cannot:
rules between fields, and whether a cluster's own KubeRay is new enough. `kubectl apply
--dry-run=server` asks the cluster itself.
"""

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}


def record(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def items(of: Schema, at_least: int = 0) -> Schema:
    return {"type": "array", "items": of, "minItems": at_least}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = record(requests=QUANTITIES, limits=QUANTITIES)
SECRET_KEY = record(("name", "key"), name=TEXT, key=TEXT, optional=FLAG)
VARIABLE = record(("name",), name=TEXT, value=TEXT, valueFrom=record(secretKeyRef=SECRET_KEY))
PORT = record(("containerPort",), containerPort=COUNT, name=TEXT, protocol=TEXT)
CONTAINER = record(
    ("name", "image", "resources"),
    name=TEXT,
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    resources=RESOURCES,
    ports=items(PORT),
    env=items(VARIABLE),
)
TOLERATION = record(
    key=TEXT,
    operator=one_of("Exists", "Equal"),
    value=TEXT,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
)
POD = record(
    ("containers",),
    serviceAccountName=TEXT,
    nodeSelector=TEXTS,
    tolerations=items(TOLERATION),
    terminationGracePeriodSeconds=COUNT,
    containers=items(CONTAINER, at_least=1),
)
METADATA = record(name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
TEMPLATE = record(("spec",), metadata=METADATA, spec=POD)
GROUP: dict[str, Schema] = {
    "resources": QUANTITIES,
    "labels": TEXTS,
    "rayStartParams": TEXTS,
    "template": TEMPLATE,
}
HEAD = record(
    ("template", "rayStartParams"),
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    enableIngress=FLAG,
    **GROUP,
)
WORKERS = record(
    ("groupName", "minReplicas", "maxReplicas", "template", "rayStartParams"),
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    numOfHosts=COUNT,
    **GROUP,
)
AUTOSCALER = record(
    version=one_of("v1", "v2"),
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=COUNT,
    resources=RESOURCES,
    image=TEXT,
    env=items(VARIABLE),
)
CLUSTER_SPEC = record(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=record(mode=one_of("disabled", "token")),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD,
    workerGroupSpecs=items(WORKERS),
)
JOB_SPEC = record(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    submitterConfig=record(backoffLimit=COUNT),
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    rayClusterSpec=CLUSTER_SPEC,
)


def manifest(kind: str, spec: Schema) -> Schema:
    """A whole object of the group ray.io/v1."""
    return record(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata={**METADATA, "required": ["name"]},
        spec=spec,
    )


RAY_CLUSTER = manifest("RayCluster", CLUSTER_SPEC)
RAY_JOB = manifest("RayJob", JOB_SPEC)
