"""Load for a gateway, by Locust: pictures as files, by link, several links, and wrong requests.

    make load HOST=http://localhost:9696                  30 seconds, 8 clients, a table
    make load HOST=... CLIENTS=32 SECONDS=60 TAGS=file    more clients, for longer, only files
    make load HOST=... PAGE=8089                          Locust's own page, at that port

Without ``make``: ``locust --locustfile bench/locustfile.py --headless --host ... --tags file``.
With ``--steps 1,4,16`` the number of clients grows meanwhile; with ``--pace`` each of them asks so
often, and not as often as it can; ``--requests FILE`` writes a line for each request. The gateway
must reach the links of ``--pictures``: on one machine, serve ``notebooks/samples`` there, and name
that address in its ALLOWED_IMAGE_HOSTS. A key in GATEWAY_API_KEY is sent along.

A request counts as failed unless its answer is the right one: a wrong request must be refused.
"""

import csv
import itertools
import json
import os
import random
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from locust import FastHttpUser, LoadTestShape, constant_throughput, events, stats, tag, task
from urllib3 import encode_multipart_formdata

SAMPLES = sorted((Path(__file__).resolve().parent.parent / "notebooks/samples").glob("*.png"))
FORMS = [encode_multipart_formdata({"file": (each.name, each.read_bytes())}) for each in SAMPLES]
KEY = os.environ.get("GATEWAY_API_KEY", "")
SEVERAL = 4  # links in one request
JSON = "application/json"
# What is wrong, its type, and the status of the answer.
WRONG = [
    (b"this is no picture", "image/png", 415),
    (b'{"picture": "dress"}', JSON, 400),
    (b'{"url": "http://169.254.169.254/"}', JSON, 400),
]
numbers = itertools.count()
# So that a table of results is no wider than a terminal.
stats.STATS_NAME_WIDTH, stats.PERCENTILES_TO_REPORT = 20, [0.5, 0.75, 0.95, 0.99, 1.0]


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Add our own options to Locust's."""
    parser.add_argument("--pictures", default="", help="where the links lead: a folder's address")
    parser.add_argument("--pace", type=float, default=0, help="requests a second of each client")
    parser.add_argument("--steps", default="", help="numbers of clients, one after the other: 1,4")
    parser.add_argument("--step-seconds", type=int, default=3, help="how long each of them lasts")
    parser.add_argument("--requests", default="", help="a file, which gets a line for each request")


class Steps(LoadTestShape):
    """First so many clients, then so many, and then the end."""

    abstract = True  # only where --steps asks for it

    def tick(self) -> tuple[int, float] | None:
        """Return how many clients there should be now, and how fast they may come and go."""
        assert self.runner is not None
        options: Any = self.runner.environment.parsed_options
        numbers = [int(number) for number in options.steps.split(",")]
        step = int(self.get_run_time() / options.step_seconds)
        return (numbers[step], 100) if step < len(numbers) else None


@events.init.add_listener
def prepare(environment: Any, **_: object) -> None:
    """Prepare the steps and the file of requests; leave out what needs links if there are none."""
    options = environment.parsed_options
    if options.steps:
        environment.shape_class = Steps()
        environment.shape_class.runner = environment.runner
    if options.requests:
        note_requests(environment, Path(options.requests))
    if not options.pictures:
        if {*(options.tags or [])} & {"link", "links"}:
            sys.exit("Links need --pictures ADDRESS, where the gateway finds notebooks/samples.")
        Client.tasks = [each for each in Client.tasks if each not in (Client.link, Client.links)]
    if options.headless:
        for host in (options.host or "").split(","):
            check_answers(host)


def check_answers(host: str) -> None:
    """End in a sentence where nobody answers, instead of with thousands of failures."""
    try:
        urllib.request.urlopen(f"{host}/livez", timeout=30).close()
    except HTTPError:
        pass  # perhaps only /predict is published
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        sys.exit(f"No gateway answers at {host or '--host'}: {why}. Here, make serve starts one.")


def note_requests(environment: Any, path: Path) -> None:
    """Write a line of CSV for each request that has ended; `cpu` is what Locust has used so far."""
    file = path.open("w", newline="", buffering=1)
    writer = csv.writer(file)
    writer.writerow(["start", "clients", "name", "milliseconds", "problem", "cpu"])

    @environment.events.request.add_listener
    def note(
        name: str, response_time: float, exception: object, start_time: float, **_: object
    ) -> None:
        times = f"{start_time:.4f}", environment.runner.user_count, name, f"{response_time:.2f}"
        writer.writerow([*times, exception, f"{time.process_time():.4f}"])


class Client(FastHttpUser):
    """Somebody who sends the next picture when the answer to the last one has come, or paced.

    Of several hosts, separated by commas, each client takes one, in turns.
    """

    pace: Callable[[Any], float] | None = None

    def __init__(self, environment: Any) -> None:
        hosts = (environment.host or self.host or "").split(",")
        self.host = hosts[next(numbers) % len(hosts)]
        super().__init__(environment)
        self.options = environment.parsed_options
        self.headers = {"Authorization": f"Bearer {KEY}"} if KEY else {}

    def on_start(self) -> None:
        """Start at a moment of one's own, where clients are paced, so that they do not march."""
        if self.options.pace:
            time.sleep(random.random() / self.options.pace)
            self.pace = constant_throughput(self.options.pace)

    def wait_time(self) -> float:
        """Return the seconds until the next request: none, unless clients are paced."""
        return self.pace(self) if self.pace else 0

    @tag("file")
    @task(6)
    def file(self) -> None:
        """A picture in a form."""
        self.ask("a file", *random.choice(FORMS))

    @tag("link")
    @task(3)
    def link(self) -> None:
        """A link to a picture."""
        self.ask("a link", json.dumps({"url": self.any_link()}).encode(), JSON)

    @tag("links")
    @task(1)
    def links(self) -> None:
        """Several links in one request."""
        body = {"urls": [self.any_link() for _ in range(SEVERAL)]}
        self.ask("several links", json.dumps(body).encode(), JSON)

    @tag("wrong")
    @task(1)
    def wrong(self) -> None:
        """Something that must be refused."""
        self.ask("a wrong request", *random.choice(WRONG))

    def any_link(self) -> str:
        """Return a link to one of the pictures."""
        return f"{self.options.pictures.rstrip('/')}/{random.choice(SAMPLES).name}"

    def ask(self, name: str, body: bytes, kind: str, status: int = 200) -> None:
        """Send a request; count it as failed unless the answer has this status and a class."""
        client: Any = self.client  # its annotations leave out bytes
        headers = {**self.headers, "Content-Type": kind}
        with client.post(
            "/predict", data=body, headers=headers, name=name, catch_response=True
        ) as response:
            if response.status_code == 0:
                response.failure(f"no answer: {type(response.error).__name__}")
            elif response.status_code != status:
                response.failure(f"{response.status_code} in place of {status}")
            elif status == 200 and "predictions" not in response.text:
                response.failure("no predictions")
            else:
                response.success()
