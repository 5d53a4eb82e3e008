"""JSON to NumPy arrays and back, in the row and the column form of TensorFlow Serving's REST API.

Functions that loop in C parse, check and convert the numbers, of which a picture has 150,000.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

import grpc
import numpy as np

from tfserving import messages_pb2 as pb

from .errors import ServingError, invalid_argument
from .tensors import TYPES, data_type, dtype_name, shape_name

MAX_SHOWN_CHARACTERS = 500
# A string, or the short form of Infinity, which TensorFlow Serving reads and Python does not.
STRING_OR_INF = re.compile(rb'"(?:[^"\\]++|\\.)*+"|\bInf\b')
# Only a number with a three-digit exponent, or with hundreds of digits, can be too large for a
# double.
HUGE_NUMBER = re.compile(rb"[eE]\+?\d{3}|\d{309}")
# Everything but brackets, in a document whose strings are all closed.
NOT_A_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"|[^][{}"]++')
# TensorFlow Serving's message for each of Python's.
PARSE_ERRORS = {
    "Expecting value": "Invalid value.",
    "Extra data": "The document root must not be followed by other values.",
    "Expecting property name enclosed in double quotes": "Missing a name for object member.",
    "Expecting ':' delimiter": "Missing a colon after a name of object member.",
    "Unterminated string starting at": "Missing a closing quotation mark in string.",
    "Invalid control character at": "Invalid encoding in string.",
    "Invalid \\escape": "Invalid escape character in string.",
    "Invalid \\uXXXX escape": "Incorrect hex digit after \\u escape in string.",
}
JSON_TYPES = {
    dict: "Object",
    list: "Array",
    str: "String",
    int: "Number",
    float: "Number",
    bool: "Bool",
    type(None): "Null",
}


def parse_body(body: bytes) -> dict[str, Any]:
    """Parse a request's body, which must be a JSON object; NaN, ±Infinity and ±Inf are numbers."""
    if not body or body.isspace():
        raise invalid_argument("JSON Parse error: The document is empty")
    try:
        document = _loads(body)
    except json.JSONDecodeError as error:
        raise invalid_argument(f"JSON Parse error: {_parse_error(error)}") from error
    except (ValueError, RecursionError) as error:
        raise invalid_argument(f"JSON Parse error: {error}") from error
    if not isinstance(document, dict):
        raise invalid_argument(f"JSON Value: {show(document)} Is not object")
    return document


def _loads(body: bytes) -> Any:
    hooks: dict[str, Any] = {"object_pairs_hook": _first_of_each_key}
    if HUGE_NUMBER.search(body):  # Python would read them as Infinity
        hooks |= {"parse_float": _finite, "parse_int": _finite_integer}
    try:
        return json.loads(body, **hooks)
    except json.JSONDecodeError:
        longer = STRING_OR_INF.sub(lambda m: b"Infinity" if m[0] == b"Inf" else m[0], body)
        if longer == body:
            raise
        return json.loads(longer, **hooks)


def _parse_error(error: json.JSONDecodeError) -> str:
    """Return TensorFlow Serving's message for what is wrong in a document, and at which byte."""
    before = error.doc[: error.pos]
    message = PARSE_ERRORS.get(error.msg, error.msg)
    if error.msg == "Expecting ',' delimiter":
        open_brackets: list[str] = []
        for bracket in NOT_A_BRACKET.sub("", before):
            if bracket in "[{":
                open_brackets.append(bracket)
            else:
                open_brackets.pop()
        message = (
            "Missing a comma or ] after an array element."
            if open_brackets[-1] == "["
            else "Missing a comma or } after an object member."
        )
    return f"{message} at offset: {len(before.encode('utf-8', 'surrogatepass'))}"


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError("Number too big to be stored in double.")
    return value


def _finite_integer(number: str) -> int:
    _finite(number)
    return int(number)


def _first_of_each_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary in which, as in TensorFlow Serving, the first of two equal keys counts."""
    items = dict(pairs)
    return items if len(items) == len(pairs) else dict(reversed(pairs))


def parse_inputs(
    document: Mapping[str, Any], declared: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], bool]:
    """Read the tensors of a predict request, and whether they came in row form.

    ``declared`` maps the inputs of the signature to their ``TensorInfo``.
    """
    if "instances" in document and "inputs" in document:
        raise invalid_argument(
            f"JSON Value: {show(document)} Not formatted correctly expecting only one of "
            "'inputs' or 'instances' keys to exist"
        )
    if "instances" in document:
        return _parse_rows(document["instances"], declared), True
    if "inputs" in document:
        return _parse_columns(document["inputs"], declared), False
    raise invalid_argument("Missing 'inputs' or 'instances' key")


def format_rows(outputs: Mapping[str, np.ndarray]) -> str:
    """Write ``{"predictions": [...]}``: one value per row, or one object of named values."""
    batch = None
    for name, array in outputs.items():
        if not array.ndim:
            raise invalid_argument(f"Tensor name: {name} has no shape information")
        if batch is not None and batch != len(array):
            raise invalid_argument(
                f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {batch}"
            )
        batch = len(array)
    columns = {name: _to_json(name, array) for name, array in outputs.items()}
    if len(columns) == 1:
        rows = next(iter(columns.values()))
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return _dump("predictions", rows)


def format_columns(outputs: Mapping[str, np.ndarray]) -> str:
    """Write ``{"outputs": ...}``: the only tensor, or an object of named tensors."""
    columns = {name: _to_json(name, array) for name, array in outputs.items()}
    return _dump("outputs", columns if len(columns) > 1 else next(iter(columns.values())))


def _parse_rows(rows: Any, declared: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not isinstance(rows, list):
        raise invalid_argument(
            f"JSON Value: {show(rows)} Expecting 'instances' to be an list/array"
        )
    if not rows:
        raise invalid_argument("No values in 'instances' array")
    named = _is_named(rows[0])
    for index, row in enumerate(rows):
        if _is_named(row) != named:
            expected, got = ("object", "list") if named else ("value/list", "object")
            raise invalid_argument(
                f"Expecting {expected} but got {got} at item {index} of input list"
            )
        if named and row.keys() != declared.keys():
            if unknown := [name for name in row if name not in declared]:
                raise invalid_argument(
                    f"Failed to process element: {index} key: {unknown[0]} of 'instances' list. "
                    "Error: INVALID_ARGUMENT: JSON object: does not have named input: "
                    f"{unknown[0]}"
                )
            raise invalid_argument(
                f"Failed to process element: {index} of 'instances' list. JSON object: "
                f"{show(row)} keys must be equal to: {','.join(sorted(declared))}"
            )
    if named:
        return {
            name: _parse_batch([row[name] for row in rows], info.dtype, f" key: {name}")
            for name, info in declared.items()
        }
    if len(declared) > 1:
        raise invalid_argument(
            "instances is a plain list, but expecting list of objects as multiple input tensors "
            "required as per tensorinfo_map"
        )
    return {name: _parse_batch(rows, info.dtype, "") for name, info in declared.items()}


def _parse_batch(rows: list, dtype: int, key: str) -> np.ndarray:
    """Parse rows of one tensor; when that fails, parse them one by one to name the bad one."""
    try:
        return parse_tensor(rows, dtype)
    except ServingError as error:
        first = None
        for index, row in enumerate(rows):
            prefix = f"Failed to process element: {index}{key} of 'instances' list. Error: "
            try:
                array = parse_tensor(row, dtype)
            except ServingError as row_error:
                raise invalid_argument(
                    f"{prefix}{row_error.code.name}: {row_error.message}"
                ) from row_error
            first = array if first is None else first
            if array.size != first.size:
                raise invalid_argument(
                    f"{prefix}INVALID_ARGUMENT: Expecting tensor size: {first.size} "
                    f"but got: {array.size}"
                ) from error
            if array.shape != first.shape:
                raise invalid_argument(
                    f"{prefix}INVALID_ARGUMENT: Expecting shape {shape_name(first.shape)} "
                    f"but got: {shape_name(array.shape)}"
                ) from error
        raise


def _parse_columns(value: Any, declared: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if _is_named(value):
        for name in declared:
            if name not in value:
                raise invalid_argument(f"Missing named input: {name} in 'inputs' object.")
        return {name: parse_tensor(value[name], info.dtype) for name, info in declared.items()}
    if len(declared) > 1:
        raise invalid_argument(
            "inputs is a plain value/list, but expecting an object as multiple input tensors "
            "required as per tensorinfo_map"
        )
    return {name: parse_tensor(value, info.dtype) for name, info in declared.items()}


def parse_tensor(value: Any, dtype: int) -> np.ndarray:
    """Parse nested lists, or a single value, into an array of a ``DataType``.

    Raises ServingError for ragged lists, for values of another type, and for numbers that the
    dtype cannot hold.
    """
    level: list[Any] = [value]
    shape: list[int] = []
    while level and isinstance(level[0], list):
        if set(map(type, level)) != {list}:
            stray = next(item for item in level if not isinstance(item, list))
            raise invalid_argument(
                f"JSON Value: {show(stray)} found at incorrect level: {len(shape) + 1} "
                f"in the JSON DOM. Expected at level: {_rank(value)}"
            )
        size = len(level[0])
        if set(map(len, level)) != {size}:
            other = next(len(item) for item in level if len(item) != size)
            raise invalid_argument(
                f"Encountered list at unexpected size: {other} at level: {len(shape)} "
                f"expected size: {size}"
            )
        shape.append(size)
        level = list(chain.from_iterable(level))
    try:
        return _values(level, dtype).reshape(shape)
    except ServingError as error:
        if any(isinstance(item, list) for item in level):
            rank = len(shape)
            raise invalid_argument(
                f"Encountered list at unexpected level: {rank} expected < {rank}"
            ) from error
        raise


def _rank(value: Any) -> int:
    """Count how deep lists are nested, along their first items."""
    rank = 0
    while isinstance(value, list):
        value, rank = value[0] if value else None, rank + 1
    return rank


def _values(values: list, data_type: int) -> np.ndarray:
    """Convert values that are all on the innermost level."""
    dtype = TYPES[data_type][0] if data_type in TYPES else None
    if data_type == pb.DT_STRING:
        _require(values, data_type, str, dict)
        return _objects([_string(value) for value in values])
    if data_type == pb.DT_BOOL:
        _require(values, data_type, bool)
        return np.array(values, bool)
    if dtype is not None and dtype.kind in "iu":
        _require(values, data_type, int)
        limits = np.iinfo(dtype)
        if values and not limits.min <= min(values) <= max(values) <= limits.max:
            wrong = next(value for value in values if not limits.min <= value <= limits.max)
            raise _type_error(wrong, data_type)
        return np.array(values, dtype)
    if dtype is not None and dtype.kind == "f":
        _require(values, data_type, int, float)
        return _decimals(values, data_type)
    raise ServingError(
        grpc.StatusCode.UNIMPLEMENTED,
        f"Conversion of JSON Value: {show(values[:1])} to type: {dtype_name(data_type)}",
    )


def _decimals(values: list, data_type: int) -> np.ndarray:
    """Convert numbers to the nearest values of a floating-point dtype, which must not overflow."""
    try:
        doubles = np.array(values, np.float64)
    except OverflowError:
        raise _lossy_error(max(values, key=abs), data_type) from None
    with np.errstate(over="ignore"):
        array = doubles.astype(TYPES[data_type][0])
    if (too_large := np.isinf(array) & ~np.isinf(doubles)).any():
        raise _lossy_error(values[int(too_large.argmax())], data_type)
    return array


def _require(values: list, data_type: int, *types: type) -> None:
    """Raise unless every value is of one of the types; bool does not count as int."""
    if not set(map(type, values)) <= set(types):
        raise _type_error(next(value for value in values if type(value) not in types), data_type)


def _type_error(value: Any, data_type: int) -> ServingError:
    kind = str(value) if isinstance(value, bool) else JSON_TYPES[type(value)]
    return invalid_argument(
        f"JSON Value: {show(value)} Type: {kind} is not of expected type: {dtype_name(data_type)}"
    )


def _lossy_error(value: float, data_type: int) -> ServingError:
    return invalid_argument(
        f"Cannot convert JSON value: {show(value)} to {dtype_name(data_type)} without loss of "
        "precision."
    )


def _string(value: str | dict) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            raise invalid_argument(
                "JSON Parse error: a string has half a surrogate pair"
            ) from error
    if _is_named(value):
        raise invalid_argument(f"JSON Value: {show(value)} not formatted correctly for base64 data")
    text = "".join(value["b64"].split()).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid_argument("Unable to base64 decode") from error


def _is_named(value: Any) -> bool:
    """Tell an object of named tensors from everything else, ``{"b64": "..."}`` included."""
    return isinstance(value, dict) and not (
        value.keys() == {"b64"} and isinstance(value["b64"], str)
    )


def _to_json(name: str, array: np.ndarray) -> Any:
    """Make nested lists of an array; strings are base64 when the name ends in ``_bytes``."""
    kind = data_type(array.dtype)
    if array.dtype.kind == "c":
        raise invalid_argument(f"Failed to write JSON value for tensor type: {dtype_name(kind)}")
    if kind == pb.DT_STRING and name.endswith("_bytes"):
        encoded = [{"b64": base64.b64encode(value).decode()} for value in array.flat]
        return _objects(encoded).reshape(array.shape).tolist()
    if kind == pb.DT_STRING:
        # Bytes that are not UTF-8 travel through Python's strings and come out as they were.
        decoded = [value.decode("utf-8", "surrogateescape") for value in array.flat]
        return _objects(decoded).reshape(array.shape).tolist()
    if kind in (pb.DT_HALF, pb.DT_BFLOAT16, pb.DT_FLOAT):
        # By way of the shortest text that stands for the float, which is 0.1. The double nearest to
        # that float would be written 0.10000000149011612.
        return array.astype(np.float32).astype(str).astype(np.float64).tolist()
    return array.tolist()


def _objects(values: list) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _dump(key: str, value: Any) -> str:
    return f'{{\n    "{key}": {json.dumps(value, ensure_ascii=False)}\n}}'


def show(value: Any) -> str:
    """Write a JSON value for a message, cut off after ``MAX_SHOWN_CHARACTERS``."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "..."
