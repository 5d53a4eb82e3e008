"""Decode and resize a picture inside a TensorFlow graph, pixel for pixel as Pillow does."""

import tensorflow as tf


def nearest(size: tf.Tensor, target: int) -> tf.Tensor:
    """Return which of `size` pixels Pillow keeps when it resizes by `nearest`, int32 [target].

    Pillow adds up steps in float64. TensorFlow would replace a plain division by a multiplication,
    which rounds differently, so the step comes from `divide_no_nan`.
    """
    step = tf.math.divide_no_nan(tf.cast(size, tf.float64), target)
    return tf.cast(tf.cumsum(tf.concat([[step / 2], tf.fill([target - 1], step)], 0)), tf.int32)


def decode(image_bytes: tf.Tensor, height: int, width: int, resizing: str) -> tf.Tensor:
    """Return the RGB pixels of a JPEG or PNG file, float32 [height, width, 3] of 0 … 255.

    EXIF data is ignored: a photo that a phone has stored sideways stays sideways.

    Args:
        image_bytes: the file, a string tensor without an axis.
        height: of the result.
        width: of the result.
        resizing: one of `description.RESIZINGS`.
    """
    pixels = tf.io.decode_jpeg(image_bytes, channels=3, dct_method="INTEGER_ACCURATE")
    if resizing == "bilinear":
        return tf.round(tf.image.resize(pixels, [height, width], antialias=True))
    pixels = tf.gather(pixels, nearest(tf.shape(pixels)[0], height))
    pixels = tf.gather(pixels, nearest(tf.shape(pixels)[1], width), axis=1)
    return tf.cast(pixels, tf.float32)
