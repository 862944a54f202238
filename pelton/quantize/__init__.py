"""From dense weights to quantized ones: which type a weight gets, and the values that it then has."""

from .recipes import QUANTIZATIONS, fitting, weight_type
from .round_to_nearest import quantize

__all__ = ["QUANTIZATIONS", "fitting", "quantize", "weight_type"]
