"""Entries of a matrix in a two-sided metric against dense least squares and against trying every choice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.core.sparse import alone, best_entries, fitted

SHAPES = pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 7), (7, 1)])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metrics(out: int, width: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Of inputs and outputs; rank: of both, where they are singular."""
    x, g = (
        random(3 * width if rank is None else rank, width, seed=1),
        random(3 * out if rank is None else rank, out, seed=2),
    )
    x, g = x * random(width, seed=3).exp(), g * random(out, seed=4).exp()
    return x.T @ x, g.T @ g


def chosen(*shape: int, share: float = 0.5) -> Tensor:
    kept = torch.rand(*shape, generator=torch.Generator().manual_seed(5)) < share
    kept.view(-1)[0] = True
    return kept


def least_squares(weight: Tensor, metric: Tensor, output: Tensor, kept: Tensor) -> Tensor:
    """The values of least loss at the kept places: the normal equations of B ⊗ G, dense."""
    whole, places = torch.kron(output, metric), kept.flatten().nonzero().flatten()
    found = torch.linalg.lstsq(whole[places][:, places], (whole @ weight.flatten())[places], driver="gelsd").solution
    return torch.zeros_like(weight).flatten().index_copy(0, places, found).view_as(weight)


def loss(weight: Tensor, values: Tensor, metric: Tensor, output: Tensor) -> float:
    """½ tr(B E G Eᵀ)."""
    missed = weight - values
    return float(((output @ missed) * (missed @ metric)).sum() / 2)


@SHAPES
def test_alone_is_what_one_entry_loses(shape: tuple[int, int]) -> None:
    metric, output = metrics(*shape)
    one = torch.zeros(shape, dtype=torch.float64)
    one[-1, 0] = 1.5
    expected = torch.trace(output @ one @ metric @ one.T) / 2
    assert float(expected) == pytest.approx(1.5**2 * float(alone(metric, output)[-1, 0]) / 2)


@SHAPES
def test_values_are_those_of_least_squares(shape: tuple[int, int]) -> None:
    weight, (metric, output), kept = random(*shape), metrics(*shape), chosen(*shape)
    values = fitted(weight, metric, output, kept, torch.where(kept, weight, 0.0), 400)
    torch.testing.assert_close(values, least_squares(weight, metric, output, kept), rtol=1e-6, atol=1e-8)
    assert not values[~kept].any()


@pytest.mark.parametrize("rank", [None, 4])
def test_no_step_loses_more_than_the_one_before(rank: int | None) -> None:
    weight, (metric, output), kept = random(8, 12), metrics(8, 12, rank), chosen(8, 12)
    start = torch.where(kept, weight, 0.0)
    losses = [loss(weight, fitted(weight, metric, output, kept, start, n), metric, output) for n in range(30)]
    assert losses[0] == loss(weight, start, metric, output) and losses[1] < losses[0]
    assert all(b <= a + 1e-12 * losses[0] for a, b in itertools.pairwise(losses))
    best = loss(weight, least_squares(weight, metric, output, kept), metric, output)
    assert losses[-1] >= best * (1 - 1e-9) - 1e-9


@SHAPES
def test_more_turns_and_entries_never_lose_more_and_all_entries_lose_nothing(shape: tuple[int, int]) -> None:
    weight, (metric, output) = random(*shape), metrics(*shape)

    def of(count: int, turns: int) -> float:
        places, values = best_entries(weight, metric, output, count, turns, 50)
        assert len(places) == count and (places.diff() > 0).all()
        made = torch.zeros(weight.numel(), dtype=torch.float64).index_copy(0, places, values).view_as(weight)
        return loss(weight, made, metric, output)

    half = weight.numel() // 2
    losses = [of(half, turns) for turns in (0, 1, 3)]
    assert losses == sorted(losses, reverse=True)
    assert of(0, 3) == pytest.approx(loss(weight, torch.zeros_like(weight), metric, output))
    assert of(weight.numel(), 3) == pytest.approx(0.0, abs=1e-18)


def test_what_is_chosen_is_close_to_the_best_of_all_choices() -> None:
    """On 20 matrices of 10 entries, 5 of which stay: 252 choices each, with their best values."""
    ratios: list[Any] = []
    for seed in range(20):
        weight = random(2, 5, seed=seed)
        x, g = random(7, 5, seed=seed + 100), random(3, 2, seed=seed + 200)
        metric, output = x.T @ x, g.T @ g
        places, values = best_entries(weight, metric, output, 5, 3, 50)
        made = torch.zeros(10, dtype=torch.float64).index_copy(0, places, values).view(2, 5)
        every = []
        for of in itertools.combinations(range(10), 5):
            kept = torch.zeros(10, dtype=torch.bool).index_fill(0, torch.tensor(of), True).view(2, 5)
            every.append(loss(weight, least_squares(weight, metric, output, kept), metric, output))
        best = (weight.square() * alone(metric, output)).flatten().topk(5).indices
        kept = torch.zeros(10, dtype=torch.bool).index_fill(0, best, True).view(2, 5)
        largest = torch.where(kept, weight, 0.0)
        found, plain = loss(weight, made, metric, output), loss(weight, largest, metric, output)
        assert min(every) * (1 - 1e-9) <= found < plain
        ratios.append((found / min(every), plain / min(every)))
    between = torch.tensor(ratios).median(0).values
    assert between[0] < 1.01 and between[1] > 1.5, between


def test_inputs_and_outputs_that_never_come_take_no_entries_before_the_others() -> None:
    weight, (metric, output) = random(6, 9) + 3, metrics(6, 9)
    metric[2], metric[:, 2], output[4], output[:, 4] = 0, 0, 0, 0
    places, values = best_entries(weight, metric, output, 40, 3, 30)
    assert not ((places % 9 == 2) | (places // 9 == 4)).any() and values.isfinite().all()
    places, values = best_entries(weight, torch.zeros_like(metric), output, 7, 3, 30)
    assert places.tolist() == list(range(7)) and torch.equal(values, weight.flatten()[:7])


def test_the_same_again_and_an_ill_scaled_metric_stays_finite() -> None:
    weight, (metric, output) = random(16, 24), metrics(16, 24, rank=3)
    scale = 10.0 ** torch.linspace(-8, 8, 24, dtype=torch.float64)
    metric = scale[:, None] * metric * scale
    first, second = (best_entries(weight, metric, output, 150, 3, 10) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert first[1].isfinite().all()


def test_what_is_computed_in_float32_is_no_worse() -> None:
    weight, (metric, output) = random(24, 40), metrics(24, 40)
    losses = []
    for given, size in ((weight, 1.0), (weight.float(), 1e-12), (weight.float(), 1e30)):
        places, values = best_entries(given, metric * size, output, 500, 3, 10)
        assert values.dtype == given.dtype
        made = torch.zeros(weight.numel(), dtype=torch.float64).index_copy(0, places, values.double())
        losses.append(loss(weight, made.view(24, 40), metric, output))
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-3)] * 2
    assert best_entries(weight.bfloat16(), metric, output, 500, 0, 1)[1].dtype == torch.float32
