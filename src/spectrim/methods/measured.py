"""Allocation by predicted curves, each scaled by one measurement: our own recipe's, after LEMS (arXiv 2610.32878).

Of matrix k the spectrum predicts what a rank loses up to a factor, and one measurement on the model gives the factor:

    D_k(r) = ½ Σ_{i ≥ r} σ_i²,      s_k = KL(dense ‖ model with k alone at rank r⁰_k) / D_k(r⁰_k).

The plan then solves, over every rank smaller than dense, and dense itself at no loss,

    minimise Σ_k s_k D_k(r_k)   subject to   Σ_k parameters_k(r_k) ≤ budget

exactly (`spend.knapsack`), and spends what is left step by step. r⁰_k is by `point`:

- target: the rank of k at the ratio of the whole, where the curve is used. Our own decision;
- tenth: a tenth of the break-even rank ⌊(mn − 1) / (m + n)⌋ of plain factors, as LEMS measures.

KL is the mean over tokens of the next-token distributions' on the last `trial` calibration windows, sums in float64. A
KL that is not finite is an infinite cost: the matrix stays dense, and a note says so. r⁰_k is lowered to where at least
a millionth of the energy is lost, as nothing is to be measured beyond (a matrix of lower rank). `scale: none` takes all
s_k = 1 and runs no model: that is for spectra in nats a token (`two_sided_svd`).

Costs, for N blocks and n matrices: about n (N + 1) / 2 block passes over the trial windows and n of the head, at one
rank of each matrix, for a run starts at the block of its matrix. Memory: two states a window beside the model. Every
measurement is remembered by matrix and rank, so another ratio measures only ranks that are new.
Left out of LEMS: its weights by depth and their search, the floor of 0.3 of break-even, labels' losses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.core.budget import rank_cost, rank_plan, rank_within
from spectrim.core.meter import Meter
from spectrim.core.plan import Plan, Target
from spectrim.core.registry import Allocator, Decomposer, Problem, Sees, allocator
from spectrim.core.spend import cut, hull, knapsack, single

logger = logging.getLogger(__name__)

SMALL = 512  # matrices with a smaller side below this may get any rank
KNOWN = 1e-6  # the least share of a matrix's energy whose loss is measured


@dataclass(frozen=True)
class Ladder:
    """The sizes that one matrix may have, ascending: ranks, and dense at last; with the parameters of each."""

    ranks: tuple[int, ...]
    costs: Int[Tensor, "sizes"]


@allocator("measured_curve")
@dataclass(frozen=True)
class MeasuredCurve(Allocator):
    """The ranks of least total predicted loss, the prediction for each matrix scaled by one measurement.

    trial and length: how many of the last calibration windows are run, and how far (None: whole); point: at which rank;
    multiple: of which ranks are, in matrices with both sides 512 or more; least: rank that every matrix keeps; gap: see
    `knapsack`.
    """

    trial: int = 32
    length: int | None = None
    scale: Literal["measured", "none"] = "measured"
    point: Literal["target", "tenth"] = "target"
    multiple: int = 8
    least: int = 1
    gap: float = 1e-4
    needs: ClassVar[tuple[()]] = ()

    def __post_init__(self) -> None:
        for name, value, lowest in (("trial", self.trial, 1), ("multiple", self.multiple, 1), ("least", self.least, 0)):
            if value < lowest:
                raise ValueError(f"{name} is {value}: give at least {lowest}")
        if self.length is not None and self.length < 2:
            raise ValueError(f"length is {self.length}: give at least 2, or null for whole windows")
        if not 0 <= self.gap < 1:
            raise ValueError(f"gap is {self.gap}: it must be at least 0 and below 1")

    @property
    def sees(self) -> Sees:
        """The model where it is measured, else spectra."""
        return "model" if self.scale == "measured" else "units"

    @property
    def grain(self) -> int:
        """One step of rank in a large matrix."""
        return self.multiple

    def refuses(self, decomposer: Decomposer) -> str:
        """What has other units than ranks alone."""
        if "entry" in decomposer.kinds or "rank" not in decomposer.kinds:
            return f"measured_curve shares out ranks, and {type(decomposer).__name__} has {', '.join(decomposer.kinds)}"
        return ""

    def check(self, problem: Problem) -> None:
        """Raise ValueError when the least ranks everywhere exceed the budget, or for a target that has no ranks."""
        lowest = sum(int(self.ladder(problem, target).costs.min()) for target in problem.targets)
        _refuse(problem, lowest, f"rank {self.least} everywhere")

    def allocate(self, problem: Problem) -> Plan:
        """The plan of least total loss.

        Raises ValueError when the least ranks exceed the budget, or the matrices that cannot be cut, and for a spectrum
        that is not finite.
        """
        if problem.budget >= problem.dense:
            return Plan({}, problem.budget, problem.dense)
        self.check(problem)
        targets = sorted(problem.targets, key=lambda t: t.name)
        ladders = [self.ladder(problem, target) for target in targets]
        curves = {target.name: _curve(problem, target) for target in targets}
        scales, notes = self.scales(problem, curves)
        losses = [
            _losses(curves[target.name], ladder, scales[target.name])
            for target, ladder in zip(targets, ladders, strict=True)
        ]
        possible = sum(int(ladder.costs[lost.isfinite()].min()) for ladder, lost in zip(ladders, losses, strict=True))
        _refuse(problem, possible, "what stays dense, as its KL is not finite, with the least ranks of the others")
        picked = knapsack([ladder.costs for ladder in ladders], losses, problem.budget, self.gap)
        picked = _filled(ladders, losses, picked, problem.budget)
        sizes = {t.name: (*each.ranks, None)[i] for t, each, i in zip(targets, ladders, picked, strict=True)}
        return replace(rank_plan(targets, sizes, problem.format, problem.budget, problem.fixed), notes=notes)

    def ladder(self, problem: Problem, target: Target) -> Ladder:
        """The sizes that a matrix may have; dense alone where no rank is smaller."""
        part, fixed = single(target), problem.fixed.get(target.name, 0)
        largest = rank_within(problem.format, part, part.parameters - 1 - fixed)
        step = self.multiple if min(part.out_features, part.in_features) >= SMALL else 1
        lowest = min(-(-self.least // step) * step, largest)
        ranks = tuple(range(lowest, largest + 1, step)) if largest else ()
        costs = [fixed + rank_cost(problem.format, part, rank) for rank in ranks]
        return Ladder(ranks, torch.tensor([*costs, part.parameters]))

    def trial_rank(self, problem: Problem, target: Target) -> int:
        """r⁰ of a matrix, before it is lowered to where something is lost."""
        part, fixed = single(target), problem.fixed.get(target.name, 0)
        if self.point == "target":
            share = target.parameters * problem.budget // problem.dense
            return rank_within(problem.format, part, min(share, part.parameters - 1) - fixed)
        return max(1, (part.parameters - 1) // (part.out_features + part.in_features) // 10)

    def scales(
        self, problem: Problem, curves: Mapping[str, Float[Tensor, "_"]]
    ) -> tuple[dict[str, float], tuple[str, ...]]:
        """s by target, and notes on those that are infinite; 0 for a matrix without energy, whose loss is none."""
        if self.scale == "none":
            return dict.fromkeys(curves, 1.0), ()
        assert problem.live is not None
        meter = Meter(problem.live, "kl", {}, self.trial, self.length, last=True)
        found, notes = {}, []
        ordered = sorted(problem.targets, key=lambda t: (min(t.blocks), t.name))
        for done, target in enumerate(ordered, 1):
            curve = curves[target.name]
            found[target.name] = 0.0
            if float(curve[0]) > 0:
                last = int((curve > KNOWN * curve[0]).nonzero().max())
                rank = min(self.trial_rank(problem, target), last)
                lost = self._measured(problem, meter, target, rank)
                found[target.name] = lost / float(curve[rank]) if math.isfinite(lost) else math.inf
                logger.debug("%s at rank %d: KL %.4g, predicted %.4g", target.name, rank, lost, float(curve[rank]))
                if not math.isfinite(lost):
                    notes.append(f"{target.name}: the KL at rank {rank} alone is {lost}; it stays dense")
                    logger.warning(notes[-1])
            problem.progress("measure", done, len(ordered))
        return found, tuple(notes)

    def _measured(self, problem: Problem, meter: Meter, target: Target, rank: int) -> float:
        """KL(dense ‖ the model with one matrix at a rank), nats a token; remembered."""
        assert problem.candidates is not None
        candidate, fixed = problem.candidates[target.name], problem.fixed.get(target.name, 0)
        choice = candidate.first(fixed + rank_cost(problem.format, single(target), rank))

        def make() -> dict[str, Tensor]:
            return {"values": torch.tensor(meter.of_target(target, [choice]), dtype=torch.float64)}

        fields = {"target": target.name, "rank": rank, "trial": self.trial, "length": self.length}
        value = float(problem.remember("measured", fields, make)["values"])
        # what is rounding below 0 is nothing lost; max() would let a NaN through on one side only
        return 0.0 if value < 0 else value


def _refuse(problem: Problem, lowest: int, what: str) -> None:
    if lowest > problem.budget:
        dense = problem.dense
        raise ValueError(
            f"ratio too large: it leaves {problem.budget:,} parameters, but {what} needs {lowest:,} of {dense:,}; the "
            f"largest possible ratio here is {(dense - lowest) * 10**4 // dense / 10**4}"
        )


def _curve(problem: Problem, target: Target) -> Float[Tensor, "_"]:
    """D at every rank from 0 to the smaller side, float64; a spectrum that ends early loses nothing after."""
    assert problem.candidates is not None
    spectrum = problem.candidates[target.name].rank_units.scores.to("cpu", torch.float64)
    if not bool(spectrum.isfinite().all()):
        raise ValueError(
            f"the spectrum of {target.name} has values that are not finite: its weight or its calibration "
            "statistics overflowed; decompose it from finite ones"
        )
    part = single(target)
    missing = min(part.out_features, part.in_features) + 1 - len(spectrum)
    energies = torch.nn.functional.pad(spectrum.square() / 2, (0, max(0, missing)))
    return energies.flip(0).cumsum(0).flip(0)


def _losses(curve: Float[Tensor, "_"], ladder: Ladder, scale: float) -> Float[Tensor, "sizes"]:
    """s D at every size; dense loses nothing, and is all that an infinite scale leaves."""
    lost = curve.new_zeros(len(ladder.costs))
    if ladder.ranks:
        lost[:-1] = curve[list(ladder.ranks)] * scale if math.isfinite(scale) else math.inf
    return lost


def _filled(
    ladders: Sequence[Ladder], losses: Sequence[Float[Tensor, "_"]], picked: Sequence[int], budget: int
) -> list[int]:
    """The sizes after what is left of the budget is spent, most gained for a parameter first."""
    steps, gains, floors = {}, {}, {}
    for i, (ladder, lost, place) in enumerate(zip(ladders, losses, picked, strict=True)):
        name = f"{i:09}"
        floors[name] = place
        steps[name] = ladder.costs.diff()
        gains[name] = torch.cat(
            [torch.full((place,), math.inf, dtype=torch.float64), hull(-lost[place:].diff(), steps[name][place:])]
        )
    left = budget - sum(int(ladder.costs[0]) for ladder in ladders)
    taken = cut(gains, steps, left, floors)
    return [taken[name] for name in sorted(taken)]
