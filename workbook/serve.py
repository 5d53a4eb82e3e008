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
from pathlib import Path
from urllib.error import HTTPError

import description
from workbook import servers
from workbook.lesson import ROOT, lessons
from workbook.processes import end_on_signals
from workbook.run import MODEL, execute_all, free_ports

LOGS = ROOT / "build" / "serve"
PORTS = {"GRPC_PORT": 8500, "REST_PORT": 8501, "GATEWAY_PORT": 9696, "METRICS_PORT": 9697}


def start(name: str, command: list[str], **env: str) -> None:
    """Start a server that logs to a file; it ends with this process."""
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{name}.log").open("wb") as log:
        servers.start(
            name,
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def is_ready(url: str) -> bool:
    """Ask the gateway whether it can predict.

    Raises RuntimeError when a server has ended, and when the gateway says that it cannot work with
    this model, in whose case waiting does not help.
    """
    servers.require_running(*servers.running)
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except HTTPError as error:
        problem = json.load(error)
        if "model-unsuitable" in problem.get("type", ""):
            raise RuntimeError(f"The gateway says: {problem['detail']}") from None
        return False
    except OSError:
        return False
    return True


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
            raise RuntimeError(
                f"There is no version of a model in {base_path}: lesson 01 exports one."
            )
        serve(base_path.resolve())
    except KeyboardInterrupt:
        servers.stop()
        print("\nInterrupted; everything that was started has ended.")
        return 0
    except (RuntimeError, TimeoutError, ValueError) as error:  # the last: there is no description
        print(error, file=sys.stderr)
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
    print(f"starting both servers; their logs are in {os.path.relpath(LOGS)}/", flush=True)
    start("model server", model_server)
    servers.wait_for(status, "model server")
    start(
        "gateway",
        gunicorn,
        TF_SERVING_HOST=grpc,
        MODEL_DESCRIPTION=str(about),
        MODEL_NAME=base_path.name,
        DRAIN_SECONDS="0",
        METRICS_PORT=f"{ports['METRICS_PORT']}",
    )
    servers.wait_until(lambda: is_ready(f"{http}/readyz"), "the gateway is ready")
    print(
        f"\n  model server   gRPC {grpc}, REST {status}\n  gateway        {http}\n"
        f"  metrics        http://127.0.0.1:{ports['METRICS_PORT']}/metrics\n"
        f"\nClassify a picture:\n\n"
        f"  curl --data '{body}' {http}/predict\n\n"
        "Ctrl-C ends both.",
        flush=True,
    )
    while True:
        servers.require_running(*servers.running)
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
