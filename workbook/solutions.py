"""Solutions of the exercises: `python -m workbook.solutions 03 04` executes those of two lessons.

The bonus lesson of lesson 04 is `04-bonus`.

A lesson has three, each of three cells: the question, a cell for the answer (tag `exercise`) and a
cell that checks it (tag `check`). `notebooks/solutions.ipynb` has the answers; each cell with the
tag `answer` names in its metadata the lesson, the exercise's cell, and a typical wrong answer.
"""

import copy
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from workbook.lesson import ROOT, lessons, ports_of
from workbook.run import free_ports

SOLUTIONS = ROOT / "notebooks" / "solutions.ipynb"


class Answer(NamedTuple):
    """One cell of the solutions.

    Attributes:
        lesson: the lesson, such as `03` or `04-bonus`.
        exercise: the id of the cell that it answers.
        source: the right answer.
        wrong: a typical wrong one.
        hint: what the check says of the wrong one, in part.
    """

    lesson: str
    exercise: str
    source: str
    wrong: str
    hint: str


def answers(solutions: NotebookNode) -> list[Answer]:
    """Return the answers of the notebook with the solutions, in their order."""
    return [
        Answer(source=cell.source, **cell.metadata["answers"])
        for cell in solutions.cells
        if "answer" in cell.metadata.get("tags", [])
    ]


def exercises(lesson: NotebookNode) -> list[tuple[NotebookNode, NotebookNode]]:
    """Return the cells for answers of a lesson, each with the cell that checks it."""
    tagged = [c for c in lesson.cells if {"exercise", "check"} & {*c.metadata.get("tags", [])}]
    return list(zip(tagged[::2], tagged[1::2], strict=True))


def with_answers(lesson: NotebookNode, forms: dict[str, list[str]]) -> NotebookNode:
    """Return a lesson in which exercises are answered, each with its check, once for every form.

    Args:
        lesson: as it is read from its file; stays as it is.
        forms: the sources to put into an exercise's cell, by its id. The cells get the ids
            `ID-0`, `ID-1`, …, those that check them `ID-0-check`, `ID-1-check`, …
    """
    checks = {answer.id: check for answer, check in exercises(lesson)}
    done, checked = [], [checks[each].id for each in forms]
    for cell in lesson.cells:
        for number, source in enumerate(forms.get(cell.id, [])):
            answer, check = copy.deepcopy(cell), copy.deepcopy(checks[cell.id])
            answer.id, check.id = f"{cell.id}-{number}", f"{cell.id}-{number}-check"
            answer.source = source
            done += [answer, check]
        if cell.id not in forms and cell.id not in checked:
            done.append(copy.deepcopy(cell))
    return NotebookNode({**lesson, "cells": done})


def name_of(path: Path) -> str:
    """Return what answers call a lesson: its number, or `04-bonus` for the bonus of lesson 04."""
    return path.name[: 8 if "-bonus-" in path.name else 2]


def set_parameters(notebook: NotebookNode, values: dict[str, Any]) -> None:
    """Add those values to the cell with a notebook's parameters of which it has the names."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            for name, value in values.items():
                if f"{name} = " in cell.source:
                    cell.source += f"\n{name} = {value!r}"


def execute(notebook: NotebookNode, **environment: str) -> None:
    """Execute a notebook at the repository's root; its outputs go into its cells."""
    resources = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=900, resources=resources, coalesce_streams=True
    )
    client.execute(env=os.environ | environment)


def solve(number: str) -> None:
    """Execute a lesson with its answers, and write what these print into the solutions."""
    (path,) = (each for each in lessons(ROOT / "notebooks") if name_of(each) == number)
    solutions, node = read(SOLUTIONS), read(path)
    mine = [answer for answer in answers(solutions) if answer.lesson == number]
    solved = with_answers(node, {answer.exercise: [answer.source] for answer in mine})
    set_parameters(solved, free_ports(ports_of(path)))
    execute(solved)
    done = {cell.id: cell for cell in solved.cells}
    solutions = read(SOLUTIONS)  # again: that took minutes, in which somebody may have edited it
    for cell in solutions.cells:
        about = cell.metadata.get("answers", {})
        if about.get("lesson") == number:
            answer = done[f"{about['exercise']}-0"]
            cell.outputs = answer.outputs + done[f"{answer.id}-check"].outputs
    code = [cell for cell in solutions.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, 1):
        cell.execution_count = count
    nbformat.write(solutions, SOLUTIONS)


def read(path: Path) -> NotebookNode:
    """Read a notebook."""
    return nbformat.read(path, as_version=4)


def main() -> None:
    """Run the command line: `python -m workbook.solutions 03 04` solves these two lessons."""
    for number in sys.argv[1:]:
        solve(number)


if __name__ == "__main__":
    main()
