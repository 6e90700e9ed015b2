"""Put COAT into a live model and take it out again: one walker, one report."""

import re
from collections import Counter
from dataclasses import asdict, dataclass, field

import torch
from coat_kernels import Granularity
from torch import nn

from .config import AllGather, CoatConfig, FrozenWeights, Keep
from .families import (
    attention_state,
    is_adapted,
    lora_state,
    mlp_state,
    norm_state,
    not_storable,
    together,
    watch_tuners,
    why_kept,
    why_not_stored,
)
from .functional import WeightCache
from .modules import (
    AttentionState,
    CoatAttention,
    CoatFrozenLinear,
    CoatHead,
    CoatLinear,
    CoatLora,
    CoatMLP,
    CoatNorm,
    Converted,
    Merged,
    MLPState,
    NormState,
    convert,
    fuse_loss,
    gather_codes,
    gather_values,
    unfuse_loss,
)
from .policy import Policy
from .report import conversion_table, format_bytes

STORED = ", stored as FP8"  # in the report, of a frozen weight
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0), Blackwell (10, 0) and (12, 0)


@dataclass
class ConversionReport:
    """What :func:`apply_coat` or :func:`remove_coat` did.

    Attributes:
        converted: Module name -> what it is now.
        kept: Name of a linear, norm, MLP or attention that stays as it was -> why.
        uncovered: Class of the other modules that hold parameters -> how many modules and parameters COAT does not
            touch.
        unmatched: Entries of ``modules_to_not_convert``, ``activations`` and ``regions`` that name nothing of this
            model.
        regions: Region of a vision-language model -> where it is, whether it trains, and what its policy is.
        gathered: What FSDP2 gathers of the converted linears' weights; empty where there is one process.
    """

    converted: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    regions: dict[str, str] = field(default_factory=dict)
    gathered: str = ""

    def to_dict(self) -> dict:
        return asdict(self)

    def summary(self) -> str:
        """A few lines: how many modules were converted, what was kept and why, what is not covered."""
        kinds = Counter(re.split("[,:]", what)[0] for what in self.converted.values())
        converted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines = [f"{converted or 'nothing'} converted, {len(self.kept)} modules kept"]
        if self.kept:
            reasons = Counter(self.kept.values())
            lines.append("kept: " + ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common()))
        stored = sum(STORED in what for what in self.converted.values())
        if stored:
            lines.append(f"{stored} frozen weights stored as FP8; saves and remove_coat hold what FP8 made of them")
        lines += [f"{region}: {what}" for region, what in self.regions.items()]
        lines += [f"under FSDP2: {self.gathered}"] if self.gathered else []
        if self.uncovered:
            lines.append("not covered: " + ", ".join(f"{kind} ({what})" for kind, what in self.uncovered.items()))
        if self.unmatched:
            lines.append(f"the configuration names what this model has not: {', '.join(self.unmatched)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        """The whole report as a table, with the layers of a stack on one line."""
        return conversion_table(self.to_dict())


def check_devices(model: nn.Module) -> None:
    """Refuse devices and dtypes on which FP8 training cannot work.

    Raises:
        ValueError: For a GPU below compute capability 8.9, a device other than CUDA and CPU, or FP16 weights.
    """
    for device in {p.device for p in model.parameters()}:
        if device.type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < FP8_CAPABILITY:
                raise ValueError(
                    f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
                    "FP8 tensor cores need 8.9 (Ada), 9.0 (Hopper) or newer. Train in BF16 there, or use "
                    "hf_coat.CoatAdamW alone"
                )
        elif device.type not in ("cpu", "meta"):
            raise ValueError(
                f"the model is on {device}; COAT runs on NVIDIA GPUs of compute capability 8.9 or newer "
                "and, for tests, on the CPU"
            )
    halves = [name for name, p in model.named_parameters() if p.dtype == torch.float16]
    if halves:
        raise ValueError(
            f"{halves[0]} is torch.float16 ({len(halves)} parameters are); COAT trains in BF16 or FP32: load the "
            "model with dtype=torch.bfloat16"
        )


def _uncovered(model: nn.Module) -> dict[str, str]:
    """Modules with parameters of their own that are no linears and not converted, by class."""
    modules, parameters = Counter(), Counter()
    for module in model.modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if own and not isinstance(module, (nn.Linear, Converted)):
            modules[type(module).__name__] += 1
            parameters[type(module).__name__] += own
    return {kind: f"{count} modules, {parameters[kind]:,} parameters" for kind, count in modules.items()}


class _Walk:
    """One conversion: the model, what is asked for, and the report that is being written."""

    def __init__(self, model: nn.Module, config: CoatConfig):
        self.model, self.config, self.report = model, config, ConversionReport()
        self.names = {module: name for name, module in model.named_modules()}
        auto = config.frozen_weights is FrozenWeights.AUTO
        self.stores = is_adapted(model) if auto else config.frozen_weights is FrozenWeights.FP8
        self.policy = Policy(model, config)

    def linears(self) -> None:
        reasons, unstored = why_kept(self.model), why_not_stored(self.model)
        needed = next((m for m in unstored if isinstance(m, CoatFrozenLinear)), None)
        if needed is not None and self.stores:
            raise ValueError(not_storable(self.names[needed], unstored[needed]))
        for name, module in list(self.model.named_modules()):
            if not isinstance(module, nn.Linear):
                continue
            if type(module) not in (nn.Linear, CoatLinear, CoatFrozenLinear, CoatHead):
                reason = f"a {type(module).__name__}, not a plain nn.Linear"
            else:
                reason = self.policy.excluded(name) or reasons.get(name)
            if reason is None:
                what = self.store(module, name, unstored.get(module))
                self.report.converted[name] = f"CoatLinear, a scale per {self.config.granularity.value}{what}"
            else:
                if isinstance(module, CoatLinear):
                    module.revert()
                self.report.kept[name] = reason

    def store(self, module: nn.Linear, name: str, unstored: str | None) -> str:
        """Convert a linear, store its weight as FP8 if it is to be, and say so."""
        region = self.policy.region(name)
        if not self.stores or module.weight.requires_grad or unstored:
            if isinstance(module, CoatFrozenLinear):
                module.thaw()
            CoatLinear.convert(module, self.config, region)
            return f", not stored as FP8: {unstored}" if self.stores and unstored else ""
        if isinstance(module, CoatFrozenLinear):
            if (module.coat.granularity, module.coat.power_of_two) == (
                self.config.granularity,
                self.config.power_of_two,
            ):
                module.coat, module.coat_merged, module.coat_region = self.config, None, region
                return STORED
            module.thaw()
        watch_tuners()
        CoatFrozenLinear.freeze(CoatLinear.convert(module, self.config, region)).coat_name = name
        return STORED

    def adapters(self) -> None:
        """LoRA layers over converted linears."""
        for name, module in list(self.model.named_modules()):
            state = lora_state(module)
            if state is not None:
                convert(module, CoatLora, self.config, state, self.policy.region(name))
                self.report.converted[name] = "CoatLora: base and adapter share an FP8 input"

    def loss(self) -> None:
        """The head of a language model, whose product stays as it was, and its loss."""
        if not self.config.fuse_loss:
            unfuse_loss(self.model)
            return
        for name, what in fuse_loss(self.model).items():
            if what.startswith("loss not fused"):
                self.report.kept[name] = f"{self.report.kept.get(name, 'head')}; {what}"
            else:
                self.report.kept.pop(name, None)
                self.report.converted[name] = f"CoatHead, {what}"

    def merge(self) -> None:
        """Let q, k and v run as one linear. Only scales per token can stand beside each other in one product."""
        if self.config.granularity is not Granularity.TOKEN:
            return
        for module in self.model.modules():
            names = together(module)
            if names:
                self.join(module, names)

    def join(self, module: nn.Module, names: tuple[str, ...]) -> None:
        """Let these children, which read one input, run as one linear."""
        owners = [getattr(module, name) for name in names]
        children = [getattr(owner, "base_layer", owner) for owner in owners]
        if all(isinstance(child, CoatLinear) for child in children):
            merged = Merged(children, owners, WeightCache() if self.config.cache_weights else None)
            for child in children:
                child.coat_merged = merged
                self.report.converted[self.names[child]] += f", as one of {', '.join(names)}"

    def join_firsts(self, module: nn.Module, state: MLPState) -> None:
        """Gate and up with adapters run as one linear; without, :func:`~hf_coat.functional.coat_mlp` does that."""
        adapted = any(isinstance(getattr(module, name), CoatLora) for name in state.firsts)
        if adapted and len(state.firsts) > 1 and self.config.granularity is Granularity.TOKEN:
            self.join(module, state.firsts)

    def gather(self) -> None:
        """What FSDP2, if it comes, gathers of the weights."""
        if self.config.fsdp_all_gather is AllGather.BF16:
            what = "values are gathered, as fsdp_all_gather='bf16' asks"
        elif self.config.granularity is not Granularity.TOKEN:
            what = "values are gathered, for a scale per tensor is known when the whole tensor is"
        else:
            weights = [module.weight for module in gather_codes(self.model)]
            count = sum(w.numel() for w in weights)
            codes = count + 4 * sum(w.shape[0] for w in weights)
            what = (
                f"{len(weights)} weights are gathered as FP8 codes, {format_bytes(codes)} instead of "
                f"{format_bytes(2 * count)} of BF16; norms, embeddings, heads and biases as they are"
            )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            self.report.gathered = what

    def others(self) -> None:
        """Norms, MLPs and attentions."""
        for name, module in list(self.model.named_modules()):
            for kind, (recognise, mixin, how) in KINDS.items():
                state = recognise(module)
                if state is None:
                    continue
                policy = self.policy.keep(kind, name)
                if isinstance(state, str):
                    reason = state
                elif "forward" in vars(module) and not isinstance(module, Converted):
                    reason = "its forward was replaced (an offloading hook?)"
                elif kind == "attention":
                    reason = "activations='paper'" if policy is Keep.PAPER else None
                else:
                    reason = "activations='bf16'" if policy is Keep.BF16 else None
                fuses = isinstance(state, AttentionState) and state.rotary is not None
                reason = self.policy.excluded(name, fuses) or reason
                if reason is None:
                    state.keep = policy
                    if isinstance(state, MLPState) and self.config.cache_weights:
                        state.cache = WeightCache()
                    convert(module, mixin, self.config, state, self.policy.region(name))
                    self.report.converted[name] = how(state, self.config)
                    if isinstance(state, MLPState):
                        self.join_firsts(module, state)
                else:
                    if isinstance(module, Converted):
                        module.revert()
                    self.report.kept[name] = reason
                break


def _groups(config: CoatConfig) -> str:
    return f"FP8 groups of {config.group_size}"


def _norm_text(state: NormState, config: CoatConfig) -> str:
    return f"CoatNorm, {state}: its input in {_groups(config)}"


def _mlp_text(state: MLPState, config: CoatConfig) -> str:
    what = "gate and up" if state.gated else "the activation's input"
    return f"CoatMLP, {state}: {what} in {_groups(config)}"


def _attention_text(state: AttentionState, config: CoatConfig) -> str:
    what = f"in {_groups(config)}" if state.keep is Keep.LEAN else "as they are"
    what = "as they are, for it is eager" if state.eager else what
    return f"CoatAttention: q, k and v {what}{', fused rotary embedding' if state.rotary else ''}"


# Kind of module, as in CoatConfig.activations -> how it is recognised, what it becomes, what the report says.
KINDS = {
    "norm": (norm_state, CoatNorm, _norm_text),
    "mlp": (mlp_state, CoatMLP, _mlp_text),
    "attention": (attention_state, CoatAttention, _attention_text),
}


def apply_coat(model: nn.Module, config: CoatConfig | None = None) -> ConversionReport:
    """Convert a live model in place: its linears multiply in FP8, its norms, MLPs and attentions keep FP8.

    Parameters, their names, ties and hooks stay. Doing it again changes nothing, or, with another config, how the
    converted modules compute. Heads, embeddings, routers and whatever is not recognised stay as they are, and the
    report says so.

    Args:
        model: Any module, also on the meta device; BF16 or FP32 parameters.
        config: How to quantize and what to keep; the "lean" preset's ``CoatConfig()`` by default.

    Returns:
        The report of what was converted, kept and not covered.

    Raises:
        ValueError: For devices and dtypes that cannot train in FP8, or a model with nothing to convert.
        RuntimeError: For a model that FSDP2 has sharded already and whose gradients wait to be reduced.
    """
    config = CoatConfig() if config is None else config
    check_devices(model)
    gather_values(model)
    walk = _Walk(model, config)
    walk.linears()
    walk.adapters()
    walk.merge()
    walk.others()
    walk.gather()
    if not walk.report.converted:
        raise ValueError(f"COAT found nothing to convert in {type(model).__name__}: {walk.report.summary()}")
    walk.loss()
    walk.report.uncovered = _uncovered(model)
    walk.report.unmatched = walk.policy.unmatched
    walk.report.regions = walk.policy.describe(model)
    return walk.report


def remove_coat(model: nn.Module) -> ConversionReport:
    """Undo :func:`apply_coat` in place, exactly: the same parameters in modules of the classes they had.

    Only weights that were stored as FP8 stay rounded to it; the report says which.

    Returns:
        A report whose ``converted`` names the modules that are plain again.
    """
    report = ConversionReport()
    gather_values(model)
    for name, module in model.named_modules():
        if isinstance(module, (CoatLinear, Converted)):
            how = ", its weight as FP8 had it" if isinstance(module, CoatFrozenLinear) else ""
            report.converted[name] = type(module.revert()).__name__ + how
    report.converted |= unfuse_loss(model)
    report.uncovered = _uncovered(model)
    return report
