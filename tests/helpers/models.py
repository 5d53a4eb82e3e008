"""Small models for the gateway to ask, which LiteRT serves: no model server loads TensorFlow."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from helpers.basics import CLASSES


def save_lite(path: Path, signatures: dict[str, Any], variables: Any = None) -> Path:
    """Write a version that holds nothing but ``model.tflite``, whole or not at all.

    ``signatures`` are functions of TensorFlow, and ``variables`` is the module that holds theirs.
    """
    import tensorflow as tf

    with TemporaryDirectory() as folder:
        module = variables or tf.Module()
        tf.saved_model.save(module, folder, signatures=signatures)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, [*signatures])
        content = converter.convert()
    partial = path.with_name(f"partial-{path.name}")
    partial.mkdir(parents=True)
    (partial / "model.tflite").write_bytes(content)
    return partial.rename(path)


def save_classifier(
    path: Path, size: int = 32, dtype: str = "float32", seed: tuple[int, int] = (1, 2)
) -> Path:
    """Save a classifier with random weights, whose pictures have this size and type."""
    import tensorflow as tf

    module = tf.Module()
    shape = [size * size * 3, len(CLASSES)]
    module.weights = tf.Variable(tf.random.stateless_normal(shape, seed=seed) / size)
    scale = 1.0 if dtype == "float32" else 1 / 255

    @tf.function(input_signature=[tf.TensorSpec([None, size, size, 3], dtype, name="inputs")])
    def serve(inputs):
        flat = tf.reshape(scale * tf.cast(inputs, tf.float32), [-1, shape[0]])
        return {"probabilities": tf.nn.softmax(flat @ module.weights)}

    return save_lite(path, {"serving_default": serve}, module)
