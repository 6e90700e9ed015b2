"""What every test shares: the device, the ``gpu`` marker, and Triton's interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a module with kernels is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:  # one at the head of each equal part: the processes of pytest-xdist begin with one part each
        rest = [item for item in items if item not in slow]
        items[:] = [item for i, head in enumerate(slow) for item in (head, *rest[i :: len(slow)])]


@pytest.fixture
def device() -> str:
    """Where the tensors of a test live: ``"cuda"`` where there is one, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"
