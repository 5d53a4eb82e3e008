"""What all of the gateway's answers have: an id, a line in the log, safe headers, or a problem.

And the two routes for programs that watch it or want to know how to ask it.
"""

import json
import logging
import os
import re
import sys
import time
import uuid
from typing import Any

import grpc
import prometheus_client as prometheus
from flask import Blueprint, Response, current_app, g, request
from flask_limiter import Limiter
from flask_limiter.util import get_remote_address
from werkzeug.exceptions import BadRequest, HTTPException

from pictures import IMAGE_MAX_BYTES, TOO_BIG, Problem

env = os.environ.get
RATE_LIMIT = env("RATE_LIMIT", "")
FORM_MAX_BYTES = IMAGE_MAX_BYTES + 65536  # a form is around the picture
JSON_MAX_BYTES = 65536  # lists in lists take 30 times their bytes when parsed
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

blueprint = Blueprint("web", __name__)
limiter = Limiter(get_remote_address, enabled=bool(RATE_LIMIT), storage_uri="memory://")
access_log = logging.getLogger("access")
access_log.addHandler(logging.StreamHandler(sys.stdout))
access_log.setLevel(logging.INFO)
registry = prometheus.CollectorRegistry()
PROBLEMS = prometheus.Counter("gateway_problems", "Problems", ["cause"], registry=registry)


@blueprint.before_app_request
def begin() -> None:
    """Give the request an id, its caller's if that is a plain one, and start its clock."""
    given = request.headers.get("X-Request-ID", "")
    g.id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
    g.start, g.seconds, g.cause = time.perf_counter(), {}, None
    g.is_form = request.mimetype == "multipart/form-data"
    if not g.is_form:
        request.max_content_length = JSON_MAX_BYTES


def read_json() -> Any:
    """Return what a body says; raise BadRequest where it is no JSON, 413 where it is too long."""
    try:
        return request.get_json(force=True)
    except RecursionError as error:  # brackets in brackets in brackets ...
        raise BadRequest from error
    finally:
        request.stream.read(1)  # raises 413 if it was cut: in chunks its length shows only here


@blueprint.after_app_request
def finish(response: Response) -> Response:
    """Write one line to the log, without the query, which may hold somebody's secret."""
    response.headers.update(HEADERS | {"X-Request-ID": g.id})
    seconds = {"all": time.perf_counter() - g.start} | g.seconds
    line = {"time": time.time(), "id": g.id, "client": request.remote_addr, "cause": g.cause}
    line |= {"method": request.method, "path": request.path, "status": response.status_code}
    access_log.info(json.dumps(line | {"seconds": {k: round(v, 6) for k, v in seconds.items()}}))
    return response


@blueprint.app_errorhandler(HTTPException)
def answer_problem(error: HTTPException) -> Response:
    """Answer with a problem (RFC 9457), be it ours, Flask's own or a mistake in the code (500)."""
    g.cause = getattr(error, "cause", error.name.lower().replace(" ", "-"))
    PROBLEMS.labels(g.cause).inc()
    kind, title = f"tag:clothing-gateway,2026:{g.cause}", g.cause.replace("-", " ").capitalize()
    detail = {413: TOO_BIG, 429: f"More requests than {RATE_LIMIT}; wait a little."}
    body = {"type": kind, "title": title, "status": error.code}
    sentence = detail.get(error.code or 0, error.description)
    body["detail"] = ": ".join([*getattr(error, "__notes__", []), str(sentence)])
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "2"}}.get(error.code or 0)
    response = Response(json.dumps(body), error.code, headers, "application/problem+json")
    response.allow.update(getattr(error, "valid_methods", None) or [])
    if error.code == 429 and limiter.current_limit:
        response.headers["Retry-After"] = str(limiter.current_limit.reset_at - int(time.time()))
    return response


@blueprint.app_errorhandler(grpc.RpcError)
def answer_rpc_error(error: grpc.RpcError) -> Response:
    """Answer when the model server did not; what it said goes to the log, not to strangers."""
    current_app.logger.warning("%s: the model server: %s %s", g.id, error.code(), error.details())
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        sentence = "The model server is too slow; try again soon."
        return answer_problem(Problem(504, "model-timeout", sentence))
    sentence = f"The model server gives no answer ({error.code().name}); try again soon."
    return answer_problem(Problem(503, "model-unavailable", sentence))


@blueprint.get("/metrics")
def metrics() -> Response:
    """Answer with the counts and times that Prometheus collects."""
    text = prometheus.generate_latest(registry)
    return Response(text, content_type=prometheus.CONTENT_TYPE_LATEST)


@blueprint.get("/openapi.json")
def openapi() -> Response:
    """Answer with the description of all this for programs."""
    return current_app.send_static_file("openapi.json")
