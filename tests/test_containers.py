"""Images and containers of both tiers: built, run, limited, stopped, killed, and removed.

Each test runs five containers at most, and removes them.
"""

import json
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import requests
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.basics import CLASSES, ROOT, SAMPLES, eventually, free_port
from helpers.containers import (
    DOCKERFILES,
    EMBEDDED,
    GATEWAY,
    HARDENED,
    SERVING,
    STATUS,
    answer,
    build,
    built_model,
    classify,
    container,
    docker,
    embedded_image,
    gateway_image,
    inspect,
    stop,
    wait_for,
)
from helpers.images import encode
from helpers.manifests import KUBE, docker_options, environment, of_kind, render, run_kustomize
from PIL import Image
from test_compose import compose

import tfserving
from workbook.engine import SERVING_IMAGE, choose_engine, docker_obstacle

# Fixtures.
__all__ = ["build", "built_model", "compose", "embedded_image", "gateway_image", "render"]

pytestmark = pytest.mark.docker
chosen, why = choose_engine("auto", image=None)
if chosen != "docker":
    pytest.skip(f"no container is run: {why}", allow_module_level=True)


@pytest.fixture(scope="session")
def own_images(build: Callable[..., str], built_model: Path) -> Iterator[dict[str, str]]:
    """Images of a model of one's own: the same one under another name."""
    name = f"test{uuid.uuid4().hex[:8]}-model"
    folder = shutil.copytree(built_model, ROOT / "build" / name)
    try:
        about = folder / "1/assets.extra/model.json"
        about.write_text(json.dumps(json.loads(about.read_text()) | {"name": name}))
        argument = f"--build-arg=MODEL_NAME={name}"
        gateway = build(name.replace("model", "gateway"), GATEWAY, argument)
        yield {"name": name, "gateway": gateway, "model-server": build(name, EMBEDDED, argument)}
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def network(build: Callable[..., str]) -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:8]}"
    docker("network", "create", name)
    yield name
    docker("network", "rm", name)


@pytest.fixture(scope="session")
def model_server(embedded_image: str, network: str) -> Iterator[str]:
    """A model server that containers on the network know as ``model``."""
    place = [f"--network={network}", "--network-alias=model", "--publish=127.0.0.1::8501"]
    with container(*place, embedded_image) as name:
        wait_for(name, f"http://{docker('port', name, '8501')}{STATUS}", b"AVAILABLE")
        yield name


@pytest.fixture
def start_gateway_container(gateway_image: str, model_server: str, network: str):
    """Run the gateway with these options until the test is over; give its name and address."""

    @contextmanager
    def start(*options: str) -> Iterator[tuple[str, str]]:
        port = free_port()
        place = [f"--network={network}", f"--publish=127.0.0.1:{port}:9696"]
        with container(*place, "--env=TF_SERVING_HOST=model:8500", *options, gateway_image) as name:
            url = f"http://127.0.0.1:{port}"
            wait_for(name, f"{url}/readyz")
            yield name, url

    return start


def test_both_images_serve_as_confined_as_their_manifests_say(
    gateway_image: str, embedded_image: str, network: str, render: Callable[[str], list[dict]]
) -> None:
    """User, rights, limits and volumes are those of the pods; so is the name of the Service."""
    deployments = of_kind(render("embedded"), "Deployment")
    options = {name: docker_options(each) for name, each in deployments.items()}
    variables = environment(deployments["gateway"])
    env = [f"--env={name}={value}" for name, value in variables.items()]
    port = free_port()
    publish = f"--publish=127.0.0.1:{port}:9696"
    alias = f"--network-alias={variables['TF_SERVING_HOST'].split('/')[-1].split(':')[0]}"
    on_net = [f"--network={network}", alias, *options["model-server"]]
    beside = [f"--network={network}", publish, *env]
    with (
        container(*on_net, embedded_image) as server,
        container(*beside, *options["gateway"], gateway_image) as gateway,
    ):
        wait_for(gateway, f"http://127.0.0.1:{port}/readyz")
        answer = classify(f"http://127.0.0.1:{port}", SAMPLES[0].read_bytes())
        assert answer.json()["top_class"] == CLASSES[0]
        for name, folder, size in ((server, "/tmp", 64), (gateway, "/dev/shm", 256)):
            assert docker("exec", name, "id", "-u") == "10001"
            for file, mebibytes, said in (
                ("/app/file", 0, "Read-only file system"),
                (f"{folder}/file", size + 1, "No space left on device"),
            ):
                write = f"head -c {mebibytes}M /dev/zero > {file}"
                command = ["docker", "exec", name, "sh", "-c", write]
                done = subprocess.run(command, capture_output=True, text=True, timeout=60)
                assert said in done.stderr
            assert inspect(name, ".State.OOMKilled") == "false"
            docker("exec", name, "rm", f"{folder}/file")
        assert [stop(gateway), stop(server)] == ["0", "0"]


def test_a_model_of_ones_own_is_served_under_its_name(
    own_images: dict[str, str], network: str
) -> None:
    port, rest = free_port(), free_port()
    on_net = [f"--network={network}", "--network-alias=own", f"--publish=127.0.0.1:{rest}:8501"]
    beside = [f"--network={network}", "--env=TF_SERVING_HOST=own:8500"]
    with (
        container(*on_net, own_images["model-server"]) as server,
        container(*beside, f"--publish=127.0.0.1:{port}:9696", own_images["gateway"]) as gateway,
    ):
        wait_for(gateway, f"http://127.0.0.1:{port}/readyz", own_images["name"].encode())
        answered = classify(f"http://127.0.0.1:{port}", SAMPLES[0].read_bytes()).json()
        assert (answered["model"]["name"], answered["top_class"]) == (own_images["name"], "dress")
        assert answer(f"http://127.0.0.1:{rest}/v1/models/{own_images['name']}")
        assert answer(f"http://127.0.0.1:{rest}{STATUS}") is None
        eventually(lambda: inspect(server, ".State.Health.Status") == "healthy", "it is healthy")
        assert docker("exec", server, "cat", "/proc/1/comm") == "python"
        assert [stop(gateway), stop(server)] == ["0", "0"]


def test_the_context_holds_only_what_the_images_copy(
    build: Callable[..., str], built_model: Path, tmp_path: Path
) -> None:
    others = ROOT / "build" / f"test-{uuid.uuid4().hex[:8]}"
    others.mkdir()
    (others / "photo").touch()
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM python:3.11-slim\nCOPY . /context\n")
    try:
        image = build("context", str(dockerfile))
    finally:
        shutil.rmtree(others)
    found = docker("run", "--rm", image, "find", "/context", "-type", "f").splitlines()
    names = {file.removeprefix("/context/").split("/")[0] for file in found}
    assert names - {"build"} == {
        *("Pipfile", "Pipfile.lock", "description.py", "gateway.py", "links.py", "pictures.py"),
        *("web.py", "worker.py", "gunicorn.conf.py"),
        *("tfserving", "website", "model_server"),
    }
    models = {file.split("/")[3] for file in found if file.startswith("/context/build/")}
    assert "clothing-model" in models and all(name.endswith("-model") for name in models)
    assert not [file for file in found if "__pycache__" in file or file.endswith(".keras")]
    du = ["du", "-s", "--block-size=1MB", "--exclude=/context/build", "/context"]
    assert int(docker("run", "--rm", image, *du).split()[0]) <= 5


def test_the_gateway_image_is_small_and_holds_no_more_than_it_needs(gateway_image: str) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        words = ["docker", "run", "--rm", "--network=none", gateway_image, *command]
        return subprocess.run(words, capture_output=True, text=True, timeout=60)

    packages = "/app/.venv/lib/python3.11/site-packages"
    assert (
        int(run("du", "-s", "--apparent-size", "--block-size=1MB", packages).stdout.split()[0])
        <= 140
    )
    for module in ("tensorflow", "pip", "setuptools", "pipenv"):
        assert "No module named" in run("python", "-c", f"import {module}").stderr
    base = run("/usr/bin/env", "PATH=/usr/local/bin:/usr/bin", "python3", "-m", "pip", "--version")
    assert "No module named pip" in base.stderr
    assert run("sh", "-c", "command -v gcc cc c++ make curl wget").stdout == ""
    assert run("id", "-u").stdout.strip() == "10001"
    assert run("sh", "-c", "find /app -writable -not -user 10001").stdout == ""


def test_the_model_servers_image_is_small_and_has_no_tensorflow(
    embedded_image: str, model_server: str
) -> None:
    assert int(inspect(embedded_image, ".Size")) <= 300e6
    run = ["docker", "run", "--rm", "--network=none", "--entrypoint=python3", embedded_image]
    for module in ("tensorflow", "tensorflow_serving", "keras"):
        done = subprocess.run([*run, "-c", f"import {module}"], capture_output=True, timeout=60)
        assert b"No module named" in done.stderr
    idle = re.search(r"VmRSS:\s+(\d+) kB", docker("exec", model_server, "cat", "/proc/1/status"))
    assert idle and int(idle[1]) <= 200_000  # 120,000 were measured


def test_the_images_say_what_they_are_and_whether_they_are_healthy(
    gateway_image: str, embedded_image: str, serving_image: str
) -> None:
    for image in (gateway_image, embedded_image, serving_image):
        labels = json.loads(inspect(image, "json .Config.Labels"))
        assert image.split(":")[0].endswith(labels["org.opencontainers.image.title"])
        for name in ("description", "licenses"):
            assert labels[f"org.opencontainers.image.{name}"]
        check = json.loads(inspect(image, "json .Config.Healthcheck.Test"))
        assert check[0] == "CMD"
        words = ["docker", "run", "--rm", "--entrypoint", check[1], image, *check[2:]]
        assert subprocess.run(words, capture_output=True, timeout=120).returncode == 1


def test_the_gateway_starts_with_little_work(start_gateway_container: Callable) -> None:
    """Its CPU time, which other programs do not lengthen as they do the time that passes."""
    with start_gateway_container() as (name, _):
        stats = docker("exec", name, "sh", "-c", "cat /proc/[0-9]*/stat").splitlines()
        fields = [line.rpartition(")")[2].split() for line in stats if "(gunicorn)" in line]
        ticks = int(docker("exec", name, "getconf", "CLK_TCK"))
    assert len(fields) == 2, "gunicorn and its worker"
    assert sum(int(each[11]) + int(each[12]) for each in fields) / ticks < 2


def test_the_gateway_image_works_with_nothing_it_could_do_without(
    start_gateway_container: Callable,
) -> None:
    limits = ["--user=10001", "--memory=256m", "--memory-swap=256m", "--cpus=0.5"]
    with start_gateway_container(*HARDENED, *limits) as (name, url):
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda path: classify(url, path.read_bytes()), SAMPLES))
        assert [answer.json()["top_class"] for answer in answers] == CLASSES
        large = SAMPLES[0].read_bytes() + b"\0" * 5_000_000  # goes through a file
        assert classify(url, large).json()["top_class"] == CLASSES[0]
        page = requests.get(url, timeout=60)
        assert page.ok and "text/html" in page.headers["Content-Type"]
        links = re.findall(r'(?:src|href)="/?(\w[^":]+)"', page.text)
        assert len(links) > 2
        for link in links:
            assert requests.get(f"{url}/{link}", timeout=60).ok, link
        assert answer(f"{url}/metrics") is None
        told = docker("exec", name, "python", "-c", METRICS)
        assert "gateway_seconds_count" in told and docker("port", name).startswith("9696/tcp")
        eventually(lambda: inspect(name, ".State.Health.Status") == "healthy", "it is healthy")
        assert docker("exec", name, "cat", "/proc/1/comm") == "gunicorn"
        assert inspect(name, ".State.OOMKilled") == "false"
        assert stop(name) == "0"


METRICS = """
import os, requests
print(requests.get(f"http://127.0.0.1:{os.environ['METRICS_PORT']}").text)
"""

# Asks from a container beside the gateway, since Docker's port on this machine takes connections
# for a while when there is nobody behind it any more.
CLIENT = """
import sys, threading, description, requests, urllib3
picture = description.read("model.json").samples[0].jpeg
def ask():
    try:
        while True:
            answer = requests.post(sys.argv[1], files={"file": picture}, timeout=60)
            sys.stdout.write(f"{answer.status_code}\\n")
            sys.stdout.flush()
    except requests.ConnectionError as error:
        cut = isinstance(error.args[0], urllib3.exceptions.ProtocolError)
        sys.stdout.write("cut\\n" if cut else "refused\\n")
threads = [threading.Thread(target=ask) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_a_gateway_answers_whom_it_has_accepted_before_it_ends(
    start_gateway_container: Callable, gateway_image: str, network: str
) -> None:
    with start_gateway_container() as (name, _):
        ask = ["python", "-c", CLIENT, f"http://{name}:9696/predict"]
        with container(f"--network={network}", gateway_image, *ask) as client:
            eventually(lambda: docker("logs", client).count("200") > 20, "answers come")
            assert stop(name) == "0"
            assert docker("wait", client) == "0"
            said = docker("logs", client).splitlines()
    assert {*said} == {"200", "refused"} and said.count("refused") == 4


def test_a_gateway_that_ran_out_of_memory_serves_again(start_gateway_container: Callable) -> None:
    pixels = encode(Image.new("RGBA", (5000, 5000)), "PNG")
    limits = ["--memory=140m", "--memory-swap=140m", "--restart=unless-stopped"]
    with start_gateway_container(*limits) as (name, url):
        with pytest.raises(requests.ConnectionError):
            classify(url, pixels)
        wait_for(name, f"{url}/readyz")
        assert classify(url, SAMPLES[0].read_bytes()).json()["top_class"] == CLASSES[0]


def test_the_memory_of_fault_lab_4_is_too_little_and_that_of_its_mend_enough(
    embedded_image: str,
) -> None:
    def options(folder: str) -> list[str]:
        objects = run_kustomize(KUBE / "faults" / folder)
        return docker_options(of_kind(objects, "Deployment")["model-server"])

    with container(*options("lab-4"), embedded_image) as name:
        assert docker("wait", name) == "137"
        assert inspect(name, ".State.OOMKilled") == "true"
    publish = "--publish=127.0.0.1::8501"
    with container(*options("working"), publish, embedded_image) as name:
        wait_for(name, f"http://{docker('port', name, '8501')}{STATUS}", b"AVAILABLE")


def test_a_model_server_that_ran_out_of_memory_is_started_again(embedded_image: str) -> None:
    ports = free_port(), free_port()
    publish = [
        f"--publish=127.0.0.1:{mine}:{its}" for mine, its in zip(ports, (8500, 8501), strict=True)
    ]
    status = f"http://127.0.0.1:{ports[1]}{STATUS}"
    with container("--restart=unless-stopped", *publish, embedded_image) as name:
        wait_for(name, status, b"AVAILABLE")
        # What it took to load the model, which is more than it keeps, and a little.
        peak = re.search(r"VmHWM:\s+(\d+) kB", docker("exec", name, "cat", "/proc/1/status"))
        assert peak
        limit = f"{int(peak[1]) // 1024 + 100}m"
        docker("update", f"--memory={limit}", f"--memory-swap={limit}", name)

        pb_request = tfserving.PredictRequest()
        pb_request.model_spec.name = "clothing-model"
        batch = np.zeros((128, 224, 224, 3), np.float32)
        pb_request.inputs["inputs"].CopyFrom(tfserving.make_tensor_proto(batch))
        with tfserving.make_channel(f"127.0.0.1:{ports[0]}") as channel:
            stub = tfserving.PredictionServiceStub(channel)
            calls = [stub.Predict.future(pb_request, timeout=60) for _ in range(4)]
            eventually(lambda: inspect(name, ".RestartCount") != "0", "it is started again")
            for call in calls:
                call.cancel()
        wait_for(name, status, b"AVAILABLE")
        rows = {"instances": np.zeros((1, 224, 224, 3)).tolist()}
        assert requests.post(f"{status}:predict", json=rows, timeout=60).ok


@pytest.fixture(scope="session")
def serving_image(build: Callable[..., str], embedded_image: str) -> str:
    """An image of model_server/Dockerfile, on top of a stand-in for TensorFlow Serving's."""
    server = "/usr/bin/tensorflow_model_server"
    script = '#!/bin/sh\\nexec python -m model_server --prefer_tflite_model "$@"\\n'
    lines = [
        f"FROM {embedded_image}",
        "USER 0",
        f"RUN printf '{script}' > {server} && chmod +x {server}",
        "RUN rm -r /models /etc/serving",
        "ENV MODEL_BASE_PATH=/models MODEL_NAME=model",
        'ENTRYPOINT ["/usr/bin/tf_serving_entrypoint.sh"]',
        "HEALTHCHECK NONE",
    ]
    stand_in = build("stand-in", "", stdin="\n".join(lines))
    return build("clothing-model", SERVING, f"--build-arg=SERVING_IMAGE={stand_in}")


def test_the_tensorflow_serving_image_has_its_model_settings_and_health(serving_image: str) -> None:
    ports = free_port(), free_port()
    publish = [
        f"--publish=127.0.0.1:{mine}:{its}" for mine, its in zip(ports, (8500, 8501), strict=True)
    ]
    with container("--init", *HARDENED, "--tmpfs=/tmp", *publish, serving_image) as name:
        eventually(lambda: inspect(name, ".State.Health.Status") == "healthy", "healthy", 120)
        check = [*json.loads(inspect(name, "json .Config.Healthcheck.Test"))[1:]]
        for model, status in (("clothing-model", 0), ("another-model", 1)):
            ask = ["docker", "exec", f"--env=MODEL_NAME={model}", name, *check]
            assert subprocess.run(ask, timeout=60).returncode == status
        assert docker("exec", name, "id", "-u") == "10001"
        with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        rest = f"http://127.0.0.1:{ports[1]}"
        rows = {"instances": np.zeros((3, 224, 224, 3)).tolist()}
        assert requests.post(f"{rest}{STATUS}:predict", json=rows, timeout=60).ok
        page = (answer(f"{rest}/monitoring/prometheus/metrics") or b"").decode()
        assert 'padding_size_count{execution_batch_size="4"} 1' in page  # three rows become four


def test_the_official_image_is_what_the_dockerfile_builds_upon(build: Callable[..., str]) -> None:
    """Where it cannot be had, the build gets as far as its FROM, and no further."""
    if docker_obstacle(SERVING_IMAGE):
        with pytest.raises(AssertionError) as failed:
            build("clothing-model", SERVING)
        assert re.search(rf"{SERVING_IMAGE}|tensorflow/serving/manifests", str(failed.value))
        assert not re.search("unknown instruction|parse error|COPY failed", str(failed.value))
        return
    with container("--init", *HARDENED, "--tmpfs=/tmp", build("clothing-model", SERVING)) as name:
        eventually(lambda: inspect(name, ".State.Health.Status") == "healthy", "healthy", 120)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
@pytest.mark.parametrize("name", ["clothing-model", "flower"])
def test_without_a_model_one_sentence_says_what_to_do(
    build: Callable[..., str], dockerfile: str, name: str, tmp_path: Path
) -> None:
    for file in [*DOCKERFILES, "Pipfile", "Pipfile.lock", ".dockerignore"]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    arguments = ["--force-rm", f"--file={dockerfile}", "--build-arg=SERVING_IMAGE=python:3.11-slim"]
    arguments += [f"--build-arg=MODEL_NAME={name}"]
    done = subprocess.run(
        ["docker", "build", *arguments, "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert re.search(rf"There is no build/{name}/1.*: make workbook ONLY=01 exports it", said)
    assert "only folders that end in -model reach Docker" in said


@pytest.mark.thorough
@pytest.mark.parametrize("dockerfile", [GATEWAY, EMBEDDED])
def test_packages_come_from_the_mirror_that_the_builder_names(
    gateway_image: str, dockerfile: str
) -> None:
    """The mirror has no package; it is enough that it is asked, and that nobody else is."""
    with container(gateway_image, "python", "-m", "http.server", "8000") as mirror:
        host = inspect(mirror, "range .NetworkSettings.Networks}}{{.IPAddress}}{{end")
        arguments = [f"--build-arg=PIP_INDEX_URL=http://{host}:8000/simple"]
        arguments += [f"--build-arg=PIP_TRUSTED_HOST={host}", "--target=packages"]
        words = ["docker", "build", "--force-rm", f"--file={dockerfile}", *arguments, "."]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
        logs = subprocess.run(["docker", "logs", mirror], capture_output=True, text=True)
    assert done.returncode != 0 and "No matching distribution found for pipenv" in (
        done.stdout + done.stderr
    )
    assert re.findall('"GET (.*) HTTP', logs.stderr) == ["/simple/pipenv/"]
