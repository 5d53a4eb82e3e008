"""Run the model server and the gateway side by side until Ctrl-C: `make serve`.

Its one argument is the folder of the model's versions, build/clothing-model if there is none:
`make serve MODEL=build/leaf-model`. The folder's name is the model's.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import HTTPError

import description
from workbook.lesson import ROOT, lessons
from workbook.processes import end_on_signals
from workbook.run import MODEL, execute_all, free_ports

LOGS = ROOT / "build" / "serve"
PORTS = {"GRPC_PORT": 8500, "REST_PORT": 8501, "GATEWAY_PORT": 9696, "METRICS_PORT": 9697}


class Ended(Exception):
    """A server has ended by itself, or was never ready."""


@contextmanager
def server(name: str, command: list[str], **env: str) -> Iterator[subprocess.Popen]:
    """Run a server that logs to a file, and end it when the block is left.

    It has a process group of its own, so that Ctrl-C reaches only this process. This process then
    ends the gateway first, and the model server, which the gateway asks, after it.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=35)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def check_alive(servers: dict[str, subprocess.Popen]) -> None:
    """Raise `Ended`, with the last line of its log, when one of the servers has ended."""
    for name, process in servers.items():
        if process.poll() is not None:
            lines = (LOGS / f"{name}.log").read_text(errors="replace").splitlines() or ["nothing"]
            raise Ended(
                f"The {name} has ended with status {process.returncode}; the last line of"
                f" {os.path.relpath(LOGS)}/{name}.log is: {lines[-1].strip()}"
            )


def wait_until(servers: dict[str, subprocess.Popen], url: str, word: bytes = b"") -> None:
    """Poll an address until it answers 200 with this word.

    Raises:
        Ended: It does not within two minutes; or a server has ended; or the gateway says that it
            cannot work with this model, in whose case waiting does not help.
    """
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        check_alive(servers)
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if word in answer.read():
                    return
        except HTTPError as error:
            problem = json.load(error)
            if "model-unsuitable" in problem.get("type", ""):
                raise Ended(f"The gateway says: {problem['detail']}") from None
        except OSError:
            pass
        time.sleep(0.1)
    raise Ended(
        f"{url} was not ready within two minutes; see the logs in {os.path.relpath(LOGS)}/."
    )


def main() -> int:
    """Serve until a signal comes, and return 0; return 1 when a server ends by itself."""
    end_on_signals()
    base_path = Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL.parent
    try:
        if base_path == MODEL.parent and not MODEL.is_dir():
            print("There is no build/clothing-model yet: notebook 01 makes it.", flush=True)
            first = lessons(ROOT / "notebooks")[:1]
            (made,) = execute_all(first, ROOT / "build" / "workbook")
            if made.error:
                print(f"{made.notebook} failed: {made.error}", file=sys.stderr)
                return 1
        if not any(base_path.glob("[0-9]*")):
            raise Ended(f"There is no version of a model in {base_path}: lesson 01 exports one.")
        serve(base_path.resolve())
    except KeyboardInterrupt:
        print("\nInterrupted; everything that was started has ended.")
        return 0
    except (Ended, ValueError) as ended:  # the second where there is no description
        print(ended, file=sys.stderr)
        return 1
    return 0


def serve(base_path: Path) -> None:
    """Start both servers, print their addresses, and wait until one ends or a signal comes."""
    ports = free_ports(PORTS)
    grpc, http = f"127.0.0.1:{ports['GRPC_PORT']}", f"http://127.0.0.1:{ports['GATEWAY_PORT']}"
    status = f"http://127.0.0.1:{ports['REST_PORT']}/v1/models/{base_path.name}"
    newest = max((each for each in base_path.glob("[0-9]*")), key=lambda each: int(each.name))
    about = newest / "assets.extra/model.json"
    label = next((sample.label for sample in description.read(about).samples), "")
    body = json.dumps({"sample": label}, ensure_ascii=False)
    model_server = [
        *(sys.executable, "-m", "model_server"),
        *(f"--port={ports['GRPC_PORT']}", f"--rest_api_port={ports['REST_PORT']}"),
        *(f"--model_name={base_path.name}", f"--model_base_path={base_path}"),
        "--prefer_tflite_model=true",
    ]
    gunicorn = [
        *(sys.executable, "-m", "gunicorn"),
        *("--bind", f"127.0.0.1:{ports['GATEWAY_PORT']}", "gateway:app"),
    ]
    servers: dict[str, subprocess.Popen] = {}
    with ExitStack() as stack:
        print("starting the model server …", flush=True)
        servers["model server"] = stack.enter_context(server("model server", model_server))
        wait_until(servers, status, b'"AVAILABLE"')
        print("starting the gateway …", flush=True)
        servers["gateway"] = stack.enter_context(
            server(
                "gateway",
                gunicorn,
                TF_SERVING_HOST=grpc,
                MODEL_DESCRIPTION=str(about),
                MODEL_NAME=base_path.name,
                DRAIN_SECONDS="0",
                METRICS_PORT=f"{ports['METRICS_PORT']}",
            )
        )
        wait_until(servers, f"{http}/readyz")
        print(
            f"\n  model server   gRPC {grpc}, REST {status}\n  gateway        {http}\n"
            f"  metrics        http://127.0.0.1:{ports['METRICS_PORT']}/metrics\n"
            f"\nClassify a picture:\n\n"
            f"  curl --data '{body}' {http}/predict\n\n"
            "Ctrl-C ends both.",
            flush=True,
        )
        while True:
            check_alive(servers)
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
