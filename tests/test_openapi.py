"""The gateway's description of itself, OpenAPI 3.1: true to the code, and to what it does."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
import schemathesis
from helpers.basics import CLASSES, ROOT, SAMPLES
from helpers.servers import Server
from hostile.namespace import Namespace
from schemathesis.core.result import Ok

import gateway as gateway_module
import pictures
import web

PATH = ROOT / "website/static/openapi.json"
DESCRIPTION = json.loads(PATH.read_text(encoding="utf-8"))
TAG = "tag:clothing-gateway,2026:"
CONFIGURATION = """
# A link or a file of the right form is not always one that leads to a picture, and where the
# picture's host fails, the gateway does not.
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "413", "415", "502", "504"]
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "502", "504"]
"""


def resolve(part: dict) -> dict:
    """Follow a reference."""
    while "$ref" in part:
        _, *names = part["$ref"].split("/")
        part = DESCRIPTION
        for name in names:
            part = part[name]
    return part


def schemas(part: object) -> Iterator[dict]:
    """All schemas in the description."""
    if isinstance(part, dict):
        if isinstance(part.get("schema"), dict):
            yield part["schema"]
        for child in part.values():
            yield from schemas(child)
    elif isinstance(part, list):
        for child in part:
            yield from schemas(child)


@pytest.fixture(scope="module")
def gateway(namespace: Namespace, launch: Callable[..., Server], tiny_model: Path) -> Server:
    return namespace.start_gateway(launch, tiny_model, IMAGE_TIMEOUT_SECONDS="1")


def test_valid():
    assert DESCRIPTION["openapi"].startswith("3.1.")
    for schema in [*schemas(DESCRIPTION), *DESCRIPTION["components"]["schemas"].values()]:
        jsonschema.Draft202012Validator.check_schema(schema)
    references = re.findall(r'"\$ref": "([^"]+)"', PATH.read_text(encoding="utf-8"))
    assert references
    for reference in references:
        assert resolve({"$ref": reference})
    operations = schemathesis.openapi.from_dict(DESCRIPTION).get_all_operations()
    assert all(isinstance(operation, Ok) for operation in operations)


def test_every_route_is_described():
    routes = {
        (rule.rule, method.lower())
        for rule in gateway_module.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.endpoint not in ("static", "web.sample")  # pictures of the website
    }
    described = {(path, method) for path, item in DESCRIPTION["paths"].items() for method in item}
    assert described == routes


def test_numbers_and_names_are_those_of_the_code():
    links = DESCRIPTION["components"]["schemas"]["Links"]["properties"]["urls"]
    assert links["maxItems"] == web.MAX_LINKS
    operation = DESCRIPTION["paths"]["/predict"]["post"]
    content = operation["responses"]["200"]["content"]["application/json"]
    assert content["schema"]["oneOf"][1]["maxItems"] == web.MAX_LINKS
    assert list(content["example"]["predictions"]) == CLASSES
    assert ", ".join(pictures.IMAGE_FORMATS) in DESCRIPTION["info"]["description"]


def test_every_cause_is_described():
    files = ("gateway.py", "links.py", "pictures.py", "web.py")
    sources = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    raised = re.findall(r'Problem\((\d{3}), "([a-z-]+)"', sources)
    assert len(raised) > 10
    described = {
        (int(code), cause.removeprefix(TAG))
        for code, response in DESCRIPTION["paths"]["/predict"]["post"]["responses"].items()
        if code != "200"
        for schema in schemas(resolve(response))
        for cause in schema["allOf"][1]["properties"]["type"]["enum"]
    }
    assert described >= {(int(code), cause) for code, cause in raised}
    assert {(413, "request-entity-too-large"), (429, "too-many-requests")} <= described


def test_answers_are_as_described(namespace, gateway):
    """One of each kind, checked with another library than schemathesis."""
    link = "http://good.test/picture.png"
    for body, status in (
        ({"url": link}, 200),
        ({"urls": [link] * 16}, 200),
        ({"sample": "dress", "preview": True}, 200),
        ({"urls": [link] * 17}, 400),
        ({"url": "http://127.0.0.1/"}, 400),
        ({"url": "no link"}, 400),
        ({"url": "http://good.test/page"}, 415),
        ({"url": "http://good.test/bomb"}, 413),
        ({"url": "http://good.test/missing"}, 502),
        ({"url": "http://good.test/silent"}, 504),
    ):
        answer = namespace.send("POST", "/predict", body)
        assert answer.status == status, answer
        response = resolve(DESCRIPTION["paths"]["/predict"]["post"]["responses"][str(status)])
        (kind, content), *others = response["content"].items()
        assert not others
        assert answer.headers["Content-Type"] == kind
        schema = {**content["schema"], "components": DESCRIPTION["components"]}
        jsonschema.validate(answer.body, schema)
        for name, header in response["headers"].items():
            jsonschema.validate(answer.headers[name], resolve(header)["schema"])


def test_the_description_is_served(namespace, gateway):
    answer = namespace.send("GET", "/openapi.json")
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.body == DESCRIPTION
    assert {path.stem for path in SAMPLES} == set(CLASSES)


def test_schemathesis_finds_nothing(namespace, gateway, tmp_path):
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(CONFIGURATION)
    command = [str(Path(sys.executable).with_name("schemathesis"))]
    command += [f"--config-file={configuration}", "run", f"{gateway.http}/openapi.json"]
    command += ["--checks=all", "--max-examples=40", "--seed=1", "--generation-database=none"]
    command += ["--no-color", "--continue-on-failure"]
    result = subprocess.run(
        namespace.inside(*command), check=False, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert namespace.ask("caught") == [], "a made-up link went where none may go"
