"""The REST API: a Flask application, and the waitress server that runs it."""

import json
import logging
import socket
import threading
import time
from typing import Any
from urllib.parse import quote

import flask
import grpc
import waitress.server
from google.protobuf import json_format
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2
from waitress import wasyncore
from werkzeug.exceptions import MethodNotAllowed, NotFound
from werkzeug.routing import BaseConverter

from . import json_tensors, service
from .errors import ServingError, invalid_argument
from .manager import ModelManager
from .servable import DEFAULT_SIGNATURE

log = logging.getLogger(__name__)

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
MAX_BODY_BYTES = 2**31 - 1


class ModelNameConverter(BaseConverter):
    """Tells a model's name from the ``:predict`` behind it."""

    regex = "[^/:]+"


def make_app(manager: ModelManager, timeout_ms: int = 30_000) -> flask.Flask:
    """Make the application; a prediction that takes longer than ``timeout_ms`` is a 504."""
    app = flask.Flask(__name__)
    app.url_map.converters["model"] = ModelNameConverter

    @app.get("/v1/models/<model:name>")
    @app.get("/v1/models/<model:name>/versions/<int:version>")
    def status(name: str, version: int | None = None) -> flask.Response:
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=_spec(name, version))
        response = service.get_model_status(manager, request)
        return _json(_message_to_json(response))

    @app.get("/v1/models/<model:name>/metadata")
    @app.get("/v1/models/<model:name>/versions/<int:version>/metadata")
    def metadata(name: str, version: int | None = None) -> flask.Response:
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=_spec(name, version), metadata_field=[service.SIGNATURE_DEF]
        )
        response = service.get_model_metadata(manager, request)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata[service.SIGNATURE_DEF].Unpack(signatures)
        return _json(
            f'{{\n"model_spec":{_message_to_json(response.model_spec)},\n'
            f'"metadata": {{"signature_def": {_message_to_json(signatures)}}}\n}}\n'
        )

    @app.post("/v1/models/<model:name>:predict")
    @app.post("/v1/models/<model:name>/versions/<int:version>:predict")
    def predict(name: str, version: int | None = None) -> flask.Response:
        document = json_tensors.parse_body(flask.request.get_data(cache=False))
        signature_name = document.get("signature_name", "")
        if not isinstance(signature_name, str):
            raise invalid_argument("'signature_name' key must be a string value.")
        with manager.servable(_spec(name, version)) as (_, servable):
            signature = servable.signatures.get(signature_name or DEFAULT_SIGNATURE)
            if signature is None:
                raise invalid_argument(
                    f'Serving signature name: "{signature_name or DEFAULT_SIGNATURE}" '
                    "not found in signature def"
                )
            if not signature.inputs:
                raise invalid_argument(
                    f"Failed to get input map for signature: {signature_name or 'DEFAULT'}"
                )
            inputs, rows = json_tensors.parse_inputs(document, signature.inputs)
            outputs = servable.predict(signature_name, inputs, timeout_ms=timeout_ms)
        write = json_tensors.format_rows if rows else json_tensors.format_columns
        return _json(write(outputs))

    @app.post("/v1/models/<model:name>:<any(classify, regress):method>")
    @app.post("/v1/models/<model:name>/versions/<int:version>:<any(classify, regress):method>")
    def unimplemented(name: str, method: str, version: int | None = None) -> flask.Response:
        raise ServingError(
            grpc.StatusCode.UNIMPLEMENTED,
            f"this model server does not answer :{method}; TensorFlow Serving does",
        )

    @app.errorhandler(ServingError)
    def serving_error(error: ServingError) -> flask.Response:
        return _json(
            json.dumps({"error": error.message}, indent=4), HTTP_STATUS.get(error.code, 500)
        )

    @app.errorhandler(NotFound)
    @app.errorhandler(MethodNotAllowed)
    def malformed(error: NotFound | MethodNotAllowed) -> flask.Response:
        path = quote(flask.request.path, safe="/:")
        if path.startswith("/v1/"):
            return serving_error(
                invalid_argument(f"Malformed request: {flask.request.method} {path}")
            )
        message = f"there is nothing at {path}; try /v1/models/NAME"
        return serving_error(ServingError(grpc.StatusCode.NOT_FOUND, message))

    @app.errorhandler(Exception)
    def internal_error(error: Exception) -> flask.Response:
        log.exception("%s %s failed", flask.request.method, flask.request.path)
        return serving_error(ServingError(grpc.StatusCode.INTERNAL, repr(error)))

    return app


class RestServer:
    """Runs an application on a bound socket, in threads of its own, until it is told to stop."""

    def __init__(self, app: flask.Flask, bound_socket: socket.socket, num_threads: int):
        self._server = waitress.server.create_server(
            app,
            sockets=[bound_socket],
            threads=num_threads,
            ident=None,
            connection_limit=1000,
            asyncore_use_poll=True,
            recv_bytes=2**20,
            max_request_body_size=MAX_BODY_BYTES,
            inbuf_overflow=MAX_BODY_BYTES,  # keep bodies in memory: the disk may be read-only
            outbuf_overflow=MAX_BODY_BYTES,
        )
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        threading.Thread(target=self._server.run, name="rest", daemon=True).start()

    def stop(self, deadline: float) -> None:
        """Accept nothing more; return when all is answered, or when ``time.monotonic()`` is due."""
        server = self._server
        in_polling_thread = server.trigger.pull_trigger  # no other may touch the sockets
        in_polling_thread(lambda: wasyncore.dispatcher.close(server))
        while time.monotonic() < deadline and any(
            channel.request or channel.requests or channel.total_outbufs_len
            for channel in list(server.active_channels.values())
        ):
            time.sleep(0.01)
        in_polling_thread(self._close_connections)
        server.task_dispatcher.shutdown(timeout=max(0, deadline - time.monotonic()))

    def _close_connections(self) -> None:
        for channel in self._server.active_channels.values():
            channel.will_close = True
        self._server.trigger.close()


def _spec(name: str, version: int | None) -> Any:
    spec = model_pb2.ModelSpec(name=name)
    if version is not None:
        if version >= 2**63:
            raise invalid_argument(f"Failed to convert version: {version} to numeric.")
        spec.version.value = version
    return spec


def _message_to_json(message: Any) -> str:
    return json_format.MessageToJson(
        message,
        always_print_fields_with_no_presence=True,
        preserving_proto_field_name=True,
        indent=1,
    )


def _json(body: str, status: int = 200) -> flask.Response:
    return flask.Response(
        body.encode("utf-8", "surrogateescape"), status, content_type="application/json"
    )
