"""docs/troubleshooting.md: its faults are caused here, and its words are looked for.

Each test hands what was printed to `saw`, with the anchor of the entry that quotes it.
"""

import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import grpc
import numpy as np
import pytest
import requests
import yaml
from helpers.basics import ROOT, SAMPLES, describe_model, eventually
from helpers.servers import Server, WebHost, serve

import description
import tfserving
from workbook import cloud, cluster, engine, servers
from workbook.kubectl import Kubectl

PAGE = ROOT / "docs/troubleshooting.md"
SECTIONS = [
    *("Set-up", "Docker", "TensorFlow Serving", "gRPC", "Gateway"),
    *("Kubernetes", "Autoscaling", "AWS", "Your machine"),
]
PARTS = re.compile(
    r"\n\n\*\*Symptom\.\*\* \S[^\n]+:\n\n```text\n(?P<quoted>.+?)\n```"
    r"\n\n\*\*Cause\.\*\* \S[^\n]+\n\n\*\*Remedy\.\*\* \S[^\n]+"
    r"\n\n\*(?:Reproduced by `(?P<test>test_\w+)`|Seen (?P<seen>with [^\n]+))\.\*\s*",
    re.DOTALL,
)
KUBECTL = [str(Path(sys.executable).with_name("kubectl")), "--kubeconfig=/dev/null"]


class Entry(NamedTuple):
    """What stands under one heading."""

    section: str
    title: str
    body: str

    @property
    def anchor(self) -> str:
        return anchor_of(self.title)

    @property
    def parts(self) -> re.Match[str]:
        return PARTS.fullmatch(self.body) or pytest.fail(f"{self.title} has not all its parts")


def anchor_of(title: str) -> str:
    """Return the anchor of a heading; with these letters alone, every program gives it the same."""
    assert re.fullmatch("[A-Za-z0-9 -]+", title), title
    return title.lower().replace(" ", "-")


def read_entries() -> list[Entry]:
    found = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        name, *entries = section.split("\n### ")
        for entry in entries:
            title, newline, body = entry.partition("\n")
            found.append(Entry(name.splitlines()[0], title, newline + body))
    return found


ENTRIES = read_entries()


def saw(anchor: str, *printed: object) -> None:
    """Assert that all that an entry quotes was printed, whatever is large or small in it."""
    (entry,) = (entry for entry in ENTRIES if entry.anchor == anchor)
    text = "\n".join(map(str, printed)).casefold()
    missing = [line for line in entry.parts["quoted"].splitlines() if line.casefold() not in text]
    assert missing == [], text


def run(*command: object, **options: Any) -> str:
    """Run a command that must fail, and return all that it printed."""
    words = [str(word) for word in command]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 120}
    done = subprocess.run(words, **both | {"cwd": ROOT} | options)
    assert done.returncode != 0, done.stdout
    return done.stdout


def error_of(call: Callable[[], Any], *kinds: type[Exception]) -> str:
    """Return the words of the error that a call must raise."""
    with pytest.raises(kinds or Exception) as caught:
        call()
    return str(caught.value)


# --- The page ------------------------------------------------------------------------------------


def test_every_entry_has_its_parts_and_says_how_we_know() -> None:
    assert len(ENTRIES) >= 30
    for entry in ENTRIES:
        if test := entry.parts["test"]:
            assert f'"{entry.anchor}"' in inspect.getsource(globals()[test]), entry.title
        else:
            # A version or a year, and where to read it.
            assert re.search(r"\d.*\]\(https://github\.com/\S+/\S+\)", entry.parts["seen"])


def test_entries_stand_where_they_strike_under_anchors_of_their_own() -> None:
    headings = re.findall(r"^#{2,3} (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert list(dict.fromkeys(entry.section for entry in ENTRIES)) == SECTIONS
    anchors = [anchor_of(heading) for heading in headings]
    assert len(set(anchors)) == len(anchors)


LINK = re.compile(r"troubleshooting\.md#([\w-]+)")
LINKING = [
    *(*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.py")),
    *(each for name in ("workbook", "model_server", "eks") for each in (ROOT / name).rglob("*.py")),
    *(ROOT / "workbook/setup.sh", *ROOT.glob("notebooks/*.ipynb")),
]


def test_every_link_to_an_entry_leads_somewhere() -> None:
    anchors = {anchor_of(entry.title) for entry in ENTRIES} | {anchor_of(name) for name in SECTIONS}
    links = {path.name: LINK.findall(path.read_text(encoding="utf-8")) for path in LINKING}
    assert {name: {*found} - anchors for name, found in links.items() if {*found} - anchors} == {}
    inside = re.findall(r"\]\(#([\w-]+)\)", PAGE.read_text(encoding="utf-8"))
    assert {*inside} <= anchors
    # Where our own sentences are raised.
    for name in ("engine.py", "cluster.py", "servers.py", "cloud.py", "setup.sh", "manager.py"):
        assert links[name], f"{name} links to no entry"
    lessons = [name for name in links if re.match(r"0[1-5]-", name) and links[name]]
    assert len({name[:2] for name in lessons}) == 5


# --- Set-up --------------------------------------------------------------------------------------

# Stands in for a Python of which the set-up makes an environment; its pip is a command of ours.
PYTHON = """#!/bin/sh
case "$*" in
*"import ensurepip"*) echo "$0" ;;
*"-m venv"*) mkdir -p .tools/bin && cp "$0" .tools/bin/python ;;
*"-m pip install"*) {pip} ;;
*) exit 1 ;;
esac
"""
# What pip really says where nobody listens, and where the index has nothing; a full disk.
PIPS = {
    "pypi-cannot-be-reached": "{python} -m pip install --retries 1 -i http://127.0.0.1:1/ a",
    "pypi-has-no-package-for-this-machine": "{python} -m pip install --no-index a",
    "the-disk-is-full": "{python} -c \"open('/dev/full', 'wb', 0).write(b'package')\"",
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in which nothing is installed."""
    (tmp_path / "clone/workbook").mkdir(parents=True)
    shutil.copy(ROOT / "workbook/setup.sh", tmp_path / "clone/workbook")
    return tmp_path / "clone"


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_no_python_suits(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("sh", "dirname", "mkdir", "cmp", "rm"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    said = run("workbook/setup.sh", cwd=clone, env={"PATH": str(tmp_path / "bin")})
    saw("no-python-that-suits", said)


def test_another_python(clone: Path) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    executable(clone / ".venv/bin/python", "#!/bin/sh\necho 3.99\n")
    env = {**os.environ, "PYTHON": sys.executable}
    saw("another-python-than-before", run("workbook/setup.sh", cwd=clone, env=env))


@pytest.mark.parametrize("anchor", PIPS)
def test_pip_fails(clone: Path, anchor: str) -> None:
    """With "pypi-cannot-be-reached", "pypi-has-no-package-for-this-machine", "the-disk-is-full"."""
    pip = PIPS[anchor].format(python=sys.executable)
    python = executable(clone / "python", PYTHON.format(pip=pip))
    said = run("workbook/setup.sh", cwd=clone, env={**os.environ, "PYTHON": str(python)})
    saw(anchor, said)


def test_pipenv_skips(tmp_path: Path) -> None:
    later = {"version": "==1.0", "markers": "python_full_version >= '99'"}
    lock = tmp_path / "Pipfile.lock"
    lock.write_text(json.dumps({"default": {"numpy": later}, "develop": {}}))
    saw("pipenv-has-skipped-a-package", run(sys.executable, "workbook/installed.py", lock))


def test_another_kernel() -> None:
    said = run(sys.executable, "-I", "-S", "-c", "import keras")
    saw("no-module-named-keras", said)


@pytest.mark.filterwarnings("ignore:Call to deprecated create function")
def test_old_stubs() -> None:
    from google.protobuf.descriptor import FieldDescriptor

    # What protoc wrote for a field of a message until its version 3.18.
    numbers = dict.fromkeys(("index", "number", "type", "cpp_type", "label", "default_value"), 1)
    others = dict.fromkeys(("message_type", "enum_type", "containing_type", "extension_scope"))
    flags = {"has_default_value": False, "is_extension": False}
    field: Any = {"name": "key", "full_name": "Map.key", **numbers, **others, **flags}
    saw("descriptors-cannot-be-created-directly", error_of(lambda: FieldDescriptor(**field)))


def test_new_stubs() -> None:
    from google.protobuf.runtime_version import Domain, ValidateProtobufRuntimeVersion

    # The first statement of a file that a later protoc has written.
    said = error_of(lambda: ValidateProtobufRuntimeVersion(Domain.PUBLIC, 99, 0, 0, "", "a.proto"))
    saw("generated-code-newer-than-protobuf", said)


def test_new_grpc_stubs() -> None:
    source = (ROOT / "tfserving/services_pb2_grpc.py").read_text()
    later = re.sub("GRPC_GENERATED_VERSION = .*", "GRPC_GENERATED_VERSION = '99.0.0'", source)
    assert later != source
    saw("the-generated-code-wants-a-newer-grpcio", error_of(lambda: exec(later, {})))


def test_tostring() -> None:
    array: Any = np.zeros(3)
    saw("ndarray-has-no-attribute-tostring", error_of(lambda: array.tostring(), AttributeError))


def test_old_h5() -> None:
    import keras

    written = {"name": "conv", "filters": 8, "kernel_size": 3, "groups": 1}
    said = error_of(lambda: keras.layers.SeparableConv2D.from_config(written))
    saw("an-old-h5-model-does-not-load", said)


# --- Docker --------------------------------------------------------------------------------------

SLIM = "python:3.11-slim"


def command(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"there is no {name} command")


@pytest.fixture
def daemon() -> str:
    """The docker command, where an engine answers."""
    if engine.wanted_engine("auto") == "embedded" or not cluster.docker_answers():
        pytest.skip("no Docker engine answers, or it shall not be used")
    return "docker"


@pytest.fixture
def slim(daemon: str) -> str:
    """The command that runs a container of Python."""
    if not engine.docker("image", "inspect", SLIM):
        pytest.skip(f"there is no {SLIM} here")
    return daemon


def test_no_daemon(tmp_path: Path) -> None:
    env = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/docker.sock"}
    said = run(command("docker"), "ps", env=env)
    saw("cannot-connect-to-the-docker-daemon", said)


@pytest.mark.docker
def test_docker_socket(daemon: str) -> None:
    if os.getuid() != 0 or "DOCKER_HOST" in os.environ:
        pytest.skip("only root can become somebody who may not use the socket")
    saw(
        "permission-denied-at-the-docker-socket",
        run(daemon, "ps", user=65534, group=65534, cwd="/"),
    )


def test_no_compose(tmp_path: Path) -> None:
    """Both versions of the sentence are quoted, and a client says one of them."""
    env = {**os.environ, "DOCKER_CONFIG": str(tmp_path), "HOME": str(tmp_path)}
    words = [command("docker"), "compose", "up"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=tmp_path)
    if "no configuration file" in done.stderr:
        pytest.skip("Compose is installed for all users")
    (entry,) = (entry for entry in ENTRIES if entry.anchor == "compose-is-not-known")
    assert any(line in done.stderr for line in entry.parts["quoted"].splitlines()), done.stderr


@pytest.mark.docker
def test_no_registry(daemon: str) -> None:
    nowhere = "127.0.0.1:1/tensorflow/serving:2.20.0"
    said = error_of(lambda: engine.choose_engine("docker", nowhere), RuntimeError)
    saw("the-registry-cannot-be-reached", said)


def test_another_processor(tmp_path: Path) -> None:
    """What the kernel says to a program for a processor that nobody has."""
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xff\xff" + bytes(100))
    program.chmod(0o755)
    saw("exec-format-error", error_of(lambda: subprocess.run([str(program)]), OSError))


@pytest.mark.docker
def test_busy_port(slim: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ours = error_of(lambda: servers.require_free_ports(port), RuntimeError)
        published = f"--publish=127.0.0.1:{port}:9696"
        saw("a-port-is-in-use", ours, run(slim, "run", "--rm", published, SLIM, "true"))


@pytest.mark.docker
def test_out_of_memory(slim: str) -> None:
    name = f"troubleshooting-{os.getpid()}"
    limits = ("--memory=16m", "--memory-swap=16m", "--network=none")
    try:
        run(slim, "run", f"--name={name}", *limits, SLIM, "python", "-c", "bytearray(10**9)")
        listed = engine.docker("ps", "--all", f"--filter=name={name}", "--format={{.Status}}")
    finally:
        engine.docker("rm", "--force", name)
    saw("a-container-ends-with-137", listed)


@pytest.mark.docker
def test_localhost_in_a_container(slim: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as here:
        program = f"import socket; socket.create_connection({here.getsockname()})"
        said = run(slim, "run", "--rm", "--network=none", SLIM, "python", "-c", program)
    saw("localhost-in-a-container", said)


# --- TensorFlow Serving --------------------------------------------------------------------------


def test_no_versions(start_model_server: Callable[..., Server], tmp_path: Path) -> None:
    """A base path with nothing in it, then one that ends with the version's number."""
    server = start_model_server(tmp_path, wait=False)

    def log() -> str:
        return server.log.read_text()

    eventually(lambda: "no versions of model" in log(), "the server says that it waits")
    saw("no-versions-of-servable", log())
    (tmp_path / "saved_model.pb").touch()
    eventually(lambda: "is itself a SavedModel" in log(), "the server looks again")
    saw("the-base-path-is-itself-a-savedmodel", log())
    server.stop()


def predict(server: Server, name: str, signature: str, alias: str) -> str:
    """Return the words of a Predict call that must fail."""
    request = tfserving.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    picture = np.zeros((1, 32, 32, 3), np.float32)
    request.inputs[alias].CopyFrom(tfserving.make_tensor_proto(picture))
    with grpc.insecure_channel(server.grpc) as channel:
        stub = tfserving.PredictionServiceStub(channel)
        return error_of(lambda: stub.Predict(request, timeout=20), grpc.RpcError)


def test_requests_that_do_not_fit(model_server: Server) -> None:
    saw("servable-not-found", predict(model_server, "clothes", "", "inputs"))
    saw("the-signature-is-not-found", predict(model_server, "clothing-model", "serving_png", "a"))
    saw("the-input-has-another-name", predict(model_server, "clothing-model", "", "input_8"))
    url = f"{model_server.http}/v1/models/clothing-model"
    saw("missing-inputs-or-instances", requests.post(f"{url}:predict", json={}).json()["error"])
    saw("malformed-request", requests.post(f"{url}/predict", json={}).json()["error"])


# --- gRPC ----------------------------------------------------------------------------------------


class Echo(grpc.GenericRpcHandler):
    """A service that gives back what it gets, once it may."""

    def __init__(self) -> None:
        self.may = threading.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method != "/test.Echo/Say":
            return None

        def say(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.may.wait(20)
            return request

        return grpc.unary_unary_rpc_method_handler(say)


@pytest.fixture
def echo() -> Iterator[tuple[Echo, Any]]:
    server, service = grpc.server(futures.ThreadPoolExecutor(1)), Echo()
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield service, channel
    service.may.set()
    server.stop(None)


def test_deadline(echo: tuple[Echo, Any]) -> None:
    """A server that is there, and has something else to do first."""
    say = echo[1].unary_unary("/test.Echo/Say")
    said = error_of(lambda: say(b"first", timeout=0.1), grpc.RpcError)
    saw("deadline-exceeded-on-the-first-request", said)


def test_nobody_listens(closed: str) -> None:
    with grpc.insecure_channel(closed) as channel:
        stub = tfserving.PredictionServiceStub(channel)
        saw("unavailable", error_of(lambda: stub.Predict(tfserving.PredictRequest(), timeout=20)))


def test_swapped_ports(model_server: Server) -> None:
    with grpc.insecure_channel(model_server.http.removeprefix("http://")) as channel:
        stub = tfserving.PredictionServiceStub(channel)
        ours = error_of(lambda: stub.Predict(tfserving.PredictRequest(), timeout=20))
    curl = run(command("curl"), "--silent", "--show-error", f"http://{model_server.grpc}/v1")
    saw("grpc-and-rest-have-different-ports", ours, curl)


def test_large_message(echo: tuple[Echo, Any]) -> None:
    say = echo[1].unary_unary("/test.Echo/Say")
    said = error_of(lambda: say(bytes(5_000_003), timeout=20), grpc.RpcError)
    saw("received-message-larger-than-max", said)


def test_another_service(echo: tuple[Echo, Any]) -> None:
    stub = tfserving.PredictionServiceStub(echo[1])
    said = error_of(lambda: stub.Predict(tfserving.PredictRequest(), timeout=20), grpc.RpcError)
    saw("method-not-found", said)


FORK = """
import os, sys, threading
import grpc
call = grpc.insecure_channel(sys.argv[1]).unary_unary("/test.Echo/Say").future(b"", timeout=20)
waiting = threading.Thread(target=call.exception, daemon=True)
waiting.start()
while not call.running():
    pass
if child := os.fork():
    os.kill(child, 9)
os._exit(1)
"""


def test_fork() -> None:
    """A process is forked while a thread of it waits for an answer; whether it hangs is luck."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        saw("grpc-after-a-fork", run(sys.executable, "-c", FORK, target))


# --- Gateway -------------------------------------------------------------------------------------


class HostOfPictures(WebHost):
    """A host that refuses programs."""

    def do_GET(self) -> None:
        self.answer(403)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The gateway in this process; what a test changes in it is as before in the end."""
    import gateway

    def forget() -> None:
        for each in (gateway.connect, gateway.get_signature, gateway.check_sample):
            each.cache_clear()

    forget()
    yield gateway
    forget()


def detail(answer: Any, status: int) -> str:
    """Return the sentence of a problem."""
    assert answer.status_code == status, answer.text
    return answer.get_json(force=True)["detail"]


def post(gateway: Any, **request: Any) -> Any:
    return gateway.app.test_client().post("/predict", **request)


PICTURE = {"data": SAMPLES[0].read_bytes(), "content_type": "image/png"}


def test_gateway_without_a_model_server(
    gateway: Any, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    monkeypatch.setattr(gateway, "TF_SERVING_HOST", closed)
    saw("the-model-server-gives-no-answer", detail(post(gateway, **PICTURE), 503))


def test_gateway_and_its_model(
    gateway: Any, monkeypatch: pytest.MonkeyPatch, model_server: Server, tmp_path: Path
) -> None:
    client = gateway.app.test_client()
    monkeypatch.setattr(gateway, "TF_SERVING_HOST", model_server.grpc)
    with monkeypatch.context() as change:
        change.setattr(gateway, "MODEL_NAME", "clothes")
        saw("the-model-server-has-no-model-of-this-name", detail(client.get("/readyz"), 503))
    with monkeypatch.context() as change:
        # The picture of a dress under another name: the model seems to err.
        (dress,) = gateway.MODEL.samples
        other = describe_model(tmp_path / "model.json", samples=[])
        read = description.read(other)._replace(samples=[dress._replace(label="hat")])
        change.setattr(gateway, "MODEL", read)
        saw("the-model-does-not-suit", detail(client.get("/readyz"), 503))
    ask = gateway.ask
    monkeypatch.setattr(gateway, "ask", lambda batch, signature, _: ask(batch, signature, 0.0))
    saw("the-model-server-is-too-slow", detail(post(gateway, **PICTURE), 504))


def test_links(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = post(gateway, json={"url": "http://127.0.0.1/dress.png"})
    saw("a-link-must-not-lead-to-a-private-address", detail(answer, 400))
    with serve(HostOfPictures) as host:
        monkeypatch.setattr(gateway.links, "ALLOWED_IMAGE_HOSTS", {host})
        answer = post(gateway, json={"url": f"http://{host}/dress.png"})
    saw("a-host-answers-403", detail(answer, 502))


def test_files_that_are_refused(
    gateway: Any, monkeypatch: pytest.MonkeyPatch, model_server: Server
) -> None:
    monkeypatch.setattr(gateway, "TF_SERVING_HOST", model_server.grpc)
    answer = post(gateway, data=b"<!DOCTYPE html><html></html>", content_type="image/png")
    saw("the-link-leads-to-a-web-page", detail(answer, 415))
    answer = post(gateway, data=bytes(10_000_001), content_type="image/png")
    saw("the-picture-is-too-big", detail(answer, 413))
    monkeypatch.setattr(gateway.web, "GATEWAY_API_KEY", "secret")
    saw("no-key-or-a-wrong-one", detail(post(gateway, **PICTURE), 401))


def test_no_description() -> None:
    said = error_of(lambda: description.read("build/nowhere/model.json"), ValueError)
    saw("there-is-no-description-of-the-model", said)


# --- Kubernetes, autoscaling, and a cluster on AWS -----------------------------------------------


def test_kubectl_without_a_cluster() -> None:
    """As long as nobody here listens at a port that kubectl takes for a cluster's."""
    if servers.is_busy(8080):
        pytest.skip("somebody listens at localhost:8080")
    saw("connection-to-localhost-8080-refused", run(*KUBECTL, "get", "pods"))


def test_named_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("WORKBOOK_CONTEXT", "nobody")
    monkeypatch.delenv("WORKBOOK_ENGINE", raising=False)
    monkeypatch.delenv("IMAGE_LOADER", raising=False)
    said = error_of(lambda: cluster.choose_cluster("auto"), RuntimeError)
    saw("the-named-cluster-does-not-answer", said)
    said = error_of(lambda: cluster.load_command("ping:001"), RuntimeError)
    saw("no-way-for-an-image-into-the-cluster", said)


def test_pods_that_do_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a rehearsal, whose words are compared with kubectl's in test_kubectl.py."""
    monkeypatch.chdir(ROOT)
    rendered = subprocess.check_output([KUBECTL[0], "kustomize", "kube-config/ping"])
    objects = list(yaml.safe_load_all(rendered))
    (deployment,) = (each for each in objects if each["kind"] == "Deployment")
    deployment["spec"]["replicas"] = 1
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    kubectl = Kubectl(cluster.Cluster("embedded", "asked for"), "ping")

    def table(kinds: str) -> str:
        capsys.readouterr()
        kubectl(f"get {kinds}")
        return capsys.readouterr().out

    try:
        assert kubectl.rehearsal is not None
        kubectl.rehearsal.apply(objects)
        eventually(lambda: "ErrImagePull" in table("pods"), "the image is missed")
        saw("errimagepull", table("pods"))
        saw("a-service-without-endpoints", table("endpointslices"))
        kubectl.load("ping:001", "kube-config/ping/Dockerfile", context="kube-config/ping")
        container["command"] = ["false"]
        kubectl.rehearsal.apply(objects)
        eventually(lambda: "CrashLoop" in table("pods"), "the command has ended twice")
        saw("crashloopbackoff", table("pods"))
    finally:
        kubectl.close()


GROUP = {"groupVersion": "autoscaling/v2", "version": "v2"}
VERBS = {"namespaced": True, "singularName": "", "verbs": ["get", "list", "create", "patch"]}
METRIC = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 60}}
NEW_AUTOSCALER = {
    "apiVersion": "autoscaling/v2",
    "kind": "HorizontalPodAutoscaler",
    "metadata": {"name": "gateway", "namespace": "default"},
    "spec": {
        "scaleTargetRef": {"kind": "Deployment", "name": "gateway"},
        "maxReplicas": 3,
        "metrics": [{"type": "Resource", "resource": METRIC}],
    },
    "status": {"desiredReplicas": 0, "currentMetrics": None},
}


class Api(WebHost):
    """As much of a cluster's API as kubectl asks for; without metrics, like a new Kind cluster."""

    status = 200
    answers: ClassVar[dict[str, object]] = {
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {
            "kind": "APIGroupList",
            "groups": [{"name": "autoscaling", "versions": [GROUP], "preferredVersion": GROUP}],
        },
        "/api/v1": {
            "kind": "APIResourceList",
            "groupVersion": "v1",
            "resources": [{"name": "pods", "kind": "Pod", **VERBS}],
        },
        "/apis/autoscaling/v2": {
            "kind": "APIResourceList",
            "groupVersion": "autoscaling/v2",
            "resources": [
                {"name": "horizontalpodautoscalers", "kind": "HorizontalPodAutoscaler", **VERBS}
            ],
        },
        "/apis/autoscaling/v2/namespaces/default/horizontalpodautoscalers/gateway": NEW_AUTOSCALER,
        "/api/v1/namespaces/default/events": {"kind": "EventList", "apiVersion": "v1", "items": []},
    }

    def do_GET(self) -> None:
        known = self.answers.get(self.path.partition("?")[0])
        status = 404 if self.status == 200 and known is None else self.status
        reason = {200: "", 401: "Unauthorized", 404: "NotFound"}[status]
        failure: dict[str, object] = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        failure |= {"reason": reason, "message": reason, "code": status}
        body = json.dumps(known if status == 200 else failure).encode()
        self.answer(status, body, Content_Type="application/json")


class Closed(Api):
    """The API of a cluster that does not know us."""

    status = 401


def test_kubectl_and_an_api(tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(json.dumps(NEW_AUTOSCALER | {"apiVersion": "autoscaling/v2beta2"}))
    words = [*KUBECTL, f"--cache-dir={tmp_path}"]
    with serve(Api) as address:
        words.append(f"--server=http://{address}")
        describe = [*words, "describe", "horizontalpodautoscaler", "gateway"]
        saw("the-hpa-shows-unknown", subprocess.check_output(describe, text=True))
        saw("metrics-api-not-available", run(*words, "top", "pods"))
        saw("no-matches-for-kind", run(*words, "apply", "--validate=false", f"--filename={old}"))
    with serve(Closed) as address:
        words[-1] = f"--server=http://{address}"
        saw("unauthorized-at-an-eks-cluster", run(*words, "get", "pods"))


# --- AWS -----------------------------------------------------------------------------------------


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials anywhere, and no instance to ask for some."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_no_credentials(no_account: None) -> None:
    import boto3

    from eks import account

    sts = boto3.client("sts", region_name="eu-west-1")
    said = error_of(sts.get_caller_identity)
    ours = error_of(lambda: account.connect(account.Cluster.read()), account.Problem)
    saw("unable-to-locate-credentials", said, ours)


def test_agreed_without_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = error_of(lambda: cloud.choose(True, "auto", ()), RuntimeError)
    saw("something-is-missing-for-the-real-aws", said)


class AskingRegistry(WebHost):
    """A registry that wants a login, as ECR does."""

    def do_GET(self) -> None:
        self.answer(401, WWW_Authenticate='Basic realm="registry"')

    do_HEAD = do_GET


@pytest.mark.docker
def test_registry_without_a_login(daemon: str) -> None:
    with serve(AskingRegistry) as address:
        saw("no-basic-auth-credentials", run(daemon, "pull", f"{address}/clothing-gateway:001"))


def test_vpc_in_use(no_account: None) -> None:
    import boto3
    from moto import mock_aws

    with mock_aws():
        ec2 = boto3.client("ec2", region_name="eu-west-1")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")
        said = error_of(lambda: ec2.delete_vpc(VpcId=vpc))
    saw("a-load-balancer-blocks-the-deletion", said)


# --- Your machine --------------------------------------------------------------------------------


def test_proxy(monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://{closed}")
    said = error_of(lambda: requests.get("http://localhost:9696/livez", timeout=20))
    saw("a-proxy-is-in-the-way", said)


def test_line_endings(tmp_path: Path) -> None:
    script = tmp_path / "setup.sh"
    script.write_bytes((ROOT / "workbook/setup.sh").read_bytes().replace(b"\n", b"\r\n"))
    saw("windows-has-changed-the-line-endings", run("sh", script, cwd=tmp_path))
