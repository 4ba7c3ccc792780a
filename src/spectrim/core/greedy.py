"""Directions and entries of many matrices in one greedy order, held as one pool a matrix and never as one array.

What a pool spends, parameters or bytes, is its own: the order of units is the same for both.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.core.budget import WITH_ENTRIES, unit_cost
from spectrim.core.bytes import entry_bytes, order_bytes, refuse_too_few
from spectrim.core.plan import Candidate, Choice, Target
from spectrim.core.spend import hull


@dataclass
class Kept:
    """What one matrix may keep, best first of each kind, and how much of it it keeps so far.

    A key is a value² / cost in parameters. itemsize: bytes of a number where bytes are spent, else 0: parameters are.
    paid: what the first directions cost, from none on; size: what the dense matrix does.
    """

    target: Target
    ranks: Sequence[float]
    paid: Sequence[int]
    entries: Float[Tensor, "n"]
    energy: float
    size: int
    itemsize: int = 0
    rank: int = 0
    entry: int = 0
    dense: bool = False
    open: list[bool] = field(default_factory=lambda: [True, True, True])

    @property
    def spent(self) -> int:
        """Parameters or bytes; an index that is there at no entries too is among the bytes."""
        return self.size if self.dense else self.paid[self.rank] + self.of_entries(self.entry)

    def of_entries(self, number: int) -> int:
        """What so many entries cost."""
        return entry_bytes(self.target.parts[0], number, self.itemsize) if self.itemsize else number

    def entry_key(self, index: int) -> float:
        """Of one entry."""
        value = float(self.entries[index])
        return value * value / self.energy

    def next_key(self, kind: int) -> float | None:
        """The key of the next direction (0), entry (1), or of the step from all of them to dense (2)."""
        if self.dense or not self.open[kind]:
            return None
        if kind == 0:
            return self.ranks[self.rank] if self.rank < len(self.ranks) else None
        if kind == 1:
            return self.entry_key(self.entry) if self.entry < len(self.entries) else None
        return -1.0

    def keep(self, least: float) -> int:
        """Keep all units of a key of at least that; what they cost."""
        self.rank = above(self.ranks.__getitem__, len(self.ranks), least)
        self.entry = above(self.entry_key, len(self.entries), least)
        self.dense = False
        self.dense = self.spent >= self.size
        return self.spent

    def take(self, kind: int, left: int) -> int:
        """Keep the next unit, or of entries the whole run of one key, as far as `left` pays; what was paid."""
        before, run = self.spent, 1
        room = self.size - before
        if kind == 1:
            run = above(self.entry_key, len(self.entries), self.entry_key(self.entry)) - self.entry
            step = min(self.of_entries(self.entry + run) - self.of_entries(self.entry), left)
        else:
            step = self.paid[self.rank + 1] - self.paid[self.rank] if kind == 0 else 0
        if kind == 2 or step >= room:
            self.dense = room <= left
            self.open[kind] = False
        elif step > left:
            self.open[kind] = False
        elif kind == 0:
            self.rank += 1
        else:
            most = self.of_entries(self.entry) + left
            taken = bisect.bisect_right(range(1, run + 1), most, key=lambda n: self.of_entries(self.entry + n))
            self.entry += taken
            self.open[kind] = taken > 0
        return self.spent - before

    def choice(self, format: str) -> Choice:
        """What is kept, in the sparse form of a rank's format."""
        return Choice({self.target.parts[0].module: WITH_ENTRIES[format]}, {"rank": self.rank, "entry": self.entry})


def kept_of(candidate: Candidate, format: str, energy: float, itemsize: int = 0) -> Kept:
    """All units of a candidate, its directions at what they cost in a format; itemsize 0: in parameters."""
    (part,) = candidate.target.parts
    units = {units.kind: units for units in candidate.units}
    values = units["rank"].scores.double().cpu().square() / energy if "rank" in units else torch.zeros(0)
    each = unit_cost(format, part)
    costs = torch.full((len(values),), each) if isinstance(each, int) else each[: len(values)]
    ranks = hull(values, costs).tolist()
    paid, size = [0, *itertools.accumulate(costs.tolist())], part.parameters
    if itemsize:
        order = order_bytes(format, part)
        paid, size = [0, *(order + itemsize * each for each in paid[1:])], itemsize * size
    return Kept(candidate.target, ranks, paid, units["entry"].scores.cpu(), energy, size, itemsize)


def above(key: Callable[[int], float], length: int, least: float) -> int:
    """How many of the keys 0, 1, …, none above the one before it, are at least that."""
    return bisect.bisect_right(range(length), -least, key=lambda i: -key(i))


def fill(pools: Sequence[Kept], budget: int) -> None:
    """Take units in the order of their keys, then of pools, directions before entries, as far as the budget goes.

    All that fit in this order, found by bisection over the key; after the first that does not, whatever still fits,
    where a list whose next unit does not fit is closed. No array over all pools is made: memory is theirs.

    budget: parameters or bytes, as the pools spend. Raises ValueError where they cost more than it when they keep
    nothing, as they may in bytes.
    """
    # As in `spend.cut`, the order does not depend on the budget, and neither does what a step costs given the steps
    # before it. Where the runs at B and B + 1 first differ, a step fits at B + 1 alone, whose budget it uses up.
    refuse_too_few(sum(pool.keep(math.inf) for pool in pools), budget)
    low, high = 0, int(np.float64(math.inf).view(np.int64))  # non-negative doubles are in the order of their bits
    if sum(pool.keep(0.0) for pool in pools) > budget:
        while high - low > 1:
            middle = (low + high) // 2
            fits = sum(pool.keep(float(np.int64(middle).view(np.float64))) for pool in pools) <= budget
            low, high = (low, middle) if fits else (middle, high)
        for pool in pools:
            pool.keep(float(np.int64(high).view(np.float64)))
    left = budget - sum(pool.spent for pool in pools)
    queue: list[tuple[float, int, int]] = []

    def offer(place: int, kind: int) -> None:
        key = pools[place].next_key(kind)
        if key is not None:
            heapq.heappush(queue, (-key, place, kind))

    for place in range(len(pools)):
        for kind in range(3):
            offer(place, kind)
    while queue and left > 0:
        _, place, kind = heapq.heappop(queue)
        if pools[place].next_key(kind) is not None:
            left -= pools[place].take(kind, left)
            offer(place, kind)
