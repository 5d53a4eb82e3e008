"""What both APIs answer: a request message in, a response message out, ServingError otherwise."""

from typing import Any

import grpc

from tfserving import messages_pb2 as pb
from tfserving import server_messages_pb2

from . import inference, metrics, tensors
from .errors import ServingError, invalid_argument
from .manager import ModelManager
from .servable import DEFAULT_SIGNATURE

SIGNATURE_DEF = "signature_def"
METHOD_NAMES = ("tensorflow/serving/predict", *inference.METHODS)


def check_method(signature: Any, check_method_name: bool) -> None:
    """Raise ServingError when a signature's method is no known one, if that is to be checked."""
    if check_method_name and signature.method_name not in METHOD_NAMES:
        raise ServingError(
            grpc.StatusCode.INTERNAL,
            "Expected prediction signature method_name to be one of "
            f"{{{', '.join(METHOD_NAMES)}}}. Was: {signature.method_name}",
        )


def predict(
    manager: ModelManager,
    as_tensor_content: bool,
    check_method_name: bool,
    request: Any,
    timeout_ms: int = 0,
) -> Any:
    """Answer a ``PredictRequest`` with a ``PredictResponse``."""
    _require_model_spec(request)
    spec = request.model_spec
    with (
        manager.servable(spec) as (version, servable),
        metrics.runtime(spec.name, "Predict"),
    ):
        check_method(servable.signature(spec.signature_name), check_method_name)
        outputs = servable.predict(
            spec.signature_name, request.inputs, request.output_filter, timeout_ms
        )
    response = pb.PredictResponse()
    _fill_model_spec(response.model_spec, spec, version)
    for alias, array in outputs.items():
        tensors.to_proto(array, as_tensor_content, response.outputs[alias])
    return response


def infer(
    method: inference.Method,
    manager: ModelManager,
    check_method_name: bool,
    request: Any,
    timeout_ms: int = 0,
) -> Any:
    """Answer a method's request, such as a ``ClassificationRequest``, with its response."""
    _require_model_spec(request)
    response, spec = method.response(), request.model_spec
    with manager.servable(spec) as (version, servable), metrics.runtime(spec.name, method.api):
        result = inference.infer(
            servable, spec.signature_name, method, request.input, check_method_name, timeout_ms
        )
    metrics.examples(spec.name, request.input)
    response.result.CopyFrom(result)
    _fill_model_spec(response.model_spec, spec, version)
    return response


def multi_inference(
    manager: ModelManager, check_method_name: bool, request: Any, timeout_ms: int = 0
) -> Any:
    """Answer a ``MultiInferenceRequest``: several signatures of one model on the same input."""
    response = server_messages_pb2.MultiInferenceResponse()
    spec = request.tasks[0].model_spec if request.tasks else pb.ModelSpec()
    with (
        manager.servable(spec) as (version, servable),
        metrics.runtime(spec.name, "MultiInference"),
    ):
        results = inference.infer_all(
            servable, request.tasks, request.input, check_method_name, timeout_ms
        )
    metrics.examples(spec.name, request.input)
    for task, result in zip(request.tasks, results, strict=True):
        answer = response.results.add()
        kind = inference.METHODS[task.method_name].kind
        getattr(answer, f"{kind}_result").CopyFrom(result)
        _fill_model_spec(answer.model_spec, task.model_spec, version)
    return response


def get_model_metadata(manager: ModelManager, request: Any) -> Any:
    """Answer a ``GetModelMetadataRequest``: the signatures, packed into an ``Any``."""
    _require_model_spec(request)
    if not request.metadata_field:
        raise invalid_argument("GetModelMetadataRequest must specify at least one metadata_field")
    for field in request.metadata_field:
        if field != SIGNATURE_DEF:
            raise invalid_argument(f"Metadata field {field} is not supported")
    signatures = pb.SignatureDefMap()
    with manager.servable(request.model_spec) as (version, servable):
        for name, signature in servable.signatures.items():
            signatures.signature_def[name].CopyFrom(signature)
    response = pb.GetModelMetadataResponse()
    response.model_spec.name = request.model_spec.name
    response.model_spec.version.value = version
    packed = response.metadata[SIGNATURE_DEF]
    packed.type_url = "type.googleapis.com/tensorflow.serving.SignatureDefMap"
    packed.value = signatures.SerializeToString()
    return response


def get_model_status(manager: ModelManager, request: Any) -> Any:
    """Answer a ``GetModelStatusRequest``: state and error of each version that it selects."""
    _require_model_spec(request)
    response = pb.GetModelStatusResponse()
    for version in manager.status(request.model_spec):
        status = response.model_version_status.add(version=version.number, state=version.state)
        status.status.SetInParent()
        if version.error:
            status.status.error_code = version.error.code.value[0]
            status.status.error_message = version.error.message
    return response


def reload_config(manager: ModelManager, request: Any) -> Any:
    """Answer a ``ReloadConfigRequest`` when the models that it adds are available.

    The response says by how much the counters in ``metric_names`` have grown meanwhile.
    """
    before = {name: metrics.counted(name) for name in request.metric_names}
    if request.config.WhichOneof("config") != "model_config_list":
        raise invalid_argument(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. Only "
            "ModelConfigList is currently supported"
        )
    manager.reload(request.config)
    response = server_messages_pb2.ReloadConfigResponse()
    response.status.SetInParent()
    for name, count in before.items():
        response.metric.add(name=name, int64_value_increase=metrics.counted(name) - count)
    return response


def _fill_model_spec(spec: Any, asked: Any, version: int) -> None:
    spec.name = asked.name
    spec.version.value = version
    spec.signature_name = asked.signature_name or DEFAULT_SIGNATURE


def _require_model_spec(request: Any) -> None:
    if not request.HasField("model_spec"):
        raise invalid_argument("Missing ModelSpec")
