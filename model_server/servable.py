"""One loaded version of a model: its signatures, and the session that runs them."""

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2

from . import metrics, tensors
from .batching import BatchScheduler
from .errors import ServingError, invalid_argument, status_code

log = logging.getLogger(__name__)

DEFAULT_SIGNATURE = "serving_default"
# Packages whose import registers operations that TensorFlow itself has not.
OPERATIONS = ("tensorflow_text", "tensorflow_decision_forests")

_with_limits = ThreadPoolExecutor(max_workers=512, thread_name_prefix="run")


class Servable:
    """A SavedModel in a TensorFlow session of its own; safe to use from many threads at once.

    ``signatures`` maps each signature's name to its ``SignatureDef``.
    """

    def __init__(
        self,
        path: Path,
        tags: Iterable[str] = ("serve",),
        session_config: Any = None,
        scheduler: BatchScheduler | None = None,
    ):
        """Load the meta graph with ``tags``; raise ServingError when ``path`` does not hold it."""
        self._scheduler = scheduler
        self._batching = scheduler.parameters_for(path) if scheduler else None
        begin = metrics.now_us()
        try:
            self._session, meta_graph = _load(path, tags, session_config)
        except Exception as error:
            metrics.LOAD_ATTEMPT_COUNT.increment(str(path), "fail")
            raise _load_error(path, error) from error
        metrics.LOAD_ATTEMPT_COUNT.increment(str(path), "success")
        metrics.LOAD_LATENCY.increment(str(path), by=round(metrics.now_us() - begin))
        # Copies, since a reference into the meta graph would keep all of it in memory.
        self.signatures = {
            name: meta_graph_pb2.SignatureDef.FromString(signature.SerializeToString())
            for name, signature in meta_graph.signature_def.items()
        }
        self._placeholders = _placeholders(self._session.graph)
        self._callable = functools.lru_cache(maxsize=64)(self._make_callable)

    def signature(self, name: str) -> Any:
        """Look up a ``SignatureDef``; an empty name means the default one."""
        name = name or DEFAULT_SIGNATURE
        if name not in self.signatures:
            raise ServingError(
                grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.'
            )
        return self.signatures[name]

    def predict(
        self,
        signature_name: str,
        inputs: Mapping[str, Any],
        output_filter: Sequence[str] = (),
        timeout_ms: int = 0,
    ) -> dict[str, np.ndarray]:
        """Run a signature on arrays or TensorProtos of the dtypes and shapes that it declares.

        ``output_filter`` names the outputs to compute, all if it is empty; ``timeout_ms`` of 0
        means without limit. Raises ServingError for everything that can be wrong.
        """
        signature = self.signature(signature_name)
        feeds = _feeds(signature, inputs, self._placeholders)
        aliases = _outputs(signature, output_filter)
        names = _tensor_names(signature.inputs, sorted(signature.inputs))
        arrays = self._batch(names, _tensor_names(signature.outputs, aliases), feeds, timeout_ms)
        return dict(zip(aliases, arrays, strict=True))

    def predict_together(
        self,
        outputs: Mapping[str, Sequence[str]],
        inputs: Mapping[str, Any],
        timeout_ms: int = 0,
    ) -> list[dict[str, np.ndarray]]:
        """Run several signatures, each on the same inputs, in one run of the graph.

        ``outputs`` maps the name of each signature to the aliases of its outputs to compute.
        Raises ServingError for everything that can be wrong.
        """
        tensors_fed: dict[str, np.ndarray] = {}
        fetches: dict[str, None] = {}
        for name, aliases in outputs.items():
            signature = self.signature(name)
            feeds = _feeds(signature, inputs, self._placeholders)
            names = _tensor_names(signature.inputs, sorted(signature.inputs))
            tensors_fed |= zip(names, feeds, strict=True)
            fetches |= dict.fromkeys(_tensor_names(signature.outputs, aliases))
        arrays = self._batch(
            tuple(tensors_fed), tuple(fetches), list(tensors_fed.values()), timeout_ms
        )
        fetched = dict(zip(fetches, arrays, strict=True))
        return [
            {alias: fetched[self.signature(name).outputs[alias].name] for alias in aliases}
            for name, aliases in outputs.items()
        ]

    def close(self) -> None:
        """Free the session; no request may be running."""
        self._session.close()

    def _batch(
        self,
        fed: tuple[str, ...],
        fetched: tuple[str, ...],
        feeds: list[np.ndarray],
        timeout_ms: int,
    ) -> list[np.ndarray]:
        """Feed and fetch tensors of the graph by name, together with others who do if batching."""
        run = functools.partial(self._run, fed, fetched)
        if self._scheduler and self._batching:
            key = (self, fed, fetched)
            return self._scheduler.run(key, self._batching, run, feeds, timeout_ms)
        return run(feeds, timeout_ms)

    def _run(
        self,
        fed: tuple[str, ...],
        fetched: tuple[str, ...],
        feeds: list[np.ndarray],
        timeout_ms: int,
    ) -> list[np.ndarray]:
        begin = metrics.now_us()
        try:
            run = self._callable(fed, fetched)
            arrays = run(*feeds) if not timeout_ms else _within(timeout_ms, run, feeds)
        except tf.errors.OpError as error:
            raise ServingError(status_code(error.error_code), error.message) from error
        metrics.GRAPH_RUNS.increment()
        metrics.GRAPH_RUN_TIME.increment(by=round(metrics.now_us() - begin))
        return [np.asarray(a, object if isinstance(a, bytes) else None) for a in arrays]

    def _make_callable(
        self, fed: tuple[str, ...], fetched: tuple[str, ...]
    ) -> Callable[..., list[np.ndarray]]:
        options = config_pb2.CallableOptions(feed=fed, fetch=fetched)
        # Unlike session.run and session.make_callable, this goes straight to the C++ session:
        # 0.1 ms less for each request.
        return self._session._make_callable_from_options(options)


def _load(path: Path, tags: Iterable[str], session_config: Any) -> tuple[Any, Any]:
    """Load a meta graph into a session of its own, and return both.

    When an operation is unknown, the packages that TensorFlow Serving has linked in are imported,
    where they are installed.
    """
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


def _within(
    timeout_ms: int, run: Callable[..., list[np.ndarray]], feeds: list[np.ndarray]
) -> list[np.ndarray]:
    """Run with a time limit. A run that is late goes on in its thread, but nobody waits for it.

    TensorFlow's own limit is part of a callable. Each new limit would need a callable of its own,
    whose first run is slow.
    """
    try:
        return _with_limits.submit(run, *feeds).result(timeout_ms / 1e3)
    except TimeoutError as error:
        raise ServingError(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"Run() took longer than {timeout_ms} ms"
        ) from error


def _load_error(path: Path, error: Exception) -> ServingError:
    """Say why the SavedModel at ``path`` cannot be loaded."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, tf.errors.OpError):
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


def _tensor_names(infos: Mapping[str, Any], aliases: Iterable[str]) -> tuple[str, ...]:
    return tuple(infos[alias].name for alias in aliases)


def _names(aliases: Iterable[str]) -> str:
    return "{" + ",".join(sorted(aliases)) + "}"


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


def _feeds(
    signature: Any, inputs: Mapping[str, Any], placeholders: Collection[str]
) -> list[np.ndarray]:
    """Order the inputs by their aliases, and check each against its declaration.

    The shape of a placeholder is checked because some of TensorFlow's kernels end the whole process
    when a tensor has not the rank that they were built for.
    """
    sent, wanted = set(inputs), set(signature.inputs)
    optional = set(signature.defaults)
    if len(sent) > len(wanted) or (len(sent) < len(wanted) and not optional):
        raise invalid_argument(
            f"input size does not match signature: {len(sent)}!={len(wanted)} "
            f"len({_names(sent)}) != len({_names(wanted)}). "
            f"Sent extra: {_names(sent - wanted)}. Missing but required: {_names(wanted - sent)}."
        )
    if missing := wanted - sent - optional:
        raise invalid_argument(
            f"Signature input alias: {min(missing)} not found in request and no default value "
            f"provided. Inputs expected to be in the set {_names(wanted)}, sent: {_names(sent)}."
        )
    if unknown := sent - wanted:
        raise invalid_argument(
            f"input tensor alias not found in signature: {min(unknown)}. "
            f"Inputs expected to be in the set {_names(wanted)}."
        )
    feeds = []
    for index, alias in enumerate(sorted(wanted)):
        info = signature.inputs[alias]
        array = inputs[alias] if alias in sent else signature.defaults[alias]
        if not isinstance(array, np.ndarray):
            try:
                array = tensors.from_proto(array)
            except ValueError as error:
                raise invalid_argument(f"tensor parsing error: {alias}") from error
        dtype = tf.as_dtype(array.dtype).as_datatype_enum
        if dtype != info.dtype:
            raise invalid_argument(
                f"Expects arg[{index}] to be {tensors.dtype_name(info.dtype)} "
                f"but {tensors.dtype_name(dtype)} is provided for input {alias}"
            )
        shape = tf.TensorShape(info.tensor_shape)
        if info.name in placeholders and not shape.is_compatible_with(array.shape):
            raise invalid_argument(
                f"input {alias} has shape {list(array.shape)}, but its signature declares "
                f"{[-1 if size is None else size for size in shape]}"
            )
        feeds.append(array)
    return feeds


def _outputs(signature: Any, output_filter: Sequence[str]) -> tuple[str, ...]:
    """Check the aliases of the outputs that a request asks for; return all when it names none."""
    for position, alias in enumerate(output_filter):
        if alias not in signature.outputs:
            raise invalid_argument(
                f"output tensor alias not found in signature: {alias} "
                f"Outputs expected to be in the set {_names(signature.outputs)}."
            )
        if alias in output_filter[:position]:
            raise invalid_argument(f"duplicate output tensor alias: {alias}")
    return tuple(output_filter) or tuple(sorted(signature.outputs))
