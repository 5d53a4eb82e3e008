"""The gateway: a picture comes in over HTTP, the probabilities of its classes go out as JSON.

It is made of the cells tagged `gateway` in notebooks/04-flask-gateway.ipynb; change it there.
"""

import functools
import hmac
import mimetypes
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import prometheus_client as prometheus
from flask import Flask, Response, g, render_template, request
from keras_image_helper import create_preprocessor
from werkzeug.exceptions import BadRequest, HTTPException

import pictures
import tfserving
import web
from pictures import Problem

app = Flask(__name__, static_folder="website/static", template_folder="website")
app.request_class.form_data_parser_class = pictures.FormParser
web.limiter.init_app(app)
app.register_blueprint(web.blueprint)
env = os.environ.get
TF_SERVING_HOST = env("TF_SERVING_HOST", "localhost:8500")
MODEL_NAME = env("MODEL_NAME", "clothing-model")
SIGNATURE_NAME = env("SIGNATURE_NAME", "serving_uint8,serving_default")  # the first there is
PREDICT_TIMEOUT_SECONDS = float(env("PREDICT_TIMEOUT_SECONDS", "20"))
CLASS_NAMES_FILE = env("CLASS_NAMES_FILE", f"{app.root_path}/model_server/classes.txt")
CLASS_NAMES = Path(CLASS_NAMES_FILE).read_text(encoding="utf-8").splitlines()
GATEWAY_API_KEY = env("GATEWAY_API_KEY", "")
MAX_IN_FLIGHT = int(env("MAX_IN_FLIGHT", "32"))

MAX_LINKS = 16
SAMPLES = {path.stem: path for path in Path(app.root_path).glob("website/static/samples/*.webp")}
mimetypes.add_type("image/webp", ".webp")  # Python 3.11 in a slim image does not know it
USAGE = f'Send {{"url": link}}, {{"urls": [up to {MAX_LINKS} links]}} or a form with a file.'
app.config["MAX_CONTENT_LENGTH"] = web.FORM_MAX_BYTES
app.json.sort_keys = False  # type: ignore[attr-defined]  # classes stay in the model's order

stopping = threading.Event()  # gunicorn.conf.py sets it when the process is asked to end
places = threading.BoundedSemaphore(MAX_IN_FLIGHT)
MAX_GALLERIES = max(1, MAX_IN_FLIGHT // 4)  # requests with several links, for all their bytes
galleries = threading.BoundedSemaphore(MAX_GALLERIES)
fetchers = ThreadPoolExecutor(MAX_GALLERIES * MAX_LINKS)  # none waits for another's slow host

IN_FLIGHT = prometheus.Gauge("gateway_in_flight", "Predictions in progress", registry=web.registry)
SECONDS = prometheus.Histogram("gateway_seconds", "Time taken", ["stage"], registry=web.registry)
VERSION = prometheus.Gauge("gateway_model_version", "Version of the model", registry=web.registry)


class Signature(NamedTuple):
    """What requests to the model must look like, and the version that said so."""

    name: str
    version: int
    input_name: str
    dtype: np.dtype
    height: int
    width: int
    output_name: str


def read_signature(offered: Mapping[str, tfserving.SignatureDef], version: int) -> Signature:
    """Return a signature's names, type and size; raise Problem where pictures do not fit it."""
    wanted = SIGNATURE_NAME.split(",")
    name = next((name for name in wanted if name in offered), wanted[-1])
    tensors = [*offered[name].inputs.items(), *offered[name].outputs.items()]
    shapes = [[dim.size for dim in info.tensor_shape.dim] for _, info in tensors]
    match tensors, shapes:
        case [(input_name, info), (output_name, _)], [[_, height, width, 3], [_, classes]]:
            dtype = tfserving.numpy_dtype(info.dtype)
            if dtype.kind in "fu" and min(height, width) > 0 and classes == len(CLASS_NAMES):
                return Signature(name, version, input_name, dtype, height, width, output_name)
    fitting = f"pictures [-1, height, width, 3] and give {len(CLASS_NAMES)} numbers"
    sentence = f"{name} must take {fitting}, one for each name in CLASS_NAMES_FILE"
    raise Problem(503, "model-unsuitable", f"{sentence}, but its shapes are {shapes}.")


@functools.cache
def connect() -> tuple[tfserving.PredictionServiceStub, tfserving.ModelServiceStub]:
    """Return stubs on a channel that is made on first use, after gunicorn has forked."""
    channel = tfserving.make_channel(TF_SERVING_HOST)
    return tfserving.PredictionServiceStub(channel), tfserving.ModelServiceStub(channel)


@functools.cache
def get_signature() -> Signature:
    """Ask the model server what the model takes and gives; remembered until `cache_clear()`."""
    pb_request = tfserving.GetModelMetadataRequest(metadata_field=["signature_def"])
    pb_request.model_spec.name = MODEL_NAME
    stub, _ = connect()
    pb_response = stub.GetModelMetadata(pb_request, timeout=PREDICT_TIMEOUT_SECONDS)
    signatures = tfserving.SignatureDefMap.FromString(pb_response.metadata["signature_def"].value)
    version = pb_response.model_spec.version.value
    signature = read_signature(signatures.signature_def, version)
    VERSION.set(signature.version)
    return signature


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Take the time of a part of the work, for the answer, the log and Prometheus."""
    with SECONDS.labels(name).time():
        start = time.perf_counter()
        yield
        g.seconds[name] = g.seconds.get(name, 0) + time.perf_counter() - start


def prepare(file: bytes, signature: Signature, deadline: float) -> np.ndarray:
    """Return a picture as the model takes it, [1, height, width, 3], floats scaled to -1 ... 1."""
    preprocessor = create_preprocessor("xception", target_size=(signature.width, signature.height))
    image = pictures.read_picture(file, preprocessor.target_size, deadline)
    if signature.dtype.kind == "u":  # a model that wants plain pixels scales them itself
        return np.array(image, signature.dtype)[np.newaxis]
    return preprocessor.convert_to_tensor(image).astype(signature.dtype)


def ask(files: list[bytes], signature: Signature, deadline: float) -> tfserving.PredictResponse:
    """Send all pictures to the model server in one Predict request."""
    batch = []
    with stage("decode"):
        for number, file in enumerate(files, 1):
            with pictures.which(number, len(files)):
                batch.append(prepare(file, signature, deadline))
    pb_request = tfserving.PredictRequest()
    pb_request.model_spec.name = MODEL_NAME
    pb_request.model_spec.signature_name = signature.name
    tensor = tfserving.make_tensor_proto(np.concatenate(batch))
    pb_request.inputs[signature.input_name].CopyFrom(tensor)
    stub, _ = connect()
    with stage("predict"):
        left, metadata = deadline - time.monotonic(), [("x-request-id", g.id)]
        return stub.Predict(pb_request, timeout=left, metadata=metadata)


# What a model server says to requests that were made for another version of the model.
OUTDATED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


def classify(files: list[bytes], deadline: float) -> list[dict]:
    """Return the answer for each picture; ask twice where the model was replaced meanwhile."""
    for attempt in range(2):
        signature = get_signature()
        try:
            pb_response = ask(files, signature, deadline)
            if pb_response.model_spec.version.value == signature.version:
                break
        except grpc.RpcError as error:
            if error.code() not in OUTDATED or attempt > 0:
                raise
        get_signature.cache_clear()
    rows = tfserving.make_ndarray(pb_response.outputs[signature.output_name])
    return [describe(row, pb_response.model_spec) for row in rows.tolist()]


def describe(probabilities: list[float], model_spec: tfserving.ModelSpec) -> dict:
    """Return what the gateway says of one picture."""
    predictions = dict(zip(CLASS_NAMES, probabilities, strict=True))
    top = max(predictions, key=predictions.__getitem__)
    answer = {"predictions": predictions, "top_class": top, "top_probability": predictions[top]}
    model = {"name": model_spec.name, "version": model_spec.version.value}
    return answer | {"model": model, "seconds": {k: round(v, 6) for k, v in g.seconds.items()}}


@web.limiter.shared_limit(lambda: web.RATE_LIMIT, "pictures")
def check_caller(given: bytes) -> None:
    """Raise Problem unless this is the key, if there is one, and not too often."""
    if GATEWAY_API_KEY and not hmac.compare_digest(given, f"Bearer {GATEWAY_API_KEY}".encode()):
        raise Problem(401, "wrong-key", "No key or a wrong one; send `Authorization: Bearer KEY`.")


def read_files(body: Any) -> list[bytes]:
    """Return the pictures that a request holds, links to or names."""
    if file := request.files.get("file"):
        with closing(file):  # large ones have waited on the disk
            return [file.read()]
    match body:
        case {"sample": str(name)} if name in SAMPLES:
            return [SAMPLES[name].read_bytes()]
        case {"url": str(url)} if "urls" not in body:
            links = [url]
        case {"urls": [str(), *_] as urls} if len(urls) <= MAX_LINKS:
            links = [str(url) for url in urls]
        case _:
            raise Problem(400, "malformed-request", USAGE)
    with stage("fetch"):
        return pictures.fetch_all(links, fetchers)


def add_previews(answers: list[dict], files: list[bytes], deadline: float) -> None:
    """Add to each answer a small picture, of what was read, for the website to show."""
    for answer, file in zip(answers, files, strict=True):
        answer["preview"] = pictures.make_preview(file, deadline)


@SECONDS.labels("all").time()
def answer_body(body: Any) -> list[dict]:
    """Classify the pictures of a request, unless too many are being answered already."""
    is_gallery = isinstance(body, dict) and "urls" in body
    with ExitStack() as stack:
        for seats in (places, galleries) if is_gallery else (places,):
            if not seats.acquire(blocking=False):
                raise Problem(503, "too-busy", "Too many pictures at a time; try again soon.")
            stack.callback(seats.release)
        stack.enter_context(IN_FLIGHT.track_inprogress())
        files, deadline = read_files(body), time.monotonic() + PREDICT_TIMEOUT_SECONDS
        answers = classify(files, deadline)
        if body.get("preview"):
            add_previews(answers, files, deadline)
        return answers


@app.post("/predict")
def predict() -> dict | list[dict]:
    """Classify the picture in an upload or behind a link, or those behind several links."""
    check_caller(request.headers.get("Authorization", "").encode("latin-1"))
    try:
        body = request.form.to_dict() if g.is_form else web.read_json()
    except BadRequest as error:
        raise Problem(400, "malformed-request", USAGE) from error
    answers = answer_body(body)
    return answers if "urls" in body else answers[0]


@app.route("/", methods=["GET", "POST"])
def index() -> Response:
    """Answer with the website; where there is no JavaScript, its form is sent here."""
    page: dict[str, Any] = {"url": "", "answer": None, "problem": None}
    page |= {"classes": CLASS_NAMES, "samples": SAMPLES, "formats": pictures.IMAGE_FORMATS}
    response = Response(mimetype="text/html")
    if request.method == "POST":
        try:
            form = request.form.to_dict() | {"preview": "yes"}
            page["url"] = form.get("url", "")
            check_caller(f"Bearer {form.get('key', '')}".encode())
            page["answer"] = answer_body(form)[0]
        except (HTTPException, grpc.RpcError) as error:
            response = app.make_response(app.handle_user_exception(error))
            page["problem"], response.mimetype = response.get_json()["detail"], "text/html"
    response.set_data(render_template("index.html", needs_key=bool(GATEWAY_API_KEY), **page))
    return response


@app.get("/livez")
def livez() -> dict:
    """Answer while the process lives."""
    return {"status": "alive"}


@app.get("/readyz")
def readyz() -> dict:
    """Answer 200 while a version of the model is AVAILABLE and suits the gateway, else 503."""
    if stopping.is_set():
        raise Problem(503, "stopping", "This gateway is about to end; ask another one.")
    pb_request = tfserving.GetModelStatusRequest()
    pb_request.model_spec.name = MODEL_NAME
    _, stub = connect()
    pb_response = stub.GetModelStatus(pb_request, timeout=min(PREDICT_TIMEOUT_SECONDS, 2))
    states = [status.state for status in pb_response.model_version_status]
    if tfserving.ModelVersionStatus.AVAILABLE not in states:
        raise Problem(503, "model-unavailable", f"No version of {MODEL_NAME} is AVAILABLE.")
    get_signature.cache_clear()
    return {"status": "ready", "model": {"name": MODEL_NAME, "version": get_signature().version}}
