"""The embedded model server over gRPC: tensors, signatures, errors, and many clients at once."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, Server
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

Code = grpc.StatusCode
ANY_SIZE = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
DTYPES = [
    *(tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.complex64, tf.complex128, tf.bool),
    *(tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.uint32, tf.uint64, tf.string),
]
SHAPES: list[list[int]] = [[], [3], [2, 3], [0, 3]]


def export_calculator(path: Path) -> None:
    """Save a model with two inputs and outputs, a convolution, and an echo for every dtype."""

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 2], tf.float32, name="a"),
            tf.TensorSpec([None], tf.int32, name="b"),
        ]
    )
    def calculate(a, b):
        return {"sum": a + tf.cast(b, tf.float32)[:, None], "twice": 2 * b}

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], tf.float32, name="image")])
    def convolve(image):
        return {"map": tf.nn.conv2d(image, tf.ones([3, 3, 3, 4]), 1, "SAME")}

    def echo(dtype):
        spec = tf.TensorSpec(None, dtype, name="x")
        return tf.function(lambda x: {"y": tf.identity(x)}, input_signature=[spec])

    signatures = {f"echo_{dtype.name}": echo(dtype) for dtype in DTYPES}
    signatures |= {"serving_default": calculate, "convolve": convolve}
    tf.saved_model.save(tf.Module(), str(path), signatures=signatures)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calculator")
    export_calculator(path / "7")
    return path


@pytest.fixture(scope="module")
def server(base_path: Path, start_model_server: Callable[..., Server]) -> Iterator[Server]:
    server = start_model_server(base_path, "--grpc_max_threads", "16", model_name="calculator")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def stub(server: Server) -> Any:
    channel = grpc.insecure_channel(server.grpc, options=ANY_SIZE)
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


@pytest.fixture(scope="module")
def model_stub(server: Server) -> Any:
    return model_service_pb2_grpc.ModelServiceStub(grpc.insecure_channel(server.grpc))


def predict_request(signature_name: str = "", **inputs: Any) -> Any:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "calculator"
    request.model_spec.signature_name = signature_name
    for alias, value in inputs.items():
        proto = value if hasattr(value, "tensor_shape") else tf.make_tensor_proto(value)
        request.inputs[alias].CopyFrom(proto)
    return request


def good_request() -> Any:
    return predict_request(a=np.array([[1, 2], [3, 4]], "float32"), b=np.array([10, 20], "int32"))


def sample(dtype: Any, shape: list[int]) -> np.ndarray:
    count = int(np.prod(shape))
    if dtype == tf.string:
        texts = [b"plain", b"\x00\xff not UTF-8", "é".encode(), b"", b"tail\x00", b"x" * 1000]
        array = np.empty(count, object)
        array[:] = texts[:count]
        return array.reshape(shape)
    values: Any = np.random.default_rng(5).integers(0, 100, count)
    if dtype.is_integer and dtype.min < 0:
        values = values - 50
    if dtype.is_floating or dtype.is_complex:
        values = values / 8 * (1 - 3j if dtype.is_complex else 1)
    if dtype.is_integer and count > 1:
        values[:2] = dtype.min, 100
        values = values.astype(dtype.as_numpy_dtype)
        values[1] = dtype.max
    return values.astype(dtype.as_numpy_dtype).reshape(shape)


def typed_proto(array: np.ndarray, dtype: Any) -> Any:
    """Put the values into the typed field, as TensorFlow's own Python never does for arrays."""
    proto = tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum)
    proto.tensor_shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
    flat = array.ravel()
    if dtype in (tf.float16, tf.bfloat16):
        proto.half_val.extend(flat.view(np.uint16).tolist())
    elif dtype.is_complex:
        parts = flat.view(np.float32 if dtype == tf.complex64 else np.float64)
        (proto.scomplex_val if dtype == tf.complex64 else proto.dcomplex_val).extend(parts.tolist())
    else:
        fields = {
            tf.float32: proto.float_val,
            tf.float64: proto.double_val,
            tf.int64: proto.int64_val,
            tf.uint32: proto.uint32_val,
            tf.uint64: proto.uint64_val,
            tf.bool: proto.bool_val,
            tf.string: proto.string_val,
        }
        fields.get(dtype, proto.int_val).extend(flat.tolist())
    return proto


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_dtype_in_every_encoding(stub: Any, dtype: Any, shape: list[int]) -> None:
    array = sample(dtype, shape)
    typed = typed_proto(array, dtype)
    content = tensor_pb2.TensorProto(dtype=typed.dtype, tensor_shape=typed.tensor_shape)
    content.tensor_content = b"" if dtype == tf.string else array.tobytes()
    for proto in (typed, content) if dtype != tf.string else (typed,):
        answer = stub.Predict(predict_request(f"echo_{dtype.name}", x=proto)).outputs["y"]
        assert answer == typed  # the answer comes in typed fields, value for value


def test_last_value_stands_for_the_missing_ones(stub: Any) -> None:
    proto = typed_proto(np.array([1.5, 2.5], "float32"), tf.float32)
    proto.tensor_shape.CopyFrom(tf.TensorShape([2, 3]).as_proto())
    answer = stub.Predict(predict_request("echo_float32", x=proto)).outputs["y"]
    np.testing.assert_array_equal(tf.make_ndarray(answer), [[1.5, 2.5, 2.5], [2.5, 2.5, 2.5]])
    del proto.float_val[1:]
    answer = stub.Predict(predict_request("echo_float32", x=proto)).outputs["y"]
    np.testing.assert_array_equal(tf.make_ndarray(answer), np.full([2, 3], 1.5))


def test_default_signature_with_several_inputs_and_outputs(stub: Any) -> None:
    response = stub.Predict(good_request())
    assert response.model_spec.name == "calculator"
    assert response.model_spec.version.value == 7
    assert response.model_spec.signature_name == "serving_default"
    assert set(response.outputs) == {"sum", "twice"}
    np.testing.assert_array_equal(tf.make_ndarray(response.outputs["sum"]), [[11, 12], [23, 24]])
    assert list(response.outputs["twice"].int_val) == [20, 40]


def test_empty_batch(stub: Any) -> None:
    response = stub.Predict(predict_request(a=np.zeros([0, 2], "float32"), b=np.zeros(0, "int32")))
    assert tf.make_ndarray(response.outputs["sum"]).shape == (0, 2)


def test_output_filter_and_version(stub: Any) -> None:
    request = good_request()
    request.output_filter.append("twice")
    request.model_spec.version.value = 7
    assert set(stub.Predict(request).outputs) == {"twice"}


def test_message_far_above_four_megabytes(stub: Any) -> None:
    array = np.random.default_rng(1).random([5_000_000], np.float32)
    answer = stub.Predict(predict_request("echo_float32", x=array)).outputs["y"]
    np.testing.assert_array_equal(tf.make_ndarray(answer), array)


def broadcast(shape: list[int]) -> Any:
    proto = typed_proto(np.ones(1, "float32"), tf.float32)
    proto.tensor_shape.CopyFrom(tf.TensorShape(shape).as_proto())
    return proto


BAD_REQUESTS: dict[str, tuple[Callable[[Any], Any], grpc.StatusCode, str]] = {
    "no model_spec": (
        lambda r: r.ClearField("model_spec"),
        Code.INVALID_ARGUMENT,
        "Missing ModelSpec",
    ),
    "no name": (
        lambda r: r.model_spec.ClearField("name"),
        Code.INVALID_ARGUMENT,
        "ModelSpec has no name specified.",
    ),
    "unknown model": (
        lambda r: setattr(r.model_spec, "name", "nobody"),
        Code.NOT_FOUND,
        "Servable not found for request: Latest(nobody)",
    ),
    "unknown version": (
        lambda r: setattr(r.model_spec.version, "value", 8),
        Code.NOT_FOUND,
        "Servable not found for request: Specific(calculator, 8)",
    ),
    "unknown label": (
        lambda r: setattr(r.model_spec, "version_label", "canary"),
        Code.INVALID_ARGUMENT,
        "Unrecognized servable version label: canary",
    ),
    "unknown signature": (
        lambda r: setattr(r.model_spec, "signature_name", "subtract"),
        Code.FAILED_PRECONDITION,
        'Serving signature key "subtract" not found.',
    ),
    "missing input": (
        lambda r: r.inputs.pop("b"),
        Code.INVALID_ARGUMENT,
        "input size does not match signature: 1!=2 len({a}) != len({a,b}). "
        "Sent extra: {}. Missing but required: {b}.",
    ),
    "no input": (lambda r: r.inputs.clear(), Code.INVALID_ARGUMENT, "Missing but required: {a,b}"),
    "extra input": (
        lambda r: r.inputs["c"].CopyFrom(r.inputs["b"]),
        Code.INVALID_ARGUMENT,
        "Sent extra: {c}",
    ),
    "misnamed input": (
        lambda r: r.inputs["c"].CopyFrom(r.inputs.pop("b")),
        Code.INVALID_ARGUMENT,
        "Signature input alias: b not found in request",
    ),
    "wrong dtype": (
        lambda r: r.inputs["a"].CopyFrom(tf.make_tensor_proto([[1.0, 2.0]], tf.float64)),
        Code.INVALID_ARGUMENT,
        "Expects arg[0] to be float but double is provided for input a",
    ),
    "wrong shape": (
        lambda r: r.inputs["a"].CopyFrom(tf.make_tensor_proto([[1.0, 2.0, 3.0]])),
        Code.INVALID_ARGUMENT,
        "input a has shape [1, 3], but its signature declares [-1, 2]",
    ),
    "sizes that do not fit": (
        lambda r: r.inputs["b"].CopyFrom(tf.make_tensor_proto([1, 2, 3])),
        Code.INVALID_ARGUMENT,
        "ncompatible shapes",
    ),
    "content too short": (
        lambda r: setattr(r.inputs["a"], "tensor_content", b"\0" * 12),
        Code.INVALID_ARGUMENT,
        "tensor parsing error: a",
    ),
    "negative size": (
        lambda r: setattr(r.inputs["a"].tensor_shape.dim[0], "size", -1),
        Code.INVALID_ARGUMENT,
        "tensor parsing error: a",
    ),
    "no dtype": (
        lambda r: setattr(r.inputs["a"], "dtype", 0),
        Code.INVALID_ARGUMENT,
        "tensor parsing error: a",
    ),
    "dtype without values": (
        lambda r: setattr(r.inputs["a"], "dtype", tf.resource.as_datatype_enum),
        Code.INVALID_ARGUMENT,
        "",
    ),
    "more than memory": (
        lambda r: r.inputs["a"].CopyFrom(broadcast([2**60, 2])),
        Code.INVALID_ARGUMENT,
        "tensor parsing error: a",
    ),
    "unknown output": (
        lambda r: r.output_filter.append("product"),
        Code.INVALID_ARGUMENT,
        "output tensor alias not found in signature: product "
        "Outputs expected to be in the set {sum,twice}.",
    ),
    "output named twice": (
        lambda r: r.output_filter.extend(["sum", "sum"]),
        Code.INVALID_ARGUMENT,
        "duplicate output tensor alias: sum",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request_has_the_status_of_tensorflow_serving(stub: Any, name: str) -> None:
    spoil, code, details = BAD_REQUESTS[name]
    request = good_request()
    spoil(request)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(request)
    assert (caught.value.code(), details in str(caught.value.details())) == (code, True), (
        caught.value
    )
    assert stub.Predict(good_request()).outputs


def test_tensor_of_another_rank_does_not_end_the_process(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(predict_request("convolve", image=np.zeros([8, 8, 3], np.float32)))
    assert caught.value.code() == Code.INVALID_ARGUMENT
    response = stub.Predict(predict_request("convolve", image=np.ones([1, 8, 8, 3], np.float32)))
    assert tf.make_ndarray(response.outputs["map"]).max() == 27


def test_metadata(stub: Any) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "calculator"
    response = stub.GetModelMetadata(request)
    assert (response.model_spec.name, response.model_spec.version.value) == ("calculator", 7)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    signature = signatures.signature_def["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    assert signature.inputs["a"].dtype == tf.float32.as_datatype_enum
    assert [dim.size for dim in signature.inputs["a"].tensor_shape.dim] == [-1, 2]
    assert set(signature.outputs) == {"sum", "twice"}


@pytest.mark.parametrize(
    ("name", "fields", "code", "details"),
    [
        (None, ["signature_def"], Code.INVALID_ARGUMENT, "Missing ModelSpec"),
        ("calculator", [], Code.INVALID_ARGUMENT, "must specify at least one metadata_field"),
        ("calculator", ["size"], Code.INVALID_ARGUMENT, "Metadata field size is not supported"),
        ("", ["signature_def"], Code.INVALID_ARGUMENT, "ModelSpec has no name specified."),
        ("nobody", ["signature_def"], Code.NOT_FOUND, "Servable not found for request"),
    ],
)
def test_bad_metadata_request(
    stub: Any, name: str | None, fields: list[str], code: grpc.StatusCode, details: str
) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
    if name is not None:
        request.model_spec.SetInParent()
        request.model_spec.name = name
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetModelMetadata(request)
    assert (caught.value.code(), details in str(caught.value.details())) == (code, True), (
        caught.value
    )


def test_model_status(model_stub: Any) -> None:
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "calculator"
    (status,) = model_stub.GetModelStatus(request).model_version_status
    assert (status.version, status.state) == (7, status.AVAILABLE)
    assert (status.status.error_code, status.status.error_message) == (0, "")
    request.model_spec.version.value = 8
    with pytest.raises(grpc.RpcError) as caught:
        model_stub.GetModelStatus(request)
    assert caught.value.code() == Code.NOT_FOUND
    assert caught.value.details() == "Could not find version 8 of model calculator"


@pytest.mark.parametrize(
    ("fill", "code", "details"),
    [
        (lambda r: None, Code.INVALID_ARGUMENT, "Missing ModelSpec"),
        (
            lambda r: r.model_spec.SetInParent(),
            Code.NOT_FOUND,
            "Could not find any versions of model ",
        ),
        (
            lambda r: setattr(r.model_spec, "name", "nobody"),
            Code.NOT_FOUND,
            "Could not find any versions of model nobody",
        ),
    ],
)
def test_bad_status_request(
    model_stub: Any, fill: Callable[[Any], None], code: grpc.StatusCode, details: str
) -> None:
    request = get_model_status_pb2.GetModelStatusRequest()
    fill(request)
    with pytest.raises(grpc.RpcError) as caught:
        model_stub.GetModelStatus(request)
    assert (caught.value.code(), caught.value.details()) == (code, details)


def test_calls_that_are_not_covered_say_so(server: Server) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        for method in ("SessionService/SessionRun", "PredictionService/PredictStreamed"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/tensorflow.serving.{method}", bytes, bytes)(b"")
            assert caught.value.code() == Code.UNIMPLEMENTED
            assert f"does not answer /tensorflow.serving.{method}" in str(caught.value.details())
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/some.other.Service/Method", bytes, bytes)(b"")
        assert caught.value.code() == Code.UNIMPLEMENTED


def test_32_clients_get_their_own_right_answers(server: Server, base_path: Path) -> None:
    model = tf.saved_model.load(str(base_path / "7"))
    convolve, calculate = model.signatures["convolve"], model.signatures["serving_default"]

    def client(number: int) -> None:
        random = np.random.default_rng(number)
        with grpc.insecure_channel(
            server.grpc, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as c:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(c)
            for size in (1, 4, 2, 7, 3):
                image = random.random([size, 8, 8, 3], np.float32)
                response = stub.Predict(predict_request("convolve", image=image))
                np.testing.assert_allclose(
                    tf.make_ndarray(response.outputs["map"]),
                    convolve(image=tf.constant(image))["map"],
                    rtol=1e-5,
                )
                a = random.random([size, 2], np.float32)
                b = random.integers(0, 1000, size, np.int32)
                response = stub.Predict(predict_request(a=a, b=b))
                expected = calculate(a=tf.constant(a), b=tf.constant(b))
                for alias, tensor in expected.items():
                    np.testing.assert_array_equal(tf.make_ndarray(response.outputs[alias]), tensor)

    with ThreadPoolExecutor(32) as pool:
        assert len(list(pool.map(client, range(32)))) == 32


def test_package_is_light_until_it_serves() -> None:
    code = "import sys, model_server.server; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
