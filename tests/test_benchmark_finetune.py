"""The benchmark of the memory of tuning at toy size; whether its bounds hold is not asked here."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from benchmarks import common, finetune, memory, training
from tests.test_benchmarks import TINY

SHAPE = {**TINY, "vocab_size": 256}


@pytest.mark.slow
def test_tuning_is_measured_in_processes_of_their_own() -> None:
    made = [json.loads(json.dumps(case.to_json())) for case in finetune.cases(SHAPE, (2, 16), 2, 1)]
    assert [data["unit"] for data in made] == ["peak / bound", "peak / peak"]
    assert all(0 < data["value"] < math.inf and data["threads"] == 1 for data in made)
    one, other = (data["details"] for data in made)
    assert one["peak"] - one["imports"] == one["peak_over_imports"] > 0
    assert sum(one["bound_terms"].values()) == one["bound"] and one["bound_terms"]["activations"] > 0
    assert one["peak_over_imports_until"].keys() == {"tune 1", "tune 2"} and all(map(math.isfinite, one["losses"]))
    # what the bound counts is what was trained, of both models
    assert one["bound_terms"]["adapters"] == 16 * one["adapters"]
    matrices = memory.matrices(SHAPE).values()
    assert other["dense"]["adapters"] == 2 * finetune.RANK * sum(m + n for m, n in matrices)
    numbers = one["parameters"]
    assert numbers["dense"] == 2 * sum(m * n for m, n in matrices) + 2 * 256 * 32 + 5 * 32
    assert one["bound_terms"]["weights"] == 4 * numbers["compressed"] < 4 * numbers["dense"]
    dense = other["dense"]
    assert other["dense_peak_over_imports"] == dense["peak"] - dense["imports"] - dense[
        "program"
    ] > 0 and math.isfinite(dense["loss"])


def test_adapters_and_their_inputs_are_counted() -> None:
    layout = {
        "one": {"format": "low_rank", "in": 20, "out": 30, "bias": False, "rank": 10},
        "narrow": {"format": "low_rank", "in": 20, "out": 30, "bias": False, "rank": 3},
    }
    assert finetune.adapters(layout, 8) == 8 * (30 + 10 + 10 + 20) + 3 * (30 + 3 + 3 + 20)
    # two blocks: 32 for q, k and v, 32 for o, 32 for gate and up, 48 for down
    assert finetune.inputs(TINY, layout, 8, 10) == 4 * 10 * (2 * (32 + 32 + 32 + 48) + (10 + 2 * 8) + (3 + 2 * 3))


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_pages_of_the_program_are_part_of_what_a_process_holds_and_tensors_are_not() -> None:
    before = common.program_bytes()
    held = torch.ones(2**26)
    assert 0 < before < training.held_bytes() - held.nbytes
    assert abs(common.program_bytes() - before) < held.nbytes // 8
