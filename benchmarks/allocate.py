"""Spending a budget over a model of 224 matrices: UniRank against one sort of all scores, and the exact knapsack.

`unirank` is the whole allocation, from spectra and cosines to the plan; `sort` is one `torch.sort` of as many float64
scores, the spectra of all matrices in one tensor. `knapsack` finds one of 11 sizes for each matrix, losses falling at a
falling rate, to a proven gap; its figure is seconds. On one thread seconds are the processor's.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Bound, Case
from spectrim.calibrate.statistics import Cosine
from spectrim.core import budget, spend
from spectrim.core.plan import Candidate, Part, Target, Units
from spectrim.core.registry import Problem
from spectrim.methods.duo_svd import search
from spectrim.methods.unirank import UniRank

BLOCKS, ROLES, WIDTH, SIZES = 32, ("q", "k", "v", "o", "gate", "up", "down"), 4096, 11
RATIO, GAP = 0.4, 1e-4
REPEATS = 7
CURVES = 101
OVER_SORT = Bound("at most", 10.0)
EVALUATIONS = Bound("at most", 18.0)


def problem(blocks: int, width: int, format: str = "low_rank") -> Problem:
    """Square matrices of seven roles a block, their spectra power laws with noise, and the cosines of the blocks."""
    generator = torch.Generator().manual_seed(0)
    targets, candidates = [], {}
    index = torch.arange(1, width + 1, dtype=torch.float64)
    for block in range(blocks):
        for role in ROLES:
            name = f"layers.{block}.{role}"
            part = Part(name, width, width, name)
            targets.append(Target(name, role, (block,), (part,)))
            power, *noise = torch.rand(width + 1, generator=generator, dtype=torch.float64).split([1, width])
            spectrum = ((0.5 + noise[0]) * index ** -(0.2 + power)).sort(descending=True).values
            units = Units("rank", spectrum, None, budget.unit_cost(format, part))
            candidates[name] = Candidate(targets[-1], (units,), dict, dict, format)
    cosines = 0.7 + 0.29 * torch.rand(blocks, 1, generator=generator, dtype=torch.float64)
    statistics = {block: {Cosine(): cosines[block]} for block in range(blocks)}
    return Problem(targets, budget.allowed(targets, RATIO), format, generator, candidates, statistics)


def against_sort(blocks: int, width: int, repeats: int, cost_mode: Any = "none", format: str = "low_rank") -> Case:
    """The whole allocation over the sort. The bound is for the published setting."""
    torch.set_num_threads(1)
    asked, method = problem(blocks, width, format), UniRank(cost_mode=cost_mode)
    assert asked.candidates is not None
    scores = torch.cat([candidate.rank_units.scores for candidate in asked.candidates.values()])
    turns = common.in_turns({"unirank": lambda: method.allocate(asked), "sort": lambda: torch.sort(scores)}, repeats)
    plan = method.allocate(asked)
    return Case(
        f"unirank {cost_mode} {format}, {len(asked.targets)} × {width} / one sort",
        common.ratios(turns.processor, "unirank", ["sort"]),
        1,
        bound=OVER_SORT if (cost_mode, format) == ("none", "low_rank") else None,
        details={"seconds": common.medians(turns.processor), "unspent": plan.budget - plan.spent},
    )


def shapes(width: int) -> list[tuple[int, int]]:
    """(out, in) of a block's matrices, FFNs 2.6875 times as wide as the rest (11008 for 4096)."""
    inner = width * 43 // 16
    return [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]


def sizes_of(entries: int, width: int, sizes: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Costs and losses of each matrix: ranks at even shares, and dense; losses fall ever slower."""
    generator = torch.Generator().manual_seed(seed)
    costs, losses = [], []
    for i in range(entries):
        part = Part("", *shapes(width)[i % len(ROLES)], "")
        shares = [part.parameters * (j + 1) // sizes for j in range(sizes - 1)]
        ranks = [budget.rank_within("low_rank", part, share) for share in shares]
        costs.append(torch.tensor([*(budget.rank_cost("low_rank", part, rank) for rank in ranks), part.parameters]))
        falls = torch.rand(sizes - 1, generator=generator, dtype=torch.float64).sort(descending=True).values
        falls = falls * torch.rand(1, generator=generator, dtype=torch.float64).exp()
        losses.append(torch.cat([falls.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)]))
    return costs, losses


def knapsack(entries: int, width: int, sizes: int, repeats: int) -> Case:
    """Seconds for one choice each; other losses in every repeat, so that the spread is over problems too."""
    torch.set_num_threads(1)
    seconds, unspent = [], []
    for seed in range(repeats):
        costs, losses = sizes_of(entries, width, sizes, seed)
        allowed = int((1 - RATIO) * sum(int(cost[-1]) for cost in costs))
        solve = partial(spend.knapsack, costs, losses, allowed, GAP)
        seconds += common.in_turns({"knapsack": solve}, 1).processor["knapsack"]
        unspent.append(allowed - sum(int(cost[i]) for cost, i in zip(costs, solve(), strict=True)))
    name = f"knapsack, {entries} × {sizes} to a gap of {GAP:g}, seconds"
    return Case(name, tuple(seconds), 1, unit="seconds", details={"unspent": unspent})


def column_search(rank: int, curves: int) -> Case:
    """Errors asked for when columns are weighed against ranks, over curves whose least point lies everywhere."""
    asked = []
    for i in range(curves):
        best = rank * i / max(1, curves - 1)
        # giving up nothing is the error of the rank itself, which is known
        asked.append(float(len(search(rank, partial(_away, best)).keys() - {0})))
    return Case(f"column search at rank {rank}, evaluations", tuple(asked), 1, unit="evaluations", bound=EVALUATIONS)


def _away(best: float, given_up: int) -> float:
    return (given_up - best) ** 2


def measure() -> dict[str, object]:
    """The allocation in its published setting, and by parameters in either format; the knapsack; the column search."""
    against_sort(2, 64, 1)  # not counted: loads the libraries
    knapsack(3, 16, 3, 1)
    made = [
        against_sort(BLOCKS, WIDTH, REPEATS),
        against_sort(BLOCKS, WIDTH, REPEATS, "per_param"),
        against_sort(BLOCKS, WIDTH, REPEATS, "per_param", "pivot"),
        knapsack(BLOCKS * len(ROLES), WIDTH, SIZES, REPEATS),
        column_search(1638, CURVES),
    ]
    return common.result("allocate", made, {"ratio": RATIO, "gap": GAP, "spectra": "float64, power laws with noise"})


if __name__ == "__main__":
    common.write(Path(sys.argv[1]), measure())
