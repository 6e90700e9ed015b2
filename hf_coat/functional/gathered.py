"""A weight that came from other processes as FP8 codes: a byte for each value, and no values at all."""

import torch
from coat_kernels import dequantize
from torch.utils._pytree import tree_map_only

E4M3 = torch.float8_e4m3fn
aten = torch.ops.aten


class GatheredWeight(torch.Tensor):
    """Codes and scales of a weight [N, K] that autograd takes for the weight: its gradient has ``dtype``.

    The functions of :mod:`hf_coat.functional` read the codes. Whoever else reads it reads the values that they stand
    for; nobody can write to it.

    Args:
        bits: E4M3 codes as uint8 [N, K].
        scale: Their scales, float32 [N, 1], powers of two.
        dtype: Of the weight, BF16 or FP32.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, bits: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        return torch.Tensor._make_wrapper_subclass(cls, bits.shape, dtype=dtype, device=bits.device)

    def __init__(self, bits: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        self.bits, self.scale = bits, scale

    def values(self) -> torch.Tensor:
        """The values [N, K] that it stands for, a plain tensor."""
        return dequantize(self.bits.view(E4M3), self.scale, dtype=self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # What makes a parameter of a tensor, in FSDP2 and in nn.Parameter, makes one of this.
        if func is aten.detach.default or (
            func is aten.as_strided.default and [*map(tuple, args[1:3])] == [(*args[0].shape,), args[0].stride()]
        ):
            return cls(args[0].bits, args[0].scale, args[0].dtype)
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                if isinstance(given.get(argument.name), cls):
                    raise RuntimeError(
                        f"{func} writes to a weight that FSDP2 gathered as FP8 codes, which would be lost: write to "
                        "the sharded parameter, or convert the model with CoatConfig(fsdp_all_gather='bf16')"
                    )
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self):
        return f"GatheredWeight({list(self.shape)}, {self.dtype}, device={self.device})"
