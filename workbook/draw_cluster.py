"""Draw the anatomy of a Kubernetes cluster, with the objects of lesson 06 marked.

    .venv/bin/python -m workbook.draw_cluster

writes ``notebooks/figures/cluster.svg``.
"""

from workbook.draw_system import FIGURES, INK, MARK, MARKED, PAPER, QUIET

WIDTH, HEIGHT = 460, 732
SMALL = 15


def box(x: int, y: int, width: int, title: str, line: str = "", marked: bool = False) -> str:
    """A rounded rectangle with its centre at x, y: a title and perhaps a line below."""
    height = 56 if line else 36
    fill, stroke, weight = (MARKED, MARK, 3) if marked else ("#f3f4f6", "#9ca3af", 1.5)
    text = f'<text x="{x}" y="{y + (-4 if line else 6)}" font-weight="600">{title}</text>'
    text += f'<text x="{x}" y="{y + 17}" font-size="{SMALL}" fill="{INK}">{line}</text>'
    return (
        f'<rect x="{x - width / 2}" y="{y - height / 2}" width="{width}" height="{height}" '
        f'rx="9" fill="{fill}" stroke="{stroke}" stroke-width="{weight}"/>{text}'
    )


def frame(x: int, y: int, width: int, height: int, title: str, marked: bool = False) -> str:
    """A rectangle around other things, with its title inside at the top left."""
    color, style = (MARK, f'stroke="{MARK}" stroke-width="2.5"') if marked else (QUIET, "")
    style = style or f'stroke="{QUIET}" stroke-dasharray="5 4"'
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="none" {style}/>'
        f'<text x="{x + 12}" y="{y + 21}" font-size="{SMALL}" text-anchor="start" fill="{color}">'
        f"{title}</text>"
    )


def arrow(points: str, label: str = "", at: tuple[int, int] = (0, 0), marked: bool = False) -> str:
    """A line along points with a head at its end, and a label."""
    kind, color, weight = ("marked", MARK, 3) if marked else ("quiet", QUIET, 1.5)
    return (
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{weight}" '
        f'marker-end="url(#{kind})"/>'
        f'<text x="{at[0]}" y="{at[1]}" font-size="{SMALL}" fill="{color}">{label}</text>'
    )


def head(kind: str, color: str) -> str:
    """The head of an arrow, the same size for thin lines and thick ones."""
    return (
        f'<marker id="{kind}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="10" '
        f'markerHeight="10" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 0L10 5L0 10Z" fill="{color}"/></marker>'
    )


def words(x: int, y: int, text: str, color: str = INK, anchor: str = "middle") -> str:
    """A line of small text."""
    style = f'font-size="{SMALL}" fill="{color}" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" {style}>{text}</text>'


def picture(height: int, parts: list[str], width: int = WIDTH) -> str:
    """Put parts together as SVG, on paper of this size."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="17" fill="{INK}" '
        f'text-anchor="middle"><defs>{head("marked", MARK)}{head("quiet", QUIET)}</defs>'
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>' + "".join(parts)
    ) + "</svg>\n"


def cluster() -> str:
    """The whole picture as SVG, from kubectl at the top to the clients at the bottom."""
    parts = [
        box(110, 36, 160, "kubectl", "you"),
        arrow("110,64 110,118", "HTTPS", (142, 86)),
        frame(8, 94, 444, 182, ""),
        '<text x="440" y="115" font-size="15" text-anchor="end">control plane</text>',
        box(200, 150, 360, "API server", "everybody talks to it"),
        box(78, 238, 124, "etcd", "what you want"),
        box(214, 238, 128, "controllers", "make pods"),
        box(352, 238, 128, "scheduler", "picks a node"),
        frame(8, 318, 276, 228, "node"),
        frame(296, 318, 156, 228, "node"),
        arrow("383,150 436,150 436,298 374,298 374,346"),
        arrow("374,298 146,298 146,346"),
        box(146, 378, 224, "kubelet", "runs pods, probes them"),
        box(374, 378, 132, "kubelet", "the same"),
        frame(20, 416, 420, 104, "Deployment: three such pods", marked=True),
        box(84, 478, 108, "pod", "container", marked=True),
        box(206, 478, 108, "pod", "container", marked=True),
        box(374, 478, 108, "pod", "container", marked=True),
        box(112, 606, 204, "autoscaler (HPA)", "more or fewer pods"),
        arrow("46,577 46,524"),
        box(348, 606, 196, "Service", "one name for all", marked=True),
        arrow("374,577 374,510", marked=True),
        arrow("374,562 206,562 206,510", marked=True),
        arrow("206,562 84,562 84,510", marked=True),
        box(112, 692, 204, "clients", "browsers, for example"),
        arrow("217,692 246,692"),
        box(348, 692, 196, "HTTPRoute", "by host and path"),
        arrow("348,663 348,637"),
    ]
    return picture(HEIGHT, parts)


if __name__ == "__main__":
    (FIGURES / "cluster.svg").write_text(cluster())
