"""Pure functions on matrices: low rank weighted on one side or both, and the pivot form of a rank-r product."""

from __future__ import annotations

from typing import Literal

import scipy.linalg
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.core.eigen import eigh, eigvalsh

Metric = Float[Tensor, "in in"] | Float[Tensor, "in"] | None


def directions(weight: Float[Tensor, "out in"], metric: Metric) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k"]]:
    """Orthonormal output directions U and their energies λ, best first, k = min(out, in): W′ = U_r U_rᵀ W.

    W′ minimises tr((W − W′) M (W − W′)ᵀ) over all matrices of rank r, for every r, and that error is Σ_{i ≥ r} λ_i:
    the U_i are the eigenvectors of W M Wᵀ (Eckart-Young on W M^½). M is None (identity), a diagonal, or a symmetric
    positive semidefinite matrix, which may be singular: it is neither factored nor inverted. Everything in float64;
    the one `eigh` is on the smaller side (for out > in that of R M Rᵀ, W = Q R). Signs: each column's entry of
    largest magnitude is positive.
    """
    weight = weight.double()
    out_features, in_features = weight.shape
    if out_features <= in_features:
        energies, vectors = eigh(_sandwich(weight, metric))
        left = vectors.flip(1)
    else:
        # stored by columns, as LAPACK works: a row-major matrix would be turned around at each call
        reflectors, scales = torch.geqrf(weight)
        triangle = reflectors[:in_features].triu()
        energies, vectors = eigh(_sandwich(triangle, metric, triangular=True))
        padded = weight.new_zeros(in_features, out_features).T
        padded[:in_features] = vectors.flip(1)
        left = torch.ormqr(reflectors, scales, padded)
    lowest, highest = torch.aminmax(left, dim=0)
    return left.mul_(torch.where(-lowest > highest, -1.0, 1.0)), energies.flip(0).clamp_min(0)


def _sandwich(weight: Float[Tensor, "out in"], metric: Metric, triangular: bool = False) -> Float[Tensor, "out out"]:
    """The lower triangle of W M Wᵀ, all that `eigh` reads; triangular: W is upper triangular, its zeros are skipped."""
    rows = weight.shape[0]
    product = weight.new_zeros(rows, rows)
    metric = None if metric is None else metric.to(weight)
    for start in range(0, rows, 256):
        used = slice(start if triangular else 0, None)
        strip = weight[start : start + 256, used]
        if metric is not None:
            strip = strip * metric[used] if metric.ndim == 1 else strip @ metric[used, used]
        product[start : start + 256, start:] = strip @ weight[start:, used].T
    return product.T


def two_sided(
    weight: Float[Tensor, "out in"], metric: Metric, output: Float[Tensor, "out out"], floor: float = 1e-12
) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"], Float[Tensor, "k"]]:
    """Left, right and energies λ, best first, k = min(out, in): W′ = left[:, :r] right[:r], the optimum of rank r.

    W′ minimises ‖B^½ (W − W′) M^½‖² over all matrices of rank r, for every r, and that error is Σ_{i ≥ r} λ_i: with U
    and λ the `directions` of B^½ W, left = B^-½ U and right = Uᵀ B^½ W, scaled so that left's columns have norm 1. All
    ranks together are W. B (`output`) is symmetric positive semidefinite; eigenvalues below `floor` times the largest
    count as that much, for it is inverted (M is not). Where B is 0, all energies are 0 and the directions those of M.
    Everything in float64, every `eigh` on the smaller side: for out > in, W = Q R, so W′ = Q R′ and B is only seen as
    Qᵀ B Q. Source: own derivation; B = I is `directions`.
    """
    weight, output = weight.double(), output.to(weight.device, torch.float64)
    if not bool(output.any()):
        left, energies = directions(weight, metric)
        return left, left.T @ weight, torch.zeros_like(energies)
    basis = None
    if weight.shape[0] > weight.shape[1]:
        basis, weight = torch.linalg.qr(weight)
        output = basis.T @ output @ basis
    root, inverse = roots(output, floor)
    seen = root @ weight
    turned, energies = directions(seen, metric)
    left, right = inverse @ turned, turned.T @ seen
    sizes = left.norm(dim=0)
    left, right = left / sizes, right * sizes[:, None]
    return left if basis is None else basis @ left, right, energies


def roots(matrix: Float[Tensor, "n n"], floor: float) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """B^½ and B^-½ of a symmetric positive semidefinite matrix, float64, its eigenvalues at least `floor` · largest.

    Raises ValueError where no eigenvalue is above 0.
    """
    energies, vectors = eigh(matrix.double())
    if not float(energies[-1]) > 0:
        raise ValueError(f"the largest eigenvalue is {float(energies[-1])}: a matrix of zeros has no inverse root")
    sizes = energies.clamp_min(float(energies[-1]) * floor).sqrt()
    return (vectors * sizes) @ vectors.T, (vectors / sizes) @ vectors.T


def damped(matrix: Float[Tensor, "n n"], share: float) -> Float[Tensor, "n n"]:
    """B + share · mean(eigenvalues of B) · I, float64: what was measured of few tokens is not taken for certain."""
    found = matrix.to(torch.float64, copy=True)
    found.diagonal().add_(share * found.diagonal().mean())
    return found


def shrunk(matrix: Float[Tensor, "n n"], share: float, to: Literal["diagonal", "identity"]) -> Float[Tensor, "n n"]:
    """(1 − share) · G + share · T, float64: T is G's own diagonal, or the mean of it times I."""
    matrix = matrix.double()
    diagonal = matrix.diagonal().clone()
    found = matrix * (1 - share)
    found.diagonal().add_(share * (diagonal if to == "diagonal" else diagonal.mean()))
    return found


def pivot_rows(
    left: Float[Tensor, "out r"], right: Float[Tensor, "r in"], dtype: torch.dtype
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "rest r"], Int[Tensor, "out"]]:
    """(base, mix, order) with (left · right)[order] = [base; mix · base]: r(out + in) − r² numbers, without loss.

    The r rows of the base are chosen by pivoted QR of leftᵀ, then exchanged until no entry of mix exceeds 2 in
    magnitude. `left` needs full column rank; `right` may be rank deficient. base is rounded to `dtype` and mix fitted
    to what was rounded (`_rounded`). Returned in float64; base holds values of `dtype`.
    Source: PIFA (arXiv 2501.19090); the exchange is Gu and Eisenstat's (1996).
    """
    left, right = left.double(), right.double()
    rank = left.shape[1]
    # columns scaled to one norm: the choice must not depend on how a direction's size is split between the factors
    basis = torch.linalg.qr(left).Q
    _, _, chosen = scipy.linalg.qr(basis.T.cpu().numpy(), mode="economic", pivoting=True, check_finite=False)
    order = torch.as_tensor(chosen, dtype=torch.int64, device=left.device)
    mix = torch.linalg.solve(basis[order[:rank]], basis[order[rank:]], left=False)
    order, mix = _exchange(order, mix, rank, bound=2.0)
    product = left @ right
    base, rest = product[order[:rank]], product[order[rank:]]
    if dtype == torch.float64 or not mix.numel():
        return base.to(dtype).double(), mix, order
    return *_rounded(base, mix, rest, dtype), order


def _rounded(
    base: Float[Tensor, "r in"], mix: Float[Tensor, "rest r"], rest: Float[Tensor, "rest in"], dtype: torch.dtype
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "rest r"]]:
    """(base, mix) with base in values of `dtype` and mix fitted to that base; in half types, mix in values of it too.

    There each is fitted to the other and rounded in turn, twice (a third turn gained 2 %): an error in a row of the
    base comes back in every row mixed from it, and rounded entry by entry the error of the whole grows with √r.
    """
    # an eighth of the rounding step is where refitting noise began to raise mix above the bound
    floor = max((torch.finfo(dtype).eps / 8) ** 2, 1e-14)
    if dtype == torch.float32:
        base = base.to(dtype).double()
        return base, _refit(mix, base, rest, floor)
    wanted = torch.cat([base, rest])
    for _ in range(2):
        stacked = torch.cat([torch.eye(len(base)).to(mix), mix.T], dim=1)
        fitted = torch.linalg.solve(stacked @ stacked.T, stacked @ wanted)
        base = _round_together(fitted.T, stacked, dtype).T
        mix = _round_together(_refit(mix, base, rest, floor), base, dtype)
    return base, mix


def _exchange(
    order: Int[Tensor, "out"], mix: Float[Tensor, "rest r"], rank: int, bound: float
) -> tuple[Int[Tensor, "out"], Float[Tensor, "rest r"]]:
    """Swap a mixed row with a pivot while an entry of mix exceeds `bound`: each swap grows the base's volume by it."""
    while mix.numel():
        flat = int(mix.abs().argmax())
        i, j = divmod(flat, rank)
        size = mix[i, j].clone()
        if size.abs() <= bound:
            break
        # row i becomes pivot j: x_i = Σ_k mix_ik p_k, solved for p_j
        row, column = mix[i].clone(), mix[:, j].clone()
        mix = mix - torch.outer(column, row) / size
        mix[:, j] = column / size
        mix[i] = -row / size
        mix[i, j] = 1 / size
        order[[j, rank + i]] = order[[rank + i, j]]
    return order, mix


def _refit(
    mix: Float[Tensor, "rest r"], base: Float[Tensor, "r in"], wanted: Float[Tensor, "rest in"], floor: float
) -> Float[Tensor, "rest r"]:
    """mix plus the least-squares answer to what it misses, along directions of the base above its rounding noise.

    floor: the energy, as a share of the largest, below which a direction is noise and is not fitted.
    """
    energies, vectors = eigh(base @ base.T)
    keep = energies > energies.max().clamp_min(torch.finfo(torch.float64).tiny) * floor
    vectors, energies = vectors[:, keep], energies[keep]
    missed = (wanted - mix @ base) @ base.T
    return mix + (missed @ vectors / energies) @ vectors.T


def _round_together(
    matrix: Float[Tensor, "rows r"], lattice: Float[Tensor, "r n"], dtype: torch.dtype, block: int = 64
) -> Float[Tensor, "rows r"]:
    """`matrix` in values of `dtype`, rounded so that ‖(matrix − rounded) · lattice‖ is small, not each entry's error.

    With lattice = T Q (T lower triangular) the norm is ‖E T‖: from the last column to the first, what the earlier
    errors add to column j of E T is taken into account before rounding, so only the rounding of T_jj E_j stays
    (Babai's nearest plane).
    """
    lower = torch.linalg.qr(lattice.T, mode="r").R.T
    diagonal = lower.diagonal()
    # where the lattice has no further direction there is nothing to correct
    inverse = torch.where(diagonal.abs() > 1e-12 * diagonal.abs().max(), 1 / diagonal, 0.0)
    result, error = torch.empty_like(matrix), torch.zeros_like(matrix)
    for end in range(len(lattice), 0, -block):
        start = max(0, end - block)
        carried = error[:, end:] @ lower[end:, start:end]
        for j in range(end - 1, start - 1, -1):
            added = carried[:, j - start] + error[:, j + 1 : end] @ lower[j + 1 : end, j]
            result[:, j] = (matrix[:, j] + added * inverse[j]).to(dtype).double()
            error[:, j] = matrix[:, j] - result[:, j]
    return result


def pivot_columns(
    left: Float[Tensor, "out r"], right: Float[Tensor, "r in"], dtype: torch.dtype
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r rest"], Int[Tensor, "in"]]:
    """(base, mix, order) with (left · right)[:, order] = base · [I, mix]: the column-side pivot form.

    z = x_P + mix · x_rest, y = base · z. Same size and guarantees as `pivot_rows`; `right` needs full row rank for
    the choice to be of its own rows, else they are completed orthonormally.
    """
    basis = torch.linalg.qr(right.double().T)
    base, mix, order = pivot_rows(basis.Q, basis.R @ left.double().T, dtype)
    return base.T.contiguous(), mix.T.contiguous(), order


def pseudo_inverse(matrix: Float[Tensor, "n n"], floor: float) -> Float[Tensor, "n n"]:
    """The pseudo-inverse of a symmetric positive semidefinite matrix, each row and column first scaled to diagonal 1.

    So a channel's size does not decide what counts as zero: eigenvalues of the scaled matrix up to `floor` times the
    largest do. P = pseudo_inverse(H) is positive semidefinite, and P H P = P.
    """
    sizes = matrix.diagonal().clamp_min(0).sqrt()
    scale = torch.where(sizes > 0, 1 / sizes, 0.0)
    energies, vectors = eigh(matrix * scale[:, None] * scale)
    used = energies > floor * energies.amax().clamp_min(torch.finfo(energies.dtype).tiny)
    half = scale[:, None] * vectors[:, used] / energies[used].sqrt()
    return half @ half.T


def energies_without(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    moved: Float[Tensor, "in out"],
    kept: Int[Tensor, "c"],
    floor: float | None = None,
) -> Float[Tensor, "out"]:
    """Eigenvalues of W_S G_SS W_Sᵀ, best first, where S are the inputs that are not `kept`; moved = G Wᵀ.

    The sum of all but the first r is the least Σ‖y − y′‖² at rank r on S with the kept columns exact. With a floor G_SS
    is replaced by its Schur complement G_SS − G_SC G_CC⁺ G_CS (`pseudo_inverse` with that floor): the least error with
    the kept columns refitted. Float64 in, no copy of G_SS: out² in + c·in·out multiplications, `eigvalsh` of out × out.
    """
    if len(kept) == 0:
        return eigvalsh(weight @ moved).flip(0).clamp_min(0)
    rest = complement(kept, weight.shape[1])
    removed = gram[:, kept] @ weight[:, kept].T
    product = weight[:, rest] @ (moved - removed)[rest]
    if floor is not None:
        shared = (moved - removed)[kept]
        product = product - shared.T @ pseudo_inverse(gram[kept][:, kept], floor) @ shared
    return eigvalsh(product).flip(0).clamp_min(0)


def pulled(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    missed: Float[Tensor, "out in"],
    share: float,
    ridge: float,
) -> Float[Tensor, "out in"]:
    """W* = W + share · M (G + λ I)⁻¹, float64, λ = ridge · mean of G's diagonal.

    With G = Σ x xᵀ and M = Σ (t − W x) xᵀ it minimises Σ‖y − W* x‖² + λ ‖W* − W‖², y = share · t + (1 − share) · W x.
    At λ = 0

        Σ‖y − W′ x‖² = Σ‖y − W* x‖² + tr((W* − W′) G (W* − W′)ᵀ)

    for every W′: the best one of rank r is that of W* in the metric G. W where G is 0. Source: own derivation.
    """
    weight, gram = weight.double(), gram.double()
    size = float(gram.diagonal().mean())
    if not size > 0:
        return weight.clone()
    held = gram.clone()
    held.diagonal().add_(ridge * size)
    missed = missed.to(weight)
    factor, failed = torch.linalg.cholesky_ex(held)
    if int(failed) == 0:
        return weight + share * torch.cholesky_solve(missed.T, factor).T
    return weight + share * (missed @ pseudo_inverse(held, 1e-12))


def complement(chosen: Int[Tensor, "c"], size: int) -> Int[Tensor, "rest"]:
    """The indices below `size` that are not chosen, ascending."""
    free = torch.ones(size, dtype=torch.bool, device=chosen.device)
    free[chosen] = False
    return free.nonzero().flatten()
