"""Faults: files that come late or go, a process that is killed, requests that are garbage."""

import contextlib
import gzip
import http.client
import io
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.basics import eventually, free_port
from helpers.counter import NAME, ZERO, export_counter, hammering, number, warm_up_request
from helpers.model_server import ask
from helpers.servers import Server, wait_until_available
from helpers.serving import Client, refused
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import get_model_metadata_pb2
from werkzeug.test import EnvironBuilder

from model_server import json_workers, rest_api
from model_server.errors import ServingError

Code = grpc.StatusCode


def export_large(path: Path, number: int) -> Path:
    """Save a model that answers with its number, and has a megabyte of weights."""
    module = tf.Module()
    module.weights = tf.Variable(tf.fill([250_000], float(number)))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def mean(x):
        return {"number": tf.cast(tf.fill(tf.shape(x), module.weights[-1]), tf.int32)}

    tf.saved_model.save(module, str(path), signatures=mean)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1 and 2 that wait to be copied."""
    path = tmp_path_factory.mktemp("exported")
    for version in (1, 2):
        export_large(path / str(version), version)
    return path


COPY = """
import resource, shutil, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
shutil.copytree(sys.argv[1], sys.argv[2])
"""


def copy_until_disk_is_full(source: Path, target: Path) -> None:
    """Copy a version in a process that may write no more than 300 kB to a file."""
    command = [sys.executable, "-c", COPY, str(source), str(target)]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    assert [file.stat().st_size for file in target.rglob("variables.data*")] == [300_000]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
    exported: Path,
    start_model_server: Callable[..., Server],
) -> Iterator[Server]:
    """A server whose first version is half copied when it looks, and complete later."""
    base_path = tmp_path_factory.mktemp("base")
    copy_until_disk_is_full(exported / "1", base_path / "1")
    server = start_model_server(base_path, model_name=NAME, wait=False)
    eventually(lambda: "cannot load version 1" in server.log.read_text(), "1 has failed")
    assert server.process.poll() is None
    shutil.copytree(exported / "1", base_path / "1", dirs_exist_ok=True)
    wait_until_available(server, NAME)
    yield server
    server.stop()


@pytest.fixture
def base_path(exported: Path, tmp_path: Path) -> Path:
    """A base path of the test's own, with version 1."""
    shutil.copytree(exported / "1", tmp_path / "base" / "1")
    return tmp_path / "base"


@pytest.fixture
def client(server: Server, base_path: Path, tmp_path: Path) -> Iterator[Client]:
    """A client of a model of the test's own, which is the only one that the server has now."""
    with Client(server, tmp_path.name) as client:
        client.serve(base_path)
        yield client


def test_version_that_was_half_copied_is_served_once_complete(
    server: Server, client: Client, base_path: Path, exported: Path
) -> None:
    with hammering(server, client.model_name) as answers:
        copy_until_disk_is_full(exported / "2", base_path / "2")
        assert "2" in client.error_of(2).error_message
        assert number(client.predict(x=ZERO)) == 1
        shutil.copytree(exported / "2", base_path / "2", dirs_exist_ok=True)
        # Long before the next attempt is due, which is a minute after the first.
        client.wait_for(2, "AVAILABLE")
        client.wait_for(1, "END")
        assert number(client.predict(x=ZERO)) == 2
    assert all(own == sorted(own) for own in answers)


def test_files_of_a_version_that_is_served_may_go(
    server: Server, client: Client, base_path: Path, exported: Path
) -> None:
    with hammering(server, client.model_name) as answers:
        for file in (base_path / "1").rglob("*"):
            if file.is_file():
                file.unlink()
        assert number(client.predict(x=ZERO)) == 1
        shutil.copytree(exported / "2", base_path / "partial")
        (base_path / "partial").rename(base_path / "2")
        client.wait_for(2, "AVAILABLE")
        shutil.rmtree(base_path / "1")
    assert {own[-1] for own in answers} <= {1, 2}


def test_20_reloads_without_a_failed_request(
    server: Server, client: Client, base_path: Path, exported: Path
) -> None:
    shutil.copytree(exported / "2", base_path / "2")
    with hammering(server, client.model_name, clients=2) as answers:
        for version in itertools.islice(itertools.cycle((1, 2)), 20):
            client.serve(base_path, version)
            assert number(client.predict(x=ZERO)) == version
    assert all(set(own) == {1, 2} for own in answers)
    assert client.states() == {1: "END", 2: "AVAILABLE"}


def test_1000_malformed_requests(server: Server, client: Client) -> None:
    chance = random.Random(7)
    ports = [int(address.rpartition(":")[2]) for address in (server.http, server.grpc)]
    methods = [
        *(f"PredictionService/{name}" for name in ("Predict", "Classify", "Regress")),
        *("PredictionService/MultiInference", "PredictionService/GetModelMetadata"),
        *("ModelService/GetModelStatus", "ModelService/HandleReloadConfigRequest"),
    ]
    whole = json.dumps({"inputs": {"x": [1.0, 2.0]}}).encode()

    def spoilt(body: bytes, turn: int) -> bytes:
        """Change some bytes, and cut every other one short."""
        changed = bytearray(body[: chance.randrange(1, len(body))] if turn % 2 else body)
        for _ in range(4):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)

    def broken_http(noise: bytes) -> None:
        with socket.create_connection(("127.0.0.1", ports[len(noise) % 2]), 10) as connection:
            connection.sendall(noise)

    def broken_protobuf(method: str, body: bytes) -> grpc.StatusCode:
        call = client.channel.unary_unary(f"/tensorflow.serving.{method}", bytes, bytes)
        try:
            call(body, timeout=10)
        except grpc.RpcError as error:
            return error.code()
        return Code.OK

    def broken_json(method: str, body: bytes) -> int:
        status, answer = ask(f"{server.http}/v1/models/{client.model_name}:{method}", body)
        assert status == 200 or answer.keys() == {"error"}
        return status

    noise = [chance.randbytes(chance.randrange(1, 400)) for _ in range(300)]
    calls = []
    for turn, method in zip(range(400), itertools.cycle(methods), strict=False):
        body = spoilt(client.request(x=ZERO).SerializeToString(), turn)
        # What is by chance a whole config would be obeyed: no field of type 7 can be.
        calls.append((method, b"\x07" + body if "Reload" in method else body))
    verbs = itertools.cycle(("predict", "classify", "regress"))
    posts = [(verb, spoilt(whole, turn)) for turn, verb in zip(range(300), verbs, strict=False)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(broken_http, noise))
        codes = set(pool.map(broken_protobuf, *zip(*calls, strict=True)))
        statuses = set(pool.map(broken_json, *zip(*posts, strict=True)))
    assert codes <= {
        *(Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION),
        *(Code.INTERNAL, Code.UNIMPLEMENTED),  # what gRPC says of bytes that are no message
    }
    assert {Code.INTERNAL, Code.NOT_FOUND} <= codes
    assert {400} <= statuses <= {200, 400, 404}
    assert number(client.predict(x=ZERO)) == 1
    assert client.states() == {1: "AVAILABLE"}
    answer = ask(f"{server.http}/v1/models/{client.model_name}:predict", whole)
    assert answer == (200, {"outputs": [1, 1]})
    assert "Traceback" not in server.log.read_text()


def test_body_that_never_comes_holds_up_nobody(server: Server, client: Client) -> None:
    port = int(server.http.rpartition(":")[2])
    path = f"/v1/models/{client.model_name}"
    waiting = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(40)]
    for connection in waiting:
        connection.putrequest("POST", f"{path}:predict")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b'{"inputs"')
    assert ask(f"{server.http}{path}")[0] == 200
    for connection in waiting:
        connection.close()


def test_connections_that_are_only_held_shut_out_nobody(server: Server, client: Client) -> None:
    port = int(server.http.rpartition(":")[2])
    path = f"/v1/models/{client.model_name}"
    with ExitStack() as held:

        def connect() -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            held.callback(connection.close)
            return connection

        for number in range(1100):
            connection = connect()
            if number % 2:  # it has had its answer, and is kept alive
                connection.request("GET", path)
                assert connection.getresponse().read()
            else:  # it has sent half of a request
                connection.putrequest("POST", f"{path}:predict")
                connection.putheader("Content-Length", "1000")
                connection.endheaders(b'{"inputs"')
        last = connect()
        last.request("GET", path)
        assert last.getresponse().status == 200
        # The newest of them are still there.
        connection.request("GET", path)
        assert connection.getresponse().status == 200


def long_body(count: int) -> bytes:
    """Make a body of many numbers, which a process of its own reads."""
    return json.dumps({"inputs": [0.5] * count}).encode()


def test_long_json_is_read_and_written_by_processes_that_come_and_go(
    server: Server, client: Client
) -> None:
    url = f"{server.http}/v1/models/{client.model_name}:predict"
    assert ask(url, long_body(50_000)) == (200, {"outputs": [1] * 50_000})
    assert ask(url, b" " * 10**5 + b"{")[0] == 400
    assert ask(url.replace(client.model_name, "nobody"), long_body(50_000))[0] == 404
    (worker,) = psutil.Process(server.process.pid).children()
    assert worker.nice() == min(psutil.Process(server.process.pid).nice() + 10, 19)
    # Linux may share cores out among sessions before it looks at how nice a process is.
    assert os.getsid(worker.pid) == os.getsid(server.process.pid)
    assert os.getpgid(worker.pid) != os.getpgid(server.process.pid)  # where Ctrl-C is sent
    worker.suspend()
    with ThreadPoolExecutor(1) as pool:
        # Where there is no such model, nothing is left to do but to read the body.
        lost = pool.submit(ask, url.replace(client.model_name, "nobody"), long_body(50_000))
        try:
            assert number(client.predict(x=ZERO)) == 1
            assert ask(url, b'{"inputs": [0.5]}') == (200, {"outputs": [1]})
            assert not lost.done()  # nobody but that process reads it
        finally:
            worker.kill()
    status, answer = lost.result()
    # Where the process was dead before it was asked, another one has answered.
    assert status == 404 or (status, answer["error"][:49]) == (
        503,
        "the process that reads long JSON has ended; it ma",
    )
    assert ask(url, long_body(50_000))[0] == 200
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda count: ask(url, long_body(count)), range(30_000, 30_016)))
    assert [len(answer["outputs"]) for _, answer in answers] == [*range(30_000, 30_016)]
    assert 1 <= len(psutil.Process(server.process.pid).children()) <= max(2, os.cpu_count() or 1)


class _Body(io.BytesIO):
    """A body that notes how many bytes of it are asked for at a time."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self.asked: list[int] = []

    def read(self, size: int | None = -1) -> bytes:
        self.asked.append(-1 if size is None else size)
        return super().read(size)


def json_processes() -> list[psutil.Process]:
    """The processes of this one that read and write JSON."""
    children = psutil.Process().children()
    return [each for each in children if "model_server.json_workers" in each.cmdline()]


def test_short_json_is_read_and_written_here_and_long_json_elsewhere() -> None:
    with contextlib.closing(json_workers.JsonWorkers()) as workers:
        with workers.for_body(iter([b'{"inputs": 1}'])) as call:
            assert call("parse") == ""
        outputs = {"y": np.zeros(100, np.float32)}
        with workers.for_outputs(outputs) as call:
            assert json.loads(call("format_columns", outputs)) == {"outputs": [0.0] * 100}
        assert json_processes() == []
    for long in (
        lambda workers: workers.for_body(iter([long_body(50_000)])),
        lambda workers: workers.for_outputs({"y": np.zeros(50_000)}),
        lambda workers: workers.for_outputs({"y": np.array([b"a" * 500_000], object)}),
    ):
        with contextlib.closing(json_workers.JsonWorkers()) as workers, long(workers):
            assert len(json_processes()) == 1
        assert json_processes() == []


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_long_json_is_taken_in_pieces_and_forgotten(encoding: str) -> None:
    content = long_body(200_000)
    body = _Body(gzip.compress(content) if encoding == "gzip" else content)
    headers = [("Content-Encoding", encoding)]
    request = EnvironBuilder("/", method="POST", input_stream=body, headers=headers).get_request()
    request.environ["wsgi.input_terminated"] = True  # as waitress says
    workers = json_workers.JsonWorkers()
    with contextlib.closing(workers):
        pieces = [*rest_api.body_pieces(request)]
        assert {len(piece) for piece in pieces[:-1]} == {json_workers.PIECE_BYTES}
        with workers.for_body(iter(pieces)) as call:
            assert call("parse") == ""
            inputs, in_rows = call("inputs", {"x": types_pb2.DT_FLOAT})
        assert not in_rows
        np.testing.assert_array_equal(inputs["x"], np.full(200_000, 0.5, np.float32))
        # A copy of all of it at once would hold up the server's other threads.
        assert 1 <= min(body.asked) <= max(body.asked) <= json_workers.PIECE_BYTES
        # The same process, which has come back, holds no memory for what it has read.
        with (
            workers.for_outputs({"y": np.zeros(10_000)}) as call,
            pytest.raises(ServingError, match="Missing 'inputs' or 'instances' key"),
        ):
            call("inputs", {"x": types_pb2.DT_FLOAT})


def test_version_without_read_permission(client: Client, base_path: Path, exported: Path) -> None:
    shutil.copytree(exported / "2", base_path / "partial")
    (base_path / "partial" / "saved_model.pb").chmod(0)
    if os.access(base_path / "partial" / "saved_model.pb", os.R_OK):
        pytest.skip("root may read every file: run the tests as another user")
    (base_path / "partial").rename(base_path / "2")
    assert client.error_of(2).error_code == Code.PERMISSION_DENIED.value[0]
    assert number(client.predict(x=ZERO)) == 1
    (base_path / "2" / "saved_model.pb").chmod(0o644)
    client.wait_for(2, "AVAILABLE")


@pytest.fixture(scope="module")
def restarted(
    tmp_path_factory: pytest.TempPathFactory, start_model_server: Callable[..., Server]
) -> Iterator[Server]:
    """A server with one thread for gRPC, whose predecessor was killed while it loaded."""
    base_path = tmp_path_factory.mktemp("restarted")
    export_counter(base_path / "1", 1, [warm_up_request("wait", seconds=np.float64(1))])
    files = {file: file.stat().st_mtime_ns for file in base_path.rglob("*")}
    start = partial(
        start_model_server,
        *(base_path, "--grpc_max_threads=1", "--enforce_session_run_timeout"),
        "--enable_grpc_healthcheck_service",
        model_name=NAME,
        ports=(free_port(), free_port()),
    )
    killed = start(wait=False)
    eventually(lambda: "loading version 1" in killed.log.read_text(), "it loads")
    killed.process.kill()
    killed.process.wait()
    assert "is open on port" not in killed.log.read_text()
    server = start()
    assert ask(f"{server.http}/v1/models/{NAME}:predict", long_body(50_000))[0] == 200
    workers = psutil.Process(server.process.pid).children()
    assert len(workers) == 1
    assert {file: file.stat().st_mtime_ns for file in base_path.rglob("*")} == files
    yield server
    assert server.stop() == 0
    assert not psutil.wait_procs(workers, 10)[1], "they have outlived the server"


def test_killed_while_it_loads_and_started_again(restarted: Server) -> None:
    with Client(restarted, NAME) as client:
        assert number(client.predict(x=ZERO)) == 1
        assert client.states() == {1: "AVAILABLE"}


def test_grpc_max_threads(restarted: Server) -> None:
    with Client(restarted, NAME) as client:
        client.statuses()  # from now on the channel is open, and keeps the order of its calls
        order: list[str] = []
        predict = client.prediction.Predict
        slow = predict.future(client.request("wait", seconds=np.float64(1)))
        slow.add_done_callback(lambda _: order.append("slow"))
        quick = predict.future(client.request(x=ZERO))
        quick.add_done_callback(lambda _: order.append("quick"))
        assert number(quick.result()) == 1
        eventually(lambda: len(order) == 2, "both are done")
        assert order == ["slow", "quick"], "a second thread has answered"


def test_health_status_and_metadata_wait_for_no_prediction(restarted: Server) -> None:
    with Client(restarted, NAME) as client:
        client.statuses()  # from now on the channel is open, and keeps the order of its calls
        predict = client.prediction.Predict
        first = predict.future(client.request("wait", seconds=np.float64(1)))
        last = predict.future(client.request("wait", seconds=np.float64(3)))
        assert tf.make_ndarray(first.result().outputs["waited"]) >= 1
        # Now the only thread for predictions has the other one.
        health = health_pb2_grpc.HealthStub(client.channel)
        request = health_pb2.HealthCheckRequest()
        assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        watching = health.Watch(request)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        watching.cancel()
        assert client.states() == {1: "AVAILABLE"}
        metadata = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        metadata.model_spec.name = NAME
        assert client.prediction.GetModelMetadata(metadata).metadata
        assert not last.done()
        last.cancel()


def test_requests_are_given_up_at_their_deadline_when_asked_for(restarted: Server) -> None:
    with Client(restarted, NAME) as client:
        client.predict(x=ZERO)
        hour = client.request("wait", seconds=np.float64(3600))
        late = refused(lambda: client.prediction.Predict(hour, timeout=0.5))
        assert late[0] == Code.DEADLINE_EXCEEDED
        after = client.prediction.Predict(client.request(x=ZERO), timeout=60)
        assert number(after) == 1, "the only thread is free again"
