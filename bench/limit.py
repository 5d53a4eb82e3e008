"""The most that the cores can do: decoding, resizing and the int8 model, and nothing else."""

import functools
import multiprocessing
import runpy
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from statistics import median

import numpy as np
from PIL import Image

from bench.measure import CORES, ROOT, Reading, call_for
from bench.peers.lite import Lite


@functools.cache
def interpreter(path: str, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Load a model once in each process."""
    runner = Lite.make(path, threads)
    return lambda pixels: runner(pixels=pixels)["probabilities"]


def classify(model: str, threads: int, picture: bytes) -> np.ndarray:
    """Return the probabilities of a picture, as the gateway and its model server compute them."""
    image = Image.open(BytesIO(picture)).resize((224, 224), Image.Resampling.NEAREST)
    return interpreter(model, threads)(np.asarray(image.convert("RGB"))[np.newaxis])


def work(model: str, threads: int, picture: bytes, seconds: float) -> tuple[float, float]:
    """Classify a picture all the time; return the pictures a second, and the seconds of one."""
    classify(model, threads, picture)  # loads the model
    times, whole = call_for(lambda: classify(model, threads, picture), seconds, 1)
    return len(times) / whole, median(times)


class Limit:
    """A process for each core. They share nothing, so that none waits for another."""

    def __init__(self, model: str):
        self.model = model
        spawn = multiprocessing.get_context("spawn")
        # The gateway's malloc settings, so that memory of pictures is used again.
        settings = functools.partial(runpy.run_path, str(ROOT / "gunicorn.conf.py"))
        self.pool = ProcessPoolExecutor(CORES, spawn, initializer=settings)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown()

    def turn(self, picture: bytes, clients: int) -> Callable[[float], Reading]:
        """Return what measures pictures a second of all cores, or milliseconds of a lone one."""

        def measure(seconds: float) -> Reading:
            if clients == 1:
                _, each = self.pool.submit(work, self.model, CORES, picture, seconds).result()
                return Reading(each * 1e3)
            tasks = [self.pool.submit(work, self.model, 1, picture, seconds) for _ in range(CORES)]
            return Reading(sum(task.result()[0] for task in tasks))

        return measure
