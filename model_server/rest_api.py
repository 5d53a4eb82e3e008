"""The REST API: a Flask application, and the waitress server that runs it."""

import functools
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import flask
import grpc
import waitress.server
from google.protobuf import json_format
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    regression_pb2,
)
from waitress import wasyncore
from werkzeug.exceptions import MethodNotAllowed, NotFound
from werkzeug.routing import BaseConverter

from . import examples, json_tensors, metrics, service
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


def make_app(
    manager: ModelManager,
    timeout_ms: int = 30_000,
    metrics_path: str | None = None,
    check_method_name: bool = False,
) -> flask.Flask:
    """Make the application; a prediction that takes longer than ``timeout_ms`` is a 504.

    ``metrics_path`` is where Prometheus finds the metrics, None for nowhere.
    """
    app = flask.Flask(__name__)
    app.url_map.converters["model"] = ModelNameConverter
    app.url_map.merge_slashes = False
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False

    @app.get("/v1/models")
    def no_name() -> flask.Response:
        raise invalid_argument("Missing model name in request.")

    @app.get("/v1/models/<model:name>")
    @app.get("/v1/models/<model:name>/versions/<int:version>")
    @app.get("/v1/models/<model:name>/labels/<model:label>")
    def status(name: str, version: int | None = None, label: str = "") -> flask.Response:
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=_spec(name, version, label))
        response = service.get_model_status(manager, request)
        return _json(_message_to_json(response))

    @app.get("/v1/models/<model:name>/metadata")
    @app.get("/v1/models/<model:name>/versions/<int:version>/metadata")
    @app.get("/v1/models/<model:name>/labels/<model:label>/metadata")
    def metadata(name: str, version: int | None = None, label: str = "") -> flask.Response:
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=_spec(name, version, label), metadata_field=[service.SIGNATURE_DEF]
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
    @app.post("/v1/models/<model:name>/labels/<model:label>:predict")
    @_measured("predict")
    def predict(name: str, version: int | None = None, label: str = "") -> flask.Response:
        document = json_tensors.parse_body(flask.request.get_data(cache=False))
        signature_name = _signature_name(document)
        with manager.servable(_spec(name, version, label)) as (_, servable):
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
            with metrics.runtime(name, "Predict"):
                outputs = servable.predict(signature_name, inputs, timeout_ms=timeout_ms)
        write = json_tensors.format_rows if rows else json_tensors.format_columns
        return _json(write(outputs))

    @app.post("/v1/models/<model:name>:classify")
    @app.post("/v1/models/<model:name>/versions/<int:version>:classify")
    @app.post("/v1/models/<model:name>/labels/<model:label>:classify")
    @_measured("classify")
    def classify(name: str, version: int | None = None, label: str = "") -> flask.Response:
        request = classification_pb2.ClassificationRequest(model_spec=_spec(name, version, label))
        _fill_from_json(request)
        response = service.classify(manager, check_method_name, request, timeout_ms)
        return _json(examples.format_result(response.result))

    @app.post("/v1/models/<model:name>:regress")
    @app.post("/v1/models/<model:name>/versions/<int:version>:regress")
    @app.post("/v1/models/<model:name>/labels/<model:label>:regress")
    @_measured("regress")
    def regress(name: str, version: int | None = None, label: str = "") -> flask.Response:
        request = regression_pb2.RegressionRequest(model_spec=_spec(name, version, label))
        _fill_from_json(request)
        response = service.regress(manager, check_method_name, request, timeout_ms)
        return _json(examples.format_result(response.result))

    if metrics_path:

        @app.get(metrics_path)
        def prometheus() -> flask.Response:
            return flask.Response(metrics.page(), content_type=metrics.CONTENT_TYPE)

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


def _measured(method: str) -> Callable[[Callable], Callable]:
    """Count and time the requests that a view answers."""

    def decorate(view: Callable) -> Callable:
        @functools.wraps(view)
        def measured(name: str, **arguments: Any) -> flask.Response:
            with metrics.request(name, method, "REST"):
                return view(name, **arguments)

        return measured

    return decorate


def _signature_name(document: dict[str, Any]) -> str:
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid_argument(
            f"JSON Value: {json_tensors.show(name)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    return name


def _fill_from_json(request: Any) -> None:
    """Read a classify or regress request from the body of the HTTP request."""
    document = json_tensors.parse_body(flask.request.get_data(cache=False))
    request.model_spec.signature_name = _signature_name(document)
    request.input.CopyFrom(examples.parse_input(document))


def _spec(name: str, version: int | None, label: str) -> Any:
    spec = model_pb2.ModelSpec(name=name)
    if label:
        spec.version_label = label
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
