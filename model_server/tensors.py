"""TensorProto to NumPy array and back, without a Python loop over the values."""

import functools
import math
from typing import Any

import ml_dtypes
import numpy as np

import tfserving.tensors
from tfserving import messages_pb2 as pb

from .errors import invalid_argument

# No larger tensor fits into a message. A few bytes can claim one, though: a last value is repeated.
MAX_BYTES = 2**31

# For each type that can be sent: NumPy's name for it, and the field that lists its values.
TYPES: dict[int, tuple[np.dtype, str]] = tfserving.tensors.TYPES | {
    pb.DT_BFLOAT16: (np.dtype(ml_dtypes.bfloat16), "half_val"),
    pb.DT_COMPLEX64: (np.dtype(np.complex64), "scomplex_val"),
    pb.DT_COMPLEX128: (np.dtype(np.complex128), "dcomplex_val"),
}
_DATA_TYPES = {dtype: data_type for data_type, (dtype, _) in TYPES.items()}
# What a number of each of these fields is in memory.
_WIRE_TYPES: dict[str, type] = {
    "half_val": np.uint16,
    "scomplex_val": np.float32,
    "dcomplex_val": np.float64,
    "int_val": np.int32,
}
# The types whose field holds the values as they lie in memory.
_FIXED_WIDTH = {pb.DT_FLOAT, pb.DT_DOUBLE, pb.DT_COMPLEX64, pb.DT_COMPLEX128, pb.DT_BOOL}


def data_type(dtype: np.dtype) -> Any:
    """Return the ``DataType`` of an array's dtype; ``object`` stands for strings.

    Raises ServingError for a dtype that cannot be sent.
    """
    if dtype not in _DATA_TYPES:
        raise invalid_argument(f"arrays of type {dtype} cannot be sent")
    return _DATA_TYPES[dtype]


def dtype_name(data_type: int) -> str:
    """Name a ``DataType`` as TensorFlow's C++ messages do: ``float``, ``double``, ``uint8``."""
    known = data_type in pb.DataType.values()
    return pb.DataType.Name(data_type)[3:].lower() if known else f"unknown dtype {data_type}"


def from_proto(proto: Any) -> np.ndarray:
    """Read a TensorProto in any of its encodings; strings become an object array of bytes.

    Where values are missing the last one is repeated, and none at all stand for zeros. Raises
    ValueError when dtype, shape and values do not belong together.
    """
    if proto.dtype not in TYPES:
        raise ValueError(f"{dtype_name(proto.dtype)} cannot be sent")
    dtype, field = TYPES[proto.dtype]
    shape = [dim.size for dim in proto.tensor_shape.dim]
    size = math.prod(shape)
    is_text = proto.dtype == pb.DT_STRING
    if min(shape, default=0) < 0 or size * (1 if is_text else dtype.itemsize) > MAX_BYTES:
        raise ValueError(f"shape {shape} is not that of a tensor")
    if proto.tensor_content:
        if is_text:
            return _strings(proto.tensor_content, size).reshape(shape)
        return np.frombuffer(proto.tensor_content, dtype).reshape(shape)
    values = np.fromiter(getattr(proto, field), _WIRE_TYPES.get(field, dtype))
    if field == "int_val":
        values = values.astype(dtype)
    elif field in _WIRE_TYPES:
        values = values[: len(values) // 2 * 2] if dtype.kind == "c" else values
        values = values.view(dtype)
    values = values[:size]
    if len(values) < size:
        last = values[-1] if len(values) else b"" if is_text else 0
        values = np.concatenate([values, np.full(size - len(values), last, dtype)])
    return values.reshape(shape)


def to_proto(array: np.ndarray, as_tensor_content: bool = False, proto: Any = None) -> Any:
    """Write an array of any shape into the typed field of its dtype, or into ``tensor_content``.

    Strings always go into their typed field, as in TensorFlow Serving. The values go into the empty
    ``proto`` if there is one, which saves a copy.
    """
    proto = pb.TensorProto() if proto is None else proto
    proto.dtype = data_type(array.dtype)
    proto.tensor_shape.SetInParent()
    for length in array.shape:
        proto.tensor_shape.dim.add(size=length)
    if proto.dtype == pb.DT_STRING:
        proto.string_val.extend(array.ravel().tolist())
    elif as_tensor_content:
        proto.tensor_content = array.tobytes()
    elif proto.dtype in _FIXED_WIDTH:
        _merge(proto, array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    else:
        is_half = proto.dtype in (pb.DT_HALF, pb.DT_BFLOAT16)
        _merge(proto, _varints(array.ravel().view(np.uint16) if is_half else array.ravel()))
    return proto


def _strings(content: bytes, count: int) -> np.ndarray:
    """Read strings from raw bytes: first the length of each, as a varint, then all of them."""
    lengths, position = [], 0
    for _ in range(count):
        length = shift = 0
        while True:
            if position == len(content):
                raise ValueError("the lengths of the strings are cut off")
            byte = content[position]
            position += 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        lengths.append(length)
    if position + sum(lengths) != len(content):
        raise ValueError("the strings have other lengths than they say")
    strings = np.empty(count, object)
    for index, length in enumerate(lengths):
        strings[index] = content[position : position + length]
        position += length
    return strings


def _merge(proto: Any, values: bytes) -> None:
    """Fill the typed field of a dtype with values in the form that they have on the wire.

    There, the field's number and the length of the values come first. Read in this form, a million
    values take a few milliseconds; appended one by one, they take fifty.
    """
    if values:
        proto.MergeFromString(_head(TYPES[proto.dtype][1], len(values)) + values)


@functools.lru_cache(maxsize=256)
def _head(field: str, length: int) -> bytes:
    """Return what comes before this many bytes of values of a field."""
    number = pb.TensorProto.DESCRIPTOR.fields_by_name[field].number
    return _varints(np.array([number << 3 | 2, length]))


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
