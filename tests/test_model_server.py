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
from helpers.basics import ROOT
from helpers.servers import Server
from helpers.serving import Client, predict_request, refused
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
)

Code = grpc.StatusCode
NAME = "calculator"
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
    path = tmp_path_factory.mktemp(NAME)
    export_calculator(path / "7")
    return path


@pytest.fixture(scope="module")
def server(base_path: Path, serve_model: Callable[[str, Path], Server]) -> Server:
    return serve_model(NAME, base_path)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(server, NAME) as client:
        yield client


def good_inputs(count: int = 2) -> dict[str, Any]:
    return {
        "a": np.arange(1, 1 + 2 * count, dtype="float32").reshape(count, 2),
        "b": np.arange(10, 10 + 10 * count, 10, dtype="int32"),
    }


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
def test_every_dtype_in_every_encoding(client: Client, dtype: Any, shape: list[int]) -> None:
    array = sample(dtype, shape)
    typed = typed_proto(array, dtype)
    content = tensor_pb2.TensorProto(dtype=typed.dtype, tensor_shape=typed.tensor_shape)
    content.tensor_content = b"" if dtype == tf.string else array.tobytes()
    for proto in (typed, content) if dtype != tf.string else (typed,):
        answer = client.predict(f"echo_{dtype.name}", x=proto).outputs["y"]
        assert answer == typed  # the answer comes in typed fields, value for value


def test_last_value_stands_for_the_missing_ones(client: Client) -> None:
    proto = typed_proto(np.array([1.5, 2.5], "float32"), tf.float32)
    proto.tensor_shape.CopyFrom(tf.TensorShape([2, 3]).as_proto())
    answer = client.predict("echo_float32", x=proto).outputs["y"]
    np.testing.assert_array_equal(tf.make_ndarray(answer), [[1.5, 2.5, 2.5], [2.5, 2.5, 2.5]])
    del proto.float_val[1:]
    answer = client.predict("echo_float32", x=proto).outputs["y"]
    np.testing.assert_array_equal(tf.make_ndarray(answer), np.full([2, 3], 1.5))


@pytest.mark.parametrize(
    ("proto", "expected"),
    [
        (tensor_pb2.TensorProto(float_val=[1, 2, 3]), [1, 2]),  # more than the shape holds
        (tensor_pb2.TensorProto(), [0, 0]),
        (tensor_pb2.TensorProto(int_val=[5, 6]), [0, 0]),  # the field of another dtype
        (tensor_pb2.TensorProto(float_val=[1, 2], tensor_content=b"\0\0\0\x40" * 2), [2, 2]),
    ],
)
def test_values_are_read_as_tensorflow_reads_them(
    client: Client, proto: Any, expected: list[float]
) -> None:
    proto.dtype = tf.float32.as_datatype_enum
    proto.tensor_shape.dim.add(size=2)
    assert client.predict("echo_float32", x=proto).outputs["y"].float_val == expected


def test_a_proto_of_unknown_rank_is_a_scalar(client: Client) -> None:
    proto = typed_proto(np.full([], 3, "float32"), tf.float32)
    proto.tensor_shape.unknown_rank = True
    assert tf.make_ndarray(client.predict("echo_float32", x=proto).outputs["y"]) == 3


def test_compressed_messages(client: Client) -> None:
    request = client.request(**good_inputs())
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        assert client.prediction.Predict(request, compression=compression).outputs


def test_default_signature_with_several_inputs_and_outputs(client: Client) -> None:
    response = client.predict(**good_inputs())
    assert response.model_spec.name == NAME
    assert response.model_spec.version.value == 7
    assert response.model_spec.signature_name == "serving_default"
    assert set(response.outputs) == {"sum", "twice"}
    np.testing.assert_array_equal(tf.make_ndarray(response.outputs["sum"]), [[11, 12], [23, 24]])
    assert list(response.outputs["twice"].int_val) == [20, 40]


def test_empty_batch(client: Client) -> None:
    response = client.predict(**good_inputs(0))
    assert tf.make_ndarray(response.outputs["sum"]).shape == (0, 2)


def test_output_filter_and_version(client: Client) -> None:
    request = client.request(**good_inputs())
    request.output_filter.append("twice")
    request.model_spec.version.value = 7
    assert set(client.prediction.Predict(request).outputs) == {"twice"}


def test_message_far_above_four_megabytes(client: Client) -> None:
    array = np.random.default_rng(1).random([5_000_000], np.float32)
    answer = client.predict("echo_float32", x=array).outputs["y"]
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
    "unknown signature, broken tensor": (
        lambda r: r.MergeFrom(predict_request(NAME, "subtract", a=tensor_pb2.TensorProto())),
        Code.FAILED_PRECONDITION,
        'Serving signature key "subtract" not found.',
    ),
    "version 0": (
        lambda r: r.model_spec.version.SetInParent(),
        Code.NOT_FOUND,
        "Servable not found for request: Specific(calculator, 0)",
    ),
    "empty label": (
        lambda r: setattr(r.model_spec, "version_label", ""),
        Code.INVALID_ARGUMENT,
        "Unrecognized servable version label: ",
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
    "content too long": (
        lambda r: setattr(r.inputs["a"], "tensor_content", b"\0" * 20),
        Code.INVALID_ARGUMENT,
        "tensor parsing error: a",
    ),
    "more dimensions than NumPy knows": (
        lambda r: r.inputs["a"].CopyFrom(broadcast([1] * 70)),
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
def test_bad_request_has_the_status_of_tensorflow_serving(client: Client, name: str) -> None:
    spoil, code, details = BAD_REQUESTS[name]
    request = client.request(**good_inputs())
    spoil(request)
    got = refused(lambda: client.prediction.Predict(request))
    assert (got[0], details in got[1]) == (code, True), got
    assert client.predict(**good_inputs()).outputs


def test_tensor_of_another_rank_does_not_end_the_process(client: Client) -> None:
    flat = np.zeros([8, 8, 3], np.float32)
    code, details = refused(lambda: client.predict("convolve", image=flat))
    assert (code, "image has shape [8, 8, 3]" in details) == (Code.INVALID_ARGUMENT, True)
    response = client.predict("convolve", image=np.ones([1, 8, 8, 3], np.float32))
    assert tf.make_ndarray(response.outputs["map"]).max() == 27


def test_metadata(client: Client) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = NAME
    response = client.prediction.GetModelMetadata(request)
    assert (response.model_spec.name, response.model_spec.version.value) == (NAME, 7)
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
        (NAME, [], Code.INVALID_ARGUMENT, "must specify at least one metadata_field"),
        (NAME, ["size"], Code.INVALID_ARGUMENT, "Metadata field size is not supported"),
        ("", ["signature_def"], Code.INVALID_ARGUMENT, "ModelSpec has no name specified."),
        ("nobody", ["signature_def"], Code.NOT_FOUND, "Servable not found for request"),
    ],
)
def test_bad_metadata_request(
    client: Client, name: str | None, fields: list[str], code: grpc.StatusCode, details: str
) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
    if name is not None:
        request.model_spec.SetInParent()
        request.model_spec.name = name
    got = refused(lambda: client.prediction.GetModelMetadata(request))
    assert (got[0], details in got[1]) == (code, True), got


def test_model_status(client: Client) -> None:
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = NAME
    (status,) = client.models.GetModelStatus(request).model_version_status
    assert (status.version, status.state) == (7, status.AVAILABLE)
    assert (status.status.error_code, status.status.error_message) == (0, "")
    request.model_spec.version.value = 8
    missing = "Could not find version 8 of model calculator"
    assert refused(lambda: client.models.GetModelStatus(request)) == (Code.NOT_FOUND, missing)


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
    client: Client, fill: Callable[[Any], None], code: grpc.StatusCode, details: str
) -> None:
    request = get_model_status_pb2.GetModelStatusRequest()
    fill(request)
    assert refused(lambda: client.models.GetModelStatus(request)) == (code, details)


def test_long_details_are_cut(client: Client) -> None:
    name = "é" * 600
    code, details = refused(lambda: client.predict(name))
    whole = f'Serving signature key "{name}" not found.'
    assert code == Code.FAILED_PRECONDITION
    assert details == whole.encode()[:1024].decode("utf-8", "ignore") + "...TRUNCATED"


def test_calls_that_are_not_covered_say_so(client: Client) -> None:
    def call(method: str) -> tuple[grpc.StatusCode, str]:
        return refused(lambda: client.channel.unary_unary(method, bytes, bytes)(b""))

    for name in ("SessionService/SessionRun", "PredictionService/PredictStreamed"):
        code, details = call(f"/tensorflow.serving.{name}")
        assert code == Code.UNIMPLEMENTED
        assert f"does not answer /tensorflow.serving.{name}" in details
    assert call("/some.other.Service/Method")[0] == Code.UNIMPLEMENTED


def test_32_clients_get_their_own_right_answers(server: Server, base_path: Path) -> None:
    model = tf.saved_model.load(str(base_path / "7"))
    convolve, calculate = model.signatures["convolve"], model.signatures["serving_default"]

    def client(number: int) -> None:
        random = np.random.default_rng(number)
        with Client(server, NAME) as own:
            for size in (1, 4, 2, 7, 3):
                image = random.random([size, 8, 8, 3], np.float32)
                response = own.predict("convolve", image=image)
                np.testing.assert_allclose(
                    tf.make_ndarray(response.outputs["map"]),
                    convolve(image=tf.constant(image))["map"],
                    rtol=1e-5,
                )
                a = random.random([size, 2], np.float32)
                b = random.integers(0, 1000, size, np.int32)
                response = own.predict(a=a, b=b)
                expected = calculate(a=tf.constant(a), b=tf.constant(b))
                for alias, tensor in expected.items():
                    np.testing.assert_array_equal(tf.make_ndarray(response.outputs[alias]), tensor)

    with ThreadPoolExecutor(32) as pool:
        assert len(list(pool.map(client, range(32)))) == 32


def test_package_is_light_until_it_serves() -> None:
    code = "import sys, model_server.server; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
