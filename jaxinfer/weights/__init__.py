"""The kinds of weights, and the products that take any of them."""

from jaxinfer.weights.adapted import Adapted, LowRank
from jaxinfer.weights.dense import Dense
from jaxinfer.weights.products import dot_parts, scattered_dot
from jaxinfer.weights.quantized import QArray
from jaxinfer.weights.weight import Axes, Weight, dot, dots, grouped_dots, take

__all__ = [
    "Adapted",
    "Axes",
    "Dense",
    "LowRank",
    "QArray",
    "Weight",
    "dot",
    "dot_parts",
    "dots",
    "grouped_dots",
    "scattered_dot",
    "take",
]
