"""A client of the model server, with the official package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from helpers.basics import eventually
from helpers.servers import Addresses


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """Return status and message of a gRPC call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), str(caught.value.details())


def predict_request(model_name: str, signature_name: str = "", **inputs: Any) -> Any:
    """Make a ``PredictRequest`` of arrays or TensorProtos."""
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    request = predict_pb2.PredictRequest()
    request.model_spec.name = model_name
    request.model_spec.signature_name = signature_name
    for alias, value in inputs.items():
        proto = value if hasattr(value, "tensor_shape") else tf.make_tensor_proto(value)
        request.inputs[alias].CopyFrom(proto)
    return request


class Client:
    """The stubs of both services of a running model server, which speak of one model."""

    def __init__(self, server: Addresses, model_name: str):
        from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

        self.model_name = model_name
        self.channel = grpc.insecure_channel(
            server.grpc,
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.channel.close()

    def request(self, signature_name: str = "", **inputs: Any) -> Any:
        return predict_request(self.model_name, signature_name, **inputs)

    def predict(self, signature_name: str = "", **inputs: Any) -> Any:
        return self.prediction.Predict(self.request(signature_name, **inputs))

    def statuses(self) -> Any:
        from tensorflow_serving.apis import get_model_status_pb2

        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = self.model_name
        return self.models.GetModelStatus(request).model_version_status

    def states(self) -> dict[int, str]:
        """Return the state of each version, such as AVAILABLE."""
        return {each.version: each.State.Name(each.state) for each in self.statuses()}

    def wait_for(self, version: int, state: str) -> None:
        """Wait until a version is in a state."""
        eventually(lambda: self.states().get(version) == state, f"{version} is {state}")

    def error_of(self, version: int) -> Any:
        """Wait until a version has failed to load, and return its error status."""

        def failed() -> Any:
            for each in self.statuses():
                if (each.version, each.State.Name(each.state)) == (version, "END"):
                    return each.status if each.status.error_code else None
            return None

        return eventually(failed, f"{version} has failed")

    def serve(self, base_path: Path, *versions: int) -> Any:
        """Have the server serve this model and no other, with these versions or the newest.

        It looks at the base path at once, and answers when it has loaded what is new there.
        """
        return self.reload({self.model_name: base_path}, *versions)

    def reload(self, models: dict[str, Path], *versions: int) -> Any:
        """Have the server serve these models and no others, each from its base path."""
        from tensorflow_serving.apis import model_management_pb2

        request = model_management_pb2.ReloadConfigRequest()
        for name, base_path in models.items():
            config = request.config.model_config_list.config.add(
                name=name, base_path=str(base_path), model_platform="tensorflow"
            )
            if versions:
                config.model_version_policy.specific.versions.extend(versions)
        return self.models.HandleReloadConfigRequest(request, timeout=60)
