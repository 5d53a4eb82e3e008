"""The host of the pictures: serves a folder on a loopback port, in a process of its own.

python bench/peers/pictures.py FOLDER PORT HTTP/1.0
"""

import functools
import http.server
import sys
import time
from urllib.parse import urlsplit


class Server(http.server.ThreadingHTTPServer):
    """Keeps many clients waiting for a thread where Python's own refuses the sixth."""

    request_queue_size = 128


class Handler(http.server.SimpleHTTPRequestHandler):
    """Can be as slow as a host that is far away."""

    # Or the body of a small picture would wait for the other side to confirm the headers, 40 ms
    # where connections are kept; hosts on the Internet have it set.
    disable_nagle_algorithm = True

    def do_GET(self):
        """Answer after as many milliseconds as the query says: /photo.jpg?50."""
        time.sleep(int(urlsplit(self.path).query or 0) / 1000)
        super().do_GET()

    def log_message(self, *_):
        """Say nothing: to write it takes time that the servers under measurement lack."""


folder, port, protocol = sys.argv[1:]
Handler.protocol_version = protocol  # HTTP/1.1 keeps connections, as hosts on the Internet do
handler = functools.partial(Handler, directory=folder)
Server(("127.0.0.1", int(port)), handler).serve_forever()
