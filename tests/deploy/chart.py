"""The Helm chart: its value sets, and what Helm renders from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python
import yaml

from .prometheus import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
CHART = KUBERNETES / "chart"

Values = dict[str, Any]
Manifest = dict[str, Any]

KEY = "0123456789abcdef"
LEAST: Values = {"model": {"name": "m"}, "apiKey": {"value": KEY}}
"""The least that must be given."""


def example(name: str) -> Values:
    """Return one of the chart's example value sets."""
    return yaml.safe_load((CHART / "ci" / f"{name}.yaml").read_text())


def merged(*sets: Values) -> Values:
    """Return value sets laid over one another as Helm does: objects merge, the rest replaces."""
    result: Values = {}
    for values in sets:
        for key, value in values.items():
            old = result.get(key)
            both = isinstance(old, dict) and isinstance(value, dict)
            result[key] = merged(old, value) if both else value
    return result


VALUE_SETS: dict[str, Values] = {
    "least": LEAST,
    "gpu": example("gpu"),
    "cpu": merged(example("cpu"), {"apiKey": {"value": KEY}}),
    "open": {
        "model": {"name": "/models/m", "hubTokenSecret": "hub"},
        "apiKey": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "disruptionBudget": {"enabled": False},
        "serviceAccount": {"create": False},
        "page": True,
    },
    "all": merged(
        example("gpu"),
        {
            "image": {"digest": "sha256:" + "0" * 64, "pullSecrets": [{"name": "registry"}]},
            "parallelThink": {"max_total_tokens": None, "judge": {"rule": "top_n", "n": 2}},
            "engine": {"tensorParallelSize": 4, "env": {"VLLM_LOGGING_LEVEL": "DEBUG"}},
            "gpu": {"runtimeClassName": "nvidia"},
            "cache": {"storageClass": "fast"},
            "autoscaling": {"waitingRequestsPerPod": None},
            "service": {"type": "LoadBalancer", "port": 80},
            "podLabels": {"team": "a"},
            "podAnnotations": {"note": "b"},
            "nodeSelector": {"gpu": "h100"},
            "affinity": {"nodeAffinity": {}},
        },
    ),
}


def render(values: Values, chart: Path = CHART) -> list[Manifest]:
    """Return the manifests that Helm renders.

    Raises:
        helm_python.HelmError: The values break the schema, or a template refuses them.

    """
    with helm_python.Chart.load(chart) as loaded:
        files = loaded.render(values, name="demo", namespace="prod")
    texts = [text for name, text in sorted(files.items()) if name.endswith(".yaml")]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    """Return the only manifest of a kind."""
    (found,) = [each for each in manifests if each["kind"] == kind]
    return found


def ray_service() -> Manifest:
    """Return the RayService."""
    return yaml.safe_load((KUBERNETES / "rayservice.yaml").read_text())


def ray_pods() -> list[Manifest]:
    """Return the pods of the RayService as manifests of their own."""
    cluster = ray_service()["spec"]["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"]} | {
        group["groupName"]: group for group in cluster["workerGroupSpecs"]
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"ray-{name}", "namespace": "prod"},
            "spec": group["template"]["spec"],
        }
        for name, group in groups.items()
    ]
