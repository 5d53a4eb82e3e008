"""Measures the bundled model on a GPU, and on the CPU of the same machine: ``python -m bench.gpu``.

It needs a driver (``nvidia-smi``), and a Keras whose backend, JAX or TensorFlow, finds the GPU.
Each number is of whole calls: a batch of pictures as float32 goes from the machine's memory to the
card, and probabilities come back. The table goes into ``bench/README.md``, between its marks, and
lesson 08 reads it there. Without a GPU it says so, and nothing changes.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "bench/README.md"
MODEL = ROOT / "model_server/clothing-model.keras"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PRECISIONS = ("float32", "TF32", "bfloat16")
SECONDS = 1.0  # for each number
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
HEADER = """\
| on | precision | batch | pictures a second | ms a batch | GPU busy |
|---|---|--:|--:|--:|--:|"""
ROW = re.compile(r"^\| (.+) \| (\w+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \| (?:(\d+) %|–) \|$", re.M)


class Measured(NamedTuple):
    """Calls with one batch size: where, how exact, pictures a call, their time, % of it busy."""

    device: str
    precision: str
    batch: int
    milliseconds: float
    busy: int | None = None

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return 1000 * self.batch / self.milliseconds


def table(measured: list[Measured]) -> str:
    """Lay out what was measured as a table in Markdown."""
    lines = [
        f"| {m.device} | {m.precision} | {m.batch} | {m.rate:,.0f} | {m.milliseconds:.2f} |"
        f" {'–' if m.busy is None else f'{m.busy} %'} |"
        for m in measured
    ]
    return "\n".join([HEADER, *lines])


def written(page: str, measured: list[Measured]) -> str:
    """Return a page with this table between its marks, in place of what was there."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(measured)}\n\n{END}{rest.partition(END)[2]}"


def read(page: str) -> list[Measured]:
    """Return what a page's table says between the marks; nothing where nobody has measured."""
    rows = ROW.findall(page.partition(BEGIN)[2].partition(END)[0])
    return [
        Measured(device, precision, int(batch), float(ms), int(busy) if busy else None)
        for device, precision, batch, _, ms, busy in rows
    ]


def best(page: str) -> Measured | None:
    """Return the quickest of a page's numbers that a GPU has made, if there are any."""
    of_cards = [each for each in read(page) if not each.device.startswith("CPU")]
    return max(of_cards, key=lambda each: each.rate, default=None)


def smi(what: str) -> str:
    """Ask the first GPU's driver for something, such as its name."""
    words = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except OSError:
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """Note how busy the GPU is, in per cent, while the block runs."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            if (now := smi("utilization.gpu")).isdigit():
                seen.append(int(now))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def exactness(precision: str) -> Iterator[None]:
    """Allow TF32 in the block, or only full float32."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        how = "tensorfloat32" if precision == "TF32" else "highest"
        with jax.default_matmul_precision(how):
            yield
    else:
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(precision == "TF32")
        yield


def load(precision: str) -> Any:
    """Return the model, computing with float32 or with bfloat16."""
    import keras

    model = keras.models.load_model(MODEL, compile=False)
    config = model.get_config()
    dtype = "mixed_bfloat16" if precision == "bfloat16" else "float32"
    for layer in config["layers"]:
        if layer["class_name"] != "InputLayer":  # what comes in stays float32
            layer["config"]["dtype"] = dtype
    same = model.__class__.from_config(config)
    same.set_weights(model.get_weights())
    return same


def measure(device: str, precision: str, batches: list[int], is_gpu: bool) -> Iterator[Measured]:
    """Yield a number for each batch size: the median of calls that take a second together."""
    with exactness(precision):
        model = load(precision)
        for batch in batches:
            pictures = np.random.default_rng(1).uniform(-1, 1, (batch, *model.input_shape[1:]))
            pictures = pictures.astype(np.float32)
            times: list[float] = []
            for _ in range(3):  # compiles, and warms up
                model.predict_on_batch(pictures)
            with contextlib.ExitStack() as stack:
                busy = stack.enter_context(watched()) if is_gpu else []
                end = time.perf_counter() + SECONDS
                while time.perf_counter() < end or len(times) < 3:
                    start = time.perf_counter()
                    np.asarray(model.predict_on_batch(pictures))
                    times.append(1000 * (time.perf_counter() - start))
            percent = round(statistics.mean(busy)) if busy else None
            yield Measured(device, precision, batch, statistics.median(times), percent)


def sees_gpu() -> bool:
    """Choose the backend that is installed, JAX before TensorFlow; say whether it finds a GPU."""
    has_jax = importlib.util.find_spec("jax") is not None
    os.environ.setdefault("KERAS_BACKEND", "jax" if has_jax else "tensorflow")
    if os.environ["KERAS_BACKEND"] == "jax":
        import jax

        return jax.default_backend() == "gpu"
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def on_cpu(batches: list[int]) -> list[Measured]:
    """Measure float32 on this machine's CPU, in a process that sees no GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "bench.gpu", "--cpu", "--batches", *map(str, batches)]
    said = subprocess.check_output(words, cwd=ROOT, env={**os.environ, **hidden}, text=True)
    return [Measured(*row) for row in json.loads(said.splitlines()[-1])]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[*BATCHES])
    parser.add_argument("--cpu", action="store_true", help="print the CPU's numbers as JSON")
    args = parser.parse_args(arguments)
    if args.cpu:
        sees_gpu()
        name = f"CPU, {os.cpu_count()} cores"
        print(json.dumps([*measure(name, "float32", args.batches, is_gpu=False)]))
        return 0
    if shutil.which("nvidia-smi") is None or not (card := smi("name")) or not sees_gpu():
        print("There is no GPU here that JAX or TensorFlow can use, so nothing was measured.")
        return 0
    measured = []
    for precision in PRECISIONS:
        for each in measure(card, precision, args.batches, is_gpu=True):
            print(table([each]).splitlines()[-1], flush=True)
            measured.append(each)
    measured += on_cpu(args.batches)
    README.write_text(written(README.read_text(), measured))
    print(f"The table is in {README.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
