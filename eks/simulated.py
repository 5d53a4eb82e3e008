"""An AWS account that moto simulates on this machine, and a registry for its images.

    account = SimulatedAccount(Path("build/eks"))
    account.enter()                     # from here on, nothing of yours can be reached by accident
    account.make_cluster(aws, cluster)
    address, obstacle = account.start_registry()
    account.close()

eksctl and Docker cannot work in such an account. So the calls that eksctl would make are made here,
and Docker pushes to the registry. A second account with the same folder closes the first one.
"""

import atexit
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from eks.account import Cluster, Problem
from eks.images import docker

START_SECONDS = 120.0
open_accounts: dict[Path, "SimulatedAccount"] = {}


class SimulatedAccount:
    """An account that holds what is made in it until `close`.

    Args:
        folder: where the registry keeps its images and where programs write their logs. Whatever
            is in it is deleted.

    Attributes:
        images: names of images on Docker's engine that `close` removes.
    """

    def __init__(self, folder: Path) -> None:
        if folder in open_accounts:
            open_accounts[folder].close()
        open_accounts[folder] = self
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self.images: list[str] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        atexit.register(self.close)

    def enter(self) -> None:
        """Let this process, and everything that it starts from now on, know no other account.

        Every variable whose name begins with AWS_ is removed: keys, profiles, tokens, addresses.
        The new variables hold keys that open nothing and moto's address, and switch off the
        configuration files and the metadata service.
        """
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        address = f"127.0.0.1:{free_port()}"
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{address}",
            "AWS_ACCESS_KEY_ID": "rehearsal",
            "AWS_SECRET_ACCESS_KEY": "rehearsal",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        host, _, port = address.partition(":")
        program = str(Path(sys.executable).with_name("moto_server"))
        self._start([program, "-H", host, "-p", port], f"http://{address}/moto-api/")

    def make_cluster(self, aws: Callable[[str], Any], cluster: Cluster) -> None:
        """Create the cluster and its node groups, with the calls to EKS that eksctl makes."""
        subnets = [each["SubnetId"] for each in aws("ec2").describe_subnets()["Subnets"][:2]]
        role = f"arn:aws:iam::{aws('sts').get_caller_identity()['Account']}:role/eks"
        eks = aws("eks")
        eks.create_cluster(
            name=cluster.name,
            version=cluster.version,
            roleArn=role,
            resourcesVpcConfig={"subnetIds": subnets},
            tags=cluster.tags,
        )
        for group in cluster.node_groups:
            name = group["name"]
            eks.create_nodegroup(
                clusterName=cluster.name, nodegroupName=name, subnets=subnets, nodeRole=role
            )

    def forget_load_balancer(self, aws: Callable[[str], Any], cluster: Cluster) -> None:
        """Create what is left over when a cluster is deleted before its load balancer."""
        subnet = aws("ec2").describe_subnets()["Subnets"][0]
        tags = [{"Key": key, "Value": value} for key, value in cluster.tags.items()]
        balancing, name = aws("elbv2"), "forgotten"
        balancing.create_load_balancer(
            Name=name, Type="network", Subnets=[subnet["SubnetId"]], Tags=tags
        )
        balancing.create_target_group(
            Name=name, Protocol="TCP", Port=80, VpcId=subnet["VpcId"], Tags=tags
        )

    def start_registry(self) -> tuple[str, str]:
        """Start a registry that Docker can push to.

        Returns:
            Its address and an empty phrase; or an empty address and a phrase that says why.
        """
        if not shutil.which("docker-registry"):
            return "", "there is no docker-registry program"
        nodes = {"x86_64": "amd64", "AMD64": "amd64"}.get(platform.machine())
        if not nodes:
            return "", f"the nodes are amd64, and images that are built here {platform.machine()}"
        address = f"127.0.0.1:{free_port()}"
        storage = {"filesystem": {"rootdirectory": str(self.folder / "registry")}}
        config = {"version": 0.1, "storage": storage, "http": {"addr": address}}
        (self.folder / "registry.json").write_text(json.dumps(config))
        command = ["docker-registry", "serve", str(self.folder / "registry.json")]
        self._start(command, f"http://{address}/v2/")
        # An engine in a virtual machine, as on macOS, or in another network does not reach it.
        pull = ["docker", "pull", f"{address}/none:1"]
        said = subprocess.run(pull, capture_output=True, text=True).stderr
        if "not found" in said:
            return address, ""
        return "", "the Docker engine does not reach a registry on this machine"

    def close(self) -> None:
        """End everything, and remove images and folder; at the latest when the program ends."""
        for name in list(self.processes):
            self._stop(name)
        while self.images:
            with suppress(Problem):
                docker("image", "rm", self.images.pop())
        shutil.rmtree(self.folder, ignore_errors=True)
        open_accounts.pop(self.folder, None)
        atexit.unregister(self.close)

    def _start(self, command: list[str], url: str) -> None:
        """Start a program, replace an earlier one, and wait for an answer; or RuntimeError."""
        name = Path(command[0]).name
        self._stop(name)
        log = self.folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)
        self.processes[name] = process
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(url, timeout=5):
                return
            time.sleep(0.1)
        raise RuntimeError(f"{name} does not start: {log} says why.")

    def _stop(self, name: str) -> None:
        """End a program, if it was started."""
        if (process := self.processes.pop(name, None)) is not None:
            process.terminate()
            process.wait(timeout=60)


def overlay_images(folder: Path) -> list[str]:
    """Return the names that an overlay of `eks.publish` gives to the images, in their order."""
    overlay = yaml.safe_load((folder / "kustomization.yaml").read_text())
    return [
        f"{each['newName']}@{each['digest']}"
        if "digest" in each
        else f"{each['newName']}:{each['newTag']}"
        for each in overlay["images"]
    ]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
