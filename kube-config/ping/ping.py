"""The smallest web service: it says that it is there."""

from flask import Flask

app = Flask(__name__)


@app.get("/ping")
def ping() -> str:
    """Answer whoever asks."""
    return "PONG\n"
