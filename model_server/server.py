"""The model server as one object: ports, model and both APIs, started and stopped together."""

import errno
import functools
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

DEFAULT_THREADS = 4 * (os.cpu_count() or 1)


@dataclass
class ModelServer:
    """A model server in this process: ``with ModelServer(...) as server:`` serves models.

    The fields are the command line's flags. Making an object reserves its ports, and raises OSError
    when one is taken. ``start`` waits for the first version of each model to be
    loaded and warmed up, and only then opens the ports; it raises ValueError when a file is wrong,
    ServingError when loading is given up. ``stop`` refuses new requests and gives those in flight
    ``grace_seconds`` to end.
    """

    model_base_path: str = ""
    model_name: str = "default"
    model_config_file: str = ""
    model_config_file_poll_wait_seconds: int = 0
    allow_version_labels_for_unavailable_models: bool = False
    force_allow_any_version_labels_for_unavailable_models: bool = False
    port: int = 8500
    rest_api_port: int = 0
    rest_api_num_threads: int = DEFAULT_THREADS
    rest_api_timeout_in_ms: int = 30_000
    rest_api_enable_cors_support: bool = False
    grpc_max_threads: int = DEFAULT_THREADS
    grpc_channel_arguments: Sequence[tuple[str, int | str]] = ()
    grpc_socket_path: str = ""
    ssl_config_file: str = ""
    file_system_poll_wait_seconds: int = 1
    max_num_load_retries: int = 5
    load_retry_interval_micros: int = 60_000_000
    saved_model_tags: Sequence[str] = ("serve",)
    tensorflow_intra_op_parallelism: int = 0
    tensorflow_inter_op_parallelism: int = 0
    tensorflow_session_config_file: str = ""
    per_process_gpu_memory_fraction: float = 0.0
    prefer_tflite_model: bool = False
    num_tflite_pools: int = 0
    num_tflite_interpreters_per_pool: int = 1
    enable_model_warmup: bool = True
    num_request_iterations_for_warmup: int = 0
    enable_serialization_as_tensor_content: bool = False
    enable_signature_method_name_check: bool = False
    enable_grpc_healthcheck_service: bool = False
    enforce_session_run_timeout: bool = False
    enable_batching: bool = False
    batching_parameters_file: str = ""
    enable_per_model_batching_parameters: bool = False
    monitoring_config_file: str = ""
    grace_seconds: float = 20.0

    def __post_init__(self) -> None:
        if not self.model_base_path and not self.model_config_file:
            raise ValueError("give either a model_base_path or a model_config_file")
        if self.batching_parameters_file and not self.enable_batching:
            raise ValueError("--batching_parameters_file has no effect: add --enable_batching")
        if self.monitoring_config_file and not self.rest_api_port:
            raise ValueError(
                "--monitoring_config_file needs the REST API: give it a port with --rest_api_port"
            )
        self._batch_scheduler: Any = None
        self._manager: Any = None
        self._stopping = threading.Event()
        self._grpc_server: Any = None
        self._rest_server: Any = None
        self._json_workers: Any = None
        # Bound but not listening: while TensorFlow is imported and the model loaded, nobody else
        # can take the ports, and clients find them closed.
        self._grpc_socket = _reserve(self.port, "--port")
        self.port = self._grpc_socket.getsockname()[1]
        self._rest_socket = None
        if self.rest_api_port:
            try:
                self._rest_socket = _reserve(self.rest_api_port, "--rest_api_port")
            except OSError:
                self._grpc_socket.close()
                raise

    def start(self) -> None:
        """Load the model, then open the ports."""
        # gRPC reads this when it is imported. Without its event engine, the threads that wait for a
        # socket also read from it.
        os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
        # The files come first, so that nobody waits for a model to be told of a mistake in them.
        models = self._read_model_config()
        self._batch_scheduler = self._make_batch_scheduler()
        metrics_path = self._read_metrics_path()
        credentials = self._read_credentials()
        self._load_models(models)
        self._open_grpc(credentials)
        if self._rest_socket:
            self._open_rest(self._rest_socket, metrics_path)
        if self.model_config_file and self.model_config_file_poll_wait_seconds > 0:
            threading.Thread(target=self._poll_model_config, name="config", daemon=True).start()

    def stop(self) -> None:
        """Refuse new requests, wait for those in flight, close the ports."""
        deadline = time.monotonic() + self.grace_seconds
        self._stopping.set()
        if self._grpc_server:
            grpc_stopped = self._grpc_server.stop(self.grace_seconds)
            if self._rest_server:
                self._rest_server.stop(deadline)
            # After a second without a request, gRPC has none left to hand over. Only clients that
            # watch the health are still connected, and they would stay for ever. Close their
            # connections, so that they ask another server.
            while not grpc_stopped.wait(1):
                if not self._manager.is_busy():
                    self._grpc_server.stop(None)
            self._manager.stop(deadline - time.monotonic())
        elif self._manager:
            self._manager.stop(0)
        if self._batch_scheduler:
            self._batch_scheduler.close()
        if self._json_workers:
            self._json_workers.close()
        self._grpc_socket.close()
        if self._rest_socket:
            self._rest_socket.close()

    def _read_model_config(self) -> Any:
        """Return the ``ModelServerConfig`` of the models to serve."""
        from . import config

        if self.model_config_file:
            return config.read(self.model_config_file)
        return config.single_model(self.model_name, self.model_base_path)

    def _make_batch_scheduler(self) -> Any:
        """Start the threads that run batches; None without ``enable_batching``."""
        from .batching import BatchingParameters, BatchScheduler

        if not self.enable_batching:
            return None
        file = self.batching_parameters_file
        parameters = BatchingParameters.from_file(file) if file else BatchingParameters()
        return BatchScheduler(parameters, self.enable_per_model_batching_parameters)

    def _read_metrics_path(self) -> str | None:
        """Return the path where Prometheus finds the metrics, None for nowhere."""
        from . import metrics

        file = self.monitoring_config_file
        return metrics.prometheus_path(file) if file else None

    def _read_credentials(self) -> Any:
        """Read an ``SSLConfig``: the server's key and certificate, and whether clients need one.

        None, without such a file, means that gRPC is in the clear.
        """
        if not self.ssl_config_file:
            return None
        import grpc

        from tfserving import server_messages_pb2

        from . import text_protos

        ssl_config = text_protos.read(self.ssl_config_file, server_messages_pb2.SSLConfig())
        key, certificate = ssl_config.server_key.encode(), ssl_config.server_cert.encode()
        root_certificates = ssl_config.custom_ca.encode() or None
        if ssl_config.client_verify and not root_certificates:
            raise ValueError(
                f"{self.ssl_config_file}: client_verify needs a custom_ca to verify clients by"
            )
        return grpc.ssl_server_credentials(
            [(key, certificate)], root_certificates, ssl_config.client_verify
        )

    def _load_models(self, models: Any) -> None:
        """Load what a ``ModelServerConfig`` lists, and wait until all of it is AVAILABLE."""
        from . import manager

        if self.tensorflow_session_config_file:
            _ = self._session_config  # raises ValueError when there is something wrong in the file
        # A server that looks for versions only once tries only once to load them, too.
        looks_once = self.file_system_poll_wait_seconds == 0
        retries = 0 if looks_once else self.max_num_load_retries
        self._manager = manager.ModelManager(
            lambda name: manager.Model(
                name, self._load_version, retries, self.load_retry_interval_micros
            ),
            self.file_system_poll_wait_seconds,
            self.allow_version_labels_for_unavailable_models,
            self.force_allow_any_version_labels_for_unavailable_models,
        )
        self._manager.configure(models)
        self._manager.start()
        self._manager.wait_until_available()

    @functools.cached_property
    def _session_config(self) -> Any:
        """Make the ``ConfigProto`` of every session: its threads, and its share of a GPU."""
        from . import saved_model, text_protos

        saved_model.import_tensorflow()
        from tensorflow.core.protobuf import config_pb2

        config = config_pb2.ConfigProto(
            # One operation gets half of the cores, and leaves the others to other requests:
            # bench/README.md has the numbers. A container may use fewer cores than its machine has,
            # and this variable says how many.
            intra_op_parallelism_threads=int(os.environ.get("TF_NUM_INTRAOP_THREADS", "0"))
            or max(1, (os.cpu_count() or 1) // 2)
        )
        if self.tensorflow_session_config_file:
            text_protos.read(self.tensorflow_session_config_file, config)
        if self.tensorflow_intra_op_parallelism:
            config.intra_op_parallelism_threads = self.tensorflow_intra_op_parallelism
        if self.tensorflow_inter_op_parallelism:
            config.inter_op_parallelism_threads = self.tensorflow_inter_op_parallelism
        if self.per_process_gpu_memory_fraction:
            share = self.per_process_gpu_memory_fraction
            config.gpu_options.per_process_gpu_memory_fraction = share
        return config

    def _load_version(self, path: Path) -> Any:
        """Load the version of a model in the folder ``path``, and warm it up."""
        from . import warmup

        begin = time.monotonic()
        loaded = self._load(path)
        middle = time.monotonic()
        replayed = 0
        if self.enable_model_warmup:
            iterations = max(1, self.num_request_iterations_for_warmup)
            try:
                replayed = warmup.replay(loaded, path, iterations)
            except Exception:
                loaded.close()
                raise
        log.info(
            "loaded %s in %.0f ms, replayed %d warm-up requests in %.0f ms",
            *(path, (middle - begin) * 1e3, replayed, (time.monotonic() - middle) * 1e3),
        )
        return loaded

    def _load(self, path: Path) -> Any:
        """Load ``model.tflite`` if it is there and preferred, and the SavedModel otherwise."""
        from . import saved_model
        from .servable import LITE_FILE

        if self.prefer_tflite_model and (path / LITE_FILE).exists():
            from . import lite_model

            return lite_model.LiteModel(
                path,
                self.num_tflite_pools,
                self.num_tflite_interpreters_per_pool,
                self._batch_scheduler,
            )
        return saved_model.SavedModel(
            path, self.saved_model_tags, self._session_config, self._batch_scheduler
        )

    def _open_grpc(self, credentials: Any) -> None:
        """Open the gRPC API on its port, and on a UNIX socket where a path is given."""
        from . import grpc_api

        self._grpc_server = grpc_api.make_server(
            self._manager,
            self.grpc_max_threads,
            self.grpc_channel_arguments,
            self.enable_serialization_as_tensor_content,
            self.enable_signature_method_name_check,
            self.enable_grpc_healthcheck_service,
            self.enforce_session_run_timeout,
        )
        self._grpc_socket.close()
        self._listen(f"0.0.0.0:{self.port}", credentials)  # for gRPC, all addresses of IPv6, too
        if self.grpc_socket_path:
            self._listen(f"unix:{self.grpc_socket_path}", credentials)
        self._grpc_server.start()
        log.info("gRPC API is open on port %d", self.port)

    def _listen(self, address: str, credentials: Any) -> None:
        """Let the gRPC server listen at an address, in the clear unless there are credentials."""
        try:
            if credentials is None:
                self._grpc_server.add_insecure_port(address)
            else:
                self._grpc_server.add_secure_port(address, credentials)
        except RuntimeError as error:
            if credentials is not None:
                raise OSError(
                    f"cannot listen at {address} with the keys in {self.ssl_config_file}: "
                    "server_key and server_cert must be a PEM key and its certificate"
                ) from error
            if address.startswith("unix:"):
                raise OSError(
                    f"cannot listen at {address}: give another path with --grpc_socket_path"
                ) from error
            raise _port_error(self.port, "--port", errno.EADDRINUSE) from error

    def _open_rest(self, bound_socket: socket.socket, metrics_path: str | None) -> None:
        """Open the REST API, with the metrics at ``metrics_path`` unless that is None."""
        from . import json_workers, rest_api

        self._json_workers = json_workers.JsonWorkers()
        app = rest_api.RestApi(
            self._manager,
            self._json_workers,
            max(0, self.rest_api_timeout_in_ms),
            metrics_path,
            self.enable_signature_method_name_check,
            self.rest_api_enable_cors_support,
        )
        self._rest_server = rest_api.RestServer(app, bound_socket, self.rest_api_num_threads)
        log.info("REST API is open on port %d", self.rest_api_port)

    def _poll_model_config(self) -> None:
        """Follow the model config file until the server stops; log each mistake in it once."""
        from . import config as model_config
        from .errors import ServingError

        said = ""
        while not self._stopping.wait(self.model_config_file_poll_wait_seconds):
            try:
                config = model_config.read(self.model_config_file)
                if config != self._manager.config:
                    self._manager.reload(config)
                    log.info("now serving what %s lists", self.model_config_file)
                said = ""
            except (ValueError, ServingError) as error:
                if said != str(error):
                    said = str(error)
                    log.error("cannot serve what %s lists: %s", self.model_config_file, said)

    def __enter__(self) -> "ModelServer":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _reserve(port: int, flag: str) -> socket.socket:
    """Bind a port on all addresses of IPv4 and IPv6 without listening; port 0 means any free one.

    Where the system has no IPv6, it is IPv4 alone.
    """
    with socket.socket() as probe:
        # Some systems let two programs bind the same port on different addresses.
        if port and probe.connect_ex(("127.0.0.1", port)) == 0:
            raise _port_error(port, flag, errno.EADDRINUSE)
    both = socket.has_dualstack_ipv6()
    bound = socket.socket(socket.AF_INET6 if both else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if both:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(("::" if both else "0.0.0.0", port))
    except OSError as error:
        bound.close()
        raise _port_error(port, flag, error.errno) from error
    return bound


def _port_error(port: int, flag: str, number: int | None) -> OSError:
    if number == errno.EADDRINUSE:
        return OSError(
            f"port {port} is already in use: end the program that holds it, or give another "
            f"port with {flag}"
        )
    reason = os.strerror(number or 0)
    return OSError(f"cannot open port {port} ({reason}): give another port with {flag}")
