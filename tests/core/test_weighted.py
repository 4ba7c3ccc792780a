"""The solvers under weights by entry: against closed forms, brute force and a plain loop of the published iteration."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spectrim.core import weighted
from spectrim.core.weighted import Fit, als, dispersion, em, floored, majorant, objective, refit, solve

SHAPES = pytest.mark.parametrize("shape", [(12, 20), (15, 15), (22, 9), (1, 7), (7, 1)], ids=str)
SOLVERS = pytest.mark.parametrize("solver", [em, als], ids=["em", "als"])
Solve = Callable[..., Fit]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heavy(*shape: int, seed: int = 1) -> Tensor:
    """Weights over many orders of magnitude, a tenth of them 0."""
    fisher = (2 * random(*shape, seed=seed)).exp()
    return fisher * (random(*shape, seed=seed + 100) > -1.28)


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def scaled(weight: Tensor, rows: Tensor, columns: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The optimum for F = rows columnsᵀ: the SVD scaled on both sides."""
    left, right = truncated(rows.sqrt()[:, None] * weight * columns.sqrt(), rank)
    return left / rows.sqrt()[:, None], right / columns.sqrt()


def by_columns(weight: Tensor, fisher: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """FWSVD, where no column is 0."""
    return scaled(weight, torch.ones_like(fisher[:, 0]), fisher.sum(0) + 1e-6 * fisher.mean(), rank)


def error_of(weight: Tensor, fisher: Tensor, fit: Fit) -> float:
    return float((fisher * (weight - fit.left @ fit.right) ** 2).sum())


# --- the weights ---


def test_the_objective_is_the_weighted_sum_of_squares() -> None:
    weight, fisher, left, right = random(3, 4), heavy(3, 4), random(3, 2, seed=2), random(2, 4, seed=3)
    expected = sum(
        float(fisher[o, j]) * float(weight[o, j] - left[o] @ right[:, j]) ** 2 for o in range(3) for j in range(4)
    )
    assert objective(weight, fisher, left, right) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(40,), (8, 5)], ids=str)
def test_floors_add_a_part_of_the_mean_and_cap_the_ratio_of_weights(shape: tuple[int, ...]) -> None:
    fisher = random(*shape).square()
    fisher.view(-1)[3] = 0
    expected = fisher + 1e-6 * fisher.mean()
    torch.testing.assert_close(floored(fisher, 1e9), expected / expected.max(), rtol=1e-12, atol=0)
    capped = floored(fisher, 10.0)
    assert float(capped.max()) == 1.0 and float(capped.min()) == pytest.approx(1e-2, rel=1e-12)
    inside = capped > 1.1e-2
    torch.testing.assert_close(capped[inside], (expected / expected.max())[inside], rtol=1e-12, atol=0)
    assert torch.equal(floored(fisher, 1.0), torch.ones(*shape, dtype=torch.float64)), "no spread is plain SVD"


@pytest.mark.parametrize("constant", [1e-38, 1e-4, 1e30])
def test_floors_do_not_depend_on_the_scale(constant: float) -> None:
    fisher = random(6, 7).square()
    torch.testing.assert_close(floored(constant * fisher, 1e4), floored(fisher, 1e4), rtol=1e-12, atol=0)


def test_no_information_at_all_weighs_all_alike() -> None:
    assert torch.equal(floored(torch.zeros(3, 4), 1e4), torch.ones(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_values_that_are_no_information_are_refused(bad: float) -> None:
    fisher = torch.ones(3, 4)
    fisher[1, 2] = bad
    with pytest.raises(ValueError, match="must be finite and not below 0"):
        floored(fisher, 1e4)


def test_dispersion_is_the_variance_within_columns_over_the_mean_squared() -> None:
    assert dispersion(torch.tensor([[1.0, 5.0], [1.0, 5.0], [1.0, 5.0]])) == 0
    fisher = torch.tensor([[1.0, 2.0], [3.0, 2.0]])  # variances 1 and 0, mean 2
    assert dispersion(fisher) == pytest.approx(0.5 / 4) == pytest.approx(dispersion(7 * fisher))
    assert math.isnan(dispersion(torch.zeros(2, 2)))


@SHAPES
def test_a_majorant_is_above_and_touches_every_row_and_column(shape: tuple[int, int]) -> None:
    fisher = heavy(*shape)
    rows, columns = majorant(fisher)
    ratio = fisher / (rows[:, None] * columns)
    assert (rows > 0).all() and (columns > 0).all() and float(ratio.max()) <= 1
    for largest, living in ((ratio.amax(1), fisher.sum(1) > 0), (ratio.amax(0), fisher.sum(0) > 0)):
        torch.testing.assert_close(largest[living], torch.ones_like(largest[living]), rtol=1e-12, atol=0)


def test_a_majorant_of_rank_one_is_the_matrix_itself() -> None:
    fisher = torch.outer(random(9, seed=1).exp(), (2 * random(13, seed=2)).exp())
    rows, columns = majorant(fisher)
    torch.testing.assert_close(torch.outer(rows, columns), fisher, rtol=1e-12, atol=0)


# --- every step ---


@SOLVERS
@SHAPES
def test_no_step_from_any_place_raises_the_objective(solver: Solve, shape: tuple[int, int]) -> None:
    """Single steps, so that one refused for a rise would be missing from the history."""
    for seed in range(6):
        weight, fisher, rank = random(*shape), heavy(*shape, seed=seed), max(1, min(shape) // 3)
        left, right = random(shape[0], rank, seed=seed), random(rank, shape[1], seed=seed + 9)
        before = objective(weight, fisher, left, right)
        fit = solver(weight, fisher, left, right, 1, 0.0)
        assert fit.history == pytest.approx((before, error_of(weight, fisher, fit)), rel=1e-9)
        assert fit.history[1] < before


@SOLVERS
@pytest.mark.parametrize("shape", [(12, 20), (15, 15), (22, 9)], ids=str)
def test_the_history_falls_and_ends_at_what_the_factors_have(solver: Solve, shape: tuple[int, int]) -> None:
    weight, fisher, rank = random(*shape), heavy(*shape), min(shape) // 3
    start = by_columns(weight, fisher, rank)
    fit = solver(weight, fisher, *start, 60, 0.0)
    history = torch.tensor(fit.history, dtype=torch.float64)
    assert (history.diff() < 0).all() and len(history) > 10
    assert fit.history[0] == pytest.approx(objective(weight, fisher, *start), rel=1e-9)
    assert fit.history[-1] == pytest.approx(error_of(weight, fisher, fit), rel=1e-9, abs=1e-12)
    assert fit.left.shape == (shape[0], rank) and fit.right.shape == (rank, shape[1])


def test_a_refit_is_the_weighted_least_squares_answer_of_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fisher, right = random(11, 14), heavy(11, 14) + 0.01, random(3, 14, seed=5)
    answers = []
    for at_once in (1, 10**6):
        monkeypatch.setattr(weighted, "AT_ONCE", at_once)
        left, basis = refit(weight, fisher, random(11, 3, seed=6), right)
        torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
        answers.append(left @ basis)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-12, atol=1e-12)
    for o in range(11):
        root = fisher[o].sqrt()
        best = torch.linalg.lstsq((right * root).T, (weight[o] * root)[:, None]).solution[:, 0]
        torch.testing.assert_close(answers[0][o], best @ right, rtol=1e-7, atol=1e-8)


def test_a_refit_leaves_what_no_weight_asks_for() -> None:
    weight, left, right = random(6, 8), random(6, 2, seed=2), random(2, 8, seed=3)
    fisher = heavy(6, 8)
    fisher[4] = 0
    moved, basis = refit(weight, fisher, left, right)
    torch.testing.assert_close((moved @ basis)[4], left[4] @ right)
    assert not torch.allclose((moved @ basis)[0], left[0] @ right)


# --- where the answer is known ---


@SOLVERS
@SHAPES
def test_constant_weights_give_the_plain_svd(solver: Solve, shape: tuple[int, int]) -> None:
    weight, rank = random(*shape), max(1, min(shape) // 3)
    fisher = torch.full(shape, 0.3, dtype=torch.float64)
    start = random(shape[0], rank, seed=3), random(rank, shape[1], seed=4)
    fit = solver(weight, fisher, *start, 1 if solver is em else 3000, 0.0)
    left, right = truncated(weight, rank)
    torch.testing.assert_close(fit.left @ fit.right, left @ right, atol=1e-6, rtol=1e-6)


@SOLVERS
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_weights_of_rank_one_give_the_svd_scaled_on_both_sides(solver: Solve, rank: int) -> None:
    weight = random(14, 18)
    rows, columns = (1.5 * random(14, seed=1)).exp(), (1.5 * random(18, seed=2)).exp()
    fisher = torch.outer(rows, columns)
    left, right = scaled(weight, rows, columns, rank)
    best, start = objective(weight, fisher, left, right), by_columns(weight, fisher, rank)
    assert objective(weight, fisher, *start) > 1.05 * best, "something is left to find"
    fit = solver(weight, fisher, *start, 1 if solver is em else 5000, 0.0)
    assert fit.history[-1] == pytest.approx(best, rel=1e-9)
    torch.testing.assert_close(fit.left @ fit.right, left @ right, atol=1e-5, rtol=1e-5)


@SOLVERS
def test_the_least_of_a_small_problem_is_found(solver: Solve) -> None:
    """Rank 1 of two columns: the best left for a right (cos t, sin t) has a closed form, so t can be tried out."""
    angles = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    right = torch.stack([angles.cos(), angles.sin()], 1)
    for seed in range(5):
        weight, fisher = random(5, 2, seed=seed), 0.2 + random(5, 2, seed=seed + 50).square()
        left = ((fisher * weight) @ right.T) / (fisher @ right.T.square())
        tried = (fisher[:, None] * (weight[:, None] - left[:, :, None] * right) ** 2).sum((0, 2))
        fit = solver(weight, fisher, *by_columns(weight, fisher, 1), 2000, 0.0)
        assert fit.history[-1] == pytest.approx(float(tried.min()), rel=1e-5)


@SOLVERS
def test_it_ends_where_the_gradient_is_0(solver: Solve) -> None:
    weight, fisher = random(16, 12), heavy(16, 12) + 0.05
    fit = solver(weight, fisher, *by_columns(weight, fisher, 4), 5000, 0.0)
    slope = fisher * (weight - fit.left @ fit.right)
    for of_factor, other in ((slope @ fit.right.T, fit.right), (fit.left.T @ slope, fit.left)):
        assert of_factor.norm() <= 1e-4 * (fisher * weight).norm() * other.norm()


@SOLVERS
def test_entries_without_weight_are_filled_in(solver: Solve) -> None:
    """A matrix of rank 2 with noise where nothing weighs: the solvers see through it, weights by column do not."""
    exact = random(30, 2, seed=1) @ random(2, 24, seed=2)
    known = random(30, 24, seed=3) > -0.6
    weight, fisher = torch.where(known, exact, 3 * random(30, 24, seed=4)), known.double()
    start = by_columns(weight, fisher, 2)
    assert (start[0] @ start[1] - exact).norm() > 0.3 * exact.norm()
    fit = solver(weight, fisher, *start, 3000, 0.0)
    assert (fit.left @ fit.right - exact).norm() < 1e-4 * exact.norm()


@SOLVERS
def test_full_rank_is_exact(solver: Solve) -> None:
    weight, fisher = random(7, 12), heavy(7, 12) + 1e-2
    fit = solver(weight, fisher, random(7, 7, seed=2), random(7, 12, seed=3), 1000, 0.0)
    assert fit.history[-1] <= 1e-12 * float((fisher * weight**2).sum())


def published(weight: Tensor, fisher: Tensor, start: tuple[Tensor, Tensor], steps: int) -> list[Tensor]:
    """Srebro and Jaakkola's iteration as they have it."""
    found, share = start[0] @ start[1], fisher / fisher.max()
    all_found = []
    for _ in range(steps):
        left, right = truncated(share * weight + (1 - share) * found, start[0].shape[1])
        found = left @ right
        all_found.append(found)
    return all_found


def test_under_a_constant_majorant_the_first_step_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fisher = random(20, 26), heavy(20, 26)
    start = by_columns(weight, fisher, 6)

    def constant(fisher: Tensor) -> tuple[Tensor, Tensor]:
        return fisher.max().expand(len(fisher)), torch.ones_like(fisher[0])

    monkeypatch.setattr(weighted, "majorant", constant)
    fit = em(weight, fisher, *start, 1, 0.0)
    torch.testing.assert_close(fit.left @ fit.right, published(weight, fisher, start, 1)[0])


def test_the_majorant_and_the_acceleration_save_steps() -> None:
    weight, fisher = random(20, 26), heavy(20, 26)
    start = by_columns(weight, fisher, 6)
    slow = [float((fisher * (weight - found) ** 2).sum()) for found in published(weight, fisher, start, 200)]
    assert (torch.tensor(slow, dtype=torch.float64).diff() < 0).all()
    assert em(weight, fisher, *start, 40, 0.0).history[-1] < slow[-1]


# --- edges ---


@SOLVERS
def test_a_scale_of_the_weights_changes_nothing(solver: Solve) -> None:
    weight, fisher = random(9, 14), heavy(9, 14)
    start = by_columns(weight, fisher, 3)
    one, other = (solver(weight, c * fisher, *start, 20, 0.0) for c in (1.0, 1e-25))
    torch.testing.assert_close(one.left @ one.right, other.left @ other.right, rtol=1e-6, atol=1e-6)


@SOLVERS
@pytest.mark.parametrize("kind", ["zero weight", "zero fisher", "one entry", "dead column", "dead row", "rank below"])
def test_nothing_breaks_on_odd_matrices(solver: Solve, kind: str) -> None:
    weight, fisher = random(9, 14), heavy(9, 14)
    if kind == "zero weight":
        weight = torch.zeros_like(weight)
    elif kind == "zero fisher":
        fisher = torch.zeros_like(fisher)
    elif kind == "one entry":
        fisher = torch.zeros_like(fisher).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(1.0).double())
    elif kind == "dead column":
        fisher[:, [0, 5]] = 0
    elif kind == "dead row":
        fisher[[0, 5]] = 0
    else:
        weight = random(9, 2) @ random(2, 14, seed=1)
    kept = weight.clone(), fisher.clone()
    start = truncated(weight, 4)
    fit = solver(weight, fisher, *start, 30, 0.0)
    assert fit.left.isfinite().all() and fit.right.isfinite().all()
    assert error_of(weight, fisher, fit) <= objective(weight, fisher, *start) * (1 + 1e-12)
    assert torch.equal(weight, kept[0]) and torch.equal(fisher, kept[1])
    if kind == "one entry":
        assert error_of(weight, fisher, fit) <= 1e-6 * objective(weight, fisher, *start)


@SOLVERS
def test_steps_and_tolerance_end_it(solver: Solve) -> None:
    weight, fisher = random(12, 20), heavy(12, 20)
    start = by_columns(weight, fisher, 4)
    none = solver(weight, fisher, *start, 0, 0.0)
    assert none.left is start[0] and none.right is start[1] and len(none.history) == 1
    assert len(solver(weight, fisher, *start, 7, 0.0).history) == 8
    fit = solver(weight, fisher, *start, 500, 1e-2)
    falls = [1 - after / before for before, after in zip(fit.history, fit.history[1:], strict=False)]
    assert falls[-1] < 1e-2 <= min(falls[:-1]) and len(falls) < 500
    exact = truncated(start[0] @ start[1], 4)
    assert solver(start[0] @ start[1], fisher, *exact, 50, 0.0).left is exact[0], "nothing is left to gain"


def test_both_is_one_after_the_other_and_em_alone_at_large_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fisher = random(12, 20), heavy(12, 20)
    start = by_columns(weight, fisher, 4)
    first, second = (solve(weight, fisher, *start, name, 5, 0.0) for name in ("em", "als"))
    assert first.history == em(weight, fisher, *start, 5, 0.0).history
    assert second.history == als(weight, fisher, *start, 5, 0.0).history
    both = solve(weight, fisher, *start, "both", 5, 0.0)
    assert both.history[:6] == first.history and len(both.history) == 11
    assert (torch.tensor(both.history, dtype=torch.float64).diff() < 0).all()
    assert both.history[-1] == pytest.approx(error_of(weight, fisher, both), rel=1e-12)
    monkeypatch.setattr(weighted, "LARGEST_RANK", 3)
    assert solve(weight, fisher, *start, "both", 5, 0.0).history == first.history
