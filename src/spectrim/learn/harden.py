"""From scores of units to a plan of exactly the budget, and what was learned beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.core import budget as budgets
from spectrim.core.plan import Candidate, Choice, Plan, Target, Units
from spectrim.core.spend import cut, rank_steps

Scores = Mapping[str, Float[Tensor, "_"]]


def harden(
    candidates: Mapping[str, Candidate],
    scores: Scores,
    format: str,
    budget: int,
    fixed: Mapping[str, int] | None = None,
    least: Mapping[str, int] | None = None,
    reserved: Mapping[str, int] | None = None,
) -> Plan:
    """The plan that keeps the units of the largest scores, by `spend.cut`; which ones, in `learned["order"]`.

    Equal scores go by target, then in the units' own order. Every matrix keeps `least` directions (1 where not given),
    or the most that are smaller than dense. A matrix past its break-even rank has one last step, to dense, with the
    score of the first direction beyond. fixed: parameters of a bias that comes with any rank; reserved: of directions
    (their number) that every matrix that is not dense has beside the scored ones. Raises ValueError when the least
    exceeds the budget.
    """
    ordered, lists, costs, floors, base = {}, {}, {}, {}, 0
    for name, candidate in sorted(candidates.items()):
        (of_kind,) = candidate.units
        order = torch.sort(scores[name].detach().double().cpu(), descending=True, stable=True)
        ordered[name] = order.indices
        steps, at_zero = _steps(candidate, of_kind, format, (fixed or {}).get(name, 0), (reserved or {}).get(name, 0))
        costs[name], lists[name] = steps, order.values[: len(steps)]
        ranks = len(steps) - 1
        floor = (least or {}).get(name, 1)
        floors[name] = (min(floor, ranks) if ranks else 1) if of_kind.kind == "rank" else 0
        base += at_zero if ranks else 0
    lowest = base + sum(int(costs[name][:floor].sum()) for name, floor in floors.items())
    if lowest > budget:
        dense = sum(c.target.parameters for c in candidates.values())
        raise ValueError(
            f"ratio too large: it leaves {budget:,} parameters, but the least directions everywhere need {lowest:,} "
            f"of {dense:,}; the largest possible ratio here is {(dense - lowest) * 10**4 // dense / 10**4}"
        )
    taken = cut(lists, costs, budget - base, floors)
    return _plan(candidates, taken, costs, ordered, format, budget, fixed or {}, reserved or {})


def _steps(
    candidate: Candidate, of_kind: Units, format: str, fixed: int, reserved: int
) -> tuple[Int[Tensor, "n"], int]:
    """Parameters of each step up from nothing, the last one to dense; and those of what comes with the first."""
    if of_kind.kind == "channel":
        return of_kind.costs, 0
    (part,) = candidate.target.parts
    steps = rank_steps(format, part, fixed)
    ranks = len(steps) - 1
    if reserved >= ranks:
        return torch.tensor([part.parameters]), 0
    return steps[reserved:], fixed + int(steps[:reserved].sum())


def _plan(
    candidates: Mapping[str, Candidate],
    taken: Mapping[str, int],
    costs: Mapping[str, Tensor],
    ordered: Mapping[str, Tensor],
    format: str,
    budget: int,
    fixed: Mapping[str, int],
    reserved: Mapping[str, int],
) -> Plan:
    choices: dict[str, Choice] = {}
    spent = 0
    for name, candidate in candidates.items():
        target, count = candidate.target, taken[name]
        if count == len(costs[name]):
            spent += target.parameters
            continue
        kind = candidate.units[0].kind
        formats = {part.module: "dense" if kind == "channel" else format for part in target.parts}
        number = count + (reserved.get(name, 0) if kind == "rank" else 0)
        choices[name] = Choice(formats, {kind: number}, bias=fixed.get(name, 0) > 0)
        spent += budgets.count(choices[name], target)
    assert spent <= budget, (spent, budget)
    learned = {name: {"order": ordered[name]} for name in choices}
    return Plan(choices, budget, spent, learned=learned)


def with_learned(plan: Plan, tensors: Mapping[str, Mapping[str, Tensor]], dense: Sequence[Target] = ()) -> Plan:
    """A plan with more learned tensors; targets in `dense`, which have no choice, get one that rewrites the weight."""
    learned = {name: {**plan.learned.get(name, {}), **made} for name, made in tensors.items()}
    choices = {**plan.choices}
    for target in dense:
        choices[target.name] = Choice({part.module: "dense" for part in target.parts}, {})
    return replace(plan, choices=choices, learned={**plan.learned, **learned})
