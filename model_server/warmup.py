"""Replays the requests stored beside a SavedModel, before its first client comes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import prediction_log_pb2

from . import inference, metrics
from .errors import ServingError, invalid_argument
from .servable import Servable

MAX_RECORDS = 1000


def replay(servable: Servable, path: Path, iterations: int = 1) -> int:
    """Run the requests in ``assets.extra/tf_serving_warmup_requests``, each ``iterations`` times.

    Returns the number of requests, 0 without such a file; raises ServingError when one of them
    fails or the file is not one of ``PredictionLog`` records.
    """
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    if not file.exists():
        return 0
    begin = metrics.now_us()
    count = 0
    try:
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            count += 1
            if count > MAX_RECORDS:
                raise invalid_argument(
                    f"Number of warmup records exceeds the maximum ({MAX_RECORDS}) at {file}"
                )
            log = prediction_log_pb2.PredictionLog.FromString(record)
            kind = log.WhichOneof("log_type")
            if kind == "session_run_log":
                raise ServingError(
                    grpc.StatusCode.UNIMPLEMENTED,
                    f"Unsupported log_type for warmup: {kind} at {file}",
                )
            for _ in range(iterations if kind in _RUN else 0):
                _RUN[kind](servable, getattr(log, kind).request)
    except tf.errors.DataLossError as error:
        raise ServingError(
            grpc.StatusCode.DATA_LOSS,
            f"{error.message}. Please verify that {file} is in TFRecord format.",
        ) from error
    except DecodeError as error:
        raise invalid_argument(f"Failed to parse warmup record {count} of {file}") from error
    metrics.WARMUP_LATENCY.observe(metrics.now_us() - begin, str(path), "OK")
    metrics.WARMUP_RECORDS.increment(str(path), "OK", by=count)
    return count


def _predict(servable: Servable, request: Any) -> None:
    servable.predict(request.model_spec.signature_name, request.inputs, request.output_filter)


def _infer(method: inference.Method, servable: Servable, request: Any) -> None:
    inference.infer(servable, request.model_spec.signature_name, method, request.input)


def _multi_inference(servable: Servable, request: Any) -> None:
    inference.infer_all(servable, request.tasks, request.input)


_RUN: dict[str, Callable[[Servable, Any], Any]] = {
    "predict_log": _predict,
    "classify_log": partial(_infer, inference.CLASSIFY),
    "regress_log": partial(_infer, inference.REGRESS),
    "multi_inference_log": _multi_inference,
}
