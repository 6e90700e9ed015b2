"""One way to register an op: a schema, a reference for every device, a fake for tracing, a Triton twin for CUDA."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

NAMESPACE = "coat_kernels"


def register(schema: str, reference: Callable, fake: Callable, twin: str) -> Callable:
    """Define ``coat_kernels::<schema>`` and return a callable of its arguments, by position.

    Args:
        schema: The op's name and signature in PyTorch's schema language.
        reference: Plain PyTorch; the kernel of every device without a kernel of its own, and the oracle of the tests.
        fake: Shapes and dtypes only.
        twin: ``"module:function"`` beside this file with the Triton launcher. It is imported at the first CUDA call,
            so that this package imports fast, and imports where Triton is not installed.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema[len(name) :], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_kernel(qualified, None, reference)
    torch.library.register_fake(qualified, fake)

    @functools.cache
    def launcher() -> Callable:
        module, function = twin.split(":")
        try:
            return getattr(importlib.import_module(f".{module}", __package__), function)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ModuleNotFoundError(
                f"{qualified} needs Triton to run on a GPU and it is not installed: pip install triton", name="triton"
            ) from error

    torch.library.register_kernel(qualified, "cuda", lambda *args: launcher()(*args))
    dispatched = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*args):
        # The dispatcher costs as much host time as a launch. It is needed where somebody watches or traces.
        tensor = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_cuda and not _watched():
            return launcher()(*args)
        return dispatched(*args)

    return call


def _watched() -> bool:
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
