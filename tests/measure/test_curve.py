"""curve(): checkpoints at several ratios of one work directory, what they lose, and where the curve bends."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import spectrim
from spectrim import pipeline
from spectrim.cli import app
from spectrim.measure.curve import Row, knee
from spectrim.model import apply
from spectrim.recipe import RecipeError
from tests.conftest import letters, tree_hash
from tests.families import FAMILIES

SMALL: dict[str, Any] = {"sequences": 60, "length": 40, "settings": ["calibrate.accept=0.5"]}
RATIOS = [0.3, 0.1, 0.2]
OTHER = "unirank"  # streams, and measures once


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(letters(3000), encoding="utf-8")
    return str(file)


def test_every_ratio_is_a_checkpoint_and_nothing_is_measured_twice(
    llama_dir: Path, text: str, tmp_path: Path, calls: Counter[str]
) -> None:
    found = spectrim.curve(llama_dir, OTHER, RATIOS, text, tmp_path / "out", **SMALL)
    assert calls["streamed"] == 1 and calls["directions"] == 14
    data = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert data == json.loads(json.dumps(found.to_json())) and [row.ratio for row in found.rows] == [0.1, 0.2, 0.3]
    losses = [row.loss["excess"] for row in found.rows if row.loss]
    assert len(losses) == 3 and all(row.loss["windows"] == "accept" for row in found.rows if row.loss)
    for row in found.rows:
        folder = tmp_path / "out" / f"{row.ratio:g}"
        assert row.directory == str(folder) and row.bytes == (folder / "model.safetensors").stat().st_size
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert row.parameters == sum(p.numel() for p in model.parameters())
    assert found.knee == knee(found.rows) and data["dense"]["parameters"] == 20064
    page = (tmp_path / "out" / "curve.md").read_text()
    assert all(f"| {row.ratio:g} | {row.loss['excess']:.4f} |" in page for row in found.rows if row.loss)
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "out" / "curve.png").exists() == drawn
    # an ordinary run of the same ratio comes to the same weights
    spectrim.compress(llama_dir, OTHER, 0.2, text, tmp_path / "alone", work=tmp_path / "out.work", **SMALL)
    alone, of_curve = (
        tree_hash(each, "run.json", "spectrim.json") for each in (tmp_path / "alone", tmp_path / "out/0.2")
    )
    assert alone == of_curve


def test_a_killed_curve_goes_on_and_finished_ratios_stay(
    llama_dir: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spectrim.curve(llama_dir, OTHER, RATIOS, text, tmp_path / "whole", **SMALL)
    written, original = 0, apply.streamed

    def interrupted(*args: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        if written == 2:
            raise KeyboardInterrupt
        original(*args, **options)

    monkeypatch.setattr(apply, "streamed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        spectrim.curve(llama_dir, OTHER, RATIOS, text, tmp_path / "out", **SMALL)
    assert (tmp_path / "out" / "0.1").exists() and not (tmp_path / "out" / "0.2").exists()
    assert not (tmp_path / "out" / "curve.json").exists()
    found = spectrim.curve(llama_dir, OTHER, RATIOS, text, tmp_path / "out", **SMALL)
    assert written == 4, "the first ratio was recognised"
    assert tree_hash(tmp_path / "out", "run.json", "curve.json") == tree_hash(
        tmp_path / "whole", "run.json", "curve.json"
    )
    spectrim.curve(llama_dir, OTHER, [*RATIOS, 0.4], text, tmp_path / "out", **SMALL)
    assert written == 5
    assert [row.loss for row in found.rows] == [
        row["loss"] for row in json.loads((tmp_path / "out" / "curve.json").read_text())["rows"][:3]
    ]


def test_what_is_in_the_way_is_left_alone(llama_dir: Path, text: str, tmp_path: Path) -> None:
    spectrim.curve(llama_dir, "svd", [0.1], None, tmp_path / "out")
    before = tree_hash(tmp_path / "out")
    with pytest.raises(ValueError, match=r"is a curve of other conditions \(recipe_hash\)"):
        spectrim.curve(llama_dir, "whitened", [0.2], None, tmp_path / "out")
    (tmp_path / "out" / "0.2").mkdir()
    (tmp_path / "out" / "0.2" / "mine").write_text("")
    with pytest.raises(ValueError, match=r"0\.2 is not empty"):
        spectrim.curve(llama_dir, "svd", [0.3, 0.2], None, tmp_path / "out")
    (tmp_path / "out" / "0.2" / "mine").unlink()
    (tmp_path / "out" / "0.2").rmdir()
    assert tree_hash(tmp_path / "out") == before
    for ratios, match in (([], "needs ratios"), ([0.1, 0.1], "given twice"), ([1.2], "less than 1")):
        with pytest.raises(RecipeError, match=match):
            spectrim.curve(llama_dir, "svd", ratios, None, tmp_path / "other")


def test_a_ratio_that_fails_is_a_row_and_all_of_them_an_error(llama_dir: Path, text: str, tmp_path: Path) -> None:
    def call(*ratios: str) -> Any:
        options = ["--recipe", "svd", "--out", str(tmp_path / "out")]
        return CliRunner().invoke(app, ["compress", str(llama_dir), *options, *ratios])

    some = call("--ratios", "0.1,0.999")
    assert some.exit_code == 1 and "ratio too large" in some.stdout and (tmp_path / "out" / "0.1").exists()
    assert not (tmp_path / "out" / "0.999").exists()
    every = call("--ratios", "0.998,0.999")
    assert every.exit_code == 2 and "ratio too large" in every.stderr
    assert call("--ratios", "0.1,x").exit_code == 2
    fine = call("--ratios", "0.1", "--ratios", "0.2", "--json")
    assert fine.exit_code == 0 and [row["ratio"] for row in json.loads(fine.stdout)["rows"]] == [0.1, 0.2]
    assert "no loss was measured" in json.loads(fine.stdout)["notes"][0]
    assert not (tmp_path / "out" / "curve.png").exists()


def test_losses_on_windows_of_select_are_called_so(
    llama_dir: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    given = {**SMALL, "settings": ["calibrate.select=0.5"]}
    found = spectrim.curve(llama_dir, OTHER, [0.1, 0.2], text, tmp_path / "out", **given)
    assert [row.loss["windows"] for row in found.rows if row.loss] == ["select"] * 2
    assert "on which ranks were chosen" in found.notes[0] and "fewer than 3 points" in found.notes[1]
    assert found.knee is None and "curve.png is not drawn: it needs matplotlib" in caplog.text
    assert (tmp_path / "out" / "curve.md").exists() and not (tmp_path / "out" / "curve.png").exists()


def rows(*points: tuple[float, int, float]) -> list[Row]:
    return [Row(ratio, parameters=kept, loss={"excess": lost}) for ratio, kept, lost in points]


def test_the_knee_is_the_point_farthest_below_the_chord() -> None:
    # by hand: depths below the chord are 0.75 − 0.02 = … of the scaled points (0.25, 0.3), (0.5, 0.1), (0.75, 0.05)
    bent = rows((0.1, 100, 0.0), (0.2, 90, 0.05), (0.3, 80, 0.1), (0.4, 70, 0.3), (0.5, 60, 1.0))
    assert knee(bent) == 0.4
    assert knee(rows((0.1, 1000, 0.0), (0.2, 900, 0.5), (0.3, 800, 1.0))) is None, "a straight line has none"
    assert knee(rows((0.1, 100, 0.0), (0.2, 90, 0.9), (0.3, 80, 1.0))) is None, "bent the other way"
    assert knee(bent[:2]) is None
    assert knee(rows((0.1, 100, 0.2), (0.2, 90, 0.1), (0.3, 80, 0.1))) is None, "no loss that rises"
    assert knee([*bent, Row(0.6, parameters=50, loss={"excess": float("nan")}), Row(0.7, error="no")]) == 0.4


def test_a_curve_measures_only_where_there_is_text(llama_dir: Path, tmp_path: Path) -> None:
    made = pipeline.compress(llama_dir, "svd", 0.2, out=tmp_path / "out", measure=True)
    assert made.run["loss"] is None
    windows = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(0))
    live = pipeline.compress(
        FAMILIES["llama"].make(), "svd", 0.2, windows, measure=True, settings=["calibrate.accept=0.5"]
    )
    assert live.run["loss"]["predictions"] == 4 * 23
