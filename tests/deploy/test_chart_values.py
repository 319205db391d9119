"""Every value of the chart comes out of Helm as it went in, however it looks to YAML."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

pytest.importorskip("helm_python", reason="no helm-python-sdk: make test-deploy")

from tests.deploy.chart import (
    CHART,
    KEY,
    LEAST,
    Loader,
    Manifest,
    Values,
    expanded,
    merged,
    of_kind,
    render,
)
from tests.deploy.chart import arguments as args
from tests.deploy.chart import container as vllm
from tests.deploy.chart import environment as env

Read = Callable[[list[Manifest]], Any]

NAMES = ("123", "on", "null", "true", "1e3", "0x1f", "1.0")
"""What a name in Kubernetes may be, and YAML takes for something else."""

TEXTS = (
    *NAMES,
    *("a: b", "a:", "a #b", "#### ([0-9]+)", "~", "2026-11-29", "1:30", "- a", "? a", "!!int 1"),
    *("&a", "*a", "[a", "{a: b}", "{{ .Release.Name }}", "'", '"', "\\", r"\\boxed\{(.*?)\}", "%a"),
    *(
        "@a",
        "`a`",
        "| a",
        "> a",
        "<&>",
        "$(HOME)",
        "$$",
        "a$",
        " a ",
        "two\nlines\n",
        "\ttab",
        "é😀",
    ),
    *("\x01\u2028\ufeff", "---", "..."),
)
"""What free text may be."""

NUMBERS = (1, 1_000_000, 2**31)
BOTH = (True, False)
SIZES = ("50", "1.5", "1000000", "2Gi")
OBJECTS = tuple({"key": text, "number": 1_000_000, "deep": [{"text": text}]} for text in TEXTS)
LABELS = ({"on": "on", "1": "1e3", "1e3": "null", "a.b/c-d": "a: b #c"}, {"x": "two\nlines\n"})


@dataclass(frozen=True)
class Leaf:
    """A value of the chart.

    Attributes:
        given: What is tried.
        read: Finds it in the manifests.
        beside: Other values without which it would have no effect.

    """

    given: tuple[Any, ...]
    read: Read
    beside: Values = field(default_factory=dict)


def pod(manifests: list[Manifest]) -> Any:
    """Return the pod's specification."""
    return of_kind(manifests, "Deployment")["spec"]["template"]["spec"]


def template(manifests: list[Manifest]) -> Any:
    """Return the metadata of the pods."""
    return of_kind(manifests, "Deployment")["spec"]["template"]["metadata"]


def is_there(kind: str) -> Read:
    """Look for a manifest of a kind."""
    return lambda manifests: kind in {each["kind"] for each in manifests}


def spec(kind: str, *path: Any) -> Read:
    """Read below a manifest's `spec`."""
    return lambda manifests: at(of_kind(manifests, kind)["spec"], *path)


def at(found: Any, *path: Any) -> Any:
    """Follow keys and indices; None where there is nothing."""
    for key in path:
        missing = isinstance(found, dict) and key not in found
        found = None if missing or found is None else found[key]
    return found


def flag(name: str) -> Read:
    """Read an argument of `vllm serve`."""

    def read(manifests: list[Manifest]) -> str | None:
        found = [a.partition("=")[2] for a in args(manifests) if a.startswith(f"--{name}=")]
        return found[0] if found else None

    return read


def number(name: str) -> Read:
    """Read an argument that is a number."""

    def read(manifests: list[Manifest]) -> Any:
        text = flag(name)(manifests)
        return None if text is None else json.loads(text)

    return read


def plugin(key: str) -> Read:
    """Read a key of the plugin."""
    return lambda m: json.loads(flag("additional-config")(m))["parallel_think"].get(key)


def variable(name: str, key: str) -> Read:
    """Read where a variable's secret is."""

    def read(manifests: list[Manifest]) -> Any:
        (found,) = [e for e in vllm(manifests)["env"] if e["name"] == name]
        return found["valueFrom"]["secretKeyRef"][key]

    return read


def volume(name: str, *path: str) -> Read:
    """Read below a volume of the pod."""
    return lambda m: at(next(v for v in pod(m)["volumes"] if v["name"] == name), *path)


def labels(kind: str) -> Read:
    """Read a manifest's labels without the chart's own."""
    own = {"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/version"}
    own |= {"app.kubernetes.io/managed-by", "helm.sh/chart"}

    def read(manifests: list[Manifest]) -> Any:
        shown = of_kind(manifests, kind)["metadata"]["labels"]
        return {key: text for key, text in shown.items() if key not in own}

    return read


def peers(manifests: list[Manifest]) -> Any:
    """Return who may reach the port."""
    return of_kind(manifests, "NetworkPolicy")["spec"]["ingress"][0]["from"]


def key_of(manifests: list[Manifest]) -> str:
    """Return the key of the chart's Secret."""
    (text,) = of_kind(manifests, "Secret")["data"].values()
    return base64.b64decode(text).decode()


GPU = {"gpu": {"enabled": True}}
CPU = {"gpu": {"enabled": False}}
CLAIM = {"cache": {"type": "pvc"}}
SCALED = {"autoscaling": {"enabled": True, "minReplicas": 1, "maxReplicas": 2**31}}
HPA = "HorizontalPodAutoscaler"
MONITOR, RULE, BOARD = (
    {"monitoring": {part: {"enabled": True}}}
    for part in ("serviceMonitor", "prometheusRule", "dashboard")
)
PEERS = tuple(
    [{"podSelector": {"matchLabels": {"on": text}}}, {"ipBlock": {"cidr": text}}] for text in TEXTS
)

LEAVES: dict[str, Leaf] = {
    "image.repository": Leaf(TEXTS, lambda m: vllm(m)["image"].rpartition(":")[0]),
    "image.tag": Leaf(NAMES, lambda m: vllm(m)["image"].rpartition(":")[2]),
    "image.digest": Leaf(("sha256:" + "1" * 64,), lambda m: vllm(m)["image"].rpartition("@")[2]),
    "image.pullPolicy": Leaf(
        ("Always", "IfNotPresent", "Never"), lambda m: vllm(m)["imagePullPolicy"]
    ),
    "image.pullSecrets": Leaf(
        tuple([{"name": text}] for text in TEXTS), lambda m: pod(m)["imagePullSecrets"]
    ),
    "model.name": Leaf(
        tuple(text for text in TEXTS if not text.startswith("-")), lambda m: args(m)[0]
    ),
    "model.servedName": Leaf(TEXTS, flag("served-model-name")),
    "model.hubTokenSecret": Leaf(NAMES, variable("HF_TOKEN", "name")),
    "parallelThink.profile": Leaf(TEXTS, plugin("profile")),
    "parallelThink.profiles": Leaf(
        tuple([text + ".toml", "a.toml"] for text in TEXTS), plugin("profiles")
    ),
    "parallelThink.max_paths": Leaf((2, 64), plugin("max_paths")),
    "parallelThink.max_depth": Leaf((1, 8), plugin("max_depth")),
    "parallelThink.max_forks": Leaf((1, 1_000_000), plugin("max_forks")),
    "parallelThink.max_total_tokens": Leaf((*NUMBERS, None), plugin("max_total_tokens")),
    "parallelThink.held_kv_fraction": Leaf((0.000001, 0.5, 1), plugin("held_kv_fraction")),
    "parallelThink.thought_embeddings": Leaf(
        tuple(text + ".safetensors" for text in TEXTS), plugin("thought_embeddings")
    ),
    "parallelThink.vote_pattern": Leaf(TEXTS, plugin("vote_pattern")),
    "parallelThink.block_size": Leaf((16, 1024), plugin("block_size")),
    "parallelThink.judge": Leaf(OBJECTS, plugin("judge")),
    "engine.tensorParallelSize": Leaf((1, 64), number("tensor-parallel-size"), GPU),
    "engine.maxModelLen": Leaf((*NUMBERS, None), number("max-model-len")),
    "engine.maxNumSeqs": Leaf((1, 65536), number("max-num-seqs")),
    "engine.gpuMemoryUtilization": Leaf((0.000001, 0.9, 1), number("gpu-memory-utilization"), GPU),
    "engine.extraArgs": Leaf(
        tuple(["--a", text] for text in TEXTS), lambda m: vllm(m)["args"][-2:]
    ),
    "engine.env": Leaf(
        tuple({"on": text, "null": text, "a": text} for text in TEXTS),
        lambda m: {name: text for name, text in env(m).items() if name in ("on", "null", "a")},
    ),
    "page": Leaf(BOTH, lambda m: "parallel_think_page" in env(m)["VLLM_PLUGINS"].split(",")),
    "gpu.enabled": Leaf(BOTH, lambda m: "nvidia.com/gpu" in vllm(m)["resources"]["limits"]),
    "gpu.resource": Leaf(
        ("123/1", "a.b/1e3"),
        lambda m: next(key for key in vllm(m)["resources"]["limits"] if "/" in key),
        GPU,
    ),
    "gpu.runtimeClassName": Leaf(NAMES, spec("Deployment", "template", "spec", "runtimeClassName")),
    "cpuKVCacheGiB": Leaf(
        (1, 1_000_000), lambda m: json.loads(env(m)["VLLM_CPU_KVCACHE_SPACE"]), CPU
    ),
    "resources.requests": Leaf(
        tuple({"cpu": n, "memory": n} for n in (*SIZES, *NUMBERS, 0.5)),
        lambda m: vllm(m)["resources"]["requests"],
    ),
    "resources.limits": Leaf(
        tuple({"cpu": n, "memory": n} for n in (*SIZES, *NUMBERS, 0.5)),
        lambda m: vllm(m)["resources"]["limits"],
        CPU,
    ),
    "sharedMemory": Leaf(SIZES, volume("shm", "emptyDir", "sizeLimit")),
    "replicas": Leaf((0, *NUMBERS), spec("Deployment", "replicas")),
    "strategy.maxSurge": Leaf(NUMBERS, spec("Deployment", "strategy", "rollingUpdate", "maxSurge")),
    "strategy.maxUnavailable": Leaf(
        NUMBERS, spec("Deployment", "strategy", "rollingUpdate", "maxUnavailable")
    ),
    "shutdown.preStopSeconds": Leaf(
        (1, 300), lambda m: vllm(m)["lifecycle"]["preStop"]["sleep"]["seconds"]
    ),
    "shutdown.drainSeconds": Leaf((0, 86400), number("shutdown-timeout")),
    "probes.startupSeconds": Leaf(
        (10, 86400), lambda m: vllm(m)["startupProbe"]["failureThreshold"] * 10
    ),
    "probes.readinessPeriodSeconds": Leaf(
        (1, 300), lambda m: vllm(m)["readinessProbe"]["periodSeconds"]
    ),
    "probes.livenessPeriodSeconds": Leaf(
        (1, 300), lambda m: vllm(m)["livenessProbe"]["periodSeconds"]
    ),
    "probes.livenessFailures": Leaf(
        (1, 100), lambda m: vllm(m)["livenessProbe"]["failureThreshold"]
    ),
    "service.type": Leaf(("ClusterIP", "NodePort", "LoadBalancer"), spec("Service", "type")),
    "service.port": Leaf((1, 65535), spec("Service", "ports", 0, "port")),
    "apiKey.enabled": Leaf(
        BOTH, lambda m: "VLLM_API_KEY" in {each["name"] for each in vllm(m)["env"]}
    ),
    "apiKey.existingSecret": Leaf(
        NAMES, variable("VLLM_API_KEY", "name"), {"apiKey": {"value": ""}}
    ),
    "apiKey.secretKey": Leaf((*NAMES, "1.5"), lambda m: next(iter(of_kind(m, "Secret")["data"]))),
    "apiKey.value": Leaf(tuple(text + KEY for text in TEXTS), key_of),
    "cache.type": Leaf(
        ("emptyDir", "pvc"),
        lambda m: "pvc" if is_there("PersistentVolumeClaim")(m) else "emptyDir",
    ),
    "cache.size": Leaf(SIZES, volume("models", "emptyDir", "sizeLimit")),
    "cache.storageClass": Leaf(NAMES, spec("PersistentVolumeClaim", "storageClassName"), CLAIM),
    "cache.accessMode": Leaf(
        ("ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"),
        spec("PersistentVolumeClaim", "accessModes", 0),
        CLAIM,
    ),
    "cache.existingClaim": Leaf(NAMES, volume("models", "persistentVolumeClaim", "claimName")),
    "disruptionBudget.enabled": Leaf(BOTH, is_there("PodDisruptionBudget")),
    "disruptionBudget.maxUnavailable": Leaf(NUMBERS, spec("PodDisruptionBudget", "maxUnavailable")),
    "autoscaling.enabled": Leaf(BOTH, is_there(HPA)),
    "autoscaling.minReplicas": Leaf(NUMBERS, spec(HPA, "minReplicas"), SCALED),
    "autoscaling.maxReplicas": Leaf(NUMBERS, spec(HPA, "maxReplicas"), SCALED),
    "autoscaling.branchesPerPod": Leaf(
        NUMBERS,
        lambda m: int(spec(HPA, "metrics", 0, "pods", "target", "averageValue")(m)),
        SCALED,
    ),
    "autoscaling.waitingRequestsPerPod": Leaf(
        NUMBERS,
        lambda m: int(spec(HPA, "metrics", 1, "pods", "target", "averageValue")(m)),
        SCALED,
    ),
    "autoscaling.scaleDownSeconds": Leaf(
        (0, 3600), spec(HPA, "behavior", "scaleDown", "stabilizationWindowSeconds"), SCALED
    ),
    "networkPolicy.enabled": Leaf(BOTH, is_there("NetworkPolicy")),
    "networkPolicy.clients": Leaf(PEERS, lambda m: peers(m)[:2]),
    "networkPolicy.scrapers": Leaf(PEERS, lambda m: peers(m)[-2:]),
    "networkPolicy.modelDownload": Leaf(
        BOTH, lambda m: len(of_kind(m, "NetworkPolicy")["spec"]["egress"]) == 2
    ),
    "monitoring.serviceMonitor.enabled": Leaf(BOTH, is_there("ServiceMonitor")),
    "monitoring.serviceMonitor.interval": Leaf(
        ("1s", "15m", "100ms"), spec("ServiceMonitor", "endpoints", 0, "interval"), MONITOR
    ),
    "monitoring.serviceMonitor.labels": Leaf(LABELS, labels("ServiceMonitor"), MONITOR),
    "monitoring.prometheusRule.enabled": Leaf(BOTH, is_there("PrometheusRule")),
    "monitoring.prometheusRule.labels": Leaf(LABELS, labels("PrometheusRule"), RULE),
    "monitoring.dashboard.enabled": Leaf(BOTH, is_there("ConfigMap")),
    "monitoring.dashboard.labels": Leaf(
        tuple(given | {"grafana_dashboard": "1"} for given in LABELS), labels("ConfigMap"), BOARD
    ),
    "serviceAccount.create": Leaf(BOTH, is_there("ServiceAccount")),
    "serviceAccount.name": Leaf(NAMES, lambda m: of_kind(m, "ServiceAccount")["metadata"]["name"]),
    "podAnnotations": Leaf(
        tuple({"on": text, text: text} for text in TEXTS),
        lambda m: {k: v for k, v in template(m)["annotations"].items() if k != "checksum/api-key"},
    ),
    "podLabels": Leaf(
        LABELS,
        lambda m: {
            key: text
            for key, text in template(m)["labels"].items()
            if not key.startswith("app.kubernetes.io/")
        },
    ),
    "nodeSelector": Leaf(LABELS, lambda m: pod(m)["nodeSelector"]),
    "tolerations": Leaf(tuple([each] for each in OBJECTS), lambda m: pod(m)["tolerations"]),
    "affinity": Leaf(OBJECTS, lambda m: pod(m)["affinity"]),
}

WITHOUT_EFFECT = {"global"}
"""Helm adds it to every chart."""


def leaves_of(schema: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of all values that the schema knows."""
    for key, below in schema["properties"].items():
        if "properties" in below:
            yield from leaves_of(below, f"{path}{key}.")
        else:
            yield path + key


def leaves_in(values: Mapping[str, Any], known: set[str], path: str = "") -> Iterator[str]:
    """Yield the paths of all values of values.yaml, down to what the schema lets free."""
    for key, below in values.items():
        if isinstance(below, dict) and path + key not in known:
            yield from leaves_in(below, known, f"{path}{key}.")
        else:
            yield path + key


def test_no_value_is_left_out() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    known = set(leaves_of(schema))
    assert known - WITHOUT_EFFECT == set(LEAVES)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(leaves_in(values, known)) <= set(LEAVES)


@pytest.mark.parametrize("path", list(LEAVES))
def test_a_value_comes_out_as_it_went_in(path: str) -> None:
    leaf = LEAVES[path]
    for given in leaf.given:
        nested: Any = given
        for key in reversed(path.split(".")):
            nested = {key: nested}
        found = leaf.read(render(merged(LEAST, leaf.beside, nested)))
        assert found == given, f"{given!r} came out as {found!r}"
        assert type(found) is type(given), f"{given!r} came out as {type(found)}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "1.0"])
def test_release_and_namespace_may_be_named_like_a_number(name: str) -> None:
    for manifest in render(LEAST, release=name, namespace=name):
        metadata = manifest["metadata"]
        assert metadata["namespace"] == name
        assert metadata["labels"]["app.kubernetes.io/instance"] == name
        assert metadata["name"].startswith(f"{name}-")


def test_the_tests_read_what_kubernetes_reads() -> None:
    with pytest.raises(yaml.YAMLError, match="twice"):
        yaml.load("{a: 1, a: 2}", Loader)
    assert yaml.load("[1e3, -1.5E+3, '1e3', on]", Loader) == [1000, -1500, "1e3", True]
    assert expanded("$$(A) $(A) $(B) $$ $x $(", {"A": "a"}) == "$(A) a $(B) $ $x $("
