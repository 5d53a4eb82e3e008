"""What lesson 04 and its bonus attack a gateway with: a stranger's web server, and measures."""

import gzip
import io
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import requests
from PIL import Image

BOMB_SIDE = 13376  # pixels; Pillow refuses more than 179 million in all


class Stranger(ThreadingHTTPServer):
    """A web server on a free port of the loopback interface, until `close`.

    `/bomb` is a small file of very many pixels, `/zeros` 50 kB that become 50 MB when they are
    unpacked, `/drip` sends a byte a second for as long as anybody listens, and `/elsewhere` sends
    its visitors to another address.
    """

    request_queue_size = 64
    running: "Stranger | None" = None

    def __init__(self, elsewhere: str):
        if Stranger.running:  # a cell that runs again replaces what it has started
            Stranger.running.close()
        super().__init__(("127.0.0.1", 0), Page)
        Stranger.running, self.elsewhere, self.over = self, elsewhere, threading.Event()
        Image.new("1", (BOMB_SIDE, BOMB_SIDE)).save(bomb := io.BytesIO(), "PNG")
        self.bomb = bomb.getvalue()
        self.url = f"http://localhost:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End the server and all drips."""
        self.over.set()
        self.shutdown()
        self.server_close()


class Page(BaseHTTPRequestHandler):
    """The pages of a stranger."""

    server: Stranger

    def do_GET(self) -> None:
        """Answer one request."""
        self.send_response(302 if self.path == "/elsewhere" else 200)
        self.send_header("Location", self.server.elsewhere)
        if self.path == "/zeros":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with suppress(OSError):
            if self.path == "/bomb":
                self.wfile.write(self.server.bomb)
            if self.path == "/zeros":
                self.wfile.write(gzip.compress(bytes(50_000_000)))
            while self.path == "/drip" and not self.server.over.wait(1):
                self.wfile.write(b".")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def post(gateway: str, link: str, seconds: float = 6) -> requests.Response | None:
    """Ask a gateway about a link; None where no answer has come after some seconds."""
    with suppress(requests.Timeout):
        return requests.post(gateway, json={"url": link}, timeout=seconds)
    return None


def told(answer: requests.Response | None) -> str:
    """Return in one line what a gateway has said: status, and its class or its sentence."""
    if answer is None:
        return "no answer"
    body = answer.json() if "json" in answer.headers["Content-Type"] else {}
    said = (
        body.get("detail")
        or body.get("top_class")
        or max(body, key=lambda name: body[name], default="")
    )
    return f"{answer.status_code} {textwrap.shorten(str(said), 70, placeholder=' …')}"


def memory_while(pid: int, function: Callable, *arguments: Any) -> tuple[Any, float]:
    """Return what a function returns, and the most memory of gunicorn's worker meanwhile, in MB."""
    largest, main = 0.0, psutil.Process(pid)
    with ThreadPoolExecutor() as pool:
        job = pool.submit(function, *arguments)
        while not job.done():
            (worker,) = main.children()
            largest = max(largest, worker.memory_info().rss / 1e6)
            time.sleep(0.02)
    return job.result(), largest


def visit_among(others: int, gateway: str, bad: str, good: str) -> tuple[str, float]:
    """Have others ask about a bad link, and ask about a good one a second later.

    Returns:
        What the gateway has said of the good one, and after how many seconds.
    """
    with ThreadPoolExecutor(others) as pool:
        waiting = [pool.submit(post, gateway, bad) for _ in range(others)]
        time.sleep(1)  # by then all are inside
        begin = time.monotonic()
        answer = told(post(gateway, good))
        seconds = time.monotonic() - begin
    for each in waiting:
        each.result()
    return answer, seconds
