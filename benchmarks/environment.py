"""What a figure was measured on: it goes into every result file."""

import importlib.metadata
import subprocess

import torch


def environment(*packages: str) -> dict:
    """GPU, commit, and the versions of torch, triton, transformers and the packages named."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    names = ("torch", "triton", "transformers", *packages)
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"gpu": torch.cuda.get_device_name(), "commit": commit, "cuda": torch.version.cuda, **versions}
