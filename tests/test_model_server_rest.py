"""The embedded model server over REST: status, metadata, predictions in both forms, errors."""

import base64
import gzip
import http.client
import json
import math
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers.model_server import ask
from helpers.servers import Addresses, Server
from helpers.serving import Client


def export_shop(path: Path) -> None:
    """Save a model whose signatures have one and several inputs of several dtypes."""

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def half(x):
        return {"y": x / 2}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 2], tf.float32, name="size"),
            tf.TensorSpec([None], tf.string, name="label"),
            tf.TensorSpec([None], tf.int64, name="count"),
        ]
    )
    def describe(size, label, count):
        return {
            "area": size[:, 0] * size[:, 1],
            "shout": tf.strings.upper(label),
            "label_bytes": label,
            "more": count + 1,
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def measure(image_bytes):
        return {"length": tf.strings.length(image_bytes), "total": tf.size(image_bytes)}

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32, name="x")])
    def invert(x):
        return {"y": 1 / x}

    def echo(dtype):
        spec = tf.TensorSpec(None, dtype, name="x")
        return tf.function(lambda x: {"y": tf.identity(x)}, input_signature=[spec])

    dtypes = [
        *(tf.bool, tf.uint8, tf.uint16, tf.int32, tf.int64),
        *(tf.float16, tf.float32, tf.float64, tf.string),
    ]
    signatures = {f"echo_{dtype.name}": echo(dtype) for dtype in dtypes}
    for name, dtype in (("complex", tf.complex64), ("half", tf.float16)):
        signatures[name] = tf.function(
            lambda x, dtype=dtype: {"y": tf.cast(x, dtype)},
            input_signature=[tf.TensorSpec([None], tf.float32, name="x")],
        )
    signatures |= {"serving_default": half, "describe": describe, "measure": measure}
    tf.saved_model.save(tf.Module(), str(path), signatures=signatures | {"invert": invert})


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, serve_model: Callable[[str, Path], Server]
) -> Server:
    base_path = tmp_path_factory.mktemp("shop")
    export_shop(base_path / "3")
    return serve_model("shop", base_path)


def predict(server: Server, body: Any, path: str = "/v1/models/shop") -> Any:
    status, answer = ask(f"{server.http}{path}:predict", body)
    assert status == 200, answer
    return answer


@pytest.mark.parametrize("path", ["/v1/models/shop", "/v1/models/shop/versions/3"])
def test_status(server: Server, path: str) -> None:
    assert ask(server.http + path) == (
        200,
        {
            "model_version_status": [
                {
                    "version": "3",
                    "state": "AVAILABLE",
                    "status": {"error_code": "OK", "error_message": ""},
                }
            ]
        },
    )


@pytest.mark.parametrize("path", ["/v1/models/shop", "/v1/models/shop/versions/3"])
def test_metadata(server: Server, path: str) -> None:
    status, answer = ask(f"{server.http}{path}/metadata")
    assert status == 200
    assert answer["model_spec"] == {"name": "shop", "signature_name": "", "version": "3"}
    signature = answer["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["method_name"] == "tensorflow/serving/predict"
    info = signature["inputs"]["x"]
    assert info["dtype"] == "DT_FLOAT"
    assert info["tensor_shape"] == {
        "dim": [{"size": "-1", "name": ""}, {"size": "2", "name": ""}],
        "unknown_rank": False,
    }


@pytest.mark.parametrize("path", ["/v1/models/shop", "/v1/models/shop/versions/3"])
def test_row_form(server: Server, path: str) -> None:
    answer = predict(server, {"instances": [[1, 2.0], [3e0, 4]]}, path)
    assert answer == {"predictions": [[0.5, 1.0], [1.5, 2.0]]}


def test_row_form_with_named_input(server: Server) -> None:
    answer = predict(server, {"instances": [{"x": [1, 2]}, {"x": [3, 4]}]})
    assert answer == {"predictions": [[0.5, 1.0], [1.5, 2.0]]}


def test_row_form_with_several_inputs_and_outputs(server: Server) -> None:
    rows: list[dict[str, Any]] = [
        {"size": [2, 3], "label": "dress", "count": 4},
        {"size": [1, 5], "label": "hÿt \u0000", "count": 2**53 + 1},
    ]
    answer = predict(server, {"signature_name": "describe", "instances": rows})
    encoded = [base64.b64encode(row["label"].encode()).decode() for row in rows]
    assert answer == {
        "predictions": [
            {"area": 6.0, "shout": "DRESS", "label_bytes": {"b64": encoded[0]}, "more": 5},
            {
                "area": 5.0,
                "shout": "HÿT \u0000",
                "label_bytes": {"b64": encoded[1]},
                "more": 2**53 + 2,
            },
        ]
    }


def test_column_form(server: Server) -> None:
    assert predict(server, {"inputs": [[1, 2]]}) == {"outputs": [[0.5, 1.0]]}
    assert predict(server, {"inputs": {"x": [[1, 2]]}}) == {"outputs": [[0.5, 1.0]]}
    columns: dict[str, list] = {"size": [[2, 3]], "label": ["hat"], "count": [1]}
    answer = predict(server, {"signature_name": "describe", "inputs": columns})
    assert answer == {
        "outputs": {
            "area": [6.0],
            "shout": ["HAT"],
            "label_bytes": [{"b64": base64.b64encode(b"hat").decode()}],
            "more": [2],
        }
    }


def test_base64(server: Server) -> None:
    encoded = [{"b64": base64.b64encode(bytes(range(n))).decode()} for n in (0, 1, 255)]
    body: dict[str, Any] = {"signature_name": "measure", "inputs": encoded}
    assert predict(server, body) == {"outputs": {"length": [0, 1, 255], "total": 3}}
    body = {"signature_name": "echo_string", "inputs": {"b64": "aGk"}}  # without padding
    assert predict(server, body) == {"outputs": "hi"}
    body = {"signature_name": "echo_string", "instances": [{"b64": "aGk="}, "ho"]}
    assert predict(server, body) == {"predictions": ["hi", "ho"]}


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("bool", [[True, False], [False, True]]),
        ("uint8", [0, 255]),
        ("int32", [-(2**31), 2**31 - 1]),
        ("int64", [-(2**63), 2**63 - 1]),
        ("float64", [0.1, 1e300, -5e-324]),
        ("string", [["", "a"], ["ü", "\u2028"]]),
        ("int32", 5),
        ("int32", []),
        ("int32", [[], []]),
        ("int32", [[[[1], [2]]]]),
    ],
)
def test_values_cross_unchanged(server: Server, dtype: str, value: Any) -> None:
    body = {"signature_name": f"echo_{dtype}", "inputs": value}
    assert predict(server, body) == {"outputs": value}


def test_nan_and_infinity(server: Server) -> None:
    body = b'{"signature_name": "invert", "inputs": [0, -0.0, NaN, Infinity, -Infinity, 3]}'
    y = predict(server, body)["outputs"]
    assert y[:2] == [math.inf, -math.inf]
    assert math.isnan(y[2])
    assert [y[3], math.copysign(1, y[4])] == [0.0, -1.0]
    assert np.float32(y[5]) == np.float32(1) / np.float32(3)


def test_short_forms_of_infinity(server: Server) -> None:
    body = b'{"signature_name": "echo_float64", "inputs": [Inf, -Inf, Infinity]}'
    assert predict(server, body) == {"outputs": [math.inf, -math.inf, math.inf]}
    body = rb'{"signature_name": "echo_string", "inputs": ["Inf \" -NaN", "\\"], "x": [Inf, -NaN]}'
    assert predict(server, body) == {"outputs": ['Inf " -NaN', "\\"]}
    (nan,) = predict(server, b'{"signature_name": "echo_float64", "inputs": [-NaN]}')["outputs"]
    assert math.isnan(nan)


def test_numbers_just_within_a_double(server: Server) -> None:
    body = b'{"signature_name": "echo_float64", "inputs": [1e308, 0e999, 1e-999], "x": "1e999"}'
    assert predict(server, body) == {"outputs": [1e308, 0.0, 0.0]}
    body = b'{"signature_name": "echo_int32", "inputs": [0, 7], "x": "1e999"}'
    assert predict(server, body) == {"outputs": [0, 7]}


def test_numbers_become_the_nearest_that_their_dtype_has(server: Server) -> None:
    body = {"signature_name": "invert", "inputs": [16777217, 1435774380, 2**64, 0.1]}
    expected = 1 / np.array([16777216, 1435774336, 2**64, 0.1], np.float32)
    np.testing.assert_array_equal(np.float32(predict(server, body)["outputs"]), expected)


def test_first_of_equal_keys_counts(server: Server) -> None:
    assert predict(server, b'{"inputs": [[1, 2]], "inputs": [[3, 4]]}') == {"outputs": [[0.5, 1.0]]}


@pytest.mark.parametrize("number", ["1e39", "1e308", str(2**200)])
def test_number_beyond_a_float_is_infinity(server: Server, number: str) -> None:
    body = f'{{"signature_name": "echo_float32", "inputs": [{number}, -{number}]}}'.encode()
    assert predict(server, body) == {"outputs": [math.inf, -math.inf]}


@pytest.mark.parametrize("rest", [b"{} {}", b"\xff", b"]", b"\0", b"[" * 100_000])
def test_what_follows_the_object_is_ignored(server: Server, rest: bytes) -> None:
    assert predict(server, b'\xef\xbb\xbf {"inputs": [[1, 2]]}' + rest) == {"outputs": [[0.5, 1.0]]}


def raw(server: Server, body: bytes) -> bytes:
    with urllib.request.urlopen(f"{server.http}/v1/models/shop:predict", body) as response:
        return response.read()


def test_bytes_that_are_not_utf_8_pass(server: Server) -> None:
    body = b'{"signature_name": "echo_string", "inputs": ["\xff\xc3", "\xed\xa0\x80 \xc3\xa9"]}'
    expected = b'{\n    "outputs": ["\xff\xc3", "\xed\xa0\x80 \xc3\xa9"]\n}'
    assert raw(server, body) == expected


# TensorFlow Serving's own examples of its literals stand in the first line.
LITERALS = {
    "float32": (
        "9000000 999999 0.50000 .0003 .00003 555557.5 3 NaN Infinity -Infinity "
        "0.2 8388607.5 16777216 100000 -0.0 1e10 3.4028235e38 1e-45 33333333 0.33333333",
        "9e+06 999999.0 0.5 0.0003 3e-05 555557.5 3.0 NaN Infinity -Infinity "
        "0.2 8388607.5 16777216.0 100000.0 -0.0 1e+10 3.40282347e+38 1.4013e-45 33333332.0 "
        "0.333333343",
    ),
    "float64": (
        "0.1 1e300 0.1234567 123456789 2.0 0.30000000000000004",
        "0.1 1e+300 0.1234567 123456789.0 2.0 0.30000000000000004",
    ),
}


@pytest.mark.parametrize("dtype", LITERALS)
def test_floats_are_written_as_tensorflow_serving_writes_them(server: Server, dtype: str) -> None:
    sent, expected = (text.split() for text in LITERALS[dtype])
    numbers = ", ".join(text if text[0] != "." else f"0{text}" for text in sent)
    body = f'{{"signature_name": "echo_{dtype}", "inputs": [{numbers}]}}'.encode()
    text = raw(server, body).decode()
    assert text.partition("[")[2].partition("]")[0].split(", ") == expected


@pytest.mark.parametrize(("dtype", "name"), [("float16", "half"), ("uint16", "uint16")])
def test_dtype_that_json_has_not(server: Server, dtype: str, name: str) -> None:
    conversion = f"Conversion of JSON Value: 2 to type: {name}"
    url = f"{server.http}/v1/models/shop:predict"
    body: dict[str, Any] = {"signature_name": f"echo_{dtype}", "inputs": [2, 1]}
    assert ask(url, body) == (501, {"error": conversion})
    body = {"signature_name": f"echo_{dtype}", "instances": [2, 1]}
    prefix = "Failed to process element: 0 of 'instances' list. Error: UNIMPLEMENTED: "
    assert ask(url, body) == (400, {"error": prefix + conversion})


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/models/nobody", None, 404, "Could not find any versions of model nobody"),
        ("/v1/models/shop/versions/4", None, 404, "Could not find version 4 of model shop"),
        ("/v1/models/nobody/metadata", None, 404, "Servable not found for request: Latest(nobody)"),
        ("/v1/models/nobody:predict", {"inputs": 1}, 404, "Servable not found for request"),
        ("/v1/models/shop/versions/4:predict", {"inputs": 1}, 404, "Specific(shop, 4)"),
        (f"/v1/models/shop/versions/{2**63}", None, 400, "Failed to convert version"),
        ("/v1/models/shop/versions/new", None, 400, "Malformed request: GET /v1/models/shop/ver"),
        (f"/v1/models/shop/versions/{'9' * 5000}", None, 400, "Failed to convert version"),
        ("/v1/models/shop", {}, 400, "Malformed request: POST /v1/models/shop"),
        ("/v1/models/shop?x=1", None, 404, "Could not find any versions of model shop?x=1"),
        ("/v1/models/shop:predict?x=1", {}, 400, "Malformed request: POST /v1/models/shop:predict"),
        ("/v1/models/a%2Fb", None, 404, "Could not find any versions of model a/b"),
        ("/v1/models/shop/labels/%6Eew:predict", {}, 400, "Unrecognized servable version label: n"),
        ("/v1", None, 404, "there is nothing at /v1;"),
        ("/v1/models/shop:predict", None, 400, "Malformed request: GET /v1/models/shop:predict"),
        ("/v2/models/shop", None, 404, "there is nothing at /v2/models/shop"),
        ("/v1/models/shop:classify", {}, 400, "key 'examples' is expected and was not found"),
        ("/v1/models/shop:fly", {}, 400, "Malformed request: POST /v1/models/shop:fly"),
        ("/v1/models/shop/", None, 400, "Malformed request: GET /v1/models/shop/"),
        ("/v1//models/shop", None, 400, "Malformed request: GET /v1//models/shop"),
        ("/v1/models/shop/labels/new/metadata", None, 400, "Unrecognized servable version label"),
        ("/v1/models/shop/labels/new/versions/3", None, 400, "Malformed request"),
        ("/v1/models", None, 400, "Missing model name in request."),
        ("/v1/models/", None, 400, "Malformed request: GET /v1/models/"),
        ("/", None, 404, "there is nothing at /"),
    ],
)
def test_bad_address(server: Server, path: str, body: Any, status: int, message: str) -> None:
    answered, answer = ask(server.http + path, body)
    assert answered == status
    assert answer.keys() == {"error"}
    assert message in answer["error"]


@pytest.mark.parametrize(
    "path", ["/V1/Models/shop", "/v1/models/%73hop", "/v1/models/shop/Versions/0003"]
)
def test_address_in_another_form(server: Server, path: str) -> None:
    assert ask(server.http + path)[0] == 200
    assert predict(server, {"inputs": [[1, 2]]}, path) == {"outputs": [[0.5, 1.0]]}


@pytest.mark.parametrize("origin", ["http://somewhere:80", "HTTPS://somewhere"])
def test_address_with_its_origin(server: Server, origin: str) -> None:
    connection = http.client.HTTPConnection(server.http.removeprefix("http://"), timeout=30)
    for path, body in (("", None), (":predict", b'{"inputs": [[1, 2]]}')):
        connection.request("POST" if body else "GET", f"{origin}/v1/models/shop{path}", body)
        response = connection.getresponse()
        assert (response.status, response.read()[:1]) == (200, b"{")
    connection.close()


def test_head_is_not_served(server: Server) -> None:
    request = urllib.request.Request(f"{server.http}/v1/models/shop", method="HEAD")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
def test_method_that_is_not_served(server: Server, method: str) -> None:
    url = f"{server.http}/v1/models/shop:predict"
    request = urllib.request.Request(url, b'{"inputs": [[1, 2]]}', method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    with caught.value as error:
        assert error.code == 400
        assert error.headers["Content-Type"] == "application/json"
        assert json.load(error) == {"error": f"Malformed request: {method} /v1/models/shop:predict"}


@pytest.mark.parametrize(
    ("origin", "status", "body"),
    [
        ("http://a.page", 200, b""),
        ("https://a.page", 200, b""),
        ("null", 400, b'{\n    "error": "Origin header is missing in CORS preflight"\n}'),
        (None, 400, b'{\n    "error": "Origin header is missing in CORS preflight"\n}'),
    ],
)
def test_options(server: Server, origin: str | None, status: int, body: bytes) -> None:
    connection = http.client.HTTPConnection(server.http.removeprefix("http://"), timeout=30)
    headers = {} if origin is None else {"Origin": origin}
    connection.request("OPTIONS", "/v1/models/shop:predict", headers=headers)
    response = connection.getresponse()
    assert (response.status, response.read()) == (status, body)
    connection.close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no IPv6")
def test_ipv6(server: Server) -> None:
    rest, grpc_port = (each.rpartition(":")[2] for each in (server.http, server.grpc))
    assert ask(f"http://[::1]:{rest}/v1/models/shop")[0] == 200
    with Client(Addresses("", f"ipv6:[::1]:{grpc_port}"), "shop") as client:
        assert client.states() == {3: "AVAILABLE"}


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "image/png", ""])
def test_content_type_of_a_request_does_not_matter(server: Server, content_type: str) -> None:
    request = urllib.request.Request(
        f"{server.http}/v1/models/shop:predict",
        b'{"inputs": [[1, 2]]}',
        {"Content-Type": content_type},
    )
    with urllib.request.urlopen(request) as response:
        assert json.load(response) == {"outputs": [[0.5, 1.0]]}


PACKED = gzip.compress(b'{"inputs": [[1, 2]]}')


@pytest.mark.parametrize(
    ("body", "status", "answer"),
    [
        (PACKED, 200, {"outputs": [[0.5, 1.0]]}),
        (b'{"inputs": [[1, 2]]}', 400, "cannot unpack a body with Content-Encoding gzip"),
        (PACKED[:-1], 400, "cannot unpack a body with Content-Encoding gzip"),
        (PACKED[:12] + b"\xff\xff" + PACKED[14:], 400, "cannot unpack a body with"),
        (2**27, 400, "the body has more than 104857600 bytes when unpacked"),
    ],
    ids=["packed", "not packed", "cut off", "damaged", "endless"],
)
def test_gzip(server: Server, body: bytes | int, status: int, answer: Any) -> None:
    packed = gzip.compress(bytes(body)) if isinstance(body, int) else body
    request = urllib.request.Request(
        f"{server.http}/v1/models/shop:predict", packed, {"Content-Encoding": "gzip"}
    )
    try:
        with urllib.request.urlopen(request) as response:
            assert (response.status, json.load(response)) == (status, answer)
    except urllib.error.HTTPError as error:
        with error:
            assert error.code == status
            assert answer in json.load(error)["error"]


def test_cors_is_off(server: Server) -> None:
    with urllib.request.urlopen(f"{server.http}/v1/models/shop") as response:
        assert "Access-Control-Allow-Origin" not in response.headers


BAD_BODIES: dict[str, tuple[Any, str]] = {
    "empty": (b"", "JSON Parse error: The document is empty"),
    "blank": (b" \n", "JSON Parse error: The document is empty"),
    "not JSON": (b"instances = [1, 2]", "JSON Parse error: Invalid value. at offset: 0"),
    "cut off": (
        b'{"instances": [[1, 2',
        "JSON Parse error: Missing a comma or ] after an array element. at offset: 20",
    ),
    "no comma in a list": (
        '{"ü]": "\\"", "inputs": [{"b64": ""} [1]]}'.encode(),
        "JSON Parse error: Missing a comma or ] after an array element. at offset: 37",
    ),
    "no comma in an object": (
        b'{"inputs": [[1, 2]] "x": 1}',
        "JSON Parse error: Missing a comma or } after an object member. at offset: 20",
    ),
    "no colon": (b'{"inputs" 1}', "Missing a colon after a name of object member."),
    "no name": (b"{inputs: 1}", "Missing a name for object member."),
    "no end of a string": (b'{"inputs": "a}', "Missing a closing quotation mark in string."),
    "unknown escape": (rb'{"inputs": "\q"}', "Invalid escape character in string."),
    "bad hexadecimal": (rb'{"inputs": "\u12"}', "Incorrect hex digit after \\u escape in string."),
    "tabulator in a string": (b'{"inputs": "\t"}', "Invalid encoding in string."),
    "not UTF-8": (b'{"instances": [\xff]}', "JSON Parse error: Invalid value. at offset: 15"),
    "endless nesting": (b'{"instances":' + b"[" * 100_000, "JSON Parse error"),
    "65 dimensions": (
        b'{"signature_name": "echo_float32", "inputs":' + b"[" * 65 + b"1" + b"]" * 65 + b"}",
        "a tensor of 65 dimensions",
    ),
    "64 dimensions in a row": (
        b'{"signature_name": "echo_float32", "instances": [' + b"[" * 64 + b"1" + b"]" * 64 + b"]}",
        "a tensor of 65 dimensions",
    ),
    "signature with half a character": (
        {"signature_name": "\ud800", "inputs": 1},
        'Serving signature name: "?" not found in signature def',
    ),
    "not an object": ([1, 2], "Is not object"),
    "neither key": ({}, "Missing 'inputs' or 'instances' key"),
    "both keys": ({"inputs": [[1, 2]], "instances": [[1, 2]]}, "expecting only one of"),
    "no instances": ({"instances": []}, "No values in 'instances' array"),
    "instances no list": ({"instances": 5}, "Expecting 'instances' to be an list/array"),
    "signature no string": (
        {"signature_name": 100, "inputs": 1},
        "'signature_name' key must be a string value.",
    ),
    "unknown signature": (
        {"signature_name": "fly", "inputs": 1},
        'Serving signature name: "fly" not found in signature def',
    ),
    "string for float": (
        {"instances": [["x", "y"]]},
        "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: JSON Value: "
        '"x" Type: String is not of expected type: float',
    ),
    "bool for float": ({"inputs": [[1, True]]}, "JSON Value: true Type: True is not of expected"),
    "null": ({"inputs": [[1, None]]}, "JSON Value: null Type: Null is not of expected type: float"),
    "float for integer": (
        {"signature_name": "echo_int32", "inputs": [1, 2.0]},
        "JSON Value: 2.0 Type: Number is not of expected type: int32",
    ),
    "integer out of range": (
        {"signature_name": "echo_uint8", "inputs": [256]},
        "JSON Value: 256 Type: Number is not of expected type: uint8",
    ),
    "integer for bool": ({"signature_name": "echo_bool", "inputs": [1]}, "expected type: bool"),
    "half a character": (
        {"signature_name": "echo_string", "inputs": ["\ud800"]},
        "JSON Parse error: The surrogate pair in string is invalid.",
    ),
    "infinity with a typing error": (b'{"inputs": [[Inf, Infin]]}', "JSON Parse error"),
    "integer beyond double": (
        {"inputs": [[1, 10**400]]},
        "JSON Parse error: Number too big to be stored in double.",
    ),
    "number beyond double": (
        b'{"inputs": [[1, -1e400]]}',
        "JSON Parse error: Number too big to be stored in double.",
    ),
    "ragged": (
        {"inputs": [[1, 2], [3]]},
        "Encountered list at unexpected size: 1 at level: 1 expected size: 2",
    ),
    "ragged rows": (
        {"instances": [[1, 2], [3]]},
        "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: "
        "Expecting tensor size: 2 but got: 1",
    ),
    "rows of different shapes": (
        {"instances": [[[1, 2]], [[1], [2]]]},
        "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: "
        "Expecting shape [1,2] but got: [2,1]",
    ),
    "list beside a row": ({"instances": [1, [1]]}, "Expecting shape [] but got: [1]"),
    "number beside list": (
        {"inputs": [[1, 2], 3]},
        "JSON Value: 3 found at incorrect level: 2 in the JSON DOM. Expected at level: 2",
    ),
    "list beside number": (
        {"inputs": [3, [1, 2]]},
        "Encountered list at unexpected level: 1 expected < 1",
    ),
    "wrong shape": ({"inputs": [[1, 2, 3]]}, "input x has shape [1, 3]"),
    "object beside list": (
        {"instances": [[1, 2], {"x": [1, 2]}]},
        "Expecting value/list but got object at item 1 of input list",
    ),
    "list beside object": (
        {"instances": [{"x": [1, 2]}, [1, 2]]},
        "Expecting object but got list at item 1 of input list",
    ),
    "misnamed input in a row": (
        {"instances": [{"z": [1, 2]}]},
        "Failed to process element: 0 key: z of 'instances' list. Error: INVALID_ARGUMENT: "
        "JSON object: does not have named input: z",
    ),
    "missing input in a row": (
        {"signature_name": "describe", "instances": [{"size": [1, 2]}]},
        "keys must be equal to: count,label,size",
    ),
    "misnamed input in a column": (
        {"inputs": {"z": [[1, 2]]}},
        "Missing named input: x in 'inputs' object.",
    ),
    "rows without names": (
        {"signature_name": "describe", "instances": [[1, 2]]},
        "instances is a plain list, but expecting list of objects",
    ),
    "column without names": (
        {"signature_name": "describe", "inputs": [[1, 2]]},
        "inputs is a plain value/list, but expecting an object",
    ),
    "not base64": (
        {"signature_name": "measure", "inputs": [{"b64": "?"}]},
        "Unable to base64 decode",
    ),
    "no string in base64": (
        {"signature_name": "measure", "inputs": [{"b64": 5}]},
        "not formatted correctly for base64 data",
    ),
    "object for float": ({"inputs": [[1, {"b64": "aGk="}]]}, "Type: Object is not of expected"),
    "scalar output in row form": (
        {"signature_name": "measure", "instances": ["a"]},
        "Tensor name: total has no shape information",
    ),
    "complex output": (
        {"signature_name": "complex", "inputs": [1]},
        "Failed to write JSON value for tensor type: complex64",
    ),
    "half output": (
        {"signature_name": "half", "inputs": [1]},
        "Failed to write JSON value for tensor type: half",
    ),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_body(server: Server, name: str) -> None:
    body, message = BAD_BODIES[name]
    status, answer = ask(f"{server.http}/v1/models/shop:predict", body)
    assert answer.keys() == {"error"}
    assert (status, message in answer["error"]) == (400, True), answer
    assert predict(server, {"inputs": [[1, 2]]})


def test_body_of_a_picture(server: Server) -> None:
    picture = np.random.default_rng(2).random([1, 224, 224, 3], np.float32)
    answer = predict(server, {"signature_name": "invert", "instances": picture.tolist()})
    np.testing.assert_array_equal(np.float32(answer["predictions"]), 1 / picture)
