"""The gRPC API: PredictionService and ModelService."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

from . import metrics, service
from .errors import ServingError
from .manager import ModelManager

log = logging.getLogger(__name__)
logging.getLogger("grpc._common").setLevel(logging.CRITICAL)  # a traceback for broken requests

# A status travels in HTTP/2 headers, for which clients accept 8 KiB unless told otherwise.
MAX_STATUS_CHARACTERS = 2000


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """``tensorflow.serving.PredictionService`` on the models of a manager."""

    def __init__(
        self,
        manager: ModelManager,
        as_tensor_content: bool = False,
        check_method_name: bool = False,
    ):
        self.Predict = _handler(partial(service.predict, manager, as_tensor_content), "Predict")
        self.GetModelMetadata = _handler(partial(service.get_model_metadata, manager))
        self.Classify = _handler(partial(service.classify, manager, check_method_name), "Classify")
        self.Regress = _handler(partial(service.regress, manager, check_method_name), "Regress")
        self.MultiInference = _handler(
            partial(service.multi_inference, manager, check_method_name), "MultiInference"
        )


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """``tensorflow.serving.ModelService`` on the models of a manager."""

    def __init__(self, manager: ModelManager):
        self.GetModelStatus = _handler(partial(service.get_model_status, manager))
        self.HandleReloadConfigRequest = _handler(partial(service.reload_config, manager))


def make_server(
    manager: ModelManager,
    max_threads: int,
    channel_arguments: Sequence[tuple[str, Any]] = (),
    as_tensor_content: bool = False,
    check_method_name: bool = False,
    with_health: bool = False,
) -> grpc.Server:
    """Make a server that is neither bound to a port nor started; messages may have any size."""
    server = grpc.server(
        ThreadPoolExecutor(max_threads, thread_name_prefix="grpc"),
        options=[
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port that another server holds is an error
            *channel_arguments,
        ],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(manager, as_tensor_content, check_method_name), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(manager), server)
    server.add_generic_rpc_handlers([_NotCovered()])
    if with_health:
        # It says SERVING from the start: the port opens when every model is there.
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    return server


class _NotCovered(grpc.GenericRpcHandler):
    """Says of TensorFlow's other methods that they are not there, in a sentence."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Find the handler of a method that no service has."""
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
    answer: Callable[[Any], Any], api: str = ""
) -> Callable[[Any, grpc.ServicerContext], Any]:
    """Make a gRPC handler of a function that raises ServingError; count the requests of an API."""

    def handle(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            if not api:
                return answer(request)
            with metrics.request(_model_name(request), api, "GRPC"):
                return answer(request)
        except ServingError as error:
            failure = error
        except Exception as error:
            log.exception("%s failed", type(request).__name__)
            failure = ServingError(grpc.StatusCode.INTERNAL, repr(error))
        context.abort(failure.code, failure.message[:MAX_STATUS_CHARACTERS])

    return handle


def _model_name(request: Any) -> str:
    if hasattr(request, "tasks"):
        return request.tasks[0].model_spec.name if request.tasks else ""
    return request.model_spec.name
