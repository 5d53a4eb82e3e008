"""Draw the picture of the system, once plain and once for each lesson with its part marked."""

from workbook.drawing import MARK, QUIET, arrow, box, frame, picture, words

# Centre x, row from the top, width, title, second line.
BOXES = {
    "browser": (75, 0, 134, "browser", "or curl"),
    "gateway": (322, 0, 180, "gateway", "Flask, on CPU"),
    "server": (322, 1, 180, "model server", "on CPU or GPU"),
    "saved_model": (322, 2, 180, "SavedModel", "version 1"),
    "keras": (75, 2, 134, "Keras model", ".keras file"),
}
# From, to, what is said there: on a level arrow above and below it, beside a falling one.
ARROWS = {
    "http": ("browser", "gateway", ["HTTP", "9696"]),
    "grpc": ("gateway", "server", ["gRPC 8500"]),
    "load": ("server", "saved_model", ["loads"]),
    "export": ("keras", "saved_model", ["exports"]),
}
# What is marked in a lesson's picture, and the frames around its boxes, inner ones first: a title
# and the boxes inside. A frame that shares a box with an earlier one goes around it.
Frame = tuple[str, list[str]]
LESSONS: dict[str, tuple[list[str], list[Frame]]] = {
    "system": ([], []),
    "01": (["keras", "export", "saved_model"], []),
    "02": (["server", "load"], []),
    "03": (["grpc"], []),
    "04": (["gateway", "http"], []),
    "05": (
        ["gateway", "grpc", "server", "saved_model"],
        [
            ("container", ["gateway"]),
            ("container", ["server", "saved_model"]),
            ("one network", ["gateway", "server", "saved_model"]),
        ],
    ),
    "07": (
        ["gateway", "grpc", "server", "saved_model"],
        [
            ("pod", ["gateway"]),
            ("pod", ["server", "saved_model"]),
            ("namespace clothes", ["gateway", "server", "saved_model"]),
        ],
    ),
    "08": (
        ["gateway", "grpc", "server"],
        [("1 … k", ["gateway"]), ("1 … m", ["server"])],
    ),
    "10": (["keras", "export", "saved_model"], []),
    "11": (
        ["gateway", "grpc", "server"],
        [
            ("pod", ["gateway"]),
            ("pod", ["server", "saved_model"]),
            ("namespace faults", ["gateway", "server", "saved_model"]),
        ],
    ),
    "09": (
        ["http", "gateway", "grpc", "server", "saved_model"],
        [
            ("pods", ["gateway"]),
            ("pods", ["server", "saved_model"]),
            ("Amazon EKS", ["gateway", "server", "saved_model"]),
        ],
    ),
}
WIDTH, HALF = 434, 28
ROWS = (47, 201, 321)  # the middle of the boxes of each row


def connection(name: str, marked: bool) -> str:
    """An arrow between two boxes: level within a row, falling from one row to the next."""
    source, target, labels = ARROWS[name]
    (x1, row1, w1, *_), (x2, row2, w2, *_) = BOXES[source], BOXES[target]
    if row1 == row2:
        start, end, y = x1 + w1 / 2 + 3, x2 - w2 / 2 - 4, ROWS[row1]
        points, x, anchor = f"{start},{y} {end},{y}", (start + end) / 2, "middle"
        levels = [y - 10.0, y + 24.0]
    else:
        start, end = ROWS[row1] + HALF + 3, ROWS[row2] - HALF - 4
        points, x, anchor = f"{x1},{start} {x1},{end}", x1 + 10, "start"
        levels = [(start + end) / 2 + 2]
    color = MARK if marked else QUIET
    said = [words(x, y, label, color, anchor) for y, label in zip(levels, labels, strict=False)]
    return arrow(points, marked) + "".join(said)


def around(title: str, names: list[str], level: int) -> str:
    """A frame around some boxes, its title on top; level 1 is the closest to them."""
    left = min(BOXES[name][0] - BOXES[name][2] / 2 for name in names) - 7 * level
    right = max(BOXES[name][0] + BOXES[name][2] / 2 for name in names) + 7 * level
    rows = [ROWS[BOXES[name][1]] for name in names]
    top, bottom = min(rows) - HALF - 28 * level, max(rows) + HALF + 7 * level
    return frame(left, top, right - left, bottom - top, title, marked=True)


def system(marked: list[str], frames: list[Frame]) -> str:
    """The whole picture as SVG, with a lesson's parts in orange, and its frames."""
    parts = [connection(name, name in marked) for name in ARROWS]
    for name, (x, row, width, title, line) in BOXES.items():
        parts.append(box(x, ROWS[row], width, title, line, name in marked))
    levels: dict[str, int] = dict.fromkeys(BOXES, 0)
    for title, names in frames:
        level = 1 + max(levels[name] for name in names)
        levels |= dict.fromkeys(names, level)
        parts.append(around(title, names, level))
    outermost = max(levels.values())
    return picture(368 + 35 * outermost, parts, WIDTH, -28 * outermost)
