"""What a run has found: tables on the terminal, and one page that loads nothing from elsewhere."""

import os
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import CORES, Figure

TEMPLATE = Path(__file__).with_name("report.html")
PACKAGES = ("ai-edge-litert", "tensorflow", "grpcio", "flask", "gunicorn", "pillow", "numpy")
# Sets of instructions for many numbers at a time; those with "vnni" are made for int8.
VECTORS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni")
console = Console(highlight=False)


@dataclass
class Target:
    """What was asked for, by picture and host what it is, and what decoding and int8 alone get."""

    sentence: str
    cells: dict[tuple[str, str], float]
    limits: dict[tuple[str, str], float]
    least: float = 0.0
    most: float = float("inf")

    def verdict(self, cell: tuple[str, str]) -> str:
        """Say whether it is what was asked for, as precisely as it is shown."""
        reached = self.least <= round(self.cells[cell], 2) <= self.most
        return "reached" if reached else "NOT reached"


def processor() -> str:
    """Return the processor's name, how many cores of it there are, and how it multiplies.

    Machines that are rented by the hour have several processors of the same name; the int8 model
    takes a third of the time on those with VNNI.
    """
    about = Path("/proc/cpuinfo")
    said: dict[str, str] = {}
    for line in about.read_text().splitlines() if about.exists() else []:
        name, _, value = line.partition(":")
        said.setdefault(name.strip(), value.strip())
    name = said.get("model name", platform.machine())
    vectors = [each for each in VECTORS if each in said.get("flags", "").split()]
    kind = f" (family {said['cpu family']}, model {said['model']})" if "cpu family" in said else ""
    return f"{name}{kind}, {CORES} cores{', ' if vectors else ''}{', '.join(vectors)}"


def shown(value: float) -> str:
    """Write a number with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass
class Row:
    """One line of a figure, as it is shown."""

    name: str
    middle: float
    low: float
    high: float
    ratio: str
    cpu_ms: list[str]  # of each tier

    @property
    def value(self) -> str:
        """Write the median."""
        return shown(self.middle)

    @property
    def spread(self) -> str:
        """Write the least and the most, where they differ."""
        return "" if self.low == self.high else f"{shown(self.low)} – {shown(self.high)}"


def tiers(figure: Figure) -> list[str]:
    """Return the names of the tiers whose CPU time is known."""
    return list(dict.fromkeys(tier for each in figure.cpu_ms.values() for tier in each))


def rows(figure: Figure) -> list[Row]:
    """Return the lines of a figure; the limit, which is none of the servers, is the last."""
    found = []
    for name, values in figure.results.items():
        ratio = ""
        if figure.ours and name != figure.ours:
            each = figure.ratios(name)
            ratio = f"{median(each):.2f}"
        cpu = figure.cpu_ms.get(name, {})
        cpu_ms = [shown(cpu[tier]) if tier in cpu else "" for tier in tiers(figure)]
        found.append(Row(name, median(values), min(values), max(values), ratio, cpu_ms))
    return sorted(found, key=lambda row: row.name == figure.limit)


@dataclass
class Report:
    """Collects figures, prints each one at once, and writes all of them at the end."""

    rounds: int
    processor: str = field(default_factory=processor)
    begin: float = field(default_factory=time.time)
    load: tuple[float, float, float] = field(default_factory=os.getloadavg)
    figures: dict[str, Figure] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Say what this run is made with."""
        self.say("Processor", self.processor)
        load = ", ".join(f"{each:.1f}" for each in self.load)
        self.say("Load", f"{load} before the start (1, 5, 15 minutes); 0 is a quiet machine")
        self.say("Rounds", f"{self.rounds}, in turns: medians, with the least and the most")
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        self.say("Versions", f"Python {platform.python_version()}, {versions}")

    def say(self, name: str, fact: str) -> None:
        """Keep a fact about this run, and print it."""
        self.facts[name] = fact
        console.print(f"{name}: {fact}")

    def add(self, figure: Figure) -> None:
        """Keep a figure, and print it."""
        self.figures[figure.title] = figure
        console.print(f"\n{figure.title} · {self.processor}", style="bold")
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        columns = [figure.unit, "least – most"]
        columns += ["÷ this"] if figure.ours else []
        columns += [f"{tier}, CPU ms" for tier in tiers(figure)]
        for column in columns:
            table.add_column(column, justify="right", no_wrap=column == "least – most")
        for row in rows(figure):
            ratio = [row.ratio] if figure.ours else []
            table.add_row(row.name, row.value, row.spread, *ratio, *row.cpu_ms)
        console.print(table)

    def judge(self, targets: list[Target]) -> None:
        """Keep the targets, and print which of them are reached."""
        self.targets = targets
        console.print(f"\nTargets, links on the same machine · {self.processor}", style="bold")
        for target in targets:
            console.print(f"\n{target.sentence}")
            for cell, value in target.cells.items():
                limit = f"  (decoding and int8 alone: {target.limits[cell]:.2f})"
                console.print(f"  {', '.join(cell):<18}{value:8.2f}  {target.verdict(cell)}{limit}")

    def write(self, path: Path) -> None:
        """Write the page."""
        self.say("Took", f"{(time.time() - self.begin) / 60:.0f} minutes")
        self.facts["Began"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.begin))
        chapters: dict[str, list[Figure]] = {}
        for figure in self.figures.values():
            chapters.setdefault(figure.chapter, []).append(figure)
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(TEMPLATE.read_text())
        page = template.render(report=self, chapters=chapters, rows=rows, tiers=tiers)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(page)
        console.print(f"\nThe report: {os.path.relpath(path)}")
