"""Weighted directions against an independent optimum, and the pivot form of a product."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import scipy.linalg
import torch
from torch import Tensor

from spectrim.core.linalg import directions, pivot_columns, pivot_rows
from spectrim.core.plan import balance

SHAPES = {"wide": (12, 20), "square": (16, 16), "tall": (24, 10), "one row": (1, 9), "one column": (9, 1)}
Form = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor, Tensor]]
INPUTS = ("plenty", "few tokens", "outlier channel", "condition 1e9")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(kind: str, width: int) -> Tensor:
    """X, width × tokens; its Gram is X Xᵀ."""
    if kind == "few tokens":
        return random(width, max(1, width // 3), seed=1)
    if kind == "condition 1e9":  # of the Gram
        return torch.linalg.qr(random(width, width, seed=1)).Q * torch.logspace(0, -4.5, width, dtype=torch.float64)
    x = random(width, 4 * width, seed=1)
    if kind == "outlier channel":
        x[width // 2] *= 100
    return x


def weighted_error(difference: Tensor, gram: Tensor) -> float:
    return float((difference @ gram * difference).sum())


def optimum(weight: Tensor, x: Tensor) -> Tensor:
    """Least Σ‖(W − W′)x‖² for every rank 0, 1, …, min(out, in): the tails of the squared singular values of W X."""
    values = torch.zeros(min(weight.shape), dtype=torch.float64)
    found = torch.linalg.svdvals(weight @ x)[: len(values)] ** 2
    values[: len(found)] = found
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_rank_is_the_optimum_and_its_error_is_predicted(shape: tuple[int, int], kind: str) -> None:
    weight, x = random(*shape), inputs(kind, shape[1])
    left, energies = directions(weight, x @ x.T)
    best, total = optimum(weight, x), float(energies.sum())
    assert left.shape == (shape[0], min(shape))
    assert torch.allclose(left.T @ left, torch.eye(min(shape), dtype=torch.float64), atol=1e-12)
    for rank in range(min(shape) + 1):
        kept = left[:, :rank]
        measured = weighted_error(weight - kept @ (kept.T @ weight), x @ x.T)
        # beside 1e-9 of the error itself, float64 leaves 1e-14 of the whole energy
        assert measured == pytest.approx(float(best[rank]), rel=1e-9, abs=1e-14 * total)
        assert float(energies[rank:].sum()) == pytest.approx(measured, rel=1e-9, abs=1e-14 * total)


@pytest.mark.parametrize("metric", ["none", "diagonal", "gram"])
@pytest.mark.parametrize("shape", [(300, 310), (600, 270)], ids=["wide", "tall"])
def test_matrices_larger_than_a_block_of_the_computation(shape: tuple[int, int], metric: str) -> None:
    weight, x = random(*shape), inputs("plenty", shape[1])
    given = {"none": None, "diagonal": x.square().sum(1), "gram": x @ x.T}[metric]
    root = {"none": torch.ones(shape[1]).double(), "diagonal": x.norm(dim=1), "gram": x}[metric]
    left, energies = directions(weight, given)
    scaled = weight @ root if metric == "gram" else weight * root
    values = torch.linalg.svdvals(scaled)[: min(shape)]
    assert torch.allclose(energies, values**2, rtol=1e-9, atol=1e-12 * float(energies[0]))
    kept = left[:, :100]
    measured = float((scaled - kept @ (kept.T @ scaled)).square().sum())
    assert measured == pytest.approx(float(energies[100:].sum()), rel=1e-9)


@pytest.mark.parametrize("shape", [(12, 20), (16, 16), (24, 10)])
def test_error_equals_that_of_cholesky_whitening(shape: tuple[int, int]) -> None:
    weight, x = random(*shape), inputs("outlier channel", shape[1])
    gram = x @ x.T
    root = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    left, energies = directions(weight, gram)
    assert torch.allclose(energies, s**2, rtol=1e-9, atol=1e-14 * float(s[0] ** 2))
    for rank in (1, 4, 9):
        whitened = torch.linalg.solve_triangular(root, (u[:, :rank] * s[:rank]) @ v[:rank], upper=False, left=False)
        ours = left[:, :rank] @ (left[:, :rank].T @ weight)
        assert torch.allclose(ours, whitened, atol=1e-9)


def test_no_random_matrix_of_the_rank_is_better() -> None:
    weight, x = random(7, 11), inputs("plenty", 11)
    left, energies = directions(weight, x @ x.T)
    rng = torch.Generator().manual_seed(3)
    for rank in (1, 3, 6):
        least, kept = float(energies[rank:].sum()), left[:, :rank]
        for step in (1e-3, 1e-1, 1.0):
            basis = kept + step * torch.randn(7, rank, generator=rng, dtype=torch.float64)
            # the best right factor for these left directions
            other = basis @ torch.linalg.lstsq(basis, weight).solution
            assert weighted_error(weight - other, x @ x.T) > least


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_without_metric_it_is_the_svd(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    left, energies = directions(weight, None)
    assert torch.allclose(energies, torch.linalg.svdvals(weight) ** 2, rtol=1e-9, atol=1e-12)
    same, _ = directions(weight, torch.eye(shape[1], dtype=torch.float64))
    assert torch.allclose(left, same, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_diagonal_equals_the_full_matrix(shape: tuple[int, int]) -> None:
    weight, diagonal = random(*shape), random(shape[1], seed=2).exp()
    for one, other in zip(directions(weight, diagonal), directions(weight, torch.diag(diagonal)), strict=True):
        assert torch.allclose(one, other, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (9, 9), (9, 6)])
def test_a_zero_matrix_has_no_energy_but_orthonormal_directions(shape: tuple[int, int]) -> None:
    left, energies = directions(torch.zeros(shape), None)
    assert torch.equal(energies, torch.zeros(6 if shape != (9, 9) else 9, dtype=torch.float64))
    assert torch.allclose(left.T @ left, torch.eye(min(shape), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shape", [(10, 14), (14, 10)])
def test_a_rank_deficient_weight_has_as_many_energies(shape: tuple[int, int]) -> None:
    weight, x = random(shape[0], 3) @ random(3, shape[1], seed=5), inputs("plenty", shape[1])
    left, energies = directions(weight, x @ x.T)
    assert (energies >= 0).all()
    assert energies[3:].sum() < 1e-12 * energies[0] < energies[2]
    assert torch.allclose(left[:, :3] @ (left[:, :3].T @ weight), weight, atol=1e-12)


def test_energies_come_in_descending_order_in_float64_whatever_the_weight() -> None:
    weight = random(8, 12).bfloat16()
    left, energies = directions(weight, inputs("plenty", 12).square().sum(1).float())
    assert left.dtype == energies.dtype == torch.float64
    assert (energies.diff() <= 0).all()


@pytest.mark.parametrize("shape", [(12, 20), (24, 10)])
def test_signs_are_deterministic(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    left, _ = directions(weight, None)
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    assert torch.allclose(directions(-weight, None)[0], left, atol=1e-12)
    assert torch.equal(directions(weight, None)[0], left)


# --- pivot forms ---


def by_rows(left: Tensor, right: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(base, mix, product) of the row form, the factors as a checkpoint of `dtype` would hold them."""
    base, mix, order = pivot_rows(left, right, dtype)
    assert base.shape == (left.shape[1], right.shape[1])
    assert sorted(order.tolist()) == list(range(len(left)))
    product = torch.empty(len(left), right.shape[1], dtype=torch.float64)
    product[order] = torch.cat([base, mix.to(dtype).double() @ base])
    return base, mix, product


def by_columns(left: Tensor, right: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the column form."""
    base, mix, order = pivot_columns(left, right, dtype)
    assert base.shape == (left.shape[0], left.shape[1])
    assert sorted(order.tolist()) == list(range(right.shape[1]))
    product = torch.empty(left.shape[0], right.shape[1], dtype=torch.float64)
    product[:, order] = torch.cat([base, base @ mix.to(dtype).double()], dim=1)
    return base, mix, product


FORMS = pytest.mark.parametrize("form", [by_rows, by_columns], ids=["rows", "columns"])


def kahan(size: int = 20, angle: float = 1.3, copies: int = 50) -> Tensor:
    """Orthonormal columns whose rows deceive pivoted QR: a Kahan matrix, then what completes it, in many small rows."""
    e = torch.arange(size, dtype=torch.float64)
    upper = torch.eye(size, dtype=torch.float64) - math.cos(angle) * torch.ones(size, size).double().triu(1)
    matrix = (math.sin(angle) ** e)[:, None] * upper * (1 - 1e-10 * e)
    matrix /= 1.0001 * torch.linalg.matrix_norm(matrix, 2)
    energies, vectors = torch.linalg.eigh(torch.eye(size, dtype=torch.float64) - matrix @ matrix.T)
    rest = (vectors * energies.sqrt()) @ vectors.T / math.sqrt(copies)
    return torch.cat([matrix, *[rest] * copies], dim=1).T.contiguous()


def decaying(size: tuple[int, int], rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best rank-r form of a weight with a decaying spectrum and outlier input channels."""
    weight = random(*size, seed=seed) * torch.logspace(0, -2, size[1], dtype=torch.float64)
    x = random(size[1], 4 * size[1], seed=seed + 1)
    x[:2] *= 100
    left, _ = directions(weight, x @ x.T)
    return balance(left[:, :rank], left[:, :rank].T @ weight)


def products() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of factors in float64, left of full column rank."""
    spread = torch.logspace(0, -8, 12, dtype=torch.float64)
    repeated = random(12, 30, seed=2)
    repeated[6:] = repeated[:6]
    return {
        "random": (random(40, 12), random(12, 30, seed=1)),
        "tall": (random(60, 9), random(9, 10, seed=1)),
        "one below full": (random(20, 19), random(19, 24, seed=1)),
        "full rank": (random(12, 12), random(12, 30, seed=1)),
        "rank 1": (random(7, 1), random(1, 5, seed=1)),
        "one row": (random(1, 1), random(1, 5, seed=1)),
        "one column": (random(5, 1), random(1, 1, seed=1)),
        "badly scaled left": (random(40, 12) * spread, random(12, 30, seed=1)),
        "badly scaled right": (random(40, 12), spread[:, None] * random(12, 30, seed=1)),
        "rank deficient right": (random(40, 12), repeated),
        "zero right": (random(40, 12), torch.zeros(12, 30, dtype=torch.float64)),
        "Kahan": (kahan(), random(20, 30, seed=1)),
    }


@FORMS
@pytest.mark.parametrize("name", products().keys())
def test_pivot_form_loses_nothing_and_saves_r_squared(form: Form, name: str) -> None:
    left, right = products()[name]
    base, mix, product = form(left, right, torch.float64)
    exact, rank = left @ right, left.shape[1]
    assert (product - exact).norm() <= 1e-12 * exact.norm()
    assert base.numel() + mix.numel() == rank * (left.shape[0] + right.shape[1]) - rank**2
    assert mix.numel() == 0 or mix.abs().max() <= 2


def test_rows_of_the_base_are_rows_of_the_product() -> None:
    left, right = products()["random"]
    base, _, order = pivot_rows(left, right, torch.float64)
    assert torch.allclose(base, (left @ right)[order[:12]], atol=1e-12)
    base, _, order = pivot_columns(left, right, torch.float64)
    assert torch.allclose(base, (left @ right)[:, order[:12]], atol=1e-12)


def test_pivoted_qr_alone_would_mix_with_large_numbers() -> None:
    left = kahan()
    assert torch.allclose(left.T @ left, torch.eye(20, dtype=torch.float64), atol=1e-10)
    chosen = torch.as_tensor(scipy.linalg.qr(left.T.numpy(), mode="economic", pivoting=True)[2]).long()
    alone = torch.linalg.solve(left[chosen[:20]], left[chosen[20:]], left=False)
    assert alone.abs().max() > 10
    _, mix, _ = pivot_rows(left, random(20, 30, seed=1), torch.float64)
    assert mix.abs().max() <= 2


def test_pivots_do_not_depend_on_how_a_direction_is_split() -> None:
    left, right = products()["random"]
    split = torch.logspace(-6, 6, 12, dtype=torch.float64)
    one, other = pivot_rows(left, right, torch.float64), pivot_rows(left * split, right / split[:, None], torch.float64)
    assert torch.equal(one[2], other[2])
    assert torch.allclose(one[1], other[1], atol=1e-9)


def rounding_errors(form: Form, left: Tensor, right: Tensor) -> tuple[float, float]:
    """‖·‖ between the exact product and its pivot form in bfloat16, and its plain factors in bfloat16."""
    exact = left @ right
    base, mix, product = form(left, right, torch.bfloat16)
    assert torch.equal(base, base.bfloat16().double())
    assert mix.numel() == 0 or mix.abs().max() <= 2
    plain = left.bfloat16().double() @ right.bfloat16().double()
    return float((product - exact).norm()), float((plain - exact).norm())


@FORMS
@pytest.mark.parametrize("size", [(64, 64, 40), (96, 48, 30), (48, 96, 47), (64, 64, 63), (128, 128, 80), (40, 20, 4)])
def test_in_bfloat16_it_is_at_most_twice_as_rough_as_plain_factors(form: Form, size: tuple[int, int, int]) -> None:
    m, n, rank = size
    left, _ = directions(random(m, n), None)
    factors = balance(left[:, :rank], left[:, :rank].T @ random(m, n))
    for pair in (factors, (random(m, rank), random(rank, n, seed=1)), decaying((m, n), rank)):
        pivot, plain = rounding_errors(form, *pair)
        assert pivot <= 2 * plain


@FORMS
def test_mixing_numbers_stay_small_where_the_base_is_dependent_after_rounding(form: Form) -> None:
    rng = torch.Generator().manual_seed(0)
    for seed in range(60):
        m, n = (int(torch.randint(3, 40, (1,), generator=rng)) for _ in range(2))
        rank = int(torch.randint(1, min(m, n), (1,), generator=rng))
        decay = torch.logspace(0, -10 * seed / 60, rank, dtype=torch.float64)
        left = torch.linalg.qr(random(m, rank, seed=seed)).Q
        pivot, plain = rounding_errors(form, *balance(left, decay[:, None] * random(rank, n, seed=seed + 1)))
        assert pivot <= 3 * plain


@pytest.mark.parametrize("size", [(512, 512, 300), (512, 192, 117), (192, 512, 117)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_in_bfloat16_it_stays_so_at_the_sizes_of_models(size: tuple[int, int, int], decay: float) -> None:
    m, n, rank = size
    u, _, v = torch.linalg.svd(random(m, n), full_matrices=False)
    weight = u * torch.arange(1.0, min(m, n) + 1).double() ** -decay @ v
    left, _ = directions(weight, None)
    pivot, plain = rounding_errors(by_rows, *balance(left[:, :rank], left[:, :rank].T @ weight))
    assert pivot <= (2 if decay == 0 else 1.5 if decay < 1 else 1) * plain


@pytest.mark.parametrize("dtype", [torch.float32])
def test_the_mix_is_the_least_squares_fit_to_the_rounded_base(dtype: torch.dtype) -> None:
    left, right = products()["random"]
    base, mix, order = pivot_rows(left, right, dtype)
    wanted = (left @ right)[order[12:]]
    fitted = torch.linalg.lstsq(base.T, wanted.T).solution.T
    assert torch.allclose(mix, fitted, atol=1e-9)
    _, exact, _ = pivot_rows(left, right, torch.float64)
    assert (wanted - mix @ base).norm() < 0.9 * (wanted - exact @ base).norm()


@FORMS
def test_rank_0_is_legal(form: Form) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        base, mix, product = form(random(6, 0), random(0, 4), dtype)
        assert base.numel() == mix.numel() == 0
        assert not product.any()
