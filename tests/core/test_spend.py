"""Best steps first, hulls and the exact knapsack, each against its definition by brute force."""

from __future__ import annotations

import itertools
import math
import random
import re
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from spectrim.core import budget, spend
from spectrim.core.plan import Choice, Part, Target

BOTH = pytest.mark.parametrize("format", ["low_rank", "pivot"])
Lists = tuple[dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without run-time type checks, which take most of the time where small cases are tried by the thousand."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random_lists(rng: random.Random, lists: int = 5, longest: int = 6) -> Lists:
    """Scores with ties within and between lists; unequal costs, some of them 0; an empty list now and then."""
    scores, costs = {}, {}
    for i in range(rng.randint(1, lists)):
        length = rng.randint(0, longest)
        scores[f"l{i}"] = floats(*sorted((rng.randint(0, 8) / 2 for _ in range(length)), reverse=True))
        costs[f"l{i}"] = ints(*(rng.choice([0, 1, 1, 2, 3, 7, 12]) for _ in range(length)))
    return scores, costs


def by_definition(scores: dict[str, Tensor], costs: dict[str, Tensor], allowed: int, floors: dict[str, int]) -> Any:
    """One step at a time: the largest next score, ties by name; a list whose step does not fit is closed."""
    taken = {name: floors.get(name, 0) for name in scores}
    left = allowed - sum(int(costs[name][:count].sum()) for name, count in taken.items())
    open_ones = set(scores)
    while open_ones := {name for name in open_ones if taken[name] < len(scores[name])}:
        name = min(open_ones, key=lambda each: (-float(scores[each][taken[each]]), each))
        cost = int(costs[name][taken[name]])
        if cost > left:
            open_ones.discard(name)
        else:
            left, taken[name] = left - cost, taken[name] + 1
    return taken


def spent(costs: dict[str, Tensor], taken: dict[str, int]) -> int:
    return sum(int(costs[name][:count].sum()) for name, count in taken.items())


# --- best steps first ---


@pytest.mark.usefixtures("unchecked")
def test_a_cut_is_that_of_the_definition_and_grows_with_the_budget() -> None:
    rng = random.Random(0)
    for _ in range(60):
        scores, costs = random_lists(rng)
        floors = {name: rng.randint(0, len(each)) for name, each in scores.items() if rng.random() < 0.3}
        least, kept = spent(costs, floors), 0
        for allowed in range(least, spent(costs, {name: len(each) for name, each in costs.items()}) + 2):
            taken = spend.cut(scores, costs, allowed, floors)
            assert taken == by_definition(scores, costs, allowed, floors)
            assert kept <= spent(costs, taken) <= allowed, "a larger budget never spends less"
            kept = spent(costs, taken)
            for name, count in taken.items():
                assert count >= floors.get(name, 0)
                assert count == len(costs[name]) or int(costs[name][count]) > allowed - kept, "the next does not fit"
        assert kept == spent(costs, {name: len(each) for name, each in costs.items()}), "all of it, in the end"


@pytest.mark.usefixtures("unchecked")
def test_every_step_before_the_first_that_does_not_fit_scores_at_least_as_much_as_every_step_left() -> None:
    rng = random.Random(1)
    for _ in range(50):
        scores, costs = random_lists(rng, 6, 20)
        costs = {name: torch.full_like(each, 5) for name, each in costs.items()}  # so nothing fits after it
        taken = spend.cut(scores, costs, 5 * rng.randint(0, 40))
        kept = torch.cat([scores[name][:count] for name, count in taken.items()])
        dropped = torch.cat([scores[name][count:] for name, count in taken.items()])
        assert not len(kept) or not len(dropped) or kept.min() >= dropped.max()


def test_ties_go_by_name_whatever_the_order_of_the_lists() -> None:
    scores = {name: floats(2, 1, 1) for name in "cab"}
    costs = {name: ints(1, 1, 1) for name in "bca"}
    assert spend.cut(scores, costs, 5) == {"a": 3, "b": 1, "c": 1}
    assert spend.cut(scores, costs, 1) == {"a": 1, "b": 0, "c": 0}


def test_what_does_not_fit_closes_its_list_alone() -> None:
    scores = {"a": floats(9, 8), "b": floats(7, 6), "c": floats(5, 4)}
    costs = {"a": ints(3, 10), "b": ints(4, 4), "c": ints(1, 1)}
    assert spend.cut(scores, costs, 9) == {"a": 1, "b": 1, "c": 2}


def test_lists_of_no_steps_and_no_lists() -> None:
    assert spend.cut({}, {}, 3) == {}
    assert spend.cut({"a": floats(), "b": floats(1)}, {"a": ints(), "b": ints(2)}, 3) == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("scores", "costs", "floor", "message"),
    [
        (floats(1, 2), ints(1, 1), 0, "scores of b rise"),
        (floats(1, math.nan), ints(1, 1), 0, "scores of b are NaN at step 1"),
        (floats(2, 1), ints(1, -1), 0, "step of b costs -1"),
        (floats(2, 1), ints(1), 0, "b has 2 scores but 1 costs"),
        (floats(2, 1), ints(1, 1), 3, "floor of b is 3, but it has 2 steps"),
        (floats(2, 1), ints(1000, 3000), 2, "floors alone cost 4,000, but the budget is 3,999"),
    ],
)
def test_a_cut_refuses(scores: Tensor, costs: Tensor, floor: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spend.cut({"a": floats(1), "b": scores}, {"a": ints(1), "b": costs}, 3999, {"b": floor})


def test_a_cut_takes_at_most_ten_sorts() -> None:
    generator = torch.Generator().manual_seed(0)
    every = torch.rand(224, 4096, generator=generator, dtype=torch.float64).sort(descending=True).values
    scores = {f"l{i:03}": row for i, row in enumerate(every)}
    costs = dict.fromkeys(scores, torch.full((4096,), 8192))

    def seconds(run: Any) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    sort = min(seconds(lambda: torch.sort(torch.cat(list(scores.values())))) for _ in range(3))
    assert min(seconds(lambda: spend.cut(scores, costs, 224 * 4096 * 4000)) for _ in range(3)) <= 10 * sort


# --- the hull ---


def slopes(values: Tensor, costs: Tensor) -> list[float]:
    """min over starts at or before, of max over ends after, of value over cost between: exact."""
    value = [Fraction(each) for each in values.tolist()]
    cost = costs.tolist()

    def slope(start: int, end: int) -> float | Fraction:
        below = sum(cost[start:end])
        return Fraction(sum(value[start:end])) / below if below else math.inf

    ends = range(1, len(cost) + 1)
    return [
        float(min(max(slope(start, end) for end in ends if end > i) for start in range(i + 1)))
        for i in range(len(cost))
    ]


@pytest.mark.usefixtures("unchecked")
def test_the_hull_is_the_least_concave_one() -> None:
    rng = random.Random(2)
    for _ in range(150):
        length = rng.randint(0, 9)
        values = floats(*(rng.choice([0, 1, 2, 3.5, rng.random()]) for _ in range(length)))
        costs = ints(*(rng.choice([0, 1, 2, 9, rng.randint(1, 50)]) for _ in range(length)))
        found = spend.hull(values, costs)
        assert found.tolist() == pytest.approx(slopes(values, costs), rel=1e-12)
        assert (found[1:] <= found[:-1]).all(), "exactly, as a cut wants it"


def test_the_hull_keeps_slopes_that_fall_and_joins_those_that_rise() -> None:
    assert spend.hull(floats(8, 6, 3), ints(2, 2, 3)).tolist() == [4, 3, 1]
    assert spend.hull(floats(8, 4, 4, 1), ints(2, 4, 2, 1)).tolist() == [4, 8 / 6, 8 / 6, 1]
    for values, costs in ((floats(-1), ints(1)), (floats(math.nan), ints(1)), (floats(1), ints(-1))):
        with pytest.raises(ValueError, match="0 or more"):
            spend.hull(values, costs)


def fractional_best(values: list[Tensor], costs: list[Tensor], allowed: int) -> float:
    """The linear program: shares of steps, none larger than that of the step before it."""
    value, cost = torch.cat(values).numpy(), torch.cat(costs).numpy()
    before = np.zeros((0, len(value)))
    start = 0
    for each in values:
        for i in range(start, start + len(each) - 1):
            row = np.zeros(len(value))
            row[i + 1], row[i] = 1, -1
            before = np.vstack([before, row])
        start += len(each)
    limits = np.append(np.zeros(len(before)), allowed)
    return float(-optimize.linprog(-value, np.vstack([before, cost]), limits, bounds=(0, 1)).fun)


@pytest.mark.usefixtures("unchecked")
def test_a_cut_by_the_hull_is_the_fractional_best_but_for_one_run() -> None:
    rng = random.Random(3)
    for _ in range(60):
        values = [floats(*(rng.random() ** 2 for _ in range(rng.randint(1, 8)))) for _ in range(4)]
        costs = [ints(*(rng.randint(1, 30) for _ in each)) for each in values]
        allowed = rng.randint(0, int(torch.cat(costs).sum()))
        scores = {f"l{i}": spend.hull(v, c) for i, (v, c) in enumerate(zip(values, costs, strict=True))}
        of_lists = list(zip(scores.values(), costs, strict=True))
        runs = [float(each) * int(cost[score == each].sum()) for score, cost in of_lists for each in score]
        taken = spend.cut(scores, {f"l{i}": c for i, c in enumerate(costs)}, allowed)
        total = sum(float(v[: taken[f"l{i}"]].sum()) for i, v in enumerate(values))
        best = fractional_best(values, costs, allowed)
        assert best + 1e-9 >= total >= best - max(runs) - 1e-9


# --- ranks as steps ---


def target(m: int, n: int, name: str = "layer", role: str = "up") -> Target:
    return Target(name, role, (0,), (Part(name, m, n, name),))


@pytest.mark.usefixtures("unchecked")
@BOTH
def test_rank_steps_end_at_dense_and_pass_every_rank_that_is_smaller(format: str) -> None:
    for m, n, fixed in itertools.product(range(1, 11), range(1, 11), (0, 3)):
        part = Part("layer", m, n, "x")
        steps = spend.rank_steps(format, part, fixed)
        smaller = [r for r in range(min(m, n) + 1) if fixed + budget.rank_cost(format, part, r) < m * n]
        if not smaller or smaller == [0]:
            assert steps.tolist() == [m * n]
            continue
        paid = [fixed, *(fixed + steps.cumsum(0)).tolist()]
        assert paid == [*(fixed + budget.rank_cost(format, part, r) for r in smaller), m * n]
        assert (steps > 0).all()


def test_a_plan_of_steps() -> None:
    targets = [target(10, 14, "b"), target(20, 30, "a"), target(1, 9, "row")]
    scores = {"a": floats(*range(12, -1, -1)), "b": floats(*([0.5] * 6)), "row": floats(0)}
    assert [len(spend.rank_steps("low_rank", each.parts[0])) for each in targets] == [6, 12, 1]
    scores["a"] = scores["a"][:12]
    plan = spend.spend_ranks(targets, scores, "low_rank", 24 + 9 + 600 + 30)
    assert plan.choices == {"b": Choice({"b": "low_rank"}, {"rank": 2})}, "all else is dense"
    assert plan.spent == 48 + 9 + 600
    assert spend.spend_ranks(targets, scores, "low_rank", 50 + 9, least=0).choices["b"].counts == {"rank": 0}


def test_a_bias_that_comes_with_ranks_is_paid_for() -> None:
    targets = [target(10, 14, "a"), target(10, 14, "b")]
    scores = {"a": floats(5, 4, 3, 2, 1, 1)[: len(spend.rank_steps("low_rank", targets[0].parts[0], 10))]}
    scores["b"] = scores["a"] / 100
    fixed = {"a": 10, "b": 10}
    plan = spend.spend_ranks(targets, scores, "low_rank", 34 + 106, fixed=fixed)
    assert {name: choice.counts["rank"] for name, choice in plan.choices.items()} == {"a": 4, "b": 1}
    assert plan.spent == 34 + 106 == sum(budget.count(plan.choices[each.name], each) for each in targets)
    assert plan.choices["a"].bias
    assert spend.spend_ranks(targets, scores, "low_rank", 280, fixed=fixed).choices == {}


@BOTH
@pytest.mark.parametrize("least", [1, 3])
def test_an_infeasible_ratio_names_the_largest_one_that_is_possible(format: str, least: int) -> None:
    targets = [target(10, 14, "a"), target(20, 30, "b"), target(1, 9, "row")]
    scores = {each.name: torch.zeros(len(spend.rank_steps(format, each.parts[0]))) for each in targets}
    lowest = 9 + sum(budget.rank_cost(format, each.parts[0], least) for each in targets[:2])
    with pytest.raises(ValueError, match=f"ratio too large: .* rank {least} everywhere") as error:
        spend.spend_ranks(targets, scores, format, lowest - 1, least)
    largest = Fraction(re.search(r"largest possible ratio here is (\d\.\d+)$", str(error.value))[1])  # type: ignore[index]
    spend.spend_ranks(targets, scores, format, budget.allowed(targets, float(largest)), least)
    with pytest.raises(ValueError, match="ratio too large"):
        beyond = budget.allowed(targets, float(largest + Fraction(1, 10_000)))
        spend.spend_ranks(targets, scores, format, beyond, least)


def test_what_is_no_single_matrix_has_no_rank() -> None:
    whole = Target("mlp", "ffn", (0,), (Part("up", 8, 4, "x"), Part("down", 4, 8, "y")))
    with pytest.raises(ValueError, match=r"mlp \(role ffn\) is no single matrix"):
        spend.spend_ranks([whole], {"mlp": floats(1)}, "low_rank", 64)


# --- one choice for each ---


def best_loss(costs: list[Tensor], losses: list[Tensor], allowed: int) -> float:
    """The least total of all ways to choose."""
    best = math.inf
    for picked in itertools.product(*(range(len(each)) for each in costs)):
        if sum(int(cost[i]) for cost, i in zip(costs, picked, strict=True)) <= allowed:
            best = min(best, sum(float(loss[i]) for loss, i in zip(losses, picked, strict=True)))
    return best


def total(each: list[Tensor], picked: list[int]) -> Any:
    return sum(values[i].item() for values, i in zip(each, picked, strict=True))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("cells", [0, spend._CELLS], ids=["solver", "table"])
@pytest.mark.parametrize("largest", [12, 1000, 50_000_000])
def test_a_knapsack_is_the_best_of_all_choices(largest: int, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spend, "_CELLS", cells)
    rng = random.Random(largest)
    for _ in range(60):
        entries = rng.randint(1, 6 if largest == 12 else 5)
        costs = [ints(*(rng.randint(0, largest) for _ in range(rng.randint(1, 4)))) for _ in range(entries)]
        losses = [floats(*(rng.choice([rng.random(), 0.5, math.inf]) for _ in each)) for each in costs]
        for loss in losses:
            loss[rng.randrange(len(loss))] = rng.random()
        # just enough for one of the ways to choose, or one parameter less
        some = sum(int(each[rng.randrange(len(each))]) for each in costs) - rng.randint(0, 1)
        best = best_loss(costs, losses, some)
        if best == math.inf:
            with pytest.raises(ValueError, match="smallest possible total"):
                spend.knapsack(costs, losses, some, gap=0)
            continue
        picked = spend.knapsack(costs, losses, some, gap=0)
        assert total(costs, picked) <= some
        assert total(losses, picked) == pytest.approx(best, rel=1e-7)
        assert spend.knapsack(costs, losses, some, gap=0) == picked


@pytest.mark.usefixtures("unchecked")
def test_a_knapsack_of_a_large_model_is_near_the_lagrange_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    costs, losses = [], []
    for i in range(224):
        costs.append(torch.arange(11) * (409_600 + 131_072 * (i % 3)))
        falls = torch.rand(10, generator=generator, dtype=torch.float64).sort(descending=True).values
        losses.append(torch.cat([falls.flip(0).cumsum(0).flip(0), floats(0)]) * (1 + i % 5))
    allowed = int(0.6 * sum(int(each[-1]) for each in costs))
    picked = spend.knapsack(costs, losses, allowed)
    assert total(costs, picked) <= allowed
    bound = max(
        sum(float((loss + price * cost).min()) for cost, loss in zip(costs, losses, strict=True)) - price * allowed
        for price in np.geomspace(1e-9, 1e-4, 120)
    )
    step = max(float((loss[:-1] - loss[1:]).max()) for loss in losses)
    assert bound - 1e-9 <= total(losses, picked) <= bound * (1 + 1e-4) + step


def test_an_answer_beyond_the_budget_is_asked_for_again_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where HiGHS rounds to a little more than there is."""
    solve, rooms = spend._solve, []

    def generous(owner: Any, extra: Any, loss: Any, room: int, gap: float) -> Any:
        rooms.append(room)
        return solve(owner, extra, loss, room + 5, gap)

    monkeypatch.setattr(spend, "_CELLS", 0)
    monkeypatch.setattr(spend, "_solve", generous)
    costs, losses = [ints(1, 4, 8)] * 3, [floats(9, 4, 1)] * 3
    picked = spend.knapsack(costs, losses, 12)
    assert len(rooms) > 1 and rooms == sorted(rooms, reverse=True)
    assert total(costs, picked) <= 12

    monkeypatch.setattr(spend, "_solve", lambda owner, *_: np.array([2, 5, 8]))
    with pytest.raises(ValueError, match="HiGHS exceeds the budget of 12 by 12"):
        spend.knapsack(costs, losses, 12)


@pytest.mark.parametrize(
    ("loss", "allowed", "message"),
    [
        (floats(1, 2), 1_006, "budget is 1,006, but the smallest possible total is 1,007"),
        (floats(math.inf, 2), 2_006, "smallest possible total is 2,007"),
        (floats(math.inf, math.inf), 9_000, "every choice of entry 1 has an infinite loss"),
        (floats(math.nan, 2), 9_000, "a loss of entry 1 is NaN"),
        (floats(-math.inf, 2), 9_000, "a loss of entry 1 is NaN or −inf"),
    ],
)
def test_a_knapsack_refuses(loss: Tensor, allowed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spend.knapsack([ints(7), ints(1000, 2000)], [floats(0), loss], allowed)


def test_a_failure_of_the_solver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = optimize.OptimizeResult(success=False, message="out of time", x=None)
    monkeypatch.setattr(spend, "_CELLS", -1)
    monkeypatch.setattr(optimize, "milp", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="HiGHS found no answer for 1 entries: out of time"):
        spend.knapsack([ints(1, 2)], [floats(1, 0)], 2)


def test_a_knapsack_of_nothing_and_of_losses_that_are_all_0() -> None:
    assert spend.knapsack([], [], 0) == []
    assert total([ints(3, 1)] * 2, spend.knapsack([ints(3, 1)] * 2, [floats(0, 0)] * 2, 3)) <= 3
