"""Lock the packages of all Pipfiles: `make lock`.

A lock is for every platform and every Python that the README promises, and names no index.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from pipenv.vendor.packaging.markers import Marker

# The oldest release of each Python that the README promises.
PYTHONS = ("3.11.0", "3.12.0", "3.13.0")


def lock(pipfile: Path) -> None:
    """Write the lock beside a Pipfile; end with a sentence if the Pipfile has to change first."""
    environment = {"VIRTUAL_ENV": sys.prefix, "PIPENV_PIPFILE": str(pipfile.resolve())}
    subprocess.run(
        [sys.executable, "-m", "pipenv", "lock"], env={**os.environ, **environment}, check=True
    )
    path = pipfile.with_suffix(".lock")
    content = json.loads(path.read_text())
    content["_meta"]["sources"] = []
    wanted = tomllib.loads(pipfile.read_text()).keys()
    names = {"packages": "default", "dev-packages": "develop"}
    for section in content.keys() - {"_meta", *(names.get(name, name) for name in wanted)}:
        del content[section]
    for section in content.keys() - {"_meta"}:
        for name, package in content[section].items():
            package.pop("index", None)
            check(path, name, package)
    path.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n")


def check(path: Path, name: str, package: dict) -> None:
    """End with a sentence if a package has no hashes, or cannot be installed on every Python."""
    if not package.get("hashes"):
        sys.exit(f"{path} has no hashes for {name}: give its exact version in the Pipfile.")
    for python in PYTHONS:
        version = {"python_full_version": python, "python_version": python.rpartition(".")[0]}
        if not Marker(package.get("markers", "python_version > '3'")).evaluate(
            {**version, "sys_platform": "darwin"}
        ):
            sys.exit(
                f"{path}: {name} {package['version']} is not for Python {python}"
                f" ({package['markers']}): give an older version in the Pipfile."
            )


if __name__ == "__main__":
    if sys.version_info[:2] != (3, 11):
        sys.exit(
            "Locks are made with the oldest Python: make clean, then make lock PYTHON=python3.11."
        )
    for each in (Path("Pipfile"), Path("bench/Pipfile"), Path("workbook/book/Pipfile")):
        lock(each)
