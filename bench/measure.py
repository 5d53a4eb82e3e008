"""What both benches need, and the tests: ports, settings, and calls by many threads together."""

import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CLIENTS = 16
DOCKERFILE = Path(__file__).resolve().parent.parent / "gateway.dockerfile"


def free_port() -> int:
    """Return a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def memory_settings() -> dict[str, str]:
    """Return the environment that has glibc give memory back as the gateway's image does."""
    [tunables] = re.findall(r"GLIBC_TUNABLES=(\S+)", DOCKERFILE.read_text())
    return {"GLIBC_TUNABLES": tunables}


def count_calls(call: Callable[[], Any], seconds: float = 2.0) -> tuple[int, float]:
    """Let 16 clients call all the time; return the number of calls and the seconds they took."""

    def client(_: int) -> int:
        count = 0
        while time.perf_counter() < end:
            call()
            count += 1
        return count

    with ThreadPoolExecutor(CLIENTS) as pool:
        begin = time.perf_counter()
        end = begin + seconds
        count = sum(pool.map(client, range(CLIENTS)))
        return count, time.perf_counter() - begin
