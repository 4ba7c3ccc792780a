"""Energies with columns kept, against matrices that are formed; the pseudo-inverse against its defining equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectrim.core.linalg import complement, energies_without, pseudo_inverse

FLOOR = 1e-10


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(width: int, tokens: int) -> Tensor:
    """Of inputs of very different size: from 1 to 1e4."""
    x = random(tokens, width, seed=1) @ random(width, width, seed=2) * torch.logspace(0, 4, width, dtype=torch.float64)
    return x.T @ x


@pytest.mark.parametrize("tokens", [40, 5])
def test_pseudo_inverse(tokens: int) -> None:
    matrix = gram(12, tokens)
    inverse = pseudo_inverse(matrix, FLOOR)
    scale = matrix.diagonal().sqrt()
    assert torch.equal(inverse, inverse.T) or torch.allclose(inverse, inverse.T, rtol=1e-12)
    for found, wanted in ((matrix @ inverse @ matrix, matrix), (inverse @ matrix @ inverse, inverse)):
        size = scale if wanted is matrix else 1 / scale
        relative = (found - wanted) / (size[:, None] * size)
        assert relative.abs().max() < 1e-7
    if tokens == 40:
        assert torch.allclose(inverse @ matrix, torch.eye(12, dtype=torch.float64), atol=1e-6)


def test_pseudo_inverse_of_nothing_is_nothing() -> None:
    assert torch.equal(pseudo_inverse(torch.zeros(3, 3, dtype=torch.float64), FLOOR), torch.zeros(3, 3).double())
    dead = gram(6, 40).index_fill(0, torch.tensor([2]), 0.0).index_fill(1, torch.tensor([2]), 0.0)
    inverse = pseudo_inverse(dead, FLOOR)
    assert not inverse[2].any() and not inverse[:, 2].any() and bool(inverse[0].any())


@pytest.mark.parametrize("chosen", [[], [3], [11, 0, 7], list(range(11))])
@pytest.mark.parametrize("tokens", [40, 5])
@pytest.mark.parametrize("rows", [7, 12, 18])
def test_energies_are_squared_singular_values_over_the_tokens(chosen: list[int], tokens: int, rows: int) -> None:
    weight, kept = random(rows, 12), torch.tensor(chosen, dtype=torch.int64)
    x = random(tokens, 12, seed=3) + 0.5 * random(tokens, 1, seed=4)
    metric, rest = x.T @ x, complement(kept, 12)
    found = energies_without(weight, metric, metric @ weight.T, kept)
    wanted = torch.linalg.svdvals(x[:, rest] @ weight[:, rest].T).square()
    assert found.shape == (rows,) and bool((found.diff() <= 0).all())
    assert torch.allclose(found[: len(wanted)], wanted[:rows], atol=1e-9 * float(metric.trace()))
    assert float(found[len(wanted) :].sum()) < 1e-9 * float(metric.trace())
    # refitted: what of the other inputs the kept ones do not explain
    refitted = energies_without(weight, metric, metric @ weight.T, kept, FLOOR)
    explained = x[:, kept] @ torch.linalg.lstsq(x[:, kept], x[:, rest], driver="gelsd").solution if chosen else 0.0
    wanted = torch.linalg.svdvals((x[:, rest] - explained) @ weight[:, rest].T).square()
    assert torch.allclose(refitted[: len(wanted)], wanted[:rows], atol=1e-9 * float(metric.trace()))


def test_complement_is_ascending() -> None:
    assert complement(torch.tensor([4, 0, 2]), 6).tolist() == [1, 3, 5]
    assert complement(torch.tensor([], dtype=torch.int64), 2).tolist() == [0, 1]
