"""The embedded model server from its first flag to its last request: start, versions, stop."""

import json
import re
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, Server, free_port
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)

NAME = "counter"
State = get_model_status_pb2.ModelVersionStatus


def export_counter(path: Path, number: int, warm_up: list[bytes] | None = None) -> Path:
    """Save a model that answers with its number and its count of calls, whole or not at all.

    Its signature ``wait`` computes for as many seconds as it is told to.
    """
    module = tf.Module()
    module.calls = tf.Variable(0)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def count(x):
        return {"number": tf.fill(tf.shape(x), number), "calls": module.calls.assign_add(1)}

    @tf.function(input_signature=[tf.TensorSpec([], tf.float64, name="seconds")])
    def wait(seconds):
        begin = tf.timestamp()
        (end,) = tf.while_loop(
            lambda now: now - begin < seconds, lambda now: [tf.timestamp()], [begin]
        )
        return {"waited": end - begin}

    partial = path.with_name("partial")
    tf.saved_model.save(module, str(partial), signatures={"serving_default": count, "wait": wait})
    if warm_up is not None:
        (partial / "assets.extra").mkdir()
        with tf.io.TFRecordWriter(
            str(partial / "assets.extra" / "tf_serving_warmup_requests")
        ) as writer:
            for record in warm_up:
                writer.write(record)
    return partial.rename(path)


def predict_request(**inputs: Any) -> Any:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = NAME
    for alias, value in (inputs or {"x": np.zeros(1, np.float32)}).items():
        request.inputs[alias].CopyFrom(tf.make_tensor_proto(value))
    return request


def wait_request(seconds: float) -> Any:
    request = predict_request(seconds=np.float64(seconds))
    request.model_spec.signature_name = "wait"
    return request


def eventually(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Poll until a condition holds, and return its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"never came true: {what}")


class Client:
    """Both services of a running server."""

    def __init__(self, server: Server):
        self.channel = grpc.insecure_channel(server.grpc)
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def states(self) -> dict[int, int]:
        return {status.version: status.state for status in self.statuses()}

    def statuses(self) -> Any:
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = NAME
        return self.models.GetModelStatus(request).model_version_status

    def error_of(self, version: int) -> Any:
        """Return the error status of a version that has failed to load, None before that."""
        for status in self.statuses():
            if status.version == version and status.state == State.END and status.status.error_code:
                return status.status
        return None


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counter")
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.CopyFrom(predict_request())
    export_counter(path / "1", 1, [log.SerializeToString()] * 3)
    return path


@pytest.fixture(scope="module")
def server(base_path: Path, start_model_server: Callable[..., Server]) -> Iterator[Server]:
    server = start_model_server(
        base_path,
        *("--max_num_load_retries=0", "--num_request_iterations_for_warmup=2"),
        *("--enable_serialization_as_tensor_content", "--enable_profiler=true"),
        *("--rest_api_timeout_in_ms=300", "--tensorflow_inter_op_parallelism=2"),
        *("--grpc_channel_arguments=grpc.max_connection_age_ms=600000", "--num_load_threads", "2"),
        model_name=NAME,
    )
    yield server
    server.stop()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    client = Client(server)
    yield client
    client.channel.close()


# The tests with this server run in order: each goes on from the versions that the one before left.


def test_warm_up_has_run_before_the_first_request(client: Client) -> None:
    calls = client.prediction.Predict(predict_request()).outputs["calls"]
    assert tf.make_ndarray(calls) == 3 * 2 + 1


def test_flags(server: Server, client: Client) -> None:
    output = client.prediction.Predict(predict_request(x=np.zeros(3, np.float32))).outputs["number"]
    assert output.tensor_content == np.ones(3, np.int32).tobytes()
    assert not output.int_val
    log = server.log.read_text()
    assert "--enable_profiler has no effect" in log
    assert "--num_load_threads has no effect" in log


def test_log_is_quiet(server: Server) -> None:
    lines = server.log.read_text().splitlines()
    assert len(lines) < 10
    assert all(re.match(r"\d{4}-\d\d-\d\d [\d:,]+ (INFO|WARNING) ", line) for line in lines), lines


def test_rest_prediction_that_takes_too_long_is_504(server: Server) -> None:
    body = json.dumps({"signature_name": "wait", "inputs": 2.0}).encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{server.http}/v1/models/{NAME}:predict", body)
    with caught.value as error:
        assert error.code == 504
        assert "error" in json.load(error)


def test_new_version_takes_over_without_a_failed_request(
    server: Server, client: Client, base_path: Path
) -> None:
    enough = threading.Event()
    begun = threading.Barrier(5)

    def hammer(_: int) -> list[tuple[int, int]]:
        answers = []
        with grpc.insecure_channel(server.grpc) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            while not enough.is_set():
                response = stub.Predict(predict_request())
                number = tf.make_ndarray(response.outputs["number"])[0]
                answers.append((response.model_spec.version.value, int(number)))
                if len(answers) == 1:
                    begun.wait(30)
        return answers

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(hammer, number) for number in range(4)]
        try:
            begun.wait(30)
            slow = client.prediction.Predict.future(wait_request(3))
            export_counter(base_path / "2", 2)
            eventually(lambda: client.states().get(2) == State.AVAILABLE, "2 is AVAILABLE")
            eventually(lambda: client.states()[1] == State.END, "1 is END")
            assert slow.done(), "version 1 was unloaded while it answered a request"
        finally:
            enough.set()
        answers = [future.result() for future in running]
    assert slow.result().model_spec.version.value == 1
    for own in answers:
        assert all(version == number for version, number in own)
        assert own == sorted(own)
        assert {own[0][0], own[-1][0]} == {1, 2}
    assert [status.version for status in client.statuses()] == [2, 1]


def test_version_that_is_gone_answers_not_found(client: Client) -> None:
    request = predict_request()
    request.model_spec.version.value = 1
    with pytest.raises(grpc.RpcError) as caught:
        client.prediction.Predict(request)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def no_saved_model(path: Path) -> None:
    path.mkdir()


def a_file(path: Path) -> None:
    path.write_text("not a folder")


def truncated_graph(path: Path) -> None:
    partial = export_counter(path.with_name("whole"), 0)
    with (partial / "saved_model.pb").open("rb+") as file:
        file.truncate(500)
    partial.rename(path)


def truncated_variables(path: Path) -> None:
    partial = export_counter(path.with_name("whole"), 0)
    (partial / "variables" / "variables.data-00000-of-00001").write_bytes(b"")
    partial.rename(path)


def warm_up_that_fails(path: Path) -> None:
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.CopyFrom(predict_request(y=np.zeros(1, np.float32)))
    export_counter(path, 0, [log.SerializeToString()])


def warm_up_of_another_format(path: Path) -> None:
    whole = export_counter(path.with_name("whole"), 0, [])
    (whole / "assets.extra" / "tf_serving_warmup_requests").write_text("{}" * 100)
    whole.rename(path)


def warm_up_without_end(path: Path) -> None:
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.CopyFrom(predict_request())
    export_counter(path, 0, [log.SerializeToString()] * 1001)


@pytest.mark.parametrize(
    ("version", "spoil", "code", "message"),
    [
        (3, no_saved_model, "NOT_FOUND", "holds no saved_model.pb"),
        (4, a_file, "NOT_FOUND", "holds no saved_model.pb"),
        (5, truncated_graph, "DATA_LOSS", "saved_model.pb"),
        (6, truncated_variables, "OUT_OF_RANGE", "Read less bytes than requested"),
        (7, warm_up_that_fails, "INVALID_ARGUMENT", "input"),
        (8, warm_up_of_another_format, "DATA_LOSS", "TFRecord"),
        (9, warm_up_without_end, "INVALID_ARGUMENT", "exceeds the maximum (1000)"),
    ],
)
def test_broken_version_is_reported_and_the_good_one_stays(
    client: Client,
    base_path: Path,
    version: int,
    spoil: Callable[[Path], None],
    code: str,
    message: str,
) -> None:
    spoil(base_path / str(version))
    status = eventually(lambda: client.error_of(version), f"{version} has failed")
    assert status.error_code == getattr(grpc.StatusCode, code).value[0], status
    assert message in status.error_message
    assert client.prediction.Predict(predict_request()).model_spec.version.value == 2
    assert client.states()[2] == State.AVAILABLE


def test_versions_follow_the_base_path_back_and_down_to_none(
    client: Client, base_path: Path
) -> None:
    for number in range(2, 10):
        broken = base_path / str(number)
        broken.unlink() if broken.is_file() else shutil.rmtree(broken)
    eventually(lambda: client.states()[2] == State.END, "2 is END")
    assert client.prediction.Predict(predict_request()).model_spec.version.value == 1
    shutil.rmtree(base_path / "1")
    eventually(lambda: client.states()[1] == State.END, "1 is END")
    with pytest.raises(grpc.RpcError) as caught:
        client.prediction.Predict(predict_request())
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    export_counter(base_path / "2026112209300000000", 5)
    eventually(lambda: client.states().get(2026112209300000000) == State.AVAILABLE, "it is back")
    assert tf.make_ndarray(client.prediction.Predict(predict_request()).outputs["number"]) == [5]


def test_waits_for_a_first_version_and_says_where(
    tmp_path: Path, launch: Callable[..., Server]
) -> None:
    base_path, rest_port = tmp_path / "models", free_port()
    command = [sys.executable, "-m", "model_server", "--port=0", f"--rest_api_port={rest_port}"]
    command += [f"--model_name={NAME}", f"--model_base_path={base_path}"]
    server = launch(command, http=f"http://127.0.0.1:{rest_port}")

    def said(text: str) -> None:
        eventually(lambda: text in server.log.read_text(), text)

    said(f"base path {base_path} of model {NAME}: does not exist")
    (base_path / "latest").mkdir(parents=True)
    said(f"such as {base_path / '1'} (there is: latest)")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", rest_port)) != 0, "open before a model is there"
    export_counter(tmp_path / "whole", 1)
    for entry in (tmp_path / "whole").iterdir():
        entry.rename(base_path / entry.name)
    said(f"{base_path} is itself a SavedModel: give the folder above it as --model_base_path")
    export_counter(base_path / "1", 1)
    match = eventually(
        lambda: re.search(r"gRPC API is open on port (\d+)", server.log.read_text()), "open"
    )
    server.grpc = f"127.0.0.1:{match[1]}"
    client = Client(server)
    assert client.prediction.Predict(predict_request()).model_spec.version.value == 1
    client.channel.close()
    assert server.stop() == 0


def test_gives_up_with_one_sentence_when_the_only_version_is_broken(
    tmp_path: Path, launch: Callable[..., Server]
) -> None:
    (tmp_path / "1").mkdir()
    command = [sys.executable, "-m", "model_server", "--port=0", f"--model_base_path={tmp_path}"]
    command += ["--max_num_load_retries=1", "--load_retry_interval_micros=1000000"]
    server = launch(command, http="")
    assert server.process.wait(60) == 1
    log = server.log.read_text()
    assert log.count("cannot load version 1 of default") == 2
    assert "next attempt in 1 s, 1 left" in log
    assert log.splitlines()[-1].startswith(
        f"model_server: {tmp_path / '1'} holds no saved_model.pb"
    )
    assert "Traceback" not in log


def test_requests_in_flight_outlive_sigterm(
    tmp_path: Path, start_model_server: Callable[..., Server]
) -> None:
    export_counter(tmp_path / "1", 1)
    server = start_model_server(tmp_path, model_name=NAME)
    client = Client(server)
    body = json.dumps({"signature_name": "wait", "inputs": 2.0}).encode()

    def over_rest() -> Any:
        with urllib.request.urlopen(f"{server.http}/v1/models/{NAME}:predict", body) as response:
            return json.load(response)

    with ThreadPoolExecutor(1) as pool:
        over_grpc = client.prediction.Predict.future(wait_request(2))
        rest = pool.submit(over_rest)
        # What is answered now was asked after the two above: they are in flight.
        client.statuses()
        urllib.request.urlopen(f"{server.http}/v1/models/{NAME}").close()
        assert not over_grpc.done()
        assert not rest.done()
        server.process.terminate()
        eventually(lambda: "finishing those in flight" in server.log.read_text(), "it has begun")
        assert tf.make_ndarray(over_grpc.result().outputs["waited"]) >= 2
        assert rest.result()["outputs"] >= 2
    assert server.process.wait(30) == 0
    client.channel.close()


def test_interrupt_while_waiting_for_a_model(tmp_path: Path, launch: Callable[..., Server]) -> None:
    command = [sys.executable, "-m", "model_server", "--port=0", f"--model_base_path={tmp_path}"]
    server = launch(command, http="")
    eventually(lambda: "no versions of model" in server.log.read_text(), "it waits")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield holder.getsockname()[1]


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "model_server", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_busy_port_is_one_sentence(busy_port: int, tmp_path: Path) -> None:
    outcome = run(f"--port={busy_port}", f"--model_base_path={tmp_path}")
    assert outcome.returncode == 1
    assert outcome.stderr == (
        f"model_server: port {busy_port} is already in use: end the program that holds it, "
        "or give another port with --port\n"
    )
    outcome = run("--port=0", f"--rest_api_port={busy_port}", f"--model_base_path={tmp_path}")
    assert (outcome.returncode, outcome.stderr.count("\n")) == (1, 1)
    assert f"port {busy_port} is already in use" in outcome.stderr
    assert "--rest_api_port" in outcome.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--modl_name=x"], "unknown flag --modl_name; did you mean --model_name?"),
        (["--enable_baching"], "unknown flag --enable_baching; did you mean --enable_batching?"),
        (["--frobnicate=1"], "unknown flag --frobnicate\n"),
        ([], "--model_base_path is missing: the folder that holds each version"),
        (["--model_base_path=x", "--port=http"], "http is not a port number from 0 to 65535"),
        (["--model_base_path=x", "--port=5", "--rest_api_port=5"], "must differ"),
        (["--model_base_path=x", "--enable_model_warmup=perhaps"], "perhaps is neither true nor"),
        (["--model_base_path=x", "--grpc_channel_arguments=age"], "not of the form name=value"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], message: str) -> None:
    outcome = run(*flags)
    assert outcome.returncode == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_help_and_version() -> None:
    outcome = run("--help")
    assert outcome.returncode == 0
    assert "--file_system_poll_wait_seconds" in outcome.stdout
    assert run("--version").stdout.startswith("model_server with TensorFlow ")
