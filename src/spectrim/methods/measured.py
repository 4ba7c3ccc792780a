"""Allocation by predicted curves, each scaled by measurements: our own recipe's, after LEMS (arXiv 2610.32878).

Of matrix k the spectrum predicts what a rank loses up to a factor, and measurements on the model give the factor:

    D_k(r) = ½ Σ_{i ≥ r} σ_i²,      s_k(r) = KL(dense ‖ model with k alone at rank r) / D_k(r),      first at r = r⁰_k.

Of entries a rank stands for as many as it has parameters. The plan then solves, over every rank smaller than dense,
and dense itself at no loss,

    minimise Σ_k s_k D_k(r_k)   subject to   Σ_k parameters_k(r_k) ≤ budget

exactly (`spend.knapsack`), and spends what is left step by step. Where the planned rank is far from r⁰_k it rests on
the shape of the curve alone. So in each of `rounds` further rounds every matrix whose planned rank is predicted to lose
`APART` times more or less than any measured one is measured there too, and the plan is made again: log s_k is linear in
log D_k between measured ranks, constant beyond them, and no lower rank loses less. Of all these plans the one of least
measured KL of the whole model is taken. `exchange`: so many turns of `core/exchange.py` from there. r⁰_k is by
`point`:

- target: the rank of k at the ratio of the whole, where the curve is used. Our own decision;
- tenth: a tenth of the break-even rank ⌊(mn − 1) / (m + n)⌋ of plain factors, as LEMS measures.

KL is the mean over tokens of the next-token distributions' on the first `length` tokens of the last `trial` calibration
windows, sums in float64; eight times as many tokens gave no better plan (docs/methods/spectrim.md). A KL that is not
finite is an infinite cost of all lower ranks, and of all where no other is known; a note says so. Ranks are measured no
higher than where a millionth of the energy is lost, as nothing is to be seen beyond (a matrix of lower rank).
`scale: none` takes all s_k = 1 and runs no model: that is for spectra in nats a token (`two_sided_svd`).

Costs, for N blocks and n matrices, a round: about n (N + 1) / 2 block passes over the trial windows and n of the head,
at one rank of each matrix, for a run starts at the block of its matrix; then one pass of the whole model. Memory: two
states a window beside the model, and the compressed modules; with a limit on memory one block and, in files, n + 2
states a window. Every measurement is remembered by matrix and rank, so another ratio measures only ranks that are new;
with a limit those of a round are measured together, and remembered at its end.
Left out of LEMS: its weights by depth and their search, the floor of 0.3 of break-even, labels' losses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.core.budget import rank_cost, rank_plan, rank_within
from spectrim.core.exchange import Exchange
from spectrim.core.meter import measures
from spectrim.core.plan import Choice, Plan, Target
from spectrim.core.registry import Allocator, Decomposer, Problem, Sees, allocator, recalled
from spectrim.core.spend import Ladder, cut, hull, knapsack, single

logger = logging.getLogger(__name__)

SMALL = 512  # matrices with a smaller side below this may get any rank
APART = 1.25  # ranks are measured again where they are predicted to lose this many times more or less
KNOWN = 1e-6  # the least share of a matrix's energy whose loss is measured
FLOOR = 1e-9  # nats a token that a measured loss counts as at least: below it is rounding

Points = dict[int, float]  # KL of a matrix alone at measured ranks


@allocator("measured_curve")
@dataclass(frozen=True)
class MeasuredCurve(Allocator):
    """The ranks of least total predicted loss, the prediction for each matrix scaled by one measurement.

    trial and length: how many of the last calibration windows are run, and how far (None: whole); point: at which rank;
    rounds: how often matrices are measured again, at the ranks then planned; exchange: turns of it; multiple: of which
    ranks are, in matrices with both sides 512 or more; least: rank that every matrix keeps; gap: see `knapsack`.
    """

    trial: int = 16
    length: int | None = 128
    scale: Literal["measured", "none"] = "measured"
    point: Literal["target", "tenth"] = "target"
    rounds: int = 2
    exchange: int = 0
    multiple: int = 8
    least: int = 1
    gap: float = 1e-4
    needs: ClassVar[tuple[()]] = ()

    def __post_init__(self) -> None:
        counts = {"trial": (self.trial, 1), "multiple": (self.multiple, 1), "least": (self.least, 0)}
        for name, (value, lowest) in {**counts, "rounds": (self.rounds, 0), "exchange": (self.exchange, 0)}.items():
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

    def streamed(self, sequences: int, length: int) -> tuple[int, int] | None:
        """The trial windows: it measures changes, and wants nothing else of the model."""
        return min(self.trial, sequences), min(self.length or length, length)

    @property
    def grain(self) -> int:
        """One step of rank in a large matrix."""
        return self.multiple

    def refuses(self, decomposer: Decomposer) -> str:
        """What has neither ranks nor entries, or both; and entries where rank is to move."""
        name, kinds = type(decomposer).__name__, decomposer.kinds
        if ("entry" in kinds) == ("rank" in kinds):
            return f"measured_curve shares out ranks or entries, and {name} has {', '.join(kinds)}"
        if self.exchange and "entry" in kinds:
            return f"exchange moves ranks, and {name} has entries: set allocate.exchange to 0"
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
        return _Rounds(self, problem).best()

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


class _Rounds:
    """Measurements and plans by turns; points: of each matrix the losses measured so far."""

    def __init__(self, method: MeasuredCurve, problem: Problem):
        self.method, self.problem = method, problem
        self.targets = sorted(problem.targets, key=lambda t: t.name)
        self.ladders = {target.name: method.ladder(problem, target) for target in self.targets}
        self.curves = {target.name: _curve(problem, target) for target in self.targets}
        self.points: dict[str, Points] = {target.name: {} for target in self.targets}
        self.notes: list[str] = []
        if method.scale == "measured":
            self.measures = measures(problem)

    def best(self) -> Plan:
        """The plan of least measured loss, of those that the rounds come to; the only one where nothing is measured."""
        if self.method.scale == "none":
            return self.solved()
        self.measure({target.name: self.method.trial_rank(self.problem, target) for target in self.targets})
        plans = [self.solved()]
        for _ in range(self.method.rounds):
            found = self.points_wanted(plans[-1])
            if not found:
                break
            self.measure(found)
            plans.append(self.solved())
        if len(plans) == 1 and not self.method.exchange:
            return plans[0]
        losses = [self.whole(plan) for plan in plans]
        logger.info("measured_curve: KL by round %s", ", ".join(f"{loss:.4g}" for loss in losses))
        # a loss that is not a number is none that could be the least
        place = min(range(len(plans)), key=lambda i: (math.isnan(losses[i]), losses[i]))
        best = plans[place]
        if self.method.exchange and math.isfinite(losses[place]):
            best = self.exchanged(best, losses[place])
        return replace(best, notes=tuple(self.notes))

    def exchanged(self, plan: Plan, lost: float) -> Plan:
        """The plan moved step by step to where the model as a whole loses less; see `exchange`."""
        step = Exchange(self.problem, self.ladders, self.curves, self.method.trial, self.method.length, self.method.gap)
        for turn in range(self.method.exchange):
            better = step.best(plan, self.whole)
            logger.info("measured_curve: exchange %d: KL %.4g, before %.4g", turn + 1, better[1], lost)
            if not better[1] < lost:
                break
            plan, lost = better
        return plan

    def points_wanted(self, plan: Plan) -> dict[str, int]:
        """Planned ranks that were not measured yet."""
        ranks = {name: self.lowered(name, choice.counts["rank"]) for name, choice in plan.choices.items()}
        return {name: rank for name, rank in ranks.items() if rank is not None and self._far(name, rank)}

    def _far(self, name: str, rank: int) -> bool:
        """Whether what a rank is predicted to lose is apart from all that was measured of the matrix."""
        known, curve = self.points[name], self.curves[name]
        apart = (abs(math.log(float(curve[rank]) / float(curve[other]))) for other in known)
        return min(apart, default=math.inf) > math.log(APART)

    def lowered(self, name: str, rank: int) -> int | None:
        """The rank, or the largest below it where something is lost; None for a matrix without energy."""
        curve = self.curves[name]
        return min(rank, int((curve > KNOWN * curve[0]).nonzero().max())) if float(curve[0]) > 0 else None

    def measure(self, ranks: Mapping[str, int]) -> None:
        """KL of matrices alone, each at its rank; a note on one that is not finite."""
        wanted: dict[str, int] = {}
        for target in sorted((t for t in self.targets if t.name in ranks), key=lambda t: (min(t.blocks), t.name)):
            rank = self.lowered(target.name, ranks[target.name])
            if rank is not None and rank not in self.points[target.name]:
                wanted[target.name] = rank
        for name, lost in self.alone(wanted).items():
            rank, curve = wanted[name], self.curves[name]
            self.points[name][rank] = lost if math.isfinite(lost) else math.inf
            logger.debug("%s at rank %d: KL %.4g, predicted %.4g", name, rank, lost, float(curve[rank]))
            if not math.isfinite(lost):
                self.notes.append(f"{name}: the KL at rank {rank} alone is {lost}; {_without(rank)}")
                logger.warning(self.notes[-1])

    def alone(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """KL(dense ‖ the model with one matrix at a rank), nats a token, of each; remembered."""
        method, remember = self.method, self.problem.remember
        fields = {
            name: {"target": name, "rank": rank, "trial": method.trial, "length": method.length}
            for name, rank in ranks.items()
        }
        known = {name: recalled(remember, "measured", of_one) for name, of_one in fields.items()}
        changed = {name: self.choice(name, ranks[name]) for name, found in known.items() if found is None}
        if changed:
            progress = partial(self.problem.progress, "measure")
            for name, lost in self.measures.deviations({}, changed, method.trial, method.length, progress):
                known[name] = remember("measured", fields[name], partial(_kept, lost))
        values = {name: float(found["values"]) for name, found in known.items() if found is not None}
        # what is rounding below 0 is nothing lost; max() would let a NaN through on one side only
        return {name: 0.0 if value < 0 else value for name, value in values.items()}

    def choice(self, name: str, rank: int) -> Choice:
        """A matrix at a rank."""
        problem = self.problem
        assert problem.candidates is not None
        candidate, fixed = problem.candidates[name], problem.fixed.get(name, 0)
        return candidate.first(fixed + rank_cost(problem.format, single(candidate.target), rank))

    def whole(self, plan: Plan) -> float:
        """KL(dense ‖ the model with a plan), nats a token; remembered."""
        method = self.method
        ranks = {name: choice.counts["rank"] for name, choice in sorted(plan.choices.items())}

        def make() -> Mapping[str, Tensor]:
            base = {name: self.choice(name, rank) for name, rank in ranks.items()}
            return _kept(self.measures.deviation(base, method.trial, method.length))

        fields = {"ranks": ranks, "trial": method.trial, "length": method.length}
        return float(self.problem.remember("measured", fields, make)["values"])

    def solved(self) -> Plan:
        """The plan of least total loss by what is known now."""
        problem, targets = self.problem, self.targets
        ladders = [self.ladders[target.name] for target in targets]
        losses = [
            ladder.losses(scaled(self.curves[target.name], self.points[target.name]))
            for target, ladder in zip(targets, ladders, strict=True)
        ]
        possible = sum(int(ladder.costs[lost.isfinite()].min()) for ladder, lost in zip(ladders, losses, strict=True))
        _refuse(problem, possible, "what stays dense, as its KL is not finite, with the least ranks of the others")
        picked = knapsack([ladder.costs for ladder in ladders], losses, problem.budget, self.method.gap)
        picked = _filled(ladders, losses, picked, problem.budget)
        sizes = {t.name: (*each.ranks, None)[i] for t, each, i in zip(targets, ladders, picked, strict=True)}
        plan = rank_plan(targets, sizes, problem.format, problem.budget, problem.fixed)
        return replace(plan, notes=tuple(self.notes))


def _kept(lost: float) -> Mapping[str, Tensor]:
    """A loss as it is remembered."""
    return {"values": torch.tensor([lost], dtype=torch.float64)}


def _without(rank: int) -> str:
    return f"it keeps more than rank {rank}, or stays dense"


def _refuse(problem: Problem, lowest: int, what: str) -> None:
    if lowest > problem.budget:
        dense = problem.dense
        raise ValueError(
            f"ratio too large: it leaves {problem.budget:,} parameters, but {what} needs {lowest:,} of {dense:,}; the "
            f"largest possible ratio here is {(dense - lowest) * 10**4 // dense / 10**4}"
        )


def _curve(problem: Problem, target: Target) -> Float[Tensor, "_"]:
    """D at every rank from 0 to the smaller side, float64; a spectrum that ends early loses nothing after.

    Of entries: at as many as a rank has parameters.
    """
    assert problem.candidates is not None
    (units,) = (units for units in problem.candidates[target.name].units if units.kind in ("rank", "entry"))
    spectrum = units.scores.to("cpu", torch.float64)
    if not bool(spectrum.isfinite().all()):
        raise ValueError(
            f"the spectrum of {target.name} has values that are not finite: its weight or its calibration "
            "statistics overflowed; decompose it from finite ones"
        )
    part = single(target)
    ranks = range(min(part.out_features, part.in_features) + 1)
    counts = torch.tensor([rank_cost(problem.format, part, r) if units.kind == "entry" else r for r in ranks])
    energies = torch.nn.functional.pad(spectrum.square() / 2, (0, 1))
    return energies.flip(0).cumsum(0).flip(0)[counts.clamp_max(len(spectrum))]


def scaled(curve: Float[Tensor, "_"], points: Mapping[int, float]) -> Float[Tensor, "_"]:
    """Losses at every rank: the predicted ones times what they were off by at the measured ranks.

    The factor's logarithm is linear in that of the prediction between points, constant beyond them; without any it is
    1. A loss that is not finite holds for all lower ranks, and for all where no other is known. Never rising with rank.
    """
    finite = {rank: max(loss, FLOOR) for rank, loss in points.items() if math.isfinite(loss)}
    if not points or not float(curve[0]) > 0:
        return curve
    if not finite:
        return torch.full_like(curve, math.inf)
    ranks = sorted(finite, key=lambda rank: float(curve[rank]))
    places = [math.log(float(curve[rank])) for rank in ranks]
    factors = [math.log(finite[rank]) - place for rank, place in zip(ranks, places, strict=True)]
    known = curve > 0
    lost = torch.zeros_like(curve)
    lost[known] = curve[known] * torch.from_numpy(np.interp(curve[known].log().numpy(), places, factors)).exp()
    for rank, loss in points.items():
        if not math.isfinite(loss):
            lost[: rank + 1] = math.inf
    return lost.flip(0).cummax(0).values.flip(0)


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
