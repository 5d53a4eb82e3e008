"""Every notebook is what a reader may expect of a lesson; `make workbook` runs them."""

import ast
import ipaddress
import json
import re
import statistics
import subprocess
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from helpers.basics import ROOT

from workbook.lesson import lessons

NOTEBOOKS = lessons(ROOT / "notebooks")
MAIN = [path for path in NOTEBOOKS if "-bonus-" not in path.name]
GLOSSARY = ROOT / "docs/glossary.md"
# Ranges that belong to no machine of ours: examples, the metadata address of the clouds, and what
# clusters give to Services and pods unless they are told otherwise.
EXAMPLES = (
    *("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "169.254.169.254/32"),
    *("10.96.0.0/12", "10.244.0.0/16"),
)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def before_exercises(path: Path) -> list[nbformat.NotebookNode]:
    """The cells that a reader reads; exercises, with cells of their own, are for working."""
    cells = read(path).cells
    (begin,) = (n for n, cell in enumerate(cells) if "## Exercises\n" in cell.source)
    end = next(n for n, cell in enumerate(cells) if cell.source.startswith("## Clean up\n"))
    return cells[:begin] + cells[end:]


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path: Path) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(path) for output in cell.outputs]


def lines_of(cell: nbformat.NotebookNode) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def parameters(path: Path) -> dict[str, object]:
    """The names and values of the one cell tagged `parameters`; fails on anything but literals."""
    (cell,) = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    values = {}
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        (target,) = statement.targets
        assert isinstance(target, ast.Name), ast.unparse(statement)
        values[target.id] = ast.literal_eval(statement.value)
    return values


def text_without_pictures(path: Path) -> str:
    node = read(path)
    for cell in node.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    return json.dumps(node, ensure_ascii=False)


def test_no_number_of_a_lesson_is_used_twice() -> None:
    """But by its bonus lesson, which it names, and which comes after it."""
    assert len(MAIN) >= 7
    numbers = [path.name[:2] for path in MAIN]
    assert numbers[0] == "01"
    assert len(set(numbers)) == len(numbers)
    for before, path in pairwise(NOTEBOOKS):
        if path not in MAIN:
            assert before.name[:2] == path.name[:2]
            assert f"]({path.name})" in "".join(cell.source for cell in read(before).cells)


def test_lesson_01_exports_a_model_that_can_be_served(clothing_model: Path) -> None:
    """The fixture executes the notebook, once for all tests."""
    assert (clothing_model / "1" / "saved_model.pb").stat().st_size > 0
    assert (clothing_model / "1" / "variables").is_dir()


@every_notebook
def test_begins_and_ends_as_every_lesson_does(path: Path) -> None:
    cells = read(path).cells
    assert re.match(rf"# {path.name[:2]} · [A-Z]", cells[0].source)
    headings = re.findall(
        r"^## (.+)$", "\n".join(c.source for c in cells if c.cell_type == "markdown"), re.MULTILINE
    )
    assert headings[-4:] == ["Checkpoint", "Exercises", "Clean up", "What you built"]
    parameters(path)
    following = [other for other in MAIN if other.name[:2] > path.name[:2]]
    if following:
        assert f"]({following[0].name})" in cells[-1].source


@every_notebook
def test_cells_are_small_and_explained(path: Path) -> None:
    # Cells that become a program are whole functions, and stand for themselves.
    programs = {"gateway", "first_gateway"}
    cells = [c for c in before_exercises(path) if not programs & {*c.metadata.get("tags", [])}]
    lengths = [lines_of(cell) for cell in cells if cell.cell_type == "code"]
    # Lesson 01 exports twice, 04 builds two programs and attacks both, 08 has seven parts, 10 goes
    # the whole way.
    most, median = {"01": (65, 6), "04": (57, 6), "08": (68, 6), "10": (50, 5)}.get(
        path.name[:2], (50, 4)
    )
    assert 25 <= len(cells) <= most
    assert max(map(lines_of, code_cells(path))) <= 20
    assert statistics.median(lengths) <= median
    assert statistics.quantiles(lengths, n=10, method="inclusive")[-1] <= 12
    introduced = sum(
        before.cell_type == "markdown" and cell.cell_type == "code"
        for before, cell in pairwise(cells)
    )
    assert introduced >= 0.75 * len(lengths)
    if path.stem == "04-flask-gateway":
        prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
        assert len(" ".join(prose).split()) <= 1400


@every_notebook
def test_there_is_a_picture_for_every_eight_code_cells(path: Path) -> None:
    """A figure or a plot; exercises are for working."""
    cells = before_exercises(path)
    code = [cell for cell in cells if cell.cell_type == "code"]
    prose = "".join(cell.source for cell in cells if cell.cell_type == "markdown")
    plots = sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert len(code) <= 8 * (prose.count("](figures/") + plots)


@every_notebook
def test_the_last_cell_has_three_lines_to_remember(path: Path) -> None:
    _, _, after = read(path).cells[-1].source.partition("\n\nThree lines to remember:\n\n")
    assert [line[:2] for line in after.split("\n\n")[0].splitlines()] == ["- "] * 3


@every_notebook
def test_tables_have_no_line_that_falls_out(path: Path) -> None:
    for cell in read(path).cells:
        rows = [line for line in cell.source.splitlines() if line.endswith(" |")]
        assert cell.cell_type == "code" or all(row.startswith("| ") for row in rows), rows


@every_notebook
def test_is_committed_with_the_outputs_of_one_clean_run(path: Path) -> None:
    node = read(path)
    nbformat.validate(node)
    ids = [cell.id for cell in node.cells]
    assert len(set(ids)) == len(ids)
    code = code_cells(path)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    # Papermill takes a committed error for a failed run, so a lesson catches those it shows.
    assert [o.ename for o in outputs(path) if o.output_type == "error"] == []
    assert node.metadata.kernelspec.name == "python3"


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell has printed, as far as it is committed."""
    return "".join(str(output.get("text", "")) for output in cell.outputs)


@every_notebook
def test_functions_that_are_shown_are_those_of_the_files(path: Path) -> None:
    """Whatever printed them: `inspect.getsource`, `cat`, `read_text()`."""
    folders = ("model_server", "tfserving", "workbook", "kube-config", "eks")
    files = [
        *ROOT.glob("*.py"),
        *(file for name in folders for file in (ROOT / name).rglob("*.py")),
    ]
    sources = [file.read_text(encoding="utf-8") for file in files]
    definition = r"^(?:@.+\n)*(?:def|class) \w+(?:.*:|\(\n(?: .*\n)+\).*:)\n(?:(?:[ )].*)?\n)*"
    shown = "\n".join(map(printed, code_cells(path)))
    found = [text.rstrip() + "\n" for text in re.findall(definition, shown, re.MULTILINE)]
    assert [text for text in found if not any(text in source for source in sources)] == []
    if path.name.startswith("04-bonus"):
        names = {re.findall(r"(?:def|class) (\w+)", text)[0] for text in found}
        assert names >= {"Budget", "DeadlineSocket", "read_body", "admit", "answer_problem"}


@every_notebook
def test_files_that_are_shown_are_as_they_are(path: Path) -> None:
    for cell in code_cells(path):
        commands = re.findall(r"^!((?:cat|sed|grep) [^{$\n]+)$", cell.source, re.MULTILINE)
        commands += [
            f"cat {name}"
            for name in re.findall(r'print\(Path\("([^"]+)"\)\.read_text\(\)\)', cell.source)
        ]
        for command in commands:
            now = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
            assert now.stdout.strip() in printed(cell), command


def test_lesson_02_times_requests_that_are_warmed_up() -> None:
    """Lesson 01 writes none for `serving_bytes`: there, the first request is slow in any case."""
    (path,) = (path for path in NOTEBOOKS if path.name.startswith("02-"))
    timed = [cell.source for cell in code_cells(path) if 'deploy("assets.extra")' in cell.source]
    assert [re.findall(r"times\(6(.*)\)", source) for source in timed] == [[", **floats"] * 2]
    assert '"signature_name"' not in next(
        line
        for cell in code_cells(path)
        for line in cell.source.splitlines()
        if "floats = " in line
    )


def test_lesson_05_is_committed_as_it_runs_in_containers() -> None:
    """Where an engine answers, `make workbook` runs it so: `.ci/run` makes sure of that."""
    (path,) = (path for path in NOTEBOOKS if path.name.startswith("05-"))
    for words in ("engine: docker – ", "prediction: dress ", " requests, 0 failed"):
        assert words in text_without_pictures(path)


@every_notebook
def test_shows_figures_and_nothing_of_the_machine(path: Path) -> None:
    assert path.stat().st_size < 200_000
    pictures = {
        kind for o in outputs(path) for kind in o.get("data", {}) if kind.startswith("image/")
    }
    assert pictures == {"image/png"}
    text = text_without_pictures(path)
    assert re.findall(r"(?<![\w.])/(?:root|home|work|tmp|opt|Users)/[^\s\"]*", text) == []
    printed = "\n".join(
        str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs(path)
    )
    for address in re.findall(r"\b(?:\d{1,3}\.){3}\d{1,3}\b", printed):
        ip = ipaddress.ip_address(address)
        example = any(ip in ipaddress.ip_network(each) for each in EXAMPLES)
        assert ip.is_loopback or ip.is_unspecified or example, address


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def glossary_links(path: Path) -> set[str]:
    """The anchors of the glossary to which a page or a notebook links."""
    return set(re.findall(r"glossary\.md#([\w-]+)", path.read_text(encoding="utf-8")))


@every_notebook
def test_words_that_are_explained_are_in_the_glossary(path: Path) -> None:
    assert glossary_links(path) <= anchors(GLOSSARY)


def test_the_glossary_is_sorted_and_somebody_links_to_each_word() -> None:
    words = re.findall(r"^## (.+)$", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    assert words == sorted(set(words), key=str.lower)
    pages = [*NOTEBOOKS, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    linked = set().union(*map(glossary_links, pages))
    assert anchors(GLOSSARY) - {"glossary"} - linked == set()


@every_notebook
def test_readme_and_lesson_agree_on_the_minutes(path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| \[.*\(notebooks/{path.name}\) \|.*$", readme, re.MULTILINE)
    minutes = re.findall(r"\*\*Takes\*\* about (\d+) minutes", read(path).cells[0].source)
    assert minutes and f"| {minutes[0]} |" in row
