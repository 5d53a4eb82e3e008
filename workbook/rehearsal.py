"""Rehearse Kubernetes manifests without a cluster: their pods, as processes of this machine.

    rehearsal = Rehearsal("ping", {"ping:001": read_image("Dockerfile")})
    rehearsal.apply(manifests)
    rehearsal.rollout_status("ping")
    rehearsal.close()

does to each Deployment's pods what a cluster would do: it runs their commands with their variables,
executes their probes, starts again what has died, scales, and rolls out changes step by step. It is
no cluster: NOT_SHOWN says what is missing. What it cannot do as a cluster does, it refuses.
"""

import base64
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from workbook import manifests
from workbook.manifests import Image, Manifest, container
from workbook.pods import LETTERS, TICK_SECONDS, Pod
from workbook.servers import is_busy, require_free_ports

ENDPOINTS_SECONDS = 0.5  # so late does a Service learn which pods are ready; in a cluster, too
PLACES = 8  # for the pods of a Deployment behind a headless Service
CLOSE_SECONDS = 10  # so long may a pod take to end when the rehearsal is over
REHEARSED = ("Deployment", "Service", "Secret", "HorizontalPodAutoscaler")
NOT_SHOWN = """\
There is no scheduler, no node, no API server and no cluster DNS.
Pods are processes of yours: they have no image, no limits and no user of their own.
Addresses, ports and paths in commands are replaced by this machine's.
An autoscaler keeps its least number of pods, and other kinds of objects have no effect."""


class Rehearsal:
    """The pods of some manifests in one namespace, until `close`; `images` are what they run."""

    def __init__(self, namespace: str = "default", images: dict[str, Image] | None = None):
        self.namespace, self.images = namespace, images or {}
        self.id, self.folder = secrets.token_hex(4), Path(tempfile.mkdtemp(prefix="rehearsal-"))
        self.objects: dict[tuple[str, str], Manifest] = {}
        self.made: dict[tuple[str, str], float] = {}
        self.revisions: dict[str, list[Manifest]] = {}
        self.all_pods: list[Pod] = []
        self.endpoints: dict[str, list[Pod]] = {}
        # A pod has a place, and each place has ports of its own, so that the name of a headless
        # Service can mean all places of its pods, whichever pods come and go.
        self.places: dict[tuple[str, int], dict[int, int]] = {}
        self.ports, self.claims = self._free_ports(), list[socket.socket]()
        self.doors: dict[object, Door] = {}
        self.lock, self.over = threading.RLock(), threading.Event()
        # It removes what is left when this program ends without having called `close`.
        self.reaper = subprocess.Popen(
            [sys.executable, "-m", "workbook.rehearsal", self.id, self.folder],
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
        for door in self.doors.values():
            door.close()
        for claim in self.claims:
            claim.close()
        assert self.reaper.stdin is not None
        self.reaper.stdin.close()
        self.reaper.wait(timeout=60)

    # --- What kubectl asks for --------------------------------------------------------------------

    def apply(self, text: str) -> None:
        """Add or change objects; a Deployment whose pod template changes is rolled out.

        Raises:
            ValueError: An object asks for something that a rehearsal cannot do.
        """
        objects = [each for each in yaml.safe_load_all(text) if each]
        for each in objects:
            if each["kind"] in ("Deployment", "Service"):
                manifests.refuse_unknown(each)
        with self.lock:
            for each in objects:
                kind, name = each["kind"], each["metadata"]["name"]
                if kind == "Deployment":
                    history, now = self.revisions.get(name, []), each["spec"]["template"]
                    self.revisions[name] = [old for old in history if old != now] + [now]
                self.objects[kind, name] = each
                self.made.setdefault((kind, name), time.monotonic())

    def change(self, deployment: str, change: Callable[[Manifest], object]) -> None:
        """Apply a Deployment again, after a function has changed what it specifies."""
        changed = json.loads(json.dumps(self.object("Deployment", deployment)))
        change(changed["spec"])
        self.apply(yaml.safe_dump(changed))

    def rollout_status(self, deployment: str, seconds: float = 120) -> None:
        """Wait until all pods of a Deployment are new and ready, and print how it goes.

        Raises:
            TimeoutError: They are not, in this time.
        """
        said, deadline = "", time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self.lock:
                wanted, revision = self.replicas(deployment), self.revision(deployment)
                pods = [pod for pod in self.pods(deployment) if not pod.ending.is_set()]
            new = [pod for pod in pods if pod.revision == revision]
            ready = sum(map(self.is_available, new))
            if ready == len(pods) == wanted:
                return print(f'deployment "{deployment}" successfully rolled out')
            how = f"{ready} of {wanted} updated replicas are available"
            if len(new) < wanted:
                how = f"{len(new)} out of {wanted} new replicas have been updated"
            elif len(pods) > len(new):
                how = f"{len(pods) - len(new)} old replicas are pending termination"
            if how != said:
                start = f'Waiting for deployment "{deployment}" rollout to finish'
                print(f"{start}: {how}...", flush=True)
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
        options = self._options(self.pod(name), [*command]) | {"stdout": subprocess.PIPE}
        return subprocess.run(**options, text=True, timeout=60)

    def forward(self, target: str, port: int | str | None = None, local_port: int = 0) -> int:
        """Forward a port of this machine to ONE pod, `pod/NAME` or the first of `service/NAME`.

        Returns:
            the port on this machine; what it was forwarded to before is forgotten.
        """
        kind, _, name = target.partition("/")
        if kind == "service":
            ready, port = self.ready_pods(name), self.target_port(name, port)
            if not ready:
                raise ValueError(f"no pod of the Service {name} is ready")
        pod = ready[0] if kind == "service" else self.pod(name)
        if local_port in self.doors:
            self.doors.pop(local_port).close()
        require_free_ports(*filter(None, [local_port]))
        door = Door(lambda: pod.address(port), local_port)
        self.doors[door.server_address[1]] = door
        return door.server_address[1]

    def expose(self, service: str, port: int | str | None = None) -> int:
        """Return a port of this machine that sends each connection to some ready pod of a Service.

        It does what kube-proxy does on every node, and learns of changes as late.
        """
        target = self.target_port(service, port)

        def choose() -> str:
            pods = self.endpoints.get(service)
            return secrets.choice(pods).address(target) if pods else "127.0.0.1:1"

        with self.lock:
            if (service, target) not in self.doors:
                self.doors[service, target] = Door(choose)
            return self.doors[service, target].server_address[1]

    # --- What there is ----------------------------------------------------------------------------

    def pods(self, deployment: str | None = None) -> list[Pod]:
        """Return the pods, of one Deployment or of all, oldest first."""
        with self.lock:
            mine = (pod for pod in self.all_pods if deployment in (None, pod.owner))
            return [pod for pod in mine if not pod.gone.is_set()]

    def pod(self, name: str) -> Pod:
        """Return a pod by its name."""
        for pod in self.pods():
            if pod.name == name:
                return pod
        raise ValueError(f'pods "{name}" not found')

    def named(self, kind: str) -> dict[str, Manifest]:
        """Return the objects of a kind, by name."""
        return {name: each for (k, name), each in self.objects.items() if k == kind}

    def object(self, kind: str, name: str) -> Manifest:
        """Return an object by its kind and name."""
        if (kind, name) not in self.objects:
            group = ".apps" if kind == "Deployment" else ""
            raise ValueError(f'{kind.lower()}s{group} "{name}" not found')
        return self.objects[kind, name]

    def replicas(self, deployment: str) -> int:
        """Return how many pods there shall be: without replicas, an autoscaler's least number."""
        least = [
            autoscaler["spec"].get("minReplicas", 1)
            for autoscaler in self.named("HorizontalPodAutoscaler").values()
            if autoscaler["spec"]["scaleTargetRef"]["name"] == deployment
        ]
        spec = self.object("Deployment", deployment)["spec"]
        return spec.get("replicas", max(least, default=1))

    def revision(self, deployment: str) -> str:
        """Return the hash of the pod template that a Deployment has now."""
        template = self.object("Deployment", deployment)["spec"]["template"]
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).digest()[:8]
        return "".join(LETTERS[byte % len(LETTERS)] for byte in digest)

    def ready_pods(self, service: str) -> list[Pod]:
        """Return the pods that a Service may send requests to."""
        pods = [pod for pod in self.pods() if pod.owner in self._templates_behind(service)]
        return [pod for pod in pods if pod.ready and not pod.ending.is_set()]

    def is_available(self, pod: Pod) -> bool:
        """Say whether a pod has been ready for its Deployment's minReadySeconds."""
        least = self.object("Deployment", pod.owner)["spec"].get("minReadySeconds", 0)
        return time.monotonic() - pod.ready_since >= least

    def target_port(self, service: str, port: int | str | None = None) -> int | str:
        """Return the port of the pods that a Service's port leads to, by default its first one."""
        for each in self.object("Service", service)["spec"]["ports"]:
            if port in (None, each["port"], each.get("name")):
                return each.get("targetPort", each["port"])
        raise ValueError(f"the Service {service} has no port {port}")

    def _templates_behind(self, service: str) -> dict[str, Manifest]:
        """Return the pod templates that a Service selects, by the names of their Deployments."""
        selector = self.object("Service", service)["spec"]["selector"].items()
        templates = {n: d["spec"]["template"] for n, d in self.named("Deployment").items()}
        return {n: t for n, t in templates.items() if selector <= t["metadata"]["labels"].items()}

    # --- The controllers --------------------------------------------------------------------------

    def _control(self) -> None:
        for number in itertools.count():
            with self.lock:
                self.all_pods = self.pods()
                for name in self.named("Deployment"):
                    self._reconcile(name)
                if number % max(1, round(ENDPOINTS_SECONDS / TICK_SECONDS)) == 0:
                    self.endpoints = {name: self.ready_pods(name) for name in self.named("Service")}
            if self.over.wait(TICK_SECONDS):
                return

    def _reconcile(self, name: str) -> None:
        """Take one step towards a Deployment's pods, within maxSurge and maxUnavailable."""
        spec = self.object("Deployment", name)["spec"]
        wanted, revision = self.replicas(name), self.revision(name)
        live = [pod for pod in self.pods(name) if not pod.ending.is_set()]
        new = [pod for pod in live if pod.revision == revision]
        old = [pod for pod in live if pod.revision != revision]
        rolling = spec.get("strategy", {}).get("rollingUpdate") or {}
        surge = manifests.absolute(rolling.get("maxSurge", "25%"), wanted, math.ceil)
        fewer = manifests.absolute(rolling.get("maxUnavailable", "25%"), wanted, math.floor)
        least = wanted - (fewer or int(not surge))
        for _ in range(min(wanted - len(new), wanted + surge - len(live))):
            taken = {pod.place for pod in self.pods(name)}
            place = next(number for number in itertools.count() if number not in taken)
            template = spec["template"]
            self.all_pods.append(Pod(name, revision, template, place, self.folder, self._launch))
        # The new ones that are too many go, the youngest first, those that are not ready before.
        surplus = sorted(new, key=lambda pod: (pod.ready, -pod.born))[: max(0, len(new) - wanted)]
        # Of the old ones those that serve nobody may go at once, the others only when not missed.
        available = sum(map(self.is_available, new))
        spare = max(0, len(live) - least - (len(new) - available))
        idle = [pod for pod in old if not pod.ready][:spare]
        serving = [pod for pod in old if pod.ready]
        unmissed = max(0, len(serving) + available - least)
        for pod in [*surplus, *idle, *serving[:unmissed]]:
            pod.ending.set()

    # --- Processes --------------------------------------------------------------------------------

    def _launch(self, pod: Pod) -> subprocess.Popen:
        """Start the manifest's command, or that of the image's Dockerfile."""
        if pod.image not in self.images:
            raise LookupError(f'Failed to pull image "{pod.image}": nobody has built it here')
        image, own = self.images[pod.image], "command" in pod.container
        words = pod.container.get("command", image.entrypoint)
        words = [*words, *pod.container.get("args", [] if own else image.command)]
        pod.ports = self._ports_at(pod.owner, pod.place)
        with pod.log.open("wb") as log:
            return subprocess.Popen(**self._options(pod, words) | {"stdout": log})

    def _options(self, pod: Pod, words: list[str]) -> dict[str, Any]:
        """Return what `subprocess` needs to run a command as in a pod's container."""
        image = self.images[pod.image]
        asked = image.environment | manifests.environment(pod.container, self._secret)
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

    def _secret(self, name: str) -> dict[str, str]:
        secret = self.object("Secret", name)
        coded = secret.get("data", {}).items()
        data = {key: base64.b64decode(text).decode() for key, text in coded}
        return data | secret.get("stringData", {})

    def _here(self, pod: Pod, words: list[str]) -> list[str]:
        """Replace the addresses, ports and paths of a cluster by those of this machine."""
        names = "|".join(self.named("Service")) or "(?!)"
        end = rf"(?:\.{self.namespace}(?:\.svc(?:\.cluster\.local)?)?)?"
        rules = {rf"(?:dns:///)?(?<![\w.-])(?P<service>{names}){end}:(?P<port>\d+)": ""}
        for inside, here in sorted(self.images[pod.image].paths.items(), reverse=True):
            rules[re.escape(inside) + r"(?![\w.-])"] = here
        rules |= {r"(?<![\d.])0\.0\.0\.0(?![\d.])": "127.0.0.1", "^python3?$": sys.executable}
        rules |= {rf"(?<![\w.]){number}(?!\w)": str(own) for number, own in pod.ports.items()}

        def replace(match: re.Match[str]) -> str:
            if match["service"]:
                return self._service_address(match["service"], int(match["port"]))
            return next(new for old, new in rules.items() if re.fullmatch(old, match[0]))

        return [re.sub("|".join(rules), replace, word) for word in words]

    def _service_address(self, name: str, port: int) -> str:
        """Return what stands for `name:port` here: all places of its pods, or a balanced port."""
        if self.object("Service", name)["spec"].get("clusterIP") != "None":
            return f"127.0.0.1:{self.expose(name, port)}"
        target, behind = self.target_port(name, port), self._templates_behind(name)
        if not behind:  # a cluster's DNS would know its pods later; a process is told once
            raise ValueError(f"Error: no Deployment makes pods for the Service {name} yet")
        return ",".join(
            f"127.0.0.1:{self._ports_at(each, n)[manifests.port_number(container(its), target)]}"
            for each, its in behind.items()
            for n in range(PLACES)
        )

    def _ports_at(self, deployment: str, place: int) -> dict[int, int]:
        """Return the ports on this machine that pods have in one of a Deployment's places."""
        with self.lock:
            if (deployment, place) not in self.places:
                its = container(self.object("Deployment", deployment)["spec"]["template"])
                own = {number: next(self.ports) for number in manifests.port_numbers(its)}
                self.places[deployment, place] = own
            return self.places[deployment, place]

    def _free_ports(self) -> Iterator[int]:
        """Yield ports that nobody listens at, from hundreds that no other rehearsal has claimed.

        They are below those that the system gives to outgoing connections, 32768 and more on Linux.
        """
        while True:
            first = 26_000 + 100 * secrets.randbelow(60)
            with suppress(OSError):
                self.claims.append(socket.create_server(("127.0.0.1", first)))
                yield from (port for port in range(first + 1, first + 100) if not is_busy(port))


class Door(socketserver.ThreadingTCPServer):
    """A port of this machine, each of whose connections goes to the address that is chosen."""

    daemon_threads = allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, choose: Callable[[], str], port: int = 0):
        super().__init__(("127.0.0.1", port), socketserver.BaseRequestHandler)
        self.choose = choose
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def finish_request(self, request: Any, client_address: object) -> None:
        """Carry what one side sends to the other, until both have said all."""
        host, port = self.choose().split(":")
        with suppress(OSError), socket.create_connection((host, int(port))) as other:
            answers = threading.Thread(target=pass_on, args=(other, request), daemon=True)
            answers.start()
            pass_on(request, other)
            answers.join()

    def close(self) -> None:
        """Take no more connections."""
        self.shutdown()
        self.server_close()


def pass_on(source: socket.socket, target: socket.socket) -> None:
    """Pass on what one side sends, its end included."""
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    sys.stdin.read()  # until the program that rehearses ends, however it does
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("REHEARSAL") == sys.argv[1]:
                process.kill()
    shutil.rmtree(sys.argv[2], ignore_errors=True)
