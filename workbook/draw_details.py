"""Draw what lessons 06, 07 and 12 need to see of a cluster from close by."""

from workbook.drawing import INK, MARK, MARKED, QUIET, arrow, box, frame, picture, words


def images() -> str:
    """How an image comes from your Docker into a node of Kind's."""
    parts = [
        box(92, 66, 168, "docker build", "makes ping:001"),
        arrow("92,95 92,135"),
        box(92, 166, 168, "your Docker", "has ping:001"),
        frame(290, 14, 162, 196, "a node of Kind"),
        box(371, 166, 140, "its own store", "has ping:001", marked=True),
        arrow("371,137 371,99"),
        box(371, 70, 140, "pod", "needs ping:001"),
        arrow("177,166 299,166", marked=True),
        words(234, 156, "kind load", MARK),
        words(234, 188, "docker-image", MARK),
    ]
    return picture(224, parts)


def service() -> str:
    """What a Service knows: an address of its own, a port, and a selector."""
    parts = [
        box(230, 36, 250, "a client in the cluster", "asks http://ping, port 80"),
        arrow("230,65 230,99"),
        box(230, 130, 320, "Service ping", "CLUSTER-IP 10.96.…, port 80", marked=True),
        words(242, 184, "selector: name=ping", MARK, "start"),
        arrow("230,159 230,207 84,207 84,233", marked=True),
        arrow("230,207 230,233", marked=True),
        box(84, 264, 128, "pod", "name=ping", marked=True),
        box(230, 264, 128, "pod", "name=ping", marked=True),
        box(376, 264, 128, "pod", "name=gateway"),
        words(157, 318, "targetPort http is containerPort 9696"),
        words(376, 318, "not selected", QUIET),
    ]
    return picture(336, parts)


def headless() -> str:
    """Where the requests of one gRPC connection go behind the two kinds of Service."""
    parts = [
        frame(8, 8, 216, 304, "one address"),
        box(116, 70, 150, "gateway", "one connection"),
        arrow("116,99 116,139", marked=True),
        box(116, 170, 150, "Service", "CLUSTER-IP"),
        arrow("116,199 116,215 66,215 66,233", marked=True),
        box(66, 264, 92, "pod", "all of it", marked=True),
        box(166, 264, 92, "pod", "nothing"),
        frame(236, 8, 216, 304, "headless"),
        box(344, 70, 192, "gateway", "two connections"),
        box(344, 166, 136, "DNS", "both addresses"),
        arrow("344,99 344,135"),
        arrow("261,99 261,233", marked=True),
        arrow("427,99 427,233", marked=True),
        box(294, 264, 92, "pod", "half", marked=True),
        box(394, 264, 92, "pod", "half", marked=True),
    ]
    return picture(322, parts)


def bar(row: int, begin: int, end: int, text: str, marked: bool = False) -> str:
    """A bar of the picture `ending`, from one second to another."""
    fill, stroke = (MARKED, MARK) if marked else ("#f3f4f6", "#9ca3af")
    left, width = 100 + 7 * begin, 7 * (end - begin)
    return (
        f'<rect x="{left}" y="{40 * row + 12}" width="{width}" height="30" rx="5" fill="{fill}" '
        f'stroke="{stroke}"/>' + words(left + width // 2, 40 * row + 32, text)
    )


def ending() -> str:
    """Who serves whom while one model server replaces another."""
    parts = [
        words(92, 32, "new pod", INK, "end"),
        bar(0, 0, 50, "ready, in DNS", marked=True),
        words(92, 72, "connection", INK, "end"),
        bar(1, 0, 33, "to the old pod, 33 s at most"),
        bar(1, 33, 50, "to the new", marked=True),
        words(92, 112, "old pod", INK, "end"),
        bar(2, 0, 35, "preStop: still serves"),
        bar(2, 35, 42, "stops"),
        *(words(100 + 7 * second, 158, f"{second} s", QUIET) for second in (0, 10, 20, 30, 40)),
    ]
    return picture(170, parts)


def homework() -> str:
    """The objects of `kube-config/template`, and what the questions ask of each."""
    parts = [
        box(230, 40, 330, "your image, its tag, its port", "an overlay of yours", marked=True),
        arrow("230,69 230,93", marked=True),
        frame(8, 96, 444, 250, "namespace homework"),
        box(230, 158, 290, "Deployment app", "the container\u2019s port", marked=True),
        arrow("120,189 120,226"),
        box(120, 256, 190, "pods", "the smallest unit"),
        arrow("340,310 340,314 120,314 120,287"),
        box(340, 280, 190, "Service app", "selector, CLUSTER-IP", marked=True),
        words(120, 335, "chosen by their label", QUIET),
        frame(8, 358, 216, 108, "namespace default"),
        box(116, 422, 196, "Service kubernetes", "there before you"),
        frame(236, 358, 216, 108, "kubectl autoscale"),
        box(344, 422, 196, "autoscaler (HPA)", "1 to 3, at 20 %"),
    ]
    return picture(476, parts)
