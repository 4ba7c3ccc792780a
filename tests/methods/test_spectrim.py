"""Our own recipe: the two-sided decomposition, whole runs, settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
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
from spectrim.core.sparse import EntryCandidate, alone, best_entries, fitted
from spectrim.methods.spectrim import TwoSided, TwoSidedEntries, TwoSidedSVD
from spectrim.model import targets
from spectrim.model.blocks import Batch, share_inputs
from tests.families import FAMILIES, VOCABULARY

FISHER = OutputFisher(4)  # of one window of four, by default
IDS = torch.randint(1, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the decomposition ---


def of_matrix(method: TwoSided, weight: Tensor, stats: Mapping[Any, Tensor]) -> Candidate:
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


@pytest.mark.parametrize("method", [TwoSidedSVD(), TwoSidedEntries()])
def test_gradients_that_overflowed_are_refused(method: TwoSided) -> None:
    stats = statistics(4, 5)
    stats[FISHER][0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer: Fisher information is not finite"):
        of_matrix(method, random(4, 5), stats)


# --- entries ---


def cut_to(candidate: Candidate, count: int) -> tuple[Tensor, Tensor]:
    """Places, and the matrix."""
    cut = candidate.cut(Choice({"layer": "low_rank_sparse"}, {"rank": 0, "entry": count}))["layer"]
    assert (cut["entries"].diff() > 0).all() and len(cut["entries"]) == len(cut["values"]) == count
    weight = candidate.weights()["layer"]
    made = torch.zeros(weight.numel(), dtype=torch.float64).index_copy(0, cut["entries"], cut["values"].double())
    return cut["entries"], made.view(weight.shape)


def lost(missed: Tensor, metric: Tensor, output: Tensor) -> Tensor:
    """½ tr(B E G Eᵀ) of what is missed."""
    return ((output @ missed) * (missed @ metric)).sum() / 2


@pytest.mark.parametrize("shape", [(8, 14), (14, 8)])
@pytest.mark.parametrize("sided", ["both", "input"])
def test_scores_of_entries_are_what_each_alone_would_lose_in_nats(shape: tuple[int, int], sided: Any) -> None:
    weight, stats = random(*shape), statistics(*shape)
    (units,) = of_matrix(TwoSidedEntries(sided=sided), weight, stats).units
    output = damped(stats[FISHER], 0.3) if sided == "both" else torch.eye(shape[0], dtype=torch.float64)
    metric = stats[Gram()] / (50 if sided == "both" else 1)
    left_out = [torch.zeros(shape, dtype=torch.float64).view(-1).index_copy(0, torch.tensor([i]), w[None]).view(shape)
                for i, w in enumerate(weight.flatten())]  # fmt: skip
    each = torch.stack([lost(missed, metric, output) for missed in left_out]).sort(descending=True).values
    torch.testing.assert_close(units.scores.double().square() / 2, each, rtol=1e-6, atol=1e-12)
    assert units.kind == "entry" and units.cost == 1 and units.errors is None


@pytest.mark.parametrize("sided", ["both", "input"])
def test_entries_are_cut_to_what_loses_least_together_and_to_the_weight_where_all_stay(sided: Any) -> None:
    weight, stats = random(8, 14), statistics(8, 14)
    method = TwoSidedEntries(sided=sided)
    candidate = of_matrix(method, weight, stats)
    metric, output = method.metrics(candidate.target, stats)
    losses = []
    for count in (20, 60, 100):
        places, made = cut_to(candidate, count)
        expected = best_entries(weight, metric, output, count, 1, 10)
        assert torch.equal(places, expected[0]) and torch.equal(made.flatten()[places], expected[1])
        one_by_one = torch.zeros(8 * 14, dtype=torch.bool)
        one_by_one[(weight.square() * alone(metric, output)).flatten().topk(count).indices] = True
        unfitted = torch.where(one_by_one.view(8, 14), weight, 0.0)
        losses.append(float(lost(weight - made, metric, output)))
        assert losses[-1] < 0.97 * float(lost(weight - unfitted, metric, output))
    assert losses == sorted(losses, reverse=True)
    torch.testing.assert_close(cut_to(candidate, 8 * 14)[1], weight)


def test_learned_entries_stay_and_their_values_are_fitted() -> None:
    weight, stats = random(8, 14), statistics(8, 14)
    candidate = of_matrix(TwoSidedEntries(), weight, stats)
    assert isinstance(candidate, EntryCandidate)
    order = torch.randperm(8 * 14, generator=torch.Generator().manual_seed(1))
    places, made = cut_to(replace(candidate, learned={"entries": order}), 40)
    assert torch.equal(places, candidate.tensors()["entries"][order[:40]].long().sort().values)
    kept = torch.zeros(8 * 14, dtype=torch.bool).index_fill(0, places, True).view(8, 14)
    metric, output = stats[Gram()], damped(stats[FISHER], 0.3)
    torch.testing.assert_close(
        made, fitted(weight, metric, output, kept, torch.where(kept, weight, 0.0), 10), rtol=1e-12, atol=0.0
    )


def test_where_no_gradient_came_entries_are_those_of_the_inputs() -> None:
    weight, stats = random(6, 9), statistics(6, 9)
    stats[FISHER].zero_()
    places, made = cut_to(of_matrix(TwoSidedEntries(), weight, stats), 30)
    expected = cut_to(of_matrix(TwoSidedEntries(sided="input"), weight, stats), 30)
    assert torch.equal(places, expected[0]) and torch.equal(made, expected[1])


@pytest.mark.parametrize("method", [TwoSidedEntries(), TwoSidedEntries(sided="input")])
def test_weights_that_are_not_finite_are_refused_by_name(method: TwoSided) -> None:
    weight = random(6, 9)
    weight[2, 3] = torch.inf
    with pytest.raises(ValueError, match="scores of layer are not finite"):
        of_matrix(method, weight, statistics(6, 9))


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


@FORMATS
def test_entries_run_whole_with_and_without_a_backward_pass(
    format: str, llama_dir: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    given: dict[str, Any] = {"text": IDS, "work": tmp_path / "work", "format": format.replace("low_rank", "plain")}
    trial = ["groups.0.allocate.trial=2"]
    losses = {}
    for sided in ("both", "input"):
        settings = [*trial, f"groups.0.decompose.sided={sided}"]
        made = spectrim.compress(llama_dir, "spectrim-entries", 0.3, out=tmp_path / sided, settings=settings, **given)
        assert 0.29 < made.summary["ratio_actual"] <= 0.31
        assert all(choice.counts.get("rank", 0) == 0 for choice in made.plan.choices.values())
        assert any("entry" in choice.counts for choice in made.plan.choices.values())
        with torch.no_grad():
            dense = FAMILIES["llama"].make()(IDS).logits.log_softmax(-1)
            found = spectrim.load(tmp_path / sided)(IDS).logits.log_softmax(-1)
        losses[sided] = float((dense.exp() * (dense - found)).sum(-1).mean())
    assert all(0 < lost < 1 for lost in losses.values())
    assert calls["resident"] and calls["streamed"]


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
        ("two_sided_entries", {"turns": -1}, "turns is -1"),
        ("two_sided_entries", {"steps": -1}, "steps is -1"),
        ("two_sided_entries", {"damping": -0.1}, "damping is -0.1"),
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
    table = registry.decomposers() if kind.startswith("two_sided") else registry.allocators()
    with pytest.raises(ValueError, match=reason):
        registry.build("method", table, kind, settings)
