"""TensorProto to NumPy array and back, without a Python loop over the values."""

import math
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

# TensorFlow's C++ names, which its messages show, where Python's differ.
_CPP_NAMES = {"float16": "half", "float32": "float", "float64": "double"}

# Nothing larger fits into a message; a few bytes can claim to be larger, with a repeated value.
MAX_BYTES = 2**31

# The typed field that holds the values of each dtype.
_FIELDS = {
    tf.float16: "half_val",
    tf.bfloat16: "half_val",
    tf.float32: "float_val",
    tf.float64: "double_val",
    tf.complex64: "scomplex_val",
    tf.complex128: "dcomplex_val",
    tf.int8: "int_val",
    tf.int16: "int_val",
    tf.int32: "int_val",
    tf.int64: "int64_val",
    tf.uint8: "int_val",
    tf.uint16: "int_val",
    tf.uint32: "uint32_val",
    tf.uint64: "uint64_val",
    tf.bool: "bool_val",
    tf.string: "string_val",
}
# Values that a typed field holds in another form: as bits.
_VIEWS = {tf.float16: np.uint16, tf.bfloat16: np.uint16}
# Values that a typed field holds as they lie in memory.
_FIXED_WIDTH = {tf.float32, tf.float64, tf.complex64, tf.complex128, tf.bool}


def dtype_name(dtype: int) -> str:
    """Name a ``DataType`` as TensorFlow's C++ messages do: ``float``, ``double``, ``uint8``."""
    name = tf.as_dtype(dtype).name
    return _CPP_NAMES.get(name, name)


def from_proto(proto: Any) -> np.ndarray:
    """Read a TensorProto in any of its encodings; strings become an object array of bytes.

    Raises ValueError when dtype, shape and values do not belong together.
    """
    try:
        dtype = tf.as_dtype(proto.dtype)
        if dtype not in _FIELDS:
            raise ValueError(f"{dtype.name} cannot be sent")
        shape = [dim.size for dim in proto.tensor_shape.dim]
        if min(shape, default=0) < 0 or math.prod(shape) * max(dtype.size, 1) > MAX_BYTES:
            raise ValueError(f"shape {shape} is not that of a tensor")
        if proto.tensor_content and dtype != tf.string:
            return np.frombuffer(proto.tensor_content, dtype.as_numpy_dtype).reshape(shape)
        # TensorFlow's own parser knows the rest: every typed field, and that a last value stands
        # for all that are missing after it.
        with tf.device("CPU:0"):
            parsed = tf.io.parse_tensor(proto.SerializeToString(), dtype).numpy()
        return np.asarray(parsed, dtype.as_numpy_dtype)  # a single string comes as plain bytes
    except (TypeError, tf.errors.OpError) as error:
        raise ValueError(str(error)) from error


def to_proto(array: np.ndarray, as_tensor_content: bool = False, proto: Any = None) -> Any:
    """Write an array of any shape into the typed field of its dtype, or into ``tensor_content``.

    Strings always go into their typed field, as in TensorFlow Serving. The values go into the empty
    ``proto`` if there is one, which saves a copy.
    """
    dtype = tf.as_dtype(array.dtype)
    proto = tensor_pb2.TensorProto() if proto is None else proto
    proto.dtype = dtype.as_datatype_enum
    proto.tensor_shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
    if as_tensor_content and dtype != tf.string:
        proto.tensor_content = array.tobytes()
    elif dtype in _FIXED_WIDTH:
        # On the wire, such a field is its number and its length before the values as they lie in
        # memory; a million of them are written in a millisecond instead of fifty.
        values = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        number = tensor_pb2.TensorProto.DESCRIPTOR.fields_by_name[_FIELDS[dtype]].number
        if values:
            proto.MergeFromString(_varint(number << 3 | 2) + _varint(len(values)) + values)
    else:
        flat = np.ascontiguousarray(array).ravel()
        numbers = flat.view(_VIEWS[dtype]) if dtype in _VIEWS else flat
        getattr(proto, _FIELDS[dtype]).extend(numbers.tolist())
    return proto


def _varint(number: int) -> bytes:
    """Write a non-negative integer as protobuf does: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
