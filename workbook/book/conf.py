"""How Sphinx renders the book; `python -m workbook.book` runs it."""

import os
import posixpath
from pathlib import Path
from urllib.parse import urlsplit

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = os.environ["BOOK_REPOSITORY"]
COMMIT = os.environ["BOOK_COMMIT"]
# Where the pages will be: Sphinx writes them elsewhere, and only whole books come here.
TARGET = Path(os.environ["BOOK_TARGET"])

project = "Clothes to Cluster"
html_title = project
extensions = ["myst_nb", "sphinx_copybutton"]

# The outputs are those of the files. Nothing here is a formula: prices have dollar signs.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions: list[str] = []
myst_heading_anchors = 6
# `lead` turns the links into those of the book.
myst_all_links_external = True

html_theme = "furo"
html_static_path = ["book.css"]
html_css_files = ["book.css"]
html_copy_source = False
html_use_index = False
html_show_copyright = False
# Widgets would want scripts of others; the lessons show none.
nb_ipywidgets_js: dict[str, dict] = {}
copybutton_selector = "div.cell_input pre, div.highlight-sh pre"


def lead(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Let each link lead somewhere: to a page of the book, or to a file of the repository."""
    for link in doctree.findall(nodes.reference):
        parts = urlsplit(link.get("refuri", ""))
        if parts.scheme or parts.netloc or not parts.path:
            continue
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), parts.path))
        name = "index" if path == "README.md" else path.rpartition(".")[0]
        if name in app.env.found_docs and Path(path).suffix in (".md", ".ipynb"):
            link["refuri"] = app.builder.get_relative_uri(page, name)
            if parts.fragment:
                slugs = app.env.metadata[name].get("myst_slugs", {})
                link["refuri"] += "#" + slugs.get(parts.fragment, ("", parts.fragment))[1]
        elif (ROOT / path).exists():
            link["refuri"] = f"{home(page)}/{path}"
        else:
            logging.getLogger(__name__).warning("%s is nowhere", parts.path, location=link)


def home(page: str) -> str:
    """Say where the repository's files are, as seen from a page."""
    if REPOSITORY:
        return f"{REPOSITORY}/blob/{COMMIT}"
    return Path(os.path.relpath(ROOT, (TARGET / page).parent)).as_posix()


def setup(app: Sphinx) -> None:
    """Take part in the rendering."""
    app.connect("doctree-resolved", lead)
