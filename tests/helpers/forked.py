"""Model servers that are forked where what they import is loaded.

Each is a process of its own and runs what ``python -m model_server`` runs. It saves a second of
CPU. How that command itself starts is tested with the command.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from helpers.basics import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [f"model_server.{name}" for name in ("grpc_api", "lite_model", "manager", "rest_api", "warmup")]
)


class ForkedModelServer:
    """A model server with these flags, with what the tests ask of a ``subprocess.Popen``."""

    def __init__(self, flags: list[str], log: Path, env: dict[str, str]) -> None:
        log.touch()  # here, for who reads it before the process has begun
        self._process = CONTEXT.Process(target=run, args=(flags, log, env), daemon=True)
        # The first start also starts the process that is forked: quiet, like the model server.
        with mock.patch.dict(os.environ, {"TF_CPP_MIN_LOG_LEVEL": "3"}):
            self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit status."""
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired("model_server", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(flags: list[str], log: Path, env: dict[str, str]) -> None:
    """Become ``python -m model_server`` with these flags and this environment."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = ["model_server", *flags]
    runpy.run_module("model_server", run_name="__main__", alter_sys=True)
