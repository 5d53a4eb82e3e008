"""The gRPC API: PredictionService and ModelService."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tfserving import services_pb2_grpc

from . import inference, metrics, service
from .errors import ServingError
from .manager import ModelManager

log = logging.getLogger(__name__)
logging.getLogger("grpc._common").setLevel(logging.CRITICAL)  # no traceback for a broken request

# A status travels in HTTP/2 headers, for which clients accept 8 KiB unless told otherwise.
MAX_STATUS_BYTES = 1024


class PredictionService:
    """``tensorflow.serving.PredictionService`` on the models of a manager."""

    def __init__(
        self,
        manager: ModelManager,
        probes: ThreadPoolExecutor,
        as_tensor_content: bool,
        check_method_name: bool,
        enforce_session_run_timeout: bool,
    ):
        def handler(api: str, answer: Callable, *arguments: Any) -> Callable:
            answer = partial(answer, *arguments, check_method_name)
            return _handler(answer, api, enforce_session_run_timeout)

        self.Predict = handler("Predict", service.predict, manager, as_tensor_content)
        self.Classify = handler("Classify", service.infer, inference.CLASSIFY, manager)
        self.Regress = handler("Regress", service.infer, inference.REGRESS, manager)
        self.MultiInference = handler("MultiInference", service.multi_inference, manager)
        metadata = partial(service.get_model_metadata, manager)
        self.GetModelMetadata = _in_pool(probes, _handler(metadata))


class ModelService:
    """``tensorflow.serving.ModelService`` on the models of a manager."""

    def __init__(self, manager: ModelManager, probes: ThreadPoolExecutor):
        self.GetModelStatus = _in_pool(probes, _handler(partial(service.get_model_status, manager)))
        self.HandleReloadConfigRequest = _handler(partial(service.reload_config, manager))


def make_server(
    manager: ModelManager,
    max_threads: int,
    channel_arguments: Sequence[tuple[str, Any]],
    as_tensor_content: bool,
    check_method_name: bool,
    with_health: bool,
    enforce_session_run_timeout: bool,
) -> grpc.Server:
    """Make a server that is neither bound to a port nor started; messages may have any size.

    Health checks, status and metadata have threads of their own: they wait for no prediction.
    """
    probes = ThreadPoolExecutor(2, thread_name_prefix="probes")
    server = grpc.server(
        ThreadPoolExecutor(max_threads, thread_name_prefix="grpc"),
        options=[
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port that another server holds is an error
            *channel_arguments,
        ],
    )
    services_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(
            manager, probes, as_tensor_content, check_method_name, enforce_session_run_timeout
        ),
        server,
    )
    services_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(manager, probes), server)
    server.add_generic_rpc_handlers([_NotCovered()])
    if with_health:
        # SERVING from the start, because the port opens only when every model is loaded.
        servicer = health.HealthServicer(experimental_thread_pool=probes)
        servicer.Check = _in_pool(probes, partial(servicer.Check))  # type: ignore[method-assign]
        for name in ("PredictionService", "ModelService"):
            servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return server


class _NotCovered(grpc.GenericRpcHandler):
    """Answers TensorFlow's other methods with a sentence that says they are not covered."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return a handler that refuses a method of TensorFlow's; None for anybody else's."""
        method = details.method
        if not method.startswith("/tensorflow."):
            return None

        def refuse(requests: Iterator[bytes], context: grpc.ServicerContext) -> None:
            context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                f"this model server does not answer {method}; "
                "python -c 'import model_server; help(model_server)' says what it does",
            )

        return grpc.stream_stream_rpc_method_handler(refuse)


def _handler(
    answer: Callable[..., Any], api: str = "", enforce_timeout: bool = False
) -> Callable[[Any, grpc.ServicerContext], Any]:
    """Make a gRPC handler of a function that raises ServingError; count the requests of an API.

    With ``enforce_timeout``, the function gets what is left of the client's deadline.
    """

    def handle(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            if not api:
                return answer(request)
            timeout_ms = _milliseconds(context.time_remaining()) if enforce_timeout else 0
            with metrics.request(_model_name(request), api, "GRPC"):
                return answer(request, timeout_ms)
        except ServingError as error:
            failure = error
        except Exception as error:
            log.exception("%s failed", type(request).__name__)
            failure = ServingError(grpc.StatusCode.INTERNAL, repr(error))
        context.abort(failure.code, _details(failure.message))

    return handle


def _details(message: str) -> str:
    """Cut a message where TensorFlow Serving does."""
    encoded = message.encode("utf-8", "replace")
    if len(encoded) <= MAX_STATUS_BYTES:
        return message
    return encoded[:MAX_STATUS_BYTES].decode("utf-8", "ignore") + "...TRUNCATED"


def _in_pool(pool: ThreadPoolExecutor, handler: Any) -> Any:
    """Let gRPC call a handler in a thread of this pool, and not in one of the server's."""
    handler.experimental_thread_pool = pool
    return handler


def _milliseconds(seconds: float | None) -> int:
    """Round a time limit up, to at least 1 ms; 0 when there is none, or more than eleven days."""
    return 0 if seconds is None or seconds > 1e6 else math.ceil(seconds * 1e3) or 1


def _model_name(request: Any) -> str:
    if hasattr(request, "tasks"):
        return request.tasks[0].model_spec.name if request.tasks else ""
    return request.model_spec.name
