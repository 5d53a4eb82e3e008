"""What lesson 08 computes with: the autoscaler that it replays, and its simulation."""

import json
import math
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import simpy
import yaml
from helpers.basics import ROOT

from workbook import scaling
from workbook.cluster import Cluster
from workbook.kubectl import Kubectl

COST = {"Locust": 1.0, "gateway": 5.0, "model server": 8.0}


def cells(tag: str) -> dict[str, Any]:
    """Run the lesson's cells with this tag; return what they define."""
    defined: dict[str, Any] = {"math": math, "np": np, "random": random, "simpy": simpy}
    defined["ExitStack"] = ExitStack
    for cell in nbformat.read(ROOT / "notebooks/08-scaling.ipynb", as_version=4).cells:
        if tag in cell.metadata.get("tags", []):
            exec(compile(cell.source, f"lesson 08, {cell.id}", "exec"), defined)
    return defined


@pytest.fixture(scope="module")
def replay() -> dict[str, Any]:
    return cells("replay")


@pytest.fixture(scope="module")
def simulation() -> dict[str, Any]:
    random.seed(1)
    return cells("simulation")


def scaler(tier: str) -> dict[str, Any]:
    path = ROOT / f"kube-config/base/{tier}-horizontalpodautoscaler.yaml"
    return yaml.safe_load(path.read_text())["spec"]


@pytest.mark.parametrize(
    ("replicas", "usage", "wanted"),
    [(4, 80, 4), (4, 87, 4), (4, 73, 4), (4, 89, 5), (4, 60, 3), (3, 800, 10), (4, 0, 2)],
)
def test_the_formula_rounds_up_tolerates_a_tenth_and_keeps_within_its_bounds(
    replay: dict[str, Any], replicas: int, usage: float, wanted: int
) -> None:
    assert replay["wish"](replicas, usage, scaler("gateway")) == wanted


def test_gateways_double_at_once_and_go_one_by_one_after_two_minutes(
    replay: dict[str, Any],
) -> None:
    rates = [0] * 2 + [1000] * 4 + [0] * 30
    replicas = replay["replay"](rates, scaler("gateway"), picture_ms=5)
    assert replicas[:6] == [2, 2, 4, 8, 10, 10]
    assert replicas[6:14] == [10] * 8  # until the last high wish, at 90 s, is older than 120 s
    assert replicas[14:] == [n for n in range(9, 2, -1) for _ in range(2)] + [2] * 8


def test_a_short_rush_calls_for_no_model_server(replay: dict[str, Any]) -> None:
    """It would have to last as long as the window for scaling up; then one comes at a time."""
    spec = scaler("model-server")
    rush = replay["replay"]([10, 10, 10, 500, 10, 10], spec, picture_ms=8, requested=250)
    assert rush == [2] * 6
    lasting = replay["replay"]([10, 10, 10, *[500] * 6], spec, picture_ms=8, requested=250)
    assert lasting == [2, 2, 2, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("gateways", "clients", "cores", "cost", "rate"),
    [
        (1, 1, 1, COST, 1000 / 14),  # nobody waits
        (1, 1, 4, COST, 1000 / 8),  # a lone picture is scored by all cores
        (4, 64, 2, COST, 2 * 1000 / 14),  # the cores are the limit
        (1, 64, 16, COST | {"gateway": 10.0}, 1000 / 10),  # the gateway is
        (2, 64, 16, COST | {"gateway": 10.0}, 2 * 1000 / 10),
    ],
)
def test_the_simulation_is_limited_by_what_should_limit_it(
    simulation: dict[str, Any],
    gateways: int,
    clients: int,
    cores: int,
    cost: dict[str, float],
    rate: float,
) -> None:
    closed: Callable[..., float] = simulation["closed"]
    assert closed(gateways, clients, cores, cost) == pytest.approx(rate, rel=0.06)


def test_requests_wait_when_the_servers_are_nearly_always_busy(simulation: dict[str, Any]) -> None:
    p95 = {
        busy: simulation["opened"](4, 4, busy * 4 * 1000 / COST["gateway"], COST)
        for busy in (0.3, 0.7, 0.98)
    }
    assert COST["gateway"] + COST["model server"] < p95[0.3] <= p95[0.7] * 1.05
    assert p95[0.98] > 1.5 * p95[0.3]


def test_requests_are_summed_up_as_littles_law_wants_it() -> None:
    """Two clients in turns, each of whose requests takes a tenth of a second."""
    seen = [scaling.Request(n / 20, 2, 100.0, "", 0.0) for n in range(100)]
    point = scaling.point(seen)
    assert point.rate * point.mean / 1000 == pytest.approx(2)
    assert point.p95 == 100
    assert scaling.by_clients(seen, [2]) == {2: point}
    quick, slow = point._replace(rate=9.0), point._replace(rate=11.0)
    assert scaling.wavering({(1, 1): {4: quick, 8: slow}}, [4, 8]) == pytest.approx(0.2)


def test_an_autoscaler_is_seen_with_measurements_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objects are what a cluster says of them: fields are missing, or null, at first."""
    monkeypatch.setattr(Kubectl, "opened", {})
    (tmp_path / "kubectl").write_text(f"cat {tmp_path}/$4.json")
    kubectl = Kubectl(Cluster("kubernetes", "", f"sh {tmp_path}/kubectl"), "clothes")
    scaler = scaling.Scaler(kubectl, "model-server")

    def say(deployment: dict[str, Any], autoscaler: dict[str, Any]) -> None:
        told = {"spec": {"replicas": 3}, "status": deployment}
        (tmp_path / "deployment.json").write_text(json.dumps(told))
        (tmp_path / "horizontalpodautoscaler.json").write_text(json.dumps(autoscaler))

    for nothing in ({}, {"status": {"currentMetrics": None, "desiredReplicas": 0}}):
        say({"replicas": 3}, nothing)
        look = scaler.look()
        assert (look.wanted, look.ready) == (3, 0)
        assert math.isnan(look.usage)
    metric = {"type": "Resource", "resource": {"current": {"averageUtilization": 95}}}
    say({"readyReplicas": 2}, {"status": {"currentMetrics": [metric]}})
    scaler.watch(lambda look: look.ready == 2, seconds=60)
    assert scaler.history[-1][1:] == (3, 2, 95)
    assert len(scaler.history) == 3


def test_tables_are_narrow() -> None:
    columns: dict[int, dict[str, float]] = {
        1: {"pods": 4, "links": 99_949},
        10_000: {"pods": 0.25, "links": 27_590_400},
    }
    columns[100] = {"pods": math.nan, "links": 178_321}
    assert scaling.table("times", columns).splitlines() == [
        "| times | 1 | 10,000 | 100 |",
        "|---|--:|--:|--:|",
        "| pods | 4 | 0.2 | – |",
        "| links | 99,949 | 27.6 M | 178 k |",
    ]
