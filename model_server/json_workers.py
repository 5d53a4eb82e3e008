"""Processes that read and write long JSON, so that nobody else waits meanwhile.

One thread of a process runs Python at a time, and Python's parser lets go only when it is done: for
20 MB of JSON, every other request would stand still for a second. A document that is short is read
here and now; a long one goes to a process of its own, of which there are as many as cores. They
start when they are first needed, and end with the server, however that ends: what they read from it
comes to an end then.

They also give way. Where cores are scarce, predictions come first: these processes are as nice as
``NICENESS`` says. A body goes to them in pieces, because a copy of all of it at once would hold up
the other threads of the server for as long as the memory for it is found.

    python -m model_server.json_workers        is such a process
"""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from . import json_tensors
from .errors import ServingError, invalid_argument

LONG_BODY_BYTES = 2**16
PIECE_BYTES = 2**18
NICENESS = 10  # a tenth of a core is left to such a process beside others that want all of it
LONG_OUTPUT_VALUES = 2**12
STRING_BYTES_A_VALUE = 16  # so many bytes of a string take as long to write as a number

Call = Callable[..., Any]


def functions() -> dict[str, Call]:
    """Make the functions for one document after another.

    ``add`` takes a piece of a body, and ``parse`` reads them together and returns the signature's
    name; ``inputs`` and ``examples`` return what it holds for predict, and for classify and regress
    as a serialized ``Input``; ``forget`` ends this document. ``format_rows`` and ``format_columns``
    write an answer. All of them raise ServingError.
    """
    pieces: list[bytes] = []
    document: dict[str, Any] = {}

    def parse() -> str:
        body = b"".join(pieces)
        pieces.clear()
        document.update(json_tensors.parse_body(body))
        return _signature_name(document)

    def inputs(declared: Mapping[str, int]) -> tuple[dict[str, np.ndarray], bool]:
        return json_tensors.parse_inputs(document, declared)

    def examples() -> bytes:
        from . import json_examples

        return json_examples.parse_input(document).SerializeToString()

    def forget() -> None:
        pieces.clear()
        document.clear()

    return {
        "add": pieces.append,
        "parse": parse,
        "inputs": inputs,
        "examples": examples,
        "forget": forget,
        "format_rows": json_tensors.format_rows,
        "format_columns": json_tensors.format_columns,
    }


class JsonWorkers:
    """Lends the functions above, in this process or in one of its own."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._places = threading.Semaphore(max(2, os.cpu_count() or 1))
        self._closed = False

    @contextmanager
    def for_body(self, pieces: Iterator[bytes]) -> Iterator[Call]:
        """Lend a function that calls one of the functions by name, to read a body.

        ``pieces`` are of ``PIECE_BYTES`` each, only the last may be shorter.
        """
        piece = next(pieces, b"")
        with self._lend() if len(piece) > LONG_BODY_BYTES else _here() as call:
            try:
                call("add", piece)
                for piece in pieces:
                    call("add", piece)
                yield call
            finally:
                call("forget")

    @contextmanager
    def for_outputs(self, outputs: Mapping[str, np.ndarray]) -> Iterator[Call]:
        """Lend a function that calls one of the functions by name, to write an answer."""
        values = sum(array.size for array in outputs.values())
        for array in outputs.values():
            if array.dtype == object:
                values += sum(map(len, array.flat)) // STRING_BYTES_A_VALUE
        with self._lend() if values > LONG_OUTPUT_VALUES else _here() as call:
            yield call

    @contextmanager
    def _lend(self) -> Iterator[Call]:
        with self._places:
            worker = self._take()
            try:
                yield worker.call
            finally:
                with self._lock:
                    keep = not self._closed and worker.is_alive()
                    if keep:
                        self._idle.append(worker)
                if not keep:
                    worker.close()

    def _take(self) -> "_Worker":
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive():
                    return worker
                worker.close()
        return _Worker()

    def close(self) -> None:
        """End the processes; one that is at work ends when that is done."""
        with self._lock:
            self._closed = True
            for worker in self._idle:
                worker.close()
            self._idle.clear()


class _Worker:
    """A process of its own, and the pipes to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for the server, which ends this process. Not a session of its own: Linux
            # may share cores out among sessions first, and how nice a process is counts within one.
            process_group=0,
        )

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function there; raise what it raises."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            pickle.dump((name, arguments), self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            kind, answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self._process.kill()
            self._process.wait()  # or it would pass for alive a moment longer
            raise ServingError(
                grpc.StatusCode.UNAVAILABLE,
                "the process that reads long JSON has ended; it may have lacked memory",
            ) from error
        if kind == "refused":
            code, message = answer
            raise ServingError(grpc.StatusCode[code], message)
        if kind == "failed":
            raise RuntimeError(answer)
        return answer

    def is_alive(self) -> bool:
        """Say whether it can be called again."""
        return self._process.poll() is None

    def close(self) -> None:
        """Let it end."""
        with suppress(BrokenPipeError), self._process:
            pass  # closes the pipes, and waits


@contextmanager
def _here() -> Iterator[Call]:
    by_name = functions()
    yield lambda name, *arguments: by_name[name](*arguments)


def _signature_name(document: Mapping[str, Any]) -> str:
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid_argument(
            f"JSON Value: {json_tensors.show(name)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    return name.encode("utf-8", "replace").decode()  # a protobuf takes no half of a character


def _serve() -> None:
    """Answer calls until standard input ends."""
    os.nice(NICENESS)
    calls, answers = sys.stdin.buffer, sys.stdout.buffer
    by_name = functions()
    while True:
        try:
            name, arguments = pickle.load(calls)
        except EOFError:
            return
        try:
            answer = "done", by_name[name](*arguments)
        except ServingError as error:
            answer = "refused", (error.code.name, error.message)
        except Exception as error:
            answer = "failed", repr(error)
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
        del arguments, answer


if __name__ == "__main__":
    _serve()
