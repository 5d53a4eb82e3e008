"""NumPy arrays to TensorProto and back, for the numeric types, booleans and strings."""

import math

import numpy as np
from numpy.typing import ArrayLike

from tfserving import messages_pb2 as pb

# For each type: NumPy's name for it, and the field that lists its values one by one.
TYPES: dict[pb.DataType, tuple[np.dtype, str]] = {
    pb.DT_HALF: (np.dtype(np.float16), "half_val"),
    pb.DT_FLOAT: (np.dtype(np.float32), "float_val"),
    pb.DT_DOUBLE: (np.dtype(np.float64), "double_val"),
    pb.DT_INT8: (np.dtype(np.int8), "int_val"),
    pb.DT_INT16: (np.dtype(np.int16), "int_val"),
    pb.DT_INT32: (np.dtype(np.int32), "int_val"),
    pb.DT_INT64: (np.dtype(np.int64), "int64_val"),
    pb.DT_UINT8: (np.dtype(np.uint8), "int_val"),
    pb.DT_UINT16: (np.dtype(np.uint16), "int_val"),
    pb.DT_UINT32: (np.dtype(np.uint32), "uint32_val"),
    pb.DT_UINT64: (np.dtype(np.uint64), "uint64_val"),
    pb.DT_BOOL: (np.dtype(np.bool_), "bool_val"),
    pb.DT_STRING: (np.dtype(object), "string_val"),
}
DATA_TYPES = {dtype: data_type for data_type, (dtype, _) in TYPES.items()}


def numpy_dtype(data_type: pb.DataType) -> np.dtype:
    """Return NumPy's name for a type, such as float32 for ``DT_FLOAT`` (strings are ``object``).

    Raises TypeError for a type that these conversions do not cover.
    """
    if data_type not in TYPES:
        name = pb.DataType.Name(data_type) if data_type in pb.DataType.values() else data_type
        raise TypeError(f"Tensors of type {name} have no conversion to NumPy here.")
    return TYPES[data_type][0]


def make_tensor_proto(values: ArrayLike) -> pb.TensorProto:
    """Return an array (or a number, string, list ...) as a TensorProto of the same type and shape.

    Numbers and booleans travel as raw little-endian bytes in ``tensor_content``, ``str`` and
    ``bytes`` in ``string_val``, text as UTF-8. Raises TypeError for any other type.
    """
    array = np.asarray(values)
    if array.dtype.kind in "SU":  # NumPy's own strings lose trailing zero bytes
        array = np.asarray(values, dtype=object)
    data_type = DATA_TYPES.get(array.dtype.newbyteorder("="))
    if data_type is None:
        raise TypeError(f"Arrays of type {array.dtype} have no conversion to a TensorProto here.")

    dims = [pb.TensorShapeProto.Dim(size=size) for size in array.shape]
    tensor = pb.TensorProto(dtype=data_type, tensor_shape=pb.TensorShapeProto(dim=dims))
    if data_type == pb.DT_STRING:
        for value in array.flat:
            tensor.string_val.append(value.encode() if isinstance(value, str) else value)
    else:
        tensor.tensor_content = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return tensor


def make_ndarray(tensor: pb.TensorProto) -> np.ndarray:
    """Return a TensorProto as an array of the same type and shape; strings as ``bytes`` objects.

    A server may send raw bytes in ``tensor_content``, or list the values in the field of their
    type. If that list is too short, its last value is repeated; an empty one stands for zeros.
    Raises TypeError for a type that is not covered, ValueError when there are more values than the
    shape has room for.
    """
    dtype = numpy_dtype(tensor.dtype)
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.tensor_content:
        content = np.frombuffer(tensor.tensor_content, dtype.newbyteorder("<"))
        return content.astype(dtype).reshape(shape)

    values = getattr(tensor, TYPES[tensor.dtype][1])
    if tensor.dtype == pb.DT_HALF:  # each value is the 16 bits of a number, written as an integer
        array = np.fromiter(values, np.uint16).view(np.float16)
    else:
        array = np.fromiter(values, dtype)
    zero = b"" if tensor.dtype == pb.DT_STRING else dtype.type(0)
    last = array[-1] if array.size else zero
    missing = math.prod(shape) - array.size
    return np.append(array, np.full(max(missing, 0), last, dtype)).reshape(shape)
