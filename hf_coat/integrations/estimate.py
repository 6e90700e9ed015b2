"""Memory told beforehand for a model of transformers: its structure from its config, without weights.

The config comes from a folder or the Hub; the model is made on the meta device, gets its adapters and its conversion
there, and :func:`hf_coat.peak.estimate_step` runs a step of it.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from ..config import CoatOptimizerConfig, HfCoatConfig, OptimizerName
from ..convert import apply_coat
from ..optim import OPTIMIZERS, muon_groups
from ..pays import hidden_size, measured
from ..pays import speedup as measured_speedup
from ..peak import CARDS, StepEstimate, estimate_step
from .checks import check_release

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Training:
    """A training run whose memory is asked for.

    Args:
        model: Folder or Hub id of a model with a ``config.json``; a config by itself too.
        batch, length: Sequences on a GPU in one forward, and their tokens, those of images included.
        coat: What :meth:`hf_coat.HfCoatConfig.resolve` takes; None for ``torch.optim.AdamW`` without COAT.
        gpus: Over how many GPUs FSDP2 shards it.
        lora: Rank of LoRA adapters on all linears; None trains in full.
        images: Images in each sequence of a vision-language model.
        dtype: Of the parameters, ``"bfloat16"`` or ``"float32"``; by default a model in BF16, whose trained parameters
            become FP32 under FSDP2: accelerate does that where Trainer has ``bf16=True``.
        checkpointing: Whether with gradient checkpointing.
        accumulate: Whether gradients are accumulated over several forwards.
        revision, token: As in ``from_pretrained``.
    """

    model: str | PreTrainedConfig
    batch: int = 4
    length: int = 2048
    coat: HfCoatConfig | dict | str | None = "lean"
    gpus: int = 1
    lora: int | None = None
    images: int = 1
    dtype: str | None = None
    checkpointing: bool = False
    accumulate: bool = False
    revision: str | None = None
    token: str | bool | None = None


def estimate(training: Training) -> StepEstimate:
    """Predict the memory of a step of this training with the stock Trainer and ``bf16=True``.

    Raises:
        As :func:`estimates`.
    """
    return estimates(training, (training.gpus,))[training.gpus]


def estimates(training: Training, gpus: Iterable[int]) -> dict[int, StepEstimate]:
    """The same for several numbers of GPUs at once, whatever ``training`` says of them.

    Raises:
        OSError: Where there is no such config; transformers' own message.
        RuntimeError, ValueError: As :func:`hf_coat.peak.estimate_step`; or for a kind of images that is not known, or
            gradients that are both accumulated and released.
    """
    coat = None if training.coat is None else HfCoatConfig.resolve(training.coat)
    release = coat is not None and coat.optimizer is not None and coat.optimizer.gradient_release
    if release:
        check_release(coat, 1 + training.accumulate)
    found = {}
    gpus = sorted(gpus)
    # FSDP2 gathers FP32 weights as BF16; one GPU has them as they are, under autocast. Released gradients: as one GPU.
    sharded = [count for count in gpus if count > 1]
    for counts, gather in (([1] * (1 in gpus), None), (sharded, None if release else torch.bfloat16)):
        if not counts:
            continue
        model, make_optimizer = ghost(training)
        if counts is sharded and training.dtype is None:
            for p in model.parameters():
                p.data = p.data.float() if p.requires_grad else p.data
        found |= estimate_step(
            model,
            batch_of(model, training),
            make_optimizer,
            gpus=counts,
            units=tuple(getattr(model, "_no_split_modules", None) or ()),
            gather=gather,
            autocast=torch.bfloat16,
            accumulate=training.accumulate,
            gradient_release=release,
        )
    return found


def speedup(training: Training) -> dict[str, int | float | str] | None:
    """What :func:`hf_coat.pays.speedup` says of this training on the GPU that was measured; None where it says
    nothing: without COAT in the model, with adapters, or where nothing was measured."""
    coat = None if training.coat is None else HfCoatConfig.resolve(training.coat)
    if coat is None or coat.model is None or training.lora is not None:
        return None
    return measured_speedup(hidden_size(_config(training)), training.batch * training.length, measured().gpu)


def largest_batch(
    training: Training, card: int, known: dict[int, dict[int, StepEstimate]], gpus: Sequence[int] = ()
) -> int:
    """The most sequences on a GPU that a card of :data:`hf_coat.peak.CARDS` holds; 0 where it holds not even one.

    The peak is the most of several sums, each of which grows with the batch along a straight line. So a line through
    two batches lies nowhere above it but between them: what does not fit by such a line does not fit.

    Args:
        known: By batch what :func:`estimates` said of it before; what is asked for here is added.
        gpus: Numbers of GPUs that will be asked about too, and are estimated together with this one.
    """
    low, high, guess, room = 0, None, training.batch, int(CARDS[card] * 2**30)

    def reach(a: int, b: int) -> int:
        """The last batch that fits by the line through two."""
        return b + (room - needed[b]) * (b - a) // max(1, needed[b] - needed[a])

    while high is None or high - low > 1:
        if guess not in known:
            known[guess] = estimates(replace(training, batch=guess), {training.gpus, *gpus})
        needed = {batch: found[training.gpus].needed() for batch, found in sorted(known.items())}
        fit = [batch for batch in needed if needed[batch] <= room]
        others = [batch for batch in needed if needed[batch] > room]
        low, high = max(fit, default=0), min(others, default=None)
        if len(fit) > 1:
            last = max(reach(*fit[-2:]), low)
            high = last + 1 if high is None else min(high, last + 1)
        if len(others) > 1:
            high = min(high, max(reach(*others[:2]), low) + 1)
        if high is None:
            guess = 2 * low
        elif low and others:  # between these two the line lies above the peak: half-way from what fits by it
            guess = (min(max(reach(low, others[0]), low + 1), high - 1) + high - 1) // 2
        else:
            guess = min(high - 1, 4 * low) if low else high // 2
    return low


def _config(training: Training) -> PreTrainedConfig:
    if isinstance(training.model, PreTrainedConfig):
        return training.model
    return AutoConfig.from_pretrained(training.model, revision=training.revision, token=training.token)


def ghost(training: Training):
    """The model on the meta device as it is when training begins, and what makes its optimizer."""
    config = _config(training)
    vision = type(config) in AutoModelForImageTextToText._model_mapping
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, dtype=DTYPES[training.dtype or "bfloat16"])
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False  # as Trainer sets it
    if training.checkpointing:
        model.gradient_checkpointing_enable()
    if training.lora is not None:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=training.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters)
        if training.checkpointing:
            model.enable_input_require_grads()
    coat = None if training.coat is None else HfCoatConfig.resolve(training.coat)
    if coat is not None and coat.model is not None:
        apply_coat(model, coat.model)
    return model, functools.partial(_make_optimizer, None if coat is None else coat.optimizer)


def _make_optimizer(config: CoatOptimizerConfig | None, model: torch.nn.Module) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config is None:
        return torch.optim.AdamW(trainable, fused=True)
    groups = muon_groups(model) if config.name is OptimizerName.MUON else trainable
    return OPTIMIZERS[config.name](groups, **config.settings)


def batch_of(model: nn.Module, training: Training) -> dict[str, torch.Tensor]:
    """Token ids, labels and images of one forward; without padding, and each token with a label."""
    config = model.config
    ids = torch.zeros(training.batch, training.length, dtype=torch.long)
    batch = {"input_ids": ids, "labels": torch.zeros_like(ids)}
    vision = getattr(config, "vision_config", None)
    if vision is None or not training.images:
        return batch
    count = training.batch * training.images
    images, tokens = _images(config, vision, count)
    if training.images * (tokens + 1) >= training.length:
        raise ValueError(
            f"{training.images} images of {tokens} tokens each leave no room for text in a sequence of "
            f"{training.length}: ask for longer ones"
        )
    image_token = next(
        value for value in _attributes(config, "image_token_id", "image_token_index") if value is not None
    )
    ids += int(image_token == 0)  # text must be something else
    for i in range(training.images):  # a token of text, then an image
        ids[:, i * (tokens + 1) + 1 : (i + 1) * (tokens + 1)] = image_token
    if "image_grid_thw" in images:  # which positions they are does not matter; the model would look for images
        images["position_ids"] = torch.zeros(3, *ids.shape, dtype=torch.long)
    return batch | images


def _attributes(holder: object, *names: str) -> Iterator:
    return (getattr(holder, name, None) for name in names)


def _images(config: PreTrainedConfig, vision: PreTrainedConfig, count: int) -> tuple[dict[str, torch.Tensor], int]:
    """``count`` images as the model takes them (on the meta device), and the tokens of each.

    Those with a fixed size have it in their config; for the others, which cut an image of any size into patches, an
    image of 448 x 448 pixels is taken.
    """
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    side = side[0] if isinstance(side, (list, tuple)) else side
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    merge = getattr(vision, "spatial_merge_size", None)
    if merge is not None and getattr(vision, "temporal_patch_size", None) is not None:  # the Qwen family
        grid = 448 // (patch * merge) * merge
        width = channels * vision.temporal_patch_size * patch * patch
        return {
            "pixel_values": torch.empty(count * grid * grid, width, device="meta"),
            "image_grid_thw": torch.tensor([[1, grid, grid]] * count),
        }, (grid // merge) ** 2
    tokens = next(_tokens_of_fixed_size(config, side, patch), None) if side and patch else None
    if tokens is None:
        raise ValueError(
            f"how a {config.model_type!r} takes images is not known here; --images 0 tells of its text alone"
        )
    return {"pixel_values": torch.empty(count, channels, side, side, device="meta")}, tokens


def _tokens_of_fixed_size(config: PreTrainedConfig, side: int, patch: int) -> Iterator[int]:
    """Tokens that one image of a fixed size becomes, by what the config says of it."""
    patches = (side // patch) ** 2
    if getattr(config, "mm_tokens_per_image", None):  # Gemma 3
        yield config.mm_tokens_per_image
    if getattr(config, "downsample_ratio", None):  # InternVL
        yield int(patches * config.downsample_ratio**2)
    if getattr(config, "vision_feature_select_strategy", None):  # LLaVA: CLIP's class token is left out by default
        yield patches + (config.vision_feature_select_strategy == "full")
    if getattr(config, "num_image_tokens", None):  # PaliGemma
        yield config.num_image_tokens
