"""Execute lessons and write the outputs into their files: `python -m workbook.refresh 04 05`.

A lesson's file keeps its cells; outputs and execution counts become those of one clean run, and its
metadata notes how many seconds that took. The pages are in build/refresh/.
"""

import argparse
import sys
from pathlib import Path

import nbformat

from workbook.lesson import ROOT, lessons
from workbook.processes import end_on_signals
from workbook.run import choose, execute_all


def refresh(notebook: Path, folder: Path) -> str:
    """Execute a notebook and write its outputs into it; return what went wrong, if anything."""
    (outcome,) = execute_all([notebook], folder)
    if outcome.error:
        return outcome.error
    source = nbformat.read(notebook, as_version=4)
    executed = nbformat.read(folder / notebook.name, as_version=4)
    done = {cell.id: cell for cell in executed.cells}  # with one that Papermill may have added
    code = [cell for cell in source.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, 1):
        cell.outputs, cell.execution_count = done[cell.id].outputs, count
        for output in cell.outputs:  # a terminal's ends of lines, after a command with `!`
            if "text" in output:
                output.text = output.text.replace("\r\n", "\n")
    source.metadata["seconds"] = round(outcome.seconds)
    nbformat.write(source, notebook)
    return ""


def main() -> int:
    """Run the command line; 0 when every notebook ran to its end, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lessons", nargs="+", metavar="NN", help="how their file names begin")
    chosen = choose(parser.parse_args().lessons, lessons(ROOT / "notebooks"))
    end_on_signals()
    for notebook in chosen:
        if error := refresh(notebook, ROOT / "build" / "refresh"):
            print(f"{notebook.name} failed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
