"""The chart and the RayService, rendered and checked without a cluster.

Helm's own engine renders, schemas of Kubernetes check what it makes; what other programs read of
it (rules, Serve's configuration) is checked by those programs.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_parallel_think.core.options import ServerOptions
from vllm_parallel_think.metrics.export import Home
from vllm_parallel_think.metrics.instruments import Instruments

helm = pytest.importorskip("helm_python", reason="pip install '.[deploy]'")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install '.[deploy]'")

pytestmark = pytest.mark.deploy

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
CHART = KUBERNETES / "chart"
VERSION = "1.34"
CUSTOM = ("ServiceMonitor", "PrometheusRule")

ALL_ON = {
    "replicas": 3,
    "gpu": {"count": 4},
    "servedModelName": "big",
    "apiKey": {"value": "0123456789abcdef"},
    "cache": {"size": "200Gi", "storageClass": "shared"},
    "page": True,
    "offline": True,
    "env": {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": 8},
    "extraArgs": ["--max-num-seqs", "128", "--api-server-count=2"],
    "nodeSelector": {"gpu": "h200"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "imagePullSecrets": [{"name": "registry"}],
    "autoscaling": {"enabled": True},
    "networkPolicy": {
        "enabled": True,
        "from": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}],
        "monitoringFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
    },
    "monitoring": {
        "serviceMonitor": True,
        "rules": True,
        "dashboard": True,
        "labels": {"release": "prometheus"},
    },
}
BARE = {
    "apiKey": {"existingSecret": "mine"},
    "disruptionBudget": {"enabled": False},
    "networkPolicy": {"enabled": False},
    "parallelThink": {"profile": "hogwild", "judge": {"rule": "typical"}},
}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "cpu": yaml.safe_load((CHART / "values-cpu.yaml").read_text("utf-8")),
    "all on": ALL_ON,
    "bare": BARE,
}


def manifests(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Render the chart; return its manifests."""
    with helm.Chart.load(str(CHART)) as chart:
        rendered = chart.render(values, name="demo", namespace="llm")
    files = [text for name, text in rendered.items() if name.endswith(".yaml")]
    return [part for text in files for part in yaml.safe_load_all(text) if part]


def of_kind(found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Return the one manifest of a kind."""
    (one,) = [manifest for manifest in found if manifest["kind"] == kind]
    return one


def pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the pod templates of a manifest."""
    if manifest["kind"] == "Deployment":
        yield manifest["spec"]["template"]
    if manifest["kind"] == "RayService":
        cluster = manifest["spec"]["rayClusterConfig"]
        yield cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["template"]


@pytest.fixture(scope="module")
def ray_service() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / "rayservice.yaml").read_text("utf-8"))
    return found


@pytest.mark.parametrize("name", VALUES)
def test_the_chart_lints(name: str) -> None:
    report = helm.lint(str(CHART), VALUES[name], strict=True, namespace="llm")
    assert report["errors"] in (None, [])
    assert not [m for m in report["messages"] or () if m["severity"] >= 2]


@pytest.mark.parametrize("name", VALUES)
def test_every_manifest_fits_its_schema(name: str) -> None:
    found = manifests(VALUES[name])
    assert {"Deployment", "Service", "ServiceAccount"} <= {m["kind"] for m in found}
    for manifest in found:
        assert manifest["metadata"]["namespace"] == "llm"
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, VERSION, strict=True)
    names = [(m["kind"], m["metadata"]["name"]) for m in found]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": -1}, "replicas"),
        ({"gpu": {"count": "two"}}, "count"),
        ({"image": {"repository": "x", "tag": "latest"}}, "tag"),
        ({"parallelThink": {"max_paths": 1}}, "max_paths"),
        ({"parallelThink": {"maxPaths": 4}}, "maxPaths"),
        ({"apiKey": {"value": "short"}}, "value"),
        ({"cache": {"size": "much"}}, "size"),
        ({"service": {"type": "Magic"}}, "type"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(helm.HelmError, match=says):
        manifests(values)


def test_the_schema_knows_every_setting_of_the_plugin() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    known = set(schema["properties"]["parallelThink"]["properties"])
    assert known == set(ServerOptions.__dataclass_fields__)
    defaults = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    assert set(schema["properties"]) - {"global"} == set(defaults), "a value without a default"
    ServerOptions.parse(defaults["parallelThink"])


def test_copies_in_the_chart_are_the_originals() -> None:
    """Helm reads only files inside a chart."""
    for copy, original in (
        ("rules.yaml", DEPLOY / "prometheus" / "rules.yaml"),
        ("parallel-think.json", DEPLOY / "grafana" / "parallel-think.json"),
    ):
        assert (CHART / "files" / copy).read_bytes() == original.read_bytes()


def test_what_is_rendered_of_monitoring(tmp_path: Path) -> None:
    found = manifests(ALL_ON)
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(of_kind(found, "PrometheusRule")["spec"]), "utf-8")
    done = subprocess.run(
        ["promtool", "check", "rules", str(rules)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    monitor, service = of_kind(found, "ServiceMonitor"), of_kind(found, "Service")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    selector = monitor["spec"]["selector"]["matchLabels"]
    assert selector.items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    dashboard = of_kind(found, "ConfigMap")["data"]["parallel-think.json"]
    original = (DEPLOY / "grafana" / "parallel-think.json").read_text("utf-8")
    assert json.loads(dashboard) == json.loads(original)


def test_scaling_follows_metrics_that_exist(tmp_path: Path) -> None:
    scaler = of_kind(manifests(ALL_ON), "HorizontalPodAutoscaler")
    names = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert names == {"vllm_pt_active_branches", "vllm_num_requests_waiting"}
    assert Instruments(Home(tmp_path)).active_branches


def test_the_command_is_what_the_values_say() -> None:
    (container,) = of_kind(manifests(ALL_ON), "Deployment")["spec"]["template"]["spec"][
        "containers"
    ]
    arguments = container["args"]
    assert arguments[:2] == ["serve", "Qwen/Qwen3-8B"]
    assert "--tensor-parallel-size=4" in arguments and "--served-model-name=big" in arguments
    assert arguments[-3:] == ALL_ON["extraArgs"]
    (config,) = [a.partition("=")[2] for a in arguments if a.startswith("--additional-config=")]
    ServerOptions.parse(json.loads(config)["parallel_think"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    environment = {entry["name"]: entry for entry in container["env"]}
    assert environment["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"]["key"] == "api-key"
    assert environment["VLLM_PLUGINS"]["value"] == "parallel_think,parallel_think_page"
    assert "0123456789abcdef" not in json.dumps(container)


def test_serve_reads_the_ray_service(ray_service: dict[str, Any]) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="pip install '.[ray]'")
    config = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
    (application,) = schema.ServeDeploySchema.model_validate(config).applications
    from deploy.ray.serving import build

    build(application.args)
    assert application.import_path == "deploy.ray.serving:build"


def test_pods_of_the_ray_service_fit_their_schema(ray_service: dict[str, Any]) -> None:
    for number, template in enumerate(pods(ray_service)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}"}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, VERSION, strict=True)


EXPLAINED = {
    # Ray writes its sockets and logs in many places of the image.
    ("RayService", "readOnlyRootFilesystem"),
    # The head's autoscaler asks the API server for pods.
    ("RayService", "automountServiceAccountToken"),
}
"""Findings that are meant, and why."""


def findings(manifest: dict[str, Any]) -> Iterator[str]:
    """Yield what a manifest's pods lack of Kubernetes' restricted Pod Security Standard, and more.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/
    """
    for template in pods(manifest):
        spec = template["spec"]
        own = spec.get("securityContext", {})
        if not own.get("runAsNonRoot") or not own.get("runAsUser"):
            yield "runAsNonRoot"
        if own.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield "seccompProfile"
        if spec.get("automountServiceAccountToken") is not False:
            yield "automountServiceAccountToken"
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(key):
                yield key
        allowed = {"emptyDir", "persistentVolumeClaim", "configMap", "secret"}
        for volume in spec.get("volumes", ()):
            if not allowed & set(volume):
                yield f"volume {volume['name']}"
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"no limit for {volume['name']}"
        for container in spec["containers"]:
            yield from container_findings(container)


def container_findings(container: dict[str, Any]) -> Iterator[str]:
    """Yield what a container lacks."""
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield "allowPrivilegeEscalation"
    if context.get("capabilities", {}).get("drop") != ["ALL"]:
        yield "capabilities"
    if not context.get("readOnlyRootFilesystem"):
        yield "readOnlyRootFilesystem"
    if not re.search(r":[\w.-]+$", container["image"]) or container["image"].endswith(":latest"):
        yield "image without a version"
    if "memory" not in container.get("resources", {}).get("limits", {}):
        yield "no memory limit"
    if any(port.get("hostPort") for port in container.get("ports", ())):
        yield "hostPort"


@pytest.mark.parametrize("name", [*VALUES, "ray"])
def test_nothing_is_found_that_is_not_explained(name: str, ray_service: dict[str, Any]) -> None:
    found = [ray_service] if name == "ray" else manifests(VALUES[name])
    seen = {(m["kind"], finding) for m in found for finding in findings(m)}
    assert seen <= EXPLAINED
    if name == "ray":
        assert seen == EXPLAINED, "an explanation for what is no longer found"
