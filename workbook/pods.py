"""Keep a pod alive as a kubelet does: start it, probe it, start it again, end it with its grace.

The container of a pod is a process here.
"""

import hashlib
import http.client
import json
import math
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from workbook.manifests import PROBES, Manifest, container, port_number

TICK_SECONDS = 0.1
FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 10.0, 300.0
# The letters of Kubernetes' random names: no vowels, so no words.
LETTERS = "bcdfghjklmnpqrstvwxz2456789"
# What `get pods` shows when a pod cannot be started, by what its `launch` raises.
OBSTACLES = {
    LookupError: "ErrImagePull",
    ValueError: "CreateContainerConfigError",
    OSError: "RunContainerError",
}
Launch = Callable[["Pod"], subprocess.Popen]


class Pod:
    """A pod of a Deployment: one process that is kept alive until `ending` is set.

    `launch` starts the process. It raises LookupError where there is no such image, ValueError
    where a part of its environment is missing, and OSError where it cannot be executed.
    """

    def __init__(self, owner: str, template: Manifest, slot: int, folder: Path, launch: Launch):
        self.owner, self.slot, self.launch = owner, slot, launch
        self.revision = revision_of(template)
        letters = "".join(secrets.choice(LETTERS) for _ in range(5))
        self.name = f"{owner}-{self.revision}-{letters}"
        self.container = container(template)
        self.image: str = self.container["image"]
        self.state, self.restarts, self.ready_since = "Pending", 0, math.inf
        self.last_exit: int | None = None
        self.born, self.died = time.monotonic(), math.inf
        self.ending, self.gone = threading.Event(), threading.Event()
        self.grace = float(template["spec"].get("terminationGracePeriodSeconds", 30))
        hook = self.container.get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})
        self.pre_stop = float(hook["sleep"]["seconds"])
        self.ports = dict[int, int]()  # this machine's, by those of the container
        self.log = folder / f"{self.name}.log"
        self.log.touch()
        self.process: subprocess.Popen | None = None
        # By type, reason and message: when it was seen first and last, and how often.
        self.events: dict[tuple[str, str, str], tuple[float, float, int]] = {}
        threading.Thread(target=self._keep_alive, name=self.name, daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether a Service may send it requests."""
        return self.ready_since < math.inf

    @ready.setter
    def ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready_since = time.monotonic() if ready else math.inf

    @property
    def status(self) -> str:
        """What `kubectl get pods` shows, such as Running or CrashLoopBackOff."""
        return "Terminating" if self.ending.is_set() else self.state

    def address(self, port: int | str | None = None) -> str:
        """Return `host:port` on this machine of a port of the pod, by default of its first one."""
        return f"127.0.0.1:{self.ports[port_number(self.container, port)]}"

    def _note(self, reason: str, message: str, kind: str = "Normal") -> None:
        now = time.monotonic()
        first, _, count = self.events.get((kind, reason, message), (now, now, 0))
        self.events[kind, reason, message] = first, now, count + 1

    # --- Its life ---------------------------------------------------------------------------------

    def _keep_alive(self) -> None:
        crashes = failures = 0
        while not self.ending.is_set():
            started = time.monotonic()
            try:
                self._run_once()
            except tuple(OBSTACLES) as error:
                self.state = next(OBSTACLES[kind] for kind in OBSTACLES if isinstance(error, kind))
                self._note("Failed", str(error), "Warning")
                if self.state == "ErrImagePull" and not self.ending.wait(3):
                    self.state = "ImagePullBackOff"
                    self._note("BackOff", f'Back-off pulling image "{self.image}"')
                self.ending.wait(backoff(failures))
                failures += 1
                continue
            if time.monotonic() - started > 2 * LONGEST_BACKOFF_SECONDS:
                crashes = 0
            if crashes and not self.ending.is_set():
                self.state = "CrashLoopBackOff"
                self._note("BackOff", "Back-off restarting failed container", "Warning")
                self.ending.wait(backoff(crashes - 1))
            crashes += 1
            self.restarts += not self.ending.is_set()
        self.gone.set()

    def _run_once(self) -> None:
        """Start the process, have it probed, and stay until it has ended or the pod must end."""
        self.state = "ContainerCreating"
        self.process = process = self.launch(self)
        self._note("Started", "Container started")
        self.state, started = "Running", threading.Event()
        if "startupProbe" not in self.container:
            started.set()
        for kind in self.container.keys() & PROBES:
            threading.Thread(target=self._probe, args=(kind, process, started), daemon=True).start()
        while process.poll() is None and not self.ending.wait(TICK_SECONDS / 2):
            if started.is_set() and "readinessProbe" not in self.container:
                self.ready = True
        if self.ending.is_set():
            self._stop(process, self.grace)
        with suppress(ProcessLookupError, PermissionError):  # what it has left behind
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        self.last_exit, self.died = code if code >= 0 else 128 - code, time.monotonic()
        self.state, self.ready = "Error" if self.last_exit else "Completed", False

    def _stop(self, process: subprocess.Popen, grace: float) -> None:
        """End the process as the kubelet does: preStop, SIGTERM, and SIGKILL after the grace."""
        self.ready, began, told = False, time.monotonic(), False
        self._note("Killing", f"Stopping container {self.container['name']}")
        while process.poll() is None:
            seconds = time.monotonic() - began
            if seconds >= grace:
                process.kill()
            elif seconds >= self.pre_stop and not told:
                process.terminate()
                told = True
            time.sleep(TICK_SECONDS / 2)

    # --- Its probes -------------------------------------------------------------------------------

    def _probe(self, kind: str, process: subprocess.Popen, started: threading.Event) -> None:
        """Execute a probe with its period and thresholds, for as long as this process lives."""
        spec, failures = self.container[kind], 0
        way = next(way for way in CHECKS if way in spec)
        check, action = CHECKS[way], spec[way]

        def over() -> bool:
            return process.poll() is not None or self.ending.is_set()

        while kind != "startupProbe" and not started.wait(TICK_SECONDS):
            if over():
                return
        while not over():
            problem = check(action, self.address(action["port"]), spec.get("timeoutSeconds", 1))
            if over():
                return
            failures = failures + 1 if problem else 0
            if problem:
                self._note("Unhealthy", f"{kind[:-5].title()} probe failed: {problem}", "Warning")
            failed = failures >= spec.get("failureThreshold", 3)
            if kind == "readinessProbe":
                self.ready = (self.ready or not problem) and not failed
            elif kind == "startupProbe" and not problem:
                return started.set()
            elif failed:
                self._note("Killing", f"Container failed {kind[:-5]} probe, will be restarted")
                return self._stop(process, spec.get("terminationGracePeriodSeconds", self.grace))
            self.ending.wait(spec.get("periodSeconds", 10))


def check_http(action: Manifest, address: str, timeout: float) -> str | None:
    """Ask for a page as the kubelet does; None for 200 to 399, redirects are not followed."""
    path = action.get("path", "/")
    with closing(http.client.HTTPConnection(address, timeout=timeout)) as connection:
        try:
            connection.request("GET", path, headers={"User-Agent": "kube-probe/rehearsal"})
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or error
            if isinstance(error, ConnectionRefusedError):
                reason = f"dial tcp {address}: connect: connection refused"
            return f'Get "http://{address}{path}": {reason}'
    return None if 200 <= status < 400 else f"HTTP probe failed with statuscode: {status}"


def check_grpc(_: Manifest, address: str, timeout: float) -> str | None:
    """Ask the health service of gRPC; None if it is SERVING."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options) as channel:
        try:
            stub, request = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest()
            status = stub.Check(request, timeout=timeout).status
        except grpc.RpcError as error:
            return f"error: {error.code().name}"
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    return None if name == "SERVING" else f"service unhealthy (responded with {name!r})"


def check_tcp(_: Manifest, address: str, timeout: float) -> str | None:
    """Open a connection, and close it; None if somebody listens."""
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout).close()
    except OSError as error:
        return f"dial tcp {address}: connect: {(error.strerror or str(error)).lower()}"
    return None


CHECKS = {"httpGet": check_http, "grpc": check_grpc, "tcpSocket": check_tcp}


def backoff(failures: int) -> float:
    """Return the seconds that the kubelet waits before it tries again: 10, 20, 40 … 300."""
    return min(FIRST_BACKOFF_SECONDS * 2**failures, LONGEST_BACKOFF_SECONDS)


def revision_of(template: Manifest) -> str:
    """Return the hash of a pod template, which is part of its pods' names."""
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]
