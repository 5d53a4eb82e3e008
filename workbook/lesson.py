"""What a notebook is: read as JSON, which is soon done, without running anything."""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


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


def read(notebook: Path) -> dict[str, Any]:
    """Return a notebook's JSON, with each cell's source as one string."""
    node = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in node["cells"]:
        cell["source"] = "".join(cell["source"])
    return node


def look_at(notebook: Path) -> Outcome:
    """Read what a notebook is called and how many code cells it has."""
    cells = read(notebook)["cells"]
    heading = re.search(r"^# (.+)$", cells[0]["source"], re.MULTILINE) if cells else None
    count = sum(cell["cell_type"] == "code" for cell in cells)
    return Outcome(notebook.stem, heading[1] if heading else notebook.stem, count)


def ports_of(notebook: Path) -> dict[str, int]:
    """Return names and values of the parameters of a notebook that are ports."""
    found = {}
    for cell in read(notebook)["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            for line in ast.parse(cell["source"]).body:
                match line:
                    case ast.Assign([ast.Name(name)], ast.Constant(int(port))):
                        found[name] = port
    return {name: port for name, port in found.items() if name.endswith("_PORT")}
