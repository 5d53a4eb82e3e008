"""kubectl's commands, for a cluster or for a rehearsal of one; and a client that asks steadily."""

import copy
import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml

from workbook import servers
from workbook.autoscaler import target_of
from workbook.cluster import Cluster, load_command
from workbook.engine import run
from workbook.manifests import Manifest, port_number, read_image
from workbook.pods import Pod
from workbook.rehearsal import KUBERNETES, RESOURCES, Rehearsal

COMPONENT = "app.kubernetes.io/component"
WELL = 100  # so many answers in a row
# What kubectl warns of, whatever else it says.
FORCED = (
    "Warning: Immediate deletion does not wait for confirmation that the running resource has been"
    " terminated. The resource may continue to run on the cluster indefinitely."
)
UNDONE = (
    "Warning: resource deployments/{} was previously managed with 'kubectl apply'. Rolling back"
    " will not update the kubectl.kubernetes.io/last-applied-configuration annotation, which may"
    " cause unexpected behavior on future 'kubectl apply' operations. Consider using"
    " 'kubectl apply' with your previous configuration file instead."
)
OLD_OPTION = (
    "Flag --cpu-percent has been deprecated, Use --cpu with percentage or resource quantity format"
    " (e.g., '70%' for utilization or '500m' for milliCPU)."
)
# What `get` shows: what stands before a name among other kinds, and the columns.
KINDS = {
    "pods": ("pod", "NAME READY STATUS RESTARTS AGE"),
    "services": ("service", "NAME TYPE CLUSTER-IP EXTERNAL-IP PORT(S) AGE"),
    "deployments": ("deployment.apps", "NAME READY UP-TO-DATE AVAILABLE AGE"),
    "endpointslices": ("endpointslice.discovery.k8s.io", "NAME ADDRESSTYPE PORTS ENDPOINTS AGE"),
    "hpa": (
        "horizontalpodautoscaler.autoscaling",
        "NAME REFERENCE TARGETS MINPODS MAXPODS REPLICAS AGE",
    ),
}
SINGULAR = {kind.lower(): kind for kind in RESOURCES}  # as commands name them
# The options of `autoscale`, and the older name of the first of them.
CPU, OLD_CPU = ["--cpu", "--min", "--max"], ["--cpu-percent", "--min", "--max"]


class PodState(NamedTuple):
    """What is seen of a pod from outside."""

    name: str
    ready: bool
    restarts: int


def read_to_end(stream: IO[str]) -> None:
    """Read what nobody wants, line by line, and close the stream."""
    with stream:
        for _ in stream:
            pass


class Kubectl:
    """`kubectl("get pods")` prints the command, does it in a namespace, and prints what it says.

    `cluster` is what runs the pods, as `choose_cluster` says it. Another one for the same namespace
    takes the place of this one, which is closed; `again` says whether this one did.
    """

    opened: dict[str, "Kubectl"] = {}  # noqa: RUF012

    def __init__(self, cluster: Cluster, namespace: str):
        self.again = namespace in self.opened
        if self.again:
            self.opened[namespace].close()
        self.opened[namespace] = self
        self.cluster, self.namespace, self.closing = cluster, namespace, ExitStack()
        self.command = f"{cluster.kubectl} --namespace {namespace}"
        self.rehearsal = None if cluster.engine == "kubernetes" else Rehearsal(namespace)
        if self.rehearsal is not None:
            self.closing.callback(self.rehearsal.close)

    def load(self, image: str, dockerfile: str, paths: Any = None, **build: Any) -> None:
        """Bring an image of this machine's Docker to where the pods run.

        A rehearsal reads its command from the Dockerfile instead; the arguments are `read_image`'s.
        """
        if self.rehearsal is None:
            run(load_command(image))
        else:
            self.rehearsal.images[image] = read_image(dockerfile, paths=paths, **build)

    def __call__(self, command: str, check: bool = True) -> None:
        """Do one command; raise RuntimeError when it fails, unless it may."""
        if self.rehearsal is None:
            own = " --namespace " in command
            return run(f"{self.cluster.kubectl if own else self.command} {command}", check)
        print(f"rehearsal: {command}", flush=True)
        try:
            rehearse(self.rehearsal, command)
        except (ValueError, TimeoutError) as error:
            said = re.search(r" (not found|already exists)$", str(error))
            reason = said and said[1].title().replace(" ", "")
            print(f"{f'Error from server ({reason})' if reason else 'error'}: {error}")
            if check:
                raise RuntimeError(f"This failed, see above: kubectl {command}") from error

    def forward(self, target: str, port: int, local_port: int) -> None:
        """Open a tunnel, `kubectl port-forward`, in place of an earlier one at the same port."""
        command = f"port-forward {target} {local_port}:{port}"
        if self.rehearsal is not None:
            print(f"rehearsal: {command} &")
            self.rehearsal.forward(target.removeprefix("service/"), port, local_port)
            return
        print(f"$ {self.command} {command} &")
        self._open(command, local_port, "Forwarding")

    def _open(self, command: str, local_port: int, opened: str) -> None:
        """Start a kubectl that listens at a port; return when its first line says that it does."""
        name, words = f"{command.split()[0]} {local_port}", shlex.split(f"{self.command} {command}")
        output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        tunnel = servers.start(name, words, [local_port], text=True, **output)
        self.closing.callback(servers.stop, name)
        # To try whether it is open could break it; kubectl says when it is, or why it cannot be.
        assert tunnel.stdout is not None
        if not (line := tunnel.stdout.readline()).startswith(opened):
            raise RuntimeError(f"This failed: kubectl {command}: {line}")
        # It has a line for each connection, and would stop for ever at a pipe that is full.
        threading.Thread(target=read_to_end, args=(tunnel.stdout,), daemon=True).start()

    def pods(self, component: str) -> list[PodState]:
        """Return the state of a component's pods; those that are ending are among them."""
        if self.rehearsal is not None:
            pods = self.rehearsal.pods(component)
            return [PodState(pod.name, pod.ready, pod.restarts) for pod in pods]
        command = f"{self.command} get pods --selector {COMPONENT}={component} --output json"
        found = []
        for item in json.loads(subprocess.check_output(shlex.split(command)))["items"]:
            (state,) = item["status"].get("containerStatuses") or [{}]
            ready, restarts = state.get("ready", False), state.get("restartCount", 0)
            found.append(PodState(item["metadata"]["name"], ready, restarts))
        return found

    def object(self, kind: str, name: str, namespace: str = "") -> Manifest:
        """Return an object as the API server has it; `kind` is as in commands: `deployment`.

        `namespace` is another one than that of the other commands. Raises ValueError with kubectl's
        sentence if there is no such object.
        """
        if self.rehearsal is not None:
            return state(self.rehearsal, SINGULAR[kind], name, namespace)
        own = f"{self.cluster.kubectl} --namespace {namespace}" if namespace else self.command
        words = shlex.split(f"{own} get {kind} {name} --output json")
        found = subprocess.run(words, capture_output=True, text=True)
        if found.returncode:
            raise ValueError(found.stderr.strip())
        return json.loads(found.stdout)

    def reach(self, service: str, port: int, local_port: int) -> str:
        """Return an address of this machine behind which the ready pods of a Service answer.

        On a cluster it is that of `kubectl proxy`. The API server passes requests on to what the
        Service's EndpointSlices name, as a client's would be; `forward` goes past them, to a pod.
        """
        command = f"proxy --port {local_port}"
        if self.rehearsal is not None:
            print(f"rehearsal: {command} &")
            return f"http://127.0.0.1:{self.rehearsal.expose(service, port)}"
        print(f"$ {self.command} {command} &")
        self._open(command, local_port, "Starting to serve")
        there = f"namespaces/{self.namespace}/services/{service}:{port}/proxy"
        return f"http://127.0.0.1:{local_port}/api/v1/{there}"

    def kill(self, pod: str) -> None:
        """End the first process of a pod's container, as a crash would."""
        if self.rehearsal is None:
            return self(f"exec {pod} -- sh -c 'kill 1'", check=False)
        print(f"rehearsal: SIGKILL to the process of {pod}")
        if process := self.rehearsal.pod(pod).process:
            process.kill()

    def close(self) -> None:
        """Close the tunnels, and end the rehearsal if there is one."""
        self.closing.close()


# --- What a rehearsal does for a command ----------------------------------------------------------


def rehearse(rehearsal: Rehearsal, command: str) -> None:
    """Do a command and print what kubectl would print.

    Raises ValueError with kubectl's sentence if it cannot be done, TimeoutError if that takes too
    long, and NotImplementedError if a rehearsal does not know it.
    """
    words, inside = words_of(command)
    match words:
        case _ if "|" in words:
            first, _, reader = command.partition(" | ")
            with redirect_stdout(StringIO()) as said:
                rehearse(rehearsal, first)
            done = subprocess.run(
                reader, shell=True, input=said.getvalue(), stdout=subprocess.PIPE, text=True
            )
            print(done.stdout, end="")
        case ["get", kinds] if {*kinds.split(",")} <= {*KINDS}:
            print_tables(rehearsal, kinds.split(","))
        case ["get", "services", "--namespace", "default"]:
            row = service_row(KUBERNETES, rehearsal.began)
            print(aligned([KINDS["services"][1].split(), row], gap=3))
        case ["get", kind, name, "--output", "yaml"] if kind in SINGULAR:
            print(yaml.safe_dump(rehearsal.object(SINGULAR[kind], name)), end="")
        case ["describe", "pod", name]:
            describe(rehearsal.pod(name), rehearsal.namespace)
        case ["logs", name]:
            print(rehearsal.pod(name).log.read_text(errors="replace"), end="")
        case ["logs", name, "--tail", number]:
            log = rehearsal.pod(name).log.read_text(errors="replace")
            print(*log.splitlines(keepends=True)[-int(number) :], sep="", end="")
        case ["exec", *kind, name] if kind in ([], ["deployment"]):
            new, old = rehearsal.live_pods(name) if kind else ([rehearsal.pod(name)], [])
            if not (new or old):
                raise TimeoutError("timed out waiting for the condition")
            done = rehearsal.exec((new or old)[0].name, *inside)
            print(done.stdout, end="")
            if done.returncode:
                raise ValueError(f"command terminated with exit code {done.returncode}")
        case ["create", "--save-config", "--filename", file]:
            apply(rehearsal, Path(file).read_text())
        case ["apply", "--kustomize", folder, *selector] if len(selector) in (0, 2):
            manifests = subprocess.check_output(["kubectl", "kustomize", folder], text=True)
            apply(rehearsal, manifests, *selector[1:])
        case ["delete", "pod", name]:
            rehearsal.delete_pod(name)
            print(f'pod "{name}" deleted from {rehearsal.namespace} namespace')
        case ["delete", "pod", name, "--force", "--grace-period", "0"]:
            rehearsal.delete_pod(name, grace=0)
            print(FORCED)
            print(f'pod "{name}" force deleted from {rehearsal.namespace} namespace')
        case ["scale", "deployment", name, "--replicas", number]:
            rehearsal.change(name, lambda spec: spec.update(replicas=int(number)))
            print(f"deployment.apps/{name} scaled")
        case ["autoscale", "deployment", name, *options] if options[::2] in (CPU, OLD_CPU):
            if options[0] == "--cpu-percent":
                print(OLD_OPTION)
            percent, least, most = (int(each.removesuffix("%")) for each in options[1::2])
            autoscale(rehearsal, name, percent, least, most)
            print(f"horizontalpodautoscaler.autoscaling/{name} autoscaled")
        case ["set", ("image" | "env" | "resources") as what, "deployment", name, *changes]:
            edit(rehearsal, ["set", what], "deployment", name, changes)
        case ["patch", kind, name, *options] if kind in SINGULAR:
            edit(rehearsal, ["patch"], kind, name, options)
        case ["rollout", "undo", "deployment", name]:
            rehearsal.object("Deployment", name)  # or it is not found
            before = rehearsal.revisions[name][-2:-1]
            print(UNDONE.format(name))
            if not before:
                raise ValueError(f'no rollout history found for deployment "{name}"')
            rehearsal.change(name, lambda spec: spec.update(template=before[0]))
            print(f"deployment.apps/{name} rolled back")
        case ["rollout", "status", "deployment", name]:
            rehearsal.rollout_status(name, 600)
        case ["rollout", "status", "deployment", name, "--timeout", seconds]:
            rehearsal.rollout_status(name, float(seconds.removesuffix("s")))
        case _:
            raise NotImplementedError(f"A rehearsal does not know: kubectl {command}")


def autoscale(rehearsal: Rehearsal, name: str, percent: int, least: int, most: int) -> None:
    """Make an autoscaler for a Deployment; ValueError if there is no such, or one of the name."""
    rehearsal.object("Deployment", name)
    if name in rehearsal.objects["HorizontalPodAutoscaler"]:
        raise ValueError(f'horizontalpodautoscalers.autoscaling "{name}" already exists')
    target = {"type": "Utilization", "averageUtilization": percent}
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
        "minReplicas": least,
        "maxReplicas": most,
        "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
    }
    made = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler"}
    rehearsal.apply([made | {"metadata": {"name": name}, "spec": spec}])


def state(rehearsal: Rehearsal, kind: str, name: str, namespace: str = "") -> Manifest:
    """Return an object of a rehearsal with what a cluster adds: addresses, pods, their CPU."""
    if (kind, name, namespace) == ("Service", "kubernetes", "default"):
        return KUBERNETES
    found: Manifest = copy.deepcopy(rehearsal.object(kind, name))
    if kind == "Service":
        found["spec"].setdefault("clusterIP", "127.0.0.1")
        found["spec"].setdefault("type", "ClusterIP")
    elif kind == "Deployment":
        found["spec"]["replicas"] = rehearsal.replicas(name)
        new, old = rehearsal.live_pods(name)
        found["status"] = {"readyReplicas": sum(pod.ready for pod in [*new, *old])}
    elif kind == "HorizontalPodAutoscaler":
        target = found["spec"]["scaleTargetRef"]["name"]
        new, old = rehearsal.live_pods(target)
        found["status"] = {"currentReplicas": len(new) + len(old)}
        if name in rehearsal.usage:
            now = {"averageUtilization": rehearsal.usage[name]}
            metric = {"type": "Resource", "resource": {"name": "cpu", "current": now}}
            found["status"] |= {"currentMetrics": [metric]}
            found["status"] |= {"desiredReplicas": rehearsal.replicas(target)}
    return found


def words_of(command: str) -> tuple[list[str], list[str]]:
    """Return a command's words, with names and values apart, and those after `--`.

    `scale deployment/ping --replicas=3` becomes `scale deployment ping --replicas 3`.
    """
    outside, _, inside = command.partition(" -- ")
    kinds = "|".join(SINGULAR)
    apart = re.sub(rf"( (?:{kinds}))/|( --[a-z-]+)=", r"\1\2 ", outside)
    return shlex.split(apart), shlex.split(inside)


def apply(rehearsal: Rehearsal, manifests: str, selector: str = "") -> None:
    """Give the rehearsal objects, all or those with a label, and say what is new."""
    chosen = [*yaml.safe_load_all(manifests)]
    if selector:
        label, _, value = selector.partition("=")
        chosen = [each for each in chosen if each["metadata"].get("labels", {}).get(label) == value]
    names = [(each["kind"], each["metadata"]["name"]) for each in chosen]
    before = [rehearsal.objects[kind].get(name) for kind, name in names]
    rehearsal.apply(chosen)
    for (kind, name), known, each in zip(names, before, chosen, strict=True):
        # A budget's selector is always sent: the API has it replaced as a whole, not merged.
        same = known == each and kind != "PodDisruptionBudget"
        how = "unchanged" if same else "configured" if known else "created"
        group = each["apiVersion"].rpartition("/")[0]
        print(f"{kind.lower()}{'.' * bool(group)}{group}/{name} {how}")


def edit(rehearsal: Rehearsal, verb: list[str], kind: str, name: str, changes: list[str]) -> None:
    """Have kubectl itself change an object, outside any cluster, and print what it says."""
    before = rehearsal.object(SINGULAR[kind], name)
    words, text = ["kubectl", *verb, "--local", "--filename", "-", *changes], json.dumps(before)
    said, done = (
        subprocess.run([*words, *form], input=text, capture_output=True, text=True)
        for form in ([], ["--output", "json"])
    )
    if done.returncode:
        raise ValueError(done.stderr.strip().removeprefix("error: "))
    if done.stdout:  # otherwise it is so already
        rehearsal.apply([without_defaults(json.loads(done.stdout), before)])
    print(said.stdout, end="")


def without_defaults(value: Any, before: Any) -> Any:
    """Leave out of a manifest what kubectl has filled in: new fields with nothing in them."""
    if isinstance(value, list):
        pairs = zip_longest(value, (before or [])[: len(value)])
        return [without_defaults(*pair) for pair in pairs]
    if not isinstance(value, dict):
        return value
    known = before if isinstance(before, dict) else {}
    full = {key: without_defaults(each, known.get(key)) for key, each in value.items()}
    return {
        key: each for key, each in full.items() if key in known or each not in ({}, "", "0", None)
    }


def print_tables(rehearsal: Rehearsal, kinds: list[str]) -> None:
    """Print a table of each kind as `kubectl get` does."""
    tables = []
    for kind in kinds:
        before, header = KINDS[kind]
        found = sorted(rows(rehearsal, kind))
        if len(kinds) > 1:
            found = [[f"{before}/{name}", *cells] for name, *cells in found]
        tables += [aligned([header.split(), *found], gap=3)] if found else []
    print("\n\n".join(tables) or f"No resources found in {rehearsal.namespace} namespace.")


def rows(rehearsal: Rehearsal, kind: str) -> Iterator[list[str]]:
    """Yield a row for each object of a kind, as `kubectl get` shows it."""
    if kind == "pods":
        for pod in rehearsal.pods():
            restarts = f"{pod.restarts} ({age(pod.died)} ago)" if pod.restarts else "0"
            yield [pod.name, f"{pod.ready:d}/1", pod.status, restarts, age(pod.born)]
    elif kind == "deployments":
        for name in rehearsal.objects["Deployment"]:
            (new, old), made = rehearsal.live_pods(name), age(rehearsal.made["Deployment", name])
            ready = sum(pod.ready for pod in [*new, *old])
            available = sum(map(rehearsal.is_available, [*new, *old]))
            wanted = rehearsal.replicas(name)
            yield [name, f"{ready}/{wanted}", f"{len(new)}", f"{available}", made]
    elif kind == "services":
        for name in rehearsal.objects["Service"]:
            yield service_row(state(rehearsal, "Service", name), rehearsal.made["Service", name])
    elif kind == "hpa":
        for name in rehearsal.objects["HorizontalPodAutoscaler"]:
            each = state(rehearsal, "HorizontalPodAutoscaler", name)
            spec, made = each["spec"], age(rehearsal.made["HorizontalPodAutoscaler", name])
            used = f"{rehearsal.usage[name]}%" if name in rehearsal.usage else "<unknown>"
            bounds = [f"{spec['minReplicas']}", f"{spec['maxReplicas']}"]
            now = [f"cpu: {used}/{target_of(spec)}%", *bounds]
            deployment = f"Deployment/{spec['scaleTargetRef']['name']}"
            count = f"{each['status']['currentReplicas']}"
            yield [name, deployment, *now, count, made]
    elif kind == "endpointslices":
        for name in rehearsal.objects["Service"]:
            port, found = rehearsal.target_port(name), rehearsal.pods_behind(name)
            try:
                number = f"{port_number(found[0].container, port)}" if found else "<unset>"
                addresses = [pod.address(port) for pod in found]
            except ValueError:  # the pods have no port of this name
                number, addresses = "<unset>", ["127.0.0.1" for _ in found]
            made = age(rehearsal.made["Service", name])
            yield [name, "IPv4", number, ",".join(addresses) or "<unset>", made]


def service_row(service: Manifest, made: float) -> list[str]:
    """Return what `kubectl get services` shows of one that was made at that moment."""
    spec = service["spec"]
    outside = "<pending>" if spec["type"] == "LoadBalancer" else "<none>"
    ports = ",".join(f"{port['port']}/TCP" for port in spec["ports"])
    return [service["metadata"]["name"], spec["type"], spec["clusterIP"], outside, ports, age(made)]


def describe(pod: Pod, namespace: str) -> None:
    """Print what `kubectl describe` says of a pod, as far as a rehearsal knows it."""
    lines = [("Image:", pod.image), ("State:", "Running")]
    if pod.state != "Running":
        lines[1:] = [("State:", "Waiting"), ("  Reason:", pod.state)]
    if pod.last_exit is not None:
        reason = "Error" if pod.last_exit else "Completed"
        lines += [("Last State:", "Terminated"), ("  Reason:", reason)]
        lines += [("  Exit Code:", f"{pod.last_exit}")]
    lines += [("Ready:", f"{pod.ready}"), ("Restart Count:", f"{pod.restarts}")]
    events = [["Type", "Reason", "Age", "From", "Message"]]
    events += [["----", "------", "----", "----", "-------"]]
    seen = sorted(pod.events.copy().items(), key=lambda event: event[1][1])
    for (kind, reason, message), (first, last, count) in seen:
        when = age(last) if count == 1 else f"{age(last)} (x{count} over {age(first)})"
        message = f"spec.containers{{{pod.container['name']}}}: {message}"
        events.append([kind, reason, when, "kubelet", message])
    print(f"Name:             {pod.name}\nNamespace:        {namespace}\nContainers:")
    print(f"  {pod.container['name']}:")
    print(*(f"    {key:16}{value}" for key, value in lines), sep="\n")
    print("Events:", aligned(events, gap=2, indent="  "), sep="\n")


def aligned(table: list[list[str]], gap: int, indent: str = "") -> str:
    """Return rows as lines, each column as wide as its longest cell and a gap."""
    widths = [max(map(len, column)) + gap for column in zip(*table, strict=True)]
    return "\n".join((indent + "".join(map(str.ljust, row, widths))).rstrip() for row in table)


def age(since: float) -> str:
    """Return how long ago a moment was, as kubectl writes it."""
    minutes, seconds = divmod(int(time.monotonic() - since), 60)
    if minutes < 2:
        return f"{60 * minutes + seconds}s"
    if minutes < 10 and seconds:
        return f"{minutes}m{seconds}s"
    return f"{minutes}m" if minutes < 180 else f"{minutes // 60}h"


# --- A client -------------------------------------------------------------------------------------


class Client:
    """The program `client.py` of `folder`, which asks a gateway steadily, and writes into `notes`.

    In a cluster it is a pod. In a rehearsal it is a process that connects to a port which sends
    each connection to some ready pod of the Service `gateway`, as the Service does in a cluster.
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
        servers.stop("client")  # before its notes are emptied
        with notes.open("w") as file:
            servers.start("client", words, stdout=file)
        servers.wait_until(self.is_well, "a hundred predictions have come")

    def answers(self, since: float = 0.0) -> list[tuple[float, str]]:
        """Return when answers came, as `time.time()`, and what they were: `version 1` ..."""
        pairs = re.findall(r"^(\S+) (.*)\n", self.notes.read_text(), re.MULTILINE)
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

        servers.wait_until(is_other, "the pod is ready again")
        moment = time.time()
        servers.wait_until(lambda: self.is_well(moment), "a hundred predictions have come")

    def close(self) -> None:
        """End the client."""
        servers.stop("client")
        if self.kubectl.rehearsal is None:
            self.there(f"delete --kustomize {self.folder} --ignore-not-found --timeout 120s")
