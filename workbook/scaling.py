"""What lesson 08 measures with: servers, Locust's requests, CPU times, requests per pod; and plots.

What the lesson is about, the replayed autoscaler and the simulation, stands in its cells.
"""

import csv
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, NamedTuple

import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import psutil
import requests
from matplotlib.ticker import MaxNLocator
from PIL import Image

import tfserving
from description import Description
from workbook import servers
from workbook.kubectl import Kubectl

TIERS = ("gateway", "model server")
INK, MARK, GOLD, QUIET, LIGHT = "#1f2937", "#c2410c", "#d97706", "#9ca3af", "#fed7aa"
LINES = (INK, MARK, QUIET, GOLD)
ASK = Path(__file__).with_name("ask.py")
# A model server's image has a shell, and perhaps no Python: the shell itself asks for the page.
PAGE = r"""exec 3<>/dev/tcp/127.0.0.1/8501
printf 'GET /monitoring/prometheus/metrics HTTP/1.0\r\n\r\n' >&3
grep 'request_latency_count{.*Predict' <&3"""


class Request(NamedTuple):
    """One request of Locust's: its start in seconds, how many clients there were, its outcome."""

    start: float
    clients: int
    milliseconds: float
    problem: str
    cpu: float  # seconds that Locust itself had used by then

    @property
    def end(self) -> float:
        """When its answer came, in seconds."""
        return self.start + self.milliseconds / 1000


class Point(NamedTuple):
    """Requests a second, and the mean and the 95th percentile of their milliseconds."""

    rate: float
    mean: float
    p95: float


# --- Servers --------------------------------------------------------------------------------------


def start_model_server(name: str, base_path: Path, ports: tuple[int, int], *flags: str) -> str:
    """Start our model server with the small int8 model; return its address for gateways."""
    grpc_port, rest_port = ports
    words = [sys.executable, "-m", "model_server", f"--port={grpc_port}"]
    words += [f"--rest_api_port={rest_port}", f"--model_name={base_path.name}"]
    words += [f"--model_base_path={base_path.resolve()}", "--prefer_tflite_model=true"]
    words += ["--monitoring_config_file=model_server/monitoring.config", *flags]
    with Path(f"build/lesson-08-{grpc_port}.log").open("wb") as log:
        servers.start(name, words, ports, stdout=log, stderr=log)
    wait_for(f"http://localhost:{rest_port}/v1/models/{base_path.name}", name)
    return f"localhost:{grpc_port}"


def start_gateway(name: str, port: int, model_servers: Sequence[str], **settings: object) -> str:
    """Start a gateway that knows these model servers; return its address for clients."""
    env = os.environ | {"TF_SERVING_HOST": ",".join(model_servers), "DRAIN_SECONDS": "0"}
    env |= {key: str(value) for key, value in settings.items()}
    words = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "gateway:app"]
    with Path(f"build/lesson-08-{port}.log").open("wb") as log:
        ports = [port, *([int(env["METRICS_PORT"])] if "METRICS_PORT" in settings else [])]
        servers.start(name, words, ports, env=env, stdout=log, stderr=log)
    wait_for(f"http://localhost:{port}/readyz", name)
    return f"http://localhost:{port}"


def wait_for(url: str, name: str) -> None:
    """Wait until a server answers, without a clock: there are many, and each takes a second."""
    with redirect_stdout(StringIO()):
        servers.wait_for(url, name)


# --- Load -----------------------------------------------------------------------------------------


def load(hosts: Sequence[str], options: str) -> list[Request]:
    """Let Locust send pictures as files; return its requests in the order of their ends."""
    notes = Path("build/lesson-08-requests.csv")
    command = f"locust -f bench/locustfile.py --headless --tags file {options}"
    command += f" --host {','.join(hosts)}"
    print("$", command, flush=True)
    more = ["--only-summary", "--exit-code-on-error", "0", "--requests", str(notes)]
    with Path("build/lesson-08-locust.log").open("wb") as log:
        words = [sys.executable, "-m", *shlex.split(command), *more]
        subprocess.run(words, check=True, stdout=log, stderr=log)
    with notes.open(newline="") as file:
        return [
            Request(
                float(row["start"]),
                int(row["clients"]),
                float(row["milliseconds"]),
                row["problem"],
                float(row["cpu"]),
            )
            for row in csv.DictReader(file)
        ]


def point(seen: Sequence[Request]) -> Point:
    """Sum up requests that were answered."""
    ms = np.array([each.milliseconds for each in seen])
    ends = [each.end for each in seen]
    return Point((len(ms) - 1) / np.ptp(ends), float(ms.mean()), float(np.percentile(ms, 95)))


def by_clients(seen: Sequence[Request], numbers: Sequence[int]) -> dict[int, Point]:
    """Sum up requests for each number of clients."""
    return {n: point([each for each in seen if each.clients == n]) for n in numbers}


def wavering(measured: Mapping[Any, Mapping[int, Point]], numbers: Sequence[int]) -> float:
    """Say by how much throughputs differ that should be alike: the median over all runs."""
    rates = [[line[n].rate for n in numbers] for line in measured.values()]
    return float(np.median([np.ptp(each) / np.median(each) for each in rates]))


def cpu_seconds(tier: str) -> float:
    """Return how long the servers whose names begin so have had a core, with their workers."""
    mine = [psutil.Process(each.pid) for n, each in servers.running.items() if n.startswith(tier)]
    mine += [child for process in mine for child in process.children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in mine)


def measure(hosts: Sequence[str], options: str) -> tuple[list[Request], dict[str, float]]:
    """Send load; return its requests, and the milliseconds of CPU of each tier for one of them."""
    before = {tier: cpu_seconds(tier) for tier in TIERS}
    seen = load(hosts, options)
    cost = {tier: 1000 * (cpu_seconds(tier) - before[tier]) / len(seen) for tier in TIERS}
    cost["Locust"] = 1000 * (seen[-1].cpu - seen[0].cpu) / (len(seen) - 1)
    return seen, {tier: round(ms, 2) for tier, ms in cost.items()}


def stage_seconds(metrics_port: int, rest_port: int) -> dict[str, float]:
    """Return the seconds that a gateway has spent in its stages, and its model server, so far."""
    page = requests.get(f"http://localhost:{metrics_port}/metrics", timeout=10).text
    found = dict(re.findall(r'gateway_seconds_sum{stage="(\w+)"} (\S+)', page))
    url = f"http://localhost:{rest_port}/monitoring/prometheus/metrics"
    page = requests.get(url, timeout=10).text
    found["model"] = float(re.findall(r"request_latency_sum{.*GRPC.*} (\S+)", page)[0]) / 1e6
    return {stage: float(seconds) for stage, seconds in found.items()}


def measure_stages(
    host: str, options: str, metrics_port: int, rest_port: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Send load; return the milliseconds that a request spends in each part of its way, and `cost`.

    The parts follow one another. `cost` is what `measure` returns.
    """
    before = stage_seconds(metrics_port, rest_port)
    seen, cost = measure([host], options)
    after = stage_seconds(metrics_port, rest_port)
    ms = {name: 1000 * (s - before.get(name, 0)) / len(seen) for name, s in after.items()}
    parts = {"decode": ms["decode"], "model server": ms["model"]}
    parts["gRPC"] = ms["predict"] - ms["model"]
    parts["rest of the gateway"] = ms["all"] - ms["decode"] - ms["predict"]
    parts["HTTP"] = point(seen).mean - ms["all"]
    return parts, cost


def throughput(
    address: str, model: Description, threads: int = 1, batch: int = 1, seconds: float = 1.0
) -> float:
    """Let threads ask a model server for batches of pictures; return pictures a second."""
    pb_request = tfserving.PredictRequest()
    pb_request.model_spec.name = model.name
    pb_request.model_spec.signature_name = "serving_uint8"
    pixels = np.zeros((batch, model.height, model.width, 3), np.uint8)
    pb_request.inputs["pixels"].CopyFrom(tfserving.make_tensor_proto(pixels))
    with tfserving.make_channel(address) as channel:
        stub = tfserving.PredictionServiceStub(channel)
        stub.Predict(pb_request, timeout=60)  # connects
        start = time.perf_counter()

        def client(_: int) -> int:
            calls = 0
            while time.perf_counter() < start + seconds:
                stub.Predict(pb_request, timeout=60)
                calls += 1
            return calls

        with ThreadPoolExecutor(threads) as pool:
            calls = sum(pool.map(client, range(threads)))
        return batch * calls / (time.perf_counter() - start)


# --- Pods -----------------------------------------------------------------------------------------


class Replicas:
    """The pods of the model server: who asks them, and how many requests each has answered."""

    def __init__(self, kubectl: Kubectl, model_name: str):
        self.kubectl, self.model_name = kubectl, model_name
        self.history: list[tuple[float, dict[str, int]]] = []

    def inside(self, pod: str, *words: str) -> str:
        """Run a command in a pod; return what it prints."""
        if self.kubectl.rehearsal is not None:
            return self.kubectl.rehearsal.exec(pod, *words).stdout
        command = [*shlex.split(self.kubectl.command), "exec", pod, "--", *words]
        return subprocess.run(command, capture_output=True, text=True).stdout

    def ask(self, target: str, policy: str, seconds: float) -> int:
        """Run `ask.py` in a gateway's pod; return how many of its requests have failed."""
        words = ["python", "-c", ASK.read_text(), target, policy, f"{seconds}", self.model_name]
        said = self.inside(self.kubectl.pods("gateway")[0].name, *words)
        if not re.fullmatch(r"\d+\s*", said):
            raise RuntimeError(f"The client in the gateway's pod said: {said[-500:]}")
        return int(said)

    def start(self, number: int) -> None:
        """Scale to so many pods, wait until they and a gateway are ready, and forget the past."""
        self.kubectl(f"scale deployment/model-server --replicas={number}")
        servers.wait_until(
            lambda: len(self.counts()) == number, f"{number} model servers are ready"
        )
        servers.wait_until(
            lambda: any(pod.ready for pod in self.kubectl.pods("gateway")), "a gateway is ready"
        )
        self.history.clear()

    def counts(self) -> dict[str, int]:
        """Return how many predictions each pod has answered that is ready, by its own count."""
        pods = [pod.name for pod in self.kubectl.pods("model-server") if pod.ready]
        return {pod: self._count(pod) for pod in pods}

    def _count(self, pod: str) -> int:
        numbers = re.findall(r" (\d+)$", self.inside(pod, "bash", "-c", PAGE), re.MULTILINE)
        return sum(map(int, numbers))

    def shares(self, target: str, policy: str, seconds: float) -> list[int]:
        """Ask for some seconds; return how many requests each pod has answered meanwhile."""
        before = self.counts()
        self.ask(target, policy, seconds)
        return [count - before.get(pod, 0) for pod, count in self.counts().items()]

    def watch(self, until: Callable[[], object], seconds: float = 30) -> None:
        """Note the counts twice a second, until something is true or the time is over."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            self.history.append((time.time(), self.counts()))
            time.sleep(0.5)

    def all_work(self, number: int) -> bool:
        """Say whether so many pods have each had a fair part of the last two seconds' requests."""
        if len(self.history) < 5:
            return False
        old, new = self.history[-5][1], self.history[-1][1]
        gained = [new[pod] - old.get(pod, 0) for pod in new]
        return len(gained) == number and min(gained) > 0.2 * sum(gained)

    def plot(self, moments: Mapping[str, float], smooth: int = 3) -> None:
        """Draw each pod's requests a second over `smooth` notes, and what happened when."""
        start = self.history[0][0]
        pods = dict.fromkeys(pod for _, seen in self.history for pod in seen)
        for pod, color in zip(pods, (INK, GOLD, MARK, QUIET, LIGHT), strict=False):
            noted = np.array([(t, seen[pod]) for t, seen in self.history if pod in seen])
            if len(noted) > smooth:
                seconds, requests = (noted[smooth:] - noted[:-smooth]).T
                rates = requests / seconds
                plt.plot(noted[smooth:, 0] - start, rates, color=color, label=pod[-5:])
        plt.ylim(0, 1.25 * plt.ylim()[1])
        for number, (what, when) in enumerate(moments.items()):
            plt.axvline(when - start, color=QUIET, linestyle=":")
            height = (0.93 - 0.08 * number) * plt.ylim()[1]
            plt.text(when - start, height, f" {what}")
        plt.xlabel("seconds")
        plt.ylabel("requests a second")
        plt.legend(title="pod", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
        show()


class Look(NamedTuple):
    """What is seen of an autoscaler at a moment."""

    when: float  # seconds, as `time.time()`
    wanted: int  # pods
    ready: int
    usage: float  # CPU in per cent of what the pods request; not a number while nobody measures it


class Scaler:
    """The autoscaler of a Deployment with the same name, and what has been seen of it."""

    def __init__(self, kubectl: Kubectl, name: str):
        self.kubectl, self.name = kubectl, name
        self.history: list[Look] = []

    def look(self) -> Look:
        """Note how many pods it wants, how many are ready, and what they use."""
        deployment = self.kubectl.object("deployment", self.name)
        scaler = self.kubectl.object("horizontalpodautoscaler", self.name)
        metrics = scaler.get("status", {}).get("currentMetrics") or [{}]
        current = metrics[0].get("resource", {}).get("current", {})
        ready = deployment.get("status", {}).get("readyReplicas", 0)
        usage = current.get("averageUtilization", np.nan)
        self.history.append(Look(time.time(), deployment["spec"]["replicas"], ready, usage))
        return self.history[-1]

    def watch(self, until: Callable[[Look], object], seconds: float) -> None:
        """Look every second, until something is true of a look or the time is over."""
        end = time.monotonic() + seconds
        while not until(self.look()) and time.monotonic() < end:
            time.sleep(1)

    def plot(self, target: int, load: Sequence[float]) -> None:
        """Draw pods and CPU against time, with the target (per cent) and from when to when load."""
        when, wanted, ready, usage = np.array(self.history).T
        start = min(when[0], load[0])
        seconds = when - start
        _, (above, below) = plt.subplots(2, sharex=True, figsize=(5.4, 4.4))
        above.step(seconds, wanted, color=MARK, where="post", label="wanted")
        above.step(seconds, ready, color=INK, where="post", linestyle="--", label="ready")
        above.set(ylabel="pods", ylim=(0, 1.15 * wanted.max()))
        above.yaxis.set_major_locator(MaxNLocator(integer=True))
        below.step(seconds, usage, color=INK, where="post", label="used")
        below.axhline(target, color=MARK, linestyle=":", label="target")
        below.set(xlabel="seconds", ylabel="CPU, % of requests", ylim=(0, None))
        if np.isnan(usage).all():
            below.text(seconds.mean(), target / 2, "<unknown>", ha="center")
        for each in (above, below):
            each.axvspan(*(np.array(load) - start), color=LIGHT, alpha=0.5, linewidth=0)
            each.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        show()


# --- Plots ----------------------------------------------------------------------------------------


def table(title: str, columns: Mapping[Any, Mapping[str, float]]) -> str:
    """Lay out numbers in Markdown, a column for each key, narrow enough for a phone."""
    names = [f"{name:,}" if isinstance(name, int) else name for name in columns]
    lines = [f"| {title} | {' | '.join(names)} |", "|---" + "|--:" * len(columns) + "|"]
    for row in next(iter(columns.values())):
        numbers = [short(column[row]) for column in columns.values()]
        lines.append(f"| {row} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def short(number: float) -> str:
    """Write a number with about three digits, so that a table stays narrow."""
    if number != number:  # not a number
        return "–"
    if number >= 99_950:
        return f"{number / 1e6:,.1f} M" if number >= 999_500 else f"{number / 1000:.0f} k"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def show() -> None:
    """Show the current figure in few colours, so that a notebook with many plots stays small."""
    plain, small = BytesIO(), BytesIO()
    plt.gcf().savefig(plain, dpi=110)
    plt.close()
    Image.open(plain).convert("RGB").quantize(40, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True
    )
    IPython.display.display(IPython.display.Image(small.getvalue()))


def plot_stages(stages: Mapping[int, Mapping[str, float]]) -> None:
    """Draw a stacked bar of milliseconds for each number of clients."""
    left = np.zeros(len(stages))
    for stage, color in zip(
        next(iter(stages.values())), (MARK, INK, GOLD, LIGHT, QUIET), strict=True
    ):
        widths = [max(0.0, each[stage]) for each in stages.values()]
        plt.barh(
            [f"clients: {number}" for number in stages], widths, left=left, color=color, label=stage
        )
        left += widths
    plt.xlabel("milliseconds for a picture")
    plt.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    show()


def clients_axis(axes: Any, numbers: Sequence[int], label: str = "clients") -> None:
    """Give axes a scale on which each doubling is a step."""
    axes.set_xscale("log")
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.set(xlabel=label, ylim=(0, 1.05 * axes.get_ylim()[1]))


def plot_tiers(measured: Mapping[tuple[int, int], Mapping[int, Point]], limit: float) -> None:
    """Draw throughput and p95 against clients, for each number of gateways and model servers.

    A dot marks the knee: the fewest clients with nine tenths of a line's best throughput.
    """
    _, axes = plt.subplots(2, figsize=(5.4, 5.2))
    for (arrangement, line), color in zip(measured.items(), LINES, strict=True):
        rates = {n: each.rate for n, each in line.items()}
        knee = min(n for n in rates if rates[n] >= 0.9 * max(rates.values()))
        label = "{} + {}".format(*arrangement)
        axes[0].plot([*rates], [*rates.values()], color=color, label=label)
        axes[0].plot(knee, rates[knee], "o", color=color)
        axes[1].plot([*line], [each.p95 for each in line.values()], color=color)
    axes[0].axhline(limit, color=INK, linestyle="--", label="all cores")
    axes[0].set_ylabel("pictures a second")
    axes[1].set_ylabel("p95, ms")
    for each in axes:
        clients_axis(each, [*measured[1, 1]])
    axes[0].legend(
        title="gateways + model servers", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    show()


def plot_batches(sizes: Sequence[int], lines: Mapping[str, Sequence[float]]) -> None:
    """Draw pictures a second against threads or sizes of batches."""
    for (label, rates), color in zip(lines.items(), (INK, MARK, QUIET), strict=True):
        plt.plot(sizes, rates, "o-", color=color, label=label)
    clients_axis(plt.gca(), sizes, "threads that ask, or pictures in a batch")
    plt.ylabel("pictures a second")
    plt.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    show()


def plot_replay(rates: Sequence[float], replicas: Sequence[int]) -> None:
    """Draw the load and the autoscaler's answer, a look each fifteen seconds."""
    minutes = np.arange(1, len(rates) + 1) / 4
    _, axes = plt.subplots()
    axes.fill_between(minutes, rates, step="pre", color=LIGHT)
    axes.set(xlabel="minutes, replayed", ylabel="pictures a second")
    twin = axes.twinx()
    twin.step(minutes, replicas, color=INK)
    twin.set(ylabel="gateways", ylim=(0, max(replicas) + 1))
    twin.yaxis.set_major_locator(MaxNLocator(integer=True))
    show()


def plot_simulation(measured: Mapping, simulated: Mapping) -> None:
    """Draw measured throughputs as dots, simulated ones (pictures a second) as lines."""
    for (arrangement, line), color in zip(measured.items(), LINES, strict=True):
        label = "{} + {}".format(*arrangement)
        plt.plot([*line], [each.rate for each in line.values()], "o", color=color, label=label)
        plt.plot([*line], [*simulated[arrangement].values()], color=color)
    clients_axis(plt.gca(), [*line])
    plt.ylabel("pictures a second")
    legend = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}
    plt.legend(title="dots measured, lines simulated", ncols=4, **legend)
    show()


def plot_ratios(ratios: Mapping[str, float], milliseconds: Mapping[str, float]) -> None:
    """Draw how many gateways one GPU can serve, with five to two as a line."""
    colors = [MARK if 2 <= ratio <= 3.2 else INK for ratio in ratios.values()]
    bars = plt.barh([*ratios], [*ratios.values()], color=colors)
    labels = [f" {ratio:.1f} ({milliseconds[name]:.2f} ms)" for name, ratio in ratios.items()]
    plt.bar_label(bars, labels)
    plt.axvline(2.5, color=QUIET, linestyle="--")
    plt.margins(x=0.45)
    plt.xlabel("gateways that one GPU can serve")
    show()


def plot_overload(overload: Mapping[str, Sequence[Request]]) -> None:
    """Draw each request: when it was asked, and when its answer came."""
    _, axes = plt.subplots(1, len(overload), sharey=True, figsize=(5.4, 3.2))
    for axis, (title, seen) in zip(axes, overload.items(), strict=True):
        start = min(each.start for each in seen)
        for label, color in (("answered", INK), ("refused", GOLD)):
            some = [each for each in seen if bool(each.problem) == (label == "refused")]
            ends = [each.milliseconds / 1000 for each in some]
            x = [each.start - start for each in some]
            axis.plot(x, ends, ".", markersize=2, color=color, label=label)
        axis.set(title=title, xlabel="asked at second")
    axes[0].set_ylabel("seconds until the answer")
    axes[0].legend(markerscale=4)
    show()
