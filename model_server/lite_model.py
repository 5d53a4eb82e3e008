"""A ``model.tflite`` as a servable: LiteRT runs it, and TensorFlow is not needed."""

import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from flatbuffers import flexbuffers

from tfserving import messages_pb2 as pb

from . import metrics, tensors
from .batching import BatchingParameters, BatchScheduler
from .errors import ServingError, invalid_argument
from .servable import DEFAULT_SIGNATURE, LITE_FILE, Servable

# The most rows that TensorFlow Serving shares out among the interpreters of its pools.
SHARED_ROWS = 500
# Where TensorFlow's converter for SavedModels once kept their signatures, and TensorFlow Serving
# still looks for them.
SIGNATURE_DEFS = b"signature_defs_metadata"
PREDICT = "tensorflow/serving/predict"


def cores() -> int:
    """Count the cores that this server may use; ``TF_NUM_INTRAOP_THREADS`` says it of a container.

    A container may use fewer cores than its machine has, and only whoever starts it knows.
    """
    return int(os.environ.get("TF_NUM_INTRAOP_THREADS", "0")) or os.cpu_count() or 1


class LiteModel(Servable):
    """A TensorFlow Lite model in a pool of interpreters, each of which runs one request at a time.

    A request that comes alone gets an interpreter that uses all cores. Those that come together get
    one of ``num_pools`` others, which use one core each. With more than one
    ``num_interpreters_per_pool``, rows of requests are merged and shared out among them.

    Signatures are read from the file: those of LiteRT, which may each have a graph of their own,
    and those that TensorFlow Serving reads. A file without any gets ``serving_default``, with the
    names that its tensors have.
    """

    def __init__(
        self,
        path: Path,
        num_pools: int,
        num_interpreters_per_pool: int,
        scheduler: BatchScheduler | None,
    ):
        """Load ``model.tflite`` in the folder ``path``; raise ServingError when it is not one."""
        begin = metrics.now_us()
        num_pools = num_pools or cores()
        try:
            content = (path / LITE_FILE).read_bytes()
            self._everywhere = _Runner(content, threads=cores())
            self._elsewhere: queue.LifoQueue[_Runner] = queue.LifoQueue()
            for _ in range(num_pools):
                self._elsewhere.put(_Runner(content, threads=1))
            signatures = self._everywhere.signatures
            super().__init__(path, signatures, self._everywhere.placeholders, scheduler)
        except ServingError:
            metrics.LOAD_ATTEMPT_COUNT.increment(str(path), "fail")
            raise
        except Exception as error:
            metrics.LOAD_ATTEMPT_COUNT.increment(str(path), "fail")
            reason = " ".join(str(error).split())
            raise invalid_argument(f"{path / LITE_FILE}: LiteRT cannot run it: {reason}") from error
        self._changing = threading.Lock()
        self._requests = 0
        self._sharing: BatchScheduler | None = None
        if num_interpreters_per_pool > 1:
            self._sharing = BatchScheduler(
                BatchingParameters(
                    max_batch_size=SHARED_ROWS,
                    max_enqueued_batches=num_pools * 100,
                    num_batch_threads=num_pools,
                    enable_large_batch_splitting=True,
                    max_execution_batch_size=-(-SHARED_ROWS // num_interpreters_per_pool),
                )
            )
        metrics.LOAD_ATTEMPT_COUNT.increment(str(path), "success")
        metrics.LOAD_LATENCY.increment(str(path), by=round(metrics.now_us() - begin))

    def close(self) -> None:
        """Let the threads end that share out rows; memory is freed with the last reference."""
        if self._sharing:
            self._sharing.close()

    def _make_callable(
        self, fed: tuple[str, ...], fetched: tuple[str, ...]
    ) -> Callable[..., list[np.ndarray]]:
        def run(feeds: list[np.ndarray], timeout_ms: int = 0) -> list[np.ndarray]:
            with self._runner() as runner:
                return runner.run(dict(zip(fed, feeds, strict=True)), fetched)

        def share(*feeds: np.ndarray) -> list[np.ndarray]:
            if not self._sharing:
                return run(list(feeds))
            key = (fed, fetched)
            return self._sharing.run(key, self._sharing.parameters, run, list(feeds))

        return share

    @contextmanager
    def _runner(self) -> Iterator["_Runner"]:
        """Lend a runner; wait for one while all are busy."""
        with self._changing:
            self._requests += 1
            alone = self._requests == 1
        runner = self._everywhere if alone else self._elsewhere.get()
        try:
            yield runner
        finally:
            if not alone:
                self._elsewhere.put(runner)
            with self._changing:
                self._requests -= 1


class _Runner:
    """One interpreter with the signatures of its file."""

    def __init__(self, content: bytes, threads: int):
        self._interpreter = Interpreter(model_content=content, num_threads=threads)
        self._interpreter.allocate_tensors()
        self._runner_of = functools.cache(self._interpreter.get_signature_runner)
        details = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        # Of the main graph, which a request may ask by the names of its tensors.
        self._inputs, self._outputs = ({each["name"]: each for each in side} for side in details)
        self.placeholders: set[str] = set()
        # For each signature of LiteRT, the alias of each tensor by the name that it has here.
        self._aliases: dict[str, dict[str, str]] = {}
        self.signatures = self._read_signatures(content)

    def run(self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...]) -> list[np.ndarray]:
        """Feed tensors by name; return ``outputs`` in their order, as copies."""
        try:
            arrays = self._run(inputs, outputs)
        except (RuntimeError, ValueError) as error:
            raise ServingError(
                grpc.StatusCode.INTERNAL, f"Failed to invoke TfLite interpreter: {error}"
            ) from error
        return [array.astype(object) if array.dtype.kind == "S" else array for array in arrays]

    def _run(self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...]) -> list[np.ndarray]:
        for name, aliases in self._aliases.items():
            if aliases.keys() >= {*inputs, *outputs}:
                answer = self._runner_of(name)(**{aliases[n]: a for n, a in inputs.items()})
                return [answer[aliases[output]] for output in outputs]
        if not (self._inputs.keys() >= inputs.keys() and self._outputs.keys() >= {*outputs}):
            raise ServingError(
                grpc.StatusCode.UNIMPLEMENTED, "These signatures have no graph in common."
            )
        for name, array in inputs.items():
            self._interpreter.resize_tensor_input(self._inputs[name]["index"], array.shape)
        self._interpreter.allocate_tensors()
        for name, array in inputs.items():
            self._interpreter.set_tensor(self._inputs[name]["index"], array)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(self._outputs[name]["index"]) for name in outputs]

    def _read_signatures(self, content: bytes) -> dict[str, Any]:
        signatures = {
            name: pb.SignatureDef.FromString(text) for name, text in _signature_defs(content)
        }
        for name, signature in signatures.items():
            self._correct_names(name, signature)
        for name in self._interpreter.get_signature_list():
            runner = self._runner_of(name)
            inputs, outputs = runner.get_input_details(), runner.get_output_details()
            taken = {known for aliases in self._aliases.values() for known in aliases}
            for details in (*inputs.values(), *outputs.values()):
                if details["name"] in taken:  # in another graph
                    details["name"] = f"{name}/{details['name']}"
            self._aliases[name] = {
                details["name"]: alias for alias, details in (*inputs.items(), *outputs.items())
            }
            self.placeholders |= {d["name"] for d in inputs.values() if _is_resizable(d)}
            signatures[name] = _signature_def(inputs, outputs)
        if not signatures:
            named = [
                {name.partition(":")[0]: each for name, each in side.items()}
                for side in (self._inputs, self._outputs)
            ]
            signatures[DEFAULT_SIGNATURE] = _signature_def(*named)
            self.placeholders = {n for n, each in self._inputs.items() if _is_resizable(each)}
        return signatures

    def _correct_names(self, name: str, signature: Any) -> None:
        """Drop what follows the colon in names of tensors that only exist without it.

        Raises ServingError for a tensor that does not exist at all.
        """
        for kind, infos, existing in (
            ("input", signature.inputs, self._inputs),
            ("output", signature.outputs, self._outputs),
        ):
            for alias, info in infos.items():
                for known in (info.name, info.name.partition(":")[0]):
                    if known in existing:
                        info.name = known
                        break
                else:
                    raise ServingError(
                        grpc.StatusCode.INTERNAL,
                        f"Signature {kind} {alias} references an unknown tensor: Unknown tensor "
                        f"'{info.name}'. (signature {name})",
                    )


def _is_resizable(details: Mapping[str, Any]) -> bool:
    """Say whether a tensor declares which of its sizes may change, which old files do not."""
    return -1 in details["shape_signature"]


def _signature_def(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
    """Describe tensors by alias, in LiteRT's details, as a ``SignatureDef``."""
    signature = pb.SignatureDef(method_name=PREDICT)
    for side, infos in ((inputs, signature.inputs), (outputs, signature.outputs)):
        for alias, details in side.items():
            info = infos[alias]
            info.name = details["name"]
            dtype = np.dtype(details["dtype"])
            info.dtype = tensors.data_type(np.dtype(object) if dtype.kind == "S" else dtype)
            info.tensor_shape.SetInParent()
            for size in details["shape_signature"]:
                info.tensor_shape.dim.add(size=int(size))
    return signature


def _signature_defs(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Find the signatures that TensorFlow Serving reads: their names, and them as protobuf."""
    model = schema.Model.GetRootAs(content)
    for index in range(model.MetadataLength()):
        metadata = model.Metadata(index)
        if metadata.Name() == SIGNATURE_DEFS:
            packed = model.Buffers(metadata.Buffer()).DataAsNumpy().tobytes()
            entries = flexbuffers.GetRoot(packed).AsMap
            for key in entries.Keys:
                yield key.AsKey, entries[key.AsKey].AsStringBytes
