"""One process in place of two tiers: FastAPI, and the model in ONNX Runtime or LiteRT beside it.

ONNX_THREADS=0 MODEL=build/clothing-model.onnx uvicorn bench.peers.fastapi_app:app
"""

import os
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from fastapi import FastAPI, UploadFile
from PIL import Image
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
classes = Path("model_server/classes.txt").read_text().split()
app = FastAPI()

if MODEL.endswith(".onnx"):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["ONNX_THREADS"])  # 0: on all cores
    session = onnxruntime.InferenceSession(MODEL, options)

    def run(pixels: np.ndarray) -> np.ndarray:
        """Scale pixels as the model was trained, and return the probabilities."""
        inputs = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
        return session.run(["probabilities"], {"inputs": inputs})[0]

else:
    from bench.peers.lite import Lite

    run = Lite(MODEL)


class Link(BaseModel):
    """The body of a request."""

    url: str


def classify(picture: bytes) -> dict:
    """Prepare a picture as the model was trained, and run it here."""
    image = Image.open(BytesIO(picture)).convert("RGB").resize((224, 224), Image.Resampling.NEAREST)
    probabilities = run(np.array(image)[np.newaxis])[0].tolist()
    return {"predictions": dict(zip(classes, probabilities, strict=True))}


@app.post("/predict")
def predict(link: Link) -> dict:
    """Classify the picture behind a link."""
    with urlopen(link.url) as response:
        return classify(response.read())


@app.post("/upload")
def upload(file: UploadFile) -> dict:
    """Classify an uploaded picture."""
    return classify(file.file.read())
