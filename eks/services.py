"""The Services of the cluster for which AWS runs load balancers."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from eks.account import Problem


def delete_services(cluster: dict[str, Any], region: str) -> None:
    """Delete a cluster's Services of type LoadBalancer; a controller then deletes the rest."""
    name = cluster["name"]
    token = ["eks", "get-token", "--cluster-name", name, "--region", region, "--output", "json"]
    login = {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": "aws"}
    authority = cluster["certificateAuthority"]["data"]
    server = {"server": cluster["endpoint"], "certificate-authority-data": authority}
    user = {"exec": {**login, "args": token, "interactiveMode": "Never"}}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": server}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
    }
    with tempfile.TemporaryDirectory() as folder:
        # A file of its own, so that kubectl knows no other cluster of yours.
        path = Path(folder, "kubeconfig")
        path.write_text(json.dumps(config))
        ask = partial(kubectl, f"--kubeconfig={path}", f"--context={name}")
        services = json.loads(ask("get", "services", "--all-namespaces", "--output=json"))
        for service in services["items"]:
            if service["spec"]["type"] == "LoadBalancer":
                about = service["metadata"]
                where = f"--namespace={about['namespace']}"
                ask("delete", "service", about["name"], where, "--wait=false")
                print(f"service {about['namespace']}/{about['name']} deleted")


def find_kubectl() -> str | None:
    """Return the path of kubectl, preferably of the one in this Python's environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return shutil.which("kubectl", path=path)


def kubectl(*arguments: str) -> str:
    """Run kubectl and return its output."""
    found = find_kubectl()
    if not found or not shutil.which("aws"):
        raise Problem("Deleting the cluster's Services takes kubectl and aws: install them.")
    command = [found, *arguments, "--request-timeout=30s"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise Problem(
            f"The cluster has load balancers and does not let its Services be deleted: {said} "
            "With the cluster gone they would stay and cost money, so nothing was deleted."
        )
    return done.stdout
