"""From scores to a plan: against a walk one step at a time, and against the counting of the budget."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spectrim.core import budget
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target, Units
from spectrim.learn.harden import harden, with_learned
from spectrim.methods.lorap import ChannelPrune
from tests.learn.toys import decomposed, uniform

FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])
SHAPES = {"a": (12, 8), "b": (9, 9), "c": (6, 20), "d": (16, 10)}


def matrix(name: str, format: str, bias: bool = False) -> Candidate:
    """Of random weights, by SVD."""
    m, n = SHAPES[name]
    weight = uniform(m * n, -1.0, seed=ord(name)).view(m, n)
    target = Target(name, "up", (0,), (Part(name, m, n, "x", bias),))
    return decomposed(target, lambda: {name: weight}, format)


def matrices(format: str) -> dict[str, Candidate]:
    return {name: matrix(name, format) for name in SHAPES}


def scores_of(candidates: Mapping[str, Candidate], seed: int = 0) -> dict[str, Tensor]:
    return {
        name: uniform(len(c.units[0].scores), seed=seed + place)
        for place, (name, c) in enumerate(sorted(candidates.items()))
    }


def dense(candidates: Mapping[str, Candidate]) -> int:
    return sum(candidate.target.parameters for candidate in candidates.values())


def kept(plan: Plan, candidates: Mapping[str, Candidate]) -> int:
    """Parameters of a plan, counted anew."""
    return sum(
        budget.count(plan.choices[name], c.target) if name in plan.choices else c.target.parameters
        for name, c in candidates.items()
    )


def walked(
    candidates: Mapping[str, Candidate],
    scores: Mapping[str, Tensor],
    format: str,
    allowed: int,
    fixed: Mapping[str, int],
    least: int,
) -> dict[str, int | None]:
    """Ranks by taking the best direction that fits, again and again; None: dense. Every matrix has one below dense."""
    ranks: dict[str, int | None] = {}

    def cost(name: str, rank: int | None) -> int:
        part = candidates[name].target.parts[0]
        return part.parameters if rank is None else budget.rank_cost(format, part, rank) + fixed.get(name, 0)

    def after(name: str, rank: int) -> int | None:
        return rank + 1 if cost(name, rank + 1) < cost(name, None) and rank < min(SHAPES[name]) else None

    for name in candidates:
        ranks[name] = 0
        while ranks[name] is not None and ranks[name] < least and after(name, ranks[name]) is not None:
            ranks[name] += 1
    ordered = {name: values.sort(descending=True).values.tolist() for name, values in scores.items()}
    closed: set[str] = set()
    while True:
        ready = [(-ordered[n][r], n) for n, r in ranks.items() if r is not None and n not in closed]
        if not ready:
            return ranks
        _, name = min(ready)
        rank = ranks[name]
        assert rank is not None
        more = cost(name, after(name, rank)) - cost(name, rank)
        if sum(cost(n, r) for n, r in ranks.items()) + more <= allowed:
            ranks[name] = after(name, rank)
        else:
            closed.add(name)


@FORMATS
@pytest.mark.parametrize("fixed", [{}, {"a": 12, "c": 6}], ids=["", "new biases"])
@pytest.mark.parametrize("ratio", [0.02, 0.2, 0.45, 0.7])
def test_the_best_scores_that_fit_are_taken(format: str, fixed: dict[str, int], ratio: float) -> None:
    candidates = matrices(format)
    allowed = int((1 - ratio) * dense(candidates))
    for seed in range(0, 40, 10):
        scores = scores_of(candidates, seed)
        plan = harden(candidates, scores, format, allowed, fixed)
        expected = walked(candidates, scores, format, allowed, fixed, 1)
        found = {n: plan.choices[n].counts["rank"] if n in plan.choices else None for n in candidates}
        assert found == expected
        assert plan.spent == kept(plan, candidates) <= plan.budget == allowed
        assert allowed - plan.spent < max(m + n for m, n in SHAPES.values())
        for name, choice in plan.choices.items():
            assert choice.formats == {name: format} and choice.bias == (name in fixed)
            order = plan.learned[name]["order"]
            assert order.tolist() == sorted(range(min(SHAPES[name])), key=lambda i, s=scores[name]: (-float(s[i]), i))
        assert plan.learned.keys() == plan.choices.keys()


@FORMATS
def test_a_cut_has_the_directions_of_the_best_scores(format: str) -> None:
    candidates = matrices(format)
    scores = scores_of(candidates)
    plan = harden(candidates, scores, format, dense(candidates) // 2)
    assert plan.choices
    for name, choice in plan.choices.items():
        learned = replace(candidates[name], learned=plan.learned[name])
        cut, weight = learned.cut(choice)[name], learned.weights()[name]
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        best = scores[name].topk(choice.counts["rank"]).indices
        torch.testing.assert_close(cut["left"] @ cut["right"], (u[:, best] * s[best]) @ v[best], rtol=0, atol=1e-5)
        assert best.sort().values.tolist() != list(range(len(best))), "not those of the largest singular values"


@FORMATS
def test_equal_scores_go_by_name_then_by_place(format: str) -> None:
    candidates = matrices(format)
    scores = {name: torch.full_like(values, 0.5) for name, values in scores_of(candidates).items()}
    for allowed in range(130, dense(candidates), 23):
        plan = harden(candidates, scores, format, allowed)
        assert all(made["order"].diff().eq(1).all() for made in plan.learned.values())
        found = {n: plan.choices[n].counts["rank"] if n in plan.choices else None for n in candidates}
        assert found == walked(candidates, scores, format, allowed, {}, 1)
    first = harden(candidates, scores, format, dense(candidates) // 2)
    assert "a" not in first.choices and first.choices["d"].counts["rank"] == 1, "all of the first before the others"
    signed = {name: values * 0 * (-1) ** place for place, (name, values) in enumerate(scores.items())}
    zeros = {name: values * 0 for name, values in scores.items()}
    allowed = dense(candidates) // 2
    assert harden(candidates, signed, format, allowed).choices == harden(candidates, zeros, format, allowed).choices


@FORMATS
def test_the_order_of_targets_does_not_matter(format: str) -> None:
    candidates = matrices(format)
    scores = scores_of(candidates)
    plan = harden(candidates, scores, format, 250)
    for seed in range(4):
        names = random.Random(seed).sample(sorted(candidates), len(candidates))
        again = harden({n: candidates[n] for n in names}, {n: scores[n] for n in reversed(names)}, format, 250)
        assert again.dumps() == plan.dumps()
        assert all(torch.equal(again.learned[n]["order"], made["order"]) for n, made in plan.learned.items())


@FORMATS
def test_a_larger_budget_never_keeps_less(format: str) -> None:
    candidates = matrices(format)
    scores = scores_of(candidates, 7)
    spent = [harden(candidates, scores, format, b, {"b": 9}).spent for b in range(dense(candidates), 110, -4)][::-1]
    assert spent == sorted(spent) and spent[-1] == dense(candidates)


@FORMATS
def test_a_matrix_whose_scores_are_best_ends_dense(format: str) -> None:
    candidates = matrices(format)
    scores = {name: values + 2 * (name == "c") for name, values in scores_of(candidates).items()}
    plan = harden(candidates, scores, format, dense(candidates) // 2)
    assert "c" not in plan.choices and "c" not in plan.learned and plan.choices.keys() == {"a", "b", "d"}
    assert plan.spent == kept(plan, candidates) <= plan.budget


@FORMATS
def test_the_least_is_kept_everywhere(format: str) -> None:
    candidates = matrices(format)
    scores = {name: values * (name == "b") for name, values in scores_of(candidates).items()}
    least = {"a": 3, "c": 2, "d": 99}
    plan = harden(candidates, scores, format, 300, least=least)
    assert plan.choices["a"].counts["rank"] >= 3 and plan.choices["c"].counts["rank"] >= 2
    most = budget.largest_rank(format, candidates["d"].target.parts[0])
    assert "d" not in plan.choices or plan.choices["d"].counts["rank"] == most
    alone = harden(candidates, scores, format, 150)
    assert [alone.choices[n].counts["rank"] for n in ("c", "d")] == [1, 1], "without: one everywhere"


@FORMATS
def test_reserved_directions_come_first_and_are_counted(format: str) -> None:
    candidates = matrices(format)
    scores, reserved = scores_of(candidates), {"a": 2, "d": 1}
    for allowed in (180, 230, 280, 350):
        plan = harden(candidates, scores, format, allowed, {"d": 16}, reserved=reserved)
        assert plan.spent == kept(plan, candidates) <= allowed
        assert plan.choices["a"].counts["rank"] >= 3 if "a" in plan.choices else True
        assert plan.choices["d"].counts["rank"] >= 2 if "d" in plan.choices else True
        for name, number in reserved.items():
            if name not in plan.choices:
                continue
            further = {
                "left": torch.ones(SHAPES[name][0], number),
                "right": torch.ones(number, SHAPES[name][1]),
                **plan.learned[name],
            }
            cut = replace(candidates[name], learned=further).cut(plan.choices[name])[name]
            assert cut["left"].shape[1] == plan.choices[name].counts["rank"]
            own = cut["left"].shape[1] - number
            best = scores[name].topk(own).indices
            u, s, v = torch.linalg.svd(candidates[name].weights()[name], full_matrices=False)
            expected = (u[:, best] * s[best]) @ v[best] + number
            torch.testing.assert_close(cut["left"] @ cut["right"], expected, rtol=0, atol=1e-4)


def test_a_matrix_that_its_reserved_directions_fill_is_dense() -> None:
    candidates = matrices("low_rank")
    for number in (budget.largest_rank("low_rank", candidates["a"].target.parts[0]), 7):
        plan = harden(candidates, scores_of(candidates), "low_rank", 300, reserved={"a": number})
        assert "a" not in plan.choices and plan.spent == kept(plan, candidates) <= 300


@FORMATS
@pytest.mark.parametrize(("fixed", "reserved"), [({}, {}), ({"a": 12}, {}), ({"a": 12}, {"a": 2, "c": 1})])
def test_a_budget_below_the_least_is_refused_with_the_largest_ratio(
    format: str, fixed: dict[str, int], reserved: dict[str, int]
) -> None:
    candidates = matrices(format)
    parts = {name: c.target.parts[0] for name, c in candidates.items()}
    ranks = {name: 1 + reserved.get(name, 0) for name in candidates}
    lowest = sum(budget.rank_cost(format, parts[n], ranks[n]) + fixed.get(n, 0) for n in candidates)
    scores = scores_of(candidates)
    plan = harden(candidates, scores, format, lowest, fixed, reserved=reserved)
    assert plan.spent == lowest and {n: c.counts["rank"] for n, c in plan.choices.items()} == ranks
    with pytest.raises(ValueError, match=f"ratio too large.*need {lowest:,} of {dense(candidates):,}") as error:
        harden(candidates, scores, format, lowest - 1, fixed, reserved=reserved)
    possible = float(str(error.value).rsplit(" ", 1)[1])
    allowed = budget.allowed([c.target for c in candidates.values()], possible)
    assert harden(candidates, scores, format, allowed, fixed, reserved=reserved).spent <= allowed
    assert budget.allowed([c.target for c in candidates.values()], possible + 2e-4) < lowest


def test_scores_on_other_devices_and_with_gradients_are_read_alike() -> None:
    candidates = matrices("low_rank")
    scores = scores_of(candidates)
    learning = {name: values.clone().requires_grad_() for name, values in scores.items()}
    plan = harden(candidates, learning, "low_rank", 250)
    assert plan.dumps() == harden(candidates, scores, "low_rank", 250).dumps()
    assert not any(made["order"].requires_grad for made in plan.learned.values())


def test_nan_scores_are_refused() -> None:
    candidates = matrices("low_rank")
    scores = scores_of(candidates)
    scores["b"][3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        harden(candidates, scores, "low_rank", 250)


# --- channels ---


def ffn(name: str, hidden: int, width: int) -> Candidate:
    parts = (
        Part(f"{name}.up", width, hidden, f"{name}.up"),
        Part(f"{name}.down", hidden, width, f"{name}.down"),
    )
    weights = {
        p.module: uniform(p.parameters, -1.0, seed=i).view(p.out_features, p.in_features) for i, p in enumerate(parts)
    }
    made = ChannelPrune(protect=0.0, score="weight").decompose(
        Target(name, "ffn", (0,), parts), weights, {p.module: {} for p in parts}
    )
    assert isinstance(made.units[0], Units) and made.units[0].kind == "channel"
    return made


def test_channels_of_the_best_scores_stay() -> None:
    candidates = {"a": matrix("a", "low_rank"), "x": ffn("x", 5, 12), "y": ffn("y", 5, 12)}
    scores = scores_of(candidates, 3)
    plan = harden(candidates, scores, "low_rank", dense(candidates) // 2)
    assert plan.spent == kept(plan, candidates) and 0 <= plan.budget - plan.spent < 20
    assert {"x", "y"} <= plan.choices.keys()
    for name in ("x", "y"):
        choice = plan.choices[name]
        assert set(choice.formats.values()) == {"dense"} and choice.counts.keys() == {"channel"}
        count = choice.counts["channel"]
        learned = replace(candidates[name], learned=plan.learned[name])
        best = candidates[name].tensors()["order"][scores[name].topk(count).indices].sort().values
        cut, weights = learned.cut(choice), candidates[name].weights()
        assert torch.equal(cut[f"{name}.down"]["weight"], weights[f"{name}.down"][:, best])
        assert torch.equal(cut[f"{name}.up"]["weight"], weights[f"{name}.up"][best])
    everything = harden({"x": candidates["x"]}, {"x": scores["x"]}, "low_rank", candidates["x"].target.parameters)
    assert everything.choices == {} and everything.spent == 120
    nothing = harden({"x": candidates["x"]}, {"x": scores["x"]}, "low_rank", 0)
    assert nothing.choices["x"].counts == {"channel": 0} and nothing.spent == 0


# --- what was learned beside ---


def test_learned_tensors_are_added_to_a_plan() -> None:
    candidates = matrices("low_rank")
    plan = harden(candidates, scores_of(candidates), "low_rank", 250)
    scale = {"a": {"scale": torch.ones(8)}, "z": {"scale": torch.ones(3), "offset": torch.zeros(4)}}
    stays = Target("z", "up", (0,), (Part("z.weightless", 4, 3, "x"),))
    made = with_learned(plan, scale, [stays])
    assert made.learned["a"].keys() == {"order", "scale"} and made.learned["b"] == plan.learned["b"]
    assert made.learned["z"].keys() == {"scale", "offset"}
    assert made.choices == {**plan.choices, "z": Choice({"z.weightless": "dense"}, {})}
    assert budget.count(made.choices["z"], stays) == stays.parameters
    assert plan.learned["a"].keys() == {"order"} and "z" not in plan.choices, "the plan itself is as it was"
    assert (made.budget, made.spent) == (plan.budget, plan.spent)
