"""Classify, Regress and MultiInference on lists of ``tf.Example``, over gRPC and REST."""

import base64
import math
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.model_server import ask, log_record, serving, write_warm_up
from helpers.servers import Addresses, Server
from helpers.serving import Client, predict_request, refused
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    input_pb2,
    regression_pb2,
    session_service_pb2,
)

from model_server import metrics

NAME = "iris"
Code = grpc.StatusCode
CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"
PREDICT = "tensorflow/serving/predict"
v1 = tf.compat.v1
signatures = v1.saved_model.signature_def_utils


def export_flowers(path: Path) -> None:
    """Save a model of the features ``size`` (float), ``legs`` (int64) and ``name`` (bytes)."""
    with tf.Graph().as_default(), v1.Session() as session:
        examples = v1.placeholder(tf.string, [None], name="examples")
        other = v1.placeholder(tf.string, [None], name="other")
        parsed = tf.io.parse_example(
            examples,
            {
                "size": tf.io.FixedLenFeature([], tf.float32, 0.0),
                "legs": tf.io.FixedLenFeature([], tf.int64, 0),
                "name": tf.io.FixedLenFeature([], tf.string, "?"),
            },
        )
        size, name = parsed["size"], parsed["name"]
        column = tf.identity(size[:, None], name="x")
        scores = tf.stack([size, size + tf.cast(parsed["legs"], tf.float32)], axis=1)
        classes = tf.stack([tf.strings.join(["small ", name]), tf.strings.upper(name)], axis=1)
        classify, regress = (
            signatures.classification_signature_def,
            signatures.regression_signature_def,
        )

        def hand_made(inputs: dict, outputs: dict, method: str) -> Any:
            info = v1.saved_model.build_tensor_info
            return signatures.build_signature_def(
                {alias: info(tensor) for alias, tensor in inputs.items()},
                {alias: info(tensor) for alias, tensor in outputs.items()},
                method,
            )

        of_input: dict[str, Any] = {"inputs": examples}
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            {
                "serving_default": classify(examples, classes, scores),
                "only_classes": classify(examples, classes, None),
                "only_scores": classify(examples, None, scores),
                "regress": regress(examples, size * 2),
                "column": regress(examples, size[:, None]),
                "elsewhere": regress(other, tf.cast(tf.strings.length(other), tf.float32)),
                "untyped": hand_made(of_input, {"scores": scores}, "tensorflow/serving/predict"),
                "flat": hand_made(of_input, {"scores": size}, CLASSIFY),
                "whole_scores": hand_made(
                    of_input, {"scores": tf.cast(scores, tf.int64)}, CLASSIFY
                ),
                "number_classes": hand_made(of_input, {"classes": scores}, CLASSIFY),
                "too_many": hand_made(of_input, {"scores": tf.tile(scores, [2, 1])}, CLASSIFY),
                "uneven": hand_made(
                    of_input, {"scores": scores, "classes": classes[:, :1]}, CLASSIFY
                ),
                "no_scores": hand_made(of_input, {"y": scores}, CLASSIFY),
                "three": hand_made(of_input, {"a": size, "b": size, "c": size}, CLASSIFY),
                "misnamed": hand_made({"x": examples}, {"scores": scores}, CLASSIFY),
                "two_inputs": hand_made(
                    {"inputs": examples, "x": other}, {"scores": scores}, CLASSIFY
                ),
                "matrix": hand_made(of_input, {"outputs": scores}, REGRESS),
                "one": hand_made(of_input, {"outputs": size[:1]}, REGRESS),
                "double": hand_made(of_input, {"outputs": tf.cast(size, tf.float64)}, REGRESS),
                "no_outputs": hand_made(of_input, {"y": size}, REGRESS),
                "own_method": hand_made(of_input, {"y": size}, "a/method/of/its/own"),
                "nothing": hand_made(of_input, {}, REGRESS),
                "through": hand_made(of_input, {"x": examples}, REGRESS),
                "same_twice": hand_made({"a": examples, "b": examples}, {"y": size}, REGRESS),
                "both_ways": hand_made(of_input, {"y": size, "z": size}, CLASSIFY),
                "half_plus_two": hand_made({"x": column}, {"y": column / 2 + 2}, PREDICT),
            },
        )
        builder.save()


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("iris")
    export_flowers(path / "4")
    write_warm_up(
        path / "4",
        [
            log_record("classify_log", classify_request()),
            log_record("regress_log", regress_request()),
            log_record("multi_inference_log", multi_request(("", CLASSIFY), ("regress", REGRESS))),
        ],
    )
    return path


@pytest.fixture(scope="module")
def server(base_path: Path, serve_model: Callable[[str, Path], Server]) -> Server:
    return serve_model(NAME, base_path)


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[Any]:
    with Client(server, NAME) as client:
        yield client.prediction


def example(**features: float | int | bytes) -> Any:
    message = tf.train.Example()
    for name, value in features.items():
        feature = message.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif isinstance(value, int):
            feature.int64_list.value.append(value)
        else:
            feature.float_list.value.append(value)
    return message


FLOWERS = [example(size=0.25, name=b"rose"), example(size=2.5, legs=3, name=b"t\xc3\xa4nnel")]
SCORES = [[0.25, 0.25], [2.5, 5.5]]
CLASSES = [["small rose", "ROSE"], ["small tännel", "T\u00e4NNEL"]]


def inputs(*examples: Any, context: Any = None) -> Any:
    message = input_pb2.Input()
    if context is not None:
        message.example_list_with_context.context.CopyFrom(context)
        message.example_list_with_context.examples.extend(examples)
    else:
        message.example_list.examples.extend(examples)
    return message


def classify_request(signature_name: str = "", given: Any = None) -> Any:
    request = classification_pb2.ClassificationRequest(input=given or inputs(*FLOWERS))
    request.model_spec.name = NAME
    request.model_spec.signature_name = signature_name
    return request


def regress_request(signature_name: str = "regress", given: Any = None) -> Any:
    request = regression_pb2.RegressionRequest(input=given or inputs(*FLOWERS))
    request.model_spec.name = NAME
    request.model_spec.signature_name = signature_name
    return request


def multi_request(*tasks: tuple[str, str], given: Any = None) -> Any:
    request = inference_pb2.MultiInferenceRequest(input=given or inputs(*FLOWERS))
    for signature_name, method_name in tasks:
        task = request.tasks.add(method_name=method_name)
        task.model_spec.name = NAME
        task.model_spec.signature_name = signature_name
    return request


def labels_and_scores(result: Any) -> tuple[list, list]:
    rows = [row.classes for row in result.classifications]
    return (
        [[each.label for each in row] for row in rows],
        [[each.score for each in row] for row in rows],
    )


def test_warm_up(server: Server, base_path: Path) -> None:
    loaded = rf"loaded {base_path / '4'} in \d+ ms, replayed 3 warm-up requests"
    assert re.search(loaded, server.log.read_text())


def test_classify(stub: Any) -> None:
    response = stub.Classify(classify_request())
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == (NAME, 4, "serving_default")
    assert labels_and_scores(response.result) == (CLASSES, SCORES)
    only_classes = stub.Classify(classify_request("only_classes")).result
    assert labels_and_scores(only_classes) == (CLASSES, [[0, 0], [0, 0]])
    only_scores = stub.Classify(classify_request("only_scores")).result
    assert labels_and_scores(only_scores) == ([["", ""], ["", ""]], SCORES)


def test_regress(stub: Any) -> None:
    response = stub.Regress(regress_request())
    assert (response.model_spec.version.value, response.model_spec.signature_name) == (4, "regress")
    assert [each.value for each in response.result.regressions] == [0.5, 5.0]
    column = stub.Regress(regress_request("column")).result.regressions
    assert [each.value for each in column] == [0.25, 2.5]


def test_context_is_in_every_example_and_the_example_wins(stub: Any) -> None:
    given = inputs(
        example(size=1.5), example(name=b"fern"), context=example(size=0.5, name=b"moss")
    )
    labels, scores = labels_and_scores(stub.Classify(classify_request(given=given)).result)
    assert labels == [["small moss", "MOSS"], ["small fern", "FERN"]]
    assert scores == [[1.5, 1.5], [0.5, 0.5]]


def test_multi_inference(stub: Any) -> None:
    request = multi_request(("", CLASSIFY), ("regress", REGRESS))
    classification, regression = stub.MultiInference(request).results
    assert labels_and_scores(classification.classification_result) == (CLASSES, SCORES)
    assert classification.model_spec.signature_name == "serving_default"
    assert [each.value for each in regression.regression_result.regressions] == [0.5, 5.0]
    assert regression.model_spec.signature_name == "regress"
    assert {each.model_spec.version.value for each in (classification, regression)} == {4}


def test_multi_inference_feeds_every_input_the_same_examples_in_one_run(tmp_path: Path) -> None:
    spec = [tf.TensorSpec([None], tf.string, name="inputs")]

    def function(outputs: Callable[[tf.Tensor], dict[str, tf.Tensor]]) -> Any:
        lengths = lambda inputs: outputs(tf.cast(tf.strings.length(inputs), tf.float32))  # noqa: E731
        return tf.function(lengths, input_signature=spec)

    # Each signature of a TensorFlow 2 model has a placeholder of its own.
    by_name = {
        "length": function(lambda length: {"outputs": length}),
        "half": function(lambda length: {"outputs": length[:, None] / 2}),
        "scores": function(lambda length: {"scores": tf.stack([length, -length], axis=1)}),
    }
    tf.saved_model.save(tf.Module(), str(tmp_path / "6"), signatures=by_name)
    request = multi_request(("half", REGRESS), ("scores", CLASSIFY), ("length", REGRESS))
    write_warm_up(tmp_path / "6", [log_record("multi_inference_log", request)])
    lengths = [float(len(flower.SerializeToString())) for flower in FLOWERS]
    flags = f"--model_name={NAME}", f"--model_base_path={tmp_path}"
    for batching in ("false", "true"):
        with (
            serving(*flags, f"--enable_batching={batching}") as server,
            Client(server, NAME) as client,
        ):
            runs = metrics.counted("/tensorflow/core/graph_runs")
            results = client.prediction.MultiInference(request).results
            assert metrics.counted("/tensorflow/core/graph_runs") == runs + 1
        half, scores, length = results
        assert [each.value for each in half.regression_result.regressions] == [
            each / 2 for each in lengths
        ]
        assert labels_and_scores(scores.classification_result)[1] == [[n, -n] for n in lengths]
        assert [each.value for each in length.regression_result.regressions] == lengths
        specs = [each.model_spec for each in results]
        assert [each.signature_name for each in specs] == ["half", "scores", "length"]
        assert {(each.name, each.version.value) for each in specs} == {(NAME, 6)}


def test_multi_inference_on_another_placeholder(stub: Any) -> None:
    request = multi_request(("elsewhere", REGRESS), ("", CLASSIFY))
    lengths, classification = stub.MultiInference(request).results
    assert [each.value for each in lengths.regression_result.regressions] == [
        len(flower.SerializeToString()) for flower in FLOWERS
    ]
    assert labels_and_scores(classification.classification_result) == (CLASSES, SCORES)


def test_signature_without_a_method_name_of_its_own(stub: Any) -> None:
    """TensorFlow 2 saves every signature as one for Predict, and the check is off by default."""
    assert labels_and_scores(stub.Classify(classify_request("untyped")).result)[1] == SCORES


def without(field: str, request: Any) -> Any:
    request.ClearField(field)
    return request


def other_spec(request: Any, spec: Any = None, **fields: Any) -> Any:
    spec = spec or request.model_spec
    for name, value in fields.items():
        if name == "version":
            spec.version.value = value
        else:
            setattr(spec, name, value)
    return request


def other_task(index: int, **fields: Any) -> Any:
    request = multi_request(("", CLASSIFY), ("regress", REGRESS))
    return other_spec(request, request.tasks[index].model_spec, **fields)


INVALID = Code.INVALID_ARGUMENT
EMPTY = input_pb2.Input()
EMPTY_LIST = input_pb2.Input(example_list=input_pb2.ExampleList())
EMPTY_REQUEST = classification_pb2.ClassificationRequest()
EMPTY_WITH_CONTEXT = inputs(context=example(size=1.0))
BAD: dict[str, tuple[Any, grpc.StatusCode, str]] = {
    "no model_spec": (
        without("model_spec", classify_request()),
        INVALID,
        "Missing ModelSpec",
    ),
    "regress without model_spec": (
        without("model_spec", regress_request()),
        INVALID,
        "Missing ModelSpec",
    ),
    "unknown model": (
        other_spec(classify_request(), name="rose"),
        Code.NOT_FOUND,
        "Servable not found for request: Latest(rose)",
    ),
    "unknown version": (
        other_spec(regress_request(), version=5),
        Code.NOT_FOUND,
        "Servable not found for request: Specific(iris, 5)",
    ),
    "unknown label": (
        other_spec(regress_request(), version_label="new"),
        INVALID,
        "Unrecognized servable version label: new",
    ),
    "unknown signature": (
        classify_request("fly"),
        INVALID,
        "No signature was found with the name: fly",
    ),
    "regress, unknown signature": (
        regress_request("fly"),
        INVALID,
        "No signature was found with the name: fly",
    ),
    "no input": (without("input", classify_request()), INVALID, "Input is empty."),
    "regress without input": (without("input", regress_request()), INVALID, "Input is empty."),
    "empty list": (classify_request(given=EMPTY_LIST), INVALID, "Input is empty."),
    "only context": (classify_request(given=EMPTY_WITH_CONTEXT), INVALID, "Input is empty."),
    "feature of another type": (
        classify_request(given=inputs(example(size=3))),
        INVALID,
        "Data types don't match. Data type: int64 but expected type: float",
    ),
    "one dimension": (
        classify_request("flat"),
        INVALID,
        "Expected Tensor shape: [batch_size num_classes] but got [2]",
    ),
    "scores of another dtype": (
        classify_request("whole_scores"),
        INVALID,
        "Expected scores Tensor of DT_FLOAT. Got: DT_INT64",
    ),
    "classes of another dtype": (
        classify_request("number_classes"),
        INVALID,
        "Expected classes Tensor of DT_STRING. Got: DT_FLOAT",
    ),
    "another batch size": (
        classify_request("too_many"),
        INVALID,
        "Expected scores output batch size of 2. Got: 4",
    ),
    "classes and scores do not match": (
        classify_request("uneven"),
        INVALID,
        "Tensors class and score should match in dim_size(1). Got 1 vs. 2",
    ),
    "neither classes nor scores": (
        classify_request("no_scores"),
        INVALID,
        'outputs to contain at least one of "classes" or "scores". Signature was: inputs {',
    ),
    "three outputs": (
        classify_request("three"),
        INVALID,
        "Expected one or two output Tensors, found 3",
    ),
    "input of another name": (
        classify_request("misnamed"),
        INVALID,
        "No classification inputs found in SignatureDef: inputs {",
    ),
    "two inputs": (classify_request("two_inputs"), INVALID, "Expected one input Tensor."),
    "regress gives a matrix": (
        regress_request("matrix"),
        INVALID,
        "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got [2,2]",
    ),
    "regress gives one": (
        regress_request("one"),
        INVALID,
        "Input batch size did not match output batch size: 2 vs. 1",
    ),
    "regress gives doubles": (
        regress_request("double"),
        INVALID,
        "Expected output Tensor of DT_FLOAT.  Got: DT_DOUBLE",
    ),
    "regress without outputs": (
        regress_request("no_outputs"),
        INVALID,
        "No regression outputs found in SignatureDef: inputs {",
    ),
    "regress on a classification": (
        regress_request("serving_default"),
        INVALID,
        "Expected one output Tensor.",
    ),
    "no task": (multi_request(), INVALID, "ModelSpec has no name specified."),
    "task without a name": (
        other_task(1, name=""),
        INVALID,
        "Found ModelSpec with an empty model name.",
    ),
    "tasks for two models": (
        other_task(1, name="rose"),
        INVALID,
        "All ModelSpecs in a MultiInferenceRequest must access the same model name.",
    ),
    "task for an unknown model": (
        other_task(0, name="rose"),
        Code.NOT_FOUND,
        "Servable not found for request: Latest(rose)",
    ),
    "task with an unknown signature": (
        other_task(1, signature_name="fly"),
        INVALID,
        "Requested signature not found in model graph: fly",
    ),
    "same signature twice": (
        multi_request(("", CLASSIFY), ("serving_default", CLASSIFY)),
        INVALID,
        "Duplicate evaluation of signature: serving_default",
    ),
    "task for Predict": (
        multi_request(("", "tensorflow/serving/predict")),
        Code.UNIMPLEMENTED,
        "Unsupported signature method_name: tensorflow/serving/predict",
    ),
    "tasks without input": (
        without("input", multi_request(("", CLASSIFY))),
        INVALID,
        "Input is empty.",
    ),
}


def call(stub: Any, request: Any) -> Any:
    if isinstance(request, classification_pb2.ClassificationRequest):
        return stub.Classify(request)
    if isinstance(request, regression_pb2.RegressionRequest):
        return stub.Regress(request)
    return stub.MultiInference(request)


@pytest.mark.parametrize("name", BAD)
def test_bad_request(stub: Any, name: str) -> None:
    request, code, details = BAD[name]
    got = refused(lambda: call(stub, request))
    assert (got[0], details in got[1]) == (code, True), got


SERIALIZED = [flower.SerializeToString() for flower in FLOWERS]


@pytest.mark.parametrize("signature_name", ["own_method", "both_ways", "no_outputs"])
def test_predict_runs_a_signature_of_any_method(stub: Any, signature_name: str) -> None:
    outputs = stub.Predict(predict_request(NAME, signature_name, inputs=SERIALIZED)).outputs
    assert {tuple(output.float_val) for output in outputs.values()} == {(0.25, 2.5)}


@pytest.mark.parametrize(
    ("signature_name", "aliases", "details"),
    [
        ("nothing", ["inputs"], "Must specify at least one target to fetch or execute."),
        ("through", ["inputs"], "examples:0 is both fed and fetched."),
        ("same_twice", ["a", "b"], 'Endpoint "examples:0" fed more than once.'),
    ],
)
def test_signature_that_tensorflow_cannot_run(
    stub: Any, signature_name: str, aliases: list[str], details: str
) -> None:
    request = predict_request(NAME, signature_name, **dict.fromkeys(aliases, SERIALIZED))
    assert refused(lambda: stub.Predict(request)) == (INVALID, details)


def test_method_names_are_checked_when_asked_for(base_path: Path) -> None:
    flags = f"--model_name={NAME}", f"--model_base_path={base_path}"
    with (
        serving(*flags, "--enable_signature_method_name_check") as server,
        Client(server, NAME) as client,
    ):
        for request, details in (
            (
                classify_request("untyped"),
                f"classification signature method_name to be {CLASSIFY}. "
                "Was: tensorflow/serving/predict",
            ),
            (
                regress_request(""),
                f"regression signature method_name to be {REGRESS}. Was: {CLASSIFY}",
            ),
            (multi_request(("regress", CLASSIFY)), f"to be {CLASSIFY}. Was: {REGRESS}"),
        ):
            got = refused(partial(call, client.prediction, request))
            assert (got[0], details in got[1]) == (INVALID, True), got
        assert labels_and_scores(client.prediction.Classify(classify_request()).result)[1] == SCORES
        assert client.predict("regress", inputs=SERIALIZED).outputs
        code, details = refused(lambda: client.predict("own_method", inputs=SERIALIZED))
        assert (code, details.endswith("Was: a/method/of/its/own")) == (Code.INTERNAL, True)
        body = {"signature_name": "own_method", "instances": [{"b64": ""}]}
        status, answer = post(server, f"{NAME}:predict", body)
        assert (status, answer["error"].endswith("Was: a/method/of/its/own")) == (500, True)
        check = health_pb2_grpc.HealthStub(client.channel).Check
        assert refused(lambda: check(health_pb2.HealthCheckRequest()))[0] == Code.UNIMPLEMENTED


def test_health_check(server: Server) -> None:
    with Client(server, NAME) as client:
        health = health_pb2_grpc.HealthStub(client.channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        for service in ("", "PredictionService", "ModelService"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert health.Check(request).status == serving
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == serving
        watch.cancel()
        unknown = health_pb2.HealthCheckRequest(service="nothing")
        assert refused(lambda: health.Check(unknown))[0] == Code.NOT_FOUND


def test_reflection_is_off(server: Server) -> None:
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    with Client(server, NAME) as client:
        reflect = client.channel.stream_stream(method, bytes, bytes)
        assert refused(lambda: list(reflect(iter([b""]))))[0] == Code.UNIMPLEMENTED


def post(server: Addresses, path: str, body: Any) -> tuple[int, Any]:
    return ask(f"{server.http}/v1/models/{path}", body)


def test_a_tensor_within_the_graph_is_fed_in_any_shape(server: Server) -> None:
    body: dict[str, Any] = {"signature_name": "half_plus_two", "instances": [1.0, 2.0, 5.0]}
    assert post(server, f"{NAME}:predict", body) == (200, {"predictions": [2.5, 3, 4.5]})
    body["instances"] = [[1.0], [2.0]]
    assert post(server, f"{NAME}:predict", body) == (200, {"predictions": [[2.5], [3]]})


ROWS = [{"size": 0.25, "name": "rose"}, {"size": [2.5], "legs": 3, "name": "tännel"}]


def test_classify_over_rest(server: Server) -> None:
    answer = [
        [[label, score] for label, score in zip(*row, strict=True)]
        for row in zip(CLASSES, SCORES, strict=True)
    ]
    for path in (NAME, f"{NAME}/versions/4"):
        assert post(server, f"{path}:classify", {"examples": ROWS}) == (200, {"results": answer})


def test_feature_beyond_a_float_is_infinity(server: Server) -> None:
    body = {"signature_name": "regress", "examples": [{"size": 1e39}, {"size": -1e39}]}
    assert post(server, f"{NAME}:regress", body) == (200, {"results": [math.inf, -math.inf]})


def test_regress_over_rest(server: Server) -> None:
    body = {"signature_name": "regress", "examples": ROWS}
    assert post(server, f"{NAME}:regress", body) == (200, {"results": [0.5, 5.0]})
    body["examples"] = [{"size": 0.05}]  # 0.1, and not the double next to the float
    assert post(server, f"{NAME}:regress", body) == (200, {"results": [0.1]})
    raw = b'{"signature_name": "regress", "examples": [{"size": NaN}, {"size": -Infinity}]}'
    status, answer = post(server, f"{NAME}:regress", raw)
    assert (status, np.isnan(answer["results"][0]), answer["results"][1]) == (200, True, -np.inf)


def test_context_base64_and_booleans_over_rest(server: Server) -> None:
    name = {"b64": base64.b64encode(b"fern").decode()}
    body = {"context": {"size": 0.5, "name": "moss"}, "examples": [{"name": name}, {"legs": True}]}
    status, answer = post(server, f"{NAME}:classify", body)
    assert (status, answer["results"]) == (
        200,
        [[["small fern", 0.5], ["FERN", 0.5]], [["small moss", 0.5], ["MOSS", 1.5]]],
    )


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "JSON Parse error: The document is empty"),
        (b"{examples", 400, "JSON Parse error"),
        ([], 400, "Is not object"),
        ({}, 400, "key 'examples' is expected and was not found"),
        ({"examples": 5}, 400, "Expecting 'examples' value to be an list/array"),
        ({"examples": []}, 400, "'examples' value is an empty array"),
        ({"examples": [5]}, 400, "Example must be JSON object but got JSON Number"),
        ({"examples": [{}], "context": "x"}, 400, "must be JSON object but got JSON String"),
        ({"examples": [{"size": None}]}, 400, "Feature: size has element with unexpected JSON"),
        ({"examples": [{"size": [[1.0]]}]}, 400, "with unexpected JSON type: Array"),
        ({"examples": [{"size": {"a": 1}}]}, 400, "with unexpected JSON type: Object"),
        ({"examples": [{"size": [1, 2.0]}]}, 400, "feature: size expecting type: int64"),
        ({"examples": [{"size": [1.0, 2]}]}, 400, "feature: size expecting type: float"),
        ({"examples": [{"name": ["a", 2]}]}, 400, "feature: name expecting type: bytes"),
        ({"examples": [{"legs": 2**63}]}, 400, "has uint64 element. Only int64 is supported."),
        ({"examples": [{"name": {"b64": "?"}}]}, 400, "Unable to base64 decode"),
        ({"examples": [{}], "signature_name": 5}, 400, "'signature_name' key must be a string"),
        ({"examples": [{}], "signature_name": "fly"}, 400, "No signature was found with the name"),
    ],
)
def test_bad_body(server: Server, body: Any, status: int, message: str) -> None:
    for method in ("classify", "regress"):
        answered, answer = post(server, f"{NAME}:{method}", body)
        assert answer.keys() == {"error"}
        assert (answered, message in answer["error"]) == (status, True), answer


def test_unknown_model_over_rest(server: Server) -> None:
    for path, status in (("rose", 404), (f"{NAME}/versions/5", 404), (f"{NAME}/labels/new", 400)):
        for method in ("classify", "regress"):
            assert post(server, f"{path}:{method}", {"examples": [{}]})[0] == status


@pytest.mark.parametrize(
    ("version", "kind", "stored", "code", "message"),
    [
        (
            5,
            "session_run_log",
            session_service_pb2.SessionRunRequest(),
            Code.UNIMPLEMENTED,
            "Unsupported log_type for warmup: session_run_log",
        ),
        (6, "classify_log", classify_request("flat"), INVALID, "Expected Tensor shape: [batch_"),
        (7, "classify_log", EMPTY_REQUEST, INVALID, "Input is empty."),
    ],
)
def test_version_whose_warm_up_fails_is_not_served(
    server: Server,
    serve_model: Callable[[str, Path], Server],
    base_path: Path,
    version: int,
    kind: str,
    stored: Any,
    code: grpc.StatusCode,
    message: str,
) -> None:
    shutil.copytree(base_path / "4", base_path / "partial")
    write_warm_up(base_path / "partial", [log_record(kind, stored)])
    (base_path / "partial").rename(base_path / str(version))
    serve_model(NAME, base_path)
    with Client(server, NAME) as client:
        status = client.error_of(version)
    assert (status.error_code, message in status.error_message) == (code.value[0], True), status
    assert post(server, f"{NAME}:classify", {"examples": [{}]})[0] == 200
