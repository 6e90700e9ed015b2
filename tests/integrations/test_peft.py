"""LoRA on a frozen FP8 base, the PEFT way: any order of calls, PEFT's own files, its merging, its variants."""

import copy
import weakref

import peft
import pytest
import torch
import trl
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration, Trainer
from transformers import TrainingArguments as PlainArguments

import hf_coat
from hf_coat import CoatConfig, memory
from hf_coat.modules import CoatFrozenLinear, CoatLinear, CoatLora

ALL = "all-linear"
IDS = torch.arange(48).view(3, 16) * 5


def fill(model, seed=0):
    """Adapters that do something: PEFT starts with b = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(p.shape, generator=generator) * 0.1
                p.copy_(p * (1 + noise) if "magnitude" in name else noise)
    return model


def lora(model, seed=0, **settings):
    return fill(get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ALL} | settings)), seed)


def stored(model):
    return sum(isinstance(m, CoatFrozenLinear) for m in model.modules())


def fused(model):
    return sum(isinstance(m, CoatLora) for m in model.modules())


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS.to(model.device)).logits.float().cpu()


def step(model):
    """Loss and the gradients of what trains, by name."""
    model.train().zero_grad()
    ids = IDS.to(model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


def joined(grads):
    return torch.cat([grad.flatten() for grad in grads.values()])


# A product of two operands with three bits of mantissa is 3.7 % off in the mean; a logit has passed four of these in a
# row, whose errors are independent of each other.
NEAR = 0.075


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def folder(tools, tmp_path):
    tools.tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder, config=None):
    how = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, **how, dtype=torch.bfloat16)


@pytest.fixture
def calls(monkeypatch):
    """How often the fused function ran, and with how many linears each time."""
    from hf_coat.modules import linear

    seen, inner = [], linear.coat_lora

    def counted(x, weight, *args, **kwargs):
        seen.append(len(weight) if isinstance(weight, list) else 1)
        return inner(x, weight, *args, **kwargs)

    monkeypatch.setattr(linear, "coat_lora", counted)
    return seen


# --- Loading ---


class _Most(TorchDispatchMode):
    """The most bytes of BF16 matrices that live at one time, among the results of operations."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 and t.dim() == 2 and not t.is_meta:
                storage = t.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.gone, storage._cdata)
        return result

    def gone(self, key):
        self.now -= self.live.pop(key, 0)


def test_the_base_is_stored_while_it_is_read(folder):
    with _Most() as most:
        model = load(folder, CoatConfig(frozen_weights="fp8"))
    plain = load(folder)
    assert stored(model) == 14 and model.dtype == torch.bfloat16
    unconverted = model.lm_head.weight.nbytes + model.model.embed_tokens.weight.nbytes
    largest = max(m.weight.numel() * 2 for m in model.modules() if isinstance(m, CoatFrozenLinear))
    # a weight as it is read and, where the file's dtype or device is another, as it is cast
    assert most.most <= unconverted + 2 * largest < unconverted + 14 * 2 * 64 * 32
    hf_coat.apply_coat(plain.requires_grad_(False), CoatConfig(frozen_weights="fp8"))
    for name, p in plain.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    assert torch.equal(logits(model), logits(plain))


def test_a_full_save_is_plain_and_says_what_it_holds(folder, tmp_path, heard):
    model = load(folder, CoatConfig(frozen_weights="fp8"))
    assert "14 frozen weights stored as FP8; saves and remove_coat hold what FP8 made of them" in heard
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved/model.safetensors", "pt") as file:
        assert file.metadata()["coat_frozen_weights"] == "14 weights hold values that were rounded to FP8"
    saved, plain = load_file(tmp_path / "saved/model.safetensors"), load_file(folder / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in saved.items()} == {n: (t.dtype, t.shape) for n, t in plain.items()}
    again = load(tmp_path / "saved")  # as its config.json says
    assert stored(again) == 14 and torch.equal(logits(again), logits(model))
    base = model.dequantize()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not stored(base) and torch.equal(base.get_parameter(name), saved[name])


# --- Every order of calls ---


def by_hand(folder, tmp_path, tools):
    model = lora(load(folder))
    hf_coat.apply_coat(model)
    return model


def converted_first(folder, tmp_path, tools):
    model = lora(load(folder, CoatConfig(frozen_weights="fp8")))
    hf_coat.apply_coat(model, CoatConfig(frozen_weights="fp8"))
    return model


def stock_trainer(folder, tmp_path, tools):
    model = lora(load(folder, CoatConfig()))
    Trainer(model, PlainArguments(**tools.short_run(tmp_path)), train_dataset=tools.random_tokens())
    return model


def trainer(folder, tmp_path, tools):
    model = lora(load(folder))
    Trainer(model, hf_coat.TrainingArguments(**tools.short_run(tmp_path), coat="lean"),
            train_dataset=tools.random_tokens())  # fmt: skip
    return model


def adapter_onto_converted(folder, tmp_path, tools):
    lora(load(folder)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(
        load(folder, CoatConfig(frozen_weights="fp8")), tmp_path / "adapter", is_trainable=True
    )
    hf_coat.apply_coat(model)
    return model


@pytest.mark.parametrize("make", [by_hand, converted_first, stock_trainer, trainer, adapter_onto_converted])
def test_every_order_gives_the_same_model(make, folder, tmp_path, tools, calls):
    model = make(folder, tmp_path, tools)
    expected = by_hand(folder, tmp_path, tools).to(model.device)
    assert stored(model) == fused(model) == 14
    grads, calls[:] = step(model), sorted(calls)
    assert calls == [1] * 4 + [2] * 2 + [3] * 2, "o and down; gate and up; q, k and v; of two layers"
    for name, grad in step(expected).items():
        assert torch.equal(grads[name], grad), name


def test_trl_with_a_peft_config(folder, tmp_path, tools):
    import datasets

    args = trl.SFTConfig(**tools.short_run(tmp_path, max_length=16, bf16=False, use_cpu=True), dataset_kwargs={
        "skip_prepare_dataset": True})  # fmt: skip
    rows = datasets.Dataset.from_dict({"input_ids": [list(range(i, i + 16)) for i in range(16)]})
    tokenizer = tools.tiny_tokenizer()
    trained = trl.SFTTrainer(
        model=load(folder, CoatConfig(frozen_weights="fp8")), args=args, train_dataset=rows,
        processing_class=tokenizer, peft_config=LoraConfig(r=4, target_modules=ALL),
    )  # fmt: skip
    assert stored(trained.model) == fused(trained.model) == 14
    trained.train()
    assert all(p.abs().sum() > 0 for name, p in trained.model.named_parameters() if "lora_B" in name)


def test_close_to_peft_on_the_unrounded_base(folder):
    """FP8 has 3 bits of mantissa: products of rounded operands differ by a few percent, their sums by less."""
    ours, theirs = lora(load(folder)), lora(load(folder))
    hf_coat.apply_coat(ours)
    assert distance(logits(ours), logits(theirs)) < NEAR
    ours, theirs = step(ours), step(theirs)
    assert ours.keys() == theirs.keys() and len(ours) == 28
    assert distance(joined(ours), joined(theirs)) < 0.1


# --- Files, merging ---


def test_linears_whose_dtype_the_model_reads_are_not_stored():
    """T5 casts to the dtype of a weight; an MLP with dropout inside runs T5's own code."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 128}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).bfloat16()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q", "v"])).train()
    report = hf_coat.apply_coat(model)
    assert sum(what.endswith(", stored as FP8") for what in report.converted.values()) > 0
    wo = next(what for name, what in report.converted.items() if name.endswith("DenseReluDense.wo"))
    assert wo.endswith("not stored as FP8: T5DenseActDense reads its weight")
    ids = torch.arange(20).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_adapters_are_pefts_own_and_go_both_ways(folder, tmp_path):
    """Stock PEFT on the BF16 base, and PEFT here, differ by the rounding of the base and of the activations alone."""
    ours = by_hand(folder, tmp_path, None)
    ours.save_pretrained(tmp_path / "ours")
    stock = lora(load(folder))
    stock.save_pretrained(tmp_path / "stock")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()

    loaded = PeftModel.from_pretrained(load(folder), tmp_path / "ours")
    assert torch.equal(logits(loaded), logits(stock))
    twin = load(folder, CoatConfig(frozen_weights="fp8")).dequantize()  # a BF16 base of the values that ours has
    rounded = PeftModel.from_pretrained(twin, tmp_path / "ours")
    here = PeftModel.from_pretrained(load(folder, CoatConfig(frozen_weights="fp8")), tmp_path / "stock")
    hf_coat.apply_coat(here)
    assert torch.equal(logits(here), logits(ours))
    assert distance(logits(ours), logits(rounded)) < NEAR and distance(logits(ours), logits(loaded)) < NEAR


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_merging(folder, settings):
    model = lora(load(folder), **settings)
    hf_coat.apply_coat(model)
    before, q_proj = logits(model), model.base_model.model.model.layers[0].self_attn.q_proj
    bits, base = q_proj.base_layer.weight.clone(), q_proj.base_layer.dequantize()

    model.merge_adapter()
    assert type(q_proj.base_layer) is torch.nn.Linear and not stored(model)
    if not settings.get("use_dora"):
        delta = q_proj.get_delta_weight("default")
        assert torch.equal(q_proj.base_layer.weight, (base + delta.float()).to(base.dtype))
    merged = logits(model)
    assert distance(merged, before) < NEAR
    report = hf_coat.apply_coat(model)  # as a Trainer does
    assert sum("adapters are merged into it" in why for why in report.kept.values()) == 14
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert stored(model) == 14 and torch.equal(q_proj.base_layer.weight, bits)
    assert torch.equal(logits(model), before), "exactly what it was"

    # the same mathematics without FP8 of the activations: what is merged equals what is not, within BF16's rounding
    plain = copy.deepcopy(model)
    hf_coat.remove_coat(plain)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, (CoatLora, CoatLinear)) for m in merged.modules())
    hf_coat.remove_coat(merged)
    assert distance(logits(merged), logits(plain)) < 2 * 2.0**-7


def test_merging_what_breaks_leaves_the_base_alone(folder):
    model = lora(load(folder), target_modules=["o_proj"])
    hf_coat.apply_coat(model)
    o_proj = model.base_model.model.model.layers[0].self_attn.o_proj
    bits = o_proj.base_layer.weight.clone()
    with torch.no_grad():
        o_proj.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(o_proj.base_layer.weight, bits) and isinstance(o_proj.base_layer, CoatFrozenLinear)


def test_undoing(folder):
    model = lora(load(folder))
    report = hf_coat.apply_coat(model)
    assert "14 CoatLora" in report.summary() and "14 frozen weights stored" in report.summary()
    report = hf_coat.remove_coat(model)
    assert not stored(model) and not fused(model)
    assert sum("as FP8 had it" in what for what in report.converted.values()) == 14
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(q_proj) is peft.tuners.lora.Linear and type(q_proj.base_layer) is torch.nn.Linear


# --- Which way a layer takes ---


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 32}},
        {"lora_dropout": 0.5},
        {"target_modules": ["k_proj", "down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"bias": "all"},
    ],
    ids=["dora", "lora_bias", "patterns", "dropout", "some", "modules_to_save", "embedding", "bias"],
)
def test_settings_of_lora(folder, tools, settings):
    """All give what PEFT gives on a plain base of the same values, within FP8's rounding of the activations."""

    def with_biases(model):
        torch.manual_seed(1)
        for m in model.modules():
            if isinstance(m, torch.nn.Linear) and m is not model.lm_head:
                m.bias = torch.nn.Parameter(torch.randn(m.out_features).to(m.weight.dtype) * 0.1)
        return model

    biased = "bias" in settings or "lora_bias" in settings
    base = with_biases(load(folder)) if biased else load(folder)
    ours, theirs = lora(base, **settings), lora(copy.deepcopy(base), **settings)
    hf_coat.apply_coat(ours)
    assert distance(logits(ours), logits(theirs)) < NEAR
    if settings.get("lora_dropout"):
        torch.manual_seed(0)
        first = step(ours)
        torch.manual_seed(0)
        assert all(torch.equal(grad, first[name]) for name, grad in step(ours).items())
        ours.eval()
        theirs.eval()
    a, b = step(ours), step(theirs)
    assert a.keys() == b.keys()
    if not settings.get("lora_dropout"):
        assert distance(joined(a), joined(b)) < 0.1


def test_several_adapters_switching_and_disabling(folder, calls):
    model, theirs = lora(load(folder)), lora(load(folder))
    for m in (model, theirs):
        m.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_alpha=4))
        fill(m, seed=1)
    hf_coat.apply_coat(model)
    base = load(folder)
    hf_coat.apply_coat(base.requires_grad_(False), CoatConfig(frozen_weights="fp8"))
    for name in ("default", "other", "default"):
        for m in (model, theirs):
            m.set_adapter(name)
        assert distance(logits(model), logits(theirs)) < NEAR and calls
        with model.disable_adapter():
            calls.clear()
            assert torch.equal(logits(model), logits(base)) and not calls
    for m in (model, theirs):
        m.base_model.set_adapter(["default", "other"])
    calls.clear()
    assert distance(logits(model), logits(theirs)) < NEAR
    assert calls and set(calls) <= {1, 2, 3}, "fused where only one of the two is there"
    for m in (model, theirs):
        m.delete_adapter("other")
        m.set_adapter("default")
    assert distance(logits(model), logits(theirs)) < NEAR
    unloaded = model.unload()
    assert stored(unloaded) == 14 and torch.equal(logits(unloaded), logits(base))


def test_adapters_in_one_batch(folder):
    model, theirs = lora(load(folder)), lora(load(folder))
    for m in (model, theirs):
        m.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        fill(m, seed=1).eval()
    hf_coat.apply_coat(model)
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        a, b = (m(IDS, adapter_names=names).logits.float() for m in (model, theirs))
    assert distance(a, b) < NEAR


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_of_an_adapters_parts_are_called(folder, part, kind):
    model, seen = lora(load(folder), lora_dropout=0.2), []
    hf_coat.apply_coat(model)
    module = model.base_model.model.model.layers[1].mlp.up_proj.get_submodule(f"{part}.default")
    getattr(module, f"register_{kind}_hook")(lambda *_: seen.append(True))
    step(model)
    assert seen == [True]


def test_the_paper_preset_takes_pefts_way(folder, calls):
    model = lora(load(folder))
    hf_coat.apply_coat(model, hf_coat.HfCoatConfig.resolve("paper").model)
    assert stored(model) == 14 and distance(logits(model), logits(lora(load(folder)))) < 0.1
    assert step(model) and not calls


def test_a_converted_model_prints(folder):
    model = lora(load(folder, CoatConfig()))
    hf_coat.apply_coat(model)
    assert "lora.CoatLinear(" in repr(model) and "keeps=lean" in repr(model)


# --- Training ---


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_accumulation(folder, reentrant):
    model = lora(load(folder), lora_dropout=0.2)
    hf_coat.apply_coat(model)
    model.enable_input_require_grads()  # as checkpointing does; the first norm then keeps its input in FP8
    torch.manual_seed(5)
    expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    grads = step(model)
    assert all(torch.equal(grads[name], grad) for name, grad in expected.items()), "the same masks"
    ids = IDS.to(model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    assert not torch.equal(model.get_parameter(next(iter(grads))).grad, grads[next(iter(grads))])


def test_what_is_kept_between_forward_and_backward(folder):
    def kept(model):
        model.train()
        batch = {"input_ids": IDS, "labels": IDS}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        return memory.measure(model, batch, optimizer)

    ours, theirs = lora(load(folder)), lora(load(folder))
    hf_coat.apply_coat(ours)
    ours, theirs = kept(ours), kept(theirs)
    assert ours.activations < 0.7 * theirs.activations
    assert ours.weights < theirs.weights and ours.gradients == theirs.gradients


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_states_of_adapters(folder, rank):
    """What CoatAdamW says of LoRA: below FP32 states but for a b of rank 1, which has a scale for each value."""
    model = lora(load(folder), r=rank)
    hf_coat.apply_coat(model)
    step(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = hf_coat.CoatAdamW(trained, lr=1e-3)
    optimizer.step()
    took = {p: sum(t.nbytes for name, t in optimizer.state[p].items() if name != "step") for p in trained}
    for name, p in model.named_parameters():
        if "lora_B" in name:
            assert took[p] == (2 + 8 / rank) * p.numel()
            assert (took[p] < 8 * p.numel()) == (rank > 1)
        elif "lora_A" in name:  # groups of 128 of rows of 64 and 96
            assert took[p] == 2 * p.numel() + 8 * rank
    assert sum(took.values()) < 8 * sum(p.numel() for p in trained)


def test_prepare_model_for_kbit_training_leaves_the_codes_alone(folder):
    model = load(folder, CoatConfig(frozen_weights="fp8"))
    bits = model.model.layers[0].mlp.up_proj.weight.clone()
    model = lora(prepare_model_for_kbit_training(model))
    hf_coat.apply_coat(model)
    assert torch.equal(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight, bits)
    assert stored(model) == 14 and step(model)


# --- What does not work with a stored base ---


def test_initialisations_that_need_the_weight(folder):
    """Before the base is stored they work; afterwards PEFT refuses them itself."""
    model = get_peft_model(load(folder), LoraConfig(r=4, target_modules=ALL, init_lora_weights="pissa"))
    hf_coat.apply_coat(model)
    assert distance(logits(model), logits(load(folder))) < 0.1
    base = load(folder, CoatConfig(frozen_weights="fp8"))
    for how, error in (("pissa", "float32, float16, or bfloat16"), ("olora", "Unsupported data type")):
        with pytest.raises(TypeError, match=error):
            get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=ALL, init_lora_weights=how))
    with pytest.raises(RuntimeError, match="floating point"):
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]))
