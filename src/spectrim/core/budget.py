"""Counting parameters, and spending a budget of them exactly."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from jaxtyping import Int
from torch import Tensor

from spectrim.core.plan import Choice, Part, Plan, Target

# What a user writes as a group's `format`, and the module format of its rank units.
RANK_FORMATS = {"plain": "low_rank", "pivot": "pivot"}


def rank_cost(format: str, part: Part, rank: int) -> int:
    """Parameters of `part` at `rank`: r(m+n) for low_rank, r(m+n) − r² for pivot.

    Raises ValueError for a format without a rank.
    """
    m, n = part.out_features, part.in_features
    if format == "low_rank":
        return rank * (m + n)
    if format == "pivot":
        return rank * (m + n - rank)
    raise ValueError(f"format {format!r} has no cost by rank alone; known: low_rank, pivot")


def unit_cost(format: str, part: Part) -> int | Int[Tensor, "n"]:
    """Cost of each rank unit: m+n, or in the pivot form m+n−2i−1 for the i-th (from 0), which sum to `rank_cost`."""
    m, n = part.out_features, part.in_features
    if format == "pivot":
        return m + n - 1 - 2 * torch.arange(min(m, n))
    return rank_cost(format, part, 1)


def largest_rank(format: str, part: Part) -> int:
    """The largest rank whose parameters are fewer than the dense ones: ⌊(mn−1)/(m+n)⌋, or min(m,n)−1 for pivot."""
    m, n = part.out_features, part.in_features
    return min(m, n) - 1 if format == "pivot" else (m * n - 1) // (m + n)


def rank_within(format: str, part: Part, parameters: int) -> int:
    """The largest rank that `parameters` pay for, at most `largest_rank`."""
    m, n = part.out_features, part.in_features
    if format == "pivot":
        # r² − (m+n) r + parameters ≥ 0, exact in integers: the square root is rounded up
        inside = (m + n) ** 2 - 4 * parameters
        root = math.isqrt(inside - 1) + 1 if inside > 0 else 0
        rank = (m + n - root) // 2
    else:
        rank = parameters // (m + n)
    return max(0, min(rank, largest_rank(format, part)))


def count(choice: Choice, target: Target) -> int:
    """Parameters of `target` as `choice` has it, new biases included; indices are not parameters."""
    total = 0
    for part in target.parts:
        format = choice.formats[part.module]
        total += part.parameters if format == "dense" else rank_cost(format, part, choice.counts["rank"])
        total += part.out_features if choice.bias else 0
    return total


def allowed(targets: Sequence[Target], ratio: float) -> int:
    """Parameters that may be kept: floor((1 − ratio) · dense). Raises ValueError outside 0 ≤ ratio < 1."""
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio {ratio} is the fraction of parameters to remove: it must be at least 0 and below 1")
    dense = sum(target.parameters for target in targets)
    # 1 − 0.9 is not 0.1 in binary: take the short decimal that the user meant, and stay exact for any size
    return math.floor((1 - Fraction(ratio).limit_denominator(10**9)) * dense)


def rank_plan(targets: Sequence[Target], ranks: Mapping[str, int | None], format: str, budget: int) -> Plan:
    """The plan that gives each single-matrix target its rank (None: dense) in one format."""
    choices, spent = {}, 0
    for target in targets:
        rank = ranks[target.name]
        if rank is None:
            spent += target.parameters
            continue
        choices[target.name] = Choice({target.parts[0].module: format}, {"rank": rank})
        spent += count(choices[target.name], target)
    assert spent <= budget, (spent, budget)
    return Plan(choices, budget, spent)


def even_ranks(
    targets: Sequence[Target], budget: int, format: str, multiple: int = 1, least: int = 1
) -> dict[str, int | None]:
    """Ranks that give every matrix the same share of its parameters, spending `budget` as far as units allow.

    Ranks are multiples of `multiple`, at least `least` of them (or `largest_rank`, where that is less); None means
    dense, as a matrix stays that no rank makes smaller. Steps (one more unit, or the
    last one to dense) are taken in the order of the share that they bring their matrix to, then by name: first all
    that fit in that order, then, skipping what does not fit, whatever still does. So the budget is never exceeded,
    what is left is less than a step, a larger budget never keeps less, and the order of `targets` does not matter.

    Raises ValueError when the least ranks everywhere exceed the budget, with the largest ratio that is possible.
    """
    parts = {target.name: target.parts[0] for target in sorted(targets, key=lambda t: t.name)}
    floor = {name: min(least * multiple, largest_rank(format, part)) for name, part in parts.items()}

    def at_share(share: float) -> dict[str, int | None]:
        return {name: _rank_at(format, part, share, multiple, floor[name]) for name, part in parts.items()}

    def spent(ranks: Mapping[str, int | None]) -> int:
        return sum(_cost_or_dense(format, parts[name], rank) for name, rank in ranks.items())

    lowest = spent(at_share(0.0))
    if lowest > budget:
        dense = sum(part.parameters for part in parts.values())
        largest = (dense - lowest) * 10**4 // dense / 10**4
        raise ValueError(
            f"ratio too large: it leaves {budget:,} parameters, but rank {least * multiple} everywhere needs "
            f"{lowest:,} of {dense:,}; the largest possible ratio here is {largest}"
        )

    low, high = 0.0, 1.0
    ranks = at_share(high)
    if spent(ranks) > budget:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(at_share(middle)) <= budget else (low, middle)
        ranks = at_share(low)
    return _top_up(parts, ranks, budget - spent(ranks), format, multiple)


def _rank_at(format: str, part: Part, share: float, multiple: int, floor: int) -> int | None:
    if share >= 1:
        return None
    rank = rank_within(format, part, math.floor(share * part.parameters))
    return max(rank - rank % multiple, floor) or None


def _cost_or_dense(format: str, part: Part, rank: int | None) -> int:
    return part.parameters if rank is None else rank_cost(format, part, rank)


def _next_rank(format: str, part: Part, rank: int, multiple: int) -> int | None:
    following = rank + multiple - rank % multiple
    return following if following <= largest_rank(format, part) else None


def _top_up(
    parts: Mapping[str, Part], ranks: dict[str, int | None], remaining: int, format: str, multiple: int
) -> dict[str, int | None]:
    queue: list[tuple[float, str]] = []

    def offer(name: str, rank: int | None) -> None:
        if rank is not None:
            part = parts[name]
            share = _cost_or_dense(format, part, _next_rank(format, part, rank, multiple)) / part.parameters
            heapq.heappush(queue, (share, name))

    for name, rank in ranks.items():
        offer(name, rank)
    while queue:
        _, name = heapq.heappop(queue)
        part, rank = parts[name], ranks[name]
        assert rank is not None
        following = _next_rank(format, part, rank, multiple)
        step = _cost_or_dense(format, part, following) - _cost_or_dense(format, part, rank)
        if step <= remaining:
            remaining -= step
            ranks[name] = following
            offer(name, following)
    return ranks
