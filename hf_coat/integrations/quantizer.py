"""``from_pretrained(..., quantization_config=CoatConfig())``: the conversion as a quantizer of transformers.

The linears change class before their weights are loaded, and keep BF16 or FP32 parameters. So the model trains in full
or with adapters. With ``frozen_weights="fp8"`` nothing but adapters (and what is no linear) trains: each weight is
rounded to FP8 as soon as it is read, and the BF16 model never exists. Either way it is saved as plain safetensors that
load without hf_coat. The saved ``config.json`` names COAT under ``quantization_config``; loading it with hf_coat
imported converts again.
"""

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from ..config import CoatConfig, FrozenWeights
from ..convert import apply_coat, check_devices, remove_coat
from ..functional import StoredWeight
from ..modules import CoatFrozenLinear
from .checks import check_model

# See callback.py
logger = logging.get_logger("transformers.coat")


class _Store(ConversionOps):
    """What transformers does with the weight of a frozen linear as soon as it is read."""

    def convert(self, input_dict: dict, model: nn.Module, **kwargs) -> dict[str, torch.Tensor]:
        stored = {}
        for name, weight in input_dict.items():
            coat = model.get_submodule(name.rpartition(".")[0]).coat
            weight = weight[0] if isinstance(weight, list) else weight
            made = StoredWeight.of(weight, coat.granularity, coat.power_of_two)
            stored |= {name: made.bits, f"{name}_scale": made.scale}
        return stored


class CoatHfQuantizer(HfQuantizer):
    """Applies a ``CoatConfig`` while transformers loads a model; its ``report`` says what came of it."""

    def __init__(self, quantization_config: CoatConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        if quantization_config.frozen_weights is FrozenWeights.FP8:
            self.pre_quantized = False  # a checkpoint that names COAT is a plain one too

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        # Not later: hooks that offload modules keep the forward that a module had before.
        check_model(model, self.quantization_config)
        weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        if self.quantization_config.frozen_weights is FrozenWeights.FP8:
            for weight in weights:
                weight.requires_grad_(False)
        self.report = apply_coat(model, self.quantization_config)
        for weight in weights:
            weight.requires_grad_()  # those that were stored are no longer the model's
        logger.warning(f"COAT: {self.report.summary()}")
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        check_devices(model)  # before, it was on the meta device
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        module, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module), CoatFrozenLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Store()

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Leave the state dict to the model, whose own is plain, and note in the file what it holds."""
        stored = sum(isinstance(module, CoatFrozenLinear) for module in model.modules())
        note = {"coat_frozen_weights": f"{stored} weights hold values that were rounded to FP8"}
        return None, note if stored else {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        remove_coat(model)
        # By default transformers passes the model's own dtype. Some parameters may be in another one on purpose.
        return model if dtype == model.config.dtype else model.to(dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # without it Trainer refuses to train without adapters


if CoatConfig.quant_method not in auto.AUTO_QUANTIZER_MAPPING:  # transformers refuses a second registration
    auto.register_quantization_config(CoatConfig.quant_method)(CoatConfig)
    auto.register_quantizer(CoatConfig.quant_method)(CoatHfQuantizer)
