"""The models that peers.py measures, and what each peer makes of them."""

import importlib.util
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel, TrainerCallback


def llama_size(hidden: int) -> dict:
    """A layer of the proportions of Llama-2-7B's, with heads of 128."""
    return {
        "hidden_size": hidden,
        "intermediate_size": 11008 * hidden // 4096,
        "num_attention_heads": hidden // 128,
    }


LLAMA_2_7B = llama_size(4096)
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}


class Unavailable(Exception):
    """A peer that cannot take part in a case here; its text says why."""


@dataclass(frozen=True)
class Peer:
    """What makes a peer of transformers' own model.

    Args:
        patch: Called before the model is made.
        convert: Called with the model, which it changes in place.
        compiled: Whether torch.compile compiles the model.
        recipe: What ``TrainingArguments(coat=...)`` is.
        own_layer: Makes a module of the peer's own in place of transformers' layer, from the config and the length.
    """

    patch: Callable[[], None] | None = None
    convert: Callable[[nn.Module], object] | None = None
    compiled: bool = False
    recipe: str | dict | None = None
    own_layer: Callable[[LlamaConfig, int], nn.Module] | None = None


def _need(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{package} is not installed")


def _liger() -> None:
    _need("liger_kernel", "liger-kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()


def _torchao(model: nn.Module) -> None:
    """float8 with a scale per tensor, taken from the tensor itself: torchao's default recipe, without the head."""
    _need("torchao", "torchao")
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(model, module_filter_fn=lambda module, name: "lm_head" not in name)


def _coat(recipe: str | dict) -> Peer:
    def convert(model):
        import hf_coat

        return hf_coat.apply_coat(model, hf_coat.HfCoatConfig.resolve(recipe).model)

    return Peer(convert=convert, recipe=recipe)


class _TransformerEngineLayer(nn.Module):
    """TransformerEngine's layer in FP8 by its default recipe, delayed scaling on Hopper."""

    def __init__(self, config: LlamaConfig, length: int):
        super().__init__()
        _need("transformer_engine", "transformer-engine")
        import transformer_engine.pytorch as te

        self.autocast = te.autocast
        self.layer = te.TransformerLayer(
            config.hidden_size, config.intermediate_size, config.num_attention_heads, bias=False,
            normalization="RMSNorm", layernorm_epsilon=config.rms_norm_eps, activation="swiglu", hidden_dropout=0.0,
            attention_dropout=0.0, self_attn_mask_type="causal", attn_input_format="bshd", fuse_qkv_params=True,
            params_dtype=torch.bfloat16,
        )  # fmt: skip
        self.rotary = te.RotaryPositionEmbedding(config.hidden_size // config.num_attention_heads)(length)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.layer(x, rotary_pos_emb=self.rotary)


class _NvidiaCoatLayer(nn.Module):
    """NVlabs/COAT's own decoder layer, from the package fp8-coat, with its groups of 16.

    Its model quantizes the hidden states once before the first layer and their gradient once after the last, with the
    two modules that stand here around the one layer. Their time is part of the layer's; it is about one per cent.
    """

    def __init__(self, config: LlamaConfig, length: int):
        super().__init__()
        _need("coat", "fp8-coat")
        _restore_names_of_transformers_4()
        from coat.activation.real_quantization import Coat_quantize_bgn, Coat_quantize_end
        from coat.models.coat_llama import CoatLlamaDecoderLayer

        config.coat_fp8_args = {"group_size": 16}
        config.rope_theta = config.rope_parameters["rope_theta"]  # where transformers 4 had it
        self.layer = CoatLlamaDecoderLayer(config, layer_idx=0)
        self.begin, self.end = Coat_quantize_bgn(self.layer.qargs), Coat_quantize_end(self.layer.qargs)
        like = torch.empty(1, dtype=torch.bfloat16)
        self.positions = self.layer.self_attn.rotary_emb(like, torch.arange(length)[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (quantized,) = self.layer(*self.begin(x), position_embeddings=self.positions)
        return self.end(*quantized)


def _restore_names_of_transformers_4() -> None:
    """NVlabs/COAT's Llama file imports names that transformers 5 no longer has; its decoder layer uses none."""
    from transformers.models.llama import modeling_llama

    for name in (
        "_prepare_4d_causal_attention_mask_with_cache_position",
        "LlamaLinearScalingRotaryEmbedding",
        "LlamaDynamicNTKScalingRotaryEmbedding",
    ):
        setattr(modeling_llama, name, None)
    LlamaModel._update_causal_mask = None


PEERS = {
    "bf16": Peer(),
    "bf16-compile": Peer(compiled=True),
    "liger": Peer(patch=_liger),
    "torchao": Peer(convert=_torchao, compiled=True),
    "torchao-eager": Peer(convert=_torchao),
    "te": Peer(own_layer=_TransformerEngineLayer),
    "nvcoat": Peer(own_layer=_NvidiaCoatLayer),
    "lean": _coat("lean"),
    "lean-attention": _coat({"model": {"activations": "lean"}}),  # the attentions' q, k and v in FP8 too
    "lean-attention-3": _coat(  # those of every third layer
        {"model": {"activations": {f"*layers.{i}.self_attn": "lean" for i in range(2, 32, 3)}}}
    ),
    "paper": _coat("paper"),
}
OURS = tuple(name for name, peer in PEERS.items() if peer.recipe)


def attention(backend: str) -> AbstractContextManager:
    """The context in which sdpa takes cuDNN's attention where it can; ``"default"`` leaves the choice to torch."""
    if backend == "default":
        return nullcontext()
    order = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return sdpa_kernel([getattr(SDPBackend, name) for name in order], set_priority=True)


def llama_config(size: dict, layers: int, length: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        **size, num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=length, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip


def in_bf16(make: Callable[[], nn.Module], device: str) -> nn.Module:
    """A module whose parameters are made in BF16 on the device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(torch.float32)


class Layers(nn.Module):
    """Decoder layers without what is around them: hidden states [B, S, H] in, hidden states out."""

    def __init__(self, model: LlamaModel, length: int):
        super().__init__()
        self.layers = model.layers
        weight = model.norm.weight
        self.positions = model.rotary_emb(weight, torch.arange(length, device=weight.device)[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, position_embeddings=self.positions)
        return x


def layers_of(name: str, config: LlamaConfig, length: int, device: str) -> nn.Module:
    """A peer's decoder layers, hidden states in, hidden states out."""
    peer = PEERS[name]
    if peer.own_layer:
        return in_bf16(lambda: peer.own_layer(config, length), device).train()
    module = Layers(_made(peer, LlamaModel, config, device), length)
    if peer.compiled:
        module.compile()
    return module


def causal_lm(name: str, config: LlamaConfig, device: str, *, compile: bool = True) -> PreTrainedModel:
    """A peer's ``LlamaForCausalLM``; ``compile=False`` where the Trainer compiles it."""
    peer = PEERS[name]
    if peer.own_layer:
        raise Unavailable(f"{name} has a layer of its own, but no LlamaForCausalLM")
    model = _made(peer, LlamaForCausalLM, config, device)
    if peer.compiled and compile:
        model.compile()
    return model


def _made(peer: Peer, kind: type[PreTrainedModel], config: LlamaConfig, device: str) -> PreTrainedModel:
    if peer.patch:
        peer.patch()
    model = in_bf16(lambda: kind(config), device).train()
    if peer.convert:
        peer.convert(model)
    return model


class StepClock(TrainerCallback):
    """Times a Trainer's steps, each from the end of the one before; on a GPU without the host waiting for it."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Of the second step and all after it."""
        pairs = list(zip(self.ends, self.ends[1:], strict=False))
        if not torch.cuda.is_available():
            return [(end - start) * 1e3 for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def figures(self, warmup: int, traced: int = 0) -> dict[str, float]:
        """Median, spread and number of the steps behind the first ``warmup``, without the last ``traced``."""
        times = self.milliseconds()
        times = times[max(0, warmup - 1) : len(times) - traced]
        return {
            "ms": statistics.median(times),
            "spread_ms": max(times) - min(times),
            "steps_measured": len(times),
        }
