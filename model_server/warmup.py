"""Replays the requests stored beside a SavedModel, before its first client comes."""

import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
from google.protobuf.message import DecodeError

from tfserving import server_messages_pb2

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
        for record in _records(file):
            count += 1
            if count > MAX_RECORDS:
                raise invalid_argument(
                    f"Number of warmup records exceeds the maximum ({MAX_RECORDS}) at {file}"
                )
            log = server_messages_pb2.PredictionLog.FromString(record)
            kind = log.WhichOneof("log_type")
            if kind == "session_run_log":
                raise ServingError(
                    grpc.StatusCode.UNIMPLEMENTED,
                    f"Unsupported log_type for warmup: {kind} at {file}",
                )
            for _ in range(iterations if kind in _RUN else 0):
                _RUN[kind](servable, getattr(log, kind).request)
    except DecodeError as error:
        raise invalid_argument(f"Failed to parse warmup record {count} of {file}") from error
    metrics.WARMUP_LATENCY.observe(metrics.now_us() - begin, str(path), "OK")
    metrics.WARMUP_RECORDS.increment(str(path), "OK", by=count)
    return count


def _records(file: Path) -> Iterator[bytes]:
    """Read a TFRecord file; raise ServingError where it is damaged.

    Each record is its length (8 bytes), that length's checksum (4), the content, and the content's
    checksum (4), all little-endian. The checksums are masked CRC-32C.
    """
    content = file.read_bytes()
    offset = 0
    while offset < len(content):
        (length,) = struct.unpack_from("<Q", content.ljust(offset + 8, b"\0"), offset)
        parts = (offset, offset + 8), (offset + 12, offset + 12 + length)
        for start, end in parts:
            checksum = google_crc32c.value(content[start:end])
            masked = ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
            if content[end : end + 4] != struct.pack("<I", masked):
                raise ServingError(
                    grpc.StatusCode.DATA_LOSS,
                    f"corrupted record at {offset}. Please verify that {file} is in TFRecord "
                    "format.",
                )
        yield content[offset + 12 : offset + 12 + length]
        offset += length + 16


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
