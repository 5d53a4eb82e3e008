"""Lists of ``tf.Example`` from the JSON bodies of classify and regress requests."""

from collections.abc import Callable, Mapping
from typing import Any

from tfserving import server_messages_pb2

from .errors import invalid_argument
from .json_tensors import FLOAT, JSON_TYPES, STRING, parse_tensor, show


def parse_input(document: Mapping[str, Any]) -> Any:
    """Read the ``Input`` of a classify or regress request from its JSON body."""
    inputs = server_messages_pb2.Input()
    examples: Any = inputs.example_list
    if "context" in document:
        examples = inputs.example_list_with_context
        _fill_example(examples.context, document["context"])
        examples.context.SetInParent()
    rows = document.get("examples")
    for wrong, complaint in (
        (
            "examples" not in document,
            "When method is classify, key 'examples' is expected and was not found",
        ),
        (not isinstance(rows, list), "Expecting 'examples' value to be an list/array"),
        (not rows, "'examples' value is an empty array"),
    ):
        if wrong:
            raise invalid_argument(f"JSON Value: {show(document)} {complaint}")
    for row in rows or ():
        _fill_example(examples.examples.add(), row)
    return inputs


def _fill_example(example: Any, row: Any) -> None:
    if not isinstance(row, dict):
        raise invalid_argument(f"Example must be JSON object but got JSON {_json_type(row)}")
    for name, content in row.items():
        values = content if isinstance(content, list) else [content]
        kinds = [_kind(name, value) for value in values]
        if len(set(kinds)) > 1:
            raise invalid_argument(
                f"Unexpected element type in feature: {name} expecting type: {kinds[0]}"
            )
        feature = example.features.feature[name.encode("utf-8", "replace").decode()]
        if kinds:
            _FILL[kinds[0]](feature, values)


def _kind(name: str, value: Any) -> str:
    if isinstance(value, str) or (isinstance(value, dict) and value.keys() == {"b64"}):
        return "bytes"
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return "int64"
    if isinstance(value, int) and 0 < value < 2**64:
        raise invalid_argument(f"Feature: {name} has uint64 element. Only int64 is supported.")
    if isinstance(value, int | float):
        return "float"
    raise invalid_argument(
        f"Feature: {name} has element with unexpected JSON type: {_json_type(value)}"
    )


def _fill_floats(feature: Any, values: list) -> None:
    feature.float_list.value.extend(parse_tensor(values, FLOAT).tolist())


def _fill_bytes(feature: Any, values: list) -> None:
    feature.bytes_list.value.extend(parse_tensor(values, STRING).tolist())


def _fill_integers(feature: Any, values: list) -> None:
    feature.int64_list.value.extend(map(int, values))


_FILL: dict[str, Callable[[Any, list], None]] = {
    "float": _fill_floats,
    "bytes": _fill_bytes,
    "int64": _fill_integers,
}


def _json_type(value: Any) -> str:
    return str(value) if isinstance(value, bool) else JSON_TYPES[type(value)]
