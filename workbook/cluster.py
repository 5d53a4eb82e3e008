"""Which cluster runs the pods here: a Kubernetes one, or none, and then what rehearses them.

The lessons have a cluster of their own: Kind's, named `clothes`, whose access data stands in
`build/kubeconfig` and nowhere else. Another cluster is used only when WORKBOOK_CONTEXT names its
context; yours in ~/.kube/config, its current context above all, is neither read nor changed.
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from workbook import engine

NAME = "clothes"
KUBECONFIG = Path("build/kubeconfig")
OWN = (f"--name={NAME}", f"--kubeconfig={KUBECONFIG}")
KIND_CONFIG = Path("kube-config/kind/cluster.yaml")
KIND_VERSION = "v0.33.0"
KIND_SHA256 = {
    "linux-amd64": "aee6151561422756b764a4ae28e7f44cda5af5a9eead3cc9985112b1de8d8e0d",
    "linux-arm64": "20022bee6cfcd5086cb7234d218e3454e6090022f2a8f55d1fa7fcf42c3867a2",
    "darwin-amd64": "5a99f26f57246dc9319dd294803313197a0f34d33c525b3ea8b655db5916ece0",
    "darwin-arm64": "0c8c7dbe5e23594a198b786c4bc13dacc101fa6196b0cb0b23a1ca44e61f4b4f",
}
KIND_URL = "https://kind.sigs.k8s.io/dl"


class Cluster(NamedTuple):
    """What runs the pods: `kubernetes`, or `embedded`, which is a rehearsal as processes.

    `kubectl` is the command with the options that name the cluster; `created` says whether
    `choose_cluster` has made it.
    """

    engine: str
    why: str
    kubectl: str = "kubectl"
    created: bool = False


def choose_cluster(
    wanted: str = "auto",
    images: tuple[str, ...] = (),
    namespace: str = "",
    look_only: bool = False,
) -> Cluster:
    """Choose what runs the pods, and create the lessons' own cluster where that is possible.

    Args:
        wanted: `auto`, `docker` (a cluster, here Kind's) or `embedded` (a rehearsal); for `auto`
            WORKBOOK_ENGINE decides, if it is set.
        images: the pods' images, which Docker must have for a cluster.
        namespace: where the pods shall be; nobody else's, for it is deleted in the end.
        look_only: neither fetch nor create anything, and take it that both would succeed.

    Raises RuntimeError, with a sentence that says why, if Docker or the cluster of WORKBOOK_CONTEXT
    was asked for and cannot be used, or if the namespace is somebody else's.
    """
    if engine.wanted_engine(wanted) == "embedded":
        return Cluster("embedded", "asked for")
    if context := os.environ.get("WORKBOOK_CONTEXT"):
        kubectl = f"kubectl --context {shlex.quote(context)}"
        if not answers(kubectl):
            raise RuntimeError(
                f"WORKBOOK_CONTEXT names the cluster {context}, which does not answer:"
                f" see what {kubectl} cluster-info says, or unset WORKBOOK_CONTEXT"
                " (docs/troubleshooting.md#the-named-cluster-does-not-answer)."
            )
        why = f"WORKBOOK_CONTEXT names {context}"
        return within(namespace, Cluster("kubernetes", why, kubectl))
    own = images_obstacle(images) or own_cluster(look_only)
    if isinstance(own, Cluster):
        return within(namespace, own)
    return Cluster(*engine.settle_for_embedded(wanted, f"there is no cluster: {own}"))


def within(namespace: str, cluster: Cluster) -> Cluster:
    """Return a cluster whose namespace, if there is one of this name, is the lessons' own."""
    words = shlex.split(f"{cluster.kubectl} get namespace {namespace} --ignore-not-found")
    words.append("--output=go-template={{.metadata.labels}}")
    found = subprocess.run(words, capture_output=True, text=True).stdout if namespace else ""
    if found and f"app.kubernetes.io/part-of:{namespace}" not in found:
        raise RuntimeError(
            f"The cluster has a namespace {namespace} that is not this workbook's:"
            " name another cluster with WORKBOOK_CONTEXT."
        )
    return cluster._replace(why=cluster.why + version_of(cluster.kubectl))


def version_of(kubectl: str) -> str:
    """Return `, Kubernetes ` and the version of a cluster, or nothing if it does not tell."""
    words = shlex.split(f"{kubectl} get --raw /version")
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = subprocess.run(words, capture_output=True, text=True).stdout
        return f", Kubernetes {json.loads(found)['gitVersion']}"
    return ""


def images_obstacle(images: tuple[str, ...]) -> str | None:
    """Say why Docker cannot run these images, or None when it can."""
    if not docker_answers():
        return "no Docker engine answers"
    missing = [image for image in images if not engine.docker("image", "inspect", image)]
    return f"{' and '.join(missing)} could not be built" if missing else None


def docker_answers(wanted: str = "auto") -> bool:
    """Say whether there is a Docker engine, and its use has not been forbidden."""
    forbidden = engine.wanted_engine(wanted) == "embedded"
    return not forbidden and engine.docker("info", "--format", "{{.ServerVersion}}") != ""


def answers(kubectl: str) -> bool:
    """Say whether a cluster's API answers, and lets us in."""
    words = shlex.split(f"{kubectl} get namespaces --request-timeout=10s")
    return subprocess.run(words, capture_output=True, timeout=60).returncode == 0


def own_cluster(look_only: bool = False) -> Cluster | str:
    """Return the lessons' cluster, which is created if need be, or say why there is none."""
    kubectl = f"kubectl --kubeconfig {KUBECONFIG} --context kind-{NAME}"
    if obstacle := kind_obstacle(look_only):
        return obstacle
    if engine.docker("info", "--format", "{{.CgroupVersion}}") == "1":
        return "Kubernetes needs control groups of version 2, and this Docker has version 1"
    if look_only:
        return Cluster("kubernetes", f"Kind has the cluster {NAME}, or can create it", kubectl)
    KUBECONFIG.parent.mkdir(exist_ok=True)
    if NAME in kind("get", "clusters").stdout.split():
        kind("export", "kubeconfig", *OWN)
        if answers(kubectl):
            return Cluster("kubernetes", f"the Kind cluster {NAME} was there", kubectl)
        return f"that of Kind does not answer: kind delete cluster --name {NAME}"
    import yaml  # here, so that `look_only` works before anything is installed

    image = yaml.safe_load(KIND_CONFIG.read_text())["nodes"][0]["image"]
    if not engine.docker("image", "inspect", image) and (obstacle := engine.pull_obstacle(image)):
        return obstacle
    print(f"creating the Kind cluster {NAME}, a minute or two", flush=True)
    with ExitStack() as half:  # half a cluster would be in the way of the next attempt
        half.callback(kind, "delete", "cluster", *OWN)
        done = kind("create", "cluster", *OWN, f"--config={KIND_CONFIG}", "--wait=5m")
        if done.returncode == 0 and answers(kubectl):
            half.pop_all()
            return Cluster("kubernetes", f"Kind has created {NAME}", kubectl, created=True)
    said = next((line for line in done.stderr.splitlines() if "ERROR" in line), "no answer")
    return f"Kind could not create one ({said.removeprefix('ERROR: ')})"


def kind(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Kind."""
    return subprocess.run(["kind", *arguments], capture_output=True, text=True)


def kind_obstacle(look_only: bool = False) -> str | None:
    """See to it that the pinned `kind` is on PATH, or say why it is not.

    It is had from its makers if its checksum is right, and put beside this environment's Python;
    with `look_only`, it is not.
    """
    if shutil.which("kind") and KIND_VERSION in kind("version").stdout:
        return None
    machine = platform.machine().lower()
    machine = f"{platform.system().lower()}-{engine.MACHINES.get(machine, machine)}"
    if machine not in KIND_SHA256:
        return f"Kind is not made for {machine}"
    if look_only:
        return None
    try:
        url = f"{KIND_URL}/{KIND_VERSION}/kind-{machine}"
        with urllib.request.urlopen(url, timeout=engine.PROBE_SECONDS) as answer:
            program = answer.read()
    except OSError:
        return f"there is no kind {KIND_VERSION}, and it cannot be downloaded"
    if hashlib.sha256(program).hexdigest() != KIND_SHA256[machine]:
        return f"the kind {KIND_VERSION} that came has a wrong checksum, and was thrown away"
    target = Path(sys.executable).with_name("kind.new")
    target.write_bytes(program)
    target.chmod(0o755)
    target.rename(target.with_name("kind"))
    return None


def load_command(image: str) -> str:
    """Return the shell command that brings an image of this Docker into the cluster.

    IMAGE_LOADER is such a command without the image, for example `minikube image load`. By default
    it is Kind's; where Docker keeps images as containerd does, Kind takes them from a file only.
    Raises RuntimeError if WORKBOOK_CONTEXT names a cluster, and IMAGE_LOADER does not say how.
    """
    if loader := os.environ.get("IMAGE_LOADER"):
        return f"{loader} {image}"
    if context := os.environ.get("WORKBOOK_CONTEXT"):
        raise RuntimeError(
            f"Say with IMAGE_LOADER how an image gets into {context}, for example"
            f" IMAGE_LOADER='minikube image load' or 'k3d image import --cluster NAME'"
            " (docs/troubleshooting.md#no-way-for-an-image-into-the-cluster)."
        )
    if has_containerd_store():
        archive = f"build/{image.replace(':', '-')}.tar"
        load = f"kind load image-archive --name {NAME} {archive}"
        return f"docker save --output {archive} {image} && {load} && rm {archive}"
    return f"kind load docker-image --name {NAME} {image}"


def has_containerd_store() -> bool:
    """Say whether this Docker keeps images as containerd does."""
    return "io.containerd.snapshotter" in engine.docker("info", "--format", "{{.DriverStatus}}")
