"""The launchers: the ready configurations of accelerate, and the examples in two processes."""

import importlib.util
import json
import os
import re
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the examples find text and a model, and leave a folder each."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "texts").mkdir()
    lines = [f"{i} is the number after {i - 1}, and before {i + 1}\n" for i in range(400)]
    (folder / "text.txt").write_text("".join(lines))
    for i in range(0, 400, 20):
        (folder / "texts" / f"{i}.txt").write_text("".join(lines[i : i + 20]))
    sys.path.insert(0, str(EXAMPLES))
    try:
        data = importlib.import_module("data")
    finally:
        sys.path.remove(str(EXAMPLES))
    for part in data.small_llama(Dataset.from_dict({"text": lines}), hidden_size=64, intermediate_size=96):
        part.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def said(folder):
    """What each example says to its two outputs when torchrun starts it in two processes."""
    text = ["--dataset_name", folder / "text.txt", "--held_out", "8"]
    examples = {
        "sft": text,
        "lora": [*text, "--model_name_or_path", folder / "model"],
        "pretrain": ["--tiny", "--text", folder / "texts", "--corpus", folder / "corpus", "--held_out_tokens", "500"],
    }
    if importlib.util.find_spec("sklearn"):
        examples["vlm"] = ["--held_out", "8"]
    always = ["--coat", "lean", "--max_steps", "2", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"]
    commands = [[f"{n}.py", *always, "--output_dir", folder / n, *options] for n, options in examples.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [Path(__file__).with_name("examples_in_turn.py"), json.dumps(commands, default=str)]
    environment = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=400, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-5000:]
    printed, logged = (
        dict(re.findall(r">>> (\w+)\.py\n(.*?)(?=>>>|\Z)", o, re.S)) for o in (done.stdout, done.stderr)
    )
    return {name: (printed[name], logged[name]) for name in examples}


@pytest.mark.parametrize(
    ("example", "lines", "files"),
    [
        ("sft", ["What COAT did to the model", "held-out text, before", "text, after"], {"model.safetensors"}),
        ("lora", ["held-out text, before", "text, after"], {"adapter_model.safetensors"}),
        ("vlm", ["What COAT did to the model", "=== COAT", "answers are right"], {"processor_config.json"}),
        ("pretrain", ["What COAT did to the model", "M parameters", "transformers alone"], {"run.json"}),
    ],
)
def test_examples_in_two_processes(said, folder, example, lines, files):
    """The first process alone tells and writes."""
    if example not in said:
        pytest.skip("scikit-learn is not installed")
    printed, logged = said[example]
    for line in lines:
        assert printed.count(line) == 1, printed
    assert logged.count("CoatLinear") == 1, "the conversion is told once"
    there = {path.name for path in (folder / example).iterdir()}
    assert files | {"coat_config.json", "coat_run.json"} <= there and "merged" not in there
    assert json.loads((folder / example / "coat_run.json").read_text())["hardware"]["processes"] == 2


def test_pretraining_in_two_processes(said, folder):
    """Each has the rows that ``--per_device_train_batch_size`` says; memory is not told of a part of the model."""
    record = json.loads((folder / "pretrain" / "run.json").read_text())
    assert record["tokens"] == 2 * 2 * 2 * 2 * 64  # steps, microbatches, processes, rows, tokens in a row
    assert record["memory"] is None
