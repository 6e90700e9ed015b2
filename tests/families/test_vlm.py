"""Vision-language models of transformers, tiny and random: their regions, and that each of them trains as before.

How far a gradient may be from that of the unconverted twin is derived as in test_families.py, by which this page is
helped: from a twin with errors as large as those of rounding to FP8.
"""

import copy
import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoModelForImageTextToText

import hf_coat
from hf_coat import CoatConfig, memory
from hf_coat.config import Keep, Region
from hf_coat.modules import CoatAttention, CoatFrozenLinear, CoatLinear, Converted, attention, loss
from hf_coat.policy import find_regions
from hf_coat.probe import Probe

_spec = importlib.util.spec_from_file_location("families", Path(__file__).with_name("test_families.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

needs_library = pytest.mark.skipif(
    loss.library("cpu") is None, reason="the loss of CPU tensors needs torch 2.13 or newer"
)
IMAGE = 120  # the id of image tokens
ANSWER = 5  # tokens at the end of a sequence that have labels
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
LLM = dict(**SIZES, vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_key_value_heads=2)
TEXT = dict(**LLM, rms_norm_eps=1e-2, max_position_embeddings=64)
IDS = dict(image_token_id=IMAGE)
QWEN = dict(**IDS, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123)
MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))


def patches(size: int, **more) -> dict:
    """A tower's configuration; its images are 16 x 16."""
    return dict(**SIZES, image_size=16, patch_size=size, layer_norm_eps=1e-2, **more)


def qwen_tower(**more) -> dict:
    tower = dict(depth=2, hidden_size=64, num_heads=4, patch_size=4, temporal_patch_size=2, spatial_merge_size=2)
    return tower | more


def llava(**more) -> transformers.LlavaConfig:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**patches(8)), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE, vision_feature_layer=-1, **more,
    )  # fmt: skip


# Where the regions are, in most of them.
VISION, PROJECTOR, LANGUAGE = "model.vision_tower", ("model.multi_modal_projector",), "model.language_model"


@dataclass(frozen=True)
class VLM:
    """A tiny model: its configuration, where its regions are, and how many tokens stand for an image."""

    config: transformers.PreTrainedConfig
    vision: str = VISION
    projector: tuple[str, ...] = PROJECTOR
    language: str = LANGUAGE
    tokens: int = 4
    pixels: tuple[int, ...] = (2, 3, 16, 16)  # of the batch's two images
    inputs: dict = field(default_factory=dict)


MERGERS = dict(vision="model.visual", projector=("model.visual.merger",), pixels=(32, 96))
GRIDS = dict(image_grid_thw=torch.tensor([[1, 4, 4]] * 2))
IDEFICS = dict(
    vision="model.vision_model", projector=("model.connector",), language="model.text_model", pixels=(2, 1, 3, 16, 16)
)
VLMS = {
    "llava": VLM(llava()),
    "llava_next": VLM(
        transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**patches(8)), text_config=transformers.LlamaConfig(**TEXT),
            image_token_index=IMAGE, vision_feature_layer=-1, image_grid_pinpoints=[[16, 32]],
        ),
        tokens=14, pixels=(2, 3, 3, 16, 16), inputs=dict(image_sizes=torch.tensor([[16, 32]] * 2)),
    ),
    "qwen2_vl": VLM(
        transformers.Qwen2VLConfig(
            vision_config=qwen_tower(embed_dim=64, mlp_ratio=2), text_config=TEXT | MROPE, **QWEN
        ),
        **MERGERS, inputs=GRIDS,
    ),
    "qwen2_5_vl": VLM(
        transformers.Qwen2_5_VLConfig(
            vision_config=qwen_tower(
                intermediate_size=96, out_hidden_size=64, window_size=16, fullatt_block_indexes=[1]
            ),
            text_config=TEXT | MROPE, **QWEN,
        ),
        **MERGERS, inputs=GRIDS,
    ),
    "qwen3_vl": VLM(
        transformers.Qwen3VLConfig(
            vision_config=qwen_tower(
                intermediate_size=96, out_hidden_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0]
            ),
            text_config=dict(**TEXT, head_dim=16, **MROPE), **QWEN,
        ),
        **{**MERGERS, "projector": ("model.visual.merger", "model.visual.deepstack_merger_list.0")}, inputs=GRIDS,
    ),
    "gemma3": VLM(
        transformers.Gemma3Config(
            vision_config=patches(4, model_type="siglip_vision_model"),
            text_config=dict(
                **TEXT, head_dim=16, query_pre_attn_scalar=16, sliding_window=6,
                layer_types=["sliding_attention", "full_attention"],
            ),
            mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=121, eoi_token_index=122,
        ),
    ),
    "idefics3": VLM(
        transformers.Idefics3Config(
            vision_config=patches(4), text_config=transformers.LlamaConfig(**TEXT), scale_factor=2, **IDS
        ),
        **IDEFICS,
    ),
    "smolvlm": VLM(
        transformers.SmolVLMConfig(
            vision_config=patches(4), text_config=transformers.LlamaConfig(**TEXT), scale_factor=2, **IDS
        ),
        **IDEFICS,
    ),
    "internvl": VLM(
        transformers.InternVLConfig(
            vision_config=dict(**SIZES, image_size=[16, 16], patch_size=[4, 4], layer_norm_eps=1e-2),
            text_config=transformers.Qwen2Config(**TEXT), image_seq_length=4, **IDS,
        ),
    ),
    "paligemma": VLM(
        transformers.PaliGemmaConfig(
            vision_config=patches(8, projection_dim=64, model_type="siglip_vision_model"),
            text_config=transformers.GemmaConfig(**TEXT, head_dim=16), projection_dim=64, hidden_size=64,
            image_token_index=IMAGE,
        ),
    ),
    "mllama": VLM(
        transformers.MllamaConfig(
            vision_config=dict(
                hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_global_layers=1, attention_heads=4,
                image_size=16, patch_size=8, vision_output_dim=128, intermediate_layers_indices=[0], max_num_tiles=2,
                supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
            ),
            text_config=dict(**TEXT, cross_attention_layers=[1]), image_token_index=IMAGE,
        ),
        vision="model.vision_model", tokens=1, pixels=(2, 1, 2, 3, 16, 16),
        inputs=dict(
            aspect_ratio_ids=torch.ones(2, 1, dtype=torch.long), aspect_ratio_mask=torch.ones(2, 1, 2).long(),
        ),
    ),
}  # fmt: skip
every_vlm = pytest.mark.parametrize("name", VLMS)

# What trains -> which regions do not.
FROZEN = {
    "everything": (),
    "tower frozen": (Region.VISION,),
    "projector only": (Region.VISION, Region.LANGUAGE, Region.HEAD),
}


def build(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """A model whose every parameter is random: a bias or a gate that a conversion loses is seen."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape)) if p.ndim < 2 else p.normal_(0, 0.1)
    return model.train()


def batch(name: str, images: bool = True) -> dict:
    """Two sequences, each with an image and an answer at its end; or the same of text alone."""
    vlm, draws = VLMS[name], torch.Generator().manual_seed(1)
    length = 8 + vlm.tokens
    ids = torch.randint(3, 100, (2, length), generator=draws)
    inputs = {}
    if images:
        ids[:, 2 : 2 + vlm.tokens] = IMAGE
        inputs = dict(pixel_values=torch.randn(vlm.pixels, generator=draws), **vlm.inputs)
        if name == "mllama":
            inputs["cross_attention_mask"] = torch.ones(2, length, 1, 2, dtype=torch.long)
    if name in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    labels = torch.where(torch.arange(length) < length - ANSWER, -100, ids)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **inputs)


def freeze(model: nn.Module, regions: tuple[Region, ...]) -> nn.Module:
    roots = find_regions(model)
    for name, p in model.named_parameters():
        of = [root for root in roots if name.startswith(f"{root}.")]
        p.requires_grad_(not of or roots[max(of, key=len)] not in regions)
    return model


@contextmanager
def watching(module: nn.Module):
    """The bytes that autograd is given to keep while ``module`` runs, in a list; parameters are not counted."""
    kept, held = [], {p.untyped_storage()._cdata for p in module.parameters()}

    def pack(t):
        if t.untyped_storage()._cdata not in held:
            kept.append(t.nbytes)
        return t

    def enter(*_):
        hooks.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        hooks[-1].__enter__()

    def leave(*_):
        hooks.pop().__exit__(None, None, None)

    hooks, handles = [], (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    yield kept
    for handle in handles:
        handle.remove()


# --- regions and policies ---


@every_vlm
def test_regions(name):
    vlm, model = VLMS[name], build(VLMS[name].config)
    expected = {vlm.vision: "vision", vlm.language: "language", "lm_head": "head"}
    expected |= dict.fromkeys(vlm.projector, "projector")
    assert find_regions(model) == expected
    report = hf_coat.apply_coat(model)
    assert list(report.regions) == ["vision", "projector", "language", "head"]
    assert report.regions["vision"].startswith(f"{vlm.vision}: ") and "; lean; " in report.regions["vision"]
    assert vlm.vision in str(report) and "projector: " in report.summary() and "region=vision" in repr(model)
    assert hf_coat.apply_coat(model) == report


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])  # whose merger, inside the tower, trains
def test_a_frozen_tower_rests_in_bf16(name):
    """Unless it is asked for, or its weights are stored as FP8. Its rotary embeddings are fused, where it has any."""
    model = freeze(build(VLMS[name].config), (Region.VISION,))
    tower = model.get_submodule(VLMS[name].vision)

    def converted() -> list[nn.Module]:
        return [module for module in tower.modules() if isinstance(module, (CoatLinear, Converted))]

    def rests() -> bool:
        fused = [m.coat_state for m in converted() if isinstance(m, CoatAttention)]
        assert len(fused) == len(converted()) == (0 if name == "llava" else 2), "attentions alone"
        return all(state.keep is Keep.BF16 and state.rotary for state in fused)

    report = hf_coat.apply_coat(model)
    assert rests() and "in a frozen tower" in str(report) and "nothing trains" in report.regions["vision"]
    assert "lean" in hf_coat.apply_coat(model, CoatConfig(activations={"vision": "lean"})).regions["vision"]
    assert any(isinstance(module, CoatLinear) for module in converted())
    hf_coat.apply_coat(model)
    assert rests(), "turned back"
    left = hf_coat.apply_coat(model, CoatConfig(modules_to_not_convert=["vision"]))
    assert not converted() and left.regions["vision"].endswith("BF16, as modules_to_not_convert says")
    hf_coat.apply_coat(model, CoatConfig(frozen_weights="fp8"))
    assert any(isinstance(module, CoatFrozenLinear) for module in tower.modules())


def qwen_of(inner: int) -> nn.Module:
    """A Qwen2.5-VL with this many values inside its tower's MLPs; the tower does not train."""
    config = copy.deepcopy(VLMS["qwen2_5_vl"].config)
    config.vision_config.intermediate_size = inner
    return freeze(build(config), (Region.VISION,))


@needs_library
def test_a_frozen_tower_of_sizes_that_bf16_is_slow_with():
    """As Qwen2.5-VL's own 3420, which is no multiple of 8; where that is most of its weights."""
    model, inputs = qwen_of(100), batch("qwen2_5_vl")
    assert_trains_as_before(model, inputs)
    report = hf_coat.apply_coat(model)
    block = "model.visual.blocks.0"
    assert {f"{block}.mlp", f"{block}.mlp.up_proj", f"{block}.attn.proj", f"{block}.norm1"} <= report.converted.keys()
    assert report.kept["model.visual.merger.mlp.0"].startswith("projector")
    vision = report.regions["vision"]
    assert "frozen" in vision and "; lean; " in vision and "sizes (100) are no multiples of 8" in vision
    with watching(model.get_submodule(block)) as kept:
        model(**inputs)
    assert not kept
    measured = memory.measure(model, inputs, torch.optim.SGD(model.parameters()))
    assert memory.predict(model, inputs).activations == measured.activations
    with Probe(model) as probe:
        model(**inputs)
    assert f"{block}.mlp.down_proj" in probe.figures()
    assert "multiples" not in hf_coat.apply_coat(freeze(model, ())).regions["vision"], "it trains"
    mlps = CoatConfig(modules_to_not_convert=["model.visual.blocks.*.mlp.*"])
    left = hf_coat.apply_coat(freeze(model, (Region.VISION,)), mlps)
    assert "BF16" in left.regions["vision"] and f"{block}.attn.proj" not in left.converted, "what is left is aligned"
    left = hf_coat.apply_coat(model, CoatConfig(modules_to_not_convert=["visual"]))
    assert left.regions["vision"].endswith("BF16, as modules_to_not_convert says")

    for inner in (96, 20):  # multiples of 8; a fifth of the weights
        report = hf_coat.apply_coat(qwen_of(inner))
        assert report.kept[f"{block}.mlp.up_proj"].startswith("in a frozen tower")
        assert "faster where nothing trains" in report.regions["vision"]


@pytest.mark.parametrize("trains", ["everything", "tower frozen"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_each_attention_rotates_in_one_pass(name, trains, monkeypatch):
    model, calls, own = freeze(build(VLMS[name].config), FROZEN[trains]), [], attention.coat_rotary
    report = hf_coat.apply_coat(model)
    monkeypatch.setattr(attention, "coat_rotary", lambda *args: calls.append(args[0].shape) or own(*args))
    model(**batch(name))
    assert len(calls) == 2 + 2, "layers of the tower, of the language model"
    assert sum("fused rotary embedding" in what for what in report.converted.values()) == 2 + 2


@every_vlm
def test_what_each_region_does_by_itself(name):
    vlm, model = VLMS[name], build(VLMS[name].config)
    report = hf_coat.apply_coat(model)
    for path, module in model.named_modules():
        region = next((root for root in (*vlm.projector, vlm.vision, vlm.language) if path.startswith(f"{root}.")), "")
        region = "projector" if path in vlm.projector or region in vlm.projector else region
        if region == "projector":
            assert not isinstance(module, (CoatLinear, Converted))
        elif type(module) is nn.Linear:
            assert path == "lm_head", report.kept.get(path)
        elif isinstance(module, CoatAttention):
            assert module.coat_state.keep is (Keep.LEAN if region == vlm.vision else Keep.BF16)
    assert report.converted["lm_head"].startswith("CoatHead")


def test_a_model_of_text_has_no_regions():
    config = transformers.LlamaConfig(**TEXT)
    model = transformers.LlamaForCausalLM(config)
    report = hf_coat.apply_coat(model, CoatConfig(activations={"vision": "bf16"}))
    assert report.regions == {} and report.unmatched == ["vision"] and "region=" not in repr(model)


def test_a_resampler_and_a_linear_patch_embedding():
    """Idefics2's perceiver is a nested model that reads no pixels; Siglip2's tower reads patches by a linear."""
    perceiver = dict(
        resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2, num_key_value_heads=2, resampler_head_dim=16
    )
    idefics2 = build(
        transformers.Idefics2Config(
            vision_config=patches(8), text_config=transformers.MistralConfig(**TEXT), **IDS,
            perceiver_config=dict(**perceiver, hidden_size=64),
        )
    )  # fmt: skip
    roots = find_regions(idefics2)
    assert roots["model.connector.perceiver_resampler"] == "projector" == roots["model.connector.modality_projection"]
    tower = dict(**SIZES, patch_size=4, num_patches=16, model_type="siglip2_vision_model")
    text = dict(**SIZES, vocab_size=128, max_position_embeddings=16, projection_size=64)
    siglip2 = transformers.Siglip2Model(transformers.Siglip2Config(vision_config=tower, text_config=text))
    assert find_regions(siglip2) == {"text_model": "language", "vision_model": "vision"}
    report = hf_coat.apply_coat(siglip2)
    assert report.kept["vision_model.embeddings.patch_embedding"] == "patch embedding"


def test_the_user_decides():
    def report(**settings):
        return hf_coat.apply_coat(build(llava()), CoatConfig(**settings))

    projector = "model.multi_modal_projector.linear_1"
    assert projector in report(activations={"projector": "lean"}).converted
    assert projector in report(activations="lean").converted
    assert projector in report(activations={"*.linear_1": "lean"}).converted
    assert projector in report(activations={"vision": "bf16"}).kept

    kept = report(activations={"vision": "bf16"})
    assert kept.kept["model.vision_tower.encoder.layers.0.mlp"] == "activations='bf16'"
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in kept.converted and kept.unmatched == []
    assert "model.language_model.layers.0.mlp" in kept.converted and "bf16" in kept.regions["vision"]

    text_only = report(modules_to_not_convert=["vision"])
    assert not any("vision_tower" in name for name in text_only.converted) and text_only.unmatched == []

    moved = report(regions={"vision_tower.encoder.layers.1": "projector", "nowhere": "head"})
    assert moved.kept["model.vision_tower.encoder.layers.1.mlp.fc1"].startswith("projector")
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in moved.converted and moved.unmatched == ["nowhere"]

    assert "use 'token'" in report(granularity="tensor").regions["language"]


# --- training ---


def assert_trains_as_before(model: nn.Module, inputs: dict) -> None:
    """Loss and gradients of the converted model are as near as those of twins with errors as large as rounding's."""
    expected, grads = families.train(model, inputs)
    converted = copy.deepcopy(model)
    report = hf_coat.apply_coat(converted)
    coat_loss, coat_grads = families.train(converted, inputs)
    twins = [families.train(twin, inputs) for twin in families.disturbed(model, report)]

    assert (coat_loss - expected).abs() <= 3 * torch.stack([twin[0] - expected for twin in twins]).abs().max()
    assert coat_grads.keys() == grads.keys() and all(model.get_parameter(n).requires_grad for n in grads)
    error = torch.cat([(coat_grads[n] - g).flatten() for n, g in grads.items()]).norm()
    allowed = families.typical([torch.cat([(twin[n] - g).flatten() for n, g in grads.items()]) for _, twin in twins])
    assert error <= families.IN_ALL * allowed
    assert allowed < 0.5 * torch.cat([g.flatten() for g in grads.values()]).norm()


@pytest.mark.parametrize("trains", FROZEN)
@every_vlm
def test_loss_and_gradients(name, trains):
    assert_trains_as_before(freeze(build(VLMS[name].config), FROZEN[trains]), batch(name))


@pytest.mark.parametrize("trains", [("vision",), ("language",), ("head",), ("vision", "head"), ("vision", "language")])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])  # whose projector is beside the tower, and in it
def test_any_subset_of_regions_trains(name, trains):
    model = freeze(build(VLMS[name].config), tuple(region for region in Region if region.value not in trains))
    assert_trains_as_before(model, batch(name))


@every_vlm
def test_a_frozen_region_keeps_nothing_that_no_gradient_needs(name):
    vlm, inputs = VLMS[name], batch(name)
    kept = {}
    for trains, frozen in FROZEN.items():
        model = freeze(build(vlm.config), frozen)
        hf_coat.apply_coat(model)
        tower, language = model.get_submodule(vlm.vision), model.get_submodule(vlm.language)
        for merger in (m for m in vlm.projector if m.startswith(vlm.vision)):  # its own are the projector's
            model.get_submodule(merger).requires_grad_(False)
        with watching(tower) as vision, watching(language) as text:
            model(**inputs)
        kept[trains] = sum(vision), sum(text)
    assert kept["everything"][0] > 0 and kept["tower frozen"][0] == kept["projector only"][0] == 0
    if not vlm.projector[0].startswith(vlm.vision):  # else nothing is left that trains
        assert 0 < kept["projector only"][1] < kept["everything"][1]


def test_a_frozen_linear_keeps_nothing_of_its_input():
    """With a projector in front of a frozen language model, only what the input's gradient needs is kept: what norms
    read (a byte a value), gate and up, and the attention's own; no linear's input."""
    model = freeze(build(llava()), FROZEN["projector only"]).bfloat16()
    hf_coat.apply_coat(model, CoatConfig(activations="lean", modules_to_not_convert=["projector", "vision"]))
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch("llava").items()}
    with watching(model.model.language_model.layers[0]) as kept:
        model(**inputs)
    tokens = inputs["input_ids"].numel()
    norms, mlp, attention = 2 * (64 + 1 + 4), 2 * (96 + 1) + 4, 64 + 32 + 32 + 4 + 2 + 2
    scales = 2 * 4 + 6 * 4  # of linears' inputs, per token; and of weights, per row of each weight
    weights = 4 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    rotary = 2 * 16 * 2 * tokens  # cos and sin
    assert sum(kept) <= tokens * (norms + mlp + attention + scales) + weights + rotary


@pytest.mark.parametrize("frozen", [(), (Region.VISION,), (Region.VISION, Region.LANGUAGE)])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_gradient_checkpointing(name, frozen, reentrant):
    results = []
    for checkpointing in (False, True):
        model = freeze(build(VLMS[name].config), frozen)
        hf_coat.apply_coat(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        results.append(families.train(model, batch(name)))
    assert results[0][0] == results[1][0] and results[0][1].keys() == results[1][1].keys()
    for grad in results[0][1]:
        assert torch.allclose(results[0][1][grad], results[1][1][grad], rtol=1e-4, atol=1e-6), grad


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mllama"])
def test_text_alone_in_between(name):
    """A batch without images gives the tower no gradient, and leaves the next batch with one what it was."""
    model = build(VLMS[name].config)
    hf_coat.apply_coat(model)
    expected, grads = families.train(model, batch(name))
    _, text = families.train(model, batch(name, images=False))
    vision = {n for n in grads if n.startswith(VLMS[name].vision)}
    assert vision and not any(text[n].any() for n in vision & text.keys())
    again, grads_again = families.train(model, batch(name))
    assert again == expected and all(torch.equal(grads_again[n], g) for n, g in grads.items())


@pytest.mark.parametrize("name", ["llava", "gemma3", "smolvlm", "internvl"])
def test_several_images_in_a_sample(name):
    """Both images in the first sample, the second is text alone."""
    vlm, inputs = VLMS[name], batch(name)
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"]], dim=1)
    ids[1] = ids[1].where(ids[1] != IMAGE, 5)
    inputs |= dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.where(ids != IMAGE, -100))
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if name == "smolvlm":  # images of a sample, [1, 2, ...], and none of the other
        inputs["pixel_values"] = torch.cat([inputs["pixel_values"].transpose(0, 1), torch.zeros(1, 2, 3, 16, 16)])
    assert_trains_as_before(build(vlm.config), inputs)


@needs_library
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_images_of_padding_take_no_memory(name):
    """These models leave out images that are all zeros, and how many are left decides how much is kept."""
    if name == "smolvlm" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("the SmolVLM of this transformers cannot run under autocast")
    model, inputs = build(VLMS[name].config), batch(name)
    hf_coat.apply_coat(model)
    padding = torch.zeros(2, 3, *inputs["pixel_values"].shape[2:])
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], padding], dim=1)
    before = inputs["pixel_values"].clone()
    with torch.autocast("cpu", torch.bfloat16):  # the images are cast before they are looked at
        predicted = memory.predict(model, inputs).activations
        assert predicted == memory.measure(model, inputs, torch.optim.SGD(model.parameters())).activations
        inputs["pixel_values"] = before[:, :1]
        assert predicted == memory.predict(model, inputs).activations
    model.bfloat16()
    inputs["pixel_values"] = before
    predicted = memory.predict(model, inputs).activations
    assert predicted == memory.measure(model, inputs, torch.optim.SGD(model.parameters())).activations
    assert torch.equal(inputs["pixel_values"], before)


def test_dynamic_resolution_and_video():
    """Qwen's images have any number of patches; two in one sample, none in the other, then a video of two frames."""
    model, draws = build(VLMS["qwen2_5_vl"].config), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (2, 30), generator=draws)
    ids[0, 2:6], ids[0, 8:16] = IMAGE, IMAGE  # 4 x 4 and 4 x 8 patches, four to a token
    images = dict(
        pixel_values=torch.randn(16 + 32, 96, generator=draws), image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 8]])
    )
    assert_trains_as_before(model, dict(input_ids=ids, labels=ids, mm_token_type_ids=(ids == IMAGE).int(), **images))
    ids = torch.where(ids == IMAGE, 5, ids)
    ids[0, 2:10] = 121  # two frames of 4 x 4 patches
    video = dict(pixel_values_videos=torch.randn(32, 96, generator=draws), video_grid_thw=torch.tensor([[2, 4, 4]]))
    assert_trains_as_before(model, dict(input_ids=ids, labels=ids, mm_token_type_ids=2 * (ids == 121).int(), **video))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_packed_samples_do_not_see_each_other(name):
    """Two samples in one row, told apart by their positions, lose and learn what they do in two rows."""
    model, given = build(VLMS[name].config), []
    hf_coat.apply_coat(model)
    inputs = batch(name)
    inputs.pop("attention_mask")
    language = model.get_submodule(VLMS[name].language)
    seen = language.register_forward_pre_hook(lambda _, args, kw: given.append(kw["position_ids"]), with_kwargs=True)
    expected, grads = families.train(model, inputs)
    seen.remove()
    tensors = {key: value for key, value in inputs.items() if value.shape == inputs["input_ids"].shape}
    row = inputs | {key: value.reshape(1, -1) for key, value in tensors.items()}
    length = inputs["input_ids"].shape[1]
    row["position_ids"] = torch.arange(length).repeat(2)[None]
    if name == "qwen2_5_vl":  # in front of time, height and width
        row["position_ids"] = torch.cat([row["position_ids"][None], given[0][-3:].reshape(3, 1, -1)])
    packed, packed_grads = families.train(model, row | {"use_cache": False})
    assert torch.allclose(packed, expected, rtol=1e-3)
    error = torch.cat([(packed_grads[n] - g).flatten() for n, g in grads.items()]).norm()
    assert error < 1e-2 * torch.cat([g.flatten() for g in grads.values()]).norm()


@pytest.mark.parametrize(
    ("name", "targets", "region"),
    [
        ("llava", r".*vision_tower.*\.(q_proj|fc1)", VISION),
        ("llava", r".*projector\.linear_1", PROJECTOR[0]),
        ("llava", r".*language_model.*\.v_proj", LANGUAGE),
        ("llava", "lm_head", "lm_head"),
        ("qwen2_5_vl", r".*visual\.blocks.*\.(qkv|up_proj)", "model.visual"),
        ("qwen2_5_vl", r".*visual\.merger\.mlp\.0", "model.visual.merger"),
    ],
)
def test_lora_in_a_region(name, targets, region):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    vlm, model, inputs = VLMS[name], build(VLMS[name].config), batch(name)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    _, expected = families.train(model, inputs)
    report = hf_coat.apply_coat(model)
    assert list(report.regions) == ["vision", "projector", "language", "head"]
    _, grads = families.train(model, inputs)
    assert grads.keys() == expected.keys() and all(region in name and "lora" in name for name in grads)
    for path, grad in expected.items():
        assert (grads[path] - grad).norm() < 0.5 * grad.norm(), path
    with watching(model.get_submodule(f"base_model.model.{vlm.vision}")) as kept:
        model(**inputs)
    assert (sum(kept) > 0) == region.startswith(vlm.vision)


@needs_library
@every_vlm
def test_no_image_token_meets_the_head(name, monkeypatch):
    rows, own = [], loss._FusedLoss.apply
    monkeypatch.setattr(loss._FusedLoss, "apply", lambda hidden, *rest: rows.append(len(hidden)) or own(hidden, *rest))
    model = build(VLMS[name].config)
    hf_coat.apply_coat(model)
    outputs = model(**batch(name))
    outputs.loss.backward()
    assert rows == [2 * ANSWER] and outputs.logits.product.value is None


# --- generation, checkpoints, and out again ---


@every_vlm
def test_generates_saves_loads_and_is_removed(name, tmp_path):
    model, inputs = build(VLMS[name].config).eval(), batch(name)
    inputs.pop("labels")
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**inputs).logits
    classes = [type(module) for module in model.modules()]
    hf_coat.apply_coat(model)
    generated = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3
    with torch.no_grad():
        converted = model(**inputs).logits
    assert not torch.equal(converted, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in plain.items())
    hf_coat.apply_coat(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, converted)
    hf_coat.remove_coat(model)
    assert [type(module) for module in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


@needs_library
def test_memory_of_a_frozen_tower_is_predicted_and_measured():
    model, inputs = freeze(build(llava()), (Region.VISION,)), batch("llava")
    hf_coat.apply_coat(model)
    measured = memory.measure(model, inputs, torch.optim.SGD(model.parameters()))
    assert memory.predict(model, inputs).activations == measured.activations
    everything = memory.measure(freeze(model, ()), inputs, torch.optim.SGD(model.parameters()))
    assert measured.activations < everything.activations
