"""Look at this machine, and say what each lesson will run on it: `make doctor`.

It changes nothing and asks nobody but the programs that are here. What a lesson runs is what the
lesson's own functions say. Any Python can run this file, before anything is installed: what needs
a newer one, or packages, is imported where it is used.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 5.0  # for each program that is asked
NEWEST_NEEDS = (3, 11)  # what the other modules are written for
NO_PYTHON = "none that suits"
HELP = "docs/troubleshooting.md"
# How to get what is missing: on Linux, in WSL where that differs, and on macOS.
AWS = "https://awscli.amazonaws.com/awscli-exe-linux-$(uname -m).zip"
ARM = platform.machine().lower() in ("arm64", "aarch64")
EKSCTL = (
    "https://github.com/eksctl-io/eksctl/releases/latest/download/"
    f"eksctl_Linux_{'arm64' if ARM else 'amd64'}.tar.gz"
)
COMMANDS = {
    "docker": {
        "Linux": "curl -fsSL https://get.docker.com | sudo sh",
        "WSL": "winget.exe install Docker.DockerDesktop",
        "Darwin": "brew install --cask docker-desktop",
    },
    "compose": {
        "Linux": "sudo apt install docker-compose-plugin",
        "WSL": "winget.exe install Docker.DockerDesktop",
        "Darwin": "brew install --cask docker-desktop",
    },
    "aws": {
        "Linux": f"curl -o aws.zip {AWS} && unzip -q aws.zip && sudo aws/install",
        "Darwin": "brew install awscli",
    },
    "eksctl": {
        "Linux": f"curl -L {EKSCTL} | sudo tar xz -C /usr/local/bin",
        "Darwin": "brew install eksctl",
    },
}


class Fact(NamedTuple):
    """What was found, and what to do if that is not enough."""

    what: str
    found: str
    advice: str = ""


# --- The machine ---------------------------------------------------------------------------------


def ask(*words: str) -> str:
    """Run a command and return what it prints; nothing when it fails or takes too long."""
    try:
        done = subprocess.run(words, capture_output=True, timeout=SECONDS, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def system() -> str:
    """Return `Linux`, `WSL` or `Darwin`."""
    name = platform.system()
    return "WSL" if name == "Linux" and "microsoft" in platform.release().lower() else name


def command_for(name: str) -> str:
    """Return how to install something here, or nothing where we know of no way."""
    commands = COMMANDS[name]
    return commands.get(system()) or (commands["Linux"] if system() == "WSL" else "")


def look_at_python() -> Fact:
    """Say which Python the set-up takes; the advice is its own sentence when there is none."""
    done = subprocess.run(["workbook/setup.sh", "python"], capture_output=True, cwd=ROOT)
    if done.returncode:
        return Fact("Python", NO_PYTHON, done.stderr.decode().strip())
    path = done.stdout.decode().strip().replace(f"{ROOT}{os.sep}", "")
    version = ask(path, "-c", "import platform; print(platform.python_version())")
    installed = subprocess.run(["workbook/setup.sh", "current"], cwd=ROOT).returncode == 0
    found = f"{version}, {path}, {'with' if installed else 'without'} the packages of Pipfile.lock"
    return Fact("Python", found, "" if installed else "make workbook")


def look_at_machine() -> Fact:
    """Say which system and processor this is."""
    cpus = os.cpu_count() or 1
    return Fact("machine", f"{system()} on {platform.machine()}, {cpus} processors")


def look_at_memory() -> Fact:
    """Say how much memory there is."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Fact("memory", f"{total / 1e9:.0f} GB")


def look_at_disk() -> Fact:
    """Say how much room is left where the packages go."""
    free = shutil.disk_usage(ROOT).free / 1e9
    advice = f"free some: {HELP}#the-disk-is-full" if free < 3 else ""
    return Fact("disk", f"{free:.0f} GB are free", advice)


def look_at_proxy() -> Fact:
    """Say which proxy programs use, and whether they use it for this machine, too."""
    names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
    given = {name: os.environ.get(name) or os.environ.get(name.upper()) for name in names}
    used = sorted({re.sub("//.*@", "//", proxy) for proxy in given.values() if proxy})
    without = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    spared = {"localhost", "127.0.0.1"} <= {*without.replace(" ", "").split(",")}
    advice = "" if spared or not used else "export no_proxy=localhost,127.0.0.1,::1"
    return Fact("proxy", ", ".join(used) or "none", advice)


def look_at_docker() -> Fact:
    """Say which engine answers, what it has, and how it keeps images."""
    client = ask("docker", "--version")
    if not client:
        return Fact("Docker", "no docker command", command_for("docker"))
    form = "{{.ServerVersion}}, {{.Architecture}}, {{.NCPU}} processors, {{.MemTotal}}"
    engine = ask("docker", "info", "--format", form)
    words = re.match(r"(\d.*), (\d+)$", engine)
    if not words:
        return Fact("Docker", "no engine answers", f"{HELP}#cannot-connect-to-the-docker-daemon")
    return Fact("Docker", f"{words.group(1)}, {int(words.group(2)) / 1e9:.0f} GB")


def look_at_image_store() -> Fact:
    """Say how Docker keeps images; Kind cares."""
    if sys.version_info < NEWEST_NEEDS or not ask("docker", "info", "--format", "{{.ID}}"):
        return Fact("image store", "–")
    from workbook import cluster

    how = "containerd's" if cluster.has_containerd_store() else "Docker's own"
    return Fact("image store", how)


def look_at_compose() -> Fact:
    """Say which Compose there is, as a plugin or as a command."""
    found = ask("docker", "compose", "version", "--short") or ask(
        "docker-compose", "version", "--short"
    )
    return Fact("Compose", found or "none", "" if found else command_for("compose"))


def look_at_program(name: str, *arguments: str, advice: str = "") -> Fact:
    """Say which version of a program there is."""
    found = re.search(r"v?\d+\.\d+\.\d+", ask(name, *arguments))
    return Fact(name, found.group() if found else "none", "" if found else advice)


def look_at_ports() -> Fact:
    """Say which of the lessons' ports are taken."""
    if sys.version_info < NEWEST_NEEDS:
        return Fact("ports", "–")
    from workbook.lesson import lessons, ports_of
    from workbook.ports import is_busy

    ports = sorted({p for path in lessons(ROOT / "notebooks") for p in ports_of(path).values()})
    busy = [str(port) for port in ports if is_busy(port)]
    if not busy:
        return Fact("ports", f"all that the lessons use are free: {ports[0]} to {ports[-1]}")
    return Fact("ports", f"in use: {', '.join(busy)}", f"{HELP}#a-port-is-in-use")


LOOKS: list[Callable[[], Fact]] = [
    *(look_at_python, look_at_machine, look_at_memory, look_at_disk, look_at_proxy, look_at_ports),
    *(look_at_docker, look_at_image_store, look_at_compose),
    lambda: look_at_program("kubectl", "version", "--client", advice="make workbook brings it"),
    lambda: look_at_program("kind", "version", advice="lesson 06 fetches it"),
    lambda: look_at_program("aws", "--version", advice=command_for("aws")),
    lambda: look_at_program("eksctl", "version", advice=command_for("eksctl")),
]


# --- The lessons ---------------------------------------------------------------------------------


def choose_model_server() -> tuple[str, str]:
    """Say what serves models."""
    from workbook import engine

    engine.PROBE_SECONDS = SECONDS
    chosen, why = engine.choose_engine("auto", look_only=True)
    here = engine.docker("image", "inspect", "--format={{.Id}}", engine.SERVING_IMAGE)
    if chosen == "docker" and not here:
        why = f"{engine.SERVING_IMAGE} will be pulled, if its registry can be reached"
    return chosen, why


def choose_containers() -> tuple[str, str]:
    """Say what runs images that are built here."""
    from workbook import engine

    return engine.choose_engine("auto", None, look_only=True)


def choose_pods() -> tuple[str, str]:
    """Say what runs pods."""
    from workbook import cluster

    return cluster.choose_cluster("auto", look_only=True)[:2]


def choose_cloud() -> tuple[str, str]:
    """Say what stands for AWS, as long as nobody agrees to costs."""
    from workbook import cloud

    return cloud.choose(False, "auto", ())[:2]


class Choice(NamedTuple):
    """Something that lessons choose: the call by which they do so, and the same for us.

    `docker` and `otherwise` are the two outcomes, in words.
    """

    what: str
    call: str
    choose: Callable[[], tuple[str, str]]
    docker: str
    otherwise: str


CHOICES = [
    Choice(
        *("model server", r"choose_engine\((?!.*image=None)", choose_model_server),
        *("TensorFlow Serving, in Docker", "model_server, in Python"),
    ),
    Choice(
        *("containers", r"choose_engine\(.*image=None", choose_containers),
        *("Docker and Compose", "processes in their place"),
    ),
    Choice(
        *("pods", r"choose_cluster\(", choose_pods),
        *("a Kubernetes cluster", "a rehearsal, as processes"),
    ),
    Choice(
        *("AWS", r"cloud\.choose\(", choose_cloud),
        *("a rehearsal, with images", "a rehearsal, without images"),
    ),
]


def decide(choice: Choice) -> tuple[str, str]:
    """Return what lessons will use, and why; `stops` where they will not go on."""
    try:
        chosen, why = choice.choose()
        return (choice.otherwise if chosen == "embedded" else choice.docker), why
    except ImportError:
        return "unknown", "make workbook installs what decides this"
    except (RuntimeError, ValueError) as error:
        return "stops", str(error)


def choices_of(notebook: Path) -> list[Choice]:
    """Return what a lesson chooses, read from its cells."""
    from workbook.lesson import read

    cells = read(notebook)["cells"]
    code = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "code")
    return [choice for choice in CHOICES if re.search(choice.call, code)]


def plan() -> tuple[list[Fact], list[Fact]]:
    """Return what each choice comes to, and why; and what each lesson will use."""
    from workbook.lesson import lessons, look_at

    with ThreadPoolExecutor() as pool:
        made = dict(zip(CHOICES, pool.map(decide, CHOICES), strict=True))
    rows = []
    for path in lessons(ROOT / "notebooks"):
        uses = [f"{choice.what}: {made[choice][0]}" for choice in choices_of(path)]
        rows.append(Fact(look_at(path).title, "\n".join(uses) or "nothing but Python"))
    return [Fact(choice.what, *both) for choice, both in made.items()], rows


# --- What is printed -----------------------------------------------------------------------------


def show(title: str, rows: list[Fact], *header: str) -> None:
    """Print as many cells of each row as there are headings, as a table.

    Where rich is not installed, there are plain lines.
    """
    cells = [row[: len(header)] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        width = max(len(row[0]) for row in cells)
        print(f"{title}\n")
        for row in cells:
            print(f"  {row[0]:{width}}  {', '.join(row[1:])}".replace("\n", ", "))
        print()
        return
    table = Table(*header, title=title, title_justify="left", title_style="bold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def main() -> int:
    """Print what there is and what it is good for; 1 where no Python suits, else 0."""
    os.chdir(ROOT)
    # As in a lesson, the environment's own commands come first.
    os.environ["PATH"] = f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    with ThreadPoolExecutor(len(LOOKS)) as pool:
        facts = list(pool.map(lambda look: look(), LOOKS))
    show("This machine", facts, "", "found")
    if sys.version_info >= NEWEST_NEEDS:
        made, lessons = plan()
        show("What the lessons choose", made, "", "choice", "because")
        show("What each lesson will run", lessons, "lesson", "runs")
        print("WORKBOOK_ENGINE, WORKBOOK_CONTEXT and AGREE_TO_COST change this: see the README.")
    print("No lesson needs more than Python. What is missing or in the way, and what helps:\n")
    for fact in facts:
        if fact.advice:  # not in a table, so that a command can be copied
            print(f"  {fact.what}: {fact.advice}")
    print(f"\nIf something goes wrong: {HELP}")
    return int(facts[0].found == NO_PYTHON)


if __name__ == "__main__":
    sys.exit(main())
