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

REGISTRY = "ALL_ATTENTION_FUNCTIONS"  # a name in transformers' modeling files


@dataclass
class AttentionState:
    """What is done in an attention module.

    Args:
        keep: The activation policy: "lean" keeps FP8 groups, else what the attention's kernel keeps stays as it is.
        rotary: Name of the function, of :data:`ROTARY`, that runs as one kernel; None where none does.
        eager: Whether it computes its scores itself, so that nothing of it is kept in FP8.
    """

    keep: Keep = Keep.LEAN
    rotary: str | None = None
    eager: bool = False


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

    def __getitem__(self, name: str) -> Callable:  # as modeling files asked up to transformers 4.57
        return functools.partial(attend, self.registry[name])

    def __contains__(self, name: str) -> bool:
        return name in self.registry

    def __getattr__(self, name):
        return getattr(self.registry, name)


def attend(interface: Callable, module: CoatAttention, query, key, value, *args, **kwargs):
    """Run an attention function of transformers' registry (sdpa, flash attention) and keep what it needs in FP8.

    Dropout would be another one the second time; where there is some nothing changes. A mask that trains, a bias of
    positions say, and an attention that returns its weights too need the graph of the first time.
    """
    config, state = module.coat, module.coat_state
    lean = state.keep is Keep.LEAN
    if kwargs.get("dropout") or lean and any(_trains(t) for t in (*args, *kwargs.values())):
        return interface(module, query, key, value, *args, **kwargs)
    rest = []

    def call(*states):
        out, *rest[:] = interface(module, *states, *args, **kwargs)
        return out

    out = keep_attention(
        call, query, key, value, fp8=lean, group_size=config.group_size, scale_format=config.scale_format
    )
    if lean and out.requires_grad and any(isinstance(t, torch.Tensor) for t in rest):
        return interface(module, query, key, value, *args, **kwargs)
    return out, *rest


def _trains(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


Rotated = tuple[torch.Tensor, torch.Tensor]


def rotate_heads(q, k, cos, sin) -> Rotated | None:
    """Rotate [B, N, S, D] by angles [B or 1, S, D]; None where they are of other shapes or layouts."""
    plain = q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
    if plain and q.dtype == k.dtype and q.stride(-1) == k.stride(-1) == 1:
        return coat_rotary(q, k, cos, sin)
    return None


def rotate_patches(q, k, cos, sin) -> Rotated | None:
    """The same of [S, N, D] or [B, S, N, D] by angles [S, D], as vision towers have them."""
    if q.dim() not in (3, 4) or cos.dim() != 2:
        return None
    heads = [(x if x.dim() == 4 else x[None]).transpose(1, 2) for x in (q, k)]
    rotated = rotate_heads(*heads, cos[None], sin[None])
    if rotated is None:
        return None
    return rotated[0].transpose(1, 2).view(q.shape), rotated[1].transpose(1, 2).view(k.shape)


# Name of a rotary function in transformers' modeling files -> how it is computed in one pass.
ROTARY = {"apply_rotary_pos_emb": rotate_heads, "apply_rotary_pos_emb_vision": rotate_patches}


@functools.cache
def with_names(forward: Callable, rotary: str | None) -> Callable:
    """``forward`` with other objects behind two of the global names that it reads.

    The modeling file itself is left in peace: other models are using it.
    """
    names = {REGISTRY: _Registry(forward.__globals__[REGISTRY])}
    if rotary is not None:
        own = forward.__globals__[rotary]

        @functools.wraps(own)
        def fused(q, k, cos, sin, *args, **kwargs):
            rotated = None if args or kwargs else ROTARY[rotary](q, k, cos, sin)
            return own(q, k, cos, sin, *args, **kwargs) if rotated is None else rotated

        names[rotary] = fused
    copy = types.FunctionType(
        forward.__code__, forward.__globals__ | names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def is_attention(forward: Callable) -> bool:
    """Whether a module's forward gets its attention function from transformers' registry."""
    return inspect.isfunction(forward) and REGISTRY in forward.__code__.co_names


def plain_rotary(forward: Callable) -> str | None:
    """Name of the global rotary function that ``forward`` calls, where it computes ``x * cos + rotate_half(x) * sin``.

    That of a vision tower is given BF16 heads and float32 angles, and has to round once.
    """
    names = forward.__code__.co_names if inspect.isfunction(forward) else ()
    return next((name for name in ROTARY if name in names and _rotates(forward.__globals__.get(name), name)), None)


def _rotates(own: Callable, name: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    plain = {"generator": generator, "dtype": torch.float32}  # whatever is the default while loading
    q, k = (torch.randn(2, heads, 5, 8, **plain) for heads in (4, 2))
    cos, sin = (torch.randn(2, 5, 8, **plain) for _ in range(2))
    if ROTARY[name] is rotate_patches:
        q, k = (x[0].transpose(0, 1).bfloat16() for x in (q, k))
        cos, sin = cos[0], sin[0]
    heads = -3 if cos.dim() == 3 else -2

    def rotated(x):
        x_f = x.float()
        half = torch.cat((-x_f[..., 4:], x_f[..., :4]), dim=-1)
        return (x_f * cos.unsqueeze(heads) + half * sin.unsqueeze(heads)).to(x.dtype)

    step = 1e-6 if q.dtype == torch.float32 else 2**-7  # of a float32 and of a BF16 number
    try:
        pairs = list(zip(own(q, k, cos, sin), map(rotated, (q, k)), strict=True))
        return all(y.shape == x.shape and torch.allclose(y, x, rtol=step, atol=1e-6) for y, x in pairs)
    except (TypeError, ValueError, RuntimeError, IndexError):  # another signature, or other shapes and dtypes
        return False
