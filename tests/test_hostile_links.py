"""Links that strangers send: where they must not lead, and what the hosts behind them must not do.

The gateway runs in a network namespace (hostile/namespace.py) that nothing can leave, on an
internet of the test's own (hostile/internet.py): two open addresses, names of all kinds, and a net
that catches every connection to any other address or port. Nothing may ever be caught.
"""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from helpers.basics import eventually
from helpers.servers import Server
from hostile.internet import (
    LESSON_ADDRESS,
    LESSON_PORT,
    LESSON_PORTS,
    PUBLIC,
    PUBLIC6,
    SLOW_TLS,
)
from hostile.namespace import Answer, Namespace

IMAGE_TIMEOUT, MAX_BYTES, BOUND = 1, 200_000, 20
BLOCKED, REFUSED = {"link-blocked"}, {"link-blocked", "link-malformed"}
UNKNOWN = REFUSED | {"link-failed"}  # no address in any notation, and no name that exists
ESTABLISHED = "01"  # as /proc/net/tcp has it


@pytest.fixture(scope="module")
def gateway(namespace: Namespace, launch: Callable[..., Server], tiny_model: Path) -> Server:
    """A gateway inside, in an environment full of traps."""
    (namespace.folder / ".netrc").write_text("default login somebody password secret\n")
    proxies = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    return namespace.start_gateway(
        launch,
        tiny_model,
        IMAGE_TIMEOUT_SECONDS=str(IMAGE_TIMEOUT),
        IMAGE_MAX_BYTES=str(MAX_BYTES),
        ALLOWED_IMAGE_HOSTS=f"lesson.test, 127.0.0.1:{LESSON_PORT}",
        HOME=str(namespace.folder),
        **dict.fromkeys(proxies, "http://10.9.9.9:3128"),
    )


@pytest.fixture(scope="module")
def worker(gateway: Server) -> psutil.Process:
    return psutil.Process(gateway.process.pid).children()[0]


@pytest.fixture
def predict(namespace: Namespace, gateway: Server) -> Iterator[Callable[..., Answer]]:
    """Send links to the gateway; in the end its process lives and nothing has been caught."""

    def send(*urls: str) -> Answer:
        body = {"url": urls[0]} if len(urls) == 1 else {"urls": urls}
        answer = namespace.send("POST", "/predict", body)
        assert namespace.ask("caught") == [], f"the gateway went where {urls} lead"
        return answer

    namespace.ask("visits")
    yield send
    assert gateway.process.poll() is None
    assert namespace.ask("caught") == []


def assert_refused(answer: Answer, causes: set[str] = REFUSED) -> None:
    assert answer.cause in causes, answer
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.status == (400 if answer.cause in REFUSED else 502)


def read_words(name: str) -> list[str]:
    """The words of a file in hostile/, without its comments."""
    lines = (Path(__file__).parent / "hostile" / name).read_text(encoding="utf-8").splitlines()
    return " ".join(line for line in lines if not line.startswith("## ")).split()


def count_connections(worker: psutil.Process) -> int:
    """The number of connections to the hosts of pictures, in the worker's own namespace."""
    lines = Path(f"/proc/{worker.pid}/net/tcp").read_text().splitlines()[1:]
    hosts = {f"{socket.inet_aton(host)[::-1].hex().upper()}" for host in (PUBLIC, SLOW_TLS)}
    remotes = [line.split()[2].split(":")[0] for line in lines if line.split()[3] == ESTABLISHED]
    return sum(remote in hosts for remote in remotes)


def redirect(url: str, code: int = 302, host: str = "good.test") -> str:
    return f"http://{host}/redirect/{code}/{quote(url, safe='')}"


# The way works -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://good.test/picture.png",
            "http://good.test:80/picture.png",
            "http://GOOD.test/gzip",
        ),
        *(f"http://{PUBLIC}/picture.png", f"http://[{PUBLIC6}]/picture.png"),
        *(
            "http://six.test/picture.png",
            "http://both.test/picture.png",
            "HTTP://alias.test/chunked",
        ),
        *(
            "http://good.test/picture.png#@127.0.0.1/",
            "http://good.test/picture.png?u=http://[::1]/",
        ),
        *("http://good.test/hops/2", "http://good.test/status/200", "  http://good.test/gzip"),
        *(redirect("/picture.png", code) for code in (301, 302, 303, 307, 308)),
        *(redirect("//six.test/picture.png"), redirect("../../../picture.png")),
        redirect(redirect("http://alias.test/picture.png")),
        "http://good.test/flooding-redirect",
    ],
)
def test_good_links(namespace, predict, url):
    answer = predict(url)
    assert answer.status == 200, answer
    assert "top_class" in answer.body
    for visit in namespace.ask("visits"):
        names = {header.partition(":")[0].lower() for header in visit["headers"]}
        assert names.isdisjoint({"authorization", "cookie", "proxy-authorization", "referer"})


def test_https(namespace, predict):
    if not namespace.certificate:
        pytest.skip("the openssl command, which makes the certificate, is not installed")
    assert predict("https://good.test/picture.png").status == 200
    assert predict(redirect("https://good.test/picture.png")).status == 200
    for url in ("https://alias.test/picture.png", f"https://{PUBLIC}/picture.png"):
        assert "certificate is not its own" in predict(url).body["detail"]


def test_names_that_are_none(predict):
    for url in ("http://nothing.test/", "http://sub.no-such-domain/", redirect("http://no.test/")):
        assert "No such host was found" in predict(url).body["detail"]


def count_new_connections(namespace: Namespace, predict: Callable[..., Answer], *urls: str) -> int:
    """Predict one link after the other, each without a problem; return the connections made."""
    namespace.ask("connections")
    for url in urls:
        answer = predict(url)
        assert answer.status == 200, answer
    return len(namespace.ask("connections"))


def test_connections_are_kept_for_a_moment(namespace, predict):
    kept = "http://six.test/kept"
    # A busy machine may take longer than they are kept, but not each time.
    assert count_new_connections(namespace, predict, *[kept] * 6) < 6
    time.sleep(1.1)  # longer than they are kept
    assert count_new_connections(namespace, predict, kept) == 1


@pytest.mark.parametrize("page", ["hung-up", "picture.png"])
def test_connections_that_are_not_kept(namespace, predict, page):
    """The host hangs up after its answer, and says so or not."""
    links = [f"http://six.test/{page}"] * 4
    assert count_new_connections(namespace, predict, *links) >= 3  # one may be there already


def test_connections_that_end_as_they_are_used(namespace, predict):
    links = ["http://six.test/kept-once"] * 4
    count_new_connections(namespace, predict, *links)


def test_hosts_that_say_more_than_they_were_asked(namespace, predict):
    """What they add is no answer to the next request."""
    links = ["http://six.test/kept-with-more", "http://six.test/kept"] * 3
    assert count_new_connections(namespace, predict, *links) <= 6


def test_kept_connections_are_no_way_around_a_check(namespace, predict):
    """Not for another name with the same address, nor for hosts that were slow in coming."""
    assert predict("http://six.test/kept").status == 200
    assert predict("http://six.test/kept-slow").cause == "link-timeout"
    if namespace.certificate:
        assert (
            count_new_connections(namespace, predict, *["https://good.test/picture.png"] * 2) == 2
        )
        assert predict("https://alias.test/picture.png").cause == "link-failed"


# Where no link may lead --------------------------------------------------------------------------

PRIVATE_HOSTS = read_words("private-hosts.txt")


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_private_hosts_are_blocked(predict, host):
    plain = host.isascii() and "%" not in host and not host.endswith(".")
    for url in (f"http://{host}/", f"https://{host}/dress.png", f"http://{host}:80"):
        assert_refused(predict(url), BLOCKED if plain else REFUSED)
    if host.isascii():
        assert_refused(predict(redirect(f"http://{host}/latest/meta-data/")))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target",
    [
        *(
            "http://127.0.0.1/",
            "https://[::1]/",
            "//169.254.169.254/",
            "//localhost/",
            "\\\\ten.test",
        ),
        *("http://2130706433/", "HTTP://0x7f.1/", "http://good.test@10.0.0.5/", "//a:b@ten.test/"),
        *("http://good.test:8080/", "//good.test:22/", "file:///etc/passwd", "ftp://10.0.0.5/"),
        *("gopher://10.0.0.5:6379/_x", "data:image/png;base64,AAAA", "javascript:alert(1)"),
    ],
)
def test_redirects_are_checked_like_links(predict, code, target):
    answer = predict(redirect(target, code))
    # A backslash may also be taken for a part of the path, on the same host.
    assert_refused(answer, UNKNOWN if "\\" in target else REFUSED)


def test_redirects_to_private_hosts_after_good_ones(namespace, predict):
    assert_refused(predict(redirect(redirect("http://six.test/redirect/307/http:%2F%2F10.5%2F"))))
    assert_refused(predict(redirect(redirect(redirect("http://cname.test/")))))
    assert_refused(predict(f"http://127.0.0.1:{LESSON_PORT}/redirect/302/http:%2F%2F127.0.0.1%2F"))


OTHER_LINKS = read_words("other-links.txt")
OTHER_LINKS += [
    "",
    " ",
    "http:\\\\127.0.0.1\\",
    "http://good.test\n@127.0.0.1/",
    "http://127.0.0.1\t/",
    "http://127.0.\t0.1/",
    "ht\ntp://127.0.0.1/",
    "\thttp://127.0.0.1/",
    "http://\n127.0.0.1/",
    "http://127.0.0.1\r\n/",
    "http://127.0.0.1\x00.good.test/",
    "http://good.test\x00@127.0.0.1/",
    "\x00http://ten.test/",
    "http://good.test\u200b@ten.test/",
    "http://127.0.0.1 .good.test/",
    "http://a b/",
    "http://\ud800.test/",
    "http://127.0.0.1/" + "a" * 60_000,
]


@pytest.mark.parametrize("url", OTHER_LINKS)
def test_other_links_are_refused(predict, url):
    assert_refused(predict(url))


NO_HOSTS = read_words("no-hosts.txt")
NO_HOSTS += ["a" * 64 + ".test", "a." * 200 + "test"]


@pytest.mark.parametrize("host", NO_HOSTS)
def test_hosts_that_are_none(predict, host):
    assert_refused(predict(f"http://{host}/"), UNKNOWN)


@pytest.mark.parametrize(
    "name",
    ["mixed.test", "mixed-first.test", "mixed6.test", "mixed64.test", "mapped-public.test"],
)
def test_names_with_a_private_address_among_others(predict, name):
    """Refused, or only the public one is connected to (::ffff:1.2.3.4 is 1.2.3.4 by then)."""
    for _ in range(4):
        answer = predict(f"http://{name}/picture.png")
        assert answer.status == 200 or answer.cause == "link-blocked", answer


@pytest.mark.parametrize(
    "name", ["rebind.test", "rebind-metadata.test", "rebind-late.test", "rebind-back.test"]
)
@pytest.mark.parametrize("first", range(3))
def test_names_that_change_their_address(predict, name, first):
    url = f"http://try{first}.{name}/picture.png"
    for _ in range(4):
        answer = predict(redirect(url) if first == 1 else url)
        assert answer.status == 200 or answer.cause == "link-blocked", answer
    assert_refused(
        predict(f"http://again{first}.{name}/redirect/302/%2Fredirect%2F302%2F%252F"), UNKNOWN
    )


def test_allowed_hosts_are_the_only_exception(namespace, predict):
    for url in (
        f"http://127.0.0.1:{LESSON_PORT}/picture.png",
        f"http://2130706433:{LESSON_PORT}/picture.png",
        *(f"http://lesson.test:{port}/picture.png" for port in LESSON_PORTS),
        "http://LESSON.test/picture.png",
        redirect(f"http://127.0.0.1:{LESSON_PORT}/picture.png"),
        f"http://127.0.0.1:{LESSON_PORT}/redirect/302/%2Fpicture.png",
    ):
        answer = predict(url)
        other_notation = "2130706433" in url
        assert answer.status == 200 or (other_notation and answer.cause == "link-blocked"), answer
    for url in (
        *(
            "http://127.0.0.1/",
            "http://127.0.0.1:8500/",
            "https://127.0.0.1/",
            "http://127.0.0.1:22/",
        ),
        *(f"http://{LESSON_ADDRESS}/picture.png", f"http://{LESSON_ADDRESS}:{LESSON_PORT}/"),
        *(
            f"http://127.1.2.3:{LESSON_PORT}/",
            f"http://[::1]:{LESSON_PORT}/",
            "http://sub.lesson.test/",
        ),
        *(
            "http://lesson.test.ten.test/",
            "http://lesson.test@ten.test/",
            "http://loopback.test:8088/",
        ),
        *(
            "http://user:password@lesson.test/",
            "ftp://lesson.test/",
            "file://lesson.test/etc/passwd",
        ),
    ):
        assert_refused(predict(url))
        assert_refused(predict(redirect(url)))
        assert_refused(predict(redirect(url, host="lesson.test")))
        assert_refused(predict(redirect(url, host=f"127.0.0.1:{LESSON_PORT}")))


def test_one_blocked_link_among_good_ones(predict):
    good = ["http://good.test/picture.png"] * 8
    answers = predict(*good, "http://169.254.169.254/", *good[:7]).body
    blocked = answers.pop(8)
    assert (blocked["status"], blocked["type"].rpartition(":")[2]) == (400, "link-blocked")
    assert all("top_class" in answer for answer in answers)


def test_links_in_the_form(namespace, predict):
    for url in (
        "http://127.0.0.1/",
        "http://ten.test/",
        "file:///etc/passwd",
        redirect("http://10.5/"),
    ):
        body = f"url={quote(url, safe='')}".encode()
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = namespace.send("POST", "/", body, **headers)
        assert answer.status == 400, answer
        assert b"<html" in answer.body.lower()
        assert namespace.ask("caught") == []


# What the hosts behind them must not do ----------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "causes"),
    [
        *[(f"hops/{n}", {"link-failed"}) for n in (4, 5, 99)],
        *[(page, {"link-failed"}) for page in ("loop", "nowhere", "missing", "nothing", "garbage")],
        *[(f"status/{n}", {"link-failed"}) for n in (204, 206, 304, 400, 401, 404, 500, 599, 999)],
        *[(page, {"request-entity-too-large"}) for page in ("large", "endless-body", "bomb")],
        ("huge-declared", {"request-entity-too-large", "link-failed"}),
        ("endless-chunks", {"request-entity-too-large", "link-timeout"}),
        ("bomb-in-bomb", {"request-entity-too-large", "link-failed"}),
        ("bomb-deflate", {"request-entity-too-large", "link-failed"}),
        ("huge-chunk", {"request-entity-too-large", "link-failed", "not-a-picture"}),
        ("many-codings", {"link-failed", "not-a-picture"}),
        *[(page, {"link-failed"}) for page in ("broken-gzip", "cut", "cut-chunk", "old")],
        *[(page, {"link-failed"}) for page in ("endless-headers", "endless-header-line")],
        *[(page, {"link-failed"}) for page in ("many-headers", "long-header", "large-headers")],
        *[(page, {"link-failed"}) for page in ("endless-status", "endless-continue")],
        *[
            (page, {"link-failed", "not-a-picture"})
            for page in ("endless-chunk-line", "two-lengths")
        ],
        *[(page, {"not-a-picture"}) for page in ("empty", "page")],
        *[(page, {"link-timeout"}) for page in ("silent", "slow-status", "slow-headers")],
        *[(page, {"link-timeout"}) for page in ("slow-header-line", "slow-body", "slow-chunk")],
        *[(page, {"link-timeout"}) for page in ("slow-declared-body", "slow-chunk-line")],
        *[(page, {"link-timeout"}) for page in ("slow-gzip", "endless-nothing")],
        *[(page, {"link-timeout", "link-failed"}) for page in ("endless-trailer",)],
        # A picture that is whole although something around it is not: either is right.
        *[(page, {"", "link-timeout", "link-failed"}) for page in ("slow-trailer", "no-length")],
        ("negative-length", {"", "link-failed", "not-a-picture"}),
    ],
)
def test_hosts_that_misbehave(predict, page, causes):
    start = time.monotonic()
    answer = predict(f"http://good.test/{page}")
    assert answer.cause in causes, answer
    assert time.monotonic() - start < BOUND


@pytest.mark.parametrize(
    "url", ["https://slow-tls.test/", "http://crowded.test/", "http://crowds.test/"]
)
def test_hosts_that_do_not_let_anyone_in(predict, url):
    assert predict(url).cause == "link-timeout"
    assert predict(redirect(url)).cause == "link-timeout"


def test_names_that_are_never_answered(predict):
    assert predict("http://never.test/").cause in {"link-timeout", "link-failed"}


@pytest.mark.parametrize(
    "page",
    [
        *("slow-headers", "slow-header-line", "slow-body", "slow-chunk-line", "slow-trailer"),
        *("slow-gzip", "endless-continue", "endless-nothing", "silent", "https", "dns"),
    ],
)
def test_slow_hosts_do_not_keep_good_links_waiting(predict, worker, page):
    links = [f"http://host{n}.good.test/{page}" for n in range(64)]
    if page == "https":
        links = [f"https://host{n}.slow-tls.test/" for n in range(64)]
    if page == "dns":
        links = [f"http://host{n}.never.test/" for n in range(64)]
    with ThreadPoolExecutor(4) as clients:
        answers = [*clients.map(lambda n: predict(*links[n : n + 16]), range(0, 64, 16))]
    assert {answer.cause for answer in answers} <= {"link-timeout", "link-failed"}
    eventually(lambda: count_connections(worker) == 0, "no slow host is listened to", BOUND)
    # A second for sixteen links may be too little on a busy machine, but not again and again.
    good = ["http://good.test/picture.png"] * 16
    eventually(lambda: predict(*good).status == 200, "good links are fetched", BOUND)


def test_hosts_whose_names_come_too_late(namespace, predict):
    """Nobody connects to them any more."""
    namespace.ask("connections")
    namespace.ask("answered")
    links = [f"http://h{n}.late.test/slow-body" for n in range(16)]
    assert predict(*links).cause == "link-timeout"
    names: set[str] = set()

    def all_answered() -> bool:
        names.update(namespace.ask("answered"))
        return names >= {f"h{n}.late.test" for n in range(16)}

    eventually(all_answered, "the names are known, too late", BOUND)
    assert predict("http://good.test/picture.png").status == 200
    assert len(namespace.ask("connections")) == 1


def test_memory_is_bounded(predict, worker):
    """Not even for a moment did anything that hosts have sent so far take much."""
    status = Path(f"/proc/{worker.pid}/status").read_text()
    assert int(status.split("VmHWM:")[1].split()[0]) // 1024 < 400


def test_corpus_is_large_enough():
    assert len({*PRIVATE_HOSTS, *OTHER_LINKS, *NO_HOSTS}) >= 150
