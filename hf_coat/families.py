"""How the parts of a model are recognised that COAT leaves alone: data and structure, no model code.

A linear is left alone when its precision costs little memory and much accuracy (heads, routers), when it is not a
plain ``nn.Linear``, or when it is too narrow for FP8 tensor cores.
"""

from collections.abc import Iterator

from torch import nn

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


def why_kept(model: nn.Module) -> dict[str, str]:
    """For each linear that must stay as it is, by qualified name: the reason."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads, adapters = list(head_prefixes(model)), adapter_prefixes(model)
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if any(name.startswith(prefix) for prefix in adapters):
            reasons[name] = "adapter weights of PEFT"
        elif any(name.startswith(whole) and not name.startswith(backbone) for whole, backbone in heads):
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
