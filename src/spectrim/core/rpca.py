"""Robust PCA: a matrix as low rank plus sparse, and refitting both parts once they are cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.core.eigen import eigh
from spectrim.core.linalg import directions

Mode = Literal["fixed", "inexact"]
# Singular values of a Gram's eigenvalues are rounding noise below this share of the largest.
NOISE = 1e-8
# The threshold of the growing penalty ends at this share of the norm, well above that noise.
LEAST_THRESHOLD = 1e-7
GROWTH = 1.5


@dataclass(frozen=True)
class Decomposed:
    """W ≈ left · right + sparse; left has orthonormal columns, right orthogonal rows, largest first.

    iterations: those that were run; residual: ‖W − left · right − sparse‖ over ‖W‖, Frobenius norms.
    """

    left: Float[Tensor, "out r"]
    right: Float[Tensor, "r in"]
    sparse: Float[Tensor, "out in"]
    iterations: int
    residual: float


def robust_pca(
    weight: Float[Tensor, "out in"],
    penalty: float | None = None,
    mode: Mode = "fixed",
    tolerance: float = 1e-4,
    iterations: int = 100,
) -> Decomposed:
    """min ‖L‖_* + λ ‖S‖_1 subject to W = L + S, by the alternating direction method of multipliers, in float64.

    With the threshold τ and the dual Z (both in units of the weight, Z starts at 0), one iteration is

        L = soft(W − S + Z, τ) on singular values,  S = soft(W − L + Z, λτ) on entries,  Z ← Z + (W − L − S).

    penalty: λ, None for 1/√max(out, in). mode: `fixed` keeps τ = 4 mean|W|; `inexact` starts at τ = ‖W‖₂ / 1.25 and
    divides it by 1.5 at each iteration (down to 1e-7 ‖W‖₂), Z with it. It ends when ‖W − L − S‖ ≤ tolerance · ‖W‖, or
    after `iterations`. What is then left of W goes to S where S is not 0, so that W = L + S there; elsewhere it stays
    out, and is the `residual`: at most `tolerance`, unless the iterations ran out first.

    One singular value decomposition an iteration, of the smaller side: eigenvectors of the Gram (half the time of
    `torch.linalg.svd` at 2048²). Singular values are exact above 1e-8 of the largest, and τ stays above that.
    Memory: eight float64 copies of the weight. Scaling, transposing, and flipping signs of rows or columns carry over.
    A zero weight has empty parts. Raises ValueError for values that are not finite and settings out of range.
    Sources: Candès et al. 2011 (arXiv 0912.3599), Lin et al. 2010 (arXiv 1009.5055).
    """
    _check(weight, penalty, mode, tolerance, iterations)
    out_features, in_features = weight.shape
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    exact = weight.double()
    if largest == 0:
        return Decomposed(exact.new_zeros(out_features, 0), exact.new_zeros(0, in_features), exact.clone(), 0, 0.0)
    scale = 2.0 ** math.frexp(largest)[1]  # so that no square overflows or vanishes; a power of two rounds nothing
    turned = out_features > in_features
    matrix = (exact.T if turned else exact) / scale
    factor = 1 / math.sqrt(max(out_features, in_features)) if penalty is None else penalty
    left, sizes, right, sparse, count = _alternate(matrix.contiguous(), factor, mode, tolerance, iterations)
    if turned:
        left, right, sparse, matrix = right.T, left.T, sparse.T, matrix.T
    right = sizes[:, None] * right
    gap = matrix - left @ right
    sparse = torch.where(sparse != 0, gap, 0.0)
    residual = float((gap - sparse).norm() / matrix.norm())
    return Decomposed(left.contiguous(), right * scale, (sparse * scale).contiguous(), count, residual)


def _check(
    weight: Float[Tensor, "out in"], penalty: float | None, mode: Mode, tolerance: float, iterations: int
) -> None:
    if not bool(weight.isfinite().all()):
        raise ValueError("the weight has values that are not finite: it cannot be split into low rank and sparse")
    if penalty is not None and not 0 < penalty < math.inf:
        raise ValueError(f"penalty is {penalty}: λ must be above 0; 1/√max(out, in) is as published")
    if mode not in ("fixed", "inexact"):
        raise ValueError(f"mode is {mode!r}: known are 'fixed' and 'inexact'")
    if not 0 <= tolerance < math.inf or iterations < 1:
        raise ValueError(
            f"tolerance is {tolerance} and iterations {iterations}: at least 0, and at least 1, are possible"
        )


def _alternate(
    weight: Float[Tensor, "rows columns"], penalty: float, mode: Mode, tolerance: float, iterations: int
) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "r"], Float[Tensor, "r columns"], Float[Tensor, "rows columns"], int]:
    """Singular vectors and values of L, largest first, S, and the iterations; rows ≤ columns."""
    threshold = 4 * float(weight.abs().mean()) if mode == "fixed" else 0.0
    least, limit = 0.0, tolerance * float(weight.norm())
    sparse, dual = torch.zeros_like(weight), torch.zeros_like(weight)
    for count in range(1, iterations + 1):
        # the eigenvectors of the Gram: nothing else here is of cubic cost but products with them
        base = weight + dual
        moved = base - sparse
        energies, vectors = eigh(moved @ moved.T)
        sizes = energies.clamp_min(0).sqrt()
        largest = float(sizes[-1])
        if mode == "inexact" and count == 1:  # of the weight itself
            threshold, least = largest / 1.25, LEAST_THRESHOLD * largest
        kept = int((sizes > max(threshold, NOISE * largest)).sum())
        sizes = sizes[len(sizes) - kept :].flip(0)
        left = vectors[:, len(vectors) - kept :].flip(1)
        right = left.T @ moved / sizes[:, None]
        sizes = sizes - threshold
        missed = torch.addmm(base, left * sizes, right, alpha=-1)
        # what the soft threshold takes off is the new dual
        after = missed.clamp(-penalty * threshold, penalty * threshold)
        sparse = missed - after
        gap, dual = float(dual.sub_(after).norm()), after
        if gap <= limit:
            break
        if mode == "inexact":
            smaller = max(threshold / GROWTH, least)
            dual.mul_(smaller / threshold)
            threshold = smaller
    return left, sizes, right, sparse, count


def refit(
    weight: Float[Tensor, "out in"],
    left: Float[Tensor, "out r"],
    right: Float[Tensor, "r in"],
    places: Int[Tensor, "e"],
    metric: Float[Tensor, "in"] | None,
    alternations: int,
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"], Float[Tensor, "e"]]:
    """The best found factors of the same rank r, and values at the same `places` (row · in + column), float64.

    Lowers tr((W − L − S) M (W − L − S)ᵀ), M a diagonal or None for the identity: S = W − L at the places, L the best
    rank r of W − S, in turns, and S once more. Each step is the optimum for what the other left, so the error does not
    rise; the best turn counts, and S is exactly W − L there. Any S next to the `left` and `right` given is no better.
    Costs one `directions` an alternation (one `eigh` of the smaller side).
    """
    exact, rank, places = weight.double(), left.shape[1], places.long()
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = math.inf
    left, right = left.to(exact), right.to(exact)
    for turn in range(alternations + 1):
        gap = (exact - left @ right).flatten()
        values = gap[places]
        gap[places] = 0
        error = float((gap.view_as(exact).square() * (1.0 if metric is None else metric.to(exact))).sum())
        if best is None or error < least:
            best, least = (left, right, values), error
        if turn == alternations or rank == 0:
            break
        rest = exact.flatten().clone()
        rest[places] -= values
        rest = rest.view_as(exact)
        left = directions(rest, metric)[0][:, :rank]
        right = left.T @ rest
    assert best is not None
    return best
