"""Robust PCA: planted parts, its symmetries, its trend with λ, odd shapes; the refit; the benchmark at toy size."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import rpca as benchmark
from spectrim.core.rpca import Decomposed, refit, robust_pca

MODES = pytest.mark.parametrize("mode", ["fixed", "inexact"])
SHAPES = [(20, 32), (36, 16), (24, 24), (1, 9), (9, 1), (1, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(size: int = 160, rank: int = 5, density: float = 0.05) -> tuple[Tensor, Tensor]:
    """A low-rank and a sparse matrix, entries of both of one order of size."""
    chosen = torch.rand(size, size, generator=torch.Generator().manual_seed(3)) < density
    low_rank = random(size, rank, seed=1) @ random(rank, size, seed=2)
    return low_rank, 5 * random(size, size, seed=4).sign() * chosen


def whole(found: Decomposed) -> Tensor:
    return found.left @ found.right + found.sparse


def objective(low_rank: Tensor, weight: Tensor) -> float:
    """‖L‖_* + λ ‖W − L‖_1."""
    return float(torch.linalg.svdvals(low_rank).sum() + (weight - low_rank).abs().sum() / math.sqrt(max(weight.shape)))


@MODES
def test_planted_parts_are_recovered(mode: Any) -> None:
    low_rank, sparse = planted()
    found = robust_pca(low_rank + sparse, mode=mode, tolerance=1e-8)
    assert found.residual < 1e-6 and found.iterations < 100
    assert found.left.shape[1] == 5
    assert torch.equal(found.sparse != 0, sparse != 0)
    torch.testing.assert_close(found.left @ found.right, low_rank, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sparse, sparse, rtol=0, atol=1e-5)


@MODES
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_have_their_form_and_the_residual_is_the_true_one(mode: Any, shape: tuple[int, int]) -> None:
    weight = random(*shape)
    found = robust_pca(weight, mode=mode)
    r = found.left.shape[1]
    assert found.right.shape == (r, shape[1]) and r <= min(shape)
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-8)
    sizes = found.right.norm(dim=1)
    unit = found.right / sizes[:, None]
    torch.testing.assert_close(unit @ unit.T, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-8)
    assert (sizes.diff() <= 1e-12).all()
    gap = weight - whole(found)
    assert found.residual == pytest.approx(float(gap.norm() / weight.norm()), rel=1e-6, abs=1e-14)
    assert found.residual <= 1e-4
    assert (gap[found.sparse != 0].abs() <= 1e-14 * weight.abs().max()).all(), "where S is, nothing is left"


@MODES
def test_iterations_bound_the_work_and_the_residual_falls(mode: Any) -> None:
    weight = random(40, 56)
    found = [robust_pca(weight, mode=mode, tolerance=0.0, iterations=n) for n in (1, 3, 10, 30)]
    assert [each.iterations for each in found] == [1, 3, 10, 30]
    residuals = [each.residual for each in found]
    assert residuals == sorted(residuals, reverse=True) and residuals[-1] < 0.01
    early = robust_pca(weight, mode=mode, tolerance=2 * residuals[2], iterations=100)
    assert early.iterations <= 12 and early.residual <= 2 * residuals[2]


def test_the_objective_falls_to_its_least() -> None:
    """Below that of the planted parts, and of either part alone."""
    low_rank, sparse = planted(60, 3, 0.1)
    weight = low_rank + sparse + 0.1 * random(60, 60, seed=8)
    late = []
    for iterations in (25, 50, 100, 200):
        found = robust_pca(weight, tolerance=0.0, iterations=iterations)
        late.append(objective(found.left @ found.right, weight))
    assert all(after <= before * (1 + 1e-7) for before, after in itertools.pairwise(late))
    assert late[-2] - late[-1] < 3e-4 * late[-1]
    others = [objective(other, weight) for other in (low_rank, weight - sparse, weight, torch.zeros(60, 60))]
    assert late[-1] < min(others)


@MODES
def test_scaling_carries_over(mode: Any) -> None:
    weight = random(24, 40)
    found = robust_pca(weight, mode=mode)
    for factor in (4.0, 2.0**-200, 2.0**300):
        scaled = robust_pca(weight * factor, mode=mode)
        assert scaled.iterations == found.iterations and torch.equal(scaled.left, found.left)
        assert torch.equal(scaled.sparse, found.sparse * factor) and torch.equal(scaled.right, found.right * factor)
    odd = robust_pca(weight * 0.37, mode=mode)
    torch.testing.assert_close(odd.sparse, 0.37 * found.sparse, rtol=0, atol=1e-9)


@MODES
@pytest.mark.parametrize("shape", [(24, 40), (24, 24)])
def test_transposing_and_signs_carry_over(mode: Any, shape: tuple[int, int]) -> None:
    weight = random(*shape)
    found, turned = robust_pca(weight, mode=mode), robust_pca(weight.T, mode=mode)
    torch.testing.assert_close(turned.sparse, found.sparse.T, rtol=0, atol=1e-9)
    torch.testing.assert_close(turned.left @ turned.right, (found.left @ found.right).T, rtol=0, atol=1e-9)
    rows, columns = random(shape[0], seed=5).sign(), random(shape[1], seed=6).sign()
    flipped = robust_pca(weight * rows[:, None] * columns, mode=mode)
    torch.testing.assert_close(flipped.sparse, found.sparse * rows[:, None] * columns, rtol=0, atol=1e-9)


def test_a_larger_penalty_gives_a_larger_rank_and_fewer_entries() -> None:
    weight, ranks, densities = random(48, 48), [], []
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        found = robust_pca(weight, factor / math.sqrt(48))
        ranks.append(found.left.shape[1])
        densities.append(float((found.sparse != 0).double().mean()))
    assert ranks == sorted(ranks) and densities == sorted(densities, reverse=True)
    assert ranks[0] == 0 and densities[0] > 0.99 and 0.4 < densities[2] < 0.7 and densities[-1] < 0.05


@MODES
def test_a_zero_weight_has_empty_parts(mode: Any) -> None:
    found = robust_pca(torch.zeros(5, 7), mode=mode)
    assert found.left.shape == (5, 0) and found.right.shape == (0, 7)
    assert not found.sparse.any() and found.residual == 0 and found.iterations == 0


@MODES
def test_float32_and_bfloat16_are_read_exactly_and_left_alone(mode: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = random(12, 20).to(dtype)
        before, found = weight.clone(), robust_pca(weight, mode=mode)
        assert torch.equal(weight, before) and found.sparse.dtype == torch.float64
        assert torch.equal(found.sparse, robust_pca(weight.double(), mode=mode).sparse)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        robust_pca(random(4, 4).index_fill(0, torch.tensor([1]), value))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": 0.0}, "penalty is 0.0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"iterations": 0}, "iterations 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        robust_pca(random(4, 4), **settings)


# --- refit ---


def cut_parts(shape: tuple[int, int], rank: int, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A weight, and the first directions and largest entries of its parts."""
    weight = random(*shape) + 3 * random(shape[0], 2, seed=1) @ random(2, shape[1], seed=2)
    found = robust_pca(weight)
    places = found.sparse.flatten().abs().argsort(descending=True, stable=True)[:number]
    return weight, found.left[:, :rank], found.right[:rank], places, found.sparse.flatten()[places]


def error(weight: Tensor, left: Tensor, right: Tensor, places: Tensor, values: Tensor, metric: Tensor | None) -> float:
    gap = weight - left @ right
    gap.view(-1)[places] -= values
    return float((gap.square() * (1.0 if metric is None else metric)).sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(20, 32), (36, 16)])
@pytest.mark.parametrize(("rank", "number"), [(3, 100), (0, 100), (3, 0), (0, 0)])
def test_refitting_never_raises_the_error(shape: tuple[int, int], rank: int, number: int, weighted: bool) -> None:
    weight, left, right, places, values = cut_parts(shape, rank, number)
    metric = random(shape[1], seed=9).exp() if weighted else None
    errors = [error(weight, left, right, places, values, metric)]
    for alternations in (1, 2, 5, 20):
        a, b, c = refit(weight, left, right, places, metric, alternations)
        assert a.shape == left.shape and b.shape == right.shape
        errors.append(error(weight, a, b, places, c, metric))
        assert torch.equal(c, (weight - a @ b).flatten()[places]), "S is exactly what L leaves there"
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    if rank and number:
        assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_each_part_of_a_refit_is_the_optimum_for_the_other(weighted: bool) -> None:
    weight, left, right, places, _ = cut_parts((20, 32), 3, 100)
    metric = random(32, seed=9).exp() if weighted else torch.ones(32, dtype=torch.float64)
    left, right, values = refit(weight, left, right, places, metric if weighted else None, 400)
    rest = weight.flatten().clone()
    rest[places] -= values
    sizes = torch.linalg.svdvals(rest.view_as(weight) * metric.sqrt())
    assert error(weight, left, right, places, values, metric) == pytest.approx(
        float(sizes[3:].square().sum()), rel=1e-6
    )


# --- benchmark ---


@MODES
def test_benchmark(mode: Any) -> None:
    data = benchmark.case(24, mode, 1).to_json()
    assert 0 < data["min"] <= data["value"] and data["repeats"] == 1
    assert data["details"]["residual"] <= benchmark.TOLERANCE and set(data["details"]["seconds"]) == {
        "ours", "kernels", "svd",
    }  # fmt: skip


def test_the_benchmarks_kernel_is_the_decomposition() -> None:
    matrix = random(12, 20)
    right = benchmark.kernels(matrix, 1)
    _, _, exact = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close((right.flip(0) * exact).sum(1).abs(), torch.ones(12, dtype=torch.float64))
