"""The gRPC API: PredictionService and ModelService."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

from . import service
from .errors import ServingError
from .manager import ModelManager

# A status travels in HTTP/2 headers, for which clients accept 8 KiB unless told otherwise.
MAX_STATUS_CHARACTERS = 2000


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """``tensorflow.serving.PredictionService`` on the models of a manager."""

    def __init__(self, manager: ModelManager, as_tensor_content: bool = False):
        self.Predict = _handler(partial(service.predict, manager, as_tensor_content))
        self.GetModelMetadata = _handler(partial(service.get_model_metadata, manager))
        self.Classify = self.Regress = self.MultiInference = _unimplemented


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """``tensorflow.serving.ModelService`` on the models of a manager."""

    def __init__(self, manager: ModelManager):
        self.GetModelStatus = _handler(partial(service.get_model_status, manager))
        self.HandleReloadConfigRequest = _unimplemented


def make_server(
    manager: ModelManager,
    max_threads: int,
    channel_arguments: Sequence[tuple[str, Any]] = (),
    as_tensor_content: bool = False,
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
        PredictionService(manager, as_tensor_content), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(manager), server)
    return server


def _handler(answer: Callable[[Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    """Make a gRPC handler of a function that raises ServingError."""

    def handle(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return answer(request)
        except ServingError as error:
            context.abort(error.code, error.message[:MAX_STATUS_CHARACTERS])

    return handle


def _unimplemented(request: Any, context: grpc.ServicerContext) -> None:
    context.abort(
        grpc.StatusCode.UNIMPLEMENTED,
        f"this model server does not answer a {type(request).__name__}; TensorFlow Serving does",
    )
