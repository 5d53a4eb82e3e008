"""The processes of a run: all that descend from it, and how they end.

`python -m workbook.processes VARIABLE VALUE FOLDER` waits until its input ends, however the program
that has started it does. Then it kills the processes that have inherited the variable, and removes
the folder.
"""

import shutil
import signal
import sys
import uuid
from contextlib import suppress
from types import FrameType

import psutil

MARK = uuid.uuid4().hex
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def marked(variable: str, mark: str) -> list[psutil.Process]:
    """Return the processes that have inherited a variable with this value."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(variable) == mark:
                found.append(process)
    return found


def started() -> list[psutil.Process]:
    """Return the processes that descend from this one, the servers of a notebook included.

    A kernel leads a session of its own, so neither Ctrl-C nor the kernel's end reaches the
    servers that a notebook has started; but all of them inherit the mark in their environment.
    """
    return marked("WORKBOOK_RUN", MARK)


def end_started() -> None:
    """End every process that this one has started."""
    ending = started()
    for process in ending:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(ending, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def end_on_signals() -> None:
    """Raise one KeyboardInterrupt on Ctrl-C, SIGTERM or a closed terminal, however often sent."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.terminate()
        end_started()
        raise KeyboardInterrupt

    for each in SIGNALS:
        signal.signal(each, interrupt)


if __name__ == "__main__":
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.stdin.read()
    for process in marked(*sys.argv[1:3]):
        with suppress(psutil.Error):
            process.kill()
    shutil.rmtree(sys.argv[3], ignore_errors=True)
