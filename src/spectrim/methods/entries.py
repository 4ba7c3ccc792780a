"""Pruning of single weights: by magnitude, and by Wanda (Sun et al., ICLR 2024, arXiv 2306.11695).

The matrix that is left is sparse and no more: no rank. Kept weights are unchanged. Scores of w_oj:

    magnitude  |w_oj|, compared within the matrix;    wanda  |w_oj| ‖x_j‖, compared within each output row,

‖x_j‖ the norm of an input over the calibration tokens. So wanda takes every row's best entry first, then every row's
second best, and so on, the best of these first: rows keep equally many, to within one. What a unit of wanda scores is
the root mean square, over the rows, of the scores of that place in their row; it falls from place to place, its
squares add up to those of all entries, and it is what allocators see that compare matrices.

Magnitude needs nothing, wanda the column sums of x². Costs one sort of the matrix. Keeps for each entry its
place (int32, or int64 for 2³¹ entries and more) and score (float32): 8 bytes a parameter in the work directory.
Deviations: none of the scores. Kept entries are counted as parameters one each, their indices as bytes; the published
tables count a weight that is set to zero as removed, which is the same number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.calibrate.statistics import Norm, Statistic
from spectrim.core.plan import Candidate, Kind, Measured, Target, Tensors, Units
from spectrim.core.registry import Decomposer, Statistics, decomposer
from spectrim.core.sparse import EntryCandidate


@dataclass(frozen=True)
class Prune(Decomposer):
    """Entries by a score of each; subclasses say which."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Entries alone."""
        return ("entry",)

    def order(self, weight: Float[Tensor, "out in"], stats: Statistics) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
        """Scores, none above the one before it, and the places row · in + column that they belong to."""
        raise TypeError(f"{type(self).__name__} does not say how it orders entries")

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """Entry units of a single-matrix target. Raises ValueError for values that are not finite."""
        (part,) = target.parts
        weight = weights[part.module]
        wide = weight if weight.dtype == torch.float64 else weight.float()
        scores, places = self.order(wide.abs(), stats[part.module])
        if not bool(scores.isfinite().all()):
            raise ValueError(f"scores of {part.module} are not finite: its weight or calibration statistics overflowed")
        small = part.parameters <= torch.iinfo(torch.int32).max
        tensors = {"entries": places.to(torch.int32 if small else torch.int64)}
        return self.restore(
            target, (Units("entry", scores.to(wide.dtype), None, 1),), lambda: tensors, lambda: weights, dict
        )

    def restore(
        self, target: Target, units: tuple[Units, ...], tensors: Tensors, weights: Tensors, statistics: Measured
    ) -> Candidate:
        """The candidate, which settles ranks into entries itself."""
        return EntryCandidate(target, units, tensors, weights, statistics=statistics)


@decomposer("magnitude")
@dataclass(frozen=True)
class Magnitude(Prune):
    """The entries largest in magnitude."""

    def order(self, weight: Float[Tensor, "out in"], stats: Statistics) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
        """|w|; equal ones in the order of their places."""
        scores, places = torch.sort(weight.flatten(), descending=True, stable=True)
        return scores, places


@decomposer("wanda")
@dataclass(frozen=True)
class Wanda(Prune):
    """The same number of entries in every output row, those largest in |w_oj| ‖x_j‖."""

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Column sums of x²."""
        return (Norm(power=2),)

    def order(self, weight: Float[Tensor, "out in"], stats: Statistics) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
        """Place by place within the rows; of one place the best first, equal ones in the order of rows."""
        # a constant factor changes nothing within a matrix, but between matrices: float64 keeps it
        weighted = weight.double() * stats[Norm(power=2)].to(weight.device, torch.float64).sqrt()
        within, columns = torch.sort(weighted, dim=1, descending=True, stable=True)
        levels, rows = torch.sort(within.T, dim=1, descending=True, stable=True)
        places = rows * weight.shape[1] + columns.T.gather(1, rows)
        means = levels.square().mean(1).sqrt()
        # the rounding of the mean may break what holds exactly: no place is worth more than the one before
        means = torch.cummin(means, 0).values
        return means.repeat_interleave(weight.shape[0]), places.flatten()
