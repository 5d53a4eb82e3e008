"""The gateway under gunicorn, over HTTP, with the real model server behind it."""

import functools
import gzip
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import grpc
import numpy as np
import pytest
import requests
from helpers.basics import CLASSES, ROOT, SAMPLES, describe_model, free_port
from helpers.images import TURNS, encode, turned
from helpers.models import save_lite
from helpers.servers import Server, WebHost, serve, wait_until_ready
from keras_image_helper import create_preprocessor
from PIL import Image, ImageDraw, ImageOps

import description
import tfserving
from web import FormParser, Problem, UploadBudget

NOTEBOOK = "notebooks/04-flask-gateway.ipynb"
MAX_BYTES = 200_000


def draw(size: tuple[int, int] = (60, 45), mode: str = "RGB") -> Image.Image:
    """A picture that no turning or mirroring leaves as it is."""
    image = Image.new(mode, size, "white" if mode == "RGB" else (0, 0, 0, 0))
    pencil = ImageDraw.Draw(image)
    pencil.rectangle((4, 3, size[0] // 2, size[1] // 3), fill="firebrick")
    pencil.ellipse((size[0] // 3, size[1] // 2, size[0] - 5, size[1] - 4), fill="navy")
    return image


PICTURE = encode(draw())


@functools.cache
def bomb() -> bytes:
    return gzip.compress(bytes(50_000_000))


class PictureHost(WebHost):
    """The web that the gateway fetches from: well-behaved pictures and hosts that misbehave."""

    visits: ClassVar[list[str]] = []

    def drip(self, content: bytes) -> None:
        """Send a byte ten times a second: never silent for long, never done."""
        try:
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        except OSError:
            pass

    def send_raw_location(self, location: bytes) -> None:
        self.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n")

    def do_GET(self):
        self.visits.append(self.path)
        page, _, argument = self.path.strip("/").partition("/")
        match page:
            case "picture.png":
                self.answer(200, PICTURE)
            case "broken-gzip":
                self.answer(200, b"no gzip", Content_Encoding="gzip")
            case "cut":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + PICTURE)
            case "says" if argument == "nothing":
                pass
            case "says":
                self.wfile.write(unquote(argument).encode())
            case "status":
                self.answer(int(argument), PICTURE)
            case "hints":
                self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
                self.answer(200, PICTURE)
            case "h%C3%BChe-utf8" | "h%FChe-latin1":
                self.answer(200, PICTURE)
            case "picky" if "contact@a.example" in self.headers["User-Agent"]:
                self.answer(200 if "image/" in self.headers.get("Accept", "") else 406, PICTURE)
            case "gzip":
                self.answer(200, gzip.compress(PICTURE), Content_Encoding="gzip")
            case "chunked":
                self.protocol_version = "HTTP/1.1"
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for chunk in (PICTURE[:50], PICTURE[50:], b""):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            case "redirect" if argument == "0":
                self.answer(302, b"", Location="/picture.png")
            case "redirect":
                self.answer(302, b"", Location=f"/redirect/{int(argument) - 1}")
            case "elsewhere-utf8":
                self.send_raw_location("/hühe-utf8".encode())
            case "elsewhere-latin1":
                self.send_raw_location("/hühe-latin1".encode("latin-1"))
            case "elsewhere":
                self.answer(301, b"", Location=unquote(argument))
            case "large":
                self.answer(200, bytes(MAX_BYTES + 1))
            case "endless":
                self.send_response(200)
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(bytes(65536))
                except OSError:
                    pass
            case "bomb":
                self.answer(200, bomb(), Content_Encoding="gzip")
            case "endless-redirect":
                self.send_response(302)
                self.send_header("Location", "/picture.png")
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(bytes(65536))
                except OSError:
                    pass
            case "page":
                self.answer(200, b"<!doctype html><p>not a picture", Content_Type="image/png")
            case "slow-body":
                self.send_response(200)
                self.end_headers()
                self.drip(PICTURE)
            case "slow-header":
                self.drip(b"HTTP/1.0 200 OK\r\n" + b"X" * 100)
            case "silent":
                self.rfile.read(1)
            case _:
                self.answer(404, b"")


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    """The address of a running PictureHost."""
    bomb()  # which takes longer to make than the gateway waits for a busy host
    with serve(PictureHost) as address:
        yield address


@pytest.fixture(scope="module")
def gateway(start_gateway, model_server, pictures, closed) -> Server:
    return start_gateway(
        model_server.grpc,
        ALLOWED_IMAGE_HOSTS=f"{pictures}, {closed}",
        IMAGE_MAX_BYTES=str(MAX_BYTES),
        IMAGE_MAX_PIXELS="1000000",
        IMAGE_TIMEOUT_SECONDS="1",
        IMAGE_CONTACT="contact@a.example",
    )


def send(gateway: Server, picture: bytes, **options) -> requests.Response:
    files = {"file": ("any name", picture)}
    return requests.post(f"{gateway.http}/predict", files=files, timeout=30, **options)


def link(gateway: Server, *urls: str, preview=False, **options) -> requests.Response:
    body = {"url": urls[0]} if len(urls) == 1 else {"urls": urls}
    body["preview"] = preview
    return requests.post(f"{gateway.http}/predict", json=body, timeout=30, **options)


def assert_problem(response: requests.Response, status: int, cause: str) -> dict:
    """Check that the answer is a problem as RFC 9457 has it, and return it."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == f"tag:clothing-gateway,2026:{cause}"
    assert problem["status"] == status
    assert problem["title"]
    assert " " in problem["detail"]
    assert (status == 503) == ("Retry-After" in response.headers)
    return problem


def facts(response: requests.Response) -> dict:
    """What an answer says of the picture: all but the time that it took."""
    assert response.status_code == 200, response.text
    return {name: value for name, value in response.json().items() if name != "seconds"}


def ask_directly(target: str, picture: Image.Image, size=(32, 32), name="clothing-model") -> list:
    """The probabilities straight from the model server, for a picture prepared here."""
    array = create_preprocessor("xception", target_size=size).convert_to_tensor(picture)
    pb_request = tfserving.PredictRequest()
    pb_request.model_spec.name = name
    pb_request.inputs["inputs"].CopyFrom(tfserving.make_tensor_proto(array))
    with grpc.insecure_channel(target) as channel:
        pb_response = tfserving.PredictionServiceStub(channel).Predict(pb_request, timeout=30)
    return tfserving.make_ndarray(pb_response.outputs["probabilities"])[0].tolist()


def test_file(gateway, model_server):
    answer = send(gateway, PICTURE).json()
    assert list(answer) == ["predictions", "top_class", "top_probability", "model", "seconds"]
    assert list(answer["seconds"]) == ["decode", "predict"]
    predictions = answer["predictions"]
    assert list(predictions) == CLASSES
    assert list(predictions.values()) == pytest.approx(
        ask_directly(model_server.grpc, draw()), abs=1e-6
    )
    assert sum(predictions.values()) == pytest.approx(1)
    assert answer["top_probability"] == max(predictions.values())
    assert predictions[answer["top_class"]] == answer["top_probability"]
    assert answer["model"] == {"name": "clothing-model", "version": 1}


def test_url(gateway, pictures):
    expected = facts(send(gateway, PICTURE))
    for page in ("picture.png", "gzip", "chunked"):
        assert facts(link(gateway, f"http://{pictures}/{page}")) == expected


def test_urls(gateway, pictures):
    answers = link(gateway, *[f"http://{pictures}/picture.png"] * 16).json()
    assert len(answers) == 16
    expected = send(gateway, PICTURE).json()["predictions"]
    for answer in answers:
        assert answer["predictions"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("page", "status", "cause"),
    [
        ("page", 415, "not-a-picture"),
        ("large", 413, "request-entity-too-large"),
        ("missing", 502, "link-failed"),
    ],
)
def test_of_several_pictures_each_is_answered_on_its_own(gateway, pictures, page, status, cause):
    """A problem stands in its picture's place; where there are only problems, it is the first."""
    good, bad = f"http://{pictures}/picture.png", f"http://{pictures}/{page}"
    problem = assert_problem(link(gateway, bad), status, cause)
    first, second, third = link(gateway, good, bad, good, preview=True).json()
    assert second.pop("seconds") and second == problem
    expected = link(gateway, good).json()["predictions"]
    for answer in (first, third):
        assert answer["predictions"] == pytest.approx(expected, abs=1e-6)
        assert answer["preview"].startswith("data:image/")
    only_bad = link(gateway, bad, f"http://{pictures}/other-problem")
    assert assert_problem(only_bad, status, cause) == problem


@pytest.mark.parametrize("length", [65_536, 70_000, 200_000])
@pytest.mark.parametrize("text", [b'{"url": "%s"}', b'{"url": "https://a.example/"}%s'])
def test_json_that_is_too_long(gateway, length, text):
    """It says so whether the length is announced or shows only as the chunks come."""
    body = text % (b" " * length)
    for data in (body, iter([body[:5000], body[5000:]])):
        response = requests.post(f"{gateway.http}/predict", data=data, timeout=30)
        assert_problem(response, 413, "request-entity-too-large")


def test_json_needs_no_content_type(gateway, pictures):
    body = json.dumps({"url": f"http://{pictures}/picture.png"})
    headers = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d sends
    response = requests.post(f"{gateway.http}/predict", data=body, headers=headers, timeout=30)
    assert response.status_code == 200


def test_upright_whatever_the_camera_says(gateway):
    expected = facts(send(gateway, PICTURE))
    for orientation in TURNS:
        picture = turned(draw(), orientation)
        assert ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).size == draw().size
        assert facts(send(gateway, picture)) == expected, f"orientation {orientation}"


def test_transparency_is_white(gateway):
    expected = facts(send(gateway, PICTURE))
    transparent = draw(mode="RGBA")
    assert facts(send(gateway, encode(transparent))) == expected
    assert facts(send(gateway, encode(transparent, "WEBP", lossless=True))) == expected
    palette = draw().quantize(8)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert facts(send(gateway, encode(palette))) == expected


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *[("JPEG", mode) for mode in ("RGB", "L", "CMYK")],
        *[("PNG", mode) for mode in ("RGB", "L", "LA", "P", "1")],
        *[("WEBP", mode) for mode in ("RGB", "RGBA")],
        *[("GIF", mode) for mode in ("P", "L", "1")],
        *[("BMP", mode) for mode in ("RGB", "P", "1")],
        *[("TIFF", mode) for mode in ("RGB", "L", "CMYK", "1")],
    ],
)
def test_formats(gateway, kind, mode):
    response = send(gateway, encode(draw().convert(mode), kind))
    assert response.status_code == 200, response.text
    assert sum(response.json()["predictions"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        PICTURE[: len(PICTURE) // 2],
        encode(draw(), "JPEG")[:400],
        encode(draw(), "PPM"),
        encode(draw(), "ICO"),
    ],
    ids=["empty", "SVG", "half a PNG", "half a JPEG", "PPM", "ICO"],
)
def test_not_a_picture(gateway, content):
    detail = assert_problem(send(gateway, content), 415, "not-a-picture")["detail"]
    assert "PNG" in detail or "damaged or incomplete" in detail or "empty" in detail


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "{}", '{"url": 5}', '{"urls": []}', '{"urls": "x"}', "\xff", "null"]
)
def test_malformed_requests(gateway, body):
    response = requests.post(f"{gateway.http}/predict", data=body.encode("latin-1"), timeout=30)
    assert_problem(response, 400, "malformed-request")


@pytest.mark.parametrize(
    "chunks", [b"zz\r\n", b"-1\r\n", b"2\r\n{}XX0\r\n\r\n", b"2;\1\r\n{}\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("path", ["/predict", "/"])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_chunks_that_are_none(gateway, chunks, path, kind):
    host, port = gateway.http.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    head += f"Content-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(head.encode() + chunks)
        client.shutdown(socket.SHUT_WR)
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert "Traceback" not in gateway.log.read_text()


def test_too_many_links_and_a_form_without_a_file(gateway, pictures):
    assert_problem(link(gateway, *[f"http://{pictures}/"] * 17), 400, "malformed-request")
    response = requests.post(f"{gateway.http}/predict", files={"note": (None, "hi")}, timeout=30)
    assert "only: note" in assert_problem(response, 400, "malformed-request")["detail"]


def post_form(gateway, parts: dict[bytes, bytes], boundary: str = "b", end: bytes = b"--b--"):
    """Send a form as it is on the wire: the header after ``form-data;``, then the content."""
    part = b"--b\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n"
    return requests.post(
        f"{gateway.http}/predict",
        b"".join(part % each for each in parts.items()) + end,
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
        timeout=30,
    )


@pytest.mark.parametrize(
    "parts",
    [
        {b'name="file"; filename="a.png"': PICTURE},
        {b"name=file; filename=a.png": PICTURE},
        {b'name="file"; filename="\xc3\xa4 \\" b.png"': PICTURE},
        {b'filename="a.png"; name="file"\r\nContent-Type: image/png': PICTURE},
        {b'name="other"': b"\xff" * 999, b'name="file"; filename="a.png"': PICTURE},
        {b'name="file"; filename=""': b"", b'name="sample"': b"dress"},
        {b'name="file"; filename=""': PICTURE},
        {b'name="file"': PICTURE},
        {b'name="file"\r\nContent-Type: image/png': PICTURE},
        {b"name=\"file\"; filename*=UTF-8''%e8%a1%a3.jpg\r\nContent-Type: image/jpeg": PICTURE},
        {b'name="file"; filename*0="h\xc3\xbc"; filename*1="he.jpg"': PICTURE},
        {b'name="file"; filename="h\xf6he.jpg"': PICTURE},
        {b'name="file"; filename="\x95\\.jpg"': PICTURE},
        {b'name="image"; filename="a.png"': PICTURE, b'name="preview"': b"yes"},
        {b'name="picture"\r\nContent-Type: image/png': PICTURE},
        {b'filename="a.png"': PICTURE},
        {b'name="image"; filename="a.png"': b"no picture", b'name="file"; filename="b"': PICTURE},
    ],
)
def test_forms(gateway, parts):
    assert post_form(gateway, parts).json()["top_class"] in CLASSES


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "IMAGE/x", "application/octet-stream"])
def test_a_picture_alone(gateway, kind):
    """It may come without a form around it, and its exact type does not matter."""
    url, headers = f"{gateway.http}/predict", {"Content-Type": kind}
    expected = facts(send(gateway, PICTURE))
    for data in (PICTURE, iter([PICTURE[:50], PICTURE[50:]])):
        assert facts(requests.post(url, data, headers=headers, timeout=30)) == expected
    for data in (bytes(20_000_000), iter([bytes(65_536)] * 20)):
        response = requests.post(url, data, headers=headers, timeout=30)
        assert_problem(response, 413, "request-entity-too-large")
    for data in (b"", b"no picture"):
        response = requests.post(url, data, headers=headers, timeout=30)
        assert_problem(response, 415, "not-a-picture")


def test_a_link_in_a_urlencoded_form(gateway, pictures):
    for body in ({"url": f"http://{pictures}/picture.png"}, {"sample": "dress", "preview": "yes"}):
        response = requests.post(f"{gateway.http}/predict", data=body, timeout=30)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": b""}, "0 bytes of no type"),
        ({"data": PICTURE}, f"{len(PICTURE)} bytes of no type) is not a JSON object"),
        ({"data": '{"url": nonsense}'}, "is not a JSON object"),
        ({"data": {"link": "x"}}, "6 bytes of application/x-www-form-urlencoded"),
        ({"json": {}}, "only: nothing"),
        ({"json": {"link": "x", "size": 5}}, "only: link, size"),
        ({"json": {"url": 5}}, "The url is not a text"),
        ({"json": {"urls": "x"}}, "The urls are not a list of links"),
        ({"json": {"urls": ["x"] * 17}}, "There are 17 links in urls"),
        ({"json": {"sample": "ocelot"}}, "There is no sample ocelot"),
        ({"files": {"one": PICTURE, "two": PICTURE}}, "The form has 2 files"),
        ({"files": [("file", PICTURE), ("file", PICTURE)]}, "The form has 2 files"),
    ],
)
def test_the_problem_says_what_came_and_what_is_wanted(gateway, options, said):
    response = requests.post(f"{gateway.http}/predict", timeout=30, **options)
    detail = assert_problem(response, 400, "malformed-request")["detail"]
    assert said in detail and detail.endswith("or a picture itself as image/jpeg.")


@pytest.mark.parametrize(
    ("form", "status", "cause"),
    [
        ({"parts": {b'name="file"; filename="a"': PICTURE}, "boundary": "c"}, 400, "malformed"),
        ({"parts": {b'name="file"; filename="a"': PICTURE}, "end": b""}, 400, "malformed"),
        ({"parts": {b'name="file"; filename="a"': PICTURE}, "boundary": ""}, 400, "malformed"),
        ({"parts": {b'nom="file"': PICTURE}}, 400, "malformed"),
        ({"parts": {}}, 400, "malformed"),
        ({"parts": {b'name="%d"' % number: b"" for number in range(1000)}}, 413, "request-entity"),
    ],
)
def test_malformed_forms(gateway, form, status, cause):
    response = post_form(gateway, **form)
    assert response.status_code == status, response.text
    assert response.json()["type"].partition(":")[2].partition(":")[2].startswith(cause)


@pytest.mark.parametrize(
    "url",
    [
        *("", "dress.png", "http://", "http://[::1", "http://a:99999/", "//a/b", "http://a b/"),
        *("\0http:///dress.png", "ht\ttp:///", "\0http://127.0.0.1/", "\x1f//"),
    ],
)
def test_malformed_links(gateway, url):
    assert_problem(link(gateway, url), 400, "link-malformed")


@pytest.fixture
def canary() -> Iterator[Callable[[], int]]:
    """A listening loopback port; called, it tells the port, and in the end nobody has come."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield lambda: server.getsockname()[1]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


PRIVATE_HOSTS = [
    *("127.0.0.1", "localhost", "LocalHost", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "0"),
    *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]"),
    *("10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "224.0.0.1"),
    *("[fd00:ec2::254]", "[fe80::1]", "[ff02::1]", "[2002:7f00:1::]", "255.255.255.255"),
]


# A connection that was tried and refused would be a 502, one that hangs a 504.
@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_private_addresses_are_blocked(gateway, pictures, host):
    assert_problem(link(gateway, f"http://{host}/dress.png"), 400, "link-blocked")
    assert_problem(link(gateway, f"https://{host}/dress.png"), 400, "link-blocked")
    response = link(gateway, f"http://{pictures}/elsewhere/http://{host}/dress.png")
    assert_problem(response, 400, "link-blocked")


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_other_ports_are_blocked(gateway, canary, host):
    assert_problem(link(gateway, f"http://{host}:{canary()}/"), 400, "link-blocked")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://192.0.2.1/dress.png",
        "data:image/png;base64,AAAA",
        "http://somebody:secret@192.0.2.1/dress.png",
        "http://{pictures}@127.0.0.1/",
    ],
)
def test_other_links_are_blocked(gateway, pictures, url):
    url = url.format(pictures=pictures)
    assert_problem(link(gateway, url), 400, "link-blocked")
    assert_problem(link(gateway, f"http://{pictures}/elsewhere/{url}"), 400, "link-blocked")


def test_allowing_a_port_allows_no_other(gateway, pictures, canary):
    host, _ = pictures.split(":")
    assert_problem(link(gateway, f"http://{host}:{canary()}/"), 400, "link-blocked")
    assert_problem(link(gateway, f"http://{host}/"), 400, "link-blocked")


def test_redirects(gateway, pictures):
    expected = facts(send(gateway, PICTURE))
    assert facts(link(gateway, f"http://{pictures}/redirect/2")) == expected
    assert facts(link(gateway, f"http://{pictures}/endless-redirect")) == expected
    PictureHost.visits.clear()
    assert_problem(link(gateway, f"http://{pictures}/redirect/3"), 502, "link-failed")
    assert PictureHost.visits == [f"/redirect/{n}" for n in (3, 2, 1, 0)]


def test_what_browsers_follow_is_followed(gateway, pictures):
    expected = facts(send(gateway, PICTURE))
    for spaces in ("%s\n", "  %s", "\t%s\r\n", "\u00a0%s "):
        assert facts(link(gateway, spaces % f"http://{pictures}/picture.png")) == expected
    for page in ("elsewhere-utf8", "elsewhere-latin1", "hints", "status/203", "picky"):
        assert facts(link(gateway, f"http://{pictures}/{page}")) == expected, page


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("broken-gzip", "not packed as it says"),
        ("cut", "hung up before its answer was whole"),
        ("says/nothing", "hung up without an answer"),
        ("says/nonsense", "The host's answer is not HTTP"),
        *((f"status/{code}", "save the picture, and send the file") for code in (403, 406, 429)),
        ("status/404", "The picture's host answered 404"),
        ("page", "This is a web page"),
    ],
)
def test_what_hosts_do_is_told(gateway, pictures, page, said):
    assert said in link(gateway, f"http://{pictures}/{page}").json()["detail"]


def test_hosts_that_fail(gateway, pictures, closed):
    problem = assert_problem(link(gateway, f"http://{pictures}/nothing"), 502, "link-failed")
    assert "404" in problem["detail"]
    problem = assert_problem(link(gateway, f"http://{closed}/"), 502, "link-failed")
    assert "The host does not answer" in problem["detail"]
    assert_problem(link(gateway, f"http://{pictures}/page"), 415, "not-a-picture")


def test_bad_links_among_good_ones_are_named(gateway, pictures):
    good, port = f"http://{pictures}/picture.png", f"http://localhost:{pictures[-1]}/"
    gone, slow = f"http://{pictures}/gone", f"http://{pictures}/silent"
    bad = {
        "http://10.1.2.3/": "400 link-blocked",
        port: "400 link-blocked",
        gone: "502 link-failed",
        slow: "504 link-timeout",
        "nonsense": "400 link-malformed",
    }
    first, *problems, last = link(gateway, good, *bad, good).json()
    assert first["top_class"] == last["top_class"]
    for (url, told), problem in zip(bad.items(), problems, strict=True):
        assert f"{problem['status']} {problem['type'].rpartition(':')[2]}" == told
        assert url in problem["detail"]
    assert "port" in problems[1]["detail"]


@pytest.mark.parametrize("page", ["slow-body", "slow-header", "silent"])
def test_slow_hosts(gateway, pictures, page):
    assert_problem(link(gateway, f"http://{pictures}/{page}"), 504, "link-timeout")


@pytest.mark.parametrize("page", ["large", "endless", "bomb"])
def test_links_to_too_many_bytes(gateway, pictures, page):
    response = link(gateway, f"http://{pictures}/{page}")
    problem = assert_problem(response, 413, "request-entity-too-large")
    assert "200,000 bytes" in problem["detail"]


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 20_000_000])
def test_uploads_of_too_many_bytes(gateway, size):
    problem = assert_problem(send(gateway, bytes(size)), 413, "request-entity-too-large")
    assert "200,000 bytes" in problem["detail"]


def test_too_many_pixels(gateway):
    picture = encode(Image.new("1", (1001, 1000)))
    assert len(picture) < 1000
    problem = assert_problem(send(gateway, picture), 413, "request-entity-too-large")
    assert "1,000,000 pixels" in problem["detail"]
    assert_problem(
        send(gateway, encode(Image.new("1", (30_000, 30_000)))), 413, "request-entity-too-large"
    )
    assert send(gateway, encode(Image.new("1", (1000, 1000)))).status_code == 200


def test_proxies_of_the_environment_are_ignored(start_gateway, model_server, pictures, canary):
    proxy = f"http://127.0.0.1:{canary()}"
    gateway = start_gateway(
        model_server.grpc,
        ALLOWED_IMAGE_HOSTS=pictures,
        **{name: proxy for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY")},
    )
    session = requests.Session()
    session.trust_env = False
    body = {"url": f"http://{pictures}/picture.png"}
    assert session.post(f"{gateway.http}/predict", json=body, timeout=30).status_code == 200


def test_wrong_addresses_and_methods(gateway):
    assert_problem(requests.get(f"{gateway.http}/nothing", timeout=30), 404, "not-found")
    response = requests.get(f"{gateway.http}/predict", timeout=30)
    assert_problem(response, 405, "method-not-allowed")
    assert "POST" in response.headers["Allow"]


def test_health(gateway):
    assert requests.get(f"{gateway.http}/livez", timeout=30).json() == {"status": "alive"}
    ready = requests.get(f"{gateway.http}/readyz", timeout=30)
    assert ready.status_code == 200
    assert ready.json()["model"] == {"name": "clothing-model", "version": 1}


def test_metrics(gateway, pictures):
    def read(line: str) -> float:
        text = requests.get(gateway.metrics, timeout=30).text
        return next((float(m.split()[-1]) for m in text.splitlines() if m.startswith(line)), 0.0)

    stages = {
        f'gateway_seconds_count{{stage="{s}"}}' for s in ("fetch", "decode", "predict", "all")
    }
    blocked = 'gateway_problems_total{cause="link-blocked"}'
    before = {line: read(line) for line in (*stages, blocked)}
    link(gateway, f"http://{pictures}/picture.png")
    link(gateway, "http://127.0.0.1/")
    assert {line: read(line) - before[line] for line in before} == {
        'gateway_seconds_count{stage="fetch"}': 2,
        'gateway_seconds_count{stage="decode"}': 1,
        'gateway_seconds_count{stage="predict"}': 1,
        'gateway_seconds_count{stage="all"}': 2,
        blocked: 1,
    }
    assert read("gateway_in_flight") == 0


def test_key(start_gateway, model_server):
    gateway = start_gateway(model_server.grpc, GATEWAY_API_KEY="sésame")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sésame".encode()}):
        response = send(gateway, PICTURE, headers=headers)
        assert_problem(response, 401, "wrong-key")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    headers = {"Authorization": "Bearer sésame".encode()}
    assert send(gateway, PICTURE, headers=headers).status_code == 200
    assert requests.get(f"{gateway.http}/readyz", timeout=30).status_code == 200


def test_several_workers_after_one_fork(start_gateway, model_server):
    gateway = start_gateway(model_server.grpc, GUNICORN_CMD_ARGS="--workers 2 --preload")
    with ThreadPoolExecutor(8) as clients:
        answers = [*clients.map(lambda _: send(gateway, PICTURE).status_code, range(32))]
    assert answers == [200] * 32


def test_model_server_dead_then_alive(launch, start_gateway, tiny_model):
    port, rest_port = free_port(), free_port()
    gateway = start_gateway(f"localhost:{port}")
    problem = assert_problem(send(gateway, PICTURE), 503, "model-unavailable")
    assert str(port) not in problem["detail"]
    ready = f"{gateway.http}/readyz"
    assert_problem(requests.get(ready, timeout=30), 503, "model-unavailable")
    assert requests.get(f"{gateway.http}/livez", timeout=30).status_code == 200

    model_server = launch(
        [
            *(sys.executable, "-m", "model_server", f"--port={port}"),
            *(f"--rest_api_port={rest_port}", "--model_name=clothing-model"),
            *(f"--model_base_path={tiny_model}", "--prefer_tflite_model"),
        ],
        http=f"http://127.0.0.1:{rest_port}",
    )
    wait_until_ready(gateway, ready, lambda body: b'"ready"' in body)
    assert send(gateway, PICTURE).status_code == 200

    model_server.stop()
    assert_problem(requests.get(ready, timeout=30), 503, "model-unavailable")
    assert_problem(send(gateway, PICTURE), 503, "model-unavailable")


def test_model_server_that_says_nothing(start_gateway):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        gateway = start_gateway(target, PREDICT_TIMEOUT_SECONDS="0.5")
        assert_problem(send(gateway, PICTURE), 504, "model-timeout")
        assert_problem(requests.get(f"{gateway.http}/readyz", timeout=30), 504, "model-timeout")


def save_other_model(path: Path, height: int = 48, width: int = 40, classes: int = 3) -> Path:
    """Save a classifier whose names, size, types and number of classes are not the product's."""
    import tensorflow as tf

    module = tf.Module()
    shape = [height * width * 3, classes]
    module.weights = tf.Variable(tf.random.stateless_normal(shape, seed=[3, 4]) / 30)

    @tf.function(input_signature=[tf.TensorSpec([None, height, width, 3], tf.float16, name="look")])
    def halves(look):
        flat = tf.reshape(tf.cast(look, tf.float32), [-1, height * width * 3])
        return {"guess": tf.ensure_shape(tf.nn.softmax(flat @ module.weights), [None, classes])}

    @tf.function(input_signature=[tf.TensorSpec([None, height, width, 3], tf.uint8, name="raw")])
    def pixels(raw):
        return {"guess": halves(tf.cast(tf.cast(raw, tf.float32) / 127.5 - 1, tf.float16))["guess"]}

    return save_lite(path, {"serving_default": halves, "pixels": pixels}, module)


def test_another_model_drops_in(start_model_server, start_gateway, tmp_path):
    save_other_model(tmp_path / "other" / "7")
    about = describe_model(
        tmp_path / "model.json", name="other", classes=["sock", "glove", "scarf"], samples=[]
    )
    server = start_model_server(tmp_path / "other", model_name="other")
    other = {"MODEL_DESCRIPTION": str(about)}

    answer = send(start_gateway(server.grpc, **other), PICTURE).json()
    assert list(answer["predictions"]) == ["sock", "glove", "scarf"]
    assert sum(answer["predictions"].values()) == pytest.approx(1, abs=1e-6)
    assert answer["model"] == {"name": "other", "version": 7}

    pixels = send(start_gateway(server.grpc, SIGNATURE_NAME="pixels", **other), PICTURE).json()
    assert pixels["predictions"] == pytest.approx(answer["predictions"], abs=1e-6)

    gateway = start_gateway(server.grpc, SIGNATURE_NAME="nonsense", **other)
    problem = assert_problem(send(gateway, PICTURE), 503, "model-unsuitable")
    assert (
        "offers pixels, serving_default, and none of SIGNATURE_NAME, which is nonsense"
        in (problem["detail"])
    )

    gateway = start_gateway(server.grpc, MODEL_NAME="other")
    for response in (requests.get(f"{gateway.http}/readyz", timeout=30), send(gateway, PICTURE)):
        problem = assert_problem(response, 503, "model-unsuitable")
        assert "10 numbers" in problem["detail"]
        assert "[-1, 3]" in problem["detail"]


def test_a_wrong_name_of_the_model_is_said(model_server, start_gateway):
    gateway = start_gateway(model_server.grpc, MODEL_NAME="clothing-modle")
    for response in (requests.get(f"{gateway.http}/readyz", timeout=30), send(gateway, PICTURE)):
        problem = assert_problem(response, 503, "model-unavailable")
        sentence = "no model named clothing-modle; the description is of clothing-model."
        assert sentence in problem["detail"]


def test_not_ready_where_the_model_errs_about_its_sample(model_server, start_gateway, tmp_path):
    """As where its pictures are scaled differently than in training."""
    hat = {"class": "hat", "jpeg": b64encode(SAMPLES[0].read_bytes()).decode()}
    about = describe_model(tmp_path / "model.json", samples=[hat])
    gateway = start_gateway(model_server.grpc, MODEL_DESCRIPTION=str(about))
    response = requests.get(f"{gateway.http}/readyz", timeout=30)
    problem = assert_problem(response, 503, "model-unsuitable")
    assert "clothing-model says dress to its own sample, hat" in problem["detail"]


def test_model_replaced_while_serving(start_model_server, start_gateway, tiny_model, tmp_path):
    base_path = tmp_path / "model"
    base_path.mkdir()
    (base_path / "1").symlink_to(tiny_model / "1")
    server = start_model_server(base_path, "--file_system_poll_wait_seconds=1")
    gateway = start_gateway(server.grpc)
    first = send(gateway, PICTURE).json()
    assert first["model"]["version"] == 1

    save_other_model(tmp_path / "new", classes=10).rename(base_path / "2")
    deadline = time.monotonic() + 30
    while (answer := send(gateway, PICTURE)).json().get("model") != {
        "name": "clothing-model",
        "version": 2,
    }:
        assert answer.status_code == 200, answer.text
        assert time.monotonic() < deadline
    assert list(answer.json()["predictions"]) == CLASSES
    assert answer.json()["predictions"] != first["predictions"]


def save_two_signatures(path: Path) -> Path:
    """Save a model that calls every picture a dress when it gets bytes, and a hat for floats."""
    import tensorflow as tf

    def always(label: str, dtype: Any) -> Any:
        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], dtype, name="pictures")])
        def signature(pictures):
            row = tf.one_hot([CLASSES.index(label)], len(CLASSES))
            return {"probabilities": tf.tile(row, [tf.shape(pictures)[0], 1])}

        return signature

    signatures = {"serving_uint8": always("dress", tf.uint8)}
    signatures["serving_default"] = always("hat", tf.float32)
    return save_lite(path, signatures)


def test_bytes_are_sent_where_the_model_takes_them(start_model_server, start_gateway, tmp_path):
    save_two_signatures(tmp_path / "model" / "1")
    server = start_model_server(tmp_path / "model", "--file_system_poll_wait_seconds=1")
    gateway = start_gateway(server.grpc)
    assert send(gateway, PICTURE).json()["top_class"] == "dress"
    floats = start_gateway(server.grpc, SIGNATURE_NAME="serving_default")
    assert send(floats, PICTURE).json()["top_class"] == "hat"

    # The next version has no such signature: no request may notice.
    save_other_model(tmp_path / "new", classes=10).rename(tmp_path / "model" / "2")
    deadline = time.monotonic() + 30
    while (answer := send(gateway, PICTURE)).json()["model"]["version"] == 1:
        assert time.monotonic() < deadline
    assert answer.status_code == 200
    expected = send(start_gateway(server.grpc), PICTURE).json()
    assert answer.json()["predictions"] == pytest.approx(expected["predictions"], abs=1e-6)


def test_tensorflow_is_not_imported():
    program = "import sys, gateway; print([m for m in sys.modules if 'tensorflow' in m])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]"


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    return b"".join(head + part + b"\r\n" for part in parts) + end


def parse(body: bytes):
    length, options = len(body), {"boundary": "b"}
    return FormParser().parse(io.BytesIO(body), "multipart/form-data", length, options)


@pytest.mark.parametrize(
    ("body", "files"),
    [
        (form(bytes(700_000)), 1),
        (form(bytes(700_000), b"small", bytes(800_000)), 3),
        (
            form(
                b"small", end=b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\ny\r\n--b--'
            ),
            1,
        ),
        (form(bytes(700_000), bytes(900_000), end=b"--b\r\n"), 0),
        (form(bytes(700_000), end=b"--b\r\nnonsense\r\n\r\n--b--"), 0),
        (b"nonsense", 0),
    ],
)
def test_a_form_takes_room_until_its_files_are_closed(body, files):
    before = UploadBudget.left
    *_, found = parse(body)
    kept = [file for _, file in found.items(multi=True)]
    sizes = [file.seek(0, io.SEEK_END) for file in kept]
    assert len(sizes) == files and UploadBudget.left == before - sum(sizes)
    for file in kept * 2:
        file.close()
    assert UploadBudget.left == before


def test_a_picture_alone_takes_room_until_it_is_closed():
    before = UploadBudget.left
    *_, found = FormParser().parse(io.BytesIO(bytes(700_000)), "image/png", 700_000, {})
    assert UploadBudget.left == before - 700_000
    assert found["file"].read() == bytes(700_000)
    found["file"].close()
    assert UploadBudget.left == before


def files_on_their_way() -> int:
    """How many bytes this process has on disk for forms."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the folder's own
            found += link.stat().st_size if "(deleted)" in os.readlink(link) else 0
    return found


def test_forms_that_do_not_fit_leave_their_room_at_once(monkeypatch):
    """Bytes are given back when they have left the disk, also while the refusal is still known."""
    monkeypatch.setattr(UploadBudget, "left", 1_500_000)
    *_, kept = parse(form(bytes(600_000)))
    room = files_on_their_way()
    for _ in range(3):
        with pytest.raises(Problem) as refused:
            parse(form(bytes(1_200_000)))
        assert refused.value.code == 503 and UploadBudget.left == 900_000
        assert files_on_their_way() == room
    kept["file"].close()
    *_, found = parse(form(bytes(1_200_000)))
    found["file"].close()
    assert UploadBudget.left == 1_500_000 and files_on_their_way() < room


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/predict", lambda: {"files": {"file": bytes(11_000_000)}}, 413),
        ("/predict", lambda: {"json": {"url": "a" * 200_000}}, 413),
        ("/predict", lambda: {"data": iter([bytes(100_000)] * 9)}, 413),
        ("/nowhere", lambda: {"data": bytes(200_000)}, 404),
    ],
    ids=["upload", "JSON", "chunks", "nowhere"],
)
def test_who_sent_what_nobody_read_can_ask_again(gateway, path, options, status):
    """The answer says that the connection ends, so that the next request takes another one."""
    with requests.Session() as session:
        refused = session.post(f"{gateway.http}{path}", timeout=30, **options())
        assert (refused.status_code, refused.headers["Connection"]) == (status, "close")
        for _ in range(2):
            answer = session.post(f"{gateway.http}/predict", json={"sample": "dress"}, timeout=30)
            assert (answer.status_code, answer.headers["Connection"]) == (200, "keep-alive")


def test_gateway_is_what_the_notebook_exports(tmp_path):
    command = [*(sys.executable, "-m", "nbconvert", NOTEBOOK), *("--to", "python")]
    command += ["--template", "gateway", "--TemplateExporter.extra_template_basedirs"]
    command += ["workbook/templates", "--output-dir", str(tmp_path), "--output", "gateway"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    exported = (tmp_path / "gateway.py").read_text()
    assert exported == (ROOT / "gateway.py").read_text()
    assert np.all([len(line) <= 100 for line in exported.splitlines()])
    ruff = [sys.executable, "-m", "ruff", "format", "--check", str(tmp_path / "gateway.py")]
    subprocess.run([*ruff, "--config", "pyproject.toml"], cwd=ROOT, check=True)


def cells_of_the_gateway() -> list[str]:
    cells = json.loads((ROOT / NOTEBOOK).read_text())["cells"]
    tagged = [cell for cell in cells if "gateway" in cell["metadata"].get("tags", [])]
    return ["".join(cell["source"]) for cell in tagged]


def test_its_cells_can_run_again_one_by_one_and_all_together():
    cells = cells_of_the_gateway()
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in [*cells, *(cell for cell in cells for _ in range(2)), *cells]:
        exec(compile(cell, "cell", "exec"), names)
    client = names["app"].test_client()
    assert client.get("/livez").get_json() == {"status": "alive"}
    with client.get("/openapi.json") as answer:
        assert answer.status_code == 200


def test_it_can_be_read_in_one_sitting():
    assert len((ROOT / "gateway.py").read_text().splitlines()) <= 200
    for cell in cells_of_the_gateway():
        assert len([line for line in cell.splitlines() if line.strip()]) <= 20


LOOK = """
import logging, mimetypes, os, sys, warnings
import flask, numpy, PIL.Image, requests, requests_hardened.ip_filter, urllib3
def look():
    return [
        flask.Request.form_data_parser_class, PIL.Image.MAX_IMAGE_PIXELS, dict(os.environ),
        requests_hardened.ip_filter.EXTRA_BLOCKED_NET_RANGES, logging.getLogger("urllib3").level,
        logging.getLogger().level, dict(mimetypes.types_map), list(warnings.filters),
        urllib3.connectionpool.HTTPConnectionPool.ConnectionCls, requests.adapters.DEFAULT_RETRIES,
    ]
before = look()
import gateway
assert "gateway" in sys.modules and look() == before
"""


def test_importing_it_changes_no_other_library():
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_docs_name_every_variable_with_its_default() -> None:
    files = ("gateway.py", "links.py", "web.py", "gunicorn.conf.py")
    sources = [(ROOT / name).read_text() for name in files]
    defaults = dict(re.findall(r'\benv\(\s*"(\w+)", f?"([^"]*)"\)', "".join(sources)))
    defaults["MODEL_DESCRIPTION"] = description.BUNDLED
    defaults["MODEL_NAME"] = "the description's `name"  # and the table closes the backquotes
    assert "".join(sources).count("env(") == len(defaults)
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.+?) \|", (ROOT / "docs/service.md").read_text(), re.M)
    documented = {name: value.strip("`").replace("none", "") for name, value in rows}
    assert documented == defaults
