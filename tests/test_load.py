"""What sends load: Locust, in a process of its own, against a gateway and a model server."""

import csv
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from helpers.basics import ROOT, eventually, free_port
from helpers.servers import Server, wait_until_ready

LOCUST = [sys.executable, "-m", "locust", "--locustfile", "bench/locustfile.py", "--headless"]


def start(*options: object) -> subprocess.Popen[str]:
    """Locust is run, and never imported: it would replace the sockets and threads of the tests."""
    words = [*LOCUST, "--only-summary", *map(str, options)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def locust_until(folder: Path, noted: Callable[[list[dict[str, str]]], bool], *options: object):
    """Run Locust until what it has noted will do; return its status, its table and its notes."""
    notes = folder / "requests.csv"
    with start("--requests", notes, *options) as process:
        try:
            eventually(lambda: notes.exists() and noted(rows(notes)), "enough requests")
        finally:
            process.send_signal(signal.SIGINT)
        table = "".join(process.communicate(timeout=60))
    assert process.returncode in (0, 1), table
    return process.returncode, table, rows(notes)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def test_every_kind_of_request_gets_its_answer(
    launch: Callable[..., Server],
    start_gateway: Callable[..., Server],
    model_server: Server,
    tmp_path: Path,
) -> None:
    address = f"127.0.0.1:{free_port()}"
    web = [sys.executable, "-m", "http.server", address.partition(":")[2], "--bind", "127.0.0.1"]
    pictures = launch([*web, "--directory", "notebooks/samples"], http=f"http://{address}")
    wait_until_ready(pictures, f"{pictures.http}/dress.png", lambda body: True)
    gateway = start_gateway(model_server.grpc, ALLOWED_IMAGE_HOSTS=address)
    kinds = {"a file", "a link", "several links", "a wrong request"}
    status, table, noted = locust_until(
        tmp_path,
        lambda noted: {row["name"] for row in noted} == kinds,
        *("--host", gateway.http, "--pictures", pictures.http, "--users", 4),
    )
    assert {row["problem"] for row in noted} == {""} and status == 0
    assert all(f"POST     {kind}" in table for kind in kinds)


def test_refusals_are_counted_and_every_request_is_noted(
    start_gateway: Callable[..., Server], model_server: Server, tmp_path: Path
) -> None:
    crowded = start_gateway(model_server.grpc, MAX_IN_FLIGHT="1").http
    refused = "503 in place of 200"
    status, _, noted = locust_until(
        tmp_path,
        lambda noted: (
            {(row["clients"], row["problem"]) for row in noted}
            >= {("1", ""), ("8", ""), ("8", refused)}
        ),
        *("--host", f"{crowded},{crowded}", "--tags", "file"),
        *("--steps", "1,8,8,8,8,8", "--step-seconds", 5),
    )
    assert status == 1
    assert {row["problem"] for row in noted if row["clients"] == "1"} == {""}
    assert {row["problem"] for row in noted} == {"", refused}
    assert all(float(row["milliseconds"]) > 0 for row in noted)


def test_without_a_gateway_it_says_so_and_sends_nothing() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with start("--host", address, "--tags", "file") as process:
        table, said = process.communicate(timeout=60)
    assert process.returncode != 0 and "POST" not in table + said
    assert f"No gateway answers at {address}: " in said and "make serve starts one" in said


def test_links_without_a_place_for_pictures_are_refused_in_a_sentence() -> None:
    with start("--host", "http://127.0.0.1:1", "--tags", "link") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and "Links need --pictures ADDRESS" in said
