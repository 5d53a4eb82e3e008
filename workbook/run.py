"""Execute the lessons in order and turn them into pages: `make workbook`."""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from workbook.cluster import docker_answers
from workbook.lesson import ROOT, Outcome, lessons, look_at, ports_of, read
from workbook.processes import end_on_signals
from workbook.servers import is_busy

MODEL = ROOT / "build" / "clothing-model" / "1"
TEMPLATES = Path(__file__).with_name("templates")
# Without containers or a cluster, most lessons wait more than they compute.
SIDE_BY_SIDE = 5


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


def free_ports(wanted: dict[str, int], reserved: Collection[int] = ()) -> dict[str, int]:
    """Give each name its port; if that is busy, the next free one, and say so in one line.

    Ports that are `reserved`, for lessons that run at the same time, are left out without a word.
    """
    given: dict[str, int] = {}
    for name, preferred in wanted.items():
        taken = {*wanted.values(), *given.values(), *reserved} - {preferred}
        begin = preferred + (preferred in reserved)
        given[name] = next(p for p in range(begin, 65536) if p not in taken and not is_busy(p))
        if given[name] != preferred and preferred not in reserved:
            print(f"port {preferred} is busy: {name} is {given[name]} this time", flush=True)
    return given


def execute_all(notebooks: list[Path], folder: Path, jobs: int = 1) -> Iterator[Outcome]:
    """Execute lessons, each in a process of its own; give what becomes of each when it ends.

    After one that has failed, no other begins.

    Args:
        notebooks: in the order in which they begin; where several run at a time, the longest ones
            of them begin first, and end together.
        folder: where the executed notebooks and their pages go.
        jobs: how many may run at a time. One with `alone` in its metadata, because it measures or
            makes what the others need, runs by itself.
    """
    waiting = in_best_order(notebooks) if jobs > 1 else list(notebooks)
    running: dict[Future, tuple[Path, Collection[int]]] = {}
    columns = TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn()) as progress, ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            at_work = [notebook for notebook, _ in running.values()]
            if waiting and len(running) < jobs and may_join(waiting[0], at_work):
                notebook = waiting.pop(0)
                usual = ports_of(notebook)
                given = free_ports(usual, [p for _, ports in running.values() for p in ports])
                changed = {name: port for name, port in given.items() if port != usual[name]}
                task = progress.add_task(notebook.stem, total=look_at(notebook).cells)
                step = functools.partial(progress.advance, task)
                future = pool.submit(execute_apart, notebook, folder, changed, step)
                running[future] = notebook, given.values()
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                outcome = future.result()
                if outcome.outcome == "failed":
                    waiting.clear()
                yield outcome


def in_best_order(notebooks: list[Path]) -> list[Path]:
    """Put the longest of those that run side by side first, by the seconds that refresh noted."""
    about = {notebook: read(notebook)["metadata"] for notebook in notebooks}
    first = list(takewhile(lambda notebook: about[notebook].get("alone"), notebooks))
    rest = notebooks[len(first) :]

    def longest_first(notebook: Path) -> tuple[bool, float]:
        metadata = about[notebook]
        return bool(metadata.get("alone")), -metadata.get("seconds", 0)

    return first + sorted(rest, key=longest_first)


def may_join(notebook: Path, at_work: list[Path]) -> bool:
    """Say whether a lesson may run beside these; with `alone` in its metadata, beside none."""
    both = [notebook, *at_work]
    return not at_work or not any(read(n)["metadata"].get("alone") for n in both)


def execute_apart(
    notebook: Path, folder: Path, parameters: dict[str, int], step: Callable[[], object]
) -> Outcome:
    """Execute a notebook in a process of its own; call `step` after each code cell."""
    words = (notebook, folder, json.dumps(parameters))
    command = [sys.executable, "-m", "workbook.execute", *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if "outcome" in said:
                return Outcome(**said["outcome"])
            step()
    outcome = look_at(notebook)
    outcome.outcome, outcome.error = "failed", f"its process has ended with {process.returncode}"
    return outcome


def side_by_side() -> int:
    """How many lessons may run at a time: containers and a cluster are there for all of them."""
    return 1 if "WORKBOOK_CONTEXT" in os.environ or docker_answers() else SIDE_BY_SIDE


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
    parser.add_argument("--jobs", type=int, help="how many at a time")
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
    outcomes = {notebook.stem: look_at(notebook) for notebook in chosen}
    try:
        for outcome in execute_all(chosen, arguments.target, arguments.jobs or side_by_side()):
            outcomes[outcome.notebook] = outcome
            publish([*outcomes.values()], notebooks, arguments.target)
    except KeyboardInterrupt:
        print("\nInterrupted; every kernel and server that was started has ended.", file=sys.stderr)
        return 130
    report([*outcomes.values()], arguments.target)
    return int(any(outcome.outcome != "done" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
