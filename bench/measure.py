"""What all measurements share: servers, clients, taking turns, and the figures that come of it."""

import contextlib
import functools
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import grpc
import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
CORES = os.cpu_count() or 1
Call = Callable[[], Any]


class Reading(NamedTuple):
    """What one turn has measured, and the milliseconds of CPU that each tier took for a call."""

    value: float
    cpu_ms: Mapping[str, float] = {}


@dataclass
class Figure:
    """Results side by side: for each name, one value from each round."""

    chapter: str
    title: str
    unit: str  # "/s", of which more is better, or "ms", "s" or "MiB"
    ours: str = ""  # the name of what the others are compared with
    limit: str = ""  # the name of what is no server, but the most that these cores can do
    results: dict[str, list[float]] = field(default_factory=dict)
    cpu_ms: dict[str, dict[str, float]] = field(default_factory=dict)

    def ratios(self, name: str, ours: str = "") -> list[float]:
        """Say how many times as good ours is as another, round by round."""
        pairs = zip(self.results[ours or self.ours], self.results[name], strict=True)
        return [ours / other if self.unit == "/s" else other / ours for ours, other in pairs]


class Settings(NamedTuple):
    """How much to measure."""

    rounds: int  # of turns, of which the median counts
    requests: int  # between two looks at a server's memory
    seconds: float = 1  # of one turn with many clients
    clients: int = 16  # of a busy server
    most_clients: int = 32  # while memory is looked at
    # New versions of the model after which memory is looked at again: first when the allocator has
    # all the space that it keeps for later.
    versions: tuple[int, ...] = (4, 14)


class Client(threading.local):
    """One kept connection to each server for each thread.

    Plain `http.client`, since whatever a lone client takes counts as the server's time: urllib3
    takes a millisecond more.
    """

    def __init__(self):
        self.connect = functools.cache(http.client.HTTPConnection)

    def ask(self, method: str, url: str, body: bytes | None = None, **headers: str) -> bytes:
        """Return the body of the answer, which must be 200."""
        _, address, path, query, _ = urlsplit(url)
        connection = self.connect(address)
        connection.request(method, f"{path}?{query}", body, headers)
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            sys.exit(f"{url} answered {response.status}: {answer.decode(errors='replace')}")
        return answer


client = Client()


def said_of(clients: int) -> str:
    """Say how many clients there are."""
    return f"{clients} clients" if clients > 1 else "one client"


def free_port() -> int:
    """Return a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Command(NamedTuple):
    """How to start a server, and where it says that it is ready."""

    words: list[str]
    port: int
    ready: str  # a path, for which any answer but an error of the server will do; "" is gRPC
    env: Mapping[str, str] = {}
    folder: Path = ROOT
    rest_port: int = 0

    @property
    def address(self) -> str:
        """Return where it listens."""
        return f"127.0.0.1:{self.port}"


def is_ready(command: Command) -> bool:
    """Say whether a server answers."""
    if not command.ready:
        with (
            grpc.insecure_channel(command.address) as channel,
            contextlib.suppress(grpc.FutureTimeoutError),
        ):
            grpc.channel_ready_future(channel).result(0.2)
            return True
        return False
    with contextlib.closing(http.client.HTTPConnection(command.address, timeout=30)) as connection:
        try:
            connection.request("GET", command.ready)
            return connection.getresponse().status < 500
        except OSError:
            return False


class Server(NamedTuple):
    """A server that has been started, and the seconds until it was ready."""

    process: psutil.Process
    seconds: float

    def family(self) -> list[psutil.Process]:
        """Return its process and those that it has started."""
        return [self.process, *self.process.children(recursive=True)]

    def memory(self) -> float:
        """Return the resident memory of all of them in MiB."""
        return sum(process.memory_info().rss for process in self.family()) / 2**20


def most_memory(servers: Mapping[str, Server], work: Call) -> dict[str, float]:
    """Return the most memory that each server has, of many looks, while something works."""
    most = dict.fromkeys(servers, 0.0)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        while not done.done():
            most = {name: max(most[name], each.memory()) for name, each in servers.items()}
            time.sleep(0.05)
        done.result()
    return most


@contextlib.contextmanager
def server(command: Command) -> Iterator[Server]:
    """Run a server until the block ends; hand it out once it is ready."""
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command.words,
            cwd=command.folder,
            env={**os.environ, **command.env},
            stdout=log,
            stderr=log,
        )
        try:
            while not is_ready(command):
                if process.poll() is not None or time.perf_counter() - begin > 120:
                    log.seek(0)
                    sys.exit(f"{' '.join(command.words)} did not start:\n{log.read().decode()}")
                time.sleep(0.01)
            yield Server(psutil.Process(process.pid), time.perf_counter() - begin)
        finally:
            process.terminate()
            process.wait()


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Return what these processes have used of the processors since they started."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def call_for(call: Call, seconds: float, clients: int) -> tuple[list[float], float]:
    """Let clients call for some seconds, once at least; return each call's seconds, and all's."""

    def ask(_: int) -> list[float]:
        times: list[float] = []
        while (begin := time.perf_counter()) < end or not times:
            call()
            times.append(time.perf_counter() - begin)
        return times

    with ThreadPoolExecutor(clients) as pool:
        begin = time.perf_counter()
        end = begin + seconds
        times = [each for several in pool.map(ask, range(clients)) for each in several]
        return times, time.perf_counter() - begin


def turn(
    call: Call, clients: int, tiers: Mapping[str, list[psutil.Process]] | None = None
) -> Callable[[float], Reading]:
    """Return what measures a call for some seconds: calls a second, or a lone one's ms."""

    def measure(seconds: float) -> Reading:
        before = {name: cpu_seconds(tier) for name, tier in (tiers or {}).items()}
        times, whole = call_for(call, seconds, clients)
        used = {name: cpu_seconds(tier) - before[name] for name, tier in (tiers or {}).items()}
        cpu_ms = {name: each * 1e3 / len(times) for name, each in used.items()}
        return Reading(median(times) * 1e3 if clients == 1 else len(times) / whole, cpu_ms)

    return measure


def compare(
    figure: Figure, turns: Mapping[str, Callable[[float], Reading]], settings: Settings
) -> Figure:
    """Fill a figure by turns, so that whatever else the machine does hits all of them."""
    client.connect.cache_clear()  # the servers have closed connections that were idle
    seconds = settings.seconds * (1 if figure.unit == "/s" else 0.5)
    if settings.rounds > 1:  # a single one only tries whether everything runs
        for measure in turns.values():
            measure(seconds / 4)
    readings: dict[str, list[Reading]] = {name: [] for name in turns}
    for _ in tqdm(range(settings.rounds), figure.title, leave=False):
        for name, measure in turns.items():
            readings[name].append(measure(seconds))
    for name, each in readings.items():
        figure.results[name] = [reading.value for reading in each]
        figure.cpu_ms[name] = {
            tier: median(reading.cpu_ms[tier] for reading in each) for tier in each[0].cpu_ms
        }
    return figure
