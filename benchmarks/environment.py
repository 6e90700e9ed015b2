"""What a figure was measured on, and how to measure it in a process of its own."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(*packages: str) -> dict:
    """GPU, commit, and the versions of torch, triton, transformers and the packages named; None for a missing one."""
    git = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    where = {"gpu": gpu, "commit": git.stdout.strip() or None, "cuda": torch.version.cuda}
    return where | {name: _version(name) for name in ("torch", "triton", "transformers", *packages)}


def fresh_process(
    script: str, *arguments: str, timeout: float | None = None, environ: Mapping[str, str] | None = None
) -> dict:
    """What ``python script *arguments --json FILE`` wrote into the file, or ``{"error": what it said at its end}``.

    ``environ`` is added to the environment that it runs in.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, script, *arguments, "--json", str(result)]
        try:
            environment = os.environ | (environ or {})
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {timeout:g} s"}
        if done.returncode or not result.exists():
            said = (done.stderr or done.stdout).strip().splitlines()
            return {"error": "\n".join([f"exit status {done.returncode}", *said[-25:]])}
        return json.loads(result.read_text())
