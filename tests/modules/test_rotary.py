"""The rotary embeddings of attentions: which functions of transformers run as one kernel, and that they are equal."""

import importlib

import pytest
import torch

import hf_coat.modules.attention as attention
from hf_coat.modules.attention import ROTARY, _rotates, plain_rotary, rotate_patches, with_names

VISION = "apply_rotary_pos_emb_vision"
# Modeling file -> its vision attention and the shape in which that hands over its heads.
TOWERS = {
    "qwen2_vl": ("VisionAttention", (7, 4, 16)),
    "qwen2_5_vl": ("Qwen2_5_VLVisionAttention", (7, 4, 16)),
    "qwen3_vl": ("Qwen3VLVisionAttention", (7, 4, 16)),
    "glm4v": ("Glm4vVisionAttention", (7, 4, 16)),
    "video_llama_3": ("VideoLlama3VisionAttention", (7, 4, 16)),
    "mlcd": ("MLCDAttention", (2, 7, 4, 16)),
}


def modeling(name: str):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def heads(shape, dtype, device):
    """q and k as strided views of one projection's output, as towers have them, and float32 angles of patches."""
    draws = torch.Generator().manual_seed(0)
    qkv = torch.randn(*shape[:-2], 3, *shape[-2:], generator=draws).to(device, dtype)
    angles = 10 * torch.randn(shape[-3], shape[-1], generator=draws).to(device)
    return qkv[..., 0, :, :].requires_grad_(), qkv[..., 1, :, :].requires_grad_(), angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TOWERS)
def test_a_towers_rotation_and_its_gradients(name, dtype, device):
    kind, shape = TOWERS[name]
    forward, own = getattr(modeling(name), kind).forward, getattr(modeling(name), VISION)
    assert plain_rotary(forward) == VISION
    q, k, cos, sin = heads(shape, dtype, device)
    expected, actual = own(q, k, cos, sin), rotate_patches(q, k, cos, sin)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    grads = [torch.autograd.grad([*ys], [q, k], [dy, 2 * dy]) for ys in (expected, actual)]
    # Both compute in float32 and round once; a fused multiply-add may round to the neighbour, and a gradient of eager
    # code is the sum of two that are rounded: of values below 8, 2**-8 or 2**-24 of 8 each.
    step = 8 * 2 ** (-8 if dtype == torch.bfloat16 else -23)
    for ours, theirs in zip((*actual, *grads[1]), (*expected, *grads[0]), strict=True):
        assert ours.dtype == theirs.dtype == dtype and ours.shape == theirs.shape == shape
        assert torch.allclose(ours, theirs, rtol=0, atol=2 * step)
    changed = sum((a != b).float().mean() for a, b in zip(actual, expected, strict=True)) / 2
    assert dtype == torch.float32 or changed < 1e-2
    empty = [x[:0] if x.dim() < 4 else x[:, :0] for x in (q, k)]
    assert [y.shape for y in rotate_patches(*empty, cos[:0], sin[:0])] == [x.shape for x in empty]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_angles_of_sections_are_rotated_as_any(name):
    """Time, height and width share a head's angles there; those are put together once, for all layers."""
    kind = {"qwen2_vl": "Qwen2VLAttention", "qwen2_5_vl": "Qwen2_5_VLAttention", "qwen3_vl": "Qwen3VLTextAttention"}
    assert plain_rotary(getattr(modeling(name), kind[name]).forward) == "apply_rotary_pos_emb"


def half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def in_bf16(q, k, cos, sin):
    cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def promoted(q, k, cos, sin):
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def batched(q, k, cos, sin):
    return tuple(x[None] for x in modeling("qwen2_5_vl").apply_rotary_pos_emb_vision(q, k, cos, sin))


def backwards(q, k, cos, sin):
    return modeling("qwen2_5_vl").apply_rotary_pos_emb_vision(q, k, cos, -sin)


@pytest.mark.parametrize("other", [in_bf16, promoted, batched, backwards, lambda q, k: (q, k), None])
def test_other_functions_of_that_name_are_left_alone(other):
    """Which round more often, give another dtype or shape, turn the other way, or take other arguments."""
    assert not _rotates(other, VISION)


def test_other_shapes_take_the_models_own_way(device, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "coat_rotary", lambda *args: calls.append(args))
    q, k, cos, sin = heads((7, 4, 16), torch.float32, device)
    assert rotate_patches(q, k, cos[None], sin[None]) is None  # angles of each image
    assert rotate_patches(q, k, cos[:, :8], sin[:, :8]) is None  # a part of each head
    assert rotate_patches(q, k.bfloat16(), cos, sin) is None
    assert not calls
    forward = modeling("qwen2_5_vl").Qwen2_5_VLVisionAttention.forward
    fused, own = with_names(forward, VISION).__globals__[VISION], forward.__globals__[VISION]
    expected = own(q, k.bfloat16(), cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(fused(q, k.bfloat16(), cos, sin), expected, strict=True))
    assert forward.__globals__[VISION] is own and list(ROTARY) == ["apply_rotary_pos_emb", VISION]
