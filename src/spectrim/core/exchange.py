"""Exchange at the compressed model: rank moves from matrices where it is worth little to those where it is worth more.

What a matrix loses alone in the dense model is not what it loses beside all the others. At a plan P with the loss L(P)
every matrix k is measured in the compressed model at a size a little larger, u_k (dense ones: smaller), and

    a_k = (L(P) − L(P with k at u_k)) / (D_k(r_k) − D_k(u_k))

is what a predicted nat of it is worth there. Then Σ a_k D_k(r_k) is minimised under the same budget, no size further
from the plan's than `REACHES` of its dense parameters; the reach of least measured loss gives the next plan.
L is the KL to the dense model of the whole compressed model on the trial windows. Our own decision.

Costs a turn: one measurement of each matrix in the compressed model, and a pass of the whole model for each reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.core.budget import rank_cost, rank_plan
from spectrim.core.meter import measures
from spectrim.core.plan import Choice, Plan, Target
from spectrim.core.registry import Problem
from spectrim.core.spend import Ladder, knapsack, single

REACHES = (0.2, 0.1, 0.05, 0.025)  # shares of a matrix's dense parameters that it may gain or lose in a turn
NUDGE = 0.05  # and by which it grows to be measured
LEAST = 1e-9  # of a_k: growing never counts as harm, which is noise

Curves = Mapping[str, Float[Tensor, "_"]]


class Exchange:
    """Turns of exchange on one problem; ladders and curves by target, as `measured_curve` has them."""

    def __init__(
        self,
        problem: Problem,
        ladders: Mapping[str, Ladder],
        curves: Curves,
        trial: int,
        length: int | None,
        gap: float,
    ):
        self.problem, self.ladders, self.curves = problem, ladders, curves
        self.trial, self.length, self.gap = trial, length, gap
        self.targets = sorted(problem.targets, key=lambda t: t.name)

    def best(self, plan: Plan, whole: Callable[[Plan], float]) -> tuple[Plan, float]:
        """Of the plans within each reach the one that loses least, with its loss by `whole`."""
        worth = self.worth(plan, whole(plan))
        found: list[tuple[Plan, float]] = []
        for reach in REACHES:
            other = self.moved(plan, worth, reach)
            if all(other.choices != known.choices for known, _ in found):
                found.append((other, whole(other)))
        return min(found, key=lambda each: (math.isnan(each[1]), each[1]))

    def worth(self, plan: Plan, lost: float) -> dict[str, float]:
        """a_k of every matrix; remembered."""
        problem = self.problem

        def make() -> dict[str, Tensor]:
            found = self._worth(plan, lost)
            return {"values": torch.tensor([found[t.name] for t in self.targets], dtype=torch.float64)}

        ranks = {name: choice.counts["rank"] for name, choice in sorted(plan.choices.items())}
        fields = {"worth at": ranks, "nudge": NUDGE, "trial": self.trial, "length": self.length}
        values = problem.remember("measured", fields, make)["values"].tolist()
        return {target.name: value for target, value in zip(self.targets, values, strict=True)}

    def _worth(self, plan: Plan, lost: float) -> dict[str, float]:
        """a_k of every matrix, measured; the least where nothing is predicted to come of its nudge."""
        changes: dict[str, float] = {}
        changed: dict[str, Choice | None] = {}
        for target in self.targets:
            ladder, place = self.ladders[target.name], self.place(target.name, plan)
            predicted, other = ladder.losses(self.curves[target.name]), self.nudged(target, place)
            change = float(predicted[place] - predicted[other])
            if change != 0:
                changes[target.name], changed[target.name] = change, self._choice(target, other)
        found = {target.name: LEAST for target in self.targets}
        progress = partial(self.problem.progress, "exchange")
        by = measures(self.problem)
        for name, other_loss in by.deviations(plan.choices, changed, self.trial, self.length, progress):
            gained = (lost - other_loss) / changes[name]
            found[name] = max(gained, LEAST) if math.isfinite(gained) else math.inf
        return found

    def nudged(self, target: Target, place: int) -> int:
        """The first size that is larger by the nudge; the largest one that is smaller by it where none is."""
        costs, step = self.ladders[target.name].costs, NUDGE * target.parameters
        larger = (costs >= costs[place] + step).nonzero()
        if len(larger):
            return int(larger[0])
        smaller = (costs <= costs[place] - step).nonzero()
        return int(smaller[-1]) if len(smaller) else 0

    def place(self, name: str, plan: Plan) -> int:
        """Where on its ladder a plan has a matrix."""
        ladder = self.ladders[name]
        choice = plan.choices.get(name)
        return len(ladder.ranks) if choice is None else ladder.ranks.index(choice.counts["rank"])

    def _choice(self, target: Target, place: int) -> Choice | None:
        problem, ranks = self.problem, self.ladders[target.name].ranks
        assert problem.candidates is not None
        if place == len(ranks):
            return None
        size = problem.fixed.get(target.name, 0) + rank_cost(problem.format, single(target), ranks[place])
        return problem.candidates[target.name].first(size)

    def moved(self, plan: Plan, worth: Mapping[str, float], reach: float) -> Plan:
        """The plan of least Σ a_k D_k within reach of this one."""
        problem, places = self.problem, [self.place(target.name, plan) for target in self.targets]
        ladders = [self.ladders[target.name] for target in self.targets]
        losses = []
        for target, ladder, place in zip(self.targets, ladders, places, strict=True):
            losses.append(self._losses(target, ladder, place, worth[target.name]))
            losses[-1][(ladder.costs - ladder.costs[place]).abs() > reach * target.parameters] = math.inf
        picked = knapsack([ladder.costs for ladder in ladders], losses, problem.budget, self.gap)
        sizes = {t.name: (*each.ranks, None)[i] for t, each, i in zip(self.targets, ladders, picked, strict=True)}
        return rank_plan(self.targets, sizes, problem.format, problem.budget, problem.fixed)

    def _losses(self, target: Target, ladder: Ladder, place: int, worth: float) -> Float[Tensor, "sizes"]:
        """a_k D_k of every size; where measuring broke the model, nothing smaller than now."""
        predicted = ladder.losses(self.curves[target.name])
        if math.isfinite(worth):
            return predicted * worth
        return torch.where(torch.arange(len(predicted)) < place, math.inf, torch.zeros_like(predicted))
