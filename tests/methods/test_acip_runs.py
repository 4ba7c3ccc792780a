"""ACIP through whole runs: one training for all ratios, stopped and resumed ones, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import spectrim
from spectrim.core import registry
from spectrim.learn.training import Trainer
from spectrim.methods import acip
from spectrim.methods.acip import _Training
from spectrim.model import targets
from tests.conftest import tree_hash
from tests.families import FAMILIES
from tests.methods.test_acip import BOTH, SMALL, TEXT, setting, trained

# --- runs ---


def options(work: Path, **more: Any) -> dict[str, Any]:
    changed = dataclasses.asdict(SMALL)
    given = [f"groups.0.allocate.{name}={value}" for name, value in changed.items() if value is not None]
    return {"text": TEXT, "work": work, "settings": given, **more}


@pytest.fixture(scope="module")
def undisturbed(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run on a work directory of its own."""
    directory = tmp_path_factory.mktemp("undisturbed")
    spectrim.compress(llama_dir, "acip", 0.4, out=directory / "out", **options(directory / "work"))
    return directory / "out"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of training that were run."""
    seen: list[int] = []
    original = _Training.update

    def counted(self: _Training, step: int) -> Mapping[str, float]:
        seen.append(step)
        return original(self, step)

    monkeypatch.setattr(_Training, "update", counted)
    monkeypatch.setattr(acip, "Trainer", functools.partial(Trainer, every=5))
    return seen


def test_one_training_serves_all_ratios_and_the_files_have_what_was_counted(
    llama_dir: Path, undisturbed: Path, tmp_path: Path, steps: list[int]
) -> None:
    for ratio in (0.2, 0.4):
        out = tmp_path / str(ratio)
        result = spectrim.compress(llama_dir, "acip", ratio, out=out, **options(tmp_path / "work"))
        with safe_open(out / "model.safetensors", "pt") as file:
            sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
        names = [target.name for target in targets.find(FAMILIES["llama"].make()).targets]
        held = sum(
            size for name, size in sizes.items() if any(name.startswith(t + ".") for t in names) and "bias" not in name
        )
        assert held == result.plan.spent <= result.plan.budget
    assert len(steps) == SMALL.steps + SMALL.post
    assert tree_hash(tmp_path / "0.4", "run.json") == tree_hash(undisturbed, "run.json"), "as if it had been the first"


@pytest.mark.parametrize("stop", [8, 16])
def test_a_killed_training_goes_on_to_the_same_bytes(
    llama_dir: Path, undisturbed: Path, tmp_path: Path, steps: list[int], stop: int
) -> None:
    def kill(stage: str, done: int, total: int) -> None:
        if stage.startswith(("masks", "adapters")) and done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spectrim.compress(llama_dir, "acip", 0.4, out=tmp_path / "out", **options(tmp_path / "work", progress=kill))
    steps.clear()
    spectrim.compress(llama_dir, "acip", 0.4, out=tmp_path / "out", **options(tmp_path / "work"))
    assert steps == list(range(stop // 5 * 5, SMALL.steps + SMALL.post))
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(undisturbed, "run.json")
    assert not list((tmp_path / "work" / "acip-under-way").glob("*.safetensors")), "nothing half done stays"


def test_the_seed_decides() -> None:
    on = setting()
    (first, made), (second, again) = trained(on), trained(on)
    assert first.dumps() == second.dumps() and all(torch.equal(made[name], again[name]) for name in made)
    shuffled = SMALL.allocate(replace(on.problem(0.3), targets=on.targets[::-1]))
    assert shuffled.dumps() == first.dumps()
    other = SMALL.allocate(replace(on.problem(0.3), generator=torch.Generator().manual_seed(1)))
    assert other.dumps() != first.dumps()


# --- what is refused ---


def test_a_loss_that_is_no_number_names_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = acip.cross_entropy, itertools.count()

    def broken(logits: Tensor, ids: Tensor) -> Tensor:
        return original(logits, ids) * (float("nan") if next(calls) == 3 else 1.0)

    monkeypatch.setattr(acip, "cross_entropy", broken)
    on = setting()
    before = {name: value.clone() for name, value in on.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"nan at step 3 of stage 'masks'"):
        SMALL.allocate(on.problem(0.3))
    assert all(torch.equal(value, before[name]) for name, value in on.model.state_dict().items())


@BOTH
def test_too_large_a_ratio_is_refused_before_anything_runs(format: str) -> None:
    on = setting(format)
    with pytest.raises(ValueError, match=r"ratio too large.*adapter of every.*largest possible ratio here is") as error:
        SMALL.check(on.problem(0.97, candidates=None, live=None))
    largest = float(str(error.value).split()[-1])
    SMALL.check(on.problem(largest, candidates=None, live=None))
    with pytest.raises(ValueError, match="ratio too large"):
        SMALL.check(on.problem(largest + 2e-4, candidates=None, live=None))
    with pytest.raises(ValueError, match="ratio too large"):
        SMALL.allocate(on.problem(0.97))


def test_units_other_than_directions_are_refused(llama_dir: Path) -> None:
    on = setting()
    with pytest.raises(ValueError, match="adds no bias"):
        SMALL.check(on.problem(0.3, fixed={on.targets[0].name: 32}))
    for method, reason in (("column_svd", "other units beside them"), ("robust_pca", "rank and entry")):
        settings = [*options(Path())["settings"], f"groups.0.decompose={{method: {method}}}"]
        with pytest.raises(ValueError, match=reason):
            spectrim.compress(llama_dir, "acip", 0.3, text=TEXT, settings=settings, out=llama_dir.parent / "none")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"every": 0}, "every is 0"),
        ({"sequences": 0}, "sequences is 0"),
        ({"post": -1}, "post is -1"),
        ({"adapter": -1}, "adapter is -1"),
        ({"snapshots": -1}, "snapshots is -1"),
        ({"length": 1}, "length is 1"),
        ({"constant": 0.0}, r"constant is 0\.0"),
        ({"rate": -1.0}, r"rate is -1\.0"),
        ({"adapter_rate": float("inf")}, "adapter_rate is inf"),
        ({"penalty": float("nan")}, "penalty is nan"),
        ({"growth": 0.9}, r"growth is 0\.9"),
        ({"highest": 1.0}, r"highest is 1\.0"),
        ({"share": 1.5}, r"share is 1\.5"),
        ({"scale": 0.0}, r"scale is 0\.0"),
        ({"order": "random"}, "'random'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        registry.build("allocator", registry.allocators(), "acip", settings)
