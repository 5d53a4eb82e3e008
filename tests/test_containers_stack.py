"""Both tiers under Compose: networks, limits, logs, two model servers of which one falls.

A Compose project has at most five containers here, and they are removed.
"""

import json
import os
import re
import subprocess
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from helpers.basics import CLASSES, ROOT, SAMPLES, eventually, free_port
from helpers.containers import (
    EMBEDDED,
    build,
    built_model,
    classify,
    docker,
    embedded_image,
    gateway_image,
    inspect,
    instructions,
)
from helpers.images import encode
from PIL import Image
from test_compose import compose

from workbook.engine import choose_engine

# Fixtures.
__all__ = ["build", "built_model", "compose", "embedded_image", "gateway_image"]

pytestmark = pytest.mark.docker
chosen, why = choose_engine("auto", image=None)
if chosen != "docker":
    pytest.skip(f"no container is run: {why}", allow_module_level=True)


class Stack:
    """A Compose project with names and ports of its own, and a host of pictures beside it."""

    def __init__(self, compose: list[str], images: dict[str, str], folder: Path):
        self.project, self.port = f"test-{uuid.uuid4().hex[:8]}", free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        pictures = {
            "image": images["gateway"],
            "command": ["python", "-m", "http.server", "8000", "--directory", "/pictures"],
            "volumes": [f"{ROOT / 'notebooks/samples'}:/pictures:ro"],
            "healthcheck": {"disable": True},
            "init": True,
        }
        services: dict[str, dict] = {name: {"image": image} for name, image in images.items()}
        # Gateways look names up again when a connection reaches its age: sooner than after 30 s.
        (words,) = instructions(EMBEDDED, "CMD")
        services["model-server"]["command"] = json.loads(words.replace("=30000", "=4000"))
        services["gateway"]["environment"] = {"PREDICT_TIMEOUT_SECONDS": None}  # that of `env`
        override = {"services": {**services, "pictures": pictures}}
        (folder / "override.yaml").write_text(json.dumps(override))
        self.compose = compose
        self.env = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_FILE": f"{ROOT / 'docker-compose.yaml'}:{folder / 'override.yaml'}",
            "MODEL_SERVER": "embedded",
            "GATEWAY_PORT": str(self.port),
            "ALLOWED_IMAGE_HOSTS": "pictures:8000",
        }

    def run(self, *arguments: str, seconds: float = 120) -> str:
        done = subprocess.run(
            [*self.compose, *arguments],
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    def containers(self, service: str) -> list[dict[str, Any]]:
        """What ``ps`` says of the running containers of a service."""
        lines = self.run("ps", "--format", "json", service).splitlines()
        return sorted((json.loads(line) for line in lines), key=lambda each: each["Name"])

    def requests_of(self, container: str) -> int:
        """How many gRPC requests a model server has counted."""
        read = "import urllib.request as u; print(u.urlopen('{}').read().decode())"
        url = "http://127.0.0.1:8501/monitoring/prometheus/metrics"
        page = docker("exec", container, "python", "-c", read.format(url))
        counts = re.findall(
            r"^:tensorflow:serving:request_latency_count{.*GRPC.*} (\d+)$", page, re.MULTILINE
        )
        return sum(map(int, counts))

    def left(self) -> list[str]:
        """The names of all containers, networks and volumes of the project."""
        label = f"--filter=label=com.docker.compose.project={self.project}"
        found = [docker("ps", "--all", "--quiet", label)]
        found += [docker(kind, "ls", "--quiet", label) for kind in ("network", "volume")]
        return " ".join(found).split()


@pytest.fixture(scope="module")
def stack(
    compose: list[str],
    gateway_image: str,
    embedded_image: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    images = {"gateway": gateway_image, "model-server": embedded_image}
    stack = Stack(compose, images, tmp_path_factory.mktemp("compose"))
    try:
        stack.run("up", "--detach", "--build", "--wait", seconds=600)
        yield stack
    finally:
        stack.run("down", "--volumes")


def test_what_waited_for_health_predicts_at_once(stack: Stack) -> None:
    for service in ("gateway", "model-server"):
        (container,) = stack.containers(service)
        assert container["Health"] == "healthy"
    for path, name in zip(SAMPLES, CLASSES, strict=True):
        assert classify(stack.url, path.read_bytes()).json()["top_class"] == name


def test_links_work_to_allowed_hosts_only(stack: Stack) -> None:
    def ask(url: str) -> requests.Response:
        return requests.post(f"{stack.url}/predict", json={"url": url}, timeout=60)

    answer = ask("http://pictures:8000/dress.png")
    assert answer.json()["top_class"] == "dress" and "fetch" in answer.json()["seconds"]
    refused = ask("http://model-server:8501/v1/models/clothing-model")
    assert refused.status_code == 400 and refused.json()["type"].endswith(":link-blocked")


def test_a_request_is_found_in_the_logs(stack: Stack) -> None:
    mark = uuid.uuid4().hex
    assert classify(stack.url, SAMPLES[0].read_bytes(), headers={"X-Request-ID": mark}).ok
    eventually(lambda: mark in stack.run("logs", "gateway"), "the log has the request")
    assert "gRPC API is open" in stack.run("logs", "model-server")


@pytest.mark.thorough
def test_the_worst_pictures_of_many_clients_fit_into_the_limit(stack: Stack) -> None:
    worst = Image.new("RGBA", (5000, 5000), (200, 20, 20, 128))
    kinds: list[tuple[str, dict]] = [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ]
    files = [encode(worst, kind, **options) for kind, options in kinds]
    files += [encode(worst.convert("CMYK"), "JPEG", progressive=True, quality=50)]
    files = [file + bytes(9_900_000 - len(file)) for file in files]
    (gateway,) = stack.containers("gateway")
    count = "cat /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control 2>/dev/null"

    def status(file: bytes) -> int | str:
        try:
            return classify(stack.url, file).status_code
        except requests.ConnectionError as error:
            return str(error)

    with ThreadPoolExecutor(32) as pool:
        statuses = Counter(pool.map(status, files * 12))
    kills = re.search(r"oom_kill (\d+)", docker("exec", gateway["Name"], "sh", "-c", f"{count};:"))
    assert kills and kills[1] == "0", f"killed for its memory {kills}: {statuses}"
    assert statuses.keys() <= {200, 503, 504}, statuses  # late on a busy machine
    assert inspect(gateway["Name"], ".RestartCount") == "0"


def test_no_upload_is_lost_where_too_many_come_at_a_time(stack: Stack) -> None:
    """Those that fit into the folder on their way are answered, others are told to come again."""
    files = [SAMPLES[0].read_bytes().ljust(9_900_000, b"\0")] * 60
    stack.env["PREDICT_TIMEOUT_SECONDS"] = "300"  # however busy this machine is
    try:
        stack.run("up", "--detach", "--no-build", "--wait")
    finally:
        del stack.env["PREDICT_TIMEOUT_SECONDS"]
    (gateway,) = stack.containers("gateway")
    in_gateway = partial(docker, "exec", gateway["Name"], "python", "-c")
    # A quick machine may have room for all of them, so the first one finds the folder full.
    in_gateway(
        "import pathlib, shutil; room = shutil.disk_usage('/dev/shm').free;"
        "pathlib.Path('/dev/shm/filler').write_bytes(bytes(room))"
    )
    answers = [classify(stack.url, files[0], timeout=600)]
    assert answers[0].status_code == 503, answers[0].text
    in_gateway("import os; os.unlink('/dev/shm/filler')")
    with ThreadPoolExecutor(60) as pool:
        answers += pool.map(lambda file: classify(stack.url, file, timeout=600), files)
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {200, 503} and statuses[200] >= 20, statuses
    refused = [answer for answer in answers if answer.status_code == 503]
    assert all(answer.headers["Retry-After"] == "2" for answer in refused)
    assert {answer.json()["type"].rpartition(":")[2] for answer in refused} == {"too-busy"}


def test_two_model_servers_share_the_work_and_one_may_fall(stack: Stack) -> None:
    stack.run("up", "--detach", "--wait", "--no-build", "--scale=model-server=2")
    names = [each["Name"] for each in stack.containers("model-server")]
    assert len(names) == 2
    picture = SAMPLES[0].read_bytes()

    def counts() -> list[int]:
        return [stack.requests_of(name) for name in names]

    def second_is_asked() -> bool:
        assert classify(stack.url, picture).ok
        return stack.requests_of(names[1]) > 0

    # The gateway looks the name up again when a connection has reached its greatest age.
    eventually(second_is_asked, "the second model server gets requests", seconds=90)
    before = counts()
    for _ in range(60):
        assert classify(stack.url, picture).ok
    shares = [now - then for now, then in zip(counts(), before, strict=True)]
    assert sum(shares) == 60 and min(shares) >= 20

    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.wait(0.05):  # so that there is CPU left for the one that starts again
            statuses.append(classify(stack.url, picture).status_code)

    def restarts() -> str:
        return docker("inspect", "--format={{.RestartCount}} {{.State.Health.Status}}", names[0])

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(ask) for _ in range(2)]
        try:
            eventually(lambda: len(statuses) > 20, "answers come")
            crash = ["docker", "exec", names[0], "bash", "-c", "kill -9 -1"]
            subprocess.run(crash, capture_output=True, timeout=60)
            asked = len(statuses)
            eventually(lambda: restarts() == "1 healthy", "it is started again", seconds=120)
            assert len(statuses) > asked
        finally:
            done.set()
        for job in jobs:
            job.result()
    assert {*statuses} == {200}


def test_one_command_leaves_nothing(stack: Stack) -> None:
    names = stack.run("ps", "--format={{.Name}}", "gateway", "model-server").splitlines()
    stack.run("stop")
    codes = {docker("inspect", "--format={{.State.ExitCode}}", name) for name in names}
    assert codes == {"0"}, "somebody was not asked to end, but killed"
    assert len(stack.left()) >= len(names) + 2
    stack.run("down")
    assert stack.left() == []
    assert docker("ps", "--all", "--quiet", f"--filter=name={stack.project}") == ""
