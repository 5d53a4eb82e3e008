"""kube-config/: requests, limits, numbers of pods, and how pods come and go."""

import json
import re
import runpy
from collections.abc import Callable

import gunicorn.config
import pytest
from helpers.basics import ROOT
from helpers.containers import SERVING, instructions
from helpers.manifests import (
    CLOTHES,
    COMPOSE,
    KUBE,
    clothes,
    container,
    default,
    environment,
    objects,
    of_kind,
    pod,
    pod_labels,
    read,
    render,
    replicas,
    selects,
)

from workbook.manifests import quantity

__all__ = ["clothes", "objects", "render"]  # fixtures


def test_requests_and_limits_are_complete_and_those_of_compose(objects: list[dict]) -> None:
    for name, deployment in of_kind(objects, "Deployment").items():
        resources = container(deployment)["resources"]
        requests, limits = (
            {key: quantity(value) for key, value in resources[which].items()}
            for which in ("requests", "limits")
        )
        assert {"cpu", "memory"} <= requests.keys() <= limits.keys()
        assert all(requests[key] <= limits[key] for key in requests)
        if name in COMPOSE:
            # The log, of which the kubelet keeps 50 MB, and the volumes that are on the disk.
            disk = 50e6 + sum(
                quantity(each["emptyDir"]["sizeLimit"])
                for each in pod(deployment)["volumes"]
                if "medium" not in each["emptyDir"]
            )
            assert disk <= requests["ephemeral-storage"] < limits["ephemeral-storage"]
            measured = COMPOSE[name]["deploy"]["resources"]["limits"]
            assert limits["cpu"] == quantity(measured["cpus"])
            # Compose has one limit for both model servers, and for TensorFlow and LiteRT in ours.
            litert = "nodeSelector" not in pod(deployment) and name == "model-server"
            assert (limits["memory"] < quantity(measured["memory"])) == litert
            if "nvidia.com/gpu" not in limits and not litert:
                assert limits["memory"] == quantity(measured["memory"])


def test_the_model_server_runs_as_many_batches_as_it_has_cpus(clothes: list[dict]) -> None:
    config = (ROOT / "model_server/batching.config").read_text()
    match = re.search(r"num_batch_threads { value: (\d+) }", config)
    deployment = of_kind(clothes, "Deployment")["model-server"]
    assert match and int(match[1]) == quantity(container(deployment)["resources"]["limits"]["cpu"])


def test_either_an_autoscaler_or_the_manifest_says_how_many(objects: list[dict]) -> None:
    deployments = of_kind(objects, "Deployment")
    scalers = of_kind(objects, "HorizontalPodAutoscaler")
    assert scalers.keys() <= deployments.keys()
    for name, deployment in deployments.items():
        assert ("replicas" in deployment["spec"]) != (name in scalers)
    for name, scaler in scalers.items():
        spec = scaler["spec"]
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        assert spec["scaleTargetRef"] == target
        assert 1 <= spec["minReplicas"] <= spec["maxReplicas"]
        for metric in spec["metrics"]:
            assert metric["resource"]["target"]["type"] == "Utilization"
            assert (
                metric["resource"]["name"] in container(deployments[name])["resources"]["requests"]
            )
        for direction in ("scaleUp", "scaleDown"):
            assert spec["behavior"][direction]["policies"]
        windows = [
            spec["behavior"][each]["stabilizationWindowSeconds"]
            for each in ("scaleUp", "scaleDown")
        ]
        assert windows[0] < windows[1]


def test_the_overlays_have_the_numbers_of_the_lessons(render: Callable) -> None:
    numbers = {
        name: (replicas(render(name), "gateway"), replicas(render(name), "model-server"))
        for name in ("base", "single-node", "gpu")
    }
    assert numbers == {"base": (2, 2), "single-node": (1, 1), "gpu": (5, 2)}


@pytest.mark.parametrize(
    ("name", "left"),
    [
        # Of two cores such a node gives 1.9 to pods, and those of the system request 0.3.
        ("base", 1.9 - 0.3),
        ("embedded", 1.9 - 0.3),
        # The pods of Kind's control plane request 0.95, metrics-server 0.1.
        ("single-node", 2 - 0.95 - 0.1),
        ("single-node, embedded", 2 - 0.95 - 0.1),
    ],
)
def test_an_update_of_all_finds_a_place_on_two_cores(
    name: str, left: float, render: Callable
) -> None:
    """While the old pods, which end slowly, are there beside the new ones; and with the client."""
    (client,) = read(KUBE / "client/client-pod.yaml")["spec"]["containers"]
    cpu = quantity(client["resources"]["requests"]["cpu"])
    for each, deployment in of_kind(render(name), "Deployment").items():
        request = quantity(container(deployment)["resources"]["requests"]["cpu"])
        cpu += 2 * replicas(render(name), each) * request
    assert round(cpu, 3) <= left


def test_whatever_is_applied_over_another_leaves_nothing_behind(
    clothes: list[dict], render: Callable
) -> None:
    """What only the first of two folders has would stay: kubectl apply deletes nothing."""
    names, base = (
        {
            (each["kind"], each["metadata"]["name"])
            for each in objects
            if each["kind"] != "Namespace"
        }
        for objects in (clothes, render("base"))
    )
    assert names == base
    for each in of_kind(clothes, "Deployment").values():
        assert "replicas" not in each["spec"]


def test_a_new_pod_is_asked_twice_before_an_old_one_goes(clothes: list[dict]) -> None:
    for deployment in of_kind(clothes, "Deployment").values():
        period = container(deployment)["readinessProbe"]["periodSeconds"]
        assert deployment["spec"]["minReadySeconds"] > period


def test_model_servers_with_a_gpu_go_where_there_is_one(render: Callable) -> None:
    deployment = of_kind(render("gpu"), "Deployment")["model-server"]
    assert container(deployment)["resources"]["limits"]["nvidia.com/gpu"] == 1
    scaler = of_kind(render("gpu"), "HorizontalPodAutoscaler")["model-server"]["spec"]
    assert scaler["minReplicas"] == scaler["maxReplicas"]
    taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert pod(deployment)["tolerations"] == [taint]
    # A third pod would wait for a third GPU for ever.
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


def test_only_the_embedded_server_goes_to_any_processor(render: Callable) -> None:
    for name in CLOTHES:
        deployment = of_kind(render(name), "Deployment")["model-server"]
        selector = {} if "embedded" in name else {"kubernetes.io/arch": "amd64"}
        assert pod(deployment).get("nodeSelector", {}) == selector


# --- Rollouts, disruptions, the end of a pod -----------------------------------------------------


def test_rollouts_and_emptied_nodes_leave_a_pod_that_serves(clothes: list[dict]) -> None:
    budgets = of_kind(clothes, "PodDisruptionBudget")
    for name, deployment in of_kind(clothes, "Deployment").items():
        update = deployment["spec"]["strategy"]["rollingUpdate"]
        assert update["maxSurge"] + update["maxUnavailable"] >= 1
        count = replicas(clothes, name)
        if "nvidia.com/gpu" in container(deployment)["resources"]["limits"]:
            assert update["maxUnavailable"] < count
        else:
            assert update["maxUnavailable"] == 0
        budget = budgets[name]["spec"]
        assert selects(budget["selector"], pod_labels(deployment))
        # Also of the fewest pods one may go, and where there are more than one, one stays.
        assert budget["maxUnavailable"] >= 1 and "minAvailable" not in budget
        assert count == 1 or budget["maxUnavailable"] < count
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_pods_are_spread_over_nodes_and_zones(clothes: list[dict]) -> None:
    for deployment in of_kind(clothes, "Deployment").values():
        constraints = pod(deployment)["topologySpreadConstraints"]
        keys = {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
        assert {each["topologyKey"] for each in constraints} == keys
        for each in constraints:
            assert selects(each["labelSelector"], pod_labels(deployment))
            assert each["whenUnsatisfiable"] == "ScheduleAnyway"  # one node is a cluster, too


def test_a_gateway_has_the_time_to_end_what_it_has_begun(
    clothes: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = of_kind(clothes, "Deployment")["gateway"]
    env = environment(deployment)
    drain = float(env.get("DRAIN_SECONDS", default("gunicorn.conf.py", "DRAIN_SECONDS")))
    longest = sum(
        float(env.get(name, default(code, name)))
        for code, name in (
            ("links.py", "IMAGE_TIMEOUT_SECONDS"),
            ("gateway.py", "PREDICT_TIMEOUT_SECONDS"),
        )
    )
    monkeypatch.setenv("DRAIN_SECONDS", str(drain))
    settings = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    assert drain >= 5
    # From SIGTERM on, gunicorn gives its worker this long.
    patience = settings.get("graceful_timeout", gunicorn.config.GracefulTimeout.default)
    assert drain + longest <= patience < pod(deployment)["terminationGracePeriodSeconds"]


def test_a_model_server_serves_until_gateways_have_left_it(clothes: list[dict]) -> None:
    from model_server.server import ModelServer

    deployment = of_kind(clothes, "Deployment")["model-server"]
    sleep = container(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
    (command,) = map(json.loads, instructions(SERVING, "CMD"))
    match = re.search(r"grpc\.max_connection_age_ms=(\d+)", " ".join(command))
    assert match
    age = int(match[1]) / 1000
    assert sleep >= 1.1 * age  # of which gRPC takes a tenth more or less
    longest = default("gateway.py", "PREDICT_TIMEOUT_SECONDS")
    assert ModelServer.grace_seconds >= longest
    grace = pod(deployment)["terminationGracePeriodSeconds"]
    assert grace > sleep + max(longest, ModelServer.grace_seconds)
