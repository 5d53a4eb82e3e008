"""Draw what happens one after the other: a column of boxes, and beside each what may be said."""

from typing import NamedTuple

from workbook.drawing import MARK, QUIET, arrow, box, frame, picture, words


class Step(NamedTuple):
    """One box of a column.

    Attributes:
        title: what is there, or is done.
        line: a few words below the title.
        notes: up to three lines beside the box.
        marked: whether the box is today's.
    """

    title: str
    line: str = ""
    notes: tuple[str, ...] = ()
    marked: bool = False


STEPS = {
    "01-signatures": [
        Step("a file's bytes", "JPEG or PNG", ("serving_bytes", "begins here"), True),
        Step("decode and resize"),
        Step("pixels", "uint8, 0 … 255", ("serving_uint8", "begins here"), True),
        Step("scale"),
        Step("inputs", "float32, −1 … 1", ("serving_default", "begins here"), True),
        Step("frozen graph", "the weights are inside"),
        Step("probabilities", "one for each class", ("all three", "end here")),
    ],
    "02-version": [
        Step("folder 2 appears", "beside folder 1", ("version 1", "answers")),
        Step("the server notices", "it looks every second"),
        Step("it loads version 2", "and warms it up", ("version 1", "still answers")),
        Step(
            "version 2: AVAILABLE",
            "new requests go there",
            ("version 1 finishes", "its last requests"),
            True,
        ),
        Step("version 1: END", "its memory is free", ("version 2", "answers")),
    ],
    "03-request": [
        Step(
            "PredictRequest", "one message", ("model_spec:", "which model, and", "which signature")
        ),
        Step("inputs", "a tensor for each name"),
        Step("TensorProto", "one array", ("dtype: float32", "shape: 1, 224, 224, 3")),
        Step("tensor_content", "its numbers, as bytes", ("nearly all", "that is sent"), True),
    ],
    "04-functions": [
        Step("fetch", "a link becomes bytes", ("requests",)),
        Step("prepare", "bytes become numbers", ("Pillow and NumPy",)),
        Step("ask", "numbers become scores", ("gRPC,", "as in lesson 03"), True),
        Step("describe", "numbers get their names", ("the classes of", "the description")),
    ],
    "04-program": [
        Step("this notebook", "cells with one tag"),
        Step("nbconvert", "our template", ("takes only", "these cells")),
        Step("a program", "first_gateway.py", (), True),
        Step("gunicorn", "the main process", ("starts workers,", "replaces dead ones")),
        Step("worker", "eight threads", ("eight requests", "at the same time")),
    ],
    "04-redirect": [
        Step("the stranger", "sends a link", ("to a server", "of his own")),
        Step("the gateway", "opens the link", ("a public address:", "looks harmless")),
        Step("the stranger's server", "302: look over there", ("there is", "127.0.0.1")),
        Step("the gateway", "follows", ("from inside", "the network"), True),
        Step("a private host", "answers the gateway", ("which tells", "the stranger")),
    ],
    "04-refusals": [
        Step("POST /predict", "a link, or a file"),
        Step("web.py", "room for one more?", ("503 too many", "at a time")),
        Step("links.py", "fetch", ("400 private address", "502, 504 its host", "fails or is slow")),
        Step("pictures.py", "decode", ("413 too big", "415 no picture")),
        Step("gateway.py", "ask the model", ("503 no model server", "504 it is too slow"), True),
        Step("the answer", "probabilities", ("200",)),
    ],
    "04b-link": [
        Step("a stranger's link", "http or https, port 80 or 443", ("else 400",)),
        Step("look its host up", "once", ("504 after", "5 seconds in all")),
        Step("is the address public?", "whatever the name says", ("else 400",), True),
        Step("connect", "to exactly that address", ("502 if it fails",)),
        Step("a redirect?", "a second link", ("begins at the top",)),
        Step("read", "piece by piece", ("413 after 10 MB,", "unpacked")),
    ],
    "04b-picture": [
        Step(
            "what the file declares",
            "nothing is decoded yet",
            ("413 too large", "415 no picture"),
        ),
        Step("decode", "when there is room", ("for all", "its pixels"), True),
        Step("turn it upright", "as EXIF says"),
        Step("8 bits, RGB, on white", "whatever it was"),
        Step("make it small", "the model's size"),
    ],
    "05-stages": [
        Step("packages", "Pipenv, pip, and .venv", ("gives .venv,", "is thrown away")),
        Step("base", "Python, without manuals", ("gives its files,", "is thrown away")),
        Step("model", "a copy of this folder", ("gives model.json,", "is thrown away")),
        Step("FROM scratch", "nothing at all", ("takes these", "and our code"), True),
    ],
}
WIDTH, COLUMN, STEP, HALF = 434, 230, 92, 28


def steps(column: list[Step]) -> str:
    """Return a column of boxes with arrows from each to the next, as SVG."""
    centre, parts = COLUMN // 2 + 12, []
    for number, step in enumerate(column):
        y = 44 + number * STEP
        parts.append(box(centre, y, COLUMN, step.title, step.line, step.marked))
        if number:
            before = HALF if column[number - 1].line else 18
            begin, end = y - STEP + before, y - (HALF if step.line else 18)
            parts.append(arrow(f"{centre},{begin} {centre},{end - 2}"))
        for line, note in enumerate(step.notes):
            level = y + 5 + 18 * (line - (len(step.notes) - 1) / 2)
            color = MARK if step.marked else QUIET
            parts.append(words(COLUMN + 28, level, note, color, "start"))
    return picture(88 + (len(column) - 1) * STEP, parts, WIDTH)


def localhost() -> str:
    """Two containers that cannot find each other, and the same two on one network, as SVG."""
    parts = [
        frame(10, 40, 200, 130, "container"),
        box(110, 96, 160, "gateway"),
        arrow("110,114 110,140"),
        words(110, 158, "localhost:8500: nobody", MARK),
        frame(224, 40, 200, 130, "container"),
        box(324, 96, 160, "model server"),
        words(324, 146, "localhost:8500: here", QUIET),
        '<text x="12" y="26" text-anchor="start">Each container has a localhost of its own:</text>',
        '<text x="12" y="214" text-anchor="start">On one network, they have names:</text>',
        frame(4, 228, 426, 170, "network", marked=True),
        frame(18, 258, 186, 126, "container"),
        box(111, 314, 152, "gateway"),
        frame(230, 258, 186, 126, "container"),
        box(323, 314, 152, "model server"),
        arrow("187,314 245,314", marked=True),
        words(323, 366, "model-server:8500", MARK),
    ]
    return picture(406, parts, WIDTH)
