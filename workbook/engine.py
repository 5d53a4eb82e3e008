"""Which engine runs TensorFlow Serving here, Docker or our `model_server`, and how commands run."""

import os
import shlex
import shutil
import subprocess
from threading import Timer

from workbook.manifests import read_image

SERVING_IMAGE = "tensorflow/serving:2.20.0"
PROBE_SECONDS = 10.0
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def choose_engine(
    wanted: str = "auto", image: str | None = SERVING_IMAGE, look_only: bool = False
) -> tuple[str, str]:
    """Choose what runs TensorFlow Serving, and fetch its Docker image where that is possible.

    Args:
        wanted: `auto`, `docker` or `embedded`; for `auto` WORKBOOK_ENGINE decides, if it is set.
        image: what must be on this machine, or be had from its registry; None for images that are
            built here, with any engine that has Compose.
        look_only: fetch nothing, and take it that an image can be had from its registry.

    Returns `docker` or `embedded`, and the reason in one phrase. Raises RuntimeError, with a
    sentence that says why, if Docker was asked for and cannot be used.
    """
    if wanted_engine(wanted) == "embedded":
        return "embedded", "asked for"
    if obstacle := docker_obstacle(image, look_only):
        return settle_for_embedded(wanted, obstacle)
    return "docker", f"a Docker engine answers and has {image or 'Compose'}"


def wanted_engine(wanted: str) -> str:
    """Return `auto`, `docker` or `embedded`: for `auto`, what WORKBOOK_ENGINE says, if anything."""
    if wanted == "auto":
        wanted = os.environ.get("WORKBOOK_ENGINE") or "auto"
    if wanted not in ("auto", "docker", "embedded"):
        raise ValueError(f"WORKBOOK_ENGINE is {wanted!r}: choose auto, docker or embedded.")
    return wanted


def settle_for_embedded(wanted: str, obstacle: str) -> tuple[str, str]:
    """Return `embedded` and the obstacle; or RuntimeError where Docker was asked for."""
    if wanted_engine(wanted) == "docker":
        raise RuntimeError(
            f"Docker was asked for, but {obstacle}; mend that, or take WORKBOOK_ENGINE=embedded."
            " See docs/troubleshooting.md#docker."
        )
    return "embedded", obstacle


def docker_obstacle(image: str | None, look_only: bool = False) -> str | None:
    """Say what keeps `image` (None: Compose) from running in Docker here, or None: nothing.

    An image that is not here is pulled; with `look_only`, it is not.
    """
    if shutil.which("docker") is None:
        return "there is no docker command"
    machine = docker("info", "--format", "{{.Architecture}}")
    if not machine:
        return "no Docker engine answers"
    if image is None:
        found = shutil.which("docker-compose") or docker("compose", "version")
        return None if found else "there is no docker-compose command"
    processor = MACHINES.get(machine, machine)
    if not (found := docker("image", "inspect", "--format={{.Architecture}}", image)):
        if processor != "amd64":
            return f"{image} is made for amd64 and this engine runs on {machine}"
        return None if look_only else pull_obstacle(image)
    if found != processor:
        return f"the {image} that is here was made for another processor than {machine}"
    return None


def docker(*arguments: str) -> str:
    """Run one docker command and return its output; nothing when it fails or takes too long."""
    words = ["docker", *arguments]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def run(command: str, check: bool = True, width: int | None = None) -> None:
    """Run a command; print it, and what it prints, line by line, cut to a width if there is one.

    Raises RuntimeError if it fails, and shall be checked.
    """
    print("$", command, flush=True)
    # Jupyter asks programs for colours, and for bars that move, which an output cannot show.
    env = {**os.environ, "FORCE_COLOR": "", "TERM": "dumb"}
    words = ["bash", "-o", "pipefail", "-c", f"exec 2>&1; {command}"]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line.rstrip("\n")[:width], flush=True)
    if check and process.returncode:
        raise RuntimeError(f"This failed, see above: {command}")


def command_of(
    dockerfile: str, changes: dict[str, str], arguments: dict[str, str] | None = None
) -> str:
    """Return what a Dockerfile has in ENTRYPOINT and CMD, with changes for outside a container.

    `arguments` are the build's. Raises KeyError if what is to be changed is not there.
    """
    image = read_image(dockerfile, arguments=arguments)
    words = [*image.entrypoint, *image.command]
    for inside, outside in changes.items():
        if not any(inside in word for word in words):
            raise KeyError(f"{inside} is not in {words}")
        words = [word.replace(inside, outside) for word in words]
    return shlex.join(words)


def remove_containers(name: str) -> None:
    """Remove all containers and networks whose names begin with `name`, where Docker runs."""
    match = f"--filter=name=^/?{name}[-_]"
    if containers := docker("container", "ls", "--all", "--quiet", match).split():
        docker("container", "rm", "--force", "--volumes", *containers)
    if networks := docker("network", "ls", "--quiet", match).split():
        docker("network", "rm", *networks)


def pull_obstacle(image: str) -> str | None:
    """Pull `image`, a dot for each finished layer; None, or what kept it from coming.

    The engine prints its first line once the registry has answered. A network that swallows
    every packet would keep it waiting for minutes, so that line has a deadline.
    """
    words, both = ["docker", "pull", image], subprocess.STDOUT
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=both, text=True) as pull:
        deadline = Timer(PROBE_SECONDS, pull.kill)
        deadline.start()
        last = ""
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
