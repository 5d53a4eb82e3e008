"""What the figures of the lessons are made of: boxes, frames, arrows and words, as SVG.

A phone shows a figure no wider than about 300 pixels, so figures are narrow and their text is
large.
"""

INK, QUIET, PAPER, MARK, MARKED = "#1f2937", "#6b7280", "#ffffff", "#c2410c", "#ffedd5"
WIDTH = 460
SMALL = 15


def words(x: float, y: float, text: str, color: str = INK, anchor: str = "middle") -> str:
    """A line of small text."""
    style = f'font-size="{SMALL}" fill="{color}" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" {style}>{text}</text>'


def box(x: float, y: float, width: int, title: str, line: str = "", marked: bool = False) -> str:
    """A rounded rectangle with its centre at x, y: a title and perhaps a line below."""
    height = 56 if line else 36
    fill, stroke, weight = (MARKED, MARK, 3) if marked else ("#f3f4f6", "#9ca3af", 1.5)
    return (
        f'<rect x="{x - width / 2}" y="{y - height / 2}" width="{width}" height="{height}" '
        f'rx="9" fill="{fill}" stroke="{stroke}" stroke-width="{weight}"/>'
        f'<text x="{x}" y="{y + (-4 if line else 6)}" font-weight="600">{title}</text>'
    ) + (words(x, y + 17, line) if line else "")


def frame(x: float, y: float, width: float, height: float, title: str, marked: bool = False) -> str:
    """A dashed line around other things, with its title inside at the top left."""
    color, weight = (MARK, 2) if marked else (QUIET, 1)
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="none" '
        f'stroke="{color}" stroke-width="{weight}" stroke-dasharray="6 4"/>'
    ) + words(x + 12, y + 21, title, color, "start")


def arrow(points: str, marked: bool = False) -> str:
    """A line along points with a head at its end."""
    kind, color, weight = ("marked", MARK, 3) if marked else ("quiet", QUIET, 1.5)
    return (
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{weight}" '
        f'marker-end="url(#{kind})"/>'
    )


def head(kind: str, color: str) -> str:
    """The head of an arrow, the same size for thin lines and thick ones."""
    return (
        f'<marker id="{kind}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="10" '
        f'markerHeight="10" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 0L10 5L0 10Z" fill="{color}"/></marker>'
    )


def picture(height: float, parts: list[str], width: int = WIDTH, top: float = 0) -> str:
    """Put parts together as SVG, on paper of this size, whose upper edge is at `top`."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {width} {height}" '
        f'width="{width}" height="{height}" font-family="system-ui, sans-serif" font-size="17" '
        f'fill="{INK}" text-anchor="middle">'
        f"<defs>{head('marked', MARK)}{head('quiet', QUIET)}</defs>"
        f'<rect y="{top}" width="{width}" height="{height}" rx="8" fill="{PAPER}"/>'
    ) + "".join([*parts, "</svg>\n"])
