"""Which versions of which model are there, in what state, and which one answers a request."""

import dataclasses
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from tensorflow_serving.apis import get_model_status_pb2

from .errors import ServingError, invalid_argument
from .servable import Servable

log = logging.getLogger(__name__)

State = get_model_status_pb2.ModelVersionStatus
REMINDER_SECONDS = 60.0


@dataclasses.dataclass
class Version:
    """A numbered version of a model, from the first attempt to load it until the server ends."""

    number: int
    state: int = State.LOADING
    servable: Servable | None = None
    error: ServingError | None = None
    in_flight: int = 0
    failures: int = 0
    retry_at: float = 0.0


class Model:
    """The versions of one model: those found below its base path, and those that were."""

    def __init__(
        self,
        name: str,
        base_path: Path,
        load: Callable[[Path], Servable],
        max_num_load_retries: int = 5,
        load_retry_interval_micros: int = 60_000_000,
    ):
        self.name = name
        self.base_path = base_path
        self.versions: dict[int, Version] = {}
        self.changed = threading.Condition()
        self._load_servable = load
        self._max_num_load_retries = max_num_load_retries
        self._retry_seconds = load_retry_interval_micros / 1e6
        self._said = ("", 0.0)

    def available(self) -> list[int]:
        """Return the numbers of the versions that answer requests, in ascending order."""
        return sorted(n for n, v in self.versions.items() if v.state == State.AVAILABLE)

    def lost(self) -> ServingError | None:
        """Return the error of the newest version when no attempt to load it is left."""
        failed = [v for v in self.versions.values() if v.failures > self._max_num_load_retries]
        return max(failed, key=lambda v: v.number).error if failed else None

    def poll(self) -> None:
        """Bring the versions in line with the base path: load the newest, then unload the others.

        The others go only when the newest is AVAILABLE, or when nothing is left to serve.
        """
        found = self._find_versions()
        if found is None:
            return
        aspired = sorted(found)[-1:]
        for number in aspired:
            if self._wants_loading(number):
                self._load(number, found[number])
        if not aspired or set(aspired) & set(self.available()):
            for number in self.available():
                if number not in aspired:
                    self._unload(self.versions[number])
        for number, version in self.versions.items():
            if number not in aspired:
                version.failures, version.retry_at = 0, 0.0

    def _find_versions(self) -> dict[int, Path] | None:
        """Return number and folder of each version; None when the base path cannot be read."""
        path = self.base_path
        try:
            names = sorted(entry.name for entry in path.iterdir())
        except OSError as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
            self._say(
                f"base path {path} of model {self.name}: {reason}; waiting for a folder there "
                f"that holds each version in a folder named by its number, such as {path / '1'}"
            )
            return None
        numbers = [name for name in names if name.isascii() and name.isdigit()]
        found = {int(name): path / name for name in numbers if int(name) < 2**63}
        if not found and "saved_model.pb" in names:
            self._say(
                f"{path} is itself a SavedModel: give the folder above it as --model_base_path, "
                "and name this one by its version number"
            )
        elif not found:
            self._say(
                f"no versions of model {self.name} found under base path {path}; waiting for a "
                f"SavedModel in a folder named by its version number, such as {path / '1'} "
                f"(there is: {', '.join(names) or 'nothing'})"
            )
        return found

    def _say(self, message: str) -> None:
        """Log a message when it is new, and again from time to time while it stays true."""
        said, when = self._said
        if message != said or time.monotonic() - when > REMINDER_SECONDS:
            log.warning(message)
            self._said = message, time.monotonic()

    def _wants_loading(self, number: int) -> bool:
        version = self.versions.get(number)
        if version is None or (version.state == State.END and version.error is None):
            return True
        return (
            version.state == State.END
            and version.failures <= self._max_num_load_retries
            and time.monotonic() >= version.retry_at
        )

    def _load(self, number: int, path: Path) -> None:
        with self.changed:
            version = self.versions.setdefault(number, Version(number))
            version.state, version.error = State.LOADING, None
        try:
            servable = self._load_servable(path)
        except Exception as error:
            failure = ServingError(grpc.StatusCode.INTERNAL, repr(error))
            if isinstance(error, ServingError):
                failure = error
            version.failures += 1
            version.retry_at = time.monotonic() + self._retry_seconds
            left = self._max_num_load_retries + 1 - version.failures
            log.error(
                "cannot load version %d of %s: %s (%s)",
                *(number, self.name, failure),
                f"next attempt in {self._retry_seconds:g} s, {left} left" if left else "given up",
            )
            with self.changed:
                version.state, version.error = State.END, failure
                self.changed.notify_all()
        else:
            # From now on the collector passes over what is loaded: a look at all of TensorFlow's
            # objects would hold up every thread for a fifth of a second, in mid-request.
            gc.freeze()
            with self.changed:
                version.servable, version.state, version.failures = servable, State.AVAILABLE, 0
                self.changed.notify_all()

    def _unload(self, version: Version) -> None:
        """Take a version out of service, wait for the requests that it still answers, free it."""
        with self.changed:
            version.state = State.UNLOADING
            self.changed.wait_for(lambda: version.in_flight == 0)
            servable, version.servable = version.servable, None
        assert servable is not None
        servable.close()
        del servable
        gc.unfreeze()
        gc.collect()  # the Python side of a graph is full of cycles
        gc.freeze()
        with self.changed:
            version.state = State.END
        log.info("unloaded version %d of %s", version.number, self.name)


class ModelManager:
    """Keeps the models in line with the file system, and hands their servables to requests."""

    def __init__(self, models: Iterable[Model], file_system_poll_wait_seconds: int = 1):
        self._models = {model.name: model for model in models}
        self._poll_wait_seconds = file_system_poll_wait_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="versions", daemon=True)

    def start(self) -> None:
        """Begin to poll, in a thread of its own."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop polling; wait up to ``timeout`` seconds for a version that is being loaded."""
        self._stop.set()
        self._thread.join(max(0, timeout))

    def wait_until_available(self) -> None:
        """Wait for a version of every model; raise its ServingError when loading was given up."""
        for model in self._models.values():
            with model.changed:
                while not model.available():
                    if error := model.lost():
                        raise error
                    model.changed.wait(0.5)  # not without end: signals must get through

    @contextmanager
    def servable(self, spec: Any) -> Iterator[tuple[int, Servable]]:
        """Hold the servable that a ``ModelSpec`` selects, with its version, while it is in use."""
        model, number = self._select(spec)
        request = f"Latest({spec.name})" if number is None else f"Specific({spec.name}, {number})"
        missing = ServingError(
            grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {request}"
        )
        if model is None:
            raise missing
        with model.changed:
            available = model.available()
            if number is None and available:
                number = available[-1]
            if number not in available:
                raise missing
            version = model.versions[number]
            version.in_flight += 1
        try:
            assert version.servable is not None
            yield version.number, version.servable
        finally:
            with model.changed:
                version.in_flight -= 1
                if version.in_flight == 0:
                    model.changed.notify_all()

    def status(self, spec: Any) -> list[Version]:
        """Return the versions that a ``ModelSpec`` selects, in whatever state, newest first."""
        model, number = self._select(spec)
        versions: dict[int, Version] = {}
        if model is not None:
            with model.changed:
                versions = {n: dataclasses.replace(v) for n, v in model.versions.items()}
        if number is not None:
            if number not in versions:
                raise ServingError(
                    grpc.StatusCode.NOT_FOUND,
                    f"Could not find version {number} of model {spec.name}",
                )
            return [versions[number]]
        if not versions:
            raise ServingError(
                grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {spec.name}"
            )
        return [versions[n] for n in sorted(versions, reverse=True)]

    def _select(self, spec: Any) -> tuple[Model | None, int | None]:
        if not spec.name:
            raise invalid_argument("ModelSpec has no name specified.")
        if spec.WhichOneof("version_choice") == "version_label":
            raise invalid_argument(f"Unrecognized servable version label: {spec.version_label}")
        number = spec.version.value if spec.HasField("version") else None
        return self._models.get(spec.name), number

    def _poll(self) -> None:
        if self._poll_wait_seconds < 0:
            log.warning("--file_system_poll_wait_seconds is negative: no version is looked for")
            return
        while True:
            for model in self._models.values():
                model.poll()
            if self._poll_wait_seconds == 0 or self._stop.wait(self._poll_wait_seconds):
                return
