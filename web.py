"""What every answer of the gateway has: an id, a line in the log, safe headers, or a problem.

Also here: the forms that come in, the key and the rate limit, the route `/openapi.json`, and times
and counts for Prometheus, which worker.py shows at a port of their own.
"""

import errno
import hmac
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from tempfile import SpooledTemporaryFile, gettempdir
from typing import Any

import flask
import grpc
import prometheus_client as prometheus
from flask import Blueprint, Flask, Response, current_app, g, render_template, request
from flask_limiter import Limiter
from flask_limiter.util import get_remote_address
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser
from werkzeug.datastructures import FileStorage, MultiDict
from werkzeug.exceptions import BadRequest, HTTPException, NotFound, RequestEntityTooLarge
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header

from description import ROOT, Description

env = os.environ.get
GATEWAY_API_KEY = env("GATEWAY_API_KEY", "")
RATE_LIMIT = env("RATE_LIMIT", "")
IMAGE_MAX_BYTES = int(env("IMAGE_MAX_BYTES", "10000000"))
IMAGE_MAX_PIXELS = int(env("IMAGE_MAX_PIXELS", "25000000"))
MAX_IN_FLIGHT = int(env("MAX_IN_FLIGHT", "32"))

MAX_LINKS = 16
MAX_BATCHES = max(1, MAX_IN_FLIGHT // 4)  # requests with several links, which bring the most bytes
USAGE = (
    f'Send {{"url": link}}, {{"urls": [up to {MAX_LINKS} links]}}, a form with one file, '
    "or a picture itself as image/jpeg."
)
PICTURE_TYPES = ("image/", "application/octet-stream")  # what a picture may call itself
LINKS_MAX_BYTES = 4 * IMAGE_MAX_BYTES  # of all pictures behind the links of one request
FORM_MAX_BYTES = IMAGE_MAX_BYTES + 65536  # the picture, and the form around it
FORM_MEMORY_BYTES = 500_000  # a larger part of a form waits in a file
FORM_MAX_PARTS = 128
JSON_MAX_BYTES = 65536  # nested lists take 30 times as much memory once they are parsed
TOO_BIG = (
    f"A picture may have {IMAGE_MAX_BYTES:,} bytes and {IMAGE_MAX_PIXELS:,} pixels, "
    f"those of several links {LINKS_MAX_BYTES:,} bytes together."
)
TOO_MANY_UPLOADS = "Too many uploads at a time; try again soon."
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

blueprint = Blueprint("web", __name__)
limiter = Limiter(get_remote_address, storage_uri="memory://")
stopping = threading.Event()  # set when the process has been asked to end
request_slots = threading.BoundedSemaphore(MAX_IN_FLIGHT)
batch_slots = threading.BoundedSemaphore(MAX_BATCHES)
access_log = logging.getLogger("access")
access_log.addHandler(logging.StreamHandler(sys.stdout))
access_log.setLevel(logging.INFO)

registry = prometheus.CollectorRegistry()
PROBLEMS = prometheus.Counter("gateway_problems", "Problems", ["cause"], registry=registry)
IN_FLIGHT = prometheus.Gauge("gateway_in_flight", "Predictions in progress", registry=registry)
SECONDS = prometheus.Histogram("gateway_seconds", "Time taken", ["stage"], registry=registry)
MODEL_VERSION = prometheus.Gauge("gateway_model_version", "Version of the model", registry=registry)


File = bytes | HTTPException  # what should be a picture, or the problem of getting it

# --- Problems ------------------------------------------------------------------------------------


class Problem(HTTPException):
    """An HTTP error with a cause that programs can tell apart and a sentence for people."""

    def __init__(self, status: int, cause: str, sentence: str):
        super().__init__(sentence)
        self.code, self.cause = status, cause


def explain(error: HTTPException) -> str:
    """Return the sentence for people: what is wrong, and what to do about it."""
    sentences = {413: TOO_BIG, 429: f"More requests than {RATE_LIMIT}; wait a little."}
    return str(sentences.get(error.code or 0, error.description))


def problem_of(error: grpc.RpcError) -> Problem:
    """Return what clients are told when the model server fails; the log gets its own words."""
    current_app.logger.warning("%s: the model server: %s %s", g.id, error.code(), error.details())
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return Problem(504, "model-timeout", "The model server is too slow; try again soon.")
    sentence = f"The model server gives no answer ({error.code().name}); try again soon."
    if error.code() == grpc.StatusCode.NOT_FOUND:
        wanted, described = current_app.config["MODEL_NAME"], current_app.config["MODEL"].name
        sentence = (
            f"The model server has no model named {wanted}; the description is of {described}."
        )
    return Problem(503, "model-unavailable", sentence)


def describe_problem(error: HTTPException) -> dict:
    """Count an error, and return its problem (RFC 9457)."""
    g.cause = getattr(error, "cause", error.name.lower().replace(" ", "-"))
    PROBLEMS.labels(g.cause).inc()
    kind, title = f"tag:clothing-gateway,2026:{g.cause}", g.cause.replace("-", " ").capitalize()
    return {"type": kind, "title": title, "status": error.code, "detail": explain(error)}


def fill_in(answers: list[dict], files: list[File]) -> list[dict]:
    """Return an answer for each file that holds a picture, and a problem for each other file."""
    left = iter(answers)
    return [next(left) if isinstance(file, bytes) else describe_problem(file) for file in files]


@blueprint.app_errorhandler(HTTPException)
def answer_problem(error: HTTPException) -> Response:
    """Answer with a problem, be it ours, Flask's own or a mistake in the code (500)."""
    body = describe_problem(error)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "2"}}.get(error.code or 0)
    response = Response(json.dumps(body), error.code, headers, "application/problem+json")
    response.allow.update(getattr(error, "valid_methods", None) or [])
    if error.code == 429 and limiter.current_limit:
        response.headers["Retry-After"] = str(limiter.current_limit.reset_at - int(time.time()))
    return response


@blueprint.app_errorhandler(grpc.RpcError)
def answer_rpc_error(error: grpc.RpcError) -> Response:
    """Answer when the model server did not."""
    return answer_problem(problem_of(error))


# --- Around every request ------------------------------------------------------------------------


def is_upload() -> bool:
    """Say whether the body claims to be a form in parts, or a picture itself."""
    return request.mimetype.startswith(("multipart/form-data", *PICTURE_TYPES))


@blueprint.before_app_request
def begin() -> None:
    """Give the request an id (its caller's, if that is a plain one), and start its clock."""
    given = request.headers.get("X-Request-ID", "")
    g.id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
    g.start, g.seconds, g.cause = time.perf_counter(), {}, None
    if not is_upload():
        request.max_content_length = JSON_MAX_BYTES


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Take the time of a part of the work, for the answer, the log and Prometheus."""
    with SECONDS.labels(name).time():
        start = time.perf_counter()
        yield
        g.seconds[name] = g.seconds.get(name, 0) + time.perf_counter() - start


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """Return times in whole microseconds."""
    return {name: round(value, 6) for name, value in seconds.items()}


@blueprint.after_app_request
def finish(response: Response) -> Response:
    """Write one line to the log, without the query, which may hold somebody's secret."""
    response.headers.update(HEADERS | {"X-Request-ID": g.id})
    seconds = {"all": time.perf_counter() - g.start} | g.seconds
    line = {"time": time.time(), "id": g.id, "client": request.remote_addr, "cause": g.cause}
    line |= {"method": request.method, "path": request.path, "status": response.status_code}
    access_log.info(json.dumps(line | {"seconds": rounded(seconds)}))
    return response


def limit_rate(function: Callable) -> Callable:
    """Count calls against RATE_LIMIT; without one, the limiter is not even asked."""
    limit = limiter.shared_limit(lambda: RATE_LIMIT, "pictures")
    return limit(function) if RATE_LIMIT else function


@limit_rate
def check_caller(given: bytes) -> None:
    """Raise Problem (401) for a wrong key, if one is set, and 429 if calls come too often."""
    if GATEWAY_API_KEY and not hmac.compare_digest(given, f"Bearer {GATEWAY_API_KEY}".encode()):
        raise Problem(401, "wrong-key", "No key or a wrong one; send `Authorization: Bearer KEY`.")


@contextmanager
def admit(is_batch: bool) -> Iterator[None]:
    """Hold a place among the requests in progress; raise Problem (503) if none is free."""
    with ExitStack() as stack:
        stack.enter_context(SECONDS.labels("all").time())
        for slots in (request_slots, batch_slots) if is_batch else (request_slots,):
            if not slots.acquire(blocking=False):
                raise Problem(503, "too-busy", "Too many pictures at a time; try again soon.")
            stack.callback(slots.release)
        stack.enter_context(IN_FLIGHT.track_inprogress())
        yield


@blueprint.get("/samples/<int:number>.jpg")
def sample(number: int) -> Response:
    """Answer with a picture of the model's description; 404 where there are not so many."""
    samples = current_app.config["MODEL"].samples
    if number >= len(samples):
        raise NotFound
    return Response(samples[number].jpeg, content_type="image/jpeg")


@blueprint.get("/openapi.json")
def openapi() -> Response:
    """Answer with the description of the API for programs, OpenAPI 3.1."""
    return current_app.send_static_file("openapi.json")


# --- Bodies --------------------------------------------------------------------------------------


class UploadBudget:
    """One form's share of the bytes that all forms in progress may take together."""

    # Large parts wait on this disk, which in a container is memory.
    left = shutil.disk_usage(gettempdir()).free * 3 // 4
    lock = threading.Lock()

    def __init__(self, stream=None, taken: int = 0):
        self.stream, self.taken = stream, taken

    def read(self, size: int) -> bytes:
        """Return the next bytes of the form; raise Problem (503) when the disk is nearly full."""
        data = self.stream.read(size)
        with UploadBudget.lock:
            if len(data) > UploadBudget.left:
                raise Problem(503, "too-busy", TOO_MANY_UPLOADS)
            UploadBudget.left -= len(data)
            self.taken += len(data)
            return data

    def split(self, size: int) -> "UploadBudget":
        """Hand some of the taken bytes over to a budget of their own."""
        self.taken -= size
        return UploadBudget(taken=size)

    def close(self) -> None:
        """Give back all that was taken."""
        with UploadBudget.lock:
            UploadBudget.left += self.taken
            self.taken = 0


class Upload(FileStorage):
    """A file of a form, with the bytes that it takes of the budget."""

    budget: UploadBudget

    def close(self) -> None:
        """Close the file and give its bytes back."""
        super().close()
        self.budget.close()


def name_of_file(part: MultipartSegment) -> str | None:
    """Return the name of a form's file, "" where it has none, and None for a field.

    Programs say in several ways that a part is a file. Where nobody has chosen one, a browser sends
    a file without a name and without content, which is a field here.
    """
    disposition = parse_options_header(part.header("Content-Disposition", ""))[1]
    name = part.filename or disposition.get("filename", "")
    marked = part.filename == "" or part.name == "file"
    is_picture = (part.content_type or "").startswith(PICTURE_TYPES)
    if not name and not (part.size and (marked or is_picture)):
        return None
    try:
        return name.encode("latin-1").decode()
    except UnicodeError:  # in some code page: the name is only shown
        return name


class FormParser(FormDataParser):
    """Reads forms with `multipart`, in a tenth of the time that Werkzeug's own parser takes.

    A body that is a picture counts as a form with one file. What fails closes its files, and gives
    back their bytes, at once. If it kept them until the request has ended, several large uploads
    could block one another.
    """

    def parse(self, stream, mimetype, content_length, options=None):
        """Return the stream, the fields and the files; nothing of a form that is malformed.

        Raises:
            Problem: 503 where the files do not fit on the disk beside those of others.
        """
        try:
            if mimetype.startswith(PICTURE_TYPES):
                return self.parse_picture(stream)
            if mimetype == "multipart/form-data":
                return self.parse_form(stream, (options or {}).get("boundary", ""))
        except OSError as error:  # also when a file is closed, which writes the rest
            if error.errno != errno.ENOSPC:
                raise
            raise Problem(503, "too-busy", TOO_MANY_UPLOADS) from error
        return super().parse(stream, mimetype, content_length, options)

    def parse_picture(self, stream):
        """Return a body that is a picture as if it were the file of a form."""
        with ExitStack() as stack:
            stack.callback((budget := UploadBudget(stream)).close)
            content = stack.enter_context(SpooledTemporaryFile(FORM_MEMORY_BYTES))
            while chunk := budget.read(1 << 16):
                content.write(chunk)
            content.seek(0)
            stack.pop_all()  # whoever reads the file closes it
        file = Upload(content, "", "file")
        file.budget = budget
        return stream, MultiDict(), MultiDict({"file": file})

    def parse_form(self, stream, boundary: str):
        """Return the stream, the fields and the files of a form in parts."""
        fields: MultiDict[str, str] = MultiDict()
        files: MultiDict[str, FileStorage] = MultiDict()
        budget = UploadBudget(stream)
        options = {"max_segment_count": FORM_MAX_PARTS, "header_charset": "latin-1"}
        try:
            with ExitStack() as stack:
                stack.callback(budget.close)  # last, when all files are closed
                for event in PushMultipartParser(boundary, **options).parse_blocking(budget.read):
                    if isinstance(event, MultipartSegment):
                        part = event
                        file = stack.enter_context(SpooledTemporaryFile(FORM_MEMORY_BYTES))
                    elif event:
                        file.write(event)
                    else:
                        file.seek(0)
                        if (name := name_of_file(part)) is not None:
                            upload = Upload(file, name, part.name)
                            upload.budget = budget.split(part.size)
                            stack.callback(upload.close)
                            files.add(part.name, upload)
                        else:
                            fields.add(part.name, file.read().decode(errors="replace"))
                            file.close()
                stack.pop_all()  # whoever reads the files closes them
        except ParserLimitReached as error:
            raise RequestEntityTooLarge from error
        except MultipartError:
            return stream, MultiDict(), MultiDict()
        budget.close()
        return stream, fields, files


class Request(flask.Request):
    """A request whose forms are read by the parser above."""

    form_data_parser_class = FormParser


def malformed(body: Any = None) -> Problem:
    """Return the problem (400) of a request with neither picture nor link; it says what came."""
    match body:
        case {"urls": [_, *_] as links} if len(links) > MAX_LINKS:
            came = f"There are {len(links)} links in urls."
        case {"urls": _}:
            came = "The urls are not a list of links."
        case {"url": _}:
            came = "The url is not a text."
        case {"sample": label}:
            came = f"There is no sample {label!s:.40}."
        case {} if not body and request.mimetype == "multipart/form-data":
            came = "The form is empty, or it ends early, or its boundary is another one."
        case {}:
            came = f"Neither a file nor a link came, only: {', '.join(body) or 'nothing':.100}."
        case _:
            size, kind = len(request.get_data()), request.mimetype or "no type"
            came = f"What came ({size:,} bytes of {kind:.60}) is not a JSON object."
    return Problem(400, "malformed-request", f"{came} {USAGE}")


def find_upload() -> FileStorage | None:
    """Return the file of a form, whatever its field's name; raise Problem (400) for several."""
    if not is_upload():
        return None
    files = request.files.getlist("file") or [*request.files.values()]
    if len(files) > 1:
        came = f"The form has {len(files)} files, and one at a time can be answered."
        raise Problem(400, "malformed-request", f"{came} {USAGE}")
    return files[0] if files else None


def read_body() -> dict:
    """Return the fields of a form, or the object that JSON holds; raise Problem (400), or 413.

    A body in chunks tells its length only as it is read. One that is longer than allowed looks
    like one that ends early, so JSON is read to its end, where the 413 shows.
    """
    if is_upload():
        return request.form.to_dict()
    try:
        body = request.get_json(force=True)  # curl calls it a form
    except (BadRequest, RecursionError):  # the second from brackets in brackets in brackets ...
        body = request.form.to_dict() if {"url", "sample"} & request.form.keys() else None
    finally:
        request.stream.read(1)
    if not isinstance(body, dict):
        raise malformed(body)
    return body


def answer_page(answer: Callable[[dict], list[dict]], model: Description, **page: Any) -> Response:
    """Answer with the website, and with what `answer` says to its form if that was sent."""
    # The page reserves the room that these need; probabilities of 0.5 need the longest sentence.
    longest = [(name, 0.5) for name in sorted(model.classes, key=len, reverse=True)]
    page |= {"needs_key": bool(GATEWAY_API_KEY), "url": "", "model": model, "longest": longest}
    response = Response()
    if request.method == "POST":
        try:
            form = request.form.to_dict() | {"preview": "yes"}
            page["url"] = form.get("url", "")
            check_caller(f"Bearer {form.get('key', '')}".encode())
            page["answer"] = answer(form)[0]
        except (HTTPException, grpc.RpcError) as error:
            problem = problem_of(error) if isinstance(error, grpc.RpcError) else error
            page["problem"], response = explain(problem), answer_problem(problem)
            # A file's problem is shown in its card, any other beside the link's field.
            page["of_file"] = problem.code in (413, 415) and not page["url"]
    response.set_data(render_template("index.html", **page))
    response.mimetype = "text/html"
    return response


def create_app(model: Description | None = None, model_name: str = "") -> Flask:
    """Return an application with all of the above, and no routes for pictures yet.

    Args:
        model: whose samples there are, and what problems say of the model.
        model_name: its name on the model server.
    """
    app = Flask("gateway", root_path=str(ROOT))
    app.config |= {"MODEL": model, "MODEL_NAME": model_name}
    app.static_folder, app.template_folder = "website/static", "website"
    app.request_class = Request
    app.config["MAX_CONTENT_LENGTH"] = FORM_MAX_BYTES
    app.json.sort_keys = False  # type: ignore[attr-defined]  # classes stay in the model's order
    if RATE_LIMIT:
        limiter.init_app(app)
    app.register_blueprint(blueprint)
    return app
