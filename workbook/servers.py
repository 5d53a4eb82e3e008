"""Servers that a lesson's cells start: a cell that runs again replaces what it started before."""

import atexit
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from workbook.ports import is_busy

running: dict[str, subprocess.Popen] = {}
logs: dict[str, Path] = {}


def start(
    name: str, command: Sequence[str], ports: Sequence[int] = (), **options: Any
) -> subprocess.Popen:
    """Start a command, after what this kernel has started under the same name has ended.

    Args:
        name: what it is, such as "gateway".
        command: its words.
        ports: where it will listen on the loopback interface.
        options: of `subprocess.Popen`.

    Raises:
        RuntimeError: A port is busy; the sentence names the process that holds it, if the system
            lets us see it.
    """
    stop(name)
    require_free_ports(*ports)
    # A group of its own: interrupting a cell interrupts the kernel's group, not the server.
    running[name] = subprocess.Popen(command, process_group=0, **options)
    logs[name] = Path(getattr(options.get("stdout"), "name", os.devnull))
    return running[name]


def wait_for(url: str, name: str = "", seconds: float = 180) -> None:
    """Poll an address until it answers 200, with a clock that shows how long that takes.

    Args:
        url: where to ask.
        name: the server, as `start` knows it; its end also ends the waiting.
        seconds: how long to wait at most.

    Raises:
        RuntimeError: The server has ended; the sentence holds the last line of its log.
        TimeoutError: The address did not answer in time.
    """
    deadline = time.monotonic() + seconds
    clock = f"waiting for {url}: {{elapsed}}"
    with tqdm(bar_format=clock, file=sys.stdout) as bar:
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(url, timeout=5):
                return
            if name in running:
                require_running(name)
            time.sleep(0.1)
            bar.update()
    raise TimeoutError(f"{url} did not answer within {seconds:.0f} seconds.")


def require_running(*names: str) -> None:
    """Raise RuntimeError, with the last line of its log, when one of these has ended by itself."""
    for name in names:
        if (status := running[name].poll()) is not None:
            lines = logs[name].read_text(errors="replace").splitlines() or ["nothing"]
            raise RuntimeError(
                f"The {name} has ended with status {status}; the last line of"
                f" {os.path.relpath(logs[name])} is: {lines[-1].strip()}"
            )


def stop(*names: str) -> None:
    """End what was started under these names, in this order; without a name, the newest first."""
    for name in names or [*reversed(running)]:
        if (process := running.pop(name, None)) is not None:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


atexit.register(stop)


def require_free_ports(*ports: int) -> None:
    """Raise RuntimeError, with a sentence that names the holder, when a port is busy."""
    for port in filter(is_busy, ports):
        raise RuntimeError(
            f"Port {port} is in use by {holder_of(port)}: end it, or choose another port in the"
            " cell of parameters (docs/troubleshooting.md#a-port-is-in-use)."
        )


def holder_of(port: int) -> str:
    """Name the process that listens at a port, and its pid, if the system lets us see it."""
    for process in psutil.process_iter(["name"]):
        with suppress(psutil.Error, OSError):
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN and each.laddr.port == port:
                    return f"{process.info['name']}, pid {process.pid}"
    return "a process of another user"


def wait_until(condition: Callable[[], object], what: str, seconds: float = 300) -> None:
    """Wait until something is true, with a clock that shows how long; TimeoutError if it stays so.

    Args:
        condition: what is asked five times a second.
        what: the same in words, for the clock.
        seconds: how long to wait at most.
    """
    deadline = time.monotonic() + seconds
    with tqdm(bar_format=f"until {what}: {{elapsed}}", file=sys.stdout) as clock:
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"It took more than {seconds:g} s until {what}.")
            time.sleep(0.2)
            clock.update()
