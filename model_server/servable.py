"""One loaded version of a model: its signatures, and what every engine does before it runs them."""

import abc
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from . import metrics, tensors
from .batching import BatchScheduler
from .errors import ServingError, invalid_argument

DEFAULT_SIGNATURE = "serving_default"
# What --prefer_tflite_model looks for beside saved_model.pb.
LITE_FILE = "model.tflite"

_with_limits = ThreadPoolExecutor(max_workers=512, thread_name_prefix="run")


class Servable(abc.ABC):
    """A model in an engine of its own; safe to use from many threads at once.

    ``signatures`` maps each signature's name to its ``SignatureDef``, ``placeholders`` names the
    tensors that only a request can provide.
    """

    def __init__(
        self,
        path: Path,
        signatures: Mapping[str, Any],
        placeholders: Collection[str],
        scheduler: BatchScheduler | None,
    ):
        """Raise ServingError when the parameters for batching beside the model are wrong."""
        self.signatures = signatures
        self._placeholders = placeholders
        self._scheduler = scheduler
        self._batching = scheduler.parameters_for(path) if scheduler else None
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
        return self.predict_together({signature_name: output_filter}, inputs, timeout_ms)[0]

    def predict_together(
        self,
        outputs: Mapping[str, Sequence[str]],
        inputs: Mapping[str, Any],
        timeout_ms: int = 0,
    ) -> list[dict[str, np.ndarray]]:
        """Run several signatures, each on the same inputs, in one run of the graph.

        ``outputs`` maps the name of each signature to its ``output_filter``. The rest is as in
        ``predict``.
        """
        feeds: list[tuple[str, np.ndarray]] = []
        wanted: list[dict[str, str]] = []
        for name, output_filter in outputs.items():
            signature = self.signature(name)
            arrays = _feeds(signature, inputs, self._placeholders)
            aliases = _outputs(signature, output_filter)
            names = (signature.inputs[alias].name for alias in sorted(signature.inputs))
            fed = {tensor for tensor, _ in feeds}  # for a signature before this one
            feeds += [pair for pair in zip(names, arrays, strict=True) if pair[0] not in fed]
            wanted.append({alias: signature.outputs[alias].name for alias in aliases})
        fetched = tuple(dict.fromkeys(name for names in wanted for name in names.values()))
        arrays = self._batch(
            tuple(name for name, _ in feeds), fetched, [array for _, array in feeds], timeout_ms
        )
        values = dict(zip(fetched, arrays, strict=True))
        return [{alias: values[name] for alias, name in names.items()} for names in wanted]

    @abc.abstractmethod
    def close(self) -> None:
        """Free the engine; no request may be running."""

    @abc.abstractmethod
    def _make_callable(
        self, fed: tuple[str, ...], fetched: tuple[str, ...]
    ) -> Callable[..., list[np.ndarray]]:
        """Make a function of the tensors ``fed`` that returns those ``fetched``, both by name.

        It raises ServingError for what the engine refuses.
        """

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
        run = self._callable(fed, fetched)
        arrays = run(*feeds) if not timeout_ms else _within(timeout_ms, run, feeds)
        metrics.GRAPH_RUNS.increment()
        metrics.GRAPH_RUN_TIME.increment(by=round(metrics.now_us() - begin))
        return [np.asarray(a, object if isinstance(a, bytes) else None) for a in arrays]


def _within(
    timeout_ms: int, run: Callable[..., list[np.ndarray]], feeds: list[np.ndarray]
) -> list[np.ndarray]:
    """Run with a time limit. A run that is late goes on in its thread, but nobody waits for it.

    TensorFlow's own limit is part of a callable. Each new limit would need a callable of its own,
    whose first run is slow. TensorFlow Lite has none.
    """
    try:
        return _with_limits.submit(run, *feeds).result(timeout_ms / 1e3)
    except TimeoutError as error:
        raise ServingError(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"Run() took longer than {timeout_ms} ms"
        ) from error


def _names(aliases: Iterable[str]) -> str:
    return "{" + ",".join(sorted(aliases)) + "}"


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
        dtype = tensors.data_type(array.dtype)
        if dtype != info.dtype:
            raise invalid_argument(
                f"Expects arg[{index}] to be {tensors.dtype_name(info.dtype)} "
                f"but {tensors.dtype_name(dtype)} is provided for input {alias}"
            )
        if info.name in placeholders and not _fits(array.shape, info.tensor_shape):
            raise invalid_argument(
                f"input {alias} has shape {list(array.shape)}, but its signature declares "
                f"{[dim.size for dim in info.tensor_shape.dim]}"
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


def _fits(shape: Sequence[int], declared: Any) -> bool:
    """Say whether a shape is one that a ``TensorShapeProto`` declares; -1 there is any size."""
    if declared.unknown_rank:
        return True
    sizes = [dim.size for dim in declared.dim]
    return len(shape) == len(sizes) and all(
        size in (-1, length) for length, size in zip(shape, sizes, strict=True)
    )
