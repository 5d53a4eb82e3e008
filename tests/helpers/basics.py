"""What the tests of all parts need: the tree, ports, processes, and patience."""

import itertools
import json
import os
import random
import shutil
import socket
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from workbook.processes import marked

ROOT = Path(__file__).resolve().parents[2]


CLASSES = (ROOT / "model_server/classes.txt").read_text().split()


SAMPLES = [ROOT / f"notebooks/samples/{name}.png" for name in CLASSES]


def describe_model(path: Path, **changes: object) -> Path:
    """Write a model's description, by default of the tiny model; return its path."""
    dress = b64encode(SAMPLES[0].read_bytes()).decode()
    said: dict[str, object] = {"name": "clothing-model", "title": "", "question": "What is it?"}
    said |= {"classes": CLASSES, "height": 32, "width": 32}
    said |= {"scaling": "xception", "resizing": "nearest"}
    said |= {"samples": [{"class": "dress", "jpeg": dress}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said | changes))
    return path


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4


PORTS = itertools.cycle(random.sample(range(11000 + 5000 * WORKER, 16000 + 5000 * WORKER), 5000))


def free_port() -> int:
    """Find a port that nobody listens at, among those that this worker alone gives away.

    Systems take the ports of outgoing connections, and those that programs leave to them, from
    32768 on: such a port can be taken again before the program that it is for has started.
    """
    for port in PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: the ports never end")


def copy_of_root(folder: Path) -> Path:
    """Copy what a clone has; what runs in the copy shares no `build/` with anything else."""
    names = (".git", ".venv", ".tools", ".*cache", ".hypothesis", "build", "bench", "tests")
    return Path(shutil.copytree(ROOT, folder / "root", ignore=shutil.ignore_patterns(*names)))


def processes_with(mark: str) -> list[psutil.Process]:
    """Those processes that have inherited TEST_MARK, orphans and other sessions included."""
    return marked("TEST_MARK", mark)


def eventually(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Poll until a condition holds, and return its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"never came true: {what}")
