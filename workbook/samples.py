"""Pictures whose classes are known, which tell a right scaling from a wrong one.

A model that gets its pictures scaled differently from training does not fail, it errs.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from PIL import Image, ImageOps

from description import SCALINGS, Preprocessor

MOST, SIDE = 10, 320  # as many samples at most travel with a model, each as small as this


class Answers(NamedTuple):
    """What a model says to the samples, by the right answers, and how sure it is of these."""

    said: dict[str, str]
    sure: float


def load(folder: str | Path, class_names: list[str]) -> dict[str, bytes]:
    """Return a small JPEG for each class of which the folder has a picture, at most ten.

    Raises:
        ValueError: No picture is named after a class.
    """
    files = {path.stem: path for path in Path(folder).iterdir()}
    labels = [name for name in class_names if name in files][:MOST]
    if not labels:
        example = f"{class_names[0]}.jpg"
        raise ValueError(f"No picture in {folder} is named after a class, as {example} would be.")
    return {label: jpeg_of(files[label]) for label in labels}


def jpeg_of(path: Path) -> bytes:
    """Return a picture as a JPEG of at most 320 × 320 pixels."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    image.thumbnail((SIDE, SIDE))
    image.save(stream := BytesIO(), "JPEG", quality=90)
    return stream.getvalue()


def pixels_of(samples: dict[str, bytes], preprocessor: Preprocessor) -> np.ndarray:
    """Return the samples in the model's size, uint8 [number, height, width, 3]."""
    images = (Image.open(BytesIO(jpeg)) for jpeg in samples.values())
    return np.stack([np.asarray(preprocessor.resize_image(image)) for image in images])


def ask(
    probabilities: Callable[[np.ndarray], np.ndarray],
    samples: dict[str, bytes],
    class_names: list[str],
    preprocessor: Preprocessor,
) -> dict[str, Answers]:
    """Ask a model about the samples in every scaling; `probabilities` takes a batch of pictures."""
    pixels, answers = pixels_of(samples, preprocessor).astype(np.float32), {}
    labels = [class_names.index(label) for label in samples]
    for scaling in SCALINGS:
        rows = probabilities(np.asarray(SCALINGS[scaling](pixels), np.float32))
        said = [class_names[number] for number in rows.argmax(axis=1)]
        sure = float(rows[range(len(labels)), labels].mean())
        answers[scaling] = Answers(dict(zip(samples, said, strict=True)), sure)
    return answers


def check(model: keras.Model, answers: dict[str, Answers], scaling: str) -> None:
    """Raise ValueError, with a sentence, where a model wants another scaling than this.

    Some models scale pictures themselves, with a layer for it. They want the values as they are.
    That another scaling makes a model surer proves nothing: large values alone do that.
    """
    scalers = (keras.layers.Rescaling, keras.layers.Normalization)
    inside = [layer.name for layer in layers_of(model) if isinstance(layer, scalers)]
    if inside and scaling != "0..255":
        raise ValueError(
            f"The model scales pictures itself, in {', '.join(inside)}: set SCALING to '0..255'."
        )
    wrong = {label: said for label, said in answers[scaling].said.items() if label != said}
    if wrong:
        raise ValueError(
            f"The model errs about samples, {wrong}. Is SCALING, {scaling}, what it was trained"
            " with? If it is, put pictures into SAMPLES that it knows."
        )
    if scaling == "0..255" and not inside:
        print("No layer of the model scales pictures. Was it really trained on values of 0 … 255?")


def layers_of(model: keras.Model) -> list[keras.Layer]:
    """Return the layers of a model and of those inside it."""
    nested = [layers_of(each) if isinstance(each, keras.Model) else [each] for each in model.layers]
    return [layer for layers in nested for layer in layers]
