"""Rehearse Kubernetes manifests without a cluster: their pods, as containers or as processes.

    with Rehearsal(manifests, "docker", {"ping:001": Image("kube-config/ping")}) as pods:
        pods.rollout_status("ping")
        print(pods.get("pods"))

takes what `kubectl kustomize` prints and does to each Deployment's pods what a cluster would do:
runs their commands with their environment, user, limits and volumes, executes their probes, starts
again what has died, scales, and rolls out changes step by step. It is no cluster: `not_shown` says
what is missing. A pod has one container here.
"""

import asyncio
import base64
import hashlib
import itertools
import json
import math
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
import yaml

from workbook.kubelet import (
    LETTERS,
    TICK_SECONDS,
    Containers,
    Image,
    Manifest,
    Pod,
    Processes,
    docker,
    port_number,
)

__all__ = ["Image", "Pod", "Rehearsal"]

ENDPOINTS_SECONDS = 0.5  # so late does a Service learn which pods are ready; in a cluster, too
REHEARSED = ("Deployment", "Service", "ConfigMap", "Secret")


class Rehearsal:
    """The pods of some manifests, from `start` to `close`.

    Args:
        manifests: Kubernetes objects as YAML, as `kubectl kustomize` prints them.
        engine: `docker` runs pods as containers, `embedded` as processes.
        images: what makes each image. Docker needs none, if the images are on its engine.
    """

    def __init__(self, manifests: str, engine: str, images: dict[str, Image] | None = None):
        self.images = images or {}
        self.id = secrets.token_hex(4)
        self.engine = Containers(self) if engine == "docker" else Processes(self)
        self.network = f"rehearsal-{self.id}"
        self.objects: dict[tuple[str, str], Manifest] = {}
        self.revisions: dict[str, list[Manifest]] = {}
        self.all_pods: list[Pod] = []
        self.endpoints: dict[str, list[Pod]] = {}
        self.events: list[tuple[float, str, str, str]] = []
        self.born, self.deadline = time.monotonic(), math.inf
        self.lock, self.over = threading.RLock(), threading.Event()
        self.servers: list[asyncio.Server] = []
        self.carrying: set[asyncio.Task | None] = set()
        self._take(manifests)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> Self:
        """Start the pods; return at once."""
        self.folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
        # It removes what is left when this program ends without having called `close`.
        self.reaper = subprocess.Popen(
            [
                *(sys.executable, "-m", "workbook.rehearsal"),
                *(self.id, type(self.engine).__name__, self.folder),
            ],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        if isinstance(self.engine, Containers):
            docker("network", "create", f"--label=rehearsal={self.id}", self.network)
        self.loop = asyncio.new_event_loop()
        self.forwarding = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.controlling = threading.Thread(target=self._control, daemon=True)
        self.forwarding.start()
        self.controlling.start()
        return self

    def close(self) -> None:
        """End every pod, with SIGTERM and soon SIGKILL, and remove all that was made."""
        self.deadline = time.monotonic() + 10
        self.over.set()
        self.controlling.join()
        with self.lock:
            for pod in self.all_pods:
                pod.ending.set()
        for pod in self.all_pods:
            pod.gone.wait()
        asyncio.run_coroutine_threadsafe(self._stop_listening(), self.loop).result(timeout=60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.forwarding.join()
        self.loop.close()
        assert self.reaper.stdin is not None
        if isinstance(self.engine, Processes):
            self.engine.ports.close()
        self.reaper.stdin.close()
        self.reaper.wait(timeout=60)

    # --- What kubectl would do --------------------------------------------------------------------

    def kubectl(self, command: str) -> None:
        """Do what a kubectl command says, one of those below, and print what it would print."""
        words = shlex.split(command)
        options = dict(itertools.pairwise(words))
        seconds = float(options.get("--timeout", "120s").rstrip("s"))
        name = next((word.rpartition("/")[2] for word in words if "/" in word), "")
        try:
            match words:
                case ["get", kinds, *_]:
                    print(*map(self.get, kinds.split(",")), sep="\n\n")
                case ["describe", "pod", pod]:
                    print(self.describe(pod))
                case ["logs", pod]:
                    print(self.logs(pod), end="")
                case ["exec", pod, "--", *arguments]:
                    print(self.exec(pod, *arguments), end="")
                case ["delete", "pod", pod]:
                    self.delete_pod(pod)
                    print(f'pod "{pod}" deleted')
                case ["scale", _, "--replicas", number]:
                    self.scale(name, int(number))
                    print(f"deployment.apps/{name} scaled")
                case ["set", "image", _, change]:
                    self.set_image(name, change.partition("=")[2])
                    print(f"deployment.apps/{name} image updated")
                case ["rollout", "status", *_]:
                    self.rollout_status(name, seconds)
                case ["rollout", "undo", _]:
                    self.rollout_undo(name)
                    print(f"deployment.apps/{name} rolled back")
                case ["rollout", "restart", _]:
                    self.rollout_restart(name)
                    print(f"deployment.apps/{name} restarted")
                case _:
                    raise ValueError(f"A rehearsal does not know: kubectl {command}")
        except TimeoutError as error:
            print(f"error: {error}")

    def apply(self, manifests: str) -> None:
        """Add or change objects; a Deployment whose pod template changes is rolled out."""
        with self.lock:
            self._take(manifests)

    def scale(self, name: str, replicas: int) -> None:
        """Change the number of pods of a Deployment."""
        with self.lock:
            self.deployment(name)["spec"]["replicas"] = replicas

    def set_image(self, name: str, image: str) -> None:
        """Give the pods of a Deployment another image."""
        changed = json.loads(json.dumps(self.deployment(name)))
        changed["spec"]["template"]["spec"]["containers"][0]["image"] = image
        self.apply(yaml.safe_dump(changed))

    def rollout_restart(self, name: str) -> None:
        """Replace all pods of a Deployment by new ones."""
        changed = json.loads(json.dumps(self.deployment(name)))
        annotations = changed["spec"]["template"]["metadata"].setdefault("annotations", {})
        annotations["kubectl.kubernetes.io/restartedAt"] = str(time.time())
        self.apply(yaml.safe_dump(changed))

    def rollout_undo(self, name: str) -> None:
        """Return a Deployment to the pod template that it had before."""
        with self.lock:
            if len(self.revisions[name]) < 2:
                raise ValueError(f"No rollout history found for deployment {name!r}.")
            self.revisions[name].append(self.revisions[name].pop(-2))
            self.deployment(name)["spec"]["template"] = self.revisions[name][-1]

    def rollout_status(self, name: str, seconds: float = 120) -> None:
        """Wait until all pods of a Deployment are new and available; print how it goes.

        Raises:
            TimeoutError: they are not, in this time; the sentence has the pods' states.
        """
        said, deadline = "", time.monotonic() + seconds
        while True:
            with self.lock:
                wanted, revision = self._replicas(name), self._revision(name)
                pods = [pod for pod in self.pods(name) if not pod.ending.is_set()]
                new = [pod for pod in pods if pod.revision == revision]
                available = [pod for pod in new if self._is_available(pod)]
            if len(available) == len(pods) == wanted:
                return print(f'deployment "{name}" successfully rolled out')
            if len(new) < wanted:
                how = f"{len(new)} out of {wanted} new replicas have been updated"
            elif len(pods) > len(new):
                how = f"{len(pods) - len(new)} old replicas are pending termination"
            else:
                how = f"{len(available)} of {wanted} updated replicas are available"
            if how != said:
                print(f'Waiting for deployment "{name}" rollout to finish: {how}...', flush=True)
            said = how
            if time.monotonic() > deadline:
                waiting = [f"{pod.name} is {pod.status}" for pod in new if pod not in available]
                states = ", ".join(waiting) or how
                raise TimeoutError(f"{name} was not rolled out in {seconds:g} s: {states}.")
            time.sleep(TICK_SECONDS)

    def delete_pod(self, name: str) -> None:
        """End a pod with its grace, and wait for it; its Deployment makes another one."""
        pod = self.pod(name)
        pod.ending.set()
        pod.gone.wait()

    def kill(self, name: str) -> None:
        """End a container's first process with SIGKILL, as a crash or an empty memory would."""
        self.engine.signal(self.pod(name), signal.SIGKILL)

    def logs(self, name: str) -> str:
        """Return what a pod has printed since its container was started last."""
        return self.pod(name).log.read_text(errors="replace")

    def exec(self, name: str, *command: str) -> str:
        """Run a command inside a pod, and return what it prints."""
        return self.engine.run(self.pod(name), list(command), 60).stdout

    def port_forward(self, target: str, port: int | str | None = None, local_port: int = 0) -> int:
        """Forward a port of this machine to ONE pod, `pod/NAME` or the first of `service/NAME`.

        Returns:
            the port on this machine, which is open until the rehearsal ends.
        """
        kind, name = target.split("/")
        if kind == "service":
            ready = self._ready(name)
            if not ready:
                raise ValueError(f"No pod of the Service {name} is ready.")
            pod, port = ready[0], self._target_port(name, port)
        else:
            pod = self.pod(name)
        return self._listen(lambda: pod.address(port), local_port)

    def expose(self, service: str, port: int | str | None = None, local_port: int = 0) -> int:
        """Open a port of this machine that sends each connection to some ready pod of a Service.

        It does what kube-proxy does on every node, and learns of changes as late.
        """
        target_port = self._target_port(service, port)

        def choose() -> str | None:
            pods = self.endpoints.get(service, [])
            return secrets.choice(pods).address(target_port) if pods else None

        return self._listen(choose, local_port)

    def get(self, kind: str) -> str:
        """Return a table as of `kubectl get`: of pods, deployments, services, endpointslices."""
        with self.lock:
            rows = getattr(self, f"_{kind}_rows")()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("   ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)

    def describe(self, name: str) -> str:
        """Return what is known about a pod, its events last."""
        pod = self.pod(name)
        lines = [f"Name:      {name}", f"Image:     {pod.image}", f"State:     {pod.status}"]
        lines += [f"Last exit: {pod.last_exit}"] * bool(pod.last_exit)
        lines += [f"Ready:     {pod.ready}", f"Restarts:  {pod.restarts}", "Events:"]
        for when, what, reason, message in self.events:
            if what == f"pod/{name}":
                lines.append(f"  {self._age(self.born + when):>4} ago   {reason:<10} {message}")
        return "\n".join(lines)

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

    def not_shown(self) -> list[str]:
        """Say in sentences what this rehearsal does not show."""
        kinds = sorted({kind for kind, _ in self.objects} - set(REHEARSED) - {"Namespace"})
        missing = ["There is no scheduler, no node, no API server and no cluster DNS."]
        if kinds:
            missing.append(f"These objects have no effect: {', '.join(kinds)}.")
        if isinstance(self.engine, Containers):
            missing.append("No image is pulled: only those count that this Docker has.")
            missing.append("Docker's DNS names a pod as soon as it runs, ready or not.")
            if names := [name for name in self.named("Service") if self._translates(name)]:
                behind = f"For containers, {' and '.join(names)} means the pods' own ports"
                missing.append(f"{behind}: Docker's network does not translate a Service's ports.")
        else:
            missing.append(
                "Pods are processes of yours: no image, no limits, no user of their own."
            )
            missing.append("Addresses, ports and paths in commands are replaced by this machine's.")
        return missing

    # --- Objects ----------------------------------------------------------------------------------

    def _take(self, manifests: str) -> None:
        for manifest in filter(None, yaml.safe_load_all(manifests)):
            key = manifest["kind"], manifest["metadata"]["name"]
            if key[0] == "Deployment":
                template = manifest["spec"]["template"]
                pod = template["spec"]
                if len(pod["containers"]) != 1 or pod.get("initContainers"):
                    raise ValueError(f"{key[1]} has more than one container a pod: not rehearsed.")
                history = self.revisions.setdefault(key[1], [])
                if template in history:
                    history.remove(template)
                history.append(template)
            self.objects[key] = manifest

    def named(self, kind: str) -> dict[str, Manifest]:
        """Return the objects of a kind, by name."""
        return {name: each for (k, name), each in self.objects.items() if k == kind}

    def deployment(self, name: str) -> Manifest:
        """Return a Deployment as it is now."""
        return self.objects["Deployment", name]

    def _service(self, name: str) -> Manifest:
        if ("Service", name) not in self.objects:
            raise ValueError(f'services "{name}" not found')
        return self.objects["Service", name]

    @property
    def namespace(self) -> str:
        """The namespace of the objects, which is one."""
        spaces = {each["metadata"].get("namespace", "default") for each in self.workloads()}
        return spaces.pop() if len(spaces) == 1 else "default"

    def workloads(self) -> list[Manifest]:
        """Return the objects that are rehearsed."""
        return [each for (kind, _), each in self.objects.items() if kind in REHEARSED]

    def data(self, kind: str, name: str) -> dict[str, str]:
        """Return what a ConfigMap or a Secret holds."""
        found = self.objects.get((kind, name))
        if found is None:
            raise ValueError(f'{kind.lower()} "{name}" not found')
        coded = found.get("data") or {}
        if kind == "Secret":
            coded = {key: base64.b64decode(text).decode() for key, text in coded.items()}
        return coded | found.get("stringData", {})

    def services_of(self, labels: dict[str, str]) -> list[str]:
        """Return the names of the Services that select pods with these labels."""
        selectors = {n: s["spec"].get("selector") for n, s in self.named("Service").items()}
        return [n for n, s in selectors.items() if s and s.items() <= labels.items()]

    def deployments_behind(self, service: str) -> list[str]:
        """Return the names of the Deployments whose pods a Service selects."""
        templates = {n: d["spec"]["template"] for n, d in self.named("Deployment").items()}
        return [
            n for n, t in templates.items() if service in self.services_of(t["metadata"]["labels"])
        ]

    def _target_port(self, service: str, port: int | str | None) -> int | str:
        ports = self._service(service)["spec"]["ports"]
        for each in ports:
            if port in (None, each["port"], each.get("name")):
                return each.get("targetPort", each["port"])
        raise ValueError(f"The Service {service} has no port {port}.")

    def _replicas(self, deployment: str) -> int:
        """Return how many pods there shall be: without replicas, an autoscaler's least number."""
        least = [
            autoscaler["spec"].get("minReplicas", 1)
            for autoscaler in self.named("HorizontalPodAutoscaler").values()
            if autoscaler["spec"]["scaleTargetRef"]["name"] == deployment
        ]
        return self.deployment(deployment)["spec"].get("replicas", max(least, default=1))

    def _translates(self, service: str) -> bool:
        """Say whether a Service has a port that is another one in its pods."""
        behind = self.deployments_behind(service)
        containers = [self.deployment(n)["spec"]["template"]["spec"]["containers"] for n in behind]
        return any(
            port_number(container, port.get("targetPort", port["port"])) != port["port"]
            for port in self._service(service)["spec"]["ports"]
            for (container,) in containers
        )

    def _revision(self, deployment: str) -> str:
        template = json.dumps(self.deployment(deployment)["spec"]["template"], sort_keys=True)
        digest = hashlib.sha256(template.encode()).digest()[:8]
        return "".join(LETTERS[byte % len(LETTERS)] for byte in digest)

    def note(self, what: str, reason: str, message: str) -> None:
        """Record an event."""
        self.events.append((time.monotonic() - self.born, what, reason, message))

    # --- The controllers --------------------------------------------------------------------------

    def _control(self) -> None:
        for number in itertools.count():
            with self.lock:
                self.all_pods = [pod for pod in self.all_pods if not pod.gone.is_set()]
                for name in self.named("Deployment"):
                    self._reconcile(name)
                if number % max(1, round(ENDPOINTS_SECONDS / TICK_SECONDS)) == 0:
                    self.endpoints = {name: self._ready(name) for name in self.named("Service")}
            if self.over.wait(TICK_SECONDS):
                return

    def _ready(self, service: str) -> list[Pod]:
        self._service(service)
        return [
            pod
            for pod in self.pods()
            if pod.ready and not pod.ending.is_set() and service in self.services_of(pod.labels)
        ]

    def _is_available(self, pod: Pod) -> bool:
        least = self.deployment(pod.owner)["spec"].get("minReadySeconds", 0)
        return pod.ready and time.monotonic() - pod.ready_since >= least

    def _reconcile(self, name: str) -> None:
        """Take one step towards a Deployment's pods, within maxSurge and maxUnavailable."""
        spec = self.deployment(name)["spec"]
        wanted, revision = self._replicas(name), self._revision(name)
        live = [pod for pod in self.pods(name) if not pod.ending.is_set()]
        new = [pod for pod in live if pod.revision == revision]
        old = [pod for pod in live if pod.revision != revision]
        strategy = spec.get("strategy", {})
        if strategy.get("type") == "Recreate":
            surge, unavailable = 0, wanted
            if old or any(pod.revision != revision for pod in self.pods(name)):
                return self._end(old, name)
        else:
            rolling = strategy.get("rollingUpdate") or {}
            surge = absolute(rolling.get("maxSurge", "25%"), wanted, math.ceil)
            unavailable = absolute(rolling.get("maxUnavailable", "25%"), wanted, math.floor)
            unavailable = unavailable or int(not surge)
        for _ in range(min(wanted - len(new), wanted + surge - len(live))):
            pod = Pod(self, name, spec["template"], revision)
            self.all_pods.append(pod)
            pod.thread.start()
        # The new ones that are too many go, the youngest first, those that are not ready before.
        surplus = sorted(new, key=lambda pod: (pod.ready, -pod.born))[: max(0, len(new) - wanted)]
        self._end(surplus, name)
        # Of the old ones those that serve nobody may go at once, the others only when not missed.
        spare = len(live) - (wanted - unavailable) - sum(not self._is_available(p) for p in new)
        idle = [pod for pod in old if not self._is_available(pod)]
        self._end(idle[: max(0, spare)], name)
        serving = [pod for pod in old if self._is_available(pod)]
        available = len(serving) + sum(map(self._is_available, new))
        self._end(serving[: max(0, available - (wanted - unavailable))], name)

    def _end(self, pods: list[Pod], deployment: str) -> None:
        for pod in pods:
            self.note(f"deployment/{deployment}", "ScalingReplicaSet", f"Deleted pod {pod.name}")
            pod.ending.set()

    # --- Tables and ports -------------------------------------------------------------------------

    def _pods_rows(self) -> list[list[str]]:
        rows = [["NAME", "READY", "STATUS", "RESTARTS", "AGE"]]
        for pod in self.pods():
            ready, age = f"{int(pod.ready)}/1", self._age(pod.born)
            rows.append([pod.name, ready, pod.status, str(pod.restarts), age])
        return rows

    def _deployments_rows(self) -> list[list[str]]:
        rows = [["NAME", "READY", "UP-TO-DATE", "AVAILABLE", "AGE"]]
        for name in self.named("Deployment"):
            pods, revision = self.pods(name), self._revision(name)
            ready = f"{sum(pod.ready for pod in pods)}/{self._replicas(name)}"
            new = sum(pod.revision == revision and not pod.ending.is_set() for pod in pods)
            available = sum(map(self._is_available, pods))
            rows.append([name, ready, str(new), str(available), self._age(self.born)])
        return rows

    def _services_rows(self) -> list[list[str]]:
        rows = [["NAME", "TYPE", "PORT(S)", "SELECTOR"]]
        for name, service in self.named("Service").items():
            spec = service["spec"]
            ports = ",".join(f"{each['port']}/TCP" for each in spec["ports"])
            selector = ",".join(f"{k}={v}" for k, v in spec.get("selector", {}).items())
            rows.append([name, spec.get("type", "ClusterIP"), ports, selector])
        return rows

    def _endpointslices_rows(self) -> list[list[str]]:
        rows = [["NAME", "ENDPOINTS"]]
        for name in self.named("Service"):
            ready = [pod.name for pod in self._ready(name)]
            rows.append([name, ",".join(ready) or "<none>"])
        return rows

    @staticmethod
    def _age(since: float) -> str:
        seconds = int(time.monotonic() - since)
        return f"{seconds}s" if seconds < 120 else f"{seconds // 60}m"

    def _listen(self, choose: Callable[[], str | None], local_port: int) -> int:
        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            others: asyncio.StreamWriter | None = None
            task = asyncio.current_task()
            self.carrying.add(task)  # else nobody but itself would know of it, and it might vanish
            try:
                host, port = (choose() or "127.0.0.1:1").split(":")
                answers, others = await asyncio.open_connection(host, int(port))
                await asyncio.gather(copy(reader, others), copy(answers, writer))
            except OSError:
                writer.transport.abort()
            except asyncio.CancelledError:
                pass  # the rehearsal is over; Python 3.11 would report a cancelled task as an error
            finally:
                self.carrying.discard(task)
                for each in filter(None, (writer, others)):
                    each.close()

        listening = asyncio.start_server(carry, "127.0.0.1", local_port)
        server = asyncio.run_coroutine_threadsafe(listening, self.loop).result(timeout=10)
        self.servers.append(server)
        return server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        for server in self.servers:
            server.close()
        carrying = asyncio.all_tasks() - {asyncio.current_task()}
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)


def absolute(value: int | str, of: int, rounded: Callable[[float], int]) -> int:
    """Read maxSurge or maxUnavailable: a number, or a percentage of the replicas."""
    text = str(value)
    return rounded(of * int(text[:-1]) / 100) if text.endswith("%") else int(text)


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what one side sends, its end included."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()


def remove_leftovers(rehearsal: str, engine: str, folder: str) -> None:
    """End and remove what a rehearsal has started, if anything is left of it."""
    if engine == Containers.__name__:
        left = docker("ps", "--all", "--quiet", f"--filter=label=rehearsal={rehearsal}").split()
        if left:
            docker("rm", "--force", "--volumes", *left, must=False)
        docker("network", "rm", f"rehearsal-{rehearsal}", must=False)
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("REHEARSAL") == rehearsal:
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    sys.stdin.read()  # until the program that rehearses ends, however it does
    remove_leftovers(*sys.argv[1:])
