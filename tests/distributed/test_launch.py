"""The launchers: the ready configurations of accelerate, and the examples in two processes."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import Dataset

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


def in_two_processes(folder, script, *options):
    """What an example says when torchrun starts it twice, and the files it leaves in ``folder``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [EXAMPLES / script, "--coat", "lean", "--output_dir", folder, "--max_steps", "2"]
    command += ["--per_device_train_batch_size", "2", "--disable_tqdm", "true", *options]
    environment = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stderr.count("CoatLinear") == 1, "the conversion is told once"
    files = {path.name for path in folder.iterdir()}
    assert {"coat_config.json", "coat_run.json"} <= files
    return done.stdout, files


def said_once(printed, *lines):
    for line in lines:
        assert printed.count(line) == 1, printed


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{i} is the number after {i - 1}, and before {i + 1}\n" for i in range(400)))
    return file


def test_sft(tmp_path, text):
    printed, files = in_two_processes(tmp_path / "run", "sft.py", "--dataset_name", text, "--held_out", "8")
    said_once(printed, "What COAT did to the model", "perplexity on held-out text, before", "held-out text, after")
    assert "model.safetensors" in files


def test_lora(tmp_path, text, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    data = importlib.import_module("data")
    for part in data.small_llama(Dataset.from_text(str(text)), hidden_size=64, intermediate_size=96):
        part.save_pretrained(tmp_path / "model")
    printed, files = in_two_processes(
        tmp_path / "run", "lora.py", "--model_name_or_path", tmp_path / "model", "--dataset_name", text, "--held_out",
        "8",
    )  # fmt: skip
    said_once(printed, "perplexity on held-out text, before", "held-out text, after")
    assert "adapter_model.safetensors" in files and "merged" not in files


def test_vlm(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    printed, files = in_two_processes(tmp_path / "run", "vlm.py", "--held_out", "8")
    said_once(printed, "What COAT did to the model", "=== COAT", "of the held-out answers are right")
    assert {"model.safetensors", "processor_config.json"} <= files


def test_pretrain(tmp_path):
    """One process makes the corpus; the steps have the rows that they have in one process."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(
            "".join(f"{j} is the number after {j - 1}\n" for j in range(30 * i, 30 * i + 40))
        )
    printed, files = in_two_processes(
        tmp_path / "run", "pretrain.py", "--tiny", "--text", folder, "--corpus", tmp_path / "corpus",
        "--held_out_tokens", "1000", "--logging_steps", "1",
    )  # fmt: skip
    said_once(printed, "What COAT did to the model", "M parameters", "held-out loss, as trained", "transformers alone")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["tokens"] == 2 * 2 * 2 * 2 * 64  # steps, microbatches, processes, rows, block
    assert record["memory"] is None and "model.safetensors" in files
