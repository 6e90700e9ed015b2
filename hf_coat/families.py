"""How the parts of a model are recognised: data, structure and numbers; no model code.

A linear is left alone when its precision costs little memory and much accuracy (heads, routers), when it is not a
plain ``nn.Linear``, or when it is too narrow for FP8 tensor cores.

A norm or an MLP is what its forward computes, not what it is called: names propose what it may be, and a probe runs
the module's own forward on a few random numbers, with small random weights on the CPU, and compares. What no form
explains is left alone.
"""

import dis
import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from coat_kernels import ACTIVATIONS, activation, norm
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .modules import (
    AttentionState,
    CoatFrozenLinear,
    CoatLinear,
    Converted,
    LoraState,
    MLPState,
    NormState,
    heads,
    is_attention,
    plain_rotary,
)

ROUTERS = ("gate", "router")  # last part of the name of a mixture-of-experts router; "router" also inside it
NARROWEST = 16  # FP8 tensor cores read 16 values at a time; narrower linears would be mostly padding


def is_router(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last in ROUTERS or "router" in last


def head_prefixes(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs (model, its backbone) of qualified name prefixes; what is in the first but not in the second is a head.

    Hugging Face models say by ``base_model_prefix`` which of their children is the backbone.
    """
    for name, module in model.named_modules():
        backbone = getattr(module, "base_model_prefix", "")
        if backbone in dict(module.named_children()):  # not getattr: wrappers pass attributes of what they wrap on
            start = f"{name}." if name else ""
            yield start, f"{start}{backbone}."


def adapter_prefixes(model: nn.Module) -> list[str]:
    """Qualified name prefixes of adapter weights. PEFT's tuner layers list them in ``adapter_layer_names``."""
    return [
        f"{name}.{part}.".lstrip(".")
        for name, module in model.named_modules()
        for part in getattr(module, "adapter_layer_names", ())
    ]


def is_adapted(model: nn.Module) -> bool:
    """Whether adapters of PEFT are what trains of this model."""
    return bool(getattr(model, "peft_config", None)) or any(hasattr(m, "adapter_layer_names") for m in model.modules())


def is_lora(module: nn.Module) -> bool:
    """Whether this is PEFT's LoRA layer for a linear."""
    return (own_class(module).__module__, own_class(module).__name__) == ("peft.tuners.lora.layer", "Linear")


def lora_state(module: nn.Module) -> LoraState | None:
    """What a LoRA layer over a converted linear needs; None for any other module."""
    if not is_lora(module):
        return None
    if isinstance(module, Converted):
        return module.coat_state
    return LoraState() if isinstance(module.base_layer, CoatLinear) else None


def why_not_stored(model: nn.Module) -> dict[nn.Linear, str]:
    """The linears whose weights must not be stored as FP8 even where they are frozen: why."""
    reasons = {}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    times = Counter(id(m.weight) for m in linears)
    reasons |= {m: "it shares its weight" for m in linears if times[id(m.weight)] > 1}
    for module in model.modules():
        if hasattr(module, "adapter_layer_names"):
            base = getattr(module, "base_layer", None)
            if isinstance(base, nn.Linear) and not is_lora(module):
                reasons[base] = _needs_weight(module)
            continue
        for name, child in module.named_children():
            linear = getattr(child, "base_layer", child)
            if isinstance(linear, nn.Linear) and _reads_weight(own_class(module).forward, name):
                reasons[linear] = f"{own_class(module).__name__} reads its weight"
    return reasons


@functools.cache
def _reads_weight(forward: Callable, name: str) -> bool:
    """Whether a module's forward has ``self.<name>.weight`` in it, as T5's does, which casts to its dtype."""
    if not inspect.isfunction(forward):
        return False
    names = [instruction.argval for instruction in dis.get_instructions(forward)]
    return (name, "weight") in itertools.pairwise(names)


def _needs_weight(tuner: nn.Module) -> str:
    return f"{type(tuner).__module__.rpartition('.')[0]}.{type(tuner).__name__} may need its weight"


def not_storable(name: str, reason: str) -> str:
    """What to say where a linear is stored as FP8 that must not be."""
    return (
        f"{name} is stored as FP8, but {reason}: load or convert the model with "
        "CoatConfig(frozen_weights='bf16'), which leaves frozen weights as they are"
    )


LORA_VARIANTS = ("ALoraLinearVariant", "DoraLinearVariant", "MontecloraLinearVariant")
READ_FIRST = ("FrodModel", "TinyLoraModel")  # tuners that look at weights before they build a layer


def refuse_tuner(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Stop PEFT where it builds an adapter layer that would read the codes of a stored weight as values.

    A hook on the registration of modules, which :func:`watch_tuners` sets, so that ``get_peft_model`` itself fails;
    and ``add_adapter`` on layers that are there, where a variant of LoRA registers what it needs before it reads.

    ============================  ====================================================================================
    On a base stored as FP8       Tuners of PEFT 0.21, each tried on a tiny Llama
    ============================  ====================================================================================
    trains                        LoRA: plain, rsLoRA, DoRA, aLoRA, MonteCLoRA, QALoRA; started as gaussian, EVA or
                                  LoRA-GA, or from an adapter's file
    trains, wraps no linear       prompt, multitask prompt and prefix tuning, p-tuning, CPT, cartridges, LN tuning,
                                  trainable tokens; adaption prompt, which knows uint8; Shadow on decoder layers
    refused here                  AdaLoRA, AdaMSS, BEFT, BOFT, C3A, DEFT, DeLoRA, FourierFT, FRoD, GraLoRA, HiRA, HRA,
                                  IA3, Lily, LoHa, LoKr, MiSS, OFT, OSF, PEANuT, Poly, PSOFT, PVeRA, RandLora, RoAd,
                                  Shadow on a linear, SHiRA, SuperTuning, TinyLoRA, UniLoRA, VB-LoRA, VeRA, WaveFT;
                                  LoRA as KaSA or VeLoRA, and with ``target_parameters``
    refused by PEFT               GLoRA on any linear that is not exactly ``nn.Linear``; LoRA started as PiSSA, OLoRA,
                                  MiCA or orthogonal, or as BD-LoRA, which need a weight in floating point
    ============================  ====================================================================================

    Some of the refused ones would train rightly, but none can merge; DEFT, HiRA, HRA, PEANuT, UniLoRA and VeLoRA would
    compute with the codes and say nothing. They train on a base in BF16, multiplied in FP8. X-LoRA was not tried.

    Raises:
        ValueError: Naming the layer, the tuner and the option that keeps frozen weights in BF16.
    """
    tuner = module if name == "base_layer" or "base_layer" in module._modules else child
    if name == "model" and type(module).__name__ in READ_FIRST:
        stored = next((m for m in child.modules() if isinstance(m, CoatFrozenLinear)), None)
        if stored is not None:
            raise ValueError(not_storable(stored.coat_name, _needs_weight(module)))
    if not hasattr(tuner, "adapter_layer_names"):
        return
    base = child if name == "base_layer" else getattr(tuner, "base_layer", None)
    while hasattr(base, "base_layer"):
        base = base.base_layer
    if not isinstance(base, CoatFrozenLinear):
        return
    if not is_lora(tuner):
        raise ValueError(not_storable(base.coat_name, _needs_weight(tuner)))
    variants = {type(v).__name__ for v in getattr(tuner, "lora_variant", {}).values()}
    if not variants <= set(LORA_VARIANTS):
        reason = f"{', '.join(sorted(variants.difference(LORA_VARIANTS)))} of LoRA may need its weight"
        raise ValueError(not_storable(base.coat_name, reason))


@functools.cache
def watch_tuners() -> None:
    """Have :func:`refuse_tuner` called in this process from now on."""
    register_module_module_registration_hook(refuse_tuner)


def why_kept(model: nn.Module) -> dict[str, str]:
    """For each linear that must stay as it is, by qualified name: the reason."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    beside, adapters = list(head_prefixes(model)), adapter_prefixes(model)
    outputs = {id(head) for _, head, _ in heads(model)}
    merged = {id(m.base_layer) for m in model.modules() if is_lora(m) and m.merged}
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if any(name.startswith(prefix) for prefix in adapters):
            reasons[name] = "adapter weights of PEFT"
        elif id(module) in merged:
            reasons[name] = "adapters are merged into it, which FP8 would round away"
        elif id(module) in outputs or any(
            name.startswith(whole) and not name.startswith(backbone) for whole, backbone in beside
        ):
            reasons[name] = "head"
        elif id(module.weight) in embeddings:
            reasons[name] = "shares its weight with an embedding"
        elif is_router(name):
            reasons[name] = "router"
        elif min(module.weight.shape) < NARROWEST:
            reasons[name] = f"narrower than {NARROWEST}"
        elif "forward" in vars(module) and type(module) is nn.Linear:  # a converted one's hooks hold its own forward
            reasons[name] = "its forward was replaced (an offloading hook?)"
    return reasons


# Linears that read one input, by name; where the parent is an attention that has no second input.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
OTHER_INPUTS = ("key_value_states", "encoder_hidden_states", "cross_attention_states", "encoder_outputs")

# Names of an MLP's linears: those that read its input, and the last one (None where it is another module's).
MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("gate_up_proj",), "down_proj"),
    (("Wi",), "Wo"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("c_fc",), "c_proj"),
    (("up_proj",), "down_proj"),
    (("wi",), "wo"),
    (("fc_in",), "fc_out"),
    (("lin1",), "lin2"),
    (("linear_fc1",), "linear_fc2"),
    (("dense",), None),
)
EPSILONS = ("variance_epsilon", "eps", "norm_eps", "epsilon")


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as the model has it."""
    return module.coat_original if isinstance(module, Converted) else type(module)


def together(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the children of an attention that read one input and can run as one linear."""
    if not is_attention(own_class(module).forward):
        return None
    if any(name in inspect.signature(own_class(module).forward).parameters for name in OTHER_INPUTS):
        return None
    children = dict(module.named_children())
    return next((names for names in TOGETHER if all(name in children for name in names)), None)


def attention_state(module: nn.Module) -> AttentionState | str | None:
    """How an attention module can be converted; why it is not; or None for any other module."""
    forward = own_class(module).forward
    if not is_attention(forward):
        return None
    if any("position_bias" in name for name in (*forward.__code__.co_names, *forward.__code__.co_varnames)):
        return "an attention with a bias on its scores"
    eager = getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager"
    return AttentionState(rotary=_plain_rotary(forward), eager=eager)


def norm_state(module: nn.Module) -> NormState | str | None:
    """Which norm a module computes; why it cannot be told; or None where it does not look like a norm at all."""
    parameters = dict(module.named_parameters(recurse=False))
    if (
        "norm" not in own_class(module).__name__.lower()
        or any(module.children())
        or any(True for _ in module.buffers())
    ):
        return None
    if not set(parameters) <= {"weight", "bias"} or any(p.dim() != 1 for p in parameters.values()):
        return None
    eps = next((name for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)
    if eps is None:
        return "a norm without an epsilon"
    weight = parameters.get("weight")
    width = 64 if weight is None else weight.shape[0]
    if weight is None and isinstance(module, nn.LayerNorm):
        width = module.normalized_shape[-1]
    dtype = torch.float32 if weight is None else weight.dtype
    settings = repr([(n, v) for n, v in sorted(vars(module).items()) if isinstance(v, (bool, int, float, str, tuple))])
    key = (own_class(module), width, dtype, eps, settings, *parameters)
    if key not in _NORMS:
        _NORMS[key] = _probe_norm(module, width, dtype, eps, parameters)
    form = _NORMS[key]
    return "a norm of another form" if form is None else NormState(*form, eps=eps)


_NORMS: dict[tuple, tuple | None] = {}


def _on_cpu(probe: Callable) -> Callable:
    """Run a probe with tensors on the CPU, whatever the default device is while a model is being loaded."""

    @functools.wraps(probe)
    def run(*args):
        with torch.device("cpu"):
            return probe(*args)

    return run


def _stand_in(module: nn.Module, **held) -> Callable:
    """The forward of the module's own class on a copy of it that holds other parameters or children."""
    cls = own_class(module)
    twin = cls.__new__(cls)
    vars(twin).update(vars(module))
    vars(twin).update(held)
    return functools.partial(cls.forward, twin)


_plain_rotary = functools.cache(_on_cpu(plain_rotary))


@_on_cpu
def _probe_norm(module, width, dtype, eps_name, parameters) -> tuple | None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

    eps = getattr(module, eps_name)
    held = {name: random(width) for name in parameters}
    run = _stand_in(
        module, _parameters={"weight": None, "bias": None} | held if isinstance(module, nn.LayerNorm) else held
    )
    gated = [p.name for p in inspect.signature(own_class(module).forward).parameters.values()][2:3] in (
        ["gate"],
        ["z"],
    )
    values = random(2, 3, width, dtype=torch.float32)  # what normalises another dimension than the last one fails
    # Ordinary tokens, and some so small that the epsilon decides. A gated norm may read the FP32 of a scan.
    kinds = [torch.bfloat16] if dtype == torch.bfloat16 and not gated else [torch.bfloat16, torch.float32]
    xs = [scale * values.to(kind) for kind in kinds for scale in (1.0, eps**0.5)]
    gates = [random(*x.shape, dtype=x.dtype) for x in xs] if gated else [None] * len(xs)
    best, fewest = None, 1
    for center, offset, round_first, promote, gate in itertools.product(
        (False, True),
        (0.0, 1.0) if "weight" in held else (0.0,),
        (True, False),
        (True, False),
        ("after", "before") if gated else (None,),
    ):
        mismatches = 0
        for x, z in zip(xs, gates, strict=True):
            weight, bias = held.get("weight"), held.get("bias")
            out = torch.promote_types(x.dtype, weight.dtype) if promote and weight is not None else x.dtype
            inner = activation(z, x, act="silu").h.view(x.shape) if gate == "before" else x
            ours = norm(
                inner, weight, bias, eps=eps, center=center, offset=offset, round_first=round_first, out_dtype=out
            ).y.view(x.shape)
            if gate == "after":
                ours = activation(z.to(ours.dtype), ours, act="silu").h.view(x.shape).to(out)
            try:
                with torch.no_grad():
                    theirs = run(x) if z is None else run(x, z)
            except (TypeError, ValueError, RuntimeError, AttributeError):
                return None
            # A step of BF16 is 2**-7 of a value at most; FP32 sums differ in their order, and may cancel.
            step = 2.0**-7 if torch.bfloat16 in (x.dtype, dtype) else 1e-5
            same = isinstance(theirs, torch.Tensor) and theirs.dtype == ours.dtype and theirs.shape == ours.shape
            if not same or not torch.allclose(
                theirs.float(), ours.float(), rtol=step, atol=step * ours.abs().max().item()
            ):
                mismatches = None
                break
            mismatches += (theirs != ours).float().mean().item() / len(xs)
        if mismatches is not None and mismatches < fewest:
            best, fewest = (center, offset, round_first, promote, gate), mismatches
    return best


def mlp_state(module: nn.Module) -> MLPState | str | None:
    """Which MLP a module computes; why it cannot be told; or None where its children are none of an MLP's."""
    children = dict(module.named_children())
    linears = {name for name, child in children.items() if isinstance(getattr(child, "base_layer", child), nn.Linear)}
    for firsts, last in MLPS:
        names = {*firsts, last} - {None}
        if names == linears and not any(True for n, c in children.items() if n not in names for _ in c.parameters()):
            break
    else:
        return None
    if any(isinstance(child, nn.Dropout) and child.p > 0 for child in children.values()):
        return "an MLP with dropout inside"
    wide = [getattr(children[name], "base_layer", children[name]) for name in (firsts[0], last) if name is not None]
    if len(firsts) == 2:
        gated = True
    elif last is None:
        gated = False
    else:
        gated = wide[0].out_features == 2 * wide[1].in_features
        if not gated and wide[0].out_features != wide[1].in_features:
            return "an MLP of another form"
    act = _probe_mlp(module, firsts, last, gated)
    return "an MLP of another form" if act is None else MLPState(firsts, last, act, gated)


@_on_cpu
def _probe_mlp(module, firsts, last, gated) -> str | None:
    """The activation with which the module's own forward is the MLP that its children's names promise."""
    generator = torch.Generator().manual_seed(0)
    plain = {"generator": generator, "dtype": torch.float32}  # whatever is the default while loading
    hidden, inner = 6, 10

    def linear(n_in, n_out):
        made = nn.Linear(n_in, n_out, dtype=torch.float32)
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, **plain))
        return made

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        made = {name: linear(hidden, inner * (2 if gated and len(firsts) == 1 else 1)) for name in firsts}
        if last is not None:
            made[last] = linear(inner, hidden)
        x = torch.randn(5, hidden, **plain)
        parts = [made[name](x) for name in firsts]
        if gated and len(parts) == 1:
            parts = parts[0].chunk(2, dim=-1)
        results = []
        for training in (True, False):
            run = _stand_in(module, _modules={**module._modules, **made}, training=training)
            try:
                results.append(run(x))
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
                return None
        for act in ACTIVATIONS:
            h = activation(parts[0], parts[1] if gated else None, act=act).h
            ours = h if last is None else made[last](h)
            if all(
                isinstance(y, torch.Tensor) and y.shape == ours.shape and torch.allclose(y, ours, atol=1e-5)
                for y in results
            ):
                return act
    return None
