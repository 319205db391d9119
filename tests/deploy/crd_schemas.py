"""Strict schemas of the custom resources that the manifests use.

Kubernetes' own kinds are checked against its OpenAPI schemas, which the package
`kubernetes-validate` ships. No package ships these three, so here are the fields that our manifests
use, and no others: a field outside them is an error, where the real schemas prune it silently.
Sources, read in November 2026 (`CRD_FOLDER=… pytest` checks against the whole files):

* ServiceMonitor, PrometheusRule: prometheus-operator, `example/prometheus-operator-crd/`
  (https://github.com/prometheus-operator/prometheus-operator)
* RayService: KubeRay, `helm-chart/kuberay-operator/crds/ray.io_rayservices.yaml`
  (https://github.com/ray-project/kuberay)
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
INTEGER: Schema = {"type": "integer"}
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h|d|w|y))+$"}


def record(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """Return the schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def rows(of: Schema) -> Schema:
    """Return the schema of a list that is not empty."""
    return {"type": "array", "items": of, "minItems": 1}


def resource(api: str, kind: str, spec: Schema) -> Schema:
    """Return the schema of a whole manifest."""
    metadata = record(("name",), name=STRING, namespace=STRING, labels=STRINGS)
    return record(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": api},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


ENDPOINT = record(port=STRING, path=STRING, interval=DURATION)
SERVICE_MONITOR = record(
    ("selector", "endpoints"), selector=record(matchLabels=STRINGS), endpoints=rows(ENDPOINT)
)

RULE = record(
    ("expr",),
    record=STRING,
    alert=STRING,
    expr={"type": ["string", "integer"]},
    labels=STRINGS,
    annotations=STRINGS,
    **{"for": DURATION},
)
RULE["oneOf"] = [{"required": ["record"]}, {"required": ["alert"]}]
GROUP = record(("name",), name={**STRING, "minLength": 1}, interval=DURATION, rules=rows(RULE))
PROMETHEUS_RULE = record(groups=rows(GROUP))

POD: Schema = {"type": "object", "required": ["spec"]}
"""A pod's template; the tests check it against Kubernetes' own schema of a Pod."""
HEAD = record(("template",), rayStartParams=STRINGS, template=POD)
WORKERS = record(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=STRING,
    replicas=INTEGER,
    minReplicas=INTEGER,
    maxReplicas=INTEGER,
    rayStartParams=STRINGS,
    template=POD,
)
CLUSTER = record(
    ("headGroupSpec",),
    rayVersion=STRING,
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=record(idleTimeoutSeconds=INTEGER),
    headGroupSpec=HEAD,
    workerGroupSpecs=rows(WORKERS),
)
RAY_SERVICE = record(
    serviceUnhealthySecondThreshold=INTEGER,
    deploymentUnhealthySecondThreshold=INTEGER,
    excludeHeadPodFromServeSvc={"type": "boolean"},
    serveConfigV2=STRING,
    rayClusterConfig=CLUSTER,
)

BY_KIND = {
    "ServiceMonitor": resource("monitoring.coreos.com/v1", "ServiceMonitor", SERVICE_MONITOR),
    "PrometheusRule": resource("monitoring.coreos.com/v1", "PrometheusRule", PROMETHEUS_RULE),
    "RayService": resource("ray.io/v1", "RayService", RAY_SERVICE),
}
