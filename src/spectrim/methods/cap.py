"""CAP: one pool of directions and entries of all matrices (Zhou et al., ICLR 2026, arXiv 2505.03801, version 3).

First stage: robust PCA splits each weight, W ≈ L + S (`core.rpca`), with λ = penalty / √max(out, in). Its candidates

    a direction of L:  value σ_i, cost m + n (in the pivot form less);    an entry of S:  value |s_oj|, cost 1,

of all matrices are then weighed against each other in one budget. The paper learns a keeping probability for each by
policy gradient; here is what that starts from, the greedy order: best value² / cost first, the allocator `cap_greedy`.
Within one matrix `settle` makes of a rank that another allocator gave the mix with the largest sum of values².

What is kept was fitted next to the whole of the other part. `refit` therefore alternates S = W − L at the kept places
with L = the best rank r of W − S; the error never rises.

Needs no data (`weighting = "rms"`: column sums of x², kept too). Time: an `eigh` of the smaller side for each iteration
of the decomposition, up to 100, and for each alternation of the cut. Memory: eight float64 copies of one weight. The
work directory holds, beside both factors of L in float32, 16 bytes for each entry of S: int64 place, float32 value and
score; S may have more than half as many entries as W. Scores of all matrices are in memory as `cap_greedy` spends.

Deviations and choices of ours. The paper publishes λ with factor 1 (the default), no weighting and no refit (`refit =
0`). It does not say how L + S is iterated: a fixed penalty parameter, or a growing one (`mode`). The order by value² /
cost (the squared error that one parameter saves, were the parts orthogonal), `settle`, `refit`, `weighting` (robust PCA
of W D, D = diag(‖x_j‖), D² at least 1e-6 of its mean, undone by D⁻¹), the 2:4 `pattern` and `relative` are ours. A
factor of 0.5 on λ gave a lower error after the cut in a trial of ours (160 × 160, half the parameters).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectrim.calibrate.statistics import Norm, Statistic
from spectrim.core.budget import WITH_ENTRIES, count, rank_cost
from spectrim.core.bytes import reached
from spectrim.core.greedy import fill, kept_of
from spectrim.core.plan import Candidate, Choice, Kind, Measured, Plan, Target, Tensors, Units, balance
from spectrim.core.registry import Allocator, Decomposer, Problem, Sees, Statistics, allocator, decomposer
from spectrim.core.rpca import Mode, refit, robust_pca

logger = logging.getLogger(__name__)

Weighting = Literal["none", "rms"]
Pattern = Literal["none", "2:4"]
# D² is not below this share of its mean: columns of inputs that were always 0 could not be undone.
FLOOR = 1e-6


# --- directions and entries of one matrix ---


@decomposer("robust_pca")
@dataclass(frozen=True)
class RobustPCA(Decomposer):
    """Low rank plus sparse.

    mode, iterations, tolerance: of `rpca.robust_pca`; penalty: a factor on its λ. weighting: `rms` splits W D.
    refit: alternations after the cut. pattern: `2:4` limits S to the best 2 of each 4 neighbouring inputs.
    """

    mode: Mode = "fixed"
    penalty: float = 1.0
    iterations: int = 100
    tolerance: float = 1e-4
    weighting: Weighting = "none"
    refit: int = 10
    pattern: Pattern = "none"

    def __post_init__(self) -> None:
        if not 0 < self.penalty < math.inf:
            raise ValueError(f"penalty is {self.penalty}: the factor on λ must be above 0; 1 is as published")
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}: at least 1 is needed")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}: the relative residual to end at is in [0, 1)")
        if self.refit < 0:
            raise ValueError(f"refit is {self.refit}: the number of alternations is 0 (none, as published) or more")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Directions and entries."""
        return ("rank", "entry")

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Column sums of x² where inputs weigh."""
        return (Norm(power=2),) if self.weighting == "rms" else ()

    @property
    def keeps(self) -> tuple[Statistic, ...]:
        """The same again: refitting reads them."""
        return self.needs

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """Rank and entry units of a single-matrix target. Raises ValueError for values that are not finite."""
        (part,) = target.parts
        weight = weights[part.module].double()
        kept = {part.module: {statistic: stats[part.module][statistic] for statistic in self.keeps}}
        scale = _squares(kept[part.module]).sqrt().to(weight) if self.needs else torch.ones_like(weight[0])
        penalty = self.penalty / math.sqrt(max(weight.shape))
        try:
            found = robust_pca(weight * scale, penalty, self.mode, self.tolerance, self.iterations)
        except ValueError as error:
            raise ValueError(f"{part.module}: {error}") from error
        if found.residual > self.tolerance:
            logger.info("%s: residual %.1e after %d iterations", part.module, found.residual, found.iterations)
        sparse = found.sparse if self.pattern == "none" else found.sparse * best_2_of_4(found.sparse.abs())
        scores, order = torch.sort(sparse.abs().flatten(), descending=True, stable=True)
        order = order[: int((scores > 0).sum())]
        dtype = _dtype(weights[part.module])
        tensors = {
            "left": found.left.to(dtype),
            "right": (found.right / scale).to(dtype),
            "entries": order,
            "values": (sparse / scale).flatten()[order].to(dtype),
        }
        units = (
            Units(
                "rank", found.right.norm(dim=1).sort(descending=True).values, None, part.out_features + part.in_features
            ),
            Units("entry", scores[: len(order)].to(dtype), None, 1),
        )
        return self.restore(target, units, lambda: tensors, lambda: weights, lambda: kept)

    def restore(
        self, target: Target, units: tuple[Units, ...], tensors: Tensors, weights: Tensors, statistics: Measured
    ) -> Candidate:
        """The candidate, which mixes directions and entries itself."""
        return SparseCandidate(
            target, units, tensors, weights, statistics=statistics, weighting=self.weighting, refit=self.refit
        )


@dataclass(frozen=True)
class SparseCandidate(Candidate):
    """Directions and entries of one matrix.

    tensors: `left` out × k and `right` k × in of L, k its rank, best first; `entries`, the places row · in + column of
    S, and their `values`, best first by weighted magnitude.
    """

    weighting: Weighting = "none"
    refit: int = 0

    @property
    def metric(self) -> Float[Tensor, "in"] | None:
        """D², or None where inputs do not weigh."""
        if self.weighting == "none":
            return None
        return _squares(self.statistics()[self.target.parts[0].module])

    def priced(self, format: str, cost: int | Int[Tensor, "n"]) -> Candidate:
        """As of any candidate; costs may be of more directions than L has."""
        return super().priced(format, cost if isinstance(cost, int) else cost[: len(self.rank_units.scores)])

    def first(self, parameters: int) -> Choice:
        """The first directions and entries whose values² have the largest sum of all that `parameters` pay for."""
        return self._mix(self.format, parameters)

    def settle(self, choice: Choice) -> Choice:
        """A choice of a rank becomes the mix for as many parameters; any other, as of entries, is returned as it is."""
        (part,) = self.target.parts
        format = choice.formats[part.module]
        if format not in WITH_ENTRIES:
            return choice
        return self._mix(format, rank_cost(format, part, choice.counts["rank"]))

    def _mix(self, format: str, parameters: int) -> Choice:
        (part,), (ranks, entries) = self.target.parts, self.units
        saved = [torch.cumsum(torch.cat([torch.zeros(1), u.scores.cpu()]).double().square(), 0) for u in self.units]
        free = parameters - torch.tensor([rank_cost(format, part, rank) for rank in range(len(ranks.scores) + 1)])
        counts = free.clamp(0, len(entries.scores))
        rank = int(torch.where(free >= 0, saved[0] + saved[1][counts], -1.0).argmax())
        return Choice({part.module: WITH_ENTRIES[format]}, {"rank": rank, "entry": int(counts[rank])})

    def cut(self, choice: Choice) -> dict[str, dict[str, Tensor]]:
        """`left`, `right`, `entries` and `values` of a mix, refitted; any other choice as of any candidate."""
        if "entry" not in choice.counts:
            return super().cut(choice)
        (part,) = self.target.parts
        tensors, weight = self.tensors(), self.weights()[part.module]
        left, right = (t.to(weight.device) for t in self._directions(choice.counts["rank"], weight))
        number = choice.counts["entry"]
        chosen = self.learned["entries"][:number].cpu() if "entries" in self.learned else torch.arange(number)
        places, order = tensors["entries"].cpu()[chosen].sort()
        values = tensors["values"].cpu()[chosen][order].to(left)
        places = places.to(weight.device)
        if self.refit:
            left, right, values = refit(weight, left, right, places, self.metric, self.refit)
        left, right = balance(left, right)
        dtype = _dtype(weight)
        made = {"left": left.to(dtype), "right": right.to(dtype), "entries": places, "values": values.to(dtype)}
        return {part.module: made}


def best_2_of_4(sizes: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
    """Where the 2 largest of each 4 neighbours in a row are; of fewer at the end of a row half, rounded up."""
    rows, width = sizes.shape
    padded = torch.nn.functional.pad(sizes, (0, -width % 4), value=-1.0).view(rows, -1, 4)
    rank = padded.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    kept = torch.full((padded.shape[1],), 2, device=sizes.device)
    kept[-1] = (width - 4 * (len(kept) - 1) + 1) // 2
    return (rank < kept[:, None]).view(rows, -1)[:, :width]


def _squares(stats: Statistics) -> Float[Tensor, "in"]:
    """D²: column sums of x², floored; ones where there was no input at all."""
    squares = stats[Norm(power=2)].double()
    return squares.clamp_min(FLOOR * float(squares.mean())) if squares.any() else torch.ones_like(squares)


def _dtype(weight: Tensor) -> torch.dtype:
    """That of a weight's factors."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


# --- one order over all ---


@allocator("cap_greedy")
@dataclass(frozen=True)
class CapGreedy(Allocator):
    """Directions and entries of all matrices in one order, best value² / cost first, as far as the budget goes.

    relative: values are shares of the energy ‖W‖² of their matrix (in the metric of its candidate). budget: what is
    spent, nominal parameters, or bytes: as many as those parameters would take, of values and indices together.
    """

    relative: bool = False
    budget: Literal["parameters", "bytes"] = "parameters"
    sees: ClassVar[Sees] = "units"
    grain: ClassVar[int] = 1
    needs: ClassVar[tuple[Statistic, ...]] = ()

    def allocate(self, problem: Problem) -> Plan:
        """Everything that fits in that order; then, skipping what does not, whatever still does.

        Directions stay a prefix of the spectrum; where their costs fall along it, those between two corners of the
        hull of value² over cost count as one. A matrix whose kept parts reach its dense size is dense, at no more than
        that, and the order goes on without it. So the budget is never exceeded, what is left pays for no entry that is
        not kept, a larger budget never keeps less, and the order of targets does not matter. In bytes all of this
        holds too; the order is the same, and a matrix is dense where its parts and their index take as many bytes.

        Raises ValueError for a candidate without entry units, and for bytes that do not pay for empty indices.
        """
        assert problem.candidates is not None
        itemsize = problem.itemsize if self.budget == "bytes" else 0
        targets, pools = sorted(problem.targets, key=lambda t: t.name), []
        for target in targets:
            candidate = problem.candidates[target.name]
            if not any(units.kind == "entry" for units in candidate.units):
                raise ValueError(
                    f"cap_greedy weighs entries, but {target.name} (role {target.role}) has no entry units: decompose "
                    "it by robust_pca, magnitude or wanda, or match it in a group of its own, with another allocator"
                )
            energy = _energy(candidate) if self.relative else 1.0
            pools.append(kept_of(candidate, problem.format, energy, itemsize))
        fill(pools, problem.budget * (itemsize or 1))
        choices = {pool.target.name: pool.choice(problem.format) for pool in pools if not pool.dense}
        empty = [name for name, choice in choices.items() if not any(choice.counts.values())]
        if empty:
            logger.warning("%d matrices keep nothing at all, as %s", len(empty), empty[0])
        spent = sum(count(choices[t.name], t) if t.name in choices else t.parameters for t in targets)
        assert spent <= problem.budget, (spent, problem.budget)
        plan = Plan(choices, problem.budget, spent)
        return replace(plan, notes=(reached("cap_greedy", plan, targets, itemsize),)) if itemsize else plan


def _energy(candidate: Candidate) -> float:
    """‖W‖² in the metric of a candidate, 1 for a zero weight."""
    if candidate.units[0].kind == "entry":  # and nothing else: all of the weight
        return float(candidate.units[0].scores.double().square().sum()) or 1.0
    metric = candidate.metric if isinstance(candidate, SparseCandidate) else None
    squares = candidate.weights()[candidate.target.parts[0].module].double().square().sum(0).cpu()
    return float((squares if metric is None else squares * metric.cpu()).sum()) or 1.0
