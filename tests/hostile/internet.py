"""A small hostile internet, for a network namespace that has nothing but loopback.

Every address on Earth is on this machine here: two of them, and a few names, are the open web; a
connection to any other address or port ends in a net. Nothing can leave the namespace.
"""

import functools
import gzip
import json
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import certifi

PUBLIC, PUBLIC6, CROWDED, SLOW_TLS = (
    *("93.184.215.14", "2606:2800:21f:cb07::1"),
    *("93.184.215.16", "93.184.215.17"),
)
LATE = 1.3
# What tests allow with ALLOWED_IMAGE_HOSTS: a port of an address, and all ports of a name.
LESSON_PORT, LESSON_ADDRESS, LESSON_PORTS = 8088, "127.0.0.2", (80, 8089)
NET_PORTS = [21, 22, 23, 25, 80, 110, 443, 445, 631, 2375, 2379, 3000, 3128, 3306, 4194, 5000]
NET_PORTS += [5432, 5601, 6379, 6443, 7001, 8000, 8080, 8200, 8443, 8500, 8501, 8888, 9000, 9200]
NET_PORTS += [10250, 10255, 11211, 27017, 50051]

# A name and what is under it: addresses, another name (CNAME), addresses that change with each
# query (a tuple), or no answer at all (None).
NAMES: dict[str, list[str] | str | tuple[str, ...] | None] = {
    "good.test": [PUBLIC],
    "six.test": [PUBLIC6],
    "both.test": [PUBLIC, PUBLIC6],
    "alias.test": "good.test",
    "lesson.test": [LESSON_ADDRESS],
    "slow-tls.test": [SLOW_TLS],
    "late.test": [PUBLIC],  # after LATE seconds
    "crowded.test": [CROWDED],
    "crowds.test": [CROWDED] + [f"93.184.216.{n}" for n in range(1, 13)],
    "localhost": ["127.0.0.1", "::1"],
    "loopback.test": ["127.0.0.1"],
    "loopback6.test": ["::1"],
    "zero.test": ["0.0.0.0"],
    "ten.test": ["10.0.0.5"],
    "shared.test": ["100.64.0.1"],
    "private6.test": ["fd00:ec2::254"],
    "site.test": ["fec0::1"],
    "mapped.test": ["::ffff:10.0.0.5"],
    "mapped-public.test": [f"::ffff:{PUBLIC}"],
    "compatible.test": ["::127.0.0.1"],
    "nat64.test": ["64:ff9b::a9fe:a9fe"],
    "6to4.test": ["2002:7f00:1::"],
    "teredo.test": ["2001:0:7f00:1::"],
    "metadata.google.internal": ["169.254.169.254"],
    "instance-data": ["169.254.169.254"],
    "kubernetes.default.svc": ["10.96.0.1"],
    "cluster.local": ["10.96.0.1"],
    "model-server": ["10.0.0.7"],
    "two-private.test": ["10.0.0.5", "192.168.1.1"],
    "mixed.test": [PUBLIC, "10.0.0.5"],
    "mixed-first.test": ["10.0.0.5", PUBLIC],
    "mixed6.test": [PUBLIC, "fd00:ec2::254"],
    "mixed64.test": [PUBLIC6, "127.0.0.1"],
    "cname.test": "ten.test",
    "cname-chain.test": "cname.test",
    "cname-localhost.test": "localhost",
    "cname-metadata.test": "metadata.google.internal",
    "never.test": None,
    "rebind.test": (PUBLIC, "127.0.0.1"),
    "rebind-metadata.test": (PUBLIC, "169.254.169.254"),
    "rebind-late.test": (PUBLIC, PUBLIC, "10.0.0.5"),
    "rebind-back.test": ("127.0.0.1", PUBLIC),
}

queries: Counter[str] = Counter()
visits: list[dict] = []
connections: list[tuple[str, int]] = []
answered: list[str] = []
picture = (Path(__file__).parents[2] / "notebooks/samples/dress.png").read_bytes()


def look_up(name: str, kind: int) -> tuple[list[str], list[str]] | None:
    """The aliases and the addresses behind a name; None where the name is to get no answer."""
    labels = name.lower().rstrip(".").split(".")
    known = next((n for i in range(len(labels)) if (n := ".".join(labels[i:])) in NAMES), "")
    match NAMES.get(known, []):
        case None:
            return None
        case str(target):
            aliases, addresses = look_up(target, kind) or ([], [])
            return [target, *aliases], addresses
        case tuple(turns):
            queries[name] += kind == 1
            return [], [turns[min(queries[name], len(turns)) - 1]] if kind == 1 else []
        case list(addresses):
            return [], [a for a in addresses if (":" in a) == (kind == 28)]
    raise AssertionError


def encode_name(name: str) -> bytes:
    labels = name.rstrip(".").encode().split(b".")
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


class Dns(socketserver.BaseRequestHandler):
    """Answer A (1) and AAAA (28) queries, with no time to live."""

    def handle(self) -> None:
        message, sock = self.request
        labels, at = [], 12
        while length := message[at]:
            labels.append(message[at + 1 : at + 1 + length].decode("latin-1"))
            at += 1 + length
        (kind,) = struct.unpack(">H", message[at + 1 : at + 3])
        if labels[-2:] == ["late", "test"]:
            time.sleep(LATE)
        found = look_up(".".join(labels), kind)
        if found is None:
            return
        records, owner = [], b"\xc0\x0c"
        for alias in found[0]:
            records.append((owner, 5, encode_name(alias)))
            owner = encode_name(alias)
        for address in found[1]:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            records.append((owner, kind, socket.inet_pton(family, address)))
        known = any(".".join(labels[i:]).lower() in NAMES for i in range(len(labels)))
        flags = 0x8180 if known else 0x8183
        reply = message[:2] + struct.pack(">5H", flags, 1, len(records), 0, 0)
        reply += message[12 : at + 5]
        for name, record_kind, data in records:
            reply += name + struct.pack(">HHIH", record_kind, 1, 0, len(data)) + data
        sock.sendto(reply, self.client_address)
        answered.append(".".join(labels))


class Web(socketserver.StreamRequestHandler):
    """A host of pictures, which misbehaves as the first part of the path says."""

    def handle(self) -> None:
        connections.append(self.client_address[:2])
        page = self.answer()
        while page.startswith("kept"):
            page = self.answer(again=True)

    def answer(self, again: bool = False) -> str:
        """Answer a request, if there is one, and return the first part of its path."""
        lines = []
        while (line := self.rfile.readline()) not in (b"\r\n", b"\n", b""):
            lines.append(line.decode("latin-1").strip())
        if not lines:
            return ""
        path = lines[0].split(" ")[1]
        visits.append({"path": path, "headers": lines[1:], "to": self.request.getsockname()[:2]})
        page, _, argument = path.split("?")[0].lstrip("/").partition("/")
        if again and page == "kept-once":
            return "hung up"
        with suppress(OSError):
            for part in ANSWERS.get(page, ANSWERS["missing"])(argument):
                self.wfile.write(part)
        return page


def head(*headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *headers, "", ""]).encode()


def whole(body: bytes, *headers: str, status: str = "200 OK") -> list[bytes]:
    return [head(f"Content-Length: {len(body)}", *headers, status=status), body]


def drip(*start: bytes, content: bytes) -> Iterator[bytes]:
    """Send a byte ten times a second: never silent for long, never done."""
    yield from start
    for byte in content * 1000:
        yield bytes([byte])
        time.sleep(0.1)


def flood(*start: bytes, content: bytes) -> Iterator[bytes]:
    """Send the same for ever, as fast as it is read."""
    yield from start
    while True:
        yield content


def wait() -> Iterator[bytes]:
    time.sleep(300)
    yield b""


def hop(argument: str) -> list[bytes]:
    left = int(argument)
    target = f"/hops/{left - 1}" if left else "/picture.png"
    return whole(b"", f"Location: {target}", status="302 Found")


def redirect(argument: str) -> list[bytes]:
    code, _, target = argument.partition("/")
    return whole(b"", f"Location: {unquote(target)}", status=f"{code} Elsewhere")


KEPT = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(picture) + picture
GZIP = head("Content-Encoding: gzip")
CHUNKED = head("Transfer-Encoding: chunked")
EMPTY_BLOCK = b"\0\0\0\xff\xff"  # deflate: nothing, and not the last
GZIP_START = bytes.fromhex("1f8b0800000000000003")


@functools.cache
def bomb() -> bytes:
    """100 MB in 97 kB. Making it takes half a second, so it is made before anybody waits for it."""
    return gzip.compress(bytes(100_000_000))


ANSWERS = {
    "picture.png": lambda _: whole(picture),
    "gzip": lambda _: whole(gzip.compress(picture), "Content-Encoding: gzip"),
    "chunked": lambda _: [CHUNKED, b"%x\r\n%s\r\n0\r\n\r\n" % (len(picture), picture)],
    "kept": lambda _: [KEPT],
    "kept-once": lambda _: [KEPT],  # and ended when the next request comes
    "kept-slow": lambda _: drip(b"HTTP/1.1 200 OK\r\nX: ", content=b"x"),
    "kept-with-more": lambda _: [KEPT + b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"],
    "hung-up": lambda _: [KEPT],
    "missing": lambda _: whole(b"", status="404 Not Found"),
    "status": lambda code: whole(picture, status=f"{code} Whatever"),
    "redirect": redirect,
    "hops": hop,
    "loop": lambda _: whole(b"", "Location: /loop", status="302 Found"),
    "nowhere": lambda _: whole(b"", status="302 Found"),
    "flooding-redirect": lambda _: flood(
        head("Location: /picture.png", status="302 Found"), content=bytes(65536)
    ),
    "slow-status": lambda _: drip(content=b"HTTP/1.1 200 OKOKOKOK"),
    "slow-header-line": lambda _: drip(b"HTTP/1.1 200 OK\r\nX: ", content=b"x"),
    "slow-headers": lambda _: drip(b"HTTP/1.1 200 OK\r\n", content=b"X: x\r\n"),
    "slow-body": lambda _: drip(head(), content=picture),
    "slow-declared-body": lambda _: drip(head("Content-Length: 100000"), content=picture),
    "slow-chunk-line": lambda _: drip(CHUNKED, content=b"0"),
    "slow-chunk": lambda _: drip(CHUNKED + b"ffff\r\n", content=picture),
    "slow-trailer": lambda _: drip(
        CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(picture), picture), content=b"X: x\r\n"
    ),
    "slow-gzip": lambda _: drip(GZIP + GZIP_START, content=EMPTY_BLOCK),
    "silent": lambda _: wait(),
    "endless-headers": lambda _: flood(b"HTTP/1.1 200 OK\r\n", content=b"X: x\r\n" * 999),
    "endless-header-line": lambda _: flood(b"HTTP/1.1 200 OK\r\nX: ", content=b"x" * 65536),
    "endless-status": lambda _: flood(content=b"HTTP/1.1 200 OK" * 999),
    "endless-continue": lambda _: flood(content=b"HTTP/1.1 100 Continue\r\n\r\n" * 99),
    "endless-body": lambda _: flood(head(), content=bytes(65536)),
    "endless-chunks": lambda _: flood(CHUNKED, content=b"1\r\nx\r\n" * 999),
    "endless-chunk-line": lambda _: flood(CHUNKED, content=b"0" * 65536),
    "endless-trailer": lambda _: flood(CHUNKED + b"0\r\n", content=b"X: x\r\n" * 999),
    "endless-nothing": lambda _: flood(GZIP + GZIP_START, content=EMPTY_BLOCK * 9999),
    "bomb": lambda _: whole(bomb(), "Content-Encoding: gzip"),
    "bomb-in-bomb": lambda _: whole(gzip.compress(bomb()), "Content-Encoding: gzip, gzip"),
    "bomb-deflate": lambda _: whole(bomb()[10:-8], "Content-Encoding: deflate"),
    "many-codings": lambda _: whole(picture, "Content-Encoding: " + "gzip, " * 50 + "gzip"),
    "broken-gzip": lambda _: whole(b"no gzip", "Content-Encoding: gzip"),
    "large": lambda _: whole(bytes(200_001)),
    "huge-declared": lambda _: [head(f"Content-Length: {10**15}"), bytes(99)],
    "huge-chunk": lambda _: [CHUNKED + b"ffffffffffffffffffff\r\n", bytes(99)],
    "cut": lambda _: [head("Content-Length: 1000000"), picture],
    "cut-chunk": lambda _: [CHUNKED + b"ffff\r\n", picture[:99]],
    "no-length": lambda _: whole(picture, "Content-Length: many"),
    "negative-length": lambda _: whole(picture, "Content-Length: -1"),
    "two-lengths": lambda _: whole(picture, "Content-Length: 5"),
    "garbage": lambda _: [b"\xff\0\r\n" * 99],
    "old": lambda _: [picture],
    "nothing": lambda _: [],
    "empty": lambda _: whole(b""),
    "many-headers": lambda _: whole(picture, *(f"X-{n}: x" for n in range(5000))),
    "long-header": lambda _: whole(picture, "X: " + "x" * 100_000),
    "large-headers": lambda _: whole(picture, *["X: " + "x" * 60_000] * 90),
    "page": lambda _: whole(b"<!doctype html><p>no picture", "Content-Type: image/png"),
}


class SlowTls(socketserver.StreamRequestHandler):
    """Begin a TLS handshake and never finish it."""

    def handle(self) -> None:
        with suppress(OSError):
            for part in drip(b"\x16\x03\x03\x40\x00", content=b"\x02"):
                self.wfile.write(part)


class Server(socketserver.ThreadingTCPServer):
    """A server that shares its port with the net, which then gets the other addresses."""

    allow_reuse_address = allow_reuse_port = daemon_threads = True
    request_queue_size = 512
    certificate = ""

    def __init__(self, address: str, port: int, handler: type, certificate: str = ""):
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), handler)
        if certificate:
            import ssl

            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_) -> None:
        pass  # the gateway hangs up on most of these pages, and on a certificate not its own


def set_up_network() -> None:
    """Make all addresses local, and names the business of the Dns class."""
    for command in (
        "link set lo up",
        f"-6 address add {PUBLIC6}/128 dev lo nodad",
        "route add local 0.0.0.0/0 dev lo",
        "-6 route add local ::/0 dev lo",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    folder = Path(sys.argv[1])
    files = {
        "resolv.conf": "nameserver 127.0.0.1\n",
        "nsswitch.conf": "hosts: files dns\n",
        "hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost\n10.0.0.9 this-pod\n",
    }
    for name, content in files.items():
        (folder / name).write_text(content)
        subprocess.run(["mount", "--bind", folder / name, f"/etc/{name}"], check=True)
    if (certificate := folder / "public.pem").exists():
        subprocess.run(["mount", "--bind", certificate, certifi.where()], check=True)


def catch(port: int) -> socket.socket:
    """Listen at a port of every address, IPv4 and IPv6, that no server above listens at."""
    net = socket.socket(socket.AF_INET6)
    net.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    net.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    net.bind(("::", port))
    net.listen(512)
    net.setblocking(False)
    return net


def caught(nets: list[socket.socket]) -> Iterator[tuple[str, int]]:
    """Take every connection out of the nets and say where each of them wanted to go."""
    for net in nets:
        with suppress(BlockingIOError):
            while True:
                connection, _ = net.accept()
                yield connection.getsockname()[:2]
                connection.close()


def take(noted: list) -> list:
    """Return what was noted, and forget it before the answer is out: after that, more may come."""
    taken = noted[:]
    del noted[: len(taken)]
    return taken


def main() -> None:
    """Set everything up, say so, and then answer questions on standard input."""
    bomb()
    set_up_network()
    dns = socketserver.ThreadingUDPServer(("127.0.0.1", 53), Dns)
    threading.Thread(target=dns.serve_forever, daemon=True).start()
    for address in (PUBLIC, PUBLIC6):
        Server(address, 80, Web)
        if len(sys.argv) > 2:
            Server(address, 443, Web, sys.argv[2])
    Server("127.0.0.1", LESSON_PORT, Web)
    for port in LESSON_PORTS:
        Server(LESSON_ADDRESS, port, Web)
    Server(SLOW_TLS, 443, SlowTls)
    crowd = []
    for address in [CROWDED] + [f"93.184.216.{n}" for n in range(1, 13)]:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((address, 80))
        server.listen(0)
        crowd.append(server)
        for _ in range(2):  # with its queue full, the next to come get no answer
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex((address, 80))
            crowd.append(client)
    nets = [catch(port) for port in NET_PORTS]
    print("ready", flush=True)
    for question in sys.stdin:
        match question.strip():
            case "caught":
                print(json.dumps([*caught(nets)]), flush=True)
            case "visits":
                print(json.dumps(take(visits)), flush=True)
            case "connections":
                print(json.dumps(take(connections)), flush=True)
            case "answered":
                print(json.dumps(take(answered)), flush=True)


if __name__ == "__main__":
    main()
