"""The benchmark of two processes at toy size; whether its bound holds is not asked here."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import processes
from tests.test_benchmarks import TINY


@pytest.mark.slow
@pytest.mark.distributed
def test_both_sides_are_timed_in_processes_of_their_own() -> None:
    case = processes.case({**TINY, "vocab_size": 256}, (2, 16), 1)
    data = json.loads(json.dumps(case.to_json()))
    assert 0 < data["value"] < math.inf and data["unit"] == "two processes / one" and data["threads"] == 1
    assert data["bound"]["limit"] == 0.6
    one, two = data["details"]["seconds"]["1"], data["details"]["seconds"]["2"]
    assert data["value"] == pytest.approx(two[0] / one[0], rel=0.01)
    assert {"decompose", "write"} <= data["details"]["stages"]["2"].keys()
