"""Lesson 09 asks and changes nobody's account unless its reader agrees to the costs."""

import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from helpers.basics import ROOT, copy_of_root, processes_with

from eks.simulated import SimulatedAccount
from workbook import cloud

LESSON = ROOT / "notebooks/09-eks.ipynb"
IMAGES = ("clothing-gateway:001", "clothing-model:001")
KEY = "AKIAIOSFODNN7EXAMPLE"  # from AWS's documentation


class Outside:
    """A machine whose reader has an account, and all that would notice a word to the outside."""

    def __init__(self, folder: Path, port: int):
        self.asked: list[str] = []
        self.calls = folder / "calls"
        self.root = copy_of_root(folder)
        programs = folder / "programs"
        programs.mkdir()
        for name in ("aws", "eksctl"):
            (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {self.calls}\nexit 1\n')
            (programs / name).chmod(0o755)
        (folder / "config").write_text(
            f"[profile work]\nregion = us-west-2\naws_access_key_id={KEY}\n"
        )
        address = f"http://127.0.0.1:{port}"
        own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self.env = {
            **own,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "WORKBOOK_ENGINE": "embedded",
            **dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), address),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
            "AWS_ENDPOINT_URL": address,
            "AWS_ENDPOINT_URL_EKS": address,
            "AWS_EKS_ENDPOINT": address,
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
            "AWS_CONFIG_FILE": str(folder / "config"),
            "AWS_PROFILE": "work",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-reader",
            "AWS_SESSION_TOKEN": "token-of-the-reader",
            "TEST_MARK": str(folder),
        }

    def run(self, **parameters: object) -> tuple[int, str, str]:
        """Run the lesson; return its exit status, what it printed, and the error."""
        executed = self.root.parent / "executed.ipynb"
        words = [f"-p {name} {value}".split() for name, value in parameters.items()]
        command = [
            sys.executable,
            "-m",
            "papermill",
            str(LESSON),
            str(executed),
            "--no-progress-bar",
        ]
        done = subprocess.run(
            [*command, "--kernel", "python3", *(word for each in words for word in each)],
            cwd=self.root,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        cells = nbformat.read(executed, as_version=4).cells
        printed = (str(o.get("text", "")) for cell in cells for o in cell.get("outputs", []))
        return done.returncode, "".join(printed), done.stderr


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    class Trap(http.server.BaseHTTPRequestHandler):
        """Notes whoever comes, be it as to AWS or as to a proxy on the way to it."""

        def handle(self) -> None:
            machine.asked.append(self.rfile.readline(1000).decode(errors="replace"))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Trap)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    machine = Outside(tmp_path, server.server_address[1])
    yield machine
    server.shutdown()
    server.server_close()


@pytest.mark.again
@pytest.mark.skipif(
    os.environ.get("LESSONS_AGAIN") != "1",
    reason="runs a whole lesson; LESSONS_AGAIN=1 asks for it",
)
def test_without_agreement_no_account_is_asked(outside: Outside, clothing_model: Path) -> None:
    """Not even with credentials in the environment, a profile, and the programs installed."""
    status, printed, error = outside.run(EXPORT_DIR=clothing_model)
    assert status == 0, error[-3000:]
    assert outside.asked == [] and not outside.calls.exists()
    assert "simulated on this machine" in printed and "engine: embedded" in printed
    for secret in (KEY, "of-the-reader"):
        assert secret not in printed + error
    accounts = set(re.findall(r"\b\d{12}\b", printed))
    assert accounts == {"123456789012"}, "moto's, and no other"
    assert not (outside.root / "build/eks").exists()
    assert processes_with(str(outside.root.parent)) == []


def test_the_trap_notices_an_account_that_is_asked(outside: Outside) -> None:
    status, _, _ = outside.run(AGREE_TO_COST=True)
    assert status != 0
    assert outside.asked != []
    assert not outside.calls.exists(), "made nothing before it knew who it is"


def test_agreement_without_credentials_says_so_and_makes_nothing(outside: Outside) -> None:
    for name in [name for name in outside.env if name.startswith("AWS_")]:
        del outside.env[name]
    outside.env |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(outside.root)}
    status, _, error = outside.run(AGREE_TO_COST=True)
    assert status != 0 and "There are no AWS credentials here: log in" in error
    assert outside.asked == [] and not outside.calls.exists()


@pytest.mark.parametrize("word", ["True", "yes", 1, 1.0, None, ["True"]])
def test_nothing_but_true_is_an_agreement(word: object) -> None:
    assert cloud.choose(word, "embedded", IMAGES).engine == "embedded"


def test_an_agreement_without_the_programs_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="but docker and aws and eksctl must be installed"):
        cloud.choose(True, "auto", IMAGES)
    with pytest.raises(RuntimeError, match=r"but no Docker engine answers; .*WORKBOOK_ENGINE"):
        cloud.choose(False, "docker", IMAGES)


def test_without_a_registry_there_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    account = SimulatedAccount(tmp_path / "account")
    try:
        assert account.start_registry() == ("", "there is no docker-registry program")
    finally:
        account.close()
    assert not (tmp_path / "account").exists()
