"""The gateway: a picture comes in over HTTP, the probabilities of its classes go out as JSON.

It is made of the cells tagged `gateway` in notebooks/04-flask-gateway.ipynb; change it there.
"""

import functools
import os
import time
from contextlib import closing
from typing import Any

import grpc
import numpy as np
from flask import Response, g, request

import description
import links
import pictures
import tfserving
import web
from description import Signature
from web import Problem

env = os.environ.get
TF_SERVING_HOST = env("TF_SERVING_HOST", "localhost:8500")
SIGNATURE_NAME = env("SIGNATURE_NAME", "serving_uint8,serving_default")  # the first there is
PREDICT_TIMEOUT_SECONDS = float(env("PREDICT_TIMEOUT_SECONDS", "20"))
MODEL = description.read(env("MODEL_DESCRIPTION", description.BUNDLED))
MODEL_NAME = env("MODEL_NAME", MODEL.name)


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
    offered = tfserving.SignatureDefMap.FromString(pb_response.metadata["signature_def"].value)
    version = pb_response.model_spec.version.value
    try:
        signature = MODEL.read_signature(offered.signature_def, version, SIGNATURE_NAME.split(","))
    except ValueError as error:
        raise Problem(503, "model-unsuitable", str(error)) from None
    web.MODEL_VERSION.set(version)
    return signature


def prepare(files: list[web.File], signature: Signature, deadline: float) -> np.ndarray:
    """Return the pictures in files as the model takes them, [number, height, width, 3]."""
    preprocessor = MODEL.preprocessor((signature.width, signature.height))
    images = pictures.read_pictures(files, preprocessor, deadline)
    if signature.dtype.kind == "u":  # a model that wants plain pixels scales them itself
        return np.stack([np.array(image, signature.dtype) for image in images])
    tensors = [preprocessor.convert_to_tensor(image) for image in images]
    return np.concatenate(tensors).astype(signature.dtype)


def ask(batch: np.ndarray, signature: Signature, deadline: float) -> tfserving.PredictResponse:
    """Send prepared pictures to the model server in one Predict request."""
    pb_request = tfserving.PredictRequest()
    pb_request.model_spec.name = MODEL_NAME
    pb_request.model_spec.signature_name = signature.name
    pb_request.inputs[signature.input_name].CopyFrom(tfserving.make_tensor_proto(batch))
    stub, _ = connect()
    left, metadata = deadline - time.monotonic(), [("x-request-id", g.id)]
    return stub.Predict(pb_request, timeout=left, metadata=metadata)


# What a model server says to requests that were made for another version of the model.
OUTDATED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


def classify(files: list[web.File], deadline: float) -> list[dict]:
    """Return each file's answer, or its problem; ask twice if the model was replaced meanwhile."""
    for attempt in range(2):
        signature = get_signature()
        with web.stage("decode"):
            batch = prepare(files, signature, deadline)
        try:
            with web.stage("predict"):
                pb_response = ask(batch, signature, deadline)
            if pb_response.model_spec.version.value == signature.version:
                break
        except grpc.RpcError as error:
            if error.code() not in OUTDATED or attempt > 0:
                raise
        get_signature.cache_clear()
    rows = tfserving.make_ndarray(pb_response.outputs[signature.output_name])
    answers = [describe(row, pb_response.model_spec) for row in rows.tolist()]
    return web.fill_in(answers, files)


def read_files(body: Any) -> list[web.File]:
    """Return the pictures that a request holds, links to or names."""
    if (file := web.find_upload()) is not None:
        with closing(file):  # a large one has waited in a file
            return [file.read()]
    match body:
        case {"sample": str(label)} if label in (known := dict(MODEL.samples)):
            return [known[label]]
        case {"url": str(url)} if "urls" not in body:
            urls = [url]
        case {"urls": [str(), *_] as several} if len(several) <= web.MAX_LINKS:
            urls = [str(url) for url in several]
        case _:
            raise web.malformed(body)
    with web.stage("fetch"):
        return links.fetch_all(urls)


def describe(probabilities: list[float], model_spec: tfserving.ModelSpec) -> dict:
    """Return what the gateway says of one picture."""
    predictions = dict(zip(MODEL.classes, probabilities, strict=True))
    top = max(predictions, key=predictions.__getitem__)
    answer = {"predictions": predictions, "top_class": top, "top_probability": predictions[top]}
    return answer | {"model": {"name": model_spec.name, "version": model_spec.version.value}}


def answer(body: Any) -> list[dict]:
    """Classify the pictures of a request, unless too many are being answered already."""
    with web.admit(is_batch="urls" in body):
        files, deadline = read_files(body), time.monotonic() + PREDICT_TIMEOUT_SECONDS
        answers = classify(files, deadline)
        if body.get("preview"):
            pictures.add_previews(answers, files, deadline)
        return [each | {"seconds": web.rounded(g.seconds)} for each in answers]


def predict() -> dict | list[dict]:
    """Classify the picture in an upload or behind a link, or those behind several links."""
    web.check_caller(request.headers.get("Authorization", "").encode("latin-1"))
    body = web.read_body()
    answers = answer(body)
    return answers if "urls" in body else answers[0]


def index() -> Response:
    """Answer with the website; where there is no JavaScript, its form is sent here."""
    return web.answer_page(answer, model=MODEL, formats=pictures.IMAGE_FORMATS)


@functools.cache
def check_sample() -> None:
    """Ask once about a picture whose class is known; raise Problem where the model errs."""
    for sample in MODEL.samples[:1]:
        signature, deadline = get_signature(), time.monotonic() + PREDICT_TIMEOUT_SECONDS
        pb_response = ask(prepare([sample.jpeg], signature, deadline), signature, deadline)
        row = tfserving.make_ndarray(pb_response.outputs[signature.output_name])[0]
        if (top := MODEL.classes[row.argmax()]) != sample.label:
            how = f"says {top} to its own sample, {sample.label}: is another model served"
            sentence = f"{MODEL_NAME} {how}, or one that wants pictures scaled differently?"
            raise Problem(503, "model-unsuitable", sentence)


def readyz() -> dict:
    """Answer 200 while a version of the model is AVAILABLE and suits the gateway, else 503."""
    if web.stopping.is_set():
        raise Problem(503, "stopping", "This gateway is about to end; ask another one.")
    pb_request = tfserving.GetModelStatusRequest()
    pb_request.model_spec.name = MODEL_NAME
    _, stub = connect()
    pb_response = stub.GetModelStatus(pb_request, timeout=min(PREDICT_TIMEOUT_SECONDS, 2))
    states = [status.state for status in pb_response.model_version_status]
    if tfserving.ModelVersionStatus.AVAILABLE not in states:
        raise Problem(503, "model-unavailable", f"No version of {MODEL_NAME} is AVAILABLE.")
    get_signature.cache_clear()
    check_sample()
    return {"status": "ready", "model": {"name": MODEL_NAME, "version": get_signature().version}}


def livez() -> dict:
    """Answer while the process lives."""
    return {"status": "alive"}


app = web.create_app(MODEL, MODEL_NAME)
app.add_url_rule("/", view_func=index, methods=["GET", "POST"])
app.add_url_rule("/predict", view_func=predict, methods=["POST"])
app.add_url_rule("/livez", view_func=livez)
app.add_url_rule("/readyz", view_func=readyz)
