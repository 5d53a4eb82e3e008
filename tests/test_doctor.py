"""`make doctor`: what it says of machines that have this and lack that, and that it only looks.

docker, kind, kubectl, aws and eksctl are replaced by scripts that write down how they were called.
"""

import ast
import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from helpers.basics import ROOT, copy_of_root

from workbook import doctor
from workbook.cluster import KIND_VERSION
from workbook.lesson import lessons, look_at

DOCKER = """case "$*" in
  --version) echo "Docker version 29.1.3";;
  *ServerVersion*MemTotal*) echo "29.1.3, {machine}, 4 processors, 8000000000";;
  *DriverStatus*) echo "{store}";;
  *CgroupVersion*) echo {cgroups};;
  "info --format {{{{.Architecture}}}}") echo {machine};;
  "compose version"*) echo 5.0.1;;
  info*) echo answer;;
  *) exit 1;;
esac"""


class Machine:
    """A PATH with what the set-up needs and commands of ours, and a way to ask the doctor."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.calls = ROOT, folder / "bin", folder / "calls"
        self.bin.mkdir()
        self.calls.touch()
        for name in ("sh", "dirname", "cmp", "mkdir", "rm", "make", "sleep"):
            (self.bin / name).symlink_to(str(shutil.which(name)))
        decides = ("WORKBOOK_", "DOCKER_", "MAKE", "PYTHON", "AWS_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(decides)}
        self.env = {name: env[name] for name in env if not name.lower().endswith("_proxy")}
        self.env |= {"PATH": str(self.bin), "HOME": str(folder), "COLUMNS": "200"}

    def stub(self, name: str, script: str) -> None:
        """Make a command that notes its arguments and does what a script says."""
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.calls}\n{script}\n')
        path.chmod(0o755)

    def docker(self, machine: str = "x86_64", store: str = "overlay2", cgroups: int = 2) -> None:
        self.stub("docker", DOCKER.format(machine=machine, store=store, cgroups=cgroups))

    def ask(self, *words: str, status: int = 0) -> str:
        """Run the doctor, which must end with this status, and return what it prints."""
        words = words or (sys.executable, "-m", "workbook.doctor")
        done = subprocess.run(words, cwd=self.root, env=self.env, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def line_of(said: str, start: str) -> str:
    """Return the first line that begins with a word, without what draws the table."""
    lines = [line.strip("│ ") for line in said.splitlines()]
    found = next(line for line in lines if line.startswith(f"{start} "))
    return " ".join(found.replace("│", " ").split())


def test_a_machine_with_everything(machine: Machine) -> None:
    machine.docker(store="[[driver-type io.containerd.snapshotter.v1]]")
    machine.stub("kind", f"echo kind {KIND_VERSION} go1.26 linux/amd64")
    machine.stub("aws", "echo aws-cli/2.31.0 Python/3.13.7")
    machine.stub("eksctl", "echo 0.215.0")
    said = machine.ask()
    assert line_of(said, "Docker") == "Docker 29.1.3, x86_64, 4 processors, 8 GB"
    assert line_of(said, "image store") == "image store containerd's"
    assert line_of(said, "Compose") == "Compose 5.0.1"
    assert line_of(said, "kind") == f"kind {KIND_VERSION}"
    assert line_of(said, "aws") == "aws 2.31.0" and line_of(said, "eksctl") == "eksctl 0.215.0"
    assert "tensorflow/serving:2.20.0 will be pulled" in line_of(said, "model server")
    assert line_of(said, "pods").startswith("pods a Kubernetes cluster Kind has the cluster")
    assert line_of(said, "AWS").startswith("AWS a rehearsal, with images")
    for path in lessons(ROOT / "notebooks"):
        assert look_at(path).title in said
    assert line_of(said, "06 · Run a ping on Kubernetes").endswith("pods: a Kubernetes cluster")
    assert line_of(said, "04 · Bonus: Meet").endswith("nothing but Python")
    for name in ("Docker", "Compose", "kind", "aws", "eksctl"):
        assert f"\n  {name}: " not in said


def test_it_only_looks(machine: Machine) -> None:
    machine.docker()
    for name in ("kind", "kubectl", "aws", "eksctl"):
        machine.stub(name, "exit 1")
    kubeconfig = ROOT / "build/kubeconfig"
    before = kubeconfig.exists()
    machine.ask()
    asked = {line.split()[1] for line in machine.calls.read_text().splitlines()}
    assert asked <= {"--version", "version", "info", "image", "compose"}
    assert "docker image inspect" in machine.calls.read_text()
    assert kubeconfig.exists() == before


def test_what_keeps_the_lessons_from_docker_is_said(machine: Machine) -> None:
    machine.docker(machine="aarch64", cgroups=1)
    said = machine.ask()
    chosen = line_of(said, "model server")
    assert chosen.startswith("model server model_server, in Python")
    assert "is made for amd64 and this engine runs on aarch64" in chosen
    assert "control groups of version 2, and this Docker has version 1" in line_of(said, "pods")
    assert line_of(said, "containers").startswith("containers Docker and Compose")


def test_an_engine_that_hangs_is_none(machine: Machine) -> None:
    machine.stub("docker", '[ "$1" = info ] && exec sleep 100; echo Docker version 29.1.3')
    said = machine.ask()
    assert line_of(said, "Docker") == "Docker no engine answers"
    assert "#cannot-connect-to-the-docker-daemon" in said
    assert line_of(said, "pods").endswith("no Docker engine answers")


def test_each_missing_program_has_a_command(machine: Machine) -> None:
    said = machine.ask()
    assert line_of(said, "Docker") == "Docker no docker command"
    for name in ("Docker", "aws", "eksctl"):
        assert f"\n  {name}: {doctor.command_for(name.lower())}\n" in said
    assert "there is no docker command" in line_of(said, "model server")


@pytest.mark.parametrize("system", ["Linux", "WSL", "Darwin"])
def test_every_platform_has_its_commands(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(doctor, "system", lambda: system)
    found = [doctor.command_for(name) for name in doctor.COMMANDS]
    assert all(found) and all("\n" not in command for command in found)
    assert all(("brew" in command) == (system == "Darwin") for command in found)
    assert any("winget" in command for command in found) == (system == "WSL")


def test_a_wish_that_cannot_be_granted_stops_the_lessons(machine: Machine) -> None:
    machine.env["WORKBOOK_ENGINE"] = "docker"
    said = machine.ask()
    assert "Docker was asked for, but there is no docker command" in line_of(said, "model server")
    assert line_of(said, "02 · Serve it with TensorFlow Serving").endswith("model server: stops")


def test_busy_ports_and_a_proxy_that_takes_too_much_are_named(machine: Machine) -> None:
    machine.env |= {"http_proxy": "http://me:secret@proxy.example:3128"}
    with ExitStack() as stack:
        with suppress(OSError):  # somebody else has it: that is as good
            stack.enter_context(socket.create_server(("127.0.0.1", 9696)))
        said = machine.ask()
    assert line_of(said, "ports").startswith("ports in use: ") and "9696" in line_of(said, "ports")
    assert line_of(said, "proxy") == "proxy http://proxy.example:3128"
    assert "\n  proxy: export no_proxy=localhost,127.0.0.1,::1\n" in said and "secret" not in said
    machine.env["no_proxy"] = "localhost, 127.0.0.1"
    assert "\n  proxy: " not in machine.ask()


def test_it_runs_before_anything_is_installed(machine: Machine, tmp_path: Path) -> None:
    machine.root = copy_of_root(tmp_path)
    machine.docker()
    (machine.bin / "python3").symlink_to(getattr(sys, "_base_executable", sys.executable))
    said = machine.ask("make", "doctor")
    assert "without the packages of Pipfile.lock" in said and "\n  Python: make workbook\n" in said
    assert not (machine.root / ".venv").exists() and not (machine.root / ".tools").exists()
    # Without any package, not even this environment's.
    said = machine.ask(sys.executable, "-S", "-E", "-m", "workbook.doctor")
    assert "│" not in said and line_of(said, "Docker").startswith("Docker 29.1.3")
    assert "TensorFlow Serving, in Docker" in line_of(said, "model server")
    assert "a Kubernetes cluster" in line_of(said, "pods")
    assert "make workbook installs what decides this" in line_of(said, "AWS")


def test_only_an_unfit_python_is_a_failure(machine: Machine, tmp_path: Path) -> None:
    machine.root = copy_of_root(tmp_path)
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        machine.stub(name, "exit 1")
    said = machine.ask(sys.executable, "-m", "workbook.doctor", status=1)
    assert line_of(said, "Python") == "Python none that suits"
    assert "\n  Python: No Python 3.11, 3.12 or 3.13 with its venv module was found" in said


def test_old_pythons_can_read_it() -> None:
    """Somebody with one of them is told which to get, in place of a SyntaxError."""
    ast.parse((ROOT / "workbook/doctor.py").read_text(), feature_version=(3, 8))
