"""An output that a command made before is known by it, and by no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Int
from torch import Tensor

import spectrim
from spectrim import finished, recipe
from spectrim.core.progress import silent
from spectrim.core.store import Store
from spectrim.jobs import plan_jobs
from spectrim.model import blocks, targets
from spectrim.model.checkpoint import Checkpoint
from spectrim.recipe import Recipe
from spectrim.run import Run, Timings

WINDOWS = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def asked(ratio: float = 0.4, format: str = "plain") -> Recipe:
    return recipe.build("svd", {"ratio": ratio, "format": format}, [])


def run(
    model: Path, asked: Recipe, windows: Int[Tensor, "sequences length"] | None = None, dtype: torch.dtype | None = None
) -> Run:
    source = Checkpoint(model, torch.float32)
    structure = blocks.share_inputs(source.model, targets.find(source.model))
    store, jobs = Store(model.parent / "unused"), plan_jobs(asked, structure)
    return Run(source, structure, asked, jobs, windows, torch.device("cpu"), store, Timings(), silent, dtype)


@pytest.fixture
def model(llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_dir, tmp_path / "model"))


@pytest.fixture
def out(model: Path, tmp_path: Path) -> Path:
    """An output that says what it answers."""
    made = spectrim.compress(model, asked(), out=tmp_path / "out")
    summary = {**made.summary, **finished.record(tmp_path / "out", finished.request_of(run(model, asked())))}
    (tmp_path / "out" / finished.SUMMARY).write_text(json.dumps(summary))
    return tmp_path / "out"


def test_the_same_command_is_answered(model: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    finished.refuse_filled(out, False, finished.of_recipe(asked()))
    found = finished.compressed(run(model, asked()), out, False)
    assert found is not None and str(out) in caplog.text
    plan, summary, facts = found
    assert plan.to_json() == summary["plan"] == json.loads((out / "spectrim.json").read_text())["plan"]
    assert facts == json.loads((out / "run.json").read_text()) and facts["timings"]
    assert finished.compressed(run(model, asked()), out, True) is None
    assert finished.compressed(run(model, asked()), None, False) is None
    assert finished.compressed(run(model, asked()), out.parent / "other", False) is None


@pytest.mark.parametrize("other", [{"ratio": 0.3}, {"format": "pivot"}])
def test_another_recipe_is_refused_at_once(out: Path, other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not empty"):
        finished.refuse_filled(out, False, finished.of_recipe(asked(**other)))
    finished.refuse_filled(out, True, finished.of_recipe(asked(**other)))


def test_an_output_without_a_request_or_tuned_after_is_refused_at_once(out: Path) -> None:
    summary = json.loads((out / finished.SUMMARY).read_text())
    without = {key: value for key, value in summary.items() if key != "request"}
    for content in (json.dumps(without), json.dumps({**summary, "finetuning": []}), "[]", "{"):
        (out / finished.SUMMARY).write_text(content)
        with pytest.raises(ValueError, match="is not empty"):
            finished.refuse_filled(out, False, finished.of_recipe(asked()))


@pytest.mark.parametrize("change", ["weights", "tokenizer", "text", "dtype", "file", "missing", "size", "version"])
def test_anything_else_that_differs_is_refused(
    change: str, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    if change == "weights":
        content = bytearray((model / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (model / "model.safetensors").write_bytes(content)
    elif change == "tokenizer":
        (model / "tokenizer_config.json").write_text("{}")
    elif change == "text":
        given["windows"] = WINDOWS
    elif change == "dtype":
        given["dtype"] = torch.bfloat16
    elif change == "file":
        (out / "mine.txt").write_text("not of that run")
    elif change == "missing":
        (out / "config.json").unlink()
    elif change == "size":
        (out / "config.json").write_text("{}")
    else:
        monkeypatch.setattr(finished, "version", lambda name: "0")
    with pytest.raises(ValueError, match="is not empty; nothing was changed"):
        finished.compressed(run(model, asked(), **given), out, False)


def test_what_a_run_took_says_nothing_of_what_it_made(model: Path) -> None:
    before = finished.request_of(run(model, asked())), finished.beside(model)
    (model / "run.json").write_text("{}")
    (model / "spectrim.json").write_text("{}")
    assert finished.request_of(run(model, asked())) == before[0]
    assert finished.beside(model) != before[1], "a tuned model keeps what its source said"
