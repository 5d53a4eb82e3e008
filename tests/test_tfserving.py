"""The protocol of tfserving/, byte for byte against tensorflow-serving-api in the same process."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf.any_pb2 import Any
from google.protobuf.descriptor import Descriptor
from tensorflow.core.example import example_pb2, feature_pb2
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2, types_pb2
from tensorflow.core.protobuf import error_codes_pb2, meta_graph_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    input_pb2,
    model_management_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
    status_pb2,
)
from tensorflow_serving.config import (
    file_system_storage_path_source_pb2,
    log_collector_config_pb2,
    logging_config_pb2,
    model_server_config_pb2,
)

import tfserving
from tfserving import messages_pb2, server_messages_pb2, services_pb2_grpc
from tfserving.tensors import TYPES

ROOT = Path(tfserving.__file__).parent.parent
OURS = {
    **messages_pb2.DESCRIPTOR.message_types_by_name,
    **server_messages_pb2.DESCRIPTOR.message_types_by_name,
}
# These are in no Python package; TensorFlow Serving's own files are read with them.
FILES_ONLY = {"BatchingParameters", "MonitoringConfig", "PrometheusConfig", "SSLConfig"}
THEIRS = {
    name: message
    for module in [
        example_pb2,
        feature_pb2,
        tensor_pb2,
        tensor_shape_pb2,
        meta_graph_pb2,
        classification_pb2,
        get_model_metadata_pb2,
        get_model_status_pb2,
        inference_pb2,
        input_pb2,
        model_management_pb2,
        model_pb2,
        predict_pb2,
        prediction_log_pb2,
        regression_pb2,
        status_pb2,
        file_system_storage_path_source_pb2,
        log_collector_config_pb2,
        logging_config_pb2,
        model_server_config_pb2,
    ]
    for name, message in module.DESCRIPTOR.message_types_by_name.items()
}
NUMERIC = [dtype for dtype, _ in TYPES.values() if dtype != np.dtype(object)]


def example(dtype: np.dtype, shape: tuple[int, ...] = (2, 3)) -> np.ndarray:
    """Values that a wrong type or a wrong byte order would change."""
    values = np.random.default_rng(7).integers(-120, 120, shape)
    if dtype.kind == "u":
        values = values + 120
    if dtype.kind == "b":
        return values > 0
    return (values / 3 if dtype.kind == "f" else values).astype(dtype)


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected, strict=True)


def their_ndarray(tensor: tfserving.TensorProto) -> np.ndarray:
    return tf.make_ndarray(tensor_pb2.TensorProto.FromString(tensor.SerializeToString()))


def our_ndarray(tensor: tensor_pb2.TensorProto) -> np.ndarray:
    return tfserving.make_ndarray(tfserving.TensorProto.FromString(tensor.SerializeToString()))


def test_generated_files_are_up_to_date(tmp_path):
    (tmp_path / "tfserving").mkdir()
    commands = re.findall(r"python -m grpc_tools\.protoc .*", tfserving.__doc__)
    assert len(commands) == 3
    for command in commands:
        arguments = shlex.split(command.replace("out=.", f"out={tmp_path}"))
        subprocess.run([sys.executable, *arguments[1:]], cwd=ROOT, check=True)
    generated = {path.name: path.read_text() for path in (tmp_path / "tfserving").iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "tfserving").glob("*_pb2*")}
    assert sorted(generated) == [
        "messages_pb2.py",
        "messages_pb2.pyi",
        "server_messages_pb2.py",
        "server_messages_pb2.pyi",
        "services_pb2_grpc.py",
    ]
    assert generated == committed, "run the three commands in tfserving/__init__.py"


@pytest.mark.parametrize("name", sorted(OURS.keys() - FILES_ONLY))
def test_fields_have_tensorflow_s_names_numbers_and_types(name):
    def wire(field):
        kind = "enum" if field.enum_type else field.type
        return field.number, kind, field.is_repeated, field.message_type and field.message_type.name

    def compare(ours: Descriptor, theirs: Descriptor):
        for field in ours.fields:
            assert wire(field) == wire(theirs.fields_by_name[field.name]), field.name
        for nested in ours.nested_types:
            compare(nested, theirs.nested_types_by_name[nested.name])
        for enum in ours.enum_types:
            expected = theirs.enum_types_by_name[enum.name]
            assert [(v.name, v.number) for v in enum.values] == [
                (v.name, v.number) for v in expected.values
            ]

    compare(OURS[name], THEIRS[name])


def test_data_types_and_codes_have_tensorflow_s_numbers():
    assert set(messages_pb2.DataType.items()) <= set(types_pb2.DataType.items())
    assert set(messages_pb2.Code.items()) == {
        item for item in error_codes_pb2.Code.items() if item[1] < 20
    }


@pytest.mark.parametrize("service", ["PredictionService", "ModelService"])
def test_stubs_call_tensorflow_serving_s_paths(service):
    def paths(module):
        class Recorder:
            def __init__(self):
                self.paths = set()

            def unary_unary(self, path, **_):
                self.paths.add(path)

        recorder = Recorder()
        getattr(module, f"{service}Stub")(recorder)
        return recorder.paths

    theirs = {
        "PredictionService": prediction_service_pb2_grpc,
        "ModelService": model_service_pb2_grpc,
    }[service]
    ours = paths(services_pb2_grpc)
    assert ours == paths(theirs)


@pytest.mark.parametrize("shape", [(2, 3), (1,), (), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", NUMERIC, ids=str)
def test_numbers_go_both_ways(dtype, shape):
    array = example(dtype, shape)
    assert_same(np.asarray(their_ndarray(tfserving.make_tensor_proto(array))), array)
    assert_same(our_ndarray(tf.make_tensor_proto(array)), array)
    assert_same(tfserving.make_ndarray(tfserving.make_tensor_proto(array)), array)


# TensorFlow itself lists the values of uint16 and bool one by one.
@pytest.mark.parametrize("dtype", [d for d in NUMERIC if d.name not in ("uint16", "bool")], ids=str)
def test_arrays_have_tensorflow_s_very_bytes(dtype):
    array = example(dtype)
    ours = tfserving.make_tensor_proto(array).SerializeToString(deterministic=True)
    assert ours == tf.make_tensor_proto(array).SerializeToString(deterministic=True)


@pytest.mark.parametrize("given", [6, 2, 1, 0])
@pytest.mark.parametrize("dtype", NUMERIC, ids=str)
def test_typed_fields_repeat_their_last_value(dtype, given):
    data_type, field = next((key, name) for key, (kind, name) in TYPES.items() if kind == dtype)
    values = example(dtype).ravel()[:given]
    tensor = tensor_pb2.TensorProto(dtype=data_type)
    tensor.tensor_shape.dim.add(size=2)
    tensor.tensor_shape.dim.add(size=3)
    getattr(tensor, field).extend(values.view(np.uint16) if field == "half_val" else values)

    array = our_ndarray(tensor)
    assert_same(array, tf.make_ndarray(tensor))
    expected = values[np.minimum(np.arange(6), given - 1)] if given else np.zeros(6, dtype)
    assert_same(array, expected.reshape(2, 3))


@pytest.mark.parametrize(
    "strings",
    [[b"\xff\xd8 a JPEG\x00\x00", b""], [["dress", "hat"], ["größe", ""]], b"one\x00", [], "text"],
    ids=repr,
)
def test_strings_go_both_ways(strings):
    expected = np.asarray(strings, dtype=object)
    encode = np.frompyfunc(lambda text: text.encode() if isinstance(text, str) else text, 1, 1)
    expected = np.asarray(encode(expected), dtype=object)

    ours = tfserving.make_tensor_proto(expected if expected.size == 0 else strings)
    theirs = tf.make_tensor_proto(strings, dtype=tf.string)
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(
        deterministic=True
    )
    assert_same(our_ndarray(theirs), expected)
    assert_same(np.asarray(their_ndarray(ours), dtype=object), expected)


def test_strings_repeat_their_last_value():
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[b"a", b"b"])
    tensor.tensor_shape.dim.add(size=4)
    assert our_ndarray(tensor).tolist() == [b"a", b"b", b"b", b"b"]
    assert tf.make_ndarray(tensor).tolist() == [b"a", b"b", b"b", b"b"]


def test_order_of_bytes_and_of_axes_does_not_matter():
    array = example(np.dtype(np.float32))
    assert_same(their_ndarray(tfserving.make_tensor_proto(array.astype(">f4"))), array)
    assert_same(their_ndarray(tfserving.make_tensor_proto(array.T)), array.T)


def test_an_array_may_be_changed_after_it_was_read():
    array = tfserving.make_ndarray(tfserving.make_tensor_proto(np.zeros(3, np.float32)))
    array += 1
    assert array.tolist() == [1, 1, 1]


def test_types_without_conversion_are_named():
    with pytest.raises(TypeError, match="datetime64"):
        tfserving.make_tensor_proto(np.zeros(1, "datetime64[s]"))
    with pytest.raises(TypeError, match="DT_BFLOAT16"):
        tfserving.make_ndarray(tfserving.TensorProto(dtype=messages_pb2.DT_BFLOAT16))
    with pytest.raises(TypeError, match="DT_RESOURCE"):
        tfserving.make_ndarray(tfserving.TensorProto(dtype=messages_pb2.DT_RESOURCE))
    with pytest.raises(TypeError, match="type 99 "):
        tfserving.make_ndarray(tfserving.TensorProto.FromString(b"\x08\x63"))


def test_more_values_than_the_shape_has_room_for_are_refused():
    tensor = tfserving.make_tensor_proto(np.zeros(3, np.float32))
    tensor.tensor_shape.dim[0].size = 2
    with pytest.raises(ValueError):
        tfserving.make_ndarray(tensor)
    listed = tfserving.TensorProto(dtype=messages_pb2.DT_FLOAT, float_val=[1, 2])
    with pytest.raises(ValueError):
        tfserving.make_ndarray(listed)


def fill_request(request, make_tensor_proto):
    request.model_spec.name = "clothing-model"
    request.model_spec.version.value = 3
    request.model_spec.signature_name = "serving_default"
    request.inputs["inputs"].CopyFrom(make_tensor_proto(example(np.dtype(np.float32))))
    request.output_filter.append("probabilities")
    return request


def test_predict_messages_are_the_same_bytes():
    ours = fill_request(tfserving.PredictRequest(), tfserving.make_tensor_proto)
    theirs = fill_request(predict_pb2.PredictRequest(), tf.make_tensor_proto)
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(
        deterministic=True
    )
    response = predict_pb2.PredictResponse(model_spec=theirs.model_spec)
    response.outputs["probabilities"].CopyFrom(theirs.inputs["inputs"])
    read = tfserving.PredictResponse.FromString(response.SerializeToString())
    assert read.model_spec.version.value == 3
    assert_same(
        tfserving.make_ndarray(read.outputs["probabilities"]), example(np.dtype(np.float32))
    )


def test_fields_that_only_tensorflow_knows_survive():
    theirs = fill_request(predict_pb2.PredictRequest(), tf.make_tensor_proto)
    theirs.client_id = b"somebody"
    through = tfserving.PredictRequest.FromString(theirs.SerializeToString())
    assert predict_pb2.PredictRequest.FromString(through.SerializeToString()) == theirs


def test_signatures_are_read_out_of_the_any():
    signatures = get_model_metadata_pb2.SignatureDefMap()
    inputs = signatures.signature_def["serving_default"].inputs["inputs"]
    inputs.dtype, inputs.name = types_pb2.DT_FLOAT, "serving_default_inputs:0"
    for size in (-1, 224, 200, 3):
        inputs.tensor_shape.dim.add(size=size)
    response = get_model_metadata_pb2.GetModelMetadataResponse()
    packed = Any()
    packed.Pack(signatures)
    response.metadata["signature_def"].CopyFrom(packed)

    read = tfserving.GetModelMetadataResponse.FromString(response.SerializeToString())
    value = read.metadata["signature_def"].value
    info = tfserving.SignatureDefMap.FromString(value).signature_def["serving_default"].inputs
    assert [dim.size for dim in info["inputs"].tensor_shape.dim] == [-1, 224, 200, 3]
    assert info["inputs"].name == "serving_default_inputs:0"
    assert tfserving.numpy_dtype(info["inputs"].dtype) == np.float32


def test_status_is_read():
    theirs = get_model_status_pb2.GetModelStatusResponse()
    theirs.model_version_status.add(version=2, state="AVAILABLE")
    broken = theirs.model_version_status.add(version=3, state="END")
    broken.status.error_code, broken.status.error_message = 5, "No such version."

    read = tfserving.GetModelStatusResponse.FromString(theirs.SerializeToString())
    first, second = read.model_version_status
    assert (first.version, first.state) == (2, tfserving.ModelVersionStatus.AVAILABLE)
    assert (second.status.error_code, second.status.error_message) == (5, "No such version.")


def test_tensorflow_is_not_imported():
    program = "import sys, tfserving; print('tensorflow' in sys.modules, 'grpc' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert result.stdout.split() == ["False", "True"]
