"""Which module may import which: nothing of the workbook in the product, and no circles."""

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.basics import ROOT

# The files of each part. The product must run without the workbook beside it.
PRODUCT = {
    "gateway": ["*.py"],
    "tfserving": ["tfserving/**/*.py"],
    "model_server": ["model_server/**/*.py"],
    "eks": ["eks/**/*.py"],
}
PARTS = PRODUCT | {"workbook": ["workbook/**/*.py"], "bench": ["bench/**/*.py"]}
WORKBOOK = {"workbook", "notebooks", "bench", "tests"}


def name_of(path: Path) -> str:
    """Name a file as an import does: ``eks/cost.py`` is ``eks.cost``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(part: str) -> dict[str, Path]:
    """The file of each module of a part, by the module's name."""
    paths = [path for pattern in PARTS[part] for path in ROOT.glob(pattern)]
    return {name_of(path): path for path in paths}


MODULES = {name: path for part in PARTS for name, path in modules_of(part).items()}


def imports(source: str, package: str) -> Iterator[tuple[str, str]]:
    """Each import in a module of ``package``, wherever it stands: a module, and a name in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for each in node.names:
                yield each.name, ""
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for each in node.names:
                yield importlib.util.resolve_name(module, package), each.name


def imports_of(name: str) -> list[tuple[str, str]]:
    path = MODULES[name]
    return list(imports(path.read_text(), name_of(path.parent / "__init__.py")))


@functools.cache
def own_imports(name: str) -> set[str]:
    """The project's own modules that one of them imports."""
    found = set()
    for module, attribute in imports_of(name):
        submodule = f"{module}.{attribute}"
        found |= {submodule if submodule in MODULES else module} & MODULES.keys()
    return found


def circle_of(module: str) -> list[str]:
    """The shortest route by which a module imports itself; empty if there is none."""
    routes = [[module]]
    seen: set[str] = set()
    while routes:
        route = routes.pop(0)
        for imported in sorted(own_imports(route[-1])):
            if imported == module:
                return [*route, module]
            if imported not in seen:
                seen.add(imported)
                routes.append([*route, imported])
    return []


SOURCE = """
import a.b
from c import d, e
from . import f
from ..g import h
if TYPE_CHECKING:
    import i
def function():
    from .j import k as l
"""


def test_imports_are_found_wherever_they_stand() -> None:
    assert set(imports(SOURCE, "package.inner")) == {
        *(("a.b", ""), ("c", "d"), ("c", "e"), ("package.inner", "f"), ("package.g", "h")),
        *(("i", ""), ("package.inner.j", "k")),
    }
    assert {"pictures", "web", "tfserving"} <= own_imports("gateway")
    assert {"model_server.manager", "model_server.batching"} <= own_imports("model_server.server")
    assert "model_server.training.draw" in own_imports("model_server.training.train")


@pytest.mark.parametrize("part", PRODUCT)
def test_the_product_imports_nothing_of_the_workbook(part: str) -> None:
    assert modules_of(part)
    found = [
        f"{name} imports {module}"
        for name in modules_of(part)
        for module, _ in imports_of(name)
        if module.split(".")[0] in WORKBOOK
    ]
    assert not found


@pytest.mark.parametrize("part", PARTS)
def test_no_module_imports_itself_by_way_of_others(part: str) -> None:
    circles = [" -> ".join(route) for name in modules_of(part) if (route := circle_of(name))]
    assert not circles
