"""A LiteRT model called in process: on all cores for a lone caller, on one for each of several.

The peers of the gateway import this, and so does what calls the model without any server.
"""

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter


class Lite:
    """The signature `serving_uint8` of a `model.tflite`, for any number of threads."""

    def __init__(self, path: str, cores: int = os.cpu_count() or 1):
        self.everywhere = self.make(path, cores)
        self.elsewhere: queue.LifoQueue = queue.LifoQueue()
        for _ in range(cores):
            self.elsewhere.put(self.make(path, 1))
        self.lock, self.callers = threading.Lock(), 0

    @staticmethod
    def make(path: str, threads: int) -> Any:
        """Return an interpreter of its own for one caller at a time."""
        interpreter = Interpreter(model_path=path, num_threads=threads)
        interpreter.allocate_tensors()
        return interpreter.get_signature_runner("serving_uint8")

    @contextmanager
    def runner(self) -> Iterator[Any]:
        """Lend an interpreter; wait for one while all are busy."""
        with self.lock:
            self.callers += 1
            alone = self.callers == 1
        runner = self.everywhere if alone else self.elsewhere.get()
        try:
            yield runner
        finally:
            if not alone:
                self.elsewhere.put(runner)
            with self.lock:
                self.callers -= 1

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return the probabilities, [number, 10], of pixels, uint8 [number, height, width, 3]."""
        with self.runner() as runner:
            return runner(pixels=pixels)["probabilities"]
