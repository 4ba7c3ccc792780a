"""Counting against brute force and built modules; uniform ranks that spend a budget exactly."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import jaxtyping
import pytest
import torch

from spectrim.core import budget
from spectrim.core.plan import Choice, Part, Target
from spectrim.model.modules import FORMATS

RANK_FORMATS = ("low_rank", "pivot")
BOTH = pytest.mark.parametrize("format", RANK_FORMATS)
SMALL = [(m, n) for m in range(1, 13) for n in range(1, 13)]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without run-time type checks, which take most of the time where integers are tried by the thousand."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def part(m: int, n: int, name: str = "layer") -> Part:
    return Part(name, m, n, name)


def target(m: int, n: int, name: str = "layer") -> Target:
    return Target(name, "other", (0,), (part(m, n, name),))


def parameters(format: str, m: int, n: int, rank: int) -> int:
    """Counted from the tensors' shapes."""
    return m * rank + rank * n if format == "low_rank" else rank * n + (m - rank) * rank


# --- counting ---


@pytest.mark.usefixtures("unchecked")
@BOTH
def test_cost_by_rank_and_by_unit(format: str) -> None:
    for m, n in SMALL:
        each = budget.unit_cost(format, part(m, n))
        for rank in range(min(m, n) + 1):
            assert budget.rank_cost(format, part(m, n), rank) == parameters(format, m, n, rank)
            total = rank * each if isinstance(each, int) else int(each[:rank].sum())
            assert total == parameters(format, m, n, rank)


@pytest.mark.usefixtures("unchecked")
@BOTH
def test_largest_rank_and_rank_within_are_exact(format: str) -> None:
    for m, n in SMALL:
        smaller = [r for r in range(min(m, n) + 1) if parameters(format, m, n, r) < m * n]
        assert budget.largest_rank(format, part(m, n)) == smaller[-1]
        for allowed in range(-2, m * n + 3):
            fitting = [r for r in smaller if parameters(format, m, n, r) <= allowed]
            assert budget.rank_within(format, part(m, n), allowed) == (fitting[-1] if fitting else 0)


@pytest.mark.usefixtures("unchecked")
@BOTH
def test_rank_within_is_exact_for_sizes_beyond_float_precision(format: str) -> None:
    rng = random.Random(0)
    for _ in range(300):
        m, n = rng.randint(10**8, 10**9), rng.randint(10**8, 10**9)
        rank = rng.randint(1, budget.largest_rank(format, part(m, n)))
        cost = parameters(format, m, n, rank)
        assert budget.rank_within(format, part(m, n), cost) == rank
        assert budget.rank_within(format, part(m, n), cost - 1) == rank - 1


def test_a_format_without_a_rank_has_no_cost_by_rank() -> None:
    with pytest.raises(ValueError, match=r"low_rank_columns.*low_rank, pivot"):
        budget.rank_cost("low_rank_columns", part(4, 6), 1)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)])
def test_count_is_what_the_built_module_holds(m: int, n: int, bias: bool, format: str) -> None:
    for rank in range(min(m, n) + 1):
        spec = {"format": format, "in": n, "out": m, "bias": bias, "rank": rank}
        if format == "pivot":
            spec["side"] = "rows"
        tensors = FORMATS[format].empty(spec, device="meta").state_dict().values()
        built = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
        assert budget.count(Choice({"layer": format}, {"rank": rank}, bias=bias), target(m, n)) == built


def test_count_of_several_parts_and_of_dense_ones() -> None:
    parts = (part(6, 9, "a"), part(9, 6, "b"))
    both = Target("ab", "ffn", (0,), parts)
    assert budget.count(Choice({"a": "dense", "b": "low_rank"}, {"rank": 2}), both) == 54 + 30
    assert budget.count(Choice({"a": "dense", "b": "dense"}, {}, bias=True), both) == 54 + 6 + 54 + 9


def test_allowed_is_the_floor_of_what_remains() -> None:
    for size in range(2, 60):
        for percent in range(100):
            assert budget.allowed([target(1, size)], percent / 100) == (100 - percent) * size // 100


@pytest.mark.parametrize("dense", [10**6, 7 * 10**10, 10**13])
def test_allowed_is_exact_for_large_models(dense: int) -> None:
    for percent in range(100):
        exact = Fraction(100 - percent, 100) * dense
        assert budget.allowed([target(1, dense)], percent / 100) == exact
        assert budget.allowed([target(1, dense + 1)], percent / 100) == int(exact + Fraction(100 - percent, 100))


def test_allowed_ignores_the_noise_of_a_computed_ratio() -> None:
    assert 0.1 + 0.2 > 0.3 and 0.8 - 0.1 > 0.7
    assert budget.allowed([target(10, 100)], 0.1 + 0.2) == 700
    assert budget.allowed([target(10, 100)], 0.8 - 0.1) == 300


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, 20.0, float("nan")])
def test_allowed_refuses_what_is_no_fraction_to_remove(ratio: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        budget.allowed([target(4, 4)], ratio)


# --- uniform ranks ---


def costs(targets: Sequence[Target], ranks: Mapping[str, int | None], format: str) -> int:
    total = 0
    for each in targets:
        (one,), rank = each.parts, ranks[each.name]
        dense = one.out_features * one.in_features
        total += dense if rank is None else parameters(format, one.out_features, one.in_features, rank)
    return total


def random_targets(rng: random.Random, largest: int = 48) -> list[Target]:
    """Some matrices that can be compressed, several of one shape, in no order."""
    shapes = [(rng.randint(2, largest), rng.randint(3, largest)) for _ in range(rng.randint(1, 3))]
    chosen = [rng.choice(shapes) for _ in range(rng.randint(1, 6))]
    targets = [target(m, n, f"t{i}") for i, (m, n) in enumerate(chosen) if m * n > m + n]
    rng.shuffle(targets)
    return targets or [target(4, 4)]


def lowest(targets: Sequence[Target], format: str, multiple: int) -> int:
    """What the least ranks cost: one step, or what fits below dense."""
    total = 0
    for each in targets:
        m, n = each.parts[0].out_features, each.parts[0].in_features
        total += parameters(format, m, n, min(multiple, budget.largest_rank(format, each.parts[0])))
    return total


def largest_step(targets: Sequence[Target], format: str, multiple: int) -> int:
    """`multiple` times the largest unit."""
    sizes = [(each.parts[0].out_features, each.parts[0].in_features) for each in targets]
    return max(multiple * (m + n if format == "low_rank" else m + n - 1) for m, n in sizes)


@pytest.mark.usefixtures("unchecked")
@BOTH
@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_even_ranks_on_random_shapes(format: str, multiple: int) -> None:
    rng = random.Random(multiple)
    for _ in range(34):  # 204 sets of shapes in all
        targets = random_targets(rng)
        dense, least = sum(t.parameters for t in targets), lowest(targets, format, multiple)
        some, kept = rng.randint(least, dense - 1), 0
        for allowed in sorted({least, some, some + 1, dense - 1, dense}):
            ranks = budget.even_ranks(targets, allowed, format, multiple)
            spent = costs(targets, ranks, format)
            assert spent <= allowed
            assert spent == dense or allowed - spent < largest_step(targets, format, multiple)
            assert spent >= kept, "a larger budget keeps no less"
            kept = spent
            for each in targets:
                top, rank = budget.largest_rank(format, each.parts[0]), ranks[each.name]
                assert rank is None or rank % multiple == 0 or rank == top < multiple
                assert rank is None or 1 <= rank <= top


@pytest.mark.usefixtures("unchecked")
@BOTH
def test_even_ranks_do_not_depend_on_the_order_of_targets(format: str) -> None:
    rng = random.Random(1)
    for _ in range(50):
        targets = random_targets(rng)
        allowed = rng.randint(lowest(targets, format, 1), sum(t.parameters for t in targets))
        found = budget.even_ranks(targets, allowed, format)
        rng.shuffle(targets)
        assert budget.even_ranks(targets, allowed, format) == found


@pytest.mark.usefixtures("unchecked")
@BOTH
def test_nothing_that_still_fits_is_left_out(format: str) -> None:
    rng = random.Random(2)
    for _ in range(100):
        targets = random_targets(rng)
        allowed = rng.randint(lowest(targets, format, 1), sum(t.parameters for t in targets))
        ranks = budget.even_ranks(targets, allowed, format)
        left = allowed - costs(targets, ranks, format)
        for each in targets:
            rank, top = ranks[each.name], budget.largest_rank(format, each.parts[0])
            if rank is not None:
                more = {**ranks, each.name: rank + 1 if rank < top else None}
                assert costs(targets, more, format) - costs(targets, ranks, format) > left


def greedy(targets: Sequence[Target], allowed: int, format: str, multiple: int) -> dict[str, int | None]:
    """The definition, step by step: the smallest share first, then by name; what does not fit ends its matrix."""
    ranks: dict[str, int | None] = {
        each.name: min(multiple, budget.largest_rank(format, each.parts[0])) for each in targets
    }
    open_ones = {each.name: each for each in targets}
    while open_ones:
        steps = []
        for name, each in open_ones.items():
            rank, top = ranks[name], budget.largest_rank(format, each.parts[0])
            assert rank is not None
            following = (rank // multiple + 1) * multiple
            more = {name: following if following <= top else None}
            steps.append((Fraction(costs([each], more, format), each.parameters), name, more))
        _, name, more = min(steps, key=lambda step: step[:2])
        if costs(targets, {**ranks, **more}, format) <= allowed:
            ranks.update(more)
        if ranks[name] != more[name] or ranks[name] is None:
            del open_ones[name]
    return ranks


@BOTH
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.usefixtures("unchecked")
def test_even_ranks_are_those_of_the_definition(format: str, multiple: int) -> None:
    rng = random.Random(4)
    for _ in range(40):
        targets = random_targets(rng, largest=24)
        allowed = rng.randint(lowest(targets, format, multiple), sum(t.parameters for t in targets))
        assert budget.even_ranks(targets, allowed, format, multiple) == greedy(targets, allowed, format, multiple)


@BOTH
def test_shares_are_even(format: str) -> None:
    targets = [target(100, 60, "a"), target(40, 200, "b"), target(80, 80, "c")]
    allowed = budget.allowed(targets, 0.4)
    ranks = budget.even_ranks(targets, allowed, format)
    for each in targets:
        share = costs([each], ranks, format) / each.parameters
        one_unit = (each.parts[0].out_features + each.parts[0].in_features) / each.parameters
        assert abs(share - 0.6) <= 2 * one_unit


def test_equal_matrices_get_ranks_that_differ_by_one_and_ties_go_by_name() -> None:
    targets = [target(10, 14, name) for name in "cab"]
    ranks = budget.even_ranks(targets, 3 * 3 * 24 + 24, "low_rank")
    assert ranks == {"a": 4, "b": 3, "c": 3}


@BOTH
@pytest.mark.parametrize("multiple", [1, 8])
def test_ratio_0_leaves_everything_dense(format: str, multiple: int) -> None:
    targets = [target(10, 14, "a"), target(30, 20, "b")]
    allowed = budget.allowed(targets, 0.0)
    ranks = budget.even_ranks(targets, allowed, format, multiple)
    assert ranks == {"a": None, "b": None}
    plan = budget.rank_plan(targets, ranks, format, allowed)
    assert not plan.choices and plan.spent == plan.budget == 140 + 600


@pytest.mark.usefixtures("unchecked")
@BOTH
@pytest.mark.parametrize("multiple", [1, 8])
def test_an_infeasible_ratio_names_the_largest_one_that_is_possible(format: str, multiple: int) -> None:
    rng = random.Random(3)
    for _ in range(25):
        targets = random_targets(rng)
        with pytest.raises(ValueError, match="ratio too large") as error:
            budget.even_ranks(targets, lowest(targets, format, multiple) - 1, format, multiple)
        found = re.search(r"largest possible ratio here is (\d\.\d+)$", str(error.value))
        assert found is not None
        largest = Fraction(found.group(1))
        budget.even_ranks(targets, budget.allowed(targets, float(largest)), format, multiple)
        beyond = float(largest + Fraction(1, 10_000))
        with pytest.raises(ValueError, match="ratio too large"):
            budget.even_ranks(targets, budget.allowed(targets, beyond), format, multiple)


@BOTH
def test_a_matrix_that_no_rank_makes_smaller_stays_dense_and_is_counted(format: str) -> None:
    targets = [target(1, 10, "row"), target(20, 30, "matrix")]
    for ratio in (0.1, 0.5, 0.8):
        allowed = budget.allowed(targets, ratio)
        ranks = budget.even_ranks(targets, allowed, format)
        assert ranks["row"] is None
        assert costs(targets, ranks, format) <= allowed
    with pytest.raises(ValueError, match=r"largest possible ratio here is 0\.0$"):
        budget.even_ranks([target(1, 10)], 8, format)


@BOTH
def test_a_plan_of_ranks_counts_what_it_spends(format: str) -> None:
    targets = [target(10, 14, "a"), target(30, 20, "b")]
    plan = budget.rank_plan(targets, {"a": 3, "b": None}, format, 700)
    assert plan.choices == {"a": Choice({"a": format}, {"rank": 3})}
    assert plan.spent == parameters(format, 10, 14, 3) + 600
    assert plan.budget == 700


def test_unit_costs_of_the_pivot_form_fall_by_two() -> None:
    each = budget.unit_cost("pivot", part(5, 7))
    assert isinstance(each, torch.Tensor)
    assert each.tolist() == [11, 9, 7, 5, 3]
