"""The predicted high-water mark: counted by hand, against recorded runs on a GPU, and by what moves it."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import CLIPVisionConfig, Gemma3Config, LlamaConfig, LlavaConfig, Qwen2VLConfig
from transformers.modeling_outputs import CausalLMOutput

from hf_coat import CoatAdamW, GradientRelease, HfCoatConfig, cli, memory
from hf_coat.config import PRESETS
from hf_coat.integrations.estimate import Training, batch_of, estimate, estimates, ghost, largest_batch
from hf_coat.memory import predict
from hf_coat.modules import loss
from hf_coat.peak import WORKSPACE, estimate_step

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
SEEN = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(**TEXT)
LLAVA = LlavaConfig(
    vision_config=CLIPVisionConfig(**SEEN, image_size=32, patch_size=8).to_dict(),
    text_config=LLAMA.to_dict(), image_token_index=500,
)  # fmt: skip
QWEN2_VL = Qwen2VLConfig(
    text_config=TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
    vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14},
    image_token_id=500, vision_start_token_id=501, vision_end_token_id=502, video_token_id=503,
)  # fmt: skip
GEMMA3 = Gemma3Config(
    text_config=TEXT | {"head_dim": 16}, vision_config=SEEN | {"image_size": 64, "patch_size": 8},
    mm_tokens_per_image=16, image_token_index=500,
)  # fmt: skip
LLAMA_2_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)

SHARDED = {"gpus": 2, "dtype": "bfloat16"}


def of(config=LLAMA, **changes):
    return estimate(Training(config, **{"batch": 2, "length": 64} | changes))


class Net(nn.Module):
    """Two linears without a bias; the loss is the sum of what comes out."""

    config = None

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(512, 1024, bias=False), nn.Linear(1024, 2048, bias=False)

    def forward(self, x):
        return CausalLMOutput(loss=self.last(self.first(x)).sum())


def test_peak_by_hand():
    """All sizes are multiples of the allocator's 512 bytes, but for the loss and its gradient."""
    rows, scalar = 4096, 512
    step = estimate_step(
        Net(),
        {"x": torch.empty(rows, 512, device="meta")},
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        max_grad_norm=0,
    )[1]
    weights = 4 * (512 * 1024 + 1024 * 2048)
    h, y = 4 * rows * 1024, 4 * rows * 2048
    assert (step.weights, step.gradients, step.optimizer_states) == (weights, weights, 0)
    assert step.activations == h + scalar  # the loss is not let go
    # Forward: h, y, loss. Backward: the gradient of y is an expanded scalar, dW of last needs it whole; then dh.
    assert step.phase in ("forward", "backward")
    batch = 4 * rows * 512
    assert step.peak - WORKSPACE - batch - weights - h >= y
    assert step.peak == sum(step.at_peak.values())


@pytest.mark.parametrize(
    ("coat", "layers", "measured", "without", "changes"),
    [
        (None, 32, 86.431, 0.0, {}),
        (None, 16, 32.53, 13.04, {}),  # forward and backward only: without optimizer states
        ("paper", 16, 20.6, 6.77, {}),
        ("lean", 32, 42.199, 0.0, {}),
        ({"optimizer": {"gradient_release": True}}, 32, 29.899, 0.0, {"batch": 1}),
        ("lean", 32, 23.499, 0.0, {"lora": 16}),
        (None, 32, 67.943, 0.0, SHARDED),
        ("lean", 32, 29.88, 0.0, SHARDED),
        ({"model": {"fuse_loss": False}}, 32, 31.656, 0.0, SHARDED),  # lean, when under FSDP2 it made its logits
    ],
)
def test_recorded_peaks(coat, layers, measured, without, changes):
    """Within 5 % of what H200s said (GiB): step, stack, step_batch_1, lora and sharded.json of benchmarks/results."""
    config = LlamaConfig(**{**LLAMA_2_7B.to_dict(), "num_hidden_layers": layers})
    training = Training(config, **{"batch": 4, "length": 2048, "coat": coat} | changes)
    assert estimate(training).peak / 2**30 - without == pytest.approx(measured, rel=0.05)


def test_logits_in_one_piece(monkeypatch):
    """With two tokens for each hidden unit all logits take as much as the FP32 sum of the pieces' gradients, and lie
    beside what lies beside that: the peak of this short, wide model moves by no more than a piece."""
    monkeypatch.setattr(loss, "library", lambda kind: loss._by_liger)
    config = LlamaConfig(**{**LLAMA_2_7B.to_dict(), "num_hidden_layers": 2, "vocab_size": 128256})
    training, peaks = Training(config, batch=4, length=2048, coat="lean"), []
    for arguments in ({loss.SIZE}, set()):
        monkeypatch.setattr(loss, "_liger", lambda arguments=arguments: (None, arguments))
        peaks.append(estimate(training).peak)
    one, several = peaks
    assert several - 2 * 2048 * 128256 <= one <= several


@pytest.mark.parametrize("coat", [None, "lean", "paper"])
def test_classes_are_those_of_predict(coat):
    """The same classes as :func:`hf_coat.memory.predict`, whose figures are exact; here rounded up as CUDA does."""
    training = Training(LLAMA, batch=2, length=64, coat=coat)
    model, make = ghost(training)
    with torch.autocast("cpu", torch.bfloat16):
        exact = predict(model, (2, 64), optimizer=None if coat is None else PRESETS[coat].optimizer)
    step = estimate(training)
    storages = 2 * 60  # more than this model keeps
    for name in ("weights", "gradients", "optimizer_states", "activations"):
        assert 0 <= getattr(step, name) - getattr(exact, name) < (512 + 8) * storages
    assert step.breakdown().peak == step.peak > exact.total - exact.gradients


def test_what_moves_it():
    full = of()
    assert of(batch=4).peak > full.peak and of(batch=4).weights == full.weights
    plain = of(coat=None)
    assert of(lora=4).gradients < full.gradients / 4 and of(lora=4, coat=None).weights > plain.weights
    assert of(lora=4).weights < full.weights, "the frozen base is stored as FP8"
    assert of(checkpointing=True, length=256).activations < of(length=256).activations
    assert of(accumulate=True).at_peak["gradients"] >= full.gradients
    shared = of(gpus=4, dtype="bfloat16")
    assert full.weights / 4 <= shared.weights < full.weights / 4 + 512 * 40
    assert shared.at_peak["whole units"] > 0 and full.activations == shared.activations
    assert estimates(Training(LLAMA, batch=2, length=64, dtype="bfloat16"), (1, 4)) == {1: full, 4: shared}
    assert of(dtype="float32").weights == pytest.approx(2 * full.weights, rel=0.02)  # buffers are float32 anyway
    assert plain.logits > full.logits


@pytest.mark.parametrize("coat", [None, "lean"])
def test_sharded_as_accelerate_does(coat):
    """Trained weights are FP32 and gathered as BF16: what is kept for the backward is what BF16 weights would keep."""
    half, wide = (of(gpus=4, coat=coat, dtype=dtype) for dtype in ("bfloat16", None))
    assert wide.gradients == pytest.approx(2 * half.gradients, rel=0.02)
    assert wide.weights == pytest.approx(2 * half.weights, rel=0.02)
    assert wide.optimizer_states == pytest.approx((1 if coat else 2) * half.optimizer_states, rel=0.02)
    assert wide.activations == half.activations < of(coat=coat, dtype="float32").activations
    assert wide.at_peak["whole units"] == half.at_peak["whole units"]
    adapted, base = (of(gpus=4, coat=coat, lora=4, dtype=dtype) for dtype in (None, "bfloat16"))
    assert adapted.weights == base.weights, "what is frozen stays as it is, and PEFT's adapters are FP32 already"


def test_codes_that_are_gathered():
    """Two units' converted weights are a byte a value and four a row; the rest, and other recipes, are BF16."""
    layer, root = 2 * (64 * 64 + 32 * 64) + 3 * 64 * 96, 2 * 512 * 64 + 64
    rows = 2 * (64 + 32) + 2 * 96 + 64
    norms = 2 * 64
    gradients = 2 * root
    values = 2 * (root + layer + norms) + gradients
    codes = 2 * root + layer + 4 * rows + 2 * norms + gradients
    for coat, expected in (("lean", codes), ({"model": {"fsdp_all_gather": "bf16"}}, values), ("paper", values)):
        for dtype in ("bfloat16", None):  # accelerate's FP32 weights are gathered as BF16, and codes are codes
            assert of(coat=coat, gpus=2, dtype=dtype).at_peak["whole units"] == expected
    # LoRA: only the adapters, FP32, have gradients; frozen weights are bytes already
    assert of(gpus=2, lora=4).at_peak["whole units"] < codes - gradients + layer / 2


def test_gradients_that_wait_to_be_reduced():
    """All of them whole from the first microbatch on, as BF16 where FSDP2 computes in it (test_trainer.py looks); and
    beside their sum a new one, at most the largest, that is added to it."""
    sizes = [2 * p.numel() for p in ghost(Training(LLAMA))[0].parameters()]
    rounding = 512 * len(sizes)
    for dtype in ("bfloat16", None):
        once, more = (of(gpus=4, dtype=dtype, length=256, accumulate=accumulate) for accumulate in (False, True))
        assert 0 <= more.peak - once.peak - sum(sizes) <= max(sizes) + rounding
        assert 0 <= more.at_peak["whole gradients"] - sum(sizes) <= rounding
        assert more.gradients == once.gradients, "what the optimizer is given"
    alone = of(accumulate=True)
    assert "whole gradients" not in alone.at_peak and alone.peak > of().peak


def test_gradients_that_are_released(monkeypatch):
    """One gradient at a time, in every class of the prediction; all of them, and the clipping's copies, without.

    So small a model's gradients would all be one batch: here none waits.
    """
    recipe = {"optimizer": {"gradient_release": True}}
    monkeypatch.setitem(GradientRelease.__init__.__kwdefaults__, "batch_bytes", 0)
    monkeypatch.setattr(memory, "BATCH_BYTES", 0)
    one, all_of_them = of(coat=recipe, length=16), of(coat="lean", length=16)  # few logits: the peak comes later
    largest = max(p.nbytes for p in ghost(Training(LLAMA))[0].parameters())
    assert one.gradients == largest < all_of_them.gradients / 2
    assert (one.weights, one.optimizer_states) == (all_of_them.weights, all_of_them.optimizer_states)
    assert one.at_peak.get("gradients", 0) <= largest and one.peak < all_of_them.peak
    model, batch = ghost(Training(LLAMA))[0], (2, 64)
    optimizer = HfCoatConfig.resolve(recipe).optimizer
    assert predict(model, batch, optimizer=optimizer).gradients == largest
    with pytest.raises(ValueError, match="gradient_release=True steps each parameter in every backward"):
        of(coat=recipe, accumulate=True)


@pytest.mark.parametrize("config", [LLAVA, QWEN2_VL, GEMMA3], ids=lambda config: config.model_type)
def test_vision_language_models(config):
    with_image, without = (of(config, length=384, images=images) for images in (1, 0))
    assert with_image.activations > without.activations
    assert with_image.weights == without.weights


def test_an_image_must_fit():
    with pytest.raises(ValueError, match="16 tokens each leave no room"):
        of(LLAVA, length=16)
    model, _ = ghost(Training(LLAVA))
    assert (batch_of(model, Training(LLAVA, images=2))["input_ids"][0] == 500).sum() == 2 * 16


def test_largest_batch():
    wide = LlamaConfig(**TEXT | {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32000})
    training = Training(wide, batch=3, length=2048, coat=None)
    known = {}
    most = largest_batch(training, 24, known, gpus=(1, 8))
    after = estimates(replace(training, batch=most + 1), (1,))
    assert known[most][1].fits(24) and not after[1].fits(24)
    before = len(known)
    assert before < 6
    more = largest_batch(replace(training, gpus=8), 24, known, gpus=(1,))
    after = estimates(replace(training, batch=more + 1), (8,))
    assert more >= most and known[more][8].fits(24) and not after[8].fits(24)
    assert largest_batch(training, 24, known) == most and len(known) < before + 6


def test_command(tmp_path, capsys):
    LlamaConfig(**TEXT | {"hidden_size": 2048, "intermediate_size": 8192}).save_pretrained(tmp_path)
    arguments = ["estimate", str(tmp_path), "--batch", "2", "--seq", "16384", "--vs", "bf16", "paper", "--card", "24"]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    for text in (
        "lean",
        "BF16, AdamW",
        "paper",
        "peak",
        "fits on 141 GB",
        "largest batch on 24 GB",
        "nothing was run",
    ):
        assert text in table
    assert "whole until reduced" not in table
    assert cli.main([*arguments[:2], "--gpus", "2", "--accumulate"]) == 0
    assert "gradients, whole until reduced" in capsys.readouterr().out
    assert cli.main([*arguments[:6], "--json", "--lora", "4"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record) == ["lean", "bf16"] and record["lean"]["fits"] == [24, 40, 48, 80, 141]
    assert cli.main(["estimate", str(tmp_path / "none")]) == 1
    assert "hf-coat estimate:" in capsys.readouterr().err


def test_states_are_the_optimizers_own():
    """Nothing about a state's format is known here: it is asked for its tensors."""
    sizes = [
        estimate_step(Net(), {"x": torch.empty(8, 512, device="meta")}, make)[1].optimizer_states
        for make in (
            lambda model: CoatAdamW(model.parameters()),
            lambda model: CoatAdamW(model.parameters(), group_size=32),
            lambda model: torch.optim.AdamW(model.parameters()),
        )
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1]


def test_states_take_no_memory():
    """A byte is a code, not an integer that a model looks into; real ones would be gigabytes."""
    made = []
    estimate_step(
        Net(),
        {"x": torch.empty(8, 512, device="meta")},
        lambda model: made.append(CoatAdamW(model.parameters())) or made[0],
    )
    (optimizer,) = made
    states = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    assert states and all(isinstance(tensor, FakeTensor) for tensor in states)
