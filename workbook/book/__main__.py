"""Render the lessons and docs, with the outputs that their files hold, as a book: `make book`.

What belongs into the book, and where, follows from the names of the files.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from workbook.lesson import ROOT, lessons, read

HERE = Path(__file__).parent
# The front page; its links, and those that lead to it, are those of the README.
FRONT = "index.md"
LAST = "takeaways.md"


def chapters(root: Path) -> dict[str, list[str]]:
    """Return the pages of each part of the book, in their order, as paths below ``root``.

    A page that is not there is left out, and so is a part without pages.
    """
    docs = sorted(path.name for path in (root / "docs").glob("*.md"))
    parts = {
        "Lessons": [f"notebooks/{path.name}" for path in lessons(root / "notebooks")],
        "To look things up": [
            *(f"docs/{name}" for name in docs if name != LAST),
            *(f"notebooks/{path.name}" for path in root.glob("notebooks/solutions.ipynb")),
        ],
        "In the end": [f"docs/{name}" for name in docs if name == LAST],
    }
    return {part: pages for part, pages in parts.items() if pages}


def front_page(readme: str, parts: dict[str, list[str]], repository: str = "") -> str:
    """Return the front page: the README, and below it the list that the book is made of.

    Badges are pictures of others, and a book asks nobody. In a published book, links stand in their
    place: to what launches the repository, and to its executed lessons, which lie beside the book.
    """
    launch = ""
    if repository:
        name = urlsplit(repository).path.strip("/")
        launch = (
            f"Run it: [GitHub Codespaces](https://codespaces.new/{name}), "
            f"[Binder](https://mybinder.org/v2/gh/{name}/HEAD?urlpath=lab/tree/notebooks). "
            '<a href="workbook/index.html">See what the lessons printed</a> in the last run.\n'
        )
    badges = re.compile(r"(^\[!\[.*\n)+", re.MULTILINE)
    readme = badges.sub(lambda _: launch, readme, count=1)
    trees = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {part}", "", *pages, "```"])
        for part, pages in parts.items()
    ]
    return "\n\n".join([readme, *trees]) + "\n"


def with_anchors(notebook: Path) -> dict:
    """Return a notebook whose every cell but the first can be linked to.

    The anchor is `cell-id=` and the cell's id, as it is in JupyterLab.
    """
    node = read(notebook)
    # The outputs are of IPython, whose lines may begin with `!` and `%`.
    node["metadata"].setdefault("language_info", {})["pygments_lexer"] = "ipython3"
    cells = []
    for number, cell in enumerate(node["cells"]):
        anchor = f'<span id="cell-id={cell["id"]}"></span>'
        if number and cell["cell_type"] == "markdown":
            cell["source"] = f"{anchor}\n\n{cell['source']}"
        elif number:
            name = f"anchor-{number}"
            cells.append({"cell_type": "markdown", "id": name, "metadata": {}, "source": anchor})
        cells.append(cell)
    return {**node, "cells": cells}


def stage(root: Path, folder: Path, repository: str = "") -> None:
    """Copy what the book is made of into a folder; a page keeps its path in the repository."""
    parts = chapters(root)
    for page in [page for pages in parts.values() for page in pages]:
        target = folder / page
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".ipynb":
            target.write_text(json.dumps(with_anchors(root / page)), encoding="utf-8")
        else:
            shutil.copy(root / page, target)
    for pictures in ("figures", "samples"):
        shutil.copytree(root / "notebooks" / pictures, folder / "notebooks" / pictures)
    readme = (root / "README.md").read_text(encoding="utf-8")
    (folder / FRONT).write_text(front_page(readme, parts, repository), encoding="utf-8")


def render(source: Path, target: Path, builder: str, **settings: str) -> None:
    """Run Sphinx; a warning is an error.

    Args:
        source: the folder that `stage` has filled.
        target: where the pages go.
        builder: `html` makes a page for each chapter, `singlehtml` one of the whole book.
        settings: what `conf.py` reads, in capital letters.

    Raises:
        subprocess.CalledProcessError: there were warnings or errors; Sphinx has printed them.
    """
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning"]
    command += ["--conf-dir", str(HERE), "--builder", builder]
    command += ["--doctree-dir", str(source.with_name("trees")), str(source), str(target)]
    subprocess.run(command, env={**os.environ, **settings}, check=True)


def main() -> int:
    """Run the command line; 0 if the book is there, and without a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=ROOT / "build" / "book")
    parser.add_argument("--repository", default="", help="where it is published from")
    parser.add_argument("--commit", default="HEAD", help="whose files links lead to there")
    arguments = parser.parse_args()
    target = arguments.target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as scratch:
        source, pages = Path(scratch, "source"), Path(scratch, "book")
        stage(ROOT, source, arguments.repository)
        settings = {
            **{"BOOK_REPOSITORY": arguments.repository, "BOOK_COMMIT": arguments.commit},
            "BOOK_TARGET": str(target),
        }
        try:
            render(source, pages, "html", **settings)
            render(source, Path(scratch, "print"), "singlehtml", **settings, BOOK_PRINT="1")
        except subprocess.CalledProcessError as error:
            return error.returncode
        # The whole book as one page; its pictures and styles are those of the other pages.
        whole = Path(scratch, "print", "index.html").read_text(encoding="utf-8")
        whole = whole.replace('href="#document-index"', 'href="index.html"')
        # Sphinx lists sections as `#document-NAME#SECTION`; there is no such anchor.
        whole = re.sub(r'(href="#document-[^"#]+)#[^"]*"', r'\1"', whole)
        (pages / "print.html").write_text(whole, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        pages.rename(target)
    print(f"Read it: {os.path.relpath(target)}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
