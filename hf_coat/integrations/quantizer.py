"""``from_pretrained(..., quantization_config=CoatConfig())``: the conversion as a quantizer of transformers.

Nothing is quantized in storage: the linears change class before their weights are loaded, and keep BF16 or FP32
parameters. So the model trains in full or with adapters, and is saved as plain safetensors that load without hf_coat.
The saved ``config.json`` names COAT under ``quantization_config``; loading it with hf_coat imported converts again.
"""

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from ..config import CoatConfig
from ..convert import apply_coat, check_devices, remove_coat
from .checks import check_model

# See trainer.py
logger = logging.get_logger("transformers.coat")


class CoatHfQuantizer(HfQuantizer):
    """Applies a ``CoatConfig`` while transformers loads a model; its ``report`` says what came of it."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        # Not later: hooks that offload modules keep the forward that a module had before.
        check_model(model, self.quantization_config)
        self.report = apply_coat(model, self.quantization_config)
        logger.warning(f"COAT: {self.report.summary()}")
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        check_devices(model)  # before, it was on the meta device
        return model

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
