"""Keep a pod alive as a kubelet does: start it, probe it, start it again, end it with its grace.

The container of a pod is a process here.
"""

import http.client
import itertools
import math
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from workbook.manifests import PROBES, Manifest, container, port_number

TICK_SECONDS = 0.1
FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 10.0, 300.0
# The letters of Kubernetes' random names: no vowels, so no words.
LETTERS = "bcdfghjklmnpqrstvwxz2456789"


class Pod:
    """A pod of a Deployment: one process that is kept alive until `ending` is set.

    `launch` starts the process. It raises LookupError where there is no such image, ValueError
    where a part of its environment is missing, and OSError where it cannot be executed.
    """

    def __init__(
        self,
        owner: str,
        revision: str,
        template: Manifest,
        place: int,
        folder: Path,
        launch: Callable[["Pod"], subprocess.Popen],
    ):
        self.owner, self.revision, self.launch = owner, revision, launch
        self.name = f"{owner}-{revision}-{''.join(secrets.choice(LETTERS) for _ in range(5))}"
        self.container = container(template)
        self.image: str = self.container["image"]
        self.state, self.ready, self.restarts = "Pending", False, 0
        self.last_exit: int | None = None
        self.born, self.died = time.monotonic(), math.inf
        self.ending, self.gone = threading.Event(), threading.Event()
        self.grace = float(template["spec"].get("terminationGracePeriodSeconds", 30))
        hook = self.container.get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})
        self.pre_stop = float(hook["sleep"]["seconds"])
        self.log = folder / f"{self.name}.log"
        self.log.touch()
        self.process: subprocess.Popen | None = None
        self.place, self.ports = place, dict[int, int]()  # by its number, the one on this machine
        # By type, reason and message: when it was seen first and last, and how often.
        self.events: dict[tuple[str, str, str], tuple[float, float, int]] = {}
        threading.Thread(target=self._keep_alive, name=self.name, daemon=True).start()

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
        backoff, image_backoff = itertools.chain([0.0], backoffs()), backoffs()
        while not self.ending.is_set():
            started = time.monotonic()
            try:
                self._run_once()
            except (LookupError, ValueError) as error:
                missing = isinstance(error, LookupError)
                self.state = "ErrImagePull" if missing else "CreateContainerConfigError"
                self._note("Failed", str(error.args[0]), "Warning")
                if missing and not self.ending.wait(3):
                    self.state = "ImagePullBackOff"
                    self._note("BackOff", f'Back-off pulling image "{self.image}"')
                self.ending.wait(next(image_backoff))
                continue
            if time.monotonic() - started > 2 * LONGEST_BACKOFF_SECONDS:
                backoff = itertools.chain([0.0], backoffs())
            if not self.ending.is_set() and (pause := next(backoff)):
                self.state = "CrashLoopBackOff"
                self._note("BackOff", "Back-off restarting failed container", "Warning")
                self.ending.wait(pause)
            self.restarts += not self.ending.is_set()
        self.gone.set()

    def _run_once(self) -> None:
        """Start the process, have it probed, and stay until it has ended or the pod must end."""
        self.state = "ContainerCreating"
        try:
            self.process = process = self.launch(self)
        except OSError as error:
            self._note("Failed", f"Error: {error}", "Warning")
            self.state, self.last_exit, self.died = "RunContainerError", 128, time.monotonic()
            return
        self._note("Started", "Container started")
        self.state, started = "Running", threading.Event()
        for kind in PROBES:
            if spec := self.container.get(kind):
                arguments = (kind, spec, process, started)
                threading.Thread(target=self._probe, args=arguments, daemon=True).start()
        if "startupProbe" not in self.container:
            started.set()
        while process.poll() is None and not self.ending.wait(TICK_SECONDS / 2):
            if started.is_set() and "readinessProbe" not in self.container:
                self.ready = True
        if self.ending.is_set():
            self._stop(process)
        with suppress(ProcessLookupError, PermissionError):  # what it has left behind
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        self.last_exit, self.died = code if code >= 0 else 128 - code, time.monotonic()
        self.state, self.ready = "Error" if self.last_exit else "Completed", False

    def _stop(self, process: subprocess.Popen) -> None:
        """End the process as the kubelet does: preStop, SIGTERM, and SIGKILL after the grace."""
        self.ready, began = False, time.monotonic()
        self._note("Killing", f"Stopping container {self.container['name']}")
        if self._outlives(process, lambda: began + min(self.pre_stop, self.grace)):
            process.terminate()
            if self._outlives(process, lambda: began + self.grace):
                process.kill()

    def _outlives(self, process: subprocess.Popen, deadline: Callable[[], float]) -> bool:
        """Wait for a process to end; say whether it still runs at the deadline, which may move."""
        while process.poll() is None:
            if time.monotonic() >= deadline():
                return True
            time.sleep(TICK_SECONDS / 2)
        return False

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
        check = check_http if "httpGet" in spec else check_grpc
        action, good, bad = spec.get("httpGet") or spec["grpc"], 0, 0
        while not over():
            problem = check(action, self.address(action["port"]), spec.get("timeoutSeconds", 1))
            if over():
                return
            good, bad = (good + 1, 0) if problem is None else (0, bad + 1)
            if problem:
                name = kind[:-5].capitalize()
                self._note("Unhealthy", f"{name} probe failed: {problem}", "Warning")
            failed = bad >= spec.get("failureThreshold", 3)
            if kind == "readinessProbe":
                self.ready = (self.ready or good >= spec.get("successThreshold", 1)) and not failed
            elif kind == "startupProbe" and good:
                return started.set()
            elif failed:
                self._note("Killing", f"Container failed {kind[:-5]} probe, will be restarted")
                return self._stop(process)
            self.ending.wait(spec.get("periodSeconds", 10))


def check_http(action: Manifest, address: str, timeout: float) -> str | None:
    """Ask for a page as the kubelet does; None for 200 to 399, redirects are not followed."""
    path = action.get("path", "/")
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("GET", path, headers={"User-Agent": "kube-probe/rehearsal"})
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, ConnectionRefusedError):
            reason = f"dial tcp {address}: connect: connection refused"
        return f'Get "http://{address}{path}": {reason}'
    finally:
        connection.close()
    return None if 200 <= status < 400 else f"HTTP probe failed with statuscode: {status}"


def check_grpc(action: Manifest, address: str, timeout: float) -> str | None:
    """Ask the health service of gRPC; None if the service is SERVING."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    request = health_pb2.HealthCheckRequest(service=action.get("service") or "")
    with grpc.insecure_channel(address, options) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
        except grpc.RpcError as error:
            return f"error: {error.code().name}"
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return None if status == "SERVING" else f"service unhealthy (responded with {status!r})"


def backoffs() -> Iterator[float]:
    """Yield the seconds that the kubelet waits before it tries again: 10, 20, 40 … 300."""
    for number in itertools.count():
        yield min(FIRST_BACKOFF_SECONDS * 2**number, LONGEST_BACKOFF_SECONDS)
