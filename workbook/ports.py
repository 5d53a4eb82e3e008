"""Which ports of this machine are taken; nothing but Python is needed to ask."""

import socket
from contextlib import suppress


def is_busy(port: int) -> bool:
    """Say whether somebody listens at this port of the loopback interface."""
    with suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
        return True
    return False
