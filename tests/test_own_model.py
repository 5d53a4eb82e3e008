"""Models of other kinds go through lesson 01 to an unchanged gateway, or get a clear no."""

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest
import requests
from conftest import export
from helpers.basics import ROOT
from helpers.servers import Server
from helpers.serving import Client
from keras import layers
from PIL import Image

import description
from workbook import folding

COLOURS = {"fire red": (220, 30, 20), "lawn green": (40, 200, 40), "Königsblau": (30, 60, 200)}


class Kind(NamedTuple):
    """How a model is made, and what lesson 01 is told of it."""

    build: Callable[[], keras.Model]
    suffix: str = ".keras"
    scaling: str = "xception"
    resizing: str = "nearest"
    classes: tuple[str, ...] = tuple(COLOURS)


def by_colour(side: int, *before: keras.Layer, factor: float = 20, channels: str = "RGB"):
    """A model that gives three logits, the means of the channels times a factor."""
    mean = [layers.GlobalAveragePooling2D(), layers.Dense(3)]
    model = keras.Sequential([keras.Input((side, side, 3)), *before, *mean])
    order = [channels.index(letter) for letter in "RGB"]
    model.layers[-1].set_weights([factor * np.eye(3)[:, np.argsort(order)], np.zeros(3)])
    return model


def mobilenet() -> keras.Model:
    """Probabilities from a backbone with random weights and from the colours, which decide."""
    keras.utils.set_random_seed(1)
    backbone = keras.applications.MobileNetV2((160, 160, 3), weights=None, include_top=False)
    inputs = keras.Input((160, 160, 3))
    features = layers.Dense(3)(layers.GlobalAveragePooling2D()(backbone(inputs)))
    colours = layers.Dense(3, name="colours")(layers.GlobalAveragePooling2D()(inputs))
    model = keras.Model(inputs, layers.Softmax()(layers.Add()([features, colours])))
    model.get_layer("colours").set_weights([20 * np.eye(3), np.zeros(3)])
    return model


def sigmoid() -> keras.Model:
    """One number: how likely blue is, rather than red."""
    mean = [layers.GlobalAveragePooling2D(), layers.Dense(1, "sigmoid")]
    model = keras.Sequential([keras.Input((48, 48, 3)), *mean])
    model.layers[-1].set_weights([np.array([[-3.0], [0], [3]]), np.zeros(1)])
    return model


MEAN = {"depthwise_initializer": keras.initializers.Constant(1 / 9)}
KINDS = {
    "mobilenet-160": Kind(mobilenet),
    "logits-64": Kind(lambda: by_colour(64, layers.DepthwiseConv2D(3, **MEAN), layers.ReLU())),
    "scales-inside": Kind(lambda: by_colour(64, layers.Rescaling(1 / 255)), scaling="0..255"),
    "old-h5": Kind(partial(by_colour, 64), suffix=".h5", scaling="0..1"),
    "two-in-one": Kind(sigmoid, classes=("fire red", "Königsblau")),
    "averaged": Kind(partial(by_colour, 50), scaling="imagenet", resizing="bilinear"),
    "caffe": Kind(partial(by_colour, 50, factor=0.1, channels="BGR"), scaling="resnet50"),
}
USUAL, THOROUGH = {"logits-64", "two-in-one", "averaged"}, pytest.mark.thorough
Exported = tuple[keras.Model, Path]


def picture(name: str, size: tuple[int, int] = (300, 200)) -> bytes:
    """A PNG of one of the colours, with some noise on it."""
    noise = np.random.default_rng(len(name)).normal(0, 30, [*size[::-1], 3])
    pixels = np.clip(COLOURS[name] + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(stream := BytesIO(), "PNG")
    return stream.getvalue()


def parameters_for(folder: Path, model: keras.Model, kind: Kind) -> dict[str, str]:
    """Write what lesson 01 needs of a model to a folder; return its parameters."""
    (folder / "samples").mkdir(parents=True)
    model.save(folder / f"model{kind.suffix}")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in kind.classes), "utf-8")
    for name in kind.classes:
        (folder / f"samples/{name}.png").write_bytes(picture(name))
    return {
        "MODEL_FILE": str(folder / f"model{kind.suffix}"),
        "CLASSES_FILE": str(folder / "classes.txt"),
        "SAMPLES": str(folder / "samples"),
        "SCALING": kind.scaling,
        "RESIZING": kind.resizing,
        "TITLE": "",
        "QUESTION": "",
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Give a kind's model and the base path of its export, which is made once."""

    @cache
    def export_kind(name: str) -> Exported:
        folder, model = tmp_path_factory.mktemp(name), KINDS[name].build()
        parameters = parameters_for(folder / "given", model, KINDS[name])
        return model, export(folder / name, **parameters)

    return export_kind


@pytest.fixture(scope="module")
def serve_too(
    model_server: Server, tiny_model: Path, exported: Callable[[str], Exported]
) -> Iterator[Callable[[str], Server]]:
    """Have the model server serve one more kind, under its own name."""
    with Client(model_server, "clothing-model") as client:
        paths = {client.model_name: tiny_model}

        def serve(name: str) -> Server:
            paths[name] = exported(name)[1]
            client.reload(paths)
            return model_server

        yield serve
        client.serve(tiny_model)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in USUAL else THOROUGH) for name in KINDS]
)
def test_a_model_of_another_kind_drops_in(
    name: str,
    exported: Callable[[str], Exported],
    serve_too: Callable[[str], Server],
    start_gateway: Callable[..., Server],
) -> None:
    """The gateway is told where the description is, and nothing else."""
    model, base_path = exported(name)
    file, kind = base_path / "1/assets.extra/model.json", KINDS[name]
    gateway = start_gateway(serve_too(name).grpc, MODEL_DESCRIPTION=str(file))
    ready = requests.get(f"{gateway.http}/readyz", timeout=60)
    assert ready.ok, ready.text
    about = description.read(file)
    assert about.question == "What does this picture show?"
    for label in kind.classes:
        upload = {"file": picture(label, size=(123, 234))}
        answer = requests.post(f"{gateway.http}/predict", files=upload, timeout=60).json()
        assert list(answer["predictions"]) == list(kind.classes)
        assert answer["top_class"] == label
        with Image.open(BytesIO(upload["file"])) as image:
            row = model.predict(about.preprocessor().convert_to_tensor(image), verbose=0)
        if name == "two-in-one":
            row = np.concatenate([1 - row, row], axis=1)
        elif name != "mobilenet-160":
            row = keras.ops.convert_to_numpy(keras.ops.softmax(row))
        np.testing.assert_allclose(list(answer["predictions"].values()), row[0], atol=1e-5)


def test_a_model_comes_by_a_link_with_its_checksum(tmp_path: Path) -> None:
    kind = KINDS["logits-64"]
    parameters = parameters_for(tmp_path / "given", kind.build(), kind)
    file = Path(parameters["MODEL_FILE"])
    linked = file.rename(tmp_path / f"linked-{tmp_path.name}.keras")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        link = {"MODEL_URL": f"http://127.0.0.1:{server.server_port}/{linked.name}"}
        with pytest.raises(AssertionError, match="MODEL_URL needs MODEL_SHA256"):
            export(tmp_path / "model", **parameters, **link)
        link["MODEL_SHA256"] = hashlib.sha256(linked.read_bytes()).hexdigest()
        export(tmp_path / "model", **parameters, **link)
        server.shutdown()
    (ROOT / "build/datasets" / linked.name).unlink()
    assert (tmp_path / "model/1/saved_model.pb").is_file()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            Kind(lambda: by_colour(64, layers.Rescaling(1 / 255, name="shrink"))),
            "The model scales pictures itself, in shrink: set SCALING to '0..255'",
        ),
        (
            Kind(lambda: by_colour(64, keras.Sequential([layers.Normalization(name="norm")]))),
            "The model scales pictures itself, in norm: set SCALING to '0..255'",
        ),
        (
            Kind(partial(by_colour, 64, channels="BGR")),
            "The model errs about samples",
        ),
        (
            Kind(lambda: keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten()])),
            r"This model takes \(None, 28, 28, 1\), and the gateway sends RGB pictures",
        ),
        (
            Kind(partial(by_colour, 64), classes=("fire red", "Königsblau")),
            "classes.txt does not fit the model",
        ),
        (
            Kind(lambda: keras.Sequential([by_colour(64), layers.Activation("sigmoid")])),
            "This model gives each class a number of its own",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(kind, sentence, tmp_path: Path) -> None:
    parameters = parameters_for(tmp_path / "given", kind.build(), kind)
    with pytest.raises((AssertionError, ValueError), match=sentence):
        export(tmp_path / "model", **parameters)
    assert not (tmp_path / "model/1").exists()


@pytest.mark.parametrize(("signature", "rank"), [("serving_uint8", 4), ("serving_bytes", 3)])
def test_a_signature_that_scales_differently_fails_the_checkpoint(
    signature: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when somebody drops the scaling from one of the graph's two ways to the floats."""
    model = by_colour(64, factor=1)
    parameters = parameters_for(tmp_path / "given", model, KINDS["logits-64"])

    def scale(x):
        return x if not isinstance(x, np.ndarray) and len(x.shape) == rank else x / 127.5 - 1

    monkeypatch.setitem(description.SCALINGS, "xception", scale)
    with pytest.raises(AssertionError, match=f"{signature} differs from Keras"):
        export(tmp_path / "model", **parameters)


def test_folding_keeps_the_function(tmp_path: Path) -> None:
    """Every kind of layer that can be folded, with statistics that matter."""
    keras.utils.set_random_seed(2)
    chain = [
        *(layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU()),
        *(layers.DepthwiseConv2D(3, depth_multiplier=2), layers.BatchNormalization(scale=False)),
        *(layers.SeparableConv2D(6, 3, use_bias=False), layers.BatchNormalization(center=False)),
        *(layers.GlobalAveragePooling2D(), layers.Dense(5), layers.BatchNormalization()),
    ]
    model = keras.Sequential([keras.Input((24, 24, 3)), *chain])
    rng = np.random.default_rng(3)
    model.set_weights([rng.uniform(0.5, 1.5, weights.shape) for weights in model.get_weights()])
    lean = folding.fold(model)
    assert not [each for each in lean.layers if isinstance(each, layers.BatchNormalization)]
    inputs = rng.uniform(-1, 1, [4, 24, 24, 3]).astype(np.float32)
    wanted = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(lean.predict(inputs, verbose=0), wanted, rtol=1e-4)


def test_a_description_that_cannot_be_used_is_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    with pytest.raises(ValueError, match="lesson 01 writes it"):
        description.read(file)
    said = {"name": "m", "title": "", "question": "", "classes": ["a"], "height": 1, "width": 1}
    said |= {"scaling": "xception", "resizing": "nearest", "samples": []}
    file.write_text(json.dumps(said))
    assert description.read(file).classes == ["a"]
    wrongs: list[object] = [
        said | {"scaling": "loud"},
        said | {"samples": [{"class": "b", "jpeg": ""}]},
        {name: value for name, value in said.items() if name != "title"},
        [],
    ]
    for wrong in wrongs:
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"model\.json (must have|is no description)"):
            description.read(file)
