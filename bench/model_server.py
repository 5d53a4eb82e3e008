"""Measures the embedded model server against the same model called in this process.

    make bench                    about two minutes
    make bench REQUESTS=20000     a longer look at its memory

All numbers come from one run, side by side: what counts are the ratios, the signature of the loaded
SavedModel called in this process being 1. ``bench/README.md`` says what was learnt from them.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import grpc
import numpy as np
import psutil
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from tqdm import tqdm

from bench.measure import CLIENTS, count_calls, free_port

MODEL = Path("build/clothing-model")
BATCHING = """
max_batch_size { value: 8 }  batch_timeout_micros { value: 2000 }  num_batch_threads { value: 2 }
allowed_batch_sizes: [1, 2, 4, 8]  max_enqueued_batches { value: 100 }
"""
RELOADS = 20
WARM_UP = 4  # reloads until the memory allocator has all the space that it keeps for later


LONG_BODIES = 5
LONG_BODY_BYTES = 20_000_000


@contextlib.contextmanager
def model_server(base_path: Path, *flags: str) -> Iterator[tuple[Any, Any, psutil.Process]]:
    """Start ``python -m model_server``; hand out both services' stubs and the process."""
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "model_server"),
            *(f"--port={port}", "--model_name=clothing-model"),
            *(f"--model_base_path={base_path}", "--grpc_max_threads=64", *flags),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            grpc.channel_ready_future(channel).result(60)
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            status_stub = model_service_pb2_grpc.ModelServiceStub(channel)
            yield stub, status_stub, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def predict_request(image: np.ndarray) -> Any:
    """Make a request for one picture of shape [1, 224, 224, 3]."""
    pb_request = predict_pb2.PredictRequest()
    pb_request.model_spec.name = "clothing-model"
    pb_request.inputs["inputs"].CopyFrom(tf.make_tensor_proto(image))
    return pb_request


def milliseconds(call: Callable[[], Any], count: int = 20) -> list[float]:
    """Time each of some calls made one after the other."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def per_second(call: Callable[[], Any]) -> float:
    """Return the calls a second of 16 clients."""
    count, seconds = count_calls(call)
    return count / seconds


def compare(
    title: str, measure: Callable[[Callable], Any], calls: dict[str, Callable], rounds: int = 6
) -> dict[str, float]:
    """Measure the calls in turns, so that whatever else the machine does hits all of them."""
    results: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        measure(call)
    for _ in tqdm(range(rounds), title, leave=False):
        for name, call in calls.items():
            results[name] += np.atleast_1d(measure(call)).tolist()
    return {name: statistics.median(values) for name, values in results.items()}


def show(title: str, unit: str, results: dict[str, float]) -> None:
    """Print results, and each as a ratio to the first."""
    first = next(iter(results.values()))
    print(f"\n{title}")
    for name, value in results.items():
        print(f"  {name:<42}{value:9.1f} {unit}{value / first:8.2f}")


def worst_waits(call: Callable[[], Any], rest_port: int) -> dict[str, float]:
    """Time the slowest of many calls: alone, and while another client posts long JSON.

    The posted numbers are no pictures, so that they are read and then refused, and the model does
    not run on them.
    """
    url = f"http://127.0.0.1:{rest_port}/v1/models/clothing-model:predict"
    numbers = b"-0.123456789, " * (LONG_BODY_BYTES // 14)
    body = b'{"instances": [%s0.5]}' % numbers

    def post() -> None:
        try:
            urllib.request.urlopen(url, body).close()
        except urllib.error.HTTPError as error:
            error.close()

    post()  # the process that reads has started now
    alone = max(milliseconds(call, 100))
    with ThreadPoolExecutor(1) as pool:
        posts = [pool.submit(post) for _ in range(LONG_BODIES)]
        beside = 0.0
        while not posts[-1].done():
            beside = max(beside, milliseconds(call, 1)[0])
    return {"alone": alone, f"beside {LONG_BODY_BYTES // 10**6} MB of JSON": beside}


def wrong_answers(stub: Any, images: list[np.ndarray], expected: np.ndarray) -> tuple[int, int]:
    """Let 64 clients ask right and wrong things; count the answers, and those that are wrong."""

    def ask(number: int) -> bool:
        index = number % len(images)
        if number % 4 == 3:
            try:
                stub.Predict(predict_request(images[index][:, :100]))
            except grpc.RpcError as error:
                return error.code() == grpc.StatusCode.INVALID_ARGUMENT
            return False
        answer = tf.make_ndarray(stub.Predict(requests[index]).outputs["probabilities"])
        return bool(np.allclose(answer, expected[index], atol=1e-4))

    requests = [predict_request(image) for image in images]
    count = 64 * 32
    with ThreadPoolExecutor(64) as pool:
        right = list(tqdm(pool.map(ask, range(count)), "64 clients", count, leave=False))
    return count, right.count(False)


def reload(stub: Any, status_stub: Any, base_path: Path, request: Any, version: int) -> None:
    """Add a version, and ask until it answers and the one before it has gone."""
    new = base_path / f"next-{version}"
    shutil.copytree(MODEL / "1", new, copy_function=os.link)
    new.rename(base_path / str(version))
    while stub.Predict(request).model_spec.version.value != version:
        time.sleep(0.01)
    of_old = get_model_status_pb2.GetModelStatusRequest()
    of_old.model_spec.name = "clothing-model"
    of_old.model_spec.version.value = version - 1
    end = get_model_status_pb2.ModelVersionStatus.END
    while status_stub.GetModelStatus(of_old).model_version_status[0].state != end:
        time.sleep(0.01)
    shutil.rmtree(base_path / str(version - 1))


def main() -> None:
    """Run all measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000, help="for the look at the memory")
    requests = parser.parse_args().requests
    if not (MODEL / "1").exists():
        sys.exit(f"{MODEL}/1 is missing: make workbook ONLY=01 exports the model")

    images = list(np.random.default_rng(1).uniform(-1, 1, [16, 1, 224, 224, 3]).astype(np.float32))
    request = predict_request(images[0])
    model = tf.saved_model.load(str(MODEL / "1"))
    signature = model.signatures["serving_default"]
    one, sixteen = tf.constant(images[0]), tf.constant(np.concatenate(images))
    expected = np.stack([signature(inputs=image)["probabilities"].numpy() for image in images])

    with tempfile.TemporaryDirectory() as folder:
        base_path = Path(folder) / "model"
        shutil.copytree(MODEL / "1", base_path / "1", copy_function=os.link)
        parameters = Path(folder) / "batching.txt"
        parameters.write_text(BATCHING)
        rest_port = free_port()
        batching = ("--enable_batching", f"--batching_parameters_file={parameters}")
        with (
            model_server(base_path, f"--rest_api_port={rest_port}") as (stub, status_stub, process),
            model_server(base_path, *batching) as (batched, _, _),
        ):
            calls = {
                "signature in this process": lambda: signature(inputs=one)["probabilities"].numpy(),
                "model server, gRPC": lambda: stub.Predict(request),
            }
            show("Latency, one client", "ms", compare("latency", milliseconds, calls))
            calls["model server, gRPC, batching"] = lambda: batched.Predict(request)
            results = compare("throughput", per_second, calls)
            merged = milliseconds(lambda: signature(inputs=sixteen)["probabilities"].numpy(), 5)
            results["signature in this process, 16 in a call"] = 16e3 / statistics.median(merged)
            show(f"Throughput, {CLIENTS} clients", "/s", results)

            waits = worst_waits(lambda: stub.Predict(request), rest_port)
            show("Worst wait for a Predict", "ms", waits)

            print("\nRight and wrong requests, 64 clients")
            for name, each in (("batching off", stub), ("batching on", batched)):
                count, wrong = wrong_answers(each, images, expected)
                print(f"  {name:<42}{count:9} answers, {wrong} wrong")

            moments = ("before", "after")
            memory = [process.memory_info().rss / 2**20]
            for _ in tqdm(range(requests), "requests", leave=False):
                stub.Predict(request)
            memory.append(process.memory_info().rss / 2**20)
            show(f"Memory, {requests} requests", "MiB", dict(zip(moments, memory, strict=True)))
            memory = []
            for version in tqdm(range(2, WARM_UP + RELOADS + 2), "reloads", leave=False):
                reload(stub, status_stub, base_path, request, version)
                memory.append(process.memory_info().rss / 2**20)
            memory = [memory[WARM_UP - 1], memory[-1]]
            show(f"Memory, {RELOADS} reloads", "MiB", dict(zip(moments, memory, strict=True)))


if __name__ == "__main__":
    main()
