"""Counting bytes: values at one item size, and the indices that stand beside them.

Sizes of indices are those of the module formats, which a test compares: int32 for the order of pivots and for kept
columns; for nnz entries of out × in the smaller of CSR, 4 (out + 1) + 2 nnz (4 nnz above 32768 inputs), and of one bit
a place, out · ⌈in / 8⌉.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from spectrim.core.budget import WITH_ENTRIES, count, sizes
from spectrim.core.plan import Choice, Part, Plan, Target


def entry_bytes(part: Part, number: int, itemsize: int) -> int:
    """Bytes of so many entries of a matrix: their values, and the smaller index. An index takes room at none, too."""
    narrow, starts, mask = _index(part)
    return itemsize * number + min(starts + narrow * number, mask)


def entry_steps(part: Part, number: int, itemsize: int) -> Int[Tensor, "n"]:
    """What the first, second, … entry adds to `entry_bytes`: index bytes only until a mask is the smaller one."""
    narrow, starts, mask = _index(part)
    return itemsize + (starts + narrow * torch.arange(number + 1)).clamp_max(mask).diff()


def _index(part: Part) -> tuple[int, int, int]:
    """Bytes of a column and of all row starts in CSR, and of the mask."""
    narrow = 2 if part.in_features <= 2**15 else 4
    return narrow, 4 * (part.out_features + 1), part.out_features * -(-part.in_features // 8)


def order_bytes(format: str, part: Part) -> int:
    """Bytes of the order of outputs that a pivot form of any rank above 0 stores; 0 for other formats."""
    return 4 * part.out_features if format == "pivot" else 0


def index_bytes(choice: Choice, target: Target) -> int:
    """Bytes of all indices of a target as `choice` has it."""
    total = 0
    for part in target.parts:
        format = choice.formats[part.module]
        rank, columns = choice.counts.get("rank", 0), choice.counts.get("column", 0)
        out_features, in_features = sizes(choice, target, part)
        for plain, sparse in WITH_ENTRIES.items():
            if format == sparse:
                total += entry_bytes(part, choice.counts["entry"], 0) + (order_bytes(plain, part) if rank else 0)
        if format == "low_rank_columns":
            total += 4 * columns
        elif format == "pivot" and rank + columns:
            total += 4 * (in_features if columns else out_features)
    return total


def stored_bytes(targets: Sequence[Target], choices: Mapping[str, Choice], itemsize: int) -> int:
    """Bytes of targets as a plan stores them, those without a choice dense; biases that they had are not counted."""
    total = 0
    for target in targets:
        choice = choices.get(target.name)
        if choice is None:
            total += itemsize * target.parameters
        else:
            total += itemsize * count(choice, target) + index_bytes(choice, target)
    return total


def refuse_too_few(least: int, allowed: int) -> None:
    """Raise ValueError where so many bytes do not even pay for the least a plan stores, the indices of no entries."""
    if least > allowed:
        raise ValueError(
            f"ratio too large: it leaves {allowed:,} bytes, but the indices of matrices that keep nothing need "
            f"{least:,}; lower the ratio, or count parameters (budget: parameters)"
        )


def reached(name: str, plan: Plan, targets: Sequence[Target], itemsize: int) -> str:
    """A note for the plan of an allocator: the bytes reached, and those allowed."""
    spent, allowed = stored_bytes(targets, plan.choices, itemsize), plan.budget * itemsize
    assert spent <= allowed, (spent, allowed)
    return f"{name}: {spent:,} of {allowed:,} bytes allowed, indices included ({itemsize} a number)"
