"""Allocation by measured deviation of the model's output: the module level of Duo-SVD (arXiv 2510.19385, version 2).

Base state: every target at the ratio of the whole. K_0 is how far it is from the dense model. Then one target k at a
time is put at each ratio q of a grid while all others stay, K_kq is measured, and D_kq = K_kq − K_0 (0 at the base, by
definition). The plan solves

    minimise Σ_k D_{k, q_k}   subject to   Σ_k parameters_k(q_k) ≤ budget

exactly (`spend.knapsack`). K is, by `deviation`:

- kl: mean over tokens of KL(dense ‖ compressed) of the next-token distributions, nats, as published;
- hidden: Σ ‖h − h′‖² / Σ ‖h‖² over the states that leave the last block, h of the dense model;
- perplexity: of the calibration text itself.

Costs, for N blocks, n targets and q ratios: about n·q·(N + 1)/2 block passes over the windows, and as many passes of
the head, for a run starts at the block of its target, from states kept of the base. Memory: the compressed model
beside the dense one, the choices of one target, and two states a window; the dense model's output is computed anew of
its last state for each target and batch, never kept. Every finished target is remembered.
Deviations from the public code: the budget is kept strictly (it rounds costs down to cells and takes the nearest
total, up to 2 % above), what is left of it is spent unit by unit, and a target may stay dense or become dense on the
way; KL is per token, not per sequence; hidden states are compared around the base state, as the other two.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from spectrim.core.budget import allowed, count
from spectrim.core.meter import Kind, Meter
from spectrim.core.plan import Candidate, Choice, Plan, Target
from spectrim.core.registry import Allocator, Problem, Sees, allocator
from spectrim.core.spend import knapsack

logger = logging.getLogger(__name__)

Options = dict[int, Choice | None]  # by parameters kept, ascending; None: dense


@allocator("deviation")
@dataclass(frozen=True)
class Deviation(Allocator):
    """One ratio for each target, so that together they move the model's output least.

    grid: ratios tried, beside that of the whole; highest: the largest that a target may get; sequences and length: of
    the calibration windows, those that are run (None: all, whole); interpolate: how many choices of a target are
    measured, the others by monotone interpolation over their parameters (0: all are); gap: see `knapsack`.
    """

    grid: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    sequences: int | None = 32
    length: int | None = None
    deviation: Kind = "kl"
    interpolate: int = 0
    gap: float = 1e-4
    highest: float = 0.9
    needs = ()
    sees: ClassVar[Sees] = "model"  # not a field: no setting
    grain = 1

    def __post_init__(self) -> None:
        for ratio in (*self.grid, self.highest):
            if not 0 <= ratio < 1:
                raise ValueError(f"grid or highest has the ratio {ratio}: it must be at least 0 and below 1")
        for name, value, least in (("sequences", self.sequences, 1), ("length", self.length, 2)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: give at least {least}, or null for all there is")
        if self.interpolate < 0 or self.interpolate == 1:
            raise ValueError(f"interpolate is {self.interpolate}: 0 measures everything, else at least 2 are measured")
        if not 0 <= self.gap < 1:
            raise ValueError(f"gap is {self.gap}: it must be at least 0 and below 1")

    def check(self, problem: Problem) -> None:
        """Raise ValueError where no target losing more than `highest` leaves more than the budget."""
        if allowed(problem.targets, self.highest) > problem.budget:
            raise ValueError(
                f"ratio too large: it leaves {problem.budget:,} of {problem.dense:,} parameters, but no target may "
                f"lose more than highest = {self.highest} of its own; the largest possible ratio here is {self.highest}"
            )

    def allocate(self, problem: Problem) -> Plan:
        """The plan of least total deviation. Raises ValueError when the budget is below the smallest choices."""
        dense = problem.dense
        if problem.budget >= dense:
            return Plan({}, problem.budget, dense)
        options = self.options(problem)
        rows, notes = self.table(problem, options)
        names = sorted(rows)
        picked = knapsack(
            [torch.tensor(rows[name].costs) for name in names],
            [torch.tensor(rows[name].losses, dtype=torch.float64) for name in names],
            problem.budget,
            self.gap,
        )
        chosen = {name: list(options[name].values())[place] for name, place in zip(names, picked, strict=True)}
        spent = top_up(problem, rows, chosen)
        return Plan({name: c for name, c in chosen.items() if c is not None}, problem.budget, spent, notes)

    def options(self, problem: Problem) -> dict[str, Options]:
        """What each target may become, by name; its choice in the base state among it.

        Raises ValueError where the smallest of all exceed the budget, with the largest ratio that is possible.
        """
        self.check(problem)
        dense = problem.dense
        ratios = [ratio for ratio in self.grid if ratio <= self.highest]
        found, lowest, base = {}, 0, base_of(problem)
        for target in sorted(problem.targets, key=lambda t: t.name):
            candidate = _candidate(problem, target)
            choices = [within(target, candidate, allowed([target], ratio)) for ratio in ratios]
            by_cost = {kept(choice, target): choice for choice in (*choices, base[target.name])}
            found[target.name] = {cost: by_cost[cost] for cost in sorted(by_cost)}
            lowest += min(found[target.name])
        if lowest > problem.budget:
            raise ValueError(
                f"ratio too large: it leaves {problem.budget:,} parameters, but the smallest choices need {lowest:,} "
                f"of {dense:,}; the largest possible ratio here is {(dense - lowest) * 10**4 // dense / 10**4}"
            )
        return found

    def table(self, problem: Problem, options: Mapping[str, Options]) -> tuple[dict[str, Row], tuple[str, ...]]:
        """Deviations over that of the base, by target, and notes on what was left out of them.

        Raises ValueError where the base itself has no finite deviation.
        """
        assert problem.live is not None
        base = base_of(problem)
        meter = Meter(problem.live, self.deviation, base, self.sequences, self.length)
        fields = {"deviation": self.deviation, "sequences": self.sequences, "length": self.length, "base": _json(base)}
        made = problem.remember("deviation", {**fields, "target": None}, lambda: _values([meter.of_base()]))
        of_base = float(made["values"])
        if not math.isfinite(of_base):
            raise ValueError(f"the model with every target at the group's ratio has the deviation {of_base}")
        rows, notes = {}, []
        ordered = sorted(problem.targets, key=lambda t: (min(t.blocks), t.name))
        for done, target in enumerate(ordered, 1):
            own = kept(base[target.name], target)
            costs = self._measured([cost for cost in options[target.name] if cost != own], own)
            choices = {str(cost): options[target.name][cost] for cost in costs}
            of_row = {**fields, "target": target.name, "choices": _json(choices)}
            made = problem.remember("deviation", of_row, partial(_measure, meter, target, list(choices.values())))
            losses = {own: 0.0} | dict(zip(costs, (made["values"] - of_base).tolist(), strict=True))
            notes += _exclude(target, losses)
            rows[target.name] = _row(list(options[target.name]), losses)
            problem.progress("deviation", done, len(ordered))
        return rows, tuple(notes)

    def _measured(self, costs: Sequence[int], own: int) -> list[int]:
        """Those of a target's choices that are run: all, or a number spread evenly; the base is known anyway."""
        everything = sorted([*costs, own])
        if self.interpolate == 0 or self.interpolate >= len(everything):
            return list(costs)
        places = np.linspace(0, len(everything) - 1, self.interpolate).round().astype(int)
        return [everything[place] for place in places if everything[place] != own]


# --- choices ---


def _candidate(problem: Problem, target: Target) -> Candidate:
    assert problem.candidates is not None
    return problem.candidates[target.name]


def base_of(problem: Problem) -> dict[str, Choice | None]:
    """Every target at the share of its parameters that the budget is of all."""
    return {
        target.name: within(target, _candidate(problem, target), target.parameters * problem.budget // problem.dense)
        for target in problem.targets
    }


def kept(choice: Choice | None, target: Target) -> int:
    """Parameters of a choice; None is dense."""
    return target.parameters if choice is None else count(choice, target)


def within(target: Target, candidate: Candidate, parameters: int) -> Choice | None:
    """The choice for that many parameters; None, dense, at all of them and where it would not be smaller."""
    if parameters >= target.parameters:
        return None
    choice = candidate.first(parameters)
    return choice if count(choice, target) < target.parameters else None


def _json(choices: Mapping[str, Choice | None]) -> dict[str, Any]:
    """Choices as JSON data, without their errors, which decide nothing of what is built."""
    return {name: None if c is None else asdict(replace(c, error=None)) for name, c in sorted(choices.items())}


# --- the table ---


@dataclass(frozen=True)
class Row:
    """Of one target: parameters of its choices, ascending, and what each adds to the deviation; inf: excluded."""

    costs: tuple[int, ...]
    losses: tuple[float, ...]

    def at(self, cost: int) -> float:
        """What is lost at any number of parameters: linear between the choices that are not excluded."""
        costs, losses = np.array(self.costs), np.array(self.losses)
        known = np.isfinite(losses)
        return float(np.interp(cost, costs[known], losses[known]))


def _values(values: Sequence[float]) -> dict[str, Tensor]:
    return {"values": torch.tensor(values, dtype=torch.float64)}


def _measure(meter: Meter, target: Target, choices: Sequence[Choice | None]) -> dict[str, Tensor]:
    return _values(meter.of_target(target, choices))


def _exclude(target: Target, losses: dict[int, float]) -> list[str]:
    """Make what is not finite infinite, and say so."""
    notes = []
    for cost, loss in sorted(losses.items()):
        if not math.isfinite(loss):
            losses[cost] = math.inf
            ratio = 1 - cost / target.parameters
            notes.append(f"{target.name}: the deviation at ratio {ratio:.4f} is not finite; not considered")
            logger.warning(notes[-1])
    return notes


def _row(costs: Sequence[int], losses: Mapping[int, float]) -> Row:
    """Losses of all choices: those that were not measured by monotone cubic interpolation, none outside of them."""
    finite = sorted((cost, loss) for cost, loss in losses.items() if math.isfinite(loss))
    curve = PchipInterpolator(*zip(*finite, strict=True), extrapolate=False) if len(finite) > 1 else None
    found = []
    for cost in costs:
        value = losses[cost] if cost in losses else math.nan if curve is None else float(curve(cost))
        found.append(value if math.isfinite(value) else math.inf)
    return Row(tuple(costs), tuple(found))


# --- what is left of the budget ---


def top_up(problem: Problem, rows: Mapping[str, Row], chosen: dict[str, Choice | None]) -> int:
    """Grow `chosen` by single units (or to dense) while they fit, most gained for a parameter first, then by name.

    Gains are those of the table, linear between its choices. Returns the parameters spent: short of the budget by less
    than the next step of any target.
    """
    targets = {target.name: target for target in problem.targets}
    costs = {name: kept(choice, targets[name]) for name, choice in chosen.items()}
    left = problem.budget - sum(costs.values())
    queue: list[tuple[float, str]] = []
    steps: dict[str, Choice | None] = {}

    def offer(name: str) -> None:
        choice, target = chosen[name], targets[name]
        if choice is None:
            return
        steps[name] = following(target, _candidate(problem, target), choice)
        after = kept(steps[name], target)
        gain = (rows[name].at(costs[name]) - rows[name].at(after)) / (after - costs[name])
        heapq.heappush(queue, (-gain, name))

    for name in sorted(chosen):
        offer(name)
    while queue:
        _, name = heapq.heappop(queue)
        after = kept(steps[name], targets[name])
        if after - costs[name] <= left:
            left -= after - costs[name]
            chosen[name], costs[name] = steps[name], after
            offer(name)
    return problem.budget - left


def following(target: Target, candidate: Candidate, choice: Choice) -> Choice | None:
    """The choice with one unit more; None, dense, where that is not smaller."""
    units = candidate.units[0]
    taken = choice.counts[units.kind]
    if taken >= len(units.costs):
        return None
    return within(target, candidate, count(choice, target) + int(units.costs[taken]))
