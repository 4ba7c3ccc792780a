"""Counting parameters, and spending a budget of them exactly."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from spectrim.core.plan import Choice, Part, Plan, Target

# What a user writes as a group's `format`, and the module format of its rank units.
RANK_FORMATS = {"plain": "low_rank", "pivot": "pivot"}
# What the format of a rank becomes when a sparse part stands beside it.
WITH_ENTRIES = {"low_rank": "low_rank_sparse", "pivot": "pivot_sparse"}


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
        total += _module_cost(choice, part, *sizes(choice, target, part))
        total += part.out_features if choice.bias and not part.bias else 0
    return total


def sizes(choice: Choice, target: Target, part: Part) -> tuple[int, int]:
    """(out, in) of one module under a choice: a pruned FFN has fewer rows, and fewer columns in its last module."""
    channels = choice.counts.get("channel")
    if channels is None:
        return part.out_features, part.in_features
    if part == target.parts[-1]:
        return part.out_features, channels
    return part.out_features // target.channels * channels, part.in_features


def _module_cost(choice: Choice, part: Part, out_features: int, in_features: int) -> int:
    format = choice.formats[part.module]
    rank, columns = choice.counts.get("rank", 0), choice.counts.get("column", 0)
    if format == "dense":
        return out_features * in_features
    for plain, sparse in WITH_ENTRIES.items():
        if format == sparse:
            return rank_cost(plain, part, rank) + choice.counts["entry"]
    if columns == 0:
        return rank_cost("low_rank" if format == "low_rank_columns" else format, part, rank)
    if format == "low_rank_columns":
        return out_features * columns + rank * (out_features + in_features - columns)
    if format == "pivot":
        return out_features * (columns + rank) + rank * (in_features - columns - rank)
    raise ValueError(f"format {format!r} of {part.module} has no kept columns")


def allowed(targets: Sequence[Target], ratio: float) -> int:
    """Parameters that may be kept: floor((1 − ratio) · dense). Raises ValueError outside 0 ≤ ratio < 1."""
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio {ratio} is the fraction of parameters to remove: it must be at least 0 and below 1")
    dense = sum(target.parameters for target in targets)
    # 1 − 0.9 is not 0.1 in binary: take the short decimal that the user meant, and stay exact for any size
    return math.floor((1 - Fraction(ratio).limit_denominator(10**9)) * dense)


def rank_plan(
    targets: Sequence[Target],
    counts: Mapping[str, int | None],
    format: str,
    budget: int,
    fixed: Mapping[str, int] | None = None,
) -> Plan:
    """The plan that gives each target its number of units (None: dense): rank in one format, channels of an FFN.

    fixed: parameters of the bias that a target's method adds once it is not dense.
    """
    choices: dict[str, Choice] = {}
    shared: dict[tuple[str, int], dict[str, int]] = {}  # most targets of a model have one of few numbers
    spent = 0
    for target in targets:
        units = counts[target.name]
        if units is None:
            spent += target.parameters
            continue
        kind, form = ("channel", "dense") if is_ffn(target) else ("rank", format)
        formats = {part.module: form for part in target.parts}
        kept = shared.setdefault((kind, units), {kind: units})
        choices[target.name] = Choice(formats, kept, bias=(fixed or {}).get(target.name, 0) > 0)
        spent += count(choices[target.name], target)
    assert spent <= budget, (spent, budget)
    return Plan(choices, budget, spent)


def is_ffn(target: Target) -> bool:
    """Whether a target is an FFN as a whole, whose units are channels."""
    return target.role == "ffn"


@dataclass(frozen=True)
class _Scale:
    """The sizes that one matrix can have, or several equal FFNs together, which keep one width."""

    names: tuple[str, ...]
    target: Target
    format: str
    multiple: int
    least: int
    fixed: int
    weight: float

    @cached_property
    def dense(self) -> int:
        return len(self.names) * self.target.parameters

    @cached_property
    def largest(self) -> int:
        """The most units that are smaller than dense."""
        if is_ffn(self.target):
            return self.target.channels - 1
        part = self.target.parts[0]
        return rank_within(self.format, part, part.parameters - 1 - self.fixed)

    @cached_property
    def floor(self) -> int:
        return min(self.least * self.multiple, self.largest)

    def cost(self, units: int | None) -> int:
        if units is None:
            return self.dense
        if is_ffn(self.target):
            return len(self.names) * units * (self.target.parameters // self.target.channels)
        return self.fixed + rank_cost(self.format, self.target.parts[0], units)

    def at_share(self, share: float) -> int | None:
        """Units at a share of the parameters, times the target's weight; None: dense, at the whole of them."""
        if math.isinf(self.weight) or share * self.weight >= 1:
            return None
        parameters = math.floor(share * self.weight * self.target.parameters)
        if is_ffn(self.target):
            units = min(parameters // (self.target.parameters // self.target.channels), self.largest)
        else:
            units = min(rank_within(self.format, self.target.parts[0], parameters - self.fixed), self.largest)
        return max(units - units % self.multiple, self.floor) or None

    def following(self, units: int) -> int | None:
        following = units + self.multiple - units % self.multiple
        return following if following <= self.largest else None


def even_ranks(
    targets: Sequence[Target],
    budget: int,
    format: str,
    multiple: int = 1,
    least: int = 1,
    weights: Mapping[str, float] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int | None]:
    """Units that give every target the same share of its parameters, spending `budget` as far as units allow.

    Units are ranks of a matrix, channels of an FFN; equal FFNs get equal widths. Numbers are multiples of `multiple`,
    at least `least` of them (or the largest below dense, where that is less); None means dense, as a matrix stays that
    no rank makes smaller. weights: shares by target name up to one common factor, which the budget decides; a share
    of 1 or more is dense (`math.inf`: always). fixed: parameters of a bias that comes with every rank.
    Steps (one more unit, or the last one to dense) are taken in the order of the share, over its weight, that they
    bring their target to, then by name: first all that fit in that order, then, skipping what does not fit, whatever
    still does. So the budget is never exceeded, what is left is less than a step, a larger budget never keeps less,
    and the order of `targets` does not matter.

    Raises ValueError when the least ranks everywhere exceed the budget, with the largest ratio that is possible.
    """
    scales = _scales(targets, format, multiple, least, weights or {}, fixed or {})

    def at_share(share: float) -> list[int | None]:
        return [scale.at_share(share) for scale in scales]

    def spent(units: Sequence[int | None]) -> int:
        return sum(scale.cost(count) for scale, count in zip(scales, units, strict=True))

    _refuse_infeasible(spent(at_share(0.0)), sum(scale.dense for scale in scales), budget, least * multiple)
    low, high = 0.0, 1 / min([scale.weight for scale in scales if scale.weight > 0], default=1.0)
    units = at_share(high)
    if spent(units) > budget:
        while low < (middle := (low + high) / 2) < high:  # until the two are neighbours
            low, high = (middle, high) if spent(at_share(middle)) <= budget else (low, middle)
        units = at_share(low)
    _top_up(scales, units, budget - spent(units))
    return {name: count for scale, count in zip(scales, units, strict=True) for name in scale.names}


def _scales(
    targets: Sequence[Target],
    format: str,
    multiple: int,
    least: int,
    weights: Mapping[str, float],
    fixed: Mapping[str, int],
) -> list[_Scale]:
    """In order of names; FFNs of one shape and weight are one."""
    equal: dict[object, list[Target]] = {}
    for target in sorted(targets, key=lambda t: t.name):
        weight = weights.get(target.name, 1.0)
        if not weight >= 0:  # nor NaN
            raise ValueError(f"the weight of {target.name} is {weight}: a share cannot be negative")
        shape = tuple((part.out_features, part.in_features) for part in target.parts)
        equal.setdefault((shape, weight) if is_ffn(target) else target.name, []).append(target)
    return [
        _Scale(
            tuple(t.name for t in group), group[0], format, multiple, least,
            fixed.get(group[0].name, 0), weights.get(group[0].name, 1.0),
        )
        for group in equal.values()
    ]  # fmt: skip


def _refuse_infeasible(lowest: int, dense: int, budget: int, units: int) -> None:
    if lowest > budget:
        largest = (dense - lowest) * 10**4 // dense / 10**4
        raise ValueError(
            f"ratio too large: it leaves {budget:,} parameters, but rank {units} everywhere needs "
            f"{lowest:,} of {dense:,}; the largest possible ratio here is {largest}"
        )


def _top_up(scales: Sequence[_Scale], units: list[int | None], remaining: int) -> None:
    queue: list[tuple[float, str, int]] = []

    def offer(index: int) -> None:
        scale, count = scales[index], units[index]
        if count is not None and scale.weight > 0:
            share = scale.cost(scale.following(count)) / scale.dense / scale.weight
            heapq.heappush(queue, (share, scale.names[0], index))

    for index in range(len(scales)):
        offer(index)
    while queue:
        _, _, index = heapq.heappop(queue)
        scale, count = scales[index], units[index]
        assert count is not None
        following = scale.following(count)
        step = scale.cost(following) - scale.cost(count)
        if step <= remaining:
            remaining -= step
            units[index] = following
            offer(index)
