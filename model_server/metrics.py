"""What the server counts and times, under TensorFlow Serving's names, for Prometheus to fetch.

The metrics belong to the process, as TensorFlow Serving's do: servers in one process share them.
The page is written here and not by prometheus_client, which would rename every counter and put the
labels into another order.

Of TensorFlow Serving's own families, ``mlmd_map`` and ``request_log_count`` are missing: keys of ML
Metadata are not read, and requests are not logged. Of the families of TensorFlow's runtime and of
batching there are only the ones below.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from tfserving import server_messages_pb2

from . import text_protos
from .errors import ServingError

DEFAULT_PATH = "/monitoring/prometheus/metrics"
CONTENT_TYPE = "text/plain"


def prometheus_path(monitoring_config_file: str) -> str | None:
    """Return the path at which a ``MonitoringConfig`` wants the page, or None without one.

    Raises ValueError with one sentence when something is wrong with the file.
    """
    proto = text_protos.read(monitoring_config_file, server_messages_pb2.MonitoringConfig())
    path = proto.prometheus_config.path or DEFAULT_PATH
    if not path.startswith("/"):
        raise ValueError(f'{monitoring_config_file}: path must begin with "/"; was "{path}"')
    return path if proto.prometheus_config.enable else None


def page() -> str:
    """Write all metrics in Prometheus' text format."""
    return "".join(f"{line}\n" for metric in _METRICS for line in metric.lines())


def now_us() -> float:
    """Read a clock that only measures durations, in microseconds."""
    return time.perf_counter_ns() / 1e3


@contextmanager
def request(model_name: str, api: str, entrypoint: str) -> Iterator[None]:
    """Count a request with its status, and time it when it succeeds."""
    begin = now_us()
    try:
        yield
    except Exception as error:
        status = error.code.name if isinstance(error, ServingError) else "INTERNAL"
        REQUEST_COUNT.increment(model_name, status)
        raise
    REQUEST_COUNT.increment(model_name, "OK")
    REQUEST_LATENCY.observe(now_us() - begin, model_name, api, entrypoint)


@contextmanager
def runtime(model_name: str, api: str) -> Iterator[None]:
    """Time how long TensorFlow works on a request, when that succeeds."""
    begin = now_us()
    yield
    RUNTIME_LATENCY.observe(now_us() - begin, model_name, api, "TF1")


def examples(model_name: str, inputs: Any) -> None:
    """Count the examples in the ``Input`` of a request."""
    count = len(inputs.example_list.examples) + len(inputs.example_list_with_context.examples)
    EXAMPLE_COUNTS.observe(count, model_name)
    EXAMPLE_COUNT_TOTAL.increment(model_name, by=count)


class Counter:
    """A number for each combination of labels."""

    def __init__(self, name: str, *label_names: str):
        self.name, self._label_names = name, label_names
        self._values: dict[tuple[str, ...], int] = {}
        self._lock = threading.Lock()
        _METRICS.append(self)

    def total(self) -> int:
        """Add up the numbers of all labels."""
        with self._lock:
            return sum(self._values.values())

    def increment(self, *labels: str, by: int = 1) -> None:
        """Add to the number of these labels."""
        with self._lock:
            self._values[labels] = self._values.get(labels, 0) + by

    def lines(self) -> list[str]:
        """Write the metric in Prometheus' text format."""
        with self._lock:
            values = dict(self._values)
        return [
            f"# TYPE {self.name} counter",
            *(f"{self.name}{_labels(self._label_names, each)} {values[each]}" for each in values),
        ]


def counted(name: str) -> int:
    """Add up the counter of this name, as TensorFlow writes it; 0 if there is none."""
    for metric in _METRICS:
        if isinstance(metric, Counter) and metric.name == name.replace("/", ":"):
            return metric.total()
    return 0


class Histogram:
    """A distribution for each combination of labels, in exponential buckets."""

    def __init__(
        self, name: str, *label_names: str, scale: float = 10, growth: float = 1.8, count: int = 33
    ):
        self._name, self._label_names = name, label_names
        self._limits = [scale * growth**power for power in range(count)]
        self._buckets: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        self._lock = threading.Lock()
        _METRICS.append(self)

    def observe(self, value: float, *labels: str) -> None:
        """Add a value to the distribution of these labels."""
        bucket = bisect_left(self._limits, value)
        with self._lock:
            if labels not in self._buckets:
                self._buckets[labels] = [0] * (len(self._limits) + 1)
            self._buckets[labels][bucket] += 1
            self._sums[labels] = self._sums.get(labels, 0) + value

    def lines(self) -> list[str]:
        """Write the metric in Prometheus' text format."""
        with self._lock:
            buckets = {labels: list(accumulate(each)) for labels, each in self._buckets.items()}
            sums = dict(self._sums)
        lines = [f"# TYPE {self._name} histogram"]
        limits = [*(f"{limit:g}" for limit in self._limits), "+Inf"]
        for labels, counts in buckets.items():
            for limit, count in zip(limits, counts, strict=True):
                inside = _labels((*self._label_names, "le"), (*labels, limit))
                lines.append(f"{self._name}_bucket{inside} {count}")
            outside = _labels(self._label_names, labels)
            lines.append(f"{self._name}_sum{outside} {sums[labels]:.15g}")
            lines.append(f"{self._name}_count{outside} {counts[-1]}")
        return lines


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    pairs = (
        f'{name}="{value.translate(escapes)}"' for name, value in zip(names, values, strict=True)
    )
    return "{" + ",".join(pairs) + "}"


_METRICS: list[Counter | Histogram] = []

# Times are in microseconds.
LOAD_ATTEMPT_COUNT = Counter(
    ":tensorflow:cc:saved_model:load_attempt_count", "model_path", "status"
)
LOAD_LATENCY = Counter(":tensorflow:cc:saved_model:load_latency", "model_path")
GRAPH_RUNS = Counter(":tensorflow:core:graph_runs")
GRAPH_RUN_TIME = Counter(":tensorflow:core:graph_run_time_usecs")

REQUEST_COUNT = Counter(":tensorflow:serving:request_count", "model_name", "status")
REQUEST_LATENCY = Histogram(
    ":tensorflow:serving:request_latency", "model_name", "API", "entrypoint"
)
RUNTIME_LATENCY = Histogram(":tensorflow:serving:runtime_latency", "model_name", "API", "runtime")
EXAMPLE_COUNT_TOTAL = Counter(":tensorflow:serving:request_example_count_total", "model")
EXAMPLE_COUNTS = Histogram(
    ":tensorflow:serving:request_example_counts", "model", scale=1, growth=2, count=15
)
WARMUP_LATENCY = Histogram(":tensorflow:serving:model_warmup_latency", "model_path", "status")
WARMUP_RECORDS = Counter(":tensorflow:serving:model_warmup_records_read", "model_path", "status")

QUEUING_LATENCY = Histogram(
    *(":tensorflow:serving:batching_session:queuing_latency", "thread_pool_name"),
    scale=100,
    growth=1.2,
    count=52,
)
WRAPPED_RUN_COUNT = Counter(":tensorflow:serving:batching_session:wrapped_run_count")
INPUT_BATCH_SIZE, PROCESSED_BATCH_SIZE = (
    Histogram(f":tensorflow:serving:batching_session:{name}", scale=1, growth=2, count=14)
    for name in ("input_batch_size", "processed_batch_size")
)
PADDING_SIZE = Histogram(
    *(":tensorflow:serving:batching_session:padding_size", "execution_batch_size"),
    scale=1,
    growth=2,
    count=14,
)
