"""The website in a real browser, in front of the real gateway and model server.

Every page that ``visit`` opens is checked when its test is over: no error in the console (which is
where a breach of the Content-Security-Policy shows), no request to another origin, and nothing
that moved by itself.
"""

import itertools
import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from flask import Response
from helpers.basics import CLASSES, ROOT, describe_model, free_port
from helpers.images import encode
from helpers.servers import Server, WebHost, serve
from PIL import Image
from playwright.sync_api import Browser, Error, FilePayload, Page, Route, expect
from werkzeug.serving import make_server

import description
import web

SAMPLES = ROOT / "notebooks/samples"
DRESS = SAMPLES / "dress.png"
KEY = "sésame"
# When the machine's networks change, Chromium gives a page up, and shows its own in its place,
# which may come so late that it interrupts the next try.
GAVE_UP = r"net::ERR_NETWORK_CHANGED|interrupted by another navigation to \"chrome-error:"
PHONE = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}
SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) {
    const nodes = entry.sources.map((source) => source.node);
    const what = nodes.map((node) => (node?.outerHTML ?? node?.data)?.slice(0, 80));
    shifts.push([entry.value, what.join()]);
  }
}).observe({type: "layout-shift", buffered: true});
"""
PAINTED = "() => new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(shifts))))"
CUT = """() => [...document.querySelectorAll("main *:not(.unseen, input, svg *, figcaption)")]
  .filter((e) => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map((e) => e.outerHTML)"""

Visit = Callable[..., Page]


class SlowLine(WebHost):
    """The gateway at the end of a slow line: its page comes piece by piece."""

    gateway = ""

    def do_GET(self):
        answer = requests.get(self.gateway + self.path, timeout=30)
        headers = {name: answer.headers[name] for name in ("Content-Type", "Content-Length")}
        if self.path != "/":
            return self.answer(200, answer.content, **headers)
        self.answer(200, b"", **headers)
        for piece in re.split(rb"(?<=>)(?=.)|(?<=.)(?=<)", answer.content):
            self.wfile.write(piece)
            time.sleep(0.02)


class PictureHost(WebHost):
    """A stranger's web server: drawings, a page that is no picture, and one slow picture."""

    gate = threading.Event()

    def do_GET(self):
        name = self.path.strip("/").partition("?")[0]
        if name == "slow.png":
            self.gate.wait(60)
            name = "hat.png"
        if name == "page.html":
            self.answer(200, b"<!doctype html>")
        elif (SAMPLES / name).is_file():
            self.answer(200, (SAMPLES / name).read_bytes())
        else:
            self.answer(404)


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with serve(PictureHost) as address:
        yield address
        PictureHost.gate.set()


@pytest.fixture(scope="module")
def described(clothing_model: Path) -> dict[str, str]:
    """The variables for a gateway that knows the bundled model, with all its samples."""
    return {"MODEL_DESCRIPTION": str(clothing_model / "1/assets.extra/model.json")}


@pytest.fixture(scope="module")
def gateway(start_gateway, clothing_server, host, described: dict[str, str]) -> Server:
    limits = {"IMAGE_TIMEOUT_SECONDS": "20", "IMAGE_MAX_BYTES": "1000000"}
    return start_gateway(clothing_server.grpc, ALLOWED_IMAGE_HOSTS=host, **limits, **described)


@pytest.fixture(scope="module")
def locked_gateway(start_gateway, clothing_server, described: dict[str, str]) -> Server:
    return start_gateway(clothing_server.grpc, GATEWAY_API_KEY=KEY, **described)


@pytest.fixture
def visit(browser: Browser, gateway: Server) -> Iterator[Visit]:
    """Open the website in a context of its own; check the page when the test is over."""
    pages: list[Page] = []
    errors: list[str] = []
    strangers: list[str] = []
    changes: list[str] = []  # of the machine's networks, such as Docker's

    def open_page(address: str = gateway.http, **options) -> Page:
        options = {"viewport": {"width": 1280, "height": 800}} | options
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(30_000)

        def on_console(message):
            answered = urlsplit(message.location["url"]).path in ("/", "/predict")
            expected = answered and message.text.startswith("Failed to load resource")
            if message.type == "error" and not expected:
                changed = message.text.endswith("net::ERR_NETWORK_CHANGED")
                (changes if changed else errors).append(message.text)

        def on_request(request):
            if not request.url.startswith((f"{address}/", "data:", f"blob:{address}/")):
                strangers.append(request.url)

        page.on("console", on_console)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", on_request)
        page.add_init_script(SHIFTS)

        def load() -> bool:
            changes.clear()
            try:
                page.goto(address)
            except Error as error:
                if not re.search(GAVE_UP, error.message):
                    raise
                return False
            return not changes

        while not load():
            pass
        if options.get("java_script_enabled", True):
            pages.append(page)
        return page

    yield open_page
    shifts = [shift for page in pages for shift in page.evaluate(PAINTED)]
    for context in browser.contexts:
        context.close()
    assert errors == []
    assert strangers == []
    assert shifts == []


def send_link(page: Page, link: str) -> None:
    page.get_by_label("Link to a picture").fill(link)
    page.get_by_role("button", name="Classify", exact=True).click()


def expect_answer(page: Page, name: str) -> None:
    sure = re.compile(f"^{name}, \\d\\d\u00a0%$")
    expect(page.get_by_role("heading", level=3)).to_have_text(sure)
    expect(page.locator(".chart li").first).to_contain_text(name)


def expect_picture(page: Page) -> None:
    """The one card shows a picture that the browser has decoded."""
    image = page.locator(".card img")
    expect(image).to_be_visible()
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


def expect_problem(page: Page, sentence: str | re.Pattern, of_file: bool = False) -> None:
    """It stands beside the field for links, or beside the file; and no dead bars are shown."""
    places = {True: page.locator(".card .problem"), False: page.locator("#problem")}
    expect(places[of_file]).to_have_text(sentence)
    expect(places[of_file]).to_be_in_viewport(ratio=1)
    expect(places[not of_file]).to_be_empty()
    expect(page.locator(".chart")).to_be_hidden()
    expect(page.get_by_role("status")).to_have_text(sentence)
    expect(page.get_by_role("heading", name="No answer for this picture.")).to_be_visible()


def as_transfer(page: Page, *paths: Path, text: str = ""):
    """A DataTransfer in the page, as a drop brings it: files, or text."""
    files = [[path.name, [*path.read_bytes()]] for path in paths]
    return page.evaluate_handle(
        """([files, text]) => {
          const transfer = new DataTransfer();
          for (const [name, bytes] of files) {
            transfer.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
          }
          if (text) transfer.setData("text/plain", text);
          return transfer;
        }""",
        [files, text],
    )


def upload(name: str, content: bytes) -> FilePayload:
    return {"name": name, "mimeType": "image/png", "buffer": content}


# The ways in


def test_click_every_sample(visit: Visit) -> None:
    page = visit()
    for name in CLASSES:
        page.get_by_role("button", name=name, exact=True).click()
        expect_answer(page, name)
        expect_picture(page)


def test_paste_a_link_into_the_field(visit: Visit, host: str) -> None:
    page = visit()
    send_link(page, f"http://{host}/pants.png")
    expect_answer(page, "pants")
    expect_picture(page)
    expect(page.locator(".card img")).to_have_attribute("src", re.compile("^data:image/"))
    rows = page.locator(".chart li")
    values = [float(text.split()[0]) for text in rows.locator(".value").all_inner_texts()]
    widths = rows.locator("rect").evaluate_all(
        "all => all.map((e) => e.width.baseVal.valueInSpecifiedUnits)"
    )
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(100, abs=0.5)
    assert widths == pytest.approx(values, abs=0.051)
    assert sorted(rows.locator(".name").all_inner_texts()) == CLASSES
    for stage in ("fetch", "decode", "predict"):
        expect(page.locator(f"[data-fact={stage}]")).to_have_text(re.compile(r"^\d+\sms$"))
    expect(page.locator("[data-fact=model]")).to_have_text("clothing-model, version 1")
    # Words that somebody knows who has never written a program.
    expect(page.locator(".facts dt")).to_have_text(["Loading", "Reading", "Deciding", "Model"])
    sentence = page.get_by_role("heading", level=3).inner_text()
    expect(page.get_by_role("status")).to_have_text(sentence)


def test_choose_a_file(visit: Visit) -> None:
    page = visit()
    page.get_by_label("Choose pictures").set_input_files(DRESS)
    expect_answer(page, "dress")
    expect_picture(page)
    expect(page.locator("figcaption")).to_have_text("dress.png")
    expect(page.locator("[data-fact=fetch]")).to_have_text("–")


def test_a_format_that_the_browser_cannot_show(visit: Visit) -> None:
    page = visit()
    with Image.open(SAMPLES / "skirt.png") as image:
        tiff = upload("skirt.tiff", encode(image, "TIFF"))
    page.get_by_label("Choose pictures").set_input_files(tiff)
    expect_answer(page, "skirt")
    expect(page.locator(".card img")).to_have_attribute("src", re.compile("^data:image/"))
    expect_picture(page)


def test_drop_a_file_anywhere(visit: Visit) -> None:
    page = visit()
    transfer = as_transfer(page, SAMPLES / "shoes.png")
    page.dispatch_event("h1", "dragover", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_have_class(re.compile("over"))
    page.dispatch_event("h1", "drop", {"dataTransfer": transfer})
    expect(page.locator("#drop")).not_to_have_class(re.compile("over"))
    expect_answer(page, "shoes")
    expect_picture(page)


def test_drop_a_link(visit: Visit, host: str) -> None:
    page = visit()
    link = f"http://{host}/hat.png"
    page.dispatch_event("h1", "drop", {"dataTransfer": as_transfer(page, text=link)})
    expect_answer(page, "hat")
    expect(page.get_by_label("Link to a picture")).to_have_value(link)


def test_paste_a_picture(visit: Visit, gateway: Server) -> None:
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=gateway.http)
    page.evaluate(
        """(bytes) => navigator.clipboard.write([new ClipboardItem({
          "image/png": new Blob([new Uint8Array(bytes)], {type: "image/png"}),
        })])""",
        [*(SAMPLES / "shorts.png").read_bytes()],
    )
    page.keyboard.press("Control+V")
    expect_answer(page, "shorts")
    expect_picture(page)


def test_paste_a_link_beside_the_field(visit: Visit, gateway: Server, host: str) -> None:
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=gateway.http)
    page.evaluate("text => navigator.clipboard.writeText(text)", f" http://{host}/shirt.png\n")
    page.keyboard.press("Control+V")
    expect_answer(page, "shirt")
    expect(page.get_by_label("Link to a picture")).to_have_value(f"http://{host}/shirt.png")
    page.evaluate("navigator.clipboard.writeText('no link')")
    page.get_by_label("Link to a picture").fill("")
    page.keyboard.press("Control+V")
    expect(page.get_by_label("Link to a picture")).to_have_value("no link")
    expect_answer(page, "shirt")


def test_take_a_picture_on_a_phone(visit: Visit) -> None:
    expect(visit().locator("#camera")).to_be_hidden()
    page = visit(**PHONE)
    # The place for the picture leaves most of the screen to all else.
    (place,) = boxes_of(page, ".card .picture")
    assert place["height"] < page.evaluate("innerHeight") / 3
    camera = page.get_by_label("Take a picture")
    expect(camera).to_have_attribute("capture", "environment")
    expect(camera).to_have_attribute("accept", "image/*")
    camera.set_input_files(SAMPLES / "outwear.png")
    expect_answer(page, "outwear")
    expect(page.get_by_role("heading", level=3)).to_be_in_viewport()


# States


def test_progress_shows_at_once_and_a_new_choice_replaces_the_old(visit: Visit, host: str) -> None:
    PictureHost.gate.clear()
    page = visit()
    page.get_by_label("Link to a picture").fill(f"http://{host}/slow.png")
    busy = """() => {
      document.querySelector("#form").requestSubmit();
      return document.querySelector(".card").getAttribute("aria-busy");
    }"""
    assert page.evaluate(busy) == "true", "set before the browser can even paint"
    expect(page.get_by_role("status")).to_have_text("Looking at the picture …")
    expect(page.get_by_role("heading", level=3)).to_have_text("Looking at the picture …")
    page.get_by_role("button", name="dress", exact=True).click()
    expect_answer(page, "dress")

    send_link(page, f"http://{host}/slow.png?again")
    expect(page.locator("[aria-busy]")).to_have_count(1)
    PictureHost.gate.set()
    expect_answer(page, "hat")
    expect(page.locator("[aria-busy]")).to_have_count(0)


@pytest.mark.parametrize(
    ("motion", "animation"), [("no-preference", "breathe"), ("reduce", "none")]
)
def test_motion(visit: Visit, motion: str, animation: str) -> None:
    page = visit(reduced_motion=motion)
    with page.expect_request("**/predict"):
        page.route("**/predict", lambda route: None)
        page.get_by_role("button", name="hat").click()
    expect(page.locator(".bar").first).to_have_css("animation-name", animation)
    page.unroute_all(behavior="ignoreErrors")


def test_an_unsure_answer_is_hedged(visit: Visit) -> None:
    page = visit()
    predictions = dict.fromkeys(CLASSES, 0.02) | {"outwear": 0.53, "t-shirt": 0.31}
    answer = {
        "predictions": predictions,
        "seconds": {"decode": 0.001, "predict": 0.002},
        "model": {"name": "clothing-model", "version": 7},
    }
    page.route("**/predict", lambda route: route.fulfill(json=answer))
    page.get_by_role("button", name="hat").click()
    heading = page.get_by_role("heading", level=3)
    expect(heading).to_have_text("Perhaps outwear (53\u00a0%) or t-shirt (31\u00a0%)")


# Errors


def explanation(gateway: Server, **request) -> str:
    """The sentence of the gateway's own problem document."""
    return requests.post(f"{gateway.http}/predict", **request, timeout=60).json()["detail"]


@pytest.mark.parametrize(
    "link",
    ["http://10.0.0.1/hat.png", "no link", "http://{host}/missing.png", "http://{host}/page.html"],
)
def test_errors_of_links(visit: Visit, gateway: Server, host: str, link: str) -> None:
    link = link.replace("{host}", host)
    page = visit()
    send_link(page, link)
    expect_problem(page, explanation(gateway, json={"url": link}))
    field = page.get_by_label("Link to a picture")
    expect(field).to_have_value(link)
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_have_accessible_description(
        re.compile(re.escape(explanation(gateway, json={"url": link})))
    )
    again = page.get_by_role("button", name="Try again")
    expect(again).to_be_visible(visible=link.endswith("missing.png"))
    page.get_by_role("button", name="hat", exact=True).click()
    expect_answer(page, "hat")
    expect(page.locator("#problem")).to_be_empty()
    expect(field).not_to_have_attribute("aria-invalid", "true")


def test_a_long_link_does_not_move_the_page(visit: Visit) -> None:
    page = visit(**PHONE)
    send_link(page, f"http://localhost/{'long' * 60}.png")
    expect(page.locator("#problem")).to_have_text(re.compile(r"http://localhost/\w+…$"))


@pytest.mark.parametrize("size", [(360, 640), (600, 800), (1280, 800)])
def test_an_error_shows_beside_the_field(visit: Visit, size: tuple[int, int]) -> None:
    """However soon it comes after the page has moved to the place of the answer."""
    page = visit(viewport={"width": size[0], "height": size[1]})
    for _ in range(2):
        send_link(page, "http://localhost/hat.png")
        expect_problem(page, re.compile("private address"))
        expect(page.get_by_label("Link to a picture")).to_be_in_viewport(ratio=1)
        expect(page.locator("#problem")).to_be_in_viewport(ratio=1)
        page.get_by_role("button", name="hat", exact=True).click()
        expect_answer(page, "hat")
        expect(page.get_by_role("heading", level=3)).to_be_in_viewport(ratio=1)


def test_nothing_given(visit: Visit) -> None:
    page = visit()
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.locator("#problem")).to_contain_text("Paste a link")
    expect(page.get_by_label("Link to a picture")).to_be_focused()


def test_errors_of_files_keep_the_picture(visit: Visit, gateway: Server) -> None:
    page = visit()
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    pictures = {
        "large.bmp": encode(Image.fromarray(noise), "BMP"),
        "wide.png": encode(Image.new("1", (6000, 5000)), "PNG"),
        "page.png": b"<!doctype html>",
    }
    for name, picture in pictures.items():
        page.get_by_label("Choose pictures").set_input_files(upload(name, picture))
        expect_problem(page, explanation(gateway, files={"file": picture}), of_file=True)
        expect(page.get_by_label("Link to a picture")).not_to_have_attribute("aria-invalid", "true")
        expect(page.locator("figcaption")).to_have_text(name)
        if name != "page.png":
            expect_picture(page)


def test_no_connection_then_try_again(visit: Visit) -> None:
    page = visit()
    page.route("**/predict", lambda route: route.abort())
    errors = page.get_by_text("The gateway cannot be reached")
    page.get_by_label("Choose pictures").set_input_files(DRESS)
    expect(errors.first).to_be_visible()
    expect_picture(page)
    page.unroute("**/predict")
    page.get_by_role("button", name="Try again").click()
    expect_answer(page, "dress")
    expect(page.locator(".card .problem")).to_be_empty()
    expect(page.locator(".chart")).to_be_visible()


def test_an_answer_that_is_not_the_gateways(visit: Visit) -> None:
    page = visit()
    page.route("**/predict", lambda route: route.fulfill(status=200, body="<h1>Sign in</h1>"))
    page.get_by_label("Choose pictures").set_input_files(DRESS)
    expect_problem(page, re.compile("^The gateway cannot be reached"), of_file=True)
    page.route("**/predict", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    page.get_by_label("Choose pictures").set_input_files(DRESS)
    expect_problem(page, "The gateway answers 502; try again later.", of_file=True)


def test_model_server_gone_and_too_many_requests(visit: Visit, start_gateway) -> None:
    gateway = start_gateway(f"127.0.0.1:{free_port()}", RATE_LIMIT="1 per hour")
    page = visit(gateway.http)
    page.get_by_label("Choose pictures").set_input_files(DRESS)
    expect_problem(page, re.compile(r"The model server .* Please wait \d+\u00a0s\.$"), True)
    expect_picture(page)
    page.get_by_role("button", name="Try again").click()
    expect_problem(page, re.compile(r"1 per hour.* Please wait 6[01]\u00a0min\.$"), True)
    expect_picture(page)


# Several pictures


def test_gallery(visit: Visit, gateway: Server) -> None:
    page = visit()
    held: list[Route] = []
    page.route("**/predict", lambda route: held.append(route))
    names = ["dress", "hat", "shoes", "pants", "skirt"]
    files = [upload(f"{name}.png", (SAMPLES / f"{name}.png").read_bytes()) for name in names]
    files.append(upload("broken.png", b"<!doctype html>"))
    page.get_by_label("Choose pictures").set_input_files(files)
    cards = page.get_by_role("article")
    expect(cards).to_have_count(6)
    expect(page.get_by_role("status")).to_have_text("Looking at 6 pictures …")
    for answered in range(6):
        under_way = min(3, 6 - answered)
        expect(page.locator("[aria-busy]")).to_have_count(under_way)
        assert len(held) == answered + under_way, "three requests at a time"
        held[answered].continue_()  # it need not be the next card's
        finished = page.locator("article:not(.empty), article.failed")
        expect(finished).to_have_count(answered + 1)
    for card, name in zip(cards.all(), names, strict=False):
        expect(card.locator("figcaption")).to_have_text(f"{name}.png")
        expect(card.get_by_role("heading")).to_contain_text(name)
    expect(cards.last.get_by_role("heading")).to_have_text("No answer for this picture.")
    expect(cards.last).to_contain_text(explanation(gateway, files={"file": b"<!doctype html>"}))
    expect(page.get_by_role("status")).to_have_text("5 of 6 pictures are answered.")
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)
    page.get_by_role("button", name="hat", exact=True).click()
    expect(cards).to_have_count(1)


def test_several_links_at_once(visit: Visit, host: str) -> None:
    page = visit()
    text = f"http://{host}/hat.png\nhttp://{host}/skirt.png"
    page.dispatch_event("h1", "drop", {"dataTransfer": as_transfer(page, text=text)})
    expect(page.get_by_role("heading", level=3)).to_have_text(
        [re.compile("^hat, "), re.compile("^skirt, ")]
    )


def test_paste_several_links_into_the_field(visit: Visit, gateway: Server, host: str) -> None:
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=gateway.http)
    text = f"http://{host}/hat.png\nhttp://{host}/skirt.png"
    page.evaluate("text => navigator.clipboard.writeText(text)", text)
    page.get_by_label("Link to a picture").press("Control+V")
    expect(page.get_by_role("article")).to_have_count(2)
    expect(page.get_by_label("Link to a picture")).to_have_value("")
    expect(page.get_by_role("heading", name="hat, ")).to_have_count(1)
    expect(page.get_by_role("heading", name="skirt, ")).to_have_count(1)


# The key


def test_the_key_is_asked_for_once(visit: Visit, locked_gateway: Server) -> None:
    page = visit(locked_gateway.http)
    dialog = page.get_by_role("dialog", name="The gateway asks for a key")
    page.get_by_label("Choose pictures").set_input_files([DRESS, DRESS, DRESS, DRESS])
    expect(dialog).to_be_visible()
    expect(page.get_by_role("textbox", name="Key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("That key is not the right one.")
    page.get_by_role("textbox", name="Key").fill(KEY)
    page.get_by_role("button", name="Continue").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("heading", name="dress, ")).to_have_count(4)
    page.reload()
    page.get_by_role("button", name="hat", exact=True).click()
    expect_answer(page, "hat")
    assert page.evaluate("Object.values(sessionStorage)") == [KEY]


def test_no_key_given(visit: Visit, locked_gateway: Server) -> None:
    page = visit(locked_gateway.http)
    page.get_by_role("button", name="hat", exact=True).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect_problem(page, "Without its key, the gateway gives no answer.", of_file=True)
    page.get_by_label("Choose pictures").set_input_files([DRESS] * 5)
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Try again")).to_have_count(5)
    page.get_by_role("button", name="hat", exact=True).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("textbox", name="Key").fill(KEY)
    page.keyboard.press("Enter")
    expect_answer(page, "hat")


# Everyone


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desk", "phone"])
def test_a_page_that_comes_slowly(visit: Visit, gateway: Server, options: dict) -> None:
    """What has come stays where it is, which ``visit`` looks at."""
    SlowLine.gateway = gateway.http
    with serve(SlowLine) as address:
        page = visit(f"http://{address}", **options)
        expect(page.locator("#cards .chart li")).to_have_count(len(CLASSES))


def test_keyboard_only(visit: Visit, host: str) -> None:
    page = visit()
    page.on("filechooser", lambda chooser: chooser.set_files(DRESS))
    focused = """() => {
      const {id, value, parentElement} = document.activeElement;
      const rings = [document.activeElement, parentElement].map((e) => getComputedStyle(e));
      return [id || value || "Classify", rings.some((s) => s.outlineStyle === "solid")];
    }"""
    order = []
    for _ in range(13):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
    assert order == [[name, True] for name in ("url", "Classify", "file", *CLASSES)]
    page.keyboard.press("Space")
    expect_answer(page, "t-shirt")
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
    page.keyboard.type(f"http://{host}/hat.png")
    page.keyboard.press("Enter")
    expect_answer(page, "hat")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect_answer(page, "dress")


STATES: dict[str, Callable[[Page], None]] = {
    "idle": lambda page: None,
    "answer": lambda page: page.get_by_role("button", name="hat", exact=True).click(),
    "error": lambda page: send_link(page, f"http://localhost/{'long' * 60}.png"),
    "gallery": lambda page: page.get_by_label("Choose pictures").set_input_files(
        [upload(f"{'long' * 60}.png", file.read_bytes()) for file in (DRESS, ROOT / "Makefile")]
    ),
    "key": lambda page: page.evaluate("askForKey(true), 0"),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit: Visit, scheme: str) -> None:
    luminance = []
    for options in ({}, PHONE):
        page = visit(color_scheme=scheme, **options)
        for name, reach in STATES.items():
            reach(page)
            expect(page.locator("[aria-busy]")).to_have_count(0)
            violations = Axe().run(page).response["violations"]
            found = [(each["id"], [node["html"] for node in each["nodes"]]) for each in violations]
            assert found == [], name
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        luminance.append(sum(map(int, re.findall(r"\d+", color))) / 3)
    assert max(luminance) < 60 if scheme == "dark" else min(luminance) > 200


@pytest.mark.parametrize("size", [(360, 640), (768, 1024), (1024, 768), (1280, 800), (3840, 2160)])
def test_every_width(visit: Visit, size: tuple[int, int]) -> None:
    """Nothing scrolls sideways, and no text is wider than its place."""
    page = visit(viewport={"width": size[0], "height": size[1]})
    for name, reach in STATES.items():
        reach(page)
        expect(page.locator("[aria-busy]")).to_have_count(0)
        assert page.evaluate("document.documentElement.scrollWidth") == size[0], name
        assert page.evaluate(CUT) == [], name


def test_budget(visit: Visit, gateway: Server) -> None:
    page = visit()
    page.wait_for_load_state("networkidle")
    loaded = page.evaluate("performance.getEntriesByType('resource').map((e) => e.name)")
    assert len(loaded) >= 2 + len(CLASSES)
    addresses = {gateway.http, f"{gateway.http}/static/favicon.svg", *loaded}
    answers = [requests.get(address, timeout=30) for address in addresses]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    # How large the samples are is up to the description.
    own = [answer.content for answer in answers if "/samples/" not in answer.url]
    assert sum(map(len, own)) < 40_000


# Any classifier

NAMES = ["lily of the valley", "fire red", "Löwenzahn", "t-shirt", "雏菊"]
LONG = [f"rough-coated Bouvier des Flandres, {n}" for n in range(100)]


class Classifier:
    """The website of a model that is told what to say, so it may have any classes.

    It takes its first sample for what it is, and is not sure about any other.
    """

    def __init__(self, folder: Path, classes: list[str], **changes: object):
        pictures = [encode(Image.new("RGB", (320, 90 + 60 * n)), "JPEG") for n in range(5)]
        samples = [
            {"class": name, "jpeg": b64encode(jpeg).decode()}
            for name, jpeg in zip(classes, pictures, strict=False)
        ]
        said = {"title": "Flowers", "question": "Was blüht da?", "samples": samples}
        path = describe_model(folder / "model.json", classes=classes, **said | changes)
        self.model = description.read(path)
        self.app = web.create_app(self.model, "flowers")
        self.app.add_url_rule("/", "index", self.index, methods=["GET", "POST"])
        self.app.add_url_rule("/predict", "predict", self.predict, methods=["POST"])

    def rank(self, label: str) -> list[tuple[str, float]]:
        """What it says of a sample, the most probable first; the last of the classes come first."""
        best = 0.7 if label == self.model.classes[0] else 0.55
        others = [name for name in reversed(self.model.classes) if name != label]
        weights = 0.8 ** np.arange(len(others))
        shares = (1 - best) * weights / weights.sum()
        return [(label, best), *zip(others, shares.tolist(), strict=True)]

    def answer(self, body: dict) -> list[dict]:
        ranked = dict(self.rank(body["sample"]))
        jpeg = b64encode(dict(self.model.samples)[body["sample"]]).decode()
        said = {
            "predictions": {name: ranked[name] for name in self.model.classes},
            "seconds": {"predict": 0.002},
            "model": {"name": "flowers", "version": 7},
            "preview": f"data:image/jpeg;base64,{jpeg}",
        }
        return [said]

    def index(self) -> Response:
        return web.answer_page(self.answer, model=self.model, formats=["JPEG"])

    def predict(self) -> dict:
        return self.answer(web.read_body())[0]


@pytest.fixture
def show(visit: Visit, tmp_path: Path) -> Iterator[Callable[..., tuple[Classifier, Page]]]:
    """Open the website of a classifier with these classes."""
    with ExitStack() as stack:

        def show(classes: list[str], options: dict, **changes: object) -> tuple[Classifier, Page]:
            classifier = Classifier(tmp_path, classes, **changes)
            server = make_server("127.0.0.1", 0, classifier.app, threaded=True)
            stack.callback(server.server_close)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return classifier, visit(f"http://127.0.0.1:{server.server_port}", **options)

        yield show


def classes_of(count: int) -> list[str]:
    return [*NAMES, *(f"Große Königskerze {n}" for n in range(count))][:count]


def press(page: Page, sample: str) -> None:
    page.get_by_role("button", name=sample, exact=True).click()


@pytest.mark.parametrize("count", [2, 5, 10, 100])
def test_the_page_says_what_the_description_says(show: Callable, count: int) -> None:
    classifier, page = show(classes_of(count), {})
    expect(page).to_have_title("Was blüht da? · Flowers")
    expect(page.get_by_role("heading", level=1)).to_have_text("Was blüht da?")
    expect(page.locator("header")).to_contain_text("Flowers")
    expect(page.locator("header")).to_contain_text(f"which of {count} classes")
    about = page.locator("meta[name=description]")
    expect(about).to_have_attribute("content", re.compile(f"^Flowers: .* of {count} classes"))
    samples = page.locator("fieldset button img")
    for image, sample in zip(samples.all(), classifier.model.samples, strict=True):
        expect(image).to_have_attribute("alt", sample.label)
        shown = page.request.get(image.evaluate("image => image.src")).body()
        assert shown == sample.jpeg


def test_a_description_may_leave_out_what_can_be_left_out(show: Callable) -> None:
    _, page = show(classes_of(3), {}, title="", question="", samples=[])
    expect(page).to_have_title("What does this picture show? · Picture classifier")
    expect(page.get_by_role("heading", level=1)).to_have_text("What does this picture show?")
    expect(page.locator("header")).to_contain_text("Picture classifier")
    expect(page.locator("fieldset")).to_have_count(0)


def test_nothing_on_the_page_is_about_clothes(show: Callable) -> None:
    _, page = show(["cat", "dog"], {})
    files = ("", "/static/style.css", "/static/script.js", "/static/favicon.svg")
    for file in files:
        text = page.request.get(page.url.rstrip("/") + file).text()
        assert not re.search(r"cloth|\b(dress|hanger|garment|outwear|pants)", text, re.IGNORECASE)


def expect_chart(page: Page, ranked: list[tuple[str, float]]) -> None:
    """All classes are there, or ten and what is left; rows keep their distance and stay inside."""
    expect(page.locator(".card")).not_to_have_class(re.compile("empty"))
    # A posted form's answer is text before its style sheet is there.
    page.wait_for_load_state("load")
    rows = page.locator(".chart li:not(.others)")
    shown = ranked if len(ranked) <= 11 else ranked[:10]
    texts = [f"{name} {100 * value:.1f}\u00a0%" for name, value in shown]
    assert [" ".join(text.split("\n")) for text in rows.all_inner_texts()] == texts
    left = ranked[len(shown) :]
    others = page.locator(".chart .others")
    together = f"{100 * sum(value for _, value in left):.1f}\u00a0%"
    expect(others).to_have_text([f"and {len(left)} others, together {together}"] if left else [])

    (outer,) = boxes_of(page, ".chart")
    for part in (".name", ".bar", ".value"):
        boxes = boxes_of(page, f".chart li:not(.others) {part}")
        assert len(boxes) == len(shown)
        assert all(box["x"] >= outer["x"] for box in boxes)
        assert all(box["x"] + box["width"] <= outer["x"] + outer["width"] + 1 for box in boxes)
        ends = [box["y"] + box["height"] for box in boxes]
        assert all(box["y"] >= end for box, end in zip(boxes[1:], ends, strict=False))
    boxes = boxes_of(page, ".chart li")
    gaps = [lower["y"] - upper["y"] - upper["height"] for upper, lower in itertools.pairwise(boxes)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), abs=1)
    assert 0 <= gaps[0] < boxes[0]["height"], "rows belong together"
    assert page.evaluate(CUT) == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def boxes_of(page: Page, selector: str) -> list[dict[str, float]]:
    """Where the elements are that take any room, all of them in one look at the page."""
    boxes = page.locator(selector).evaluate_all(
        """all => all.map((e) => e.getBoundingClientRect().toJSON())"""
    )
    return [box for box in boxes if box["width"] and box["height"]]


def widen(page: Page, width: int, scripts: bool) -> None:
    """Change the window's width, when nothing has moved before; what moves now may do so."""
    if scripts:
        assert page.evaluate(PAINTED) == []
    page.set_viewport_size({"width": width, "height": 800})
    if scripts:
        page.evaluate(PAINTED)
        page.evaluate("shifts.length = 0")


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "plain"])
@pytest.mark.parametrize("count", [2, 5, 10, 11, 12, 100])
def test_any_number_of_classes(show: Callable, count: int, scripts: bool) -> None:
    options = {"viewport": {"width": 360, "height": 800}, "java_script_enabled": scripts}
    classifier, page = show(classes_of(count), options)
    heading = page.get_by_role("heading", level=3)
    for width in (360, 1280):
        widen(page, width, scripts)
        press(page, "lily of the valley")
        expect(heading).to_have_text("lily of the valley, 70\u00a0%")
        expect(page.locator("figcaption")).to_have_text("A sample: lily of the valley")
        expect_picture(page)
        expect_chart(page, classifier.rank("lily of the valley"))

        press(page, "fire red")
        ranked = classifier.rank("fire red")
        second, next_best = ranked[1]
        sentence = f"Perhaps fire red (55\u00a0%) or {second} ({100 * next_best:.0f}\u00a0%)"
        expect(heading).to_have_text(sentence)
        expect_chart(page, ranked)


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("count", [2, 5, 100])
def test_long_names_are_whole_and_move_nothing(show: Callable, count: int, options: dict) -> None:
    classifier, page = show(["hat", *LONG][:count], options)
    for sample in classifier.model.samples:
        press(page, sample.label)
        expect(page.get_by_role("heading", level=3)).to_contain_text(sample.label)
        expect_chart(page, classifier.rank(sample.label))


def test_axe_finds_nothing_about_many_classes(show: Callable) -> None:
    _, page = show(classes_of(100), {})
    press(page, "fire red")
    expect(page.locator(".others")).to_contain_text(["together"] * page.locator(".others").count())
    assert Axe().run(page).response["violations"] == []


# Without JavaScript


def test_without_scripts(visit: Visit, host: str) -> None:
    page = visit(java_script_enabled=False)
    page.get_by_role("button", name="dress", exact=True).click()
    expect_answer(page, "dress")
    expect(page).to_have_title(re.compile(r"^dress, \d\d\u00a0% · What is this"))
    expect(page.get_by_role("heading", level=3)).to_be_in_viewport()
    expect(page.locator(".card img")).to_have_attribute("src", re.compile("^data:image/"))
    names = page.locator(".chart .name").all_inner_texts()
    assert sorted(names) == CLASSES
    values = [float(text.split()[0]) for text in page.locator(".chart .value").all_inner_texts()]
    assert values == sorted(values, reverse=True)
    expect(page.locator("[data-fact=predict]")).to_have_text(re.compile(r"^\d+\sms$"))

    send_link(page, f"http://{host}/shoes.png")
    expect_answer(page, "shoes")
    expect(page.get_by_label("Link to a picture")).to_have_value(f"http://{host}/shoes.png")

    expect(page.locator("figcaption")).to_have_text(f"http://{host}/shoes.png")

    file = page.get_by_label("Choose pictures")
    expect(file).not_to_have_attribute("multiple", "")
    file.set_input_files(SAMPLES / "pants.png")
    page.get_by_role("button", name="Classify the file").click()
    expect_answer(page, "pants")
    expect(page.locator("figcaption")).to_have_text("pants.png")

    page.get_by_role("button", name="hat", exact=True).click()
    expect_answer(page, "hat")
    expect(page.locator("figcaption")).to_have_text("A sample: hat")


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desk", "phone"])
def test_errors_without_scripts(visit: Visit, options: dict) -> None:
    page = visit(java_script_enabled=False, **options)

    def expect_problem_in_view(sentence: str, place: str) -> None:
        expect(page.locator(place)).to_contain_text(sentence)
        expect(page.locator(place)).to_be_in_viewport(ratio=1)
        expect(page).to_have_title(re.compile("^No answer"))
        expect(page.get_by_role("heading", level=3)).to_have_text("No answer for this picture.")
        expect(page.locator(".chart")).to_be_hidden()

    send_link(page, "http://localhost/hat.png")
    expect_problem_in_view("private address", "#problem")
    expect(page.get_by_label("Link to a picture")).to_be_in_viewport(ratio=1)
    page.get_by_label("Choose pictures").set_input_files(upload("large.png", bytes(2_000_000)))
    page.get_by_role("button", name="Classify the file").click()
    expect_problem_in_view("A picture may have 1,000,000 bytes", ".card .problem")
    expect(page.locator("#problem")).to_be_empty()


def test_the_key_without_scripts(visit: Visit, locked_gateway: Server) -> None:
    page = visit(locked_gateway.http, java_script_enabled=False)
    page.get_by_role("button", name="hat", exact=True).click()
    expect(page.locator("#problem")).not_to_be_empty()
    page.get_by_role("textbox", name="Key").fill(KEY)
    page.get_by_role("button", name="hat", exact=True).click()
    expect_answer(page, "hat")


def test_a_form_without_a_place_for_files(gateway: Server) -> None:
    page = requests.post(gateway.http, data={"sample": "hat"}, timeout=30)
    assert page.status_code == 200
    assert '<h3 class="sentence">hat, ' in page.text


def test_the_form_says_when_to_come_back(start_gateway, closed: str) -> None:
    gateway = start_gateway(closed, RATE_LIMIT="1 per hour")
    for status in (503, 429):
        page = requests.post(gateway.http, data={"sample": "dress"}, timeout=30)
        assert page.status_code == status
        assert int(page.headers["Retry-After"]) > 0


def test_what_strangers_write_stays_text(gateway: Server) -> None:
    form = {"url": '"><b id=stranger>'}
    page = requests.post(gateway.http, files={"file": ("", b"")}, data=form, timeout=30)
    assert page.status_code == 400
    assert "&lt;b id=stranger&gt;" in page.text
    assert "<b id=stranger>" not in page.text
