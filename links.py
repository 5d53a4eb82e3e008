"""Follow the links of strangers: to public addresses only, within a time and a number of bytes."""

import functools
import http.client
import os
import re
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import requests
import urllib3
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from requests_hardened import ip_filter
from requests_hardened.ip_filter_adapter import IPFilterAdapter
from urllib3.exceptions import (
    ConnectTimeoutError,
    DecodeError,
    IncompleteRead,
    NameResolutionError,
    NewConnectionError,
)
from urllib3.util.ssl_match_hostname import CertificateError
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from web import IMAGE_MAX_BYTES, LINKS_MAX_BYTES, MAX_BATCHES, MAX_LINKS, File, Problem

env = os.environ.get
IMAGE_TIMEOUT_SECONDS = float(env("IMAGE_TIMEOUT_SECONDS", "5"))
IMAGE_CONTACT = env("IMAGE_CONTACT", "")
ALLOWED_IMAGE_HOSTS = set(env("ALLOWED_IMAGE_HOSTS", "").lower().replace(",", " ").split())

MAX_REDIRECTS, MAX_HEAD_BYTES = 3, 65536
# Hosts refuse programs that do not say who they are and what they read.
HEADERS = {
    "User-Agent": "clothing-gateway/1.0" + (f" ({IMAGE_CONTACT})" if IMAGE_CONTACT else ""),
    "Accept": "image/webp,image/jpeg,image/png,image/*;q=0.9,*/*;q=0.5",
}
UNFRIENDLY = (401, 403, 406, 429, 503)  # what hosts answer to programs, though not to people
# What hosts do instead of sending a picture; the first that fits is told.
FAILURES: list[tuple[Any, str]] = [
    ((socket.gaierror, NameResolutionError), "No such host was found"),
    (
        (ssl.SSLCertVerificationError, CertificateError),
        "The host's certificate is not its own, or is out of date",
    ),
    ((ssl.SSLError, urllib3.exceptions.SSLError), "The host does not speak https"),
    ((NewConnectionError, ConnectTimeoutError), "The host does not answer"),
    (DecodeError, "The host's answer is not packed as it says"),
    (http.client.RemoteDisconnected, "The host hung up without an answer"),
    (
        (IncompleteRead, http.client.IncompleteRead, ConnectionResetError),
        "The host hung up before its answer was whole",
    ),
    (http.client.HTTPException, "The host's answer is not HTTP"),
]
IDLE_SECONDS, MAX_IDLE = 1.0, 16  # how long connections are kept, and how many to an address
# All public IPv6 addresses are in 2000::/3. One outside it may be an IPv4 address in disguise. The
# IPv4 address below looks public, but on Azure's virtual machines it leads to Azure's own services.
PUBLIC_IPV6 = ip_network("2000::/3")
NOT_PUBLIC = tuple(map(ip_network, ("::/3", "4000::/2", "8000::/1", "168.63.129.16")))
resolvers = ThreadPoolExecutor(512)  # a lookup ends after some seconds, found or not
fetch_pool = ThreadPoolExecutor(MAX_BATCHES * MAX_LINKS)  # no link waits for another's slow host
thread = threading.local()  # its `budget` is that of the request whose link it follows


class Budget:
    """The time and the bytes that one request may spend on all of its links together."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds
        self.bytes_left = LINKS_MAX_BYTES

    def seconds_left(self) -> float:
        """Return the seconds that are left; raise TimeoutError when none are."""
        if (seconds := self.deadline - time.monotonic()) > 0:
            return seconds
        raise TimeoutError


def look_up(host: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that looks up a host's name, in a thread of its own.

    The system's lookup is the only thing here without a deadline. Where it takes too long, its
    thread is left behind.
    """
    try:
        ip_address(host)
    except ValueError:
        return resolvers.submit(function, *args).result(thread.budget.seconds_left())
    return function(*args)


class DeadlineSocket(socket.socket):
    """A socket that waits for a byte no longer than its thread's budget has time."""

    used = 0.0

    def recv_into(self, *args: Any) -> int:
        """Receive bytes; raise TimeoutError when the time is over, however many keep coming."""
        self.settimeout(thread.budget.seconds_left())
        count = super().recv_into(*args)
        self.used = time.monotonic()
        return count


class TLSDeadlineSocket(DeadlineSocket, ssl.SSLSocket):
    """The same for https; the ssl module makes them."""


class BoundedResponse(http.client.HTTPResponse):
    """A host's answer whose headers are short: in memory they take six times their bytes."""

    def _read_status(self) -> tuple[str, int, str]:
        """Read the first line; have every 1xx status but 101 skipped, as 100 is."""
        version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, 100 if 101 < status < 200 else status, reason

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

    response_class = BoundedResponse

    def _new_conn(self):
        self.timeout = thread.budget.seconds_left()
        sock = DeadlineSocket(fileno=look_up(self.host, super()._new_conn).detach())
        try:
            sock.settimeout(thread.budget.seconds_left())
        except TimeoutError:
            sock.close()
            raise
        return sock

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


class GuardedAdapter(IPFilterAdapter):
    """Connects to no private address, except to one of an allowed host."""

    def __init__(self, is_https: bool, is_allowed: bool):
        super().__init__(is_https)
        self.is_allowed = is_allowed
        # A host may end a kept connection just as the request arrives: try again, as browsers do.
        self.max_retries = urllib3.Retry(
            1, connect=0, redirect=0, status=0, other=0, respect_retry_after_header=False
        )

    def init_poolmanager(self, connections, maxsize, block=False, **kwargs):
        """Prepare for connections of the kinds above; loading the certificates takes 14 ms."""
        context = urllib3.util.ssl_.create_urllib3_context()
        context.load_verify_locations(DEFAULT_CA_BUNDLE_PATH)
        context.sslsocket_class = TLSDeadlineSocket
        super().init_poolmanager(connections, MAX_IDLE, block, ssl_context=context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": Pool, "https": TLSPool}

    def cert_verify(self, conn, url, verify, cert):
        """Leave it to the context, instead of loading all certificates for each connection."""

    def build_connection_pool_key_attributes(self, request, verify, cert=None):
        """Look the host up once, check the address, and let requests connect to that one only."""
        if self.is_allowed:
            adapter = requests.adapters.HTTPAdapter
            return adapter.build_connection_pool_key_attributes(self, request, verify, cert)
        check = super().build_connection_pool_key_attributes
        host, tls = look_up(urlsplit(request.url).hostname, check, request, verify, cert)
        address = ip_address(host["host"].strip("[]"))
        if any(address in network for network in NOT_PUBLIC):
            raise ip_filter.InvalidIPAddress(address)
        return host, tls


get_adapter = functools.cache(GuardedAdapter)


def open_link(url: str) -> requests.Response:
    """Connect, unless the address is private, and return the host's answer, its body unread."""
    prepared = requests.Request("GET", url, HEADERS).prepare()
    parts = urlsplit(prepared.url or "")
    host, is_https = parts.hostname or "", parts.scheme == "https"
    port = (443 if is_https else 80) if parts.port is None else parts.port
    allowed = bool({host, f"{host}:{port}"} & ALLOWED_IMAGE_HOSTS)
    usual = parts.scheme in ("http", "https") and (allowed or port in (80, 443))
    if not usual or parts.username is not None:
        sentence = "A link must be http or https, to port 80 or 443, without a password"
        raise Problem(400, "link-blocked", f"{sentence}: {url:.200}")
    plain = re.match("https?://[^/?#]", prepared.url or "")  # else requests has left it as it was
    if not plain or "%" in host or host.endswith("."):  # other ways to write a host
        raise ValueError(host)
    if ":" in host and not allowed and ip_address(host) not in PUBLIC_IPV6:
        raise ip_filter.InvalidIPAddress(host)
    return get_adapter(is_https, allowed).send(prepared, stream=True)


def read_body(response: requests.Response, budget: Budget) -> bytes:
    """Return the unpacked body, counting its bytes as they pass."""
    if (code := response.status_code) not in (200, 203):
        sentence = f"The picture's host answered {code}: {response.url:.200}"
        if code in UNFRIENDLY:
            sentence += " Perhaps it refuses programs: save the picture, and send the file."
        raise Problem(502, "link-failed", sentence)
    body = bytearray()
    while chunk := response.raw.read(1 << 18, decode_content=True):
        body += chunk
        budget.bytes_left -= len(chunk)
        if len(body) > IMAGE_MAX_BYTES or budget.bytes_left < 0:
            raise RequestEntityTooLarge
    return bytes(body)


def location_of(response: requests.Response) -> str:
    """Return where a redirect leads; hosts write other letters as UTF-8, or in a code page."""
    location = response.headers["Location"].strip().encode("latin-1")
    try:
        return location.decode()
    except UnicodeDecodeError:
        return quote(location, safe=string.printable)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Return an error and those that led to it; libraries keep these in several places."""
    while error:
        yield error
        inner = [each for each in error.args if isinstance(each, Exception)]
        error = getattr(error, "reason", None) or (inner[-1] if inner else error.__cause__)


def explain(error: Exception) -> str:
    """Say what a host has done."""
    errors = [each for each in chain(error) if isinstance(each, Exception)]
    for kinds, sentence in FAILURES:
        if any(isinstance(each, kinds) for each in errors):
            return sentence
    return "The host's answer cannot be read"


def fetch(url: str, budget: Budget) -> bytes:
    """Return what a link and its redirects lead to, or raise Problem."""
    start = url = url.strip()  # as browsers do
    thread.budget = budget
    try:
        for _ in range(1 + MAX_REDIRECTS):
            with open_link(url) as response:
                if not response.is_redirect:
                    return read_body(response, budget)
                url = urljoin(url, location_of(response))
    except ip_filter.InvalidIPAddress as error:
        sentence = "A link must not lead to a private address"
        raise Problem(400, "link-blocked", f"{sentence}: {url:.200}") from error
    except requests.exceptions.InvalidHeader as error:
        raise Problem(502, "link-failed", f"The host's answer is not HTTP: {url:.200}") from error
    except ValueError as error:
        sentence = "A link must look like https://host/picture.jpg"
        raise Problem(400, "link-malformed", f"{sentence}: {url:.200}") from error
    except (TimeoutError, requests.RequestException, urllib3.exceptions.HTTPError) as error:
        if time.monotonic() > budget.deadline:
            raise Problem(504, "link-timeout", f"The host is too slow: {url:.200}") from error
        raise Problem(502, "link-failed", f"{explain(error)}: {url:.200}") from error
    raise Problem(502, "link-failed", f"More than {MAX_REDIRECTS} redirects: {start:.200}")


def fetch_all(urls: list[str]) -> list[File]:
    """Return what each link leads to, or its problem; raise the problem of a single one.

    All are fetched at once, within IMAGE_TIMEOUT_SECONDS.
    """
    budget = Budget(IMAGE_TIMEOUT_SECONDS)
    if len(urls) == 1:  # waking another thread would cost as much as fetching
        return [fetch(urls[0], budget)]

    def fetch_one(url: str) -> File:
        try:
            return fetch(url, budget)
        except HTTPException as error:
            return error.with_traceback(None)  # which would hold what has been read

    return [*fetch_pool.map(fetch_one, urls)]
