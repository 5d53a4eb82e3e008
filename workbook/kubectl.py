"""Say it once: kubectl's commands, to a cluster or to what rehearses one; and a steady client."""

import atexit
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from workbook.cluster import Cluster, load_command
from workbook.rehearsal import Image, Rehearsal

COMPONENT = "app.kubernetes.io/component"
WELL = 100  # so many answers in a row


class PodState(NamedTuple):
    """What is seen of a pod from outside."""

    name: str
    ready: bool
    restarts: int


class Kubectl:
    """`kubectl("get pods")` prints the command, does it, and prints what it says.

    Args:
        cluster: what runs the pods, as `choose_cluster` says it.
        namespace: the pods' namespace.
    """

    def __init__(self, cluster: Cluster, namespace: str):
        self.cluster = cluster
        self.command = f"{cluster.kubectl} --namespace {namespace}"
        rehearsed = cluster.engine != "kubernetes"
        self.rehearsal = Rehearsal("", cluster.engine).start() if rehearsed else None
        self.tunnels: list[subprocess.Popen] = []

    def load(self, image: str, dockerfile: str, paths: dict[str, str] | None = None) -> None:
        """Bring an image to where the pods run.

        Args:
            image: its name and tag, on this machine's Docker.
            dockerfile: where a rehearsal as processes reads its command.
            paths: paths of the image, and what they are on this machine.
        """
        if self.rehearsal is not None:
            self.rehearsal.images[image] = Image(f"--file {dockerfile} .", paths or {})
        else:
            command = load_command(image)
            print(f"$ {command}", flush=True)
            subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)

    def __call__(self, command: str, check: bool = True) -> None:
        """Do one command; raise RuntimeError or TimeoutError when it fails, unless it may."""
        if self.rehearsal is not None:
            print(f"rehearsal: {command}", flush=True)
            return self._rehearse(self.rehearsal, command)
        print(f"$ {self.command} {command}", flush=True)
        with subprocess.Popen(
            self._words(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
        if check and process.returncode:
            raise RuntimeError(f"This failed: kubectl {command}")

    def forward(self, target: str, port: int, local_port: int) -> None:
        """Open a tunnel, `kubectl port-forward`, that lasts until `close`."""
        command = f"port-forward {target} {local_port}:{port}"
        if self.rehearsal is not None:
            print(f"rehearsal: {command} &")
            self.rehearsal.port_forward(target, port, local_port)
            return
        print(f"$ {self.command} {command} &")
        tunnel = subprocess.Popen(
            self._words(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.tunnels.append(tunnel)
        atexit.register(tunnel.terminate)
        # To try whether it is open could break it; kubectl says when it is, or why it cannot be.
        assert tunnel.stdout is not None
        said = tunnel.stdout.readline()
        if not said.startswith("Forwarding"):
            raise RuntimeError(f"This failed: kubectl {command}: {said}")

    def pods(self, component: str) -> list[PodState]:
        """Return the state of a component's pods; those that are ending are among them."""
        if self.rehearsal is not None:
            pods = self.rehearsal.pods(component)
            return [PodState(pod.name, pod.ready, pod.restarts) for pod in pods]
        words = self._words(f"get pods --selector {COMPONENT}={component} --output json")
        found = []
        for item in json.loads(subprocess.check_output(words))["items"]:
            (state,) = item["status"].get("containerStatuses") or [{}]
            ready, restarts = state.get("ready", False), state.get("restartCount", 0)
            found.append(PodState(item["metadata"]["name"], ready, restarts))
        return found

    def close(self) -> None:
        """Close the tunnels, and end the rehearsal if there is one."""
        for tunnel in self.tunnels:
            tunnel.terminate()
            tunnel.wait(timeout=60)
        if self.rehearsal is not None:
            self.rehearsal.close()

    def _words(self, command: str) -> list[str]:
        return shlex.split(f"{self.command} {command}")

    def _rehearse(self, rehearsal: Rehearsal, command: str) -> None:
        match shlex.split(command):
            case ["create", "--save-config", "--filename", file]:
                self._apply(rehearsal, Path(file).read_text())
            case ["apply", "--kustomize", folder, *selector]:
                manifests = subprocess.check_output(["kubectl", "kustomize", folder], text=True)
                self._apply(rehearsal, manifests, "".join(selector).removeprefix("--selector="))
            case ["delete", "pod", pod, "--force", *_]:
                rehearsal.pod(pod).grace = 0
                rehearsal.delete_pod(pod)
                print(f'pod "{pod}" force deleted')
            case ["exec", target, *_] if target.startswith("deployment/"):
                first = rehearsal.pods(target.removeprefix("deployment/"))[0]
                rehearsal.kubectl(command.replace(target, first.name, 1))
            case ["rollout", "status", target, "--timeout", seconds]:
                name = target.removeprefix("deployment/")
                rehearsal.rollout_status(name, float(seconds.removesuffix("s")))
            case _:
                rehearsal.kubectl(command)

    def _apply(self, rehearsal: Rehearsal, manifests: str, selector: str = "") -> None:
        """Give the rehearsal objects, all or those with a label, and say what is new."""
        label, _, value = selector.partition("=")
        chosen = []
        for each in yaml.safe_load_all(manifests):
            if selector and each["metadata"]["labels"].get(label) != value:
                continue
            kind, name = each["kind"], each["metadata"]["name"]
            before = rehearsal.objects.get((kind, name))
            how = "unchanged" if before == each else "configured" if before else "created"
            print(f"{kind.lower()}/{name} {how}")
            chosen.append(each)
        rehearsal.apply(yaml.safe_dump_all(chosen))


class Client:
    """The program `client.py`, which asks a gateway steadily, beside the cluster's other pods.

    In a cluster it is a pod. In a rehearsal it is a process that connects to a port which sends
    each connection to some ready pod of the Service `gateway`, as the Service does in a cluster.

    Args:
        kubectl: where the gateway is.
        folder: the program and the manifests of its pod.
        notes: the file for what it writes.
    """

    def __init__(self, kubectl: Kubectl, folder: str, notes: Path):
        self.kubectl, self.folder, self.notes = kubectl, folder, notes
        if kubectl.rehearsal is not None:
            url = f"http://localhost:{kubectl.rehearsal.expose('gateway', 80)}"
            words = [sys.executable, f"{folder}/client.py", url]
        else:
            self.there = Kubectl(kubectl.cluster, "clothes-client")
            self.there(f"apply --kustomize {folder}")
            self.there("wait pod/client --for condition=Ready --timeout 120s")
            words = shlex.split(f"{self.there.command} logs --follow client")
        with notes.open("w") as file:
            self.process = subprocess.Popen(words, stdout=file)
        atexit.register(self.process.terminate)
        wait_until(self.is_well)

    def answers(self, since: float = 0.0) -> list[tuple[float, str]]:
        """Return when answers came, as `time.time()`, and what they were: `version 1` ..."""
        lines = self.notes.read_text().splitlines(keepends=True)
        pairs = [line.strip().split(" ", 1) for line in lines if line.endswith("\n")]
        return [(float(when), what) for when, what in pairs if float(when) >= since]

    def is_well(self, since: float = 0.0) -> bool:
        """Say whether there have been answers, and the last hundred were predictions."""
        last = self.answers(since)[-WELL:]
        return len(last) == WELL and all(what.startswith("version") for _, what in last)

    def recover(self, component: str, before: list[PodState]) -> None:
        """Wait until a component's pods are not as before, and ready, and predictions come."""

        def is_other() -> bool:
            now = self.kubectl.pods(component)
            return now not in ([], before) and all(pod.ready for pod in now)

        wait_until(is_other)
        moment = time.time()
        wait_until(lambda: self.is_well(moment))

    def close(self) -> None:
        """End the client."""
        self.process.terminate()
        self.process.wait(timeout=60)
        if self.kubectl.rehearsal is None:
            self.there(f"delete --kustomize {self.folder} --timeout 120s")


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Wait until something is true; raise TimeoutError if it is not so after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"What was waited for has not come true in {seconds:g} s.")
        time.sleep(0.2)
