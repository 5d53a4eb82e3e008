"""Which engine runs TensorFlow Serving here: Docker, or the embedded server `model_server`."""

import json
import os
import shutil
import socket
import subprocess
from threading import Timer

SERVING_IMAGE = "tensorflow/serving:2.20.0"
PROBE_SECONDS = 10.0
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def choose_engine(wanted: str = "auto", image: str = SERVING_IMAGE) -> tuple[str, str]:
    """Choose what runs TensorFlow Serving, and fetch its Docker image where that is possible.

    Args:
        wanted: `auto`, `docker` or `embedded`; for `auto` the environment variable
            `WORKBOOK_ENGINE` decides, where it is set.
        image: the Docker image that must be on this machine, or be had from its registry.

    Returns:
        The engine, `docker` or `embedded`, and the reason in one phrase.

    Raises:
        ValueError: `wanted` is none of the three.
        RuntimeError: Docker was asked for and cannot be used; the sentence says why.
    """
    if wanted == "auto":
        wanted = os.environ.get("WORKBOOK_ENGINE") or "auto"
    if wanted not in ("auto", "docker", "embedded"):
        raise ValueError(f"WORKBOOK_ENGINE is {wanted!r}: choose auto, docker or embedded.")
    if wanted == "embedded":
        return "embedded", "asked for"
    obstacle = docker_obstacle(image)
    if obstacle is None:
        return "docker", f"a Docker engine answers and has {image}"
    if wanted == "docker":
        raise RuntimeError(
            f"Docker was asked for, but {obstacle}; mend that, or take WORKBOOK_ENGINE=embedded."
        )
    return "embedded", obstacle


def require_free_ports(*ports: int) -> None:
    """Raise RuntimeError, with a sentence that says what to do, when a port is taken."""
    for port in ports:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                raise RuntimeError(
                    f"Port {port} is in use: end the program that holds it, "
                    "or choose another one in the cell of parameters."
                )


def docker_obstacle(image: str) -> str | None:
    """Say what keeps `image` from running in Docker here, or None when nothing does."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    machine = docker("info", "--format", "{{.Architecture}}")
    if not machine:
        return "no Docker engine answers"
    found = docker("image", "inspect", image)
    if not found:
        if MACHINES.get(machine, machine) != "amd64":
            return f"{image} is made for amd64 and this engine runs on {machine}"
        return pull_obstacle(image)
    if json.loads(found)[0]["Architecture"] != MACHINES.get(machine, machine):
        return f"the {image} that is here was made for another processor than {machine}"
    return None


def docker(*arguments: str) -> str:
    """Run one docker command and return its output; nothing when it fails or takes too long."""
    try:
        answer = subprocess.run(
            ["docker", *arguments], capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def pull_obstacle(image: str) -> str | None:
    """Pull `image`, a dot for each finished layer; None, or what kept it from coming.

    The engine prints its first line once the registry has answered. A network that swallows
    every packet would keep it waiting for minutes, so that line has a deadline.
    """
    pull = subprocess.Popen(
        ["docker", "pull", image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = Timer(PROBE_SECONDS, pull.kill)
    deadline.daemon = True
    deadline.start()
    last = ""
    with pull:
        assert pull.stdout is not None
        for last in pull.stdout:
            if ": Pulling from " in last:
                deadline.cancel()
                print(f"pulling {image}, once, some 200 MB")
            if last.rstrip().endswith("Pull complete"):
                print(".", end="", flush=True)
    deadline.cancel()
    if pull.returncode == 0:
        print(" done")
        return None
    if pull.returncode < 0 or "dial tcp" in last or "Client.Timeout" in last:
        return f"the registry of {image} cannot be reached"
    return f"{image} cannot be pulled ({last.strip() or 'no reason given'})"
