"""The optimum in a metric on both sides, against alternating least squares and against the one-sided one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectrim.core.linalg import damped, directions, roots, shrunk, two_sided

SHAPES = pytest.mark.parametrize("shape", [(7, 11), (9, 9), (13, 6), (1, 5), (5, 1)])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def semidefinite(size: int, seed: int) -> Tensor:
    """Eigenvalues over four orders of magnitude."""
    basis = torch.linalg.qr(random(size, size, seed=seed)).Q
    return (basis * torch.logspace(0, -4, size, dtype=torch.float64)) @ basis.T


def error(difference: Tensor, gram: Tensor, output: Tensor) -> float:
    return float((output @ difference @ gram * difference).sum())


def alternating(weight: Tensor, gram: Tensor, output: Tensor, rank: int, seed: int) -> float:
    """The error that exact steps on one factor at a time end at; the gradient of each is set to 0 in turn."""
    left = random(len(weight), rank, seed=seed)
    for _ in range(3000):
        right = torch.linalg.solve(left.T @ output @ left, left.T @ output @ weight)
        left = torch.linalg.solve(right @ gram @ right.T, right @ gram @ weight.T).T
    return error(weight - left @ right, gram, output)


@pytest.mark.parametrize("shape", [(7, 11), (9, 9), (13, 6)])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_what_alternating_least_squares_end_at(shape: tuple[int, int], rank: int) -> None:
    weight, gram, output = random(*shape), semidefinite(shape[1], 1), semidefinite(shape[0], 2)
    left, right, energies = two_sided(weight, gram, output)
    found = error(weight - left[:, :rank] @ right[:rank], gram, output)
    assert found == pytest.approx(float(energies[rank:].sum()), rel=1e-8)
    best = min(alternating(weight, gram, output, rank, seed) for seed in (3, 4, 5))
    assert found == pytest.approx(best, rel=1e-5) and found <= best * (1 + 1e-9)


@SHAPES
def test_every_rank_has_the_predicted_error_and_all_are_the_weight(shape: tuple[int, int]) -> None:
    weight, gram, output = random(*shape), semidefinite(shape[1], 1), semidefinite(shape[0], 2)
    left, right, energies = two_sided(weight, gram, output)
    assert left.shape == (shape[0], min(shape)) and right.shape == (min(shape), shape[1])
    assert bool((energies.diff() <= 0).all())
    torch.testing.assert_close(left.norm(dim=0), torch.ones(min(shape), dtype=torch.float64))
    torch.testing.assert_close(left @ right, weight, rtol=0, atol=1e-9)
    for rank in range(min(shape) + 1):
        found = error(weight - left[:, :rank] @ right[:rank], gram, output)
        assert found == pytest.approx(float(energies[rank:].sum()), rel=1e-7, abs=1e-12 * float(energies.sum()))


@SHAPES
@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_without_a_metric_on_outputs_it_is_one_sided(shape: tuple[int, int], size: float) -> None:
    weight, gram = random(*shape), semidefinite(shape[1], 1)
    expected, energies = directions(weight, gram)
    left, right, found = two_sided(weight, gram, size * torch.eye(shape[0], dtype=torch.float64))
    torch.testing.assert_close(found, size * energies, rtol=1e-9, atol=1e-14 * size * float(energies.sum()))
    for rank in range(min(shape) + 1):
        torch.testing.assert_close(left[:, :rank] @ right[:rank], expected[:, :rank] @ (expected[:, :rank].T @ weight))


@SHAPES
def test_a_weight_of_low_rank_is_whole_at_that_rank_also_in_singular_metrics(shape: tuple[int, int]) -> None:
    out, width = shape
    rank = min(2, out, width)
    weight = random(out, rank, seed=6) @ random(rank, width, seed=7)
    output = damped(random(out, 1, seed=8) @ random(1, out, seed=8), 0.3)
    left, right, energies = two_sided(weight, semidefinite(width, 1), output)
    torch.testing.assert_close(left[:, :rank] @ right[:rank], weight, rtol=0, atol=1e-8)
    assert bool((energies[rank:] <= 1e-12 * energies.sum()).all())
    # B alone, of rank 1: floored, so that everything is finite and all ranks are still the weight
    left, right, _ = two_sided(weight, torch.zeros(width, width), random(out, 1, seed=8) @ random(1, out, seed=8))
    torch.testing.assert_close(left @ right, weight, rtol=0, atol=1e-4)


@SHAPES
def test_outputs_that_nothing_depends_on_have_no_energy_and_directions_of_the_inputs(shape: tuple[int, int]) -> None:
    weight, gram = random(*shape), semidefinite(shape[1], 1)
    left, right, energies = two_sided(weight, gram, torch.zeros(shape[0], shape[0]))
    assert torch.equal(left, directions(weight, gram)[0]) and not energies.any()
    torch.testing.assert_close(left @ right, weight)


def test_roots_and_their_floor() -> None:
    matrix = semidefinite(6, 1)
    root, inverse = roots(matrix, 1e-12)
    torch.testing.assert_close(root @ root, matrix, rtol=0, atol=1e-14)
    torch.testing.assert_close(root @ inverse, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10)
    _, inverse = roots(torch.diag(torch.tensor([4.0, 0.0, -1e-9])), 0.25)
    torch.testing.assert_close(inverse, torch.diag(torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)))
    with pytest.raises(ValueError, match="no inverse root"):
        roots(torch.zeros(3, 3), 1e-12)


def test_damping_and_shrinking() -> None:
    matrix = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    before = matrix.clone()
    assert damped(matrix, 0.5).tolist() == [[4, 1], [1, 2]]
    assert damped(matrix, 0.0).tolist() == matrix.tolist()
    assert shrunk(matrix, 0.5, "diagonal").tolist() == [[3, 0.5], [0.5, 1]]
    assert shrunk(matrix, 0.5, "identity").tolist() == [[2.5, 0.5], [0.5, 1.5]]
    assert shrunk(matrix, 1.0, "identity").tolist() == [[2, 0], [0, 2]]
    assert torch.equal(matrix, before)
