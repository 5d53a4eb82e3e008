"""Lesson 09 in the cloud and in rehearsal: what differs between the two, said once."""

import shutil
import subprocess
import urllib.request
from contextlib import suppress
from ipaddress import IPv4Network
from pathlib import Path

import yaml

from workbook import cluster
from workbook.engine import settle_for_embedded, wanted_engine
from workbook.kubectl import Kubectl
from workbook.manifests import Manifest
from workbook.servers import wait_until

PROGRAMS = ("docker", "aws", "eksctl")
EXAMPLE = "203.0.113.7/32"  # nobody's address, for examples


def choose(agreed: object, wanted: str, images: tuple[str, ...]) -> cluster.Cluster:
    """Choose where the pods run: on `aws` with an agreement, else in a rehearsal.

    With `docker`, a rehearsal also has images to push to a registry, and to pull from it.

    Args:
        agreed: nothing but True is an agreement to costs.
        wanted: for a rehearsal, `auto`, `docker` or `embedded`, as in `choose_cluster`.
        images: what must be on this machine's Docker.

    Raises RuntimeError if the costs are agreed to and something is missing, or if Docker was asked
    for and cannot be used.
    """
    embedded = wanted_engine(wanted) == "embedded"
    obstacle = "no Docker engine is used" if embedded else cluster.images_obstacle(images)
    if agreed is not True:
        why = "AGREE_TO_COST is not True, so AWS is simulated"
        engine, obstacle = settle_for_embedded(wanted, obstacle) if obstacle else ("docker", "")
        return cluster.Cluster(engine, f"{why}; {obstacle}" if obstacle else why)
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        obstacle = f"{' and '.join(missing)} must be installed"
    if obstacle:
        raise RuntimeError(
            f"AGREE_TO_COST is True, but {obstacle}. Mend that, or rehearse: set it to False."
            " See docs/troubleshooting.md#something-is-missing-for-the-real-aws."
        )
    return cluster.Cluster("aws", "AGREE_TO_COST is True: from here on it costs money")


def read_namespace(overlay: Path) -> Manifest:
    """Return the Namespace that is among the objects of an overlay."""
    objects = yaml.safe_load_all(subprocess.check_output(["kubectl", "kustomize", overlay]))
    return next(each for each in objects if each["kind"] == "Namespace")


def connect_kubectl(chosen: cluster.Cluster, folder: Path) -> Kubectl:
    """Return kubectl for the cluster that eksctl has made, or for a rehearsal.

    `folder` has the overlay, whose namespace it is for, and the cluster's kubeconfig.
    """
    if chosen.engine == "aws":
        command = f"kubectl --kubeconfig {folder / 'kubeconfig'}"
        chosen = cluster.Cluster("kubernetes", chosen.why, command)
    return Kubectl(chosen, read_namespace(folder)["metadata"]["name"])


def own_network(engine: str) -> str:
    """Return this machine's address as Amazon sees it, as a network; for a rehearsal an example."""
    if engine != "aws":
        return EXAMPLE
    with urllib.request.urlopen("https://checkip.amazonaws.com", timeout=30) as answer:
        return str(IPv4Network(answer.read().decode().strip()))


def put_secret(kubectl: Kubectl, overlay: Path, name: str, data: dict[str, str]) -> None:
    """Make an overlay's namespace and a Secret in it, in no file and in no command's arguments."""
    namespace = read_namespace(overlay)
    about = {"name": name, "namespace": namespace["metadata"]["name"]}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": about, "stringData": data}
    if kubectl.rehearsal is not None:
        return kubectl.rehearsal.apply([namespace, secret])
    # The client's way would leave the Secret's text in an annotation, too.
    for manifest, how in ((namespace, "apply"), (secret, "apply --server-side")):
        command = [*kubectl.command.split(), *how.split(), "--filename=-"]
        subprocess.run(command, input=yaml.safe_dump(manifest), text=True, check=True)


def load_balancer(kubectl: Kubectl, service: str) -> str:
    """Wait until a Service has a load balancer, and return its host; in a rehearsal, a port."""
    if kubectl.rehearsal is not None:
        return f"127.0.0.1:{kubectl.rehearsal.expose(service, 80)}"
    # Amazon's have a name, those of other clouds an address.
    first = ".status.loadBalancer.ingress[0]"
    path = f"jsonpath={{{first}.hostname}}{{{first}.ip}}"
    command = [*kubectl.command.split(), "get", "service", service, "--output", path]
    wait_until(lambda: subprocess.check_output(command), "there is a load balancer", 600)
    return subprocess.check_output(command, text=True)


def wait_until_shut(kubectl: Kubectl, host: str) -> str:
    """Wait until a load balancer admits us no longer, and say so; a rehearsal shows its list."""
    if kubectl.rehearsal is not None:
        spec = kubectl.rehearsal.objects["Service"]["gateway"]["spec"]
        return f"admitted: {', '.join(spec['loadBalancerSourceRanges'])}"

    def is_shut() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://{host}/livez", timeout=5):
            return False
        return True

    wait_until(is_shut, "nobody is admitted")
    return "nobody answers within five seconds"
