"""The gateway while things go wrong around it: model servers that end, freeze or change, too many
requests, slow clients, signals; and ten thousand requests in a row."""

import functools
import http.client
import io
import json
import os
import platform
import random
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import grpc
import numpy as np
import psutil
import pytest
import requests
import yaml
from helpers.basics import ROOT, eventually, free_port
from helpers.images import encode
from helpers.models import save_classifier
from helpers.servers import Server, WebHost, serve, wait_until_available, wait_until_ready
from keras_image_helper import create_preprocessor
from PIL import Image
from tensorflow_serving.apis import (
    model_service_pb2_grpc,
    prediction_service_pb2_grpc,
)

import tfserving
from workbook.manifests import quantity

NAME = "clothing-model"
MONITORING = "/monitoring/prometheus/metrics"
SAMPLE = (ROOT / "notebooks/samples/dress.png").read_bytes()


class Answer(NamedTuple):
    """What a client of the gateway saw; status 0 where there was no answer."""

    status: int
    body: Any
    headers: dict[str, str]

    @property
    def cause(self) -> str:
        return self.body["type"].rpartition(":")[2]


def ask_directly(target: str, size: int = 32, dtype: str = "float32") -> list[float]:
    """The sample's probabilities straight from the model server, prepared here."""
    preprocessor = create_preprocessor("xception", target_size=(size, size))
    image = preprocessor.resize_image(Image.open(io.BytesIO(SAMPLE)).convert("RGB"))
    array = preprocessor.convert_to_tensor(image)
    if dtype == "uint8":
        array = np.array(image, np.uint8)[np.newaxis]
    pb_request = tfserving.PredictRequest()
    pb_request.model_spec.name = NAME
    pb_request.inputs["inputs"].CopyFrom(tfserving.make_tensor_proto(array))
    with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        pb_response = tfserving.PredictionServiceStub(channel).Predict(pb_request, timeout=30)
    return tfserving.make_ndarray(pb_response.outputs["probabilities"])[0].tolist()


def post(gateway: Server, session: Any = requests, **arguments: Any) -> Answer:
    """Send the sample, or what the arguments say, to the gateway."""
    arguments = arguments or {"files": {"file": ("sample.png", SAMPLE)}}
    try:
        response = session.post(f"{gateway.http}/predict", timeout=30, **arguments)
    except requests.RequestException as error:
        return Answer(0, repr(error), {})
    return Answer(response.status_code, response.json(), dict(response.headers))


def get(gateway: Server, path: str) -> Answer:
    response = requests.get(gateway.http + path, timeout=30)
    is_json = "json" in response.headers["Content-Type"]
    body = response.json() if is_json else response.text
    return Answer(response.status_code, body, dict(response.headers))


def in_flight(gateway: Server) -> int:
    lines = requests.get(gateway.metrics, timeout=30).text.splitlines()
    line = next(line for line in lines if line.startswith("gateway_in_flight "))
    return int(float(line.split()[1]))


def workers(gateway: Server) -> list[psutil.Process]:
    return psutil.Process(gateway.process.pid).children()


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Stop a process with SIGSTOP, and let it go on in the end."""
    server.process.send_signal(signal.SIGSTOP)
    status = psutil.Process(server.process.pid).status
    try:
        # On a busy machine it may still answer a request before it gets the signal.
        eventually(lambda: status() == psutil.STATUS_STOPPED, "it stands still")
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


@contextmanager
def traffic(gateway: Server, clients: int = 4) -> Iterator[list[Answer]]:
    """Send the sample all the time, and see to it that the gateway's process stays the same."""
    answers: list[Answer] = []
    enough = threading.Event()
    before = workers(gateway)
    deadline = time.monotonic() + 120

    def client() -> None:
        with requests.Session() as session:
            while not enough.is_set() and time.monotonic() < deadline:
                answers.append(post(gateway, session))
                if answers[-1].status != 200:
                    enough.wait(0.05)  # as a polite client does

    with ThreadPoolExecutor(clients) as pool:
        jobs = [pool.submit(client) for _ in range(clients)]
        try:
            yield answers
        finally:
            enough.set()
    for job in jobs:
        job.result()
    assert workers(gateway) == before


def wait_for(answers: list[Answer], number: int, condition: Callable[[Answer], bool]) -> None:
    """Wait until so many more of these answers have come."""
    start = len(answers)
    eventually(
        lambda: sum(map(condition, answers[start:])) >= number,
        f"{number} such answers, but {Counter(answer.status for answer in answers[start:])}",
    )


def is_good(answer: Answer) -> bool:
    return answer.status == 200


def assert_right(answers: list[Answer], expected: dict[int, list[float]]) -> None:
    """Check that all is 200, 503 or 504, and each 200 the right answer of the version it names."""
    for status, body, headers in answers:
        assert status in (200, 503, 504), body
        if status == 200:
            probabilities = list(body["predictions"].values())
            assert probabilities == pytest.approx(expected[body["model"]["version"]], abs=1e-5)
        assert (status == 503) == ("Retry-After" in headers)


# The model server goes, and comes back -----------------------------------------------------------


def test_model_server_ends_and_starts_again(start_model_server, start_gateway, tiny_model):
    ports = free_port(), free_port()
    server = start_model_server(tiny_model, ports=ports)
    expected = {1: ask_directly(server.grpc)}
    gateway = start_gateway(server.grpc)
    with traffic(gateway) as answers:
        for number in (signal.SIGKILL, signal.SIGTERM):
            wait_for(answers, 20, is_good)
            server.process.send_signal(number)
            server.process.wait(60)
            wait_for(answers, 20, lambda answer: answer.status == 503)
            assert get(gateway, "/readyz").status == 503
            assert get(gateway, "/livez").status == 200
            server = start_model_server(tiny_model, ports=ports)
        wait_for(answers, 50, is_good)
        assert get(gateway, "/readyz").status == 200
    assert_right(answers, expected)
    server.stop()


def test_frozen_model_server(start_gateway, model_server):
    expected = {1: ask_directly(model_server.grpc)}
    gateway = start_gateway(model_server.grpc, PREDICT_TIMEOUT_SECONDS="1")
    with traffic(gateway) as answers:
        wait_for(answers, 20, is_good)
        with frozen(model_server):
            wait_for(answers, 8, lambda answer: answer.status == 504)
            late = post(gateway)
            assert (late.status, late.cause) == (504, "model-timeout")
            assert get(gateway, "/readyz").status == 504
            assert get(gateway, "/livez").status == 200
        wait_for(answers, 50, is_good)
        assert get(gateway, "/readyz").status == 200
    assert_right(answers, expected)
    assert in_flight(gateway) == 0


@pytest.mark.parametrize(("size", "dtype"), [(32, "float32"), (48, "uint8")])
def test_model_is_replaced(start_model_server, start_gateway, tmp_path, size, dtype):
    ports = free_port(), free_port()
    first = save_classifier(tmp_path / "model" / "1").parent
    server = start_model_server(first, "--file_system_poll_wait_seconds=1", ports=ports)
    gateway = start_gateway(server.grpc)
    expected = {1: ask_directly(server.grpc)}
    with traffic(gateway) as answers:
        wait_for(answers, 20, is_good)
        second = save_classifier(tmp_path / "staged", size, dtype, seed=(5, 2)).rename(first / "2")
        wait_for(
            answers, 50, lambda answer: is_good(answer) and answer.body["model"]["version"] == 2
        )
        expected[2] = ask_directly(server.grpc, size, dtype)
        first_part = len(answers)
        # Back to the first, by a server that starts anew: no version was ever AVAILABLE there.
        server.process.kill()
        server.process.wait(60)
        second.rename(tmp_path / "staged")
        server = start_model_server(first, ports=ports)
        wait_for(
            answers, 50, lambda answer: is_good(answer) and answer.body["model"]["version"] == 1
        )
    assert_right(answers, expected)
    assert expected[1] != pytest.approx(expected[2], abs=1e-3)
    assert all(map(is_good, answers[: first_part - 8])), "one version follows the other seamlessly"
    server.stop()


# Several model servers ---------------------------------------------------------------------------


class Pair:
    """Two model servers behind one gateway."""

    def __init__(self, start_model_server: Callable[..., Server], base_path: Path, folder: Path):
        self.monitoring = folder / "monitoring.txt"
        self.monitoring.write_text("prometheus_config { enable: true }")
        self.start_model_server, self.base_path = start_model_server, base_path
        self.ports = [(free_port(), free_port()) for _ in range(2)]
        self.servers = [self.start(which, wait=False) for which in (0, 1)]
        for server in self.servers:
            wait_until_available(server, NAME)

    def start(self, which: int, wait: bool = True) -> Server:
        flag = f"--monitoring_config_file={self.monitoring}"
        return self.start_model_server(self.base_path, flag, ports=self.ports[which], wait=wait)

    def target(self) -> str:
        return ", ".join(server.grpc for server in self.servers)

    def predictions(self, which: int) -> int:
        """How many Predict requests a server says it has answered."""
        text = requests.get(self.servers[which].http + MONITORING, timeout=30).text
        labels = f'model_name="{NAME}",API="Predict",entrypoint="GRPC"'
        wanted = f":tensorflow:serving:request_latency_count{{{labels}}} "
        line = next((x for x in text.splitlines() if x.startswith(wanted)), "0")
        return int(line.split()[-1])

    def has_work(self, which: int) -> bool:
        return self.predictions(which) >= 20

    def kill(self, which: int) -> None:
        self.servers[which].process.kill()
        self.servers[which].process.wait(60)

    def check(self, gateway: Server, victims: tuple[int, ...] = (0,)) -> None:
        """See that requests are balanced, and that none fails when one of two servers is killed."""
        expected = get_predictions(post(gateway))
        before = [self.predictions(which) for which in (0, 1)]
        with traffic(gateway) as answers:
            wait_for(answers, 60, is_good)
        shares = [self.predictions(which) - before[which] for which in (0, 1)]
        assert sum(shares) == len(answers)
        assert min(shares) >= 0.4 * len(answers), shares

        with traffic(gateway) as answers:
            for victim in victims:
                wait_for(answers, 40, is_good)
                self.kill(victim)
                wait_for(answers, 40, is_good)
                if victim != victims[-1]:
                    self.servers[victim] = self.start(victim)
                    eventually(functools.partial(self.has_work, victim), "it has work again")
        for answer in answers:  # not one is anything but 200
            assert get_predictions(answer) == pytest.approx(expected, abs=1e-5)
        for server in self.servers:
            server.stop()


def get_predictions(answer: Answer) -> dict[str, float]:
    assert answer.status == 200, answer.body
    return answer.body["predictions"]


def test_one_of_two_model_servers_is_killed(
    start_model_server, start_gateway, tiny_model, tmp_path
):
    pair = Pair(start_model_server, tiny_model, tmp_path)
    pair.check(start_gateway(pair.target()), victims=(0, 1))


def test_one_of_two_servers_of_the_bundled_model_is_killed(
    start_model_server, start_gateway, clothing_model, tmp_path
):
    pair = Pair(start_model_server, clothing_model, tmp_path)
    pair.check(start_gateway(pair.target()))


def test_one_of_two_model_servers_freezes_for_ever(
    start_model_server, start_gateway, clothing_model, tmp_path
):
    """Its connection stays open; unanswered pings tell, before any request runs out of time.

    Each client may have met it once. Whoever asks later does not, and gets no late answer.
    """
    pair = Pair(start_model_server, clothing_model, tmp_path)
    gateway = start_gateway(pair.target())
    expected = get_predictions(post(gateway))
    clients = 4
    with frozen(pair.servers[0]), traffic(gateway, clients) as answers:
        wait_for(answers, 100, is_good)
    for answer in answers:  # not one is anything but 200
        assert get_predictions(answer) == pytest.approx(expected, abs=1e-5)
    times = sorted(answer.body["seconds"]["predict"] for answer in answers)
    print(f"frozen for ever: slowest {times[-1]:.2f} s, then {times[-clients - 1]:.2f} s")
    assert times[-clients - 1] < 6
    # It is asked again when it goes on.
    before = pair.predictions(0)
    eventually(lambda: is_good(post(gateway)) and pair.predictions(0) > before, "it has work again")
    for server in pair.servers:
        server.stop()


def test_a_slow_model_server_is_not_taken_for_a_frozen_one(start_gateway, model_server):
    """However long a model computes, its server answers pings, and is asked once."""
    with recording(model_server.grpc) as (recorder, target):
        gateway = start_gateway(target)
        assert is_good(post(gateway))
        recorder.calls.clear()
        recorder.hold.clear()
        with ThreadPoolExecutor(6) as pool:
            jobs = []
            for number in range(6):  # so that pings go out all the time
                jobs.append(pool.submit(post, gateway))
                eventually(lambda: len(recorder.calls) > number, "it is asked")  # noqa: B023
                time.sleep(1.5)
            recorder.hold.set()
            assert all(is_good(job.result()) for job in jobs)
        assert len(recorder.calls) == 6


class Relay(socketserver.BaseRequestHandler):
    """Passes a connection's bytes on to the model server that belongs to its address, and back."""

    targets: ClassVar[dict[str, str]] = {}

    def handle(self) -> None:
        host, port = self.targets[self.request.getsockname()[0]].split(":")
        with suppress(OSError), socket.create_connection((host, int(port))) as server:
            back = threading.Thread(target=self.pump, args=(server, self.request))
            back.start()
            self.pump(self.request, server)
            back.join()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class RelayServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True


def test_one_of_two_addresses_of_a_name_is_killed(launch, start_model_server, tiny_model, tmp_path):
    """The name is in a file of the gateway's own, in place of the machine's /etc/hosts."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost model-servers\n127.0.0.2 model-servers\n")
    alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    mount = ["sh", "-ec", 'mount --bind "$0" /etc/hosts; exec "$@"', str(hosts)]
    if subprocess.run([*alone, *mount, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be had here, in which a name has two addresses")

    pair = Pair(start_model_server, tiny_model, tmp_path)
    addresses = ("127.0.0.1", "127.0.0.2")
    Relay.targets = dict(zip(addresses, (server.grpc for server in pair.servers), strict=True))
    with RelayServer(("0.0.0.0", 0), Relay) as relay:
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        port = free_port()
        command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "gateway:app"]
        target = f"dns:///model-servers:{relay.server_address[1]}"
        environment = {"TF_SERVING_HOST": target, "DRAIN_SECONDS": "0"}
        gateway = launch([*alone, *mount, *command], f"http://127.0.0.1:{port}", **environment)
        wait_until_ready(gateway, f"{gateway.http}/readyz", lambda body: True)
        pair.check(gateway)
        gateway.stop()
        relay.shutdown()


# What the gateway tells the model server ---------------------------------------------------------


class Recorder(
    prediction_service_pb2_grpc.PredictionServiceServicer,
    model_service_pb2_grpc.ModelServiceServicer,
):
    """Stands between the gateway and a model server, notes what comes, and refuses if told to."""

    def __init__(self, target: str):
        self.channel = grpc.insecure_channel(target)
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.calls: list[dict[str, Any]] = []
        self.refusals: list[grpc.StatusCode] = []
        self.hold = threading.Event()
        self.hold.set()

    def GetModelMetadata(self, request, context):
        return self.prediction.GetModelMetadata(request)

    def GetModelStatus(self, request, context):
        return self.models.GetModelStatus(request)

    def Predict(self, request, context):
        ended = threading.Event()
        context.add_callback(ended.set)
        metadata = {key: value for key, value in context.invocation_metadata()}
        left = context.time_remaining()
        self.calls.append({"metadata": metadata, "left": left, "ended": ended})
        while not self.hold.wait(0.05) and context.is_active():
            pass
        if self.refusals:
            context.abort(self.refusals.pop(0), "as the test wants it")
        return self.prediction.Predict(request)


@contextmanager
def recording(target: str) -> Iterator[tuple[Recorder, str]]:
    """Run a Recorder before a model server; give it and its address."""
    recorder = Recorder(target)
    options = [("grpc.max_receive_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(16), options=options)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(recorder, server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(recorder, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield recorder, f"127.0.0.1:{port}"
    finally:
        recorder.hold.set()
        server.stop(None).wait(30)
        recorder.channel.close()


def test_deadline_and_id_reach_the_model_server(start_gateway, model_server):
    with recording(model_server.grpc) as (recorder, target):
        gateway = start_gateway(target, PREDICT_TIMEOUT_SECONDS="7")
        files = {"file": ("sample.png", SAMPLE)}
        assert is_good(post(gateway, files=files, headers={"X-Request-ID": "request.1-a_b"}))
        assert recorder.calls[0]["metadata"]["x-request-id"] == "request.1-a_b"
        assert 0 < recorder.calls[0]["left"] <= 7
        answer = post(gateway)
        assert recorder.calls[1]["metadata"]["x-request-id"] == answer.headers["X-Request-ID"]


def test_abandoned_work_stops(start_gateway, model_server):
    with recording(model_server.grpc) as (recorder, target):
        gateway = start_gateway(target, PREDICT_TIMEOUT_SECONDS="1", MAX_IN_FLIGHT="1")
        assert is_good(post(gateway))
        recorder.hold.clear()
        answer = post(gateway)
        assert (answer.status, answer.cause) == (504, "model-timeout")
        assert recorder.calls[-1]["ended"].wait(30), "the model server knows that nobody waits"
        recorder.hold.set()
        assert in_flight(gateway) == 0
        assert is_good(post(gateway))


def test_what_was_not_begun_is_tried_again_and_once(start_gateway, model_server):
    code = grpc.StatusCode
    with recording(model_server.grpc) as (recorder, target):
        gateway = start_gateway(target)
        assert is_good(post(gateway))
        for refusals, calls, status in (
            ([code.UNAVAILABLE], 2, 200),
            ([code.UNAVAILABLE] * 2, 2, 503),
            ([code.CANCELLED], 2, 200),
            ([code.RESOURCE_EXHAUSTED], 1, 503),
            ([code.INTERNAL], 1, 503),
            ([code.DEADLINE_EXCEEDED], 1, 504),
        ):
            recorder.calls.clear()
            recorder.refusals = [*refusals]
            assert (post(gateway).status, len(recorder.calls)) == (status, calls), refusals
            assert recorder.refusals == []


def test_large_pictures_are_tried_again_because_they_are_kept(
    start_model_server, start_gateway, tmp_path
):
    """A 224 x 224 picture has 600 KB; gRPC keeps 256 KB for a second try unless told otherwise."""
    server = start_model_server(save_classifier(tmp_path / "model" / "1", 224).parent)
    copy = Path(shutil.copytree(ROOT / "tfserving", tmp_path / "copy" / "tfserving"))
    source, option = (
        (copy / "channel.py").read_text(),
        '("grpc.per_rpc_retry_buffer_size", 1 << 28)',
    )
    assert source.count(option) == 1
    (copy / "channel.py").write_text(source.replace(f"{option},", ""))
    without = {"GUNICORN_CMD_ARGS": f"--pythonpath {copy.parent}"}
    with recording(server.grpc) as (recorder, target):
        for environment, status in (({}, 200), (without, 503)):
            gateway = start_gateway(target, **environment)
            assert is_good(post(gateway))
            recorder.refusals = [grpc.StatusCode.UNAVAILABLE]
            assert post(gateway).status == status
            gateway.stop()
    server.stop()


# Too many requests, and slow clients -------------------------------------------------------------


class SlowHost(WebHost):
    """A host of pictures that answers when the test lets it."""

    hold = threading.Event()

    def do_GET(self):
        if "slow" in self.path:
            self.hold.wait(60)
        self.answer(200 if "missing" not in self.path else 404, SAMPLE)


@pytest.fixture
def pictures() -> Iterator[str]:
    """The address of a running SlowHost, which lets nothing go until the test says so."""
    SlowHost.hold = threading.Event()
    with serve(SlowHost) as address:
        yield address
        SlowHost.hold.set()


def patient(host: str) -> dict[str, str]:
    """Have a gateway wait a minute for pictures of this host."""
    return {"IMAGE_TIMEOUT_SECONDS": "60", "ALLOWED_IMAGE_HOSTS": host}


def check_refusals(gateway: Server, ready: int, let_go: Callable[[], object], **slow: Any) -> None:
    """Fill both places with slow requests; see that others are refused until they are done."""
    with ThreadPoolExecutor(40) as pool:
        kept = [pool.submit(post, gateway, **slow) for _ in range(2)]
        eventually(lambda: in_flight(gateway) == 2, "both places are taken")
        refused = [job.result() for job in [pool.submit(post, gateway) for _ in range(38)]]
        for answer in refused:
            assert (answer.status, answer.cause) == (503, "too-busy")
            assert int(answer.headers["Retry-After"]) > 0
        assert get(gateway, "/livez").status == 200
        assert get(gateway, "/readyz").status == ready
        assert not any(job.done() for job in kept), "the refusals did not wait for these"
        let_go()
        assert [job.result().status for job in kept] == [200, 200]
    assert in_flight(gateway) == 0
    assert is_good(post(gateway))


def test_overload_by_a_slow_picture_host(start_gateway, model_server, pictures):
    gateway = start_gateway(model_server.grpc, MAX_IN_FLIGHT="2", **patient(pictures))
    assert is_good(post(gateway))
    slow = {"json": {"url": f"http://{pictures}/slow"}}
    check_refusals(gateway, 200, SlowHost.hold.set, **slow)


def test_overload_by_requests_with_several_links(start_gateway, model_server, pictures):
    """They get a quarter of the places, and the rest is for others."""
    gateway = start_gateway(model_server.grpc, MAX_IN_FLIGHT="4", **patient(pictures))
    slow, quick = f"http://{pictures}/slow", f"http://{pictures}/quick"
    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(post, gateway, json={"urls": [slow, quick]})
        eventually(lambda: in_flight(gateway) == 1, "a quarter of the places is taken")
        for _ in range(3):
            refused = post(gateway, json={"urls": [quick, quick]})
            assert (refused.status, refused.cause) == (503, "too-busy")
            assert int(refused.headers["Retry-After"]) > 0
            assert post(gateway, json={"url": quick}).status == 200
        assert not kept.done()
        SlowHost.hold.set()
        assert kept.result().status == 200
    assert in_flight(gateway) == 0
    assert post(gateway, json={"urls": [quick, quick]}).status == 200


class HostOfLarge(WebHost):
    """A host of pictures with bytes behind them that nobody needs, some of 25 million pixels."""

    small = SAMPLE.ljust(2_400_000, b"\0")

    @staticmethod
    @functools.cache
    def many_pixels() -> bytes:
        return encode(Image.new("RGBA", (5000, 5000)), "WEBP", lossless=True)

    def do_GET(self):
        file = self.many_pixels() if self.path in ("/worst", "/pixels") else self.small
        self.answer(200, file.ljust(9_900_000, b"\0") if self.path == "/worst" else file)


@pytest.mark.thorough
def test_memory_while_many_send_many_large_links(start_gateway, model_server):
    """It stays within what the container may have beside its uploads, and then goes back."""
    manifest = yaml.safe_load((ROOT / "kube-config/base/gateway-deployment.yaml").read_text())
    pod = manifest["spec"]["template"]["spec"]
    quantities = [pod["containers"][0]["resources"]["limits"]["memory"]]
    quantities += [pod["volumes"][0]["emptyDir"]["sizeLimit"]]
    limit, uploads = (int(quantity(each)) for each in quantities)
    with serve(HostOfLarge) as address, ThreadPoolExecutor(56) as pool:
        gateway = start_gateway(model_server.grpc, **patient(address), PREDICT_TIMEOUT_SECONDS="10")
        worst = {"url": f"http://{address}/worst"}
        body = {"urls": [f"http://{address}/{number}" for number in range(16)]}
        answers = [*pool.map(lambda body: post(gateway, json=body), [worst] * 24 + [body] * 32)]
    (worker,) = workers(gateway)
    status = Path(f"/proc/{worker.pid}/status").read_text()
    causes = Counter("" if answer.status == 200 else answer.cause for answer in answers)
    assert causes.keys() <= {"", "too-busy", "model-timeout"} and causes[""] >= 3, causes
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    assert peak < limit - uploads, f"{peak:,} of {limit:,} bytes, {uploads:,} of them for uploads"
    if platform.libc_ver()[0] == "glibc":
        eventually(lambda: worker.memory_info().rss < 300_000_000, "memory goes back")


@pytest.mark.thorough
def test_large_pictures_of_many_clients_leave_their_memory_behind(start_gateway, model_server):
    """Also where gunicorn is started by hand: what it reads has threads share one heap."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc can be told how threads keep memory")
    pixels = Image.new("RGBA", (5000, 5000))
    files = [HostOfLarge.many_pixels(), encode(pixels.convert("CMYK"), "JPEG")]
    gateway = start_gateway(model_server.grpc, PREDICT_TIMEOUT_SECONDS="25")
    assert is_good(post(gateway))
    (worker,) = workers(gateway)
    before = worker.memory_info().rss
    with ThreadPoolExecutor(12) as pool:
        answers = [*pool.map(lambda file: post(gateway, files={"file": ("x", file)}), files * 12)]
    assert {answer.status for answer in answers} <= {200, 503}, answers
    after = worker.memory_info().rss
    assert after - before < 100_000_000, f"{before:,} bytes became {after:,}"


@contextmanager
def gateway_with_little_room(launch: Callable[..., Server], folder: Path, **env: str) -> Iterator:
    """A gateway whose uploads have 48 MiB of their own; give it and that room's folder."""
    alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    mount = ["sh", "-ec", 'mount -t tmpfs -o size=48m tmpfs "$0"; exec "$@"', str(folder)]
    if subprocess.run([*alone, *mount, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be had here, with a small disk in it")
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "gateway:app"]
    env |= {"TMPDIR": str(folder), "DRAIN_SECONDS": "0"}
    gateway = launch([*alone, *mount, *command], f"http://127.0.0.1:{port}", **env)
    wait_until_ready(gateway, f"{gateway.http}/readyz", lambda body: True)
    yield gateway, Path(f"/proc/{workers(gateway)[0].pid}/root{folder}")
    gateway.stop()


LARGE = {"files": {"file": ("dress.png", SAMPLE.ljust(9_900_000, b"\0"))}}


@pytest.mark.thorough
def test_floods_of_uploads_leave_no_trace(launch, model_server, tmp_path):
    """Those that have no room are told to come again, and the next ones find it empty."""
    room = gateway_with_little_room(launch, tmp_path, TF_SERVING_HOST=model_server.grpc)
    with room as (gateway, folder), ThreadPoolExecutor(60) as pool:
        for _ in range(3):
            answers = [*pool.map(lambda _: post(gateway, **LARGE), range(60))]
            causes = Counter("" if is_good(answer) else answer.cause for answer in answers)
            assert causes.keys() <= {"", "too-busy"} and causes[""] >= 3, causes
            disk = shutil.disk_usage(folder)
            assert disk.used == 0, f"{disk.used:,} bytes are not given back"
        assert is_good(post(gateway, **LARGE))


def test_an_upload_while_the_disk_is_full(launch, model_server, tmp_path):
    """Something else has filled it; that is no error of the gateway, and passes."""
    room = gateway_with_little_room(launch, tmp_path, TF_SERVING_HOST=model_server.grpc)
    with room as (gateway, folder):
        for free in (5_000_000, 0):
            (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - free))
            answer = post(gateway, **LARGE)
            assert (answer.status, answer.cause) == (503, "too-busy")
            assert int(answer.headers["Retry-After"]) > 0
            (folder / "filler").unlink()
            assert shutil.disk_usage(folder).used == 0
            assert is_good(post(gateway, **LARGE))


def test_pictures_that_take_longer_to_decode_than_there_is_time(start_gateway, model_server):
    """The model server, which has not even been asked, is not to blame."""
    with serve(HostOfLarge) as address:
        gateway = start_gateway(model_server.grpc, PREDICT_TIMEOUT_SECONDS="1", **patient(address))
        answer = post(gateway, json={"urls": [f"http://{address}/pixels"] * 16})
    assert (answer.status, answer.cause) == (503, "too-busy")


def test_overload_by_a_frozen_model_server(start_gateway, model_server):
    gateway = start_gateway(model_server.grpc, MAX_IN_FLIGHT="2", PREDICT_TIMEOUT_SECONDS="60")
    assert is_good(post(gateway))
    with frozen(model_server):
        go_on = model_server.process.send_signal
        check_refusals(gateway, 504, lambda: go_on(signal.SIGCONT))


def connect(gateway: Server, content: bytes) -> socket.socket:
    """Open a connection to the gateway and send something."""
    sock = socket.create_connection(("127.0.0.1", int(gateway.http.rpartition(":")[2])))
    sock.sendall(content)
    return sock


HEAD = b"POST /predict HTTP/1.1\r\nHost: gateway\r\n"
FORM = b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 900000\r\n\r\n"


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"", id="silent"),
        pytest.param(HEAD + b"X-Slow: ", id="headers drip"),
        pytest.param(HEAD + FORM + b"--b\r\n", id="an upload drips"),
        pytest.param(b"GET /livez HTTP/1.0\r\n\r\n", id="never closes"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n" * 400, id="never reads"),
    ],
)
def test_slow_clients_stop_nobody(start_gateway, model_server, start):
    gateway = start_gateway(model_server.grpc)
    before = workers(gateway)
    enough = threading.Event()
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(gateway, start)) for _ in range(200)]

        def drip() -> None:
            while start.startswith(b"POST") and not enough.wait(0.2):
                for sock in slow:
                    with suppress(OSError):  # the gateway may have had enough of it
                        sock.send(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            for _ in range(3):
                assert is_good(post(gateway))
                assert get(gateway, "/readyz").status == 200
        finally:
            enough.set()
            dripping.join()
    assert workers(gateway) == before


def test_a_kept_connection_that_is_cut_for_others(start_gateway, model_server, pictures):
    """The answer says so, else the client would lose its next request."""
    gateway = start_gateway(model_server.grpc, MAX_IN_FLIGHT="1", **patient(pictures))
    body = json.dumps({"url": f"http://{pictures}/slow"})
    with ExitStack() as stack:
        connection = http.client.HTTPConnection(gateway.http.removeprefix("http://"), timeout=60)
        stack.callback(connection.close)
        connection.request("POST", "/predict", body)
        eventually(lambda: in_flight(gateway) == 1, "its picture is on its way")
        crowd = [stack.enter_context(connect(gateway, HEAD)) for _ in range(80)]
        assert select.select(crowd, [], [], 60)[0], "nobody was cut"
        SlowHost.hold.set()
        response = connection.getresponse()
        assert (response.status, response.headers["Connection"]) == (200, "close")


# The end -----------------------------------------------------------------------------------------


def test_sigterm(start_gateway, model_server, pictures):
    gateway = start_gateway(
        model_server.grpc,
        DRAIN_SECONDS="2",
        IMAGE_TIMEOUT_SECONDS="60",
        ALLOWED_IMAGE_HOSTS=pictures,
    )
    slow = {"json": {"url": f"http://{pictures}/slow"}}
    with ThreadPoolExecutor(4) as pool:
        kept = [pool.submit(post, gateway, **slow) for _ in range(4)]
        eventually(lambda: in_flight(gateway) == 4, "requests are in flight")
        gateway.process.terminate()
        stopping = eventually(
            lambda: (a := get(gateway, "/readyz")).status == 503 and a, "it is not ready"
        )
        assert stopping.cause == "stopping"
        assert get(gateway, "/livez").status == 200
        new = [post(gateway) for _ in range(10)]  # each on a connection of its own
        assert [answer.status for answer in new] == [200] * 10
        eventually(lambda: is_refused(gateway), "after that nobody is taken in")
        assert not any(job.done() for job in kept)
        SlowHost.hold.set()
        assert [job.result().status for job in kept] == [200] * 4
    assert gateway.process.wait(60) == 0


def is_refused(gateway: Server) -> bool:
    try:
        connect(gateway, b"").close()
        return False
    except ConnectionRefusedError:
        return True


def test_nothing_is_lost_when_it_ends(start_gateway, model_server):
    """Whoever got a connection gets an answer, until connections are refused."""
    gateway = start_gateway(model_server.grpc, DRAIN_SECONDS="1")
    deadline = time.monotonic() + 60

    def client() -> list[Answer]:
        answers = []
        while time.monotonic() < deadline:
            answers.append(post(gateway))
            if "refused" in str(answers[-1].body):
                return answers
        pytest.fail("it never ends")

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(client) for _ in range(4)]
        assert is_good(post(gateway))
        gateway.process.terminate()
        for job in jobs:
            *answers, _ = job.result()
            assert [answer.body for answer in answers if not is_good(answer)] == []
    assert gateway.process.wait(60) == 0


def test_sigint(start_gateway, model_server, pictures):
    gateway = start_gateway(
        model_server.grpc, IMAGE_TIMEOUT_SECONDS="60", ALLOWED_IMAGE_HOSTS=pictures
    )
    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(post, gateway, json={"url": f"http://{pictures}/slow"})
        eventually(lambda: in_flight(gateway) == 1, "a request is in flight")
        gateway.process.send_signal(signal.SIGINT)
        eventually(lambda: is_refused(gateway), "nobody is taken in")
        SlowHost.hold.set()
        assert kept.result().status == 200
    assert gateway.process.wait(60) == 0
    assert "Traceback" not in gateway.log.read_text()


def test_no_control_socket_and_no_files(start_gateway, model_server, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    gateway = start_gateway(
        model_server.grpc, HOME=str(home), XDG_RUNTIME_DIR=str(home), TMPDIR=str(tmp_path)
    )
    assert is_good(post(gateway))
    for process in (psutil.Process(gateway.process.pid), *workers(gateway)):
        assert process.net_connections("unix") == []
        files = {file.path for file in process.open_files()} - {str(gateway.log)}
        assert all(file.startswith(str(tmp_path)) for file in files), files
    assert [*home.iterdir()] == []
    gateway.stop()
    assert [*tmp_path.iterdir()] == [home]


@pytest.mark.parametrize("arguments", ["--workers 2", "--workers 2 --preload"])
def test_several_workers(start_gateway, model_server, arguments):
    gateway = start_gateway(model_server.grpc, GUNICORN_CMD_ARGS=arguments)
    eventually(lambda: len(workers(gateway)) == 2, "two workers")
    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda _: post(gateway).status, range(64))]
    assert answers == [200] * 64
    gateway.process.terminate()
    assert gateway.process.wait(60) == 0


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGHUP])
def test_metrics_are_told_by_the_next_worker(start_gateway, model_server, sign):
    gateway = start_gateway(model_server.grpc)
    (before,) = workers(gateway)
    (before if sign == signal.SIGKILL else gateway.process).send_signal(sign)
    eventually(lambda: workers(gateway) and before not in workers(gateway), "a new worker")
    assert in_flight(gateway) == 0 and post(gateway).status == 200
    gateway.stop()


def test_a_busy_port_for_metrics_is_named(start_gateway, model_server):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(pytest.fail.Exception) as failed:
            start_gateway(model_server.grpc, METRICS_PORT=f"{port}")
    last = str(failed.value).strip().splitlines()[-1]
    assert "in use" in last and f"{port}" in last


# Ten thousand requests ---------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.skipif(
    os.environ.get("SOAK_TESTS") != "1", reason="takes a minute; SOAK_TESTS=1 asks for it"
)
def test_ten_thousand_requests(start_gateway, model_server, pictures, closed):
    gateway = start_gateway(model_server.grpc, ALLOWED_IMAGE_HOSTS=f"{pictures} {closed}")
    link = f"http://{pictures}/"
    kinds: list[tuple[str, dict]] = [
        *[("", {"files": {"file": ("sample.png", SAMPLE)}})] * 5,
        *[("", {"json": {"url": f"{link}dress.png", "preview": True}})] * 2,
        ("", {"json": {"urls": [f"{link}dress.png"] * 3}}),
        ("", {"json": {"sample": "dress"}}),
        ("link-failed", {"json": {"url": f"{link}missing"}}),
        ("link-failed", {"json": {"url": f"http://{closed}/"}}),
        ("link-blocked", {"json": {"url": "http://169.254.169.254/"}}),
        ("link-malformed", {"json": {"url": "http://"}}),
        ("malformed-request", {"data": b"{"}),
        ("not-a-picture", {"files": {"file": ("x", SAMPLE[:500])}}),
    ]
    assert is_good(post(gateway))
    (worker,) = workers(gateway)

    def client(seed: int, number: int) -> None:
        chance = random.Random(seed)
        with requests.Session() as session:
            for _ in range(number):
                cause, arguments = chance.choice(kinds)
                answer = post(gateway, session, **arguments)
                if cause:
                    assert answer.cause == cause, answer
                else:
                    assert answer.status == 200, answer

    def measure() -> tuple[float, int, int]:
        eventually(lambda: worker.num_fds() < 60, "connections are closed again")
        return worker.memory_info().rss, worker.num_fds(), worker.num_threads()

    measures = []
    for number in (250, 250, 750):  # for each of eight clients: 2,000, 4,000 and 10,000 in all
        with ThreadPoolExecutor(8) as pool:
            for job in [pool.submit(client, seed, number) for seed in range(8)]:
                job.result()
        measures.append(measure())
    print("memory, files and threads after 2,000, 4,000 and 10,000 requests:", measures)
    memory, files, threads = zip(*measures, strict=True)
    assert max(memory) < 1.1 * memory[0], measures
    assert max(files) <= files[0] + 4, measures
    assert max(threads) <= threads[0] + 8, measures
