"""Ranks by energy and cosine: `unirank` sorts all directions of the model once; `cosine_softmax` shares by block.

`unirank` (UniRank, arXiv 2606.21847, abstract). Direction i of a matrix in block l has the score

    s_i = I_l · σ_i² / Σ_j σ_j²,    I_l = 1 − c_l,

σ its spectrum in whatever metric the decomposer has, c_l the mean cosine over tokens of the residual stream before and
after the block. All scores are sorted once and the best directions kept until the budget is spent. In a whitened
spectrum the kept scores add up to Σ I (1 − relative output error), which `cost_mode: per_param` maximises in parameters
instead of in directions. Needs one number a block beside what the decomposer needs; costs one sort of all scores.

Deviations, where the abstract leaves room: past its break-even rank a matrix has one last step, to dense, at what is
left of its parameters and with the score of the first direction beyond (to count m + n for every direction would charge
nearly dense matrices up to twice); after the first step that does not fit, later ones that do are still taken; I is at
least 1e-4 of the largest one, so that no block is all ties at 0; a matrix keeps rank 1.

`cosine_softmax` (the first version of CPSVD's allocation, from public code): block l loses the fraction
d_l ∝ softmax_l(−(1 − c_l) / t) of its parameters, every matrix in it alike. Published without a guard against d_l > 1;
here d_l is clipped at 1 and the common factor such that the budget is spent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.calibrate.statistics import Cosine, Statistic, SublayerCosine
from spectrim.core.plan import Candidate, Plan, Target
from spectrim.core.registry import Allocator, Problem, Sees, allocator
from spectrim.core.spend import hull, least_steps, rank_steps, single, spend_ranks

ATTENTION = ("q", "k", "v", "o", "qkv")  # roles before the middle of a block; all others are of its FFN
LEAST_IMPORTANCE = 1e-4  # of the largest one
LEAST_SHARE = 1e-30  # of the largest one: what divides is not 0


@allocator("unirank")
@dataclass(frozen=True)
class UniRank(Allocator):
    """The directions of largest importance × energy share in the whole model."""

    granularity: Literal["layer", "sublayer"] = "layer"
    cost_mode: Literal["none", "per_param"] = "none"
    energy_power: Literal[1, 2] = 2
    importance_power: float = 1.0
    least: int = 1
    sees: ClassVar[Sees] = "units"
    grain: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.importance_power < math.inf:
            raise ValueError(f"importance_power is {self.importance_power}: it must be 0 (energy alone) or more")
        if self.least < 0:
            raise ValueError(f"least is {self.least}: the rank that every matrix keeps cannot be below 0")

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The cosine over blocks or over their sub-layers; nothing for energy alone."""
        if self.importance_power == 0:
            return ()
        return (Cosine(),) if self.granularity == "layer" else (SublayerCosine(),)

    def check(self, problem: Problem) -> None:
        """Raise ValueError when `least` ranks everywhere exceed the budget, or for a target that has no ranks."""
        least_steps(problem.targets, problem.format, problem.budget, self.least, problem.fixed)

    def allocate(self, problem: Problem) -> Plan:
        """See `spend.spend_ranks`.

        Raises ValueError when `least` ranks everywhere exceed the budget, for a target without rank units, and for a
        spectrum or a cosine that is not finite, naming it.
        """
        assert problem.candidates is not None
        weights = self._importances(problem)
        scores = {
            target.name: self._scores(problem, target, problem.candidates[target.name], weights[target.name])
            for target in problem.targets
        }
        return spend_ranks(problem.targets, scores, problem.format, problem.budget, self.least, problem.fixed)

    def _importances(self, problem: Problem) -> dict[str, float]:
        """I of each target, to its power."""
        if not self.needs:
            return {target.name: 1.0 for target in problem.targets}
        found = {target.name: 1 - _cosine(problem, target, self.needs[0]) for target in problem.targets}
        # all blocks without effect: all alike
        largest = max(found.values(), default=0.0)
        relative = {name: value / largest if largest > 0 else 1.0 for name, value in found.items()}
        return {name: max(value, LEAST_IMPORTANCE) ** self.importance_power for name, value in relative.items()}

    def _scores(self, problem: Problem, target: Target, candidate: Candidate, weight: float) -> Float[Tensor, "n"]:
        """The score of each step of a matrix: one for each rank that is smaller than dense, and the one to dense."""
        energies = weight * _shares(target, candidate, self.energy_power)
        costs = rank_steps(problem.format, single(target), problem.fixed.get(target.name, 0))
        beyond = len(costs) - 1
        # a spectrum may end early: of the low-rank part of a matrix, say
        energies = torch.nn.functional.pad(energies, (0, max(0, beyond + 1 - len(energies))))
        if self.cost_mode == "none":
            return energies[: beyond + 1]
        values = torch.cat([energies[:beyond], energies[beyond:].sum(0, keepdim=True)])
        # what is kept in any case is no part of the choice
        kept = min(self.least, beyond)
        return torch.cat([torch.full_like(values[:kept], math.inf), hull(values[kept:], costs[kept:])])


def _shares(target: Target, candidate: Candidate, power: int) -> Float[Tensor, "n"]:
    """σ^power over their sum, float64; 0 for a matrix without energy."""
    kinds = [units.kind for units in candidate.units]
    if "rank" not in kinds:
        raise ValueError(
            f"unirank shares out ranks, but {target.name} (role {target.role}) has units of kind {', '.join(kinds)}: "
            "match it in a group of its own, with another allocator"
        )
    spectrum = candidate.rank_units.scores.to("cpu", torch.float64)
    if not bool(spectrum.isfinite().all()):
        raise ValueError(
            f"the spectrum of {target.name} has values that are not finite: its weight or its calibration "
            "statistics overflowed; decompose it from finite ones"
        )
    # the largest first, so that squares neither overflow nor vanish
    energies = (spectrum / spectrum.max().clamp_min(torch.finfo(spectrum.dtype).tiny)) ** power
    return energies / energies.sum().clamp_min(torch.finfo(spectrum.dtype).tiny)


def _cosine(problem: Problem, target: Target, statistic: Statistic) -> float:
    """The cosine over what a target is in, the mean over its blocks. Raises ValueError where it is not finite."""
    assert problem.statistics is not None
    place = 1 if statistic == SublayerCosine() and target.role not in ATTENTION else 0
    cosine = sum(float(problem.statistics[block][statistic][place]) for block in target.blocks) / len(target.blocks)
    if not math.isfinite(cosine):
        raise ValueError(
            f"the cosine over the blocks {target.blocks} of {target.name} is {cosine}: no token was calibrated on, or "
            "hidden states are not finite"
        )
    return cosine


@allocator("cosine_softmax")
@dataclass(frozen=True)
class CosineSoftmax(Allocator):
    """Every block loses a fraction ∝ exp(−(1 − cosine) / temperature) of its parameters, its matrices all alike."""

    temperature: float = 0.2
    least: int = 1
    sees: ClassVar[Sees] = "units"
    grain: ClassVar[int] = 1
    needs: ClassVar[tuple[Statistic, ...]] = (Cosine(),)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it must be above 0; 0.2 is as published")
        if self.least < 0:
            raise ValueError(f"least is {self.least}: the rank that every matrix keeps cannot be below 0")

    def check(self, problem: Problem) -> None:
        """Raise ValueError when `least` ranks everywhere exceed the budget, or for a target that has no ranks."""
        least_steps(problem.targets, problem.format, problem.budget, self.least, problem.fixed)

    def allocate(self, problem: Problem) -> Plan:
        """Steps in the order in which a falling common factor λ in d_l = min(1, λ w_l) pays for them.

        The order does not depend on the budget, so a larger one never keeps less. Raises ValueError when `least` ranks
        everywhere exceed the budget, for a target that is no single matrix and for a cosine that is not finite.
        """
        found = {target.name: _cosine(problem, target, Cosine()) for target in problem.targets}
        scores = {target.name: _thresholds(problem, target, self._share(found, target)) for target in problem.targets}
        return spend_ranks(problem.targets, scores, problem.format, problem.budget, self.least, problem.fixed)

    def _share(self, cosines: Mapping[str, float], target: Target) -> float:
        """w of a target, relative to the largest one."""
        exponent = (cosines[target.name] - max(cosines.values())) / self.temperature
        return max(math.exp(exponent), LEAST_SHARE)


def _thresholds(problem: Problem, target: Target, share: float) -> Float[Tensor, "n"]:
    """The λ from which on each step is within what the matrix keeps: 1 − λ w = its parameters after the step."""
    part, fixed = single(target), problem.fixed.get(target.name, 0)
    costs = rank_steps(problem.format, part, fixed)
    # the bias that comes with a rank is in the fraction kept; the last step ends at all parameters
    after = (costs.cumsum(0) + (fixed if len(costs) > 1 else 0)).double()
    return (1 - after / part.parameters) / share
