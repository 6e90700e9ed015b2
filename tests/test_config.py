"""CoatConfig, CoatOptimizerConfig, HfCoatConfig: what they accept and refuse, and what is written and read."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
from coat_kernels.formats import Fp8Format, Granularity

import hf_coat
from hf_coat import CoatConfig, CoatOptimizerConfig, HfCoatConfig
from hf_coat.config import CONFIG_NAME, PRESETS

ODD = HfCoatConfig(
    model=CoatConfig(granularity="tensor", power_of_two=False, modules_to_not_convert=["q_proj"]),
    optimizer=CoatOptimizerConfig(group_size=64, format="e4m3"),
)


def test_presets():
    lean, paper = HfCoatConfig.resolve("lean"), HfCoatConfig.resolve("paper")
    assert lean == HfCoatConfig() and lean.model.granularity is Granularity.TOKEN and lean.model.power_of_two
    assert paper.model == CoatConfig(
        granularity="tensor", power_of_two=False, grad_format="e5m2", activations="paper", group_size=16,
        scale_format="bfloat16", fuse_loss=False,
    )  # fmt: skip
    assert paper.optimizer == CoatOptimizerConfig(group_size=128, format="paper", weights="nearest")
    assert lean.optimizer == CoatOptimizerConfig(group_size=128, format="lean", weights="stochastic", seed=0)
    lean.model.modules_to_not_convert = ["q_proj"]
    assert PRESETS["lean"] == HfCoatConfig(), "a preset that was handed out is the user's own"


def test_enums_by_value_and_by_member():
    config = CoatConfig(granularity="tensor", grad_format=Fp8Format.E5M2)
    assert config.granularity is Granularity.TENSOR and config.grad_format is Fp8Format.E5M2
    assert config == CoatConfig(granularity=Granularity.TENSOR, grad_format="e5m2")
    assert config != CoatConfig(granularity="tensor") and config != HfCoatConfig(model=config)


def test_repr_shows_what_is_not_default():
    assert repr(CoatConfig()) == "CoatConfig()" and repr(HfCoatConfig()) == "HfCoatConfig()"
    assert repr(CoatConfig(granularity="tensor")) == "CoatConfig(granularity='tensor')"
    assert repr(ODD) == (
        "HfCoatConfig(model=CoatConfig(granularity='tensor', power_of_two=False, modules_to_not_convert=['q_proj']), "
        "optimizer=CoatOptimizerConfig(group_size=64, format='e4m3'))"
    )
    assert repr(HfCoatConfig(optimizer=None)) == "HfCoatConfig(optimizer=None)"


@pytest.mark.parametrize(
    ("make", "error", "parts"),
    [
        (lambda: CoatConfig(group=16), TypeError, ["group=16", "granularity", "modules_to_not_convert"]),
        (lambda: CoatConfig(group_size=100), ValueError, ["group_size", "100", "16, 32, 64, 128, 256"]),
        (lambda: CoatConfig(group_size="128"), ValueError, ["group_size", "'128'", "16, 32, 64, 128, 256"]),
        (
            lambda: CoatConfig(scale_format="fp8"),
            ValueError,
            ["scale_format", "'fp8'", "'float32', 'bfloat16', 'e8m0'"],
        ),
        (lambda: CoatConfig(cache_weights=1), TypeError, ["cache_weights", "1", "True or False"]),
        (lambda: CoatConfig(fuse_loss="no"), TypeError, ["fuse_loss", "'no'", "True or False"]),
        (lambda: CoatConfig(frozen_weights="int8"), ValueError, ["frozen_weights", "'int8'", "'auto', 'fp8', 'bf16'"]),
        (lambda: CoatConfig(fsdp_all_gather="int8"), ValueError, ["fsdp_all_gather", "'int8'", "'fp8', 'bf16'"]),
        (lambda: CoatConfig(activations="off"), ValueError, ["activations", "'off'", "'lean', 'paper', 'bf16'"]),
        (
            lambda: CoatConfig(activations={"mlp": "x"}),
            ValueError,
            ["activations for 'mlp'", "'x'", "'lean', 'paper'"],
        ),
        (lambda: CoatConfig(activations=["lean"]), TypeError, ["activations", "['lean']", "'attention'"]),
        (
            lambda: CoatConfig(regions={"lm": "text"}),
            ValueError,
            ["regions for 'lm'", "'text'", "'vision', 'projector'"],
        ),
        (lambda: CoatConfig(regions=["vision"]), TypeError, ["regions", "['vision']", "dict"]),
        (lambda: CoatConfig(granularity="row"), ValueError, ["granularity", "'row'", "'tensor', 'token'"]),
        (lambda: CoatConfig(granularity="group"), ValueError, ["granularity", "'group'", "'tensor', 'token'"]),
        (lambda: CoatConfig(granularity=["token"]), ValueError, ["granularity", "['token']", "'tensor', 'token'"]),
        (lambda: CoatConfig(grad_format="fp8"), ValueError, ["grad_format", "'fp8'", "'e4m3', 'e5m2'"]),
        (lambda: CoatConfig(power_of_two="true"), TypeError, ["power_of_two", "'true'", "True or False"]),
        (lambda: CoatConfig(power_of_two=1), TypeError, ["power_of_two", "1", "True or False"]),
        (lambda: CoatConfig(power_of_two=False), ValueError, ["power_of_two", "'token'", "granularity='tensor'"]),
        (lambda: CoatConfig(modules_to_not_convert="lm_head"), TypeError, ["modules_to_not", "'lm_head'", "list"]),
        (lambda: CoatConfig.from_dict({"hf_coat_version": "new", "x": 1}), ValueError, ["hf_coat_version", "'new'"]),
        (lambda: CoatConfig(group_size=128.0), ValueError, ["group_size", "128.0", "16, 32, 64, 128"]),
        (lambda: CoatConfig(modules_to_not_convert=[1]), TypeError, ["modules_to_not_convert", "[1]", "list of str"]),
        (lambda: CoatConfig().update(granularity="row"), ValueError, ["granularity", "'row'", "'tensor', 'token'"]),
        (lambda: CoatConfig.from_dict({"quant_method": "awq"}), ValueError, ["quant_method", "'awq'", "'coat'"]),
        (lambda: CoatOptimizerConfig(group=1), TypeError, ["group=1", "name, group_size, format, weights, seed"]),
        (lambda: CoatOptimizerConfig(group_size=0), ValueError, ["group_size", "0", "1 to 1024"]),
        (lambda: CoatOptimizerConfig(group_size=1025), ValueError, ["group_size", "1025", "1 to 1024"]),
        (lambda: CoatOptimizerConfig(group_size=True), TypeError, ["group_size", "True", "integer"]),
        (lambda: CoatOptimizerConfig(group_size=128.0), TypeError, ["group_size", "128.0", "integer"]),
        (lambda: CoatOptimizerConfig(format="fp8"), ValueError, ["format", "'fp8'", "'lean', 'paper', 'e4m3'"]),
        (lambda: CoatOptimizerConfig(name="sgd"), ValueError, ["name", "'sgd'", "'adamw', 'lion'"]),
        (lambda: CoatOptimizerConfig(weights=None), ValueError, ["weights", "None", "'nearest', 'stochastic'"]),
        (lambda: CoatOptimizerConfig(seed=1.0), TypeError, ["seed", "1.0", "integer"]),
        (lambda: HfCoatConfig(optim="adamw"), TypeError, ["optim='adamw'", "model, optimizer"]),
        (lambda: HfCoatConfig(model=None, optimizer=None), ValueError, ["model", "optimizer", "both None"]),
        (lambda: HfCoatConfig(model="lean"), TypeError, ["model", "'lean'", "CoatConfig"]),
        (
            lambda: HfCoatConfig(optimizer=CoatConfig()),
            TypeError,
            ["optimizer", "CoatConfig()", "CoatOptimizerConfig"],
        ),
        (
            lambda: HfCoatConfig(optimizer={"size": 1}),
            TypeError,
            ["size=1", "name, group_size, format, weights, seed"],
        ),
        (lambda: HfCoatConfig.from_dict([]), TypeError, ["HfCoatConfig", "[]", "dict"]),
        (lambda: HfCoatConfig.resolve(3), TypeError, ["coat", "3", "'lean', 'paper'", "path"]),
        (lambda: HfCoatConfig.resolve("leen"), ValueError, ["'leen'", "'lean', 'paper'", "JSON", "no file 'leen'"]),
        (
            lambda: HfCoatConfig.resolve("user/recipe"),
            OSError,
            ["user/recipe", "not in the local cache"],
        ),
        (lambda: HfCoatConfig.resolve("{'model': 1}"), ValueError, ["coat", "not valid JSON", "line 1"]),
        (lambda: HfCoatConfig.resolve('{"model": {"granularity": "row"}}'), ValueError, ["'row'", "'token'"]),
    ],
)
def test_what_is_refused_names_key_value_and_choices(make, error, parts):
    with pytest.raises(error) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_the_optimizer_half_and_the_recipe_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CoatOptimizerConfig().group_size = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        HfCoatConfig().model = None


def test_replace_copy_and_pickle():
    assert dataclasses.replace(ODD, optimizer=None) == HfCoatConfig(model=ODD.model, optimizer=None)
    assert dataclasses.replace(ODD.model, granularity="token", power_of_two=True).modules_to_not_convert == ["q_proj"]
    assert copy.deepcopy(ODD) == ODD == pickle.loads(pickle.dumps(ODD))
    with pytest.raises(ValueError, match="'row'"):
        dataclasses.replace(ODD.model, granularity="row")


@pytest.mark.parametrize("config", [HfCoatConfig(), ODD, HfCoatConfig(optimizer=None), HfCoatConfig(model=None)])
def test_written_and_read(config, tmp_path):
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain and plain["hf_coat_version"] == hf_coat.__version__
    assert HfCoatConfig.from_dict(plain) == config
    config.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / CONFIG_NAME).read_text()) == plain
    assert HfCoatConfig.from_pretrained(tmp_path / "new") == config
    if config.model is not None:
        assert CoatConfig.from_dict(config.model.to_dict()) == config.model


def test_what_a_string_stands_for(tmp_path, monkeypatch):
    ODD.save_pretrained(tmp_path)
    file = tmp_path / CONFIG_NAME
    for value in (ODD, ODD.to_dict(), str(tmp_path), str(file), json.dumps(ODD.to_dict())):
        assert HfCoatConfig.resolve(value) == ODD
    assert HfCoatConfig.resolve(ODD.model) == HfCoatConfig(model=ODD.model, optimizer=None)
    assert HfCoatConfig.resolve(ODD.optimizer) == HfCoatConfig(model=None, optimizer=ODD.optimizer)
    assert HfCoatConfig.resolve({"optimizer": None}) == HfCoatConfig(optimizer=None)
    monkeypatch.chdir(tmp_path)
    file.rename("lean")
    assert HfCoatConfig.resolve("lean") == HfCoatConfig() and HfCoatConfig.resolve("./lean") == ODD
    with pytest.raises(ValueError, match=CONFIG_NAME):
        HfCoatConfig.resolve(str(tmp_path))


def test_a_broken_file_is_named(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text('{"model": {"granularity": "row"}}')
    with pytest.raises(ValueError, match="'row'") as caught:
        HfCoatConfig.resolve(str(file))
    assert any(str(file) in note for note in caught.value.__notes__)
    file.write_text('{"model": ')
    with pytest.raises(ValueError, match="recipe.json is not valid JSON"):
        HfCoatConfig.resolve(str(file))


@pytest.mark.parametrize(
    "read",
    [
        lambda: HfCoatConfig.from_dict({"hf_coat_version": "99.1", "loss": "fused"}),
        lambda: HfCoatConfig.from_dict({"hf_coat_version": "99.1", "model": {"loss": "fused"}}),
        lambda: CoatConfig.from_dict({"hf_coat_version": "99.1", "quant_method": "coat", "loss": "fused"}),
    ],
)
def test_unknown_keys_of_a_newer_version(read):
    with pytest.raises(ValueError) as caught:
        read()
    assert all(part in str(caught.value) for part in ["99.1", hf_coat.__version__, "loss='fused'", "pip install"])


def test_known_keys_of_a_newer_version_and_unknown_keys_of_this_one():
    assert HfCoatConfig.from_dict({"hf_coat_version": "99.1", "optimizer": None}) == HfCoatConfig(optimizer=None)
    with pytest.raises(TypeError, match="loss='fused'"):
        HfCoatConfig.from_dict({"hf_coat_version": hf_coat.__version__, "loss": "fused"})


def test_from_dict_as_transformers_calls_it():
    stored = {"quant_method": "coat", "granularity": "tensor"}
    config, unused = CoatConfig.from_dict(stored, return_unused_kwargs=True, grad_format="e5m2", dtype="auto")
    assert config == CoatConfig(granularity="tensor", grad_format="e5m2") and unused == {"dtype": "auto"}
    assert stored == {"quant_method": "coat", "granularity": "tensor"}
    assert dict(config)["quant_method"] == "coat" and '"granularity": "tensor"' in config.to_json_string()


def test_the_package_names_what_it_exports():
    assert set(hf_coat.__all__) == set(hf_coat._HOMES) and {*hf_coat.__all__, "trl"} <= set(dir(hf_coat))
    with pytest.raises(AttributeError, match="CoatAdam'"):
        hf_coat.CoatAdam  # noqa: B018


def test_import_adds_nothing_heavy():
    """After ``import transformers``, ``import hf_coat`` loads two pages of its own and the standard library."""
    code = (
        "import sys, transformers; before = set(sys.modules); import hf_coat; "
        "added = {name for name in set(sys.modules) - before if name.split('.')[0] not in sys.stdlib_module_names}; "
        "assert added == {'hf_coat', 'hf_coat.integrations'}, added"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_works_without_triton_peft_and_trl():
    code = """
import sys
for name in ("triton", "peft", "trl"):
    sys.modules[name] = None
import hf_coat
import torch
assert "transformers.quantizers.auto" not in sys.modules
layer = torch.nn.Linear(32, 32)
model = torch.nn.Sequential(layer)
assert list(hf_coat.apply_coat(model).converted) == ["0"]
optimizer = hf_coat.CoatAdamW(model.parameters(), lr=0.1)
before = layer.weight.detach().clone()
model(torch.ones(2, 32)).sum().backward()
optimizer.step()
assert not torch.equal(before, layer.weight)
args = hf_coat.TrainingArguments("unused", coat="paper", report_to="none")
assert args.optim == "coat_adamw"
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "coat" in AUTO_QUANTIZER_MAPPING
try:
    hf_coat.trl
except ModuleNotFoundError as error:
    assert error.name == "trl", error
else:
    raise AssertionError("trl is blocked")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
