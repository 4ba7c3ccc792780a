"""Our own recipe: the two-sided decomposition, whole runs, settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spectrim
from spectrim.calibrate.collect import Wanted
from spectrim.calibrate.resident import resident
from spectrim.calibrate.statistics import Gram, OutputFisher, Tokens
from spectrim.core import registry
from spectrim.core.linalg import damped, directions, two_sided
from spectrim.core.plan import Candidate, Choice, Part, Target
from spectrim.methods.spectrim import TwoSidedSVD
from spectrim.model import targets
from spectrim.model.blocks import Batch, share_inputs
from tests.families import FAMILIES, VOCABULARY

FISHER = OutputFisher(4)  # of one window of four, by default
IDS = torch.randint(1, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the decomposition ---


def of_matrix(method: TwoSidedSVD, weight: Tensor, stats: Mapping[Any, Tensor]) -> Candidate:
    part = Part("layer", *weight.shape, "x")
    return method.decompose(Target("layer", "up", (0,), (part,)), {"layer": weight}, {"layer": stats})


def statistics(out: int, width: int) -> dict[Any, Tensor]:
    x, g = random(50, width, seed=1) * random(width, seed=2).exp(), random(50, out, seed=3) * random(out, seed=4).exp()
    return {Gram(): x.T @ x, FISHER: g.T @ g / 50, Tokens(): torch.tensor([50.0])}


@pytest.mark.parametrize("shape", [(8, 14), (14, 8)])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_candidate_is_the_optimum_and_its_scores_are_nats(shape: tuple[int, int], damping: float) -> None:
    weight, stats = random(*shape), statistics(*shape)
    candidate = of_matrix(TwoSidedSVD(damping), weight, stats)
    gram = stats[Gram()]
    left, right, _ = two_sided(weight, gram, damped(stats[FISHER], damping))
    for rank in (0, 3, 8):
        cut = candidate.cut(Choice({"layer": "low_rank"}, {"rank": rank}))["layer"]
        torch.testing.assert_close(cut["left"] @ cut["right"], left[:, :rank] @ right[:rank])
        difference = weight - left[:, :rank] @ right[:rank]
        # E[g gᵀ] and E[x xᵀ], a token
        second_order = (damped(stats[FISHER], damping) @ difference @ (gram / 50) * difference).sum() / 2
        predicted = candidate.rank_units.scores[rank:].square().sum() / 2
        assert float(predicted) == pytest.approx(float(second_order), rel=1e-6, abs=1e-12)
    assert candidate.rank_units.errors is None


@pytest.mark.parametrize("shape", [(8, 14), (14, 8)])
def test_one_sided_is_whitened_svd_and_says_so(shape: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    weight, stats = random(*shape), statistics(*shape)
    candidate = of_matrix(TwoSidedSVD(sided="input"), weight, stats)
    left, energies = directions(weight, stats[Gram()])
    assert torch.equal(candidate.tensors()["left"], left) and candidate.tensors().keys() == {"left"}
    assert candidate.rank_units.errors is not None and torch.equal(candidate.rank_units.errors, energies)
    assert "layer: one-sided" in caplog.text
    assert TwoSidedSVD(sided="input").needs == (Gram(),) and FISHER in TwoSidedSVD().needs


def test_gradients_that_overflowed_are_refused() -> None:
    stats = statistics(4, 5)
    stats[FISHER][0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer: Fisher information is not finite"):
        of_matrix(TwoSidedSVD(), random(4, 5), stats)


# --- whole runs ---


@pytest.mark.parametrize("recipe", ["spectrim-onepass", "spectrim-input"])
def test_a_recipe_runs_again_at_another_ratio_with_what_was_measured(
    recipe: str, llama_dir: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    settings = ["groups.0.allocate.trial=2"]
    given: dict[str, Any] = {"text": IDS, "work": tmp_path / "work", "settings": settings}
    first = spectrim.compress(llama_dir, recipe, 0.3, out=tmp_path / "first", **given)
    assert 0.29 < first.summary["ratio_actual"] <= 0.31 and first.summary["recipe"]["groups"][0]["format"] == "pivot"
    assert calls["resident" if recipe == "spectrim-onepass" else "streamed"] == 1 and sum(calls.values()) == 1
    spectrim.compress(llama_dir, recipe, 0.4, out=tmp_path / "second", **given)
    assert sum(calls.values()) == 1, "statistics and decompositions are kept"
    again = spectrim.compress(llama_dir, recipe, 0.3, out=tmp_path / "third", **given)
    assert again.plan == first.plan


def test_sampled_labels_and_both_sides_lose_less_than_one_in_the_metric_itself(llama_dir: Path, tmp_path: Path) -> None:
    """Predicted: at one plan the two-sided optimum is below the one-sided one, matrix by matrix, in its own metric."""
    model = FAMILIES["llama"].make()
    structure = share_inputs(model, targets.find(model))
    method = TwoSidedSVD(damping=0.0)
    wanted = {0: Wanted(dict.fromkeys(structure.of_block(0), method.needs))}
    (measured,) = dict(resident(model, structure, [Batch(IDS)], wanted)).values()
    for target in structure.of_block(0):
        stats = measured.of(target)[target.name]
        weight = model.get_submodule(target.name).weight.detach().double()
        lost = []
        for each in (method, TwoSidedSVD(sided="input")):
            candidate = each.decompose(target, {target.name: weight}, {target.name: stats})
            cut = candidate.cut(Choice({target.name: "low_rank"}, {"rank": 6}))[target.name]
            difference = weight - cut["left"] @ cut["right"]
            lost.append(float((stats[FISHER] @ difference @ stats[Gram()] * difference).sum()))
        assert lost[0] <= lost[1] * (1 + 1e-9)


# --- settings ---


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("two_sided_svd", {"damping": -0.1}, "damping is -0.1"),
        ("two_sided_svd", {"every": 0}, "every is 0"),
        ("two_sided_svd", {"shrink": 0.1}, "no setting 'shrink'"),
        ("two_sided_svd", {"sided": "output"}, "'output'"),
        ("measured_curve", {"trial": 0}, "trial is 0"),
        ("measured_curve", {"length": 1}, "length is 1"),
        ("measured_curve", {"multiple": 0}, "multiple is 0"),
        ("measured_curve", {"least": -1}, "least is -1"),
        ("measured_curve", {"exchange": -1}, "exchange is -1"),
        ("measured_curve", {"gap": 1.0}, "gap is 1.0"),
        ("measured_curve", {"rounds": -1}, "rounds is -1"),
        ("measured_curve", {"point": "half"}, "'half'"),
        ("measured_curve", {"scale": "guessed"}, "'guessed'"),
    ],
)
def test_settings_out_of_range(kind: str, settings: dict[str, Any], reason: str) -> None:
    table = registry.decomposers() if kind == "two_sided_svd" else registry.allocators()
    with pytest.raises(ValueError, match=reason):
        registry.build("method", table, kind, settings)
