"""Low rank under a weight for every entry: min Σ F ∘ (W − L R)² over L out × r and R r × in, F = Z² ≥ 0.

A metric on the inputs has a closed form; weights by entry have one only where F has rank one, and local minima
elsewhere. Both solvers here work in float64 from given factors and draw nothing at random. Their steps never raise the
objective; one that would by rounding is not taken. Source: Srebro and Jaakkola, "Weighted low-rank approximations",
ICML 2003; the majorant and the acceleration of `em` and the form of the ridge of `als` are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.core.linalg import directions

Solver = Literal["em", "als", "both"]
# The objective as a share of Σ F W² below which factors count as exact: what rounding to float32 leaves is less.
NOTHING = 1e-13
# The pull of a row to where it was, as a share of the mean diagonal of its system.
RIDGE = 1e-10
# Numbers in the systems that are solved at once.
AT_ONCE = 2**23
# The rank above which "both" leaves out `als`: its cost grows with the square of the rank.
LARGEST_RANK = 256


@dataclass(frozen=True)
class Fit:
    """Factors in float64, and the objective before the first step and after each."""

    left: Float[Tensor, "out r"]
    right: Float[Tensor, "r in"]
    history: tuple[float, ...]


def floored(fisher: Float[Tensor, "*shape"], largest_spread: float) -> Float[Tensor, "*shape"]:
    """F in float64 as a share of its largest value, without zeros: 1e-6 of its mean is added, and a floor taken.

    The floor is max F / largest_spread², so no two weights Z have a larger ratio than `largest_spread`. Where all of F
    is 0 all weights are equal, as in plain SVD. Raises ValueError for values that are negative or not finite.
    """
    fisher = fisher.double()
    lowest, highest = torch.aminmax(fisher)
    if not (lowest >= 0 and highest < math.inf):
        raise ValueError(
            f"Fisher information from {float(lowest)} to {float(highest)}: it must be finite and not below 0"
        )
    if highest == 0:
        return torch.ones_like(fisher)
    share = fisher / highest
    share = share + 1e-6 * share.mean()
    share = share / share.max()
    return share.clamp_min(1 / largest_spread**2)


def dispersion(fisher: Float[Tensor, "out in"]) -> float:
    """The mean over inputs of the variance of F over outputs, over the square of its mean: φ(W).

    0 where every column is constant, so that weights by column say all; NaN where all of F is 0.
    """
    fisher = fisher.double()
    return float(fisher.var(0, correction=0).mean() / fisher.mean().square())


def objective(
    weight: Float[Tensor, "out in"],
    fisher: Float[Tensor, "out in"],
    left: Float[Tensor, "out r"],
    right: Float[Tensor, "r in"],
) -> float:
    """Σ F ∘ (W − L R)²."""
    return float((fisher * (weight - left @ right).square()).sum())


def solve(
    weight: Float[Tensor, "out in"],
    fisher: Float[Tensor, "out in"],
    left: Float[Tensor, "out r"],
    right: Float[Tensor, "r in"],
    solver: Solver,
    steps: int,
    tolerance: float,
) -> Fit:
    """Factors better than those given by `em`, by `als`, or by em and then als ("both"; em alone above rank 256).

    Each takes up to `steps` steps, and ends after one that lowers the objective by less than `tolerance` of it.
    """
    if solver == "als":
        return als(weight, fisher, left, right, steps, tolerance)
    first = em(weight, fisher, left, right, steps, tolerance)
    if solver == "em" or left.shape[1] > LARGEST_RANK:
        return first
    then = als(weight, fisher, first.left, first.right, steps, tolerance)
    return Fit(then.left, then.right, first.history + then.history[1:])


def majorant(fisher: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out"], Float[Tensor, "in"]]:
    """Positive u and v with F_oj ≤ u_o v_j, which every row and column with an entry above 0 reaches somewhere.

    From the means of the columns: u = max_j F_oj / v_j, v = max_o F_oj / u_o, then u again, after which neither
    changes. Equal to F where that has rank one.
    """
    columns = fisher.mean(0)
    columns = torch.where(columns > 0, columns, columns.max())
    if not bool((columns > 0).all()):
        return torch.ones_like(fisher[:, 0]), torch.ones_like(columns)
    rows = _largest(fisher / columns)
    columns = _largest(fisher.T / rows)
    # a little more, so that rounding leaves no ratio above 1
    return _largest(fisher / columns) * (1 + 1e-14), columns


def _largest(ratios: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows"]:
    """The largest of each row; where that is 0, of all."""
    largest = ratios.amax(1)
    return torch.where(largest > 0, largest, largest.max())


def em(
    weight: Float[Tensor, "out in"],
    fisher: Float[Tensor, "out in"],
    left: Float[Tensor, "out r"],
    right: Float[Tensor, "r in"],
    steps: int,
    tolerance: float,
) -> Fit:
    """X ← the best rank r, in the metric Σ u_o v_j (·)², of S ∘ W + (1 − S) ∘ X, where S = F / (u vᵀ) ≤ 1.

    With u and v constant this is Srebro and Jaakkola's expectation-maximisation (section 3): what is missing of W is
    filled in by X. Their argument holds for every majorant u vᵀ of F; a tighter one makes longer steps, and one step is
    all where F has rank one. X is taken ahead of its last move (Nesterov's sequence); where that raises the objective,
    the step is made anew from X itself and the sequence begins again. Costs one `eigh` of the smaller side a step.
    """
    rows, columns = majorant(fisher)
    share = fisher / (rows[:, None] * columns)
    a, b, rank = rows.sqrt()[:, None], columns.sqrt(), left.shape[1]
    scaled = a * weight * b

    def step(start: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor, Tensor, float]:
        filled = start + share * (scaled - start)
        basis = directions(filled, None)[0][:, :rank]
        spread = basis.T @ filled
        product = basis @ spread
        return basis, spread, product, _error(share, scaled, product)

    now = before = (a * left) @ (right * b)
    history, momentum = [_error(share, scaled, now)], 1.0
    whole = float((share * scaled.square()).sum())
    while not _finished(history, steps, tolerance, whole):
        longer = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        basis, spread, product, error = step(now + (momentum - 1) / longer * (now - before))
        if error > history[-1] and momentum > 1:
            longer = 1.0
            basis, spread, product, error = step(now)
        if error >= history[-1]:
            break
        before, now, momentum = now, product, longer
        left, right = basis / a, spread / b
        history.append(error)
    return Fit(left, right, tuple(history))


def als(
    weight: Float[Tensor, "out in"],
    fisher: Float[Tensor, "out in"],
    left: Float[Tensor, "out r"],
    right: Float[Tensor, "r in"],
    steps: int,
    tolerance: float,
) -> Fit:
    """Alternating least squares: a step is the best L for R, then the best R for that L.

    out + in systems of r × r a step, 2 · out · in · r² multiplications to form them.
    """
    history = [objective(weight, fisher, left, right)]
    whole = float((fisher * weight.square()).sum())
    while not _finished(history, steps, tolerance, whole):
        moved, basis = refit(weight, fisher, left, right)
        other, basis = refit(weight.T, fisher.T, basis.T, moved.T)
        error = objective(weight, fisher, basis.T, other.T)
        if error >= history[-1]:
            break
        left, right = basis.T, other.T
        history.append(error)
    return Fit(left, right, tuple(history))


def refit(
    weight: Float[Tensor, "out in"],
    fisher: Float[Tensor, "out in"],
    left: Float[Tensor, "out r"],
    right: Float[Tensor, "r in"],
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """(L, Q): the rows of Q an orthonormal basis of those of R, each row of L the best for it.

    Row o moves by (Q F_o Qᵀ + λ_o)⁻¹ Q F_o (w_o − l_o Q), F_o the diagonal of its weights. The ridge pulls to where the
    row was, not to 0: so the objective itself does not rise, and what weights of 0 leave open stays as it was.
    """
    basis, triangle = torch.linalg.qr(right.T)
    left = left @ triangle.T
    moved, rank = torch.empty_like(left), left.shape[1]
    at_once = max(1, AT_ONCE // max(1, basis.numel() + rank**2))
    for rows in torch.arange(len(weight), device=weight.device).split(at_once):
        weighted = fisher[rows, :, None] * basis
        systems = weighted.mT @ basis
        missed = (fisher[rows] * (weight[rows] - left[rows] @ basis.T)) @ basis
        diagonal = systems.diagonal(dim1=1, dim2=2)
        size = diagonal.mean(1, keepdim=True)
        diagonal += RIDGE * torch.where(size > 0, size, 1.0)
        factor = torch.linalg.cholesky(systems)
        moved[rows] = left[rows] + torch.cholesky_solve(missed[:, :, None], factor)[:, :, 0]
    return moved, basis.T


def _error(share: Float[Tensor, "out in"], scaled: Float[Tensor, "out in"], product: Float[Tensor, "out in"]) -> float:
    """The objective in the coordinates of the majorant."""
    return float((share * (scaled - product).square()).sum())


def _finished(history: list[float], steps: int, tolerance: float, whole: float) -> bool:
    """Whether no step is left, the factors are exact, or the last step gained too little."""
    if len(history) > steps or history[-1] <= NOTHING * whole:
        return True
    return len(history) > 1 and history[-2] - history[-1] < tolerance * history[-2]
