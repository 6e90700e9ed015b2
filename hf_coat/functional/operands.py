"""FP8 operands of matrix products: a linear's quantized input, what it is made from again, and quantized weights.

A linear needs its input twice: as codes in the forward, and as transposed codes in the backward, for the weight
gradient. What is kept in between need not be those codes. The layer that made the input (a norm, an activation, an
attention) keeps tensors of its own for its own backward; where the input follows from them by element-wise
arithmetic, its layer says so by a :class:`Source`, and the linear keeps nothing.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from coat_kernels import Granularity, dequantize, quantize, scaled_mm, transpose
from torch.optim.optimizer import register_optimizer_step_post_hook

from .amax import ask_amax
from .gathered import GatheredWeight

E4M3 = torch.float8_e4m3fn
MOST_TOKENS = 512  # that are looked at where rounding is measured


class Watcher:
    """Who is shown what a forward rounds to FP8, if anybody is; see :mod:`hf_coat.live`.

    ``see(kind, x, codes, scale, group_size)`` gets values [..., K] and what stands for them: codes [T, K] with scales
    per group, token or tensor. It changes no number.
    """

    see: Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor, int], None] | None = None


def sampled(rows: torch.Tensor) -> torch.Tensor:
    """At most :data:`MOST_TOKENS` of these rows, at equal distances."""
    return rows[:: -(-len(rows) // MOST_TOKENS) or 1]


class Demand:
    """Whether anybody wants a layer's output as codes; the layer then makes them while it has the values at hand.

    It changes no number: codes are the same whoever makes them.
    """

    codes = False


@dataclass(eq=False)
class Source:
    """From what a tensor [T, K] can be made again, noted on that tensor by the layer that made it.

    Args:
        rebuild: ``rebuild(scale, *tensors)`` gives codes [K, round_up(T, 16)] at one scale, float32 [1, 1].
        values: ``values(dtype, *tensors)`` gives values [T, K], not always fresh ones.
        tensors: What it needs; the layer keeps them for its own backward anyway.
        codes: Codes [T, K] with a power-of-two scale per token, if they are made already.
        scale: Their scales, float32 [T, 1].
        demand: Where to leave word that codes are wanted.
    """

    rebuild: Callable[..., torch.Tensor]
    values: Callable[..., torch.Tensor]
    tensors: tuple[torch.Tensor | None, ...]
    codes: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    demand: Demand | None = None

    def note_on(self, x: torch.Tensor, width: int | None = None) -> None:
        """Leave this with ``x``, for as long as it lives unchanged; views of all of its rows have it too.

        Args:
            x: What the layer made.
            width: Length of a row, as ``rebuild`` gives it; by default that of ``x``.
        """
        base = x if x._base is None else x._base
        width = x.shape[-1] if width is None else width
        base._coat_source = (base._version, x.storage_offset(), x.numel(), width, self)


def source_of(x: torch.Tensor) -> Source | None:
    """What :meth:`Source.note_on` left for exactly the values of ``x``."""
    base = x if x._base is None else x._base
    *noted, source = getattr(base, "_coat_source", (None,))
    same = source is not None and noted == [base._version, x.storage_offset(), x.numel(), x.shape[-1]]
    return source if same and x.is_contiguous() else None


@dataclass(eq=False)
class QuantizedInput:
    """FP8 twin of a linear's input: codes [T, K] and float32 scales [T, 1] or [1, 1]; and what its backward needs:
    transposed codes [K, round_up(T, 16)], a source of them, or (neither) the codes themselves."""

    codes: torch.Tensor
    scale: torch.Tensor
    transposed: torch.Tensor | None = None
    source: Source | None = None

    @property
    def kept(self) -> tuple[torch.Tensor | None, ...]:
        """What the backward of a linear keeps, beside the scale; nothing here means the codes."""
        if self.source is not None:
            return self.source.tensors
        return () if self.transposed is None else (self.transposed,)


def quantize_input(x: torch.Tensor, granularity: Granularity, power_of_two: bool, keep: bool) -> QuantizedInput:
    """Quantize a linear's input ``x`` [..., K]; linears that read the same tensor share one result.

    The result stays with the tensor object for as long as that lives unchanged: q, k and v (or gate and up) then keep
    one FP8 copy between them, as they keep one BF16 copy without COAT.
    """
    # A compiler merges equal calls by itself. Under a frozen weight somebody else may keep x, and our codes with it,
    # in vain.
    shareable = not (torch.compiler.is_compiling() or x.is_inference()) and (keep or not torch.is_grad_enabled())
    key = (granularity, power_of_two, x._version, keep) if shareable else None
    if shareable and getattr(x, "_coat_quantized", (None,))[0] == key:
        return x._coat_quantized[1]
    source = None if torch.compiler.is_compiling() or x.is_inference() else source_of(x)
    with torch.no_grad():
        if source is not None and granularity == Granularity.TOKEN and source.codes is not None:
            quantized = QuantizedInput(source.codes, source.scale)
        else:
            if source is not None and source.demand is not None and granularity == Granularity.TOKEN:
                source.demand.codes = True
            transposed = keep and granularity == Granularity.TENSOR and source is None
            x_q, x_qt, x_s = quantize(x, E4M3, granularity, power_of_two=power_of_two, transposed=transposed)
            quantized = QuantizedInput(x_q, x_s, x_qt)
    quantized.source = source if keep else None
    if Watcher.see is not None:
        Watcher.see("linear", x, quantized.codes, quantized.scale, 0)
    if shareable:
        x._coat_quantized = (key, quantized)
    return quantized


class WeightCache:
    """The codes of a linear's weights, kept over the microbatches of an optimizer step: a byte per value.

    They are kept from the moment on that gradients accumulate, and serve the forward and, transposed, the backward.
    They are dropped when any torch optimizer steps, and not used for weights whose version counter or address is not
    what it was. An edit through ``.data`` moves neither; before any optimizer has stepped nothing is kept, so loops
    that update their weights in that way by hand never meet old codes.
    """

    _all: "weakref.WeakSet[WeightCache]" = weakref.WeakSet()
    _stepped = False

    def __init__(self):
        self.clear()
        self._all.add(self)

    def clear(self) -> None:
        self._key = self._codes = None

    @classmethod
    def clear_all(cls, *_) -> None:
        """Forget all codes; runs after each step of any torch optimizer."""
        cls._stepped = True
        for cache in cls._all:
            cache.clear()

    def find(self, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Codes and scales of ``weights`` as they are now, if they are kept."""
        return self._codes if self._codes is not None and self._key == self._state(weights) else None

    def keep(self, weights: Sequence[torch.Tensor], codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.clear()
        if self._stepped and all(w.grad is not None for w in weights):
            self._key, self._codes = self._state(weights), (codes, scale)

    @staticmethod
    def _state(weights: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
        return [(w.data_ptr(), w._version) for w in weights]

    def __deepcopy__(self, memo):
        return WeightCache()

    def __reduce__(self):
        return WeightCache, ()


register_optimizer_step_post_hook(WeightCache.clear_all)


@dataclass(eq=False, frozen=True)
class StoredWeight:
    """A frozen weight that exists as FP8 only: a byte for each value.

    Args:
        bits: E4M3 codes as uint8 [N, K].
        scale: Their scales, float32 [N, 1] or [1, 1], powers of two where there is one for each row.
    """

    bits: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, granularity: Granularity, power_of_two: bool) -> "StoredWeight":
        """Round a weight [N, K] to FP8."""
        codes, _, scale = quantize(weight.detach(), E4M3, granularity, power_of_two=power_of_two)
        return cls(codes.view(torch.uint8), scale)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The values [N, K] that it stands for."""
        return dequantize(self.bits.view(E4M3), self.scale, dtype=dtype)


Weight = torch.Tensor | StoredWeight


def bits_and_scales(
    weights: Sequence[Weight],
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]:
    """The tensors of weights, and the scales where they are stored as FP8 (all of them or none), else None."""
    if not any(isinstance(w, StoredWeight) for w in weights):
        return tuple(weights), None
    return tuple(w.bits for w in weights), tuple(w.scale for w in weights)


LARGE = 2**25  # values of a product, 8192 x 4096, that is multiplied as fast alone as beside others


def forward_products(
    x_q: torch.Tensor,
    x_s: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    granularity: Granularity,
    power_of_two: bool,
    cache: WeightCache | None,
    scales: Sequence[torch.Tensor] | None,
    out_dtype: torch.dtype,
) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
    """Multiply codes [T, K] by weights [N_i, K]: the products [T, N_i], and the scales [sum N_i, 1] or [1, 1] of the
    weights' codes.

    Weights are quantized one below the other and multiplied as one, unless each product fills the GPU by itself: then
    they gain nothing, and a v that lies in one memory with q and k has to be copied out of it to be kept. Codes that
    are there already, of stored weights, which have ``scales``, and of gathered ones, are multiplied each by itself:
    to bring them together takes longer.
    """
    if isinstance(weights[0], GatheredWeight):
        weights, scales = [w.bits for w in weights], [w.scale for w in weights]
    if x_q.shape[1] != weights[0].shape[1]:
        raise RuntimeError(f"a linear of {weights[0].shape[1]} input features was given {x_q.shape[1]}")
    options = {"out_dtype": out_dtype, "fast_accum": True}

    def products(codes, scales):
        operands = zip(codes, scales, biases, strict=True)
        return [scaled_mm(x_q, part, x_s, scale, bias, **options) for part, scale, bias in operands]

    if scales is not None:
        ys = products([bits.view(E4M3) for bits in weights], scales)
        return ys, scales[0] if len(scales) == 1 else torch.cat(tuple(scales))
    codes, scale = _quantize_weights(weights, granularity, power_of_two, cache)
    if len(weights) == 1:
        return products([codes], [scale]), scale
    rows = [len(w) for w in weights]
    if x_q.shape[0] * min(rows) >= LARGE and not any(n % 4 for n in rows):  # scales at multiples of 16 bytes
        return products(codes.split(rows), scale.split(rows)), scale
    bias = None if biases[0] is None else torch.cat(tuple(biases))
    y = scaled_mm(x_q, codes, x_s, scale, bias, **options)
    return torch.unsafe_split_with_sizes(y, rows, dim=1), scale


def _quantize_weights(weights, granularity, power_of_two, cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and scales [N, 1] or [1, 1] of weights [N_i, K], one below the other."""
    found = None if cache is None else cache.find(weights)
    if found is None:
        amax = None
        if granularity == Granularity.TENSOR and cache is not None and len(weights) == 1 and weights[0].requires_grad:
            amax = ask_amax(weights[0])  # not without gradients: averages are swapped in and out through .data there
        codes, _, scale = quantize(_one_or_all(weights), E4M3, granularity, power_of_two=power_of_two, amax=amax)
        found = codes, scale
        if cache is not None:
            cache.keep(weights, codes, scale)
    return found


def transposed_weights(
    weights: Sequence[torch.Tensor], scale: torch.Tensor, cache: WeightCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transposed codes [K, round_up(N, 16)] and their one scale [1, 1]; ``scale`` is what :func:`forward_products`
    gave. The input gradient adds up over N, which therefore has one scale: the largest."""
    if isinstance(weights[0], GatheredWeight):
        weights, cache = [w.bits for w in weights], None
    found = None if cache is None else cache.find(weights)
    codes = None if found is None else found[0]
    if weights[0].dtype == torch.uint8:
        codes = [bits.view(E4M3) for bits in weights]
    if codes is not None:
        codes, top = transpose(codes, scale if scale.shape[0] > 1 else None)
        return codes, scale if top is None else top
    top = scale if scale.shape[0] == 1 else scale.amax(dim=(0, 1), keepdim=True)
    _, codes, _ = quantize(_one_or_all(weights), E4M3, Granularity.TENSOR, scale=top, codes=False, transposed=True)
    return codes, top


FAST_DEPTH = 12288  # see input_gradient


def input_gradient(
    dy_q: torch.Tensor,
    dy_s: torch.Tensor,
    weights: Sequence[torch.Tensor],
    w_s: torch.Tensor,
    cache: WeightCache | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``dx [T, K] = dy [T, N] @ w [N, K]`` in FP8, of codes ``dy_q`` and their scales; ``w_s`` is what
    :func:`forward_products` gave.

    Up to :data:`FAST_DEPTH` products are summed in the tensor core's accumulator, as in the forward. On an H200 sums
    of 4096 random products were off by 0.0013 there, of 12288 by 0.0026, of 14336 by 0.0029, with which a result in
    BF16 (0.0017) has twice the error of an exact sum's. The codes themselves are off by 0.037. With one scale for all
    of ``dy`` exact sums cost no time.
    """
    w_qt, top = transposed_weights(weights, w_s, cache)
    fast = dy_s.shape[0] > 1 and dy_q.shape[1] <= FAST_DEPTH
    return scaled_mm(dy_q, w_qt, dy_s, top, out_dtype=out_dtype, fast_accum=fast)


def results(ys: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Products [T, N_i] as the results of linears that read a tensor of this shape. Autograd takes none for a view, so
    whoever gets them may add to them in place."""
    ys = [torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[1])) for y in ys]
    return ys[0] if len(ys) == 1 else tuple(ys)


def _one_or_all(tensors: Sequence[torch.Tensor]) -> torch.Tensor | Sequence[torch.Tensor]:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
