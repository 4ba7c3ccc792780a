"""calibrate.shrink: auto: which strength is taken of what is measured, what is said, and runs that were stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import spectrim
from spectrim import strength
from spectrim.estimate import estimate
from spectrim.recipe import RecipeError, build
from tests.conftest import tree_hash
from tests.families import VOCABULARY

# 64 windows for statistics and as many to choose on: 1536 tokens
IDS = torch.randint(1, VOCABULARY, (128, 24), generator=torch.Generator().manual_seed(2))
AUTO = ["calibrate.shrink=auto", "calibrate.select=0.5", "calibrate.batch=64"]


def factors(made: Any) -> dict[str, Tensor]:
    return load_file(made.directory / "model.safetensors")


@pytest.mark.parametrize(
    ("lost", "found"),
    [
        ({0.0: 1.0, 0.1: 0.99, 0.2: 0.995, 0.4: 1.01}, 0.2),
        ({0.0: 1.0, 0.1: 0.9, 0.2: 0.8, 0.4: 0.7, 0.8: 0.6}, 0.8),
        ({0.0: 1.0, 0.1: 1.02, 0.05: 1.009}, 0.05),
        ({0.0: 1.0, 0.1: 1.3, 0.05: 1.2, 0.025: 1.1}, 0.0),
        ({0.0: 1.0, 0.1: math.nan, 0.05: 0.9}, 0.05),
        ({0.0: math.nan, 0.1: 1.0, 0.2: math.inf}, 0.1),
        ({0.0: math.nan, 0.1: math.inf, 0.05: math.nan, 0.025: math.inf}, 0.0),
    ],
)
def test_the_largest_that_costs_nothing_is_taken(
    lost: dict[float, float], found: float, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    def measured(run: Any, *_: Any) -> float:
        tried.append(run.shrinking.share)
        return lost[run.shrinking.share]

    monkeypatch.setattr(strength, "divergence", measured)
    made = spectrim.compress(llama_dir, "whitened", 0.3, IDS, tmp_path / "out", settings=AUTO)
    assert tried == list(lost)
    (note,) = (note for note in made.plan.notes if note.startswith("calibrate.shrink"))
    assert note.startswith(f"calibrate.shrink: {found:g}, of the KL at even ranks") and note.count(":") >= len(lost)


def test_it_is_measured_on_the_windows_of_select_and_used(llama_dir: Path, tmp_path: Path) -> None:
    """Against runs at each strength by itself: the model that is made is the one of that number."""
    given: dict[str, Any] = {"recipe": "whitened", "ratio": 0.3, "text": IDS}
    made = spectrim.compress(llama_dir, out=tmp_path / "auto", settings=AUTO, **given)
    (note,) = (note for note in made.plan.notes if note.startswith("calibrate.shrink"))
    chosen = note.partition(": ")[2].partition(",")[0]
    settings = [f"calibrate.shrink={chosen}", *AUTO[1:]]
    alone = spectrim.compress(llama_dir, out=tmp_path / "alone", settings=settings, **given)
    assert tree_hash(tmp_path / "auto")["model.safetensors"] == tree_hash(tmp_path / "alone")["model.safetensors"]
    model, dense = (spectrim.load(directory) for directory in (tmp_path / "alone", llama_dir))
    with torch.no_grad():
        one, two = (each(IDS[64:]).logits.double().log_softmax(-1) for each in (dense, model))
    kl = float((one.exp() * (one - two)).sum(-1).mean())
    said = dict(pair.split(": ") for pair in note[note.index("(") + 1 : -1].split(", "))
    assert float(said[chosen]) == pytest.approx(kl, rel=2e-3) and alone.plan.choices == made.plan.choices


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: str) -> Path:
        made = spectrim.compress(llama_dir, "unirank", 0.3, IDS, tmp_path / out, settings=AUTO)
        assert made.directory is not None
        return made.directory

    undisturbed, original, calls = run("undisturbed"), strength.divergence, 0

    def interrupting(*given: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(strength, "divergence", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.undo()
    assert tree_hash(run("stopped"), "run.json") == tree_hash(undisturbed, "run.json")


def test_with_too_few_tokens_it_is_a_constant_and_says_so(llama_dir: Path, tmp_path: Path) -> None:
    made = {}
    for share in ("auto", "0.1"):
        settings = [f"calibrate.shrink={share}", "calibrate.select=0.25"]
        made[share] = spectrim.compress(llama_dir, "whitened", 0.3, IDS, tmp_path / share, settings=settings)
    assert any("768 tokens of calibrate.select to choose on, not 1024: it is 0.1" in n for n in made["auto"].plan.notes)
    one, two = factors(made["auto"]), factors(made["0.1"])
    assert all(torch.equal(one[name], two[name]) for name in one) and not made["0.1"].plan.notes


def test_methods_without_a_gram_are_told(llama_dir: Path, tmp_path: Path) -> None:
    for share in ("auto", "0.2"):
        made = spectrim.compress(
            llama_dir, "svd", 0.3, IDS, tmp_path / share, settings=[f"calibrate.shrink={share}", *AUTO[1:]]
        )
        assert made.plan.notes == (
            f"calibrate.shrink: {share} changes nothing here: no method of this recipe reads a Gram",
        )


def test_a_ratio_that_even_ranks_cannot_meet(llama_dir: Path, tmp_path: Path) -> None:
    settings = [*AUTO, "groups.0.allocate={method: unirank, least: 0}"]
    with pytest.raises(RecipeError, match=r"calibrate\.shrink: auto tries the same share everywhere.*give a number"):
        spectrim.compress(llama_dir, "unirank", 0.97, IDS, tmp_path / "out", settings=settings)


def test_what_is_tried_takes_room(llama_dir: Path) -> None:
    one, more = (
        estimate(llama_dir, build("unirank", settings=[f"calibrate.shrink={share}"])).disk["work"]
        for share in ("0.1", "auto")
    )
    assert more == one * (1 + strength.TRIALS)
