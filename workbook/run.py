"""Execute the lessons in order and turn them into pages: `make workbook`."""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import nbformat
import papermill
import psutil
from jinja2 import Environment, FileSystemLoader
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table
from traitlets.config import Config

from workbook.engine import docker
from workbook.servers import is_busy

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "build" / "clothing-model" / "1"
TEMPLATES = Path(__file__).with_name("templates")
MARK = uuid.uuid4().hex


@dataclass
class Outcome:
    """What became of one notebook: `outcome` is `done`, `failed` or `not run`.

    `engine` and `prediction` come from the lines that it printed, such as `engine: docker`.
    """

    notebook: str
    title: str
    cells: int
    engine: str = "–"
    prediction: str = ""
    seconds: float = 0.0
    outcome: str = "not run"
    error: str = ""

    @property
    def number(self) -> str:
        """The lesson's number, such as `04`; a bonus lesson has that of the lesson it adds to."""
        return self.notebook[:2] + (" bonus" if "-bonus-" in self.notebook else "")


def lessons(folder: Path) -> list[Path]:
    """Return the notebooks of a folder in their order, a bonus lesson after that of its number."""
    found = folder.glob("[0-9][0-9]-*.ipynb")
    return sorted(found, key=lambda path: (path.name[:2], "-bonus-" in path.name, path.name))


def choose(words: list[str], notebooks: list[Path]) -> list[Path]:
    """Return the notebooks whose file names begin with one of these words, or all without one.

    Raises:
        SystemExit: No notebook begins with one of the words; the status is 2.
    """
    for word in words:
        if not any(notebook.name.startswith(word) for notebook in notebooks):
            numbers = dict.fromkeys(notebook.name[:2] for notebook in notebooks)
            print(f"No lesson begins with {word}: there are {', '.join(numbers)}.", file=sys.stderr)
            raise SystemExit(2)
    return [n for n in notebooks if not words or n.name.startswith(tuple(words))]


def ports_of(notebook: Path) -> dict[str, int]:
    """Return names and values of the parameters of a notebook that are ports."""
    known = papermill.inspect_notebook(str(notebook))
    return {name: int(it["default"]) for name, it in known.items() if name.endswith("_PORT")}


def free_ports(wanted: dict[str, int]) -> dict[str, int]:
    """Give each name its port; if that is busy, the next free one, and say so in one line."""
    given: dict[str, int] = {}
    for name, preferred in wanted.items():
        taken = {*wanted.values(), *given.values()} - {preferred}
        given[name] = next(p for p in range(preferred, 65536) if p not in taken and not is_busy(p))
        if given[name] != preferred:
            print(f"port {preferred} is busy: {name} is {given[name]} this time", flush=True)
    return given


def started() -> list[psutil.Process]:
    """Return the processes that descend from this one, the servers of a notebook included.

    A kernel leads a session of its own, so neither Ctrl-C nor the kernel's end reaches the
    servers that a notebook has started; but all of them inherit the mark in their environment.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("WORKBOOK_RUN") == MARK:
                found.append(process)
    return found


def end_started() -> None:
    """End every process that this one has started."""
    ending = started()
    for process in ending:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(ending, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def on_the_engine(number: str, ports: Iterable[int]) -> list[tuple[str, str]]:
    """Return kind and name of everything that a lesson has on the Docker engine.

    Names tell: they begin with `lesson-04` or `lesson04`. A port may follow; if it is none of the
    lesson's own, somebody else runs the same lesson at the same time.
    """
    if shutil.which("docker") is None:
        return []
    own = "|".join(map(str, ports)) or "none"
    name = re.compile(rf"lesson-?{number}(-({own}))?([-_]\D.*)?")
    listed = [
        ("container", docker("container", "ls", "--all", "--format={{.Names}}")),
        ("network", docker("network", "ls", "--format={{.Name}}")),
        ("volume", docker("volume", "ls", "--format={{.Name}}")),
    ]
    return [(kind, word) for kind, text in listed for word in text.split() if name.fullmatch(word)]


def left_behind(number: str, ports: Iterable[int]) -> str:
    """Say what is still there five seconds after a lesson's last cell, or return nothing.

    The kernel is still there, too, as it is for a reader. A kernel that ends would take most of
    what it has started with it.
    """
    deadline = time.monotonic() + 5
    while True:
        servers = [process for process in started() if process.ppid() != os.getpid()]
        if not servers or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    found = [f"{kind} {name}" for kind, name in on_the_engine(number, ports)]
    for process in servers:
        with suppress(psutil.Error):
            found.append(f"process {process.pid} ({' '.join(process.cmdline())[:200]})")
    return f"it left behind: {'; '.join(found)}" if found else ""


def end_on_signals() -> None:
    """Raise one KeyboardInterrupt on Ctrl-C, SIGTERM or a closed terminal, however often sent."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        end_started()
        raise KeyboardInterrupt

    for each in signals:
        signal.signal(each, interrupt)


@contextmanager
def chatter_to(log: Path) -> Iterator[TextIO]:
    """Send what kernels and libraries print outside the notebook to a file; yield the terminal."""
    ours = os.dup(1), os.dup(2)
    try:
        with log.open("ab") as file, os.fdopen(os.dup(2), "w") as terminal:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield terminal
    finally:
        for number, saved in enumerate(ours, 1):
            os.dup2(saved, number)
            os.close(saved)


def look_at(notebook: Path) -> Outcome:
    """Read what a notebook is called and how many code cells it has, without running it."""
    cells = nbformat.read(notebook, as_version=4).cells
    heading = re.search(r"^# (.+)$", cells[0].source, re.MULTILINE) if cells else None
    count = sum(cell.cell_type == "code" for cell in cells)
    return Outcome(notebook.stem, heading[1] if heading else notebook.stem, count)


def execute(notebook: Path, folder: Path, **parameters: Any) -> Outcome:
    """Execute a notebook at the repository's root; write the result and its page into a folder.

    Args:
        notebook: the `.ipynb` file, which stays as it is.
        folder: where the executed notebook and the HTML page go.
        parameters: values for the parameters that this notebook has; others are left out.

    Returns:
        What became of it. It has `failed` when a cell raises, and also when it leaves a process
        running, or something of its own on the Docker engine; all that is then removed.
    """
    outcome = look_at(notebook)
    executed = folder / notebook.name
    folder.mkdir(parents=True, exist_ok=True)
    known = papermill.inspect_notebook(str(notebook))
    ports = {name: parameters.get(name, port) for name, port in ports_of(notebook).items()}
    ids = [cell.id for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]

    def look_after(cell: nbformat.NotebookNode, **_: object) -> None:
        if cell.id == ids[-1]:
            outcome.error = left_behind(notebook.name[:2], ports.values())

    os.environ["WORKBOOK_RUN"] = MARK
    # This environment's own kernel, whatever else is called python3 on the machine.
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix, "share", "jupyter"))
    # None of the files that IPython runs at its start for this user.
    os.environ["IPYTHONDIR"] = str(ROOT / "build" / "ipython")
    os.environ.pop("PYTHONSTARTUP", None)
    start = time.monotonic()
    try:
        with chatter_to(folder / "kernels.log") as terminal:
            papermill.execute_notebook(
                notebook,
                executed,
                {name: value for name, value in parameters.items() if name in known},
                cwd=ROOT,
                coalesce_streams=True,
                on_cell_executed=look_after,
                config=Config({"KernelManager": {"transport_encryption": "auto"}}),
                progress_bar={
                    "file": terminal,
                    "desc": f"{notebook.stem:<26}",
                    "bar_format": "{desc}{percentage:4.0f} % {bar:30} {n_fmt}/{total} {elapsed}",
                    "mininterval": 0.1 if terminal.isatty() else 10,
                },
            )
        outcome.outcome = "failed" if outcome.error else "done"
    except PapermillExecutionError as error:
        outcome.outcome, outcome.error = "failed", describe(error)
    except DeadKernelError:
        outcome.outcome, outcome.error = "failed", "the kernel died, perhaps for want of memory"
    except RuntimeError as error:  # of Jupyter, before the first cell
        log = os.path.relpath(folder / "kernels.log")
        outcome.outcome, outcome.error = "failed", f"no kernel starts ({error}); see {log}"
    finally:
        end_started()
        for kind, name in on_the_engine(notebook.name[:2], ports.values()):
            docker(kind, "rm", *(["--force", "--volumes"] if kind == "container" else []), name)
        del os.environ["WORKBOOK_RUN"]
    outcome.seconds = time.monotonic() - start
    node = nbformat.read(executed, as_version=4)
    outcome.engine = last_line(node, "engine: ") or "–"
    outcome.prediction = last_line(node, "prediction: ")
    html = page(node, notebook.parent, folder, outcome.title)
    executed.with_suffix(".html").write_text(html, encoding="utf-8")
    return outcome


def describe(error: PapermillExecutionError) -> str:
    """Put a failed cell into a few lines: its number, its source, and what it raised."""
    source = "\n".join(f"    {line}" for line in error.source.splitlines())
    message = "\n".join(strip_ansi(f"{error.ename}: {error.evalue}").splitlines()[:8])
    return f"cell [{error.exec_count}]\n\n{source}\n\nraised {message}"


def last_line(node: nbformat.NotebookNode, start: str) -> str:
    """Find the last printed line that begins with `start`, and give what follows it."""
    printed = (
        line
        for cell in reversed(node.cells)
        for output in reversed(cell.get("outputs", []))
        for line in reversed(output.get("text", "").splitlines())
    )
    return next((line.removeprefix(start) for line in printed if line.startswith(start)), "")


def page(node: nbformat.NotebookNode, source: Path, folder: Path, title: str) -> str:
    """Make an executed notebook into one page that needs no other file and no network."""

    def moved(link: re.Match) -> str:
        target = Path(source, link[1])
        is_lesson = target.suffix == ".ipynb"
        return f"{target.stem}.html" if is_lesson else os.path.relpath(target, folder)

    template = (TEMPLATES / "page.html.j2").read_text(encoding="utf-8")
    exporter = HTMLExporter(raw_template=template, embed_images=True)
    metadata = {"path": str(source), "name": title}
    html, _ = exporter.from_notebook_node(node, {"metadata": metadata})
    return re.sub(r'(?<=href=")(?!#|[a-z]+:)([^"#]+)', moved, html)


def publish(outcomes: list[Outcome], notebooks: list[Path], folder: Path) -> None:
    """Write the page that lists all lessons, and link the lessons' pages with each other.

    Args:
        outcomes: what this run has done so far; those that are `not run` count for nothing.
        notebooks: all lessons that there are, in their order.
        folder: where the pages are; its `outcomes.json` keeps what earlier runs have done.
    """
    notes = folder / "outcomes.json"
    known: dict[str, Outcome] = {}
    with suppress(FileNotFoundError, ValueError, TypeError):  # perhaps of an older version
        known = {row["notebook"]: Outcome(**row) for row in json.loads(notes.read_text())}
    known |= {outcome.notebook: outcome for outcome in outcomes if outcome.outcome != "not run"}
    rows = [
        known[path.stem]
        if path.stem in known and (folder / f"{path.stem}.html").exists()
        else look_at(path)
        for path in notebooks
    ]
    done = [asdict(row) for row in rows if row.outcome != "not run"]
    notes.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    templates = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    prediction = next((row.prediction for row in reversed(rows) if row.prediction), "")
    index = templates.get_template("index.html.j2").render(outcomes=rows, prediction=prediction)
    (folder / "index.html").write_text(index, encoding="utf-8")
    bar = templates.get_template("bar.html.j2")
    for previous, row, following in zip([None, *rows], rows, [*rows[1:], None], strict=False):
        page = folder / f"{row.notebook}.html"
        if row.outcome != "not run":
            start, _, rest = page.read_text(encoding="utf-8").partition('<nav class="lessons"')
            html = (
                start + bar.render(previous=previous, next=following) + rest.split("</nav>", 1)[1]
            )
            page.write_text(html, encoding="utf-8")


def report(outcomes: list[Outcome], folder: Path) -> None:
    """Print what became of the lessons that were to run, and what to do next."""
    prediction = next((o.prediction for o in reversed(outcomes) if o.prediction), "")
    table = Table("notebook", "engine")
    table.add_column("cells", justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("outcome")
    colours = {"done": "green", "failed": "bold red", "not run": "dim"}
    for o in outcomes:
        seconds = f"{o.seconds:.1f}" if o.seconds else "–"
        outcome = f"[{colours[o.outcome]}]{o.outcome}"
        table.add_row(o.notebook, o.engine.split()[0], str(o.cells), seconds, outcome)
    console = Console(highlight=False)
    console.print(table)
    for engine in dict.fromkeys(o.engine for o in outcomes if " – " in o.engine):
        console.print(f"engine: {engine}", markup=False)
    for o in outcomes:
        if o.error:
            console.print(f"{o.notebook} failed: {o.error}", markup=False, soft_wrap=True)
    if prediction:
        console.print(f"The picture shows: [bold]{prediction}[/bold]")
    console.print(f"Read it:        {os.path.relpath(folder)}/index.html")
    console.print("Change it:      make lab")
    console.print("Classify yours: make serve")


def main() -> int:
    """Run the command line; 0 when every notebook ran to its end, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="NN", help="such as 02 03")
    parser.add_argument("--source", type=Path, default=ROOT / "notebooks")
    parser.add_argument("--target", type=Path, default=ROOT / "build" / "workbook")
    arguments = parser.parse_args()
    notebooks = lessons(arguments.source)
    chosen = choose(arguments.only, notebooks)
    if not MODEL.is_dir() and chosen[0] != notebooks[0]:
        print("There is no build/clothing-model yet: notebook 01 goes first and makes it.")
        chosen.insert(0, notebooks[0])

    end_on_signals()
    if chosen == notebooks:
        for earlier in arguments.target.glob("*.*"):
            if earlier.is_file():
                earlier.unlink()
    outcomes = [look_at(notebook) for notebook in chosen]
    try:
        for number, notebook in enumerate(chosen):
            usual = ports_of(notebook)
            ports = {name: p for name, p in free_ports(usual).items() if p != usual[name]}
            outcomes[number] = execute(notebook, arguments.target, **ports)
            publish(outcomes, notebooks, arguments.target)
            if outcomes[number].outcome == "failed":
                break
    except KeyboardInterrupt:
        print("\nInterrupted; every kernel and server that was started has ended.", file=sys.stderr)
        return 130
    report(outcomes, arguments.target)
    return int(any(outcome.outcome != "done" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
