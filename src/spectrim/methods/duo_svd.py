"""Columns kept as they are beside a low rank for the others: the column level of Duo-SVD (arXiv 2510.19385, version 2).

For the parameters P of rank r, W = [W_C, W_S] (C kept inputs, c of them; S the others) becomes

    y = U V x_S + W_C x_C,    U V = P_r' W_S,  P_r' onto the r' best directions of W_S G_SS W_Sᵀ,

with E² = Σ_{i ≥ r'} λ_i(W_S G_SS W_Sᵀ): kept columns leave no residual, so this is Σ‖y − y′‖² itself and the factored
part is the optimum for its C. Columns are taken in the fixed order of ‖(W − P_r W)_j‖² G_jj, the energy that the
residual of column j alone has at the output. A sacrifice of d ranks (r' = r − d) pays for
c = ⌊(P − cost(r')) / (m − r')⌋ columns, plain (r'(m+n−c) + mc parameters) as pivot (m(c+r') + r'(n−c−r'), kept columns
being pivots that nothing is mixed from). d is searched by golden section; columns are taken where E falls by more than
`accept`, else the rank stays.

`columns = "compensated"` is not of the paper: the kept columns are refitted to what the factored part misses, which
replaces G_SS by its Schur complement G_SS − G_SC G_CC⁺ G_CS and never has a larger error for the same C and r'.

Needs G, also after the block is gone: in² numbers a matrix. Costs one `eigh` as whitening, then 8 to 18 float64
`eigvalsh` of the smaller side a matrix, each with c·in·out + out²·in multiplications, and one more `eigh` for the cut.
Deviations from the public code: no Cholesky factor, inverse or damping (G may be singular); c is rounded down, not to
the nearest, so that the parameters are never exceeded; the best of all points tried counts, d = r among them (c alone,
r' = 0, can be the best); inputs that are always 0 are never kept; no search where rank r leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.calibrate.statistics import Gram, Statistic
from spectrim.core.budget import rank_cost
from spectrim.core.linalg import complement, directions, energies_without, pseudo_inverse
from spectrim.core.plan import Candidate, Choice, Measured, Part, Target, Tensors, Units, balance
from spectrim.core.registry import Decomposer, Statistics, decomposer

Columns = Literal["exact", "compensated"]
# Eigenvalues of G_CC, scaled to diagonal 1, below this share of the largest are taken as 0 when columns are refitted.
FLOOR = 1e-10
# E of rank r over that of rank 0 below which there is nothing to gain.
NOTHING = 1e-7
# What the format of a rank becomes when columns stay beside it.
WITH_COLUMNS = {"low_rank": "low_rank_columns", "pivot": "pivot"}


@decomposer("column_svd")
@dataclass(frozen=True)
class ColumnSVD(Decomposer):
    """Whitened SVD that gives up ranks for columns where that lowers the error at the same parameters.

    columns: kept as they are, or refitted; accept: the share by which E has to fall for columns to be taken.
    """

    columns: Columns = "exact"
    accept: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.accept < 1:
            raise ValueError(f"accept is {self.accept}: the share of the error to gain is at least 0 and below 1")

    @property
    def first_like(self) -> str:
        """Whitened SVD: columns come in when a choice is settled."""
        return "spectrim.methods.svd.WhitenedSVD()"

    @property
    def scalable(self) -> bool:
        """No: columns are chosen for a number of ranks."""
        return False

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The Gram of the inputs."""
        return (Gram(),)

    @property
    def keeps(self) -> tuple[Statistic, ...]:
        """The Gram again: which columns to keep depends on the parameters."""
        return (Gram(),)

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """Rank units of a single-matrix target, as of whitened SVD; columns are settled later."""
        (part,) = target.parts
        weight, gram = weights[part.module], stats[part.module][Gram()]
        left, energies = directions(weight, gram)
        tensors = {"left": left.to(_dtype(weight))}
        units = Units("rank", energies.sqrt(), energies, part.out_features + part.in_features)
        return self.restore(
            target, (units,), lambda: tensors, lambda: weights, lambda: {part.module: {Gram(): gram}}
        )  # fmt: skip

    def restore(
        self, target: Target, units: tuple[Units, ...], tensors: Tensors, weights: Tensors, statistics: Measured
    ) -> Candidate:
        """The candidate, which settles columns itself."""
        return ColumnCandidate(
            target, units, tensors, weights, statistics=statistics, columns=self.columns, accept=self.accept
        )


@dataclass(frozen=True)
class ColumnCandidate(Candidate):
    """Ranks of one matrix, some of which may be given up for columns."""

    columns: Columns = "exact"
    accept: float = 0.01

    def settle(self, choice: Choice) -> Choice:
        """Fewer ranks and some columns for the parameters of `choice` where the error falls by more than `accept`.

        A choice that has columns, or is no smaller than dense, is returned as it is.
        """
        (part,) = self.target.parts
        format, rank = choice.formats[part.module], choice.counts.get("rank", 0)
        if choice.counts.get("column") or format not in WITH_COLUMNS:
            return choice
        energies = self.rank_units.errors
        assert energies is not None
        before, whole = float(energies[rank:].sum()), float(energies.sum())
        plain = replace(choice, error=before)
        if rank == 0 or before <= NOTHING**2 * whole or rank_cost(format, part, rank) >= part.parameters:
            return plain
        trade = _Trade(self, part, format, rank)
        tried = search(rank, lambda given_up: trade.error(given_up) if given_up else before)
        given_up = min(tried, key=lambda d: (tried[d], d))
        columns = trade.kept(given_up)
        if len(columns) == 0 or tried[given_up] ** 0.5 >= (1 - self.accept) * before**0.5:
            return plain
        return replace(
            choice,
            formats={part.module: WITH_COLUMNS[format]},
            counts={"rank": rank - given_up, "column": len(columns)},
            error=tried[given_up],
            keep={"column": tuple(sorted(columns.tolist()))},
        )

    def cut(self, choice: Choice) -> dict[str, dict[str, Tensor]]:
        """As of any rank; with columns also `columns` and `kept`, and `right` over the other inputs."""
        if not choice.counts.get("column"):
            return super().cut(choice)
        (part,), rank = self.target.parts, choice.counts["rank"]
        assert choice.keep is not None
        weight, gram = self.weights()[part.module], self.statistics()[part.module][Gram()]
        dtype, gram = _dtype(weight), gram.to(weight.device, torch.float64)
        columns = torch.tensor(choice.keep["column"], device=weight.device)
        rest, exact = complement(columns, part.in_features), weight.double()
        metric, kept = gram[rest][:, rest], weight[:, columns].to(dtype)
        shared = gram[rest][:, columns]
        if self.columns == "compensated":
            slopes = shared @ pseudo_inverse(gram[columns][:, columns], FLOOR)
            metric = metric - slopes @ shared.T
        left = directions(exact[:, rest], metric)[0][:, :rank]
        right = left.T @ exact[:, rest]
        if self.columns == "compensated":
            kept = (exact[:, columns] + (exact[:, rest] - left @ right) @ slopes).to(dtype)
        left, right = balance(left, right)
        return {part.module: {"left": left.to(dtype), "right": right.to(dtype), "columns": columns, "kept": kept}}


class _Trade:
    """What giving up ranks of one matrix for columns comes to."""

    def __init__(self, candidate: ColumnCandidate, part: Part, format: str, rank: int) -> None:
        weight = candidate.weights()[part.module].double()
        self.part, self.format, self.rank = part, format, rank
        self.gram = candidate.statistics()[part.module][Gram()].to(weight)
        left = candidate.tensors()["left"][:, :rank].to(weight)
        self.order = column_order(weight, left, self.gram)
        # eigenvalues beside 0 are those of R G Rᵀ, W = Q R, on the smaller side
        self.weight = torch.linalg.qr(weight, mode="r").R if len(weight) > weight.shape[1] else weight
        self.moved = self.gram @ self.weight.T
        self.floor = FLOOR if candidate.columns == "compensated" else None

    def kept(self, given_up: int) -> Int[Tensor, "c"]:
        """The columns that the parameters of that many ranks pay for."""
        if given_up == 0:
            return self.order[:0]
        rank = self.rank - given_up
        free = rank_cost(self.format, self.part, self.rank) - rank_cost(self.format, self.part, rank)
        return self.order[: free // (self.part.out_features - rank)]

    def error(self, given_up: int) -> float:
        """E² with those columns and what is left of the rank."""
        energies = energies_without(self.weight, self.gram, self.moved, self.kept(given_up), self.floor)
        return float(energies[self.rank - given_up :].sum())


def column_order(
    weight: Float[Tensor, "out in"], left: Float[Tensor, "out r"], gram: Float[Tensor, "in in"]
) -> Int[Tensor, "k"]:
    """Inputs by ‖(W − left leftᵀ W)_j‖² G_jj, largest first; without those where that is 0."""
    residual = weight - left @ (left.T @ weight)
    score, order = torch.sort(residual.square().sum(0) * gram.diagonal(), descending=True, stable=True)
    return order[score > 0]


def search(rank: int, error: Callable[[int], float]) -> dict[int, float]:
    """Errors of the sacrifices d that were tried: both ends of 0..rank, two probes, then by golden section.

    The section is left out where neither probe, 0.382 r and 0.090 r, is below the error at d = 0; it ends at a bracket
    below 3. Each d is asked for once. Source: Duo-SVD, section on columns; both ends are ours.
    """
    tried: dict[int, float] = {}

    def at(given_up: int) -> float:
        if given_up not in tried:
            tried[given_up] = error(given_up)
        return tried[given_up]

    low, high, first, second = 0, rank, round(0.382 * rank), round(0.618 * rank)
    before = at(low)
    at(high)
    if min(at(first), at(round(0.09 * rank))) >= before:
        return tried
    while high - low >= 3 and first < second:
        if at(first) <= at(second):
            high, second = second, first
            first = round(low + 0.382 * (high - low))
        else:
            low, first = first, second
            second = round(low + 0.618 * (high - low))
    return tried


def _dtype(weight: Tensor) -> torch.dtype:
    """That of a weight's factors."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
