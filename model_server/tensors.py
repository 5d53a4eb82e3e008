"""TensorProto to NumPy array and back, without a Python loop over the values."""

import math
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

# TensorFlow's messages show its C++ names. These differ from Python's.
_CPP_NAMES = {"float16": "half", "float32": "float", "float64": "double"}

# No larger tensor fits into a message. A few bytes can claim one, though: a last value is repeated.
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
# The dtypes whose typed field holds the values as they lie in memory.
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
        # TensorFlow's own parser knows the rest: every typed field, and that the last value is
        # repeated where values are missing.
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
        _merge(proto, dtype, array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    elif dtype == tf.string:
        proto.string_val.extend(array.ravel().tolist())
    else:
        is_half = dtype in (tf.float16, tf.bfloat16)
        _merge(proto, dtype, _varints(array.ravel().view(np.uint16) if is_half else array.ravel()))
    return proto


def _merge(proto: Any, dtype: Any, values: bytes) -> None:
    """Fill the typed field of a dtype with values in the form that they have on the wire.

    There, the field's number and the length of the values come first. Read in this form, a million
    values take a few milliseconds; appended one by one, they take fifty.
    """
    if values:
        number = tensor_pb2.TensorProto.DESCRIPTOR.fields_by_name[_FIELDS[dtype]].number
        proto.MergeFromString(_varints(np.array([number << 3 | 2, len(values)])) + values)


def _varints(values: np.ndarray) -> bytes:
    """Write integers as protobuf does: seven bits a byte, lowest first, +128 if more follow."""
    rest = values.astype(np.int64).view(np.uint64)
    width = -(-int(rest.max(initial=1)).bit_length() // 7)
    encoded = np.empty((len(rest), width), np.uint8)
    used = np.ones(encoded.shape, bool)
    for column in range(width):
        low = rest.astype(np.uint8) & 127
        rest >>= 7
        more = rest > 0
        encoded[:, column] = low | more.view(np.uint8) << 7
        used[:, column + 1 : column + 2] = more[:, None]
    return encoded[used].tobytes()
