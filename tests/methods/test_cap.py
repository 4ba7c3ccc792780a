"""CAP's candidates against direct computation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from spectrim.calibrate.statistics import Norm
from spectrim.core import budget, registry
from spectrim.core.plan import Choice, Part, Target
from spectrim.core.rpca import robust_pca
from spectrim.methods.cap import RobustPCA, best_2_of_4
from tests.methods.mixes import FORMATS, SHAPES, WEIGHTINGS, at, candidate, dense, mixed, random, squares


@SHAPES
@WEIGHTINGS
def test_all_units_reproduce_the_weight_to_the_tolerance(shape: tuple[int, int], weighting: Any) -> None:
    weight = mixed(*shape)
    given = candidate(weight, weighting=weighting, refit=0)
    scale = squares(shape[1]).sqrt() if weighting == "rms" else 1.0
    everything = at("low_rank", len(given.units[0].scores), len(given.units[1].scores))
    gap = (weight - dense(given.cut(everything)["layer"])) * scale
    assert gap.norm() <= 1e-4 * (weight * scale).norm()


@SHAPES
@WEIGHTINGS
def test_units_are_those_of_robust_pca(shape: tuple[int, int], weighting: Any) -> None:
    weight = mixed(*shape)
    given, tensors = candidate(weight, weighting=weighting, mode="inexact", penalty=0.8), None
    scale = squares(shape[1]).sqrt() if weighting == "rms" else torch.ones(shape[1], dtype=torch.float64)
    found = robust_pca(weight * scale, 0.8 / max(shape) ** 0.5, "inexact")
    ranks, entries = given.units
    tensors = given.tensors()
    assert [units.kind for units in given.units] == ["rank", "entry"] == list(RobustPCA().kinds)
    assert entries.cost == 1 and ranks.cost == sum(shape) and ranks.errors is entries.errors is None
    torch.testing.assert_close(ranks.scores, torch.linalg.svdvals(found.left @ found.right)[: len(ranks.scores)])
    torch.testing.assert_close(tensors["left"] @ tensors["right"], found.left @ found.right / scale)
    assert tensors["entries"].dtype == torch.int64
    sparse = torch.zeros(shape, dtype=torch.float64)
    sparse.view(-1)[tensors["entries"]] = tensors["values"]
    torch.testing.assert_close(sparse, found.sparse / scale)
    weighted = (sparse * scale).view(-1)[tensors["entries"]].abs()
    torch.testing.assert_close(weighted, entries.scores)
    assert (entries.scores.diff() <= 0).all() and (entries.scores > 0).all()


@SHAPES
@FORMATS
@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.5, 0.8])
def test_the_first_choice_is_the_best_of_all_mixes(shape: tuple[int, int], format: str, share: float) -> None:
    given = candidate(mixed(*shape), format)
    (part,), parameters = given.target.parts, int(share * shape[0] * shape[1])
    choice = given.first(parameters)
    assert choice.formats == {"layer": budget.WITH_ENTRIES[format]}
    cost = budget.count(choice, given.target)
    assert cost == parameters or (choice.counts["entry"] == len(given.units[1].scores) and cost < parameters)
    energies, values = given.units[0].scores.square(), given.units[1].scores.square()
    saved = {}
    for rank in range(len(energies) + 1):
        free = parameters - budget.rank_cost(format, part, rank)
        if free >= 0:
            saved[rank] = float(energies[:rank].sum() + values[:free].sum())
    assert saved[choice.counts["rank"]] == pytest.approx(max(saved.values()), rel=1e-12)


@SHAPES
@FORMATS
def test_a_rank_is_settled_into_a_mix_of_the_same_parameters(shape: tuple[int, int], format: str) -> None:
    given = candidate(mixed(*shape))  # priced by the choice's format, not its own
    (part,) = given.target.parts
    for rank in range(budget.largest_rank(format, part) + 1):
        choice = given.settle(Choice({"layer": format}, {"rank": rank}))
        assert choice.formats == {"layer": budget.WITH_ENTRIES[format]} and set(choice.counts) == {"rank", "entry"}
        wanted = budget.rank_cost(format, part, rank)
        short = wanted - budget.count(choice, given.target)
        assert short == 0 or (short > 0 and choice.counts["entry"] == len(given.units[1].scores))
        assert given.settle(choice) == choice
    whole = Choice({"layer": "dense"}, {})
    assert given.settle(whole) == whole


@SHAPES
@WEIGHTINGS
def test_a_cut_has_its_places_and_refitting_lowers_the_error(shape: tuple[int, int], weighting: Any) -> None:
    weight, errors = mixed(*shape), []
    scale = squares(shape[1]).sqrt() if weighting == "rms" else 1.0
    for alternations in (0, 1, 10):
        given = candidate(weight, weighting=weighting, refit=alternations)
        choice = given.first(weight.numel() // 2)
        cut = given.cut(choice)["layer"]
        assert cut["left"].shape[1] == cut["right"].shape[0] == choice.counts["rank"] > 0
        assert cut["entries"].tolist() == sorted(given.tensors()["entries"][: choice.counts["entry"]].tolist())
        torch.testing.assert_close(cut["left"].norm(dim=0), cut["right"].norm(dim=1))
        errors.append(float(((weight - dense(cut)) * scale).norm()))
        if alternations:
            missed = (weight - dense(cut)).flatten()[cut["entries"]]
            assert missed.abs().max() < 1e-12
    assert errors[2] < errors[1] < 0.95 * errors[0]


def test_without_refitting_the_kept_units_are_as_decomposed() -> None:
    given = candidate(mixed(24, 40), refit=0)
    cut, tensors = given.cut(at("low_rank", 3, 50))["layer"], given.tensors()
    torch.testing.assert_close(cut["left"] @ cut["right"], tensors["left"][:, :3] @ tensors["right"][:3])
    order = tensors["entries"][:50].argsort()
    assert torch.equal(cut["values"], tensors["values"][:50][order])


def test_nothing_at_all_can_be_kept_of_either_kind() -> None:
    given = candidate(mixed(24, 40))
    nothing = given.cut(at("low_rank", 0, 0))["layer"]
    assert not dense(nothing).any() and nothing["left"].shape == (24, 0) and len(nothing["entries"]) == 0
    entries = given.cut(at("low_rank", 0, 30))["layer"]
    kept = given.weights()["layer"].flatten()[entries["entries"]]
    assert torch.equal(entries["values"], kept), "without a low rank beside them, entries are those of the weight"


def test_what_was_learned_says_which_units_are_kept() -> None:
    given = candidate(mixed(24, 40), refit=0)
    order, entries = torch.tensor([2, 0, 3, 1]), torch.tensor([7, 5, 90, 1])
    learned = dataclasses.replace(given, learned={"order": order, "entries": entries})
    cut, tensors = learned.cut(at("low_rank", 2, 3))["layer"], given.tensors()
    torch.testing.assert_close(cut["left"] @ cut["right"], tensors["left"][:, [2, 0]] @ tensors["right"][[2, 0]])
    assert cut["entries"].tolist() == sorted(tensors["entries"][[7, 5, 90]].tolist())
    refitted = dataclasses.replace(learned, refit=3).cut(at("low_rank", 2, 3))["layer"]
    assert torch.equal(refitted["entries"], cut["entries"]) and refitted["left"].shape == (24, 2)


def test_a_dense_choice_and_one_of_ranks_alone_are_cut_as_of_any_candidate() -> None:
    given = candidate(mixed(24, 40))
    assert torch.equal(given.cut(Choice({"layer": "dense"}, {}))["layer"]["weight"], given.weights()["layer"])
    cut, tensors = given.cut(Choice({"layer": "low_rank"}, {"rank": 3}))["layer"], given.tensors()
    torch.testing.assert_close(cut["left"] @ cut["right"], tensors["left"][:, :3] @ tensors["right"][:3])
    assert set(cut) == {"left", "right"}


@pytest.mark.parametrize("width", [16, 17, 18, 19, 3, 1])
def test_2_of_4_neighbours_are_kept(width: int) -> None:
    sizes = random(12, width).abs().round(decimals=1)  # with ties
    kept = best_2_of_4(sizes)
    for row, mask in zip(sizes, kept, strict=True):
        for start in range(0, width, 4):
            group, chosen = row[start : start + 4], mask[start : start + 4]
            count = (len(group) + 1) // 2
            best = sorted(range(len(group)), key=lambda i: (-float(group[i]), i))[:count]
            assert chosen.nonzero().flatten().tolist() == sorted(best)


@WEIGHTINGS
def test_the_pattern_limits_the_sparse_part(weighting: Any) -> None:
    weight = mixed(24, 42)
    plain, limited = (candidate(weight, weighting=weighting, pattern=pattern) for pattern in ("none", "2:4"))
    mask = torch.zeros(24, 44, dtype=torch.int64)
    rows, columns = limited.tensors()["entries"] // 42, limited.tensors()["entries"] % 42
    mask[rows, columns] = 1
    groups = mask.view(24, 11, 4).sum(-1)
    assert groups.max() == 2 and groups[:, -1].max() == 1
    assert set(limited.tensors()["entries"].tolist()) < set(plain.tensors()["entries"].tolist())
    assert torch.equal(limited.units[0].scores, plain.units[0].scores)


def test_inputs_that_are_always_0_do_not_break_the_weighting() -> None:
    weight = mixed(24, 40)
    target = Target("layer", "up", (0,), (Part("layer", 24, 40, "x"),))
    for norms in (squares(40).index_fill(0, torch.tensor([3, 4]), 0.0), torch.zeros(40, dtype=torch.float64)):
        stats = {"layer": {Norm(power=2): norms}}
        given = RobustPCA(weighting="rms").decompose(target, {"layer": weight}, stats)
        made = dense(given.cut(given.first(weight.numel() // 2))["layer"])
        assert made.isfinite().all()
        assert ((weight - made) * norms.sqrt()).norm() <= 0.5 * (weight * norms.sqrt()).norm()


def test_the_weighting_needs_and_keeps_the_norms() -> None:
    assert RobustPCA().needs == RobustPCA().keeps == ()
    assert RobustPCA(weighting="rms").needs == RobustPCA(weighting="rms").keeps == (Norm(power=2),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": 0.0}, "penalty is 0.0"), ({"iterations": 0}, "iterations is 0"), ({"refit": -1}, "refit is -1"),
        ({"tolerance": 1.0}, "tolerance is 1.0"), ({"mode": "fast"}, "'fixed' or 'inexact'"),
        ({"weighting": "gram"}, "'none' or 'rms'"), ({"pattern": "4:8"}, "'none' or '2:4'"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.build("decomposer", registry.decomposers(), "robust_pca", settings)


def test_a_weight_that_is_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match=r"layer: .* not finite"):
        candidate(mixed(8, 8).index_fill(0, torch.tensor([1]), torch.inf))
