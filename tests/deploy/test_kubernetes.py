"""The manifests: rendered by Helm, against schemas, the plugin and a security lint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

pytest.importorskip("helm_python", reason="no helm-python-sdk: make test-deploy")
pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate: make test-deploy")

import helm_python
import kubernetes_validate

from deploy.ray.serve_options import cli_args
from tests.deploy import crd_schemas
from tests.deploy.chart import (
    CHART,
    KUBERNETES,
    LEAST,
    VALUE_SETS,
    arguments,
    environment,
    merged,
    of_kind,
    ray_pods,
    ray_service,
    render,
)
from tests.support.repository import ROOT
from vllm_parallel_think.core.config.server_options import ServerOptions
from vllm_parallel_think.core.errors import OptionError

KUBERNETES_VERSIONS = ("1.30", "1.37")


@pytest.fixture(params=list(VALUE_SETS))
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What Helm renders, by value set."""
    return render(VALUE_SETS[request.param])


@pytest.mark.parametrize("name", list(VALUE_SETS))
def test_helm_lints(name: str) -> None:
    report = helm_python.lint(CHART, VALUE_SETS[name], strict=True, namespace="prod")
    assert report["errors"] == []
    assert {m["error"] for m in report["messages"]} <= {"icon is recommended"}


def check_schema(manifest: dict[str, Any]) -> None:
    """Check one manifest against its kind's schema, unknown fields included."""
    own = crd_schemas.BY_KIND.get(manifest["kind"])
    if own is not None:
        jsonschema.validate(manifest, own)
        return
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_every_manifest_fits_its_schema(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        check_schema(manifest)
        assert manifest["metadata"]["namespace"] == "prod"


def test_ray_service_fits_its_schema() -> None:
    check_schema(ray_service())
    for pod in ray_pods():
        check_schema(pod)


@pytest.mark.skipif("CRD_FOLDER" not in os.environ, reason="CRD_FOLDER names no folder of CRDs")
def test_custom_resources_fit_the_whole_crds() -> None:
    schemas = {}
    for file in Path(os.environ["CRD_FOLDER"]).glob("*.yaml"):
        crd = yaml.safe_load(file.read_text())["spec"]
        for version in crd["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            schemas[f"{crd['group']}/{version['name']}", crd["names"]["kind"]] = schema
    custom = [m for m in render(VALUE_SETS["gpu"]) if m["kind"] in crd_schemas.BY_KIND]
    for manifest in [*custom, ray_service()]:
        schema = schemas[manifest["apiVersion"], manifest["kind"]]
        jsonschema.Draft7Validator(schema).validate(manifest)


def test_a_wrong_field_is_found() -> None:
    monitor = of_kind(render(VALUE_SETS["gpu"]), "ServiceMonitor")
    monitor["spec"]["endpoints"][0]["intervall"] = "1s"
    with pytest.raises(jsonschema.ValidationError):
        check_schema(monitor)
    deployment = of_kind(render(LEAST), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(deployment)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"replica": 2}, "replica"),
    "unknown key of the plugin": ({"parallelThink": {"max_path": 4}}, "max_path"),
    "too many paths": ({"parallelThink": {"max_paths": 65}}, "max_paths"),
    "one path": ({"parallelThink": {"max_paths": 1}}, "max_paths"),
    "too deep": ({"parallelThink": {"max_depth": 9}}, "max_depth"),
    "no forks": ({"parallelThink": {"max_forks": 0}}, "max_forks"),
    "whole pool and more": ({"parallelThink": {"held_kv_fraction": 1.1}}, "held_kv_fraction"),
    "no pool": ({"parallelThink": {"held_kv_fraction": 0}}, "held_kv_fraction"),
    "no tokens": ({"parallelThink": {"max_total_tokens": 0}}, "max_total_tokens"),
    "words for a number": ({"replicas": "two"}, "replicas"),
    "short key": ({"apiKey": {"value": "secret"}}, "apiKey"),
    "key as an argument": ({"engine": {"extraArgs": ["--api-key=x"]}}, "extraArgs"),
    "key as an argument with an underscore": (
        {"engine": {"extraArgs": ["--api_key=x"]}},
        "extraArgs",
    ),
    "plugin's settings as an argument": (
        {"engine": {"extraArgs": ["--additional-config.parallel_think.profile=off"]}},
        "extraArgs",
    ),
    "a control character": ({"affinity": {"nodeAffinity": "\x7f"}}, "control character"),
    "a model like a flag": ({"model": {"name": "--port=1"}}, "model"),
    "the selector's label": ({"podLabels": {"app.kubernetes.io/name": "x"}}, "podLabels: app."),
    "the release's label": (
        {"monitoring": {"dashboard": {"labels": {"app.kubernetes.io/instance": "x"}}}},
        "monitoring.dashboard.labels: app.",
    ),
    "the key's checksum": ({"podAnnotations": {"checksum/api-key": "x"}}, "podAnnotations: check"),
    "key as plain environment": ({"engine": {"env": {"VLLM_API_KEY": "x"}}}, "VLLM_API_KEY"),
    "a limit without memory": ({"resources": {"limits": {"memory": None}}}, "memory"),
    "an open registry tag": ({"image": {"tag": "a b"}}, "tag"),
    "no model": ({"model": {"name": ""}}, "model"),
    "no key": ({"apiKey": {"value": ""}}, "apiKey: give existingSecret"),
    "two keys": ({"apiKey": {"existingSecret": "a"}}, "both set"),
    "least above most": ({"autoscaling": {"minReplicas": 9}}, "minReplicas"),
    "a volume for one": ({"replicas": 2, "cache": {"type": "pvc"}}, "ReadWriteOnce"),
    "a roll-out that cannot move": ({"strategy": {"maxSurge": 0}}, "strategy"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_values_are_refused(name: str) -> None:
    change, says = BAD[name]
    with pytest.raises(helm_python.HelmError, match=re.escape(says)):
        render(merged(LEAST, change))


def test_schema_and_plugin_allow_the_same() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    keys = schema["properties"]["parallelThink"]["properties"]
    assert set(keys) == set(ServerOptions.__dataclass_fields__)
    for key in ("max_paths", "max_depth", "max_forks", "max_total_tokens"):
        low, high = keys[key]["minimum"], keys[key]["maximum"]
        for value in (low, high):
            ServerOptions.parse({key: value})
        for value in (low - 1, high + 1):
            with pytest.raises(OptionError):
                ServerOptions.parse({key: value})


def parsed_by_vllm(manifests: list[dict[str, Any]]) -> Namespace:
    """Return what `vllm serve` reads from the container's arguments."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = cli_args().make_arg_parser(FlexibleArgumentParser())
    return parser.parse_args(arguments(manifests))


def test_vllm_and_the_plugin_read_the_arguments(manifests: list[dict[str, Any]]) -> None:
    parsed = parsed_by_vllm(manifests)
    assert parsed.port == 8000
    assert parsed.shutdown_timeout >= 60
    ServerOptions.parse(parsed.additional_config["parallel_think"])


def test_text_reaches_vllm_and_the_plugin_as_it_was_written() -> None:
    values = VALUE_SETS["words"]
    parsed = parsed_by_vllm(render(values))
    assert parsed.model_tag == values["model"]["name"]
    assert parsed.served_model_name == [values["model"]["servedName"]]
    options = ServerOptions.parse(parsed.additional_config["parallel_think"])
    assert options.vote_pattern == values["parallelThink"]["vote_pattern"]


def test_a_variable_replaces_the_chart_s_own() -> None:
    given = {"HF_HOME": "/models/hub", "HOME": ""}
    shown = environment(render(merged(LEAST, {"engine": {"env": given}})))
    assert given.items() <= shown.items()
    assert shown["XDG_CACHE_HOME"] == environment(render(LEAST))["XDG_CACHE_HOME"]


def test_a_pod_has_time_to_finish_its_groups(manifests: list[dict[str, Any]]) -> None:
    pod = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]
    (drain,) = [a.split("=")[1] for a in arguments(manifests) if a.startswith("--shutdown-")]
    before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= int(drain) + before + 30


def test_ports_and_selectors_meet(manifests: list[dict[str, Any]]) -> None:
    template = of_kind(manifests, "Deployment")["spec"]["template"]
    labels = template["metadata"]["labels"].items()
    service = of_kind(manifests, "Service")
    assert service["spec"]["selector"].items() <= labels
    (port,) = template["spec"]["containers"][0]["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"] == "http"
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "ServiceMonitor":
            assert spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
            assert spec["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
        elif manifest["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
            selector = spec.get("selector") or spec["podSelector"]
            assert selector["matchLabels"].items() <= labels


def test_the_key_is_in_the_secret_alone() -> None:
    manifests = render(LEAST)
    key = LEAST["apiKey"]["value"]
    assert key not in yaml.safe_dump(manifests)
    secret = of_kind(manifests, "Secret")
    env = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
    (source,) = [e["valueFrom"]["secretKeyRef"] for e in env if e["name"] == "VLLM_API_KEY"]
    assert source["name"] == secret["metadata"]["name"] and source["key"] in secret["data"]


def test_rules_and_dashboard_are_the_project_s() -> None:
    """`make chart-files` copies them: Helm reads nothing outside a chart."""
    for name, folder in (("rules.yaml", "prometheus"), ("parallel-think.json", "grafana")):
        assert (CHART / "files" / name).read_text() == (ROOT / "deploy" / folder / name).read_text()
    manifests = render(VALUE_SETS["gpu"])
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yaml").read_text())
    assert of_kind(manifests, "PrometheusRule")["spec"] == rules
    shown = json.loads(of_kind(manifests, "ConfigMap")["data"]["parallel-think.json"])
    assert shown == json.loads((ROOT / "deploy" / "grafana" / "parallel-think.json").read_text())


def exported_names() -> set[str]:
    """Return the names of the plugin's metrics and of vLLM's requests in the queue."""
    from vllm.v1.metrics import loggers

    from vllm_parallel_think.observability.metrics import instruments

    source = Path(instruments.__file__).read_text()
    names = {"vllm_pt_" + n.removeprefix("vllm_pt_") for n in re.findall(r'"([a-z_]+)"', source)}
    vllm = Path(loggers.__file__).read_text()
    return names | set(re.findall(r'"(vllm:[a-z_]+)"', vllm))


def test_the_autoscaler_asks_for_metrics_that_exist() -> None:
    adapter = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())
    served = {}
    for rule in adapter["rules"]["custom"]:
        series = rule["seriesQuery"].split("{")[0]
        served[rule["name"]["as"]] = series
        assert series in exported_names()
    metrics = of_kind(render(VALUE_SETS["gpu"]), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert {m["pods"]["metric"]["name"] for m in metrics} == set(served)


def test_the_ray_service_runs_the_application_of_deploy_ray() -> None:
    config = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, _, builder = application["import_path"].partition(":")
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert re.search(rf"^def {builder}\(", source, re.M)
    example = yaml.safe_load((ROOT / "deploy" / "ray" / "laptop.yaml").read_text())
    theirs = example["applications"][0]
    assert application["args"].keys() <= theirs["args"].keys()
    assert {d["name"] for d in application["deployments"]} == {
        d["name"] for d in theirs["deployments"]
    }
    schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed")
    schema.ServeDeploySchema(**config)


def findings(folder: Path) -> set[str]:
    """Return the ids of what checkov finds in a folder of manifests and container files."""
    program = shutil.which("checkov") or str(ROOT / "build" / "checkov" / "bin" / "checkov")
    command = [program, "--directory", str(folder), "--framework", "kubernetes", "dockerfile"]
    done = subprocess.run(
        [*command, "--skip-download", "--output", "json", "--quiet"],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": os.environ["PATH"], "HOME": str(folder)},
    )
    assert done.stdout, done.stderr[-2000:]
    reports = json.loads(done.stdout)
    reports = reports if isinstance(reports, list) else [reports]
    assert {r["check_type"] for r in reports} == {"kubernetes", "dockerfile"}, done.stderr[-2000:]
    assert all(r["summary"]["parsing_errors"] == 0 for r in reports)
    return {c["check_id"] for r in reports for c in r["results"]["failed_checks"]}


def test_security_lint_finds_nothing_unexplained(tmp_path: Path) -> None:
    for name, values in VALUE_SETS.items():
        # `open` is there for the templates: it switches off what this test asks for.
        if name != "open":
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(render(values)))
    (tmp_path / "ray.yaml").write_text(yaml.safe_dump_all(ray_pods()))
    shutil.copy(KUBERNETES / "Containerfile", tmp_path / "Dockerfile")
    explained = yaml.safe_load((KUBERNETES / "lint-exceptions.yaml").read_text())
    assert all(len(reason) > 40 for reason in explained.values())
    assert findings(tmp_path) == set(explained)
