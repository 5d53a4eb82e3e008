"""A model that counts, and takes as long as it is told to; with what to warm it up."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from helpers.model_server import log_record, write_warm_up
from helpers.servers import Addresses
from helpers.serving import Client, predict_request

NAME = "counter"
ZERO = np.zeros(1, np.float32)


def export_counter(path: Path, number: int, warm_up: list[bytes] | None = None) -> Path:
    """Save a model that answers with its number and its count of calls, whole or not at all.

    Its signature ``wait`` computes for as many seconds as it is told to.
    """
    module = tf.Module()
    module.calls = tf.Variable(0)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def count(x):
        return {"number": tf.fill(tf.shape(x), number), "calls": module.calls.assign_add(1)}

    @tf.function(input_signature=[tf.TensorSpec([], tf.float64, name="seconds")])
    def wait(seconds):
        begin = tf.timestamp()
        (end,) = tf.while_loop(
            lambda now: now - begin < seconds, lambda now: [tf.timestamp()], [begin]
        )
        return {"waited": end - begin}

    partial = path.with_name("partial")
    tf.saved_model.save(module, str(partial), signatures={"serving_default": count, "wait": wait})
    if warm_up is not None:
        write_warm_up(partial, warm_up)
    return partial.rename(path)


def warm_up_request(signature_name: str = "", **inputs: Any) -> bytes:
    """Serialize a request as it stands in a file of warm-up requests."""
    return log_record("predict_log", predict_request("any name", signature_name, **inputs))


def number(response: Any) -> int:
    return int(tf.make_ndarray(response.outputs["number"])[0])


@contextmanager
def hammering(server: Addresses, model_name: str, clients: int = 3) -> Iterator[list[list[int]]]:
    """Send requests all the time, and collect the numbers of the versions that answered them.

    Every request must be answered, with the number of its version.
    """
    enough = threading.Event()
    answers: list[list[int]] = [[] for _ in range(clients)]

    def hammer(own: list[int]) -> None:
        with Client(server, model_name) as client:
            while not enough.is_set():
                response = client.predict(x=ZERO)
                own.append(number(response))
                assert own[-1] == response.model_spec.version.value

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(hammer, own) for own in answers]
        try:
            yield answers
        finally:
            enough.set()
        for future in running:
            future.result()
