"""Directions and entries of all matrices in one flat pool: their order, their buckets, their cost, a plan of them.

The one place where this pool counts is `Prices`: everything that is spent, softly or exactly, is read from it. A pool
whose plans spend bytes has `Steps` beside it, which they are read from then; all else is counted in parameters still.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from spectrim.core import budget as budgets
from spectrim.core.budget import WITH_ENTRIES, unit_cost
from spectrim.core.bytes import entry_bytes, entry_steps, order_bytes, refuse_too_few
from spectrim.core.plan import Candidate, Choice, Plan
from spectrim.core.spend import cut, hull, single


@dataclass(frozen=True)
class Prices:
    """What a matrix costs: of its first, second, … direction kept, of an entry, and of all of it dense."""

    ranks: Int[Tensor, "n"]
    entry: int
    dense: int

    @staticmethod
    def of(candidate: Candidate, format: str) -> Prices:
        """In parameters."""
        part, count = single(candidate.target), len(candidate.rank_units.scores)
        each = unit_cost(format, part)
        return Prices(torch.full((count,), each) if isinstance(each, int) else each[:count], 1, part.parameters)


@dataclass(frozen=True)
class Steps:
    """What a plan spends on a matrix: on nothing kept, on its first, second, … direction and entry, on all of it dense.

    In bytes an index is there at nothing kept too, and the first direction of the pivot form brings an order.
    """

    ranks: Int[Tensor, "n"]
    entries: Int[Tensor, "m"]
    nothing: int
    dense: int

    @staticmethod
    def of(candidate: Candidate, prices: Prices, format: str, itemsize: int) -> Steps:
        """In bytes, or, itemsize 0, in parameters."""
        part, number = single(candidate.target), len(candidate.units[1].scores)
        if not itemsize:
            return Steps(prices.ranks, torch.full((number,), prices.entry), 0, prices.dense)
        ranks = itemsize * prices.ranks
        ranks[:1] += order_bytes(format, part)
        nothing = entry_bytes(part, 0, itemsize)
        return Steps(ranks, entry_steps(part, number, itemsize), nothing, itemsize * prices.dense)


@dataclass(frozen=True)
class Pool:
    """All units, flat: by target, directions before entries, in their order.

    keys: value² / cost of each (of directions whose costs fall the slope of the hull); places: where each variable
    stands in the order of keys, 0 the worst, 1 the best. Variables are the units (owner None), or buckets of them:
    owner is the bucket of each unit, members its units, segment (one a target and kind) where each variable belongs.
    itemsize: bytes of a number where plans spend bytes, 0: parameters.
    """

    candidates: Mapping[str, Candidate]
    format: str
    prices: Mapping[str, Prices]
    sizes: Sequence[int]
    keys: Float[Tensor, "units"]
    owner: Int[Tensor, "units"] | None
    members: Float[Tensor, "variables"]
    costs: Float[Tensor, "variables"]
    segment: Int[Tensor, "variables"]
    places: Float[Tensor, "variables"]
    itemsize: int = 0

    @staticmethod
    def make(candidates: Mapping[str, Candidate], format: str, groups: int | None, relative: bool = False) -> Pool:
        """groups: buckets a segment, on average; None: none. Raises ValueError for a candidate of other units."""
        candidates = dict(sorted(candidates.items()))
        for name, candidate in candidates.items():
            kinds = [units.kind for units in candidate.units]
            if kinds != ["rank", "entry"]:
                raise ValueError(
                    f"bernoulli weighs directions against entries, but {name} (role {candidate.target.role}) has units "
                    f"of {' and '.join(kinds)} only: decompose it by robust_pca, or match it in a group of its own, "
                    "with another allocator"
                )
        prices = {name: Prices.of(candidate, format) for name, candidate in candidates.items()}
        values, costs = [], []
        for name, candidate in candidates.items():
            squares = [units.scores.detach().cpu().double().square() for units in candidate.units]
            energy = float(sum(s.sum() for s in squares)) or 1.0
            values += [s / energy if relative else s for s in squares]
            costs += [prices[name].ranks, torch.full((len(squares[1]),), prices[name].entry)]
        keys = torch.cat(
            [hull(v, c) if i % 2 == 0 else v / c for i, (v, c) in enumerate(zip(values, costs, strict=True))]
        )
        sizes, every = [len(v) for v in values], torch.cat(costs).double()
        segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        if groups is None:
            ones = torch.ones(len(keys))
            places = _places(keys, ones.double())
            return Pool(candidates, format, prices, sizes, keys, None, ones, every.float(), segment, places)
        owner = _buckets(costs, groups)
        total = int(owner.max()) + 1 if len(owner) else 0
        members = torch.bincount(owner, minlength=total)
        cost = torch.zeros(total, dtype=torch.float64).index_add(0, owner, every)
        mean = torch.zeros(total, dtype=torch.float64).index_add(0, owner, keys * every) / cost
        of_bucket, places = torch.zeros(total, dtype=torch.int64), _places(mean, cost)
        of_bucket[owner] = segment
        return Pool(candidates, format, prices, sizes, keys, owner, members.float(), cost.float(), of_bucket, places)

    def of_segments(self, values: Shaped[Tensor, "segments"]) -> Shaped[Tensor, "units"]:
        """The value of each unit's segment."""
        return values.repeat_interleave(torch.tensor(self.sizes))

    def unit_places(self) -> Float[Tensor, "units"]:
        """Where each unit stands in the order of keys, as a share of the cost of all."""
        costs = [c for p, size in zip(self.prices.values(), self.sizes[1::2], strict=True)
                 for c in (p.ranks.double(), torch.full((size,), float(p.entry), dtype=torch.float64))]  # fmt: skip
        return _places(self.keys, torch.cat(costs))

    def counts(self, kept: Float[Tensor, "variables"]) -> Float[Tensor, "targets 2"]:
        """Directions and entries of each target where variables are kept in part."""
        sums = torch.zeros(len(self.sizes), dtype=torch.float64)
        return sums.index_add_(0, self.segment, (kept * self.members).double()).view(-1, 2)

    def spent(self, kept: Float[Tensor, "variables"]) -> Float[Tensor, "targets"]:
        """What each target costs where variables are kept in part, without the step to dense."""
        counts = self.counts(kept)
        return self._directions(counts[:, 0]) + counts[:, 1] * self._paid.entry

    def average(self, kept: Float[Tensor, "variables"]) -> Float[Tensor, "variables"]:
        """What a unit of each variable costs on average where variables are kept in part."""
        ranks = self.counts(kept)[:, 0].clamp_min(1e-6)
        each = torch.stack([self._directions(ranks) / ranks, self._paid.entry], dim=1)
        return each.flatten()[self.segment].to(kept.dtype)

    def _directions(self, ranks: Float[Tensor, "targets"]) -> Float[Tensor, "targets"]:
        """What so many directions cost, between whole numbers of them on a line."""
        whole = torch.minimum(ranks.long(), self._paid.most)
        low = self._paid.sums[self._paid.start + whole]
        high = self._paid.sums[self._paid.start + torch.minimum(whole + 1, self._paid.most)]
        return low + (ranks - whole) * (high - low)

    @cached_property
    def _paid(self) -> _Paid:
        """The prices of all targets."""
        sums = [torch.cat([torch.zeros(1), torch.cumsum(p.ranks.double(), 0)]) for p in self.prices.values()]
        most = torch.tensor([len(p.ranks) for p in self.prices.values()])
        entry = torch.tensor([float(p.entry) for p in self.prices.values()], dtype=torch.float64)
        return _Paid(torch.cat(sums), torch.cumsum(most + 1, 0) - most - 1, most, entry)

    @property
    def dense(self) -> Float[Tensor, "targets"]:
        """What each target costs dense."""
        return torch.tensor([float(prices.dense) for prices in self.prices.values()], dtype=torch.float64)

    def gates(self, mask: Float[Tensor, "variables"]) -> Float[Tensor, "units"]:
        """Of each unit under a mask; of buckets, all of a target that would cost as much as it does dense."""
        if self.owner is None:
            return mask
        whole = (self.spent(mask) >= self.dense).repeat_interleave(2)
        return torch.where(self.of_segments(whole), 1.0, mask[self.owner])

    def plan(self, order_by: Float[Tensor, "units"], budget: int) -> Plan:
        """The plan that takes units of the largest `order_by`, ties by key, then target, kind and index, in `budget`.

        What does not fit is skipped, and closes its target's units of that kind. A target that would cost as much as
        it does dense is dense, and what that frees is spent again. Which units: `learned`. budget: parameters; what may
        be spent are as many, or, where bytes are, `itemsize` for each. ValueError where empty indices alone take more.
        """
        order = torch.argsort(self.keys, descending=True, stable=True)
        order = order[torch.argsort(order_by[order], descending=True, stable=True)]
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order))
        within = [torch.sort(own) for own in position.split(list(self.sizes))]
        steps = {
            name: Steps.of(candidate, self.prices[name], self.format, self.itemsize)
            for name, candidate in self.candidates.items()
        }
        allowed, whole = budget * (self.itemsize or 1), set[str]()
        refuse_too_few(sum(each.nothing for each in steps.values()), allowed)
        while True:
            left = allowed - sum(each.dense if name in whole else each.nothing for name, each in steps.items())
            scores, costs = {}, {}
            for i, (name, each) in enumerate(steps.items()):
                if name not in whole:
                    for kind, own in enumerate(within[2 * i : 2 * i + 2]):
                        scores[f"{name}\n{kind}"] = -own.values.double()
                        costs[f"{name}\n{kind}"] = each.entries if kind else each.ranks
            taken = cut(scores, costs, left)
            spent = {name: sum(int(costs[f"{name}\n{k}"][: taken[f"{name}\n{k}"]].sum()) for k in (0, 1))
                     for name in steps if name not in whole}  # fmt: skip
            grown = {name for name, cost in spent.items() if steps[name].nothing + cost >= steps[name].dense}
            if not grown:
                break
            whole |= grown
        rest = {name: steps[name].dense - steps[name].nothing - cost for name, cost in spent.items()}
        return self._made(within, taken, rest, budget, left - sum(spent.values()))

    def _made(
        self, within: Sequence[tuple[Tensor, Tensor]], taken: Mapping[str, int], rest: Mapping[str, int],
        budget: int, left: int,
    ) -> Plan:  # fmt: skip
        """Choices of counts; a target of which everything is kept, and that `left` makes dense, is.

        rest: what each is short of dense, those that are dense already left out.
        """
        choices, learned = {}, {}
        for i, (name, candidate) in enumerate(self.candidates.items()):
            if name not in rest:
                continue
            rank, entries = (taken[f"{name}\n{kind}"] for kind in (0, 1))
            if [rank, entries] == list(self.sizes[2 * i : 2 * i + 2]) and rest[name] <= left:
                left -= rest[name]
                continue
            formats = {single(candidate.target).module: WITH_ENTRIES[self.format]}
            choices[name] = Choice(formats, {"rank": rank, "entry": entries})
            learned[name] = {
                "order": within[2 * i][1][:rank].clone(), "entries": within[2 * i + 1][1][:entries].clone()
            }  # fmt: skip
        targets = [candidate.target for candidate in self.candidates.values()]
        total = sum(budgets.count(choices[t.name], t) if t.name in choices else t.parameters for t in targets)
        return Plan(choices, budget, total, learned=learned)


@dataclass(frozen=True)
class _Paid:
    """What the first 0, 1, … directions cost together, target after target; where each starts, and its last place."""

    sums: Float[Tensor, "all"]
    start: Int[Tensor, "targets"]
    most: Int[Tensor, "targets"]
    entry: Float[Tensor, "targets"]


def _places(keys: Float[Tensor, "n"], weights: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The middle of each in the order of keys, rising, as a share of all weights; equal keys: later ones lower."""
    order = torch.argsort(keys, descending=True, stable=True).flip(0)
    ends = torch.cumsum(weights[order], 0)
    places = torch.empty(len(keys), dtype=torch.float64)
    places[order] = (ends - weights[order] / 2) / (ends[-1] if len(ends) else 1.0)
    return places.float()


def _buckets(costs: Sequence[Int[Tensor, "_"]], groups: int) -> Int[Tensor, "units"]:
    """The bucket of each unit: neighbours of a segment, as many buckets a segment as its share of the cost gives."""
    size = float(sum(float(c.sum()) for c in costs)) / (groups * max(1, len(costs))) or 1.0
    found, start = [], 0
    for each in costs:
        total = float(each.sum())
        middle = torch.cumsum(each.double(), 0) - each.double() / 2
        index = (middle * max(1, round(total / size)) / max(total, 1.0)).long()
        _, index = torch.unique(index, return_inverse=True)  # those of a dear unit's width that hold none
        found.append(start + index)
        start += int(index.max()) + 1 if len(index) else 0
    return torch.cat(found)


def project(
    values: Float[Tensor, "n"],
    spent: Callable[[Float[Tensor, "n"]], float],
    budget: float,
    push: Float[Tensor, "n"] | float = 1.0,
    inflate: bool = False,
) -> tuple[Float[Tensor, "n"], float]:
    """clip(values − v · push, 0, 1) and v: the least v ≥ 0 within the budget, or of any sign (inflate). push > 0."""
    rates = torch.as_tensor(push, dtype=values.dtype)

    def at(v: float) -> Float[Tensor, "n"]:
        return (values - v * rates).clamp(0, 1)

    low = min(0.0, float(((values - 1) / rates).min())) if inflate else 0.0
    if spent(at(low)) <= budget:
        return at(low), low
    high = max(low, float((values / rates).max()))
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(at(middle)) <= budget else (middle, high)
    return at(high), high
