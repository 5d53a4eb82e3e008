"""Execute one lesson and turn it into a page: `python -m workbook.execute NOTEBOOK FOLDER`.

It prints a line of JSON for each code cell that has run, and then one with the outcome.
"""
# ruff: noqa: E402

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

# It would make a parser of web addresses for jsonschema: a second for what no notebook needs.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

import nbformat
import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from workbook.engine import docker
from workbook.lesson import ROOT, Outcome, look_at, ports_of
from workbook.processes import MARK, end_on_signals, end_started, started

TEMPLATES = Path(__file__).with_name("templates")


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


@contextmanager
def chatter_to(log: Path) -> Iterator[TextIO]:
    """Send what kernels and libraries print outside the notebook to a file; yield our output."""
    ours = os.dup(1), os.dup(2)
    try:
        with log.open("ab") as file, os.fdopen(os.dup(1), "w") as output:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield output
    finally:
        for number, saved in enumerate(ours, 1):
            os.dup2(saved, number)
            os.close(saved)


def execute(notebook: Path, folder: Path, parameters: dict[str, Any]) -> Outcome:
    """Execute a notebook at the repository's root; write the result and its page into a folder.

    Args:
        notebook: the `.ipynb` file, which stays as it is.
        folder: where the executed notebook and the HTML page go.
        parameters: values for the parameters that this notebook has.

    Returns:
        What became of it. It has `failed` when a cell raises, and also when it leaves a process
        running, or something of its own on the Docker engine; all that is then removed.
    """
    outcome = look_at(notebook)
    executed = folder / notebook.name
    folder.mkdir(parents=True, exist_ok=True)
    ports = {name: parameters.get(name, port) for name, port in ports_of(notebook).items()}
    ids = [cell.id for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]

    os.environ["WORKBOOK_RUN"] = MARK
    # This environment's own kernel, whatever else is called python3 on the machine.
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix, "share", "jupyter"))
    # None of the files that IPython runs at its start for this user.
    os.environ["IPYTHONDIR"] = str(ROOT / "build" / "ipython")
    os.environ.pop("PYTHONSTARTUP", None)
    start = time.monotonic()
    try:
        with chatter_to(folder / "kernels.log") as output:

            def look_after(cell: nbformat.NotebookNode, **_: object) -> None:
                if cell.id in ids:  # and not the one that papermill adds
                    print(json.dumps({"cell": cell.id}), file=output, flush=True)
                if cell.id == ids[-1]:
                    outcome.error = left_behind(notebook.name[:2], ports.values())

            papermill.execute_notebook(
                notebook,
                executed,
                parameters,
                cwd=ROOT,
                coalesce_streams=True,
                on_cell_executed=look_after,
                config=Config({"KernelManager": {"transport_encryption": "auto"}}),
                progress_bar=False,
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


def main() -> int:
    """Run the command line; 0 when there is an outcome, even `failed`, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parameters", type=json.loads, nargs="?", default={}, help="as JSON")
    end_on_signals()
    try:
        print(json.dumps({"outcome": asdict(execute(**vars(parser.parse_args())))}))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
