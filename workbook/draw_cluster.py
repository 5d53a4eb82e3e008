"""Draw the anatomy of a Kubernetes cluster, with the objects of lesson 06 marked."""

from workbook.drawing import INK, QUIET, arrow, box, frame, picture, words


def cluster() -> str:
    """The whole picture as SVG, from kubectl at the top to the clients at the bottom."""
    parts = [
        box(110, 36, 160, "kubectl", "you"),
        arrow("110,64 110,118"),
        words(142, 86, "HTTPS", QUIET),
        frame(8, 94, 444, 182, ""),
        words(440, 115, "control plane", INK, "end"),
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
    return picture(732, parts)
