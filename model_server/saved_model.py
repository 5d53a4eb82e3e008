"""A SavedModel as a servable: TensorFlow runs it, and is imported when the first one is loaded."""

import contextlib
import functools
import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from tfserving import messages_pb2 as pb

from . import metrics
from .batching import BatchScheduler
from .errors import ServingError, status_code
from .servable import Servable

log = logging.getLogger(__name__)

# Packages whose import registers operations that TensorFlow itself has not.
OPERATIONS = ("tensorflow_text", "tensorflow_decision_forests")

NO_TENSORFLOW = (
    "a SavedModel needs TensorFlow, which is not installed here: build the image with --build-arg "
    "WITH_TENSORFLOW=1, or put a model.tflite beside saved_model.pb and give --prefer_tflite_model"
)


class SavedModel(Servable):
    """A SavedModel in a TensorFlow session of its own."""

    def __init__(
        self,
        path: Path,
        tags: Iterable[str],
        session_config: Any,
        scheduler: BatchScheduler | None,
    ):
        """Load the meta graph with ``tags``; raise ServingError when ``path`` does not hold it.

        ``session_config`` is a serialized ``ConfigProto``.
        """
        begin = metrics.now_us()
        try:
            self._session, meta_graph = _load(path, tags, session_config)
        except Exception as error:
            metrics.LOAD_ATTEMPT_COUNT.increment(str(path), "fail")
            raise _load_error(path, error) from error
        metrics.LOAD_ATTEMPT_COUNT.increment(str(path), "success")
        metrics.LOAD_LATENCY.increment(str(path), by=round(metrics.now_us() - begin))
        # Copies, since a reference into the meta graph would keep all of it in memory.
        signatures = {
            name: pb.SignatureDef.FromString(signature.SerializeToString())
            for name, signature in meta_graph.signature_def.items()
        }
        super().__init__(path, signatures, _placeholders(self._session.graph), scheduler)

    def close(self) -> None:
        """Free the session; no request may be running."""
        self._session.close()

    def _make_callable(
        self, fed: tuple[str, ...], fetched: tuple[str, ...]
    ) -> Callable[..., list[np.ndarray]]:
        from tensorflow.core.protobuf import config_pb2

        options = config_pb2.CallableOptions(feed=fed, fetch=fetched)
        # Unlike session.run and session.make_callable, this goes straight to the C++ session:
        # 0.1 ms less for each request.
        with _tensorflow_errors():
            run = self._session._make_callable_from_options(options)

        def checked(*feeds: np.ndarray) -> list[np.ndarray]:
            with _tensorflow_errors():
                return run(*feeds)

        return checked


@contextlib.contextmanager
def _tensorflow_errors() -> Iterator[None]:
    """Turn TensorFlow's errors into ServingErrors with the same status."""
    try:
        yield
    except import_tensorflow().errors.OpError as error:
        raise ServingError(status_code(error.error_code), error.message) from error


@functools.cache
def import_tensorflow() -> Any:
    """Import TensorFlow, and keep it quiet; this takes seconds.

    Raises ServingError where it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors are raised too
    try:
        with _quiet_stderr():
            import tensorflow as tf
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        raise ServingError(grpc.StatusCode.FAILED_PRECONDITION, NO_TENSORFLOW) from error

    tf.get_logger().setLevel(logging.ERROR)
    # From now on the garbage collector skips what has been imported. Going through all of
    # TensorFlow would stop every thread, and every request, for a fifth of a second.
    gc.collect()
    gc.freeze()
    return tf


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard what C++ code writes to standard error, which no setting of its log prevents."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _load(path: Path, tags: Iterable[str], session_config: Any) -> tuple[Any, Any]:
    """Load a meta graph into a session of its own, and return both.

    When an operation is unknown, the packages that TensorFlow Serving has linked in are imported,
    where they are installed.
    """
    tf = import_tensorflow()
    for last in (False, True):
        graph = tf.Graph()
        session = tf.compat.v1.Session(graph=graph, config=session_config)
        try:
            with graph.as_default():
                loader = tf.compat.v1.saved_model.loader
                return session, loader.load(session, list(tags), str(path))
        except Exception as error:
            session.close()
            if last or "Op type not registered" not in str(error) or not _import_operations():
                raise
    raise AssertionError("the second attempt returns or raises")


def _import_operations() -> bool:
    """Import what is installed of ``OPERATIONS``; say whether any of it is new."""
    known = sys.modules.keys() & set(OPERATIONS)
    for package in OPERATIONS:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # such as being built for another version of TensorFlow
            log.warning("cannot import %s: %s", package, error)
    return sys.modules.keys() & set(OPERATIONS) != known


def _load_error(path: Path, error: Exception) -> ServingError:
    """Say why the SavedModel at ``path`` cannot be loaded."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, import_tensorflow().errors.OpError):
        return ServingError(status_code(error.error_code), f"{path}: {error.message}")
    if isinstance(error, PermissionError):
        return ServingError(grpc.StatusCode.PERMISSION_DENIED, f"{path}: {error}")
    if isinstance(error, OSError) and not (path / "saved_model.pb").exists():
        return ServingError(
            grpc.StatusCode.NOT_FOUND,
            f"{path} holds no saved_model.pb: export a SavedModel to it, then start again "
            "or add it as the next version",
        )
    code = grpc.StatusCode.NOT_FOUND if isinstance(error, RuntimeError) else None
    return ServingError(code or grpc.StatusCode.DATA_LOSS, f"{path}: {error}")


def _placeholders(graph: Any) -> frozenset[str]:
    """Name the tensors that only a request can provide.

    An input of a signature may also be a tensor that the graph computes, in whose place a request
    puts its own. The rank that the graph computes says nothing about the rank that clients send.
    In TensorFlow Serving's half_plus_two, such an input is a column of numbers parsed from
    Examples, and everybody sends it a plain list.
    """
    return frozenset(
        op.outputs[0].name for op in graph.get_operations() if op.type == "Placeholder"
    )
