"""Spending one budget over many targets: best steps first, or one choice for each at the least total loss."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.core.budget import is_ffn, rank_cost, rank_plan, rank_within, unit_cost
from spectrim.core.plan import Part, Plan, Target

# HiGHS calls a row kept that misses by 1e-6: with costs scaled to this size that is far below one parameter, and the
# exact check in integers seldom has anything to mend. Losses likewise, for it stops at an absolute gap of 1e-6 too.
_SIZE = 1e4
_TRIES = 20
_CELLS = 10**8  # of the knapsack's table, two bytes each


@dataclass(frozen=True)
class Ladder:
    """The sizes that one matrix may have, ascending: ranks, and dense at last; with the parameters of each."""

    ranks: tuple[int, ...]
    costs: Int[Tensor, "sizes"]

    def losses(self, lost: Float[Tensor, "_"]) -> Float[Tensor, "sizes"]:
        """Those of every size, from those of every rank; dense loses nothing."""
        return torch.cat([lost[list(self.ranks)], lost.new_zeros(1)])


# --- best steps first ---


def cut(
    scores: Mapping[str, Float[Tensor, "_"]],
    costs: Mapping[str, Int[Tensor, "_"]],
    budget: int,
    floors: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many steps of each list are taken, when steps go best first and each list is taken from its beginning.

    floors: steps that are taken in any case. The others stand in one order: larger scores first, then names, then
    places in the list. All that fit in this order are taken; after the first that does not, whatever still fits,
    where a list whose next step does not fit is closed. So nothing is spent above `budget`, what is left is less than
    the next step of any list, a larger budget never spends less, and the order of the mappings does not matter.

    Raises ValueError for scores that rise along a list, are NaN or are not one for each cost, for costs below 0, and
    when the floors cost more than `budget`.
    """
    # Why a larger budget never spends less: the order does not depend on the budget. Follow the runs at B and at B + 1
    # side by side. Until they first decide differently they have taken the same steps, and B + 1 has one more left.
    # Where they first differ, the step fits at B + 1 alone: its cost is all that is left there, so that run ends with
    # B + 1 spent, while the other never has more than B. Should they never differ, both spend the same.
    names = sorted(scores)
    if not names:
        return {}
    fixed = [(floors or {}).get(name, 0) for name in names]
    for name, floor in zip(names, fixed, strict=True):
        _check_list(name, scores[name], costs[name], floor)
    reserved = sum(int(costs[name][:floor].sum()) for name, floor in zip(names, fixed, strict=True))
    if reserved > budget:
        raise ValueError(f"the floors alone cost {reserved:,}, but the budget is {budget:,}: lower them or raise it")
    ranked = [scores[name][floor:].to("cpu", torch.float64) for name, floor in zip(names, fixed, strict=True)]
    prices = [costs[name][floor:].to("cpu", torch.int64) for name, floor in zip(names, fixed, strict=True)]
    taken, left = _first_that_fit(ranked, prices, budget - reserved)
    _walk_on(ranked, prices, taken, left)
    return {name: floor + count for name, floor, count in zip(names, fixed, taken, strict=True)}


def _check_list(name: str, scores: Float[Tensor, "_"], costs: Int[Tensor, "_"], floor: int) -> None:
    if len(scores) != len(costs):
        raise ValueError(
            f"{name} has {len(scores)} scores but {len(costs)} costs: one of each is needed for every step"
        )
    if bool(scores.isnan().any()):
        raise ValueError(f"the scores of {name} are NaN at step {int(scores.isnan().nonzero()[0])}")
    if not bool((scores[1:] <= scores[:-1]).all()):
        raise ValueError(f"the scores of {name} rise along its steps, which can only be taken in their order")
    if len(costs) > 0 and int(costs.min()) < 0:
        raise ValueError(f"a step of {name} costs {int(costs.min())}: costs cannot be below 0")
    if not 0 <= floor <= len(scores):
        raise ValueError(f"the floor of {name} is {floor}, but it has {len(scores)} steps")


def _first_that_fit(
    scores: Sequence[Float[Tensor, "_"]], costs: Sequence[Int[Tensor, "_"]], budget: int
) -> tuple[list[int], int]:
    """Steps of each list before the first that does not fit, and what is left."""
    lengths = torch.tensor([len(each) for each in scores])
    order = torch.sort(torch.cat(list(scores)), descending=True, stable=True).indices
    spent = torch.cumsum(torch.cat(list(costs))[order], 0)
    count = int(torch.searchsorted(spent, budget, right=True))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    taken = torch.bincount(owner[order[:count]], minlength=len(lengths))
    return taken.tolist(), budget - (int(spent[count - 1]) if count else 0)


def _walk_on(
    scores: Sequence[Float[Tensor, "_"]], costs: Sequence[Int[Tensor, "_"]], taken: list[int], left: int
) -> None:
    queue: list[tuple[float, int]] = []

    def offer(index: int) -> None:
        if taken[index] < len(scores[index]):
            heapq.heappush(queue, (-float(scores[index][taken[index]]), index))

    for index in range(len(scores)):
        offer(index)
    while queue:
        _, index = heapq.heappop(queue)
        cost = int(costs[index][taken[index]])
        if cost <= left:
            left -= cost
            taken[index] += 1
            offer(index)


def hull(values: Float[Tensor, "n"], costs: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Scores of steps by value for cost: the slopes of the upper concave hull of cumulated value over cumulated cost.

    They never rise, and are one number for the steps between two corners of the hull, which are worth starting only
    if all are taken. With them `cut` fills a knapsack of all lists best value for cost first (the fractional optimum,
    short of it by no more than one such run of steps), also where costs fall along a list. Free steps in front: inf.

    Raises ValueError for values that are negative or no number, and for costs below 0.
    """
    if not bool((values >= 0).all()) or bool((costs < 0).any()):
        raise ValueError("the hull is one of values and costs that are 0 or more")
    runs: list[tuple[float, int, float, int]] = []  # value, cost, slope, steps
    for value, cost in zip(values.double().tolist(), costs.tolist(), strict=True):
        slope, steps = _slope(value, cost), 1
        while runs and runs[-1][2] <= slope:
            before = runs.pop()
            value, cost, steps = value + before[0], cost + before[1], steps + before[3]
            slope = _slope(value, cost)
        runs.append((value, cost, slope, steps))
    slopes = torch.tensor([run[2] for run in runs], dtype=torch.float64)
    return torch.repeat_interleave(slopes, torch.tensor([run[3] for run in runs], dtype=torch.int64))


def _slope(value: float, cost: int) -> float:
    return value / cost if cost else math.inf


# --- ranks as steps ---


def rank_steps(format: str, part: Part, fixed: int = 0) -> Int[Tensor, "n"]:
    """Parameters of each step of a matrix up from rank 0: one more rank, as far as that is smaller than dense, then
    the last one to dense, at what is left.

    fixed: parameters of a bias that any rank brings and dense does not; they are paid at rank 0 and lower the last
    step. The sum of the steps is all parameters but `fixed`. Where no rank at all is smaller than dense there is one
    step, of all parameters.
    """
    largest = rank_within(format, part, part.parameters - 1 - fixed)
    if largest == 0:
        return torch.tensor([part.parameters])
    each = unit_cost(format, part)
    ranks = torch.full((largest,), each) if isinstance(each, int) else each[:largest]
    last = part.parameters - fixed - rank_cost(format, part, largest)
    return torch.cat([ranks.to(torch.int64), torch.tensor([last])])


def least_steps(
    targets: Sequence[Target],
    format: str,
    budget: int,
    least: int | Mapping[str, int],
    fixed: Mapping[str, int] | None = None,
) -> tuple[dict[str, Int[Tensor, "_"]], dict[str, int], int]:
    """By target the costs of its steps, and how many are floors; what biases cost. ValueError as `spend_ranks`."""
    costs: dict[str, Int[Tensor, "_"]] = {}
    floors, base = {}, 0
    for target in targets:
        part, bias = single(target), (fixed or {}).get(target.name, 0)
        costs[target.name] = rank_steps(format, part, bias)
        largest = len(costs[target.name]) - 1
        floor = least if isinstance(least, int) else least[target.name]
        floors[target.name] = min(floor, largest) if largest else 1
        base += bias if largest else 0
    lowest = base + sum(int(costs[name][:floor].sum()) for name, floor in floors.items())
    if lowest > budget:
        dense = sum(target.parameters for target in targets)
        said = f"rank {least}" if isinstance(least, int) else "the least rank"
        raise ValueError(
            f"ratio too large: it leaves {budget:,} parameters, but {said} everywhere needs {lowest:,} of "
            f"{dense:,}; the largest possible ratio here is {(dense - lowest) * 10**4 // dense / 10**4}"
        )
    return costs, floors, base


def spend_ranks(
    targets: Sequence[Target],
    scores: Mapping[str, Float[Tensor, "_"]],
    format: str,
    budget: int,
    least: int = 1,
    fixed: Mapping[str, int] | None = None,
) -> Plan:
    """The plan that takes the steps of `rank_steps` best first, by `cut`; scores are by target name, one for each step.

    Every matrix keeps `least` ranks, or the most that are smaller than dense where that is less; one that no rank
    makes smaller stays dense. Raises ValueError for a target that is no single matrix, and when the least ranks
    exceed the budget, with the largest ratio that is possible.
    """
    costs, floors, base = least_steps(targets, format, budget, least, fixed)
    taken = cut(scores, costs, budget - base, floors)
    ranks = {name: None if count == len(costs[name]) else count for name, count in taken.items()}
    return rank_plan(targets, ranks, format, budget, fixed)


def single(target: Target) -> Part:
    """The matrix of a target that is one. Raises ValueError for those that are several, or a whole FFN."""
    if len(target.parts) != 1 or is_ffn(target):
        raise ValueError(
            f"{target.name} (role {target.role}) is no single matrix and has no rank: match it in a group of its own, "
            "with another allocator"
        )
    return target.parts[0]


# --- one choice for each ---


def knapsack(
    costs: Sequence[Int[Tensor, "_"]], losses: Sequence[Float[Tensor, "_"]], budget: int, gap: float = 1e-4
) -> list[int]:
    """One choice for each entry, by its index, at the least total loss among those that cost at most `budget` together.

    An infinite loss excludes a choice. The total is proven to lie within the fraction `gap` of the least possible one:
    by a table over costs around the choices that the Lagrange relaxation makes, in units of their common divisor, or
    where that would be too large by HiGHS (mixed-integer programming, through scipy), its costs checked in integers.

    Raises ValueError when even the cheapest choices exceed the budget, for a loss that is NaN or −inf, and when HiGHS
    finds no answer.
    """
    owner, index, price, loss = _admitted(costs, losses)
    if not len(costs):
        return []
    cheapest = [int(price[owner == entry].min()) for entry in range(len(costs))]
    room = budget - sum(cheapest)
    if room < 0:
        raise ValueError(f"the budget is {budget:,}, but the smallest possible total is {sum(cheapest):,}")
    extra = price - np.array(cheapest, dtype=np.int64)[owner]
    exact = _by_table(owner, extra, loss, room, gap)
    if exact is not None:
        return [int(each) for each in index[exact]]
    allowed = room
    for _ in range(_TRIES):
        picked = _solve(owner, extra, loss, allowed, gap)
        over = int(extra[picked].sum()) - room
        if over <= 0:
            return [int(each) for each in index[picked]]
        # rounded beyond the room, within HiGHS' tolerance: ask for that much less
        allowed = max(0, allowed - over)
    raise ValueError(f"HiGHS exceeds the budget of {budget:,} by {over:,}, however much less it is given")


def _admitted(
    costs: Sequence[Int[Tensor, "_"]], losses: Sequence[Float[Tensor, "_"]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of every choice that is not excluded: the entry it belongs to, its index there, its cost and loss."""
    columns: list[tuple[np.ndarray, ...]] = []
    for entry, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        lost, price = loss.double().cpu().numpy(), cost.cpu().numpy()
        if np.isnan(lost).any() or (lost == -math.inf).any():
            raise ValueError(f"a loss of entry {entry} is NaN or −inf: {lost.tolist()}")
        (index,) = np.nonzero(np.isfinite(lost))
        if len(index) == 0:
            raise ValueError(f"every choice of entry {entry} has an infinite loss: none can be taken")
        columns.append((np.full(len(index), entry), index, price[index].astype(np.int64), lost[index]))
    if not columns:
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), np.zeros(0)
    owner, index, price, lost = (np.concatenate(column) for column in zip(*columns, strict=True))
    return owner, index, price, lost


def _relaxed(
    owner: np.ndarray, extra: np.ndarray, loss: np.ndarray, room: int
) -> tuple[float, np.ndarray, np.ndarray, float]:
    """Of the Lagrange relaxation: the price of a parameter, each entry's best choice at it (the cheapest of equal
    ones), what every choice loses beside that one, and the bound on the total loss."""
    starts = np.searchsorted(owner, np.arange(owner[-1] + 1))

    def cheapest(price: float) -> np.ndarray:
        paid = loss + price * extra
        return np.where(paid <= np.minimum.reduceat(paid, starts)[owner], extra, np.iinfo(np.int64).max)

    low, high = 0.0, 2 * float(loss.max() - loss.min())  # costs differ by 1 or more: here the cheapest are the best
    for _ in range(120):
        middle = (low + high) / 2
        fits = int(np.minimum.reduceat(cheapest(middle), starts).sum()) <= room
        low, high = (low, middle) if fits else (middle, high)
    base = starts + np.array([int(np.argmin(each)) for each in np.split(cheapest(high), starts[1:])])
    paid = loss + high * extra
    regret = paid - paid[base][owner]
    return high, base, regret, float(paid[base].sum()) - high * room


def _by_table(owner: np.ndarray, extra: np.ndarray, loss: np.ndarray, room: int, gap: float) -> np.ndarray | None:
    """The places of the picked choices, one an entry; None where the table would be too large.

    A solution lies above the bound by the regrets of its choices and the price of what it leaves unspent. If that is
    at most `most`, all its choices are among those of regrets up to `most`, and so are the sums of the costs by which
    they differ from the best ones: the table has all of those. So what it finds is the best one if it is within `most`,
    and otherwise all solutions lie above `most`, which is doubled until that proves enough.
    """
    price, base, regret, bound = _relaxed(owner, extra, loss, room)
    swap, slack = extra - extra[base][owner], room - int(extra[base].sum())
    most = max(gap, 1e-6) * max(abs(bound), float(np.abs(loss).max())) / 4
    while True:
        (kept,) = np.nonzero((regret <= most) & (swap != 0))
        unit = int(np.gcd.reduce(swap[kept])) if len(kept) else 1
        moves = swap[kept] // unit
        below, above = (_reach(-moves, regret[kept], most), _reach(moves, regret[kept], most))
        # rows are held in float64 too, several at once: few long ones are no small table
        if (below + above + 1) * max(len(np.unique(owner[kept])), 50) > _CELLS or len(kept) > np.iinfo(np.int16).max:
            return None
        least, taken = _table(owner[kept], moves, regret[kept], below, above)
        left = slack - unit * np.arange(-below, above + 1)
        over = np.where(left >= 0, least + price * left, np.inf)
        place = int(np.argmin(over))
        if over[place] <= most + gap * abs(bound):
            break
        most *= 2
    picked = base.copy()
    for row in reversed(taken):
        if row[place] >= 0:
            choice = row[place]
            picked[owner[kept[choice]]] = kept[choice]
            place -= int(moves[choice])
    return picked


def _reach(moves: np.ndarray, regret: np.ndarray, most: float) -> int:
    """A bound on the sum of moves upwards whose regrets are `most` together: the best ones for their regret."""
    (upwards,) = np.nonzero(moves > 0)
    order = upwards[np.argsort(regret[upwards] / moves[upwards], kind="stable")]
    count = int(np.searchsorted(np.cumsum(regret[order]), most, side="right"))
    return int(moves[order][: count + 1].sum())


def _table(
    owner: np.ndarray, moves: np.ndarray, regret: np.ndarray, below: int, above: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The least regret of every sum of moves from −below to above, one move or none an entry; the last moves taken."""
    least = np.full(below + above + 1, np.inf)
    least[below] = 0
    taken = []
    for entry in np.unique(owner):
        best, how = least.copy(), np.full(len(least), -1, np.int16)
        for choice in np.flatnonzero(owner == entry):
            back, forth = max(0, -int(moves[choice])), max(0, int(moves[choice]))
            found = least[back : max(back, len(least) - forth)] + regret[choice]
            target = slice(forth, forth + len(found))
            better = found < best[target]
            best[target][better], how[target][better] = found[better], choice
        least = best
        taken.append(how)
    return least, taken


def _solve(owner: np.ndarray, extra: np.ndarray, loss: np.ndarray, room: int, gap: float) -> np.ndarray:
    """The places of the picked choices, one an entry, in their order."""
    from scipy import optimize, sparse  # slow to import, and the other ways to spend do without

    count, entries = len(owner), int(owner[-1]) + 1
    unit = max(int(extra.max()), 1) / _SIZE
    one_each = sparse.csr_array((np.ones(count), (owner, np.arange(count))), shape=(entries, count))
    found = optimize.milp(
        loss * (_SIZE / max(float(np.abs(loss).max()), np.finfo(float).tiny * _SIZE)),
        integrality=np.ones(count),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(sparse.csr_array(extra[None] / unit), -np.inf, room / unit),
        ],
        options={"mip_rel_gap": gap},
    )
    if not found.success:
        raise ValueError(f"HiGHS found no answer for {entries} entries: {found.message}")
    starts = np.searchsorted(owner, np.arange(entries))
    share = np.split(found.x, starts[1:])
    return starts + np.array([int(np.argmax(each)) for each in share])
