"""The embedded model server from its first flag to its last request: start, versions, stop."""

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.basics import ROOT, eventually
from helpers.counter import NAME, ZERO, export_counter, hammering, number, warm_up_request
from helpers.model_server import ask, run_main, run_process, write_warm_up
from helpers.servers import Addresses, Server
from helpers.serving import Client, refused
from tensorflow_serving.apis import model_management_pb2

from model_server.server import ModelServer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1, with three warm-up requests."""
    path = tmp_path_factory.mktemp("counter")
    export_counter(path / "1", 1, [warm_up_request(x=ZERO)] * 3)
    return path


@pytest.fixture(scope="module")
def server(exported: Path, start_model_server: Callable[..., Server]) -> Iterator[Server]:
    server = start_model_server(
        exported,
        *("--max_num_load_retries=0", "--num_request_iterations_for_warmup=2"),
        *("--enable_serialization_as_tensor_content", "--enable_profiler=true"),
        *("--rest_api_timeout_in_ms=300", "--tensorflow_inter_op_parallelism=2"),
        *("--grpc_channel_arguments=grpc.max_connection_age_ms=600000", "--num_load_threads", "2"),
        model_name=NAME,
    )
    yield server
    server.stop()


@pytest.fixture
def base_path(exported: Path, tmp_path: Path) -> Path:
    """A base path of the test's own, with version 1."""
    return shutil.copytree(exported, tmp_path / "base")


@pytest.fixture
def client(server: Server, base_path: Path, tmp_path: Path) -> Iterator[Client]:
    """A client of a model of the test's own, which is the only one that the server has now."""
    with Client(server, tmp_path.name) as client:
        client.serve(base_path)
        yield client


def test_warm_up_has_run_before_the_first_request(client: Client) -> None:
    assert tf.make_ndarray(client.predict(x=ZERO).outputs["calls"]) == 3 * 2 + 1


def test_flags(server: Server, client: Client) -> None:
    output = client.predict(x=np.zeros(3, np.float32)).outputs["number"]
    assert output.tensor_content == np.ones(3, np.int32).tobytes()
    assert not output.int_val
    log = server.log.read_text()
    assert "--enable_profiler has no effect" in log
    assert "--num_load_threads has no effect" in log


def test_rest_prediction_that_takes_too_long_is_504(server: Server, client: Client) -> None:
    body = {"signature_name": "wait", "inputs": 2.0}
    status, answer = ask(f"{server.http}/v1/models/{client.model_name}:predict", body)
    assert (status, answer.keys()) == (504, {"error"})


def test_new_version_takes_over_without_a_failed_request(
    server: Server, client: Client, base_path: Path
) -> None:
    with hammering(server, client.model_name, clients=4) as answers:
        eventually(lambda: all(answers), "every client has had an answer")
        begun = time.monotonic()
        slow = client.prediction.Predict.future(client.request("wait", seconds=np.float64(3)))
        export_counter(base_path / "2", 2)
        client.wait_for(2, "AVAILABLE")
        client.wait_for(1, "END")
        took = time.monotonic() - begun
        assert took >= 3, "version 1 was unloaded while it answered a request"
    assert slow.result().model_spec.version.value == 1
    for own in answers:
        assert own == sorted(own)
        assert {own[0], own[-1]} == {1, 2}
    assert [status.version for status in client.statuses()] == [2, 1]
    request = client.request(x=ZERO)
    request.model_spec.version.value = 1
    gone = f"Servable not found for request: Specific({client.model_name}, 1)"
    assert refused(lambda: client.prediction.Predict(request)) == (grpc.StatusCode.NOT_FOUND, gone)


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
    export_counter(path, 0, [warm_up_request(y=ZERO)])


def warm_up_of_another_format(path: Path) -> None:
    whole = export_counter(path.with_name("whole"), 0)
    write_warm_up(whole, []).write_text("{}" * 100)
    whole.rename(path)


def warm_up_cut_short(path: Path) -> None:
    whole = export_counter(path.with_name("whole"), 0)
    with write_warm_up(whole, [warm_up_request(x=ZERO)] * 2).open("rb+") as file:
        file.truncate(file.seek(0, 2) - 5)
    whole.rename(path)


def warm_up_without_end(path: Path) -> None:
    export_counter(path, 0, [warm_up_request(x=ZERO)] * 1001)


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (no_saved_model, "NOT_FOUND", "holds no saved_model.pb"),
        (a_file, "NOT_FOUND", "holds no saved_model.pb"),
        (truncated_graph, "DATA_LOSS", "saved_model.pb"),
        (truncated_variables, "OUT_OF_RANGE", "Read less bytes than requested"),
        (warm_up_that_fails, "INVALID_ARGUMENT", "input"),
        (warm_up_of_another_format, "DATA_LOSS", "TFRecord"),
        (warm_up_cut_short, "DATA_LOSS", "TFRecord"),
        (warm_up_without_end, "INVALID_ARGUMENT", "exceeds the maximum (1000)"),
    ],
)
def test_broken_version_is_reported_and_the_good_one_stays(
    client: Client,
    base_path: Path,
    spoil: Callable[[Path], None],
    code: str,
    message: str,
) -> None:
    spoil(base_path / "2")
    client.serve(base_path)
    status = client.error_of(2)
    assert status.error_code == getattr(grpc.StatusCode, code).value[0], status
    assert message in status.error_message
    assert client.predict(x=ZERO).model_spec.version.value == 1
    assert client.states() == {2: "END", 1: "AVAILABLE"}


def test_versions_follow_the_base_path_back_and_down_to_none(
    client: Client, base_path: Path
) -> None:
    export_counter(base_path / "2", 2)
    client.wait_for(2, "AVAILABLE")
    shutil.rmtree(base_path / "2")
    client.wait_for(2, "END")
    assert client.predict(x=ZERO).model_spec.version.value == 1
    shutil.rmtree(base_path / "1")
    client.wait_for(1, "END")
    assert refused(lambda: client.predict(x=ZERO))[0] == grpc.StatusCode.NOT_FOUND
    export_counter(base_path / "2026112209300000000", 5)
    client.wait_for(2026112209300000000, "AVAILABLE")
    assert number(client.predict(x=ZERO)) == 5


def test_warm_up_records_of_no_kind_are_passed_over(client: Client, base_path: Path) -> None:
    export_counter(base_path / "2", 2, [b"", warm_up_request(x=ZERO)])
    client.serve(base_path)
    assert tf.make_ndarray(client.predict(x=ZERO).outputs["calls"]) == 2 + 1


def test_reload_tells_by_how_much_counters_have_grown(client: Client, base_path: Path) -> None:
    request = model_management_pb2.ReloadConfigRequest(
        metric_names=["/tensorflow/cc/saved_model/load_attempt_count", "/no/such/counter"]
    )
    for name in (client.model_name, "another"):
        request.config.model_config_list.config.add(
            name=name, base_path=str(base_path), model_platform="tensorflow"
        )
    metrics = client.models.HandleReloadConfigRequest(request).metric
    assert [(each.name, each.int64_value_increase) for each in metrics] == [
        ("/tensorflow/cc/saved_model/load_attempt_count", 1),
        ("/no/such/counter", 0),
    ]


COLLECTION = """
import gc, sys
from pathlib import Path
from helpers.servers import Addresses
from helpers.serving import Client
from model_server.server import ModelServer

base_path = Path(sys.argv[1])
with ModelServer(str(base_path), model_name="counter", port=0) as server:
    import tensorflow as tf

    with Client(Addresses("", f"127.0.0.1:{server.port}"), "counter") as client:
        for version in (1, 2, 1, 2):
            client.serve(base_path, version)
    looked_at = gc.get_objects()
    graphs = [each for each in looked_at if isinstance(each, tf.Graph) and each.get_operations()]
    print(len(graphs), len(looked_at) < gc.get_freeze_count())
"""


def test_garbage_collection_frees_the_old_graph_and_passes_over_tensorflow(
    exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported / "1", tmp_path / "1")
    export_counter(tmp_path / "2", 2)
    outcome = subprocess.run(
        [sys.executable, "-c", COLLECTION, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["tests", "."])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert outcome.stdout == "1 True\n"


def export_constants(path: Path) -> None:
    """Save a model of no use that has 30 MB in its graph, of which loading makes many copies."""
    rng = np.random.default_rng(3)

    @tf.function(input_signature=[tf.TensorSpec([], tf.float32, name="x")])
    def add(x):
        for _ in range(300):
            x += tf.constant(rng.random(25_000, np.float32))[0]
        return {"y": x}

    tf.saved_model.save(tf.Module(), str(path), signatures=add)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is asked for it")
def test_memory_of_a_version_goes_back_to_the_system(
    server: Server, client: Client, base_path: Path, tmp_path: Path
) -> None:
    def memory() -> int:
        return psutil.Process(server.process.pid).memory_info().rss

    export_constants(tmp_path / "large" / "1")
    before = memory()
    with Client(server, "large") as large:
        large.serve(tmp_path / "large")
        large.predict(x=np.float32(0))
        loaded = memory()
    client.serve(base_path)
    left = memory()
    assert left - before < (loaded - before) / 2, [before, loaded, left]


def replaced(graph: Path, old: bytes, new: bytes) -> None:
    graph.write_bytes(graph.read_bytes().replace(old, new))


TEXT = """
from pathlib import Path

graph = Path({graph!r})
graph.write_bytes(graph.read_bytes().replace(b"Unknown_", b"Identity"))
"""


def test_packages_with_operations_are_imported_when_a_model_needs_them(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"--model_base_path={base_path}", "--max_num_load_retries=0", "--port=0"
    graph = base_path / "1" / "saved_model.pb"
    replaced(graph, b"Identity", b"Unknown_")
    (tmp_path / "tensorflow_decision_forests.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    outcome = run_main(*flags)
    assert outcome.status == 1
    assert "Op type not registered 'Unknown_'" in outcome.stderr.splitlines()[-1]
    assert "cannot import tensorflow_decision_forests: division by zero" in outcome.stderr
    # This package gives the operation back its name, where a real one would register it.
    (tmp_path / "tensorflow_text.py").write_text(TEXT.format(graph=str(graph)))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "tensorflow_text", raising=False)
    try:
        with (
            ModelServer(str(base_path), port=0) as server,
            Client(Addresses("", f"127.0.0.1:{server.port}"), "default") as client,
        ):
            assert client.predict(x=ZERO).model_spec.version.value == 1
    finally:
        sys.modules.pop("tensorflow_text", None)


def test_waits_for_a_first_version_and_says_where(
    tmp_path: Path, start_model_server: Callable[..., Server]
) -> None:
    base_path = tmp_path / "models"
    server = start_model_server(base_path, model_name=NAME, wait=False)

    def said(text: str) -> None:
        eventually(lambda: text in server.log.read_text(), text)

    said(f"base path {base_path} of model {NAME}: does not exist")
    (base_path / "latest").mkdir(parents=True)
    said(f"such as {base_path / '1'} (there is: latest)")
    with socket.socket() as probe:
        port = int(server.http.rpartition(":")[2])
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "open before a model is there"
    export_counter(tmp_path / "whole", 1)
    for entry in (tmp_path / "whole").iterdir():
        entry.rename(base_path / entry.name)
    said(f"{base_path} is itself a SavedModel: give the folder above it as --model_base_path")
    export_counter(base_path / "1", 1)
    said("gRPC API is open on port")
    with Client(server, NAME) as client:
        assert client.predict(x=ZERO).model_spec.version.value == 1
    assert server.stop() == 0


def test_log_is_quiet_and_names_the_port_that_0_took(
    exported: Path, launch: Callable[..., Server]
) -> None:
    command = [sys.executable, "-m", "model_server", "--port=0", f"--model_base_path={exported}"]
    server = launch(command, http="")
    opened = r"gRPC API is open on port (\d+)"
    match = eventually(lambda: re.search(opened, server.log.read_text()), "open")
    server.grpc = f"127.0.0.1:{match[1]}"
    with Client(server, "default") as client:
        assert client.predict(x=ZERO).model_spec.version.value == 1
    assert server.stop() == 0
    lines = server.log.read_text().splitlines()
    assert len(lines) < 10
    assert all(re.match(r"\d{4}-\d\d-\d\d [\d:,]+ INFO ", line) for line in lines), lines


def test_gives_up_with_one_sentence_when_the_only_version_is_broken(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    outcome = run_main(
        *("--port=0", f"--model_base_path={tmp_path}"),
        *("--max_num_load_retries=1", "--load_retry_interval_micros=1000000"),
    )
    assert outcome.status == 1
    log = outcome.stderr
    assert log.count("cannot load version 1 of default") == 2
    assert "next attempt in 1 s, 1 left" in log
    assert log.splitlines()[-1].startswith(
        f"model_server: {tmp_path / '1'} holds no saved_model.pb"
    )
    assert "Traceback" not in log


def test_requests_in_flight_outlive_sigterm_and_who_watches_the_health_does_not_delay_the_end(
    exported: Path, start_model_server: Callable[..., Server]
) -> None:
    server = start_model_server(exported, "--enable_grpc_healthcheck_service", model_name=NAME)
    body = json.dumps({"signature_name": "wait", "inputs": 2.0}).encode()

    def over_rest() -> Any:
        with urllib.request.urlopen(f"{server.http}/v1/models/{NAME}:predict", body) as response:
            return json.load(response)

    with Client(server, NAME) as client, ThreadPoolExecutor(1) as pool:
        over_grpc = client.prediction.Predict.future(client.request("wait", seconds=np.float64(2)))
        rest = pool.submit(over_rest)
        # What is answered now was asked after the two above: they are in flight.
        client.statuses()
        urllib.request.urlopen(f"{server.http}/v1/models/{NAME}").close()
        watching = health_pb2_grpc.HealthStub(client.channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        assert not over_grpc.done()
        assert not rest.done()
        server.process.terminate()
        eventually(lambda: "finishing those in flight" in server.log.read_text(), "it has begun")
        assert tf.make_ndarray(over_grpc.result().outputs["waited"]) >= 2
        assert rest.result()["outputs"] >= 2
        assert server.process.wait(ModelServer.grace_seconds / 2) == 0
        with pytest.raises(grpc.RpcError) as ended:
            next(watching)
        assert ended.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_interrupt_while_waiting_for_a_model(
    tmp_path: Path, start_model_server: Callable[..., Server]
) -> None:
    server = start_model_server(tmp_path, wait=False)
    eventually(lambda: "no versions of model" in server.log.read_text(), "it waits")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield holder.getsockname()[1]


def test_busy_port_is_one_sentence(busy_port: int, tmp_path: Path) -> None:
    outcome = run_process(f"--port={busy_port}", f"--model_base_path={tmp_path}")
    assert outcome.status == 1
    assert outcome.stderr == (
        f"model_server: port {busy_port} is already in use: end the program that holds it, "
        "or give another port with --port\n"
    )
    outcome = run_main("--port=0", f"--rest_api_port={busy_port}", f"--model_base_path={tmp_path}")
    assert (outcome.status, outcome.stderr.count("\n")) == (1, 1)
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
    outcome = run_main(*flags)
    assert outcome.status == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_help_and_version() -> None:
    outcome = run_main("--help")
    assert outcome.status == 0
    assert "--file_system_poll_wait_seconds" in outcome.stdout
    assert run_main("--version").stdout.startswith("TensorFlow ModelServer: ")


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (["--version"], 0),
        (["--modl_name=x"], 2),
        (["--model_base_path=/nowhere", "--model_config_file=/nowhere/models.config"], 1),
    ],
)
def test_a_process_of_its_own_ends_as_main_does_in_this_one(flags: list[str], status: int) -> None:
    outcome = run_process(*flags)
    assert outcome == run_main(*flags)
    assert outcome.status == status
