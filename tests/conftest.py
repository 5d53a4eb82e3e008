"""Servers, models and pictures that the tests share: all real, all on loopback."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.basics import ROOT, describe_model, free_port
from helpers.forked import ForkedModelServer
from helpers.models import save_classifier
from helpers.servers import Server, wait_until_available, wait_until_ready
from helpers.serving import Client

# nbformat would have a parser of web addresses made, which takes a second in every worker.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from hostile.namespace import Namespace
    from playwright.sync_api import Browser

# What a shell starts in the background ignores Ctrl-C, and what the tests start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What the gateway knows of the models that the tests make, unless a test describes its own.
DESCRIPTION = ROOT / f"build/tests/model-{os.getpid()}.json"


os.environ["MODEL_DESCRIPTION"] = str(describe_model(DESCRIPTION))

# The files that take longest begin first, so that no worker is left alone with one at the end.
LONGEST = [
    *("containers", "gateway_faults", "commands", "website", "eks_account", "own_model", "model"),
    *("rehearsal", "containers_stack", "compose", "eks_lesson", "book", "lessons_again"),
    "model_server_lifecycle",
]
# What CI tries, too: it takes long, and says little to whoever has changed something else.
THOROUGH = {
    *("test_bench_gpu", "test_cheat_sheet", "test_eks_account", "test_eks_lesson"),
    *("test_fault_labs", "test_serving_properties"),
}
LEFT_OUT = pytest.mark.skip(reason="takes long, so only CI runs it; THOROUGH=1 asks for it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.path.stem in THOROUGH:
            item.add_marker("thorough")
        if item.get_closest_marker("thorough") and os.environ.get("THOROUGH") != "1":
            item.add_marker(LEFT_OUT)


def pytest_unconfigure() -> None:
    DESCRIPTION.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def started() -> Iterator[list[Server]]:
    """What the tests start; every process is ended when the tests are over."""
    servers: list[Server] = []
    yield servers
    for server in servers:  # all are told to end, then all are waited for
        server.process.terminate()
    for server in servers:
        server.process.wait(timeout=60)


@pytest.fixture(scope="session")
def launch(
    started: list[Server], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Server]:
    """Start processes that log to a file."""

    def start(command: list[str], http: str, grpc: str = "", **env: str) -> Server:
        log = tmp_path_factory.mktemp("server") / "log.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=stream, env={**os.environ, **env}
            )
        started.append(Server(http, grpc, process=process, log=log))
        return started[-1]

    return start


@pytest.fixture(scope="session")
def start_model_server(
    started: list[Server], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Server]:
    """Start a model server on free ports and wait until its model is AVAILABLE.

    LiteRT serves a version that has a ``model.tflite``, TensorFlow any other.
    """

    def start(
        base_path: Path,
        *flags: str,
        model_name: str = "clothing-model",
        ports: tuple[int, int] | None = None,
        wait: bool = True,
        **env: str,
    ) -> Server:
        grpc_port, rest_port = ports or (free_port(), free_port())
        log = tmp_path_factory.mktemp("server") / "log.txt"
        own = [
            *(f"--port={grpc_port}", f"--rest_api_port={rest_port}"),
            *(f"--model_name={model_name}", f"--model_base_path={base_path}"),
            "--prefer_tflite_model=true",
            *flags,
        ]
        server = Server(
            http=f"http://127.0.0.1:{rest_port}",
            grpc=f"127.0.0.1:{grpc_port}",
            process=ForkedModelServer(own, log, {**os.environ, **env}),
            log=log,
        )
        started.append(server)
        if wait:
            wait_until_available(server, model_name)
        return server

    return start


@pytest.fixture(scope="session")
def start_gateway(launch: Callable[..., Server]) -> Callable[..., Server]:
    """Start the gateway under gunicorn on a free port and wait until ``/livez`` answers."""

    def start(tf_serving_host: str, **env: str) -> Server:
        port, metrics_port = free_port(), free_port()
        server = launch(
            [
                *(sys.executable, "-m", "gunicorn", "--threads", "8"),
                *("--bind", f"127.0.0.1:{port}", "gateway:app"),
            ],
            http=f"http://127.0.0.1:{port}",
            TF_SERVING_HOST=tf_serving_host,
            **{"DRAIN_SECONDS": "0", "METRICS_PORT": f"{metrics_port}", **env},
        )
        server.metrics = f"http://127.0.0.1:{metrics_port}/metrics"
        wait_until_ready(server, f"{server.http}/livez", lambda body: True)
        return server

    return start


@pytest.fixture(scope="session")
def model_server(start_model_server: Callable[..., Server], tiny_model: Path) -> Server:
    """A model server with the tiny model."""
    return start_model_server(tiny_model, "--enable_grpc_healthcheck_service")


@pytest.fixture(scope="module")
def serve_model(model_server: Server, tiny_model: Path) -> Iterator[Callable[[str, Path], Server]]:
    """Let the server of the tiny model serve one more model while the tests of a file run."""
    with Client(model_server, "clothing-model") as client:

        def serve_model(name: str, base_path: Path) -> Server:
            client.reload({client.model_name: tiny_model, name: base_path})
            return model_server

        yield serve_model
        client.serve(tiny_model)


@pytest.fixture(scope="session")
def clothing_server(start_model_server: Callable[..., Server], clothing_model: Path) -> Server:
    """A model server with the bundled model."""
    return start_model_server(clothing_model)


@pytest.fixture(scope="session")
def closed() -> str:
    """An address where nobody listens."""
    return f"localhost:{free_port()}"


@pytest.fixture(scope="module")
def namespace() -> "Iterator[Namespace]":
    """A network namespace, a place that nothing leaves, with a hostile internet in it."""
    from hostile.namespace import Namespace

    with Namespace() as namespace:
        yield namespace


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A headless Chromium: this machine's, or Playwright's own."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)
    # The first is the same browser without its windows, and starts with a third of the work.
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        if not found and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip(f"no browser: neither {', '.join(names)} nor Playwright's own")
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


def export(base_path: Path, lite: bool = False, /, **parameters: object) -> Path:
    """Run the cells of lesson 01 that export; return ``base_path``, which then holds version 1.

    With ``lite``, those that write its ``model.tflite`` run, too.
    The whole lesson, which also serves and measures, runs in ``make workbook``.
    """
    import nbformat

    namespace: dict[str, object] = {}
    for cell in nbformat.read(ROOT / "notebooks/01-saved-model.ipynb", as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if "export" in tags or "parameters" in tags or (lite and "lite" in tags):
            exec(compile(cell.source, f"lesson 01, {cell.id}", "exec"), namespace)
        if "parameters" in tags:
            namespace |= {"EXPORT_DIR": str(base_path), **parameters}
    return base_path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make something that all workers share: whoever wants to change it takes a copy."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def made_once(name: str, make: Callable[[Path], object]) -> Path:
        finished = folder / f"{name}-made"
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                making = tmp_path_factory.mktemp(name)
                make(making / name)
                making.rename(finished)
        return finished / name

    return made_once


@pytest.fixture(scope="session")
def clothing_model(made_once: Callable[..., Path]) -> Path:
    """The base path of the bundled model, exported by the cells of lesson 01."""
    return made_once("clothing-model", lambda base_path: export(base_path, True))


@pytest.fixture(scope="session")
def tiny_model(made_once: Callable[..., Path]) -> Path:
    """A base path with version 1 of a 32 × 32 classifier with random weights.

    With these, it takes the drawn dress for a dress, which the gateway asks before it is ready.
    """
    return made_once("tiny-model", lambda base_path: save_classifier(base_path / "1", seed=(1, 18)))
