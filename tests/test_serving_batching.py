"""Batching in the embedded model server: what is merged, padded, split, refused and kept apart."""

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from helpers.basics import eventually
from helpers.model_server import ask, run_main, serving
from helpers.servers import Addresses
from helpers.serving import Client, predict_request, refused

Code = grpc.StatusCode
Predict = Callable[[Any], Any]


def export(path: Path, factor: float = 1) -> None:
    """Save a model whose signatures say how many rows the run had in which they took part.

    The sums are multiplied by ``factor``.
    """

    def rows(x):
        return tf.fill([tf.shape(x)[0]], tf.shape(x)[0])

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32, name="x")])
    def add(x):
        return {"sum": factor * tf.reduce_sum(x, 1), "rows": rows(x)}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.float32, name="x"),
            tf.TensorSpec([None], tf.string, name="label"),
        ]
    )
    def label(x, label):
        return {"sum": tf.reduce_sum(x, 1), "label": label, "rows": rows(x)}

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def picky(x):
        with tf.control_dependencies([tf.debugging.assert_non_negative(x)]):
            return {"sum": tf.reduce_sum(x, 1), "rows": rows(x)}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, name="text"),
            tf.TensorSpec([], tf.int32, name="times"),
        ]
    )
    def repeat(text, times):
        return {"texts": tf.repeat(text[:, None], times, 1), "count": tf.size(text)}

    tf.saved_model.save(
        tf.Module(),
        str(path),
        signatures={"serving_default": add, "label": label, "picky": picky, "repeat": repeat},
    )


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batching")
    export(path / "1")
    return path


@contextmanager
def batching(base_path: Path, parameters: str, *flags: str) -> Iterator[Addresses]:
    """Run a server of the model with these batching parameters."""
    with NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(parameters)
        file.flush()
        with serving(
            *("--model_name=adder", f"--model_base_path={base_path}"),
            *("--enable_batching", f"--batching_parameters_file={file.name}"),
            *("--grpc_max_threads=32", "--rest_api_num_threads=8", *flags),
        ) as server:
            yield server


@pytest.fixture(scope="module")
def server(base_path: Path) -> Iterator[Addresses]:
    parameters = (
        "max_batch_size { value: 16 }  batch_timeout_micros { value: 100000 }"
        "allowed_batch_sizes: [4, 8, 16]"
    )
    with batching(base_path, parameters) as server:
        yield server


@pytest.fixture(scope="module")
def predict(server: Addresses) -> Iterator[Predict]:
    with Client(server, "adder") as client:
        yield client.prediction.Predict


request = partial(predict_request, "adder")


def ones(count: int, columns: int = 2) -> np.ndarray:
    return np.ones([count, columns], np.float32)


def arrays(response: Any) -> dict[str, np.ndarray]:
    return {alias: tf.make_ndarray(proto) for alias, proto in response.outputs.items()}


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Make all calls at the same moment; return results and errors."""
    barrier = threading.Barrier(len(calls))

    def make(call: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return call()
        except grpc.RpcError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(make, calls))


def test_parallel_clients_get_their_own_answers_from_common_runs(
    predict: Predict,
) -> None:
    sizes = set()

    def call(value: int) -> None:
        x = np.full([1 + value % 3, 2], value, np.float32)
        outputs = arrays(predict(request(x=x)))
        np.testing.assert_array_equal(outputs["sum"], x.sum(1))
        sizes.update(outputs["rows"].tolist())

    for _ in range(5):
        assert at_once([partial(call, value) for value in range(32)]) == [None] * 32
    assert sizes <= {4, 8, 16}
    assert 16 in sizes


def test_several_inputs_are_merged_and_split_alike(predict: Predict) -> None:

    def call(value: int) -> int:
        x = np.full([1 + value % 3, 2 + value % 2], value, np.float32)
        labels = [f"{value}.{row}".encode() for row in range(len(x))]
        outputs = arrays(predict(request("label", x=x, label=labels)))
        np.testing.assert_array_equal(outputs["sum"], x.sum(1))
        assert outputs["label"].tolist() == labels
        return max(outputs["rows"])

    # Rows of two numbers and rows of three take part in runs of their own.
    assert max(at_once([partial(call, value) for value in range(32)])) > 4


def test_versions_are_never_merged(base_path: Path, tmp_path: Path) -> None:
    shutil.copytree(base_path / "1", tmp_path / "1")
    export(tmp_path / "2", factor=-1)
    file = tmp_path / "models.config"
    file.write_text(
        f"model_config_list {{ config {{ name: 'adder' base_path: '{tmp_path}' "
        "model_platform: 'tensorflow' model_version_policy { all {} } } }"
    )
    with (
        serving("--enable_batching", f"--model_config_file={file}") as server,
        Client(server, "adder") as client,
    ):
        client.wait_for(1, "AVAILABLE")
        client.wait_for(2, "AVAILABLE")

        def call(value: int) -> list[float]:
            message = client.request(x=ones(1) * value)
            message.model_spec.version.value = 1 + value % 2
            return arrays(client.prediction.Predict(message))["sum"].tolist()

        answers = at_once([partial(call, value) for value in range(24)])
    assert answers == [[-2.0 * value if value % 2 else 2.0 * value] for value in range(24)]


def test_a_lone_request_is_padded(predict: Predict) -> None:
    outputs = arrays(predict(request(x=ones(5))))
    assert outputs["rows"].tolist() == [8] * 5
    assert outputs["sum"].tolist() == [2] * 5


def test_output_filter_and_empty_batch(predict: Predict) -> None:
    message = request(x=ones(3))
    message.output_filter.append("rows")
    assert {n: a.tolist() for n, a in arrays(predict(message)).items()} == {"rows": [4] * 3}
    assert arrays(predict(request(x=ones(0))))["sum"].shape == (0,)


def test_rest_takes_part(server: Addresses) -> None:
    def call(value: int) -> Any:
        url = f"{server.http}/v1/models/adder:predict"
        status, answer = ask(url, {"instances": [[value, 1]] * 2})
        assert status == 200, answer
        return answer["predictions"]

    for value, rows in enumerate(at_once([partial(call, value) for value in range(8)])):
        assert rows == [{"sum": value + 1, "rows": 16}] * 2


def test_a_large_request_is_refused(predict: Predict) -> None:
    assert refused(lambda: predict(request(x=ones(17)))) == (
        Code.INVALID_ARGUMENT,
        "Task size 17 is larger than maximum input batch size 16",
    )


def test_bad_batch_mates_harm_nobody(predict: Predict) -> None:
    good = [partial(predict, request("picky", x=ones(1) * v)) for v in range(12)]
    bad = [
        partial(predict, request("picky", x=-ones(1))),
        partial(predict, request("picky", x=ones(1, 3))),
        partial(predict, request("picky", x=ones(1).astype(np.int32))),
        partial(predict, request("picky", y=ones(1))),
    ]
    answers = at_once([*good, *bad])
    assert [tf.make_ndarray(a.outputs["sum"]).tolist() for a in answers[:12]] == [
        [2.0 * v] for v in range(12)
    ]
    assert [error.code() for error in answers[12:]] == [Code.INVALID_ARGUMENT] * 4


def test_what_cannot_be_merged_runs_on_its_own(predict: Predict) -> None:
    text = ["a", "b", "c"]
    narrow_and_wide = [partial(predict, request(x=ones(1, 2 + v % 3))) for v in range(6)]
    scalar = [partial(predict, request("repeat", text=text, times=np.int32(2)))] * 2
    answers = [arrays(answer) for answer in at_once([*narrow_and_wide, *scalar])]
    assert [outputs["sum"].tolist() for outputs in answers[:6]] == [[2], [3], [4]] * 2
    for outputs in answers[6:]:
        assert outputs["texts"].tolist() == [[b"a"] * 2, [b"b"] * 2, [b"c"] * 2]
        assert outputs["count"].tolist() == 3


def test_a_full_queue_is_unavailable_and_recovers(base_path: Path) -> None:
    parameters = (
        "max_batch_size { value: 2 }  batch_timeout_micros { value: 300000 }"
        "max_enqueued_batches { value: 1 }  num_batch_threads { value: 1 }"
    )
    with batching(base_path, parameters) as server, Client(server, "adder") as client:
        predict = client.prediction.Predict

        def ask_while_full() -> grpc.RpcError | None:
            waiting = predict.future(request(x=ones(1)))  # until the time is over, for company
            refusal = None
            while not waiting.done():
                try:
                    predict(request(x=ones(2)))  # has no place beside it
                except grpc.RpcError as error:
                    refusal = error
            if too_late := waiting.exception():  # the other one had the queue's only place
                return too_late
            assert arrays(waiting.result())["rows"].tolist() == [1]
            return refusal

        # On a busy machine the two may miss each other, so more than one attempt may be needed.
        refusal = eventually(ask_while_full, "a request finds the queue full")
        assert refusal.code() == Code.UNAVAILABLE
        full = "The batch scheduling queue to which this task was submitted is full"
        assert full in str(refusal.details())
        assert arrays(predict(request(x=ones(2))))["rows"].tolist() == [2, 2]


def test_large_requests_are_split_on_demand_and_short_inputs_padded(base_path: Path) -> None:
    parameters = (
        "max_batch_size { value: 8 }  batch_timeout_micros { value: 300000 }"
        "enable_large_batch_splitting { value: true }  max_execution_batch_size { value: 4 }"
        "allowed_batch_sizes: [2, 4]  pad_variable_length_inputs: true"
    )
    with batching(base_path, parameters) as server, Client(server, "adder") as client:
        predict = client.prediction.Predict
        x = np.arange(14, dtype=np.float32).reshape(7, 2)
        outputs = arrays(predict(request(x=x)))
        assert outputs["sum"].tolist() == x.sum(1).tolist()
        assert outputs["rows"].tolist() == [4] * 7
        with pytest.raises(grpc.RpcError, match="Task size 9 is larger"):
            predict(request(x=ones(9)))
        short, long = at_once([partial(predict, request(x=ones(2, n) * n)) for n in (2, 3)])
    assert arrays(short)["sum"].tolist() == [6, 6]  # 2 + 2 and another 2, its first value
    assert arrays(long) == {"sum": pytest.approx([9, 9]), "rows": pytest.approx([4, 4])}


def test_a_model_brings_its_own_parameters_and_versions_change_unnoticed(
    base_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_path / "1", tmp_path / "1")
    (tmp_path / "1/batching_params.pbtxt").write_text("max_batch_size { value: 3 }")
    with (
        batching(tmp_path, "", "--enable_per_model_batching_parameters") as server,
        Client(server, "adder") as client,
    ):
        predict = client.prediction.Predict
        with pytest.raises(grpc.RpcError, match="Task size 4 is larger"):
            predict(request(x=ones(4)))

        shutil.copytree(base_path / "1", tmp_path / "next")
        (tmp_path / "next").rename(tmp_path / "2")

        def until_version_2() -> None:
            while (response := predict(request(x=ones(1)))).model_spec.version.value == 1:
                assert arrays(response)["sum"].tolist() == [2]

        assert at_once([until_version_2] * 8) == [None] * 8
        assert arrays(predict(request(x=ones(1001))))["rows"][0] == 1001  # no file, no batching


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "max_batch_size: 8",
            'text-format tensorflow.serving.BatchingParameters: 1:17 : .*Expected "{"',
        ),
        ("max_bach_size { value: 8 }", 'has no field named "max_bach_size"'),
        ("max_batch_size { value: 0 }", "max_batch_size must be positive; was 0"),
        ("batch_timeout_micros { value: -1 }", "batch_timeout_micros must be non-negative; was -1"),
        ("allowed_batch_sizes: [4, 2]", r"positive and increasing; were \[4, 2\]"),
        ("allowed_batch_sizes: [2, 4]", "last entry was 4; expected 1000"),
    ],
)
def test_a_wrong_file_is_one_sentence(
    base_path: Path, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "batching.txt"
    file.write_text(text)
    outcome = run_main(
        *("--port=0", f"--model_base_path={base_path}"),
        *("--enable_batching", f"--batching_parameters_file={file}"),
    )
    assert (outcome.status, outcome.stderr.count("\n")) == (1, 1)
    assert str(file) in outcome.stderr
    assert re.search(message, outcome.stderr)
