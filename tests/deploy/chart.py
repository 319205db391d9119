"""The Helm chart: its value sets, and what Helm renders from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml

from tests.support.repository import ROOT

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
    "words": merged(
        LEAST,
        {
            "model": {"name": "/models/a #b", "servedName": "my model: #1"},
            "parallelThink": {"vote_pattern": r"The answer: #### \$$([0-9]+)\.$(HOME)"},
        },
    ),
}


class Loader(yaml.SafeLoader):
    """Reads YAML as Kubernetes does: 1e3 is a number, and no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"keys that come twice: {twice}", node.start_mark
            )
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def render(
    values: Values, chart: Path = CHART, *, release: str = "demo", namespace: str = "prod"
) -> list[Manifest]:
    """Return the manifests that Helm renders.

    Raises:
        helm_python.HelmError: The values break the schema, or a template refuses them.
        yaml.YAMLError: What it rendered is not YAML.

    """
    with helm_python.Chart.load(chart) as loaded:
        files = loaded.render(values, name=release, namespace=namespace)
    texts = [text for name, text in sorted(files.items()) if name.endswith(".yaml")]
    return [each for text in texts for each in yaml.load_all(text, Loader) if each]


def expanded(text: str, environment: Mapping[str, str]) -> str:
    """Return what Kubernetes makes of an argument: $$ is $, $(NAME) a variable that is set."""

    def replaced(found: re.Match[str]) -> str:
        name = found["name"]
        return "$" if name is None else environment.get(name, found[0])

    return re.sub(r"\$\$|\$\((?P<name>[^)]*)\)", replaced, text)


def container(manifests: list[Manifest]) -> dict[str, Any]:
    """Return the only container of the Deployment."""
    (found,) = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    return found


def environment(manifests: list[Manifest]) -> dict[str, str]:
    """Return the container's variables that are given by value.

    Raises:
        AssertionError: A name comes twice.

    """
    listed = container(manifests)["env"]
    names = [each["name"] for each in listed]
    assert len(names) == len(set(names)), f"variables that come twice: {names}"
    return {each["name"]: each["value"] for each in listed if "value" in each}


def arguments(manifests: list[Manifest]) -> list[str]:
    """Return the arguments of `vllm serve` as the container gets them."""
    known = environment(manifests)
    return [expanded(each, known) for each in container(manifests)["args"]]


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
