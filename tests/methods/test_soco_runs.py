"""Runs of SoCo: killed and resumed, remembered, refused."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import spectrim
from spectrim.core import budget, registry
from spectrim.core.plan import Part, Plan, Target
from spectrim.core.registry import Problem
from spectrim.learn.training import Trainer
from spectrim.methods import soco
from spectrim.methods.soco import STAGES, SoCo
from tests.conftest import tree_hash
from tests.families import FAMILIES
from tests.learn.toys import Setting, setting
from tests.methods.test_soco import NO_BIAS, QUICK, STEPS, TEXT, recipe_of


@pytest.fixture(scope="module")
def undisturbed(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing interrupted, its work directory beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    spectrim.compress(llama_dir, recipe_of(folder), text=TEXT, out=folder / "out")
    return folder


@pytest.mark.parametrize("at", [2, 5, 9])
def test_a_run_killed_in_training_goes_on_to_the_same_bytes(
    at: int, llama_dir: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soco, "Trainer", functools.partial(Trainer, every=2))
    stages: list[tuple[str, int]] = []

    def killing(stage: str, done: int, total: int) -> None:
        if stage.partition(":")[0] in STAGES:
            stages.append((stage.partition(":")[0], done))
            if done == at and len(stages) == at:
                raise KeyboardInterrupt

    asked, out = recipe_of(tmp_path), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        spectrim.compress(llama_dir, asked, text=TEXT, out=out, progress=killing)
    assert not out.exists() and list((tmp_path / "out.work").glob("soco-under-way/*"))
    spectrim.compress(llama_dir, asked, text=TEXT, out=out, progress=killing)
    assert [done for _, done in stages] == [*range(1, at + 1), *range(at // 2 * 2 + 1, STEPS + 1)]
    assert [name for name, _ in stages[-STEPS + at // 2 * 2 :]] == sorted(name for name, _ in stages[at:])
    assert tree_hash(out, "run.json") == tree_hash(undisturbed / "out", "run.json")
    assert tree_hash(tmp_path / "out.work") == tree_hash(undisturbed / "out.work")


def test_the_same_run_again_gives_the_same_bytes(llama_dir: Path, undisturbed: Path, tmp_path: Path) -> None:
    spectrim.compress(llama_dir, recipe_of(tmp_path), text=TEXT, out=tmp_path / "out")
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(undisturbed / "out", "run.json")


def test_a_training_is_remembered_for_its_budget_settings_and_seed(llama_dir: Path, tmp_path: Path) -> None:
    steps: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        steps.append(stage.partition(":")[0])

    def run(**changes: Any) -> Plan:
        steps.clear()
        settings = {key: changes.pop(key) for key in ("rate",) if key in changes}
        asked = recipe_of(tmp_path, match="[up]", steps=2, **settings)
        model = AutoModelForCausalLM.from_pretrained(llama_dir)
        return spectrim.compress(model, asked, text=TEXT, progress=progress, work=tmp_path / "work", **changes).plan

    first = run()
    assert "decompose" in steps and any(name in STAGES for name in steps)
    again = run()
    assert again.dumps() == first.dumps() and not any(name in STAGES for name in steps) and "decompose" not in steps
    for changes in ({"ratio": 0.5}, {"rate": 0.1}, {"seed": 7}):
        other = run(**changes)
        assert any(name in STAGES for name in steps), changes
        assert "decompose" not in steps, "decompositions serve all of them"
        assert other.curves != first.curves or "seed" in changes, "two steps over all windows, whatever their order"


# --- refused ---


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"turns": 0}, "turns is 0"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"offset_rate": -0.1}, "offset_rate is -0.1"),
        ({"dual": -1.0}, "dual is -1.0"),
        ({"largest": 0.0}, "largest is 0.0"),
        ({"largest": 1.0}, "largest is 1.0"),  # by a sigmoid, s could not start at 1
        ({"threshold": 2.0}, "threshold is 2.0"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"stages": [0.5, 0.5, 0.5]}, r"stages are \(0.5, 0.5, 0.5\)"),
        ({"stages": [1.5, -0.5, 0.0]}, r"stages are \(1.5, -0.5, 0.0\)"),
        ({"temperatures": [0.2, 0.0]}, r"temperatures are \(0.2, 0.0\)"),
        ({"least": 1.0}, "least is 1.0"),
        ({"least": -0.1}, "least is -0.1"),
        ({"sequences": 0}, "sequences is 0"),
        ({"length": 0}, "length is 0"),
        ({"mapping": "softmax"}, "'softmax'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        registry.build("allocator", registry.allocators(), "soco", settings)


def test_settings_that_are_allowed() -> None:
    allocators = registry.allocators()
    assert registry.build("allocator", allocators, "soco", {"largest": 1.0, "mapping": "clamp"}).learns
    assert registry.build("allocator", allocators, "soco", {"stages": [0.4, 0.3, 0.3]}).stages == (0.4, 0.3, 0.3)
    assert {field.name for field in dataclasses.fields(SoCo)} >= {"steps", "batch", "rate", "deviation", "mapping"}


def shapes_only(made: Setting, ratio: float) -> Problem:
    return Problem(made.targets, budget.allowed(made.targets, ratio), made.format, torch.Generator())


def test_a_ratio_that_is_too_large_is_refused_before_training() -> None:
    made = setting(**NO_BIAS)
    SoCo(**QUICK).check(shapes_only(made, 0.5))
    with pytest.raises(ValueError, match=r"ratio too large.*largest possible ratio"):
        SoCo(**QUICK).check(shapes_only(made, 0.95))
    # half of the directions of a square matrix are no smaller than the matrix
    for ratio in (0.3, 0.6):
        method = SoCo(**QUICK, least=0.5)
        with pytest.raises(ValueError, match="ratio too large"):
            method.check(shapes_only(made, ratio))


def test_a_model_whose_factors_exceed_the_memory_is_refused_before_training() -> None:
    wide = Target("large", "up", (0,), (Part("large", 10**6, 10**6, "x"),))
    problem = Problem([wide], 10**11, "low_rank", torch.Generator())
    with pytest.raises(ValueError, match=r"whole model in memory.*GB"):
        SoCo(**QUICK).check(problem)


def test_a_ratio_of_zero_trains_nothing() -> None:
    made = setting()
    problem = replace(made.problem(0.0), live=None, candidates=None)
    with pytest.raises(AssertionError):
        SoCo(**QUICK).allocate(problem)
    plan = SoCo(**QUICK).allocate(made.problem(0.0))
    assert plan == Plan({}, problem.dense, problem.dense)


def test_groups_that_cannot_be_trained_are_refused(llama_dir: Path, tmp_path: Path) -> None:
    asked = recipe_of(tmp_path)
    with pytest.raises(ValueError, match=r"soco.*calibrate.sequential.*set it to false"):
        spectrim.compress(llama_dir, asked, text=TEXT, out=tmp_path / "a", settings=["calibrate.sequential=true"])
    with pytest.raises(ValueError, match="text"):
        spectrim.compress(llama_dir, asked, out=tmp_path / "b")
    with pytest.raises(ValueError, match=r"matri|FFN"):
        ffns = recipe_of(tmp_path, match="ffn", method="channel_prune")
        spectrim.compress(llama_dir, ffns, text=TEXT, out=tmp_path / "c")
    with pytest.raises(ValueError, match="ratio too large"):
        spectrim.compress(llama_dir, asked, ratio=0.97, text=TEXT, out=tmp_path / "d")
    assert not any((tmp_path / name).exists() for name in "abcd")


@pytest.mark.parametrize("method", ["magnitude", "robust_pca", "pooled_covariance", "column_svd"])
def test_a_decomposer_without_directions_to_scale_is_refused_by_name(method: str, tmp_path: Path) -> None:
    """Its units are others, or it makes its choice anew: what was learned would be lost."""
    model, steps = FAMILIES["llama"].make(**NO_BIAS), []
    with pytest.raises(ValueError, match=r"(?i)soco.*direction"):
        spectrim.compress(
            model,
            recipe_of(tmp_path, method=method, steps=2),
            text=TEXT,
            progress=lambda stage, done, total: steps.append(stage),
        )
    assert steps == [], "before anything heavy"
