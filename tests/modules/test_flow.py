"""The precision flow between modules: what is shared, kept and made again, and when weights are quantized."""

import copy
import functools
import inspect

import coat_kernels as ck
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama as llama_modeling
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

import hf_coat
from hf_coat import CoatConfig
from hf_coat.families import norm_state
from hf_coat.functional import Gate, WeightCache, coat_activation, coat_norm, keep_attention, operands
from hf_coat.memory import predict
from hf_coat.modules import CoatAttention, CoatLinear, CoatNorm, convert

E4M3 = torch.float8_e4m3fn
EVERYTHING = CoatConfig(activations="lean")


def llama(dtype=torch.float32, device="cpu", **changes):
    torch.manual_seed(0)
    settings = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=128, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    config = LlamaConfig(**{**settings, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").to(device)


def batch(device="cpu", length=12):
    ids = torch.arange(2 * length, device=device).view(2, length) * 7 % 128
    return {"input_ids": ids, "labels": ids}


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


class Counter:
    """Counts the calls of a function in a module, and what the first argument was."""

    def __init__(self, monkeypatch, module, name):
        self.seen, own = [], getattr(module, name)

        @functools.wraps(own)
        def counting(*args, **kwargs):
            self.seen.append(args[0])
            return own(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    def __len__(self):
        return len(self.seen)


# --- one quantized copy ---


def test_q_k_and_v_are_one_product_and_alone_the_same_numbers(device, monkeypatch):
    forward, backward = (Counter(monkeypatch, m, "scaled_mm") for m in (operands, hf_coat.functional.linear))
    model, alone = llama(device=device), llama(device=device)
    hf_coat.apply_coat(model)
    hf_coat.apply_coat(alone)
    for module in alone.modules():
        if isinstance(module, CoatLinear):
            module.coat_merged = None
    loss, grads = gradients(model, **batch(device))
    together = len(forward) + len(backward)
    loss_alone, grads_alone = gradients(alone, **batch(device))
    # A layer's attention: forward, input gradient and weight gradient of qkv and of o; 3 + 3, against 9 + 3. Of the
    # MLP's products some are counted too, as many each time.
    assert len(forward) + len(backward) - 2 * together == 2 * 6
    assert loss == pytest.approx(loss_alone, rel=1e-5)
    for name, grad in grads.items():  # one scale per token for three gradients, against one each
        assert relative(grad, grads_alone[name]) < 0.1, name


@pytest.mark.parametrize("bias", [False, True])
def test_large_products_that_share_an_input_are_apart(device, monkeypatch, bias):
    models = [llama(device=device, attention_bias=bias) for _ in range(2)]
    for model in models:
        hf_coat.apply_coat(model)
    forward = Counter(monkeypatch, operands, "scaled_mm")
    loss, grads = gradients(models[0], **batch(device))
    as_one = len(forward)
    monkeypatch.setattr(operands, "LARGE", 0)
    loss_apart, grads_apart = gradients(models[1], **batch(device))
    assert len(forward) - as_one == as_one + 2 * 3, "q, k and v are three in each layer; gate and up are two"
    assert loss_apart == pytest.approx(loss, rel=1e-6)
    for name, grad in grads.items():
        assert relative(grads_apart[name], grad) < 1e-5, name


def test_followers_called_with_another_tensor_compute_for_themselves(device):
    model = llama(device=device)
    hf_coat.apply_coat(model)
    attention = model.model.layers[0].self_attn
    x, other = (torch.randn(3, 64, device=device) for _ in range(2))
    attention.q_proj(x)
    x_q, _, x_s = ck.quantize(other)
    w_q, _, w_s = ck.quantize(attention.k_proj.weight.detach())
    expected = ck.scaled_mm(x_q, w_q, x_s, w_s)
    torch.testing.assert_close(attention.k_proj(other), expected.float(), rtol=2**-7, atol=1e-6)
    changed = attention.v_proj(x.mul_(2.0))  # the same tensor, but not what q_proj has read
    assert relative(changed, attention.v_proj(x.clone())) < 1e-6
    twin = copy.deepcopy(attention)
    assert twin.k_proj.coat_merged.members[1] is twin.k_proj is not attention.k_proj


def test_norms_make_the_codes_that_their_linears_read(device, monkeypatch):
    model = llama(device=device)
    hf_coat.apply_coat(model)
    inputs = Counter(monkeypatch, operands, "quantize")
    first = gradients(model, **batch(device))
    once = sum(t.dim() == 3 for t in inputs.seen if isinstance(t, torch.Tensor))
    inputs.seen.clear()
    second = gradients(model, **batch(device))
    again = sum(t.dim() == 3 for t in inputs.seen if isinstance(t, torch.Tensor))
    assert once - again == 4, "two norms in each of two layers know by now that linears read them"
    assert first[0] == second[0] and all(torch.equal(g, second[1][n]) for n, g in first[1].items())


# --- what is kept ---


def kept_bytes(model, tokens=(2, 64)):
    return predict(model, tokens).activations


def test_activation_policies_order_as_they_promise():
    model = llama(torch.bfloat16, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    kept = {"none": kept_bytes(model)}
    for name, activations in {
        "lean": "lean", "bf16 attention": {"attention": "bf16"}, "paper": "paper", "bf16": "bf16",
        "one layer": {"layers.0": "bf16"},
    }.items():  # fmt: skip
        twin = copy.deepcopy(model)
        report = hf_coat.apply_coat(twin, CoatConfig(activations=activations))
        assert not report.unmatched
        kept[name] = kept_bytes(twin)
    # T tokens x H values in bytes: q and k at half of H each are 4 + 4; the kernel keeps 2 norms, q k v, out, gate, up
    assert kept["lean"] < kept["bf16 attention"] < kept["paper"] < kept["bf16"] < kept["none"]
    assert kept["lean"] < kept["one layer"] < kept["bf16"]
    assert kept["none"] / kept["lean"] > 3


def test_lean_keeps_what_the_arithmetic_says():
    """Bytes per token: 1 + 1/128 for a norm's input, q, k, v, gate and up, in groups of 128; 1 for the attention's
    output; 4 for each scale of a token and each root mean square."""
    layers, tokens, hidden, inner, heads = 2, 128, 256, 512, 4
    changes = dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
    few = llama(torch.bfloat16, **{**changes, "num_key_value_heads": heads})
    many = llama(torch.bfloat16, **{**changes, "num_key_value_heads": heads, "num_hidden_layers": layers + 2})
    for model in (few, many):
        hf_coat.apply_coat(model, EVERYTHING)
    per_layer = (kept_bytes(many, (1, tokens)) - kept_bytes(few, (1, tokens))) / 2
    groups = (5 * hidden + 2 * inner) * (1 + 1 / 128) + hidden
    scales = 4 * (2 + 2 + 1 + 1)  # norms: rstd and the codes' scale; o_proj's and down_proj's input
    weights = 4 * (3 * hidden + hidden + 2 * inner + hidden)  # scales of weights, once
    assert per_layer == pytest.approx(tokens * (groups + scales) + weights, rel=0.02)


def test_checkpointing_and_offloading_see_fp8(device):
    model = llama(device=device)
    hf_coat.apply_coat(model, EVERYTHING)
    loss, grads = gradients(model, **batch(device))
    sizes = []

    def pack(t):
        sizes.append((t.dtype, t.dim()))
        return t.cpu()

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.to(device)):
        value = model(**batch(device)).loss
    value.backward()
    offloaded = value.item(), {name: p.grad.clone() for name, p in model.named_parameters()}
    assert not any(dtype == torch.float32 and dim == 4 for dtype, dim in sizes), "q, k and v are FP8"
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for other in (offloaded, gradients(model, **batch(device))):
        assert other[0] == loss and all(torch.equal(other[1][name], g) for name, g in grads.items())


@pytest.mark.parametrize("activations", ["lean", {"attention": "bf16"}])
@pytest.mark.parametrize("padded", [True, False])
def test_padding_masks(device, padded, activations):
    inputs = batch(device, 16)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if padded:
        inputs["attention_mask"][:, :3] = 0
    plain = llama(device=device)
    loss, grads = gradients(plain, **inputs)
    hf_coat.apply_coat(plain, CoatConfig(activations=activations))
    ours, quantized = gradients(plain, **inputs)
    assert ours == pytest.approx(loss, rel=2e-3)
    assert all(relative(quantized[name], g) < 0.2 for name, g in grads.items())


@pytest.mark.parametrize("fp8", [True, False])
def test_attention_gradients(device, fp8):
    """They are the exact gradients at q, k and v as they are kept, however large the scores."""
    q, k, v = (torch.randn(2, 9, 3, 16, device=device).mul_(3).transpose(1, 2).requires_grad_() for _ in range(3))
    dy = torch.randn(2, 9, 3, 16, device=device)

    def attend(q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    out = keep_attention(attend, q, k, v, fp8=fp8, group_size=16)
    assert torch.equal(out, attend(q, k, v))
    out.backward(dy)
    kept = []
    for t in (q, k, v):
        groups = ck.quantize(t.detach().transpose(1, 2), E4M3, "group", group_size=16, scale_dtype=torch.uint8)[::2]
        rounded = ck.dequantize(*groups, group_size=16, dtype=torch.float32).view(2, 9, 3, 16).transpose(1, 2)
        kept.append((rounded if fp8 else t.detach()).double().requires_grad_())
    attend(*kept).backward(dy.double())
    for t, exact in zip((q, k, v), kept, strict=True):
        assert relative(t.grad, exact.grad) < 1e-5


def test_the_output_projection_keeps_what_the_attention_holds(device):
    """In the attention's own dtype its output is there twice otherwise: a byte a value for the linear behind it."""
    model = llama(torch.bfloat16, hidden_size=256, intermediate_size=256)
    hf_coat.apply_coat(model)
    shared = kept_bytes(model, (1, 128))
    for module in model.modules():
        if isinstance(module, CoatAttention):  # whose output says nothing then
            module.register_forward_hook(lambda *_: None)
            module.o_proj.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    assert kept_bytes(model, (1, 128)) - shared == 2 * 128 * 256


# --- the functions against float64 of the same mathematics ---


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_gradients(device, center, offset):
    x = torch.randn(2, 9, 100, device=device, requires_grad=True)
    w, b = (torch.randn(100, device=device, requires_grad=True) for _ in range(2))
    dy = torch.randn(2, 9, 100, device=device)
    y = coat_norm(x, w, b, eps=1e-6, center=center, offset=offset)
    y.backward(dy)
    exact = x.detach().double()
    mean = exact.mean(-1, keepdim=True) * center
    rstd = ((exact - mean).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    truth = (exact - mean) * rstd * (w.double() + offset) + b.double()
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    groups = ck.quantize(x.detach(), E4M3, "group", group_size=128, scale_dtype=torch.uint8)[::2]
    xhat = (ck.dequantize(*groups, group_size=128, dtype=torch.float32).view(2, 9, 100).double() - mean) * rstd
    g = dy.double() * (w.double() + offset)
    dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True) - g.mean(-1, keepdim=True) * center)
    torch.testing.assert_close(x.grad.double(), dx, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), (dy.double() * xhat).sum((0, 1)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.grad.double(), dy.double().sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_a_layer_norm_in_bf16_under_autocast(device):
    """Its output is float32, as CUDA's autocast has it, and so is the input of the next one where towers add to it."""
    own = nn.LayerNorm(64, dtype=torch.bfloat16, device=device)
    nn.init.normal_(own.weight)
    layer = convert(copy.deepcopy(own), CoatNorm, CoatConfig(), norm_state(own))
    x, dy = (torch.randn(9, 64, device=device) for _ in range(2))
    with torch.autocast(device, torch.bfloat16):
        first = layer(x.bfloat16())
        y = layer(first)
    assert first.dtype == y.dtype == torch.float32
    expected = nn.functional.layer_norm(first, (64,), own.weight.float(), own.bias.float(), own.eps)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.backward(dy)
    assert layer.weight.grad.dtype == torch.bfloat16 and layer.weight.grad.any()


@pytest.mark.parametrize("act", ck.ACTIVATIONS)
def test_activation_gradients(device, act):
    x, up = (torch.randn(2, 9, 100, device=device, requires_grad=True) for _ in range(2))
    dh = torch.randn(2, 9, 100, device=device)
    coat_activation(x, up, Gate(act, True)).backward(dh)
    kept = [ck.quantize(t.detach(), E4M3, "group", group_size=128, scale_dtype=torch.uint8)[::2] for t in (x, up)]
    x64, up64 = (
        ck.dequantize(*pair, group_size=128, dtype=torch.float32).view(2, 9, 100).double().requires_grad_()
        for pair in kept
    )
    functions = {
        "silu": nn.functional.silu, "gelu": nn.functional.gelu, "relu": torch.relu, "identity": lambda t: t,
        "gelu_tanh": lambda t: nn.functional.gelu(t, approximate="tanh"), "relu2": lambda t: torch.relu(t).square(),
        "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    }  # fmt: skip
    (functions[act](x64) * up64).backward(dh.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(up.grad.double(), up64.grad, rtol=1e-4, atol=1e-5)


def test_the_fused_mlp_is_the_mlp_of_its_parts(device):
    model = llama(torch.bfloat16, device, hidden_size=96, intermediate_size=160)
    hf_coat.apply_coat(model)
    mlp = model.model.layers[0].mlp
    x = torch.randn(3, 7, 96, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)

    def run(watched):
        handle = mlp.up_proj.register_forward_hook(lambda *_: None) if watched else None
        x.grad = None
        mlp.zero_grad()
        y = mlp(x)
        y.backward(dy)
        if handle is not None:
            handle.remove()
        return [y.detach(), x.grad, *(p.grad for p in mlp.parameters())]

    for fused, parts in zip(run(False), run(True), strict=True):
        # Apart by one FP8 rounding of the gradients of gate and up, which share a scale per token in one case.
        assert relative(fused, parts) < 0.05


# --- weights ---


@pytest.fixture
def weights_quantized(monkeypatch):
    """Names nothing but weights: what _quantize_weights found no codes for."""
    return Counter(monkeypatch, operands, "_one_or_all")


def accumulate(model, optimizer, microbatches, **inputs):
    for _ in range(microbatches):
        model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_weights_are_quantized_once_while_gradients_accumulate(device, weights_quantized):
    model = llama(device=device)
    hf_coat.apply_coat(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    accumulate(model, optimizer, 1, **batch(device))
    per_pass = len(weights_quantized)  # forward and backward of four products in each of two layers
    assert per_pass == 2 * 2 * 4
    weights_quantized.seen.clear()
    accumulate(model, optimizer, 5, **batch(device))
    assert len(weights_quantized) == per_pass + per_pass // 2, "the second microbatch keeps what three more read"


@pytest.mark.parametrize("edit", ["optimizer", "copy", "load", "data", "swap"])
def test_changed_weights_are_quantized_again(device, edit):
    """After the edit the model computes what a freshly converted model with the same weights computes."""
    model = llama(device=device)
    hf_coat.apply_coat(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    accumulate(model, optimizer, 1, **batch(device))
    for _ in range(2):  # fills the caches
        model(**batch(device)).loss.backward()
    caches = [m.coat_merged.cache for m in model.modules() if isinstance(m, CoatLinear) and m.coat_merged]
    assert all(cache._codes is not None for cache in caches)
    other = [p.detach() * 1.5 for p in model.parameters()]
    with torch.no_grad():
        if edit == "optimizer":
            optimizer.step()
        elif edit == "copy":
            for p, value in zip(model.parameters(), other, strict=True):
                p.copy_(value)
        elif edit == "load":
            model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
        elif edit == "data":  # an EMA's swap, between a step and the next forward
            optimizer.step()
            for p, value in zip(model.parameters(), other, strict=True):
                p.data.copy_(value)
        else:
            for p, value in zip(model.parameters(), other, strict=True):
                p.data = value
    loss = model(**batch(device)).loss
    fresh = llama(device=device)
    fresh.load_state_dict(model.state_dict())
    hf_coat.apply_coat(fresh)
    assert torch.equal(loss, fresh(**batch(device)).loss)


def test_cached_codes_give_the_same_gradients(device):
    runs = []
    for cache_weights in (True, False):
        model = llama(device=device)
        hf_coat.apply_coat(model, CoatConfig(cache_weights=cache_weights))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(2):
            accumulate(model, optimizer, 4, **batch(device))
        runs.append(model.state_dict())
    for name, value in runs[0].items():
        # Apart where a code under its row's scale was rounded and is subnormal under the largest one.
        assert relative(value, runs[1][name]) < 1e-3, name


def test_before_any_optimizer_nothing_is_kept(monkeypatch, device):
    monkeypatch.setattr(WeightCache, "_stepped", False)
    model = llama(device=device)
    hf_coat.apply_coat(model)
    for _ in range(3):
        loss = model(**batch(device)).loss
        loss.backward()
        for p in model.parameters():
            p.data -= 0.1 * p.grad  # moves no version counter
    assert all(m.coat_merged.cache._codes is None for m in model.modules() if getattr(m, "coat_merged", None))


# --- every way of use ---


@pytest.mark.parametrize("preset", ["lean", "paper"])
def test_train_and_eval_agree_and_frozen_parts_get_no_gradients(device, preset):
    model = llama(device=device)
    hf_coat.apply_coat(model, hf_coat.HfCoatConfig.resolve(preset).model)
    model.train()
    trained = model(**batch(device)).loss
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(**batch(device)).loss, trained, rtol=1e-5)
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1.mlp" in name or name.endswith("q_proj.weight"))
    loss, grads = gradients(model.train(), **batch(device))
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() and g.any() for g in grads.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preset", ["lean", "paper"])
def test_gpu_a_layer_of_usual_size(preset, dtype):
    """Products large enough for the widest tiles. A code is 3 % from its value (their root mean square), and what
    reaches the first weights has been through a dozen products: 10 % in all, on the CPU too."""
    heads = dict(num_attention_heads=16, num_key_value_heads=16)
    model = llama(dtype, "cuda", hidden_size=2048, intermediate_size=5504, num_hidden_layers=1, **heads)
    inputs = batch("cuda", length=1160)
    plain_loss, plain = gradients(copy.deepcopy(model), **inputs)
    hf_coat.apply_coat(model, hf_coat.HfCoatConfig.resolve(preset).model)
    loss, coat = gradients(model, **inputs)
    assert loss == pytest.approx(plain_loss, rel=1e-2)
    apart = {name: relative(coat[name], grad) for name, grad in plain.items()}
    assert {name: value for name, value in apart.items() if not value <= 0.15} == {}


def test_reentrant_checkpoint_of_an_mlp(device):
    model = llama(device=device)
    hf_coat.apply_coat(model)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 5, 64, device=device, requires_grad=True)
    mlp(x).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(mlp, x, use_reentrant=True).sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("preset", ["lean", "paper"])
def test_a_converted_model_compiles(preset):
    torch._dynamo.reset()
    model = llama(num_hidden_layers=1)
    hf_coat.apply_coat(model, hf_coat.HfCoatConfig.resolve(preset).model)
    loss, grads = gradients(model, **batch())
    compiled = torch.compile(model, backend="aot_eager")
    loss_compiled, grads_compiled = gradients(compiled, **batch())
    assert loss_compiled == pytest.approx(loss, rel=1e-4)
    for name, grad in grads.items():  # attention residuals are not in FP8 there, q, k and v not one product
        assert relative(grads_compiled[f"_orig_mod.{name}"], grad) < 0.15, name


def test_a_norms_output_in_wider_rows():
    """Qwen2-VL's merger reads four tokens as one row: its linear cannot make that again from the norm's rows."""

    class Merger(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.proj = nn.LayerNorm(32), nn.Linear(128, 48)

        def forward(self, x):
            return self.proj(self.norm(x).view(-1, 128))

    torch.manual_seed(0)
    merger, x = Merger(), torch.randn(16, 32)
    merger(x).square().sum().backward()
    exact = merger.proj.weight.grad.clone()
    merger.zero_grad()
    hf_coat.apply_coat(merger)
    merger(x).square().sum().backward()
    # an operand in E4M3 is off by 1/16 of a value at most; there are three of them
    assert (merger.proj.weight.grad - exact).norm() < 3 / 16 * exact.norm()


# --- what models do with converted modules ---


def test_results_may_be_changed_in_place(device):
    model = llama(device=device)
    hf_coat.apply_coat(model, EVERYTHING)
    layer, x = model.model.layers[0], torch.randn(3, 64, device=device, requires_grad=True)
    linear, gate = layer.self_attn.q_proj, Gate("silu", False)
    for call in (layer.input_layernorm, layer.mlp, linear, lambda x: coat_activation(x, None, gate)):
        (dx,) = torch.autograd.grad((call(x) * 2).sum(), x)
        (changed,) = torch.autograd.grad(call(x).mul_(2).sum(), x)
        assert torch.equal(changed, dx) and dx.any()


def test_a_norms_output_that_was_changed_is_quantized_again(device):
    model = llama(device=device)
    hf_coat.apply_coat(model, EVERYTHING)
    layer, x = model.model.layers[0], torch.randn(3, 64, device=device, requires_grad=True)
    linear = layer.self_attn.o_proj
    y = layer.input_layernorm(x)
    changed = layer.input_layernorm(x).mul_(3)
    assert torch.equal(linear(changed), linear((y * 3).detach()))


@pytest.mark.parametrize("activations", ["auto", "lean", "paper", "bf16"])
def test_only_the_biases_of_an_mlp_train(device, activations):
    model = llama(device=device, mlp_bias=True)
    plain = copy.deepcopy(model)
    hf_coat.apply_coat(model, CoatConfig(activations=activations, frozen_weights="bf16"))
    for each in (model, plain):
        for name, p in each.named_parameters():
            p.requires_grad_("mlp" in name and name.endswith("bias"))
    (_, grads), (_, expected) = (gradients(each, **batch(device)) for each in (model, plain))
    assert len(grads) == 6 and grads.keys() == expected.keys()
    assert all(relative(grads[name], expected[name]) < 0.2 for name in grads)


def test_an_input_of_another_width_is_refused(device):
    model = llama(device=device)
    hf_coat.apply_coat(model, EVERYTHING)
    for module in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp):
        for width in (48, 80):
            with pytest.raises(RuntimeError, match=f"64 input features was given {width}"):
                module(torch.randn(2, width, device=device))


def test_calls_by_keyword(device):
    model = llama(device=device)
    hf_coat.apply_coat(model, EVERYTHING)
    layer, x = model.model.layers[0], torch.randn(2, 64, device=device)
    assert torch.equal(layer.self_attn.o_proj(input=x), layer.self_attn.o_proj(x))
    assert torch.equal(layer.input_layernorm(hidden_states=x), layer.input_layernorm(x))
    assert torch.equal(layer.mlp(x=x), layer.mlp(x))
    assert torch.equal(model.lm_head(input=x), model.lm_head(x))


@pytest.mark.parametrize("register", ["register_full_backward_pre_hook", "register_full_backward_hook"])
def test_backward_hooks_inside_an_mlp_are_called(device, register):
    model, seen = llama(device=device), []
    hf_coat.apply_coat(model, EVERYTHING)
    getattr(model.model.layers[0].mlp.gate_proj, register)(lambda *_: seen.append(True))
    gradients(model, **batch(device))
    assert seen == [True]


def test_global_hooks_see_every_linear(device):
    model, seen = llama(device=device), []
    hf_coat.apply_coat(model, EVERYTHING)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        gradients(model, **batch(device))
    finally:
        handle.remove()
    assert sum(isinstance(module, nn.Linear) for module in seen) == 15


# An attention of transformers 4.57 and before, and of remote code, here with a bias on its scores that trains.
BRACKETS = """
def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
    if hasattr(self, "bias"):
        attention_mask = self.bias[None]
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
    assert self.config._attn_implementation in ALL_ATTENTION_FUNCTIONS
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights
"""


@pytest.mark.parametrize("biased", [False, True])
def test_attentions_of_older_modeling_files(device, biased):
    names = dict(vars(llama_modeling))
    exec(BRACKETS, names)  # its global names are to be those of a modeling file
    cls = type("OwnAttention", (llama_modeling.LlamaAttention,), {"forward": names["forward"]})
    model = llama(device=device)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = cls(model.config, index).to(device)
        if biased:
            layer.self_attn.bias = nn.Parameter(torch.randn(4, 12, 12, device=device))
    plain = copy.deepcopy(model)
    report = hf_coat.apply_coat(model, EVERYTHING)
    assert report.converted["model.layers.0.self_attn"].startswith("CoatAttention: q, k and v in FP8")
    (loss, grads), (expected_loss, expected) = (gradients(each, **batch(device)) for each in (model, plain))
    assert loss == pytest.approx(expected_loss, rel=1e-2) and grads.keys() == expected.keys()
    assert all(relative(grads[name], expected[name]) < 0.3 for name in grads)


def test_attention_weights_keep_their_gradient(device):
    """Of an attention function that returns them, which the registry may hold."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    model = llama(device=device)
    transformers.AttentionInterface.register("with_weights", attend)
    model.set_attn_implementation("with_weights")
    hf_coat.apply_coat(model, EVERYTHING)
    attention = model.model.layers[0].self_attn
    x, angles = torch.randn(2, 6, 64, device=device), [torch.randn(1, 6, 16, device=device) for _ in range(2)]
    _, weights = attention(x, angles, None)
    weights.square().sum().backward()
    assert attention.q_proj.weight.grad.any()


@pytest.mark.parametrize(
    "cls,gate_stands", [(MambaRMSNormGated, "before"), (Qwen3NextRMSNormGated, "after")], ids=["before", "after"]
)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float32])
def test_gated_norms_of_mixed_dtypes(device, cls, gate_stands, weight_dtype, x_dtype, gate_dtype):
    """A state space model's scan gives FP32 beside a gate in BF16, behind which its norm stands."""
    torch.manual_seed(0)
    group = {"group_size": 64} if "group_size" in inspect.signature(cls).parameters else {}
    norm = cls(64, **group).to(device, weight_dtype)
    nn.init.normal_(norm.weight)
    state = norm_state(norm)
    assert state.gate == gate_stands
    ours = convert(copy.deepcopy(norm), CoatNorm, EVERYTHING, state)
    x, gate = (torch.randn(2, 5, 64).to(device, dtype).requires_grad_() for dtype in (x_dtype, gate_dtype))
    y, expected = ours(x, gate=gate), norm(x, gate)
    exact = {weight_dtype, x_dtype} == {torch.float32}
    assert y.dtype == expected.dtype and relative(y, expected) < (1e-5 if exact else 8e-3)
    dy = torch.randn_like(y)
    grads, truth = (
        torch.autograd.grad(out, (x, gate, module.weight), dy) for out, module in ((y, ours), (expected, norm))
    )
    for grad, true in zip(grads, truth, strict=True):
        assert grad.dtype == true.dtype and relative(grad, true) < 0.06
