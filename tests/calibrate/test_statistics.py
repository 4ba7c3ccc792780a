"""Each statistic against its formula, and the sums add up over batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectrim.calibrate.statistics import (
    Cosine,
    Fisher,
    FisherColumns,
    Gram,
    Norm,
    OutputFisher,
    Statistic,
    SublayerCosine,
    Tokens,
)

CPU = torch.device("cpu")


def tokens(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def measured(statistic: Statistic, width: int, *batches: tuple[Tensor, ...]) -> Tensor:
    state = statistic.start(width, CPU)
    for batch in batches:
        statistic.update(state, *batch)
    return statistic.result(state)


def test_gram_is_the_sum_of_outer_products() -> None:
    a, b = tokens(5, 4, 0), tokens(3, 4, 1)
    expected = sum(torch.outer(x.double(), x.double()) for x in [*a, *b])
    found = measured(Gram(), 4, (a,), (b,))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_gram_keeps_small_directions_beside_outliers() -> None:
    """A column 10⁶ times larger: products rounded to float32 would lose the small eigenvalue altogether."""
    base = tokens(64, 1, 0)
    x = torch.cat([1e6 * base, base + 1e-2 * tokens(64, 1, 1)], dim=1)
    smallest = torch.linalg.eigvalsh(measured(Gram(), 2, (x,)))[0]
    exact = torch.linalg.svdvals(x.double())[-1] ** 2
    assert math.isclose(smallest, exact, rel_tol=1e-2)


@pytest.mark.parametrize("power", [1, 2])
def test_norm_sums_powers_of_each_column(power: int) -> None:
    a, b = tokens(5, 4, 0), tokens(3, 4, 1)
    expected = [sum(abs(float(x[j])) ** power for x in [*a, *b]) for j in range(4)]
    found = measured(Norm(power), 4, (a,), (b,))  # type: ignore[arg-type]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_half_precision_inputs_are_summed_in_double() -> None:
    x = tokens(200, 3, 0).to(torch.bfloat16)
    torch.testing.assert_close(measured(Norm(), 3, (x,)), x.double().square().sum(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(measured(Gram(), 3, (x,)), x.double().T @ x.double(), rtol=1e-14, atol=0)


def test_cosine_is_the_mean_over_tokens_not_over_batches() -> None:
    before, after = tokens(7, 4, 0), tokens(7, 4, 1)
    each = [float(x @ y) / float(x.norm() * y.norm()) for x, y in zip(before, after, strict=True)]
    found = measured(Cosine(), 1, (before[:5], after[:5]), (before[5:], after[5:]))
    assert found.tolist() == pytest.approx([sum(each) / 7], rel=1e-5)


def test_cosine_over_sublayers_has_one_number_a_step() -> None:
    before, after = tokens(7, 4, 0), tokens(7, 4, 1)
    found = measured(SublayerCosine(), 2, (before, before * 3, after))
    assert found[0] == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(found[1:], measured(Cosine(), 1, (before, after)))


def test_fisher_sums_squared_gradients_over_outputs_and_sequences() -> None:
    first, second = tokens(5, 4, 0), tokens(5, 4, 1)
    expected = first.double().square().sum(0) + second.double().square().sum(0)
    found = measured(FisherColumns(), 4, (first,), (second,))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_fisher_by_entry_sums_squared_gradients_over_sequences() -> None:
    gradients = [tokens(5, 4, seed) for seed in range(3)]
    expected = sum(gradient.double().square() for gradient in gradients)
    found = measured(Fisher(), 4, *((gradient,) for gradient in gradients))
    assert found.dtype == torch.float32 and found.shape == (5, 4)
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=0)
    columns = measured(FisherColumns(), 4, *((gradient,) for gradient in gradients))
    torch.testing.assert_close(found.double().sum(0), columns, rtol=2e-7, atol=0)


def test_fisher_by_entry_keeps_what_half_precision_would_lose() -> None:
    """Squares of bfloat16 gradients below what float16 holds, thousands of them beside a large one."""
    large, small = torch.full((2, 3), 3.0), torch.full((2, 3), 1e-2, dtype=torch.bfloat16)
    found = measured(Fisher(), 3, (large,), *[(small,)] * 2000)
    expected = 9 + 2000 * float(small[0, 0]) ** 2
    assert found.double().flatten().tolist() == pytest.approx([expected] * 6, rel=2000 * 6e-8)
    tiny = measured(Fisher(), 3, (torch.full((2, 3), 1e-15, dtype=torch.bfloat16),))
    assert float(tiny[0, 0]) == pytest.approx(1e-30, rel=2e-2)


def test_fisher_by_entry_changes_neither_the_gradient_nor_another_state() -> None:
    gradient = tokens(5, 4, 0)
    kept, first, second = gradient.clone(), Fisher().start(4, CPU), Fisher().start(4, CPU)
    Fisher().update(first, gradient)
    assert torch.equal(gradient, kept)
    assert Fisher().result(second).shape == (0, 4), "no gradient, no rows"


def test_output_fisher_is_the_mean_of_outer_products_of_its_columns() -> None:
    first, second = tokens(5, 4, 0).double(), tokens(5, 7, 1).double()
    expected = (first @ first.T + second @ second.T) / 11
    found = measured(OutputFisher(), 9, (first,), (second,))
    assert found.dtype == torch.float64 and found.shape == (5, 5)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    half = measured(OutputFisher(), 9, (first.bfloat16(),), (second.bfloat16(),))
    expected = (first.bfloat16().double() @ first.bfloat16().double().T) / 11
    expected += second.bfloat16().double() @ second.bfloat16().double().T / 11
    torch.testing.assert_close(half, expected, rtol=1e-5, atol=1e-6)  # not by bfloat16's 4e-3


@pytest.mark.parametrize("outputs", [255, 256, 257, 600])
def test_output_fisher_of_many_outputs_is_whole_and_symmetric(outputs: int) -> None:
    first, second = tokens(outputs, 4, 0).double(), tokens(outputs, 7, 1).double()
    found = measured(OutputFisher(), 9, (first,), (second,))
    torch.testing.assert_close(found, (first @ first.T + second @ second.T) / 11, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found, found.T, rtol=1e-13, atol=1e-13)


def test_tokens_are_counted_over_batches() -> None:
    assert measured(Tokens(), 4, (tokens(5, 4, 0),), (tokens(3, 4, 1),)).tolist() == [8]


def test_what_gradients_are_of_and_of_which_labels() -> None:
    assert [(s.of, s.labels) for s in (Fisher(), FisherColumns())] == [("weight", "text")] * 2
    assert (OutputFisher().of, OutputFisher().labels) == ("output", "sampled")
    assert OutputFisher().needs_gradient and not Tokens().needs_gradient


def test_where_each_is_taken_and_what_needs_gradients() -> None:
    where = {type(s).__name__: s.where for s in (Gram(), Norm(), Cosine(), SublayerCosine(), FisherColumns(), Fisher())}
    assert where == {
        "Gram": "input", "Norm": "input", "Cosine": "block", "SublayerCosine": "sublayer", "FisherColumns": "gradient",
        "Fisher": "gradient",
    }  # fmt: skip
    assert FisherColumns().needs_gradient and Fisher().needs_gradient
    assert not any(s.needs_gradient for s in (Gram(), Norm(), Cosine(), SublayerCosine()))


def test_settings_tell_statistics_apart() -> None:
    assert Gram() == Gram() and hash(Norm(1)) == hash(Norm(1))
    assert len({Norm(1), Norm(2), Gram(), Cosine(), SublayerCosine(), FisherColumns(), Fisher()}) == 7
    assert (
        len({repr(s) for s in (Norm(1), Norm(2), Gram(), Cosine(), SublayerCosine(), FisherColumns(), Fisher())}) == 7
    )


def test_a_statistic_that_does_not_say_how_it_works_is_an_error() -> None:
    class Empty(Statistic):
        where = "input"

    with pytest.raises(TypeError, match="Empty does not say how it starts"):
        Empty().start(1, CPU)
    with pytest.raises(TypeError, match="Empty does not say how it is updated"):
        Empty().update({})
