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
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# The fields that a rehearsal acts upon, and those that say where a pod runs and what it may do,
# which mean nothing to a process. Below those with a star anything may stand.
KNOWN = re.findall(
    r"\S+",
    """replicas selector* strategy type rollingUpdate maxSurge maxUnavailable template metadata*
    spec automountServiceAccountToken dnsConfig* enableServiceLinks nodeSelector* securityContext*
    serviceAccountName terminationGracePeriodSeconds tolerations* topologySpreadConstraints*
    volumes emptyDir* containers name image imagePullPolicy command args ports* resources*
    volumeMounts mountPath env value valueFrom resourceFieldRef resource secretKeyRef key lifecycle
    preStop sleep seconds startupProbe readinessProbe livenessProbe httpGet path grpc service port
    initialDelaySeconds periodSeconds timeoutSeconds successThreshold failureThreshold clusterIP
    loadBalancerSourceRanges* minReadySeconds""",
)


class Image(NamedTuple):
    """What a Dockerfile makes: the folder it is built from, ENTRYPOINT and CMD.

    `paths` are paths in the image, and where the same files are here; `environment` is what ENV
    says of the model. (What else it says, such as PATH, means nothing outside a container.)
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
    """Read the last stage of a Dockerfile.

    Args:
        dockerfile: its path.
        context: the folder that the image is built from.
        paths: adds to what the Dockerfile copies, or overrides it.
        arguments: what a build gets as `--build-arg`.
    """
    folder, known = Path(context).resolve(), dict[str, str]()
    image = Image(folder, [], [], {}, {})

    def expand(text: str) -> str:
        return re.sub(r"\$\{?(\w+)\}?", lambda match: known.get(match[1], match[0]), text)

    stages = re.split(r"^FROM ", Path(dockerfile).read_text(), flags=re.MULTILINE)
    for line in (stages[0] + stages[-1]).replace("\\\n", " ").splitlines():
        match line.split(maxsplit=1):
            case ["ARG", word]:
                name, has_default, default = word.partition("=")
                if has_default:
                    known[name] = (arguments or {}).get(name, expand(default))
            case ["ENV", words]:
                said = dict(word.split("=", 1) for word in shlex.split(expand(words)))
                known |= said
                image.environment.update(
                    (name, value) for name, value in said.items() if name.startswith("MODEL_")
                )
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
    image.paths.update(
        (inside, str(Path(here).resolve())) for inside, here in (paths or {}).items()
    )
    return image


def refuse_unknown(manifest: Manifest) -> None:
    """Raise ValueError, with a sentence, for what a rehearsal would do otherwise than a cluster."""
    what = f"{manifest['kind'].lower()}/{manifest['metadata']['name']}"
    for path, value in fields(manifest["spec"]):
        name = path.rpartition(".")[2]
        expands = name in ("command", "args", "value") and "$(" in str(value)
        if expands or (name, value) == ("type", "Recreate"):
            raise ValueError(f"{what} has {path}: {value}, which is not rehearsed.")
        if name not in KNOWN and f"{name}*" not in KNOWN:
            raise ValueError(f"{what} has {path}, which is not rehearsed.")
        if name == "containers" and len(value) > 1:
            raise ValueError(f"{what} has more than one container, which is not rehearsed.")


def fields(manifest: Manifest, above: str = "spec") -> Iterator[tuple[str, Any]]:
    """Yield the path of each field of a manifest, such as `spec.template`, and its value."""
    for name, value in manifest.items():
        yield f"{above}.{name}", value
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict) and f"{name}*" not in KNOWN:
                yield from fields(each, f"{above}.{name}")


def container(template: Manifest) -> Manifest:
    """Return the one container of a pod template."""
    return template["spec"]["containers"][0]


def port_number(container: Manifest, port: int | str | None = None) -> int:
    """Return the number of a port that is given by its name or number; of the first, if not."""
    for each in container.get("ports", []):
        if port in (None, each["containerPort"], each.get("name")):
            return each["containerPort"]
    if isinstance(port, int):
        return port
    raise ValueError(f"the container {container['name']} has no port named {port}")


def port_numbers(container: Manifest) -> list[int]:
    """Return the numbers of the ports that a container declares or that its probes ask."""
    probes = [container[kind] for kind in PROBES if kind in container]
    asked = [probe.get("httpGet") or probe["grpc"] for probe in probes]
    numbers = [each["containerPort"] for each in container.get("ports", [])]
    numbers += [port_number(container, action["port"]) for action in asked]
    return list(dict.fromkeys(numbers))


def environment(
    container: Manifest, read_secret: Callable[[str], dict[str, str]]
) -> dict[str, str]:
    """Return the environment that a manifest asks for; ValueError if a Secret lacks a part."""
    found = {}
    for each in container.get("env", []):
        source = each.get("valueFrom", {})
        found[each["name"]] = each.get("value") or ""
        if reference := source.get("resourceFieldRef"):
            which, name = reference["resource"].split(".")
            found[each["name"]] = str(math.ceil(quantity(container["resources"][which][name])))
        elif reference := source.get("secretKeyRef"):
            data = read_secret(reference["name"])
            if reference["key"] not in data:
                raise ValueError(f"couldn't find key {reference['key']} in {reference['name']}")
            found[each["name"]] = data[reference["key"]]
    return found


def quantity(text: str | float) -> float:
    """Read a quantity such as 250m, 1.5 or 64Mi."""
    match = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text))
    if not match or match[2] not in UNITS:
        raise ValueError(f"{text} is not a quantity that a rehearsal understands.")
    return float(match[1]) * UNITS[match[2]]


def absolute(value: int | str, of: int, rounded: Callable[[float], int]) -> int:
    """Read maxSurge or maxUnavailable: a number, or a percentage of the replicas."""
    text = str(value)
    return rounded(of * int(text[:-1]) / 100) if text.endswith("%") else int(text)
