"""Execute the notebooks in order and turn them into pages: `make workbook`."""

import argparse
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

import nbformat
import papermill
import psutil
from jinja2 import Template
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table
from traitlets.config import Config

from workbook.engine import remove_containers
from workbook.servers import is_busy

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "build" / "clothing-model" / "1"
PORTS = {"GRPC_PORT": 8500, "REST_PORT": 8501, "GATEWAY_PORT": 9696}
PORTS |= {"BATCHING_GRPC_PORT": 8510, "BATCHING_REST_PORT": 8511}
PORTS |= {"SECOND_GRPC_PORT": 8520, "SECOND_REST_PORT": 8521, "PICTURES_PORT": 8530}
MARK = uuid.uuid4().hex

# nbconvert's own page, less the scripts that it would load from elsewhere.
PAGE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_css %}<style>main { max-width: 62rem; margin: auto }</style>{% endblock %}"""


@dataclass
class Outcome:
    """What became of one notebook: `outcome` is `done`, `failed` or `not run`.

    `engine` and `prediction` are what follows these words in the lines that it printed.
    """

    notebook: str
    title: str
    cells: int
    engine: str = "–"
    prediction: str = ""
    seconds: float = 0.0
    outcome: str = "not run"
    error: str = ""


def free_ports(wanted: dict[str, int]) -> dict[str, int]:
    """Give each name its port, or the next free one where it is busy, said in one line."""
    given: dict[str, int] = {}
    for name, preferred in wanted.items():
        taken = {*wanted.values(), *given.values()} - {preferred}
        given[name] = next(p for p in range(preferred, 65536) if p not in taken and not is_busy(p))
        if given[name] != preferred:
            print(f"port {preferred} is busy: {name} is {given[name]} this time", flush=True)
    return given


def end_started() -> None:
    """End every process that this one has started, the servers of a notebook included.

    A kernel leads a session of its own, so neither Ctrl-C nor the kernel's end reaches the
    servers that a notebook has started; but all of them inherit the mark in their environment.
    """
    started = [process for process in psutil.process_iter() if bears_mark(process)]
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(started, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def bears_mark(process: psutil.Process) -> bool:
    """Say whether a process descends from this one."""
    with suppress(psutil.Error, OSError):
        return process.environ().get("WORKBOOK_RUN") == MARK
    return False


def end_on_signals() -> None:
    """Turn Ctrl-C, SIGTERM and a closed terminal into one KeyboardInterrupt, however often sent."""
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
    """Send to a file what kernels and libraries write past the notebook; yield the terminal."""
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


def execute(notebook: Path, folder: Path, **parameters: object) -> Outcome:
    """Execute a notebook at the repository's root; write the result and its page into a folder.

    Args:
        notebook: the `.ipynb` file, which stays as it is.
        folder: where the executed notebook and the HTML page go.
        parameters: values for the parameters that this notebook has; others are left out.

    Returns:
        What became of it; a cell that raises makes it `failed` and raises nothing here.
    """
    outcome = look_at(notebook)
    executed = folder / notebook.name
    folder.mkdir(parents=True, exist_ok=True)
    known = papermill.inspect_notebook(str(notebook))
    os.environ["WORKBOOK_RUN"] = MARK
    # This environment's own kernel, whatever else is called python3 on the machine.
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix, "share", "jupyter"))
    start = time.monotonic()
    try:
        with chatter_to(folder / "kernels.log") as terminal:
            papermill.execute_notebook(
                notebook,
                executed,
                {name: value for name, value in parameters.items() if name in known},
                cwd=ROOT,
                coalesce_streams=True,
                config=Config({"KernelManager": {"transport_encryption": "auto"}}),
                progress_bar={
                    "file": terminal,
                    "desc": f"{notebook.stem:<24}",
                    "bar_format": "{desc}{percentage:4.0f} % {bar:30} {n_fmt}/{total} {elapsed}",
                    "mininterval": 0.1 if terminal.isatty() else 10,
                },
            )
        outcome.outcome = "done"
    except PapermillExecutionError as error:
        outcome.outcome, outcome.error = "failed", describe(error)
    except DeadKernelError:
        outcome.outcome, outcome.error = "failed", "the kernel died, perhaps for want of memory"
    finally:
        end_started()
        if outcome.outcome != "done":  # containers are not processes of ours
            port = parameters.get("GATEWAY_PORT", PORTS["GATEWAY_PORT"])
            remove_containers(f"lesson{notebook.name[:2]}-{port}")
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
        return (
            target.stem + ".html" if target.suffix == ".ipynb" else os.path.relpath(target, folder)
        )

    exporter = HTMLExporter(raw_template=PAGE, embed_images=True)
    metadata = {"path": str(source), "name": title}
    html, _ = exporter.from_notebook_node(node, {"metadata": metadata})
    return re.sub(r'(?<=href=")(?!#|[a-z]+:)([^"]+)', moved, html)


def report(outcomes: list[Outcome], folder: Path) -> None:
    """Write the page that lists the lessons, and print the same with what to do next."""
    prediction = next((o.prediction for o in reversed(outcomes) if o.prediction), "")
    template = Path(__file__).with_name("index.html.j2").read_text(encoding="utf-8")
    page = Template(template, autoescape=True).render(outcomes=outcomes, prediction=prediction)
    (folder / "index.html").write_text(page, encoding="utf-8")

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
            console.print(f"{o.notebook} failed: {o.error}", markup=False)
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
    notebooks = sorted(arguments.source.glob("[0-9][0-9]-*.ipynb"))
    chosen = [n for n in notebooks if not arguments.only or n.name[:2] in arguments.only]
    if chosen and not MODEL.is_dir() and chosen[0] != notebooks[0]:
        print("There is no build/clothing-model yet: notebook 01 goes first and makes it.")
        chosen.insert(0, notebooks[0])
    if not chosen:
        print(
            f"No notebook is numbered {' '.join(arguments.only)}: there are "
            f"{', '.join(n.name[:2] for n in notebooks)}.",
            file=sys.stderr,
        )
        return 2

    end_on_signals()
    if chosen == notebooks:
        for earlier in arguments.target.glob("*.*"):
            if earlier.is_file():
                earlier.unlink()
    ports = {name: port for name, port in free_ports(PORTS).items() if port != PORTS[name]}
    outcomes = [look_at(notebook) for notebook in chosen]
    try:
        for number, notebook in enumerate(chosen):
            outcomes[number] = execute(notebook, arguments.target, **ports)
            if outcomes[number].outcome == "failed":
                break
    except KeyboardInterrupt:
        print("\nInterrupted; every kernel and server that was started has ended.", file=sys.stderr)
        return 130
    report(outcomes, arguments.target)
    return int(any(o.outcome != "done" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
