"""How gunicorn runs the gateway; it reads this file by itself in the folder where it starts."""

import ctypes
import logging
import math
import os
import socket

env = os.environ.setdefault

# One worker, whose threads worker.py counts. Neither a second worker nor another number of threads
# gained anything (bench/README.md). What is short is cores, says lesson 08: add gateways.
worker_class = "worker.Worker"
logger_class = "worker.QuietLogger"
# Counted from SIGTERM: the time to be told that this gateway ends, and then to finish requests.
graceful_timeout = math.ceil(float(env("DRAIN_SECONDS", "2"))) + 30
control_socket_disable = True
METRICS_PORT = int(env("METRICS_PORT", "0"))


def when_ready(arbiter):
    """Listen for Prometheus, too, beside the gateway's own address; worker.py answers there.

    The main process keeps this socket, so a worker finds it whenever it starts.
    """
    if METRICS_PORT:
        first = arbiter.LISTENERS[0]
        address, is_ipv6 = (first.getsockname()[0], METRICS_PORT), first.family == socket.AF_INET6
        second = socket.create_server(address, family=first.family, dualstack_ipv6=is_ipv6)
        arbiter.LISTENERS.append(second)


# Threads share one heap, so that none keeps the memory of a large picture for itself; blocks of
# more than 8 MB go back to the system at once, and so does an end of the heap of more than 32 MB.
# Only glibc has such settings, with numbers from its malloc.h. The workers inherit them.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MMAP_THRESHOLD, 8 << 20)
    mallopt(M_TRIM_THRESHOLD, 32 << 20)

# gRPC reads its sockets in the thread that waits for them, not in threads of its own: each time
# one thread wakes another costs 0.1 ms and more on a virtual machine. bench/README.md has numbers.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
# The system's lookup of names: glibc would wait for 10 seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")
logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings show links
