"""What both benches need: ports, and calls by many threads together."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CLIENTS = 16


def free_port() -> int:
    """Return a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
