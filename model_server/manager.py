"""The versions of each model: their states, and which of them answers a request."""

import contextlib
import ctypes
import dataclasses
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from tfserving import messages_pb2

from . import config as model_config
from .errors import ServingError, invalid_argument
from .servable import Servable

log = logging.getLogger(__name__)

State = messages_pb2.ModelVersionStatus
REMINDER_SECONDS = 60.0


@dataclasses.dataclass
class Version:
    """A numbered version of a model, from the moment its folder is found until the server ends.

    ``aspired`` says whether it is to be served. ``tried`` is what its folder held when the last
    attempt to load it began, ``seen`` what it held at the last look.
    """

    number: int
    state: int = State.START
    aspired: bool = True
    servable: Servable | None = None
    error: ServingError | None = None
    in_flight: int = 0
    failures: int = 0
    retry_at: float = 0.0
    tried: frozenset = frozenset()
    seen: frozenset = frozenset()


class Model:
    """The versions of one model: those found below its base path, and those that were.

    ``config`` is its ``ModelConfig``, or None when it is no longer to be served.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[Path], Servable],
        max_num_load_retries: int,
        load_retry_interval_micros: int,
    ):
        self.name = name
        self.config: Any = None
        self.versions: dict[int, Version] = {}
        self.changed = threading.Condition()
        self._load_servable = load
        self._max_num_load_retries = max_num_load_retries
        self._retry_seconds = load_retry_interval_micros / 1e6
        self._said = ("", 0.0)

    def available(self) -> list[int]:
        """Return the numbers of the versions that answer requests, in ascending order."""
        with self.changed:
            return sorted(n for n, v in self.versions.items() if v.state == State.AVAILABLE)

    def lost(self) -> ServingError | None:
        """Return the error of the newest version when no attempt to load any of them is left."""
        aspired = [version for version in self.versions.values() if version.aspired]
        if aspired and all(v.failures > self._max_num_load_retries for v in aspired):
            return max(aspired, key=lambda version: version.number).error
        return None

    def trouble(self) -> str:
        """Return TensorFlow Serving's message for why no version is available."""
        with self.changed:
            failed = [v for v in self.versions.values() if v.aspired and v.error]
            if not failed:
                reason = self._said[0] or "no version has been looked for"
                return f"{{{{name: {self.name}}} due to error: {reason}}}, "
            version = max(failed, key=lambda version: version.number)
            assert version.error
            return (
                f"{{{{name: {self.name} version: {version.number}}} due to error: "
                f"{version.error.code.name}: {version.error.message}}}, "
            )

    def poll(self) -> None:
        """Bring the versions in line with the base path and the policy: load, then unload.

        A version that the policy no longer wants is unloaded only when one that it wants is
        AVAILABLE, or when it wants none.
        """
        config = self.config
        found = {} if config is None else self._find_versions(config)
        if found is None:
            return
        aspired = self._aspired(config, found)
        with self.changed:
            for number in aspired:
                self.versions.setdefault(number, Version(number))
            for number, version in self.versions.items():
                version.aspired = number in aspired
                if not version.aspired:
                    version.failures, version.retry_at = 0, 0.0
        for number in aspired:
            if self._wants_loading(self.versions[number], found[number]):
                self._load(self.versions[number], found[number])
        if not aspired or set(aspired) & set(self.available()):
            for number in self.available():
                if number not in aspired:
                    self._unload(self.versions[number])

    def _aspired(self, config: Any, found: dict[int, Path]) -> list[int]:
        """Return which of the versions in ``found`` are to be served, newest first."""
        newest_first = sorted(found, reverse=True)
        if not found:
            return []
        policy = config.model_version_policy
        choice = policy.WhichOneof("policy_choice")
        if choice == "all":
            return newest_first
        if choice == "specific":
            if missing := sorted(set(policy.specific.versions) - set(found)):
                self._say(
                    f"Version {', '.join(map(str, missing))} of servable {self.name}, which was "
                    "requested to be served as a 'specific' version in the servable's version "
                    f"policy, was not found in the file system (below {config.base_path} there "
                    f"is: {', '.join(map(str, sorted(found)))})"
                )
            return [number for number in newest_first if number in policy.specific.versions]
        return newest_first[: max(1, policy.latest.num_versions)]

    def _find_versions(self, config: Any) -> dict[int, Path] | None:
        """Return number and folder of each version; None when the base path cannot be read."""
        path = Path(config.base_path)
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
                "and name this one by its version number "
                "(docs/troubleshooting.md#the-base-path-is-itself-a-savedmodel)"
            )
        elif not found:
            self._say(
                f"no versions of model {self.name} found under base path {path}; waiting for a "
                f"SavedModel in a folder named by its version number, such as {path / '1'} "
                f"(there is: {', '.join(names) or 'nothing'}) "
                "(docs/troubleshooting.md#no-versions-of-servable)"
            )
        return found

    def _say(self, message: str) -> None:
        """Log a message when it is new, and every minute while it stays true."""
        said, when = self._said
        if message != said or time.monotonic() - when > REMINDER_SECONDS:
            log.warning(message)
            self._said = message, time.monotonic()

    def _wants_loading(self, version: Version, path: Path) -> bool:
        """Say whether it is time to try to load a version, for the first time or again."""
        if version.state != State.END:
            return version.state == State.START
        if version.error is None:
            return True
        before, version.seen = version.seen, _look_into(path)
        if version.seen == before != version.tried:
            # The files have changed since the last attempt, but not since the last look: whoever
            # has written them seems to be done.
            version.failures, version.retry_at = 0, 0.0
        return (
            version.failures <= self._max_num_load_retries and time.monotonic() >= version.retry_at
        )

    def _load(self, version: Version, path: Path) -> None:
        number = version.number
        log.info("loading version %d of %s", number, self.name)
        version.tried = version.seen = _look_into(path)
        with self.changed:
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
            with self.changed:
                version.servable, version.state, version.failures = servable, State.AVAILABLE, 0
                self.changed.notify_all()
        _return_free_memory()

    def _unload(self, version: Version) -> None:
        """Take a version out of service, wait for the requests that it still answers, free it."""
        with self.changed:
            version.state = State.UNLOADING
            self.changed.wait_for(lambda: version.in_flight == 0)
            servable, version.servable = version.servable, None
        assert servable is not None
        servable.close()
        del servable
        gc.collect()  # the Python side of a graph is full of cycles
        _return_free_memory()
        with self.changed:
            version.state = State.END
        log.info("unloaded version %d of %s", version.number, self.name)


def _return_free_memory() -> None:
    """Return to the system the memory that glibc keeps after a graph was built or freed.

    It is several times the size of the graph: 250 MiB with the clothing model.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _look_into(path: Path) -> frozenset:
    """Return the size and the time of change of everything in a folder."""
    entries = set()
    with contextlib.suppress(OSError):  # gone or unreadable, which a later look may find changed
        for entry in (path, *path.rglob("*")):
            status = entry.stat()
            entries.add((entry, status.st_size, status.st_ctime_ns))
    return frozenset(entries)


class ModelManager:
    """Keeps the models in line with config and file system; hands their servables to requests."""

    def __init__(
        self,
        make_model: Callable[[str], Model],
        file_system_poll_wait_seconds: int,
        allow_version_labels_for_unavailable_models: bool,
        force_allow_any_version_labels_for_unavailable_models: bool,
    ):
        self.config: Any = None
        self._make_model = make_model
        self._models: dict[str, Model] = {}
        self._labels: dict[str, dict[str, int]] = {}
        self._allow_labels = allow_version_labels_for_unavailable_models
        self._allow_any_labels = force_allow_any_version_labels_for_unavailable_models
        self._poll_wait_seconds = file_system_poll_wait_seconds
        self._configuring = threading.Lock()
        self._configs = 0  # how many configs there have been
        self._configs_polled = 0  # how many of them had come when the last look for versions began
        self._polled = threading.Condition()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="versions", daemon=True)

    def start(self) -> None:
        """Begin to poll, in a thread of its own."""
        self._thread.start()

    def is_busy(self) -> bool:
        """Say whether a request is being answered by some version."""
        versions = [
            v for model in list(self._models.values()) for v in list(model.versions.values())
        ]
        return any(version.in_flight for version in versions)

    def stop(self, timeout: float) -> None:
        """Stop polling; wait up to ``timeout`` seconds for a version that is being loaded."""
        self._stop.set()
        self._wake.set()
        with self._polled:
            self._polled.notify_all()
        if self._thread.is_alive():
            self._thread.join(max(0, timeout))

    def configure(self, config: Any) -> list[Model]:
        """Serve what a ``ModelServerConfig`` lists from now on; return the models that are new.

        Raises ServingError, and changes nothing, when the config is wrong, or when a label points
        to a version that is not available.
        """
        with self._configuring:
            model_config.check(config, self.config)
            labels = self._check_labels(config)
            before = model_config.listed(self.config) if self.config is not None else {}
            listed = model_config.listed(config)
            for name in listed:
                if name not in self._models:
                    self._models[name] = self._make_model(name)
            for name, model in self._models.items():
                model.config = listed.get(name)
            if not listed:
                log.warning("the config lists no model: nothing is served")
            self.config, self._labels = config, labels
            self._configs += 1
            self._wake.set()
            return [self._models[name] for name in listed if name not in before]

    def reload(self, config: Any) -> None:
        """Do as ``configure`` does, and wait until versions have been loaded and unloaded.

        Raises ServingError also when a new model has no available version then; it is still
        looked for.
        """
        new = self.configure(config)
        number = self._configs
        with self._polled:
            self._polled.wait_for(lambda: self._configs_polled >= number or self._stop.is_set())
        if missing := [model for model in new if not model.available()]:
            raise ServingError(
                grpc.StatusCode.UNKNOWN,
                f"{len(missing)} model(s) did not become available: "
                f"{{{''.join(model.trouble() for model in missing)}}}",
            )

    def wait_until_available(self) -> None:
        """Wait for a version of every model; raise its ServingError when loading was given up."""
        for model in self._models.values():
            with model.changed:
                while not model.available():
                    if error := model.lost():
                        raise error
                    model.changed.wait(0.5)  # not for ever, or no signal would be handled

    @contextlib.contextmanager
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
        """Return the version that a ``ModelSpec`` names, or all, in whatever state, newest first.

        A label is not looked at.
        """
        model = self._models.get(spec.name)
        number = spec.version.value if spec.HasField("version") else None
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
        model = self._models.get(spec.name)
        if spec.WhichOneof("version_choice") == "version_label":
            labels = self._labels.get(spec.name, {})
            if spec.version_label not in labels:
                raise invalid_argument(f"Unrecognized servable version label: {spec.version_label}")
            return model, labels[spec.version_label]
        return model, spec.version.value if spec.HasField("version") else None

    def _check_labels(self, config: Any) -> dict[str, dict[str, int]]:
        """Return the version of each label of each model, if it may have it."""
        labels: dict[str, dict[str, int]] = {}
        for name, model in model_config.listed(config).items():
            available = self._models[name].available() if name in self._models else []
            for label, number in model.version_labels.items():
                moved = self._labels.get(name, {}).get(label, number) != number
                allowed = self._allow_any_labels or (self._allow_labels and not moved)
                if not allowed and number not in available:
                    remedy = ": start with --allow_version_labels_for_unavailable_models=true"
                    raise ServingError(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"Request to assign label to version {number} of model {name}, which is "
                        "not currently available for inference"
                        + (remedy if self.config is None else ""),
                    )
                labels.setdefault(name, {})[label] = number
        return labels

    def _poll(self) -> None:
        if self._poll_wait_seconds < 0:
            log.warning("--file_system_poll_wait_seconds is negative: no version is looked for")
        while not self._stop.is_set():
            self._wake.clear()
            configs = self._configs
            if self._poll_wait_seconds >= 0:
                for model in list(self._models.values()):
                    try:
                        model.poll()
                    except Exception:  # it must end neither the others' turn nor the thread
                        log.exception("cannot look after the versions of %s", model.name)
            with self._polled:
                self._configs_polled = configs
                self._polled.notify_all()
            # With an interval of 0, only a new config makes it look again.
            self._wake.wait(self._poll_wait_seconds if self._poll_wait_seconds > 0 else None)
