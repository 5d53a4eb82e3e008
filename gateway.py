"""The gateway: a picture comes in over HTTP, the probabilities of its classes go out as JSON.

It is made of the cells tagged `gateway` in notebooks/04-flask-gateway.ipynb; change it there.
"""

import functools
import hmac
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import grpc
import numpy as np
import prometheus_client as prometheus
import requests
import urllib3
from flask import Flask, Response, request
from keras_image_helper import create_preprocessor
from PIL import Image, ImageOps
from requests_hardened import ip_filter, ip_filter_adapter
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

import tfserving

app = Flask(__name__, static_folder="website")
env = os.environ.get
TF_SERVING_HOST = env("TF_SERVING_HOST", "localhost:8500")
MODEL_NAME = env("MODEL_NAME", "clothing-model")
SIGNATURE_NAME = env("SIGNATURE_NAME", "serving_default")
PREDICT_TIMEOUT_SECONDS = float(env("PREDICT_TIMEOUT_SECONDS", "20"))
CLASS_NAMES_FILE = env("CLASS_NAMES_FILE", f"{app.root_path}/model_server/classes.txt")
CLASS_NAMES = Path(CLASS_NAMES_FILE).read_text(encoding="utf-8").splitlines()
IMAGE_MAX_BYTES = int(env("IMAGE_MAX_BYTES", "10000000"))
IMAGE_MAX_PIXELS = int(env("IMAGE_MAX_PIXELS", "25000000"))
IMAGE_TIMEOUT_SECONDS = float(env("IMAGE_TIMEOUT_SECONDS", "5"))
ALLOWED_IMAGE_HOSTS = set(env("ALLOWED_IMAGE_HOSTS", "").lower().replace(",", " ").split())
GATEWAY_API_KEY = env("GATEWAY_API_KEY", "")

MAX_LINKS, MAX_REDIRECTS = 16, 3
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
USAGE = f'Send {{"url": link}}, {{"urls": [up to {MAX_LINKS} links]}} or a form with a file.'
TOO_BIG = f"A picture may have {IMAGE_MAX_BYTES:,} bytes and {IMAGE_MAX_PIXELS:,} pixels."
app.config["MAX_CONTENT_LENGTH"] = IMAGE_MAX_BYTES + 65536  # a picture and the form around it
app.json.sort_keys = False  # type: ignore[attr-defined]  # classes stay in the model's order
Image.MAX_IMAGE_PIXELS = None  # decode() has a limit of its own
fetchers = ThreadPoolExecutor(32)  # its threads start with the first link, in the worker

registry = prometheus.CollectorRegistry()
IN_FLIGHT = prometheus.Gauge("gateway_in_flight", "Predictions in progress", registry=registry)
PROBLEMS = prometheus.Counter("gateway_problems", "Problems", ["cause"], registry=registry)
SECONDS = prometheus.Histogram("gateway_seconds", "Time taken", ["stage"], registry=registry)


class Problem(HTTPException):
    """An HTTP error with a cause that programs can tell apart and a sentence for people."""

    def __init__(self, status: int, cause: str, sentence: str):
        super().__init__(sentence)
        self.code, self.cause = status, cause


@app.errorhandler(HTTPException)
def answer_problem(error: HTTPException) -> Response:
    """Answer with a problem (RFC 9457), be it ours, Flask's own or a mistake in this file (500)."""
    cause = getattr(error, "cause", error.name.lower().replace(" ", "-"))
    PROBLEMS.labels(cause).inc()
    kind, title = f"tag:clothing-gateway,2026:{cause}", cause.replace("-", " ").capitalize()
    detail = TOO_BIG if error.code == 413 else error.description
    body = {"type": kind, "title": title, "status": error.code, "detail": detail}
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "2"}}.get(error.code or 0)
    response = Response(json.dumps(body), error.code, headers, "application/problem+json")
    response.allow.update(getattr(error, "valid_methods", None) or [])
    return response


@app.errorhandler(grpc.RpcError)
def answer_rpc_error(error: grpc.RpcError) -> Response:
    """Answer when the model server did not; what it said goes to the log, not to strangers."""
    app.logger.warning("The model server failed: %s, %s", error.code(), error.details())
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return answer_problem(Problem(504, "model-timeout", "The model server is too slow."))
    sentence = f"The model server gives no answer ({error.code().name}); try again soon."
    return answer_problem(Problem(503, "model-unavailable", sentence))


class Signature(NamedTuple):
    """What requests to the model must look like, and the version that said so."""

    version: int
    input_name: str
    dtype: np.dtype
    height: int
    width: int
    output_name: str


def read_signature(signature_def: tfserving.SignatureDef, version: int) -> Signature:
    """Return a signature's names, type and size; raise Problem where pictures do not fit it."""
    tensors = [*signature_def.inputs.items(), *signature_def.outputs.items()]
    shapes = [[dim.size for dim in info.tensor_shape.dim] for _, info in tensors]
    match tensors, shapes:
        case [(input_name, info), (output_name, _)], [[_, height, width, 3], [_, classes]]:
            dtype = tfserving.numpy_dtype(info.dtype)
            if dtype.kind in "fu" and min(height, width) > 0 and classes == len(CLASS_NAMES):
                return Signature(version, input_name, dtype, height, width, output_name)
    wanted = f"pictures [-1, height, width, 3] and give {len(CLASS_NAMES)} numbers"
    sentence = f"{SIGNATURE_NAME} must take {wanted}, one for each name in CLASS_NAMES_FILE"
    raise Problem(503, "model-unsuitable", f"{sentence}, but its shapes are {shapes}.")


@functools.cache
def connect() -> tuple[tfserving.PredictionServiceStub, tfserving.ModelServiceStub]:
    """Return stubs on a channel that is made on first use, after gunicorn has forked."""
    options = [
        ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_reconnect_backoff_ms", 1000),  # a server that comes back is noticed soon
        ("grpc.enable_http_proxy", 0),
    ]
    channel = grpc.insecure_channel(TF_SERVING_HOST, options)
    return tfserving.PredictionServiceStub(channel), tfserving.ModelServiceStub(channel)


@functools.cache
def get_signature() -> Signature:
    """Ask the model server what the model takes and gives; remembered until `cache_clear()`."""
    pb_request = tfserving.GetModelMetadataRequest(metadata_field=["signature_def"])
    pb_request.model_spec.name = MODEL_NAME
    stub, _ = connect()
    pb_response = stub.GetModelMetadata(pb_request, timeout=PREDICT_TIMEOUT_SECONDS)
    signatures = tfserving.SignatureDefMap.FromString(pb_response.metadata["signature_def"].value)
    signature_def = signatures.signature_def[SIGNATURE_NAME]
    return read_signature(signature_def, pb_response.model_spec.version.value)


def decode(picture: bytes) -> Image.Image:
    """Return a picture file as RGB pixels, upright and on white, or say why it cannot be."""
    if len(picture) > IMAGE_MAX_BYTES:
        raise RequestEntityTooLarge
    try:
        image: Image.Image = Image.open(BytesIO(picture), formats=IMAGE_FORMATS)
        if image.width * image.height > IMAGE_MAX_PIXELS:
            raise RequestEntityTooLarge
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except RequestEntityTooLarge:
        raise
    except Exception as error:  # broken files make Pillow raise many kinds of error
        sentence = f"This is not a picture that can be read; {', '.join(IMAGE_FORMATS)} can."
        raise Problem(415, "not-a-picture", sentence) from error


def prepare(picture: bytes, signature: Signature) -> np.ndarray:
    """Return a picture as the model takes it, [1, height, width, 3], floats scaled to -1 ... 1."""
    preprocessor = create_preprocessor("xception", target_size=(signature.width, signature.height))
    image = decode(picture)
    if signature.dtype.kind == "u":  # a model that wants plain pixels scales them itself
        return np.array(preprocessor.resize_image(image), signature.dtype)[np.newaxis]
    return preprocessor.convert_to_tensor(image).astype(signature.dtype)


def ask(pictures: list[bytes], signature: Signature) -> tfserving.PredictResponse:
    """Send all pictures to the model server in one Predict request."""
    with SECONDS.labels("decode").time():
        batch = np.concatenate([prepare(picture, signature) for picture in pictures])
    pb_request = tfserving.PredictRequest()
    pb_request.model_spec.name = MODEL_NAME
    pb_request.model_spec.signature_name = SIGNATURE_NAME
    pb_request.inputs[signature.input_name].CopyFrom(tfserving.make_tensor_proto(batch))
    stub, _ = connect()
    with SECONDS.labels("predict").time():
        return stub.Predict(pb_request, timeout=PREDICT_TIMEOUT_SECONDS)


def classify(pictures: list[bytes]) -> list[dict]:
    """Return the answer for each picture; ask twice where the model was replaced meanwhile."""
    for attempt in range(2):
        signature = get_signature()
        try:
            pb_response = ask(pictures, signature)
            if pb_response.model_spec.version.value == signature.version:
                break
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.INVALID_ARGUMENT or attempt > 0:
                raise
        get_signature.cache_clear()
    rows = tfserving.make_ndarray(pb_response.outputs[signature.output_name])
    return [describe(row, pb_response.model_spec) for row in rows.tolist()]


def open_link(url: str, timeout: float) -> requests.Response:
    """Connect, unless the address is private, and return the host's answer, its body unread."""
    prepared = requests.Request("GET", url, {"User-Agent": "clothing-gateway"}).prepare()
    parts = urlsplit(prepared.url or "")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    allowed = bool({parts.hostname, f"{parts.hostname}:{port}"} & ALLOWED_IMAGE_HOSTS)
    usual = parts.scheme in ("http", "https") and (allowed or port in (80, 443))
    if not usual or parts.username is not None:
        sentence = "A link must be http or https, to port 80 or 443, without a password"
        raise Problem(400, "link-blocked", f"{sentence}: {url:.200}")
    guard = ip_filter_adapter.IPFilterAdapter(is_https_proto=parts.scheme == "https")
    adapter = requests.adapters.HTTPAdapter() if allowed else guard
    return adapter.send(prepared, stream=True, timeout=timeout)


def read_body(response: requests.Response, deadline: float) -> bytes:
    """Return the unpacked body, counting its bytes and the time as they pass."""
    if response.status_code != 200:
        raise Problem(502, "link-failed", f"The picture's host answered {response.status_code}.")
    body = bytearray()
    while chunk := response.raw.read1(65536, decode_content=True):
        body += chunk
        if len(body) > IMAGE_MAX_BYTES:
            raise RequestEntityTooLarge
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body)


def fetch(url: str) -> bytes:
    """Return what a link and its redirects lead to, or raise Problem."""
    deadline = time.monotonic() + IMAGE_TIMEOUT_SECONDS
    try:
        for _ in range(1 + MAX_REDIRECTS):
            with open_link(url, max(deadline - time.monotonic(), 0.001)) as response:
                if not response.is_redirect:
                    return read_body(response, deadline)
                url = urljoin(url, response.headers["Location"])
    except ip_filter.InvalidIPAddress as error:
        raise Problem(400, "link-blocked", f"A link to a private address: {url:.200}") from error
    except ValueError as error:
        raise Problem(400, "link-malformed", f"No link to a picture: {url:.200}") from error
    except (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise Problem(504, "link-timeout", f"The host is too slow: {url:.200}") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise Problem(502, "link-failed", f"The host does not answer: {url:.200}") from error
    raise Problem(502, "link-failed", f"More than {MAX_REDIRECTS} redirects: {url:.200}")


def fetch_all(urls: list[str]) -> list[bytes]:
    """Return what the links lead to, all fetched at once, within IMAGE_TIMEOUT_SECONDS."""
    try:
        with SECONDS.labels("fetch").time():
            return [*fetchers.map(fetch, urls, timeout=IMAGE_TIMEOUT_SECONDS)]
    except TimeoutError as error:
        raise Problem(504, "link-timeout", "The picture's host is too slow.") from error


def describe(probabilities: list[float], model_spec: tfserving.ModelSpec) -> dict:
    """Return what the gateway says of one picture."""
    predictions = dict(zip(CLASS_NAMES, probabilities, strict=True))
    top = max(predictions, key=predictions.__getitem__)
    answer = {"predictions": predictions, "top_class": top, "top_probability": predictions[top]}
    return answer | {"model": {"name": model_spec.name, "version": model_spec.version.value}}


def check_key() -> None:
    """Raise Problem unless the request has the key, if there is one."""
    given = request.headers.get("Authorization", "").encode("latin-1")
    if GATEWAY_API_KEY and not hmac.compare_digest(given, f"Bearer {GATEWAY_API_KEY}".encode()):
        raise Problem(401, "wrong-key", "Send the header `Authorization: Bearer <the key>`.")


@app.post("/predict")
@IN_FLIGHT.track_inprogress()
@SECONDS.labels("all").time()
def predict() -> dict | list[dict]:
    """Classify the picture in an upload or behind a link, or those behind several links."""
    check_key()
    if request.mimetype == "multipart/form-data" and "file" in request.files:
        return classify([request.files["file"].read()])[0]
    match request.get_json(force=True, silent=True):
        case {"url": str(url)}:
            return classify(fetch_all([url]))[0]
        case {"urls": [str(), *_] as urls} if len(urls) <= MAX_LINKS:
            return classify(fetch_all([str(url) for url in urls]))
    raise Problem(400, "malformed-request", USAGE)


@app.get("/livez")
def livez() -> dict:
    """Answer while the process lives."""
    return {"status": "alive"}


@app.get("/readyz")
def readyz() -> dict:
    """Answer 200 while a version of the model is AVAILABLE and suits the gateway, else 503."""
    pb_request = tfserving.GetModelStatusRequest()
    pb_request.model_spec.name = MODEL_NAME
    _, stub = connect()
    pb_response = stub.GetModelStatus(pb_request, timeout=PREDICT_TIMEOUT_SECONDS)
    states = [status.state for status in pb_response.model_version_status]
    if tfserving.ModelVersionStatus.AVAILABLE not in states:
        raise Problem(503, "model-unavailable", f"No version of {MODEL_NAME} is AVAILABLE.")
    get_signature.cache_clear()
    return {"status": "ready", "model": {"name": MODEL_NAME, "version": get_signature().version}}


@app.get("/metrics")
def metrics() -> Response:
    """Answer with the counts and times that Prometheus collects."""
    text = prometheus.generate_latest(registry)
    return Response(text, mimetype=prometheus.CONTENT_TYPE_LATEST)


@app.get("/")
def index() -> Response:
    """Answer with the website."""
    return app.send_static_file("index.html")
