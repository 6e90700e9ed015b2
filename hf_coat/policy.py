"""Which part of a model does what, and which activation policy follows.

In a vision-language model most tokens are image tokens, the vision tower is often frozen, and the loss looks at the
answer alone. Its regions are told by structure, never by a name:

    language    a nested model whose configuration is of the type that ``config.get_text_config()`` has
    vision      another nested model that reads pixels (or samples): a convolution or linear in front of its attention
    projector   what lies between the two: other modules beside them, nested models that read no pixels (a resampler),
                and at the end of a vision tower the mergers, which attend to nothing and give the language's width
    head        the output embeddings, and what stands beside a backbone

A region's policy is what ``CoatConfig.activations`` says for it. Where that says "auto", :data:`AUTO` does:

    vision      lean, with its attentions, which see a few hundred patches: computing them again costs little; a tower
                in which nothing trains rests in BF16, with its rotary embeddings fused: see below
    projector   BF16, linears too: few parameters, whose every error reaches all that the language model sees
    language    lean without its attentions, as models of text alone
    head        BF16, fused with the loss, which skips all positions without a label: no image token meets it

A tower in which nothing trains keeps nothing either way: its speed decides. Quantizing its weights for each forward
takes longer than its faster products save: on an H200 a LLaVA-1.5-7B's step takes 499 ms with its CLIP tower in BF16
and 513 in FP8. Where most of its weights are of linears with a size that is no multiple of 8, whose rows BF16 products
cannot read 16 bytes at a time, FP8 is faster: the MLPs of Qwen2.5-VL-7B's tower have 3420 values inside, whose BF16
products are slow: with the tower in BF16 a step takes 476 ms, converted 420. A tower that is stored as FP8, as
the base of LoRA is, is converted for the bytes.

Image tokens that are large in the residual stream reach no linear behind a norm as such. Where tokens do differ, by
more than 2^12 (the input of an MLP's last linear can), one scale per tensor loses the small ones in the forward, and
the weight gradient, whose tokens always share a scale, loses them where their input is made again from an MLP's gate
and up: benchmarks/modality.py. hf_coat.probe looks for both in the first steps and leaves such linears in BF16.

A patch embedding, the linears in front of a tower's first attention, stays in BF16: it reads raw pixels. What a frozen
region keeps needs no policy: what no gradient passes keeps nothing, and what one passes (from LoRA inside, or from a
projector in front of it) keeps what the input's gradient needs, which is never the input of a frozen linear.
"""

import fnmatch
import math
from collections.abc import Iterator

from torch import nn

from .config import AUTO_POLICY, CoatConfig, FrozenWeights, Keep, Region
from .families import head_prefixes, is_adapted
from .modules import heads, is_attention

# Region (None: a model without regions) -> kind of module -> policy. Kinds that are not named are lean.
AUTO = {
    None: {"attention": Keep.BF16},
    Region.VISION: {},
    Region.PROJECTOR: {"norm": Keep.BF16, "mlp": Keep.BF16, "attention": Keep.BF16},
    Region.LANGUAGE: {"attention": Keep.BF16},
    Region.HEAD: {"attention": Keep.BF16},
}
KINDS = ("norm", "mlp", "attention")  # keys of CoatConfig.activations that are no patterns
ALIGNED = 8  # values of BF16 in the 16 bytes that its products read at a time
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names this module or a parent: part of the dotted path, or with ``*`` as in a shell."""
    return f".{pattern}." in f".{name}." or fnmatch.fnmatchcase(name, pattern)


def is_model(module: nn.Module) -> bool:
    """Whether this is a model of transformers, by itself or inside another: it has a configuration of its own."""
    # not what a wrapper passes on
    return hasattr(type(module), "base_model_prefix") and hasattr(vars(module).get("config"), "get_text_config")


def text_config(module: nn.Module) -> object | None:
    """The part of a model's configuration that is about text, if only a part is: then it has other senses too."""
    try:
        text = module.config.get_text_config()
    except ValueError:  # several
        return None
    return None if text is module.config else text


def _attends(module: nn.Module) -> bool:
    named = "attention" in type(module).__name__.lower() and any(True for _ in module.children())
    return named or isinstance(module, nn.MultiheadAttention) or is_attention(type(module).forward)


def patch_embeddings(tower: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The convolutions and linears in front of the first attention of a tower, by name."""
    for name, module in tower.named_modules():
        if _attends(module):
            return
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            yield name, module


def _mergers(tower: nn.Module, width: int | None) -> Iterator[str]:
    """Children of a tower, or of a list in it, behind its attentions, whose last linear gives the language's width."""
    attended = False
    for name, child in tower.named_children():
        parts = {f"{name}.{i}": part for i, part in enumerate(child)} if isinstance(child, nn.ModuleList) else None
        for path, part in ({name: child} if parts is None else parts).items():
            if any(map(_attends, part.modules())):
                attended = True
                continue
            linears = [module for module in part.modules() if isinstance(module, nn.Linear)]
            if attended and linears and linears[-1].out_features == width:
                yield path


def find_regions(model: nn.Module) -> dict[str, Region]:
    """The roots of a model's regions, by qualified name; a module belongs to the longest that its name begins with.

    Empty for a model that has no senses beside text.
    """
    top = next((item for item in model.named_modules() if is_model(item[1])), None)
    if top is None or text_config(top[1]) is None:
        return {}
    text = text_config(top[1])
    beside = list(head_prefixes(model))
    roots: dict[str, Region] = {}

    def visit(name: str, module: nn.Module) -> None:
        for part, child in module.named_children():
            path = f"{name}.{part}" if name else part
            if is_model(child) and text_config(child) is None:
                if type(child.config) is type(text):
                    roots[path] = Region.LANGUAGE
                elif any(True for _ in patch_embeddings(child)):
                    roots[path] = Region.VISION
                    width = getattr(text, "hidden_size", None)
                    roots.update({f"{path}.{merger}": Region.PROJECTOR for merger in _mergers(child, width)})
                else:
                    roots[path] = Region.PROJECTOR
            elif any(map(is_model, child.modules())):
                visit(path, child)
            elif any(True for _ in child.parameters()):
                is_head = any(f"{path}.".startswith(whole) and not path.startswith(inner) for whole, inner in beside)
                roots[path] = Region.HEAD if is_head else Region.PROJECTOR

    visit(*top)
    roots.update({name: Region.HEAD for name, _, _ in heads(model)})
    return roots


class Policy:
    """What is to be done with each module: what the configuration says, and where it leaves that open, :data:`AUTO`.

    Args:
        model: Any model.
        config: Its ``activations``, ``regions`` and ``modules_to_not_convert`` are read.
    """

    def __init__(self, model: nn.Module, config: CoatConfig):
        self.config, self.roots = config, find_regions(model)
        self.patches = {
            f"{root}.{name}"
            for root, region in self.roots.items()
            if region is Region.VISION
            for name, _ in patch_embeddings(model.get_submodule(root))
        }
        entries = config.activations if isinstance(config.activations, dict) else {}
        self.used = dict.fromkeys([*entries, *config.regions, *(config.modules_to_not_convert or ())], False)
        self.used |= {key: True for key in KINDS if key in entries}  # said of any model
        stored = config.frozen_weights is FrozenWeights.FP8 or is_adapted(model)
        trains = (name for name, p in model.named_parameters() if p.requires_grad)
        frozen = not stored and not any(self.region(name) is Region.VISION for name in trains)
        self.unaligned = self._unaligned(model) if frozen else []
        self.resting = frozen and not self.unaligned

    def _unaligned(self, model: nn.Module) -> list[int]:
        """The sizes of a tower's linears that are no multiples of 8, where most of its weights are of such linears."""
        left = self.config.modules_to_not_convert or ()
        linears = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and self.region(name) is Region.VISION and name not in self.patches
            if name not in self.config.promoted and not any(self._names(pattern, name) for pattern in left)
        ]
        sizes = [(linear.out_features, linear.in_features) for linear in linears]
        odd = [size for size in sizes if any(n % ALIGNED for n in size)]
        most = 2 * sum(map(math.prod, odd)) > sum(map(math.prod, sizes))
        return sorted({n for size in odd for n in size if n % ALIGNED}) if most else []

    def region(self, name: str) -> Region | None:
        """The region of a module; None where the model has none."""
        found = [pattern for pattern in self.config.regions if matches(name, pattern)]
        self.used.update(dict.fromkeys(found, True))
        if found:
            return Region(self.config.regions[found[-1]])
        roots = [root for root in self.roots if f"{name}.".startswith(f"{root}.")]
        return self.roots[max(roots, key=len)] if roots else None

    def _names(self, key: str, name: str) -> bool:
        """Whether a key of the configuration stands for this module: a region or a pattern."""
        return key == self.region(name) or matches(name, key)

    def said(self, name: str, kind: str | None = None) -> str:
        """What ``activations`` says for a module: a policy, or "auto"."""
        if isinstance(self.config.activations, str):
            return self.config.activations
        entries = self.config.activations
        found = [key for key in entries if (key == kind if key in KINDS else self._names(key, name))]
        self.used.update(dict.fromkeys(found, True))
        return entries[found[-1]] if found else AUTO_POLICY

    def keep(self, kind: str, name: str) -> Keep:
        """What a norm, an MLP or an attention keeps."""
        said = self.said(name, kind)
        if said == AUTO_POLICY and self._rests(name):
            return Keep.BF16
        return AUTO[self.region(name)].get(kind, Keep.LEAN) if said == AUTO_POLICY else Keep(said)

    def _rests(self, name: str) -> bool:
        """Whether a module is in a tower that is left in BF16 as nothing in it trains."""
        return self.resting and self.region(name) is Region.VISION

    def excluded(self, name: str, fuses: bool = False) -> str | None:
        """Why a module stays as it is, whatever it is; None for those that may be converted.

        Args:
            name: Of the module.
            fuses: Whether converting it makes fewer kernels of what it computes, without FP8.
        """
        if name in self.config.promoted:
            return self.config.promoted[name]
        found = [pattern for pattern in self.config.modules_to_not_convert or () if self._names(pattern, name)]
        self.used.update(dict.fromkeys(found, True))
        if found:
            return f"excluded by modules_to_not_convert={found[0]!r}"
        if name in self.patches:
            return "patch embedding"
        if self.said(name) == AUTO_POLICY:
            if self.region(name) is Region.PROJECTOR:
                return "projector, in BF16 unless activations names it"
            if self._rests(name) and not fuses:
                return "in a frozen tower, in BF16 unless activations names it"
        return None

    @property
    def unmatched(self) -> list[str]:
        """Patterns and regions of the configuration that no module was asked for with."""
        return [pattern for pattern, used in self.used.items() if not used]

    def describe(self, model: nn.Module) -> dict[str, str]:
        """For each region where it is, whether it trains, and what is done there; empty where there are none."""
        counts: dict[Region, list[int]] = {}
        seen = set()
        for name, p in model.named_parameters(remove_duplicate=False):
            region = self.region(name)
            if region is not None and (region, id(p)) not in seen:
                seen.add((region, id(p)))
                total, trainable = counts.setdefault(region, [0, 0])
                counts[region] = [total + p.numel(), trainable + p.numel() * p.requires_grad]
        told = {}
        for region in Region:
            if region in counts:
                where = ", ".join(root for root, kind in self.roots.items() if kind is region)
                told[region.value] = (
                    f"{where or 'CoatConfig.regions'}: {_trains(*counts[region])}; {self._decision(region)}"
                )
        return told

    def _decision(self, region: Region) -> str:
        said = self.config.activations
        said = said if isinstance(said, str) else said.get(region.value, AUTO_POLICY)
        if region is Region.HEAD:
            return "BF16"
        roots = [root for root, kind in self.roots.items() if kind is region]
        left = self.config.modules_to_not_convert or ()
        if region in left or roots and all(any(matches(root, pattern) for pattern in left) for root in roots):
            return "BF16, as modules_to_not_convert says"
        if said == AUTO_POLICY and region is Region.PROJECTOR:
            return "BF16, as every image token passes it"
        if said == AUTO_POLICY and region is Region.VISION and self.resting:
            return "BF16, which is as lean and faster where nothing trains"
        if self.config.granularity == "tensor":
            named = "lean" if said == AUTO_POLICY else said
            return f"{named}; one scale per tensor: tokens 4,000 times smaller than others lose bits, use 'token'"
        if said != AUTO_POLICY:
            return f"{said}; a scale per token"
        attention = " but for its attentions" if AUTO[region].get("attention") is Keep.BF16 else ""
        sizes = ", ".join(map(str, self.unaligned)) if region is Region.VISION else ""
        faster = f", faster than BF16 where nothing trains: sizes ({sizes}) are no multiples of {ALIGNED}"
        return f"lean{attention}; a scale per token{faster if sizes else ''}"


def _trains(parameters: int, trainable: int) -> str:
    if trainable == 0:
        return f"{parameters:,} parameters, frozen, keeps nothing that no gradient needs"
    return f"{parameters:,} parameters" if trainable == parameters else f"{trainable:,} of {parameters:,} parameters"
