"""What a run shows of itself: it changes nothing, and its figures are those of what was trained."""

import json

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_coat import CoatConfig, HfCoatConfig, TrainingArguments, apply_coat
from hf_coat.functional import Watcher, WeightCache, coat_linear, coat_norm
from hf_coat.live import EVERY, MEASURES, MOST_SAMPLES, Rounding, RoundingHistory, Speed, peak_flops
from hf_coat.memory import predict
from hf_coat.record import read_run
from hf_coat.report import format_bytes

ROUNDING = 0.026  # of values that lie within the normal numbers of E4M3
LEAN = {"activations": "lean"}


class Shown(TrainerCallback):
    """What a tracker is given."""

    def __init__(self):
        self.logs = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs[state.global_step] = dict(logs)


@pytest.fixture
def run(tools, tmp_path):
    """``run("folder", coat=..., max_steps=2)``: a stock Trainer that has trained, and what was shown of it."""

    def run(folder="run", coat="lean", resume=False, model=None, **changes):
        WeightCache._stepped = False  # as in a process of its own
        args = TrainingArguments(**tools.short_run(tmp_path / folder, coat=coat, **changes))
        shown, model = Shown(), tools.tiny_llama(attention="sdpa") if model is None else model
        trained = Trainer(model, args, train_dataset=tools.random_tokens(), callbacks=[shown])
        trained.train(resume_from_checkpoint=resume)
        return trained, shown.logs

    return run


def hooks(model):
    return [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]


@pytest.mark.parametrize(
    "coat,changes",
    [
        ({"model": LEAN}, {}),
        ("paper", {"bf16": True, "use_cpu": True}),
        ({"model": LEAN}, {"gradient_checkpointing": True}),
        ({"optimizer": {"gradient_release": True}}, {"gradient_accumulation_steps": 1}),
    ],
)
def test_the_training_is_the_same_with_it_and_without(run, tools, coat, changes):
    recipe = HfCoatConfig.resolve(coat)
    one, shown = run("one", coat, **changes)
    other, silent = run("other", HfCoatConfig(recipe.model, recipe.optimizer, live=False), **changes)
    assert tools.same_bits(dict(one.model.state_dict()), dict(other.model.state_dict()))
    assert tools.same_bits(one.optimizer.state_dict(), other.optimizer.state_dict())
    kept = {"loss", "grad_norm", "learning_rate", "epoch"}
    assert [{k: log[k] for k in kept} for log in shown.values()] == list(silent.values())
    assert "coat/norm_error" in shown[1] and "coat/norm_error" not in shown[2]
    assert Watcher.see is None and hooks(one.model) == hooks(other.model)


def test_what_is_shown(run, tmp_path):
    trained, shown = run(coat={"model": LEAN}, max_steps=2, save_strategy="steps", save_steps=1, use_cpu=True)
    parameters = sum(p.numel() for p in trained.model.parameters())
    for step in (1, 2):
        assert {k: v for k, v in shown[step].items() if k != "epoch"}.items() <= trained.state.log_history[
            step - 1
        ].items()
        assert shown[step]["coat/tokens_per_second"] > 0 and "coat/mfu" not in shown[step], "no peak of a CPU is known"
        assert shown[step]["coat/weights_gib"] == shown[step]["coat/gradients_gib"] == 4 * parameters / 2**30
        assert "coat/peak_gib" not in shown[step] and "coat/adamw_states_gib" not in shown[step]
    for kind in ("norm", "mlp", "attention", "linear"):
        assert shown[1][f"coat/{kind}_error"] == pytest.approx(ROUNDING, rel=0.15)
        assert shown[1][f"coat/{kind}_saturated"] == 0 and shown[1][f"coat/{kind}_underflowed"] < 0.01
    record = json.loads((tmp_path / "run" / "coat_run.json").read_text())
    rows = record["rounding"]["errors"]
    layers = [f"model.layers.{i}" for i in (0, 1)]
    assert list(rows) == [
        "norm",
        *(f"{kind} {layer}" for kind in ("norm", "mlp", "attention", "linear") for layer in layers),
    ]
    assert record["rounding"]["steps"] == [1] and all(len(row) == 1 for row in rows.values())
    assert record["memory"]["gradients"] == 4 * parameters


@pytest.mark.parametrize("changes", [{"use_cpu": True}, {"bf16": True, "use_cpu": True}])
def test_the_table_at_the_end(run, tools, heard, changes):
    trained, _ = run(coat={"model": LEAN}, **changes)
    (said,) = [line for line in heard.lines if "Memory of one training step" in line]
    rows = {line.split("  ")[0].strip(): line.split()[-7:] for line in said.splitlines()}
    sizes = [p.nbytes for p in trained.model.parameters()]
    adamw, ours = 2 * sum(sizes) + 4 * len(sizes), trained.optimizer.optimizer.state_bytes()  # 4: the number of steps
    expected = " ".join([format_bytes(adamw), format_bytes(ours), format_bytes(ours), f"{adamw / ours:.2f}x"])
    assert " ".join(rows["optimizer states"]) == expected
    assert rows["gradients"] == [*format_bytes(sum(sizes)).split()] * 3 + ["1.00x"]
    assert float(rows["saved activations"][-1][:-1]) > 1.5 and rows["saved activations"][-2] == "-"
    with torch.autocast("cpu", torch.bfloat16, enabled=changes.get("bf16", False)):
        batch = {
            name: torch.stack([row[name] for row in tools.random_tokens()[:2]]) for name in ("input_ids", "labels")
        }
        predicted = predict(trained.model, batch).activations
    assert format_bytes(predicted) in " ".join(rows["saved activations"])
    assert "only 'measured' was run" in said


@pytest.mark.gpu
def test_the_table_at_the_end_of_a_run_on_a_gpu(run, heard, tmp_path):
    """What stands under 'measured' is the allocator's word; the BF16 run beside it was only predicted."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trained, shown = run(bf16=True, save_strategy="steps", save_steps=2)
    (said,) = [line for line in heard.lines if "Memory of one training step" in line]
    rows = {line.split("  ")[0].strip(): line for line in said.splitlines()}
    memory = read_run(tmp_path / "run")["memory"]
    held = memory["weights"] + memory["optimizer_states"] + memory["gradients"]
    assert held < memory["peak"] <= torch.cuda.max_memory_allocated()
    assert rows["peak on the device"].split()[-3:] == [*format_bytes(memory["peak"]).split(), "-"]
    assert rows["saved activations"].split()[-2] == "-" and "only 'measured' was run" in said
    assert 0 < shown[2]["coat/peak_gib"] <= memory["peak"] / 2**30
    assert ("coat/mfu" in shown[2]) == (peak_flops(torch.cuda.get_device_name()) is not None)


def test_an_estimate_that_fails_does_not_end_the_training(run, heard, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("a model that looks into its values")

    monkeypatch.setattr("hf_coat.integrations.callback.predict", fail)
    assert run()[0].state.global_step == 2 and "no estimate of the memory without COAT" in heard


def test_steps_that_are_measured(run):
    logged, fewest = 15, 15 * -(-EVERY // 15)
    _, shown = run(max_steps=fewest + logged, logging_steps=logged)
    assert len(shown) == fewest // logged + 1
    assert [step for step, log in shown.items() if "coat/norm_error" in log] == [fewest]
    _, shown = run(max_steps=4, logging_strategy="epoch", num_train_epochs=2)
    assert all("coat/norm_error" in log for log in shown.values())


def test_a_run_that_is_resumed_remembers(run, tools, tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    straight, _ = run("run", **settings)
    (tmp_path / "run" / "checkpoint-3").rename(tmp_path / "aside")
    again, _ = run("run", resume=True, model=tools.tiny_llama(seed=1, attention="sdpa"), **settings)
    assert tools.same_bits(dict(again.model.state_dict()), dict(straight.model.state_dict()))
    record = json.loads((tmp_path / "run" / "coat_run.json").read_text())
    assert record["resumed_at"] == [2] and record["rounding"]["steps"] == [1]


# --- what is measured -----------------------------------------------------------------------------


def test_rounding_of_known_values():
    x = torch.zeros(600, 128)  # more rows than are looked at
    x[:, 0], x[:, 1:5] = 256.0, 2.0**-30  # the scale makes of 256 a code in [224, 448]; 2**-30 is none of its codes
    x.requires_grad_()
    weight = torch.eye(128).requires_grad_()
    with Rounding(nn.Module()) as rounding:
        coat_linear(x, weight)
        coat_norm(x, torch.ones(128), eps=1e-6, group_size=64)
    found = rounding.by_layer()
    assert found.keys() == {("", "linear"), ("", "norm")}
    for measures in found.values():
        assert measures["saturated"] == 0 and measures["underflowed"] == 4 / 5
        assert measures["error"] == pytest.approx(2 * 2.0**-38, rel=1e-3)  # |(2**-30) x 4| / 256
    with Rounding(nn.Module()) as rounding:
        Watcher.see(
            "mlp",
            torch.tensor([[3.0, 900.0]]),
            torch.tensor([[3.0, 448.0]]).to(torch.float8_e4m3fn),
            torch.ones(1, 1),
            0,
        )
        Watcher.see(
            "mlp", torch.full((1, 2), float("nan")), torch.ones(1, 2).to(torch.float8_e4m3fn), torch.ones(1, 1), 0
        )
    (measures,) = rounding.by_layer().values()
    assert measures["saturated"] == 1 / 4 and measures["error"] != measures["error"]


def test_what_linears_inside_a_fused_mlp_multiply(tools):
    """An outlier that the MLP makes for its last linear, whose input nobody holds as values."""
    model = tools.tiny_llama()
    apply_coat(model, CoatConfig())
    ids = torch.randint(0, 64, (1, 16), generator=torch.Generator().manual_seed(0))
    with Rounding(model) as rounding:
        model(input_ids=ids, labels=ids).loss.backward()
    before = rounding.by_layer()["model.layers.1", "linear"]["underflowed"]
    with torch.no_grad():
        for linear in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            linear.weight[0] *= 1e6
    with Rounding(model) as rounding:
        model(input_ids=ids, labels=ids).loss.backward()
    assert set(rounding.by_layer()["model.layers.1", "linear"]) == set(MEASURES)
    assert rounding.by_layer()["model.layers.1", "linear"]["underflowed"] > before + 0.05


def test_a_long_history_is_thinned():
    history = RoundingHistory()
    for step in range(1, 10 * MOST_SAMPLES):
        rows = {("model.layers.10", "norm"): {"error": 0.1}, ("model.layers.2", "norm"): {"error": 1 / step}}
        history.add(step, rows if step > 1 else {("model.layers.2", "norm"): {"error": 1.0}})
    kept = history.to_dict()
    assert MOST_SAMPLES / 2 <= len(kept["steps"]) <= MOST_SAMPLES and kept["steps"][0] == 1
    assert list(kept["errors"]) == ["norm model.layers.2", "norm model.layers.10"]
    assert kept["errors"]["norm model.layers.2"] == [float(f"{1 / step:.3g}") for step in kept["steps"]]
    assert kept["errors"]["norm model.layers.10"][:2] == [None, 0.1]


def test_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hf_coat.live.time.perf_counter", lambda: now[0])
    speed = Speed(flops=600.0, tokens=0, flops_per_token=6, peak=100.0)
    now[0] = 2.0
    speed.end_step()
    now[0] = 10.0
    speed.pause()  # an evaluation of eight seconds
    now[0] = 12.0
    assert speed.figures(1200.0, 0) == {"tokens_per_second": 25.0, "mfu": 1.5}
    now[0] = 13.0
    assert speed.figures(1800.0, 10) == {"tokens_per_second": 10.0, "mfu": 6.0}, "tokens that are counted count"
    now[0] = 14.0
    assert speed.figures(1800.0, 10) == {}


@pytest.mark.parametrize(
    "name,tera",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 836),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10G", None),
        ("NVIDIA H200 MIG 1g.18gb", None), ("NVIDIA GeForce GTX 1080", None), ("NVIDIA GB200", 2500),
    ],
)  # fmt: skip
def test_peaks_by_name(name, tera):
    assert peak_flops(name) == (None if tera is None else tera * 1e12)
