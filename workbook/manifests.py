"""Read manifests and Dockerfiles: what shall run, at which ports, with which variables.

Everything here is a plain function of what a file says; nothing is started.
"""

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Manifest = dict[str, Any]
UNITS = {"": 1, "m": 0.001, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "M": 2**20, "G": 2**30}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# The fields that a rehearsal acts upon, and those that say where a pod runs and what it may do,
# which mean nothing to a process. Below those with a star anything may stand.
KNOWN = shlex.split(
    """apiVersion kind metadata* spec stringData* replicas selector* strategy type rollingUpdate
    maxSurge maxUnavailable minReadySeconds template automountServiceAccountToken dnsConfig*
    enableServiceLinks nodeSelector* securityContext* serviceAccountName tolerations*
    terminationGracePeriodSeconds topologySpreadConstraints* volumes emptyDir* containers name image
    imagePullPolicy command args ports* resources* volumeMounts mountPath env value valueFrom
    resourceFieldRef resource secretKeyRef key lifecycle preStop sleep seconds startupProbe
    readinessProbe livenessProbe httpGet path grpc tcpSocket port periodSeconds timeoutSeconds
    failureThreshold clusterIP loadBalancerSourceRanges*"""
)
# What some of them may not hold.
REFUSED = re.compile(
    r"(command|args|value): .*\$\(|type: Recreate|max(Surge|Unavailable): .*%"
    r"|resource: (?!limits\.cpu$)|preStop: (?!{'sleep')",
    re.DOTALL,
)


class Image(NamedTuple):
    """What a Dockerfile makes, built from the folder `context`.

    `paths` are paths in the image, and where the same files are here; `environment` is what ENV
    says of the model and of metrics. (What else it says, such as PATH, means nothing outside a
    container.)
    """

    context: Path
    entrypoint: list[str]
    command: list[str]
    paths: dict[str, str]
    environment: dict[str, str]


def read_image(
    dockerfile: str,
    context: str = ".",
    paths: dict[str, str] | None = None,
    arguments: dict[str, str] | None = None,
) -> Image:
    """Read the last stage of a Dockerfile that is built from the folder `context`.

    `paths` adds to what the Dockerfile copies, or overrides it; `arguments` are `--build-arg`s.
    """
    folder, known = Path(context).resolve(), dict[str, str]()
    image = Image(folder, [], [], {}, {})

    def expand(text: str) -> str:
        return re.sub(r"\$\{?(\w+)\}?", lambda match: known.get(match[1], match[0]), text)

    stages = re.split(r"^FROM ", Path(dockerfile).read_text(), flags=re.MULTILINE)
    for line in (stages[0] + stages[-1]).replace("\\\n", " ").splitlines():
        match line.split(maxsplit=1):
            case ["ARG", word] if "=" in word:
                name, _, default = word.partition("=")
                known[name] = (arguments or {}).get(name, expand(default))
            case ["ENV", words]:
                said = dict(word.split("=", 1) for word in shlex.split(expand(words)))
                known |= said
                told = [name for name in said if name.startswith(("MODEL_", "METRICS_"))]
                image.environment.update((name, said[name]) for name in told)
            case ["ENTRYPOINT", words]:
                image.entrypoint[:] = map(expand, json.loads(words))
            case ["CMD", words]:
                image.command[:] = json.loads(words)
            case ["COPY", words]:
                words = expand(words).split()
                *sources, target = [word for word in words if not word.startswith("--")]
                for source in sources if target.startswith("/") else []:
                    inside = target + Path(source).name if target.endswith("/") else target
                    image.paths[inside] = str(folder / source.removeprefix("/context/"))
    for inside, here in (paths or {}).items():
        image.paths[inside] = str(Path(here).resolve())
    return image


def refuse_unknown(manifest: Manifest) -> None:
    """Raise ValueError, with a sentence, for what a rehearsal would do otherwise than a cluster."""
    what = f"{manifest['kind'].lower()}/{manifest['metadata']['name']}"
    for path, value in fields(manifest):
        name = path.rpartition(".")[2]
        if REFUSED.match(f"{name}: {value}"):
            raise ValueError(f"{what} has {path}: {value}, which is not rehearsed.")
        if name not in KNOWN and f"{name}*" not in KNOWN:
            raise ValueError(f"{what} has {path}, which is not rehearsed.")
        if name == "containers" and len(value) > 1:
            raise ValueError(f"{what} has more than one container, which is not rehearsed.")
        if name == "port":  # of a probe
            port_number(container(manifest["spec"]["template"]), value)


def fields(manifest: Manifest, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path of each field of a manifest, such as `spec.template`, and its value."""
    for name, value in manifest.items():
        yield f"{above}{name}", value
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict) and f"{name}*" not in KNOWN:
                yield from fields(each, f"{above}{name}.")


def container(template: Manifest) -> Manifest:
    """Return the one container of a pod template."""
    return template["spec"]["containers"][0]


def port_number(container: Manifest, port: int | str | None = None) -> int:
    """Return the number of a port that is given by its name or number; of the first, if not."""
    for each in container.get("ports", []):
        if port in (None, each["containerPort"], each.get("name")):
            return each["containerPort"]
    raise ValueError(f"the container {container['name']} declares no port {port}")


def environment(container: Manifest, read_object: Callable[[str, str], Manifest]) -> dict[str, str]:
    """Return the environment that a manifest asks for; ValueError if a Secret lacks a part."""
    found = {}
    for each in container.get("env", []):
        found[each["name"]] = each.get("value") or ""
        match each.get("valueFrom"):
            case {"resourceFieldRef": _}:
                limit = container["resources"]["limits"]["cpu"]
                found[each["name"]] = f"{math.ceil(quantity(limit))}"
            case {"secretKeyRef": {"name": name, "key": key}}:
                data = read_object("Secret", name).get("stringData", {})
                if key not in data:
                    raise ValueError(f"couldn't find key {key} in {name}")
                found[each["name"]] = data[key]
    return found


def quantity(text: str | float) -> float:
    """Read what Kubernetes means by 250m or 1.5 (cores) and 512Mi or 2Gi (bytes), Compose by 2G."""
    match = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text))
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{text} is no quantity that is known here")
    return float(match[1]) * UNITS[match[2]]
