"""A network namespace with a hostile internet in it, and ways to start and ask servers there."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest
from helpers.basics import ROOT, eventually
from helpers.servers import Server

AS_ROOT = os.geteuid() == 0
MODEL_PORTS, GATEWAY_PORT = (18500, 18501), 9696


class Answer(NamedTuple):
    """What the gateway answered."""

    status: int
    headers: http.client.HTTPMessage
    body: Any

    @property
    def cause(self) -> str:
        return self.body["type"].rpartition(":")[2] if self.status >= 400 else ""


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a UNIX socket, which, unlike TCP, leads into a network namespace."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)  # closed with the connection
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.host)


class Namespace:
    """A network namespace without a way out, where internet.py runs; skip where none can be had."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ns-"))
        self.lock = threading.Lock()
        self.certificate = self._make_certificate()
        command = ["unshare", "--net", "--mount", *([] if AS_ROOT else ["--user", "-r"])]
        command += [sys.executable, str(Path(__file__).with_name("internet.py"))]
        command += [str(self.folder)]
        command += [str(self.certificate)] if self.certificate else []
        pipe = subprocess.PIPE
        try:
            with (self.folder / "log.txt").open("w") as log:
                self.process = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=log, text=True
                )
        except FileNotFoundError as error:
            pytest.skip(f"no network namespaces here: {error}")

    def __enter__(self) -> "Namespace":
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            log = (self.folder / "log.txt").read_text()
            self.__exit__(None, None, None)
            if "unshare" in log or "not permitted" in log:
                pytest.skip(f"network namespaces are not permitted here: {log.strip()}")
            pytest.fail(log)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.communicate(timeout=60)  # the program ends with its input
        shutil.rmtree(self.folder)

    def _make_certificate(self) -> Path | None:
        """Make a certificate for good.test and six.test; None without the openssl command."""
        if not shutil.which("openssl"):
            return None
        path = self.folder / "certificate.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += [
            "-subj",
            "/CN=good.test",
            "-addext",
            "subjectAltName=DNS:good.test,DNS:six.test",
        ]
        command += ["-keyout", str(path), "-out", str(self.folder / "public.pem")]
        subprocess.run(command, check=True, capture_output=True)
        with path.open("a") as stream:
            stream.write((self.folder / "public.pem").read_text())
        return path

    def inside(self, *command: str) -> list[str]:
        """The command that runs another one in here."""
        user = [] if AS_ROOT else ["--user", "--preserve-credentials"]
        return [
            "nsenter",
            f"--target={self.process.pid}",
            "--net",
            "--mount",
            f"--wd={ROOT}",
            *user,
            *command,
        ]

    def ask(self, question: str) -> list:
        """Ask what was ``caught`` where nothing may go, or for ``visits`` to the web.

        A visitor has asked for something; ``connections`` are all that were made. Names of which
        addresses were sent are ``answered``.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.lock:
            print(question, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())

    def start_gateway(self, launch: Callable[..., Server], model: Path, **env: str) -> Server:
        """Start a gateway and its model server in here and wait until both are ready."""
        grpc_port, rest_port = MODEL_PORTS
        launch(
            self.inside(
                *(sys.executable, "-m", "model_server", "--model_name=clothing-model"),
                *(f"--port={grpc_port}", f"--rest_api_port={rest_port}"),
                *(f"--model_base_path={model}", "--prefer_tflite_model"),
            ),
            http="",
        )
        gateway = launch(
            self.inside(
                *(sys.executable, "-m", "gunicorn", "--bind", f"unix:{self.folder / 'gateway'}"),
                *("--bind", f"127.0.0.1:{GATEWAY_PORT}", "gateway:app"),
            ),
            http=f"http://127.0.0.1:{GATEWAY_PORT}",  # for who is in here
            TF_SERVING_HOST=f"127.0.0.1:{grpc_port}",
            **{"DRAIN_SECONDS": "0", **env},
        )

        def ready() -> bool:
            assert gateway.process.poll() is None, gateway.log.read_text()
            with suppress(OSError):
                return self.send("GET", "/readyz").status == 200
            return False

        eventually(ready, "the gateway is ready", seconds=120)
        return gateway

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Ask the gateway in here."""
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with closing(UnixConnection(str(self.folder / "gateway"), timeout=60)) as connection:
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            text = response.read()
        is_json = "json" in response.headers.get("Content-Type", "")
        return Answer(response.status, response.headers, json.loads(text) if is_json else text)
