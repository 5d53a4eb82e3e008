"""What a model is: its name, its classes, how pictures become its input, and what it says to some.

Lesson 01's export writes this as `model.json` into the model's folder, and everybody else reads it
from there. TensorFlow Serving itself ignores the file, and its API tells names, types and shapes of
tensors, but neither classes nor scaling. So the gateway's image holds a copy, made from the
same folder as the model's image; and the first sample shows whether the two belong together.
"""

import json
from base64 import b64decode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from keras_image_helper.preprocessors import FunctionPreprocessor
from PIL import Image

from tfserving import SignatureDef, numpy_dtype

ROOT = Path(__file__).parent
BUNDLED = "build/clothing-model/1/assets.extra/model.json"
# What a model wants in place of a picture's RGB values of 0 … 255, for arrays and tensors alike.
# keras-image-helper has the first two, under the names of models that want them; the last is what
# Keras' `preprocess_input` does in its mode "torch", with ImageNet's mean and deviation.
SCALINGS: dict[str, Callable[[Any], Any]] = {
    "xception": lambda x: x / 127.5 - 1,  # -1 … 1
    "resnet50": lambda x: x[..., ::-1] - (103.939, 116.779, 123.68),  # BGR, less ImageNet's mean
    "0..1": lambda x: x / 255,
    "0..255": lambda x: x,
    "imagenet": lambda x: (x / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225),
}
RESIZINGS = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}


class Sample(NamedTuple):
    """A picture whose class is known."""

    label: str
    jpeg: bytes


class Signature(NamedTuple):
    """What requests to a served model must look like, and the version that said so."""

    name: str
    version: int
    input_name: str
    dtype: np.dtype
    height: int
    width: int
    output_name: str


class Preprocessor(FunctionPreprocessor):
    """keras-image-helper's way from a picture to an array, resized as the model wants it."""

    def __init__(self, size: tuple[int, int], scaling: str, resizing: str):
        super().__init__(size, SCALINGS[scaling])
        self.resampling = RESIZINGS[resizing]

    def resize_image(self, img: Image.Image) -> Image.Image:
        """Return the picture as RGB, in the model's size."""
        return img.convert("RGB").resize(self.target_size, self.resampling)

    def preprocess(self, X: np.ndarray) -> np.ndarray:
        """Scale RGB values of 0 … 255 as the model wants them, float32."""
        return super().preprocess(X).astype(np.float32, copy=False)


class Description(NamedTuple):
    """What `model.json` says; the gateway asks the model about the first sample when it starts."""

    name: str
    title: str
    question: str
    classes: list[str]
    height: int
    width: int
    scaling: str
    resizing: str
    samples: list[Sample]

    def preprocessor(self, size: tuple[int, int] | None = None) -> Preprocessor:
        """Return what makes arrays, float32 [1, height, width, 3], of pictures.

        `size` is (width, height), for a version of the model that wants another size.
        """
        return Preprocessor(size or (self.width, self.height), self.scaling, self.resizing)

    def read_signature(
        self, offered: Mapping[str, SignatureDef], version: int, wanted: list[str]
    ) -> Signature:
        """Return what the first wanted signature says that a model server offers.

        Raises:
            ValueError: None is offered, or pictures do not fit it; the sentence says which are.
        """
        name = next((name for name in wanted if name in offered), None)
        if name is None:
            there = ", ".join(sorted(name for name in offered if not name.startswith("__")))
            raise ValueError(
                f"The model offers {there or 'no signature'}, and none of"
                f" SIGNATURE_NAME, which is {','.join(wanted)}."
            )
        tensors = [*offered[name].inputs.items(), *offered[name].outputs.items()]
        shapes = [[dim.size for dim in info.tensor_shape.dim] for _, info in tensors]
        match tensors, shapes:
            case [(input_name, info), (output_name, _)], [[_, height, width, 3], [_, classes]]:
                dtype = numpy_dtype(info.dtype)
                if dtype.kind in "fu" and min(height, width) > 0 and classes == len(self.classes):
                    return Signature(name, version, input_name, dtype, height, width, output_name)
        raise ValueError(
            f"{name} must take pictures [-1, height, width, 3] and give {len(self.classes)}"
            f" numbers, one for each class of {self.name}, but its shapes are {shapes}."
        )


def read(path: str | Path) -> Description:
    """Read a model's description; relative paths begin at the repository's root.

    Raises:
        ValueError: There is no such file, or it says something else; the sentence says what.
    """
    try:
        said = json.loads((ROOT / path).read_text(encoding="utf-8"))
        samples = [Sample(each["class"], b64decode(each["jpeg"])) for each in said["samples"]]
        description = Description(**said | {"samples": samples})
        usable = {*description.classes} >= {sample.label for sample in samples}
    except FileNotFoundError:
        raise ValueError(
            f"There is no {path}: lesson 01 writes it (make workbook ONLY=01), and"
            " MODEL_DESCRIPTION can name another one."
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no description of a model: {error!r}") from None
    names = {**SCALINGS, **RESIZINGS}
    if not {description.scaling, description.resizing} <= names.keys() or not usable:
        raise ValueError(
            f"{path} must have a scaling of {', '.join(SCALINGS)}, a resizing of"
            f" {' or '.join(RESIZINGS)}, and a class for every sample."
        )
    return description
