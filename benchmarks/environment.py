"""What a figure was measured on: it goes into every result file."""

import importlib.metadata
import subprocess

import torch


def environment(*packages: str) -> dict:
    """GPU, commit, and the versions of torch, triton, transformers and the packages named."""
    git = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True)
    names = ("torch", "triton", "transformers", *packages)
    versions = {name: importlib.metadata.version(name) for name in names}
    where = {"gpu": torch.cuda.get_device_name(), "commit": git.stdout.strip() or None, "cuda": torch.version.cuda}
    return where | versions
