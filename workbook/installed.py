"""Check that this environment has every package of a lock: `python installed.py Pipfile.lock`."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.markers import Marker


def missing(lock: dict[str, dict]) -> list[str]:
    """Return a sentence for each package that is missing, or installed in another version.

    Pipenv says nothing when it skips a package whose marker excludes this Python. Only packages
    for another operating system may be skipped.
    """
    sentences = []
    for name, package in {**lock["default"], **lock.get("develop", {})}.items():
        marker = package.get("markers", "")
        if "sys_platform" in marker and not Marker(marker).evaluate():
            continue
        wanted = package["version"].removeprefix("==")
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "missing"
        if found != wanted:
            why = f" (it is for {marker})" if marker and not Marker(marker).evaluate() else ""
            sentences.append(f"{name} should be {wanted} and is {found}{why}")
    return sentences


if __name__ == "__main__":
    sentences = missing(json.loads(Path(sys.argv[1]).read_text()))
    if sentences:
        sys.exit(
            f"On Python {platform.python_version()} not all of {sys.argv[1]} was installed:"
            f" {'; '.join(sentences)}. Try another Python: make clean, then"
            " make PYTHON=/path/to/python3 ..."
            " (docs/troubleshooting.md#pipenv-has-skipped-a-package)"
        )
