"""Weights that came as FP8 codes: the same numbers as the weights they were made from, gradients included."""

import copy
import pickle
from types import SimpleNamespace

import coat_kernels as ck
import pytest
import torch
from torch import nn

from hf_coat import CoatConfig, apply_coat, remove_coat
from hf_coat.functional import Adapter, Gate, GatheredWeight, coat_linear, coat_lora, coat_mlp
from hf_coat.modules import CoatLinear, gather
from hf_coat.modules.gather import CodeGather, Shard

K = 48


def weight(n, k=K, dtype=torch.bfloat16, device="cpu"):
    return nn.Parameter(torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(device, dtype) / 8)


def gathered(w, requires_grad=True):
    codes, _, scale = ck.quantize(w.detach())
    return nn.Parameter(GatheredWeight(codes.view(torch.uint8), scale, w.dtype), requires_grad)


def run(function, weights, x):
    """Results, and the gradients of x and of the weights."""
    x = x.clone().requires_grad_()
    ys = function(x, weights)
    ys = ys if isinstance(ys, tuple) else (ys,)
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(ys, [torch.randn(y.shape, generator=generator).to(y) for y in ys])
    return [y.detach() for y in ys], x.grad, [w.grad for w in weights]


def attention(x, weights):
    return coat_linear(x, weights)


def mlp(x, weights):
    return coat_mlp(x, weights[:2], weights[2], [None, None], None, Gate("silu", True, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("function", "shapes"), [(attention, [(64, K), (16, K), (16, K)]), (mlp, [(80, K), (80, K), (K, 80)])]
)
def test_codes_give_what_the_weights_give(function, shapes, dtype, device):
    plain = [weight(n, k, dtype, device) for n, k in shapes]
    codes = [gathered(w) for w in plain]
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    ys, dx, dws = run(function, plain, x)
    ys_of_codes, dx_of_codes, dws_of_codes = run(function, codes, x)
    assert all(map(torch.equal, ys, ys_of_codes))
    # The input gradient reads codes that were moved to one scale, and those of the weights are made at that scale:
    # they differ where a value is below 2**-15 of the largest scale's.
    error = (dx - dx_of_codes).float().norm() / dx.float().norm()
    assert error < 1e-3
    for dw, of_codes, w in zip(dws, dws_of_codes, plain, strict=True):
        assert type(of_codes) is torch.Tensor and of_codes.dtype == w.dtype and of_codes.shape == w.shape
        # those of gate and up follow from the gradient of h, which the above holds for
        assert (dw - of_codes).float().norm() <= 1e-3 * dw.float().norm()


def test_adapters_over_gathered_codes(device):
    plain = weight(64, device=device).requires_grad_(False)
    codes = gathered(plain, requires_grad=False)
    a, b = weight(4, device=device), weight(64, 4, device=device)
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    results = []
    for w in (plain, codes):
        a.grad = b.grad = None
        ys, dx, _ = run(lambda x, ws: coat_lora(x, ws[0], None, Adapter(a, b, 2.0)), [w], x)
        results.append((*ys, a.grad, b.grad))
        assert w.grad is None and dx is not None
    assert all(map(torch.equal, *results))


def test_who_else_reads_it_gets_values():
    plain = weight(20)
    codes = gathered(plain)
    assert isinstance(codes, nn.Parameter) and isinstance(codes, GatheredWeight) and "[20, 48]" in repr(codes)
    values = codes.detach() + 0
    assert type(values) is torch.Tensor and values.dtype == torch.bfloat16
    # half a step of E4M3, 2**-4 of a normal number, and 2**-10 of a scale, which is at most amax / 224, below those
    bound = plain.abs() * 2**-4 + plain.abs().amax(1, keepdim=True) / 224 * 2**-10
    assert ((values - plain).abs() <= bound * (1 + 2**-7)).all()
    x = torch.randn(3, K).bfloat16()
    torch.testing.assert_close(nn.functional.linear(x, codes), nn.functional.linear(x, values))
    with pytest.raises(RuntimeError, match="writes to a weight that FSDP2 gathered"):
        codes.detach().mul_(2)
    assert torch.equal(torch.zeros(20, K).add_(codes.detach()), values.float())


def test_without_fsdp2_the_hook_does_nothing():
    model = nn.Sequential(nn.Linear(K, 64), nn.Linear(64, 32))
    apply_coat(model, CoatConfig(modules_to_not_convert=["0"]))
    (hook,) = model._forward_pre_hooks.values()
    assert isinstance(hook, CodeGather) and hook.linears == [model[1]]
    model(torch.randn(2, K))
    assert hook.waiting is None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (of_twin,) = twin._forward_pre_hooks.values()
        assert of_twin.linears == [twin[1]] and type(twin[1]) is CoatLinear and twin[1] is not model[1]
    apply_coat(model)
    (again,) = model._forward_pre_hooks.values()
    assert again is not hook and again.linears == [model[0], model[1]]
    remove_coat(model)
    assert not model._forward_pre_hooks
    for config in (CoatConfig(fsdp_all_gather="bf16"), CoatConfig(granularity="tensor")):
        apply_coat(model, config)
        assert not model._forward_pre_hooks


def test_the_first_of_a_group_quantizes_for_all(device, monkeypatch):
    """Weights of one group in two dtypes, asked in any order: the codes of the weights as they are."""
    shapes, dtypes = [(16, K), (8, K), (24, 2 * K), (8, K)], [torch.float32, torch.bfloat16] * 2
    weights = [weight(*shape, dtype, device).detach() for shape, dtype in zip(shapes, dtypes, strict=True)]
    shards = [
        Shard(SimpleNamespace(_sharded_param_data=w.view(-1), padded_sharded_param_size=w.shape, device=w.device))
        for w in weights
    ]
    launches, quantize_each = [], ck.quantize_each
    monkeypatch.setattr(gather, "quantize_each", lambda x: launches.append(len(x)) or quantize_each(x))
    for shard in shards:
        shard.together = shards
    for order in ([0, 1, 2, 3], [2], [3, 1], [0, 1, 2, 3]):
        for i in order:
            (codes, scale), _ = shards[i].fsdp_pre_all_gather(None, None, None, None, None)
            q, _, s = ck.quantize(weights[i])
            assert torch.equal(codes, q.view(torch.uint8)) and torch.equal(scale, s)
        assert all(shard.made is None for shard in shards)
        for w in weights:
            w *= 3
    assert launches == [2, 2, 1, 1, 1, 2, 2]
