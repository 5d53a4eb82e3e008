"""Lists of ``tf.Example`` in, classifications and regressions out, as messages or as JSON."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from tfserving import messages_pb2, server_messages_pb2

from .errors import ServingError, invalid_argument
from .json_tensors import float_literals, quoted, shape_name
from .servable import DEFAULT_SIGNATURE, Servable
from .tensors import data_type


@dataclass(frozen=True)
class Method:
    """One of the two methods that run a signature on Examples, and where they differ.

    ``name`` is the ``method_name`` of its signatures, ``api`` the RPC, ``kind`` the noun in
    messages and fields. ``outputs`` maps the outputs that a signature may have to their
    ``DataType``; it must have at least one of them. ``wrong_count`` is the message for a signature
    with another number of outputs, ``missing`` for one with none of these. ``make_result`` turns
    the outputs for a number of examples into a result message, ``rows`` writes each row of
    that as JSON.
    """

    name: str
    api: str
    kind: str
    request: type
    response: type
    outputs: Mapping[str, int]
    wrong_count: str
    missing: str
    make_result: Callable[[Mapping[str, np.ndarray], int], Any]
    rows: Callable[[Any], list[str]]


def infer(
    servable: Servable,
    signature_name: str,
    method: Method,
    inputs: Any,
    check_method_name: bool = False,
    timeout_ms: int = 0,
) -> Any:
    """Run a signature on an ``Input``: a ``ClassificationResult`` or a ``RegressionResult``.

    With ``check_method_name`` the signature must be one for this method. Raises ServingError for
    everything that can be wrong.
    """
    signature = servable.signatures.get(signature_name or DEFAULT_SIGNATURE)
    if signature is None:
        raise invalid_argument(
            f"No signature was found with the name: {signature_name or DEFAULT_SIGNATURE}"
        )
    aliases = check_signature(signature, method, check_method_name)
    examples = serialize(inputs)
    outputs = servable.predict(signature_name, {"inputs": examples}, aliases, timeout_ms)
    return method.make_result(outputs, len(examples))


def infer_all(
    servable: Servable,
    tasks: Any,
    inputs: Any,
    check_method_name: bool = False,
    timeout_ms: int = 0,
) -> list[Any]:
    """Run the signatures that a list of ``InferenceTask`` names, all on the same ``Input``.

    They run together; the results come in the order of the tasks.
    """
    aliases = _check_tasks(servable, tasks, check_method_name)
    examples = serialize(inputs)
    outputs = servable.predict_together(aliases, {"inputs": examples}, timeout_ms)
    return [
        METHODS[task.method_name].make_result(each, len(examples))
        for task, each in zip(tasks, outputs, strict=True)
    ]


def _check_tasks(servable: Servable, tasks: Any, check_method_name: bool) -> dict[str, list[str]]:
    """Map the signature of each task to the outputs to compute; raise ServingError if it is wrong.

    No task runs before all of them are checked.
    """
    aliases: dict[str, list[str]] = {}
    for task in tasks:
        if not task.model_spec.name:
            raise invalid_argument("Found ModelSpec with an empty model name.")
        if task.model_spec.name != tasks[0].model_spec.name:
            raise invalid_argument(
                "All ModelSpecs in a MultiInferenceRequest must access the same model name."
            )
        name = task.model_spec.signature_name or DEFAULT_SIGNATURE
        if name in aliases:
            raise invalid_argument(f"Duplicate evaluation of signature: {name}")
        if name not in servable.signatures:
            raise invalid_argument(f"Requested signature not found in model graph: {name}")
        if task.method_name not in METHODS:
            raise ServingError(
                grpc.StatusCode.UNIMPLEMENTED,
                f"Unsupported signature method_name: {task.method_name}",
            )
        aliases[name] = check_signature(
            servable.signatures[name], METHODS[task.method_name], check_method_name
        )
    return aliases


def check_signature(signature: Any, method: Method, check_method_name: bool) -> list[str]:
    """Return the outputs to compute; raise ServingError when the signature has not got them."""
    if check_method_name and signature.method_name != method.name:
        raise invalid_argument(
            f"Expected {method.kind} signature method_name to be {method.name}. "
            f"Was: {signature.method_name}"
        )
    if len(signature.inputs) != 1:
        raise invalid_argument("Expected one input Tensor.")
    count = len(signature.outputs)
    if not 1 <= count <= len(method.outputs):
        raise invalid_argument(method.wrong_count.format(count=count))
    if "inputs" not in signature.inputs:
        raise invalid_argument(f"No {method.kind} inputs found in SignatureDef: {signature}")
    aliases = [alias for alias in method.outputs if alias in signature.outputs]
    if not aliases:
        raise invalid_argument(method.missing.format(signature=signature))
    return aliases


def serialize(inputs: Any) -> np.ndarray:
    """Serialize the examples of an ``Input``, each with the context before it, if there is one."""
    context = b""
    examples = inputs.example_list.examples
    if inputs.WhichOneof("kind") == "example_list_with_context":
        # Two messages, one after the other, parse as one message. Where both have a feature, the
        # second counts, which is the example's.
        context = inputs.example_list_with_context.context.SerializeToString()
        examples = inputs.example_list_with_context.examples
    if not examples:
        raise invalid_argument("Input is empty.")
    return np.array([context + example.SerializeToString() for example in examples], object)


def _classification_result(outputs: Mapping[str, np.ndarray], count: int) -> Any:
    for alias, dtype in CLASSIFY.outputs.items():
        if alias in outputs:
            array = outputs[alias]
            if array.ndim != 2:
                raise invalid_argument(
                    "Expected Tensor shape: [batch_size num_classes] but got "
                    + shape_name(array.shape)
                )
            _check_dtype(array, dtype, f"{alias} Tensor of {_name(dtype)}. ")
            if len(array) != count:
                raise invalid_argument(
                    f"Expected {alias} output batch size of {count}. Got: {len(array)}"
                )
    classes, scores = outputs.get("classes"), outputs.get("scores")
    if classes is not None and scores is not None and classes.shape != scores.shape:
        raise invalid_argument(
            "Tensors class and score should match in dim_size(1). "
            f"Got {classes.shape[1]} vs. {scores.shape[1]}"
        )
    size = next(iter(outputs.values())).shape[1]
    labels = [[""] * size] * count if classes is None else classes.tolist()
    values = [[0.0] * size] * count if scores is None else scores.tolist()
    result = server_messages_pb2.ClassificationResult()
    for row in range(count):
        added = result.classifications.add().classes
        for label, score in zip(labels[row], values[row], strict=True):
            text = label.decode("utf-8", "replace") if isinstance(label, bytes) else label
            added.add(label=text, score=score)
    return result


def _classification_rows(result: Any) -> list[str]:
    """Write a pair of label and score for each class of each example."""
    rows = []
    for classifications in result.classifications:
        scores = _literals(each.score for each in classifications.classes)
        labels = (quoted(each.label) for each in classifications.classes)
        pairs = (f"[{label}, {score}]" for label, score in zip(labels, scores, strict=True))
        rows.append(f"[{', '.join(pairs)}]")
    return rows


def _regression_result(outputs: Mapping[str, np.ndarray], count: int) -> Any:
    array = outputs["outputs"]
    if array.shape[1:] not in ((), (1,)) or not array.ndim:
        raise invalid_argument(
            "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got "
            + shape_name(array.shape)
        )
    if len(array) != count:
        raise invalid_argument(
            f"Input batch size did not match output batch size: {count} vs. {len(array)}"
        )
    _check_dtype(array, REGRESS.outputs["outputs"], "output Tensor of DT_FLOAT.  ")
    result = server_messages_pb2.RegressionResult()
    for value in array.ravel().tolist():
        result.regressions.add(value=value)
    return result


def _regression_rows(result: Any) -> list[str]:
    """Write the value of each example."""
    return _literals(regression.value for regression in result.regressions)


def _literals(values: Iterable[float]) -> list[str]:
    return float_literals(np.fromiter(values, np.float32)).tolist()


def _check_dtype(array: np.ndarray, dtype: int, expected: str) -> None:
    got = data_type(array.dtype)
    if got != dtype:
        raise invalid_argument(f"Expected {expected}Got: {_name(got)}")


def _name(dtype: int) -> str:
    return messages_pb2.DataType.Name(dtype)


CLASSIFY = Method(
    "tensorflow/serving/classify",
    api="Classify",
    kind="classification",
    request=server_messages_pb2.ClassificationRequest,
    response=server_messages_pb2.ClassificationResponse,
    outputs={"classes": messages_pb2.DT_STRING, "scores": messages_pb2.DT_FLOAT},
    wrong_count="Expected one or two output Tensors, found {count}",
    missing="Expected classification signature outputs to contain at least one of "
    '"classes" or "scores". Signature was: {signature}',
    make_result=_classification_result,
    rows=_classification_rows,
)
REGRESS = Method(
    "tensorflow/serving/regress",
    api="Regress",
    kind="regression",
    request=server_messages_pb2.RegressionRequest,
    response=server_messages_pb2.RegressionResponse,
    outputs={"outputs": messages_pb2.DT_FLOAT},
    wrong_count="Expected one output Tensor.",
    missing="No regression outputs found in SignatureDef: {signature}",
    make_result=_regression_result,
    rows=_regression_rows,
)
METHODS = {method.name: method for method in (CLASSIFY, REGRESS)}


def format_result(method: Method, result: Any) -> bytes:
    """Write ``{"results": [...]}``: pairs of label and score for each example, or a value."""
    return f'{{\n    "results": [{", ".join(method.rows(result))}]\n}}'.encode()
