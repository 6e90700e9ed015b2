"""Put COAT into a live model and take it out again: one walker, one report."""

import fnmatch
from collections import Counter
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from .config import CoatConfig
from .families import why_kept
from .modules import CoatLinear
from .report import conversion_table

FP8_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0), Blackwell (10, 0) and (12, 0)


@dataclass
class ConversionReport:
    """What :func:`apply_coat` or :func:`remove_coat` did.

    Attributes:
        converted: Module name -> what it is now.
        kept: Name of a linear that stays in the model's own precision -> why.
        uncovered: Class of the other modules that hold parameters -> how many modules and parameters COAT does not
            touch.
        unmatched: Entries of ``modules_to_not_convert`` that name no linear of this model.
    """

    converted: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        return asdict(self)

    def summary(self) -> str:
        """Two or three lines: how many linears were converted, what was kept and why, what is not covered."""
        lines = [f"{len(self.converted)} linears converted, {len(self.kept)} kept"]
        if self.kept:
            reasons = Counter(self.kept.values())
            lines.append("kept: " + ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common()))
        if self.uncovered:
            lines.append("not covered: " + ", ".join(f"{kind} ({what})" for kind, what in self.uncovered.items()))
        if self.unmatched:
            lines.append(f"modules_to_not_convert names nothing in this model: {', '.join(self.unmatched)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        """The whole report as a table, with the layers of a stack on one line."""
        return conversion_table(self.to_dict())


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names this module or a parent: part of the dotted path, or with ``*`` as in a shell."""
    return f".{pattern}." in f".{name}." or fnmatch.fnmatchcase(name, pattern)


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
    """Modules with parameters of their own that are no linears, by class."""
    modules, parameters = Counter(), Counter()
    for module in model.modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if own and not isinstance(module, nn.Linear):
            modules[type(module).__name__] += 1
            parameters[type(module).__name__] += own
    return {kind: f"{count} modules, {parameters[kind]:,} parameters" for kind, count in modules.items()}


def apply_coat(model: nn.Module, config: CoatConfig | None = None) -> ConversionReport:
    """Convert a live model in place: its plain linears become :class:`~hf_coat.modules.CoatLinear`.

    Parameters, their names, ties and hooks stay. Doing it again changes nothing, or, with another config, how the
    converted modules quantize. Heads, embeddings, routers and whatever is not recognised stay as they are, and the
    report says so.

    Args:
        model: Any module, also on the meta device; BF16 or FP32 parameters.
        config: How to quantize; the "lean" preset's ``CoatConfig()`` by default.

    Returns:
        The report of what was converted, kept and not covered.

    Raises:
        ValueError: For devices and dtypes that cannot train in FP8, or a model with nothing to convert.
    """
    config = CoatConfig() if config is None else config
    check_devices(model)
    report = ConversionReport(uncovered=_uncovered(model))
    reasons = why_kept(model)
    patterns = {pattern: False for pattern in config.modules_to_not_convert or ()}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linears:
        excluded = [pattern for pattern in patterns if _matches(name, pattern)]
        patterns.update(dict.fromkeys(excluded, True))
        if type(module) not in (nn.Linear, CoatLinear):
            reason = f"a {type(module).__name__}, not a plain nn.Linear"
        elif excluded:
            reason = f"excluded by modules_to_not_convert={excluded[0]!r}"
        else:
            reason = reasons.get(name)
        if reason is None:
            CoatLinear.convert(module, config)
            report.converted[name] = f"CoatLinear, a scale per {config.granularity.value}"
        else:
            if type(module) is CoatLinear:
                module.revert()
            report.kept[name] = reason
    report.unmatched = [pattern for pattern, found in patterns.items() if not found]
    if not report.converted:
        raise ValueError(f"COAT found nothing to convert in {type(model).__name__}: {report.summary()}")
    return report


def remove_coat(model: nn.Module) -> ConversionReport:
    """Undo :func:`apply_coat` in place, exactly: the same parameters in plain ``nn.Linear`` modules.

    Returns:
        A report whose ``converted`` names the modules that are plain again.
    """
    report = ConversionReport(uncovered=_uncovered(model))
    for name, module in model.named_modules():
        if isinstance(module, CoatLinear):
            module.revert()
            report.converted[name] = "nn.Linear"
    return report
