"""Plans through JSON; what a candidate offers for a number of parameters, and what it is cut to."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

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


# --- what was learned ---


def learned(candidate: Candidate, **tensors: Tensor) -> Candidate:
    return replace(candidate, learned=tensors)


def at(rank: int) -> Choice:
    return Choice({"layer": "low_rank"}, {"rank": rank})


ORDER = torch.tensor([4, 0, 5, 2, 1, 3])
SCALE = torch.tensor([1.5, 0.5, 0.0, 2.0, 1.0, 0.25])
U, S, V = torch.linalg.svd(WEIGHT, full_matrices=False)
DENSE = Choice({"layer": "dense"}, {})


@pytest.mark.parametrize("rank", range(7))
@pytest.mark.parametrize("right", [False, True], ids=["", "right of its own"])
def test_a_learned_order_says_which_directions_stay(rank: int, right: bool) -> None:
    cut, kept = learned(candidate(right=right), order=ORDER).cut(at(rank)), ORDER[:rank]
    expected = (U[:, kept] * S[kept]) @ V[kept] * (3 if right else 1)
    assert cut["layer"]["left"].shape == (6, rank)
    assert torch.allclose(product(cut), expected, atol=1e-5)


@pytest.mark.parametrize("rank", range(7))
def test_learned_scales_belong_to_directions_whatever_their_order(rank: int) -> None:
    plain = product(learned(candidate(), scale=SCALE).cut(at(rank)))
    assert torch.allclose(plain, (U[:, :rank] * (S * SCALE)[:rank]) @ V[:rank], atol=1e-5)
    cut, kept = learned(candidate(), scale=SCALE, order=ORDER).cut(at(rank)), ORDER[:rank]
    assert torch.allclose(product(cut), (U[:, kept] * (S * SCALE)[kept]) @ V[kept], atol=1e-5)
    left, right = cut["layer"]["left"], cut["layer"]["right"]
    # a direction of scale 0 is none; the others have their norm split evenly
    assert torch.allclose(left.norm(dim=0)[SCALE[kept] > 0], right.norm(dim=1)[SCALE[kept] > 0], atol=1e-5)
    assert bool((right.norm(dim=1)[SCALE[kept] == 0] == 0).all())


def test_further_directions_come_first_and_are_part_of_the_rank() -> None:
    rng = torch.Generator().manual_seed(2)
    more = {"left": torch.randn(6, 2, generator=rng), "right": torch.randn(2, 9, generator=rng)}
    ours = learned(candidate(), order=ORDER, scale=SCALE, **more)
    for rank in range(2, 7):
        cut, kept = ours.cut(at(rank)), ORDER[: rank - 2]
        assert cut["layer"]["left"].shape == (6, rank) and cut["layer"]["right"].shape == (rank, 9)
        expected = more["left"] @ more["right"] + (U[:, kept] * (S * SCALE)[kept]) @ V[kept]
        assert torch.allclose(product(cut), expected, atol=1e-5)
        first = {"layer": {name: cut["layer"][name] for name in ("left", "right")}}
        first["layer"] = {"left": first["layer"]["left"][:, :2], "right": first["layer"]["right"][:2]}
        assert torch.allclose(product(first), more["left"] @ more["right"], atol=1e-5)
    with pytest.raises(AssertionError, match="1 more learned directions than its rank of 1"):
        ours.cut(at(1))


@pytest.mark.parametrize("choice", [at(3), at(0), DENSE], ids=["rank 3", "rank 0", "dense"])
def test_a_learned_offset_is_handed_on(choice: Choice) -> None:
    offset = torch.arange(6.0)
    cut = learned(candidate(), offset=offset).cut(choice)["layer"]
    assert torch.equal(cut["offset"], offset) and cut.keys() >= {"offset"}
    assert "offset" not in candidate().cut(choice)["layer"]
    without = candidate().cut(choice)["layer"]
    assert all(torch.equal(cut[name], without[name]) for name in without), "and nothing else is changed"


def test_a_dense_weight_is_rewritten_by_all_that_was_learned() -> None:
    assert torch.equal(candidate().cut(DENSE)["layer"]["weight"], WEIGHT)
    ours = learned(candidate(), scale=SCALE, order=ORDER)
    assert torch.allclose(ours.cut(DENSE)["layer"]["weight"], (U * (S * SCALE)) @ V, atol=1e-5)
    more = {"left": torch.ones(6, 1), "right": torch.ones(1, 9)}
    both = learned(candidate(), scale=SCALE, **more).cut(DENSE)["layer"]["weight"]
    assert torch.allclose(both, (U * (S * SCALE)) @ V + 1, atol=1e-5)
    assert torch.equal(learned(candidate(), order=ORDER).cut(DENSE)["layer"]["weight"], WEIGHT)
    before = WEIGHT.clone()
    ours.cut(DENSE)
    assert torch.equal(WEIGHT, before), "the weight itself stays"
    ones = learned(candidate(), scale=torch.ones(6)).cut(DENSE)["layer"]["weight"]
    assert torch.equal(ones, WEIGHT), "bit for bit"


def test_a_dense_weight_keeps_its_dtype() -> None:
    ours = replace(learned(candidate(), scale=SCALE), weights=lambda: {"layer": WEIGHT.bfloat16()})
    made = ours.cut(DENSE)["layer"]["weight"]
    assert made.dtype == torch.bfloat16
    assert torch.allclose(made.float(), (U * (S * SCALE)) @ V, atol=0.05)


def test_curves_go_through_json_and_learned_tensors_do_not() -> None:
    curves: dict[str, Any] = {"loss": [1.5, 0.1 + 0.2, 1e-17], "ratio": [2.0]}
    plan = Plan({"b": at(3)}, 100, 93, learned={"b": {"scale": SCALE}}, curves=curves)
    again = Plan.from_json(json.loads(plan.dumps()))
    assert again.curves == curves and again.learned == {} and again.choices == plan.choices
    assert "learned" not in plan.to_json()
    assert "curves" not in Plan({}, 5, 4).to_json(), "a plan without them is as it ever was"


def test_merged_plans_keep_what_each_learned() -> None:
    one = Plan({}, 1, 1, learned={"a": {"scale": SCALE}}, curves={"loss": [1.0], "ratio": [0.5]})
    other = Plan({}, 1, 1, learned={"b": {"order": ORDER}}, curves={"loss": [2.0]})
    third = Plan({}, 1, 1, curves={"loss": [3.0]})
    both = merge([one, other, third])
    assert both.learned == {**one.learned, **other.learned}
    assert both.curves == {"loss": [1.0], "ratio": [0.5], "loss 2": [2.0], "loss 3": [3.0]}
