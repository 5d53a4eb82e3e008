"""Keep the pods of a rehearsal alive, as containers or as processes: what a kubelet does.

A pod has one container here. Its command, environment, user, limits, volumes, probes, `preStop`
hook and grace period come from its manifest.
"""

import http.client
import itertools
import json
import math
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbook.rehearsal import Rehearsal

TICK_SECONDS = 0.1
FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 10.0, 300.0
PLACES = 8  # for the pods of a Deployment, where they are processes
# The letters of Kubernetes' random names: no vowels, so no words.
LETTERS = "bcdfghjklmnpqrstvwxz2456789"
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Image:
    """What makes an image: the words after `docker build --tag …`.

    Where pods are processes, its Dockerfile says which command they run and from which files of the
    build context its paths come; `paths` adds to these or overrides them.
    """

    build: str
    paths: dict[str, str] = field(default_factory=dict)

    def read(self) -> tuple[Path, dict[str, str], list[str], list[str]]:
        """Return the build context, paths in the image and here, ENTRYPOINT and CMD."""
        *options, context = shlex.split(self.build)
        folder = Path(context).resolve()
        named = " ".join(options)
        file = re.search(r"--file[= ](\S+)", named)
        dockerfile = Path(file[1]) if file else folder / "Dockerfile"
        last_stage = re.split(r"^FROM ", dockerfile.read_text(), flags=re.MULTILINE)[-1]
        entrypoint: list[str] = []
        command: list[str] = []
        paths: dict[str, str] = {}
        for line in last_stage.replace("\\\n", " ").splitlines():
            match line.split(maxsplit=1):
                case ["ENTRYPOINT", words]:
                    entrypoint = json.loads(words)
                case ["CMD", words]:
                    command = json.loads(words)
                case ["COPY", words]:
                    *sources, target = [w for w in words.split() if not w.startswith("--")]
                    for source in sources if target.startswith("/") else []:
                        inside = target + Path(source).name if target.endswith("/") else target
                        paths[inside] = str(folder / source.removeprefix("/context/"))
        paths |= {inside: str(Path(here).resolve()) for inside, here in self.paths.items()}
        return folder, paths, entrypoint, command


class Pod:
    """A pod: one container or process that is kept alive until the pod is deleted.

    Attributes:
        ready: whether its Services send it requests.
        restarts: how often its container was started again.
    """

    def __init__(self, cluster: "Rehearsal", owner: str, template: Manifest, revision: str):
        self.cluster, self.owner, self.template, self.revision = cluster, owner, template, revision
        self.name = f"{owner}-{revision}-{''.join(secrets.choice(LETTERS) for _ in range(5))}"
        (self.container,) = template["spec"]["containers"]
        self.image: str = self.container["image"]
        self.labels: dict[str, str] = template["metadata"].get("labels", {})
        self.state, self.ready, self.restarts, self.last_exit = "Pending", False, 0, ""
        self.born, self.ready_since = time.monotonic(), math.inf
        self.ending, self.gone = threading.Event(), threading.Event()
        self.grace = float(template["spec"].get("terminationGracePeriodSeconds", 30))
        self.pre_stop = self.container.get("lifecycle", {}).get("preStop")
        self.log = cluster.folder / f"{self.name}.log"
        self.process: subprocess.Popen | None = None
        self.ports: dict[int, int] = {}
        self.slot = -1
        self.thread = threading.Thread(target=self._live, name=self.name, daemon=True)

    # --- What others ask --------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """What `kubectl get pods` would show, such as Running or CrashLoopBackOff."""
        return "Terminating" if self.ending.is_set() else self.state

    def address(self, port: int | str | None = None) -> str:
        """Return `host:port` on this machine of a port of the pod, by default of its first one."""
        return f"127.0.0.1:{self.ports[self.number(port)]}"

    def number(self, port: int | str | None = None) -> int:
        """Return the number of a container port that is given by its name or number."""
        return port_number(self.container, port)

    def note(self, reason: str, message: str) -> None:
        """Record an event of this pod."""
        self.cluster.note(f"pod/{self.name}", reason, message)

    # --- Its life ---------------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            self._keep_alive()
        finally:
            self.gone.set()

    def _keep_alive(self) -> None:
        backoff = itertools.chain([0.0], backoffs())
        image_backoff = backoffs()
        while not self.ending.is_set():
            if obstacle := self.cluster.engine.obstacle(self):
                self.state = obstacle[0]
                self.note("Failed", obstacle[1])
                self.ending.wait(3)
                if self.state == "ErrImagePull":
                    self.state = "ImagePullBackOff"
                self.ending.wait(next(image_backoff))
                continue
            started = time.monotonic()
            self._run_once()
            self.ready, self.ready_since = False, math.inf
            if self.ending.is_set():
                break
            if time.monotonic() - started > 2 * LONGEST_BACKOFF_SECONDS:
                backoff = itertools.chain([0.0], backoffs())
            if pause := next(backoff):
                self.state = "CrashLoopBackOff"
                self.note("BackOff", "Back-off restarting failed container")
                self.ending.wait(pause)
            self.restarts += not self.ending.is_set()

    def _run_once(self) -> None:
        """Start the container, have it probed, and stay until it has ended or the pod must end."""
        self.state = "ContainerCreating"
        try:
            self.process = self.cluster.engine.start(self)
        except (OSError, ValueError) as error:
            self.state = "RunContainerError"
            self.last_exit = str(error)
            self.note("Failed", str(error))
            return
        self.note("Started", f"Started container {self.container['name']}")
        self.state = "Running"
        started = threading.Event()
        probes = []
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            if spec := self.container.get(kind):
                arguments = (kind, spec, self.process, started)
                probes.append(threading.Thread(target=self._probe, args=arguments, daemon=True))
        if "startupProbe" not in self.container:
            started.set()
        for thread in probes:
            thread.start()
        while self.process.poll() is None and not self.ending.wait(TICK_SECONDS / 2):
            if started.is_set() and "readinessProbe" not in self.container:
                self._set_ready(True)
        self.ready = False
        if self.ending.is_set():
            self._stop(self.process)
        self.last_exit = self.cluster.engine.finish(self)
        if not self.ending.is_set():
            self.state = "OOMKilled" if "OOMKilled" in self.last_exit else "Error"
            self.note("Died", self.last_exit)

    def _stop(self, process: subprocess.Popen) -> None:
        """End the container as the kubelet does: preStop, SIGTERM, and SIGKILL after the grace."""
        deadline = time.monotonic() + self.grace
        self.note("Killing", f"Stopping container {self.container['name']}")
        if self.pre_stop and process.poll() is None:
            if "sleep" in self.pre_stop:
                self._wait_for_end(process, min(self.pre_stop["sleep"]["seconds"], self.grace))
            elif problem := self._check(self.pre_stop, self.grace):
                self.note("FailedPreStopHook", problem)
        self.cluster.engine.signal(self, signal.SIGTERM)
        if not self._wait_for_end(process, deadline - time.monotonic()):
            self.note("Killing", f"It ignored SIGTERM for {self.grace:g} s: SIGKILL")
            self.cluster.engine.signal(self, signal.SIGKILL)
            process.wait(timeout=60)

    def _wait_for_end(self, process: subprocess.Popen, seconds: float) -> bool:
        """Wait for a process to end, for so long at most; less when the rehearsal is over."""
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < min(deadline, self.cluster.deadline):
            time.sleep(TICK_SECONDS / 2)
        return process.poll() is not None

    # --- Its probes -------------------------------------------------------------------------------

    def _probe(
        self, kind: str, spec: Manifest, process: subprocess.Popen, started: threading.Event
    ) -> None:
        """Execute a probe with its period and thresholds, for as long as this process lives."""

        def over() -> bool:
            return process.poll() is not None or self.ending.is_set()

        while kind != "startupProbe" and not started.wait(TICK_SECONDS):
            if over():
                return
        self.ending.wait(spec.get("initialDelaySeconds", 0))
        good = bad = 0
        while not over():
            problem = self._check(spec, spec.get("timeoutSeconds", 1))
            if over():
                return
            good, bad = (good + 1, 0) if problem is None else (0, bad + 1)
            if problem:
                self.note("Unhealthy", f"{kind[:-5].capitalize()} probe failed: {problem}")
            failed = bad >= spec.get("failureThreshold", 3)
            if kind == "readinessProbe":
                if good >= spec.get("successThreshold", 1):
                    self._set_ready(True)
                elif failed:
                    self._set_ready(False)
            elif kind == "startupProbe" and good:
                started.set()
                return
            elif failed:
                self.note("Killing", f"Container failed its {kind[:-5]} probe, will be restarted")
                self.ready = False
                self.cluster.engine.signal(self, signal.SIGTERM)
                if not self._wait_for_end(process, self.grace):
                    self.cluster.engine.signal(self, signal.SIGKILL)
                return
            self.ending.wait(spec.get("periodSeconds", 10))

    def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready = ready
            self.ready_since = time.monotonic() if ready else math.inf

    def _check(self, spec: Manifest, timeout: float) -> str | None:
        """Execute the action of a probe or of a hook; None when it succeeds, else what failed."""
        try:
            if "httpGet" in spec:
                return check_http(spec["httpGet"], self.address(spec["httpGet"]["port"]), timeout)
            if "grpc" in spec:
                return check_grpc(spec["grpc"], self.address(spec["grpc"]["port"]), timeout)
            if "tcpSocket" in spec:
                return check_tcp(self.address(spec["tcpSocket"]["port"]), timeout)
            done = self.cluster.engine.run(self, spec["exec"]["command"], timeout)
            return None if done.returncode == 0 else (done.stdout.strip() or "it failed")
        except subprocess.TimeoutExpired:
            return f"no answer within {timeout:g} s"
        except KeyError as error:
            return f"port {error} is not open"


def check_http(action: Manifest, address: str, timeout: float) -> str | None:
    """Ask for a page as the kubelet does: 200 to 399 is a success, redirects are not followed."""
    headers = {"User-Agent": "kube-probe/rehearsal"}
    headers |= {each["name"]: each["value"] for each in action.get("httpHeaders", [])}
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("GET", action.get("path", "/"), headers=headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "strerror", None) or error or "no answer")
    finally:
        connection.close()
    return None if 200 <= status < 400 else f"HTTP probe failed with statuscode: {status}"


def check_grpc(action: Manifest, address: str, timeout: float) -> str | None:
    """Ask the health service of gRPC."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    request = health_pb2.HealthCheckRequest(service=action.get("service") or "")
    with grpc.insecure_channel(address, options) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
        except grpc.RpcError as error:
            return f"{error.code().name}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"service is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def check_tcp(address: str, timeout: float) -> str | None:
    """Connect. Docker takes connections for a port that nobody listens on, and closes them."""
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout) as connection:
            connection.settimeout(min(timeout, 0.3))
            with suppress(TimeoutError):
                return None if connection.recv(1) else "connection closed"
    except OSError as error:
        return str(error.strerror or error)
    return None


class Containers:
    """Pods as Docker containers, as confined as their manifests say, on a network of their own."""

    def __init__(self, cluster: "Rehearsal"):
        self.cluster = cluster

    def obstacle(self, pod: Pod) -> tuple[str, str] | None:
        """Say what keeps a pod's image from being started, as a state and a sentence."""
        found = docker("image", "inspect", "--format={{json .Config.User}}", pod.image, must=False)
        if not found:
            return "ErrImagePull", not_found(pod.image)
        context = security(pod)
        user = str(context.get("runAsUser", json.loads(found).split(":")[0]))
        if not context.get("runAsNonRoot") or (user.isdigit() and user != "0"):
            return None
        why = "will run as root" if user in ("", "0") else f"has non-numeric user ({user})"
        sentence = f"container has runAsNonRoot and image {why}"
        return "CreateContainerConfigError", sentence

    def start(self, pod: Pod) -> subprocess.Popen:
        """Run the container; raise ValueError with Docker's sentence when it cannot be run."""
        entrypoint, arguments = pod.container.get("command", []), pod.container.get("args", [])
        env = environment(pod)
        words = [expand(word, env) for word in [*entrypoint[1:], *arguments]]
        with pod.log.open("wb") as log:
            process = subprocess.Popen(
                [
                    *("docker", "run", "--pull=never", f"--name=rehearsal-{pod.name}"),
                    *(f"--label=rehearsal={self.cluster.id}", f"--hostname={pod.name}"),
                    *(f"--network={self.cluster.network}", *self._aliases(pod)),
                    *confinement(pod),
                    *(f"--publish=127.0.0.1::{number}" for number in port_numbers(pod.container)),
                    *(f"--env={name}={value}" for name, value in env.items()),
                    *([f"--entrypoint={expand(entrypoint[0], env)}"] if entrypoint else []),
                    *(pod.image, *words),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        form = "{{if .State.Running}}{{json .NetworkSettings.Ports}}{{end}}"
        while process.poll() is None:
            if found := docker("inspect", f"--format={form}", f"rehearsal-{pod.name}", must=False):
                published = {int(k.split("/")[0]): v for k, v in json.loads(found).items() if v}
                pod.ports = {number: int(v[0]["HostPort"]) for number, v in published.items()}
                return process
            time.sleep(TICK_SECONDS / 2)
        if process.returncode in (125, 126, 127):
            said = pod.log.read_text(errors="replace").removeprefix("docker: ").splitlines()
            self.finish(pod)
            raise ValueError(said[0].rstrip(".") if said else "it cannot be started")
        return process

    def _aliases(self, pod: Pod) -> list[str]:
        names, space = self.cluster.services_of(pod.labels), self.cluster.namespace
        ends = ["", f".{space}", f".{space}.svc", f".{space}.svc.cluster.local"]
        return [f"--network-alias={name}{end}" for name in names for end in ends]

    def finish(self, pod: Pod) -> str:
        """Remove a container that has ended, and say how it ended."""
        name, form = f"rehearsal-{pod.name}", "{{.State.OOMKilled}} {{.State.ExitCode}}"
        killed, _, code = docker("inspect", f"--format={form}", name, must=False).partition(" ")
        docker("rm", "--force", "--volumes", name, must=False)
        return f"{'OOMKilled, ' if killed == 'true' else ''}exit code {code}"

    def signal(self, pod: Pod, number: signal.Signals) -> None:
        """Send a signal to a container's first process."""
        docker("kill", f"--signal={number.name}", f"rehearsal-{pod.name}", must=False)

    def run(self, pod: Pod, command: list[str], seconds: float) -> subprocess.CompletedProcess:
        """Run a command in a container."""
        words = ["docker", "exec", f"rehearsal-{pod.name}", *command]
        return run_quietly(words, seconds)


class Processes:
    """Pods as processes of this machine: their commands, with its addresses, ports and paths."""

    def __init__(self, cluster: "Rehearsal"):
        self.cluster = cluster
        # Each place for a pod has ports of its own, so that the places of a headless Service can be
        # listed where its name stands, whichever pods come and go.
        self.places: dict[str, list[dict[int, int]]] = {}
        self.taken: dict[str, dict[int, Pod]] = {}
        self.exposed: dict[tuple[str, int], int] = {}
        self.lock, self.ports = threading.RLock(), Ports()

    def obstacle(self, pod: Pod) -> tuple[str, str] | None:
        """Say when nothing here makes a pod's image, as a state and a sentence."""
        return None if pod.image in self.cluster.images else ("ErrImagePull", not_found(pod.image))

    def start(self, pod: Pod) -> subprocess.Popen:
        """Start the manifest's command, or that of the image's Dockerfile."""
        folder, _, entrypoint, command = self.cluster.images[pod.image].read()
        entrypoint = pod.container.get("command", entrypoint)
        command = pod.container.get("args", [] if "command" in pod.container else command)
        pod.ports = self._place(pod)
        with pod.log.open("wb") as log:
            return subprocess.Popen(
                self._here(pod, [*entrypoint, *command]),
                cwd=folder,
                env=self._environment(pod),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def finish(self, pod: Pod) -> str:
        """End what a process has left behind, and say how it ended."""
        assert pod.process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pod.process.pid, signal.SIGKILL)
        code = pod.process.returncode
        return f"exit code {code if code >= 0 else 128 - code}"

    def signal(self, pod: Pod, number: signal.Signals) -> None:
        """Send a signal to a pod's process."""
        if pod.process:
            pod.process.send_signal(number)

    def run(self, pod: Pod, command: list[str], seconds: float) -> subprocess.CompletedProcess:
        """Run a command with a pod's environment and folder."""
        folder, *_ = self.cluster.images[pod.image].read()
        return run_quietly(
            self._here(pod, command), seconds, cwd=folder, env=self._environment(pod)
        )

    def _place(self, pod: Pod) -> dict[int, int]:
        """Return the ports of this pod's place, which it keeps until it is gone."""
        with self.lock:
            places = self._places(pod.owner)
            taken = self.taken.setdefault(pod.owner, {})
            for number, holder in list(taken.items()):
                if holder is pod:
                    return places[number]
                if holder.gone.is_set():
                    del taken[number]
            free = next(number for number in itertools.count() if number not in taken)
            taken[free] = pod
            while free >= len(places):
                places.append(self._new_place(pod.container))
            return places[free]

    def _places(self, deployment: str) -> list[dict[int, int]]:
        with self.lock:
            if deployment not in self.places:
                template = self.cluster.deployment(deployment)["spec"]["template"]
                (container,) = template["spec"]["containers"]
                self.places[deployment] = [self._new_place(container) for _ in range(PLACES)]
            return self.places[deployment]

    def _new_place(self, container: Manifest) -> dict[int, int]:
        return {number: self.ports.take() for number in port_numbers(container)}

    def _environment(self, pod: Pod) -> dict[str, str]:
        env = environment(pod)
        here = dict(zip(env, self._here(pod, list(env.values())), strict=True))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "PYTHONUNBUFFERED": "1", "REHEARSAL": self.cluster.id}
        return {**os.environ, **own, **here}

    def _here(self, pod: Pod, words: list[str]) -> list[str]:
        """Replace the addresses, ports and paths of a cluster by those of this machine."""
        rules: list[tuple[str, Callable[[str], str]]] = []
        end = rf"(?:\.{self.cluster.namespace}(?:\.svc(?:\.cluster\.local)?)?)?"
        for name in self.cluster.named("Service"):
            pattern = rf"(?:dns:///)?(?<![\w.-]){name}{end}:\d+"
            rules.append((pattern, partial(self._service_address, name)))
        _, paths, *_ = self.cluster.images[pod.image].read()
        for inside, here in sorted((paths | config_files(pod)).items(), reverse=True):
            rules.append((re.escape(inside) + r"(?![\w.-])", partial(take, here)))
        rules.append((r"(?<![\d.])0\.0\.0\.0(?![\d.])", partial(take, "127.0.0.1")))
        for number, own in pod.ports.items():
            rules.append((rf"(?<![\w.]){number}(?!\w)", partial(take, str(own))))
        rules.append((r"^python3?$", partial(take, sys.executable)))
        either = re.compile("|".join(f"({pattern})" for pattern, _ in rules))
        return [either.sub(lambda m: rules[(m.lastindex or 0) - 1][1](m[0]), w) for w in words]

    def _service_address(self, name: str, address: str) -> str:
        """Return what stands for `name:port` here: all places of its pods, or a balanced port."""
        port = int(address.rsplit(":", 1)[1])
        if self.cluster.named("Service")[name]["spec"].get("clusterIP") == "None":
            behind = self.cluster.deployments_behind(name)
            if not behind:  # a cluster's DNS would know its pods later; a process is told once
                raise ValueError(f"No Deployment makes pods for the Service {name} yet.")
            places = [place.get(port) for each in behind for place in self._places(each)]
            if None in places:
                raise ValueError(f"The pods of the Service {name} have no port {port}.")
            return ",".join(f"127.0.0.1:{each}" for each in places)
        with self.lock:
            if (name, port) not in self.exposed:
                self.exposed[name, port] = self.cluster.expose(name, port)
            return f"127.0.0.1:{self.exposed[name, port]}"


# --- What manifests say ---------------------------------------------------------------------------


def port_number(container: Manifest, port: int | str | None = None) -> int:
    """Return the number of a port that is given by its name or number; of the first, if not."""
    declared = container.get("ports", [])
    if port is None:
        return declared[0]["containerPort"]
    if isinstance(port, int) or port.isdigit():
        return int(port)
    for each in declared:
        if each.get("name") == port:
            return each["containerPort"]
    raise ValueError(f"{container['name']} has no port named {port}.")


def port_numbers(container: Manifest) -> list[int]:
    """Return the numbers of the ports that a container declares or that its probes ask."""
    numbers = [each["containerPort"] for each in container.get("ports", [])]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        for action in container.get(kind, {}).values():
            if isinstance(action, dict) and "port" in action:
                numbers.append(port_number(container, action["port"]))
    return list(dict.fromkeys(numbers))


def environment(pod: Pod) -> dict[str, str]:
    """Return the environment that a pod's manifest asks for."""
    cluster = pod.cluster
    env: dict[str, str] = {}
    for source in pod.container.get("envFrom", []):
        for key in ("configMapRef", "secretRef"):
            if key in source:
                env |= cluster.data("ConfigMap" if key[0] == "c" else "Secret", source[key]["name"])
    for each in pod.container.get("env", []):
        source = each.get("valueFrom", {})
        if "fieldRef" in source:
            known = {"metadata.name": pod.name, "metadata.namespace": cluster.namespace}
            env[each["name"]] = known[source["fieldRef"]["fieldPath"]]
        elif "resourceFieldRef" in source:
            what, name = source["resourceFieldRef"]["resource"].split(".")
            amount = quantity(pod.container["resources"][what][name])
            env[each["name"]] = str(math.ceil(amount))
        elif reference := source.get("configMapKeyRef") or source.get("secretKeyRef"):
            kind = "ConfigMap" if "configMapKeyRef" in source else "Secret"
            if ("optional", True) not in reference.items() or (kind, reference["name"]) in (
                cluster.objects
            ):
                env[each["name"]] = cluster.data(kind, reference["name"])[reference["key"]]
        else:
            env[each["name"]] = expand(each.get("value") or "", env)
    return env


def expand(text: str, env: dict[str, str]) -> str:
    """Replace `$(NAME)` by the variable of this name, where there is one."""
    return re.sub(r"\$\(([\w.-]+)\)", lambda match: env.get(match[1], match[0]), text)


def security(pod: Pod) -> Manifest:
    """Return the security context of a pod's container."""
    whole = pod.template["spec"].get("securityContext") or {}
    return whole | (pod.container.get("securityContext") or {})


def confinement(pod: Pod) -> list[str]:
    """Return docker's options for a pod's user, rights, limits and volumes."""
    context, options = security(pod), []
    if "runAsUser" in context:
        group = context.get("runAsGroup", context["runAsUser"])
        options.append(f"--user={context['runAsUser']}:{group}")
    if context.get("readOnlyRootFilesystem"):
        options.append("--read-only")
    if context.get("allowPrivilegeEscalation") is False:
        options.append("--security-opt=no-new-privileges")
    capabilities = context.get("capabilities") or {}
    for change in ("drop", "add"):
        options += [f"--cap-{change}={each}" for each in capabilities.get(change, [])]
    limits = pod.container.get("resources", {}).get("limits", {})
    if "memory" in limits:
        memory = int(quantity(limits["memory"]))
        options += [f"--memory={memory}", f"--memory-swap={memory}"]
    if "cpu" in limits:
        options.append(f"--cpus={quantity(limits['cpu']):g}")
    for volume, mount in mounts(pod):
        if "emptyDir" in volume:
            limit = (volume["emptyDir"] or {}).get("sizeLimit")
            size = f",size={int(quantity(limit))}" if limit else ""
            options.append(f"--tmpfs={mount['mountPath']}:rw,exec,mode=1777{size}")
    written = config_files(pod).items()
    return options + [f"--volume={here}:{inside}:ro" for inside, here in written]


def mounts(pod: Pod) -> list[tuple[Manifest, Manifest]]:
    """Return each volume of a pod with the way it is mounted."""
    volumes = {each["name"]: each for each in pod.template["spec"].get("volumes", [])}
    return [(volumes[m["name"]], m) for m in pod.container.get("volumeMounts", [])]


def config_files(pod: Pod) -> dict[str, str]:
    """Write the ConfigMaps and Secrets that are volumes to files; return their paths by mount."""
    written = {}
    for volume, mount in mounts(pod):
        kind = "ConfigMap" if "configMap" in volume else "Secret"
        named = volume.get("configMap", {}).get("name") or volume.get("secret", {}).get(
            "secretName"
        )
        if not named:
            continue
        folder = pod.cluster.folder / pod.name / mount["name"]
        folder.mkdir(parents=True, exist_ok=True)
        for key, text in pod.cluster.data(kind, named).items():
            (folder / key).write_text(text)
        sub_path = mount.get("subPath")
        written[mount["mountPath"]] = str(folder / sub_path if sub_path else folder)
    return written


def quantity(text: str | float) -> float:
    """Read a quantity such as 250m, 1.5 or 64Mi."""
    match = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text))
    if not match or match[2] not in UNITS:
        raise ValueError(f"{text} is no quantity that a rehearsal understands.")
    return float(match[1]) * UNITS[match[2]]


def backoffs() -> Iterator[float]:
    """Yield the seconds that the kubelet waits before it tries again: 10, 20, 40 … 300."""
    pauses = itertools.accumulate(
        itertools.repeat(2), lambda pause, two: pause * two, initial=FIRST_BACKOFF_SECONDS
    )
    return (min(pause, LONGEST_BACKOFF_SECONDS) for pause in pauses)


def take(new: str, old: str) -> str:
    """Return what replaces an old text: the new one."""
    return new


def not_found(image: str) -> str:
    """Say that nobody has an image."""
    return f'Failed to pull image "{image}": not found, nobody has built it here'


# --- Programs -------------------------------------------------------------------------------------


def docker(*arguments: str, must: bool = True) -> str:
    """Run a docker command and return its output; nothing when it fails and need not succeed."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    if must and done.returncode:
        raise RuntimeError(f"docker {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip() if done.returncode == 0 else ""


def run_quietly(
    command: list[str], seconds: float, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command, its errors among its output, for so many seconds at most."""
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=seconds,
        **options,
    )


class Ports:
    """Ports of this machine that no other rehearsal takes: hundreds, each claimed by its first."""

    def __init__(self) -> None:
        self.claims: list[socket.socket] = []
        self.left: Iterator[int] = iter(())

    def take(self) -> int:
        """Return a port that nobody listens at."""
        while True:
            for port in self.left:
                with suppress(OSError), socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
                    return port
            # Below those that the system gives to outgoing connections, 32768 and more on Linux.
            first = 26_000 + 100 * secrets.randbelow(60)
            claim = socket.socket()
            try:
                claim.bind(("127.0.0.1", first))
            except OSError:
                claim.close()
            else:
                self.claims.append(claim)
                self.left = iter(range(first + 1, first + 100))

    def close(self) -> None:
        """Leave the ports to others."""
        for claim in self.claims:
            claim.close()
