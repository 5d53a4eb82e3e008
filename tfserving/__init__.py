"""TensorFlow Serving's protocol without TensorFlow: messages, stubs, NumPy arrays in and out.

Everything that a client of TensorFlow Serving imports is here::

    channel = grpc.insecure_channel("localhost:8500")
    stub = tfserving.PredictionServiceStub(channel)
    pb_request = tfserving.PredictRequest()
    pb_request.model_spec.name = "clothing-model"
    pb_request.inputs["inputs"].CopyFrom(tfserving.make_tensor_proto(array))
    pb_response = stub.Predict(pb_request, timeout=20)
    probabilities = tfserving.make_ndarray(pb_response.outputs["probabilities"])

``server_messages_pb2`` has the messages that only a server needs besides. The ``.proto`` files are
written by hand; the modules that end in ``_pb2`` and ``_pb2_grpc`` are generated from them. After a
change, at the root of the repository::

    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. tfserving/messages.proto
    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. tfserving/server_messages.proto
    python -m grpc_tools.protoc -I. --grpc_python_out=. tfserving/services.proto
"""

from tfserving.channel import make_channel
from tfserving.messages_pb2 import (
    GetModelMetadataRequest,
    GetModelMetadataResponse,
    GetModelStatusRequest,
    GetModelStatusResponse,
    ModelSpec,
    ModelVersionStatus,
    PredictRequest,
    PredictResponse,
    SignatureDef,
    SignatureDefMap,
    TensorInfo,
    TensorProto,
    TensorShapeProto,
)
from tfserving.services_pb2_grpc import ModelServiceStub, PredictionServiceStub
from tfserving.tensors import make_ndarray, make_tensor_proto, numpy_dtype

__all__ = [
    "GetModelMetadataRequest",
    "GetModelMetadataResponse",
    "GetModelStatusRequest",
    "GetModelStatusResponse",
    "ModelServiceStub",
    "ModelSpec",
    "ModelVersionStatus",
    "PredictRequest",
    "PredictResponse",
    "PredictionServiceStub",
    "SignatureDef",
    "SignatureDefMap",
    "TensorInfo",
    "TensorProto",
    "TensorShapeProto",
    "make_channel",
    "make_ndarray",
    "make_tensor_proto",
    "numpy_dtype",
]
