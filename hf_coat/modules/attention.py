"""Attention modules of any model that keep q, k and v as FP8 groups, and rotate q and k in one pass."""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config import Keep
from ..functional import coat_rotary, keep_attention
from .converted import Converted

# Names in transformers' modeling files.
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
ROTARY = "apply_rotary_pos_emb"


@dataclass
class AttentionState:
    """What is done in an attention module.

    Args:
        keep: The activation policy: "lean" keeps FP8 groups, else what the attention's kernel keeps stays as it is.
        rotary: Whether its rotary embedding runs as one kernel.
    """

    keep: Keep = Keep.LEAN
    rotary: bool = False


class CoatAttention(Converted):
    """An attention module of the model. Its forward stays its own, but for two names that it reads: the registry of
    attention functions, see :func:`attend`, and the rotary embedding; see :func:`with_names`."""

    coat_state: AttentionState

    def forward(self, *args, **kwargs):
        forward = self.coat_original.forward
        if not torch.compiler.is_compiling():
            forward = with_names(forward, self.coat_state.rotary)
        return forward(self, *args, **kwargs)


class _Registry:
    """transformers' registry of attention functions, whose functions run in :func:`attend`."""

    def __init__(self, registry):
        self.registry = registry

    def get_interface(self, name: str, default: Callable) -> Callable:
        interface = self.registry.get_interface(name, default)
        return interface if interface is default else functools.partial(attend, interface)

    def __getattr__(self, name):
        return getattr(self.registry, name)


def attend(interface: Callable, module: CoatAttention, query, key, value, *args, **kwargs):
    """Run an attention function of transformers' registry (sdpa, flash attention) and keep what it needs in FP8.

    Dropout would be another one the second time; where there is some nothing changes.
    """
    if kwargs.get("dropout"):
        return interface(module, query, key, value, *args, **kwargs)
    rest = []

    def call(*states):
        out, *rest[:] = interface(module, *states, *args, **kwargs)
        return out

    config, state = module.coat, module.coat_state
    out = keep_attention(
        call, query, key, value, fp8=state.keep is Keep.LEAN, group_size=config.group_size,
        scale_format=config.scale_format,
    )  # fmt: skip
    return out, *rest


@functools.cache
def with_names(forward: Callable, rotary: bool) -> Callable:
    """``forward`` with other objects behind two of the global names that it reads.

    The modeling file itself is left in peace: other models are using it.
    """
    names = {REGISTRY: _Registry(forward.__globals__[REGISTRY])}
    if rotary:
        own = forward.__globals__[ROTARY]

        @functools.wraps(own)
        def fused(q, k, cos, sin, *args, **kwargs):
            plain = not args and not kwargs and q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
            if plain and q.dtype == k.dtype and q.stride(-1) == k.stride(-1) == 1:
                return coat_rotary(q, k, cos, sin)
            return own(q, k, cos, sin, *args, **kwargs)

        names[ROTARY] = fused
    copy = types.FunctionType(
        forward.__code__, forward.__globals__ | names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def is_attention(forward: Callable) -> bool:
    """Whether a module's forward gets its attention function from transformers' registry."""
    return inspect.isfunction(forward) and REGISTRY in forward.__code__.co_names


def has_plain_rotary(forward: Callable) -> bool:
    """Whether ``forward`` calls a global rotary function that computes ``x * cos + rotate_half(x) * sin``."""
    if not inspect.isfunction(forward) or ROTARY not in forward.__code__.co_names:
        return False
    own = forward.__globals__.get(ROTARY)
    generator = torch.Generator().manual_seed(0)
    plain = {"generator": generator, "dtype": torch.float32}  # whatever is the default while loading
    q, k = (torch.randn(2, heads, 5, 8, **plain) for heads in (4, 2))
    cos, sin = (torch.randn(2, 5, 8, **plain) for _ in range(2))

    def rotated(x):
        half = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
        return x * cos.unsqueeze(1) + half * sin.unsqueeze(1)

    try:
        results = own(q, k, cos, sin)
        return all(torch.allclose(a, rotated(b), atol=1e-6) for a, b in zip(results, (q, k), strict=True))
    except (TypeError, ValueError, RuntimeError, IndexError):  # another signature, or other shapes
        return False
