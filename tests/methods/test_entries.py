"""Magnitude and Wanda against sorting by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.calibrate.statistics import Norm
from spectrim.core import budget
from spectrim.core.plan import Candidate, Choice, Part, Target
from spectrim.core.registry import Problem
from spectrim.core.sparse import EntryCandidate
from spectrim.methods.cap import CapGreedy
from spectrim.methods.entries import Magnitude, Wanda
from spectrim.methods.svd import Uniform

M, N = 12, 20
METHODS = pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=["magnitude", "wanda"])
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norms() -> Tensor:
    return random(N, seed=1).double().exp() * 50


def candidate(method: Magnitude | Wanda, weight: Tensor, name: str = "layer") -> EntryCandidate:
    target = Target(name, "up", (0,), (Part(name, *weight.shape, "x"),))
    stats = {statistic: norms()[: weight.shape[1]] for statistic in method.needs}
    made = method.decompose(target, {name: weight}, {name: stats})
    assert isinstance(made, EntryCandidate)
    return made


def kept(given: Candidate, count: int) -> Tensor:
    """Which entries stay."""
    cut = given.cut(Choice({"layer": "low_rank_sparse"}, {"rank": 0, "entry": count}))["layer"]
    assert cut["entries"].tolist() == sorted(set(cut["entries"].tolist())) and len(cut["entries"]) == count
    weight = given.weights()["layer"]
    assert torch.equal(cut["values"], weight.flatten()[cut["entries"]]), "kept weights are unchanged"
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask.view(-1)[cut["entries"]] = True
    return mask


@pytest.mark.parametrize("count", [0, 1, 77, M * N // 2, M * N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_magnitude_keeps_the_largest(count: int, dtype: torch.dtype) -> None:
    weight = random(M, N).to(dtype)
    mask, sizes = kept(candidate(Magnitude(), weight), count), weight.abs().float()
    assert count in (0, M * N) or sizes[mask].min() >= sizes[~mask].max()


@pytest.mark.parametrize("share", [1, N // 2, N - 3])
def test_wanda_keeps_as_many_of_each_row_the_best_by_weight_times_norm(share: int) -> None:
    weight = random(M, N) * random(M, 1, seed=3).exp()
    mask, scores = kept(candidate(Wanda(), weight), share * M), weight.abs().double() * norms().sqrt()
    for row, chosen in zip(scores, mask, strict=True):
        assert int(chosen.sum()) == share and row[chosen].min() >= row[~chosen].max()
    assert not torch.equal(mask, kept(candidate(Magnitude(), weight), share * M))


def test_between_two_shares_wanda_goes_to_the_rows_with_the_best_next_entry() -> None:
    weight = random(M, N) * random(M, 1, seed=3).exp()
    given, scores = candidate(Wanda(), weight), weight.abs().double() * norms().sqrt()
    mask = kept(given, 7 * M + 4)
    following = scores.sort(dim=1, descending=True).values[:, 7]
    assert sorted(mask.sum(1).tolist()) == [7] * (M - 4) + [8] * 4
    assert set(following.topk(4).indices.tolist()) == set((mask.sum(1) == 8).nonzero().flatten().tolist())


@METHODS
def test_units_fall_and_their_squares_are_the_energy(method: Any) -> None:
    weight = random(M, N)
    (units,) = candidate(method, weight).units
    assert units.kind == "entry" and units.cost == 1 and units.errors is None
    assert (units.scores.diff() <= 0).all()
    energy = weight.double().square() * (norms() if isinstance(method, Wanda) else 1.0)
    assert float(units.scores.double().square().sum()) == pytest.approx(float(energy.sum()), rel=1e-6)


@METHODS
def test_places_are_all_there_once_and_small(method: Any) -> None:
    for weight in (random(M, N), torch.zeros(3, 4), random(1, 9), random(9, 1), torch.ones(4, 4)):
        entries = candidate(method, weight).tensors()["entries"]
        assert entries.dtype == torch.int32 and sorted(entries.tolist()) == list(range(weight.numel()))


def test_wanda_is_blind_to_the_size_of_a_row_and_equal_rows_go_in_their_order() -> None:
    weight = random(1, N).expand(M, N).contiguous()
    given = candidate(Wanda(), weight)
    rows = given.tensors()["entries"].view(N, M) // N
    assert torch.equal(rows, torch.arange(M, dtype=torch.int32).expand(N, M))
    scaled = candidate(Wanda(), weight * (1 + torch.arange(M))[:, None])
    assert torch.equal(kept(scaled, 5 * M), kept(given, 5 * M))


@METHODS
@FORMATS
def test_a_rank_is_settled_into_as_many_entries_as_it_has_parameters(method: Any, format: str) -> None:
    given = candidate(method, random(M, N))
    (part,) = given.target.parts
    for rank in range(budget.largest_rank(format, part) + 1):
        choice = given.settle(Choice({"layer": format}, {"rank": rank}))
        assert choice.formats == {"layer": budget.WITH_ENTRIES[format]}
        assert choice.counts == {"rank": 0, "entry": budget.rank_cost(format, part, rank)}
        assert given.settle(choice) == choice and budget.count(choice, given.target) == choice.counts["entry"]
    assert given.first(33).counts == {"rank": 0, "entry": 33}
    assert given.first(10**6).counts == {"rank": 0, "entry": M * N}


@METHODS
def test_a_dense_choice_is_the_weight_and_one_of_ranks_is_refused(method: Any) -> None:
    given = candidate(method, random(M, N))
    assert torch.equal(given.cut(Choice({"layer": "dense"}, {}))["layer"]["weight"], given.weights()["layer"])
    with pytest.raises(ValueError, match="layer has entries and no rank"):
        given.cut(Choice({"layer": "low_rank"}, {"rank": 2}))


@METHODS
def test_weights_that_are_not_finite_are_refused_by_name(method: Any) -> None:
    for value in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="layer are not finite"):
            candidate(method, random(M, N).index_fill(0, torch.tensor([1]), value))


def test_needs() -> None:
    assert Magnitude().needs == () and Wanda().needs == (Norm(power=2),)
    assert Magnitude().kinds == Wanda().kinds == ("entry",)


@METHODS
@FORMATS
def test_uniform_and_the_greedy_order_spend_on_entries(method: Any, format: str) -> None:
    found = {name: candidate(method, (i + 1) * random(M, N, seed=i), name) for i, name in enumerate("abc")}
    targets = [given.target for given in found.values()]
    allowed = budget.allowed(targets, 0.5)
    even = Uniform().allocate(Problem(targets, allowed, format, torch.Generator()))
    counts = {name: found[name].settle(choice).counts["entry"] for name, choice in even.choices.items()}
    assert sum(counts.values()) == even.spent <= allowed and len(set(counts.values())) <= 2
    greedy = CapGreedy().allocate(Problem(targets, allowed, format, torch.Generator(), dict(found)))
    sizes = [greedy.choices[name].counts["entry"] for name in "abc"]
    assert greedy.spent == allowed == sum(sizes) and sizes == sorted(sizes) and sizes[0] < sizes[2]
    # the same threshold for all: the last entry kept of each is above the first one left of any other
    scores = [given.units[0].scores for given in found.values()]
    last = min(each[size - 1] for each, size in zip(scores, sizes, strict=True))
    assert all(each[size] <= last for each, size in zip(scores, sizes, strict=True))
