"""The measurements: that one command makes one report of everything. Nobody's speed is tested."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from helpers.basics import ROOT

from bench.measure import Figure
from bench.report import Target


def test_a_ratio_above_one_says_that_ours_is_better() -> None:
    for unit, ours, other in (("/s", [6.0, 8.0], [3.0, 2.0]), ("ms", [3.0, 2.0], [6.0, 8.0])):
        figure = Figure("", "", unit, ours="a", results={"a": ours, "b": other})
        assert figure.ratios("b") == [2, 4]
        assert figure.ratios("a", ours="b") == [0.5, 0.25]


@pytest.mark.parametrize(
    ("value", "bounds", "verdict"),
    [
        (1.3, {"least": 1.3}, "reached"),
        (1.296, {"least": 1.3}, "reached"),  # shown as 1.30
        (1.29, {"least": 1.3}, "NOT reached"),
        (9.0, {"most": 9}, "reached"),
        (9.1, {"most": 9}, "NOT reached"),
    ],
)
def test_a_target_is_reached_or_not(value: float, bounds: dict[str, float], verdict: str) -> None:
    cell = ("30 kB", "HTTP/1.0")
    assert Target("", {cell: value}, {cell: 1}, **bounds).verdict(cell) == verdict


@pytest.mark.soak
@pytest.mark.skipif(
    os.environ.get("SOAK_TESTS") != "1", reason="takes a minute; SOAK_TESTS=1 asks for it"
)
def test_one_command_writes_one_report_that_loads_nothing(
    clothing_model: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    command = ["-m", "bench", "--quick", f"--model={clothing_model}", f"--report={report}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = report.read_text()
    assert not re.findall(r"https?:|//\w|\bsrc=|url\(|@import|<script", page)
    assert re.findall("<h2.*?>(.*)</h2>", page) == [
        *("Targets", "The gateway", "The model server", "Memory and start-up")
    ]
    captions = re.findall(r"<figcaption>(.*?)\n\s*<small>(.*?)</small>", page, re.DOTALL)
    titles, processors = [title for title, _ in captions], {said for _, said in captions}
    [processor] = re.findall("<dt>Processor</dt><dd>(.*)</dd>", page)
    assert all(said.endswith(processor) for said in processors)
    clients = ("2 clients", "one client")
    for size, host, number in product(("30 kB", "150 kB", "3 MB"), ("1.0", "1.1"), clients):
        assert f"Links, {size}, HTTP/{host} host, {number}" in titles
    for engine, number in product(("LiteRT int8", "TensorFlow"), clients):
        assert f"Predict, {engine}, {number}" in titles
        assert f"Memory of one, {engine}" in titles
    assert {
        *("Uploads, 30 kB, 2 clients", "Uploads, 30 kB, one client"),
        "The slowest Predict of a lone client, LiteRT int8",
        *("From exec to ready", "Memory when idle"),
    } <= {*titles}
    for sentence in ("3.0 × the course", "a picture end to end in at most 9 ms"):
        assert sum(sentence in title.replace("&#39;", "'") for title in titles) == 1
        [told] = re.findall(rf"{sentence}.*\n((?:  .*\n)+)", done.stdout)
        assert len(re.findall(r"\d  (?:NOT )?reached", told)) == 6
