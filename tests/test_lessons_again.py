"""A lesson's cells may run again, alone or from the middle, as often as a reader likes."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import nbformat
import psutil
import pytest
from conftest import export
from helpers.basics import ROOT, eventually, free_port, processes_with
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_own_model import KINDS, parameters_for, picture

from workbook import servers
from workbook.lesson import ports_of


def again(test: Callable) -> Callable:
    """Mark a test that executes a whole lesson."""
    reason = "takes minutes; LESSONS_AGAIN=1 asks for it"
    skip = pytest.mark.skipif(os.environ.get("LESSONS_AGAIN") != "1", reason=reason)
    return pytest.mark.again(skip(test))


class Lesson(NamedTuple):
    """What a test does with a lesson.

    Attributes:
        starts: cells that start servers, and run again on their own.
        servers: how many processes these cells leave running.
        since: the cell in the middle from which everything up to the checkpoint runs again.
        waits: a cell that waits, and is interrupted; may be empty.
        prediction: what the lesson says about its picture.
        quicker: text of the cells, and what stands in its place to save time.
    """

    starts: list[str]
    servers: int
    since: str
    waits: str
    prediction: str
    quicker: dict[str, str]


LESSONS = {
    "02": Lesson(
        starts=["02-14", "02-44"],
        servers=2,
        since="02-20",
        waits="02-30",
        prediction="prediction: pants 0.",
        quicker={"count=64": "count=16", "6 * 64": "6 * 16", "times(10,": "times(2,"},
    ),
    "03": Lesson(
        starts=["03-08"],
        servers=1,
        since="03-10",
        waits="",
        prediction="prediction: shoes 0.",
        quicker={"count=40": "count=2"},
    ),
    "05": Lesson(
        starts=["c16", "c28", "c36", "c38"],
        servers=5,
        since="c27",
        waits="c41",
        prediction="prediction: dress 0.",
        quicker={'"both work", 5': '"both work", 1', '"one works", 5': '"one works", 1'},
    ),
}


class Reader:
    """Somebody who runs a lesson's cells in any order, in one kernel."""

    def __init__(self, client: NotebookClient):
        self.client = client
        self.cells = {cell.id: cell for cell in client.nb.cells}
        self.kernel = psutil.Process(client.km.provisioner.pid)  # type: ignore[union-attr]

    def code(self, since: str = "", until: str = "") -> list[str]:
        """The ids of the code cells from one cell or heading to another, without the latter."""
        ids = list(self.cells)

        def place(what: str) -> int:
            if what in self.cells:
                return ids.index(what)
            return next(n for n, i in enumerate(ids) if f"## {what}\n" in self.cells[i].source)

        between = ids[place(since) if since else 0 : place(until)]
        return [i for i in between if self.cells[i].cell_type == "code"]

    def run(self, *ids: str) -> str:
        """Run cells, and return what they print."""
        for i in ids:
            self.client.execute_cell(self.cells[i], list(self.cells).index(i))
        return "".join(str(o.get("text", "")) for i in ids for o in self.cells[i].outputs)

    def interrupt(self, i: str) -> None:
        """Run a cell, and press the button that interrupts it as soon as it has printed."""
        self.cells[i].outputs = []

        def press() -> None:
            eventually(lambda: self.cells[i].outputs, "the cell prints something")
            self.kernel.send_signal(signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            self.run(i)
        presser.join()

    def started(self) -> set[int]:
        """The pids of the processes that the kernel has started and that still run."""
        children = self.kernel.children()
        return {each.pid for each in children if each.status() != psutil.STATUS_ZOMBIE}


@contextmanager
def reading(name: str, folder: Path, model: Path) -> Iterator[Reader]:
    """Open a lesson with free ports and embedded servers; its processes carry the folder as mark.

    Args:
        name: how the lesson's file name begins.
        folder: where a copy of the model goes.
        model: the base path of the exported model.
    """
    (path,) = (ROOT / "notebooks").glob(f"{name}*.ipynb")
    notebook = nbformat.read(path, as_version=4)
    values: dict[str, object] = {}
    values |= {"EXPORT_DIR": str(shutil.copytree(model, folder / "clothing-model"))}
    values |= {"WORKBOOK_ENGINE": "embedded", **{port: free_port() for port in ports_of(path)}}
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(f"\n{key} = {value!r}" for key, value in values.items())
        for slow, quick in LESSONS[name].quicker.items():
            cell.source = cell.source.replace(slow, quick)
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(ROOT)}}
    )
    with client.setup_kernel(env={**os.environ, "TEST_MARK": str(folder)}):
        yield Reader(client)


@again
@pytest.mark.parametrize("name", LESSONS)
def test_cells_run_again_and_leave_no_second_server(
    name: str, clothing_model: Path, tmp_path: Path
) -> None:
    lesson = LESSONS[name]
    with reading(name, tmp_path, clothing_model) as reader:
        printed = reader.run(*reader.code(until="Clean up"))
        assert lesson.prediction in printed and "checkpoint passed" in printed
        first = reader.started()

        reader.run(*lesson.starts)
        second = reader.started()
        assert first and first.isdisjoint(second), "an old server answers"
        assert len(second) == lesson.servers

        if lesson.waits:
            reader.interrupt(lesson.waits)
        printed = reader.run(*reader.code(since=lesson.since, until="Clean up"))
        assert lesson.prediction in printed and "checkpoint passed" in printed
        assert 0 < len(reader.started()) <= lesson.servers

        for _ in range(2):
            reader.run(*reader.code(since="Clean up", until="What you built"))
            assert reader.started() == set()
    assert processes_with(str(tmp_path)) == []


def test_without_its_server_lesson_02_says_so(clothing_model: Path, tmp_path: Path) -> None:
    with reading("02", tmp_path, clothing_model) as reader:
        reader.run(*reader.code(until="02-14"))
        with pytest.raises(CellExecutionError, match="No model server answers: run section 2"):
            reader.run("02-55")


HTTP_SERVER = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]


def test_starting_replaces_and_a_busy_port_is_named_with_its_holder(tmp_path: Path) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    try:
        with (tmp_path / "log").open("wb") as log:
            servers.start("one", [*HTTP_SERVER, str(port)], [port], stdout=log, stderr=log)
            servers.wait_for(address, "one")
            held = servers.start("one", [*HTTP_SERVER, str(port)], [port], stdout=log, stderr=log)
            servers.wait_for(address, "one")
        with pytest.raises(RuntimeError, match=rf"Port {port} is in use by \S+, pid {held.pid}:"):
            servers.start("another", [*HTTP_SERVER, str(port)], [port])
    finally:
        servers.stop("one", "another")
    assert held.poll() is not None


def test_where_ports_are_free_nobody_goes_through_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes most of a second, for each server that a lesson starts."""
    monkeypatch.setattr(psutil, "process_iter", None)
    servers.require_free_ports(free_port())


def test_waiting_ends_with_the_server_and_shows_its_last_words(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        servers.start("server", [sys.executable, "-c", "exit('no model')"], stdout=log, stderr=log)
    said = r"The server has ended with status 1; the last line of .*log is: no model$"
    with pytest.raises(RuntimeError, match=said):
        servers.wait_for(f"http://127.0.0.1:{free_port()}/", "server")
    servers.stop("server")


def test_waiting_for_nobody_ends_in_time() -> None:
    with pytest.raises(TimeoutError, match="did not answer within 0 seconds"):
        servers.wait_for(f"http://127.0.0.1:{free_port()}/", seconds=0)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of another model: 160 × 160 pixels, three classes, one with a space."""
    kind, folder = KINDS["mobilenet-160"], tmp_path_factory.mktemp("other")
    parameters = parameters_for(folder / "given", kind.build(), kind)
    return export(folder / "colour-model", **parameters)


def printed_by(number: str, parameters: dict, executed: Path) -> str:
    """Execute a lesson with these parameters, and return what its cells print."""
    import papermill  # takes a second, and few runs of the tests need it

    (lesson,) = (ROOT / "notebooks").glob(f"{number}-[!b]*.ipynb")
    papermill.execute_notebook(
        lesson, executed, parameters, cwd=ROOT, kernel_name="python3", progress_bar=False
    )
    cells = nbformat.read(executed, as_version=4).cells
    return "".join(str(o.get("text", "")) for cell in cells for o in cell.get("outputs", []))


@again
@pytest.mark.parametrize("number", ["02", "03", "04", "05"])
def test_a_lesson_takes_another_model(number: str, other_model: Path, tmp_path: Path) -> None:
    """Nothing but the folder and a picture is said."""
    (lesson,) = (ROOT / "notebooks").glob(f"{number}-[!b]*.ipynb")
    (tmp_path / "picture.png").write_bytes(picture("fire red"))
    parameters: dict[str, object] = {name: free_port() for name in ports_of(lesson)}
    parameters |= {"EXPORT_DIR": str(other_model), "IMAGE": str(tmp_path / "picture.png")}
    parameters |= {"WORKBOOK_ENGINE": "embedded"}
    printed = printed_by(number, parameters, tmp_path / "executed.ipynb")
    assert "prediction: fire red" in printed and "checkpoint passed" in printed


@again
def test_the_homework_takes_another_image_at_another_port(tmp_path: Path) -> None:
    """A file server of Python's, which has nothing of ping's."""
    command = '["python", "-m", "http.server", "--bind", "0.0.0.0", "8000"]'
    (tmp_path / "Dockerfile").write_text(f"FROM python\nEXPOSE 8000\nCMD {command}\n")
    parameters = {"IMAGE": "somebody/files:3.13-hw10", "PORT": 8000, "ASK": "/Dockerfile"}
    parameters |= {"DOCKERFILE": str(tmp_path / "Dockerfile"), "FOLDER": str(tmp_path)}
    parameters |= {"WORKBOOK_ENGINE": "embedded", "LOCAL_PORT": free_port()}
    printed = printed_by("12", parameters, tmp_path / "executed.ipynb")
    assert "image: somebody/files:3.13-hw10" in printed and "containerPort: 8000" in printed
    assert "200 FROM python" in printed and "checkpoint passed" in printed
