"""Measures the embedded model server against the same model called in this process."""

import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from keras_image_helper import create_preprocessor
from PIL import Image
from tqdm import tqdm

import tfserving
from bench.measure import (
    Call,
    Command,
    Figure,
    Reading,
    Server,
    Settings,
    call_for,
    compare,
    free_port,
    most_memory,
    said_of,
    server,
    turn,
)
from bench.peers.lite import Lite
from model_server.saved_model import import_tensorflow

LITE, TENSORFLOW = "LiteRT int8", "TensorFlow"
NAMES = {engine: f"model server, {engine}" for engine in (LITE, TENSORFLOW)}
FLAGS = {LITE: ["--prefer_tflite_model=true"], TENSORFLOW: []}
CHAPTER = "The model server"
LONG_BODY_BYTES = 20_000_000
END = tfserving.ModelVersionStatus.END


def command(engine: str, base_path: Path) -> Command:
    """Return how docs/service.md starts the model server."""
    port, rest_port = free_port(), free_port()
    words = [
        *(sys.executable, "-m", "model_server", f"--port={port}", f"--rest_api_port={rest_port}"),
        *("--model_name=clothing-model", f"--model_base_path={base_path}", *FLAGS[engine]),
    ]
    return Command(words, port, ready="", rest_port=rest_port)


def predict_request(signature_name: str, **inputs: Any) -> tfserving.PredictRequest:
    """Make a request that carries arrays, or files as they are."""
    pb_request = tfserving.PredictRequest()
    pb_request.model_spec.name = "clothing-model"
    pb_request.model_spec.signature_name = signature_name
    for name, values in inputs.items():
        pb_request.inputs[name].CopyFrom(tfserving.make_tensor_proto(values))
    return pb_request


PIXELS = np.random.default_rng(1).integers(0, 256, [1, 224, 224, 3], np.uint8)
REQUEST = predict_request("serving_uint8", pixels=PIXELS)


def in_process(engine: str, version: Path) -> Call:
    """Load a version of the model here, and return a call of it."""
    if engine == LITE:
        lite = Lite(str(version / "model.tflite"))
        return lambda: lite(PIXELS)
    tf = import_tensorflow()
    model = tf.saved_model.load(str(version))
    constant = tf.constant(PIXELS)
    return lambda: model.signatures["serving_uint8"](pixels=constant)["probabilities"].numpy()


def against_calls(
    engine: str, started: Command, running: Server, version: Path, settings: Settings
) -> Iterator[Figure]:
    """Compare Predict with a call of the same model in this process."""
    ours = NAMES[engine]
    with grpc.insecure_channel(started.address) as channel:
        stub = tfserving.PredictionServiceStub(channel)
        direct = in_process(engine, version)
        for clients in (settings.clients, 1):
            turns = {
                ours: turn(lambda: stub.Predict(REQUEST), clients, {"server": running.family()}),
                f"{engine}, called in process": turn(direct, clients),
            }
            title = f"Predict, {engine}, {said_of(clients)}"
            figure = Figure(CHAPTER, title, "/s" if clients > 1 else "ms", ours=ours)
            yield compare(figure, turns, settings)


def ways(
    started: Command, running: Server, size: str, picture: bytes, settings: Settings
) -> Iterator[Figure]:
    """Compare what a client can make of a picture for Predict, and send."""
    preprocessor = create_preprocessor("xception", target_size=PIXELS.shape[1:3])

    def image() -> Image.Image:
        return Image.open(BytesIO(picture))

    def as_floats() -> tfserving.PredictRequest:
        return predict_request("serving_default", inputs=preprocessor.convert_to_tensor(image()))

    def as_pixels() -> tfserving.PredictRequest:
        resized = np.asarray(preprocessor.resize_image(image()))
        return predict_request("serving_uint8", pixels=resized[np.newaxis])

    def as_file() -> tfserving.PredictRequest:
        return predict_request("serving_bytes", image_bytes=[picture])

    tiers = {"client": [psutil.Process()], "server": running.family()}
    with grpc.insecure_channel(started.address) as channel:
        stub = tfserving.PredictionServiceStub(channel)

        def send(make: Callable[[], tfserving.PredictRequest]) -> Call:
            return lambda: stub.Predict(make())

        calls = {
            f"{name}, {make().ByteSize() / 1e3:.0f} kB": send(make)
            for name, make in (("uint8", as_pixels), ("float32", as_floats), ("JPEG", as_file))
        }
        for clients in (settings.clients, 1):
            title = f"a picture of {size} sent as, {TENSORFLOW}, {said_of(clients)}"
            figure = Figure(CHAPTER, title, "/s" if clients > 1 else "ms", ours=next(iter(calls)))
            turns = {name: turn(call, clients, tiers) for name, call in calls.items()}
            yield compare(figure, turns, settings)


def beside_long_bodies(started: Command, settings: Settings) -> Figure:
    """Time the slowest of many Predicts: alone, and while another client posts long JSON.

    The posted numbers are no pictures, so that they are read and then refused, and the model does
    not run on them.
    """
    url = f"http://127.0.0.1:{started.rest_port}/v1/models/clothing-model:predict"
    body = b'{"instances": [%s0.5]}' % (b"-0.123456789, " * (LONG_BODY_BYTES // 14))

    def post() -> None:
        try:
            urllib.request.urlopen(url, body).close()
        except urllib.error.HTTPError as error:
            error.close()

    with grpc.insecure_channel(started.address) as channel, ThreadPoolExecutor(1) as pool:
        stub = tfserving.PredictionServiceStub(channel)

        def worst(is_over: Callable[[int], bool]) -> Reading:
            slowest, count = 0.0, 0
            while not is_over(count):
                begin = time.perf_counter()
                stub.Predict(REQUEST)
                slowest, count = max(slowest, time.perf_counter() - begin), count + 1
            return Reading(slowest * 1e3)

        def beside(_: float) -> Reading:
            posted = pool.submit(post)
            return worst(lambda _: posted.done())

        title = f"the slowest Predict of a lone client, {LITE}"
        return compare(
            Figure(CHAPTER, title, "ms", ours="alone"),
            {
                "alone": lambda _: worst(lambda count: count >= 100),
                f"beside {LONG_BODY_BYTES // 10**6} MB of JSON": beside,
            },
            settings,
        )


def reload(channel: grpc.Channel, base_path: Path, version: int) -> None:
    """Add a version, and ask until it answers and the one before it has gone."""
    stub, status = tfserving.PredictionServiceStub(channel), tfserving.ModelServiceStub(channel)
    old, new = base_path / str(version - 1), base_path / f"next-{version}"
    shutil.copytree(old, new, copy_function=os.link)
    new.rename(base_path / str(version))
    while stub.Predict(REQUEST).model_spec.version.value != version:
        time.sleep(0.01)
    of_old = tfserving.GetModelStatusRequest()
    of_old.model_spec.name = "clothing-model"
    of_old.model_spec.version.value = version - 1
    while status.GetModelStatus(of_old).model_version_status[0].state != END:
        time.sleep(0.01)
    shutil.rmtree(old)


def memory(engine: str, model: Path, folder: Path, settings: Settings) -> Figure:
    """Look at the memory of a server of its own, from its start to the last of many versions."""
    base_path = folder / engine
    shutil.copytree(model / "1", base_path / "1")
    started = command(engine, base_path)
    title = f"memory of one, {engine}"
    figure = Figure(CHAPTER, title, "MiB")
    with ExitStack() as stack:
        running = stack.enter_context(server(started))
        channel = stack.enter_context(grpc.insecure_channel(started.address))
        stub = tfserving.PredictionServiceStub(channel)
        figure.results["idle"] = [running.memory()]
        call = partial(
            call_for, lambda: stub.Predict(REQUEST), settings.seconds, settings.most_clients
        )
        [most] = most_memory({engine: running}, call).values()
        figure.results[f"most beside {settings.most_clients} clients"] = [most]
        for _ in tqdm(range(settings.requests), f"{title}, requests", leave=False):
            stub.Predict(REQUEST)
        figure.results[f"after {settings.requests:,} requests more"] = [running.memory()]
        news = range(1, settings.versions[-1] + 1)
        for number in tqdm(news, f"{title}, versions", leave=False):
            reload(channel, base_path, 1 + number)
            if number in settings.versions:
                figure.results[f"after new versions: {number}"] = [running.memory()]
    return figure
