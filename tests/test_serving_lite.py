"""TensorFlow Lite models: what --prefer_tflite_model serves, without TensorFlow."""

import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import requests
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import Builder, flexbuffers
from helpers.basics import free_port
from helpers.model_server import run_main, serving
from helpers.servers import Server, wait_until_available
from helpers.serving import Client, refused
from tensorflow_serving.apis import get_model_metadata_pb2

from model_server import saved_model
from tfserving import messages_pb2 as pb

Code = grpc.StatusCode


class Model(tf.Module):
    """Two signatures with graphs of their own: ``x / 2 + offset``, and the same of bytes."""

    def __init__(self, offset: float):
        super().__init__()
        self.offset = tf.constant(offset)

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, "x")])
    def serving_default(self, x: Any) -> dict[str, Any]:
        return {"y": x / 2 + self.offset, "doubled": x * 2}

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.uint8, "pixels")])
    def serving_uint8(self, pixels: Any) -> dict[str, Any]:
        return {"y": tf.cast(pixels, tf.float32) / 2 + self.offset}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel that adds 2, with a TensorFlow Lite model beside it that adds 3."""
    base_path = tmp_path_factory.mktemp("lite")
    for offset in (3.0, 2.0):
        model = Model(offset)
        signatures = {name: getattr(model, name) for name in ("serving_default", "serving_uint8")}
        tf.saved_model.save(model, base_path / "1", signatures=signatures)
        if offset == 3:
            converter = tf.lite.TFLiteConverter.from_saved_model(str(base_path / "1"))
            content = converter.convert()
    (base_path / "1/model.tflite").write_bytes(content)
    return base_path


@pytest.fixture(scope="module")
def client(exported: Path) -> Iterator[Client]:
    flags = ("--model_name=lite", f"--model_base_path={exported}", "--prefer_tflite_model")
    with serving(*flags) as server, Client(server, "lite") as client:
        yield client


def rows(*values: float) -> np.ndarray:
    return np.array([[value] * 3 for value in values], np.float32)


def answer(client: Client, signature_name: str = "", **inputs: np.ndarray) -> np.ndarray:
    return tf.make_ndarray(client.predict(signature_name, **inputs).outputs["y"])


def test_the_lite_model_answers_where_it_is_preferred_and_there(exported: Path, tmp_path: Path):
    shutil.copytree(exported / "1", tmp_path / "other/1")
    (tmp_path / "other/1/model.tflite").unlink()
    for base_path, flags, expected in [
        (exported, ["--prefer_tflite_model=true"], 5),
        (exported, [], 4),
        (tmp_path / "other", ["--prefer_tflite_model=true"], 4),
    ]:
        with serving("--model_name=lite", f"--model_base_path={base_path}", *flags) as server:
            body = {"instances": rows(4).tolist()}
            said = requests.post(f"{server.http}/v1/models/lite:predict", json=body).json()
            assert said["predictions"][0]["y"] == [expected] * 3


def test_every_signature_has_its_own_graph_and_any_number_of_rows(client: Client):
    assert answer(client, x=rows(4, 8, 0)).tolist() == rows(5, 7, 3).tolist()
    assert (
        answer(client, "serving_uint8", pixels=rows(4).astype(np.uint8)).tolist()
        == rows(5).tolist()
    )
    request = client.request(x=rows(4))
    request.output_filter.append("doubled")
    outputs = client.prediction.Predict(request).outputs
    assert list(outputs) == ["doubled"]
    assert tf.make_ndarray(outputs["doubled"]).tolist() == rows(8).tolist()


def test_metadata_says_names_types_and_free_sizes(client: Client):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "lite"
    signatures = get_model_metadata_pb2.SignatureDefMap()
    client.prediction.GetModelMetadata(request).metadata["signature_def"].Unpack(signatures)
    assert {*signatures.signature_def} == {"serving_default", "serving_uint8"}
    signature = signatures.signature_def["serving_uint8"]
    assert signature.method_name == "tensorflow/serving/predict"
    info = signature.inputs["pixels"]
    assert (info.dtype, [dim.size for dim in info.tensor_shape.dim]) == (tf.uint8, [-1, 3])
    assert signature.outputs["y"].dtype == tf.float32


@pytest.mark.parametrize(
    ("signature_name", "inputs", "code", "details"),
    [
        ("", {"x": np.zeros([1, 4], "float32")}, Code.INVALID_ARGUMENT, "has shape [1, 4]"),
        ("", {"x": np.zeros([1, 3], "uint8")}, Code.INVALID_ARGUMENT, "to be float but uint8"),
        ("", {"pixels": rows(1)}, Code.INVALID_ARGUMENT, "alias: x not found in request"),
        ("serving_bytes", {"x": rows(1)}, Code.FAILED_PRECONDITION, '"serving_bytes" not found'),
    ],
)
def test_wrong_requests_have_the_status_of_a_saved_model(
    client: Client, signature_name: str, inputs: dict, code: grpc.StatusCode, details: str
):
    got, said = refused(lambda: client.predict(signature_name, **inputs))
    assert got == code
    assert details in said


def test_many_clients_get_their_own_answers(client: Client):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: answer(client, x=rows(n, n + 1)), range(200)))
    for n, each in enumerate(answers):
        assert each.tolist() == rows(n / 2 + 3, (n + 1) / 2 + 3).tolist()


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_tflite_pools=1", "--num_tflite_interpreters_per_pool=100"],
        ["--enable_batching=true"],
    ],
    ids=["shared", "batched"],
)
def test_rows_may_be_merged_and_shared_out(exported: Path, flags: list[str]):
    own = ("--model_name=lite", f"--model_base_path={exported}", "--prefer_tflite_model")
    with serving(*own, *flags) as server, Client(server, "lite") as client:
        many = np.arange(60, dtype=np.float32).reshape(20, 3)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: answer(client, x=many), range(16)))
    assert all(each.tolist() == (many / 2 + 3).tolist() for each in answers)


def rewritten(content: bytes, change: Callable[[schema.ModelT], None]) -> bytes:
    """Change a TensorFlow Lite file by way of its schema."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content))
    change(model)
    builder = Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def without_signatures(model: schema.ModelT) -> None:
    """Leave what converters wrote before there were signatures."""
    model.signatureDefs = []
    model.subgraphs = model.subgraphs[:1]
    (given,) = model.subgraphs[0].inputs
    tensor = model.subgraphs[0].tensors[given]
    tensor.name = tensor.name.partition(b":")[0]


def with_signatures_of_tensorflow_serving(model: schema.ModelT) -> None:
    """Name the main graph's tensors as TensorFlow Serving reads it: in the file's metadata."""
    without_signatures(model)
    graph = model.subgraphs[0]
    signature = pb.SignatureDef(method_name="tensorflow/serving/predict")
    for side, alias, index, suffix in (
        (signature.inputs, "given", graph.inputs[0], ":0"),
        (signature.outputs, "y", graph.outputs[0], ""),
        (signature.outputs, "z", graph.outputs[1], ""),
    ):
        side[alias].name = graph.tensors[index].name.decode() + suffix
        side[alias].dtype = pb.DT_FLOAT
    builder = flexbuffers.Builder()
    with builder.Map():
        builder.Key("custom")
        builder.String(signature.SerializeToString().decode())
    buffer, metadata = schema.BufferT(), schema.MetadataT()
    buffer.data = builder.Finish()
    metadata.name, metadata.buffer = b"signature_defs_metadata", len(model.buffers)
    model.buffers.append(buffer)
    model.metadata.append(metadata)


def test_a_file_without_signatures_offers_its_tensors(exported: Path, tmp_path: Path):
    content = (exported / "1/model.tflite").read_bytes()
    (tmp_path / "1").mkdir()
    (tmp_path / "1/model.tflite").write_bytes(rewritten(content, without_signatures))
    flags = ("--model_name=old", f"--model_base_path={tmp_path}", "--prefer_tflite_model")
    with serving(*flags) as server, Client(server, "old") as client:
        url = f"{server.http}/v1/models/old/metadata"
        signatures = requests.get(url).json()["metadata"]["signature_def"]["signature_def"]
        assert [*signatures] == ["serving_default"]
        (name,) = signatures["serving_default"]["inputs"]
        assert name == "serving_default_x"
        answers = client.predict("", **{name: rows(4, 2)}).outputs.values()
        assert [5, 4] in [tf.make_ndarray(each)[:, 0].tolist() for each in answers]


def test_signatures_are_read_where_tensorflow_serving_reads_them(exported: Path, tmp_path: Path):
    content = (exported / "1/model.tflite").read_bytes()
    (tmp_path / "1").mkdir()
    changed = rewritten(content, with_signatures_of_tensorflow_serving)
    (tmp_path / "1/model.tflite").write_bytes(changed)
    flags = ("--model_name=own", f"--model_base_path={tmp_path}", "--prefer_tflite_model")
    with serving(*flags) as server, Client(server, "own") as client:
        outputs = client.predict("custom", given=rows(4, 2)).outputs
        found = sorted(tf.make_ndarray(each)[:, 0].tolist() for each in outputs.values())
        assert found == [[5, 4], [8, 4]]
        code, _ = refused(lambda: client.predict("serving_default", given=rows(4)))
        assert code == Code.FAILED_PRECONDITION


def test_a_broken_file_is_said_and_not_served(tmp_path: Path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1/model.tflite").write_bytes(b"no model" * 100)
    outcome = run_main(
        *("--port=0", f"--model_base_path={tmp_path}", "--prefer_tflite_model"),
        *("--max_num_load_retries=0", "--rest_api_port=0"),
    )
    assert outcome.status == 1
    assert "1/model.tflite: LiteRT cannot run it: " in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_without_tensorflow_a_saved_model_is_refused_with_the_remedy(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    for name in ("1", "new"):
        shutil.copytree(exported / "1", tmp_path / name)
    (tmp_path / "new/model.tflite").unlink()
    flags = ("--model_name=lite", f"--model_base_path={tmp_path}", "--prefer_tflite_model")
    with serving(*flags) as server, Client(server, "lite") as client:
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "tensorflow", None)
            saved_model.import_tensorflow.cache_clear()
            (tmp_path / "new").rename(tmp_path / "2")
            status = client.error_of(2)
        assert status.error_code == Code.FAILED_PRECONDITION.value[0]
        for said in (status.error_message, caplog.text):
            assert "a SavedModel needs TensorFlow, which is not installed here" in said
            assert "--build-arg WITH_TENSORFLOW=1" in said
        assert client.states() == {2: "END", 1: "AVAILABLE"}
        assert answer(client, x=rows(4)).tolist() == rows(5).tolist()


def test_tensorflow_stays_out_of_the_process(exported: Path, launch: Callable[..., Server]):
    ports = free_port(), free_port()
    command = [sys.executable, "-m", "model_server", "--prefer_tflite_model", "--model_name=lite"]
    command += [
        f"--model_base_path={exported}",
        f"--port={ports[0]}",
        f"--rest_api_port={ports[1]}",
    ]
    server = launch(command, f"http://127.0.0.1:{ports[1]}", f"127.0.0.1:{ports[0]}")
    wait_until_available(server, "lite")
    with Client(server, "lite") as client:
        outputs = client.prediction.Predict(client.request(x=rows(4)), timeout=60).outputs
        assert tf.make_ndarray(outputs["y"]).tolist() == rows(5).tolist()
        body = {"instances": rows(*range(20_000)).tolist()}  # long enough for a helper process
        assert requests.post(f"{server.http}/v1/models/lite:predict", json=body).ok
        own = psutil.Process(server.process.pid)
        helpers = own.children(recursive=True)
        assert helpers
        for process in [own, *helpers]:
            assert not [each.path for each in process.memory_maps() if "tensorflow" in each.path]
    server.stop()
