"""Several models, version policies and labels from a config file, changed while serving."""

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tensorflow as tf
from google.protobuf import text_format
from helpers.basics import eventually
from helpers.model_server import ask, run_main, serving
from helpers.servers import Addresses, Server
from helpers.serving import refused
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

Code = grpc.StatusCode
State = get_model_status_pb2.ModelVersionStatus


def export(path: Path, number: int) -> Path:
    """Save a model that adds its number, whole or not at all."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def add(x):
        return {"y": x + number}

    partial = path.with_name("partial")
    tf.saved_model.save(tf.Module(), str(partial), signatures=add)
    return partial.rename(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base paths: ``first`` holds versions 1 to 3, ``second`` 7, ``broken`` 1, ``empty`` none."""
    path = tmp_path_factory.mktemp("models")
    (path / "first").mkdir()
    for number in (1, 2, 3):
        export(path / "first" / str(number), number)
    (path / "second").mkdir()
    export(path / "second" / "7", 7)
    (path / "empty").mkdir()
    (path / "broken" / "1").mkdir(parents=True)
    return path


def model(models: Path, name: str, more: str = "", platform: str = "tensorflow") -> str:
    return f"""
        config {{
          name: "{name}"
          base_path: "{models / name}"
          model_platform: "{platform}"
          {more}
        }}"""


def listed(*configs: str) -> str:
    return f"model_config_list {{ {''.join(configs)} }}"


@pytest.fixture(scope="module")
def config_file(models: Path) -> Path:
    file = models / "models.config"
    first = "model_version_policy { all {} } version_labels { key: 'stable' value: 1 }"
    file.write_text(
        listed(
            model(models, "first", first + "version_labels { key: 'canary' value: 3 }"),
            model(models, "second"),
        )
    )
    return file


@pytest.fixture(scope="module")
def server(
    models: Path, config_file: Path, start_model_server: Callable[..., Server]
) -> Iterator[Server]:
    server = start_model_server(
        models / "nowhere",
        f"--model_config_file={config_file}",
        "--model_config_file_poll_wait_seconds=1",
        "--allow_version_labels_for_unavailable_models=true",
        "--max_num_load_retries=0",
        model_name="first",
        TF_NUM_INTRAOP_THREADS="300",
    )
    yield server
    server.stop()


class Client:
    def __init__(self, server: Addresses):
        self.http = server.http
        self.channel = grpc.insecure_channel(server.grpc)
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def predict(self, name: str, version: int = 0, label: str = "") -> tuple[int, float]:
        """Return version and result of adding to zero."""
        request = predict_pb2.PredictRequest()
        _fill(request.model_spec, name, version, label)
        request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.zeros(1, np.float32)))
        response = self.prediction.Predict(request)
        return response.model_spec.version.value, tf.make_ndarray(response.outputs["y"])[0]

    def states(self, name: str, version: int = 0, label: str = "") -> dict[int, int]:
        request = get_model_status_pb2.GetModelStatusRequest()
        _fill(request.model_spec, name, version, label)
        statuses = self.models.GetModelStatus(request).model_version_status
        return {status.version: status.state for status in statuses}

    def reload(self, config: str) -> Any:
        request = model_management_pb2.ReloadConfigRequest()
        text_format.Parse(config, request.config)
        return self.models.HandleReloadConfigRequest(request, timeout=30)

    def rest(self, path: str, body: Any = None) -> tuple[int, Any]:
        return ask(f"{self.http}/v1/models/{path}", body)


def _fill(spec: Any, name: str, version: int, label: str) -> None:
    spec.name = name
    if version:
        spec.version.value = version
    if label:
        spec.version_label = label


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    client = Client(server)
    yield client
    client.channel.close()


# The tests with this server run in order: each goes on from the config that the one before left.


def test_every_model_and_every_version(client: Client) -> None:
    assert client.states("first") == dict.fromkeys((1, 2, 3), State.AVAILABLE)
    assert client.predict("first") == (3, 3)
    assert client.predict("first", version=2) == (2, 2)
    assert client.predict("second") == (7, 7)
    assert refused(lambda: client.predict("default"))[0] == Code.NOT_FOUND


def test_threads_of_an_operation_follow_the_environment(server: Server) -> None:
    """A pod learns this way how many of its node's cores it may use."""
    assert psutil.Process(server.process.pid).num_threads() >= 300


def test_labels_over_grpc(client: Client) -> None:
    assert client.predict("first", label="stable") == (1, 1)
    assert client.predict("first", label="canary") == (3, 3)
    every_version = dict.fromkeys((1, 2, 3), State.AVAILABLE)
    assert client.states("first", label="stable") == every_version
    assert client.states("first", label="fast") == every_version
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    _fill(request.model_spec, "first", 0, "stable")
    assert client.prediction.GetModelMetadata(request).model_spec.version.value == 1
    for name, label in (("first", "fast"), ("second", "stable"), ("nobody", "stable")):
        unknown = (Code.INVALID_ARGUMENT, f"Unrecognized servable version label: {label}")
        assert refused(partial(client.predict, name, label=label)) == unknown
    missing = (Code.NOT_FOUND, "Could not find any versions of model nobody")
    assert refused(partial(client.states, "nobody", label="stable")) == missing


def test_labels_over_rest(client: Client) -> None:
    path = "first/labels/stable"
    assert client.rest(f"{path}:predict", {"instances": [0.5]}) == (200, {"predictions": [1.5]})
    for any_label in (path, "first/labels/fast"):
        status, answer = client.rest(any_label)
        assert status == 200
        assert [each["version"] for each in answer["model_version_status"]] == ["3", "2", "1"]
    status, answer = client.rest(f"{path}/metadata")
    assert (status, answer["model_spec"]["version"]) == (200, "1")
    unknown = (400, {"error": "Unrecognized servable version label: fast"})
    assert client.rest("first/labels/fast:predict", {"instances": [0.5]}) == unknown
    assert client.rest("first/labels/fast/metadata") == unknown
    assert client.rest("first/labels/:predict", {"instances": [0.5]})[0] == 400


def test_config_file_is_followed(
    server: Server, client: Client, models: Path, config_file: Path
) -> None:
    policy = "model_version_policy { specific { versions: [1, 2, 8, 9] } }"
    config_file.write_text(
        listed(model(models, "first", policy + "version_labels { key: 'stable' value: 2 }"))
    )
    eventually(lambda: client.states("first")[3] == State.END, "3 is END")
    assert client.states("first") == {1: State.AVAILABLE, 2: State.AVAILABLE, 3: State.END}
    assert client.predict("first", label="stable") == (2, 2)
    assert refused(lambda: client.predict("first", label="canary"))[0] == Code.INVALID_ARGUMENT
    assert server.log.read_text().count("Version 8, 9 of servable first, which was requested") == 1
    eventually(lambda: client.states("second") == {7: State.END}, "7 is END")
    code, details = refused(lambda: client.predict("second"))
    assert (code, details) == (Code.NOT_FOUND, "Servable not found for request: Latest(second)")


def test_config_file_that_is_wrong_changes_nothing(
    server: Server, client: Client, models: Path, config_file: Path
) -> None:
    good = config_file.read_text()
    eventually(lambda: client.predict("first") == (2, 2), "what it lists is served")
    config_file.write_text("model_config_list {\n  config {\n    nam: 'first'\n")
    eventually(lambda: 'has no field named "nam"' in server.log.read_text(), "it is told")
    config_file.unlink()
    eventually(lambda: f"cannot read {config_file}" in server.log.read_text(), "it is told")
    assert client.predict("first") == (2, 2)
    config_file.write_text(good)


@pytest.mark.parametrize(
    ("config", "code", "details"),
    [
        (
            lambda m: listed(model(m, "first"), model(m, "first")),
            Code.INVALID_ARGUMENT,
            "Illegal to list model first multiple times in config list",
        ),
        (
            lambda m: "model_config_list { config { name: 'a' base_path: 'b' } }",
            Code.INVALID_ARGUMENT,
            "Expected model a to have an absolute path or URI; got base_path()=b",
        ),
        (
            lambda m: "model_config_list { config { name: 'a' base_path: 'gs://b/c' } }",
            Code.INVALID_ARGUMENT,
            "the base path of model a is a URI, gs://b/c: this model server reads folders only",
        ),
        (
            lambda m: listed(model(m, "first", platform="")),
            Code.INVALID_ARGUMENT,
            "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
            "ModelServerConfig::model_platform.",
        ),
        (
            lambda m: listed(model(m, "first", platform="caffe")),
            Code.INVALID_ARGUMENT,
            "Model first requests unsupported platform caffe",
        ),
        (
            lambda m: listed(model(m, "first", "model_type: TENSORFLOW")),
            Code.INVALID_ARGUMENT,
            "Illegal setting both ModelServerConfig::model_type (deprecated) and "
            "ModelServerConfig::model_platform.",
        ),
        (
            lambda m: listed(model(m, "first", "version_labels { key: 'stable' value: 4 }")),
            Code.FAILED_PRECONDITION,
            "Request to assign label to version 4 of model first, which is not currently "
            "available for inference",
        ),
        (
            lambda m: "",
            Code.INVALID_ARGUMENT,
            "ServerModelConfig type not supported by HandleReloadConfigRequest. Only "
            "ModelConfigList is currently supported",
        ),
        (
            lambda m: listed(model(m, "first"), model(m, "empty")),
            Code.UNKNOWN,
            "1 model(s) did not become available: {{{name: empty} due to error: no versions of",
        ),
        (
            lambda m: listed(model(m, "first"), model(m, "broken"), model(m, "nowhere")),
            Code.UNKNOWN,
            "2 model(s) did not become available: {{{name: broken version: 1} due to error: "
            "NOT_FOUND: ",
        ),
    ],
)
def test_reload_request_is_refused(
    client: Client,
    models: Path,
    config_file: Path,
    config: Callable[[Path], str],
    code: grpc.StatusCode,
    details: str,
) -> None:
    good = config_file.read_text()
    if code == Code.UNKNOWN:  # these models are looked for, until the file is read again
        config_file.write_text(config(models))
    got = refused(lambda: client.reload(config(models)))
    config_file.write_text(good)
    assert (got[0], got[1][: len(details)]) == (code, details)
    assert client.predict("first")[0] in (2, 3)


def test_reload_request(client: Client, models: Path, config_file: Path) -> None:
    latest = "model_version_policy { latest { num_versions: 2 } }"
    config = listed(
        model(models, "first", latest + "version_labels { key: 'new' value: 3 }"),
        model(models, "second", "version_labels { key: 'only' value: 7 }"),
    )
    config_file.write_text(config)  # which the server follows, too
    response = client.reload(config)
    assert response.HasField("status")
    assert (response.status.error_code, response.status.error_message) == (0, "")
    assert client.states("first") == {1: State.END, 2: State.AVAILABLE, 3: State.AVAILABLE}
    assert client.predict("first", label="new") == (3, 3)
    assert client.predict("second", label="only") == (7, 7)

    moved = config.replace("key: 'new' value: 3", "key: 'new' value: 2")
    config_file.write_text(moved)
    client.reload(moved)
    assert client.predict("first", label="new") == (2, 2)

    export(models / "first" / "4", 4)
    eventually(lambda: client.states("first").get(4) == State.AVAILABLE, "4 is AVAILABLE")
    eventually(lambda: client.states("first")[2] == State.END, "2 is END")
    gone = "Servable not found for request: Specific(first, 2)"
    assert refused(lambda: client.predict("first", label="new")) == (Code.NOT_FOUND, gone)

    config_file.write_text("model_config_list {}")
    client.reload("model_config_list {}")
    assert refused(lambda: client.predict("first"))[0] == Code.NOT_FOUND
    assert set(client.states("first").values()) == {State.END}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("model_config_list {\n  config {\n    nam: 'a'\n  }\n}\n", "3:5"),
        (
            "model_config_list {\n  config {",
            "Error parsing text-format tensorflow.serving.ModelServerConfig: 2:",
        ),
        ("model_config_list { config { name: 'a' base_path: 'b' } }", "absolute path"),
        (
            "model_config_list { config { name: 'a' base_path: '/b' model_platform: 'tensorflow' "
            "version_labels { key: 'stable' value: 1 } } }",
            "--allow_version_labels_for_unavailable_models",
        ),
    ],
)
def test_server_does_not_start_with_a_wrong_config_file(
    tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "models.config"
    if text is not None:
        file.write_text(text)
    outcome = run_main("--port=0", f"--model_config_file={file}")
    assert outcome.status == 1
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("model_server: ")
    assert message in line
    assert "Traceback" not in line


def test_base_path_that_is_a_uri_is_refused() -> None:
    outcome = run_main("--port=0", "--model_base_path=gs://bucket/m", "--model_name=m")
    assert outcome.status == 1
    assert outcome.stderr == (
        "model_server: the base path of model m is a URI, gs://bucket/m: this model server reads "
        "folders only\n"
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A key and a certificate of ``localhost`` that is its own authority, as PEM texts."""
    if not (openssl := shutil.which("openssl")):
        pytest.skip("no openssl command to make a certificate with")
    path = tmp_path_factory.mktemp("keys")
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(path / "key.pem"), "-out", str(path / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    return (path / "key.pem").read_text(), (path / "cert.pem").read_text()


def test_tls_unix_socket_cors_and_session_config(tmp_path: Path, keys: tuple[str, str]) -> None:
    @tf.function(input_signature=[tf.TensorSpec([], tf.float32, name="x")])
    def count(x):
        return {"y": tf.while_loop(lambda y: y < x, lambda y: (y + 1,), [0.0])[0]}

    tf.saved_model.save(tf.Module(), str(tmp_path / "m" / "1"), signatures=count)
    key, certificate = keys
    models = tmp_path / "models.config"
    models.write_text(listed(model(tmp_path, "m").replace('name: "m"', 'name: "a/b"')))
    ssl_config = tmp_path / "ssl.config"
    ssl_config.write_text(
        f"server_key: {json.dumps(key)} server_cert: {json.dumps(certificate)} "
        f"custom_ca: {json.dumps(certificate)} client_verify: true"
    )
    session_config = tmp_path / "session.config"
    session_config.write_text("operation_timeout_in_ms: 2000")
    authority = certificate.encode()
    with_certificate = grpc.ssl_channel_credentials(authority, key.encode(), authority)
    without = grpc.ssl_channel_credentials(authority)
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "a/b"

    def state(channel: grpc.Channel) -> Any:
        with channel:
            service = model_service_pb2_grpc.ModelServiceStub(channel)
            return service.GetModelStatus(request, timeout=20).model_version_status[0].state

    with serving(
        f"--model_config_file={models}",
        f"--ssl_config_file={ssl_config}",
        f"--grpc_socket_path={tmp_path / 's'}",
        f"--tensorflow_session_config_file={session_config}",
        "--rest_api_enable_cors_support",
        "--rest_api_timeout_in_ms=-1",
    ) as server:
        port = server.grpc.rpartition(":")[2]
        options = [("grpc.ssl_target_name_override", "localhost")]
        for channel in (
            grpc.secure_channel(f"localhost:{port}", with_certificate),
            grpc.secure_channel(f"unix:{tmp_path / 's'}", with_certificate, options),
        ):
            assert state(channel) == State.AVAILABLE
        for channel in (
            grpc.secure_channel(f"localhost:{port}", without),
            grpc.insecure_channel(f"localhost:{port}"),
        ):
            assert refused(partial(state, channel))[0] == Code.UNAVAILABLE

        url = f"{server.http}/v1/models/a%2Fb:predict"
        preflight = urllib.request.Request(
            url, headers={"Origin": "https://a.page"}, method="OPTIONS"
        )
        for question in (preflight, urllib.request.Request(url, b'{"inputs": 5}')):
            with urllib.request.urlopen(question) as response:
                headers = {
                    k: v for k, v in response.headers.items() if k.startswith("Access-Control")
                }
                assert headers == {
                    "Access-Control-Allow-Origin": "*",
                    "Access-Control-Allow-Methods": "POST, GET",
                    "Access-Control-Allow-Headers": "Content-Type",
                }
        assert ask(url, b'{"inputs": Infinity}')[0] == 504


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("--ssl_config_file", None, "No such file or directory"),
        ("--ssl_config_file", "server_kye: ''", 'has no field named "server_kye"'),
        ("--ssl_config_file", "client_verify: true", "client_verify needs a custom_ca"),
        ("--ssl_config_file", "server_key: 'x'", "must be a PEM key and its certificate"),
        ("--tensorflow_session_config_file", "threads: 1", 'has no field named "threads"'),
        ("--grpc_socket_path", None, "give another path with --grpc_socket_path"),
    ],
)
def test_server_does_not_start_with_a_wrong_file(
    tmp_path: Path, models: Path, flag: str, text: str | None, message: str
) -> None:
    file = tmp_path / "nowhere" / "file"
    if text is not None:
        file = tmp_path / "file"
        file.write_text(text)
    outcome = run_main("--port=0", f"--model_base_path={models / 'second'}", f"{flag}={file}")
    assert outcome.status == 1
    line = outcome.stderr.splitlines()[-1]
    assert line.startswith("model_server: ")
    assert message in line
    assert "Traceback" not in outcome.stderr


def test_one_broken_version_leaves_the_others_under_policy_all(
    tmp_path: Path, models: Path
) -> None:
    shutil.copytree(models / "first" / "1", tmp_path / "m" / "1")
    (tmp_path / "m" / "2").mkdir()
    shutil.copytree(models / "first" / "3", tmp_path / "m" / "3")
    file = tmp_path / "models.config"
    file.write_text(listed(model(tmp_path, "m", "model_version_policy { all {} }")))
    with serving(f"--model_config_file={file}", "--file_system_poll_wait_seconds=0") as server:
        client = Client(server)
        expected = {1: State.AVAILABLE, 2: State.END, 3: State.AVAILABLE}
        eventually(lambda: client.states("m") == expected, str(expected))
        assert client.predict("m") == (3, 3)
        more = model(tmp_path, "m", "model_version_policy { all {} }"), model(models, "second")
        client.reload(listed(*more))  # which makes the server look once more
        assert client.states("m") == expected
        assert client.predict("second") == (7, 7)
        client.channel.close()
