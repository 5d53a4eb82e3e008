"""The rehearsal of manifests: what it does with real processes, and what it refuses."""

import copy
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from helpers.basics import ROOT, SAMPLES, eventually
from helpers.manifests import KUBE, run_kustomize

from workbook import manifests, pods
from workbook.manifests import container, read_image
from workbook.processes import marked
from workbook.rehearsal import Proxy, Rehearsal

PING = KUBE / "ping"
Manifests = list[dict[str, Any]]
Start = Callable[[Manifests], Rehearsal]


def deployment(objects: Manifests) -> dict[str, Any]:
    return next(each for each in objects if each["kind"] == "Deployment")["spec"]


def container_of(objects: Manifests) -> dict[str, Any]:
    return container(deployment(objects)["template"])


@pytest.fixture
def ping() -> Manifests:
    """The manifests of lesson 06, with a probe every second."""
    objects = run_kustomize(PING)
    container_of(objects)["readinessProbe"]["periodSeconds"] = 1
    return objects


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Rehearse manifests until the test is over, and look for what is left then."""
    monkeypatch.chdir(ROOT)
    started: list[Rehearsal] = []

    def start(objects: Manifests) -> Rehearsal:
        image = read_image("kube-config/ping/Dockerfile", "kube-config/ping")
        started.append(Rehearsal("ping", {"ping:001": image}))
        started[-1].apply(objects)
        return started[-1]

    yield start
    for rehearsal in started:
        rehearsal.close()
        assert marked("REHEARSAL", rehearsal.id) == []
        assert not rehearsal.folder.exists()


def names(rehearsal: Rehearsal) -> set[str]:
    return {pod.name for pod in rehearsal.pods("ping")}


def events(pod: pods.Pod) -> str:
    return "\n".join(f"{kind} {reason}: {text}" for kind, reason, text in pod.events.copy())


def get(address: str) -> str:
    return requests.get(f"http://{address}/ping", timeout=30).text


def only_pod(rehearsal: Rehearsal) -> pods.Pod:
    (pod,) = eventually(lambda: rehearsal.pods("ping"), "there is a pod")
    return pod


# --- What a Deployment promises ------------------------------------------------------------------


def test_ping_answers_behind_its_service(start: Start, ping: Manifests) -> None:
    rehearsal = start(ping)
    rehearsal.rollout_status("ping")
    pod = only_pod(rehearsal)
    assert re.fullmatch(r"ping-[0-9a-f]{8}-[b-z2-9]{5}", pod.name)
    eventually(lambda: rehearsal.endpoints["ping"] == [pod], "the endpoints are known")
    port = rehearsal.expose("ping", "http")
    assert rehearsal.expose("ping", 80) == port, "opened once"
    for each in (port, rehearsal.forward("ping", 80)):
        assert get(f"127.0.0.1:{each}") == "PONG\n"
    assert (pod.status, pod.ready, pod.restarts) == ("Running", True, 0)
    assert "Starting gunicorn" in pod.log.read_text()
    done = rehearsal.exec(pod.name, "sh", "-c", "echo $REHEARSAL; exit 3")
    assert (done.stdout, done.returncode) == (f"{rehearsal.id}\n", 3)


def test_a_tunnel_replaces_the_one_before_at_its_port(start: Start, ping: Manifests) -> None:
    rehearsal = start(ping)
    rehearsal.rollout_status("ping")
    port = rehearsal.forward("ping", 80)
    rehearsal.delete_pod(only_pod(rehearsal).name)
    with pytest.raises(requests.ConnectionError):
        get(f"127.0.0.1:{port}")
    rehearsal.rollout_status("ping")
    assert rehearsal.forward("ping", 80, port) == port
    assert get(f"127.0.0.1:{port}") == "PONG\n"
    busy = rehearsal.expose("ping")
    with pytest.raises(RuntimeError, match=f"Port {busy} is in use by .*, pid "):
        rehearsal.forward("ping", 80, busy)


def test_a_port_passes_on_the_end_of_what_is_said_and_the_answer_to_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def answer_in_the_end() -> None:
            connection, _ = server.accept()
            connection.settimeout(30)
            with connection, connection.makefile("rb") as file:
                connection.sendall(file.read())

        answering = pool.submit(answer_in_the_end)
        proxy = Proxy(lambda: f"127.0.0.1:{server.getsockname()[1]}")
        said, address = bytes(range(256)) * 20_000, ("127.0.0.1", proxy.server_address[1])
        with socket.create_connection(address, 30) as client, client.makefile("rb") as file:
            client.sendall(said)
            client.shutdown(socket.SHUT_WR)
            assert file.read() == said
        answering.result()
        proxy.close()


def test_a_killed_process_is_started_again_in_its_pod(start: Start, ping: Manifests) -> None:
    rehearsal = start(ping)
    rehearsal.rollout_status("ping")
    pod = only_pod(rehearsal)
    assert pod.process
    pod.process.kill()
    eventually(lambda: pod.restarts == 1 and pod.ready, "it is started again and ready")
    assert names(rehearsal) == {pod.name}
    assert pod.last_exit == 137
    assert get(pod.address("http")) == "PONG\n"


def test_a_deleted_pod_is_replaced_by_another(start: Start, ping: Manifests) -> None:
    rehearsal = start(ping)
    rehearsal.rollout_status("ping")
    (before,) = names(rehearsal)
    rehearsal.delete_pod(before)
    rehearsal.rollout_status("ping")
    assert len(names(rehearsal)) == 1 and before not in names(rehearsal)


def test_scaling_makes_and_removes_pods(start: Start, ping: Manifests) -> None:
    rehearsal = start(ping)
    rehearsal.change("ping", lambda spec: spec.update(replicas=3))
    rehearsal.rollout_status("ping")
    assert len(names(rehearsal)) == 3
    rehearsal.change("ping", lambda spec: spec.update(replicas=1))
    rehearsal.rollout_status("ping")
    eventually(lambda: len(names(rehearsal)) == 1, "two are gone")


def test_a_wrong_image_is_reported_and_replaces_nobody(
    start: Start, ping: Manifests, capsys: pytest.CaptureFixture[str]
) -> None:
    rehearsal = start(ping)
    rehearsal.rollout_status("ping")
    before, right = names(rehearsal), copy.deepcopy(ping)
    container_of(ping)["image"] = "ping:nobody-has-built-this"
    rehearsal.apply(ping)
    with pytest.raises(TimeoutError, match="timed out waiting for the condition"):
        rehearsal.rollout_status("ping", seconds=1)
    (broken,) = names(rehearsal) - before
    pod = rehearsal.pod(broken)
    assert 'Failed to pull image "ping:nobody-has-built-this"' in events(pod)
    eventually(lambda: pod.status == "ImagePullBackOff", "it waits before it tries again")
    assert before < names(rehearsal) and rehearsal.pod(*before).ready
    rehearsal.apply(right)
    rehearsal.rollout_status("ping")
    eventually(lambda: names(rehearsal) == before, "the broken pod is gone")


def test_a_command_that_does_not_exist_is_reported(start: Start, ping: Manifests) -> None:
    container_of(ping)["command"] = ["no-such-command"]
    pod = only_pod(start(ping))
    eventually(lambda: pod.status == "RunContainerError", "it cannot be started")
    assert "no-such-command" in events(pod)
    assert not pod.ready


def test_a_command_that_ends_backs_off(start: Start, ping: Manifests) -> None:
    container_of(ping)["command"] = ["sh", "-c", "echo so long; exit 3"]
    pod = only_pod(start(ping))
    eventually(lambda: pod.status == "CrashLoopBackOff", "it backs off")
    assert (pod.restarts, pod.last_exit, pod.log.read_text()) == (1, 3, "so long\n")


def test_a_rolling_update_loses_no_request(start: Start, ping: Manifests) -> None:
    container_of(ping)["lifecycle"] = {"preStop": {"sleep": {"seconds": 2}}}
    spec = deployment(ping)
    spec["replicas"] = 2
    spec["strategy"] = {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    rehearsal = start(ping)
    rehearsal.rollout_status("ping")
    eventually(lambda: len(rehearsal.endpoints["ping"]) == 2, "both are endpoints")
    before, port = names(rehearsal), rehearsal.expose("ping")
    answers, ready, done = [], [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            ready.append(sum(pod.ready for pod in rehearsal.pods("ping")))
            answer = requests.get(f"http://127.0.0.1:{port}/ping", timeout=30)
            answers.append((answer.status_code, answer.text))

    now = {"annotations": {"kubectl.kubernetes.io/restartedAt": "now"}}
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            rehearsal.change("ping", lambda spec: spec["template"]["metadata"].update(now))
            rehearsal.rollout_status("ping")
            eventually(lambda: not before & names(rehearsal), "the old pods are gone")
        finally:
            done.set()
        asking.result()
    assert set(answers) == {(200, "PONG\n")} and len(answers) > 20
    assert min(ready) >= 2


def test_an_old_pod_goes_when_the_new_one_has_been_ready_for_long_enough(
    start: Start, ping: Manifests
) -> None:
    deployment(ping)["minReadySeconds"] = 3600
    rehearsal = start(ping)
    eventually(lambda: only_pod(rehearsal).ready, "it is ready")
    old = only_pod(rehearsal)
    now = {"annotations": {"kubectl.kubernetes.io/restartedAt": "now"}}
    rehearsal.change("ping", lambda spec: spec["template"]["metadata"].update(now))
    eventually(lambda: [pod.ready for pod in rehearsal.pods()] == [True, True], "both are ready")
    with pytest.raises(TimeoutError):
        rehearsal.rollout_status("ping", 1)
    assert old in rehearsal.pods() and not old.ending.is_set()
    rehearsal.change("ping", lambda spec: spec.update(minReadySeconds=0))
    rehearsal.rollout_status("ping")
    assert old.ending.is_set()


def test_a_pod_that_ignores_sigterm_is_killed_after_its_grace(
    start: Start, ping: Manifests
) -> None:
    container_of(ping)["command"] = ["sh", "-c", "trap '' TERM; echo deaf; while :; do :; done"]
    del container_of(ping)["readinessProbe"]
    deployment(ping)["template"]["spec"]["terminationGracePeriodSeconds"] = 1
    rehearsal = start(ping)
    pod = only_pod(rehearsal)
    eventually(lambda: pod.log.read_text() == "deaf\n", "it runs")
    rehearsal.delete_pod(pod.name)
    assert pod.last_exit == 137


# --- Probes --------------------------------------------------------------------------------------


def test_a_pod_that_is_not_ready_gets_no_requests(start: Start, ping: Manifests) -> None:
    container_of(ping)["readinessProbe"]["httpGet"]["path"] = "/absent"
    rehearsal = start(ping)
    pod = only_pod(rehearsal)
    failure = "Warning Unhealthy: Readiness probe failed: HTTP probe failed with statuscode: 404"
    eventually(lambda: failure in events(pod), "the probe fails")
    assert (pod.status, pod.ready) == ("Running", False)
    assert rehearsal.ready_pods("ping") == []
    with pytest.raises(requests.ConnectionError):
        get(f"127.0.0.1:{rehearsal.expose('ping')}")
    with pytest.raises(ValueError, match="no pod of the Service ping is ready"):
        rehearsal.forward("ping", 80)


def test_a_pod_that_does_not_live_is_started_again(start: Start, ping: Manifests) -> None:
    check = {"httpGet": {"path": "/absent", "port": "http"}}
    container_of(ping)["livenessProbe"] = check | {"periodSeconds": 1, "failureThreshold": 2}
    # However slow the machine is, gunicorn listens before it is asked whether it lives.
    started = {"httpGet": {"path": "/ping", "port": "http"}}
    container_of(ping)["startupProbe"] = started | {"periodSeconds": 1, "failureThreshold": 60}
    pod = only_pod(start(ping))
    eventually(lambda: pod.restarts >= 1, "it is started again")
    assert sum(count for (*_, text), (*_, count) in pod.events.items() if "Liveness" in text) >= 2
    assert "Liveness probe failed: HTTP probe failed with statuscode: 404" in events(pod)
    assert "Normal Killing: Container failed liveness probe, will be restarted" in events(pod)


def test_a_probe_may_have_a_grace_of_its_own(start: Start, ping: Manifests) -> None:
    """What answers nobody is not given the time that preStop and the pod's grace would take."""
    check = {"httpGet": {"path": "/absent", "port": "http"}, "terminationGracePeriodSeconds": 1}
    container_of(ping)["startupProbe"] = check | {"periodSeconds": 1, "failureThreshold": 1}
    container_of(ping)["lifecycle"] = {"preStop": {"sleep": {"seconds": 3600}}}
    deployment(ping)["template"]["spec"]["terminationGracePeriodSeconds"] = 3600
    pod = only_pod(start(ping))
    eventually(lambda: pod.restarts >= 1, "it is started again")
    assert pod.last_exit == 137


def test_nothing_else_is_asked_before_the_start_is_over(start: Start, ping: Manifests) -> None:
    check = {"httpGet": {"path": "/absent", "port": "http"}}
    container_of(ping)["startupProbe"] = check | {"periodSeconds": 1, "failureThreshold": 3}
    pod = only_pod(start(ping))
    eventually(lambda: pod.restarts >= 1, "it is started again")
    assert sum(count for (*_, text), (*_, count) in pod.events.items() if "Startup" in text) >= 3
    assert "Readiness" not in events(pod) and not pod.ready


def test_a_grpc_probe_asks_its_port(start: Start, ping: Manifests) -> None:
    """gunicorn does not speak gRPC; the model server below does."""
    container_of(ping)["readinessProbe"] = {"grpc": {"port": 9696}, "periodSeconds": 1}
    pod = only_pod(start(ping))
    eventually(lambda: "Readiness probe failed: error: " in events(pod), "no gRPC")
    assert not pod.ready


# --- What manifests say --------------------------------------------------------------------------


def test_variables_come_from_where_the_manifest_says(start: Start, ping: Manifests) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}}
    ping.append(secret | {"stringData": {"KEY": "secret"}})
    container_of(ping)["env"] = [
        {"name": "COLOUR", "value": "red"},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "KEY"}}},
        {"name": "CPUS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
    ]
    rehearsal = start(ping)
    rehearsal.rollout_status("ping")
    done = rehearsal.exec(only_pod(rehearsal).name, "printenv", "COLOUR", "KEY", "CPUS")
    assert done.stdout.splitlines() == ["red", "secret", "1"]


def test_what_a_pod_needs_and_nobody_has_is_named_and_waited_for(
    start: Start, ping: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pods, "FIRST_BACKOFF_SECONDS", 0.5)
    reference = {"secretKeyRef": {"name": "keys", "key": "KEY"}}
    container_of(ping)["env"] = [{"name": "KEY", "valueFrom": reference}]
    rehearsal = start(ping)
    pod = only_pod(rehearsal)
    eventually(lambda: pod.status == "CreateContainerConfigError", "it cannot be started")
    assert 'Warning Failed: secrets "keys" not found' in events(pod)
    secret: dict[str, Any] = {"kind": "Secret", "metadata": {"name": "keys"}, "stringData": {}}
    rehearsal.apply([secret])
    eventually(lambda: "couldn't find key KEY in keys" in events(pod), "it lacks the key")
    rehearsal.apply([secret | {"stringData": {"KEY": "secret"}}])
    eventually(lambda: pod.ready, "it was tried again")
    assert pod.restarts == 0
    assert rehearsal.exec(pod.name, "printenv", "KEY").stdout == "secret\n"


def test_the_name_of_a_service_leads_to_its_pods(start: Start, ping: Manifests) -> None:
    address = "http://ping.ping.svc.cluster.local:80/ping"
    container_of(ping)["env"] = [{"name": "ADDRESS", "value": address}]
    rehearsal = start(ping)
    rehearsal.rollout_status("ping")
    eventually(lambda: rehearsal.endpoints["ping"], "the endpoints are known")
    ask = "import os, urllib.request as u; print(u.urlopen(os.environ['ADDRESS']).read().decode())"
    assert "PONG" in rehearsal.exec(only_pod(rehearsal).name, "python", "-c", ask).stdout


def test_a_name_that_leads_nowhere_yet_is_waited_for(
    start: Start, ping: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is told its addresses once: not before they are known."""
    monkeypatch.setattr(pods, "FIRST_BACKOFF_SECONDS", 0.5)
    label, port = {"app": "others"}, manifests.port_number(container_of(ping))
    spec = {"clusterIP": "None", "selector": label, "ports": [{"port": port}]}
    ping.append(
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "others"}, "spec": spec}
    )
    container_of(ping)["env"] = [{"name": "OTHERS", "value": f"dns:///others:{port}"}]
    rehearsal = start(ping)
    pod = only_pod(rehearsal)
    eventually(lambda: "no Deployment makes pods for the Service others yet" in events(pod), "")
    others = copy.deepcopy(next(each for each in ping if each["kind"] == "Deployment"))
    others["metadata"]["name"] = "others"
    others["spec"]["selector"] = {"matchLabels": label}
    others["spec"]["template"]["metadata"]["labels"] = label
    del others["spec"]["template"]["spec"]["containers"][0]["env"]
    rehearsal.apply([others])
    eventually(lambda: pod.ready, "it was tried again")
    addresses = rehearsal.exec(pod.name, "printenv", "OTHERS").stdout.strip().split(",")
    (other,) = rehearsal.pods("others")
    assert other.address() in addresses


POD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "spec.template.spec.initContainers": lambda pod: pod.update(initContainers=[{"name": "a"}]),
    "spec.template.spec.containers.livenessProbe.exec": lambda pod: pod["containers"][0].update(
        livenessProbe={"exec": {"command": ["true"]}}
    ),
    "spec.template.spec.containers.lifecycle.preStop: {'httpGet'": lambda pod: pod["containers"][
        0
    ].update(lifecycle={"preStop": {"httpGet": {"path": "/"}}}),
    "spec.template.spec.containers.livenessProbe.initialDelaySeconds": lambda pod: pod[
        "containers"
    ][0].update(livenessProbe={"initialDelaySeconds": 5}),
    "spec.template.spec.containers.readinessProbe.successThreshold": lambda pod: pod["containers"][
        0
    ].update(readinessProbe={"successThreshold": 2}),
    "spec.template.spec.containers.env.valueFrom.resourceFieldRef.resource: limits.memory": (
        lambda pod: pod["containers"][0].update(
            env=[{"name": "A", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}}]
        )
    ),
    "spec.template.spec.containers.envFrom": lambda pod: pod["containers"][0].update(
        envFrom=[{"secretRef": {"name": "a"}}]
    ),
    "spec.template.spec.containers.env.valueFrom.fieldRef": lambda pod: pod["containers"][0].update(
        env=[{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]
    ),
    "spec.template.spec.containers.env.value: $(A), ": lambda pod: pod["containers"][0].update(
        env=[{"name": "B", "value": "$(A), "}]
    ),
    "spec.template.spec.containers.volumeMounts.subPath": lambda pod: pod["containers"][0].update(
        volumeMounts=[{"name": "a", "mountPath": "/a", "subPath": "b"}]
    ),
    "spec.template.spec.volumes.configMap": lambda pod: pod.update(
        volumes=[{"name": "a", "configMap": {"name": "a"}}]
    ),
    "more than one container": lambda pod: pod["containers"].append({"name": "two"}),
}


@pytest.mark.parametrize("what", POD)
def test_what_is_not_rehearsed_is_refused_in_a_sentence(what: str, ping: Manifests) -> None:
    POD[what](deployment(ping)["template"]["spec"])
    with pytest.raises(ValueError, match=re.escape(f"deployment/ping has {what}")):
        for each in ping[1:]:
            manifests.refuse_unknown(each)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("Deployment", "strategy.type", "Recreate"),
        ("Deployment", "strategy.rollingUpdate", {"maxSurge": "50%"}),
        ("Deployment", "progressDeadlineSeconds", 5),
        ("Service", "sessionAffinity", "ClientIP"),
    ],
)
def test_other_ways_of_a_cluster_are_refused(
    kind: str, field: str, value: object, ping: Manifests
) -> None:
    manifest = next(each for each in ping if each["kind"] == kind)
    inner, _, last = field.rpartition(".")
    (manifest["spec"].setdefault(inner, {}) if inner else manifest["spec"])[last] = value
    with pytest.raises(ValueError, match=rf"/ping has spec\.{field}.*, which is not rehearsed\.$"):
        manifests.refuse_unknown(manifest)


def test_a_coded_secret_and_a_port_that_is_not_declared_are_refused(ping: Manifests) -> None:
    secret = {"kind": "Secret", "metadata": {"name": "keys"}, "data": {"KEY": "c2VjcmV0"}}
    with pytest.raises(ValueError, match=r"^secret/keys has data, which is not rehearsed\.$"):
        manifests.refuse_unknown(secret)
    container_of(ping)["livenessProbe"] = {"grpc": {"port": 9000}}
    with pytest.raises(ValueError, match=r"^the container ping declares no port 9000$"):
        manifests.refuse_unknown(next(each for each in ping if each["kind"] == "Deployment"))


@pytest.mark.parametrize("folder", ["base", "single-node", "embedded", "gpu", "ping", "../eks"])
def test_nothing_of_our_own_manifests_is_refused(folder: str) -> None:
    for each in run_kustomize(KUBE / folder):
        if each["kind"] in ("Deployment", "Service"):
            manifests.refuse_unknown(each)


QUANTITIES = [("250m", 0.25), ("1.5", 1.5), (3, 3), ("512Mi", 2**29), ("2Gi", 2**31)]


@pytest.mark.parametrize(("text", "number"), QUANTITIES)
def test_quantities_of_cpu_and_memory(text: str | float, number: float) -> None:
    assert manifests.quantity(text) == number


def test_other_quantities_are_refused() -> None:
    with pytest.raises(ValueError, match="2 GB is no quantity"):
        manifests.quantity("2 GB")


def test_commands_come_from_the_dockerfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    image = read_image("model_server/embedded.dockerfile", paths={"/tmp": "build"})
    assert image.context == ROOT and image.command[0] == "--port=8500"
    assert image.entrypoint[:2] == ["bash", "-c"] and image.entrypoint[3:] == ["serve"]
    assert image.entrypoint[2].startswith(
        'exec python -m model_server --model_name="clothing-model"'
    )
    assert image.paths["/models/clothing-model"] == str(ROOT / "build/clothing-model")
    config = image.paths["/etc/serving/monitoring.config"]
    assert config == str(ROOT / "model_server/monitoring.config")
    assert "--prefer_tflite_model=true" in image.command
    assert image.paths["/tmp"] == str(ROOT / "build")
    assert read_image("kube-config/ping/Dockerfile", "kube-config/ping").context == PING


def test_a_build_argument_names_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for dockerfile in ("model_server/Dockerfile", "model_server/embedded.dockerfile"):
        image = read_image(dockerfile, arguments={"MODEL_NAME": "leaf-model"})
        flags = '--model_name="leaf-model" --model_base_path="/models/leaf-model" "$@"'
        assert image.entrypoint[2].endswith(f" {flags}")
        assert image.paths["/models/leaf-model"] == str(ROOT / "build/leaf-model")
        assert image.environment == {"MODEL_NAME": "leaf-model"}
    image = read_image("gateway.dockerfile", arguments={"MODEL_NAME": "leaf-model"})
    described = image.paths[image.environment["MODEL_DESCRIPTION"]]
    assert described == str(ROOT / "build/leaf-model/1/assets.extra/model.json")


# --- The whole, and its end ----------------------------------------------------------------------


@pytest.mark.thorough
def test_the_clothes_are_classified_by_both_model_servers(
    clothing_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    here = {
        "/models/clothing-model": str(clothing_model),
        "/app/model.json": str(clothing_model / "1/assets.extra/model.json"),
    }
    images = {
        "clothing-gateway:001": read_image("gateway.dockerfile", paths=here),
        "clothing-model:001": read_image("model_server/embedded.dockerfile", paths=here),
    }
    rehearsal = Rehearsal("clothes", images)
    try:
        rehearsal.apply(run_kustomize(KUBE / "base"))
        for name in ("model-server", "gateway"):
            rehearsal.rollout_status(name, seconds=300)
        eventually(lambda: rehearsal.endpoints["gateway"], "the endpoints are known")
        url = f"http://127.0.0.1:{rehearsal.expose('gateway')}/predict"
        servers = rehearsal.pods("model-server")
        assert len(servers) == len(rehearsal.pods("gateway")) == 2
        page = "/monitoring/prometheus/metrics"

        def both_have_answered() -> bool:
            answer = requests.post(url, files={"file": SAMPLES[0].read_bytes()}, timeout=60)
            assert answer.json()["top_class"] == SAMPLES[0].stem
            pages = [requests.get(f"http://{pod.address('http')}{page}") for pod in servers]
            counts = [
                re.search(r'request_latency_count{.*"GRPC"} (\d+)', each.text) for each in pages
            ]
            return all(count and int(count[1]) >= 2 for count in counts)

        eventually(both_have_answered, "both model servers have answered twice")
    finally:
        rehearsal.close()
    assert marked("REHEARSAL", rehearsal.id) == []


def test_nothing_is_left_when_the_program_is_killed(ping: Manifests) -> None:
    program = """
import sys, yaml
from workbook.manifests import read_image
from workbook.rehearsal import Rehearsal
image = read_image("kube-config/ping/Dockerfile", "kube-config/ping")
rehearsal = Rehearsal("ping", {"ping:001": image})
rehearsal.apply([*yaml.safe_load_all(sys.stdin)])
rehearsal.rollout_status("ping")
print(rehearsal.id, rehearsal.folder, flush=True)
while True:
    pass
"""
    command = [sys.executable, "-c", program]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdin and process.stdout
        process.stdin.write(yaml.safe_dump_all(ping))
        process.stdin.close()
        lines = iter(process.stdout.readline, "")
        last = next(line for line in lines if re.match("[0-9a-f]{8} ", line))
        rehearsal, folder = last.split()
        assert marked("REHEARSAL", rehearsal) and Path(folder).exists()
        process.send_signal(signal.SIGKILL)
    eventually(lambda: not marked("REHEARSAL", rehearsal), "all is removed")
    eventually(lambda: not Path(folder).exists(), "all is removed")
