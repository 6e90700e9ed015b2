"""The launchers: the ready configurations of accelerate, and an example in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_configurations(name, monkeypatch):
    """Accelerate reads them, and tells a script what they say."""
    file = EXAMPLES / "accelerate" / f"{name}.yaml"
    assert load_config_from_file(str(file)).num_processes == 2
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment.get("FSDP_VERSION") == {"ddp": None, "fsdp2": "2"}[name]
    if name == "fsdp2":
        assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
        assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"


def test_an_example_in_two_processes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} is the number after {i - 1}, and before {i + 1}\n" for i in range(400)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [EXAMPLES / "sft.py", "--coat", "lean", "--dataset_name", text, "--output_dir", tmp_path / "run"]
    command += ["--max_steps", "2", "--held_out", "8", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"]
    environment = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-5000:]
    for line in ("What COAT did to the model", "perplexity on held-out text, before", "after"):
        assert done.stdout.count(line) == 1, done.stdout
    assert done.stderr.count("CoatLinear") == 1, "the conversion is told once"
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "coat_config.json", "coat_run.json"} <= files
