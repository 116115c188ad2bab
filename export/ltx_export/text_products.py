"""Keeps the products of the text's keys and values apart, which a builder would merge.

All blocks read the same text, so a builder makes one product of every block's `to_k` and `to_v`,
from a copy of all these weights that lies beside the weights themselves until they are written.
Here each product reads a text of its own: the text times min(max(mask, 1), n), in which the mask of
layers is at most 1, so that it is times 1, which no builder can know.
"""

import re
from typing import Any

import numpy as np

MASK = "skip_layer_mask"

PRODUCT = re.compile(r"\.attn2\.to_[kv]/MatMul$")
"""The end of the name of such a product in our graphs."""

FEWEST = 3
"""Products: of one block alone there is little to copy."""


def keep_apart(trt: Any, network: Any) -> list[Any]:
    """What must live as long as the network; empty if there was nothing to do.

    Of the 2B transformer, whole, for SM89 (TensorRT-RTX 1.7.1, 2026-11) the builder then takes 1.24
    times the weights instead of 1.36, in FP8 1.30 instead of 1.42. It costs some 60 of 710 kernels,
    each as small as the text.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    mask = next((tensor for tensor in inputs if tensor.name == MASK), None)
    if mask is None:
        return []
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    products = [layer for layer in layers if PRODUCT.search(layer.name)]
    if len(products) < FEWEST:
        return []
    makers = {layer.get_output(0).name: layer for layer in layers if layer.num_outputs}
    ones = _Ones(trt, network, mask)
    for index, product in enumerate(products):
        product.set_input(0, _own_text(trt, network, makers, (product, ones.next(index))))
    return ones.constants


def _own_text(trt: Any, network: Any, makers: dict[str, Any], product: tuple[Any, Any]) -> Any:
    """What the product reads, times its own 1: before it is quantized, if it is."""
    layer, one = product
    text = layer.get_input(0)
    chain = _quantization(trt, makers, text)
    if chain:
        text = chain[0].get_input(0)
    if one.dtype != text.dtype:
        one = network.add_cast(one, text.dtype).get_output(0)
    own = network.add_elementwise(text, one, trt.ElementWiseOperation.PROD).get_output(0)
    for step in chain:
        kind = step.get_output(0).dtype
        if step.type == trt.LayerType.CAST:
            again = network.add_cast(own, kind)
        elif step.type == trt.LayerType.QUANTIZE:
            again = network.add_quantize(own, step.get_input(1), kind)
        else:
            again = network.add_dequantize(own, step.get_input(1), kind)
        own = again.get_output(0)
    return own


def _quantization(trt: Any, makers: dict[str, Any], text: Any) -> list[Any]:
    """The layers from activations to codes and back, in order; none if it is not quantized."""
    kinds, chain = trt.LayerType, list[Any]()
    while (maker := makers.get(text.name)) is not None:
        if maker.type not in (kinds.CAST, kinds.DEQUANTIZE, kinds.QUANTIZE):
            break
        chain.insert(0, maker)
        if maker.type == kinds.QUANTIZE:
            return chain
        text = maker.get_input(0)
    return []


class _Ones:
    """Tensors [batch, 1, 1] of 1, each computed otherwise."""

    def __init__(self, trt: Any, network: Any, mask: Any) -> None:
        self._trt, self._network, self._dtype = trt, network, mask.dtype
        self.constants: list[Any] = []
        first = np.zeros((), np.int32)
        self.constants.append(first)
        index = network.add_constant((), trt.Weights(first)).get_output(0)
        row = network.add_gather(mask, index, 0)
        most = trt.ElementWiseOperation.MAX
        self._one = network.add_elementwise(row.get_output(0), self._constant(1), most)

    def next(self, index: int) -> Any:
        bound, least = self._constant(index + 2), self._trt.ElementWiseOperation.MIN
        one = self._network.add_elementwise(self._one.get_output(0), bound, least)
        shaped = self._network.add_shuffle(one.get_output(0))
        shaped.reshape_dims = (-1, 1, 1)
        return shaped.get_output(0)

    def _constant(self, value: int) -> Any:
        bits = _bits(str(self._dtype).rpartition(".")[2], value)
        self.constants.append(bits)
        weights = self._trt.Weights(self._dtype, bits.ctypes.data, 1)
        return self._network.add_constant((1,), weights).get_output(0)


def _bits(kind: str, value: int) -> Any:
    """Whole numbers up to 256, which each of these types has."""
    single = np.array([value], np.float32)
    if kind == "BF16":
        return (single.view(np.uint32) >> 16).astype(np.uint16)
    return single.astype({"HALF": np.float16, "FLOAT": np.float32}[kind])
