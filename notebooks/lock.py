"""Resolve Pipfile into a Pipfile.lock for every platform, which names no index: `make lock`."""

import json
import os
import subprocess
import sys
from pathlib import Path

if sys.version_info[:2] != (3, 11):
    sys.exit(
        "The lock is made with the oldest Python: make clean, then make lock PYTHON=python3.11."
    )
subprocess.run(
    [sys.executable, "-m", "pipenv", "--python", sys.executable, "lock"],
    env={**os.environ, "PIPENV_VENV_IN_PROJECT": "1", "PIPENV_IGNORE_VIRTUALENVS": "1"},
    check=True,
)
path = Path("Pipfile.lock")
lock = json.loads(path.read_text())
lock["_meta"]["sources"] = []
for section in lock.keys() - {"_meta"}:
    for name, package in lock[section].items():
        package.pop("index", None)
        if not package.get("hashes"):
            sys.exit(f"Pipfile.lock has no hashes for {name}: give its exact version in Pipfile.")
path.write_text(json.dumps(lock, indent=4, sort_keys=True) + "\n")
