"""kube-config/: its files and objects, against the schemas of Kubernetes and each other."""

import importlib.util
import json
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helpers.basics import ROOT
from helpers.containers import EMBEDDED, instructions
from helpers.manifests import (
    CLOTHES,
    COMPOSE,
    DOCKERFILES,
    FILES,
    FOLDERS,
    KUBE,
    MANIFESTS,
    NAMES,
    OPTIONAL,
    SMALL,
    clothes,
    container,
    default,
    environment,
    namespace_of,
    objects,
    of_kind,
    pod_labels,
    ports,
    probes,
    read,
    render,
    run_kustomize,
    selects,
)
from packaging.version import Version

__all__ = ["clothes", "objects", "render"]  # fixtures


# --- The files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_file_has_one_object_whose_name_and_kind_it_bears(path: Path) -> None:
    (document,) = yaml.safe_load_all(path.read_text())
    assert path.name == f"{document['metadata']['name']}-{document['kind'].lower()}.yaml"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_in_its_kustomization_which_has_namespace_and_tags(folder: str) -> None:
    kustomization = read(KUBE / folder / "kustomization.yaml")
    files = {path.name for path in (KUBE / folder).glob("*.yaml")} - {"kustomization.yaml"}
    assert sorted(kustomization["resources"]) == sorted(files)
    documents = [read(KUBE / folder / name) for name in files]
    assert not [each for each in documents if "namespace" in each["metadata"]]
    images = {container(each)["image"] for each in documents if each["kind"] == "Deployment"}
    named = {each["name"] for each in kustomization.get("images", [])}
    assert images == named  # so without their tags


def test_optional_folders_are_applied_to_the_same_namespace() -> None:
    namespace = read(KUBE / "base/kustomization.yaml")["namespace"]
    for folder in OPTIONAL:
        (only,) = run_kustomize(KUBE / folder)
        assert only["metadata"]["namespace"] == namespace


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
    policy = read(KUBE / "prometheus/prometheus-networkpolicy.yaml")
    kubernetes_validate.validate(policy, version, strict=True)


def test_every_object_has_its_labels_and_the_namespace(objects: list[dict]) -> None:
    namespace = namespace_of(objects)
    for each in objects:
        labels = {
            key.removeprefix("app.kubernetes.io/"): value
            for key, value in each["metadata"]["labels"].items()
        }
        name = each["metadata"]["name"]
        assert labels["part-of"] == namespace, name
        if namespace not in SMALL:
            assert labels["instance"] == namespace and labels["managed-by"] == "kustomize"
        if each["kind"] != "Namespace":
            assert each["metadata"]["namespace"] == namespace
        if name in NAMES and each["kind"] != "Namespace":
            assert (labels["component"], labels["name"]) == (name, NAMES[name])
    for name, deployment in of_kind(objects, "Deployment").items():
        labels = pod_labels(deployment)
        assert labels == deployment["metadata"]["labels"]
        # A selector cannot be changed, so what changes, such as the version, is not part of it.
        keys = {f"app.kubernetes.io/{each}" for each in ("name", "instance", "part-of")}
        keys &= deployment["spec"]["selector"]["matchLabels"].keys()
        assert deployment["spec"]["selector"] == {"matchLabels": {key: labels[key] for key in keys}}
        assert {"app.kubernetes.io/name"} <= keys
        if name not in SMALL:
            assert {"app.kubernetes.io/instance"} <= keys
            tag = container(deployment)["image"].partition(":")[2]
            assert tag.removesuffix("-gpu") == labels["app.kubernetes.io/version"]


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
        words = [*command, *" ".join(instructions(DOCKERFILES[name], "ENV")).split()]
        for port in exposed.split():
            assert [word for word in words if re.search(rf"[=:]{port}$", word)], port
        assert {"command", "args"}.isdisjoint(container(deployment))


def test_images_are_made_here_and_never_asked_for_where_they_are(objects: list[dict]) -> None:
    made = {
        tag
        for path in [*DOCKERFILES.values(), EMBEDDED, "kube-config/gpu/kustomization.yaml"]
        for tag in re.findall(r"docker build .*--tag ([\w:.-]+)", (ROOT / path).read_text())
    }
    for deployment in of_kind(objects, "Deployment").values():
        assert container(deployment)["image"].replace("leaf-", "clothing-") in made
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


# --- What is applied -----------------------------------------------------------------------------

KUSTOMIZATIONS = [path for path in FILES if path.name == "kustomization.yaml"]


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: str(path.parent.name))
def test_every_folder_that_a_comment_has_applied_can_be_applied(path: Path) -> None:
    text = path.read_text()
    applied = re.findall(r"kubectl apply -k (?:\.\.\.|kube-config)/([\w/-]+)", text)
    assert all((KUBE / each / "kustomization.yaml").exists() for each in applied)
    kind = yaml.safe_load(text)["kind"]
    assert (kind == "Component") == (path.parent.name == "component")
    if kind == "Kustomization" and "https://" not in text:
        assert str(path.parent.relative_to(KUBE)) in applied or "examples/canary/copy" in str(path)
        assert run_kustomize(path.parent)


def test_the_client_brings_its_namespace_and_brings_it_first() -> None:
    objects = run_kustomize(KUBE / "client")
    assert [each["kind"] for each in objects] == ["Namespace", "ConfigMap", "Pod"]
    assert {each["metadata"]["namespace"] for each in objects[1:]} == {namespace_of(objects)}
    for each in objects:
        kubernetes_validate.validate(each, VERSIONS[-1], strict=True)


# --- Another model, Kind, and the optional files -------------------------------------------------


def test_another_model_has_all_names_of_its_own(tmp_path: Path) -> None:
    folders = [KUBE / name for name in ("own-model", *OPTIONAL)]
    overlay = {"resources": [os.path.relpath(each, tmp_path.resolve()) for each in folders]}
    overlay["namespace"] = read(KUBE / "own-model/kustomization.yaml")["namespace"]
    (tmp_path / "kustomization.yaml").write_text(json.dumps(overlay))
    objects = run_kustomize(tmp_path)
    base = run_kustomize(KUBE / "base")
    kinds = [of_kind(objects, kind) for kind in ("HTTPRoute", "NetworkPolicy")]
    assert "gateway" in kinds[0] and "prometheus" in kinds[1] and len(objects) == len(base) + 2
    for each in objects:
        del each["metadata"]["labels"]
        assert not re.search("cloth", json.dumps(each["metadata"]))
    model = of_kind(objects, "Deployment")["model-server"]
    images = [container(each)["image"] for each in of_kind(objects, "Deployment").values()]
    assert images == ["leaf-gateway:001", "leaf-model:001"]
    paths = [each["httpGet"]["path"] for each in probes(model).values() if "httpGet" in each]
    assert paths == ["/v1/models/leaf-model/metadata"]
    # What is left is the labels by which the base's objects find each other, and who may look.
    label = '"app.kubernetes.io/name": "clothing-(gateway|model)"'
    label += '|"clothes-monitoring"'
    assert not re.search("cloth", re.sub(label, "", json.dumps(objects)))


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
    route = read(KUBE / "httproute/gateway-httproute.yaml")
    assert (route["apiVersion"], route["kind"]) == ("gateway.networking.k8s.io/v1", "HTTPRoute")
    assert all({"group", "kind"} <= each.keys() for each in route["spec"]["parentRefs"])
    services = of_kind(render("base"), "Service")
    for rule in route["spec"]["rules"]:
        for backend in rule["backendRefs"]:
            known = [port["port"] for port in services[backend["name"]]["spec"]["ports"]]
            assert backend["port"] in known
            # Without them the API server fills them in, and applying again would be a change.
            assert {"group", "kind", "weight"} <= backend.keys()
        assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/"}}]
        longest = sum(
            default(code, name)
            for code, name in (
                ("links.py", "IMAGE_TIMEOUT_SECONDS"),
                ("gateway.py", "PREDICT_TIMEOUT_SECONDS"),
            )
        )
        assert int(rule["timeouts"]["request"].removesuffix("s")) > longest
