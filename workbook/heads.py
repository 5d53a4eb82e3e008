"""What the last layer of a classifier gives, and what makes probabilities of it."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np


def to_probabilities(answers: np.ndarray) -> tuple[str, Callable[[Any], Any]]:
    """Tell from a model's answers what it gives, and how that becomes probabilities.

    Args:
        answers: what the model says to some noise, [number, classes], or [number, 1] where a model
            of two classes gives one number, for the second class.

    Returns:
        What it gives, in words, and a function that makes [number, classes] of such outputs, which
        may be arrays or tensors; its rows sum to 1.

    Raises:
        ValueError: The numbers are between 0 and 1, and do not sum to 1.
    """
    gives_logits = bool((answers < 0).any() or (answers > 1).any())
    if answers.shape[1:] == (1,):
        return "one number for two classes", lambda outputs: both(outputs, gives_logits)
    if gives_logits:
        return "logits", keras.ops.softmax
    if not np.allclose(answers.sum(axis=1), 1, atol=1e-3):
        raise ValueError(
            "This model gives each class a number of its own, which do not sum to one: it may find"
            " several in a picture. This workbook's gateway says one."
        )
    return "probabilities", lambda outputs: outputs


def both(second: Any, is_logit: bool) -> Any:
    """Return the probabilities of both classes, [number, 2], from the second one's number."""
    second = keras.ops.sigmoid(second) if is_logit else second
    return keras.ops.concatenate([1 - second, second], axis=1)
