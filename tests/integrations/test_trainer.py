"""TrainingArguments(coat=...) with the stock Trainer: what it does, that it resumes to the bit, what it refuses."""

import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
import types
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DDPCommunicationHookType
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import HfArgumentParser, Trainer, TrainerCallback, trainer, trainer_optimizer

import hf_coat
from hf_coat import (
    CoatAdamW,
    CoatCallback,
    CoatConfig,
    CoatLion,
    CoatOptimizerConfig,
    HfCoatConfig,
    TrainingArguments,
    with_coat,
)
from hf_coat.functional import operands
from hf_coat.integrations import callback
from hf_coat.integrations import trainer as ours
from hf_coat.modules import CoatFrozenLinear, CoatLinear

PAPER = HfCoatConfig.resolve("paper")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def make(tools, tmp_path):
    """``make(coat="paper", model=..., callbacks=[...], max_steps=3)``: a stock Trainer; arguments of both sorts."""

    def make(model=None, cls=TrainingArguments, output_dir=tmp_path / "run", **changes):
        of_trainer = {key: changes.pop(key) for key in list(changes) if key in OF_TRAINER}
        args = cls(**tools.short_run(output_dir, **({"coat": "lean"} if cls is TrainingArguments else {}) | changes))
        if "model_init" not in of_trainer:
            of_trainer["model"] = tools.tiny_llama() if model is None else model
        return Trainer(args=args, train_dataset=tools.random_tokens(), **of_trainer)

    return make


OF_TRAINER = ("callbacks", "eval_dataset", "model_init", "optimizers", "optimizer_cls_and_kwargs")


def converted(model):
    return sum(isinstance(module, CoatLinear) for module in model.modules())


def bare(optimizer):
    return getattr(optimizer, "optimizer", optimizer)


def callback_of(trained):
    return next(c for c in trained.callback_handler.callbacks if isinstance(c, CoatCallback) and c.coat is not None)


class Watch(TrainerCallback):
    """Calls a function at an event."""

    def __init__(self, event, function):
        setattr(self, event, lambda *args, **kwargs: function(*args, **kwargs))


# --- what it does ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["lean", "paper"])
def test_a_run(make, preset, heard, tmp_path):
    trained = make(coat=preset, save_strategy="steps", save_steps=1, include_num_input_tokens_seen="all")
    model, coat = trained.model, HfCoatConfig.resolve(preset)
    assert converted(model) == 14 and model.model.layers[0].mlp.up_proj.coat == coat.model, "before train()"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained.train()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.ndim > 1)

    optimizer = bare(trained.optimizer)
    assert type(optimizer) is CoatAdamW
    settings = {"lr", "betas", "eps", "weight_decay", "group_size", "format", "weights", "seed"}
    assert {key: optimizer.defaults[key] for key in settings} == {
        "lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "group_size": 128, "format": preset,
        "weights": {"lean": "stochastic", "paper": "nearest"}[preset], "seed": 0,
    }  # fmt: skip
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0], "that of the arguments"

    run = tmp_path / "run"
    assert HfCoatConfig.from_pretrained(run) == HfCoatConfig.from_pretrained(run / "checkpoint-1") == coat
    assert "14 CoatLinear" in heard and "optimizer's states took" in heard
    assert not any(line.startswith("WARNING") for line in heard.lines)
    record = callback_of(trained).record
    assert json.loads(json.dumps(record)) == record and record["coat"] == coat.to_dict()
    assert "14 CoatLinear" in callback_of(trained).report.summary() and record["train_tokens_per_second"] > 0
    parameters = sum(p.numel() for p in model.parameters())
    assert record["weights"] == 4 * parameters and record["adamw_states"] == 8 * parameters
    assert 2 * parameters < record["optimizer_states"] < 3 * parameters  # 2 bytes, and scales of groups of 64 and 96


def test_gradients_that_are_not_finite_show_in_the_log(make):
    def spoil(args, state, control, model, **_):
        if state.global_step == 1:
            model.model.norm.weight.grad[0] = float("inf")

    seen = []
    show = Watch("on_log", lambda args, state, control, logs, **_: seen.append(dict(logs)))
    trained = make(max_steps=3, max_grad_norm=0.0, callbacks=[Watch("on_pre_optimizer_step", spoil), show])
    trained.train()
    # one row of 64 values, which is less than a group of 128
    assert [log.get("coat/skipped_groups") for log in seen if "loss" in log] == [None, 1, 1]
    assert [log.get("coat/skipped_groups") for log in trained.state.log_history if "loss" in log] == [None, 1, 1]
    assert all(p.isfinite().all() for p in trained.model.parameters())


def test_what_is_saved_is_plain_and_loads_without_hf_coat(make, tools, tmp_path):
    trained = make(model=tools.tiny_llama(torch.bfloat16), save_strategy="steps", save_steps=2)
    trained.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert "quantization_config" not in json.loads((checkpoint / "config.json").read_text())
    saved, plain = load_file(checkpoint / "model.safetensors"), tools.tiny_llama(torch.bfloat16).state_dict()
    assert {name: (t.dtype, t.shape) for name, t in saved.items()} == {n: (t.dtype, t.shape) for n, t in plain.items()}
    code = """
import torch
from transformers import AutoModelForCausalLM
torch.save(AutoModelForCausalLM.from_pretrained(sys.argv[1]).state_dict(), sys.argv[2])
"""
    tools.run_python(code, checkpoint, tmp_path / "state.pt", blocked=["hf_coat", "coat_kernels"])
    ours_on_cpu = {name: p.cpu() for name, p in trained.model.state_dict().items()}
    assert tools.same_bits(dict(torch.load(tmp_path / "state.pt")), ours_on_cpu)


def test_each_half_alone(make, tmp_path):
    model_only = make(coat=CoatConfig())
    assert model_only.args.optim != ours.COAT_ADAMW and converted(model_only.model) == 14
    model_only.train()
    assert type(bare(model_only.optimizer)) is torch.optim.AdamW
    optimizer_only = make(coat=CoatOptimizerConfig(group_size=32, format="e4m3"))
    optimizer_only.train()
    assert converted(optimizer_only.model) == 0 and callback_of(optimizer_only).record["conversion"] is None
    assert bare(optimizer_only.optimizer).defaults["group_size"] == 32
    assert bare(optimizer_only.optimizer).defaults["format"] == "e4m3"
    assert make(coat={"optimizer": None}, optim="sgd").args.optim == "sgd"


def test_nothing_happens_without_coat(make, heard, tmp_path):
    for cls, changes in ((TrainingArguments, {"coat": None}), (transformers.TrainingArguments, {})):
        trained = make(cls=cls, save_strategy="steps", save_steps=2, **changes)
        trained.train()
        assert converted(trained.model) == 0 and type(bare(trained.optimizer)) is torch.optim.AdamW
        assert not list((tmp_path / "run").rglob("coat_config.json")) and not heard.lines
    assert TrainingArguments("x", report_to="none").to_dict()["coat"] is None


def test_a_peft_model(make, tools, tmp_path):
    model = get_peft_model(tools.tiny_llama(), LoraConfig(r=16, target_modules="all-linear"))
    trained = make(model=model, save_strategy="steps", save_steps=2)
    trained.train()
    kinds = {
        name.rsplit(".", 1)[-1]: type(m) for name, m in model.named_modules() if ".q_proj." in name and m._parameters
    }
    assert kinds["base_layer"] is CoatFrozenLinear and kinds["default"] is torch.nn.Linear
    assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert {"adapter_model.safetensors", "coat_config.json"} <= {
        f.name for f in (tmp_path / "run/checkpoint-2").iterdir()
    }


@pytest.mark.parametrize("half", ["lean", {"optimizer": None}], ids=["ours", "adamw"])
def test_model_init(make, tools, half):
    trained = make(model_init=lambda: tools.tiny_llama(), coat=half)
    first = trained.model
    trained.train()
    assert trained.model is not first and converted(trained.model) == 14
    assert "14 CoatLinear" in callback_of(trained).report.summary()


def test_the_model_is_converted_by_the_time_there_is_an_optimizer(tools, tmp_path):
    """FSDP wraps it right after; no event comes between a model that model_init made and that."""
    model, args = tools.tiny_llama(), TrainingArguments(**tools.short_run(tmp_path, coat="paper"))
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    assert cls is CoatAdamW and settings["group_size"] == 128 and converted(model) == 14
    assert Trainer.get_optimizer_cls_and_kwargs(args)[0] is CoatAdamW


def test_load_best_model_at_end(make, tools):
    best = {}
    keep = Watch("on_save", lambda args, state, control, model, **_: best.update({state.global_step: snapshot(model)}))
    trained = make(
        eval_dataset=tools.random_tokens(4), callbacks=[keep], load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, max_steps=3, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    trained.train()
    losses = {log["step"]: log["eval_loss"] for log in trained.state.log_history if "eval_loss" in log}
    step = max(losses, key=losses.get)
    assert len(losses) == 3 and trained.state.best_global_step == step
    assert tools.same_bits(snapshot(trained.model), best[step]) and converted(trained.model) == 14


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make, tools, reentrant):
    states = []
    for checkpointing in (False, True):
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} if checkpointing else {}
        trained = make(gradient_checkpointing=checkpointing, **kwargs)
        trained.train()
        states.append(snapshot(trained.model))
    assert tools.same_bits(*states)


def test_auto_find_batch_size(make):
    sizes = []

    def run_out_of_memory(args, state, control, **_):
        sizes.append(trained._train_batch_size)
        if len(sizes) == 1:
            raise RuntimeError("CUDA out of memory.")

    trained = make(callbacks=[Watch("on_step_begin", run_out_of_memory)], auto_find_batch_size=True, max_steps=1)
    trained.train()
    assert len(sizes) == 2 and sizes[1] < sizes[0]
    assert converted(trained.model) == 14 and trained.state.global_step == 1


def test_bf16_autocast(make):
    trained = make(bf16=True, use_cpu=not torch.cuda.is_available())
    trained.train()
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32} and converted(trained.model) == 14


def test_the_optimizer_hands_over_the_amax_of_new_weights(make, monkeypatch):
    """Accelerate's wrapper of the optimizer is one too, and must not count as another one that stepped since."""
    found, ask = [], operands.ask_amax

    def spy(weight):
        found.append(ask(weight))
        return found[-1]

    monkeypatch.setattr(operands, "ask_amax", spy)
    make(coat="paper", max_steps=3, gradient_accumulation_steps=1).train()
    asked = [amax is not None for amax in found]
    assert asked[:42] == [False] * 14 + [True] * 28  # what follows are not weights: the estimate at the end


def test_the_public_fallback(make, tmp_path, heard):
    trained = make(
        cls=transformers.TrainingArguments, save_strategy="steps", save_steps=2, callbacks=[CoatCallback("lean")],
        optimizer_cls_and_kwargs=(CoatAdamW, {"lr": 1e-2, "group_size": 64}),
    )  # fmt: skip
    assert converted(trained.model) == 14
    trained.train()
    assert bare(trained.optimizer).defaults["group_size"] == 64
    assert HfCoatConfig.from_pretrained(tmp_path / "run" / "checkpoint-2") == HfCoatConfig()
    assert not any(line.startswith("WARNING") for line in heard.lines)
    with pytest.raises(ValueError, match="given twice"):
        make(callbacks=[CoatCallback("lean")])


# --- arguments ------------------------------------------------------------------------------------


@dataclasses.dataclass
class OtherArguments(transformers.TrainingArguments):
    """As a library like TRL has them."""

    extra: int = 1

    def __post_init__(self):
        self.learning_rate = 3e-4
        super().__post_init__()


@pytest.mark.parametrize("cls", [TrainingArguments, with_coat(OtherArguments)], ids=["ours", "with_coat"])
def test_arguments_travel(cls, tmp_path, heard):
    args = cls(str(tmp_path), report_to="none", coat=PAPER, learning_rate=3e-4)
    assert args.coat == PAPER and args.optim == ours.COAT_ADAMW
    plain = args.to_dict()
    assert plain["coat"] == PAPER.to_dict() and json.loads(args.to_json_string())["coat"] == PAPER.to_dict()
    assert "'granularity': 'tensor'" in args.to_sanitized_dict()["coat"] and "granularity" in str(args)
    for again in (
        cls(**json.loads(args.to_json_string())),
        pickle.loads(pickle.dumps(args)),
        dataclasses.replace(args, seed=7),
        HfArgumentParser(cls).parse_dict(plain)[0],
    ):
        assert type(again) is cls and again.coat == PAPER and again.optim == ours.COAT_ADAMW
        assert again.learning_rate == 3e-4
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).coat == PAPER
    without = dataclasses.replace(args, coat=None, optim="adamw_torch")
    assert without.coat is None and without.optim == "adamw_torch"
    assert not heard.lines, "nothing here is a choice of the user's that is overruled"


def test_command_line(tmp_path):
    PAPER.save_pretrained(tmp_path)
    file = str(tmp_path / "coat_config.json")
    for given in ("paper", file, str(tmp_path), json.dumps(PAPER.to_dict())):
        (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
            ["--output_dir", "x", "--report_to", "none", "--coat", given]
        )
        assert args.coat == PAPER
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--output_dir", "x"])
    assert args.coat is None and "--coat" in HfArgumentParser(TrainingArguments).format_help()


def test_with_coat():
    cls = with_coat(OtherArguments)
    assert issubclass(cls, OtherArguments) and with_coat(OtherArguments) is cls is with_coat(cls)
    assert with_coat(transformers.TrainingArguments) is TrainingArguments
    assert [f.name for f in dataclasses.fields(cls)][0] == "output_dir"
    for wrong in (Trainer, dict, "SFTConfig"):
        with pytest.raises(TypeError, match="subclass of transformers.TrainingArguments"):
            with_coat(wrong)


def test_an_optimizer_that_the_user_names_is_overruled_with_a_warning(heard):
    args = TrainingArguments("x", report_to="none", coat="lean", optim="adafactor")
    assert args.optim == ours.COAT_ADAMW
    assert any(
        line.startswith("WARNING optim='adafactor' is not used") and "optimizer=None" in line for line in heard.lines
    )
    heard.lines.clear()
    args.set_optimizer(name="sgd", learning_rate=3.0)
    assert (args.optim, args.learning_rate) == (ours.COAT_ADAMW, 3.0) and "optim='sgd' is not used" in heard
    heard.lines.clear()
    assert args.set_optimizer(learning_rate=2.0) is args and args.optim == ours.COAT_ADAMW and not heard.lines
    half = TrainingArguments("x", report_to="none", coat={"optimizer": None}, optim="adafactor")
    assert half.optim == "adafactor" and half.set_optimizer("sgd").optim == "sgd" and not heard.lines


def test_an_optimizer_that_the_trainer_is_given_is_kept_with_a_warning(make, tools, heard):
    model = tools.tiny_llama()
    make(model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None)).train()
    assert any(line.startswith("WARNING") and "SGD" in line and "optimizer=None" in line for line in heard.lines)


def test_the_two_private_names():
    """TrainingArguments(coat=...) stands on these. If one is gone, test_the_public_fallback shows what still works."""
    assert trainer.DEFAULT_CALLBACKS.count(ours.FollowsArguments) == 1
    assert trainer_optimizer._OPTIMIZER_HANDLERS[ours.COAT_ADAMW] is ours._make_coat_adamw
    assert (
        Trainer.get_optimizer_cls_and_kwargs.__globals__["_OPTIMIZER_HANDLERS"]
        is trainer_optimizer._OPTIMIZER_HANDLERS
    )


# --- save, kill, resume ---------------------------------------------------------------------------

RESUMABLE = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

KILLED = """
import os, runpy, sys
tools = runpy.run_path(sys.argv[1])
import hf_coat, torch
from transformers import Trainer, TrainerCallback

class Kill(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        os._exit(17)

folder, dtype = sys.argv[2:]
settings = tools["short_run"](folder, coat="lean", max_steps=4, save_strategy="steps", save_steps=2)
model, args = tools["tiny_llama"](getattr(torch, dtype)), hf_coat.TrainingArguments(**settings)
Trainer(model, args, train_dataset=tools["random_tokens"](), callbacks=[Kill()]).train()
"""


def resumed(make, tools, folder, dtype=torch.float32, **changes):
    trained = make(model=tools.tiny_llama(dtype, seed=1), output_dir=folder, **RESUMABLE | changes)
    trained.train(resume_from_checkpoint=True)
    return trained


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory, tools):
    """Runs in processes of their own, which ended in the middle, right after a checkpoint. By dtype."""
    folders = {name: tmp_path_factory.mktemp(name) for name in DTYPES}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, tools.__file__, folder, str(DTYPES[name]).split(".")[1]],
            stderr=subprocess.PIPE, text=True,
        )
        for name, folder in folders.items()
    ]  # fmt: skip
    try:
        for run in runs:
            _, said = run.communicate(timeout=300)
            assert run.returncode == 17, said
    finally:
        for run in runs:
            run.kill()
    return folders


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_kill_resume_equals_the_straight_run(make, tools, tmp_path, killed_runs, dtype):
    folder = tmp_path / "killed"
    shutil.copytree(killed_runs[dtype], folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "coat_config.json", "coat_run.json"]
    straight = make(model=tools.tiny_llama(DTYPES[dtype]), output_dir=tmp_path / "straight", **RESUMABLE)
    straight.train()
    again = resumed(make, tools, folder, DTYPES[dtype])
    assert again.state.global_step == 4 and len(again.state.log_history) == 5
    assert tools.same_bits(snapshot(again.model), snapshot(straight.model))
    assert tools.same_bits(again.optimizer.state_dict(), straight.optimizer.state_dict())
    states = bare(again.optimizer).state[again.model.model.layers[0].mlp.up_proj.weight]
    assert states["exp_avg_codes"].dtype == torch.uint8
    for file in ("model.safetensors", "scheduler.pt"):
        paths = [path / "checkpoint-4" / file for path in (folder, tmp_path / "straight")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    "optimizer", [{"name": "lion"}, {"weights": "master"}, {"name": "lion", "format": "paper", "weights": "master"}]
)
def test_other_optimizers_resume_bit_for_bit(make, tools, tmp_path, optimizer):
    settings = RESUMABLE | {"coat": {"model": None, "optimizer": optimizer}, "learning_rate": 1e-3}
    straight = make(model=tools.tiny_llama(torch.bfloat16), output_dir=tmp_path / "straight", **settings)
    straight.train()
    kind = {"lion": CoatLion}.get(optimizer.get("name"), CoatAdamW)
    assert type(bare(straight.optimizer)) is kind and bare(straight.optimizer).defaults["betas"] == (0.9, 0.999)
    half = tmp_path / "straight" / "checkpoint-2"
    again = make(model=tools.tiny_llama(torch.bfloat16, seed=1), output_dir=tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(half))
    assert tools.same_bits(snapshot(again.model), snapshot(straight.model))
    assert tools.same_bits(again.optimizer.state_dict(), straight.optimizer.state_dict())
    assert callback_of(straight).record["optimizer_states"] == bare(straight.optimizer).state_bytes()


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda c: truncate(c / "model.safetensors"), ValueError, "not written to its end, model.safetensors is cut"),
        (lambda c: (c / "trainer_state.json").unlink(), ValueError, "it lacks trainer_state.json.*name an older one"),
        (lambda c: truncate(c / "trainer_state.json"), ValueError, "trainer_state.json is cut off"),
        (lambda c: truncate(c / "optimizer.pt"), ValueError, "optimizer.pt is cut off"),
        (lambda c: truncate(c / "coat_config.json"), ValueError, "coat_config.json is cut off"),
        (lambda c: (c / "trainer_state.json").write_bytes(b"\xff{}"), ValueError, "trainer_state.json is cut off"),
        (lambda c: (c / "optimizer.pt").unlink(), ValueError, "step 2.*no optimizer states.*lacks optimizer.pt"),
        (lambda c: (c / "scheduler.pt").unlink(), ValueError, "step 2.*no optimizer states.*or scheduler.pt"),
    ],
    ids=[
        "weights cut",
        "no trainer state",
        "trainer state cut",
        "optimizer cut",
        "config cut",
        "no text",
        "no optimizer",
        "no scheduler",
    ],  # fmt: skip
)
def test_a_half_written_checkpoint_is_refused_and_left_as_it_is(
    make, tools, tmp_path, killed_runs, damage, error, message
):
    folder = tmp_path / "killed"
    shutil.copytree(killed_runs["fp32"], folder)
    damage(folder / "checkpoint-2")
    before = listing(folder)
    trained = make(model=tools.tiny_llama(seed=1), output_dir=folder, **RESUMABLE)
    with pytest.raises(error) as caught:
        trained.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert listing(folder) == before


def test_half_written_checkpoints_are_never_picked_up(make, tools, tmp_path, killed_runs, heard):
    folder = tmp_path / "run"
    shutil.copytree(killed_runs["fp32"], folder)
    for step, lost in ((3, "trainer_state.json"), (10, "rng_state.pth")):
        shutil.copytree(folder / "checkpoint-2", folder / f"checkpoint-{step}")
        (folder / f"checkpoint-{step}" / lost).unlink()
    (folder / "checkpoint-10" / "rng_state_0.pth").touch()  # of two processes
    trained = make(model=tools.tiny_llama(seed=1), output_dir=folder, **RESUMABLE)
    trained.train(resume_from_checkpoint=True)
    assert trained.state.global_step == 4 and callback_of(trained).resumed_at == [2]
    (said,) = (line for line in heard.lines if "is resumed from" in line)
    assert f"{folder / 'checkpoint-2'};" in said and "checkpoint-10: it lacks rng_state_1.pth" in said
    assert "checkpoint-3: it lacks trainer_state.json" in said


def test_no_whole_checkpoint(make, tmp_path, killed_runs):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="no checkpoint in .* was written to its end.*lacks trainer_state.json"):
        make(output_dir=tmp_path, **RESUMABLE).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2").rmdir()
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make(output_dir=tmp_path, **RESUMABLE).train(resume_from_checkpoint=True)


def test_optimizer_states_that_do_not_fit_are_refused(make, tools, tmp_path, killed_runs):
    plain = make(output_dir=tmp_path / "plain", coat=None, **RESUMABLE)
    plain.train()
    shutil.rmtree(tmp_path / "plain" / "checkpoint-4")
    other = tmp_path / "killed"
    shutil.copytree(killed_runs["fp32"], other)
    for folder, coat, message in (
        (tmp_path / "plain", "lean", "another optimizer"),
        (other, {"optimizer": {"group_size": 32}}, "group_size=128.*group_size=32"),
        (other, {"optimizer": None}, "AdamW was given states of COAT.*coat_config.json"),
        (other, None, "AdamW was given states of COAT.*coat_config.json"),
    ):
        before = listing(folder)
        with pytest.raises(ValueError) as caught:
            resumed(make, tools, folder, coat=coat)
        assert re.search(message, str(caught.value)), str(caught.value)
        assert listing(folder) == before


def test_resuming_with_another_recipe_is_warned_about(make, tools, tmp_path, killed_runs, heard):
    folder = tmp_path / "killed"
    shutil.copytree(killed_runs["fp32"], folder)
    resumed(make, tools, folder)
    assert not any(line.startswith("WARNING") for line in heard.lines)
    shutil.rmtree(folder)
    shutil.copytree(killed_runs["fp32"], folder)
    resumed(make, tools, folder, coat={"model": {"granularity": "tensor"}})
    (warning,) = (line for line in heard.lines if line.startswith("WARNING"))
    assert "model.granularity was 'token', now 'tensor'" in warning and "checkpoint-2" in warning


class Hub:
    """What Trainer asks of the Hub's client, and which files it was given."""

    def __init__(self):
        self.repos, self.pushed = [], []

    def create_repo(self, name, **options):
        self.repos.append(name)
        return types.SimpleNamespace(repo_id=name)

    def upload_folder(self, folder_path, **options):
        self.pushed.append({file.name for file in Path(folder_path).iterdir()})
        done = Future()
        done.set_result(None)
        return done


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_process_tells_writes_and_pushes(make, monkeypatch, heard, tmp_path, process):
    hub, files = Hub(), {"coat_config.json", "coat_run.json", "README.md"}
    monkeypatch.setattr(transformers.TrainingArguments, "process_index", property(lambda args: process))
    monkeypatch.setattr(trainer, "hf_api", lambda: hub)
    run = make(
        save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id="user/model", hub_strategy="every_save",
        hub_always_push=True,
    )  # fmt: skip
    run.train()
    run.push_to_hub()
    written = {file.name for file in tmp_path.rglob("*")} & files
    if process == 0:
        assert hub.repos == ["user/model"] and written == files and "converted" in heard
        assert len(hub.pushed) > 2 and all("coat_run.json" in pushed for pushed in hub.pushed)
        assert files <= hub.pushed[-1]
    else:
        assert not hub.repos and not hub.pushed and not written
        assert not [line for line in heard.lines if line.startswith("WARNING")]


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "environment", "parts"),
    [
        ({"fp16": True}, {}, ["FP16", "bf16=True"]),
        ({"fp16_full_eval": True}, {}, ["fp16_full_eval", "bf16=True"]),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, ["mixed_precision='fp16'", "bf16=True"]),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp8"}, ["mixed_precision='fp8'", "'bf16'", "ACCELERATE_MIXED_PRECISION"]),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, {}, ["DeepSpeed", "deepspeed=", "FSDP2"]),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, ["FSDP1", "fsdp_config={'version': 2}"]),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, {}, ["CPU offload", "drop cpu_offload from"]),
        ({"fsdp": "full_shard offload"}, {}, ["CPU offload", "'offload' from fsdp="]),
    ],
)
def test_arguments_that_cannot_work(tools, tmp_path, monkeypatch, changes, environment, parts):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        TrainingArguments(**tools.short_run(tmp_path, coat="lean", **changes))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("coat", ["leen", {"modle": None}, 3, '{"optimizer": {"group_size": 0}}'])
def test_a_wrong_coat_fails_in_the_arguments(coat):
    with pytest.raises((TypeError, ValueError), match="leen|modle|3|group_size"):
        TrainingArguments("x", coat=coat)


@dataclasses.dataclass
class Launched:
    """What accelerate's state says once a launcher has set it up."""

    mixed_precision: str = "no"
    deepspeed_plugin: object = None
    fsdp_plugin: object = None


@pytest.mark.parametrize(
    ("launched", "part"),
    [
        (Launched(mixed_precision="fp8"), "mixed_precision='fp8'"),
        (Launched(mixed_precision="fp16"), "mixed_precision='fp16'"),
        (Launched(deepspeed_plugin=object()), "DeepSpeed"),
        (Launched(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=1)), "FSDP1"),
        (Launched(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True)), "CPU offload"),
    ],
)
@pytest.mark.parametrize("by", ["arguments", "callback"])
def test_launchers_that_cannot_work(make, tools, monkeypatch, launched, part, by):
    monkeypatch.setattr(callback, "AcceleratorState", lambda: launched)
    model = tools.tiny_llama()
    with pytest.raises(ValueError, match=part):
        if by == "arguments":
            make(model=model)
        else:
            make(model=model, cls=transformers.TrainingArguments, callbacks=[CoatCallback("lean")])
    assert converted(model) == 0


def test_fsdp2_is_not_refused(monkeypatch, make):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    monkeypatch.setattr(callback, "AcceleratorState", lambda: Launched(mixed_precision="bf16", fsdp_plugin=plugin))
    assert converted(make().model) == 14


@pytest.mark.parametrize("chosen", [DDPCommunicationHookType.NO, DDPCommunicationHookType.BF16])
def test_a_communication_hook_that_was_chosen_stays(monkeypatch, chosen):
    registered = []
    linear = CoatLinear.convert(torch.nn.Linear(16, 16), CoatConfig())
    linear.register_comm_hook = lambda state, hook: registered.append(hook.__name__)
    monkeypatch.setattr(ours, "write_into_buckets", lambda model: registered.append("ours"))
    ours.GradientsInBuckets(comm_hook=chosen).register_comm_hook(linear)
    assert registered == (["ours"] if chosen is DDPCommunicationHookType.NO else ["bf16_compress_hook"])
    registered.clear()
    ours.GradientsInBuckets(comm_hook=chosen).register_comm_hook(linear.requires_grad_(False))
    assert "ours" not in registered, "nothing would be written there"


def test_models_that_cannot_work(make, tools):
    with pytest.raises(ValueError, match=r"torch\.float16.*BF16 or FP32"):
        make(model=tools.tiny_llama(torch.float16))
    quantized = get_peft_model(tools.tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    quantized.base_model.model.is_quantized = True
    quantized.base_model.model.quantization_method = "bitsandbytes"
    quantized.base_model.model.hf_quantizer = dataclasses.make_dataclass("Quantizer", [("is_trainable", bool, True)])()
    with pytest.raises(ValueError, match="already quantized by 'bitsandbytes'"):
        make(model=quantized)
    assert converted(quantized) == 0
    assert make(model=quantized, coat=HfCoatConfig(model=None)).args.optim == ours.COAT_ADAMW


@pytest.mark.gpu
def test_an_old_gpu_is_refused(make, tools, monkeypatch):
    monkeypatch.setattr(hf_coat.convert, "FP8_CAPABILITY", (99, 0))
    model = tools.tiny_llama()
    with pytest.raises(ValueError, match="compute capability"):
        make(model=model)
    assert converted(model) == 0


def test_optim_args_and_an_orphaned_optimizer_name(make, tools, tmp_path):
    with pytest.raises(ValueError, match="optim_args='beta3=0.9'.*coat={'optimizer'"):
        make(optim_args="beta3=0.9").train()
    args = TrainingArguments(**tools.short_run(tmp_path, coat="lean"))
    with pytest.raises(ValueError, match="optim='coat_adamw'.*coat is None.*name another: optim="):
        dataclasses.replace(args, coat=None)
