"""Draw the anatomy of a Kubernetes cluster, with the objects of lesson 06 marked.

    .venv/bin/python -m workbook.draw_cluster

writes ``notebooks/figures/cluster.svg``.
"""

from workbook.draw_system import FIGURES, INK, MARK, MARKED, PAPER, QUIET

WIDTH, HEIGHT = 1020, 436


def box(x: int, y: int, width: int, title: str, line: str = "", marked: bool = False) -> str:
    """A rounded rectangle with its centre at x, y: a title and perhaps a line below."""
    height = 52 if line else 34
    fill, stroke, weight = (MARKED, MARK, 3) if marked else ("#f3f4f6", "#9ca3af", 1.5)
    text = f'<text x="{x}" y="{y + (-3 if line else 5)}" font-weight="600">{title}</text>'
    text += f'<text x="{x}" y="{y + 16}" font-size="13" fill="{QUIET}">{line}</text>'
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
        f'<text x="{x + 12}" y="{y + 20}" font-size="13" text-anchor="start" fill="{color}">'
        f"{title}</text>"
    )


def arrow(points: str, label: str = "", at: tuple[int, int] = (0, 0), marked: bool = False) -> str:
    """A line along points with a head at its end, and a label."""
    kind, color, weight = ("marked", MARK, 3) if marked else ("quiet", QUIET, 1.5)
    return (
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{weight}" '
        f'marker-end="url(#{kind})"/>'
        f'<text x="{at[0]}" y="{at[1]}" font-size="13" fill="{color}">{label}</text>'
    )


def head(kind: str, color: str) -> str:
    """The head of an arrow, the same size for thin lines and thick ones."""
    return (
        f'<marker id="{kind}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="10" '
        f'markerHeight="10" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 0L10 5L0 10Z" fill="{color}"/></marker>'
    )


def cluster() -> str:
    """The whole picture as SVG."""
    parts = [
        frame(196, 12, 812, 104, "control plane: keeps what shall be, and works towards it"),
        box(284, 74, 150, "API server", "the only door"),
        box(470, 74, 130, "etcd", "what shall be"),
        box(670, 74, 170, "controllers", "make and replace pods"),
        box(896, 74, 190, "scheduler", "gives a pod its node"),
        arrow("124,74 206,74", "HTTPS", (160, 66)),
        box(66, 74, 108, "kubectl", "you"),
        frame(504, 150, 240, 274, "node"),
        frame(764, 150, 244, 274, "node"),
        arrow("284,102 284,132 754,132 754,380 728,380"),
        arrow("754,380 780,380"),
        frame(516, 186, 480, 148, "Deployment: three such pods", marked=True),
        box(576, 260, 96, "pod", "container", marked=True),
        box(686, 260, 96, "pod", "container", marked=True),
        box(886, 260, 96, "pod", "container", marked=True),
        box(624, 380, 200, "kubelet", "runs pods, probes them"),
        box(886, 380, 204, "kubelet", "runs pods, probes them"),
        box(374, 186, 184, "autoscaler (HPA)", "more pods, fewer pods"),
        arrow("468,186 490,186 490,206 512,206"),
        box(66, 290, 108, "clients", "browsers"),
        arrow("124,290 152,290"),
        box(232, 290, 152, "HTTPRoute", "by host and path"),
        arrow("310,290 330,290"),
        box(394, 290, 122, "Service", "one name for all", marked=True),
        arrow("457,290 490,290 490,312 886,312 886,291", marked=True),
        arrow("576,312 576,291", marked=True),
        arrow("686,312 686,291", marked=True),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="16" fill="{INK}" '
        f'text-anchor="middle"><defs>{head("marked", MARK)}{head("quiet", QUIET)}</defs>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{PAPER}"/>' + "".join(parts)
    ) + "</svg>\n"


if __name__ == "__main__":
    (FIGURES / "cluster.svg").write_text(cluster())
