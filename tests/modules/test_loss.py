"""The head fused with the loss: its numbers against float64, its logits against plain ones, its way in and out."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_coat import memory
from hf_coat.modules import loss as page
from hf_coat.modules.loss import CoatHead, DeferredLogits, fuse_loss, unfuse_loss

V, H, T = 64, 32, 12

needs_library = pytest.mark.skipif(
    page.library("cuda" if torch.cuda.is_available() else "cpu") is None, reason=f"needs {page.REMEDY}"
)


def llama(device="cpu", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=H, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=V)
    settings = dict(num_key_value_heads=2, attn_implementation="eager") | sizes | changes
    return AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=dtype).to(device).train()


def twins(device="cpu", dtype=torch.float32, **changes):
    """A fused model and what it was before."""
    plain = llama(device, dtype, **changes)
    fused = copy.deepcopy(plain)
    assert "fused linear" in fuse_loss(fused)["lm_head"]
    return fused, plain


def batch(device="cpu", rows=3, ignored=4):
    ids = torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids.clone()
    labels[:, :ignored] = -100
    return {"input_ids": ids, "labels": labels}


def deferred(logits) -> bool:
    """Whether these are logits that nothing has computed."""
    return isinstance(logits, DeferredLogits) and logits.product.value is None


def distance(value, truth) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def assert_same_gradients(fused, plain, bound):
    """Up to ``bound``, relative to the gradient, or to a thousandth of the model's largest where it should be zero."""
    expected = dict(plain.named_parameters())
    least = 1e-3 * max(p.grad.norm() for p in expected.values() if p.grad is not None)
    for name, p in fused.named_parameters():
        q = expected.pop(name)
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert (p.grad.double() - q.grad.double()).norm() <= bound * max(q.grad.norm(), least), name
    assert not expected


# --- the numbers ---


@pytest.fixture(params=["torch", "torch in pieces", "liger"])
def library(request, device):
    if request.param == "liger":
        pytest.importorskip("liger_kernel")
        if device == "cpu":
            pytest.skip("needs a CUDA device: Triton's interpreter takes minutes, and truncates to BF16")
        return page._by_liger
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        pytest.skip("needs torch 2.13 or newer")
    return {"torch": page._by_torch, "torch in pieces": page._by_torch_in_pieces}[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 37, 2500])  # 2500 rows are several pieces
@pytest.mark.parametrize("bias", [True, False])
def test_against_float64(library, device, dtype, n, bias):
    generator = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, H, generator=generator), torch.randn(100, H, generator=generator) / 3
    operands = [hidden, weight] + ([torch.randn(100, generator=generator)] if bias else [])
    operands = [t.to(device, dtype) for t in operands]
    target = torch.randint(100, (n,), generator=generator).to(device)

    def reference(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in operands]
        logits = F.linear(*leaves)
        loss = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), target)
        return loss.detach(), torch.autograd.grad(loss, leaves)

    hidden, weight, bias = (*operands, None)[:3]
    needs = (True, True, bias is not None)
    with torch.no_grad():
        loss, gradients = library(hidden.detach(), weight.detach(), bias, target, needs)
    (true_loss, truth), (plain_loss, plain) = reference(torch.float64), reference(dtype)

    # A piece's loss by torch is the sum of two non-negative numbers that are rounded one after the other.
    # Any other's is a mean over logits that were rounded to BF16, 2**-8 of one with either sign, of many rows.
    roundings = 1e-6 if dtype == torch.float32 else 2.0**-14
    if library is page._by_torch_in_pieces and dtype == torch.bfloat16:
        roundings = 2 * 2.0**-8
    assert loss.dtype == torch.float32
    assert (loss - true_loss).abs() <= 2 * (plain_loss - true_loss).abs() + roundings * true_loss
    for value, true, same_dtype in zip(gradients, truth, plain, strict=False):
        assert value.dtype == dtype and value.shape == true.shape
        floor = 1e-6 if dtype == torch.float32 else 2.0**-9  # where the reference happens to be exact
        assert distance(value, true) <= max(2 * distance(same_dtype, true), floor)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed(library, device, needs):
    hidden, weight, bias = (torch.randn(*shape, device=device) for shape in ((2500, H), (V, H), (V,)))
    target = torch.randint(V, (2500,), device=device)
    with torch.no_grad():
        _, everything = library(hidden.detach(), weight.detach(), bias.detach(), target, (True, True, True))
        _, gradients = library(hidden.detach(), weight.detach(), bias.detach(), target, needs)
    for value, expected, needed in zip(gradients, everything, needs, strict=True):
        assert torch.equal(value, expected) if needed else value is None


@needs_library
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("items", [None, 20, torch.tensor(20)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3 * 2.0**-8)])
def test_a_models_loss_and_gradients(device, dtype, bound, items, tied):
    fused, plain = twins(device, dtype, tie_word_embeddings=tied)
    given = batch(device) | ({} if items is None else {"num_items_in_batch": items})
    outputs, expected = fused(**given), plain(**given)
    assert deferred(outputs.logits) and outputs.loss.dtype == expected.loss.dtype == torch.float32
    assert distance(outputs.loss.detach(), expected.loss.detach()) <= bound
    outputs.loss.backward()
    expected.loss.backward()
    assert_same_gradients(fused, plain, bound)
    assert torch.equal(outputs.logits, expected.logits), "they can still be read"


@needs_library
def test_arguments_of_the_loss(device):
    fused, plain = twins(device)
    given = batch(device)
    shifted = given["labels"].roll(-2, -1)
    for arguments in ({"shift_labels": shifted}, {"ignore_index": 7}, {"use_cache": False}, {"label_smoothing": 0.1}):
        logits = fused(**given).logits
        arguments = {"labels": given["labels"].clamp(min=7), "vocab_size": V} | arguments
        value = fused.loss_function(logits, **arguments)
        assert deferred(logits) is ("label_smoothing" not in arguments)
        assert torch.allclose(value, plain.loss_function(plain(**given).logits, **arguments))
    with pytest.raises(ValueError, match="batch_size"):  # as transformers
        fused(**given | {"labels": given["labels"][:, 1:]})


@needs_library
def test_gradients_of_the_logits(device):
    """Whoever detaches the logits or asks for their gradient gets what they asked for."""
    fused, plain = twins(device)
    arguments = {"labels": batch(device)["labels"], "vocab_size": V}
    assert not fused.loss_function(fused(**batch(device)).logits.detach(), **arguments).requires_grad
    with torch.no_grad():
        logits = plain(**batch(device)).logits
    logits.requires_grad_()
    plain.loss_function(logits, **arguments).backward()
    seen = []
    kept, watched = (fused(**batch(device)).logits for _ in range(2))
    kept.retain_grad()
    watched.register_hook(seen.append)
    for asked in (kept, watched):
        fused.loss_function(asked, **arguments).backward()
    for gradient in (kept.grad, *seen):
        assert torch.allclose(gradient, logits.grad, atol=1e-7)
    assert len(seen) == 1


@needs_library
@pytest.mark.parametrize("items", [None, 7, 0, torch.tensor(0)])
def test_no_label_at_all(device, items):
    fused, plain = twins(device)
    given = batch(device, ignored=T) | ({} if items is None else {"num_items_in_batch": items})
    losses = [model(**given).loss for model in (fused, plain)]
    assert torch.equal(losses[0].isnan(), losses[1].isnan()) and (items != 7 or losses[0] == 0)
    for loss in losses:
        loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in fused.lm_head.parameters())


@needs_library
def test_positions_without_a_label_are_not_multiplied(device, monkeypatch):
    fused, _ = twins(device)
    rows, real = [], page.library(device)
    monkeypatch.setattr(page, "library", lambda kind: lambda *a: (rows.append(len(a[0])), real(*a))[1])
    fused(**batch(device, rows=3, ignored=4))
    assert rows == [3 * (T - 4)]


@pytest.mark.gpu
def test_the_count_of_labels_does_not_wait_for_the_forward(monkeypatch):
    """Between the labels' arrival and the library's turn nothing synchronises, whatever was queued meanwhile."""
    got = []

    def product(hidden, weight, bias, target, needs):
        got.append(target.clone())
        return (hidden @ weight.t()).float().mean(), [torch.zeros_like(hidden), torch.zeros_like(weight), None]

    fused, given = llama("cuda", attn_implementation="sdpa"), batch("cuda")  # eager masks synchronise
    if "fused linear" not in fuse_loss(fused)["lm_head"]:
        pytest.skip(f"needs {page.REMEDY}")
    monkeypatch.setattr(page, "library", lambda kind: product)
    for first in (True, False):
        torch.cuda.set_sync_debug_mode("default" if first else "error")  # the first call compiles and allocates
        try:
            fused(**given).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    shifted = given["labels"][:, 1:].flatten()
    assert all(torch.equal(target, shifted[shifted != page.IGNORED]) for target in got) and len(got) == 2
    given["labels"][:, :6] = page.IGNORED
    fused(**given)
    assert len(got[-1]) < len(got[0])


@needs_library
def test_accumulated_gradients(device):
    """Two microbatches with ``num_items_in_batch`` make one batch."""
    fused, plain = twins(device)
    whole = batch(device, rows=4)
    items = (whole["labels"][:, 1:] != -100).sum()
    for part in (slice(0, 1), slice(1, 4)):
        fused(**{name: t[part] for name, t in whole.items()}, num_items_in_batch=items).loss.backward()
    plain(**whole).loss.backward()
    assert_same_gradients(fused, plain, 1e-5)


@needs_library
@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_frozen_parts(device, frozen):
    fused, plain = twins(device)
    for model in (fused, plain):
        getattr(model, frozen).requires_grad_(False)
        model(**batch(device)).loss.backward()
    assert_same_gradients(fused, plain, 1e-5)


@needs_library
def test_autocast(device):
    fused, plain = twins(device)
    with torch.autocast(device, torch.bfloat16):
        outputs, expected = fused(**batch(device)), plain(**batch(device))
    assert deferred(outputs.logits) and outputs.logits.dtype == expected.logits.dtype == torch.bfloat16
    outputs.loss.backward()
    expected.loss.backward()
    assert_same_gradients(fused, plain, 2 * 2.0**-8)
    assert torch.equal(outputs.logits, expected.logits)


# --- the memory ---


@needs_library
def test_no_tensor_of_all_logits(device):
    """Every allocation of a step, inside the library too."""
    vocabulary = 32768 if device == "cuda" else 2048  # there a GEMM may take 32 MiB of its own
    fused, plain = twins(device, vocab_size=vocabulary)
    ids = torch.randint(vocabulary, (1, 3000), device=device)
    activity = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] * (device == "cuda"))]

    def largest(hidden, head, loss_of):
        with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
            loss_of(head(hidden), ids, vocabulary).backward()
        return max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")

    hidden = torch.randn(1, 3000, H, device=device, requires_grad=True)
    assert largest(hidden, plain.lm_head, plain.loss_function) >= 3000 * vocabulary * 4
    assert largest(hidden, fused.lm_head, fused.loss_function) <= 1024 * vocabulary * 4, (
        "the logits of a piece, in FP32"
    )


@needs_library
def test_what_is_kept_for_the_backward(device):
    fused, _ = twins(device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        loss = fused(**batch(device)).loss
    assert not any(t.shape[-1:] == (V,) for t in saved), "no logits"
    gradients = [t for t in saved if t.shape in ((V, H), (3 * (T - 4), H)) and not isinstance(t, nn.Parameter)]
    assert len(gradients) >= 2, "the library's gradients are seen by whoever counts or moves what is saved"
    loss.backward()


@needs_library
def test_moved_to_the_host_and_back(device):
    fused, plain = twins(device)
    with torch.autograd.graph.save_on_cpu():
        fused(**batch(device)).loss.backward()
    plain(**batch(device)).loss.backward()
    assert_same_gradients(fused, plain, 1e-5)


@needs_library
def test_the_weights_gradient_is_not_copied(device):
    fused, _ = twins(device)
    loss = fused(**batch(device)).loss
    kept = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert fused.lm_head.weight.grad.data_ptr() == kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 7), (300, 4096), (3, 10000), (77,), (0, 4)])
def test_gradients_times_that_of_the_loss(device, shape, dtype):
    values, factor = torch.randn(shape, device=device).to(dtype), torch.tensor(0.3, device=device)
    truth = (values.double() * factor.double()).float().to(dtype)  # a product of the two fits a float64
    page.multiply(values, factor)
    assert torch.equal(values, truth)


@needs_library
def test_a_retained_graph(device):
    fused, _ = twins(device)
    loss = 3 * fused(**batch(device)).loss
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in fused.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(fused.parameters(), once, strict=True))


@needs_library
def test_predicted_memory(device):
    fused, plain = twins(device, vocab_size=4096)
    given = {name: t % V for name, t in batch(device, ignored=1).items()}
    predicted = memory.predict(fused, given)
    measured = memory.measure(fused, given, torch.optim.SGD(fused.parameters()))
    assert predicted.activations == measured.activations
    assert predicted.activations - 4096 * H * 4 < memory.predict(plain, given).activations - 3 * T * 4096 * 4
    assert deferred(fused(**given).logits), "the model itself was left as it was"


@needs_library
def test_a_prediction_of_what_will_run_on_a_gpu(monkeypatch):
    """Where the CPU has no library and the GPU has one, logits are as little predicted as they will be there."""
    fused, given = llama(), batch()
    fuse_loss(fused)
    expected = memory.predict(fused, given).activations
    monkeypatch.setattr(page, "library", lambda kind: page._by_liger if kind == "cuda" else None)
    monkeypatch.setattr(page, "_library_name", lambda head: "liger_kernel")
    assert memory.predict(fused, given).activations == expected


# --- the logits ---


def entropy(logits):
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


class Bypass(torch.autograd.Function):
    """A function with a backward of its own, as kernels have."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp().sum()

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0].exp()


def in_place(logits):
    logits.div_(2)
    logits[..., 0] = 0.5
    logits.view(-1, V).add_(1)
    return logits.float().log_softmax(-1)


READERS = {
    "cross entropy": lambda x: F.cross_entropy(x.float().view(-1, V), batch(x.device)["input_ids"].flatten()),
    "entropy": entropy,
    "softcap": lambda x: torch.tanh(x / 30) * 30,
    "in place": in_place,
    "autograd.Function": Bypass.apply,
    "detached": lambda x: x.detach() * x.clone(),
    "cast": lambda x: x.float().to(torch.bfloat16).double().contiguous() * 2,
    "joined": lambda x: torch.cat([x, x], dim=1).logsumexp(-1),
    "checkpointed": lambda x: checkpoint(entropy, x, use_reentrant=False),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", READERS)
def test_whatever_reads_them_gets_them(device, name):
    """Value and gradients are those of ``nn.Linear``; to the bit where the products' order of summation is one."""
    results = []
    for model in twins(device):
        value = READERS[name](model(**batch(device)).logits)
        value.double().pow(2).sum().backward()
        results.append([value.detach(), *(p.grad for p in model.parameters())])
    for value, expected in zip(*results, strict=True):
        assert type(value) is torch.Tensor and value.dtype == expected.dtype
        assert torch.equal(value, expected) or (device == "cuda" and distance(value, expected) <= 1e-6)


@needs_library
def test_what_computes_nothing(device):
    fused, plain = twins(device, torch.bfloat16)
    logits, expected = fused(**batch(device)).logits, plain(**batch(device)).logits
    assert (logits.shape, logits.dtype, logits.device) == (expected.shape, expected.dtype, expected.device)
    assert logits.requires_grad and logits.stride() == expected.stride() and len(logits) == len(expected)
    for same in (logits.detach(), logits.clone(), logits.contiguous(), logits.float(), logits.float().bfloat16()):
        assert deferred(same)
    assert not logits.detach().requires_grad and "DeferredLogits" in repr(logits) and deferred(logits)
    assert torch.equal(logits.float().bfloat16(), expected)


@needs_library
def test_what_reads_memory(device):
    fused, plain = twins(device)
    expected = plain(**batch(device)).logits.detach()

    def logits():
        return fused(**batch(device)).logits

    stream = io.BytesIO()
    torch.save(logits().detach(), stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream), expected) and torch.equal(copy.deepcopy(logits().detach()), expected)
    assert logits().tolist() == expected.tolist() and logits()[0, 0, 0].item() == expected[0, 0, 0].item()
    assert (logits().detach().cpu().numpy() == expected.cpu().numpy()).all()
    values = logits()
    address = values.data_ptr()
    assert address and values.product.value.data_ptr() == address


@needs_library
def test_logits_of_weights_that_are_gone(device):
    fused, _ = twins(device)
    logits = fused(**batch(device)).logits
    with torch.no_grad():
        fused.lm_head.weight.mul_(2)
    for gone in (logits, logits.float(), logits.detach(), logits.clone()):
        with pytest.raises(RuntimeError, match=r"before optimizer\.step"):
            gone.argmax(-1)


@needs_library
def test_when_they_are_deferred(device):
    fused, _ = twins(device)
    ids, labels = batch(device).values()
    assert deferred(fused(ids, None, None, None, None, labels).logits), "labels by position"
    assert deferred(fused.forward(input_ids=ids, labels=labels).logits), "past the hooks"
    assert type(fused(input_ids=ids).logits) is torch.Tensor, "no labels"
    with torch.no_grad():
        assert type(fused(input_ids=ids, labels=labels).logits) is torch.Tensor
    with pytest.raises(RuntimeError, match="(?i)long|int"):
        fused(input_ids=ids.float(), labels=labels)
    assert type(fused(input_ids=ids).logits) is torch.Tensor, "after a call that failed"
    outputs = fused.eval()(input_ids=ids, labels=labels)
    assert type(outputs.logits) is torch.Tensor and outputs.loss.requires_grad
    assert fused.train().generate(ids[:1], max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, T + 2)


@needs_library
def test_gradient_checkpointing(device):
    fused, plain = twins(device)
    fused.gradient_checkpointing_enable()
    fused(**batch(device)).loss.backward()
    plain(**batch(device)).loss.backward()
    assert_same_gradients(fused, plain, 1e-5)


@needs_library
def test_compiled(device):
    fused, plain = twins(device, num_hidden_layers=1)
    outputs = torch.compile(fused, backend="eager")(**batch(device))
    assert torch.allclose(outputs.loss, plain(**batch(device)).loss)
    outputs.loss.backward()


# --- in and out ---


@needs_library
def test_in_and_out_again(device):
    plain = llama(device)
    names = vars(plain).keys(), vars(plain.lm_head).keys()
    fused = copy.deepcopy(plain)
    first = fuse_loss(fused)
    assert fuse_loss(fused) == first and len(fused._forward_pre_hooks) == 1
    assert "fused with the loss" in str(fused.lm_head)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert unfuse_loss(fused) == {"lm_head": "nn.Linear"} and unfuse_loss(fused) == {}
    assert (vars(fused).keys(), vars(fused.lm_head).keys()) == names and type(fused.lm_head) is nn.Linear
    assert not fused._forward_pre_hooks and not fused._forward_pre_hooks_with_kwargs
    assert fused.loss_function is plain.loss_function
    fused.loss_function = plain.loss_function  # one that the user has set comes back
    fuse_loss(fused)
    unfuse_loss(fused)
    assert vars(fused)["_loss_function"] is plain.loss_function


@needs_library
def test_copies_are_their_own(device):
    fused, _ = twins(device)
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    for other in (copy.deepcopy(fused), torch.load(stream, weights_only=False)):
        assert deferred(other(**batch(device)).logits)
        assert type(other(batch(device)["input_ids"]).logits) is torch.Tensor
        unfuse_loss(other)
        assert not other._forward_pre_hooks and type(other.lm_head) is nn.Linear
        assert deferred(fused(**batch(device)).logits)


@needs_library
def test_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
    assert "fused linear" in fuse_loss(model)["lm_head"]
    assert memory.predict(model, (2, 8)).activations > 0


TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
TINY |= dict(num_key_value_heads=2, head_dim=16, pad_token_id=0, max_position_embeddings=64)


@needs_library
@pytest.mark.parametrize(
    ("kind", "changes", "outcome"),
    [
        ("llama", {}, "fused"),
        ("gpt2", {}, "fused"),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0}, "fused"),
        ("mixtral", {"output_router_logits": True}, "fused"),
        ("gemma2", {}, "final_logit_softcapping=30.0"),
        ("gemma2", {"final_logit_softcapping": None}, "fused"),
        ("cohere", {}, "logit_scale=0.0625"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
        ("granite", {"logits_scaling": 1.0}, "fused"),
    ],
)  # fmt: skip
def test_families(device, kind, changes, outcome):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY | changes)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(device)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fused = copy.deepcopy(plain.train()).train()
    [(name, said)] = fuse_loss(fused).items()
    assert outcome in said and fused.get_submodule(name) is fused.get_output_embeddings()
    outputs = [model(**batch(device)) for model in (fused, plain)]
    assert deferred(outputs[0].logits) is (outcome == "fused") is isinstance(fused.get_submodule(name), CoatHead)
    for o in outputs:
        o.loss.backward()
    assert_same_gradients(fused, plain, 1e-5)


@needs_library
def test_changed_logits_of_an_unknown_kind(device):
    """What no list of names could know: the logits are computed, and the numbers stay right."""
    fused, plain = twins(device)
    for model in (fused, plain):
        model.lm_head.register_forward_hook(lambda module, args, logits: logits * 0.5)
        model(**batch(device)).loss.backward()
    assert_same_gradients(fused, plain, 1e-6)


@needs_library
def test_a_vision_language_model(device):
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TINY), image_token_index=63, image_seq_length=4
    )
    torch.manual_seed(0)
    plain = transformers.LlavaForConditionalGeneration(config).to(device).train()
    fused = copy.deepcopy(plain)
    assert "fused linear" in fuse_loss(fused)["lm_head"]
    given = {name: t.clamp(max=62) for name, t in batch(device).items()}
    given["pixel_values"] = torch.randn(3, 3, 8, 8, device=device)
    given["input_ids"][:, 1:5] = 63
    outputs = [model(**given) for model in (fused, plain)]
    assert deferred(outputs[0].logits)
    for o in outputs:
        o.loss.backward()
    assert_same_gradients(fused, plain, 1e-5)


def custom_loss(logits, labels, vocab_size, **kwargs):
    return logits.sum()


def replace_forward(model):
    model.lm_head.forward = model.lm_head.forward


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "loss_function", custom_loss), "the loss is custom_loss, not transformers'"),
        (lambda m: setattr(m, "lm_head", nn.Sequential(m.lm_head)), "is a Sequential, not a plain nn.Linear"),
        (replace_forward, "forward was replaced"),
    ],
)
def test_what_is_left_alone(change, reason):
    model = llama()
    change(model)
    [said] = fuse_loss(model).values()
    assert said.startswith("loss not fused: ") and reason in said
    assert not model._forward_pre_hooks and not any(isinstance(m, CoatHead) for m in model.modules())


def test_models_without_such_a_loss():
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=16, num_layers=1, num_heads=2)
    )
    assert fuse_loss(t5) == {
        "lm_head": "loss not fused: T5ForConditionalGeneration.forward computes a loss of its own"
    }
    bert = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    assert "not fused" in fuse_loss(transformers.BertForMaskedLM(bert))["cls.predictions.decoder"]
    assert fuse_loss(transformers.BertForSequenceClassification(bert)) == {}
    assert fuse_loss(nn.Linear(4, 4)) == {}


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(page, "library", lambda kind: None)
    said = fuse_loss(llama())["lm_head"]
    assert "pip install liger-kernel" in said and "torch 2.13" in said


@needs_library
def test_on_a_device_without_a_library(device, monkeypatch):
    fused, plain = twins(device)
    monkeypatch.setattr(page, "library", lambda kind: None)
    outputs = fused(**batch(device))
    assert type(outputs.logits) is torch.Tensor and torch.equal(outputs.loss, plain(**batch(device)).loss)


def test_pieces():
    assert page._pieces(1024, 32, 100) == 1 and page._pieces(1025, 32, 100) == 2
    assert page._pieces(8192, 4096, 32000) == 4 and page._pieces(8192, 4096, 128256) == 4
    assert page._pieces(65536, 4096, 32000) == 8


BF16_TRAINED, BF16_FROZEN, FP32 = (torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)


@pytest.mark.parametrize(
    ("kind", "tokens", "size", "summed"),
    [
        (BF16_TRAINED, 1024, 32, False),  # one piece: 128 * 32 is the vocabulary
        (BF16_TRAINED, 2048, 16, True),  # 2048 tokens are more than twice the width: two pieces
        (BF16_FROZEN, 1024, 32, False),
        (FP32, 2048, 16, True),
    ],
)
def test_what_liger_is_told(monkeypatch, kind, tokens, size, summed):
    """How large a piece may be, and to sum in FP32; versions that cannot be told the first sum in FP32 always."""
    (dtype, trained), told = kind, []

    def kernel(**options):
        told.append({name: options[name] for name in (page.SIZE, "accum_dtype") if name in options})
        return torch.zeros(()), None, None, None, None, None, None

    for arguments in ({page.SIZE, "accum_dtype"}, {"accum_dtype"}):
        monkeypatch.setattr(page, "_liger", lambda arguments=arguments: (kernel, arguments))
        operands = torch.zeros(tokens, 128, dtype=dtype), torch.zeros(4096, 128, dtype=dtype)
        page._by_liger(*operands, None, torch.zeros(tokens, dtype=torch.int64), (True, trained, False))
    in_fp32 = {"accum_dtype": torch.float32}
    assert told == [{page.SIZE: size} | (in_fp32 if summed else {}), in_fp32]


@pytest.mark.parametrize(
    ("tokens", "hidden", "pieces"), [(8192, 4096, 1), (8193, 4096, 5), (2048, 1024, 1), (2049, 1024, 3)]
)
def test_one_piece_takes_no_more_memory(monkeypatch, tokens, hidden, pieces):
    monkeypatch.setattr(page, "_liger", lambda: (None, {page.SIZE}))
    rows, weight = torch.empty(tokens, hidden, device="meta"), torch.empty(32000, hidden, device="meta")
    rows, weight = rows.bfloat16(), weight.bfloat16()
    assert page._pieces_by_liger(rows, weight, (True, True, False)) == pieces
    if pieces == 1:  # all logits against the FP32 sum
        assert 2 * tokens * 32000 <= 4 * weight.numel()


def test_labels_that_are_all_there():
    target = torch.tensor([3, 1, 2])
    labels = target.as_subclass(page._AllThere)
    there = labels != page.IGNORED
    assert type(there) is torch.Tensor and there.device.type == "cpu" and there.sum().item() == 3
    part = labels[1:].contiguous()
    assert type(part) is torch.Tensor and torch.equal(part, target[1:]) and part.data_ptr() == target[1:].data_ptr()


def test_liger_does_not_wait_for_the_gpu(device):
    pytest.importorskip("liger_kernel")
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    target = torch.randint(V, (2500,), device=device)
    operands = [torch.randn(*shape, device=device, dtype=torch.bfloat16) for shape in ((2500, H), (V, H))]

    def call():
        with torch.no_grad():
            return page._by_liger(*(t.detach() for t in operands), None, target, (True, True, False))

    expected = call()[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = call()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(loss, expected)
