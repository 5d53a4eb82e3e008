"""Processes under test, and web servers of the tests' own."""

import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.forked import ForkedModelServer


@dataclass
class Addresses:
    """Where a server answers."""

    http: str
    grpc: str = ""
    metrics: str = ""  # the page of the gateway's counts


@dataclass
class Server(Addresses):
    """A process under test, with the addresses where it answers and the file that it logs to."""

    process: subprocess.Popen | ForkedModelServer = field(kw_only=True)
    log: Path = field(kw_only=True)

    def stop(self) -> int:
        """End the process with SIGTERM and return its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=60)


class WebHost(BaseHTTPRequestHandler):
    """What the web servers of the tests have in common: they are brief, and say nothing here."""

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole answer, if anybody still waits for it."""
        with suppress(OSError):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)


class Web(ThreadingHTTPServer):
    """A web server that many may ask at once."""

    request_queue_size = 128


@contextmanager
def serve(host: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a web server on loopback, and give its address, such as 127.0.0.1:12345."""
    with Web(("127.0.0.1", 0), host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def wait_until_ready(server: Server, url: str, ready: Callable[[bytes], bool]) -> None:
    """Poll ``url`` until ``ready`` says yes to the body; fail with the log when it never does."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if ready(response.read()):
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.05)
    pytest.fail(f"{url} never became ready; the log says:\n{server.log.read_text()}")


def wait_until_available(server: Server, model_name: str) -> None:
    """Wait until a version of a model is AVAILABLE."""
    status = f"{server.http}/v1/models/{model_name}"
    wait_until_ready(server, status, lambda body: b'"AVAILABLE"' in body)
