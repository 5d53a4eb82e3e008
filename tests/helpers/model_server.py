"""The model server in the tests' own process, where TensorFlow is loaded: no start takes seconds.

It is the real server, on real ports. What ends a process, or could, is tested in one of its own.
"""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from helpers.basics import ROOT, free_port
from helpers.servers import Addresses
from model_server.__main__ import main, parse_flags
from model_server.server import ModelServer


@dataclass
class Outcome:
    """What is left of a command: its exit status and what it wrote."""

    status: int
    stdout: str
    stderr: str


def run_process(*flags: str) -> Outcome:
    """Run ``python -m model_server`` with flags that end it at once."""
    done = subprocess.run(
        [sys.executable, "-m", "model_server", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_main(*flags: str) -> Outcome:
    """Call what ``run_process`` runs, in this process."""

    def serves(*_: object) -> None:
        raise AssertionError("the server has started, which these flags should prevent")

    stdout, stderr = io.StringIO(), io.StringIO()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with ExitStack() as stack:
        for number, handler in handlers.items():
            stack.callback(signal.signal, number, handler)
        # Without pytest's own handlers, the log goes where a process of its own writes it.
        stack.enter_context(mock.patch.object(logging.root, "handlers", []))
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(redirect_stdout(stdout))
        stack.enter_context(redirect_stderr(stderr))
        signal.signal(signal.SIGALRM, serves)
        signal.alarm(120)
        stack.callback(signal.alarm, 0)
        try:
            main(list(flags))
        except SystemExit as ended:
            # As Python does at the end of a process: a text is an error, no code is none.
            if isinstance(ended.code, str):
                print(ended.code, file=stderr)
            status = 1 if isinstance(ended.code, str) else ended.code or 0
    return Outcome(status, stdout.getvalue(), stderr.getvalue())


@contextmanager
def serving(*flags: str) -> Iterator[Addresses]:
    """Run a model server with these flags and both APIs in this process."""
    addresses = Addresses(f"http://127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")
    ports = [address.rpartition(":")[2] for address in (addresses.grpc, addresses.http)]
    fields = parse_flags([f"--port={ports[0]}", f"--rest_api_port={ports[1]}", *flags])
    with ExitStack() as stack:
        with mock.patch.dict(os.environ):  # no process that a test starts is to inherit its changes
            stack.enter_context(ModelServer(**fields))
        yield addresses


def log_record(kind: str, request: Any) -> bytes:
    """Serialize a request as a warm-up record, such as ``predict_log``."""
    log = prediction_log_pb2.PredictionLog()
    getattr(log, kind).request.CopyFrom(request)
    return log.SerializeToString()


def write_warm_up(path: Path, records: list[bytes]) -> Path:
    """Store records beside the SavedModel at ``path``, and return the file."""
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    file.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for record in records:
            writer.write(record)
    return file


def ask(url: str, body: Any = None) -> tuple[int, Any]:
    """GET, or POST a body (bytes as they are, anything else as JSON); return status and answer."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(url, data, timeout=60) as response:
            assert response.headers["Content-Type"] == "application/json"
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            assert error.headers["Content-Type"] == "application/json"
            return error.code, json.load(error)
