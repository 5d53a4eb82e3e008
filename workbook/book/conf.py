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
nb_render_markdown_format = "gfm"  # which has tables
myst_enable_extensions: list[str] = []
myst_heading_anchors = 6
# Neither a snippet with dots in it nor a heading that skips a level is a fault of the book.
suppress_warnings = ["misc.highlighting_failure", "myst.header"]
# `look_up` and `lead` turn the links into those of the book.
myst_all_links_external = True

html_theme = "furo"
html_static_path = ["book.css"]
templates_path = ["templates"]
# The one page of the whole book has no chapters beside it, and its title leads back.
BESIDE = ["sidebar/brand.html"]
if "BOOK_PRINT" not in os.environ:
    BESIDE += [f"sidebar/{part}.html" for part in ("search", "scroll-start", "navigation")]
    BESIDE += ["print.html", "sidebar/scroll-end.html"]
html_sidebars = {"**": BESIDE}
html_css_files = ["book.css"]
html_copy_source = False
html_use_index = False
html_show_search_summary = False  # it would fetch pages, which a browser refuses on the disk
html_show_copyright = False
# Widgets would want scripts of others; the lessons show none.
nb_ipywidgets_js: dict[str, dict] = {}
copybutton_selector = "div.cell_input pre, div.highlight-sh pre"


def look_up(app: Sphinx, doctree: nodes.document) -> None:
    """Note for each link which file of the repository it means."""
    folder = posixpath.dirname(app.env.docname)
    for link in doctree.findall(nodes.reference):
        parts = urlsplit(link.get("refuri", ""))
        if parts.path and not parts.scheme and not parts.netloc:
            link["file"] = posixpath.normpath(posixpath.join(folder, parts.path))
            link["anchor"] = parts.fragment


def lead(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Let each of these links lead somewhere: to a page of the book, or to the file itself."""
    for link in doctree.findall(nodes.reference):
        file, anchor = link.get("file", ""), link.get("anchor", "")
        name = "index" if file == "README.md" else file.rpartition(".")[0]
        if name in app.env.found_docs:
            link["refuri"] = app.builder.get_relative_uri(page, name)
            if anchor and "#" not in link["refuri"]:
                slugs = app.env.metadata[name].get("myst_slugs", {})
                link["refuri"] += "#" + slugs.get(anchor, ("", anchor))[1]
        elif file and (ROOT / file).exists():
            link["refuri"] = f"{home(page)}/{file}"
        elif file:
            logging.getLogger(__name__).warning("%s is nowhere", file, location=link)


def home(page: str) -> str:
    """Say where the repository's files are, as seen from a page."""
    if REPOSITORY:
        return f"{REPOSITORY}/blob/{COMMIT}"
    return Path(os.path.relpath(ROOT, (TARGET / page).parent)).as_posix()


def setup(app: Sphinx) -> None:
    """Take part in the rendering."""
    app.connect("doctree-read", look_up)
    app.connect("doctree-resolved", lead)
