"""What outlier image tokens do to text tokens: one scale for each token against one scale for a tensor.

    python benchmarks/modality.py [--json FILE] [--plot FILE.png] [--tiny]

Two tables. "linear": a linear reads text tokens of size 1 and image tokens of size ``factor``, and is given
gradients for its text tokens alone, as where only answers have labels. The errors are relative, against float64:

    forward     of the outputs of the text tokens
    weight      of the weight's gradient, all of which comes from text tokens. It adds up over tokens, so that all of
                them share one scale; codes of a linear's input carry the gradients' scales with them there
    rebuilt     the same where the input is the product of an MLP's gate and up, made again from what the MLP keeps; it
                is quantized at one scale straight away, and its image tokens are ``factor`` times as large

"tower": a LLaVA with a new CLIP tower, whose image tokens come through a new projector into a language model whose
text embeddings have the usual standard deviation of 0.02: hf_coat.probe's error of text tokens in the linears of the
language model, and the same with the projector's output made ``--outlier`` times larger. "ratio" is the largest value
of an image token over the largest of a text token, in the linear where that is worst.
"""

import argparse
import json
from pathlib import Path

import torch
from coat_kernels import Granularity
from environment import environment
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hf_coat import CoatConfig
from hf_coat.functional import Gate, coat_activation, coat_linear
from hf_coat.probe import LIMIT, Probe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FACTORS = [2.0**k for k in range(0, 19, 2)]
IMAGE = 1  # the id of image tokens


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def through_linear(factor: float, granularity: Granularity, text: int, image: int, width: int) -> dict:
    """One row of the first table."""
    draws = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draws).to(DEVICE)

    weight, dy = random(width, width) / width**0.5, random(text + image, width)
    dy[text:] = 0
    size = torch.ones(text + image, 1, device=DEVICE)
    size[text:] = factor
    how = {"granularity": granularity, "power_of_two": granularity is Granularity.TOKEN}

    x = random(text + image, width) * size
    w = weight.clone().requires_grad_()
    y = coat_linear(x, w, **how)
    y.backward(dy)
    row = {
        "forward": relative(y[:text].detach(), x[:text].double() @ weight.double().T),
        "weight": relative(w.grad, dy.double().T @ x.double()),
    }
    gate, up = (random(text + image, width) for _ in range(2))
    up, w = (up * size).requires_grad_(), weight.clone().requires_grad_()
    h = coat_activation(gate, up, Gate("silu", True))
    exact = (torch.nn.functional.silu(gate.double()) * up.detach().double())[:text]
    coat_linear(h, w, **how).backward(dy)
    return row | {"rebuilt": relative(w.grad, dy[:text].double().T @ exact)}


def tower(outlier: float, sizes: dict, images: int, words: int) -> tuple[LlavaForConditionalGeneration, dict]:
    """A LLaVA with new weights, and the batch to probe it with."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes["vision"]), text_config=LlamaConfig(**sizes["text"], vocab_size=256),
        image_token_index=IMAGE, vision_feature_layer=-2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).to(DEVICE)
    with torch.no_grad():
        for p in model.model.multi_modal_projector.linear_2.parameters():
            p.mul_(outlier)
    side = sizes["vision"]["image_size"]
    tokens = (side // sizes["vision"]["patch_size"]) ** 2
    ids = torch.randint(2, 256, (images, tokens + words), device=DEVICE)
    ids[:, :tokens] = IMAGE
    return model, {"input_ids": ids, "pixel_values": torch.randn(images, 3, side, side, device=DEVICE)}


class LargestValues(Probe):
    """Beside the probe's figures the largest value of a modality's tokens, in the kurtosis' place."""

    def _figures(self, x, largest):
        return torch.stack([super()._figures(x, largest)[0], x.abs().amax()])


def in_tower(outlier: float, granularity: Granularity, model, batch) -> dict:
    """One row of the second table."""
    config = CoatConfig(granularity=granularity, power_of_two=granularity is Granularity.TOKEN)
    with torch.no_grad(), LargestValues(model, config) as probe:
        model(**batch)
    linears = {name: of for name, of in probe.figures().items() if "language_model" in name}
    errors = [of["text"][0] for of in linears.values()]
    return {
        "outlier": outlier,
        "scale_per": granularity.value,
        "mean_error": sum(errors) / len(errors),
        "largest_error": max(errors),
        "ratio": max(of["image"][1] / of["text"][1] for of in linears.values()),
        "above_limit": sum(error > LIMIT for error in errors),
        "linears": len(errors),
    }


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    titles = {"forward": "outputs", "weight": "weight's gradient", "rebuilt": "the same, input made again"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for granularity in ("token", "tensor"):
            points = [(row["factor"], row[kind]) for row in rows if row["scale_per"] == granularity]
            axis.loglog(*zip(*points, strict=True), base=2, marker="o", label=f"a scale per {granularity}")
        axis.set(title=title, xlabel="image tokens, times as large as text tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error from FP8, text tokens")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outlier", type=float, default=2.0**14)
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw the first table here; needs matplotlib")
    options = parser.parse_args()
    text, image, width = (32, 64, 64) if options.tiny else (128, 576, 1024)
    sizes = {
        "vision": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=16,
                       image_size=336, patch_size=14),
        "text": dict(hidden_size=1024, intermediate_size=2752, num_hidden_layers=6, num_attention_heads=8),
    }  # fmt: skip
    if options.tiny:
        small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
        sizes = {"vision": dict(**small, image_size=16, patch_size=4), "text": small}

    linear = []
    for factor in FACTORS:
        for granularity in (Granularity.TOKEN, Granularity.TENSOR):
            row = {"factor": factor, "scale_per": granularity.value}
            linear.append(row | through_linear(factor, granularity, text, image, width))
            errors = "  ".join(f"{kind} {linear[-1][kind]:.4f}" for kind in ("forward", "weight", "rebuilt"))
            print(f"linear: image tokens x {factor:<8g} a scale per {granularity.value:7s} {errors}", flush=True)
    towers = []
    for outlier in (1.0, options.outlier):
        model, batch = tower(outlier, sizes, images=2, words=text)
        for granularity in (Granularity.TOKEN, Granularity.TENSOR):
            towers.append(in_tower(outlier, granularity, model, batch))
            print("tower:  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                         for k, v in towers[-1].items()), flush=True)  # fmt: skip
    if options.json:
        result = environment() | {"text": text, "image": image, "width": width, "sizes": sizes}
        options.json.write_text(json.dumps(result | {"linear": linear, "tower": towers}, indent=1) + "\n")
    if options.plot:
        plot(linear, options.plot)


if __name__ == "__main__":
    main()
