"""Draw who is let in and in which order all goes away again, for lesson 09."""

from workbook.drawing import MARK, QUIET, arrow, box, picture, words


def admitted() -> str:
    """How far a stranger comes, somebody without a key, and you."""
    return picture(
        418,
        [
            box(80, 40, 132, "a stranger", "elsewhere"),
            box(230, 40, 132, "a stranger", "at your place"),
            box(380, 40, 132, "you", "with the key"),
            box(230, 172, 432, "load balancer", "admits one address", marked=True),
            box(230, 276, 432, "gateway", "wants the key", marked=True),
            box(230, 380, 432, "model server", "listens to gateways only", marked=True),
            arrow("80,68 80,142"),
            words(90, 110, "no answer", QUIET, "start"),
            arrow("230,68 230,142"),
            arrow("230,200 230,246"),
            words(240, 228, "401", QUIET, "start"),
            arrow("380,68 380,142", marked=True),
            arrow("380,200 380,246", marked=True),
            arrow("380,304 380,350", marked=True),
            words(390, 332, "200", MARK, "start"),
        ],
    )


def teardown() -> str:
    """The wrong order in the left column, and the right one beside it."""
    return picture(
        418,
        [
            words(112, 26, "cluster first: wrong", QUIET),
            box(112, 68, 204, "cluster", "deleted"),
            arrow("112,96 112,142"),
            box(112, 172, 204, "load balancer", "nobody deletes it"),
            arrow("112,200 112,246"),
            box(112, 276, 204, "network", "in use, so it stays"),
            arrow("112,304 112,350"),
            box(112, 380, 204, "your bill", "goes on"),
            words(348, 26, "load balancer first", MARK),
            box(348, 68, 204, "1 load balancer", "by the cluster", marked=True),
            arrow("348,96 348,142", marked=True),
            box(348, 172, 204, "2 nodes, cluster", "and the network", marked=True),
            arrow("348,200 348,246", marked=True),
            box(348, 276, 204, "3 images", "and repositories", marked=True),
            arrow("348,304 348,350", marked=True),
            box(348, 380, 204, "4 what is left?", "a list: nothing", marked=True),
        ],
    )
