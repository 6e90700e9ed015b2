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
