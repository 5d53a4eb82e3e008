"""Measures the gateway against a direct call, the course's gateway, and FastAPI with ONNX Runtime.

    make bench                    after the model server's measurements, about five minutes

All numbers come from one run, in turns, so what counts are the ratios. ``bench/README.md`` says
what was learnt from them; ``bench/peers/`` holds the others.
"""

import argparse
import contextlib
import functools
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import psutil
import urllib3
from keras_image_helper import create_preprocessor
from PIL import Image
from tqdm import tqdm

import tfserving
from bench.measure import CLIENTS, count_calls, free_port

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "build/clothing-model"
ONNX_MODEL = ROOT / "build/clothing-model.onnx"
SAMPLES = sorted((ROOT / "notebooks/samples").glob("*.png"))
FAR = 50  # milliseconds to a host that is not on this machine
COURSE, FASTAPI = "course", "FastAPI, ONNX Runtime"
TUNED = f"{FASTAPI}, tuned"
# What gunicorn.conf.py sets for the gateway.
MALLOC = {"arena_max": 1, "mmap_threshold": 8 << 20, "trim_threshold": 32 << 20}
TUNABLES = ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())
# How many threads an operation gets (0 is how it comes), and the gateway's malloc settings.
SETTINGS = {
    FASTAPI: {"ONNX_THREADS": "0"},
    TUNED: {"ONNX_THREADS": "1", "GLIBC_TUNABLES": TUNABLES},
}
DIRECT, DIRECT_BYTES = "Predict of the prepared floats", "Predict of the prepared bytes"
LEAST = {COURSE: 3, FASTAPI: 1}  # times as many pictures a second as these

Call = Callable[[], Any]
Tiers = tuple[list[psutil.Process], list[psutil.Process]]
preprocessor = create_preprocessor("xception", target_size=(224, 224))


class Client(threading.local):
    """One kept connection to each server for each thread.

    Plain `http.client`, since whatever a lone client takes counts as the gateway's time: urllib3
    takes a millisecond more.
    """

    def __init__(self):
        self.connect = functools.cache(http.client.HTTPConnection)

    def ask(self, method: str, url: str, body: bytes | None = None, **headers: str) -> bytes:
        """Return the body of the answer, which must be 200."""
        _, address, path, query, _ = urlsplit(url)
        connection = self.connect(address)
        connection.request(method, f"{path}?{query}", body, headers)
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            sys.exit(f"{url} answered {response.status}: {answer.decode(errors='replace')}")
        return answer


client = Client()


@contextlib.contextmanager
def server(port: int, command: list[str], folder: Path, env: dict) -> Iterator[psutil.Process]:
    """Run a server until the block ends; hand out its process once it takes connections."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **env}, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"{' '.join(command)} did not start:\n{log.read().decode()}")
                time.sleep(0.1)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def photo(sample: Path) -> bytes:
    """Return a drawing at the size of a photo, with a photo's grain, as a JPEG file."""
    drawing = np.asarray(Image.open(sample).convert("RGB").resize((900, 1200)))
    grainy = drawing + np.random.default_rng(1).normal(0, 6, drawing.shape)
    file = BytesIO()
    Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def floats(picture: bytes) -> np.ndarray:
    """Decode, resize and scale: [1, 224, 224, 3], float32."""
    return preprocessor.convert_to_tensor(Image.open(BytesIO(picture)))


def pixels(picture: bytes) -> np.ndarray:
    """Decode and resize: [1, 224, 224, 3], uint8."""
    return np.array(preprocessor.resize_image(Image.open(BytesIO(picture))))[np.newaxis]


def predict_request(signature_name: str, **inputs: np.ndarray) -> tfserving.PredictRequest:
    """Make a request that carries an array."""
    pb_request = tfserving.PredictRequest()
    pb_request.model_spec.name = "clothing-model"
    pb_request.model_spec.signature_name = signature_name
    for name, array in inputs.items():
        pb_request.inputs[name].CopyFrom(tfserving.make_tensor_proto(array))
    return pb_request


def bytes_request(picture: bytes) -> tfserving.PredictRequest:
    """Make a request that carries the file as it is."""
    pb_request = predict_request("serving_bytes")
    tensor = pb_request.inputs["image_bytes"]
    tensor.dtype = tfserving.messages_pb2.DT_STRING
    tensor.tensor_shape.dim.add(size=1)
    tensor.string_val.append(picture)
    return pb_request


def by_post(url: str, body: bytes, content_type: str) -> Call:
    """Return a call that posts what is prepared here, once, as the direct call's request is."""
    headers = {"Content-Type": content_type}
    return lambda: json.loads(client.ask("POST", url, body, **headers))


def by_link(url: str, link: str) -> Call:
    """Return a call that posts a link."""
    return by_post(url, f'{{"url": "{link}"}}'.encode(), "application/json")


def by_upload(url: str, picture: bytes) -> Call:
    """Return a call that posts a form with a file."""
    fields = {"file": ("photo.jpg", picture, "image/jpeg")}
    return by_post(url, *urllib3.encode_multipart_formdata(fields))


def latency(call: Call, tiers: Tiers) -> list[float]:
    """Return the milliseconds of one call: taken in turns, each finds the caches as cold."""
    begin = time.perf_counter()
    call()
    return [(time.perf_counter() - begin) * 1e3]


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a server's process and those that it has started."""
    return [process, *process.children(recursive=True)]


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Return what these processes have used of the processors since they started."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def throughput(call: Call, tiers: Tiers) -> list[float]:
    """Return the calls a second of 16 clients, and the CPU milliseconds a call in each tier."""
    before = [cpu_seconds(tier) for tier in tiers]
    count, seconds = count_calls(call)
    used = [cpu_seconds(tier) - b for tier, b in zip(tiers, before, strict=True)]
    return [count / seconds, *(each * 1e3 / count for each in used)]


def compare(
    title: str,
    measure: Callable[[Call, Tiers], list[float]],
    calls: dict[str, tuple[Call, Tiers]],
    rounds: int = 6,
) -> dict[str, list[float]]:
    """Measure the calls in turns, so that whatever else the machine does hits all of them."""
    results: dict[str, list[list[float]]] = {name: [] for name in calls}
    client.connect.cache_clear()  # the servers have closed connections that were idle
    for each in calls.values():
        measure(*each)
    for _ in tqdm(range(rounds), title, leave=False):
        for name, each in calls.items():
            results[name].append(measure(*each))
    return {name: np.median(values, axis=0).tolist() for name, values in results.items()}


def show(title: str, columns: list[str], results: dict[str, list[float]]) -> None:
    """Print results, and the first column as a ratio to the first row too."""
    first = next(iter(results.values()))[0]
    print(f"\n{title:<36}" + "".join(f"{column:>14}" for column in [*columns, "ratio"]))
    for name, values in results.items():
        cells = "".join(f"{value:14.1f}" for value in values)
        print(f"  {name:<34}{cells}{values[0] / first:14.2f}")


def target(sentence: str, value: float, reached: bool) -> None:
    """Print a ratio that has a target, and whether this run reached it."""
    print(f"  {sentence}: {value:.2f} ({'reached' if reached else 'NOT reached'} in this run)")


def convert(peers_python: Path) -> None:
    """Make the ONNX model of the same weights, unless the one that is there is newer."""
    saved = MODEL / "1/saved_model.pb"
    if ONNX_MODEL.exists() and ONNX_MODEL.stat().st_mtime > saved.stat().st_mtime:
        return
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([peers_python, "-c", where], stdout=subprocess.PIPE, check=True)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tf2onnx.convert", "--saved-model", str(saved.parent)),
            *("--signature_def", "serving_default", "--output", str(ONNX_MODEL)),
        ],
        env={**os.environ, "PYTHONPATH": packages.stdout.decode().strip()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        sys.exit(f"The model could not be converted to ONNX:\n{done.stdout.decode()}")


def check_answers(url: dict[str, str]) -> None:
    """End with a sentence unless all give the gateway's probabilities for every sample."""
    largest = 0.0
    for sample in SAMPLES:
        client.connect.cache_clear()  # the course's first answer takes seconds
        link, file = f"{url['pictures']}/{sample.name}", sample.read_bytes()
        expected = by_link(f"{url['gateway']}/predict", link)()["predictions"]
        others = {
            "gateway, upload": by_upload(f"{url['gateway']}/predict", file),
            COURSE: by_link(f"{url[COURSE]}/predict", link),
        }
        for name in SETTINGS:
            others[name] = by_link(f"{url[name]}/predict", link)
            others[f"{name}, upload"] = by_upload(f"{url[name]}/upload", file)
        for name, call in others.items():
            answer = call()["predictions"]
            difference = max(abs(answer[label] - expected[label]) for label in expected)
            if answer.keys() != expected.keys() or difference > 1e-4:
                sys.exit(f"{name} and gateway, link differ by {difference:.1e} for {sample.name}.")
            largest = max(largest, difference)
    print(f"All give the same probabilities for {len(SAMPLES)} samples: within {largest:.0e}")


def measure_latency(gateway: str, link: str, picture: bytes, stub: Any, rounds: int) -> None:
    """Print what the gateway adds to a direct call, for one client."""
    as_floats = predict_request("serving_default", inputs=floats(picture))
    as_bytes = predict_request("serving_uint8", pixels=pixels(picture))
    nobody: Tiers = ([], [])
    calls = {
        DIRECT: (lambda: stub.Predict(as_floats), nobody),
        DIRECT_BYTES: (lambda: stub.Predict(as_bytes), nobody),
        "gateway, upload": (by_upload(gateway, picture), nobody),
        "gateway, link": (by_link(gateway, link), nobody),
        "decode, resize and scale, here": (lambda: floats(picture), nobody),
        "fetch, here": (lambda: client.ask("GET", link), nobody),
    }
    results = compare("latency", latency, calls, 20 * rounds)
    show("One picture at a time", ["ms"], results)
    direct, direct_bytes, upload, by_url, decode, fetch = (v[0] for v in results.values())
    allowed = {"decode + 2 ms": decode + 2, "fetch + decode + 2 ms": fetch + decode + 2}
    for way, total, (sentence, most) in zip(
        ("an upload", "a link"), (upload, by_url), allowed.items(), strict=True
    ):
        share = (total - direct) / most
        target(f"overhead of {way} / ({sentence}), at most 1", share, share <= 1)
        share = (total - direct_bytes) / most
        print(f"    and over Predict of the bytes that the gateway sends: {share:.2f}")


def measure_throughput(title: str, calls: dict[str, tuple[Call, Tiers]], rounds: int) -> None:
    """Print what 16 clients get done, and how much more than the others that is."""
    results = compare(title, throughput, calls, rounds)
    for values in results.values():
        values.append(values[0] * sum(values[1:]) / 1e3)
    columns = ["/s", "HTTP CPU ms", "model CPU ms", f"of {os.cpu_count()} cores"]
    show(f"{CLIENTS} clients, {title}", columns, results)
    rate, *used, cores = results["gateway"]
    for name in (COURSE, FASTAPI, TUNED):
        if name in results:
            share, cpu = rate / results[name][0], sum(used) / sum(results[name][1:-1])
            if name in LEAST:
                sentence = f"gateway / {name}, at least {LEAST[name]}"
                target(sentence, share, share >= LEAST[name])
            else:
                print(f"  gateway / {name}: {share:.2f}")
            print(f"    and CPU time a picture: {cpu:.2f}")
            if name == COURSE:  # which makes use of one core, however many there are
                most = share * (os.cpu_count() or 1) / cores
                print(f"    with all cores for the gateway and its model server: {most:.2f}")


def measure_ways(picture: bytes, stub: Any, model_tier: list[psutil.Process], rounds: int) -> None:
    """Print what each way to send a picture costs this process, the wire and the model server."""
    make: dict[str, Callable[[], tfserving.PredictRequest]] = {
        "float32": lambda: predict_request("serving_default", inputs=floats(picture)),
        "uint8": lambda: predict_request("serving_uint8", pixels=pixels(picture)),
        "the JPEG as it is": lambda: bytes_request(picture),
    }
    tiers: Tiers = ([psutil.Process()], model_tier)

    def sends(prepare: Callable[[], tfserving.PredictRequest]) -> Call:
        return lambda: stub.Predict(prepare())

    calls = {name: (sends(prepare), tiers) for name, prepare in make.items()}
    show("Ways to send it, one client", ["ms"], compare("ways", latency, calls, 20 * rounds))
    results = compare("ways", throughput, calls, rounds)
    for name, prepare in make.items():
        sizes = prepare().ByteSize(), stub.Predict(prepare()).ByteSize()
        results[name].append(sum(sizes) / 1e3)
    columns = ["/s", "client CPU ms", "model CPU ms", "kB"]
    show(f"Ways to send it, {CLIENTS} clients", columns, results)


def start_all(
    stack: contextlib.ExitStack, url: dict[str, str], folder: str, peers_python: Path
) -> dict[str, psutil.Process]:
    """Start the model server, the picture host, the gateway and its peers, until the stack ends."""
    address = {name: each.removeprefix("http://") for name, each in url.items()}
    port = {name: each.rpartition(":")[2] for name, each in address.items()}
    gunicorn = [sys.executable, "-m", "gunicorn", "--no-control-socket", "--bind"]
    peers = ROOT / "bench/peers"
    serving = {"TF_SERVING_HOST": address["model server"], "ALLOWED_IMAGE_HOSTS": "127.0.0.1"}
    onnx = {"ONNX_MODEL": str(ONNX_MODEL)}
    model = ["--model_name=clothing-model", f"--model_base_path={MODEL}"]
    model_server = [sys.executable, "-m", "model_server", f"--port={port['model server']}", *model]
    host = [sys.executable, "pictures.py", folder, port["pictures"]]
    uvicorn = [str(peers_python.absolute()), "-m", "uvicorn", "fastapi_onnx:app", "--port"]
    commands: dict[str, tuple[list[str], Path, dict[str, str]]] = {
        "pictures": (host, peers, {}),
        "model server": (model_server, ROOT, {}),
        "gateway": ([*gunicorn, address["gateway"], "gateway:app"], ROOT, serving),
        COURSE: ([*gunicorn, address[COURSE], "course:app"], peers, serving),
    }
    for name, settings in SETTINGS.items():
        commands[name] = ([*uvicorn, port[name]], peers, onnx | settings)
    return {
        name: stack.enter_context(server(int(port[name]), *command))
        for name, command in commands.items()
    }


def main() -> None:
    """Run all measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers-python", type=Path, default=ROOT / "build/peers-venv/bin/python")
    parser.add_argument("--rounds", type=int, default=6, help="more of them, less noise")
    arguments = parser.parse_args()
    if not (MODEL / "1").exists():
        sys.exit(f"{MODEL}/1 is missing: make workbook ONLY=01 exports the model")
    if not arguments.peers_python.exists():
        sys.exit(f"{arguments.peers_python} is missing: make bench installs it")
    convert(arguments.peers_python)

    rounds, picture = arguments.rounds, photo(SAMPLES[0])
    names = ("pictures", "model server", "gateway", COURSE, FASTAPI, TUNED)
    url = {name: f"http://127.0.0.1:{free_port()}" for name in names}
    link = f"{url['pictures']}/photo.jpg"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder, "photo.jpg").write_bytes(picture)
        for sample in SAMPLES:
            shutil.copy(sample, folder)
        processes = start_all(stack, url, folder, arguments.peers_python)
        target = url["model server"].removeprefix("http://")
        channel = stack.enter_context(grpc.insecure_channel(target))
        grpc.channel_ready_future(channel).result(60)
        stub = tfserving.PredictionServiceStub(channel)

        check_answers(url)
        print(f"The picture: a JPEG of 900 × 1200 pixels, {len(picture) / 1e3:.0f} kB")
        measure_latency(f"{url['gateway']}/predict", link, picture, stub, rounds)

        model_tier = family(processes["model server"])
        tiers: dict[str, Tiers] = {
            "gateway": (family(processes["gateway"]), model_tier),
            COURSE: (family(processes[COURSE]), model_tier),
        }
        tiers |= {name: (family(processes[name]), []) for name in SETTINGS}
        for title, file in (("links", link), (f"links, host {FAR} ms away", f"{link}?{FAR}")):
            calls = {
                name: (by_link(f"{url[name]}/predict", file), tier) for name, tier in tiers.items()
            }
            measure_throughput(title, calls, rounds)
        prepared = predict_request("serving_default", inputs=floats(picture))
        calls = {
            "gateway": (by_upload(f"{url['gateway']}/predict", picture), tiers["gateway"]),
            **{name: (by_upload(f"{url[name]}/upload", picture), tiers[name]) for name in SETTINGS},
            DIRECT: (lambda: stub.Predict(prepared), ([psutil.Process()], model_tier)),
        }
        measure_throughput("uploads", calls, rounds)
        measure_ways(picture, stub, model_tier, rounds)


if __name__ == "__main__":
    main()
