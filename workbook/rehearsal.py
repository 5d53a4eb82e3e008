"""Rehearse Kubernetes manifests without a cluster: their pods, as processes on this machine.

A `Rehearsal` runs the commands of a Deployment's pods with their variables, executes their probes,
starts again what has died, scales, and rolls out changes step by step. It is no cluster: NOT_SHOWN
says what is missing. What it cannot do as a cluster does, it refuses.
"""

import copy
import itertools
import math
import os
import re
import secrets
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from workbook import autoscaler, manifests
from workbook.manifests import Image, Manifest, container, port_number, quantity
from workbook.pods import TICK_SECONDS, Pod, revision_of
from workbook.servers import is_busy, require_free_ports

ENDPOINTS_TICKS = 5  # so late does a Service learn which pods are ready; in a cluster, too
SLOTS = 8  # for the pods of a Deployment behind a headless Service
CLOSE_SECONDS = 10  # so long may a pod take to end when the rehearsal is over
# The kinds of which commands read and change one object, and what errors call them.
RESOURCES = {
    "Deployment": "deployments.apps",
    "HorizontalPodAutoscaler": "horizontalpodautoscalers.autoscaling",
    "NetworkPolicy": "networkpolicies.networking.k8s.io",
    "Service": "services",
}
NOT_SHOWN = """\
There is no scheduler, no node, no API server and no cluster DNS.
Pods are processes of yours: they have no image, no limits and no user of their own.
Addresses, ports and paths in commands are replaced by this machine's.
An autoscaler keeps its least number of pods until something measures them.
Other kinds of objects have no effect."""
# The Service of the API server, which every cluster has, with the address that Kind gives it.
KUBERNETES = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "kubernetes", "namespace": "default"},
    "spec": {
        "type": "ClusterIP",
        "clusterIP": "10.96.0.1",
        "ports": [{"name": "https", "port": 443, "targetPort": 6443}],
    },
}


class Rehearsal:
    """The pods of some manifests in one namespace, until `close`; `images` are what they run."""

    def __init__(self, namespace: str = "default", images: dict[str, Image] | None = None):
        self.namespace, self.images = namespace, images or {}
        self.id, self.folder = secrets.token_hex(4), Path(tempfile.mkdtemp(prefix="rehearsal-"))
        self.objects = defaultdict[str, dict[str, Manifest]](dict)  # by kind and name
        self.began, self.made = time.monotonic(), dict[tuple[str, str], float]()
        self.revisions: dict[str, list[Manifest]] = {}
        self.all_pods: list[Pod] = []
        self.endpoints: dict[str, list[Pod]] = {}
        # A pod has a slot, and each slot has ports of its own, so that the name of a headless
        # Service can mean all slots of its pods, whichever pods come and go.
        self.claims: dict[tuple[str, int], socket.socket] = {}
        self.proxies: dict[object, Proxy] = {}
        self.usage: dict[str, int] = {}  # CPU in per cent of the requests, by autoscaler
        self.measuring: threading.Thread | None = None
        self.lock, self.over = threading.RLock(), threading.Event()
        # It removes what is left when this program ends without having called `close`.
        self.reaper = subprocess.Popen(
            [sys.executable, "-m", "workbook.processes", "REHEARSAL", self.id, self.folder],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.controlling = threading.Thread(target=self._control, daemon=True)
        self.controlling.start()

    def close(self) -> None:
        """End every pod, with SIGTERM and soon SIGKILL, and remove all that was made."""
        self.over.set()
        self.controlling.join()
        for pod in self.all_pods:
            pod.pre_stop, pod.grace = 0, min(pod.grace, CLOSE_SECONDS)
            pod.ending.set()
        for pod in self.all_pods:
            pod.gone.wait()
        for proxy in self.proxies.values():
            proxy.close()
        for claim in self.claims.values():
            claim.close()
        self.reaper.communicate(timeout=60)  # closes its input, and waits for its end

    # --- What kubectl asks for --------------------------------------------------------------------

    def apply(self, objects: list[Manifest]) -> None:
        """Add or change objects; ValueError if one asks for what a rehearsal cannot do."""
        for each in objects:
            if each["kind"] in ("Deployment", "Service", "Secret"):
                manifests.refuse_unknown(each)
        with self.lock:
            for each in copy.deepcopy(objects):
                kind, name = each["kind"], each["metadata"]["name"]
                if kind == "Deployment":
                    history, now = self.revisions.get(name, []), each["spec"]["template"]
                    self.revisions[name] = [old for old in history if old != now] + [now]
                self.objects[kind][name] = each
                self.made.setdefault((kind, name), time.monotonic())

    def change(self, deployment: str, change: Callable[[Manifest], object]) -> None:
        """Apply a Deployment again, after a function has changed what it specifies."""
        changed = copy.deepcopy(self.object("Deployment", deployment))
        change(changed["spec"])
        self.apply([changed])

    def rollout_status(self, deployment: str, seconds: float = 120) -> None:
        """Print how a rollout goes until all pods are new and ready, or raise TimeoutError."""
        said, deadline = "", time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self.lock:
                wanted, (new, old) = self.replicas(deployment), self.live_pods(deployment)
            ready = sum(map(self.is_available, new))
            if not old and ready == len(new) == wanted:
                return print(f'deployment "{deployment}" successfully rolled out')
            if len(new) < wanted:
                how = f"{len(new)} out of {wanted} new replicas have been updated"
            elif old:
                how = f"{len(old)} old replicas are pending termination"
            else:
                how = f"{ready} of {wanted} updated replicas are available"
            if how != said:
                print(f'Waiting for deployment "{deployment}" rollout to finish: {how}...')
            said = how
            time.sleep(TICK_SECONDS)
        raise TimeoutError("timed out waiting for the condition")

    def delete_pod(self, name: str, grace: float = math.inf) -> None:
        """End a pod with its grace, or less, and wait for it; its Deployment makes another one."""
        pod = self.pod(name)
        pod.grace = min(pod.grace, grace)
        pod.ending.set()
        pod.gone.wait()

    def exec(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command with a pod's variables and folder; its errors are among its output."""
        pod = self.pod(name)
        if pod.process is None or pod.process.poll() is not None:
            missing = f'container not found ("{pod.container["name"]}")'
            raise ValueError(f"unable to upgrade connection: {missing}")
        options = self._options(pod, [*command]) | {"stdout": subprocess.PIPE}
        return subprocess.run(**options, text=True, timeout=60)

    def forward(self, service: str, port: int, local_port: int = 0) -> int:
        """Forward a port of this machine, which is returned, to ONE ready pod of a Service.

        What it was forwarded to before is forgotten.
        """
        ready, target = self.ready_pods(service), self.target_port(service, port)
        if not ready:
            raise ValueError(f"no pod of the Service {service} is ready")
        address = ready[0].address(target)
        if local_port in self.proxies:
            self.proxies.pop(local_port).close()
        require_free_ports(local_port)
        proxy = Proxy(lambda: address, local_port)
        self.proxies[proxy.server_address[1]] = proxy
        return proxy.server_address[1]

    def expose(self, service: str, port: int | str | None = None) -> int:
        """Return a port whose connections go to ready pods of a Service, as kube-proxy has them."""
        number = self._port_of(service, port)["port"]

        def choose() -> str:
            pods = self.endpoints.get(service)
            with suppress(ValueError):  # the Service, or what it names, may change
                if pods:
                    return secrets.choice(pods).address(self.target_port(service, number))
            return "127.0.0.1:1"

        with self.lock:
            if (service, number) not in self.proxies:
                self.proxies[service, number] = Proxy(choose)
            return self.proxies[service, number].server_address[1]

    def start_metrics(self) -> None:
        """Measure the CPU of pods from now on, as metrics-server does: autoscalers act upon it."""
        with self.lock:
            if self.measuring is None:
                self.measuring = threading.Thread(target=self._autoscale, daemon=True)
                self.measuring.start()

    # --- What there is ----------------------------------------------------------------------------

    def pods(self, deployment: str | None = None) -> list[Pod]:
        """Return the pods, of one Deployment or of all, oldest first."""
        with self.lock:
            mine = (pod for pod in self.all_pods if deployment in (None, pod.owner))
            return [pod for pod in mine if not pod.gone.is_set()]

    def pod(self, name: str) -> Pod:
        """Return a pod by its name."""
        if found := [pod for pod in self.pods() if pod.name == name]:
            return found[0]
        raise ValueError(f'pods "{name}" not found')

    def object(self, kind: str, name: str) -> Manifest:
        """Return an object by its kind and name."""
        if name not in self.objects[kind]:
            raise ValueError(f'{RESOURCES.get(kind, f"{kind.lower()}s")} "{name}" not found')
        return self.objects[kind][name]

    def replicas(self, deployment: str) -> int:
        """Return how many pods there shall be: without replicas, an autoscaler's least number."""
        scalers = [each["spec"] for each in self.objects["HorizontalPodAutoscaler"].values()]
        own = [each for each in scalers if each["scaleTargetRef"]["name"] == deployment]
        least = own[0].get("minReplicas", 1) if own else 1
        return self.object("Deployment", deployment)["spec"].get("replicas", least)

    def live_pods(self, deployment: str) -> tuple[list[Pod], list[Pod]]:
        """Return the pods that shall stay: those of the present pod template, and older ones."""
        now = revision_of(self.object("Deployment", deployment)["spec"]["template"])
        live = [pod for pod in self.pods(deployment) if not pod.ending.is_set()]
        new = [pod for pod in live if pod.revision == now]
        return new, [pod for pod in live if pod not in new]

    def pods_behind(self, service: str) -> list[Pod]:
        """Return the pods that a Service selects and that have an address, ready or not."""
        pods = [pod for pod in self.pods() if pod.owner in self._templates_behind(service)]
        return [pod for pod in pods if pod.ports and not pod.ending.is_set()]

    def ready_pods(self, service: str) -> list[Pod]:
        """Return the pods that a Service may send requests to."""
        return [pod for pod in self.pods_behind(service) if pod.ready]

    def is_available(self, pod: Pod) -> bool:
        """Say whether a pod has been ready for its Deployment's minReadySeconds."""
        least = self.object("Deployment", pod.owner)["spec"].get("minReadySeconds", 0)
        return time.monotonic() - pod.ready_since >= least

    def target_port(self, service: str, port: int | str | None = None) -> int | str:
        """Return the port of the pods that a Service's port leads to, by default its first one."""
        found = self._port_of(service, port)
        return found["targetPort"] if "targetPort" in found else found["port"]

    def _port_of(self, service: str, port: int | str | None) -> Manifest:
        for each in self.object("Service", service)["spec"]["ports"]:
            if port in (None, each["port"], each.get("name")):
                return each
        raise ValueError(f"the Service {service} has no port {port}")

    def _templates_behind(self, service: str) -> dict[str, Manifest]:
        """Return the pod templates that a Service selects, by the names of their Deployments."""
        selector = self.object("Service", service)["spec"]["selector"].items()
        templates = {n: d["spec"]["template"] for n, d in self.objects["Deployment"].items()}
        return {n: t for n, t in templates.items() if selector <= t["metadata"]["labels"].items()}

    # --- The controllers --------------------------------------------------------------------------

    def _control(self) -> None:
        for number in itertools.count():
            with self.lock:
                self.all_pods = self.pods()
                for name in self.objects["Deployment"]:
                    self._reconcile(name)
                if number % ENDPOINTS_TICKS == 0:
                    self.endpoints = {
                        name: self.ready_pods(name) for name in self.objects["Service"]
                    }
            if self.over.wait(TICK_SECONDS):
                return

    def _reconcile(self, name: str) -> None:
        """Take one step towards a Deployment's pods, within maxSurge and maxUnavailable."""
        spec = self.object("Deployment", name)["spec"]
        wanted, (new, old) = self.replicas(name), self.live_pods(name)
        live = len(new) + len(old)
        rolling = spec.get("strategy", {}).get("rollingUpdate") or {}
        # By default a quarter more and a quarter fewer.
        surge = rolling.get("maxSurge", math.ceil(wanted / 4))
        fewer = rolling.get("maxUnavailable", wanted // 4)
        least = wanted - (fewer or int(not surge))
        for _ in range(min(wanted - len(new), wanted + surge - live)):
            taken = {pod.slot for pod in self.pods(name)}
            slot = next(number for number in itertools.count() if number not in taken)
            self.all_pods.append(Pod(name, spec["template"], slot, self.folder, self._launch))
        # The new ones that are too many go, the youngest first, those that are not ready before.
        surplus = sorted(new, key=lambda pod: (pod.ready, -pod.born))[: max(0, len(new) - wanted)]
        # Of the old ones those that serve nobody may go at once, the others only when not missed.
        available = sum(map(self.is_available, new))
        spare = max(0, live - least - (len(new) - available))
        idle = [pod for pod in old if not pod.ready][:spare]
        serving = [pod for pod in old if pod.ready]
        unmissed = max(0, len(serving) + available - least)
        for pod in [*surplus, *idle, *serving[:unmissed]]:
            pod.ending.set()

    def _autoscale(self) -> None:
        """Set numbers of pods four times a minute, by autoscalers whose `behavior` is simple."""
        before, wishes = self._cpu_seconds(), defaultdict[str, list[tuple[float, int]]](list)
        while not self.over.wait(autoscaler.SYNC_SECONDS):
            now = self._cpu_seconds()
            with self.lock:
                for name, each in self.objects["HorizontalPodAutoscaler"].items():
                    spec, target = each["spec"], each["spec"]["scaleTargetRef"]["name"]
                    mine = [pod for pod in now if pod in before and pod.owner == target]
                    calm = autoscaler.calm_seconds(spec)
                    if not mine or calm is None:
                        continue
                    requested = quantity(mine[0].container["resources"]["requests"]["cpu"])
                    used = sum(max(0.0, now[pod] - before[pod]) for pod in mine)
                    # A pod that is not measured yet counts as one that does nothing.
                    pods = max(len(mine), self.replicas(target))
                    share = used / autoscaler.SYNC_SECONDS / requested / pods
                    self.usage[name] = round(100 * share)
                    moment = time.monotonic()
                    recent = [w for w in wishes[name] if moment - w[0] < calm]
                    recent.append((moment, autoscaler.wish(pods, 100 * share, spec)))
                    wishes[name] = recent
                    wanted = max(wish for _, wish in recent)
                    self.object("Deployment", target)["spec"]["replicas"] = wanted
            before = now

    def _cpu_seconds(self) -> dict[Pod, float]:
        """Return the seconds of CPU that each ready pod has used so far."""
        ready = [(pod, pod.process) for pod in self.pods() if pod.ready]
        return {pod: autoscaler.cpu_seconds(process.pid) for pod, process in ready if process}

    # --- Processes --------------------------------------------------------------------------------

    def _launch(self, pod: Pod) -> subprocess.Popen:
        """Start the manifest's command, or that of the image's Dockerfile."""
        if pod.image not in self.images:
            raise LookupError(f'Failed to pull image "{pod.image}": nobody has built it here')
        image, own = self.images[pod.image], "command" in pod.container
        words = pod.container.get("command", image.entrypoint)
        words = [*words, *pod.container.get("args", [] if own else image.command)]
        numbers = [each["containerPort"] for each in pod.container.get("ports", [])]
        pod.ports = {number: self._port_at(pod.owner, number, pod.slot) for number in numbers}
        with pod.log.open("wb") as log:
            return subprocess.Popen(**self._options(pod, words) | {"stdout": log})

    def _options(self, pod: Pod, words: list[str]) -> dict[str, Any]:
        """Return what `subprocess` needs to run a command as in a pod's container."""
        image = self.images[pod.image]
        asked = image.environment | manifests.environment(pod.container, self.object)
        here = dict(zip(asked, self._here(pod, [*asked.values()]), strict=True))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "PYTHONUNBUFFERED": "1", "REHEARSAL": self.id}
        return {
            "args": self._here(pod, words),
            "cwd": image.context,
            "env": {**os.environ, **own, **here},
            "stdin": subprocess.DEVNULL,
            "stderr": subprocess.STDOUT,
            "start_new_session": True,
        }

    def _here(self, pod: Pod, words: list[str]) -> list[str]:
        """Replace the addresses, ports and paths of a cluster by those of this machine."""
        here = self.images[pod.image].paths | {"0.0.0.0": "127.0.0.1"}
        here |= {str(number): str(own) for number, own in pod.ports.items()}
        others = "|".join(map(re.escape, sorted(here, reverse=True)))  # /a/b before /a
        names = "|".join(self.objects["Service"]) or "(?!)"
        end = rf"(?:\.{self.namespace}(?:\.svc(?:\.cluster\.local)?)?)?"
        service = rf"(?:dns:///)?(?<!-)(?P<service>{names}){end}:(?P<port>\d+)"

        def replace(match: re.Match[str]) -> str:
            if match["service"]:
                return self._service_address(match["service"], int(match["port"]))
            return here[match[0]]

        whole = re.compile(rf"(?<![\w.])(?:{service}|{others})(?![\w.-])")
        return [whole.sub(replace, word) for word in words]

    def _service_address(self, name: str, port: int) -> str:
        """Return what stands for `name:port` here: all slots of its pods, or a balanced port."""
        if self.object("Service", name)["spec"].get("clusterIP") != "None":
            return f"127.0.0.1:{self.expose(name, port)}"
        target, behind = self.target_port(name, port), self._templates_behind(name)
        if not behind:  # a cluster's DNS would know its pods later; a process is told once
            raise ValueError(f"Error: no Deployment makes pods for the Service {name} yet")
        numbers = {each: port_number(container(its), target) for each, its in behind.items()}
        slots = itertools.product(numbers.items(), range(SLOTS))
        return ",".join(f"127.0.0.1:{self._port_at(*each, slot)}" for each, slot in slots)

    def _port_at(self, deployment: str, number: int, slot: int) -> int:
        """Return the port on this machine for a port of the pods in one of a Deployment's slots.

        It is among a hundred that nobody listens at and that no other rehearsal has claimed, below
        those that the system gives to outgoing connections, 32768 and more on Linux.
        """
        with self.lock:
            while (deployment, number) not in self.claims:
                first = 26_000 + 100 * secrets.randbelow(60)
                if not any(map(is_busy, range(first, first + 100))):
                    with suppress(OSError):
                        claim = socket.create_server(("127.0.0.1", first))
                        self.claims[deployment, number] = claim
            return self.claims[deployment, number].getsockname()[1] + 1 + slot


class Proxy(socketserver.ThreadingTCPServer):
    """A port of this machine; the address that each connection goes to is chosen then."""

    daemon_threads = allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, choose: Callable[[], str], port: int = 0):
        super().__init__(("127.0.0.1", port), socketserver.BaseRequestHandler)
        self.choose = choose
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def finish_request(self, request: Any, client_address: object) -> None:
        """Carry what one side sends to the other, its end included, until both have said all."""
        host, port = self.choose().split(":")
        with suppress(OSError), socket.create_connection((host, int(port))) as pod:
            other = {request: pod, pod: request}
            while other:
                ready: list[Any] = wait([*other])
                for source in ready:
                    if data := source.recv(65536):
                        with suppress(OSError):  # a server may answer before it has read all
                            other[source].sendall(data)
                    else:
                        other.pop(source).shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Take no more connections."""
        self.shutdown()
        self.server_close()
