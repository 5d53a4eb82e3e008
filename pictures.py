"""Pictures of strangers: from a link or a file to RGB pixels, or a Problem that says why not."""

import functools
import http.client
import logging
import os
import re
import shutil
import socket
import ssl
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np
import requests
import urllib3
from multipart import MultipartError, MultipartParser, ParserLimitReached
from PIL import Image, ImageOps
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from requests_hardened import ip_filter
from requests_hardened.ip_filter_adapter import IPFilterAdapter
from werkzeug.datastructures import FileStorage, MultiDict
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.formparser import FormDataParser

env = os.environ.get
IMAGE_MAX_BYTES = int(env("IMAGE_MAX_BYTES", "10000000"))
IMAGE_MAX_PIXELS = int(env("IMAGE_MAX_PIXELS", "25000000"))
IMAGE_TIMEOUT_SECONDS = float(env("IMAGE_TIMEOUT_SECONDS", "5"))
ALLOWED_IMAGE_HOSTS = set(env("ALLOWED_IMAGE_HOSTS", "").lower().replace(",", " ").split())

MAX_REDIRECTS, MAX_PARTS, MAX_READS, MAX_HEAD_BYTES = 3, 500, 500_000, 65536
IDLE_SECONDS, MAX_IDLE = 1.0, 16  # how long connections are kept, and how many to an address
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FORM_MEMORY_BYTES = 500_000  # larger parts of a form wait on the disk
REQUEST_MAX_BYTES = 4 * IMAGE_MAX_BYTES  # behind all links of a request
TOO_BIG = f"A picture may have {IMAGE_MAX_BYTES:,} bytes and {IMAGE_MAX_PIXELS:,} pixels"
TOO_BIG += f", those of several links {REQUEST_MAX_BYTES:,} bytes together."
OTHER_FORMATS = {
    "HEIC": rb"....ftyp(hei|mif)",
    "JPEG XL": rb"\xff\x0a|....jxl ",
    "ICO": rb"\x00\x00\x01\x00",
    "PSD": rb"8bps",
    "PDF": rb"%pdf",
    "SVG": rb".*<svg",
    "HTML": rb".*<html",
}
decoder = threading.Lock()  # held by the one picture whose pixels, up to 0.5 GB, are in memory
Image.MAX_IMAGE_PIXELS = None  # decode() has a limit of its own


class Problem(HTTPException):
    """An HTTP error with a cause that programs can tell apart and a sentence for people."""

    def __init__(self, status: int, cause: str, sentence: str):
        super().__init__(sentence)
        self.code, self.cause = status, cause


@contextmanager
def which(number: int, count: int) -> Iterator[None]:
    """Have a Problem say which of several pictures it is about."""
    try:
        yield
    except HTTPException as error:
        if count > 1:
            error.add_note(f"Picture {number} of {count}")
        raise


class Meter:
    """Counts the bytes of a form against those that all forms on their way may have together."""

    left = shutil.disk_usage(tempfile.gettempdir()).free * 3 // 4  # where large parts wait
    lock = threading.Lock()

    def __init__(self, stream=None, taken: int = 0):
        self.stream, self.taken = stream, taken

    def read(self, size: int) -> bytes:
        """Return the next bytes; raise Problem (503), and leave the room to others, if it is full.

        Had all kept their room until they have noticed, none would get through.
        """
        data = self.stream.read(size)
        with Meter.lock:
            if len(data) <= Meter.left:
                Meter.left -= len(data)
                self.taken += len(data)
                return data
            Meter.left += self.taken
            self.taken = 0
        raise Problem(503, "too-busy", "Too many uploads at a time; try again soon.")

    def split(self, size: int) -> "Meter":
        """Return a meter of its own for some of the bytes."""
        self.taken -= size
        return Meter(taken=size)

    def close(self) -> None:
        """Leave the room to others."""
        with Meter.lock:
            Meter.left += self.taken
            self.taken = 0


class Upload(FileStorage):
    """A file of a form, with the room that it takes."""

    meter: Meter

    def close(self) -> None:
        """Close the file and leave the room to others."""
        super().close()
        self.meter.close()


class FormParser(FormDataParser):
    """Reads forms with `multipart`, in a tenth of the time that Werkzeug's own parser takes."""

    def parse(self, stream, mimetype, content_length, options=None):
        """Return the stream, the fields and the files; nothing of a form that is malformed."""
        if mimetype != "multipart/form-data":
            return super().parse(stream, mimetype, content_length, options)
        fields: MultiDict[str, str] = MultiDict()
        files: MultiDict[str, FileStorage] = MultiDict()
        boundary, meter = (options or {}).get("boundary", ""), Meter(stream)
        with ExitStack() as stack:
            stack.callback(meter.close)
            try:
                for part in MultipartParser(meter, boundary, spool_limit=FORM_MEMORY_BYTES):
                    if part.filename:
                        files.add(part.name, file := Upload(part.file, part.filename, part.name))
                        file.meter = meter.split(part.size)
                        stack.callback(file.close)
                    else:
                        fields.add(part.name, part.raw.decode(errors="replace"))
            except ParserLimitReached as error:
                raise RequestEntityTooLarge from error
            except MultipartError:
                return stream, MultiDict(), MultiDict()
            stack.pop_all()  # whoever has read the files closes them
        meter.close()
        return stream, fields, files


class CountingFile(BytesIO):
    """A file whose reader gives up when it comes in very many, very small parts."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes; raise ValueError after MAX_READS reads."""
        self.reads += 1
        if self.reads > MAX_READS:
            raise ValueError("too many parts")
        return super().read(size)


def has_many(file: bytes, part: bytes) -> bool:
    """Say whether a part is more than MAX_PARTS times in a file; that its start is not is quick."""
    values = np.frombuffer(file, np.uint8)
    starts = np.count_nonzero((values[:-1] == part[0]) & (values[1:] == part[1]))
    return bool(starts > MAX_PARTS) and file.count(part) > MAX_PARTS


def decode(file: bytes, largest: tuple[int, int], exactly: bool) -> Image.Image:
    """Return what a file shows as RGB, upright, on white and shrunk; raise what Pillow raises."""
    # A file of bytes copied again and again, of 1 MB unpacked from each KB, or of passes over all
    # pixels would take minutes; a picture has a few of each.
    is_jpeg = file.startswith(b"\xff\xd8")
    parts = (b"\xff\xda", b"Exif\0\0") if is_jpeg else (b"iCCP", b"Exif\0\0")
    if any(has_many(file, part) for part in parts):
        raise ValueError("too many parts")
    image: Image.Image = Image.open(CountingFile(file), formats=IMAGE_FORMATS)
    if image.width * image.height > IMAGE_MAX_PIXELS:
        raise RequestEntityTooLarge
    with suppress(SyntaxError, ValueError, TypeError, KeyError):  # EXIF data may be anything
        ImageOps.exif_transpose(image, in_place=True)
    deep = image.mode[0] in "IF"  # more than eight bits a value, of which Pillow keeps the lowest
    top = 65535 if image.mode.startswith("I;16") else image.getextrema()[1] if deep else 255
    # Every pixel is taken or left as a whole, as keras-image-helper does it, so the rest can be
    # done to the few that are taken: it needs several times their memory.
    factor = max(1, image.width / largest[0], image.height / largest[1])
    size = largest if exactly else (int(image.width / factor) or 1, int(image.height / factor) or 1)
    image = image.resize(size, Image.Resampling.NEAREST)
    if deep:
        values = np.nan_to_num(np.asarray(image, np.float32)) / max(top, 1e-9)
        image = Image.fromarray((255 * np.clip(values, 0, 1)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        image = white
    return image.convert("RGB")


def read_picture(
    file: bytes, size: tuple[int, int], deadline: float, exactly: bool = True
) -> Image.Image:
    """Return a picture as RGB, upright and on white; raise Problem (413, 415, or 503).

    It has this (width, height), or at most this and its own proportions. One picture is decoded
    at a time; others wait for it until the deadline, in seconds of `time.monotonic()`.
    """
    if len(file) > IMAGE_MAX_BYTES:
        raise RequestEntityTooLarge
    left = deadline - time.monotonic()
    if left < 0 or not decoder.acquire(timeout=left):
        raise Problem(503, "too-busy", "Too many large pictures at a time; try again soon.")
    try:
        return decode(file, size, exactly)
    except RequestEntityTooLarge:
        raise
    except Exception:  # broken files make Pillow raise many kinds of error, which hold its pixels
        start = file[:256].lower()
    finally:
        decoder.release()
    names = (name for name, magic in OTHER_FORMATS.items() if re.match(magic, start, re.S))
    sentence = f"{next(names, 'This file')} cannot be read as a picture"
    raise Problem(415, "not-a-picture", f"{sentence}; {', '.join(IMAGE_FORMATS)} can.")


def make_preview(file: bytes, deadline: float) -> str:
    """Return a picture, at most 320 × 320, as a data URI: the website loads from nobody else."""
    image = read_picture(file, (640, 640), deadline, exactly=False)
    image.thumbnail((320, 320))
    image.save(stream := BytesIO(), "WEBP")
    return f"data:image/webp;base64,{b64encode(stream.getvalue()).decode()}"


# All public IPv6 addresses are in 2000::/3; what is elsewhere may be IPv4 in disguise.
PUBLIC_IPV6, AZURE_METADATA = ip_network("2000::/3"), ip_network("168.63.129.16")
NOT_PUBLIC = (*map(ip_network, ("::/3", "4000::/2", "8000::/1")), AZURE_METADATA)
ip_filter.EXTRA_BLOCKED_NET_RANGES += NOT_PUBLIC
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")  # glibc would wait 10 s for a name
resolvers = ThreadPoolExecutor(512)  # a lookup ends after some seconds, be it in vain
logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings show links


class Errand:
    """What one request may spend on its links, in all threads that follow them: time and bytes."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds
        self.bytes_left = REQUEST_MAX_BYTES

    def seconds_left(self) -> float:
        """Return the seconds that are left; raise TimeoutError when none are."""
        if (seconds := self.deadline - time.monotonic()) > 0:
            return seconds
        raise TimeoutError


thread = threading.local()  # its `errand` is what a thread is about


def look_up(host: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call what looks a host's name up, in a thread of its own: only that may miss a deadline."""
    try:
        ip_address(host)
    except ValueError:
        return resolvers.submit(function, *args).result(thread.errand.seconds_left())
    return function(*args)


class Line(socket.socket):
    """A socket that waits for no byte longer than the errand of its thread takes."""

    used = 0.0

    def recv_into(self, *args: Any) -> int:
        """Receive bytes; raise TimeoutError when the time is over, however many keep coming."""
        self.settimeout(thread.errand.seconds_left())
        count = super().recv_into(*args)
        self.used = time.monotonic()
        return count


class TLSLine(Line, ssl.SSLSocket):
    """The same for https; the ssl module makes them."""


class Answer(http.client.HTTPResponse):
    """A host's answer with headers that are short: parsed, they take six times their bytes."""

    def begin(self) -> None:
        """Read status and headers, of MAX_HEAD_BYTES at most."""
        stream, left = self.fp, MAX_HEAD_BYTES

        def readline(size: int | None = -1) -> bytes:
            nonlocal left
            line = type(stream).readline(stream, size)
            left -= len(line)
            if left < 0:
                raise http.client.LineTooLong("headers")
            return line

        stream.readline = readline  # type: ignore[method-assign]
        try:
            super().begin()
        finally:
            del stream.readline


class Connection(urllib3.connection.HTTPConnection):
    """A connection to the host of a picture; the next request may use it, if it comes at once."""

    response_class = Answer

    def _new_conn(self):
        self.timeout = thread.errand.seconds_left()
        line = Line(fileno=look_up(self.host, super()._new_conn).detach())
        try:
            line.settimeout(thread.errand.seconds_left())
        except TimeoutError:
            line.close()
            raise
        return line

    @property
    def is_connected(self):
        """Say whether it can still be used: few hosts hang up in the first second."""
        used = getattr(self.sock, "used", 0)
        return super().is_connected and time.monotonic() - used < IDLE_SECONDS


class TLSConnection(Connection, urllib3.connection.HTTPSConnection):
    """The same for https."""


class Pool(urllib3.HTTPConnectionPool):
    """The connections to one address."""

    ConnectionCls = Connection


class TLSPool(urllib3.HTTPSConnectionPool):
    """The same for https."""

    ConnectionCls = TLSConnection


class Guard(IPFilterAdapter):
    """Connects to no private address, except to one of an allowed host."""

    def __init__(self, is_https: bool, is_allowed: bool):
        super().__init__(is_https)
        self.is_allowed = is_allowed
        # Once more where a host ends a kept connection as the request arrives, as browsers do.
        self.max_retries = urllib3.Retry(
            1, connect=0, redirect=0, status=0, other=0, respect_retry_after_header=False
        )

    def init_poolmanager(self, connections, maxsize, block=False, **kwargs):
        """Prepare for connections of the kinds above; to load the certificates takes 14 ms."""
        context = urllib3.util.ssl_.create_urllib3_context()
        context.load_verify_locations(DEFAULT_CA_BUNDLE_PATH)
        context.sslsocket_class = TLSLine
        super().init_poolmanager(connections, MAX_IDLE, block, ssl_context=context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": Pool, "https": TLSPool}

    def cert_verify(self, conn, url, verify, cert):
        """Leave it to the context, instead of loading all certificates for each connection."""

    def build_connection_pool_key_attributes(self, request, verify, cert=None):
        """Look the host up once, check the address, and have requests connect to just that."""
        if self.is_allowed:
            adapter = requests.adapters.HTTPAdapter
            return adapter.build_connection_pool_key_attributes(self, request, verify, cert)
        check = super().build_connection_pool_key_attributes
        return look_up(urlsplit(request.url).hostname, check, request, verify, cert)


get_guard = functools.cache(Guard)


def open_link(url: str) -> requests.Response:
    """Connect, unless the address is private, and return the host's answer, its body unread."""
    prepared = requests.Request("GET", url, {"User-Agent": "clothing-gateway"}).prepare()
    parts = urlsplit(prepared.url or "")
    host, is_https = parts.hostname or "", parts.scheme == "https"
    port = (443 if is_https else 80) if parts.port is None else parts.port
    allowed = bool({host, f"{host}:{port}"} & ALLOWED_IMAGE_HOSTS)
    usual = parts.scheme in ("http", "https") and (allowed or port in (80, 443))
    if not usual or parts.username is not None:
        sentence = "A link must be http or https, to port 80 or 443, without a password"
        raise Problem(400, "link-blocked", f"{sentence}: {url:.200}")
    plain = re.match("https?://[^/?#]", prepared.url or "")  # else requests took it as it was
    if not plain or "%" in host or host.endswith("."):  # other ways to write a host
        raise ValueError(host)
    if ":" in host and not allowed and ip_address(host) not in PUBLIC_IPV6:
        raise ip_filter.InvalidIPAddress(host)
    return get_guard(is_https, allowed).send(prepared, stream=True)


def read_body(response: requests.Response, errand: Errand) -> bytes:
    """Return the unpacked body, counting its bytes as they pass."""
    if response.status_code != 200:
        sentence = f"The picture's host answered {response.status_code}: {response.url:.200}"
        raise Problem(502, "link-failed", sentence)
    body = bytearray()
    while chunk := response.raw.read(1 << 18, decode_content=True):
        body += chunk
        errand.bytes_left -= len(chunk)
        if len(body) > IMAGE_MAX_BYTES or errand.bytes_left < 0:
            raise RequestEntityTooLarge
    return bytes(body)


def fetch(url: str, errand: Errand) -> bytes:
    """Return what a link and its redirects lead to, or raise Problem."""
    start, thread.errand = url, errand
    try:
        for _ in range(1 + MAX_REDIRECTS):
            with open_link(url) as response:
                if not response.is_redirect:
                    return read_body(response, errand)
                url = urljoin(url, response.headers["Location"])
    except ip_filter.InvalidIPAddress as error:
        sentence = "A link must not lead to a private address"
        raise Problem(400, "link-blocked", f"{sentence}: {url:.200}") from error
    except requests.exceptions.InvalidHeader as error:
        raise Problem(502, "link-failed", f"The host's answer is not HTTP: {url:.200}") from error
    except ValueError as error:
        sentence = "A link must look like https://host/picture.jpg"
        raise Problem(400, "link-malformed", f"{sentence}: {url:.200}") from error
    except (TimeoutError, requests.RequestException, urllib3.exceptions.HTTPError) as error:
        if time.monotonic() > errand.deadline:
            raise Problem(504, "link-timeout", f"The host is too slow: {url:.200}") from error
        raise Problem(502, "link-failed", f"The host does not answer: {url:.200}") from error
    raise Problem(502, "link-failed", f"More than {MAX_REDIRECTS} redirects: {start:.200}")


def fetch_all(urls: list[str], fetchers: Executor) -> list[bytes]:
    """Return what the links lead to, all fetched at once, within IMAGE_TIMEOUT_SECONDS."""
    errand = Errand(IMAGE_TIMEOUT_SECONDS)
    if len(urls) == 1:  # to wake another thread would cost as much as to fetch
        return [fetch(urls[0], errand)]

    def fetch_one(number: int, url: str) -> bytes:
        with which(number, len(urls)):
            return fetch(url, errand)

    jobs = [fetchers.submit(fetch_one, number, url) for number, url in enumerate(urls, 1)]
    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
    if failed := [job for job in done if job.exception()]:
        errand.deadline = 0  # for the others
        wait(jobs)
    return [job.result() for job in failed or jobs]
