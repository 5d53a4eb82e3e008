"""JSON to NumPy arrays and back, in the row and the column form of TensorFlow Serving's REST API.

What TensorFlow Serving's parser, RapidJSON, takes and Python's does not is taken, too: bytes that
are not UTF-8, Inf, -NaN, and whatever follows the document. Functions that loop in C parse, check,
convert and write the numbers, of which a picture has 150,000. They hold Python's lock meanwhile,
and so ``json_workers`` calls them for long documents. Nothing here needs TensorFlow.
"""

import base64
import binascii
import json
import math
import re
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import grpc
import numpy as np

from tfserving import messages_pb2 as pb

from . import tensors
from .errors import ServingError, invalid_argument

# The NumPy types that a number, a string or a bool in JSON can have, by the ``DataType``: in
# TensorFlow Serving these only.
NUMPY_TYPES: dict[int, Any] = {
    number: tensors.TYPES[number][0].type
    for number in (
        *(pb.DT_FLOAT, pb.DT_DOUBLE, pb.DT_STRING, pb.DT_BOOL, pb.DT_INT8, pb.DT_INT16),
        *(pb.DT_INT32, pb.DT_INT64, pb.DT_UINT8, pb.DT_UINT32, pb.DT_UINT64),
    )
}
FLOAT, STRING = pb.DT_FLOAT, pb.DT_STRING

MAX_DIMENSIONS = 64  # NumPy has no more
MAX_SHOWN_CHARACTERS = 500
WHITE_SPACE = re.compile(r"[ \t\n\r]*")
# A string, or a number that TensorFlow Serving reads and Python does not.
STRING_OR_NUMBER = re.compile(r'"(?:[^"\\]++|\\.)*+"|\bInf\b|-NaN\b', re.DOTALL)
NUMBERS = {"Inf": "Infinity", "-NaN": "NaN"}
# Only a number with a three-digit exponent, or with hundreds of digits, can be too large for a
# double. In a copy where every digit is 0, these are found fifty times faster than by a pattern.
ZEROS = bytes(ord("0") if byte in b"0123456789" else byte for byte in range(256))
HUGE_NUMBERS = (b"e000", b"E000", b"e+000", b"E+000", b"0" * 309)
# Everything but brackets, in a document whose strings are all closed.
NOT_A_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"|[^][{}"]++')
# TensorFlow Serving's message for each of Python's.
PARSE_ERRORS = {
    "Expecting value": "Invalid value.",
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
    """Parse a request's body, which must begin with a JSON object; what follows it is ignored.

    NaN, ±Infinity and ±Inf are numbers.
    """
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
    zeros = body.translate(ZEROS)
    if any(number in zeros for number in HUGE_NUMBERS):  # Python would read them as Infinity
        hooks |= {"parse_float": _finite, "parse_int": _finite_integer}
    # Bytes that are not UTF-8 travel through Python's strings and come out as they were.
    text = body.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape")
    try:
        return _first_value(text, hooks)
    except json.JSONDecodeError:
        longer = STRING_OR_NUMBER.sub(lambda match: NUMBERS.get(match[0], match[0]), text)
        if longer == text:
            raise
        return _first_value(longer, hooks)


def _first_value(text: str, hooks: dict[str, Any]) -> Any:
    start = WHITE_SPACE.match(text)
    assert start
    value, _ = json.JSONDecoder(**hooks).raw_decode(text, start.end())
    return value


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
    return f"{message} at offset: {len(before.encode('utf-8', 'surrogateescape'))}"


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
    document: Mapping[str, Any], declared: Mapping[str, int]
) -> tuple[dict[str, np.ndarray], bool]:
    """Read the tensors of a predict request, and whether they came in row form.

    ``declared`` maps the inputs of the signature to their ``DataType``.
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


def format_rows(outputs: Mapping[str, np.ndarray]) -> bytes:
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
    columns = [
        _literals(name, array).reshape(len(array), -1 if array.size else 0)
        for name, array in outputs.items()
    ]
    rows = {name: _template(array.shape[1:]) for name, array in outputs.items()}
    row = _object_template(rows) if len(rows) > 1 else next(iter(rows.values()))
    template = f"[{', '.join([row] * (batch or 0))}]"
    return _fill("predictions", template, np.concatenate(columns, axis=1))


def format_columns(outputs: Mapping[str, np.ndarray]) -> bytes:
    """Write ``{"outputs": ...}``: the only tensor, or an object of named tensors."""
    columns = {name: _template(array.shape) for name, array in outputs.items()}
    template = _object_template(columns) if len(columns) > 1 else next(iter(columns.values()))
    literals = np.concatenate([_literals(name, array) for name, array in outputs.items()])
    return _fill("outputs", template, literals)


def _template(shape: Sequence[int]) -> str:
    """Make a text of nested lists of this shape, with ``%s`` for each value."""
    text = "%s"
    for size in reversed(shape):
        text = f"[{', '.join([text] * size)}]"
    return text


def _object_template(members: Mapping[str, str]) -> str:
    pairs = (f"{quoted(name).replace('%', '%%')}: {text}" for name, text in members.items())
    return f"{{{', '.join(pairs)}}}"


def _fill(key: str, template: str, literals: np.ndarray) -> bytes:
    text = template % tuple(literals.ravel().tolist())
    return f'{{\n    "{key}": {text}\n}}'.encode("utf-8", "surrogateescape")


def _parse_rows(rows: Any, declared: Mapping[str, int]) -> dict[str, np.ndarray]:
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
            name: _parse_batch([row[name] for row in rows], dtype, f" key: {name}")
            for name, dtype in declared.items()
        }
    if len(declared) > 1:
        raise invalid_argument(
            "instances is a plain list, but expecting list of objects as multiple input tensors "
            "required as per tensorinfo_map"
        )
    return {name: _parse_batch(rows, dtype, "") for name, dtype in declared.items()}


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


def _parse_columns(value: Any, declared: Mapping[str, int]) -> dict[str, np.ndarray]:
    if _is_named(value):
        for name in declared:
            if name not in value:
                raise invalid_argument(f"Missing named input: {name} in 'inputs' object.")
        return {name: parse_tensor(value[name], dtype) for name, dtype in declared.items()}
    if len(declared) > 1:
        raise invalid_argument(
            "inputs is a plain value/list, but expecting an object as multiple input tensors "
            "required as per tensorinfo_map"
        )
    return {name: parse_tensor(value, dtype) for name, dtype in declared.items()}


def parse_tensor(value: Any, dtype: int) -> np.ndarray:
    """Parse nested lists, or a single value, into an array of a ``DataType``.

    A number too large for a floating-point dtype becomes infinity. Raises ServingError for ragged
    lists, for values of another type, for integers that the dtype cannot hold, and for more than
    ``MAX_DIMENSIONS`` levels.
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
    if len(shape) > MAX_DIMENSIONS:
        raise invalid_argument(f"a tensor of {len(shape)} dimensions; {MAX_DIMENSIONS} are allowed")
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


def _values(values: list, dtype: int) -> np.ndarray:
    """Convert values that are all on the innermost level."""
    if dtype not in NUMPY_TYPES:
        name = tensors.dtype_name(dtype)
        raise ServingError(
            grpc.StatusCode.UNIMPLEMENTED,
            f"Conversion of JSON Value: {show(values[0] if values else [])} to type: {name}",
        )
    numpy_type = NUMPY_TYPES[dtype]
    if numpy_type is np.object_:
        _require(values, dtype, str, dict)
        return _objects([_string(value) for value in values])
    if numpy_type is np.bool_:
        _require(values, dtype, bool)
        return np.array(values, bool)
    if issubclass(numpy_type, np.floating):
        _require(values, dtype, int, float)
        with np.errstate(over="ignore"):
            return np.array(values, np.float64).astype(numpy_type)
    _require(values, dtype, int)
    least, most = np.iinfo(numpy_type).min, np.iinfo(numpy_type).max
    if values and not least <= min(values) <= max(values) <= most:
        raise _type_error(next(v for v in values if not least <= v <= most), dtype)
    return np.array(values, numpy_type)


def _require(values: list, dtype: int, *types: type) -> None:
    """Raise unless every value is of one of the types; bool does not count as int."""
    if not set(map(type, values)) <= set(types):
        raise _type_error(next(value for value in values if type(value) not in types), dtype)


def _type_error(value: Any, dtype: int) -> ServingError:
    kind = str(value) if isinstance(value, bool) else JSON_TYPES[type(value)]
    expected = tensors.dtype_name(dtype)
    return invalid_argument(
        f"JSON Value: {show(value)} Type: {kind} is not of expected type: {expected}"
    )


def _string(value: str | dict) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise invalid_argument(
                "JSON Parse error: The surrogate pair in string is invalid."
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


def _literals(name: str, array: np.ndarray) -> np.ndarray:
    """Write each value of an array; strings are base64 when the name ends in ``_bytes``."""
    if array.dtype.type not in NUMPY_TYPES.values():
        dtype = tensors.dtype_name(tensors.data_type(array.dtype))
        raise invalid_argument(f"Failed to write JSON value for tensor type: {dtype}")
    values = array.ravel().tolist()
    if array.dtype == object and name.endswith("_bytes"):
        encoded = (base64.b64encode(value).decode() for value in values)
        return _objects([f'{{"b64": "{text}"}}' for text in encoded])
    if array.dtype == object:
        return _objects([quoted(value.decode("utf-8", "surrogateescape")) for value in values])
    if array.dtype == bool:
        return _objects(["true" if value else "false" for value in values])
    if issubclass(array.dtype.type, np.floating):
        return float_literals(array.ravel())
    return _objects(list(map(str, values)))


def float_literals(array: np.ndarray) -> np.ndarray:
    """Write floats as TensorFlow Serving does, in as few digits as say which float they are.

    That is six digits where they are enough, else nine for a float32 and 17 for a float64. There is
    always a point or an exponent: 0.1, 3.0, 9e+06, 0.333333343.
    """
    literals = _objects(_printed(array, 6))
    with np.errstate(over="ignore"):
        read = np.array(list(map(float, literals)), np.float64).astype(array.dtype)
    unlike = read != array  # which NaN always is
    literals[unlike] = _printed(array[unlike], 9 if array.dtype == np.float32 else 17)
    for index in np.flatnonzero(array == np.trunc(array)):
        if not set(literals[index]) & set(".en"):  # n is in inf
            literals[index] += ".0"
    for value, name in ((math.inf, "Infinity"), (-math.inf, "-Infinity")):
        literals[array == value] = name
    literals[np.isnan(array)] = "NaN"
    return literals


def _printed(array: np.ndarray, digits: int) -> list[str]:
    return (f"%.{digits}g " * array.size % tuple(array.tolist())).split()


def quoted(text: str) -> str:
    """Write a string of JSON; what is not ASCII stays as it is."""
    return json.dumps(text, ensure_ascii=False)


def _objects(values: list) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def show(value: Any) -> str:
    """Write a JSON value for a message, cut off after ``MAX_SHOWN_CHARACTERS``."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "..."


def shape_name(shape: Sequence[int]) -> str:
    """Write a shape as TensorFlow's C++ messages do: ``[2,3]``."""
    return "[" + ",".join(map(str, shape)) + "]"
