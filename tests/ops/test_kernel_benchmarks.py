"""The table of kernels/benchmarks: every case runs, agrees with its reference, and counts the bytes that it moves."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "kernels" / "benchmarks" / "run.py"
TOKENS, HIDDEN, WIDE = 40, 64, 96
# Bytes per value or group of 128, by hand: x and dy are BF16, codes a byte, scales of groups a byte, of tokens 4.
T, H, W = TOKENS, HIDDEN, WIDE
PADDED = 48  # tokens of transposed codes
BYTES = {
    "quantize 40 x 64 per token": T * (2 * H + H + 4),
    "quantize 40 x 64 per tensor + transposed": T * H * (2 + 2 + 1) + PADDED * H + 4,
    "quantize 40 x 64 per tensor, amax given": T * H * (2 + 1) + 4 + 4,
    "quantize 3 of 40 x 64 as columns": 3 * T * H * (2 + 1) + 4 * T,
    "quantize 2 of 96 x 64 as rows": 2 * W * H * (2 + 1) + 4 * 2 * W,
    "quantize a layer of 64 and 96, half of each weight": (4 + 2 * 1.5 + 1.5) * 32 * H * 3 + 256 * 4,
    "transpose 2 of 96 x 64": 2 * 2 * W * H + 4 * 2 * W + 4,
    "norm 40 x 64, input kept + codes": T * H * (2 + 2 + 1 + 1) + T * (4 + 1 + 4) + 2 * H,
    "norm_backward of norm 40 x 64": T * H * (2 + 1 + 2) + T * (1 + 4) + (2 + 4) * H,
    "norm_transposed of norm 40 x 64": T * H + PADDED * H + T * (1 + 4) + 2 * H + 4,
    "norm_values of norm 40 x 64": T * H * (1 + 2) + T * (1 + 4) + 2 * H,
    "activation 40 x 96 silu, gated, codes": T * W * (2 + 2 + 1 + 2) + T * (4 + 2),
    "activation_backward 40 x 96 silu, gated, codes": T * W * (2 + 2 + 2) + T * (2 + 4),
    "activation_transposed 40 x 96 gelu_tanh": T * W + PADDED * W + T + 4,
    "activation_values 40 x 96 silu, gated": T * W * (2 + 2) + T * 2,
    "rotary 40 x 2 x 64": 2 * T * H * (2 + 2) + 2 * T * 64 * 2,
}


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("kernel_benchmarks", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cases(run):
    found = list(run.memory_cases("cuda" if torch.cuda.is_available() else "cpu", TOKENS, HIDDEN, WIDE))
    assert len({case.name for case in found}) == len(found)
    return {case.name: case for case in found}


def test_every_case_agrees_with_its_reference(run, cases):
    for name, case in cases.items():
        assert run.agrees(run.as_tuple(case.call()), run.as_tuple(case.reference()), case.exact), name


def test_bytes(run, cases):
    assert {name: cases[name].bytes(run.as_tuple(cases[name].call())) for name in BYTES} == BYTES


def test_a_kernel_that_disagrees_has_no_figure(run, cases, monkeypatch):
    """Of each case every result is spoilt in turn: 1 % of it wrong."""
    monkeypatch.setattr(run, "milliseconds", lambda call: 1.0)
    monkeypatch.setattr(run, "copy_of", lambda size: size / 1e12 * 1e3)
    name = "norm 40 x 64, input kept + codes"
    [row, _] = run.run_memory(1e12, [name], cases.values())  # and "layer norm"
    moved = BYTES[name]
    assert row["parity"] and row["us"] == 1e3 and row["of copy"] == pytest.approx(moved / 1e-3 / 1e12)
    assert row["of copy of this size"] == pytest.approx(row["of copy"])
    assert "of copy" in run.show(row)
    for case in cases.values():
        right = run.as_tuple(case.call())
        for i, result in enumerate(right):
            if result is None or result.numel() == 0:
                continue
            wrong = result.clone()
            flat = wrong.view(torch.uint8) if wrong.element_size() == 1 else wrong
            flat.view(-1)[: max(1, flat.numel() // 100)] += 3
            spoilt = dataclasses.replace(case, call=lambda w=(*right[:i], wrong, *right[i + 1 :]): w)
            [row] = run.run_memory(1e12, [""], [spoilt])
            assert row == {"case": case.name, "parity": False}, (case.name, i)
            assert "PARITY IS RED" in run.show(row)
