"""The Kubernetes manifests against the API's schemas, and against each other."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator.v1 import PodMonitor

from server.settings import PREFIX, Settings

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
MANIFESTS: dict[str, dict[str, Any]] = {file.stem: yaml.safe_load(file.read_text()) for file in FOLDER.glob("*.yaml")}
KINDS = {
    "Deployment", "Service", "PodMonitor", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy",
}  # fmt: skip

# The oldest Kubernetes that is still maintained by its makers, and the newest.
VERSIONS = ("1.34", "1.37")

POD = MANIFESTS["deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


def test_every_kind_is_there():
    assert {manifest["kind"] for manifest in MANIFESTS.values()} == KINDS


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", sorted(MANIFESTS.keys() - {"podmonitor"}))
def test_the_schema_of_the_api_accepts_it(name, version):
    # Strict: unknown fields are refused too.
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_the_prometheus_operators_model_accepts_the_pod_monitor():
    manifest = MANIFESTS["podmonitor"]
    parsed = PodMonitor.model_validate(manifest).model_dump(by_alias=True, exclude_unset=True, mode="json")
    # The model drops what it does not know.
    assert parsed == manifest


@pytest.mark.parametrize(
    "selector",
    [
        MANIFESTS["deployment"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["service"]["spec"]["selector"],
        MANIFESTS["podmonitor"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["poddisruptionbudget"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["networkpolicy"]["spec"]["podSelector"]["matchLabels"],
    ],
)
def test_each_selector_finds_the_pods(selector):
    assert selector.items() <= POD["metadata"]["labels"].items()


def test_ports_are_called_alike():
    (port,) = CONTAINER["ports"]
    assert port["name"] == "http"
    assert [p["targetPort"] for p in MANIFESTS["service"]["spec"]["ports"]] == ["http"]
    assert [e["port"] for e in MANIFESTS["podmonitor"]["spec"]["podMetricsEndpoints"]] == ["http"]
    assert [p["port"] for rule in MANIFESTS["networkpolicy"]["spec"]["ingress"] for p in rule["ports"]] == ["http"]
    assert {CONTAINER[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")} == {
        "http"
    }


def test_kubernetes_waits_longer_than_the_server_drains():
    environment = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
    assert {name.removeprefix(PREFIX).lower() for name in environment} <= set(Settings.model_fields)
    before = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = before + int(environment["PROSPARSE_DRAIN_TIMEOUT"]) + 10
    assert POD["spec"]["terminationGracePeriodSeconds"] >= needed


def test_no_service_puts_its_variables_into_the_servers_environment():
    # PROSPARSE_SERVE_PORT=tcp://… would be refused as an unknown setting.
    assert POD["spec"]["enableServiceLinks"] is False


def test_no_privileges():
    assert POD["spec"]["securityContext"]["runAsNonRoot"] is True
    assert POD["spec"]["automountServiceAccountToken"] is False
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_autoscaler_counts_what_the_adapter_serves():
    rules = yaml.safe_load((FOLDER / "helm" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (metric,) = MANIFESTS["hpa"]["spec"]["metrics"]
    assert [rule["seriesQuery"].split("{")[0] for rule in rules] == [metric["pods"]["metric"]["name"]]


def test_the_router_finds_the_pods_and_is_let_in():
    router = yaml.safe_load((FOLDER / "helm" / "production-stack.yaml").read_text())["routerSpec"]
    flags = dict(zip(router["extraArgs"][::2], router["extraArgs"][1::2], strict=True))
    label, value = flags["--k8s-label-selector"].split("=")
    assert POD["metadata"]["labels"][label] == value
    assert int(flags["--k8s-port"]) == CONTAINER["ports"][0]["containerPort"]
    let_in = MANIFESTS["networkpolicy"]["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert let_in.items() <= router["labels"].items()
