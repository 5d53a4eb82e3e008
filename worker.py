"""gunicorn's worker with threads, made safe against slow clients and a sudden end.

The process that forks workers loads this module. It must not load gRPC, which does not survive a
fork, so what needs the gateway imports it inside a function, in the worker.
"""

import ctypes
import mmap
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from gunicorn import util
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.http.errors import ParseException
from gunicorn.workers.gthread import ThreadWorker
from werkzeug.exceptions import BadRequest

# gunicorn.conf.py has their defaults.
DRAIN_SECONDS = float(os.environ["DRAIN_SECONDS"])
METRICS_PORT = int(os.environ["METRICS_PORT"])
# How long a client may send its request: shorter than a cluster waits for the end. When threads run
# short, clients that have been sending for long must make room, so that nobody waits for them.
REQUEST_SECONDS, CROWDED_SECONDS = 28.0, 1.0
LINGER_SECONDS = 0.2  # wait for a client's next request, unless threads run short
NOT_HTTP = BadRequest("This request is not valid HTTP.")
# With more memory than this, which photos never take, it gives back what it has freed.
MEMORY_BYTES = 256 << 20
STATM = Path("/proc/self/statm")
malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
AT_ONCE = struct.pack("ii", 1, 0)  # struct linger: on, 0 seconds


def is_readable(sock: socket.socket, seconds: float = 0) -> bool:
    """Say whether there is something to read or to accept, within some seconds."""
    poll = select.poll()  # unlike select(), for any number of open files
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def is_at_end(sock: socket.socket) -> bool:
    """Say whether nothing more will come, since the client or the worker has said so."""
    return is_readable(sock) and not sock.recv(1, socket.MSG_PEEK)


def trim_memory() -> None:
    """Give freed memory back to the system, where much is resident.

    Many large links at a time leave a heap with small blocks between large holes, which glibc
    keeps: only its end goes back by itself.
    """
    if malloc_trim and int(STATM.read_text().split()[1]) * mmap.PAGESIZE > MEMORY_BYTES:
        malloc_trim(0)


class QuietLogger(Logger):
    """gunicorn's log without its debug lines, which show what clients sent, with its secrets."""

    def debug(self, msg, *args, **kwargs):
        """Say nothing."""


class Worker(ThreadWorker):
    """gunicorn's worker with threads, which neither slow clients nor SIGTERM take by surprise."""

    alive: bool
    wsgi: Callable

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.since = {}  # when connections got their threads
        self.end = float("inf")

    def get_thread_pool(self) -> ThreadPoolExecutor:
        """Return threads for MAX_IN_FLIGHT predictions, and 64 for probes, refusals and uploads.

        gunicorn's own --threads has no effect.
        """
        import web

        self.size = web.MAX_IN_FLIGHT + 64
        return ThreadPoolExecutor(self.size)

    def load_wsgi(self):
        """Load the gateway, and add what only the worker knows to its answers.

        A body in malformed chunks shows as such only while it is read; it is answered with a
        problem, too. And where no more requests can be read from a connection, the answer says
        `Connection: close`: the worker has cut it, or a body was not read to its end. gunicorn
        closes it then, and a client that did not know would lose its next request.

        At METRICS_PORT Prometheus is answered, and nobody else.
        """
        import prometheus_client

        import web

        try:
            import gateway
        except ValueError as error:  # a setting that cannot be used; its sentence will do
            self.log.critical("%s", error)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
        super().load_wsgi()
        gateway.app.register_error_handler(ParseException, lambda _: web.answer_problem(NOT_HTTP))
        answer, metrics = self.wsgi, prometheus_client.make_wsgi_app(web.registry)

        def wsgi(environ, start_response):
            def start(*arguments):
                reader = environ["wsgi.input"].reader
                is_unread = getattr(reader, "length", 0) or getattr(reader, "parser", None)
                if is_unread or is_at_end(environ["gunicorn.socket"]):
                    start_response.__self__.force_close()
                return start_response(*arguments)

            # Not SERVER_PORT, which can come from the client where it is no socket of TCP.
            is_public = environ["gunicorn.socket"].getsockname()[1:2] != (METRICS_PORT,)
            return (answer if is_public else metrics)(environ, start)

        self.wsgi = wsgi

    def handle(self, conn):
        """Answer a client, and again if it asks again at once.

        A moment's wait here is cheaper than to hand the connection to the main thread, which would
        hand it to another thread: that takes half a millisecond.
        """
        try:
            keep = self.handle_once(conn)
            while (
                keep is True
                and self.alive
                and len(self.since) < self.size / 2
                and is_readable(conn.sock, LINGER_SECONDS)
            ):
                keep = self.handle_once(conn)
            return keep
        finally:
            del self.since[conn]

    def handle_once(self, conn):
        """Answer one request, and wait here until the client has taken its answer.

        gunicorn would wait for that in its main thread, and nobody else would be answered.
        """
        self.since[conn] = time.monotonic()
        keep = super().handle(conn)
        self.since[conn] = time.monotonic()
        if not keep:
            with suppress(OSError):
                util.close_graceful(conn.sock.dup(), max_drain=1 << 26)
                # A client that still sends must learn at once, by a reset, that nobody reads.
                # Without it the system may tell the client to pause, for as long as 100 s.
                if is_readable(conn.sock) and conn.sock.recv(1, socket.MSG_PEEK):
                    conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                conn.sock.shutdown(socket.SHUT_RDWR)
        return keep

    def handle_error(self, req, client, addr, exc):
        """Answer what is not HTTP with a problem; gunicorn would log it, with its secrets."""
        import gateway
        import web

        if not isinstance(exc, ParseException):
            return super().handle_error(req, client, addr, exc)
        with gateway.app.test_request_context(environ_base={"REMOTE_ADDR": addr[0]}):
            web.begin()
            answer = web.finish(web.answer_problem(NOT_HTTP))
        answer.headers["Connection"] = "close"
        with suppress(OSError):
            client.sendall(f"HTTP/1.1 {answer.status}\r\n{answer.headers}".encode() + answer.data)

    def murder_pending(self):
        """Once a second give memory back, stop reading from slow clients, and end when due."""
        super().murder_pending()
        trim_memory()
        now = time.monotonic()
        patience = CROWDED_SECONDS if len(self.since) >= self.size else REQUEST_SECONDS
        for conn, start in self.since.copy().items():
            late = now - start > 2 * REQUEST_SECONDS  # it does not even take its answer
            if now - start > patience:
                with suppress(OSError):
                    conn.sock.shutdown(socket.SHUT_RDWR if late else socket.SHUT_RD)
        self.alive = self.alive and now < self.end

    def handle_exit(self, sig, frame, seconds: float = DRAIN_SECONDS):
        """On SIGTERM stop being ready at once, and take connections for DRAIN_SECONDS more."""
        import web

        if not web.stopping.is_set():
            web.stopping.set()
        self.end = min(self.end, time.monotonic() + seconds)
        self.method_queue.defer(lambda: None)  # wakes the main thread

    def handle_quit(self, sig, frame):
        """On SIGINT take no more connections, but answer those who wait."""
        self.handle_exit(sig, frame, 0)

    def set_accept_enabled(self, enabled):
        """At the end take those who wait to connect, and have others refused at once."""
        super().set_accept_enabled(enabled)
        while not self.alive and self.sockets:
            listener = self.sockets.pop()
            while is_readable(listener):
                self.accept(listener)
            listener.close()
