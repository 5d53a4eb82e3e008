"""``python -m model_server``: TensorFlow Serving's flags in, a running server out."""

import argparse
import dataclasses
import difflib
import logging
import os
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .server import ModelServer

log = logging.getLogger("model_server")


def main(arguments: list[str]) -> None:
    """Serve until SIGTERM or SIGINT; exit with status 1 and one sentence when that cannot be."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    fields = parse_flags(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    try:
        with ModelServer(**fields):
            # A signal may reach another thread, and would not wake this one from an endless wait.
            while True:
                time.sleep(0.5)
    except SystemExit:
        os._exit(0)  # without waiting for threads that still run after the grace period
    except Exception as error:
        sys.exit(f"model_server: {error}")


def parse_flags(arguments: list[str]) -> dict[str, Any]:
    """Turn the command line into the fields of a ModelServer; exit when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m model_server",
        usage="%(prog)s --model_base_path=FOLDER [--flag=value ...]",
        description="Serves a SavedModel over TensorFlow Serving's gRPC and REST API.",
        epilog="Other flags of tensorflow_model_server are accepted and have no effect.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print versions and exit")
    defaults = {field.name: field.default for field in dataclasses.fields(ModelServer)}
    for name, (kind, help_text) in FLAGS.items():
        default = defaults.get(name)
        shown = "" if default in (None, (), "", dataclasses.MISSING) else f" (default: {default})"
        parser.add_argument(
            f"--{name}",
            type=kind,
            default=None if default is dataclasses.MISSING else default,
            nargs="?" if kind is _boolean else None,
            const=True if kind is _boolean else None,
            metavar="VALUE",
            help=help_text + shown,
        )
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", nargs="?", const="true", help=argparse.SUPPRESS)

    flags, unknown = parser.parse_known_args(arguments)
    fields = vars(flags)
    if fields.pop("version"):
        print(f"TensorFlow ModelServer: {_version('tensorflow-serving-api')} (in Python)")
        print(f"TensorFlow Library: {_version('tensorflow')}")
        print(f"LiteRT: {_version('ai-edge-litert')}")
        sys.exit()
    if unknown:
        name = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(name, [f"--{known}" for known in fields], 1)
        parser.error(f"unknown flag {name}" + "".join(f"; did you mean {flag}?" for flag in close))
    if not flags.model_base_path and not flags.model_config_file:
        parser.error(f"--model_base_path is missing: the {FLAGS['model_base_path'][1]}")
    if flags.port and flags.port == flags.rest_api_port:
        parser.error("--port and --rest_api_port must differ")
    for name in WITHOUT_EFFECT:
        if fields.pop(name) is not None:
            log.warning("--%s has no effect on this model server", name)
    if both := fields.pop("tensorflow_session_parallelism"):
        if flags.tensorflow_intra_op_parallelism or flags.tensorflow_inter_op_parallelism:
            parser.error(
                "give either --tensorflow_session_parallelism, or "
                "--tensorflow_intra_op_parallelism and --tensorflow_inter_op_parallelism"
            )
        fields["tensorflow_intra_op_parallelism"] = both
        fields["tensorflow_inter_op_parallelism"] = both
    return fields


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text} is not a port number from 0 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return int(text)


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return values[text.lower()]


def _list(text: str) -> list[str]:
    return text.split(",")


def _channel_arguments(text: str) -> list[tuple[str, int | str]]:
    pairs = [pair.split("=", 1) for pair in text.split(",") if pair]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text} is not of the form name=value,name=value")
    return [(key, int(value) if value.lstrip("-").isdigit() else value) for key, value in pairs]


def _exit(number: int, frame: Any) -> None:
    """End the main thread, which lets requests end on its way out; a second signal does nothing."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    log.info("%s: refusing new requests, finishing those in flight", signal.Signals(number).name)
    sys.exit(0)


FLAGS: dict[str, tuple[Any, str]] = {
    "port": (_port, "port of the gRPC API; 0 takes a free one"),
    "rest_api_port": (_port, "port of the REST API; 0 leaves it off"),
    "model_name": (str, "name that requests use"),
    "model_base_path": (
        str,
        "folder that holds each version of the model in a folder named by its number",
    ),
    "model_config_file": (
        str,
        "file that lists the models in place of the two flags above: a ModelServerConfig in "
        "protobuf's text format",
    ),
    "model_config_file_poll_wait_seconds": (
        int,
        "seconds between two looks for changes in that file; 0 means never",
    ),
    "allow_version_labels_for_unavailable_models": (
        _boolean,
        "let a new label point to a version that is not AVAILABLE yet, as at the start",
    ),
    "force_allow_any_version_labels_for_unavailable_models": (
        _boolean,
        "let any label point to a version that is not AVAILABLE",
    ),
    "file_system_poll_wait_seconds": (
        int,
        "seconds between two looks for new versions; 0 looks once, a negative number never",
    ),
    "max_num_load_retries": (int, "attempts to load a version after the first has failed"),
    "load_retry_interval_micros": (int, "microseconds between two of these attempts"),
    "saved_model_tags": (_list, "tags of the meta graph to load, separated by commas"),
    "enable_model_warmup": (
        _boolean,
        "replay assets.extra/tf_serving_warmup_requests before a version is AVAILABLE",
    ),
    "num_request_iterations_for_warmup": (int, "times to replay each of them; 0 means once"),
    "enable_serialization_as_tensor_content": (
        _boolean,
        "answer Predict with tensor_content in place of typed fields",
    ),
    "enable_signature_method_name_check": (
        _boolean,
        "answer Classify and Regress only where the signature's method_name says so",
    ),
    "enable_grpc_healthcheck_service": (_boolean, "answer grpc.health.v1.Health, too"),
    "enforce_session_run_timeout": (_boolean, "give up a gRPC request at its client's deadline"),
    "enable_batching": (_boolean, "merge concurrent requests into one run of the model"),
    "batching_parameters_file": (str, "text file with BatchingParameters"),
    "enable_per_model_batching_parameters": (
        _boolean,
        "read them from batching_params.pbtxt beside each SavedModel",
    ),
    "monitoring_config_file": (str, "text file with a MonitoringConfig"),
    "grpc_max_threads": (_positive, "threads that answer gRPC requests"),
    "grpc_channel_arguments": (
        _channel_arguments,
        "arguments of the gRPC server, such as grpc.max_connection_age_ms=2000",
    ),
    "grpc_socket_path": (str, "UNIX socket that answers gRPC requests, too"),
    "ssl_config_file": (str, "text file with an SSLConfig: gRPC is encrypted with its keys"),
    "rest_api_num_threads": (_positive, "threads that answer REST requests"),
    "rest_api_timeout_in_ms": (
        int,
        "milliseconds that a prediction over REST may take; 0 means without limit",
    ),
    "rest_api_enable_cors_support": (_boolean, "let web pages of other sites use the REST API"),
    "prefer_tflite_model": (
        _boolean,
        "serve model.tflite in a version's folder, if there is one, in place of its SavedModel",
    ),
    "num_tflite_pools": (
        int,
        "requests that a TensorFlow Lite model answers at a time; 0 means one a core",
    ),
    "num_tflite_interpreters_per_pool": (
        int,
        "above 1, rows of requests to a TensorFlow Lite model are merged and shared out among them",
    ),
    "tensorflow_session_parallelism": (int, "sets both of the following"),
    "tensorflow_intra_op_parallelism": (
        int,
        "threads in one operation; 0 means TF_NUM_INTRAOP_THREADS, or half of the cores",
    ),
    "tensorflow_inter_op_parallelism": (int, "operations at a time; 0 means one a core"),
    "tensorflow_session_config_file": (str, "text file with TensorFlow's ConfigProto"),
    "per_process_gpu_memory_fraction": (
        float,
        "share of a GPU's memory to take; 0.0 lets TensorFlow choose",
    ),
}

# The other flags of tensorflow_model_server.
WITHOUT_EFFECT = [
    "enable_profiler",
    "flush_filesystem_caches",
    "mixed_precision",
    "num_load_threads",
    "num_unload_threads",
    "platform_config_file",
    "remove_unused_fields_from_bundle_metagraph",
    "skip_initialize_tpu",
    "thread_pool_factory_config_file",
    "total_model_memory_limit_bytes",
    "use_alts_credentials",
    "use_tflite_model",
    "xla_cpu_compilation_enabled",
    "xla_gpu_compilation_enabled",
]

if __name__ == "__main__":
    main(sys.argv[1:])
