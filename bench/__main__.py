"""Measures the gateway and the model server, and writes build/bench/report.html: `make bench`.

All numbers of a figure come from the same minutes, in turns, so what counts are the ratios.
bench/README.md says what is measured, how, and what was learnt.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import distributions
from pathlib import Path

from tqdm import tqdm

from bench import gateway, model_server
from bench.measure import ROOT, Command, Figure, Server, Settings, server
from bench.report import Report

PACKAGES = ("fastapi", "uvicorn", "onnxruntime", "ai-edge-litert", "pillow", "numpy")


def start_all(
    commands: Mapping[str, Command], progress: tqdm, stack: ExitStack
) -> dict[str, Server]:
    """Start servers one after the other; they all end when the stack is closed."""
    running = {}
    for name, command in commands.items():
        running[name] = stack.enter_context(server(command))
        progress.update()
    stack.callback(lambda: [each.process.terminate() for each in running.values()])
    return running


def start(
    commands: Mapping[str, Command], rounds: int, stack: ExitStack
) -> tuple[dict[str, Server], list[Figure]]:
    """Start all servers several times; return the last ones, which stay, and figures of all."""
    seconds = Figure(gateway.MEMORY, "from exec to ready", "s")
    memory = Figure(gateway.MEMORY, "memory when idle", "MiB")
    names = [name for name in commands if name not in gateway.HOSTS]
    with tqdm(total=rounds * len(commands), desc="start-up", leave=False) as progress:
        for number in range(rounds):
            with ExitStack() as starting:
                running = start_all(commands, progress, starting)
                for name in names:
                    seconds.results.setdefault(name, []).append(running[name].seconds)
                    memory.results.setdefault(name, []).append(running[name].memory())
                if number == rounds - 1:
                    stack.push(starting.pop_all())
    return running, [seconds, memory]


def versions_of_peers() -> str:
    """Say what FastAPI runs with."""
    [packages] = gateway.PEERS_PYTHON.parent.parent.glob("lib/python*/site-packages")
    found = {each.name.lower(): each.version for each in distributions(path=[str(packages)])}
    return ", ".join(f"{name} {found[name]}" for name in PACKAGES)


def measure(report: Report, settings: Settings, model: Path, folder: Path) -> None:
    """Measure everything."""
    photos = {size: gateway.photo(size) for size in gateway.SIZES}
    for size, picture in photos.items():
        (folder / gateway.file_name(size)).write_bytes(picture)
    for sample in gateway.SAMPLES:
        shutil.copy(sample, folder)
    sizes = (
        f"{size}: {width} × {height}, {len(photos[size]) / 1e3:,.0f} kB"
        for size, (width, height, _) in gateway.SIZES.items()
    )
    report.say("Pictures", "; ".join(sizes))
    with ExitStack() as stack:
        commands = gateway.commands(model, folder)
        running, figures = start(commands, settings.rounds, stack)
        report.say("Answers", gateway.check_answers(commands))
        for figure in gateway.measure(model, commands, running, photos, settings):
            report.add(figure)
        for figure in gateway.where_time_goes(commands, photos, settings):
            report.add(figure)
        for engine, name in model_server.NAMES.items():
            for figure in model_server.against_calls(
                engine, commands[name], running[name], model / "1", settings
            ):
                report.add(figure)
        name, size = model_server.NAMES[model_server.TENSORFLOW], gateway.MIDDLE
        for figure in model_server.ways(
            commands[name], running[name], size, photos[size], settings
        ):
            report.add(figure)
        for figure in (*figures, gateway.memory(commands, running, settings)):
            report.add(figure)
        lite = commands[model_server.NAMES[model_server.LITE]]
        report.add(model_server.beside_long_bodies(lite, settings))
    for engine in model_server.NAMES:
        report.add(model_server.memory(engine, model, folder, settings))
    report.judge(gateway.targets(report.figures, settings.clients))


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="more of them, less noise")
    parser.add_argument("--requests", type=int, default=3000, help="for the look at the memory")
    parser.add_argument("--quick", action="store_true", help="try everything once, for an instant")
    parser.add_argument("--model", type=Path, default=ROOT / "build/clothing-model")
    parser.add_argument("--report", type=Path, default=ROOT / "build/bench/report.html")
    arguments = parser.parse_args()
    for name in ("saved_model.pb", "model.tflite"):
        if not (arguments.model / "1" / name).exists():
            sys.exit(f"{arguments.model}/1/{name} is missing: make workbook ONLY=01 exports it")
    settings = Settings(arguments.rounds, arguments.requests)
    if arguments.quick:
        settings = Settings(1, 20, seconds=0.1, clients=2, most_clients=2, versions=(1,))
    report = Report(settings.rounds)
    if gateway.PEERS_PYTHON.exists():
        report.say("FastAPI's", versions_of_peers())
        gateway.convert(arguments.model)
    else:
        report.say("Left out", "FastAPI, since build/peers-venv is missing: make bench installs it")
    with tempfile.TemporaryDirectory() as folder:
        measure(report, settings, arguments.model.resolve(), Path(folder))
    report.write(arguments.report)


if __name__ == "__main__":
    main()
