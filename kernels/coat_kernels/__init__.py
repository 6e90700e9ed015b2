"""FP8 kernels of COAT (arXiv 2410.19313): tensors in, tensors out. Needs torch, and Triton on a GPU; nothing else."""

from .activation import ACTIVATIONS, activation, activation_backward, activation_transposed, activation_values
from .formats import Fp8Format, Granularity, ScaleFormat
from .norm import norm, norm_backward, norm_transposed, norm_values
from .quantize import dequantize, quantize, quantize_each, transpose
from .rotary import rotary
from .scaled_mm import scaled_mm

__all__ = [
    "ACTIVATIONS",
    "Fp8Format",
    "Granularity",
    "ScaleFormat",
    "activation",
    "activation_backward",
    "activation_transposed",
    "activation_values",
    "dequantize",
    "norm",
    "norm_backward",
    "norm_transposed",
    "norm_values",
    "quantize",
    "quantize_each",
    "rotary",
    "scaled_mm",
    "transpose",
]
