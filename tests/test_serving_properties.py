"""Properties of the model server's tensors: what goes in comes out, in protobuf and in JSON."""

import json
import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorflow.core.framework import tensor_pb2

from model_server import json_tensors, tensors
from model_server.errors import ServingError

settings.register_profile(
    "serving", derandomize=True, database=None, deadline=None, max_examples=60
)
settings.load_profile("serving")

FLOATS = [tf.float16, tf.float32, tf.float64]
INTEGERS = [tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.uint32, tf.uint64]
IN_JSON = [tf.float32, tf.float64, *(each for each in INTEGERS if each != tf.uint16)]
NUMERIC = [*FLOATS, tf.bfloat16, tf.complex64, tf.complex128, tf.bool, *INTEGERS]

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def numeric_arrays(draw: st.DrawFn) -> np.ndarray:
    """Draw an array of any numeric dtype, with any bits: NaN, infinities and negative zero too."""
    dtype = draw(st.sampled_from(NUMERIC)).as_numpy_dtype
    shape = draw(shapes)
    size = np.dtype(dtype).itemsize
    count = math.prod(shape)
    if dtype is np.bool_:
        return draw(hnp.arrays(np.bool_, shape))
    data = draw(st.binary(min_size=count * size, max_size=count * size))
    return np.frombuffer(data, dtype).reshape(shape)


@st.composite
def string_arrays(draw: st.DrawFn) -> np.ndarray:
    shape = draw(shapes)
    array = np.empty(math.prod(shape), object)
    array[:] = draw(st.lists(st.binary(max_size=5), min_size=array.size, max_size=array.size))
    return array.reshape(shape)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Compare dtype, shape and every bit: NaN equals itself, 0 is not -0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return (
        bool((left == right).all()) if left.dtype == object else left.tobytes() == right.tobytes()
    )


@given(numeric_arrays() | string_arrays(), st.booleans())
def test_tensor_proto_round_trip(array: np.ndarray, as_tensor_content: bool) -> None:
    proto = tensors.to_proto(array, as_tensor_content)
    back = tensors.from_proto(tensor_pb2.TensorProto.FromString(proto.SerializeToString()))
    quiet = array.dtype in (np.float16, np.float32, np.complex64) and np.isnan(array).any()
    assert same(back, array) or (quiet and np.array_equal(back, array, equal_nan=True))


@given(numeric_arrays() | string_arrays())
def test_tensor_proto_is_what_tensorflow_reads(array: np.ndarray) -> None:
    read = tf.make_ndarray(tensors.to_proto(array))
    assert read.shape == array.shape
    assert read.tolist() == array.tolist() or np.array_equal(read, array, equal_nan=True)


@given(numeric_arrays().filter(lambda array: array.size), st.data())
def test_the_last_value_stands_for_the_missing_ones(array: np.ndarray, data: st.DataObject) -> None:
    flat = array.ravel()
    count = data.draw(st.integers(1, flat.size))
    proto = tensors.to_proto(flat[:count])
    proto.tensor_shape.ParseFromString(tf.TensorShape(array.shape).as_proto().SerializeToString())
    expected = np.concatenate([flat[:count], np.repeat(flat[count - 1 : count], flat.size - count)])
    np.testing.assert_array_equal(tensors.from_proto(proto), expected.reshape(array.shape))


@given(st.binary(max_size=40), st.lists(st.integers(-2, 5), max_size=3), st.sampled_from(NUMERIC))
def test_bytes_that_do_not_fit_the_shape_are_a_value_error(
    content: bytes, shape: list[int], dtype: Any
) -> None:
    proto = tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum, tensor_content=content)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    fits = min(shape, default=0) >= 0 and math.prod(shape) * dtype.size == len(content)
    try:
        assert list(tensors.from_proto(proto).shape) == shape
        assert fits or not content
    except ValueError:
        assert not fits


def parsed(text: str, **declared: Any) -> tuple[dict[str, np.ndarray], bool]:
    document = json_tensors.parse_body(text.encode())
    return json_tensors.parse_inputs(
        document, {name: dtype.as_datatype_enum for name, dtype in declared.items()}
    )


@st.composite
def json_values(draw: st.DrawFn) -> tuple[Any, np.ndarray]:
    """Draw a dtype and an array of it with at least one row, as a client would send it."""
    dtype = draw(st.sampled_from([*IN_JSON, tf.bool]))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=3))
    elements: Any = None
    if dtype.is_floating:
        width: Any = dtype.size * 8
        numbers = st.floats(width=width, allow_nan=False)
        elements = numbers | st.sampled_from([math.nan, math.inf, -math.inf])
    return dtype, draw(hnp.arrays(dtype.as_numpy_dtype, shape, elements=elements))


@given(json_values(), st.booleans())
def test_json_reads_what_python_writes(value: tuple[Any, np.ndarray], rows: bool) -> None:
    dtype, array = value
    key = "instances" if rows else "inputs"
    inputs, in_rows = parsed(json.dumps({key: array.tolist()}), x=dtype)
    assert in_rows == rows
    assert inputs["x"].dtype == array.dtype
    np.testing.assert_array_equal(inputs["x"], array)


@given(json_values(), json_values())
def test_named_rows_and_columns_say_the_same(
    left: tuple[Any, np.ndarray], right: tuple[Any, np.ndarray]
) -> None:
    count = min(len(left[1]), len(right[1]))
    columns = {"a": left[1][:count].tolist(), "b": right[1][:count].tolist()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    declared = {"a": left[0], "b": right[0]}
    by_row, _ = parsed(json.dumps({"instances": rows}), **declared)
    by_column, _ = parsed(json.dumps({"inputs": columns}), **declared)
    for name in columns:
        np.testing.assert_array_equal(by_row[name], by_column[name])


@given(json_values())
def test_python_reads_what_json_writes(value: tuple[Any, np.ndarray]) -> None:
    array = value[1]
    by_row = json.loads(json_tensors.format_rows({"y": array}))["predictions"]
    by_column = json.loads(json_tensors.format_columns({"y": array}))["outputs"]
    for back in (by_row, by_column):
        np.testing.assert_array_equal(np.array(back, array.dtype), array)
    several = json.loads(json_tensors.format_rows({"y": array, "z": array}))["predictions"]
    np.testing.assert_array_equal(np.array([row["z"] for row in several], array.dtype), array)


@given(string_arrays().filter(lambda array: array.size and array.ndim))
def test_any_bytes_travel_as_b64(array: np.ndarray) -> None:
    text = json_tensors.format_columns({"y_bytes": array})
    inputs, _ = parsed(json.dumps({"inputs": json.loads(text)["outputs"]}), x=tf.string)
    assert same(inputs["x"], array)


nested = st.recursive(
    st.integers(0, 9), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=8
)


def shape_of(value: Any) -> list[int] | None:
    """Return the shape of nested lists, None when they are ragged."""
    if not isinstance(value, list):
        return []
    inner = [shape_of(item) for item in value]
    if any(shape is None or shape != inner[0] for shape in inner):
        return None
    return [len(value), *(inner[0] or [])]


@given(nested)
def test_ragged_lists_are_refused_and_others_are_not(value: Any) -> None:
    shape = shape_of(value)
    text = json.dumps({"inputs": value})
    if shape is None:
        with pytest.raises(ServingError):
            parsed(text, x=tf.int32)
    else:
        assert list(parsed(text, x=tf.int32)[0]["x"].shape) == shape


@given(st.sampled_from(IN_JSON[2:]), st.integers(-(2**70), 2**70))
def test_integers_fit_or_are_refused(dtype: Any, number: int) -> None:
    text = json.dumps({"inputs": number})
    if dtype.min <= number <= dtype.max:
        assert parsed(text, x=dtype)[0]["x"] == number
    else:
        with pytest.raises(ServingError):
            parsed(text, x=dtype)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_body_is_answered(body: bytes) -> None:
    try:
        json_tensors.parse_inputs(json_tensors.parse_body(body), {"x": tf.float32.as_datatype_enum})
    except ServingError as error:
        assert error.message
