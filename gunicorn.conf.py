"""How gunicorn runs the gateway; it reads this file by itself in the folder where it starts."""

import logging
import math
import os

env = os.environ.setdefault

worker_class = "worker.Worker"
logger_class = "worker.QuietLogger"
# Counted from SIGTERM: the time to be told that this gateway ends, and then to finish requests.
graceful_timeout = math.ceil(float(env("DRAIN_SECONDS", "2"))) + 30
control_socket_disable = True

# gRPC reads its sockets in the thread that waits for them, not in threads of its own: each time
# one thread wakes another costs 0.1 ms and more on a virtual machine. bench/README.md has numbers.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
# The system's lookup of names: glibc would wait for 10 seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")
logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings show links
