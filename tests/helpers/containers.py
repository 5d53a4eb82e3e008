"""Dockerfiles, and what builds images of them and runs these as containers."""

import fcntl
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests

from helpers.basics import ROOT, eventually
from workbook import engine

GATEWAY = "gateway.dockerfile"
SERVING, EMBEDDED = "model_server/Dockerfile", "model_server/embedded.dockerfile"
DOCKERFILES = [GATEWAY, SERVING, EMBEDDED]
HARDENED = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
MIRROR = ["--build-arg=PIP_INDEX_URL", "--build-arg=PIP_TRUSTED_HOST"]  # as the shell has them
STATUS = "/v1/models/clothing-model"


def docker(*arguments: str, seconds: float = 60, stdin: str | None = None) -> str:
    """Run a docker command that must succeed, and return what it prints."""
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        input=stdin,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout.strip()


def inspect(name: str, field: str) -> str:
    return docker("inspect", f"--format={{{{{field}}}}}", name)


def unique(name: str) -> str:
    return f"{name}:test-{uuid.uuid4().hex[:8]}"


@contextmanager
def container(*arguments: str) -> Iterator[str]:
    """A container that runs in the background, and is removed in the end."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    try:
        docker("run", "--detach", f"--name={name}", *arguments)
        yield name
    finally:
        docker("rm", "--force", "--volumes", name)


def answer(url: str) -> bytes | None:
    """What an address answers with 200, or None."""
    with suppress(requests.RequestException):
        response = requests.get(url, timeout=5)
        return response.content if response.ok else None
    return None


def classify(url: str, picture: bytes, timeout: float = 60, **options) -> requests.Response:
    return requests.post(f"{url}/predict", files={"file": picture}, timeout=timeout, **options)


def wait_for(name: str, url: str, word: bytes = b"") -> None:
    """Poll an address of a container until its answer has this word."""
    try:
        eventually(lambda: word in (answer(url) or b"") and answer(url), url, seconds=120)
    except BaseException:
        logs = subprocess.run(["docker", "logs", "--tail=50", name], capture_output=True, text=True)
        print(logs.stdout, logs.stderr)
        raise


def stop(name: str) -> str:
    """Stop a container as Docker does, and return its exit status."""
    docker("stop", "--time=30", name)
    return inspect(name, ".State.ExitCode")


@pytest.fixture(scope="session")
def built_model(request: pytest.FixtureRequest, made_once: Callable[..., Path]) -> Path:
    """The exported model where Dockerfiles look for it."""
    folder = ROOT / "build/clothing-model"

    def copy_unless_there(_: Path) -> None:
        if not (folder / "1").exists():
            shutil.copytree(request.getfixturevalue("clothing_model"), folder, dirs_exist_ok=True)

    made_once("built-model", copy_unless_there)
    return folder


@pytest.fixture(scope="session")
def gateway_image(build: Callable[..., str], built_model: Path) -> str:
    return build("clothing-gateway", GATEWAY)


@pytest.fixture(scope="session")
def embedded_image(build: Callable[..., str], built_model: Path) -> str:
    return build("clothing-model", EMBEDDED)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Build an image of a Dockerfile, and return its tag; all tags are removed in the end.

    One worker of pytest-xdist builds at a time, and others find the layers in the engine's cache.

    Where no Docker engine answers, the tests are skipped that want something built.
    """
    chosen, why = engine.choose_engine("auto", image=None)
    if chosen != "docker":
        pytest.skip(f"no container is run: {why}")
    tags: list[str] = []
    folder = tmp_path_factory.getbasetemp()
    lock = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "building.lock"

    def build(name: str, dockerfile: str, *arguments: str, stdin: str | None = None) -> str:
        tags.append(unique(name))
        # A Dockerfile from stdin comes alone, without the folder.
        files = ["-"] if stdin else [f"--file={dockerfile}", "."]
        command = ["build", "--force-rm", f"--tag={tags[-1]}", *MIRROR, *arguments, *files]
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            docker(*command, seconds=1800, stdin=stdin)
        return tags[-1]

    yield build
    for tag in reversed(tags):
        subprocess.run(["docker", "image", "rm", "--force", tag], capture_output=True, timeout=60)


def instructions(dockerfile: str, name: str) -> list[str]:
    """The arguments of every instruction of this name, continued lines joined."""
    text = (ROOT / dockerfile).read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*?) *$", text, re.MULTILINE)
