"""Tables say what the records say."""

import re

import pytest

from hf_coat.memory import MemoryBreakdown
from hf_coat.report import conversion_table, format_bytes, loss_table, memory_rows, memory_table

GIB = 2**30
BF16 = MemoryBreakdown(13 * GIB, 13 * GIB, 26 * GIB, 24 * GIB)
COAT = MemoryBreakdown(13 * GIB, 13 * GIB, 13 * GIB, 8 * GIB)


def row(table: str, name: str) -> list[str]:
    """The cells of the line of ``table`` that starts with ``name``."""
    (line,) = (line.strip() for line in table.splitlines() if line.strip().startswith(name))
    return re.split(r"\s{2,}", line)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (100 * 2**20, "100 MiB"),
        (5 * 2**50, "5120 TiB"),
    ],
)
def test_bytes(count, text):
    assert format_bytes(count) == text


def test_predicted_memory():
    table = memory_table(BF16, COAT)
    assert row(table, "weights") == ["weights", "13.00 GiB", "13.00 GiB", "1.00x"]
    assert row(table, "optimizer states") == ["optimizer states", "26.00 GiB", "13.00 GiB", "2.00x"]
    assert row(table, "saved activations") == ["saved activations", "24.00 GiB", "8.00 GiB", "3.00x"]
    assert row(table, "total") == ["total", "76.00 GiB", "47.00 GiB", "1.62x"]
    assert "measured" not in table and "peak" not in table


def test_ratios_compare_like_with_like():
    """Measured with measured where there are both, else predicted with predicted."""
    measured = MemoryBreakdown(GIB, GIB, GIB, GIB, peak=8 * GIB)
    both, one = memory_rows(BF16, COAT, measured, measured), memory_rows(BF16, COAT, measured)
    assert {row["class"]: row["ratio"] for row in both} == dict.fromkeys(
        ["weights", "gradients", "optimizer_states", "activations", "total", "peak"], 1.0
    )
    assert [row["ratio"] for row in one] == [1.0, 1.0, 2.0, 3.0, 76 / 47, None]
    assert row(memory_table(BF16, COAT, measured), "peak") == ["peak on the device", "-", "-", "8.00 GiB", "-"]


def test_records_are_as_good_as_breakdowns():
    assert memory_rows(BF16.to_dict(), COAT.to_dict()) == memory_rows(BF16, COAT)


def test_nothing_is_no_ratio():
    nothing = MemoryBreakdown(0, 0, 0, 0)
    assert row(memory_table(BF16, nothing), "weights") == ["weights", "13.00 GiB", "0 B", "-"]


def test_name_of_the_baseline():
    assert "FP32 AdamW" in memory_table(BF16, COAT, baseline="FP32 AdamW")


def test_conversion_folds_layers():
    record = {
        "converted": {f"model.layers.{i}.mlp.up_proj": "CoatLinear" for i in range(12)} | {"proj2d": "CoatLinear"},
        "kept": {"lm_head": "head", "model.layers.3.mlp.gate": "router", "": "[bold]no markup[/bold]"},
        "uncovered": {"Embedding": "1 modules"},
        "unmatched": ["vision"],
    }
    table = conversion_table(record)
    assert row(table, "model.layers.*.mlp.up_proj") == ["model.layers.*.mlp.up_proj", "12", "converted", "CoatLinear"]
    assert row(table, "proj2d")[1] == "1"
    assert row(table, "model.layers.*.mlp.gate")[1:] == ["1", "kept", "router"]
    assert row(table, "(the model)")[-1] == "[bold]no markup[/bold]"
    assert row(table, "Embedding") == ["Embedding", "not covered", "1 modules"]
    assert row(table, "vision")[1:] == ["no such module", "named by the configuration"]


def test_losses_side_by_side():
    logs = {"BF16": [{"step": 10, "loss": "7.25"}, {"step": 20, "loss": 6.5}], "COAT": [{"step": 10, "loss": 7.3}]}
    logs["COAT"].append({"step": 10, "eval_loss": 1.0})
    table = loss_table(logs)
    assert row(table, "10") == ["10", "7.2500", "7.3000"]
    assert row(table, "20") == ["20", "6.5000", "-"]
    assert row(loss_table(logs, key="eval_loss"), "10") == ["10", "-", "1.0000"]
