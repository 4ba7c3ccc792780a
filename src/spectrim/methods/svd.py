"""The baselines: plain, activation-scaled, Fisher-weighted, input-weighted and whitened SVD; uniform allocation.

All five minimise tr((W − W′) M (W − W′)ᵀ) over matrices of rank r and differ in the metric M alone:

| name | M | source |
| --- | --- | --- |
| svd | I | Eckart and Young 1936 |
| asvd | diag(mean abs x_j), as S² with S = diag(mean abs x_j)^α, α = 0.5 | ASVD, arXiv 2312.05821, section 3 |
| fwsvd | diag(Σ_o F_oj), F the empirical Fisher | FWSVD, arXiv 2207.00112, equations 2 and 3 |
| input_weighted_svd | diag(Σ x_j²) | LoRAP, arXiv 2404.09695, section 3.1 |
| whitened_svd | G = Σ x xᵀ | SVD-LLM, arXiv 2403.07378, section 3.1; here without its Cholesky factor |

W′ = U_r U_rᵀ W, U the eigenvectors of W M Wᵀ: `linalg.directions`. One float64 `eigh` of min(out, in) a matrix,
out·in² + out²·in multiplications to form it; memory min(out, in)² beside the weight and the metric.
Deviations: ASVD's own search over ranks is left out (the allocator is a separate choice here). FWSVD's eps is
1e-6 of the mean and the ratio of its weights is capped, as published factors overflow otherwise (both public codes
floor it, each differently).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.calibrate.statistics import FisherColumns, Gram, Norm, Statistic
from spectrim.core import budget
from spectrim.core.linalg import Metric, directions
from spectrim.core.plan import Candidate, Plan, Target, Units
from spectrim.core.registry import Allocator, Decomposer, Problem, Sees, Statistics, allocator, decomposer


@dataclass(frozen=True)
class MetricSVD(Decomposer):
    """Low rank in a metric on the inputs; subclasses say which."""

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Statistics wanted: none for the identity."""
        return ()

    def metric(self, stats: Statistics) -> Metric:
        """M: None (identity), a diagonal, or a matrix."""
        return None

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """Rank units of a single-matrix target: scores are singular values of W M^½."""
        (part,) = target.parts
        weight = weights[part.module]
        left, energies = directions(weight, self.metric(stats[part.module]))
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        tensors = {"left": left.to(dtype)}
        errors = energies if self.output_error else None
        units = Units("rank", energies.sqrt(), errors, part.out_features + part.in_features)
        return Candidate(target, (units,), lambda: tensors, lambda: weights)

    @property
    def output_error(self) -> bool:
        """Whether the metric measures Σ‖y − y′‖² itself, so that squared scores are errors at the output."""
        return False


@decomposer("svd")
@dataclass(frozen=True)
class PlainSVD(MetricSVD):
    """SVD of the weight."""


@decomposer("asvd")
@dataclass(frozen=True)
class ActivationSVD(MetricSVD):
    """SVD of W S, S = diag(mean abs x_j)^alpha."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}: it must be 0 (plain SVD) or more; 0.5 is as published")

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Column sums of abs x."""
        return (Norm(power=1),)

    def metric(self, stats: Statistics) -> Metric:
        """S², scaled to mean 1 (a constant changes nothing)."""
        size = stats[Norm(power=1)]
        return (size / size.mean().clamp_min(torch.finfo(size.dtype).tiny)) ** (2 * self.alpha)


@decomposer("fwsvd")
@dataclass(frozen=True)
class FisherSVD(MetricSVD):
    """SVD of W diag(i), i_j² = Σ_o F_oj: needs a backward pass over the whole model."""

    largest_spread: float = 1e4

    def __post_init__(self) -> None:
        if not self.largest_spread >= 1:
            raise ValueError(f"largest_spread is {self.largest_spread}: the cap on their ratio cannot be below 1")

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Column sums of squared gradients."""
        return (FisherColumns(),)

    def metric(self, stats: Statistics) -> Float[Tensor, "in"]:
        """i², with i floored at max(i) / largest_spread and 1e-6 of its mean added to its square."""
        fisher = stats[FisherColumns()]
        fisher = fisher + 1e-6 * fisher.mean().clamp_min(torch.finfo(fisher.dtype).tiny)
        return fisher.clamp_min(float(fisher.max()) / self.largest_spread**2)


@decomposer("input_weighted_svd")
@dataclass(frozen=True)
class InputWeightedSVD(MetricSVD):
    """SVD of W diag(‖x_j‖)."""

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Column sums of x²."""
        return (Norm(power=2),)

    def metric(self, stats: Statistics) -> Metric:
        """diag(Σ x²)."""
        return stats[Norm(power=2)]


@decomposer("whitened_svd")
@dataclass(frozen=True)
class WhitenedSVD(MetricSVD):
    """The exact optimum of Σ‖W x − W′ x‖² over the calibration tokens at every rank."""

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The Gram of the inputs."""
        return (Gram(),)

    def metric(self, stats: Statistics) -> Metric:
        """G."""
        return stats[Gram()]

    @property
    def output_error(self) -> bool:
        """Yes: tr((W − W′) G (W − W′)ᵀ) is that sum."""
        return True


@allocator("uniform")
@dataclass(frozen=True)
class Uniform(Allocator):
    """The same share of parameters for every target, units a multiple of `multiple`, the rest of the budget spent."""

    multiple: int = 1
    needs = ()
    sees: ClassVar[Sees] = "shapes"  # not a field: no setting

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}: ranks can be rounded to multiples of 1, 8, 16, 64, …")

    @property
    def grain(self) -> int:
        """One step of rank."""
        return self.multiple

    def allocate(self, problem: Problem) -> Plan:
        """See `budget.even_ranks`. Raises ValueError when rank 1 everywhere exceeds the budget."""
        units = budget.even_ranks(problem.targets, problem.budget, problem.format, self.multiple, fixed=problem.fixed)
        return budget.rank_plan(problem.targets, units, problem.format, problem.budget, problem.fixed)
