"""Finished work is used again, whatever ended the run before; nothing stale is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim
from spectrim import pipeline
from spectrim import run as runs
from spectrim.calibrate.statistics import Gram
from spectrim.core import store
from spectrim.data import text as texts
from spectrim.methods import svd
from spectrim.model import apply, writer
from tests.conftest import save_model, tree_hash
from tests.families import FAMILIES, LAYERS, VOCABULARY

CALIBRATION = torch.randint(1, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(2))
TARGETS = LAYERS * len(FAMILIES["llama"].roles)


def test_another_ratio_reuses_statistics_and_decompositions(
    llama_dir: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    def run(ratio: float, **changes: Any) -> Path:
        out = tmp_path / f"{ratio}-{len(list(tmp_path.iterdir()))}"
        options: dict[str, Any] = {"text": CALIBRATION, "work": tmp_path / "work", "recipe": "whitened", **changes}
        spectrim.compress(llama_dir, ratio=ratio, out=out, **options)
        return out

    run(0.2)
    assert calls == {"streamed": 1, "directions": TARGETS}
    reused = run(0.5)
    assert calls == {"streamed": 1, "directions": TARGETS}
    fresh = tmp_path / "fresh"
    spectrim.compress(llama_dir, "whitened", ratio=0.5, text=CALIBRATION, out=fresh)
    assert tree_hash(reused, "run.json") == tree_hash(fresh, "run.json")
    calls.clear()
    # everything else that decides a decomposition makes it anew
    run(0.5, text=CALIBRATION.flip(0))
    assert calls == {"streamed": 1, "directions": TARGETS}
    run(0.5, recipe="asvd")
    run(0.5, recipe="asvd", settings=["groups.0.decompose.alpha=0.7"])
    assert calls == {"streamed": 3, "directions": 3 * TARGETS}


def test_another_model_on_the_same_work_directory_is_another_run(tmp_path: Path, calls: Counter[str]) -> None:
    for seed in (0, 1):
        directory = save_model(FAMILIES["llama"].make(seed), tmp_path / f"model{seed}")
        spectrim.compress(directory, "svd", out=tmp_path / f"out{seed}", work=tmp_path / "work")
    assert calls == {"directions": 2 * TARGETS}


def test_a_live_model_with_a_work_directory_uses_it(tmp_path: Path, calls: Counter[str]) -> None:
    for ratio in (0.2, 0.4):
        spectrim.compress(FAMILIES["llama"].make(), "svd", ratio=ratio, work=tmp_path / "work")
    assert calls == {"directions": TARGETS}


# where a run is interrupted: a function it calls, and at which of its calls
PLACES: dict[str, tuple[Any, str, int]] = {
    "text": (texts, "token_stream", 1),
    "the first block": (Gram, "update", 2),
    "the second block": (Gram, "update", 6),
    "decomposition": (svd, "directions", 10),
    "storing": (store, "save_file", 5),
    "the plan": (runs.plans, "merge", 1),
    "the last factors": (apply, "form", TARGETS),
    "the description": (pipeline, "write_json", 1),
    "the record of the run": (writer.os, "fsync", TARGETS + 5),
}


@pytest.fixture(scope="module")
def undisturbed(llama_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing interrupted, and its work directory beside it."""
    return run(llama_dir, text_file, tmp_path_factory.mktemp("undisturbed") / "out")


def run(model: Path, text: Path, out: Path) -> Path:
    spectrim.compress(model, "whitened", ratio=0.3, text=str(text), sequences=8, length=24, out=out)
    return out


@pytest.mark.parametrize("place", PLACES)
def test_a_run_interrupted_anywhere_and_run_again_gives_the_same_bytes(
    place: str, llama_dir: Path, text_file: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, at = PLACES[place]
    original, count = getattr(where, name), 0

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(llama_dir, text_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.parts[-3] == "out.work" and not path.name.startswith(".") for path in left)
    monkeypatch.undo()
    out = run(llama_dir, text_file, tmp_path / "out")
    assert tree_hash(out, "run.json") == tree_hash(undisturbed, "run.json")
    assert tree_hash(tmp_path / "out.work") == tree_hash(undisturbed.parent / "out.work")


def test_only_what_is_missing_is_made(
    llama_dir: Path, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = svd.directions

    def interrupted(*args: Any) -> Any:
        if calls["directions"] == 10:
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(svd, "directions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        spectrim.compress(llama_dir, "whitened", text=CALIBRATION, out=tmp_path / "out")
    monkeypatch.setattr(svd, "directions", counted)
    spectrim.compress(llama_dir, "whitened", text=CALIBRATION, out=tmp_path / "out")
    assert calls["directions"] == TARGETS
