"""What both APIs answer: a request message in, a response message out, ServingError otherwise."""

from typing import Any

from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    predict_pb2,
)

from . import tensors
from .errors import invalid_argument
from .manager import ModelManager
from .servable import DEFAULT_SIGNATURE

SIGNATURE_DEF = "signature_def"


def predict(manager: ModelManager, as_tensor_content: bool, request: Any) -> Any:
    """Answer a ``PredictRequest`` with a ``PredictResponse``."""
    _require_model_spec(request)
    with manager.servable(request.model_spec) as (version, servable):
        outputs = servable.predict_request(request)
    response = predict_pb2.PredictResponse()
    response.model_spec.name = request.model_spec.name
    response.model_spec.version.value = version
    response.model_spec.signature_name = request.model_spec.signature_name or DEFAULT_SIGNATURE
    for alias, array in outputs.items():
        response.outputs[alias].CopyFrom(tensors.to_proto(array, as_tensor_content))
    return response


def get_model_metadata(manager: ModelManager, request: Any) -> Any:
    """Answer a ``GetModelMetadataRequest``: the signatures, packed into an ``Any``."""
    _require_model_spec(request)
    if not request.metadata_field:
        raise invalid_argument("GetModelMetadataRequest must specify at least one metadata_field")
    for field in request.metadata_field:
        if field != SIGNATURE_DEF:
            raise invalid_argument(f"Metadata field {field} is not supported")
    signatures = get_model_metadata_pb2.SignatureDefMap()
    with manager.servable(request.model_spec) as (version, servable):
        for name, signature in servable.signatures.items():
            signatures.signature_def[name].CopyFrom(signature)
    response = get_model_metadata_pb2.GetModelMetadataResponse()
    response.model_spec.name = request.model_spec.name
    response.model_spec.version.value = version
    response.metadata[SIGNATURE_DEF].Pack(signatures)
    return response


def get_model_status(manager: ModelManager, request: Any) -> Any:
    """Answer a ``GetModelStatusRequest``: state and error of each version that it selects."""
    _require_model_spec(request)
    response = get_model_status_pb2.GetModelStatusResponse()
    for version in manager.status(request.model_spec):
        status = response.model_version_status.add(version=version.number, state=version.state)
        status.status.SetInParent()
        if version.error:
            status.status.error_code = version.error.code.value[0]
            status.status.error_message = version.error.message
    return response


def _require_model_spec(request: Any) -> None:
    if not request.HasField("model_spec"):
        raise invalid_argument("Missing ModelSpec")
