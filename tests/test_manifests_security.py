"""What the pods of kube-config/ may do: no more than Pod Security's profile `restricted`."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.containers import GATEWAY, instructions
from helpers.manifests import (
    COMPOSE,
    DOCKERFILES,
    SMALL,
    container,
    objects,
    of_kind,
    pod,
    render,
)

from workbook.manifests import quantity

__all__ = ["objects", "render"]  # fixtures

VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"),
    *("projected", "secret", "image"),  # the last of them since Kubernetes 1.33
}


def offences(spec: dict) -> Iterator[str]:
    """What Pod Security's profile `restricted` has against a pod."""
    contexts = [spec.get("securityContext", {})]
    for each in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(each):
            yield each
    for volume in spec.get("volumes", []):
        if not volume.keys() - {"name"} <= VOLUMES:
            yield f"volume {volume['name']}"
    for each in spec.get("initContainers", []) + spec["containers"]:
        own = each.get("securityContext", {})
        contexts.append(own)
        merged = contexts[0] | own
        if not merged.get("runAsNonRoot"):
            yield "runAsNonRoot"
        if merged.get("runAsUser") == 0:
            yield "runAsUser"
        if merged.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield "seccompProfile"
        if own.get("allowPrivilegeEscalation") is not False:
            yield "allowPrivilegeEscalation"
        if own.get("privileged"):
            yield "privileged"
        if own.get("procMount", "Default") != "Default":
            yield "procMount"
        capabilities = own.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []):
            yield "capabilities.drop"
        if not {*capabilities.get("add", [])} <= {"NET_BIND_SERVICE"}:
            yield "capabilities.add"
        if any("hostPort" in port for port in each.get("ports", [])):
            yield "hostPort"
        handlers = [each[key] for key in each if key.endswith("Probe")]
        handlers += each.get("lifecycle", {}).values()
        for handler in handlers:
            for way in ("httpGet", "tcpSocket"):
                if handler.get(way, {}).get("host"):
                    yield "host of a probe"
    for context in contexts:
        if context.get("windowsOptions", {}).get("hostProcess"):
            yield "hostProcess"
        if context.get("seLinuxOptions") or context.get("sysctls"):
            yield "seLinuxOptions or sysctls"
        if context.get("appArmorProfile", {}).get("type") == "Unconfined":
            yield "appArmorProfile"


def test_pods_are_as_the_namespace_demands(objects: list[dict]) -> None:
    (namespace,) = of_kind(objects, "Namespace").values()
    prefix = "pod-security.kubernetes.io"
    assert namespace["metadata"]["labels"][f"{prefix}/enforce"] == "restricted"
    assert not [key for key in namespace["metadata"]["labels"] if key.endswith("-version")]
    for name, deployment in of_kind(objects, "Deployment").items():
        assert not [*offences(pod(deployment))], name


OFFENCES: dict[str, Callable[[dict], Any]] = {
    "hostNetwork": lambda spec: spec.update(hostNetwork=True),
    "volume docker": lambda spec: spec.update(
        volumes=[{"name": "docker", "hostPath": {"path": "/var/run"}}]
    ),
    "runAsNonRoot": lambda spec: spec["securityContext"].pop("runAsNonRoot"),
    "runAsUser": lambda spec: spec["securityContext"].update(runAsUser=0),
    "seccompProfile": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "allowPrivilegeEscalation": lambda spec: spec["containers"][0]["securityContext"].pop(
        "allowPrivilegeEscalation"
    ),
    "privileged": lambda spec: spec["containers"][0]["securityContext"].update(privileged=True),
    "capabilities.drop": lambda spec: spec["containers"][0]["securityContext"].pop("capabilities"),
    "capabilities.add": lambda spec: spec["containers"][0]["securityContext"][
        "capabilities"
    ].update(add=["SYS_ADMIN"]),
    "hostPort": lambda spec: spec["containers"][0]["ports"][0].update(hostPort=80),
    "host of a probe": lambda spec: spec["containers"][0]["readinessProbe"]["httpGet"].update(
        host="169.254.169.254"
    ),
}


@pytest.mark.parametrize("offence", OFFENCES)
def test_a_pod_that_may_do_more_would_be_found(offence: str, render: Callable) -> None:
    spec = json.loads(json.dumps(pod(of_kind(render("base"), "Deployment")["gateway"])))
    OFFENCES[offence](spec)
    assert [*offences(spec)] == [offence]


def test_pods_have_no_token_and_write_only_where_they_must(
    objects: list[dict],
) -> None:
    for account in of_kind(objects, "ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False
    for name, deployment in of_kind(objects, "Deployment").items():
        spec, only = pod(deployment), container(deployment)
        assert spec["automountServiceAccountToken"] is False
        assert only["securityContext"]["readOnlyRootFilesystem"] is True
        (user,) = instructions(DOCKERFILES[name], "USER")
        context = spec["securityContext"]
        assert user == f"{context.get('runAsUser', 10001)}:{context.get('runAsGroup', 10001)}"
        if name in SMALL:
            continue
        assert spec["enableServiceLinks"] is False
        assert spec["serviceAccountName"] in of_kind(objects, "ServiceAccount")
        volumes = {each["name"]: each["emptyDir"] for each in spec["volumes"]}
        assert all("sizeLimit" in each for each in volumes.values())
        mounts = {each["mountPath"]: volumes[each["name"]] for each in only["volumeMounts"]}
        if name == "model-server":
            assert mounts.keys() == {*COMPOSE[name]["tmpfs"]}
        else:
            assert f"TMPDIR={next(iter(mounts))}" in " ".join(instructions(GATEWAY, "ENV"))
            size = quantity(mounts["/dev/shm"]["sizeLimit"])
            assert size == quantity(COMPOSE[name]["shm_size"])
