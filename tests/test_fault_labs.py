"""Lesson 11's eight faults: each is one change, is felt as its lab says, and can be mended."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import requests
from helpers.basics import ROOT, SAMPLES, eventually
from helpers.manifests import KUBE, container, environment, of_kind, pod_labels, run_kustomize
from test_manifests_network import ends, reaches
from test_manifests_schema import VERSIONS

from workbook import solutions
from workbook.cluster import Cluster
from workbook.kubectl import Kubectl
from workbook.manifests import refuse_unknown

FAULTS = KUBE / "faults"
POD = "spec.template.spec.containers.0"
# What differs from the system that works: the object, and its fields before and in the lab.
CHANGES: dict[int, tuple[str, dict[str, tuple[Any, Any]]]] = {
    1: (
        "Deployment gateway",
        {f"{POD}.image": ("clothing-gateway:001", "clothing-gateway:010")},
    ),
    2: (
        "Service gateway",
        {"spec.selector.app.kubernetes.io/name": ("clothing-gateway", "clothing-gatway")},
    ),
    3: ("Service gateway", {"spec.ports.0.targetPort": ("http", "web")}),
    4: (
        "Deployment model-server",
        {
            f"{POD}.resources.limits.memory": ("512Mi", "48Mi"),
            f"{POD}.resources.requests.memory": ("192Mi", "48Mi"),
        },
    ),
    5: ("Deployment gateway", {f"{POD}.readinessProbe.httpGet.path": ("/readyz", "/ready")}),
    6: (
        "Deployment gateway",
        {
            f"{POD}.resources.limits.cpu": ("1", None),
            f"{POD}.resources.requests.cpu": ("100m", None),
        },
    ),
    7: (
        "Deployment gateway",
        {
            f"{POD}.env.2.name": (None, "SIGNATURE_NAME"),
            f"{POD}.env.2.value": (None, "serving_unit8"),
        },
    ),
    8: (
        "NetworkPolicy model-server",
        {
            "spec.ingress.0.from.0.podSelector.matchLabels.app.kubernetes.io/name": (
                "clothing-gateway",
                "clothing-frontend",
            )
        },
    ),
}
# What a rehearsal shows as a cluster does: a command, and what it prints then.
SHOWN = {
    1: ("get pods", r"gateway-\S+ +0/1 +(ErrImagePull|ImagePullBackOff) "),
    2: ("get endpointslices", r"gateway +IPv4 +<unset> +<unset> "),
    3: ("get endpointslices", r"gateway +IPv4 +<unset> +127\.0\.0\.1 "),
    5: ("describe pod {gateway}", "Readiness probe failed: .* statuscode: 404"),
    7: ("describe pod {gateway}", "Readiness probe failed: .* statuscode: 503"),
}

every_lab = pytest.mark.parametrize("lab", CHANGES)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """The values of a manifest that have no others inside, by their paths."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {p: v for key, each in items for p, v in leaves(each, f"{path}.{key}").items()}
    return {path.removeprefix("."): value}


def named(objects: list[dict]) -> dict[str, dict]:
    return {f"{each['kind']} {each['metadata']['name']}": each for each in objects}


@pytest.fixture(scope="module")
def working() -> list[dict]:
    return run_kustomize(FAULTS / "working")


# --- What stands in the files ---------------------------------------------------------------------


def test_there_is_a_folder_for_each_lab() -> None:
    folders = {f"lab-{lab}" for lab in CHANGES}
    assert {path.name for path in FAULTS.iterdir()} == {"working", *folders}


@every_lab
def test_a_lab_is_one_change_of_one_object(lab: int, working: list[dict]) -> None:
    name, fields = CHANGES[lab]
    before, after = named(working), named(run_kustomize(FAULTS / f"lab-{lab}"))
    assert before.keys() == after.keys()
    assert [each for each in before if before[each] != after[each]] == [name]
    old, new = leaves(before[name]), leaves(after[name])
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if lab == 7:  # the new variable comes first or last
        added = environment(after[name]).items() - environment(before[name]).items()
        assert added == {("SIGNATURE_NAME", "serving_unit8")}
    else:
        assert {key: (old.get(key), new.get(key)) for key in keys} == fields


@pytest.mark.parametrize("folder", ["working", *(f"lab-{lab}" for lab in CHANGES)])
def test_no_fault_is_one_that_the_api_server_would_refuse(folder: str) -> None:
    """It could not be applied then, and there would be nothing to diagnose."""
    for each in run_kustomize(FAULTS / folder):
        kubernetes_validate.validate(each, VERSIONS[-1], strict=True)
        assert each["metadata"].get("namespace", each["metadata"]["name"]) == "faults"
        if each["kind"] in ("Deployment", "Service"):
            refuse_unknown(each)


def test_the_system_that_works_is_that_of_the_other_lessons(working: list[dict]) -> None:
    """But for its patience: what a lab breaks would break there."""
    single = named(run_kustomize(KUBE / "embedded"))
    assert named(working).keys() - {"Namespace faults"} == single.keys() - {"Namespace clothes"}
    for name, each in of_kind(working, "Deployment").items():
        known = single[f"Deployment {name}"]["spec"]["template"]["spec"]["containers"][0]
        here = container(each)
        for field in ("ports", "resources", "securityContext", "startupProbe", "livenessProbe"):
            assert here[field] == known[field]
        probe, other = here["readinessProbe"], known["readinessProbe"]
        assert probe["httpGet"] == other["httpGet"]
        assert each["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_the_selector_and_the_port_of_labs_2_and_3_are_nobodys(working: list[dict]) -> None:
    gateway = of_kind(working, "Deployment")["gateway"]
    labels, names = pod_labels(gateway), [each["name"] for each in container(gateway)["ports"]]
    for lab, is_found, has_port in ((2, False, True), (3, True, False)):
        service = of_kind(run_kustomize(FAULTS / f"lab-{lab}"), "Service")["gateway"]["spec"]
        assert (service["selector"].items() <= labels.items()) == is_found
        assert (service["ports"][0]["targetPort"] in names) == has_port


def test_the_autoscaler_of_lab_6_has_nothing_to_compute_with(working: list[dict]) -> None:
    objects = run_kustomize(FAULTS / "lab-6")
    (metric,) = of_kind(objects, "HorizontalPodAutoscaler")["gateway"]["spec"]["metrics"]
    assert metric["resource"]["name"] == "cpu"
    for given, all_of_them in ((True, working), (False, objects)):
        resources = container(of_kind(all_of_them, "Deployment")["gateway"])["resources"]
        # A limit without a request is taken for both.
        assert any("cpu" in each for each in resources.values()) == given


def test_the_policy_of_lab_8_closes_the_way_to_the_model(working: list[dict]) -> None:
    for is_open, objects in ((True, working), (False, run_kustomize(FAULTS / "lab-8"))):
        both = ends(objects)
        way = (both["gateway"], both["model-server"], 8500, "TCP")
        assert reaches(objects, *way) == is_open


# --- What is seen of them -------------------------------------------------------------------------


class Labs:
    """The system in a rehearsal, and a client that asks it."""

    def __init__(self, kubectl: Kubectl):
        self.kubectl = kubectl
        kubectl(f"apply --kustomize {FAULTS / 'working'}")
        self.url = kubectl.reach("gateway", 80, 0)

    def is_answered(self) -> bool:
        picture = {"file": SAMPLES[0].read_bytes()}
        try:
            answer = requests.post(f"{self.url}/predict", files=picture, timeout=30).json()
        except requests.RequestException:
            return False
        return answer.get("top_class") == SAMPLES[0].stem


@pytest.fixture(scope="module")
def labs(clothing_model: Path) -> Iterator[Labs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
        patch.setattr(Kubectl, "opened", {})
        kubectl = Kubectl(Cluster("embedded", "asked for"), "faults")
        here = {
            "/models/clothing-model": str(clothing_model),
            "/app/model.json": str(clothing_model / "1/assets.extra/model.json"),
        }
        kubectl.load("clothing-gateway:001", "gateway.dockerfile", here)
        kubectl.load("clothing-model:001-embedded", "model_server/embedded.dockerfile", here)
        yield Labs(kubectl)
        kubectl.close()


def mend_of(lab: int) -> str:
    """The command of the lesson's solution, with the parts that it is made of."""
    (answer,) = [
        each
        for each in solutions.answers(solutions.read(solutions.SOLUTIONS))
        if each.exercise == f"11-e{lab}-answer"
    ]
    said: list[str] = []
    parts = [line for line in answer.source.splitlines() if " = " in line and "kubectl" not in line]
    (command,) = re.findall(r"^kubectl\(.*(?:set|patch) .*$", answer.source, re.MULTILINE)
    exec("\n".join([*parts, command]), {"kubectl": said.append})
    return said[0]


@pytest.mark.parametrize("lab", SHOWN)
def test_a_fault_shows_in_a_rehearsal_and_its_mend_is_felt(
    lab: int, labs: Labs, capsys: pytest.CaptureFixture[str]
) -> None:
    command, sign = SHOWN[lab]
    labs.kubectl(f"apply --kustomize {FAULTS / 'working'}")
    eventually(labs.is_answered, "all is well", 120)

    def is_seen() -> bool:
        pods = [pod.name for pod in labs.kubectl.pods("gateway")]
        capsys.readouterr()
        labs.kubectl(command.format(gateway=pods[-1] if pods else "nobody"), check=False)
        return re.search(sign, capsys.readouterr().out) is not None

    assert not is_seen() or lab == 7  # a gateway is asked before it has found its model server
    labs.kubectl(f"apply --kustomize {FAULTS / f'lab-{lab}'}")
    eventually(lambda: not labs.is_answered(), "a client notices", 120)
    eventually(is_seen, "it is seen", 120)
    assert not labs.is_answered(), "it has mended itself"
    if lab == 7:
        ask = "import requests; print(requests.get('http://localhost:9696/readyz').text)"
        labs.kubectl(f'exec deployment/gateway -- python -c "{ask}"')
        assert "none of SIGNATURE_NAME, which is serving_unit8" in capsys.readouterr().out

    labs.kubectl(mend_of(lab))
    eventually(labs.is_answered, "it is mended", 120)


@pytest.mark.parametrize("lab", CHANGES.keys() - SHOWN.keys())
def test_what_a_rehearsal_does_not_show_is_as_it_was_for_clients(lab: int, labs: Labs) -> None:
    """The lesson says so; and the mend changes what the lab has changed."""
    labs.kubectl(f"apply --kustomize {FAULTS / f'lab-{lab}'}")
    kind, name = CHANGES[lab][0].lower().split()
    broken = leaves(labs.kubectl.object(kind, name))
    for tier in ("model-server", "gateway"):
        labs.kubectl(f"rollout status deployment/{tier} --timeout 120s")
    eventually(labs.is_answered, "it is answered", 120)
    labs.kubectl(mend_of(lab))
    mended = leaves(labs.kubectl.object(kind, name))
    for path, (before, in_lab) in CHANGES[lab][1].items():
        assert (broken.get(path), mended.get(path)) == (in_lab, before), path


def test_the_lesson_names_what_a_rehearsal_does_not_show() -> None:
    lesson = solutions.read(ROOT / "notebooks/11-fault-labs.ipynb")
    (cell,) = [cell for cell in lesson.cells if cell.source.startswith("HIDDEN = {")]
    said = cell.source.partition("if ")[0]
    assert {int(number) for number in re.findall(r"^ +(\d):", said, re.MULTILINE)} == (
        CHANGES.keys() - SHOWN.keys()
    )
