"""FP8 kernels of COAT (arXiv 2410.19313): tensors in, tensors out. Needs torch, and Triton on a GPU; nothing else."""

from .formats import Fp8Format, Granularity
from .quantize import dequantize, quantize, transpose
from .scaled_mm import scaled_mm

__all__ = ["Fp8Format", "Granularity", "dequantize", "quantize", "scaled_mm", "transpose"]
