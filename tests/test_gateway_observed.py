"""Who may ask the gateway, how often, and what can be seen of it from outside: headers, log,
metrics. Links carry secrets here, which must not appear anywhere."""

import itertools
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from helpers.basics import ROOT
from helpers.servers import Server, WebHost, serve
from prometheus_client.parser import text_string_to_metric_families

SAMPLE = (ROOT / "notebooks/samples/dress.png").read_bytes()
UPLOAD = {"file": ("sample.png", SAMPLE)}
KEY = "the-key-that-nobody-sees"
SECRET = "sesame-42"
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",
    "connect-src": "'self'",
    "form-action": "'self'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
}


class PictureHost(WebHost):
    """A host of one picture, and of pages that fail in several ways."""

    def do_GET(self):
        page, _, query = self.path.partition("?")
        status, headers, body = 200, {}, SAMPLE
        match page:
            case "/missing":
                status = 404
            case "/page":
                body = b"<!doctype html>"
            case "/away":
                status, headers = 302, {"Location": f"http://169.254.169.254/?{query}"}
            case "/silent":
                self.rfile.read(1)
                return
        self.answer(status, body, **headers)


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    """The address of a running PictureHost."""
    with serve(PictureHost) as address:
        yield address


@pytest.fixture(scope="module")
def gateway(start_gateway, model_server, pictures, closed) -> Server:
    return start_gateway(
        model_server.grpc,
        GATEWAY_API_KEY=KEY,
        ALLOWED_IMAGE_HOSTS=f"{pictures}, {closed}",
        IMAGE_TIMEOUT_SECONDS="2",
        GUNICORN_CMD_ARGS="--log-level debug",
    )


def ask(gateway: Server, method: str, path: str, key: str = KEY, **options: Any):
    headers = {"Authorization": f"Bearer {key}"} | options.pop("headers", {})
    return requests.request(method, gateway.http + path, timeout=30, headers=headers, **options)


def cause(response: requests.Response) -> str:
    """The cause of a problem; the answer must be one."""
    assert response.headers["Content-Type"] == "application/problem+json", response.text
    assert response.json()["status"] == response.status_code
    return response.json()["type"].removeprefix("tag:clothing-gateway,2026:")


def log_lines(gateway: Server) -> list[dict]:
    """The access log: every line that starts as JSON does must be JSON."""
    lines = gateway.log.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


# Access ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"]
)
def test_a_wrong_key(gateway, given):
    headers = {"Authorization": given} if given else {"Authorization": None}
    for arguments in ({"files": UPLOAD}, {"json": {"url": "http://127.0.0.1/"}}, {"data": "{"}):
        response = ask(gateway, "POST", "/predict", headers=headers, **arguments)
        assert (response.status_code, cause(response)) == (401, "wrong-key")
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_the_right_key(gateway):
    assert ask(gateway, "POST", "/predict", files=UPLOAD).status_code == 200


def test_the_key_in_the_form(gateway):
    def post(**fields: str) -> requests.Response:
        return requests.post(gateway.http, files=UPLOAD, data=fields, timeout=30)

    assert post(key=KEY).status_code == 200
    for response in (post(), post(key=""), post(key=f"{KEY} "), post(Authorization=KEY)):
        assert response.status_code == 401
        assert response.headers["Content-Type"].startswith("text/html")
        assert "data:image/" not in response.text
    assert 'name="key"' in requests.get(gateway.http, timeout=30).text


@pytest.mark.parametrize("path", ["/", "/livez", "/readyz", "/static/style.css"])
def test_what_needs_no_key(gateway, path):
    assert requests.get(gateway.http + path, timeout=30).status_code == 200


def test_no_key_is_asked_for_unless_there_is_one(start_gateway, model_server):
    gateway = start_gateway(model_server.grpc)
    assert requests.post(f"{gateway.http}/predict", files=UPLOAD, timeout=30).status_code == 200
    assert 'name="key"' not in requests.get(gateway.http, timeout=30).text
    gateway.stop()


def test_rate_limit(start_gateway, model_server):
    gateway = start_gateway(model_server.grpc, RATE_LIMIT="3 per hour")

    def post(path: str = "/predict", client: str = "127.0.0.1") -> requests.Response:
        with requests.Session() as session:
            session.mount("http://", From(client))
            return session.post(gateway.http + path, files=UPLOAD, timeout=30)

    allowed = [post(), post("/"), post()]  # both ways to send a picture count together
    assert [response.status_code for response in allowed] == [200] * 3
    assert not any("Retry-After" in response.headers for response in allowed)
    refused = post()
    assert (refused.status_code, cause(refused)) == (429, "too-many-requests")
    assert 3000 < int(refused.headers["Retry-After"]) < 3700
    assert "3 per hour" in refused.json()["detail"]
    assert refused.headers["X-Content-Type-Options"] == "nosniff"
    page = post("/")
    assert (page.status_code, page.headers["Content-Type"][:9]) == (429, "text/html")
    assert "3 per hour" in page.text
    assert post(client="127.0.0.2").status_code == 200, "another client has a limit of its own"
    for path in ("/", "/livez", "/readyz"):
        for _ in range(5):
            assert requests.get(gateway.http + path, timeout=30).status_code == 200
    gateway.stop()


class From(requests.adapters.HTTPAdapter):
    """Connects from this address."""

    def __init__(self, address: str):
        self.address = address
        super().__init__()

    def init_poolmanager(self, *args, **options):
        super().init_poolmanager(*args, **options, source_address=(self.address, 0))


# Headers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "options"),
    [
        ("GET", "/", 200, {}),
        ("POST", "/", 400, {"data": {"url": "http://10.0.0.1/", "key": KEY}}),
        ("POST", "/predict", 200, {"files": UPLOAD}),
        ("POST", "/predict", 400, {"data": "{"}),
        ("POST", "/predict", 401, {"files": UPLOAD, "key": "wrong"}),
        ("POST", "/predict", 413, {"data": bytes(11_000_000)}),
        ("POST", "/predict", 415, {"files": {"file": b"no picture"}}),
        ("GET", "/predict", 405, {}),
        ("OPTIONS", "/predict", 200, {}),
        ("HEAD", "/", 200, {}),
        ("GET", "/nothing", 404, {}),
        ("GET", "/static/nothing", 404, {}),
        ("GET", "/static/style.css", 200, {}),
        ("GET", "/static/script.js", 200, {}),
        ("GET", "/samples/0.jpg", 200, {}),
        ("GET", "/livez", 200, {}),
        ("GET", "/readyz", 200, {}),
        ("GET", "/metrics", 404, {}),
    ],
)
def test_headers_of_every_answer(gateway, method, path, status, options):
    response = ask(gateway, method, path, **options)
    assert response.status_code == status, response.text
    policy = response.headers["Content-Security-Policy"]
    assert dict(part.strip().split(" ", 1) for part in policy.split(";")) == POLICY
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"])
    assert "Set-Cookie" not in response.headers


@pytest.mark.parametrize(
    "content",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: one\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: magic\r\n\r\n",
    ],
)
def test_what_is_not_http(gateway, content):
    """gunicorn answers this, and the gateway never sees it."""
    head, _, body = send_raw(gateway, content).decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 400 BAD REQUEST\r\n")
    assert "Content-Type: application/problem+json" in head
    assert "Content-Security-Policy: default-src 'none'" in head
    assert json.loads(body)["type"] == "tag:clothing-gateway,2026:bad-request"
    line = log_lines(gateway)[-1]
    assert f"X-Request-ID: {line['id']}" in head
    assert (line["status"], line["cause"]) == (400, "bad-request")


def test_ids_of_callers(gateway):
    def answered_id(given: str | bytes) -> str:
        response = ask(gateway, "GET", "/livez", headers={"X-Request-ID": given})
        assert response.status_code == 200
        return response.headers["X-Request-ID"]

    for good in ("a", "Request_1.2-3", "x" * 64):
        assert answered_id(good) == good
        assert log_lines(gateway)[-1]["id"] == good
    for given in (
        "x" * 65,
        "a b",
        'a","status":500,"x":"',
        "<script>",
        "ä".encode(),
        "a/../b",
        "%0a",
    ):
        assert re.fullmatch("[0-9a-f]{32}", answered_id(given)), given
    assert answered_id("a") != answered_id("a b") != answered_id("a b")


@pytest.mark.parametrize(
    "header",
    [
        b"X-Request-ID: a\r\n\tb",
        b"X-Request-ID: a\rSet-Cookie: b=c",
        b"X-Request-ID: a\0b",
        b"X-Request-ID: a\nSet-Cookie: b=c",
        b"X-Request-ID : a",
    ],
)
def test_headers_cannot_be_injected(gateway, header):
    before = len(log_lines(gateway))
    answer = send_raw(gateway, b"GET /livez HTTP/1.1\r\nHost: a\r\n" + header + b"\r\n\r\n")
    head = answer.partition(b"\r\n\r\n")[0]
    assert b"Set-Cookie" not in head
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 "))
    for line in log_lines(gateway)[before:]:
        assert re.fullmatch(r"[\w.-]{1,64}", line["id"])


def send_raw(gateway: Server, content: bytes) -> bytes:
    """Send bytes as they are, and return all that comes until the gateway closes."""
    port = int(gateway.http.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(content)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return answer


# The log -----------------------------------------------------------------------------------------


def test_one_line_for_each_request(gateway, pictures):
    before = len(log_lines(gateway))
    requests_made: list[tuple[str, str, int, str | None, dict[str, Any]]] = [
        ("GET", "/livez", 200, None, {}),
        ("GET", f"/nothing?token={SECRET}", 404, "not-found", {}),
        ("POST", f"/predict?token={SECRET}", 200, None, {"files": UPLOAD}),
        ("POST", "/predict", 200, None, {"json": {"url": f"http://{pictures}/?t={SECRET}"}}),
        ("POST", "/predict", 415, "not-a-picture", {"files": {"file": b"no"}}),
        ("POST", "/predict", 401, "wrong-key", {"key": "wrong"}),
        ("GET", "/predict", 405, "method-not-allowed", {}),
        ("GET", "/a\nb", 404, "not-found", {}),
    ]
    answers = [ask(gateway, m, path, **options) for m, path, _, _, options in requests_made]
    lines = log_lines(gateway)[before:]
    assert len(lines) == len(answers)
    for line, answer, (method, path, status, why, _) in zip(
        lines, answers, requests_made, strict=True
    ):
        assert line["id"] == answer.headers["X-Request-ID"]
        assert line["status"] == answer.status_code == status
        assert (line["method"], line["path"]) == (method, path.partition("?")[0])
        assert (line["cause"], line["client"]) == (why, "127.0.0.1")
        assert abs(line["time"] - time.time()) < 3600
        assert line["seconds"]["all"] > 0
    assert {"decode", "predict"} <= lines[2]["seconds"].keys()
    assert {"fetch", "decode", "predict"} <= lines[3]["seconds"].keys()
    assert len({line["id"] for line in lines}) == len(lines)


def test_lines_stay_whole_when_many_are_written(gateway):
    before = len(log_lines(gateway))
    with ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(lambda _: ask(gateway, "GET", "/livez"), range(200))]
    lines = log_lines(gateway)[before:]
    assert sorted(line["id"] for line in lines) == sorted(
        answer.headers["X-Request-ID"] for answer in answers
    )


def test_secrets_of_links_are_not_logged(gateway, pictures, closed):
    links = {
        f"http://{pictures}/picture.png": None,
        f"http://{pictures}/missing": "link-failed",
        f"http://{pictures}/page": "not-a-picture",
        f"http://{pictures}/away": "link-blocked",
        f"http://{pictures}/silent": "link-timeout",
        f"http://{closed}/": "link-failed",
        "http://169.254.169.254/": "link-blocked",
        f"http://somebody:{SECRET}@192.0.2.1/": "link-blocked",
        f"http://[{SECRET}/": "link-malformed",
        f"ftp://192.0.2.1/{SECRET}": "link-blocked",
    }
    before = len(log_lines(gateway))
    for link, why in links.items():
        url = f"{link}?token={SECRET}&X-Amz-Signature={SECRET}#{SECRET}"
        for body in ({"url": url}, {"urls": [url, url]}):
            response = ask(gateway, "POST", "/predict", json=body)
            assert response.status_code == 200 if why is None else cause(response) == why, url
        form = {"url": url, "key": KEY}
        page = requests.post(gateway.http, data=form, timeout=30)
        assert (page.status_code == 200) == (why is None)
    assert len(log_lines(gateway)) == before + 3 * len(links)
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: "
    asked = json.dumps({"url": f"http://{pictures}/?{SECRET}"}).encode()
    for broken in (
        b"0\r\n\r\n" + asked,
        b"0\r\n\r\n" + asked + b"\r\n\r\n",
        b"9000\r\n\r\n" + asked,
    ):
        send_raw(gateway, head + broken)
    send_raw(gateway, b"GET /?token=" + SECRET.encode() + b" HTTP/1.1\r\nHost:")
    text = gateway.log.read_text()
    assert SECRET not in text
    assert KEY not in text


def test_models_that_are_gone_are_logged_for_us_alone(start_gateway, closed):
    gateway = start_gateway(closed)
    response = requests.post(f"{gateway.http}/predict", files=UPLOAD, timeout=30)
    assert (response.status_code, cause(response)) == (503, "model-unavailable")
    assert closed.partition(":")[2] not in response.text
    assert f"{response.headers['X-Request-ID']}: the model server: " in gateway.log.read_text()
    gateway.stop()


# Metrics -----------------------------------------------------------------------------------------


def samples(gateway: Server) -> dict[tuple, float]:
    """All metrics, as Prometheus' own parser reads them."""
    response = requests.get(gateway.metrics, timeout=30)
    assert response.headers["Content-Type"].count("charset") == 1
    assert response.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_by_stage_and_cause(gateway, pictures):
    before = samples(gateway)
    ask(gateway, "POST", "/predict", json={"urls": [f"http://{pictures}/"] * 3})
    ask(gateway, "POST", "/predict", files=UPLOAD)
    ask(gateway, "POST", "/predict", json={"url": f"http://{pictures}/missing"})
    ask(gateway, "POST", "/predict", json={"url": "http://10.0.0.1/"})
    ask(gateway, "POST", "/predict", data="{")
    ask(gateway, "POST", "/predict", key="wrong")
    ask(gateway, "GET", "/nothing")
    after = samples(gateway)
    assert after[("gateway_in_flight",)] == 0
    assert after[("gateway_model_version",)] == 1
    changed = {
        key: value - before.get(key, 0)
        for key, value in after.items()
        if value != before.get(key, 0) and key[0].endswith(("_total", "_count"))
    }
    expected = {
        ("gateway_seconds_count", ("stage", s)): n for s, n in [("fetch", 3), ("decode", 2)]
    }
    expected |= {
        ("gateway_seconds_count", ("stage", s)): n for s, n in [("predict", 2), ("all", 4)]
    }
    for why in ("link-failed", "link-blocked", "malformed-request", "wrong-key", "not-found"):
        expected[("gateway_problems_total", ("cause", why))] = 1
    assert changed == expected
    for stage in ("fetch", "decode", "predict", "all"):
        label = ("stage", stage)
        assert (
            after[("gateway_seconds_bucket", ("le", "+Inf"), label)]
            == (after[("gateway_seconds_count", label)])
        )
        assert after[("gateway_seconds_sum", label)] > 0


def test_strangers_cannot_make_new_metrics(gateway):
    ask(gateway, "GET", "/nothing")
    before = samples(gateway).keys()
    for number in range(20):
        ask(gateway, "GET", f"/nothing-{number}")
        ask(gateway, f"METHOD{number}", "/livez")
    new = samples(gateway).keys() - before
    assert len({key for key in new if not key[0].endswith("_created")}) <= 1, new


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "//metrics", "/%6detrics", "/readyz"])
def test_nothing_on_the_public_port_tells_metrics(gateway, path):
    """Not even whoever has the key, or asks as if it were at the other port."""
    port = gateway.metrics.split(":")[2].removesuffix("/metrics")
    assert ("gateway_in_flight",) in samples(gateway)
    for method, key in itertools.product(("GET", "HEAD", "POST", "OPTIONS"), (KEY, "wrong")):
        headers = {"Host": f"127.0.0.1:{port}", "X-Forwarded-Port": port}
        response = ask(gateway, method, path, key, headers=headers)
        assert "gateway_" not in response.text and "X-Request-ID" in response.headers
        assert response.status_code == 404 or "metrics" not in path


def test_the_other_port_tells_metrics_and_nothing_else(gateway):
    address = gateway.metrics.removesuffix("/metrics")
    for path in ("/", "/livez", "/readyz", "/predict", "/openapi.json"):
        assert requests.get(address + path, timeout=30).text.startswith("# HELP gateway_")
    headers = {"Authorization": f"Bearer {KEY}"}
    for path in ("/", "/predict"):
        refused = requests.post(address + path, files=UPLOAD, headers=headers, timeout=30)
        assert refused.status_code == 405 and "top_class" not in refused.text


def test_without_a_port_of_their_own_metrics_are_nowhere(start_gateway, model_server):
    gateway = start_gateway(model_server.grpc, METRICS_PORT="0")
    with pytest.raises(requests.ConnectionError):
        requests.get(gateway.metrics, timeout=30)
    assert requests.get(f"{gateway.http}/metrics", timeout=30).status_code == 404
    gateway.stop()


# Odd requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [900, 7_000, 2_000_000])
@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"url":', "}")])
def test_deeply_nested_json(gateway, start, end, depth):
    for body in (start * depth, start * depth + "1" + end * depth):
        response = ask(gateway, "POST", "/predict", data=body[:9_000_000])
        allowed = [(400, "malformed-request")]
        if depth > 7_000:
            allowed.append((413, "request-entity-too-large"))
        assert (response.status_code, cause(response)) in allowed
    assert ask(gateway, "GET", "/livez").status_code == 200


def test_json_is_small(gateway):
    response = ask(gateway, "POST", "/predict", data="[" + "[]," * 30_000 + "[]]")
    assert (response.status_code, cause(response)) == (413, "request-entity-too-large")
