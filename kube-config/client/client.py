"""Ask a gateway steadily, and write a line for each answer: when it came, and what it was.

python client.py http://localhost:9696
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen


def keep_asking(url: str) -> None:
    """Ask five times a second, each time on a new connection; stop at nothing."""
    picture = b""
    while True:
        try:
            picture = picture or urlopen(f"{url}/samples/0.jpg", timeout=30).read()
            request = Request(f"{url}/predict", picture, {"Content-Type": "image/jpeg"})
            answer = json.load(urlopen(request, timeout=30))
            outcome = f"version {answer['model']['version']}"
        except Exception as error:
            outcome = f"failed: {error}"
        print(f"{time.time():.3f} {outcome}\n", end="", flush=True)
        time.sleep(0.2 - time.time() % 0.2)


if __name__ == "__main__":
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(keep_asking, [sys.argv[1]] * 4))
