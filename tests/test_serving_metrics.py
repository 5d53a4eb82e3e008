"""The metrics that the embedded model server offers to Prometheus."""

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, Server, free_port
from prometheus_client.parser import text_string_to_metric_families
from tensorflow_serving.apis import (
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)

PATH = "/monitoring/prometheus/metrics"
SERVING = ":tensorflow:serving:"
GRPC_PREDICT = 'model_name="tiny",API="Predict",entrypoint="GRPC"'


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("monitoring") / "monitoring.txt"
    file.write_text("prometheus_config { enable: true }")
    return file


@pytest.fixture(scope="module")
def warm_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with one request to warm it up."""
    base_path = tmp_path_factory.mktemp("warm")
    shutil.copytree(tiny_model / "1", base_path / "1")
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.CopyFrom(predict_request())
    extra = base_path / "1/assets.extra"
    extra.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(extra / "tf_serving_warmup_requests")) as writer:
        writer.write(log.SerializeToString())
    return base_path


@pytest.fixture
def server(
    warm_model: Path, config: Path, start_model_server: Callable[..., Server]
) -> Iterator[Server]:
    server = start_model_server(
        warm_model,
        *(f"--monitoring_config_file={config}", "--enable_batching"),
        model_name="tiny",
    )
    yield server
    server.stop()


def predict_request(name: str = "tiny", size: int = 32) -> Any:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = name
    request.inputs["inputs"].CopyFrom(
        tf.make_tensor_proto(np.zeros([2, size, size, 3], np.float32))
    )
    return request


def page(server: Server, path: str = PATH) -> str:
    with urllib.request.urlopen(server.http + path) as response:
        assert response.headers["Content-Type"] == "text/plain"
        return response.read().decode()


def test_metrics_count_what_was_asked(server: Server, warm_model: Path) -> None:
    predict = prediction_service_pb2_grpc.PredictionServiceStub(
        grpc.insecure_channel(server.grpc)
    ).Predict
    for _ in range(5):
        predict(predict_request())
    for request in (predict_request(size=31), predict_request("nobody")):
        with pytest.raises(grpc.RpcError):
            predict(request)
    url = f"{server.http}/v1/models/tiny:predict"
    rows = json.dumps({"instances": np.zeros([1, 32, 32, 3]).tolist()}).encode()
    for body in (rows, rows, rows):
        urllib.request.urlopen(url, body).read()
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(url, b"{}")

    text = page(server)
    lines = text.splitlines()
    for line in (
        f"# TYPE {SERVING}request_count counter",
        f'{SERVING}request_count{{model_name="tiny",status="OK"}} 8',
        f'{SERVING}request_count{{model_name="tiny",status="INVALID_ARGUMENT"}} 2',
        f'{SERVING}request_count{{model_name="nobody",status="NOT_FOUND"}} 1',
        f"# TYPE {SERVING}request_latency histogram",
        f"{SERVING}request_latency_count{{{GRPC_PREDICT}}} 5",
        f'{SERVING}request_latency_bucket{{{GRPC_PREDICT},le="+Inf"}} 5',
        f'{SERVING}request_latency_bucket{{{GRPC_PREDICT},le="10"}} 0',
        f'{SERVING}request_latency_count{{model_name="tiny",API="predict",entrypoint="REST"}} 3',
        f'{SERVING}runtime_latency_count{{model_name="tiny",API="Predict",runtime="TF1"}} 8',
        f'{SERVING}model_warmup_latency_count{{model_path="{warm_model}/1",status="OK"}} 1',
        f'{SERVING}batching_session:input_batch_size_bucket{{le="1"}} 3',
        f'{SERVING}batching_session:input_batch_size_bucket{{le="2"}} 9',
        f"{SERVING}batching_session:wrapped_run_count{{}} 9",
        f':tensorflow:cc:saved_model:load_attempt_count{{model_path="{warm_model}/1",'
        'status="success"} 1',
        ":tensorflow:core:graph_runs{} 9",
    ):
        assert line in lines, text

    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    labels = ("tiny", "Predict", "GRPC")
    seconds = samples[f"{SERVING}request_latency_sum", *labels] / 1e6
    assert 0 < seconds < 60
    buckets = [
        n for key, n in samples.items() if key[:4] == (f"{SERVING}request_latency_bucket", *labels)
    ]
    assert len(buckets) == 34  # 10 µs times 1.8 to the power of 0 to 32, and infinity
    assert buckets == sorted(buckets)
    loading = f':tensorflow:cc:saved_model:load_latency{{model_path="{warm_model}/1"}} '
    assert [int(line.removeprefix(loading)) > 0 for line in lines if loading in line] == [True]


def test_metrics_of_examples(
    tmp_path: Path, config: Path, start_model_server: Callable[..., Server]
) -> None:
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def lengths(inputs):
        return {"scores": tf.cast(tf.strings.length(inputs), tf.float32)[:, None]}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def length(inputs):
        return {"outputs": tf.cast(tf.strings.length(inputs), tf.float32)}

    signatures = {"serving_default": lengths, "regress": length}
    tf.saved_model.save(tf.Module(), str(tmp_path / "1"), signatures=signatures)
    server = start_model_server(
        tmp_path, f"--monitoring_config_file={config}", model_name="examples"
    )
    url = f"{server.http}/v1/models/examples"
    rows: dict[str, Any] = {"examples": [{"a": 1}, {"a": 2}, {}], "context": {"b": 3}}
    urllib.request.urlopen(f"{url}:classify", json.dumps(rows).encode()).read()
    rows = {"signature_name": "regress", "examples": [{}]}
    urllib.request.urlopen(f"{url}/versions/1:regress", json.dumps(rows).encode()).read()
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(f"{url}:regress", json.dumps({"examples": [{}]}).encode())

    text = page(server)
    lines = text.splitlines()
    for line in (
        f'{SERVING}request_example_count_total{{model="examples"}} 4',
        f'{SERVING}request_example_counts_bucket{{model="examples",le="1"}} 1',
        f'{SERVING}request_example_counts_bucket{{model="examples",le="4"}} 2',
        f'{SERVING}request_example_counts_bucket{{model="examples",le="16384"}} 2',
        f'{SERVING}request_count{{model_name="examples",status="OK"}} 2',
        f'{SERVING}request_count{{model_name="examples",status="INVALID_ARGUMENT"}} 1',
        f'{SERVING}request_latency_count{{model_name="examples",API="classify",entrypoint="REST"}}'
        " 1",
        f'{SERVING}request_latency_count{{model_name="examples",API="regress",entrypoint="REST"}}'
        " 1",
        f'{SERVING}runtime_latency_count{{model_name="examples",API="Classify",runtime="TF1"}} 1',
        f'{SERVING}runtime_latency_count{{model_name="examples",API="Regress",runtime="TF1"}} 1',
    ):
        assert line in lines, text
    server.stop()


def test_a_path_of_ones_own(
    tiny_model: Path, tmp_path: Path, start_model_server: Callable[..., Server]
) -> None:
    config = tmp_path / "monitoring.txt"
    config.write_text('prometheus_config { enable: true path: "/metrics" }')
    server = start_model_server(tiny_model, f"--monitoring_config_file={config}")
    assert "# TYPE :tensorflow:serving:request_count counter" in page(server, "/metrics")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        page(server)
    server.stop()


def test_no_metrics_unless_asked_for(
    tiny_model: Path, tmp_path: Path, start_model_server: Callable[..., Server]
) -> None:
    config = tmp_path / "monitoring.txt"
    config.write_text("prometheus_config { enable: false }")
    server = start_model_server(tiny_model, f"--monitoring_config_file={config}")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        page(server)
    server.stop()


@pytest.mark.parametrize(
    ("text", "rest", "message"),
    [
        (
            "prometheus_config { enable: true }",
            False,
            "--monitoring_config_file needs the REST API",
        ),
        ("prometheus_config { enabled: true }", True, 'has no field named "enabled"'),
        ('prometheus_config { enable: true path: "m" }', True, 'path must begin with "/"; was "m"'),
    ],
)
def test_a_wrong_configuration_is_one_sentence(
    tiny_model: Path, tmp_path: Path, text: str, rest: bool, message: str
) -> None:
    config = tmp_path / "monitoring.txt"
    config.write_text(text)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "model_server", "--port=0", f"--model_base_path={tiny_model}"),
            f"--monitoring_config_file={config}",
            *([f"--rest_api_port={free_port()}"] if rest else []),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
