"""The benchmark of training memory at toy size; whether its bound holds is not asked here."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import memory, training
from tests.test_benchmarks import TINY


@pytest.mark.slow
def test_training_is_measured_in_processes_of_their_own() -> None:
    case = training.case({**TINY, "vocab_size": 256}, (2, 16), 3, 1)
    data = json.loads(json.dumps(case.to_json()))
    assert 0 < data["value"] < math.inf and data["unit"] == "peak / bound" and data["threads"] == 1
    details = data["details"]
    assert details["peak"] - details["imports"] == details["peak_over_imports"] > 0
    assert sum(details["bound_terms"].values()) == details["bound"]
    assert details["bound_terms"]["activations"] > 0
    assert {"decompose", "coarse", "sparsify", "write"} <= details["peak_over_imports_until"].keys()
    assert len(details["curves"]["soco kl"]) == 3
    numbers = 2 * sum(m * n for m, n in memory.matrices(TINY).values()) + 2 * 256 * 32 + 5 * 32
    assert details["parameters"] == numbers and details["bound_terms"]["dense_weights"] == 10 * numbers


def test_factors_and_coordinates_are_counted_in_bytes() -> None:
    matrices = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    assert training.factors(TINY) == 4 * 2 * sum((m + n) * min(m, n) for m, n in matrices)
    assert training.coordinates(TINY, 10) == 4 * 10 * 2 * (5 * 32 + 2 * 16)
