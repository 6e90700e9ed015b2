"""What the tests of the ops share."""

import pytest
import torch


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Every buffer that ``torch.empty`` allocates is filled with garbage first, so that what is not written shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        out.view(torch.uint8).fill_(0x7E) if out.numel() else None
        return out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def same_codes():
    """``same_codes(actual, expected)``: at most one FP8 step apart, and at least 99.9 % equal (-0 and 0 are equal)."""

    def same_codes(actual, expected):
        a, b = actual.cpu().float(), expected.cpu().float()
        assert a.shape == b.shape and actual.dtype == expected.dtype
        differ = a != b
        assert not a.numel() or differ.float().mean().item() <= 1e-3
        steps = (actual.cpu().view(torch.uint8).int() - expected.cpu().view(torch.uint8).int()).abs()
        assert (steps[differ] <= 1).all()

    return same_codes
