"""Frozen linears that are stored as FP8, and LoRA beside them: the products, what is resident, what is saved."""

import copy
import pickle

import coat_kernels as ck
import pytest
import torch
from coat_kernels import Granularity
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_coat import apply_coat, remove_coat
from hf_coat.config import PRESETS, CoatConfig
from hf_coat.functional import (
    Adapter,
    Gate,
    StoredWeight,
    coat_activation,
    coat_linear,
    coat_lora,
    coat_norm,
    keep_attention,
    operands,
)
from hf_coat.modules import CoatFrozenLinear, CoatLinear

E4M3 = torch.float8_e4m3fn
CONFIGS = {name: PRESETS[name].model for name in ("lean", "paper")}


def frozen(n_in, n_out, dtype=torch.bfloat16, bias=False, device="cpu", config=CONFIGS["lean"]):
    torch.manual_seed(n_in + n_out)
    layer = nn.Linear(n_in, n_out, bias=bias, dtype=dtype, device=device).requires_grad_(False)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-2, 2, n_out, device=device)[:, None])  # rows of different size
    return CoatFrozenLinear.freeze(CoatLinear.convert(layer, config))


def close(actual, truth, dtype):
    """Within twice the rounding of ``dtype``, or of the tensor cores' 14-bit sums: the mathematics is the same."""
    bound = {torch.bfloat16: 2 * 2.0**-9, torch.float32: 2.0**-9 if actual.is_cuda else 1e-5}[dtype]
    error = (actual.double() - truth).norm() / truth.norm()
    assert error <= bound, f"relative error {error:.2e} above {bound:.2e}"


def rounded(x, **how):
    """What FP8 makes of ``x`` [..., H], in float64 [T, H]."""
    q, _, s = ck.quantize(x.detach(), E4M3, **how)
    return q.double() * s.double()


def one_scale(x):
    """What FP8 makes of ``x`` when it is moved to one scale, as a product over its rows needs it."""
    q, _, s = ck.quantize(x.detach(), E4M3)
    codes, top = ck.transpose(q, s)
    return (codes.double() * top.double()).t()[: len(q)]


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "n_in", "n_out"), [((1,), 16, 32), ((2, 3, 5), 50, 70), ((0,), 32, 16)])
def test_products_of_stored_codes(device, preset, dtype, tokens, n_in, n_out):
    config = CONFIGS[preset]
    layer = frozen(n_in, n_out, dtype, bias=True, device=device, config=config)
    layer.bias.requires_grad_()
    x = torch.randn(*tokens, n_in, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(*tokens, n_out, device=device, dtype=dtype)
    y = layer(x)
    y.backward(dy)
    assert layer.weight.grad is None and y.shape == dy.shape
    if not x.numel():
        assert x.grad.shape == x.shape
        return
    how = {"granularity": config.granularity, "power_of_two": config.power_of_two}
    weight = layer.dequantize().double()
    close(y.flatten(0, -2), rounded(x, **how) @ weight.t() + layer.bias.double(), dtype)
    w_back = one_scale(weight.float()) if config.granularity == Granularity.TOKEN else weight
    dy_q, _, dy_s = ck.quantize(dy, config.grad_format.dtype, **how)
    close(x.grad.flatten(0, -2), dy_q.double() * dy_s.double() @ w_back, dtype)
    close(layer.bias.grad, dy.double().flatten(0, -2).sum(0), dtype)


def test_the_same_numbers_as_quantizing_for_each_call(device):
    layer = frozen(48, 80, device=device)
    weight = layer.dequantize()
    x = torch.randn(7, 48, device=device, dtype=torch.bfloat16)
    assert torch.equal(layer(x), coat_linear(x, weight)), "FP8 of what FP8 gave is the same"


def test_resident_bytes_and_what_is_kept_for_the_backward():
    layer = frozen(512, 256)
    resident = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert resident <= 1.01 * 512 * 256  # a byte, and 4 for each row
    x = torch.randn(16, 512, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    known = {t.untyped_storage()._cdata for t in (*layer.parameters(), *layer.buffers())}
    new = [t for t in kept if t.untyped_storage()._cdata not in known]
    assert sum(t.nbytes for t in new) == 16 * 4, "the scales of the input, nothing of its values"


def test_linears_that_run_as_one(device):
    layers = [frozen(32, n, device=device) for n in (48, 16, 16)]
    x = torch.randn(5, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    together = coat_linear(x, [layer.operand for layer in layers])
    assert all(torch.equal(y, layer(x)) for y, layer in zip(together, layers, strict=True))
    dys = [torch.randn_like(y) for y in together]
    (grad,) = torch.autograd.grad(together, x, dys)
    dy = rounded(torch.cat(dys, dim=1))
    weight = one_scale(torch.cat([layer.dequantize() for layer in layers]).float())
    close(grad, dy @ weight, torch.bfloat16)


def test_codes_of_linears_that_run_as_one_are_not_copied_together(device):
    layers = [frozen(32, n, device=device) for n in (48, 16)]
    x = torch.randn(5, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    copied = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            copied.extend(t.dtype for t in args[0]) if function is torch.ops.aten.cat.default else None
            return function(*args, **(kwargs or {}))

    weights = [layer.operand for layer in layers]
    for run in (
        lambda: coat_linear(x, weights),
        lambda: coat_lora(x, weights, None, adapters_of(layers, (4, 4), (1, 1))),
    ):
        with Watch():
            torch.autograd.backward(
                run(), [torch.ones(5, layer.out_features, device=device).bfloat16() for layer in layers]
            )
    assert set(copied) == {torch.float32}, "scales, four bytes a row"


def test_casts_of_the_model_leave_codes_and_scales_alone():
    layer = frozen(32, 48)
    bits, scale = layer.weight.clone(), layer.weight_scale.clone()
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        nn.Sequential(layer).to(dtype)
        assert torch.equal(layer.weight, bits) and torch.equal(layer.weight_scale, scale)
        assert layer.weight.dtype == torch.uint8 and layer.weight_scale.dtype == torch.float32
        assert layer.dequantize().dtype == layer.compute_dtype == dtype


def test_state_dicts_are_plain_and_load_exactly():
    model = nn.Sequential(frozen(32, 48, bias=True))
    state = model.state_dict()
    assert {name: t.dtype for name, t in state.items()} == {"0.weight": torch.bfloat16, "0.bias": torch.bfloat16}
    plain = nn.Sequential(nn.Linear(32, 48, dtype=torch.bfloat16))
    plain.load_state_dict(state)
    assert torch.equal(plain[0].weight, model[0].dequantize())

    other = nn.Sequential(frozen(32, 48, bias=True))
    other[0].weight.zero_()
    assert not other.load_state_dict(state).missing_keys
    # not always the same codes: a largest value that was rounded down to 448 asks for half the scale
    assert torch.equal(other[0].dequantize(), model[0].dequantize())

    wrapped = nn.ModuleDict({"base_model": nn.ModuleDict({"model": model})})  # as a PeftModel's names begin
    codes = wrapped.state_dict()
    assert codes["base_model.model.0.weight"].dtype == torch.uint8 and "base_model.model.0.weight_scale" in codes
    other[0].weight.zero_()
    nn.ModuleDict({"base_model": nn.ModuleDict({"model": other})}).load_state_dict(codes)
    assert torch.equal(other[0].weight, model[0].weight)


def test_copies_and_pickles():
    layer = frozen(32, 48)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.weight is not layer.weight


def test_training_a_stored_weight_thaws_it():
    layer = frozen(32, 48)
    values = layer.dequantize()
    layer.requires_grad_()
    assert type(layer) is CoatLinear and layer.weight.requires_grad and torch.equal(layer.weight, values)
    assert not list(layer.buffers()) and "weight_scale" not in layer.state_dict()


def test_codes_that_somebody_overwrote_are_refused():
    layer = frozen(32, 48)
    layer.weight.data = layer.weight.data * 0.5
    for use in (lambda: layer(torch.randn(2, 32)), layer.dequantize, nn.Sequential(layer).state_dict):
        with pytest.raises(RuntimeError, match="codes .* were overwritten with torch.float32.*frozen_weights='bf16'"):
            use()


def test_asked_for_by_name(device):
    def model():
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)).to(device)
        made[0].requires_grad_(False)
        return made

    auto, bf16, fp8 = model(), model(), model()
    apply_coat(auto)
    apply_coat(bf16, CoatConfig(frozen_weights="bf16"))
    assert [type(m) for m in auto] == [type(m) for m in bf16] == [CoatLinear] * 3, "no adapters, nothing is rounded"
    report = apply_coat(fp8, CoatConfig(frozen_weights="fp8"))
    assert [type(m) for m in fp8] == [CoatFrozenLinear, CoatLinear, CoatLinear]
    assert "stored as FP8" in report.converted["0"] and "stored" not in report.converted["1"]
    x = torch.randn(4, 32, device=device)
    expected, bits = fp8(x), fp8[0].weight.clone()
    assert torch.equal(auto(x), expected), "the codes are those that each call would have made"

    apply_coat(fp8, CoatConfig(frozen_weights="fp8", cache_weights=False))
    assert torch.equal(fp8[0].weight, bits) and torch.equal(fp8(x), expected)
    tensor = CoatConfig(frozen_weights="fp8", granularity="tensor")
    apply_coat(fp8, tensor)
    assert fp8[0].weight_scale.shape == (1, 1) and fp8(x).isfinite().all()
    apply_coat(fp8)
    assert type(fp8[0]) is CoatLinear, "no longer asked for"


def test_undoing_gives_the_dequantized_weight_and_says_so():
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).requires_grad_(False)
    weight = model[0].weight.clone()
    apply_coat(model, CoatConfig(frozen_weights="fp8"))
    report = remove_coat(model)
    assert report.converted == {name: "Linear, its weight as FP8 had it" for name in "01"}
    stored = StoredWeight.of(weight, Granularity.TOKEN, True)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, stored.dequantize(torch.float32))
    # half a step of E4M3's three bits, relative to the largest value of its row below the normal numbers
    assert ((model[0].weight - weight).abs() <= 2.0**-4 * weight.abs() + 2.0**-10 * stored.scale).all()


def test_linears_that_share_a_weight_are_not_stored():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).requires_grad_(False)
    model[1].weight = model[0].weight
    report = apply_coat(model, CoatConfig(frozen_weights="fp8"))
    assert model[1].weight is model[0].weight
    assert "not stored as FP8: it shares its weight" in report.converted["0"]


# --- LoRA ---


def adapters_of(layers, ranks, scalings, dropout=0.0):
    """Adapters in float32, as PEFT makes them; None where there is no rank."""
    return [
        None
        if rank is None
        else Adapter(
            torch.randn(rank, layer.in_features, device=layer.weight.device, requires_grad=True),
            torch.randn(layer.out_features, rank, device=layer.weight.device, requires_grad=True),
            scaling,
            dropout,
        )
        for layer, rank, scaling in zip(layers, ranks, scalings, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("widths", "ranks"), [((48,), (8,)), ((48, 16, 16), (8, 3, 4)), ((48, 16, 16), (4, None, 2))])
@pytest.mark.parametrize("tokens", [(1,), (2, 5)])
def test_lora_against_float64(device, dtype, widths, ranks, tokens):
    layers = [frozen(32, n, dtype, bias=True, device=device) for n in widths]
    adapters = adapters_of(layers, ranks, [0.5, 2.0, 1.0][: len(widths)])
    x = torch.randn(*tokens, 32, device=device, dtype=dtype, requires_grad=True)
    ys = coat_lora(x, [m.operand for m in layers], [m.bias for m in layers], adapters)
    ys = [ys] if isinstance(ys, torch.Tensor) else ys
    dys = [torch.randn_like(y) for y in ys]
    torch.autograd.backward(ys, dys)

    flat, x_q = x.detach().double().flatten(0, -2), rounded(x)
    dx = rounded(torch.cat([dy.flatten(0, -2) for dy in dys], 1)) @ one_scale(
        torch.cat([layer.dequantize() for layer in layers]).float()
    )
    bound = torch.bfloat16 if dtype == torch.bfloat16 else dtype
    for layer, adapter, y, dy in zip(layers, adapters, ys, dys, strict=True):
        truth = x_q @ layer.dequantize().double().t() + layer.bias.double()
        if adapter is not None:
            a, b, dy = adapter.a.detach().double(), adapter.b.detach().double(), dy.double().flatten(0, -2)
            truth += adapter.scaling * flat @ a.t() @ b.t()
            u = adapter.scaling * dy @ b
            dx += u @ a
            assert adapter.a.grad.dtype == torch.float32
            three_times(adapter.a.grad, u.t() @ x_q, bound)
            three_times(adapter.b.grad, adapter.scaling * dy.t() @ (flat @ a.t()), bound)
        three_times(y.flatten(0, -2), truth, bound)
    three_times(x.grad.flatten(0, -2), dx, bound)


def three_times(actual, truth, dtype):
    """An adapter's product has a factor of ``dtype`` between two others: three roundings beside that of the sum."""
    bound = {torch.bfloat16: 4 * 2.0**-9, torch.float32: 2.0**-8 if actual.is_cuda else 2e-5}[dtype]
    error = (actual.double() - truth).norm() / truth.norm()
    assert error <= bound, f"relative error {error:.2e} above {bound:.2e}"


def test_lora_keeps_the_input_once_in_fp8():
    layer = frozen(512, 256)
    (adapter,) = adapters_of([layer], [4], [1.0])
    x = torch.randn(16, 512, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        coat_lora(x, layer.operand, None, adapter)
    known = {t.untyped_storage()._cdata for t in (*layer.parameters(), *layer.buffers(), adapter.a, adapter.b)}
    new = {t.untyped_storage()._cdata: t.nbytes for t in kept if t.untyped_storage()._cdata not in known}
    expected = 16 * (512 + 4 + 2 * 4) + 2 * 4 * (512 + 256)
    assert sum(new.values()) == expected, "codes, their scales, the product of rank 4; a and b in BF16"


SOURCES = {
    "norm": lambda x, share: coat_norm(x, eps=1e-6, share=share),
    "activation": lambda x, share: coat_activation(x, None, Gate("silu", False), share=share),
}


@pytest.mark.parametrize("source", SOURCES)
def test_lora_takes_its_input_from_what_another_layer_keeps(device, source):
    """Also with dropout, whose mask belongs to values, not to the order in which they lie in memory."""
    layer, x = frozen(64, 48, device=device), torch.randn(20, 64, device=device, dtype=torch.bfloat16)
    (adapter,) = adapters_of([layer], [4], [1.0])
    dy = torch.randn(20, 48, device=device, dtype=torch.bfloat16)
    for p in (0.0, 0.5):
        grads = []
        for share in (True, False):
            y = SOURCES[source](x.clone().requires_grad_(), share)
            assert (operands.source_of(y) is not None) == share
            torch.manual_seed(0)
            out = coat_lora(y, layer.operand, None, adapter._replace(dropout=p))
            grads += torch.autograd.grad(out, adapter.a, dy)
        # a gradient of the norm of a rounded x, and one of a rounded norm of x: 2**-4 / sqrt(3) at most, each time
        assert 0 < (grads[0] - grads[1]).norm() <= 2 * 2.0**-4 / 3**0.5 * grads[1].norm()


def test_lora_reads_the_output_of_an_attention_itself(device):
    layer = frozen(64, 48, device=device)
    (adapter,) = adapters_of([layer], [4], [1.0])
    q, k, v = torch.randn(3, 2, 4, 10, 16, device=device, dtype=torch.bfloat16).requires_grad_()
    out = keep_attention(
        lambda q, k, v: (q + k + v).transpose(1, 2).contiguous().view(2, 10, 64).view(2, 10, 4, 16), q, k, v, fp8=False
    )
    x = out.flatten(2)
    assert operands.source_of(x) is not None
    dy = torch.randn(2, 10, 48, device=device, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(coat_lora(x, layer.operand, None, adapter), adapter.a, dy)
    u = dy.double().flatten(0, 1) @ adapter.b.detach().double()
    three_times(grad, u.t() @ x.detach().double().flatten(0, 1), torch.bfloat16)  # nothing of x is rounded


@pytest.mark.parametrize("many", [1, 2])
def test_lora_dropout_is_the_same_in_forward_and_backward(device, many):
    """With the identity for a and for b, the adapter's part shows the mask itself."""
    p, width = 0.25, 64
    layers = [frozen(width, width, torch.float32, device=device) for _ in range(many)]
    eye = torch.eye(width, device=device)
    adapters = [Adapter(eye.clone().requires_grad_(), eye.clone().requires_grad_(), 1.0, p) for _ in layers]
    x = torch.ones(100, width, device=device, requires_grad=True)
    torch.manual_seed(3)
    ys = coat_lora(x, [m.operand for m in layers], None, adapters)
    bases = coat_linear(x, [m.operand for m in layers]) if many > 1 else [layers[0](x)]
    ys = [ys] if many == 1 else ys
    masks = [y.detach() - base.detach() for y, base in zip(ys, bases, strict=True)]
    zero = torch.zeros_like(masks[0])
    for mask in masks:
        kept = mask > 0.5
        torch.testing.assert_close(mask, torch.where(kept, 1 / (1 - p), zero), atol=2e-2, rtol=0)
        # four standard deviations of the mean of 6,400 draws
        assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    assert many == 1 or not torch.equal(masks[0] > 0.5, masks[1] > 0.5)
    base_grad = torch.autograd.grad(bases, x, [torch.ones_like(y) for y in ys])[0]
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    expected = sum(torch.where(mask > 0.5, 1 / (1 - p), zero) for mask in masks)
    torch.testing.assert_close(x.grad - base_grad, expected, atol=2e-2, rtol=0)
    for adapter, mask in zip(adapters, masks, strict=True):
        columns = torch.where(mask > 0.5, 1 / (1 - p), zero).sum(0)
        torch.testing.assert_close(adapter.a.grad, columns.expand(width, width), rtol=1e-3, atol=0)
    torch.manual_seed(3)
    again = coat_lora(x, [m.operand for m in layers], None, adapters)
    assert torch.equal(again if many == 1 else again[0], ys[0]), "drawn from torch's generator"
