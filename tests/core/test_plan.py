"""Plans through JSON; what a candidate offers for a number of parameters, and what it is cut to."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from spectrim.core import budget
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target, Units, balance, merge

PART = Part("layer", 6, 9, "x")
TARGET = Target("layer", "up", (2,), (PART,))
WEIGHT = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
SCORES = torch.linalg.svdvals(WEIGHT).double()


def candidate(format: str = "low_rank", errors: bool = True, right: bool = False, fixed_cost: int = 0) -> Candidate:
    """Of an SVD of WEIGHT; with `right`, one that is not leftᵀ W."""
    u = torch.linalg.svd(WEIGHT).U
    tensors = {"left": u, "right": 3 * u.T @ WEIGHT} if right else {"left": u}
    units = Units("rank", SCORES, SCORES**2 if errors else None, budget.unit_cost(format, PART))
    return Candidate(TARGET, (units,), lambda: tensors, lambda: {"layer": WEIGHT}, format, fixed_cost)


def product(cut: dict[str, dict[str, Tensor]]) -> Tensor:
    return cut["layer"]["left"] @ cut["layer"]["right"]


def test_a_plan_comes_back_from_json() -> None:
    choices = {
        "b": Choice({"b": "pivot"}, {"rank": 3}, error=0.25, bias=True),
        "a": Choice({"a": "low_rank"}, {"rank": 0}),
    }
    plan = Plan(choices, 100, 93, ("x stays dense",))
    assert Plan.from_json(json.loads(plan.dumps())) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert list(plan.to_json()["choices"]) == ["a", "b"]
    assert Plan.from_json(json.loads(Plan({}, 5, 4).dumps())) == Plan({}, 5, 4)


def test_the_text_of_a_plan_does_not_depend_on_the_order_of_choices() -> None:
    one, other = Choice({"a": "low_rank"}, {"rank": 1}), Choice({"b": "low_rank"}, {"rank": 2})
    assert Plan({"a": one, "b": other}, 9, 8).dumps() == Plan({"b": other, "a": one}, 9, 8).dumps()


def test_merged_plans_add_up() -> None:
    one = Plan({"a": Choice({"a": "low_rank"}, {"rank": 1})}, 10, 9, ("first",))
    other = Plan({"b": Choice({"b": "pivot"}, {"rank": 2})}, 20, 18, ("second",))
    both = merge([one, other])
    assert both == Plan({**one.choices, **other.choices}, 30, 27, ("first", "second"))


def test_parameters_of_targets() -> None:
    assert PART.parameters == TARGET.parameters == 54
    assert Target("ffn", "ffn", (0,), (PART, Part("down", 9, 6, "y"))).parameters == 108


@pytest.mark.parametrize("format", ["low_rank", "pivot"])
def test_first_takes_what_the_parameters_pay_for(format: str) -> None:
    ours = candidate(format)
    for parameters in range(54):
        choice = ours.first(parameters)
        rank = choice.counts["rank"]
        assert choice.formats == {"layer": format}
        assert budget.rank_cost(format, PART, rank) <= parameters
        if rank < 6:
            assert budget.rank_cost(format, PART, rank + 1) > parameters
        assert choice.error == pytest.approx(float((SCORES[rank:] ** 2).sum()))
        assert ours.fit(parameters) == choice


def test_a_fixed_cost_is_paid_first() -> None:
    ours = candidate(fixed_cost=10)
    assert [ours.first(p).counts["rank"] for p in (0, 9, 24, 25, 39, 40)] == [0, 0, 0, 1, 1, 2]


def test_without_errors_a_choice_has_none() -> None:
    assert candidate(errors=False).first(40).error is None


def test_units_have_one_cost_or_one_each() -> None:
    assert Units("rank", SCORES, None, 15).costs.tolist() == [15] * 6
    each = torch.arange(6)
    assert torch.equal(Units("rank", SCORES, None, each).costs, each)


def test_repriced_units_are_the_same_ones() -> None:
    plain, pivot = candidate("low_rank"), candidate("pivot")
    repriced = plain.priced("pivot", budget.unit_cost("pivot", PART))
    assert [repriced.first(p) for p in range(54)] == [pivot.first(p) for p in range(54)]
    assert torch.equal(repriced.rank_units.scores, plain.rank_units.scores)


@pytest.mark.parametrize("rank", range(7))
def test_a_cut_is_the_truncation_with_norms_split_evenly(rank: int) -> None:
    cut = candidate().cut(Choice({"layer": "low_rank"}, {"rank": rank}))
    left, right = cut["layer"]["left"], cut["layer"]["right"]
    assert left.shape == (6, rank) and right.shape == (rank, 9)
    u, s, v = torch.linalg.svd(WEIGHT, full_matrices=False)
    assert torch.allclose(product(cut), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), atol=1e-5)


def test_a_cut_uses_the_right_factor_where_the_candidate_has_its_own() -> None:
    choice = Choice({"layer": "low_rank"}, {"rank": 4})
    own, without = candidate(right=True).cut(choice), candidate().cut(choice)
    assert torch.allclose(product(own), 3 * product(without), atol=1e-5)


def test_a_cut_of_a_bfloat16_weight_keeps_the_precision_of_left() -> None:
    ours = candidate()
    half = Candidate(TARGET, ours.units, ours.tensors, lambda: {"layer": WEIGHT.bfloat16()})
    cut = half.cut(Choice({"layer": "low_rank"}, {"rank": 6}))
    assert cut["layer"]["left"].dtype == cut["layer"]["right"].dtype == torch.float32
    assert torch.allclose(product(cut), WEIGHT.bfloat16().float(), atol=1e-5)


def test_balance_keeps_the_product_and_leaves_zero_directions() -> None:
    rng = torch.Generator().manual_seed(1)
    left, right = torch.randn(5, 4, generator=rng), torch.randn(4, 7, generator=rng)
    right[0] *= 1e12
    left[:, 1] = 0
    right[2] = 0
    one, other = balance(left, right)
    assert torch.allclose(one @ other, left @ right, rtol=1e-5)
    assert torch.equal(one[:, 1:3], left[:, 1:3]) and torch.equal(other[1:3], right[1:3])
    assert torch.allclose(one.norm(dim=0)[[0, 3]], other.norm(dim=1)[[0, 3]], rtol=1e-5)
