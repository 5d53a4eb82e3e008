"""What packages weigh with all that they need, and an environment that holds them and no others."""

import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def with_needs(*wanted: str) -> set[str]:
    """Return the names of these installed packages and of all that they need, by metadata."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in wanted]
    while waiting:
        found.add(name := waiting.pop())
        for need in map(Requirement, metadata.requires(name) or []):
            other = canonicalize_name(need.name)
            if other not in found and (not need.marker or need.marker.evaluate({"extra": ""})):
                waiting.append(other)
    return found


def megabytes(names: Iterable[str]) -> float:
    """Return how much room the files of installed packages take, in megabytes (10^6 bytes)."""
    files = {Path(str(file.locate())) for name in names for file in metadata.files(name) or []}
    return sum(file.stat().st_size for file in files if file.exists()) / 1e6


def link(folder: Path, names: Iterable[str]) -> Path:
    """Make a virtual environment of links to some installed packages; return its Python.

    `pipenv sync` makes such an environment from the network. This one needs none, since the
    packages are installed here already.
    """
    venv.create(folder, clear=True, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in names:
        for file in metadata.files(name) or []:
            if (top := file.parts[0]) not in ("..", "__pycache__") and not (site / top).exists():
                package = metadata.distribution(name).locate_file(top)
                (site / top).symlink_to(Path(str(package)).resolve())
    return folder.absolute() / "bin/python"
