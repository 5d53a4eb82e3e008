"""Local images: which processor they are for, and how they get into a registry."""

import base64
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from eks.account import Cluster, Problem


def docker(*arguments: str, **options: Any) -> str:
    """Run a docker command and return its output; raise Problem with its last line."""
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, **options)
    except FileNotFoundError:
        raise Problem("There is no docker command: install Docker, or give --no-push.") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise Problem(f"docker {arguments[0]} failed: {said}")
    return done.stdout.strip()


def inspect(image: str, cluster: Cluster) -> str:
    """Return the id of a local image; raise Problem where the cluster's nodes cannot run it."""
    docker("version")
    try:
        found = json.loads(docker("image", "inspect", image))[0]
    except Problem:
        raise Problem(f"There is no image {image}: docker compose build makes it.") from None
    nodes = {architecture(group["instanceType"]) for group in cluster.node_groups}
    if found["Architecture"] not in nodes:
        raise Problem(
            f"{image} is made for {found['Architecture']} and the nodes are {'/'.join(nodes)}: "
            f"build it with DOCKER_DEFAULT_PLATFORM=linux/{min(nodes)}, or change the instance "
            "types of eks/cluster.yaml."
        )
    return found["Id"]


def architecture(instance_type: str) -> str:
    """Return the processor of an instance type: a g after the number means Graviton."""
    family = instance_type.partition(".")[0]
    return "arm64" if re.fullmatch(r"[a-z]+\d+[a-z]*g[a-z-]*\d*", family) else "amd64"


@contextmanager
def logged_in(registry: str, token: str) -> Iterator[dict[str, str]]:
    """Log Docker in to a registry, with a configuration of its own that is deleted afterwards.

    The password reaches Docker through its standard input, so no command line and no output has
    it.

    Args:
        registry: host, or host and port.
        token: user and password as ECR gives them, joined by a colon, in Base64.

    Yields:
        The environment for docker commands that need the login.
    """
    user, _, password = base64.b64decode(token).decode().partition(":")
    # The engine's address is in the configuration that the new one replaces.
    host = docker("context", "inspect", "--format", "{{.Endpoints.docker.Host}}")
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "DOCKER_CONFIG": folder, "DOCKER_HOST": host}
        env.pop("DOCKER_CONTEXT", None)
        login = ["login", "--username", user, "--password-stdin", registry]
        try:
            docker(*login, input=password, env=env)
            yield env
        finally:
            # Some systems keep logins in a keychain, which the folder's end does not empty.
            with suppress(Problem):
                docker("logout", registry, env=env)


def push(image: str, target: str, env: dict[str, str]) -> str:
    """Push a local image under another name, and return the digest that the registry gave it."""
    megabytes = int(docker("image", "inspect", "--format", "{{.Size}}", image)) // 1_000_000
    print(f"pushing {image}, {megabytes} MB unpacked")
    docker("tag", image, target)
    try:
        with Console().status(image):
            docker("push", "--quiet", target, env=env)
        digests = json.loads(
            docker("image", "inspect", "--format", "{{json .RepoDigests}}", target)
        )
    finally:
        docker("image", "rm", target)
    repository = target.rpartition(":")[0]
    (digest,) = {each.split("@")[1] for each in digests if each.startswith(f"{repository}@")}
    return digest
