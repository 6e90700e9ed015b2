"""CoatLinear: its three products against float64 of the same quantized mathematics, and every way a linear is used."""

import copy

import coat_kernels as ck
import pytest
import torch
from coat_kernels import Fp8Format, Granularity
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from hf_coat import apply_coat
from hf_coat.config import PRESETS, CoatConfig
from hf_coat.modules import CoatLinear

CONFIGS = {name: PRESETS[name].model for name in ("lean", "paper")}
E4M3 = torch.float8_e4m3fn


@pytest.fixture(params=CONFIGS)
def config(request) -> CoatConfig:
    return CONFIGS[request.param]


def make(n_in, n_out, config, dtype=torch.bfloat16, bias=True, device="cpu"):
    torch.manual_seed(n_in + n_out)
    return CoatLinear.convert(nn.Linear(n_in, n_out, bias=bias, dtype=dtype, device=device), config)


def close(actual, truth, dtype):
    """Within twice the rounding of ``dtype``, or of the tensor cores' 14-bit sums: the mathematics is the same."""
    bound = {torch.bfloat16: 2 * 2.0**-9, torch.float32: 2.0**-9 if actual.is_cuda else 1e-5}[dtype]
    error = (actual.double() - truth).norm() / truth.norm()
    assert error <= bound, f"relative error {error:.2e} above {bound:.2e}"


def value(codes_and_scale):
    return codes_and_scale[0].double() * codes_and_scale[1].double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "n_in", "n_out"), [((1,), 16, 32), ((37,), 50, 70), ((2, 3, 5), 64, 33), ((64,), 128, 256)]
)
def test_products_against_float64(device, config, tokens, n_in, n_out, dtype):
    layer = make(n_in, n_out, config, dtype, device=device)
    x = torch.randn(*tokens, n_in, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(*tokens, n_out, device=device, dtype=dtype)
    y = layer(x)
    y.backward(dy)

    how = dict(granularity=config.granularity, power_of_two=config.power_of_two)
    x_q, _, x_s = ck.quantize(x.detach(), E4M3, **how)
    w_q, _, w_s = ck.quantize(layer.weight.detach(), E4M3, **how)
    dy_q, _, dy_s = ck.quantize(dy, config.grad_format.dtype, **how)
    w_top = ck.quantize(layer.weight.detach(), E4M3, Granularity.TENSOR, scale=w_s.amax().view(1, 1))
    if (
        config.granularity == Granularity.TOKEN
    ):  # what reduces over tokens uses one scale; moving there is exact or subnormal
        x_t, dy_t = (value(ck.transpose(q, s)).t()[: q.shape[0]] for q, s in ((x_q, x_s), (dy_q, dy_s)))
    else:
        x_t, dy_t = value((x_q, x_s)), value((dy_q, dy_s))
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype
    assert y.shape == (*tokens, n_out)
    close(y.detach().reshape(-1, n_out), value((x_q, x_s)) @ value((w_q, w_s)).t() + layer.bias.double(), dtype)
    close(x.grad.reshape(-1, n_in), value((dy_q, dy_s)) @ value((w_top[0], w_top[2])), dtype)
    close(layer.weight.grad, dy_t.t() @ x_t, dtype)
    close(layer.bias.grad, dy.double().reshape(-1, n_out).sum(0), dtype)


def test_near_the_bf16_linear(device, config):
    """E4M3 rounds to 2**-4 at most, 2.6 % in the mean square; two operands and E5M2 gradients (5.2 %): 4 % and 6 %."""
    layer = make(512, 384, config, device=device)
    plain = copy.deepcopy(layer).revert()
    x = torch.randn(256, 512, device=device, dtype=torch.bfloat16)
    dy = torch.randn(256, 384, device=device, dtype=torch.bfloat16)
    results = []
    for module in (layer, plain):
        x_in = x.clone().requires_grad_()
        y = module(x_in)
        y.backward(dy)
        results.append((y, x_in.grad, module.weight.grad))
    bounds = (0.04, 0.06, 0.06) if config.grad_format == Fp8Format.E5M2 else (0.04, 0.04, 0.04)
    for actual, expected, bound in zip(*results, bounds, strict=True):
        assert 1e-3 < (actual - expected).float().norm() / expected.float().norm() < bound


def kept_bytes(call):
    """Bytes of distinct storages that autograd keeps, by dtype."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = (tensor.dtype, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    kept = {}
    for dtype, size in seen.values():
        kept[dtype] = kept.get(dtype, 0) + size
    return kept


def test_keeps_one_byte_per_value_once_per_input(device, config):
    """q, k and v of one input keep one FP8 copy between them, and nothing of it in BF16."""
    layers = [make(128, 96, config, bias=False, device=device) for _ in range(3)]
    x = torch.randn(64, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    weights = sum(layer.weight.numel() * 2 for layer in layers)

    def call():
        h = x * 2
        for layer in layers:
            layer(h)

    kept = kept_bytes(call)
    assert kept[E4M3] == 64 * 128
    assert kept.get(torch.bfloat16, 0) <= weights
    for layer in layers:
        layer.weight.requires_grad_(False)
    assert E4M3 not in kept_bytes(call), "a frozen weight needs nothing of its input"


def test_changed_input_is_quantized_again(device, config):
    layer = make(32, 32, config, device=device)
    x = torch.randn(8, 32, device=device, dtype=torch.bfloat16)
    first = layer(x)
    x.mul_(3)
    assert not torch.equal(layer(x), first)
    assert torch.equal(layer(x), layer(x.clone()))


def test_frozen_weight_gets_no_gradient_work(device, config, monkeypatch):
    layer = make(32, 48, config, device=device)
    layer.weight.requires_grad_(False)
    x = torch.randn(8, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    calls = []
    for module in ("linear", "operands"):  # gradients of weights, and of inputs
        monkeypatch.setattr(
            f"hf_coat.functional.{module}.scaled_mm", lambda *a, **k: calls.append(a) or ck.scaled_mm(*a, **k)
        )
    y.sum().backward()
    assert len(calls) == 1 and layer.weight.grad is None and x.grad is not None and layer.bias.grad is not None


def test_train_and_eval_and_no_grad_are_the_same_numbers(device, config):
    layer = make(64, 48, config, device=device)
    x = torch.randn(8, 64, device=device, dtype=torch.bfloat16)
    train = layer.train()(x)
    evaluated = layer.eval()(x)
    with torch.no_grad():
        silent = layer(x)
    with torch.inference_mode():
        inferred = layer(x.clone())
    assert torch.equal(train, evaluated) and torch.equal(train, silent) and torch.equal(train, inferred)


def test_a_model_in_inference_mode(device):
    """q, k and v run as one there too; a tensor of inference mode counts no changes."""
    settings = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(device, torch.bfloat16)
    apply_coat(model)
    ids = torch.arange(12, device=device).view(1, 12)
    with torch.no_grad():
        expected = model.eval()(ids).logits
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_autocast(device, config, weight_dtype):
    layer = make(64, 48, config, weight_dtype, device=device)
    x = torch.randn(8, 64, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32 and layer.weight.grad.dtype == weight_dtype


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(device, config, reentrant):
    layers = nn.Sequential(*[make(48, 48, config, device=device) for _ in range(2)])
    x = torch.randn(8, 48, device=device, dtype=torch.bfloat16, requires_grad=True)
    grads = []
    for call in (layers, lambda x: checkpoint(layers, x, use_reentrant=reentrant)):
        layers.zero_grad()
        x.grad = None
        call(x).float().square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in layers.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_double_use_and_tied_weights(device, config):
    """One module used twice, and two modules with one weight, add up the gradients of both uses."""
    layer, other = make(48, 48, config, bias=False, device=device), make(48, 48, config, bias=False, device=device)
    other.weight = layer.weight
    x = torch.randn(8, 48, device=device, dtype=torch.bfloat16)
    grads = []
    for first, second in ((layer, layer), (layer, other)):
        layer.weight.grad = None
        second(torch.relu(first(x))).float().square().sum().backward()
        grads.append(layer.weight.grad.clone())
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_accumulated_gradients_are_the_sum(device, config):
    layer = make(48, 32, config, torch.float32, device=device)
    batches = [torch.randn(8, 48, device=device) for _ in range(3)]
    separate = []
    for x in batches:
        layer.zero_grad()
        layer(x).square().sum().backward()
        separate.append(layer.weight.grad.clone())
    layer.zero_grad()
    for x in batches:
        layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, (separate[0] + separate[1]) + separate[2])


def test_broken_gradient_stays_visible(device, config):
    layer = make(32, 48, config, device=device)
    x = torch.randn(8, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    dy = torch.ones_like(y)
    dy[3, 5] = float("nan")
    y.backward(dy)
    assert x.grad[3].isnan().all() and layer.weight.grad.isnan().any()


def test_zero_gradient_gives_zero(device, config):
    """Scales of zeros are the smallest there are; products with other scales underflow, and give zeros, not NaN."""
    layer = make(32, 48, config, device=device)
    x = (torch.randn(8, 32, device=device) * 1e-12).bfloat16().requires_grad_()
    layer(x).backward(torch.zeros(8, 48, device=device, dtype=torch.bfloat16))
    assert not x.grad.any() and not layer.weight.grad.any()


def test_empty_batch(device, config):
    layer = make(32, 48, config, device=device)
    x = torch.zeros(0, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 32) and not layer.weight.grad.any()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(device, config, backend):
    torch._dynamo.reset()
    layer = make(64, 48, config, device=device)
    x = torch.randn(8, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    expected = [y.detach(), x.grad.clone(), layer.weight.grad.clone()]
    x.grad = layer.weight.grad = None
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    y.sum().backward()
    for a, b in zip([y.detach(), x.grad, layer.weight.grad], expected, strict=True):
        assert torch.equal(a, b)


def test_deterministic(device, config):
    layer = make(200, 100, config, device=device)
    x = torch.randn(300, 200, device=device, dtype=torch.bfloat16)
    grads = []
    for _ in range(2):
        layer.zero_grad()
        layer(x.clone()).float().square().sum().backward()
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)


def test_float16_is_refused(device, config):
    layer = make(32, 32, config, torch.float32, device=device)
    with pytest.raises(TypeError, match="torch.float16.*bf16=True"):
        layer(torch.zeros(2, 32, dtype=torch.float16, device=device))


def test_revert_is_exact(config):
    layer = make(32, 48, config)
    weight, state = layer.weight, set(vars(layer))
    assert (
        type(layer.revert()) is nn.Linear
        and layer.weight is weight
        and state - set(vars(layer)) == {"coat", "coat_cache", "coat_merged", "coat_region"}
    )
