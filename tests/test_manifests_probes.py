"""The probes of kube-config/: whom they ask, how long they are patient, and what they know."""

from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from conftest import Client, Server
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.manifests import (
    clothes,
    default,
    load_ping,
    objects,
    of_kind,
    ports,
    probes,
    render,
)

import gateway

__all__ = ["clothes", "objects", "render"]  # fixtures


def test_probes_ask_ports_that_are_there(objects: list[dict]) -> None:
    for deployment in of_kind(objects, "Deployment").values():
        assert "readinessProbe" in probes(deployment)
        for probe in probes(deployment).values():
            if "httpGet" in probe:
                assert probe["httpGet"]["port"] in ports(deployment)
            else:
                assert probe["grpc"]["port"] == ports(deployment)["grpc"]


def test_startup_may_take_long_and_a_busy_server_is_not_killed(clothes: list[dict]) -> None:
    for name, deployment in of_kind(clothes, "Deployment").items():
        startup, readiness, liveness = (
            probes(deployment)[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")
        )
        patience = startup["periodSeconds"] * startup["failureThreshold"]
        assert patience >= {"gateway": 60, "model-server": 180}[name]
        assert liveness["httpGet"] != readiness["httpGet"]
        patience = liveness["periodSeconds"] * liveness["failureThreshold"]
        assert patience >= readiness["periodSeconds"] * readiness["failureThreshold"]
        assert patience >= 30
        assert liveness["timeoutSeconds"] >= 10
    # A 503 with a sentence is better than no gateway at all, while model servers are only slow.
    readiness = probes(of_kind(clothes, "Deployment")["gateway"])["readinessProbe"]
    patience = readiness["periodSeconds"] * readiness["failureThreshold"]
    assert patience > default("gateway.py", "PREDICT_TIMEOUT_SECONDS")


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

    def ask(kind: str) -> int:
        path = probes(deployment)[f"{kind}Probe"]["httpGet"]["path"]
        return requests.get(f"{server.http}{path}", timeout=60).status_code

    assert "grpc" in probes(deployment)["startupProbe"]
    assert ask("readiness") == ask("liveness") == 200
    with Client(server, "another-model") as client:
        health = health_pb2_grpc.HealthStub(client.channel)
        answer = health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        client.serve(tiny_model)  # and so the model is unloaded that the probes ask for
    with Client(server, "clothing-model") as client:
        client.wait_for(1, "END")
    assert ask("readiness") == 404
    assert ask("liveness") == 200
