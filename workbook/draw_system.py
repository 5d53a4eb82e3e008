"""Draw the picture of the system, once plain and once for each lesson with its part marked.

    .venv/bin/python -m workbook.draw_system

writes ``system.svg`` and ``01.svg`` … to ``notebooks/figures/``. A phone shows a picture no wider
than about 300 pixels, so the system stands in two columns and its text is large.
"""

from pathlib import Path

FIGURES = Path(__file__).resolve().parents[1] / "notebooks/figures"
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
WIDTH, HEIGHT = 434, 66
ROWS = (14, 168, 288)  # where the boxes of each row begin
TITLE, TEXT = 18, 16
INK, QUIET, PAPER, MARK, MARKED = "#1f2937", "#6b7280", "#ffffff", "#c2410c", "#ffedd5"


def box(name: str, marked: bool) -> str:
    """One part of the system: a rounded rectangle with its title and a line below."""
    x, row, width, title, line = BOXES[name]
    fill, stroke, weight = (MARKED, MARK, 3) if marked else ("#f3f4f6", "#9ca3af", 1.5)
    return (
        f'<rect x="{x - width / 2}" y="{ROWS[row]}" width="{width}" height="{HEIGHT}" rx="10" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="{weight}"/>'
        f'<text x="{x}" y="{ROWS[row] + 28}" font-size="{TITLE}" font-weight="600" fill="{INK}">'
        f'{title}</text><text x="{x}" y="{ROWS[row] + 50}" fill="{INK}">{line}</text>'
    )


def arrow(name: str, marked: bool) -> str:
    """A connection between two boxes: level within a row, falling from one row to the next."""
    source, target, labels = ARROWS[name]
    (x1, row1, w1, *_), (x2, row2, w2, *_) = BOXES[source], BOXES[target]
    color, weight = (MARK, 3) if marked else (QUIET, 1.5)
    if row1 == row2:
        start, end, y = x1 + w1 / 2 + 3, x2 - w2 / 2 - 4, ROWS[row1] + HEIGHT / 2
        line, tip = f"M{start} {y}H{end - 9}", f"M{end} {y}L{end - 9} {y - 5}V{y + 5}Z"
        places = [((start + end) / 2, y - 10, "middle"), ((start + end) / 2, y + 24, "middle")]
    else:
        start, end = ROWS[row1] + HEIGHT + 3, ROWS[row2] - 4
        line, tip = f"M{x1} {start}V{end - 9}", f"M{x1} {end}L{x1 - 5} {end - 9}H{x1 + 5}Z"
        places = [(x1 + 10, (start + end) / 2 + 2, "start")]
    words = [
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}">{label}</text>'
        for label, (x, y, anchor) in zip(labels, places, strict=False)
    ]
    return (
        f'<path d="{line}" stroke="{color}" stroke-width="{weight}"/>'
        f'<path d="{tip}" fill="{color}"/>' + "".join(words)
    )


def frame(title: str, names: list[str], level: int) -> str:
    """A dashed line around some boxes, its title on top; level 1 is the closest to them."""
    left = min(BOXES[name][0] - BOXES[name][2] / 2 for name in names) - 7 * level
    right = max(BOXES[name][0] + BOXES[name][2] / 2 for name in names) + 7 * level
    rows = [ROWS[BOXES[name][1]] for name in names]
    top, bottom = min(rows) - 28 * level, max(rows) + HEIGHT + 7 * level
    return (
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" rx="12" '
        f'fill="none" stroke="{MARK}" stroke-width="1.5" stroke-dasharray="6 4"/>'
        f'<text x="{left + 12}" y="{top + 20}" text-anchor="start" fill="{MARK}">{title}</text>'
    )


def system(lesson: tuple[list[str], list[Frame]]) -> str:
    """The whole picture as SVG, with a lesson's parts in orange, and its frames."""
    marked, frames = lesson
    parts = [arrow(name, name in marked) for name in ARROWS]
    parts += [box(name, name in marked) for name in BOXES]
    levels: dict[str, int] = dict.fromkeys(BOXES, 0)
    for title, names in frames:
        level = 1 + max(levels[name] for name in names)
        levels |= dict.fromkeys(names, level)
        parts.append(frame(title, names, level))
    outermost = max(levels.values())
    top, bottom = -28 * outermost, ROWS[-1] + HEIGHT + 14 + 7 * outermost
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {WIDTH} {bottom - top}" '
        f'width="{WIDTH}" height="{bottom - top}" font-family="system-ui, sans-serif" '
        f'font-size="{TEXT}" text-anchor="middle"><rect y="{top}" width="{WIDTH}" '
        f'height="{bottom - top}" rx="8" fill="{PAPER}"/>' + "".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    for name, lesson in LESSONS.items():
        (FIGURES / f"{name}.svg").write_text(system(lesson))
