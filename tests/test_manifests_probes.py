"""The probes of kube-config/: whom they ask, how long they are patient, and what they know."""

from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.manifests import (
    clothes,
    default,
    load_ping,
    objects,
    of_kind,
    pod,
    ports,
    probes,
    render,
)
from helpers.servers import Server
from helpers.serving import Client

import gateway

__all__ = ["clothes", "objects", "render"]  # fixtures


def test_probes_ask_ports_that_are_there(objects: list[dict]) -> None:
    for deployment in of_kind(objects, "Deployment").values():
        assert "readinessProbe" in probes(deployment)
        for probe in probes(deployment).values():
            if way := probe.get("httpGet") or probe.get("tcpSocket"):
                assert way["port"] in ports(deployment)
            else:
                assert probe["grpc"]["port"] == ports(deployment)["grpc"]


def test_startup_may_take_long_and_a_busy_server_is_not_killed(clothes: list[dict]) -> None:
    for name, deployment in of_kind(clothes, "Deployment").items():
        startup, readiness, liveness = (
            probes(deployment)[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")
        )
        patience = startup["periodSeconds"] * startup["failureThreshold"]
        assert patience >= {"gateway": 60, "model-server": 180}[name]
        assert liveness.get("httpGet") != readiness["httpGet"]
        patience = liveness["periodSeconds"] * liveness["failureThreshold"]
        assert patience >= readiness["periodSeconds"] * readiness["failureThreshold"]
        assert patience >= 30
        assert liveness["timeoutSeconds"] >= 10
    # A 503 with a sentence is better than no gateway at all, while model servers are only slow.
    readiness = probes(of_kind(clothes, "Deployment")["gateway"])["readinessProbe"]
    patience = readiness["periodSeconds"] * readiness["failureThreshold"]
    assert patience > default("gateway.py", "PREDICT_TIMEOUT_SECONDS")


def test_a_frozen_model_server_leaves_its_service_and_is_started_again(clothes: list[dict]) -> None:
    """At worst it freezes just after a probe.

    Before the kubelet kills, it waits for preStop or until the grace is over, and then two seconds.
    """
    deployment = of_kind(clothes, "Deployment")["model-server"]

    def seconds(probe: dict) -> int:
        every = max(probe["periodSeconds"], probe["timeoutSeconds"])
        times = [probe["periodSeconds"], every * (probe["failureThreshold"] - 1)]
        return sum(times) + probe["timeoutSeconds"]

    liveness = probes(deployment)["livenessProbe"]
    whole = pod(deployment)["terminationGracePeriodSeconds"]
    grace = liveness.get("terminationGracePeriodSeconds", whole)
    assert seconds(probes(deployment)["readinessProbe"]) <= 20
    assert seconds(liveness) + grace + 2 <= 60


def test_the_flask_apps_have_the_routes_that_probes_ask(objects: list[dict]) -> None:
    apps = {"gateway": gateway.app, "ping": load_ping()}
    for name, app in apps.items():
        if deployment := of_kind(objects, "Deployment").get(name):
            rules = {rule.rule: rule for rule in app.url_map.iter_rules()}
            for probe in probes(deployment).values():
                assert "GET" in rules[probe["httpGet"]["path"]].methods


@pytest.fixture(scope="module")
def server(start_model_server: Callable[..., Server], tiny_model: Path) -> Server:
    return start_model_server(tiny_model, "--enable_grpc_healthcheck_service=true")


def test_the_model_servers_probes_know_about_the_model_where_they_should(
    server: Server, tiny_model: Path, render: Callable[[str], list[dict]]
) -> None:
    deployment = of_kind(render("base"), "Deployment")["model-server"]

    asked = probes(deployment)
    path = asked["readinessProbe"]["httpGet"]["path"]
    with Client(server, "another-model") as client:
        health = health_pb2_grpc.HealthStub(client.channel)

        def ask(kind: str) -> int:
            request = health_pb2.HealthCheckRequest(service=asked[kind]["grpc"].get("service", ""))
            return health.Check(request, timeout=60).status

        serving = health_pb2.HealthCheckResponse.SERVING
        assert ask("startupProbe") == ask("livenessProbe") == serving
        assert requests.get(f"{server.http}{path}", timeout=60).status_code == 200
        client.serve(tiny_model)  # and so the model is unloaded that the probes ask for
        with Client(server, "clothing-model") as unloaded:
            unloaded.wait_for(1, "END")
        assert requests.get(f"{server.http}{path}", timeout=60).status_code == 404
        assert ask("livenessProbe") == serving
