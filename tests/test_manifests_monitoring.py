"""monitoring/ on a cluster: whom Prometheus finds and may ask, and what Grafana shows."""

import re
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helpers.basics import ROOT
from helpers.manifests import (
    COMPOSE,
    container,
    environment,
    of_kind,
    pod,
    pod_labels,
    ports,
    read,
    render,
    run_kustomize,
    selects,
)
from test_manifests_network import End, reaches
from test_manifests_schema import VERSIONS
from test_manifests_security import offences

__all__ = ["render"]  # fixture

MONITORING = ROOT / "monitoring"
HOME = "clothes-monitoring"


@pytest.fixture(scope="module")
def monitoring() -> list[dict]:
    return run_kustomize(MONITORING)


def targets(config: dict, name: str, labels: dict, annotations: dict, ports: list[int]) -> list:
    """The addresses and labels that a pod of these ports has after a job's relabelling."""
    found = []
    for port in ports:
        meta = {
            "__address__": f"10.244.1.1:{port}",
            "__metrics_path__": "/metrics",
            "__meta_kubernetes_pod_name": name,
            "__meta_kubernetes_pod_container_port_number": f"{port}",
        }
        for kind, pairs in (("label", labels), ("annotation", annotations)):
            for key, value in pairs.items():
                meta[f"__meta_kubernetes_pod_{kind}_{re.sub(r'[^A-Za-z0-9]', '_', key)}"] = value
        if relabelled := relabel(config["relabel_configs"], meta):
            found.append(relabelled)
    return found


def relabel(rules: list[dict], labels: dict[str, Any]) -> dict[str, Any] | None:
    for rule in rules:
        source = ";".join(labels.get(each, "") for each in rule["source_labels"])
        match rule.get("action", "replace"):
            case "keep":
                if not re.fullmatch(rule["regex"], source):
                    return None
            case "keepequal":
                if labels.get(rule["target_label"], "") != source:
                    return None
            case "replace":
                assert rule.keys() == {"source_labels", "target_label"}
                labels[rule["target_label"]] = source
            case action:
                raise ValueError(action)
    return labels


@pytest.fixture(scope="module")
def config(monitoring: list[dict]) -> dict:
    deployment = of_kind(monitoring, "Deployment")["prometheus"]
    (volume,) = [each["configMap"] for each in pod(deployment)["volumes"] if "configMap" in each]
    (mount,) = [each for each in container(deployment)["volumeMounts"] if each["name"] == "config"]
    data = of_kind(monitoring, "ConfigMap")[volume["name"]]["data"]
    (option,) = [each for each in container(deployment)["args"] if "--config.file" in each]
    return yaml.safe_load(data[option.removeprefix(f"--config.file={mount['mountPath']}/")])


def test_prometheus_finds_each_pod_once_where_its_metrics_are(
    config: dict, render: Callable
) -> None:
    (job,) = config["scrape_configs"]
    compose = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    assert config["global"] == compose["global"]
    for each in compose["scrape_configs"]:
        deployment = of_kind(render("base"), "Deployment")[each["job_name"]]
        annotations = deployment["spec"]["template"]["metadata"]["annotations"]
        numbers = [*ports(deployment).values()]
        (found,) = targets(job, "a-pod", pod_labels(deployment), annotations, numbers)
        (sd,) = each["dns_sd_configs"]
        assert found["__address__"] == f"10.244.1.1:{sd['port']}"
        assert found["__metrics_path__"] == each.get("metrics_path", "/metrics")
        assert (found["job"], found["instance"]) == (each["job_name"], "a-pod")
    assert not targets(job, "another", {"app.kubernetes.io/component": "x"}, {}, [80])


def test_prometheus_may_find_pods_and_do_nothing_else(
    config: dict, monitoring: list[dict], render: Callable
) -> None:
    (sd,) = config["scrape_configs"][0]["kubernetes_sd_configs"]
    binding = of_kind(monitoring, "RoleBinding")["prometheus"]
    role = of_kind(monitoring, "Role")[binding["roleRef"]["name"]]
    wanted = {*of_kind(render("base"), "Namespace")}
    assert {*sd["namespaces"]["names"]} == wanted
    assert {each["metadata"]["namespace"] for each in (role, binding)} == wanted
    (rule,) = role["rules"]
    assert rule == {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    account = pod(of_kind(monitoring, "Deployment")["prometheus"])["serviceAccountName"]
    subject = {"kind": "ServiceAccount", "name": account, "namespace": HOME}
    assert binding["subjects"] == [subject] and account in of_kind(monitoring, "ServiceAccount")
    assert (
        pod(of_kind(monitoring, "Deployment")["grafana"])["automountServiceAccountToken"] is False
    )


def test_prometheus_reaches_both_tiers_and_strangers_reach_neither_of_the_two(
    monitoring: list[dict], render: Callable
) -> None:
    objects = [*render("base"), *monitoring]
    deployments = of_kind(objects, "Deployment")
    ends = {
        name: End(f"10.244.1.{number}", each["metadata"]["namespace"], pod_labels(each))
        for number, (name, each) in enumerate(deployments.items())
    }
    for name in ("gateway", "model-server"):
        template = deployments[name]["spec"]["template"]
        port = int(template["metadata"]["annotations"]["prometheus.io/port"])
        assert reaches(objects, ends["prometheus"], ends[name], port, "TCP")
    assert reaches(objects, ends["grafana"], ends["prometheus"], 9090, "TCP")
    for port, name in ((9090, "prometheus"), (3000, "grafana")):
        assert not reaches(objects, End("10.244.2.1", "default"), ends[name], port, "TCP")


def test_every_object_is_valid_and_every_pod_as_the_namespace_demands(
    monitoring: list[dict],
) -> None:
    for each in monitoring:
        for version in VERSIONS:
            kubernetes_validate.validate(each, version, strict=True)
    for each in of_kind(monitoring, "Deployment").values():
        assert each["metadata"]["namespace"] == HOME
        assert not [*offences(pod(each))]
        assert container(each)["securityContext"]["readOnlyRootFilesystem"] is True
        limits = container(each)["resources"]["limits"]
        assert limits.keys() == container(each)["resources"]["requests"].keys()
    labels = of_kind(monitoring, "Namespace")[HOME]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_images_variables_and_files_are_those_of_compose(monitoring: list[dict]) -> None:
    for name, deployment in of_kind(monitoring, "Deployment").items():
        service = COMPOSE[name]
        assert container(deployment)["image"] == service["image"]
        assert environment(deployment) == service.get("environment", {})
        (port,) = ports(deployment).values()
        assert service["ports"][0].endswith(f":{port}")
        assert of_kind(monitoring, "Service")[name]["spec"]["ports"][0]["port"] == port
        selector = {"matchLabels": of_kind(monitoring, "Service")[name]["spec"]["selector"]}
        assert selects(selector, pod_labels(deployment))
        maps = {
            each["name"]: of_kind(monitoring, "ConfigMap")[each["configMap"]["name"]]["data"]
            for each in pod(deployment)["volumes"]
            if "configMap" in each
        }
        mounted = {
            f"{mount['mountPath']}/{file}" if "subPath" not in mount else mount["mountPath"]: text
            for mount in container(deployment)["volumeMounts"]
            for file, text in maps.get(mount["name"], {}).items()
            if mount.get("subPath", file) == file
        }
        expected = {}
        for volume in service["volumes"]:
            source, target, _ = volume.split(":")
            path = ROOT / source
            files = [*path.iterdir()] if path.is_dir() else [path]
            for file in files:
                expected[f"{target}/{file.name}" if path.is_dir() else target] = file.read_text()
        assert mounted.keys() == expected.keys()
        if name == "grafana":
            assert mounted == expected


def test_every_file_is_in_the_kustomization() -> None:
    resources = [
        each
        for each in read(MONITORING / "kustomization.yaml")["resources"]
        if each != "../kube-config/prometheus"
    ]
    for path in resources:
        document = read(MONITORING / path)
        kind = document["kind"].lower()
        assert path == f"cluster/{document['metadata']['name']}-{kind}.yaml"
    files = {path.name for path in MONITORING.glob("cluster/*.yaml")} - {"prometheus.yaml"}
    assert {path.removeprefix("cluster/") for path in resources} == files
