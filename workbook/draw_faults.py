"""Draw the two pictures of lesson 11: where a request can get lost, and how to find out where."""

from xml.sax.saxutils import escape

from workbook.drawing import MARK, QUIET, arrow, box, picture, words

# What to ask, with which command; and what each answer, which is a sign, means.
QUESTIONS = [
    (
        "Does it predict?",
        "ask()",
        [("HPA <unknown>", "yes, but: requests")],
    ),
    (
        "Do pods start?",
        "get pods: STATUS",
        [("ImagePullBackOff", "image tag"), ("CrashLoopBackOff", "memory, if OOMKilled")],
    ),
    (
        "Are they ready?",
        "get pods: READY",
        [
            ("probe gets 404", "readiness route"),
            ("503, unsuitable", "signature name"),
            ("503, unavailable", "NetworkPolicy"),
        ],
    ),
    (
        "Any endpoints?",
        "get endpointslices",
        [("no ENDPOINTS", "selector"), ("no PORTS", "port name")],
    ),
]
ONWARDS = ["no", "Running", "1/1"]  # the answers that lead to the next question
STEP, GAP = 66, 20  # from one answer to the next, and between questions


def tree() -> str:
    """The questions from top to bottom on the left, and on the right what their answers mean."""
    parts: list[str] = []
    top, before = 10, 0
    for number, (question, command, answers) in enumerate(QUESTIONS):
        middle = top + STEP * len(answers) // 2
        if number:
            parts.append(arrow(f"102,{before + 28} 102,{middle - 30}"))
            parts.append(words(112, middle - 42, ONWARDS[number - 1], QUIET, "start"))
        for place, (sign, cause) in enumerate(answers):
            y = top + STEP * place + STEP // 2
            parts.append(arrow(f"195,{middle} 218,{middle} 218,{y} 240,{y}"))
            parts.append(box(346, y, 208, escape(sign), cause, marked=True))
        parts.append(box(102, middle, 186, question, command))
        top, before = top + STEP * len(answers) + GAP, middle
    return picture(top - GAP + 10, parts)


def note(x: int, y: int, *lines: str) -> str:
    """What can be wrong at a place: one line below the other."""
    return "".join(words(x, y + 21 * n, line, MARK, "start") for n, line in enumerate(lines))


def path() -> str:
    """The way of a request from the client to the model, and beside it what can be wrong."""
    parts = [
        box(110, 38, 186, "client", "kubectl proxy"),
        arrow("110,66 110,118"),
        box(110, 148, 186, "Service", "gateway"),
        note(226, 143, "selector", "port name"),
        arrow("110,176 110,258"),
        box(110, 288, 186, "pod", "gateway"),
        note(226, 262, "image tag", "readiness route", "requests, for the HPA", "signature name"),
        arrow("110,316 110,398"),
        note(226, 362, "NetworkPolicy"),
        box(110, 428, 186, "pod", "model-server"),
        note(226, 433, "memory limit"),
    ]
    return picture(468, parts)
