"""What is decomposed in a weight's place, against alternating least squares and the splitting of the error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectrim.core.linalg import pulled, roots, two_sided
from tests.core.test_linalg_two_sided import random, semidefinite

SHAPES = pytest.mark.parametrize("shape", [(7, 11), (9, 9), (13, 6)])
TOKENS = 200


def streams(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs of the compressed stream and what the dense one has at its output; tokens in columns."""
    weight, dense = random(*shape), random(shape[1], TOKENS, seed=1)
    return weight, dense + 0.5 * random(shape[1], TOKENS, seed=2), weight @ dense


def wanted(weight: Tensor, inputs: Tensor, outputs: Tensor, share: float) -> Tensor:
    return share * outputs + (1 - share) * weight @ inputs


def alternating(aim: Tensor, inputs: Tensor, output: Tensor, rank: int, seed: int) -> float:
    """‖B^½ (aim − W′ x′)‖² after exact steps on one factor at a time."""
    left, gram = random(len(aim), rank, seed=seed), inputs @ inputs.T
    solved = torch.linalg.solve(gram, inputs @ aim.T).T
    for _ in range(3000):
        right = torch.linalg.solve(left.T @ output @ left, left.T @ output @ solved)
        left = torch.linalg.solve(right @ gram @ right.T, right @ gram @ solved.T).T
    return float(((aim - left @ right @ inputs) * (output @ (aim - left @ right @ inputs))).sum())


@SHAPES
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_decomposed_it_is_what_alternating_least_squares_end_at(shape: tuple[int, int], share: float) -> None:
    weight, inputs, outputs = streams(shape)
    output, gram, rank = semidefinite(shape[0], 3), inputs @ inputs.T, 2
    aim = wanted(weight, inputs, outputs, share)
    instead = pulled(weight, gram, (outputs - weight @ inputs) @ inputs.T, share, 0.0)
    left, right, _ = two_sided(instead, gram, output)
    missed = aim - left[:, :rank] @ right[:rank] @ inputs
    found = float((missed * (output @ missed)).sum())
    best = min(alternating(aim, inputs, output, rank, seed) for seed in (4, 5, 6))
    assert found == pytest.approx(best, rel=1e-8)


@SHAPES
@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_splits_into_what_no_matrix_reaches_and_what_is_cut(shape: tuple[int, int], rank: int) -> None:
    weight, inputs, outputs = streams(shape)
    output, gram, share = semidefinite(shape[0], 3), inputs @ inputs.T, 0.7
    aim = wanted(weight, inputs, outputs, share)
    instead = pulled(weight, gram, (outputs - weight @ inputs) @ inputs.T, share, 0.0)
    left, right, energies = two_sided(instead, gram, output)
    root = roots(output, 1e-12)[0]
    unreachable = float((root @ (aim - instead @ inputs)).square().sum())
    whole = float((root @ (aim - left[:, :rank] @ right[:rank] @ inputs)).square().sum())
    assert unreachable > 1 and whole == pytest.approx(unreachable + float(energies[rank:].sum()), rel=1e-10)
    # no matrix does better: not the weight, not one a step away
    for other in (weight, instead + 1e-3 * random(*shape, seed=7)):
        assert float((root @ (aim - other @ inputs)).square().sum()) > unreachable


@SHAPES
def test_what_is_aimed_at_decides(shape: tuple[int, int]) -> None:
    weight, inputs, outputs = streams(shape)
    gram, missed = inputs @ inputs.T, (outputs - weight @ inputs) @ inputs.T
    assert torch.equal(pulled(weight, gram, missed, 0.0, 1e-3), weight)
    torch.testing.assert_close(
        pulled(weight, gram, missed, 1.0, 0.0),
        torch.linalg.lstsq(inputs.T, outputs.T).solution.T,
        rtol=1e-8,
        atol=1e-10,
    )
    # nothing lost before it: nothing to make up for, whatever the share
    torch.testing.assert_close(pulled(weight, gram, torch.zeros_like(weight), 0.7, 1e-3), weight, rtol=0, atol=1e-12)


def test_the_ridge_pulls_to_the_weight() -> None:
    weight, inputs, outputs = streams((7, 11))
    gram, missed = inputs @ inputs.T, (outputs - weight @ inputs) @ inputs.T
    moved = [float((pulled(weight, gram, missed, 1.0, ridge) - weight).norm()) for ridge in (0.0, 1e-2, 1.0, 1e6)]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 1e-4 * moved[0]


def test_inputs_that_span_little_change_nothing_beside_them() -> None:
    weight, share = random(5, 8), 0.5
    inputs = random(8, 2, seed=1) @ random(2, TOKENS, seed=2)
    outputs = weight @ inputs + random(5, TOKENS, seed=3)
    instead = pulled(weight, inputs @ inputs.T, (outputs - weight @ inputs) @ inputs.T, share, 1e-3)
    beside = torch.linalg.qr(inputs, mode="complete").Q[:, 2:]
    torch.testing.assert_close(instead @ beside, weight @ beside, rtol=0, atol=1e-9)
    assert float((instead - weight).norm()) > 1e-2
    assert torch.equal(pulled(weight, torch.zeros(8, 8), torch.zeros(5, 8), share, 1e-3), weight)
