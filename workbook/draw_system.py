"""Draw the picture of the system, once plain and once for each lesson with its part marked.

    .venv/bin/python workbook/draw_system.py

writes ``system.svg`` and ``01.svg`` … to ``notebooks/figures/``.
"""

from pathlib import Path

FIGURES = Path(__file__).resolve().parents[1] / "notebooks/figures"
# Centre x, width, title, second line, third line.
BOXES = {
    "browser": (75, 110, "browser", "or curl", ""),
    "gateway": (290, 150, "gateway", "Flask, NumPy", "CPU"),
    "server": (530, 150, "model server", "TF Serving API", "CPU or GPU"),
    "saved_model": (733, 130, "SavedModel", "clothing-model/1", ""),
    "keras": (940, 124, "Keras model", ".keras file", ""),
}
# From, to, label above, label below.
ARROWS = {
    "http": ("browser", "gateway", "HTTP", "9696"),
    "grpc": ("gateway", "server", "gRPC", "8500"),
    "load": ("server", "saved_model", "loads", ""),
    "export": ("keras", "saved_model", "exports", ""),
}
# What is marked in a lesson's picture, and what is drawn around boxes, from the inside to the
# outside: a frame's title, and whom it holds. Frames that share a box lie inside one another.
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
    "09": (
        ["http", "gateway", "grpc", "server", "saved_model"],
        [
            ("pods", ["gateway"]),
            ("pods", ["server", "saved_model"]),
            ("Amazon EKS", ["gateway", "server", "saved_model"]),
        ],
    ),
}
TOP, HEIGHT = 34, 84
INK, QUIET, PAPER, MARK, MARKED = "#1f2937", "#6b7280", "#ffffff", "#c2410c", "#ffedd5"


def box(name: str, marked: bool) -> str:
    """One part of the system: a rounded rectangle with its title and two lines below."""
    x, width, title, *lines = BOXES[name]
    fill, stroke, weight = (MARKED, MARK, 3) if marked else ("#f3f4f6", "#9ca3af", 1.5)
    rows = [line for line in lines if line]
    first = TOP + HEIGHT / 2 + 5 - 9 * len(rows)
    text = f'<text x="{x}" y="{first}" font-weight="600" fill="{INK}">{title}</text>'
    for number, row in enumerate(rows, 1):
        y = first + 19 * number
        text += f'<text x="{x}" y="{y}" font-size="13" fill="{QUIET}">{row}</text>'
    return (
        f'<rect x="{x - width / 2}" y="{TOP}" width="{width}" height="{HEIGHT}" rx="10" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="{weight}"/>{text}'
    )


def arrow(name: str, marked: bool) -> str:
    """A connection between two boxes, its protocol above and its port below."""
    source, target, above, below = ARROWS[name]
    (x1, w1, *_), (x2, w2, *_) = BOXES[source], BOXES[target]
    way = 1 if x2 > x1 else -1
    start, end, y = x1 + way * (w1 / 2 + 3), x2 - way * (w2 / 2 + 4), TOP + HEIGHT / 2
    color, weight = (MARK, 3) if marked else (QUIET, 1.5)
    middle, tip = (start + end) / 2, end - way * 9
    return (
        f'<path d="M{start} {y}H{tip}" stroke="{color}" stroke-width="{weight}"/>'
        f'<path d="M{end} {y}L{tip} {y - 5}V{y + 5}Z" fill="{color}"/>'
        f'<text x="{middle}" y="{y - 10}" font-size="13" fill="{color}">{above}</text>'
        f'<text x="{middle}" y="{y + 22}" font-size="13" fill="{color}">{below}</text>'
    )


def frame(title: str, names: list[str], level: int) -> str:
    """A dashed line around some boxes, its title on top; level 1 is the closest to them."""
    left = min(BOXES[name][0] - BOXES[name][1] / 2 for name in names) - 7 * level
    right = max(BOXES[name][0] + BOXES[name][1] / 2 for name in names) + 7 * level
    top, height = TOP - 26 * level, HEIGHT + (26 + 7) * level
    return (
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{height}" rx="12" '
        f'fill="none" stroke="{MARK}" stroke-width="1.5" stroke-dasharray="6 4"/>'
        f'<text x="{left + 12}" y="{top + 18}" font-size="13" text-anchor="start" '
        f'fill="{MARK}">{title}</text>'
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
    above, below = 26 * max(outermost - 1, 0), 7 * max(outermost - 3, 0)
    height = 152 + above + below
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-above} 1020 {height}" width="1020" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="16" '
        f'text-anchor="middle"><rect y="{-above}" width="1020" height="{height}" rx="8" '
        f'fill="{PAPER}"/>' + "".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    for name, lesson in LESSONS.items():
        (FIGURES / f"{name}.svg").write_text(system(lesson))
