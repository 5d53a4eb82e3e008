"""The REST API: a WSGI application, and the waitress server that runs it."""

import gzip
import json
import logging
import re
import resource
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc
import waitress.server
from google.protobuf import json_format
from waitress import wasyncore
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Request, Response

from tfserving import messages_pb2 as pb
from tfserving import server_messages_pb2

from . import inference, metrics, service
from .errors import ServingError, invalid_argument
from .json_workers import PIECE_BYTES, JsonWorkers
from .manager import ModelManager
from .servable import DEFAULT_SIGNATURE

log = logging.getLogger(__name__)

# A model, perhaps a version or a label of it, and what is asked of it.
_MODEL = (
    r"(?i:/v1/models)/(?P<name>[^/:]+)"
    r"(?:(?i:/versions)/(?P<version>[0-9]+)|(?i:/labels)/(?P<label>[^/:]+))?"
)
GET_PATH = re.compile(rf"{_MODEL}(?P<metadata>/metadata)?")
METHODS = {method.api.lower(): method for method in inference.METHODS.values()}
POST_PATH = re.compile(rf"{_MODEL}:(?P<method>predict|{'|'.join(METHODS)})")
# The start of a whole URL, which some clients send in place of a path, as they would to a proxy.
ORIGIN = re.compile(r"\Ahttps?://[^/?]*", re.IGNORECASE)
WEB_ORIGIN = re.compile(r"https?://")

HTTP_STATUS = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}  # the others are 500
CORS_HEADERS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "POST, GET",
    "Access-Control-Allow-Headers": "Content-Type",
}
MAX_BODY_BYTES = 2**31 - 1
MAX_CONNECTIONS = 1000
FILES_FOR_OTHERS = 200  # how many files gRPC and models may open, of those that a process may
MAX_UNPACKED_BYTES = 100 * 2**20  # a body of kilobytes can unpack to gigabytes


@dataclass
class RestApi:
    """The REST API on the models of a manager, as a WSGI application.

    A prediction that takes longer than ``timeout_ms`` is a 504; 0 means without limit.
    ``metrics_path`` is where Prometheus finds the metrics, None for nowhere; ``with_cors`` lets
    pages of other sites ask.
    """

    manager: ModelManager
    json: JsonWorkers
    timeout_ms: int
    metrics_path: str | None
    check_method_name: bool
    with_cors: bool

    def __post_init__(self) -> None:
        self._application = Request.application(self._respond)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Answer a WSGI request; an error that is not the client's is logged, too."""
        return self._application(environ, start_response)

    def _respond(self, request: Request) -> Response:
        try:
            response = self._route(request)
        except ServingError as error:
            response = _error(error)
        except HTTPException:
            raise
        except Exception as error:
            log.exception("%s %s failed", request.method, request.path)
            response = _error(ServingError(grpc.StatusCode.INTERNAL, repr(error)))
        if self.with_cors:
            response.headers.update(CORS_HEADERS)
        return response

    def _route(self, request: Request) -> Response:
        """Answer what the address asks for; raise ServingError where there is nothing."""
        # The address as it was sent, because a model's name may contain %2F. A query counts as part
        # of the path.
        path = ORIGIN.sub("", request.environ["REQUEST_URI"])
        if request.path == self.metrics_path:
            return Response(metrics.page(), content_type=metrics.CONTENT_TYPE)
        if path[:4].lower() != "/v1/":
            message = f"there is nothing at {path}; try /v1/models/NAME"
            raise ServingError(grpc.StatusCode.NOT_FOUND, message)
        pattern = {"POST": POST_PATH, "GET": GET_PATH}.get(request.method)
        match = pattern.fullmatch(path) if pattern else None
        name = _decode(match["name"]) if match else ""
        with metrics.request(name, match.groupdict().get("method", "") if match else "", "REST"):
            if request.method == "OPTIONS":
                if not WEB_ORIGIN.search(request.headers.get("Origin", "")):
                    raise ServingError(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        "Origin header is missing in CORS preflight",
                    )
                return _json("")
            if match and request.method == "POST":
                return _json(self._post(match, body_pieces(request)))
            if match:
                return _json(self._metadata(match) if match["metadata"] else self._status(match))
            if request.method == "GET" and path.lower() == "/v1/models":
                raise invalid_argument("Missing model name in request.")
            raise invalid_argument(f"Malformed request: {request.method} {path}")

    def _status(self, match: re.Match[str]) -> str:
        request = pb.GetModelStatusRequest(model_spec=_spec(match))
        return _message_to_json(service.get_model_status(self.manager, request))

    def _metadata(self, match: re.Match[str]) -> str:
        request = pb.GetModelMetadataRequest(
            model_spec=_spec(match), metadata_field=[service.SIGNATURE_DEF]
        )
        response = service.get_model_metadata(self.manager, request)
        signatures = pb.SignatureDefMap()
        signatures.ParseFromString(response.metadata[service.SIGNATURE_DEF].value)
        return (
            f'{{\n"model_spec":{_message_to_json(response.model_spec)},\n'
            f'"metadata": {{"signature_def": {_message_to_json(signatures)}}}\n}}\n'
        )

    def _post(self, match: re.Match[str], body: Iterator[bytes]) -> bytes:
        spec = _spec(match)
        method = METHODS.get(match["method"])
        with self.json.for_body(body) as call:
            spec.signature_name = call("parse")
            if method:
                examples = server_messages_pb2.Input.FromString(call("examples"))
            else:
                inputs, rows = call("inputs", self._declared(spec))
        return self._infer(method, spec, examples) if method else self._predict(spec, inputs, rows)

    def _declared(self, spec: Any) -> dict[str, int]:
        """Return the ``DataType`` of each input of the signature that predict is to run."""
        name = spec.signature_name or DEFAULT_SIGNATURE
        with self.manager.servable(spec) as (_, servable):
            signature = servable.signatures.get(name)
            if signature is None:
                raise invalid_argument(
                    f'Serving signature name: "{name}" not found in signature def'
                )
            if not signature.inputs:
                raise invalid_argument(
                    f"Failed to get input map for signature: {spec.signature_name or 'DEFAULT'}"
                )
            service.check_method(signature, self.check_method_name)
            return {alias: info.dtype for alias, info in signature.inputs.items()}

    def _predict(self, spec: Any, inputs: dict[str, Any], rows: bool) -> bytes:
        with (
            self.manager.servable(spec) as (_, servable),
            metrics.runtime(spec.name, "Predict"),
        ):
            outputs = servable.predict(spec.signature_name, inputs, timeout_ms=self.timeout_ms)
        with self.json.for_outputs(outputs) as call:
            return call("format_rows" if rows else "format_columns", outputs)

    def _infer(self, method: inference.Method, spec: Any, examples: Any) -> bytes:
        request = method.request(model_spec=spec, input=examples)
        response = service.infer(
            method, self.manager, self.check_method_name, request, self.timeout_ms
        )
        return inference.format_result(method, response.result)


def body_pieces(request: Request) -> Iterator[bytes]:
    """Read the body of a request in pieces of ``PIECE_BYTES``, unpacked if it is compressed.

    Raises ServingError when it cannot be unpacked, or has too many bytes then.
    """
    packed = "gzip" in request.headers.get("Content-Encoding", "")
    body = gzip.GzipFile(fileobj=request.stream) if packed else request.stream
    size = 0
    try:
        while piece := body.read(PIECE_BYTES):
            size += len(piece)
            if packed and size > MAX_UNPACKED_BYTES:
                raise invalid_argument(
                    f"the body has more than {MAX_UNPACKED_BYTES} bytes when unpacked"
                )
            yield piece
    except (OSError, EOFError, zlib.error) as error:
        raise invalid_argument(
            f"cannot unpack a body with Content-Encoding gzip: {error}"
        ) from error


class _Server(waitress.server.TcpWSGIServer):
    """Closes the connection that has been idle longest when there is no room for another.

    Waitress itself would open none until one of them is closed: whoever holds them all shuts out
    everybody.
    """

    def readable(self) -> bool:
        """Say whether to accept a connection; waitress asks before each look at its sockets."""
        if len(self._map) >= self.adj.connection_limit - 1:
            idle = [
                channel
                for channel in self.active_channels.values()
                if not (channel.requests or channel.total_outbufs_len or channel.will_close)
            ]
            if idle:
                min(idle, key=lambda channel: channel.last_activity).will_close = True
        return super().readable()


class RestServer:
    """Runs an application on a bound socket, in threads of its own, until it is told to stop."""

    def __init__(self, app: Callable, bound_socket: socket.socket, num_threads: int):
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._server = _Server(
            app,
            _sock=bound_socket,
            sockinfo=(bound_socket.family, bound_socket.type, 0, bound_socket.getsockname()),
            bind_socket=False,
            threads=num_threads,
            ident=None,
            connection_limit=min(MAX_CONNECTIONS, max(files - FILES_FOR_OTHERS, 64)),
            asyncore_use_poll=True,
            recv_bytes=2**20,
            max_request_body_size=MAX_BODY_BYTES,
            inbuf_overflow=MAX_BODY_BYTES,  # keep bodies in memory: the disk may be read-only
            outbuf_overflow=MAX_BODY_BYTES,
        )
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        threading.Thread(target=self._server.run, name="rest", daemon=True).start()

    def stop(self, deadline: float) -> None:
        """Accept nothing more; return when all is answered, or at ``deadline`` (monotonic time)."""
        server = self._server
        in_polling_thread = server.trigger.pull_trigger  # no other thread may touch the sockets
        in_polling_thread(lambda: wasyncore.dispatcher.close(server))
        while time.monotonic() < deadline and any(
            channel.request or channel.requests or channel.total_outbufs_len
            for channel in list(server.active_channels.values())
        ):
            time.sleep(0.01)
        with suppress(OSError):  # the polling thread may be done, and have closed the trigger
            in_polling_thread(self._close_connections)
        server.task_dispatcher.shutdown(timeout=max(0, deadline - time.monotonic()))

    def _close_connections(self) -> None:
        for channel in self._server.active_channels.values():
            channel.will_close = True
        self._server.trigger.close()


def _spec(match: re.Match[str]) -> Any:
    """Make the ``ModelSpec`` of the model, version or label in an address."""
    spec = pb.ModelSpec(name=_decode(match["name"]))
    if match["label"]:
        spec.version_label = _decode(match["label"])
    if match["version"]:
        number = int(match["version"].lstrip("0")[:20] or "0")
        if number >= 2**63:
            raise invalid_argument(f"Failed to convert version: {match['version']} to numeric.")
        spec.version.value = number
    return spec


def _decode(text: str) -> str:
    """Undo the percent-encoding of a name in an address."""
    return unquote(text.encode("latin-1"))


def _message_to_json(message: Any) -> str:
    return json_format.MessageToJson(
        message,
        always_print_fields_with_no_presence=True,
        preserving_proto_field_name=True,
        indent=1,
    )


def _error(error: ServingError) -> Response:
    return _json(json.dumps({"error": error.message}, indent=4), HTTP_STATUS.get(error.code, 500))


def _json(body: str | bytes, status: int = 200) -> Response:
    return Response(body, status, content_type="application/json")
