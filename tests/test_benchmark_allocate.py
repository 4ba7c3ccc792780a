"""The allocation benchmark runs at toy size and gives well-formed results; whether bounds hold is not asked here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import allocate, common
from benchmarks.common import Bound, Case


def well_formed(case: Case, bound: Bound | None) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(case.to_json()))
    assert 0 < data["min"] <= data["value"] <= data["max"] < math.inf
    assert data["repeats"] == 3 and data["threads"] == 1 and case.bound == bound
    return data


@pytest.mark.parametrize(
    ("mode", "format", "bound"),
    [("none", "low_rank", allocate.OVER_SORT), ("per_param", "low_rank", None), ("per_param", "pivot", None)],
)
def test_unirank_over_one_sort(mode: str, format: str, bound: Bound | None) -> None:
    data = well_formed(allocate.against_sort(2, 24, 3, mode, format), bound)
    assert data["unit"] == "ratio" and set(data["details"]["seconds"]) == {"unirank", "sort"}
    assert 0 <= data["details"]["unspent"] < 48


def test_the_problem_is_that_of_a_model() -> None:
    asked = allocate.problem(3, 16)
    assert asked.candidates is not None and asked.statistics is not None
    assert len(asked.targets) == len(asked.candidates) == 21 and len(asked.statistics) == 3
    assert asked.budget == math.floor((1 - allocate.RATIO) * 21 * 256)
    for candidate in asked.candidates.values():
        scores = candidate.rank_units.scores
        assert scores.shape == (16,) and scores.dtype == torch.float64
        assert (scores.diff() <= 0).all() and (scores > 0).all()


def test_knapsack_seconds() -> None:
    data = well_formed(allocate.knapsack(9, 16, 4, 3), None)
    assert data["unit"] == "seconds" and data["details"]["unspent"] and min(data["details"]["unspent"]) >= 0


def test_column_search_counts_every_error_asked_for_but_the_known_one() -> None:
    case = allocate.column_search(30, 3)
    assert case.bound == allocate.EVALUATIONS and len(case.values) == 3
    assert all(3 <= count <= 12 and count == int(count) for count in case.values)


@pytest.mark.slow
def test_what_is_measured_makes_a_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BLOCKS": 1, "WIDTH": 12, "SIZES": 3, "REPEATS": 1}.items():
        monkeypatch.setattr(allocate, name, value)
    common.write(tmp_path / "allocate.json", allocate.measure())
    result = json.loads((tmp_path / "allocate.json").read_text(encoding="utf-8"))
    assert result["benchmark"] == "allocate" and len(result["cases"]) == 5
    assert [case["bound"] is not None for case in result["cases"]] == [True, False, False, False, True]
