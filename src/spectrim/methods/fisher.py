"""Low rank under element-wise Fisher weights: TFWSVD (Hua et al., EMNLP 2022, arXiv 2211.09718).

    min Σ_oj F_oj (W − W′)²_oj   over W′ of rank r,     F = Σ over sequences of (∂loss/∂W)²

FWSVD sums F over the outputs and so has a closed form; here every entry has its own weight, and the minimum is sought
by steps from FWSVD's answer, which never raise the objective: `core.weighted`. The answer depends on the rank, so it is
made at the cut. Ranks are FWSVD's units: scores are the singular values of W diag(i), i_j² = Σ_o F_oj.

Needs a backward pass over the whole model, and F after it: 4 bytes a weight in memory and in the work directory, twice
the size of a bfloat16 model. A cut costs up to `steps` times one float64 `eigh` of the smaller side (`em`), or as many
times 2 · out · in · r² multiplications (`als`); memory, six float64 matrices of the weight's size.

Only the abstract was at hand. It says that optimisers were compared, not which won with what settings, and it has a
metric that tells where SVD fails: solver, steps, tolerance, start and `weighted.dispersion` are our own decisions. So
is the form of em (a majorant of rank one in place of a constant, and acceleration), and so are the floors of F, which
are FWSVD's taken by entry. The paper tunes the model afterwards; that is not part of this.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.calibrate.statistics import Fisher, Statistic
from spectrim.core.linalg import directions
from spectrim.core.plan import Candidate, Choice, Measured, Target, Tensors, Units, balance
from spectrim.core.registry import Decomposer, Statistics, decomposer
from spectrim.core.weighted import Solver, dispersion, floored, solve

logger = logging.getLogger(__name__)


@decomposer("tfwsvd")
@dataclass(frozen=True)
class TFWSVD(Decomposer):
    """The rank r nearest to W with every entry weighed by its own Fisher information.

    solver: see `weighted.solve`; steps: at most, of each solver, 0 being FWSVD; tolerance: the relative fall of the
    objective below which a step is the last; largest_spread: of the weights √F, and of FWSVD's.
    """

    solver: Solver = "em"
    steps: int = 50
    tolerance: float = 1e-4
    largest_spread: float = 1e4

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}: it must be 0 (FWSVD itself) or more")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}: a share of the objective, at least 0 and below 1")
        if not self.largest_spread >= 1:
            raise ValueError(f"largest_spread is {self.largest_spread}: the cap on their ratio cannot be below 1")

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Squared gradients by entry."""
        return (Fisher(),)

    @property
    def keeps(self) -> tuple[Statistic, ...]:
        """The same: the answer depends on the rank. 4 bytes a weight in the work directory."""
        return (Fisher(),)

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """Rank units of a single-matrix target, as of FWSVD; the factors are made at the cut.

        Raises ValueError where the Fisher information is not finite, naming the target.
        """
        (part,) = target.parts
        weight, fisher = weights[part.module], stats[part.module][Fisher()]
        if not bool(fisher.isfinite().all()):
            raise ValueError(f"{target.name}: Fisher information is not finite, its gradients overflowed")
        left, energies = directions(weight, floored(fisher.double().sum(0), self.largest_spread))
        logger.debug("%s: dispersion of its Fisher information %.3g", target.name, dispersion(fisher))
        tensors = {"left": left.to(_dtype(weight))}
        units = Units("rank", energies.sqrt(), None, part.out_features + part.in_features)
        return self.restore(
            target, (units,), lambda: tensors, lambda: weights, lambda: {part.module: {Fisher(): fisher}}
        )  # fmt: skip

    def restore(
        self, target: Target, units: tuple[Units, ...], tensors: Tensors, weights: Tensors, statistics: Measured
    ) -> Candidate:
        """The candidate, which solves for its factors when it is cut."""
        return FisherCandidate(target, units, tensors, weights, statistics=statistics, method=self)


@dataclass(frozen=True)
class FisherCandidate(Candidate):
    """Ranks of one matrix under element-wise weights."""

    method: TFWSVD = TFWSVD()

    def cut(self, choice: Choice) -> dict[str, dict[str, Tensor]]:
        """The factors solved for at this rank; those of FWSVD at rank 0, at full rank and where values were learned."""
        (part,) = self.target.parts
        rank = choice.counts.get("rank", 0)
        whole = not 0 < rank < min(part.out_features, part.in_features)
        if whole or self.learned or choice.formats[part.module] == "dense":
            return super().cut(choice)
        weight = self.weights()[part.module]
        exact = weight.double()
        left = self.tensors()["left"][:, :rank].to(exact)
        fisher = floored(self.statistics()[part.module][Fisher()].to(exact), self.method.largest_spread)
        fit = solve(exact, fisher, left, left.T @ exact, self.method.solver, self.method.steps, self.method.tolerance)
        logger.debug(
            "%s at rank %d: objective %.3g after %d steps, was %.3g",
            self.target.name, rank, fit.history[-1], len(fit.history) - 1, fit.history[0],
        )  # fmt: skip
        left, right = balance(fit.left, fit.right)
        return {part.module: {"left": left.to(_dtype(weight)), "right": right.to(_dtype(weight))}}


def _dtype(weight: Tensor) -> torch.dtype:
    """That of a weight's factors."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
