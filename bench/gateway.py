"""Measures the gateway against the course's way, and against FastAPI with the model in process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
import urllib3
from PIL import Image
from tqdm import tqdm

from bench import model_server
from bench.limit import Limit
from bench.measure import (
    CORES,
    ROOT,
    Call,
    Command,
    Figure,
    Server,
    Settings,
    call_for,
    client,
    compare,
    free_port,
    most_memory,
    said_of,
    turn,
)
from bench.report import Target

ONNX_MODEL = ROOT / "build/clothing-model.onnx"
SAMPLES = sorted((ROOT / "notebooks/samples").glob("*.png"))
PEERS_PYTHON = ROOT / "build/peers-venv/bin/python"
CHAPTER, MEMORY = "The gateway", "Memory and start-up"
# Pictures by what they are: width, height, and JPEG's quality.
SIZES = {
    "30 kB": (400, 533, 85),  # a photo of a shop's, as the model was trained with
    "150 kB": (900, 1200, 85),
    "3 MB": (3024, 4032, 92),  # as a phone takes it
}
SMALL, MIDDLE = "30 kB", "150 kB"
HOSTS = ("HTTP/1.0", "HTTP/1.1")  # one that closes connections, and one that keeps them
FAR = 50  # milliseconds to a host that is not on this machine

LITE_SERVER, TF_SERVER = model_server.NAMES.values()
GATEWAY, COURSE = "gateway, int8", "the course's way"
FLOAT, TUNED = "FastAPI + ONNX Runtime", "FastAPI + ONNX Runtime, tuned"
INT8 = "FastAPI + the same int8 model"
LIMIT = f"decoding and int8 alone, {CORES} processes"
HTTP_TIER, MODEL_TIER = "HTTP tier", "model tier"
# What gunicorn.conf.py sets for the gateway.
MALLOC = {"arena_max": 1, "mmap_threshold": 8 << 20, "trim_threshold": 32 << 20}
TUNABLES = ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())
# The gateway's malloc settings, and how many threads an operation gets; 0 is how it comes.
PEERS = {
    FLOAT: {"ONNX_THREADS": "0"},
    TUNED: {"ONNX_THREADS": "1", "GLIBC_TUNABLES": TUNABLES},
    INT8: {"GLIBC_TUNABLES": TUNABLES},
}
# What is asked of the gateway, for links on the same machine: how many times as good as whom.
LEAST_BUSY, LEAST_ALONE = {FLOAT: 1.3, INT8: 0.9, COURSE: 3.0}, {FLOAT: 1.0}
MOST_MS = 9


def photo(size: str) -> bytes:
    """Return a drawing at the size of a photo, with a photo's grain, as a JPEG file."""
    width, height, quality = SIZES[size]
    drawing = np.asarray(Image.open(SAMPLES[0]).convert("RGB").resize((width, height)))
    grainy = drawing + np.random.default_rng(1).normal(0, 6, drawing.shape)
    file = BytesIO()
    Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def by_post(url: str, body: bytes, content_type: str) -> Call:
    """Return a call that posts what is prepared here, once."""
    headers = {"Content-Type": content_type}
    return lambda: json.loads(client.ask("POST", url, body, **headers))


def by_link(to: Command, host: Command, name: str) -> Call:
    """Return a call that posts a link to a picture."""
    body = json.dumps({"url": f"http://{host.address}/{name}"}).encode()
    return by_post(f"http://{to.address}/predict", body, "application/json")


def by_upload(to: Command, path: str, picture: bytes) -> Call:
    """Return a call that posts a form with a file."""
    fields = {"file": ("photo.jpg", picture, "image/jpeg")}
    return by_post(f"http://{to.address}/{path}", *urllib3.encode_multipart_formdata(fields))


def upload_path(name: str) -> str:
    """Return where a server takes uploads."""
    return "predict" if name == GATEWAY else "upload"


def commands(model: Path, folder: Path) -> dict[str, Command]:
    """Return how each server is started: gateway and model server as docs/service.md says."""
    gunicorn = [str(Path(sys.executable).with_name("gunicorn")), "--bind"]
    found = {
        LITE_SERVER: model_server.command(model_server.LITE, model),
        TF_SERVER: model_server.command(model_server.TENSORFLOW, model),
    }

    def serving(name: str) -> dict[str, str]:
        return {"TF_SERVING_HOST": found[name].address, "ALLOWED_IMAGE_HOSTS": "127.0.0.1"}

    port = free_port()
    words = [*gunicorn, f"127.0.0.1:{port}", "gateway:app"]
    about = {"MODEL_DESCRIPTION": str(model / "1/assets.extra/model.json")}
    found[GATEWAY] = Command(words, port, "/readyz", serving(LITE_SERVER) | about)
    port = free_port()
    # In another folder, since gunicorn.conf.py is for the gateway.
    words = [*gunicorn, f"127.0.0.1:{port}", "--no-control-socket", "course:app"]
    found[COURSE] = Command(words, port, "/", serving(TF_SERVER), ROOT / "bench/peers")
    if PEERS_PYTHON.exists():
        uvicorn = [str(PEERS_PYTHON), "-m", "uvicorn", "bench.peers.fastapi_app:app", "--port"]
        for name, env in PEERS.items():
            port, file = free_port(), model / "1/model.tflite" if name == INT8 else ONNX_MODEL
            words = [*uvicorn, str(port)]
            found[name] = Command(words, port, "/docs", env | {"MODEL": str(file)})
    for name in HOSTS:
        port = free_port()
        words = [sys.executable, "bench/peers/pictures.py", str(folder), str(port), name]
        found[name] = Command(words, port, "/")
    return found


def convert(model: Path) -> None:
    """Make the ONNX model of the same weights, unless the one that is there is newer."""
    saved = model / "1/saved_model.pb"
    if ONNX_MODEL.exists() and ONNX_MODEL.stat().st_mtime > saved.stat().st_mtime:
        return
    print("converting the model to ONNX, half a minute …", flush=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([PEERS_PYTHON, "-c", where], stdout=subprocess.PIPE, check=True)
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


def check_answers(started: Mapping[str, Command]) -> str:
    """Say by how much the answers differ; end with a sentence where they must not.

    Those with the same weights must give the same probabilities, and all of them the same class.
    """
    names = [name for name in (GATEWAY, COURSE, *PEERS) if name in started]
    largest = {GATEWAY: 0.0, COURSE: 0.0}
    for sample in SAMPLES:
        client.connect.cache_clear()  # the course's first answer takes seconds
        calls = {name: by_link(started[name], started[HOSTS[0]], sample.name) for name in names}
        for name in set(names) - {COURSE}:
            file = sample.read_bytes()
            calls[f"{name}, upload"] = by_upload(started[name], upload_path(name), file)
        answers = {name: call()["predictions"] for name, call in calls.items()}
        for name, answer in answers.items():
            like = GATEWAY if name.startswith((GATEWAY, INT8)) else COURSE
            expected = answers[like]
            difference = max(abs(answer[label] - expected[label]) for label in expected)
            tops = {max(each, key=each.__getitem__) for each in (answer, answers[GATEWAY])}
            if difference > 1e-4 or len(tops) > 1:
                sys.exit(f"{name} and {like} differ by {difference:.1e} for {sample.name}.")
            largest[like] = max(largest[like], difference)
    return (
        f"All name the same class for {len(SAMPLES)} samples; with the int8 model, probabilities "
        f"agree within {largest[GATEWAY]:.0e}, with floats within {largest[COURSE]:.0e}."
    )


def titled(what: str, clients: int) -> str:
    """Return a figure's title."""
    return f"{what}, {said_of(clients)}"


def links(size: str, host: str) -> str:
    """Say what is behind links, and where."""
    return f"links, {size}, {host} host"


def measure(
    model: Path,
    started: Mapping[str, Command],
    running: Mapping[str, Server],
    photos: Mapping[str, bytes],
    settings: Settings,
) -> Iterator[Figure]:
    """Compare all ways to classify a picture, for each size, host and number of clients."""
    tiers = {
        name: {HTTP_TIER: running[name].family()}
        for name in (GATEWAY, COURSE, *PEERS)
        if name in running
    }
    tiers[GATEWAY][MODEL_TIER] = running[LITE_SERVER].family()
    tiers[COURSE][MODEL_TIER] = running[TF_SERVER].family()

    def figure(
        what: str, calls: Mapping[str, Call], clients: int, limit: Callable | None = None
    ) -> Figure:
        turns = {name: turn(call, clients, tiers[name]) for name, call in calls.items()}
        if limit:
            turns[LIMIT] = limit
        many = clients > 1
        empty = Figure(
            CHAPTER, titled(what, clients), "/s" if many else "ms", GATEWAY, LIMIT if limit else ""
        )
        return compare(empty, turns, settings)

    with Limit(str(model / "1/model.tflite")) as limit:
        for size, picture in photos.items():
            for host in HOSTS:
                calls = {
                    name: by_link(started[name], started[host], file_name(size)) for name in tiers
                }
                for clients in (settings.clients, 1):
                    each = limit.turn(picture, clients)
                    yield figure(links(size, host), calls, clients, each)
        calls = {
            name: by_upload(started[name], upload_path(name), photos[SMALL])
            for name in tiers
            if name != COURSE
        }
        for clients in (settings.clients, 1):
            yield figure(f"uploads, {SMALL}", calls, clients, limit.turn(photos[SMALL], clients))
    far = f"{file_name(SMALL)}?{FAR}"
    calls = {name: by_link(started[name], started[HOSTS[1]], far) for name in tiers}
    yield figure(f"links, {SMALL}, a host {FAR} ms away", calls, settings.clients)


def file_name(size: str) -> str:
    """Return the name of a picture at its host."""
    return size.replace(" ", "") + ".jpg"


def time_of_parts(call: Call, seconds: float) -> dict[str, float]:
    """Return the milliseconds of each part of a lone call, as the gateway's answers tell them."""
    told: list[dict[str, float]] = []
    whole = turn(lambda: told.append(call()["seconds"]), 1)(seconds).value
    parts = {part: median(each[part] * 1e3 for each in told) for part in told[0]}
    return parts | {"HTTP, forms, JSON, log": whole - sum(parts.values())}


def where_time_goes(
    started: Mapping[str, Command], photos: Mapping[str, bytes], settings: Settings
) -> Iterator[Figure]:
    """Show the parts of the time that a lone link takes, for each size."""
    for size in photos:
        figure = Figure(CHAPTER, f"where a lone link's time goes, {size}", "ms")
        call = by_link(started[GATEWAY], started[HOSTS[0]], file_name(size))
        for _ in tqdm(range(settings.rounds), figure.title, leave=False):
            for part, value in time_of_parts(call, settings.seconds / 2).items():
                figure.results.setdefault(part, []).append(value)
        yield figure


def memory(
    started: Mapping[str, Command], running: Mapping[str, Server], settings: Settings
) -> Figure:
    """Look at the memory of each server while many clients send links."""
    figure = Figure(
        MEMORY, f"most memory beside {settings.most_clients} clients with links, {MIDDLE}", "MiB"
    )
    behind = {GATEWAY: [LITE_SERVER], COURSE: [TF_SERVER]}
    client.connect.cache_clear()
    for name in (each for each in (GATEWAY, COURSE, *PEERS) if each in running):
        call = by_link(started[name], started[HOSTS[0]], file_name(MIDDLE))
        servers = {each: running[each] for each in (name, *behind.get(name, []))}
        work = partial(call_for, call, 2 * settings.seconds, settings.most_clients)
        figure.results |= {each: [most] for each, most in most_memory(servers, work).items()}
    return figure


def targets(figures: Mapping[str, Figure], clients: int) -> list[Target]:
    """Say what was asked of the gateway and what it has reached, for each picture and host."""
    cells = [(size, host) for size in SIZES for host in HOSTS]
    found = []
    wanted = [(clients, *each) for each in LEAST_BUSY.items()]
    wanted += [(1, *each) for each in LEAST_ALONE.items()]
    for number, peer, least in wanted:
        compared = {cell: figures[titled(links(*cell), number)] for cell in cells}
        if all(peer in figure.results for figure in compared.values()):
            target = Target(f"{said_of(number)}: at least {least} × {peer}", {}, {}, least=least)
            for cell, figure in compared.items():
                target.cells[cell] = median(figure.ratios(peer))
                target.limits[cell] = median(figure.ratios(peer, ours=LIMIT))
            found.append(target)
    target = Target(
        f"one client: a picture end to end in at most {MOST_MS} ms", {}, {}, most=MOST_MS
    )
    for cell in cells:
        results = figures[titled(links(*cell), 1)].results
        target.cells[cell], target.limits[cell] = median(results[GATEWAY]), median(results[LIMIT])
    return [*found, target]
