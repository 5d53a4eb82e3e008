"""The images, built and run by a real Docker engine."""

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, free_port

pytestmark = pytest.mark.docker


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def embedded_image(clothing_model: Path) -> Iterator[str]:
    if os.environ.get("DOCKER_TESTS") != "1":
        pytest.skip("building images downloads a gigabyte; DOCKER_TESTS=1 asks for it")
    if (
        not shutil.which("docker")
        or subprocess.run(["docker", "info"], capture_output=True).returncode
    ):
        pytest.skip("no Docker engine answers")
    if not (ROOT / "build/clothing-model/1").exists():
        shutil.copytree(clothing_model, ROOT / "build/clothing-model", dirs_exist_ok=True)
    tag = f"clothing-model:test-{uuid.uuid4().hex[:8]}"
    docker("build", "--file", "model_server/embedded.dockerfile", "--tag", tag, ".")
    yield tag
    docker("image", "rm", "--force", tag)


def test_the_embedded_image_serves_unprivileged_and_read_only(embedded_image: str) -> None:
    port, name = free_port(), f"test-{uuid.uuid4().hex[:8]}"
    hardened = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp"]
    publish = f"--publish=127.0.0.1:{port}:8501"
    docker("run", "--detach", f"--name={name}", *hardened, publish, embedded_image)
    try:
        status = wait_for_status(name, f"http://127.0.0.1:{port}/v1/models/clothing-model")
        assert [version["state"] for version in status["model_version_status"]] == ["AVAILABLE"]
        assert docker("exec", name, "id", "-u") == "10001"
        docker("stop", "--time=20", name)
        assert docker("inspect", "--format={{.State.ExitCode}}", name) == "0"
    finally:
        docker("rm", "--force", name)


def wait_for_status(container: str, url: str) -> dict:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return json.load(response)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    logs = subprocess.run(["docker", "logs", container], capture_output=True, text=True)
    pytest.fail(f"{url} never answered; the container says: {logs.stderr[-2000:]}")
