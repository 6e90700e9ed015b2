"""What COAT cannot be combined with is refused here, before the first step.

Devices and dtypes are refused by :func:`hf_coat.convert.check_devices`, which every conversion calls.
"""

import dataclasses

import torch
from packaging.version import Version
from torch import nn

from ..config import CoatConfig, HfCoatConfig
from ..modules import CoatFrozenLinear, CoatLinear

SHARDS_BYTES = "2.13"  # the first torch whose FSDP2 was seen to shard frozen parameters of bytes; 2.11's cannot


def loaded_with(model: nn.Module) -> object:
    """The ``quantization_config`` that a model was loaded with, or None."""
    return getattr(getattr(model, "config", None), "quantization_config", None)


def check_model(model: nn.Module, config: CoatConfig) -> None:
    """Refuse a model that something else has quantized, or that was loaded with another ``CoatConfig``.

    Raises:
        ValueError: With what was found and the remedy.
    """
    method = getattr(model, "quantization_method", None)
    method = getattr(method, "value", method)
    if getattr(model, "is_quantized", False) and method != CoatConfig.quant_method:
        _refuse_quantized(f"the model is already quantized by {method!r}")
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if not isinstance(module, CoatLinear) and (not p.is_floating_point() or p.element_size() < 2):
                _refuse_quantized(f"the model is already quantized: {path}.{name} is {p.dtype}")
    then = loaded_with(model)
    if not isinstance(then, CoatConfig):
        return
    if then != dataclasses.replace(config, promoted=then.promoted):  # those that a probe may have found since
        raise ValueError(
            f"the model was loaded with {then}, and now {config} is asked for. Ask for the same, load the "
            "model without quantization_config, or leave it as it is with coat=HfCoatConfig(model=None)"
        )


def _refuse_quantized(found: str) -> None:
    raise ValueError(
        f"{found}. COAT cannot be combined with that: load the model unquantized, in BF16 or FP32, or use COAT's "
        "optimizer only, with coat=HfCoatConfig(model=None)"
    )


def check_run(
    *,
    mixed_precision: str = "no",
    deepspeed: bool = False,
    fsdp_version: int | None = None,
    cpu_offload: bool = False,
) -> None:
    """Refuse ways to run a training that COAT does not work with.

    Args:
        mixed_precision: As ``accelerate`` names it.
        deepspeed: Whether DeepSpeed runs the training.
        fsdp_version: 1 or 2 where FSDP runs it, else None.
        cpu_offload: Whether FSDP2 keeps parameters, gradients and optimizer states on the CPU.

    Raises:
        ValueError: With the setting and the remedy.
    """
    if mixed_precision == "fp16":
        raise ValueError(
            "COAT does not train in FP16 (fp16=True, fp16_full_eval=True or mixed_precision='fp16'): set bf16=True, "
            "or neither for FP32"
        )
    if mixed_precision == "fp8":
        raise ValueError(
            "mixed_precision='fp8' lets another library convert the linears that COAT converts: set it to 'bf16' or "
            "'no', in the accelerate configuration or in the environment variable ACCELERATE_MIXED_PRECISION"
        )
    if deepspeed:
        raise ValueError(
            "COAT does not work under DeepSpeed, whose ZeRO hands the optimizer one flat FP32 piece of all parameters "
            "instead of the rows that share their scales: drop deepspeed=, or the DeepSpeed part of the accelerate "
            "configuration, and shard with FSDP2, fsdp=True with fsdp_config={'version': 2}"
        )
    if fsdp_version == 1:
        raise ValueError(
            "COAT does not work under FSDP1, whose flat parameters lose the rows that share their scales: use FSDP2, "
            "with fsdp_config={'version': 2} or fsdp_version: 2 in the accelerate configuration"
        )
    if cpu_offload:
        raise ValueError(
            "COAT does not work with FSDP2's CPU offload, under which the optimizer steps on the CPU, where COAT's is "
            "plain PyTorch and more than ten times slower than AdamW: drop cpu_offload from fsdp_config, 'offload' "
            "from fsdp=, or fsdp_offload_params from the accelerate configuration. For memory take what is sharded "
            "already, optimizer states of about 2 bytes a parameter, and gradient_checkpointing=True, a smaller batch "
            "or more GPUs"
        )


def check_shards(model: nn.Module) -> None:
    """Refuse frozen weights stored as FP8 where FSDP2 cannot shard them.

    Raises:
        ValueError: With the remedy.
    """
    stored = any(isinstance(module, CoatFrozenLinear) for module in model.modules())
    if stored and Version(torch.__version__).release < Version(SHARDS_BYTES).release:
        raise ValueError(
            f"frozen weights are stored as FP8, in bytes, and the FSDP2 of torch {torch.__version__} asks every "
            f"parameter for a gradient: upgrade to torch {SHARDS_BYTES} or newer, keep them in BF16 with "
            "CoatConfig(frozen_weights='bf16'), or train under DDP"
        )


def check_release(coat: HfCoatConfig, gradient_accumulation_steps: int) -> None:
    """Refuse gradient release where gradients accumulate.

    Raises:
        ValueError: With the remedy.
    """
    if coat.optimizer is not None and coat.optimizer.gradient_release and gradient_accumulation_steps > 1:
        raise ValueError(
            "gradient_release=True steps each parameter in every backward, and gradient_accumulation_steps is "
            f"{gradient_accumulation_steps}: set it to 1 and make the batch larger instead, for which "
            "gradient_checkpointing=True makes room, or leave gradient_release out"
        )
