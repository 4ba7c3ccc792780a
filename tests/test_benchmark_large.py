"""The benchmark of large checkpoints at toy size; whether its bounds hold is not asked here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import large, memory, predict
from spectrim.needs import parse_size


def found(peak: int, held: int) -> dict[str, dict[str, Any]]:
    causes = {"block_weights": 100, "hidden_states": held}
    stages = {
        "calibrate": {"memory_bytes": causes, "disk_bytes": 50},
        "decompose": {"memory_bytes": {}, "disk_bytes": 80},
    }
    predicted = {"stages": stages, "disk_bytes": {"windows": 30}, "seconds": {"calibrate": 4.0, "write": 1.0}}
    return {
        "predicted": predicted,
        "measured": {"peak_over_imports": peak, "memory": 130 + held, "disk": 60, "seconds": 10.0},
    }


def test_a_peak_is_weighed_against_its_terms_and_the_limit() -> None:
    terms = memory.terms(large.SHAPE, (1, 128), 4)
    bound = sum(terms.values()) + 1000
    cases = {case.name: case for case in large.cases_of("svd", 2, 3_000_000_000, found(bound // 2, 1000))}
    assert cases["3.00 B, 2 blocks, svd: peak / bound"].value == pytest.approx(0.5)
    of_limit = cases["3.00 B, 2 blocks, svd: peak / limit"]
    assert of_limit.value == pytest.approx(1130 / parse_size(large.LIMIT)) and of_limit.bound == large.WITHIN
    assert cases["3.00 B, 2 blocks, svd: disk, at most"].value == pytest.approx(60 / 50)
    assert cases["3.00 B, 2 blocks, svd: time, at least"].value == pytest.approx(2.0)
    assert cases["3.00 B, 2 blocks, svd: memory, at most"].value == pytest.approx(1130 / 1100)


def test_growth_needs_two_sizes() -> None:
    assert large.growth("svd", {88: 100}) == []
    (case,) = large.growth("svd", {264: 110, 88: 100})
    assert case.value == 1.1 and case.to_json()["holds"] is False


@pytest.mark.slow
def test_a_report_is_there_after_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**predict.TINY, "num_hidden_layers": 1, "num_key_value_heads": 2}
    monkeypatch.setattr(large, "SHAPE", small)
    monkeypatch.setattr(large, "TOKENS", (4, 16))
    large.measure(tmp_path / "report.json", ["svd"], [1, 2])
    cases = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["cases"]
    names = [case["name"] for case in cases]
    assert len(names) == 2 * 8 + 1 and names[-1] == "svd: peak at 2 blocks / at 1"
    assert all(case["value"] > 0 for case in cases)


def test_the_size_of_a_directory_is_that_of_its_files_and_one_that_goes_meanwhile_is_none(tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for name, size in (("here", 3), ("deep/there", 40), ("deep/deeper/far", 500)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "deep" / "gone").symlink_to(tmp_path / "nothing")
    assert predict._size(tmp_path) == 543 and predict._size(tmp_path / "nothing") == 0
