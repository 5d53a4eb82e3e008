"""The metrics that the embedded model server offers to Prometheus."""

import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from helpers.basics import free_port
from helpers.model_server import ask, log_record, run_main, serving, write_warm_up
from helpers.servers import Addresses, Server
from helpers.serving import Client, predict_request
from prometheus_client.parser import text_string_to_metric_families

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
    write_warm_up(base_path / "1", [log_record("predict_log", request())])
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


def request(name: str = "tiny", size: int = 32) -> Any:
    return predict_request(name, inputs=np.zeros([2, size, size, 3], np.float32))


def page(server: Addresses, path: str = PATH) -> str:
    with urllib.request.urlopen(server.http + path) as response:
        assert response.headers["Content-Type"] == "text/plain"
        return response.read().decode()


def test_metrics_count_what_was_asked(server: Server, warm_model: Path) -> None:
    # Whoever waits for the model asks for its status.
    counted = f'{SERVING}request_count{{model_name="tiny",status="OK"}} '
    (asked_before,) = (
        int(line.removeprefix(counted))
        for line in page(server).splitlines()
        if line.startswith(counted)
    )
    with Client(server, "tiny") as client:
        predict = client.prediction.Predict
        for _ in range(5):
            predict(request())
        for bad in (request(size=31), request("nobody")):
            with pytest.raises(grpc.RpcError):
                predict(bad)
    url = f"{server.http}/v1/models/tiny:predict"
    rows = {"instances": np.zeros([1, 32, 32, 3]).tolist()}
    assert [ask(url, body)[0] for body in (rows, rows, rows, b"{}")] == [200, 200, 200, 400]

    text = page(server)
    lines = text.splitlines()
    for line in (
        f"# TYPE {SERVING}request_count counter",
        f'{SERVING}request_count{{model_name="tiny",status="OK"}} {8 + asked_before}',
        f'{SERVING}request_count{{model_name="tiny",status="INVALID_ARGUMENT"}} 2',
        f'{SERVING}request_count{{model_name="nobody",status="NOT_FOUND"}} 1',
        f"# TYPE {SERVING}request_latency histogram",
        f"{SERVING}request_latency_count{{{GRPC_PREDICT}}} 5",
        f'{SERVING}request_latency_bucket{{{GRPC_PREDICT},le="+Inf"}} 5',
        f'{SERVING}request_latency_bucket{{{GRPC_PREDICT},le="10"}} 0',
        f'{SERVING}request_latency_count{{model_name="tiny",API="predict",entrypoint="REST"}} 3',
        f'{SERVING}runtime_latency_count{{model_name="tiny",API="Predict",runtime="TF1"}} 8',
        f'{SERVING}model_warmup_latency_count{{model_path="{warm_model}/1",status="OK"}} 1',
        f'{SERVING}model_warmup_records_read{{model_path="{warm_model}/1",status="OK"}} 1',
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


def test_every_question_over_rest_is_counted(tiny_model: Path, config: Path) -> None:
    flags = "--model_name=asked", f"--model_base_path={tiny_model}", "--prefer_tflite_model"
    with serving(*flags, f"--monitoring_config_file={config}") as server:
        url = f"{server.http}/v1/models/asked"
        asked = [url, f"{url}/metadata", f"{url}/versions/1", f"{url}/versions/9", f"{url}:fly"]
        assert [ask(each)[0] for each in asked] == [200, 200, 200, 404, 400]
        text = page(server)
    for line in (
        f'{SERVING}request_count{{model_name="asked",status="OK"}} 3',
        f'{SERVING}request_count{{model_name="asked",status="NOT_FOUND"}} 1',
        f'{SERVING}request_count{{model_name="",status="INVALID_ARGUMENT"}} 1',
        f'{SERVING}request_latency_count{{model_name="asked",API="",entrypoint="REST"}} 3',
    ):
        assert line in text.splitlines(), text


def test_metrics_of_examples(tmp_path: Path, config: Path) -> None:
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def lengths(inputs):
        return {"scores": tf.cast(tf.strings.length(inputs), tf.float32)[:, None]}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def length(inputs):
        return {"outputs": tf.cast(tf.strings.length(inputs), tf.float32)}

    signatures = {"serving_default": lengths, "regress": length}
    tf.saved_model.save(tf.Module(), str(tmp_path / "1"), signatures=signatures)
    rows: dict[str, Any] = {"examples": [{"a": 1}, {"a": 2}, {}], "context": {"b": 3}}
    row: dict[str, Any] = {"examples": [{}]}
    with serving(
        *("--model_name=examples", f"--model_base_path={tmp_path}"),
        f"--monitoring_config_file={config}",
    ) as server:
        url = f"{server.http}/v1/models/examples"
        assert ask(f"{url}:classify", rows)[0] == 200
        assert ask(f"{url}/versions/1:regress", row | {"signature_name": "regress"})[0] == 200
        assert ask(f"{url}:regress", row)[0] == 400
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


def test_a_path_of_ones_own(tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "monitoring.txt"
    config.write_text('prometheus_config { enable: true path: "/metrics" }')
    flags = (
        f"--model_base_path={tiny_model}",
        "--prefer_tflite_model",
        f"--monitoring_config_file={config}",
    )
    with serving(*flags) as server:
        assert "# TYPE :tensorflow:serving:request_count counter" in page(server, "/metrics")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            page(server)


def test_no_metrics_unless_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "monitoring.txt"
    config.write_text("prometheus_config { enable: false }")
    flags = (
        f"--model_base_path={tiny_model}",
        "--prefer_tflite_model",
        f"--monitoring_config_file={config}",
    )
    with serving(*flags) as server, pytest.raises(urllib.error.HTTPError, match="404"):
        page(server)


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
    outcome = run_main(
        *(
            "--port=0",
            f"--model_base_path={tiny_model}",
            "--prefer_tflite_model",
            f"--monitoring_config_file={config}",
        ),
        *([f"--rest_api_port={free_port()}"] if rest else []),
    )
    assert (outcome.status, outcome.stderr.count("\n")) == (1, 1)
    assert message in outcome.stderr
