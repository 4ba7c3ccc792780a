"""Finished work is used again, whatever ended the run before; nothing stale is."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim
from spectrim import pipeline
from spectrim import run as runs
from spectrim.calibrate.statistics import Gram
from spectrim.core import lock, store
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


TRAINING = [f"groups.0.allocate.{setting}" for setting in ("steps=10", "batch=2", "sequences=4", "length=12")]
# whitened and unirank by one pass, duo-svd by the model's deviation, soco by training, lorap by two passes
KILLED: dict[str, list[str]] = {
    "whitened": [], "unirank": [], "duo-svd": ["groups.0.allocate.sequences=4"], "soco": TRAINING, "lorap": [],
}  # fmt: skip


def kills(model: Path, text: Path, folder: Path, chain: bool) -> dict[str, list[Any]]:
    """Runs that were killed at their writes, by recipe; see tests/kills.py."""
    request = {"model": str(model), "text": str(text), "folder": str(folder), "recipes": KILLED, "chain": chain}
    environment = {**os.environ, "PYTHONPATH": str(Path(spectrim.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kills.py"))], input=json.dumps(request), env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def same(killed: Path, undisturbed: Path) -> bool:
    """Whether two outputs and what lies in their work directories are alike, nothing half written among it."""
    assert not list(killed.parent.glob(f"{killed.name}.work/**/.*")), "nothing is left of killed runs"
    works = [tree_hash(Path(f"{out}.work")) for out in (killed, undisturbed)]
    return tree_hash(killed, "run.json") == tree_hash(undisturbed, "run.json") and works[0] == works[1]


@pytest.mark.slow
def test_runs_that_are_killed_again_and_again_give_the_same_bytes(
    llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    for name, ends in kills(llama_dir, text_file, tmp_path, chain=True).items():
        assert ends[:4] == [[1, "before"], [1, "after"], [2, "before"], [2, "after"]] and ends[-1][0] >= 4, name
        assert same(tmp_path / name / "killed", tmp_path / name / "undisturbed"), name


@pytest.mark.slow
def test_runs_killed_at_any_write_give_the_same_bytes(text_file: Path, tmp_path: Path) -> None:
    # four blocks: with two, a recipe whose FFNs are one target each writes fewer than 16 files
    model = save_model(FAMILIES["llama"].make(num_hidden_layers=4), tmp_path / "model")
    for name, ends in kills(model, text_file, tmp_path, chain=False).items():
        assert ends[-1][0] >= 16, name
        for at, when in ends:
            assert same(tmp_path / name / f"{at}-{when}", tmp_path / name / "undisturbed"), (name, at, when)


@pytest.fixture(scope="module")
def with_columns(llama_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose work directory holds artifacts of all kinds but those of a training."""
    out = tmp_path_factory.mktemp("columns") / "out"
    columns(llama_dir, text_file, out)
    return out


def columns(model: Path, text: Path, out: Path) -> None:
    options: dict[str, Any] = {"sequences": 8, "length": 24, "settings": KILLED["duo-svd"]}
    spectrim.compress(model, "duo-svd", ratio=0.3, text=str(text), out=out, **options)


KINDS = ["windows", "statistics", "candidate", "deviation", "settled", "plan"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_artifact_is_made_again_and_said(
    kind: str, llama_dir: Path, text_file: Path, with_columns: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = False
    for damaged in sorted((Path(f"{with_columns}.work") / kind).iterdir()):
        out = tmp_path / damaged.stem / "out"
        shutil.copytree(f"{with_columns}.work", f"{out}.work")
        copy = Path(f"{out}.work") / kind / damaged.name
        content = bytearray(damaged.read_bytes())
        content[-20] ^= 1
        copy.write_bytes(content)
        caplog.clear()
        columns(llama_dir, text_file, out)
        assert tree_hash(out, "run.json") == tree_hash(with_columns, "run.json")
        said = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
        found = any(damaged.name in line for line in said)
        if found or kind == "plan":  # a plan is written by every run and read by none
            assert same(out, with_columns)
            assert len(said) == found
            break
    assert found or kind == "plan", "no run reads any of them"


def test_every_kind_of_artifact_is_damaged_once(with_columns: Path) -> None:
    assert sorted(folder.name for folder in Path(f"{with_columns}.work").iterdir()) == sorted(KINDS)


def test_damage_everywhere_is_a_run_from_the_beginning(
    llama_dir: Path, text_file: Path, undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(f"{undisturbed}.work", tmp_path / "out.work")
    files = [path for path in (tmp_path / "out.work").rglob("*") if path.is_file()]
    for number, path in enumerate(files):
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size * number // len(files))
    run(llama_dir, text_file, tmp_path / "out")
    assert same(tmp_path / "out", undisturbed)
    said = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(said) == len([path for path in files if path.parent.name != "plan"])


def test_another_version_makes_everything_anew(
    llama_dir: Path, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = store.version
    for version in (original("spectrim"), "99.0"):
        monkeypatch.setattr(store, "version", lambda name, version=version: version)
        out = tmp_path / version
        spectrim.compress(llama_dir, "whitened", text=CALIBRATION, out=out, work=tmp_path / "work")
    assert calls == {"streamed": 2, "directions": 2 * TARGETS}


def test_a_second_run_on_a_work_directory_is_refused_while_the_first_one_works(llama_dir: Path, tmp_path: Path) -> None:
    start = functools.partial(spectrim.compress, llama_dir, "svd", work=tmp_path / "work")
    refused: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        if not refused:
            with pytest.raises(store.StoreError, match=f"in use by process {os.getpid()} .*--work") as error:
                start(out=tmp_path / "second")
            refused.append(str(error.value))

    start(out=tmp_path / "first", progress=progress)
    assert refused and (tmp_path / "first").exists() and not (tmp_path / "second").exists()
    assert not (tmp_path / "work" / lock.NAME).exists()
    start(out=tmp_path / "second")
    assert tree_hash(tmp_path / "second", "run.json") == tree_hash(tmp_path / "first", "run.json")


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
