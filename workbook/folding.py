"""Fold batch normalisation into the convolutions before it: the same model with fewer layers.

After training, such a layer multiplies each channel by a constant and adds another one. The
convolution in front of it can do that itself, with other weights:

    γ · (w∗x - μ) / √(σ² + ε) + β   =   (s·w)∗x + (β - s·μ)      with   s = γ / √(σ² + ε)
"""

from collections import Counter

import keras
import numpy as np

FOLDABLE = ("Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense")


def pairs_of(model: keras.Model) -> dict[str, keras.layers.BatchNormalization]:
    """Return, by the names of convolutions, the normalisation that alone reads their output."""
    maker = {id(layer.output): layer for layer in model.layers if is_foldable(layer)}
    readers = Counter(id(t) for layer in model.layers for t in keras.tree.flatten(layer.input))
    norms = [n for n in model.layers if isinstance(n, keras.layers.BatchNormalization)]
    alone = [norm for norm in norms if readers[id(norm.input)] == 1 and id(norm.input) in maker]
    return {maker[id(norm.input)].name: norm for norm in alone}


def is_foldable(layer: keras.Layer) -> bool:
    """Say whether a layer is a convolution, or alike, with nothing between it and its output."""
    return type(layer).__name__ in FOLDABLE and layer.activation is keras.activations.linear


def folded_weights(
    convolution: keras.Layer, norm: keras.layers.BatchNormalization
) -> list[np.ndarray]:
    """Return the weights with which a convolution does what both layers did.

    A depthwise kernel has its channels on the last two axes. A separable convolution has two
    kernels, of which only the last one is scaled.
    """
    to_numpy = keras.ops.convert_to_numpy
    mean, variance = to_numpy(norm.moving_mean), to_numpy(norm.moving_variance)
    scale = (to_numpy(norm.gamma) if norm.scale else 1) / np.sqrt(variance + norm.epsilon)
    shift = to_numpy(norm.beta) if norm.center else 0
    weights = convolution.get_weights()
    bias = weights.pop() if convolution.use_bias else 0
    depthwise = isinstance(convolution, keras.layers.DepthwiseConv2D)
    last = weights.pop()
    last = last * (scale.reshape(last.shape[-2:]) if depthwise else scale)
    return [*weights, last, shift + (bias - mean) * scale]


def fold(model: keras.Model) -> keras.Model:
    """Return the same function as `model`, without the batch normalisation that can be folded.

    Models inside the model, such as a backbone, are folded in the same way.
    """
    functional = keras.Model(model.inputs, model.outputs, name=model.name)
    pairs = pairs_of(functional)
    skipped = {norm.name for norm in pairs.values()}

    def clone(layer):
        bias = {"use_bias": True} if layer.name in pairs else {}
        config = {**layer.get_config(), **bias}
        return fold(layer) if isinstance(layer, keras.Model) else type(layer).from_config(config)

    def call(layer, x, *args, **kwargs):
        return x if layer.name in skipped else layer(x, *args, **kwargs)

    lean = keras.models.clone_model(functional, clone_function=clone, call_function=call)
    for new in (each for each in lean.layers if each.weights and not isinstance(each, keras.Model)):
        old, norm = functional.get_layer(new.name), pairs.get(new.name)
        new.set_weights(folded_weights(old, norm) if norm else old.get_weights())
    return lean
