"""Merges concurrent requests into one run of the model, as TensorFlow Serving's batching does.

Every signature of every version has a queue of batches, and all queues share a few threads. Inputs
are merged along their first dimension and padded up to an allowed size; outputs are split again.

TensorFlow Serving answers with an error where requests cannot be merged (a scalar, inputs or
outputs with different first dimensions, shapes that differ within a batch), and fails all requests
of a batch whose run fails. Here such requests run on their own.
"""

import dataclasses
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from tfserving import server_messages_pb2

from . import metrics, text_protos
from .errors import ServingError, invalid_argument

Arrays = list[np.ndarray]
Run = Callable[[Arrays, int], Arrays]


@dataclasses.dataclass(frozen=True)
class BatchingParameters:
    """The fields of TensorFlow Serving's ``BatchingParameters``, with its defaults."""

    max_batch_size: int = 1000
    batch_timeout_micros: int = 0
    max_enqueued_batches: int = 10
    num_batch_threads: int = os.cpu_count() or 1
    thread_pool_name: str = "model_server_batch_threads"
    allowed_batch_sizes: Sequence[int] = ()
    pad_variable_length_inputs: bool = False
    enable_large_batch_splitting: bool = False
    max_execution_batch_size: int = 0

    @classmethod
    def from_file(cls, path: str | Path) -> "BatchingParameters":
        """Read a text proto; raise ValueError with one sentence when something is wrong in it."""
        proto = text_protos.read(path, server_messages_pb2.BatchingParameters())
        values: dict[str, Any] = {}
        for field, value in proto.ListFields():
            plain = not field.message_type
            values[field.name] = (
                tuple(value) if field.is_repeated else value if plain else value.value
            )
        parameters = cls(**values)
        if problem := parameters._problem():
            raise ValueError(f"{path}: {problem}")
        return parameters

    @property
    def largest(self) -> int:
        """The most rows that one run may get."""
        if self.enable_large_batch_splitting:
            return self.max_execution_batch_size or self.max_batch_size
        return self.max_batch_size

    def allowed(self, size: int) -> int:
        """Return the smallest allowed batch size that holds ``size`` rows."""
        return next((allowed for allowed in self.allowed_batch_sizes if allowed >= size), size)

    def _problem(self) -> str | None:
        for name in ("max_batch_size", "num_batch_threads", "max_enqueued_batches"):
            if getattr(self, name) < 1:
                return f"{name} must be positive; was {getattr(self, name)}"
        if self.batch_timeout_micros < 0:
            return f"batch_timeout_micros must be non-negative; was {self.batch_timeout_micros}"
        if self.largest > self.max_batch_size:
            return "max_execution_batch_size must not be larger than max_batch_size"
        sizes = list(self.allowed_batch_sizes)
        if sizes and (sizes[0] < 1 or sizes != sorted(set(sizes))):
            return f"allowed_batch_sizes entries must be positive and increasing; were {sizes}"
        if sizes and sizes[-1] != self.largest:
            return (
                "Last entry in allowed_batch_sizes must match max_batch_size; "
                f"last entry was {sizes[-1]}; expected {self.largest}"
            )
        return None


@dataclasses.dataclass(eq=False)
class _Task:
    """A request, or a part of a large request, that waits for its outputs."""

    feeds: Arrays
    size: int
    timeout_ms: int
    enqueued: float = dataclasses.field(default_factory=time.monotonic)
    outputs: "Future[Arrays]" = dataclasses.field(default_factory=Future)


class _Queue:
    """The batches of one signature: the last is open for more tasks, those before it are not."""

    def __init__(self, parameters: BatchingParameters, run: Run):
        self.parameters = parameters
        self.run = run
        self._batches: deque[list[_Task]] = deque([[]])
        self._open_size = 0

    def add(self, tasks: Sequence[_Task]) -> None:
        """Add all tasks, or raise ServingError and add none."""
        batches, open_size = len(self._batches), self._open_size
        for task in tasks:
            if open_size + task.size > self.parameters.largest:
                batches, open_size = batches + 1, 0
            open_size += task.size
        limit = self.parameters.max_enqueued_batches
        if batches > max(limit, len(self._batches)):
            raise ServingError(
                grpc.StatusCode.UNAVAILABLE,
                "The batch scheduling queue to which this task was submitted is full; currently "
                f"{len(self._batches)} batches enqueued and max_enqueued_batches is {limit}",
            )
        for task in tasks:
            if self._open_size + task.size > self.parameters.largest:
                self._batches.append([])
                self._open_size = 0
            self._batches[-1].append(task)
            self._open_size += task.size

    def due(self) -> float:
        """Return the ``time.monotonic()`` at which a batch may be taken; infinity without one."""
        if not self._batches[0]:
            return math.inf
        if len(self._batches) > 1 or self._open_size >= self.parameters.largest:
            return 0.0
        return self._batches[0][0].enqueued + self.parameters.batch_timeout_micros / 1e6

    def take(self) -> list[_Task]:
        """Remove the oldest batch."""
        if len(self._batches) == 1:
            self._batches.append([])
            self._open_size = 0
        return self._batches.popleft()


class BatchScheduler:
    """The threads that run batches, shared by all models.

    With ``per_model``, the parameters of a model are those of ``batching_params.pbtxt`` beside its
    SavedModel, except for the threads, and a model without that file is not batched.
    """

    def __init__(self, parameters: BatchingParameters, per_model: bool = False):
        self.parameters = parameters
        self._per_model = per_model
        self._queues: dict[Hashable, _Queue] = {}
        self._changed = threading.Condition()
        self._closed = False
        for number in range(parameters.num_batch_threads):
            name = f"{parameters.thread_pool_name}_{number}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def parameters_for(self, path: Path) -> BatchingParameters | None:
        """Return the parameters for the SavedModel at ``path``, None if it is not to be batched."""
        if not self._per_model:
            return self.parameters
        file = path / "batching_params.pbtxt"
        try:
            return BatchingParameters.from_file(file) if file.exists() else None
        except ValueError as error:
            raise invalid_argument(str(error)) from error

    def run(
        self,
        key: Hashable,
        parameters: BatchingParameters,
        run: Run,
        feeds: Arrays,
        timeout_ms: int = 0,
    ) -> Arrays:
        """Run ``feeds`` together with what others submit under the same key; return the outputs.

        ``run`` is called with merged feeds and a time limit in milliseconds, 0 for none. Raises
        ServingError when the queue is full, the request too large, or when ``run`` does.
        """
        sizes = {feed.shape[0] if feed.ndim else 0 for feed in feeds}
        if len(sizes) != 1 or 0 in sizes:
            return run(feeds, timeout_ms)
        (size,) = sizes
        if size > parameters.max_batch_size:
            raise invalid_argument(
                f"Task size {size} is larger than maximum input batch size "
                f"{parameters.max_batch_size}"
            )
        starts = range(0, size, parameters.largest)
        parts = [[feed[start : start + parameters.largest] for feed in feeds] for start in starts]
        tasks = [_Task(part, len(part[0]), timeout_ms) for part in parts]
        metrics.INPUT_BATCH_SIZE.observe(size)
        with self._changed:
            queue = self._queues.get(key) or _Queue(parameters, run)
            queue.add(tasks)
            self._queues[key] = queue
            self._changed.notify()
        outputs = [task.outputs.result() for task in tasks]
        if len(outputs) == 1:
            return outputs[0]
        return [np.concatenate(arrays) for arrays in zip(*outputs, strict=True)]

    def close(self) -> None:
        """Let the threads end once they have run what is in the queues."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while batch := self._next_batch():
            queue, tasks = batch
            try:
                self._run_batch(queue, tasks)
            except Exception as error:
                for task in tasks:
                    if not task.outputs.done():
                        task.outputs.set_exception(error)
            del batch, queue, tasks  # or a model would stay in memory while this thread waits

    def _next_batch(self) -> tuple[_Queue, list[_Task]] | None:
        """Wait until a batch is due, and take it; queues take turns. None means: end the thread."""
        with self._changed:
            while True:
                now = math.inf if self._closed else time.monotonic()
                for key, queue in self._queues.items():
                    if queue.due() <= now:
                        del self._queues[key]
                        tasks = queue.take()
                        if queue.due() < math.inf:
                            self._queues[key] = queue  # behind the others
                            self._changed.notify()
                        return queue, tasks
                if self._closed:
                    return None
                due = min((queue.due() for queue in self._queues.values()), default=math.inf)
                self._changed.wait(None if due == math.inf else due - now)

    def _run_batch(self, queue: _Queue, tasks: list[_Task]) -> None:
        now = time.monotonic()
        groups: dict[Hashable, list[_Task]] = {}
        if queue.parameters.pad_variable_length_inputs:
            _pad_to_common_shape(tasks)
        for task in tasks:
            metrics.QUEUING_LATENCY.observe(
                (now - task.enqueued) * 1e6, self.parameters.thread_pool_name
            )
            if 0 < task.timeout_ms <= (now - task.enqueued) * 1e3:
                expired = "Run() timeout exceeded while waiting in batching queue"
                task.outputs.set_exception(
                    ServingError(grpc.StatusCode.RESOURCE_EXHAUSTED, expired)
                )
            else:
                groups.setdefault(tuple(feed.shape[1:] for feed in task.feeds), []).append(task)
        for group in groups.values():
            _run_merged(queue, group)


def _run_merged(queue: _Queue, tasks: list[_Task]) -> None:
    """Run tasks of equal shapes together; one by one when they cannot be merged, or it fails."""
    size = sum(task.size for task in tasks)
    padding = queue.parameters.allowed(size) - size
    metrics.PROCESSED_BATCH_SIZE.observe(size + padding)
    metrics.PADDING_SIZE.observe(padding, str(size + padding))
    if len(tasks) == 1 and not padding:
        _run_alone(queue, tasks[0])
        return
    feeds = [
        # Pad with the last task's first row: it is a row that the model accepts.
        np.concatenate([*arrays, *[arrays[-1][:1]] * padding])
        for arrays in zip(*(task.feeds for task in tasks), strict=True)
    ]
    limits = [task.timeout_ms for task in tasks]
    metrics.WRAPPED_RUN_COUNT.increment()
    try:
        outputs = queue.run(feeds, max(limits) if all(limits) else 0)
    except ServingError as error:
        if error.code == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        outputs = None
    if outputs is None or any(o.shape[:1] != (size + padding,) for o in outputs):
        for task in tasks:
            _run_alone(queue, task)
        return
    start = 0
    for task in tasks:
        task.outputs.set_result([array[start : start + task.size] for array in outputs])
        start += task.size


def _run_alone(queue: _Queue, task: _Task) -> None:
    metrics.WRAPPED_RUN_COUNT.increment()
    try:
        task.outputs.set_result(queue.run(task.feeds, task.timeout_ms))
    except Exception as error:
        task.outputs.set_exception(error)


def _pad_to_common_shape(tasks: list[_Task]) -> None:
    """Enlarge each input to the largest of all tasks, with its own first value.

    Inputs of another rank than the first task's, and empty ones, stay as they are.
    """
    for index, first in enumerate(tasks[0].feeds):
        same_rank = [task for task in tasks if task.feeds[index].ndim == first.ndim]
        shapes = [task.feeds[index].shape[1:] for task in same_rank]
        common = tuple(map(max, zip(*shapes, strict=True)))
        for task in same_rank:
            array = task.feeds[index]
            if array.shape[1:] != common and array.size:
                padded = np.full((len(array), *common), array.flat[0], array.dtype)
                padded[tuple(map(slice, array.shape))] = array
                task.feeds[index] = padded
