"""The book that `make book` makes of lessons and docs: complete, and alone in the world."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from helpers.basics import ROOT, copy_of_root, free_port
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from playwright.sync_api import Browser, Page, expect
from test_lessons_again import again

from workbook import cluster
from workbook.book.__main__ import chapters, front_page, with_anchors
from workbook.lesson import lessons, ports_of

PYTHON = ROOT / "build/book-venv/bin/python"
LOCK = "Pipfile.lock"
TAKEAWAYS = ROOT / "docs/takeaways.md"
REPOSITORY = "https://example.com/somebody/clothes"


# --- what belongs into it ------------------------------------------------------------------------


def test_every_lesson_and_every_page_of_docs_is_in_it_once_and_the_takeaways_come_last() -> None:
    pages = [page for pages in chapters(ROOT).values() for page in pages]
    there = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/*.ipynb")}
    there |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")}
    assert sorted(pages) == sorted(there)
    assert pages[0] == "notebooks/01-saved-model.ipynb"
    assert pages[-1] == "docs/takeaways.md"
    bonus = next(number for number, page in enumerate(pages) if "-bonus-" in page)
    assert pages[bonus - 1].startswith(pages[bonus][: len("notebooks/NN")])


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    lesson = tmp_path / "notebooks/03-alone.ipynb"
    lesson.parent.mkdir()
    lesson.touch()
    assert chapters(tmp_path) == {"Lessons": ["notebooks/03-alone.ipynb"]}


def test_badges_of_others_give_way_to_links_that_know_the_repository() -> None:
    readme = "# Title\n\n[![CI](a.svg)](a)\n[![Binder](https://b/b.svg)](https://b)\n\nText.\n"
    assert front_page(readme, {}) == "# Title\n\n\nText.\n\n"
    linked = front_page(readme, {"Lessons": ["notebooks/a.ipynb"]}, REPOSITORY)
    assert "https://codespaces.new/somebody/clothes)" in linked
    assert "https://mybinder.org/v2/gh/somebody/clothes/HEAD?" in linked
    assert linked.endswith("```{toctree}\n:hidden:\n:caption: Lessons\n\nnotebooks/a.ipynb\n```\n")


def test_every_cell_but_the_first_gets_an_anchor_and_nothing_else_changes() -> None:
    (path,) = (ROOT / "notebooks").glob("02-*.ipynb")
    before = nbformat.read(path, as_version=4).cells
    after = nbformat.reads(json.dumps(with_anchors(path)), as_version=4).cells
    sources = "".join(cell.source for cell in after)
    anchors = re.findall(r'<span id="cell-id=([^"]+)"></span>', sources)
    assert anchors == [cell.id for cell in before[1:]]
    kept = [cell for cell in after if not cell.id.startswith("anchor-")]
    for cell, was in zip(kept, before, strict=True):
        assert cell.id == was.id and cell.source.endswith(was.source)
        assert cell.get("outputs") == was.get("outputs")


TAKEN = re.findall(r"\]\(\.\./(notebooks/[^)#]+)#cell-id=([^)]+)\)", TAKEAWAYS.read_text())


def test_each_takeaway_leads_to_the_cell_that_proved_it() -> None:
    lines = [line for line in TAKEAWAYS.read_text().splitlines() if line.startswith("- ")]
    assert len(lines) > 20
    assert [line for line in lines if "#cell-id=" not in line] == []
    assert len(TAKEN) == TAKEAWAYS.read_text().count("](")
    numbers = {Path(name).name[:2] for name, _ in TAKEN}
    assert numbers >= {f"{number:02}" for number in range(1, 11)}


@pytest.mark.parametrize(("name", "cell"), TAKEN, ids=lambda word: Path(word).stem)
def test_the_cell_of_a_takeaway_is_there_and_has_run(name: str, cell: str) -> None:
    cells = {each.id: each for each in nbformat.read(ROOT / name, as_version=4).cells}
    assert cells[cell].cell_type == "code" and cells[cell].outputs


# --- the book itself -----------------------------------------------------------------------------


def make_book(target: Path, *options: str) -> Path:
    command = [str(PYTHON), "-m", "workbook.book", f"--target={target}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="module")
def book(made_once: Callable[..., Path]) -> Path:
    """The book, as `make book` makes it."""
    lock = ROOT / "workbook/book" / LOCK
    here = PYTHON.parents[1] / LOCK
    if not here.exists() or here.read_bytes() != lock.read_bytes():
        pytest.skip("the packages that render the book are not here: `make book` installs them")
    return made_once("book", make_book)


class Links(HTMLParser):
    """What a page names and asks for: its ids, its links, and all that a browser would load."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at the attributes of a tag."""
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given["id"]} if "id" in given else set()
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif "href" in given and given.get("rel") not in ("next", "prev", "search", "index"):
            self.loads.append(given["href"])
        self.loads += [given[name] for name in ("src", "srcset", "data", "poster") if name in given]


@pytest.fixture(scope="module")
def pages(book: Path) -> dict[Path, Links]:
    """What is in each page of the book."""
    return {path: Links(path) for path in book.rglob("*.html")}


def test_there_is_a_page_for_each_chapter_a_search_and_the_whole_on_one_page(book: Path) -> None:
    chapter = [Path(page).with_suffix(".html") for part in chapters(ROOT).values() for page in part]
    names = [*map(str, chapter), "index.html", "search.html", "print.html"]
    assert sorted(names) == sorted(str(path.relative_to(book)) for path in book.rglob("*.html"))
    whole = (book / "print.html").read_text(encoding="utf-8")
    for path in lessons(ROOT / "notebooks"):
        assert f'id="document-notebooks/{path.stem}"' in whole


def test_outputs_are_those_of_the_files_tables_and_pictures_among_them(book: Path) -> None:
    page = (book / "notebooks/08-scaling.html").read_text(encoding="utf-8")
    cells = nbformat.read(ROOT / "notebooks/08-scaling.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    assert page.count("<table") >= sum("text/markdown" in each for each in data) > 0
    plots = sum("image/png" in each for each in data)
    assert len(re.findall(r'src="\.\./_images/[0-9a-f]{40,}\.png"', page)) == plots > 0
    assert "checkpoint passed" in page


def test_every_link_leads_to_a_page_an_anchor_or_a_file(
    book: Path, pages: dict[Path, Links]
) -> None:
    lost = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            known = target in pages and (not anchor or anchor in pages[target].ids)
            if not known and not (target.exists() and target.is_relative_to(ROOT) and not anchor):
                lost.append(f"{path.relative_to(book)}: {link}")
    assert lost == []
    takeaways = [link for link in pages[book / "docs/takeaways.html"].links if "#cell-id=" in link]
    assert len(takeaways) == len(TAKEN)


def test_no_page_and_no_style_names_another_origin_to_load_from(
    book: Path, pages: dict[Path, Links]
) -> None:
    for path, page in pages.items():
        assert [each for each in page.loads if urlsplit(each).netloc] == [], path
    for path in book.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"""(url\(|@import)\s*["']?(https?:)?//""", text), path


@again
def test_links_of_a_published_book_lead_to_the_files_of_its_commit(
    book: Path, tmp_path: Path
) -> None:
    published = make_book(tmp_path / "book", f"--repository={REPOSITORY}", "--commit=abc")
    page = Links(published / "notebooks/04-flask-gateway.html")
    assert f"{REPOSITORY}/blob/abc/gateway.py" in page.links
    for path in published.rglob("*.html"):
        assert not any(link.startswith("../../../") for link in Links(path).links)
    front = Links(published / "index.html").links
    assert {"https://codespaces.new/somebody/clothes", "workbook/index.html"} <= {*front}
    assert list(tmp_path.iterdir()) == [published], "something else was left behind"


def test_a_link_that_leads_nowhere_stops_the_book_and_keeps_the_one_before(
    book: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    for folder in ("notebooks", "docs", "workbook"):
        ignored = shutil.ignore_patterns("__pycache__", "*.ipynb")
        shutil.copytree(ROOT / folder, clone / folder, ignore=ignored)
    (clone / "README.md").write_text("# Clothes\n\n[lost](nowhere.py)\n")
    shutil.rmtree(clone / "docs")
    kept = clone / "build/book/index.html"
    kept.parent.mkdir(parents=True)
    kept.touch()
    command = [str(PYTHON), "-m", "workbook.book"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode != 0 and "nowhere.py is nowhere" in done.stderr
    assert kept.exists() and [path.name for path in (clone / "build").iterdir()] == ["book"]


# --- in a browser, without a server --------------------------------------------------------------


@pytest.fixture
def visit(browser: Browser, book: Path) -> Iterator[Callable[..., Page]]:
    """Open pages from the disk; check when the test is over that nobody else was asked."""
    strangers: list[str] = []
    errors: list[str] = []
    opened: list[Page] = []

    def open_page(path: str, **options) -> Page:
        options = {"viewport": {"width": 1280, "height": 800}} | options
        page = browser.new_context(**options).new_page()
        opened.append(page)
        page.on("pageerror", lambda error: errors.append(str(error)))

        def on_request(request) -> None:
            if not request.url.startswith((book.as_uri(), "data:", "blob:")):
                strangers.append(request.url)

        page.on("request", on_request)
        page.goto(f"{book.as_uri()}/{path}", wait_until="load")
        return page

    yield open_page
    for page in opened:
        page.context.close()
    assert strangers == [] and errors == []


def test_no_chapter_asks_anybody_or_is_wider_than_a_phone(
    visit: Callable[..., Page], book: Path
) -> None:
    page = visit("index.html", viewport={"width": 400, "height": 800}, is_mobile=True)
    for path in sorted(book.rglob("*.html")):
        page.goto(path.as_uri(), wait_until="load")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 400, f"{path.relative_to(book)} is {width} px wide"
        broken = page.evaluate(
            "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        )
        assert broken == []


def test_search_finds_a_word_without_a_server(visit: Callable[..., Page]) -> None:
    page = visit("index.html")
    page.get_by_role("textbox").first.fill("decompression bomb")
    page.keyboard.press("Enter")
    found = page.locator("ul.search li a").filter(has_text="Meet the hostile internet")
    expect(found.first).to_be_visible()
    found.first.click()
    expect(page.locator("h1")).to_contain_text("Meet the hostile internet")


def test_previous_and_next_go_through_the_whole_book(
    visit: Callable[..., Page], book: Path
) -> None:
    order = [Path(page).with_suffix(".html") for part in chapters(ROOT).values() for page in part]
    page = visit("index.html")
    for path in order:
        page.locator("a.next-page").click()
        page.wait_for_url(f"{book.as_uri()}/{path}")
    assert page.locator("a.next-page").count() == 0
    page.locator("a.prev-page").click()
    page.wait_for_url(f"{book.as_uri()}/{order[-2]}")


def test_dark_mode_follows_the_system_and_the_button(visit: Callable[..., Page]) -> None:
    def darkness(page: Page) -> int:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return 765 - sum(int(part) for part in re.findall(r"\d+", color)[:3])

    assert darkness(visit("index.html", color_scheme="light")) < 100
    page = visit("index.html", color_scheme="dark")
    assert darkness(page) > 600
    page.locator("button.theme-toggle:visible").click()
    assert darkness(page) < 100


def test_paper_shows_the_text_and_no_navigation(visit: Callable[..., Page]) -> None:
    page = visit("notebooks/03-grpc-from-jupyter.html")
    expect(page.locator(".sidebar-drawer")).to_be_visible()
    page.emulate_media(media="print")
    for hidden in (".sidebar-drawer", ".related-pages", ".copybtn", ".skip-to-content"):
        assert page.locator(f"{hidden}:visible").count() == 0
    cut = page.evaluate(
        "[...document.querySelectorAll('pre')].filter(p => p.scrollWidth > p.clientWidth).length"
    )
    assert cut == 0, "lines of code that leave the paper"


# --- where it is launched ------------------------------------------------------------------------


def container() -> dict:
    return json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())


def oldest_python() -> str:
    """The Python that the locks are made with, such as 3.11."""
    found = re.search(r'^PYTHONS = \("(\d+\.\d+)\.', (ROOT / "workbook/lock.py").read_text(), re.M)
    assert found
    return found[1]


def test_codespaces_and_binder_have_the_python_of_the_locks() -> None:
    image, _, tag = container()["image"].partition(":")
    assert image.endswith("/devcontainers/python") and tag == f"{oldest_python()}-bookworm"
    assert (ROOT / ".binder/runtime.txt").read_text() == f"python-{oldest_python()}\n"


def test_a_codespace_has_docker_and_every_port_of_the_lessons() -> None:
    said = container()
    (docker,) = said["features"]
    assert re.fullmatch(r"ghcr\.io/devcontainers/features/docker-in-docker:\d+\.\d+\.\d+", docker)
    ports = {value for path in lessons(ROOT / "notebooks") for value in ports_of(path).values()}
    assert {8500, 8501, 9696} <= ports & {*said["forwardPorts"]} and 8888 in said["forwardPorts"]
    assert {*map(int, said["portsAttributes"])} == {*said["forwardPorts"]}
    assert said["remoteEnv"]["PATH"].startswith("${containerWorkspaceFolder}/.venv/bin:")
    script = ROOT / said["postCreateCommand"]
    assert os.access(script, os.X_OK)


def test_badges_and_the_text_below_them_name_both_places() -> None:
    readme = (ROOT / "README.md").read_text()
    for place in ("https://codespaces.new", "https://mybinder.org"):
        assert readme.count(f"]({place})") == 1


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in which everything is installed already, and whose lesson 01 has free ports."""
    clone = copy_of_root(tmp_path)
    for name in (".venv", ".tools"):
        (clone / name).symlink_to(ROOT / name)
    lesson = clone / "notebooks/01-saved-model.ipynb"
    text = re.sub(r"_PORT = \d+", lambda _: f"_PORT = {free_port()}", lesson.read_text())
    lesson.write_text(text)
    return clone


@again
def test_what_binder_builds_has_a_model_and_a_kernel_with_the_packages_of_the_lock(
    clone: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "prefix"
    done = subprocess.run(
        [clone / ".binder/postBuild"],
        env={**os.environ, "NB_PYTHON_PREFIX": str(prefix), "WORKBOOK_ENGINE": "embedded"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (clone / "build/clothing-model/1/model.tflite").exists()
    specs = KernelSpecManager(kernel_dirs=[str(prefix / "share/jupyter/kernels")])
    manager = KernelManager(kernel_name="python3", kernel_spec_manager=specs)
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        answer = client.execute_interactive("import tfserving, tensorflow_serving", timeout=120)
        assert answer["content"]["status"] == "ok"
        (python, *_) = specs.get_kernel_spec("python3").argv
        assert Path(python) == clone / ".venv/bin/python"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@again
def test_what_a_codespace_runs_first_makes_a_model_and_finds_the_kind_of_the_lessons(
    clone: Path, tmp_path: Path
) -> None:
    kind = tmp_path / "bin/kind"
    kind.parent.mkdir()
    kind.write_text(f'#!/bin/sh\necho "kind {cluster.KIND_VERSION}"\n')
    kind.chmod(0o755)
    path = f"{kind.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [clone / ".devcontainer/create"],
        env={**os.environ, "PATH": path, "WORKBOOK_ENGINE": "embedded"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Kind is there." in done.stdout.splitlines()
    assert (clone / "build/clothing-model/1/model.tflite").exists()
