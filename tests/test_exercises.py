"""Exercises answer back: right answers are told so, wrong ones get a hint, and nothing hides."""

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import export
from helpers.basics import free_port, processes_with
from test_lessons_again import again
from test_notebooks import NOTEBOOKS

import description
from workbook import solutions
from workbook.lesson import ports_of

ANSWERS = solutions.answers(solutions.read(solutions.SOLUTIONS))
# What a lesson needs less of, where exercises are tried and nothing is measured.
QUICKER = {
    "02": {"count=64": "count=16", "6 * 64": "6 * 16", "times(10,": "times(2,"},
    "03": {"count=40": "count=2"},
    "05": {'"both work", 5': '"both work", 1', '"one works", 5': '"one works", 1'},
    "08": {
        "STEP_SECONDS = 2": "STEP_SECONDS = 1",
        "--run-time 3s": "--run-time 1s",
        "--run-time 5s": "--run-time 2s",
        "LOAD_SECONDS = 30": "LOAD_SECONDS = 2",
        "seconds=10": "seconds=2",
        "count=4000": "count=400",
    },
}
# What these lessons measure in so short a time need not be what their checkpoints say. With the
# usual times, `make workbook` runs the checkpoints.
MEASURES = {"08"}

every_lesson = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(str(output.get("text", "")) for output in cell.outputs)


@every_lesson
def test_there_are_three_exercises_before_clean_up(path: Path) -> None:
    node = solutions.read(path)
    places = {cell.id: number for number, cell in enumerate(node.cells)}
    cells = solutions.exercises(node)
    headings = [c.id for c in node.cells if re.search(r"^## (Exercises|Clean up)$", c.source, re.M)]
    begin, end = (places[i] for i in headings)
    assert len(cells) >= 3
    for answer, check in cells:
        assert begin < places[answer.id] < places[check.id] < end
        assert "with attempt():" in check.source and "assert " in check.source
        assert printed(check).startswith("not yet: ")
    questions = "".join(cell.source for cell in node.cells[begin:end])
    for kind in ("Break it", "Change it", "Measure it"):
        assert f"**{kind}." in questions or f"· {kind}.**" in questions


@every_lesson
def test_each_exercise_has_an_executed_solution(path: Path) -> None:
    wanted = {answer.id for answer, _ in solutions.exercises(solutions.read(path))}
    assert wanted == {a.exercise for a in ANSWERS if a.lesson == solutions.name_of(path)}
    for cell in solutions.read(solutions.SOLUTIONS).cells:
        if cell.metadata.get("answers", {}).get("lesson") == solutions.name_of(path):
            assert printed(cell).endswith("right\n"), cell.id


@again
@every_lesson
def test_answers_pass_and_others_get_their_hint(
    path: Path, clothing_model: Path, tmp_path: Path
) -> None:
    """Unanswered, wrong and right, one after the other, in one run of the lesson."""
    lesson = solutions.read(path)
    mine = [answer for answer in ANSWERS if answer.lesson == solutions.name_of(path)]
    empty = {answer.id: answer.source for answer, _ in solutions.exercises(lesson)}
    forms = {a.exercise: [empty[a.exercise], a.wrong, a.source] for a in mine}
    tried = solutions.with_answers(lesson, forms)
    if path.name[:2] in MEASURES:
        heading = next(n for n, c in enumerate(tried.cells) if "## Checkpoint\n" in c.source)
        print(f"left out, because nothing is measured long enough:\n{tried.cells.pop(heading + 1)}")
    values: dict[str, Any] = {name: free_port() for name in ports_of(path)}
    values |= {"EXPORT_DIR": str(shutil.copytree(clothing_model, tmp_path / "clothing-model"))}
    solutions.set_parameters(tried, values | {"WORKBOOK_ENGINE": "embedded"})
    for cell in tried.cells:
        for slow, quick in QUICKER.get(solutions.name_of(path), {}).items():
            cell.source = cell.source.replace(slow, quick)

    solutions.execute(tried, TEST_MARK=str(tmp_path))

    said = {cell.id: printed(cell) for cell in tried.cells if cell.cell_type == "code"}
    assert mine
    for answer in mine:
        unanswered, wrong, right = (said[f"{answer.exercise}-{n}-check"] for n in range(3))
        assert unanswered.startswith("not yet: ")
        assert wrong.startswith("not yet: ") and answer.hint in wrong
        assert right == "right\n"
    assert processes_with(str(tmp_path)) == []


@again
def test_the_checkpoint_of_lesson_01_notices_what_no_prediction_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its first exercise: a wrong scaling with which the model still gets every sample right."""
    monkeypatch.setitem(description.SCALINGS, "xception", lambda pixels: pixels / 255)
    with pytest.raises(AssertionError, match="scales differently from Keras"):
        export(tmp_path / "clothing-model")
