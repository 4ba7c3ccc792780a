"""The pool of directions and entries: projections against nearest points, plans against one unit at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from spectrim.core import budget
from spectrim.core.plan import Candidate, Part, Target, Units
from spectrim.core.pool import Pool, Prices, project

FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])
SHAPES = {"a": (6, 10), "b": (12, 5), "c": (8, 8), "d": (4, 9)}


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def candidate(name: str, shape: tuple[int, int], seed: int, format: str = "low_rank") -> Candidate:
    """Units alone: more than a dense matrix pays for, with equal scores among them."""
    target = Target(name, "up", (0,), (Part(name, *shape, "x"),))
    ranks = (9 * uniform(min(shape), seed=seed)).sort(descending=True).values
    entries = (
        (3 * uniform(int(0.7 * shape[0] * shape[1]), seed=seed + 50)).sort(descending=True).values.round(decimals=1)
    )
    units = (Units("rank", ranks, None, sum(shape)), Units("entry", entries, None, 1))
    made = Candidate(target, units, dict, dict)
    return made.priced(format, budget.unit_cost(format, target.parts[0]))


def group(format: str = "low_rank") -> dict[str, Candidate]:
    return {name: candidate(name, shape, i, format) for i, (name, shape) in enumerate(SHAPES.items())}


TOTAL = sum(m * n for m, n in SHAPES.values())


# --- projection ---


@pytest.mark.parametrize("push", ["replicated", "euclidean"])
def test_a_projection_is_the_nearest_point_within_the_budget(push: str) -> None:
    costs = torch.tensor([1.0, 1.0, 4.0, 9.0, 2.0], dtype=torch.float64)
    for seed in range(20):
        z, allowed = 2 * uniform(5, seed=seed) + 0.1, 5.0
        found, shift = project(z, lambda s: float(costs @ s), allowed, costs if push == "euclidean" else 1.0)
        assert (
            shift > 0 and float(costs @ found) == pytest.approx(allowed, rel=1e-9) and float(costs @ found) <= allowed
        )
        metric = torch.ones(5, dtype=torch.float64) if push == "euclidean" else costs
        distance = float((metric * (found - z).square()).sum())
        for other in range(100):  # no point within the budget is nearer, near by or anywhere
            away = uniform(5, seed=1000 + other)
            point = away if other % 2 else (found + 0.02 * (away - 0.5)).clamp(0, 1)
            if float(costs @ point) <= allowed:
                assert float((metric * (point - z).square()).sum()) >= distance - 1e-9


def test_a_projection_keeps_the_order_and_what_is_within_the_budget() -> None:
    z = 3 * uniform(300) - 1
    found, _ = project(z, lambda s: float(s.sum()), 40.0)
    assert float(found.sum()) == pytest.approx(40.0) and float(found.min()) >= 0 and float(found.max()) <= 1
    assert (found[z.argsort()].diff() >= 0).all()
    again, shift = project(found, lambda s: float(s.sum()), 40.0 * (1 + 1e-9))
    assert torch.equal(again, found) and shift == 0
    within, shift = project(z, lambda s: float(s.sum()), 300.0)
    assert torch.equal(within, z.clamp(0, 1)) and shift == 0, "nothing is raised to a budget"
    raised, shift = project(z, lambda s: float(s.sum()), 200.0, inflate=True)
    assert float(raised.sum()) == pytest.approx(200.0) and shift < 0
    full, _ = project(z, lambda s: float(s.sum()), 1000.0, inflate=True)
    assert (full == 1).all()


@FORMATS
def test_soft_costs_are_exact_at_whole_units(format: str) -> None:
    pool = Pool.make(group(format), format, None)
    for seed in range(4):
        mask = (uniform(len(pool.keys), seed=seed) < 0.4).float()
        kept = mask.split(list(pool.sizes))
        for i, (name, spent) in enumerate(zip(pool.prices, pool.spent(mask).tolist(), strict=True)):
            part = pool.candidates[name].target.parts[0]
            rank = int(kept[2 * i].sum())
            assert spent == budget.rank_cost(format, part, rank) + int(kept[2 * i + 1].sum())
            average = pool.average(mask).split(list(pool.sizes))[2 * i]
            assert (
                average.numel() == 0
                or rank == 0
                or float(average[0]) * rank == pytest.approx(budget.rank_cost(format, part, rank))
            )


def test_soft_costs_lie_between_whole_units() -> None:
    pool = Pool.make({"a": candidate("a", (6, 10), 0, "pivot")}, "pivot", None)
    none = torch.zeros(len(pool.keys))
    for kept, cost in [((0.5,), 7.5), ((1.0, 0.5), 21.5), ((0.25, 0.25, 0.5), 15.0), ((1.0,) * 6, 60.0)]:
        values = none.clone()
        values[: len(kept)] = torch.tensor(kept)
        assert pool.spent(values).tolist() == [cost], "directions cost 15, 13, 11, …, whichever they are"
        values[6:9] = 0.5
        assert pool.spent(values).tolist() == [cost + 1.5]
    assert Pool.make({"a": candidate("a", (6, 10), 0)}, "low_rank", None).spent(none + 0.5)[0] == 0.5 * (96 + 41)
    assert isinstance(pool.prices["a"], Prices) and pool.prices["a"].dense == 60


# --- buckets ---


def test_buckets_are_neighbours_of_about_one_cost() -> None:
    found = group()
    pool = Pool.make(found, "low_rank", 6)
    assert pool.owner is not None
    assert len(pool.members) == int(pool.owner.max()) + 1 and (pool.members > 0).all()
    assert (pool.owner.diff() >= 0).all() and (pool.owner.diff() <= 1).all()
    segments = pool.of_segments(torch.arange(len(pool.sizes)))
    assert torch.equal(pool.segment[pool.owner], segments)
    assert torch.equal(pool.members, torch.bincount(pool.owner).float())
    size = float(pool.costs.sum()) / (6 * len(pool.sizes))
    directions = pool.segment % 2 == 0
    assert float(pool.costs[~directions].max()) <= 2.1 * size
    dearest = max(sum(shape) for shape in SHAPES.values())
    assert float(pool.costs[directions].max()) <= 2.1 * max(size, dearest)
    assert float(pool.places.min()) > 0 and float(pool.places.max()) < 1
    # places are in the order of what a parameter is worth
    means = torch.tensor([float(pool.keys[pool.owner == b].mean()) for b in range(len(pool.members))])
    assert float(pool.places[means.argmax()]) == float(pool.places.max())


def test_a_matrix_past_its_dense_size_is_dense_under_a_mask_of_buckets() -> None:
    pool = Pool.make(group(), "low_rank", 4)
    everything = torch.ones(len(pool.members))
    assert (pool.gates(everything) == 1).all()
    mask = everything.clone()
    mask[pool.segment == 0] = 0  # no direction of a: its entries alone are fewer than it has
    gates = pool.gates(mask).split(list(pool.sizes))
    assert not gates[0].any() and gates[1].all()
    mask[(pool.segment == 3).nonzero()[-1]] = 0  # of b enough is left to cost as much as all of it
    assert pool.spent(mask)[1] >= pool.dense[1] and pool.gates(mask).split(list(pool.sizes))[3].all()


def test_relative_keys_do_not_depend_on_the_size_of_a_matrix() -> None:
    one = candidate("a", (6, 10), 0)
    larger = Candidate(one.target, tuple(Units(u.kind, 8 * u.scores, None, u.cost) for u in one.units), dict, dict)
    for relative in (False, True):
        keys = [Pool.make({"a": each}, "low_rank", None, relative).keys for each in (one, larger)]
        torch.testing.assert_close(keys[1], keys[0] * (1 if relative else 64))


# --- plans ---


def one_at_a_time(found: Mapping[str, Candidate], order_by: Tensor, allowed: int, format: str) -> dict[str, object]:
    """The same plan, unit by unit, started again whenever a matrix becomes dense."""
    steps, at = [], 0
    for name, each in sorted(found.items()):
        for kind, units in enumerate(each.units):
            keys = Pool.make({name: each}, format, None).keys.split([len(u.scores) for u in each.units])[kind]
            for i in range(len(units.scores)):
                steps.append((-float(order_by[at]), -float(keys[i]), name, kind, i))
                at += 1
    whole: set[str] = set()
    while True:
        left = allowed - sum(found[name].target.parameters for name in whole)
        taken: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in found}
        closed = set()
        for _, _, name, kind, i in sorted(steps):
            part, kept = found[name].target.parts[0], taken[name]
            if name in whole or (name, kind) in closed:
                continue
            rank = len(kept[0])
            cost = 1 if kind else budget.rank_cost(format, part, rank + 1) - budget.rank_cost(format, part, rank)
            if cost > left:
                closed.add((name, kind))
            else:
                left -= cost
                kept[kind].append(i)
        spent = {
            name: budget.rank_cost(format, found[name].target.parts[0], len(kept[0])) + len(kept[1])
            for name, kept in taken.items()
        }
        grown = {name for name in found if name not in whole and spent[name] >= found[name].target.parameters}
        if not grown:
            return {name: None if name in whole else taken[name] for name in found}
        whole |= grown


@FORMATS
def test_a_plan_takes_the_largest_values_one_unit_at_a_time(format: str) -> None:
    found, dense = group(format), set()
    pool = Pool.make(found, format, None)
    orders = [uniform(len(pool.keys), seed=7), (5 * uniform(len(pool.keys), seed=8)).round(), pool.keys]
    for order_by, allowed in itertools.product(orders, range(0, TOTAL, 41)):
        plan = pool.plan(order_by, allowed)
        got = {
            name: (
                plan.learned[name]["order"].tolist(), plan.learned[name]["entries"].tolist()
            ) if name in plan.choices else None
            for name in found
        }  # fmt: skip
        assert got == one_at_a_time(found, order_by, allowed, format), allowed
        dense.add(any(each is None for each in got.values()))
        for name, choice in plan.choices.items():
            assert choice.formats == {name: budget.WITH_ENTRIES[format]}
            assert choice.counts == {"rank": len(got[name][0]), "entry": len(got[name][1])}  # type: ignore[index]
            assert budget.count(choice, found[name].target) < found[name].target.parameters
    assert dense == {False, True}


@FORMATS
def test_the_budget_is_spent_as_far_as_any_unit_pays(format: str) -> None:
    found = group(format)
    pool, spent = Pool.make(found, format, None), []
    order_by = uniform(len(pool.keys), seed=3)
    for allowed in [*range(0, TOTAL + 1, 17), TOTAL]:
        plan = pool.plan(order_by, allowed)
        spent.append(plan.spent)
        counted = sum(
            budget.count(plan.choices[name], each.target) if name in plan.choices else each.target.parameters
            for name, each in found.items()
        )
        assert counted == plan.spent <= allowed == plan.budget
        for name, choice in plan.choices.items():
            assert plan.spent == allowed or choice.counts["entry"] == len(found[name].units[1].scores)
    assert not plan.choices and spent[-1] == TOTAL


def test_what_is_kept_whole_becomes_dense_where_the_budget_pays() -> None:
    target = Target("a", "up", (0,), (Part("a", 6, 6, "x"),))
    few = (Units("rank", torch.ones(1), None, 12), Units("entry", torch.ones(3), None, 1))
    pool = Pool.make({"a": Candidate(target, few, dict, dict)}, "low_rank", None)
    order_by = torch.ones(4)
    assert pool.plan(order_by, 35).choices["a"].counts == {"rank": 1, "entry": 3}
    assert pool.plan(order_by, 36).choices == {}


def test_the_order_of_candidates_does_not_matter() -> None:
    found = group()
    turned = dict(reversed(found.items()))
    one, other = (Pool.make(each, "low_rank", 5) for each in (found, turned))
    assert torch.equal(one.keys, other.keys) and torch.equal(one.places, other.places)
    assert one.plan(one.keys, 150).choices == other.plan(other.keys, 150).choices


def test_candidates_without_both_kinds_are_refused_by_name() -> None:
    one = candidate("a", (6, 10), 0)
    for units, kind in ((one.units[:1], "rank"), (one.units[1:], "entry")):
        alone = Candidate(one.target, units, dict, dict)
        with pytest.raises(ValueError, match=rf"a \(role up\) has units of {kind} only: decompose it by robust_pca"):
            Pool.make({"a": alone}, "low_rank", None)
