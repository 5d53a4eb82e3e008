"""Servers, models and pictures that the tests share: all real, all on loopback."""

import fcntl
import io
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
from PIL import Image

if TYPE_CHECKING:
    from hostile.namespace import Namespace

# What a shell starts in the background ignores Ctrl-C, and what the tests start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
CLASSES = (ROOT / "model_server/classes.txt").read_text().split()
SAMPLES = [ROOT / f"notebooks/samples/{name}.png" for name in CLASSES]
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
PORTS = itertools.cycle(random.sample(range(11000 + 5000 * WORKER, 16000 + 5000 * WORKER), 5000))
# What cameras do to a picture, by the number that they note for it in the EXIF data.
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def free_port() -> int:
    """Find a port that nobody listens at, among those that this worker alone gives away.

    Systems take the ports of outgoing connections, and those that programs leave to them, from
    32768 on: such a port can be taken again before the program that it is for has started.
    """
    for port in PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: the ports never end")


def copy_of_root(folder: Path) -> Path:
    """Copy what a clone has; what runs in the copy shares no `build/` with anything else."""
    names = (".git", ".venv", ".tools", ".*cache", ".hypothesis", "build", "bench", "tests")
    return Path(shutil.copytree(ROOT, folder / "root", ignore=shutil.ignore_patterns(*names)))


def processes_with(mark: str) -> list[list[str]]:
    """The command lines of those processes that have inherited TEST_MARK."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_MARK") == mark:
                found.append(process.cmdline())
        except (psutil.Error, OSError):
            continue
    return found


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return a picture as a file of this kind."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(image: Image.Image, orientation: int, kind: str = "PNG") -> bytes:
    """Return a picture as a camera stores it that was held in one of the eight ways."""
    turn = TURNS.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image if turn is None else image.transpose(turn), kind, exif=exif)


@dataclass
class Addresses:
    """Where a server answers."""

    http: str
    grpc: str = ""


@dataclass
class Server(Addresses):
    """A process under test, with the addresses where it answers and the file that it logs to."""

    process: subprocess.Popen = field(kw_only=True)
    log: Path = field(kw_only=True)

    def stop(self) -> int:
        """End the process with SIGTERM and return its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=60)


class WebHost(BaseHTTPRequestHandler):
    """What the web servers of the tests have in common: they are brief, and say nothing here."""

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole answer, if anybody still waits for it."""
        with suppress(OSError):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)


class Web(ThreadingHTTPServer):
    """A web server that many may ask at once."""

    request_queue_size = 128


@contextmanager
def serve(host: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a web server on loopback, and give its address, such as 127.0.0.1:12345."""
    with Web(("127.0.0.1", 0), host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def wait_until_ready(server: Server, url: str, ready: Callable[[bytes], bool]) -> None:
    """Poll ``url`` until ``ready`` says yes to the body; fail with the log when it never does."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if ready(response.read()):
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.05)
    pytest.fail(f"{url} never became ready; the log says:\n{server.log.read_text()}")


def wait_until_available(server: Server, model_name: str) -> None:
    """Wait until a version of a model is AVAILABLE."""
    status = f"{server.http}/v1/models/{model_name}"
    wait_until_ready(server, status, lambda body: b'"AVAILABLE"' in body)


def eventually(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Poll until a condition holds, and return its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"never came true: {what}")


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """Return status and message of a gRPC call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), str(caught.value.details())


def predict_request(model_name: str, signature_name: str = "", **inputs: Any) -> Any:
    """Make a ``PredictRequest`` of arrays or TensorProtos."""
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    request = predict_pb2.PredictRequest()
    request.model_spec.name = model_name
    request.model_spec.signature_name = signature_name
    for alias, value in inputs.items():
        proto = value if hasattr(value, "tensor_shape") else tf.make_tensor_proto(value)
        request.inputs[alias].CopyFrom(proto)
    return request


class Client:
    """The stubs of both services of a running model server, which speak of one model."""

    def __init__(self, server: Addresses, model_name: str):
        from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

        self.model_name = model_name
        self.channel = grpc.insecure_channel(
            server.grpc,
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.channel.close()

    def request(self, signature_name: str = "", **inputs: Any) -> Any:
        return predict_request(self.model_name, signature_name, **inputs)

    def predict(self, signature_name: str = "", **inputs: Any) -> Any:
        return self.prediction.Predict(self.request(signature_name, **inputs))

    def statuses(self) -> Any:
        from tensorflow_serving.apis import get_model_status_pb2

        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = self.model_name
        return self.models.GetModelStatus(request).model_version_status

    def states(self) -> dict[int, str]:
        """Return the state of each version, such as AVAILABLE."""
        return {each.version: each.State.Name(each.state) for each in self.statuses()}

    def wait_for(self, version: int, state: str) -> None:
        """Wait until a version is in a state."""
        eventually(lambda: self.states().get(version) == state, f"{version} is {state}")

    def error_of(self, version: int) -> Any:
        """Wait until a version has failed to load, and return its error status."""

        def failed() -> Any:
            for each in self.statuses():
                if (each.version, each.State.Name(each.state)) == (version, "END"):
                    return each.status if each.status.error_code else None
            return None

        return eventually(failed, f"{version} has failed")

    def serve(self, base_path: Path, *versions: int) -> Any:
        """Have the server serve this model and no other, with these versions or the newest.

        It looks at the base path at once, and answers when it has loaded what is new there.
        """
        return self.reload({self.model_name: base_path}, *versions)

    def reload(self, models: dict[str, Path], *versions: int) -> Any:
        """Have the server serve these models and no others, each from its base path."""
        from tensorflow_serving.apis import model_management_pb2

        request = model_management_pb2.ReloadConfigRequest()
        for name, base_path in models.items():
            config = request.config.model_config_list.config.add(
                name=name, base_path=str(base_path), model_platform="tensorflow"
            )
            if versions:
                config.model_version_policy.specific.versions.extend(versions)
        return self.models.HandleReloadConfigRequest(request, timeout=60)


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start processes that log to a file; every one is ended when the tests are over."""
    servers: list[Server] = []

    def start(command: list[str], http: str, grpc: str = "", **env: str) -> Server:
        log = tmp_path_factory.mktemp("server") / "log.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=stream, env={**os.environ, **env}
            )
        server = Server(http, grpc, process=process, log=log)
        servers.append(server)
        return server

    yield start
    for server in servers:  # all are told to end, then all are waited for
        server.process.terminate()
    for server in servers:
        server.process.wait(timeout=60)


@pytest.fixture(scope="session")
def start_model_server(launch: Callable[..., Server]) -> Callable[..., Server]:
    """Start ``python -m model_server`` on free ports and wait until its model is AVAILABLE."""

    def start(
        base_path: Path,
        *flags: str,
        model_name: str = "clothing-model",
        ports: tuple[int, int] | None = None,
        wait: bool = True,
        **env: str,
    ) -> Server:
        grpc_port, rest_port = ports or (free_port(), free_port())
        server = launch(
            [
                *(sys.executable, "-m", "model_server"),
                *(f"--port={grpc_port}", f"--rest_api_port={rest_port}"),
                *(f"--model_name={model_name}", f"--model_base_path={base_path}", *flags),
            ],
            http=f"http://127.0.0.1:{rest_port}",
            grpc=f"127.0.0.1:{grpc_port}",
            **env,
        )
        if wait:
            wait_until_available(server, model_name)
        return server

    return start


@pytest.fixture(scope="session")
def start_gateway(launch: Callable[..., Server]) -> Callable[..., Server]:
    """Start the gateway under gunicorn on a free port and wait until ``/livez`` answers."""

    def start(tf_serving_host: str, **env: str) -> Server:
        port = free_port()
        server = launch(
            [
                *(sys.executable, "-m", "gunicorn", "--threads", "8"),
                *("--bind", f"127.0.0.1:{port}", "gateway:app"),
            ],
            http=f"http://127.0.0.1:{port}",
            TF_SERVING_HOST=tf_serving_host,
            **{"DRAIN_SECONDS": "0", **env},
        )
        wait_until_ready(server, f"{server.http}/livez", lambda body: True)
        return server

    return start


@pytest.fixture(scope="session")
def model_server(start_model_server: Callable[..., Server], tiny_model: Path) -> Server:
    """A model server with the tiny model."""
    return start_model_server(tiny_model, "--enable_grpc_healthcheck_service")


@pytest.fixture(scope="module")
def serve_model(model_server: Server, tiny_model: Path) -> Iterator[Callable[[str, Path], Server]]:
    """Let the server of the tiny model serve one more model while the tests of a file run."""
    with Client(model_server, "clothing-model") as client:

        def serve_model(name: str, base_path: Path) -> Server:
            client.reload({client.model_name: tiny_model, name: base_path})
            return model_server

        yield serve_model
        client.serve(tiny_model)


@pytest.fixture(scope="session")
def clothing_server(start_model_server: Callable[..., Server], clothing_model: Path) -> Server:
    """A model server with the bundled model."""
    return start_model_server(clothing_model)


@pytest.fixture(scope="session")
def closed() -> str:
    """An address where nobody listens."""
    return f"localhost:{free_port()}"


@pytest.fixture(scope="module")
def namespace() -> "Iterator[Namespace]":
    """A network namespace, a place that nothing leaves, with a hostile internet in it."""
    from hostile.namespace import Namespace

    with Namespace() as namespace:
        yield namespace


def export(base_path: Path, **parameters: object) -> Path:
    """Run lesson 01 with these parameters; return ``base_path``, which then holds version 1."""
    import papermill

    ports = {"GRPC_PORT": free_port(), "REST_PORT": free_port()}
    papermill.execute_notebook(
        ROOT / "notebooks/01-saved-model.ipynb",
        base_path.parent / "01-saved-model.ipynb",
        parameters={"EXPORT_DIR": str(base_path), **ports, **parameters},
        cwd=ROOT,
        kernel_name="python3",
        progress_bar=False,
    )
    return base_path


@pytest.fixture(scope="session")
def clothing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base path of the bundled model, exported by lesson 01 once for all workers.

    It is shared: whoever wants to change it takes a copy.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    finished = folder / "lesson-01"
    with (folder / "lesson-01.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            making = tmp_path_factory.mktemp("lesson-01")
            export(making / "clothing-model")
            making.rename(finished)
    return finished / "clothing-model"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base path with version 1 of a 32 × 32 classifier with random weights."""
    import tensorflow as tf

    base_path = tmp_path_factory.mktemp("tiny-model")
    module = tf.Module()
    module.weights = tf.Variable(tf.random.stateless_normal([32 * 32 * 3, 10], seed=[1, 2]) / 30)

    @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.float32, name="inputs")])
    def serve(inputs):
        return {
            "probabilities": tf.nn.softmax(tf.reshape(inputs, [-1, 32 * 32 * 3]) @ module.weights)
        }

    tf.saved_model.save(module, str(base_path / "1"), signatures={"serving_default": serve})
    return base_path
