"""What a run puts into its work directory, from shapes alone: bytes of candidates, spectra, statistics, trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spectrim.core import budget
from spectrim.core.plan import Part, Target
from spectrim.jobs import Job

# Of robust PCA with its default settings, on Gaussian matrices and on those of the bundled model: directions of L as a
# share of the smaller side (0.53 to 0.61), and entries of S, a share 1 − GAP √(smaller / larger side) of all.
LOW, GAP = 0.57, 0.44
# What a file begins with: the names, types and places of a few tensors.
HEADER = 400


def stored_bytes(job: Job, target: Target) -> int:
    """A candidate in the store: factors in float32, two spectra in float64; entries with their places and scores.

    left goes as far as the format can use it, or, where an allocator learns, as far as there are directions. An FFN as
    a whole has one score and one index a channel. How many entries robust PCA finds is an average over matrices.
    """
    if budget.is_ffn(target):
        return 16 * target.channels + HEADER
    (part,), decomposer = target.parts, job.decomposers[target.name]
    kinds = decomposer.kinds
    directions, entries = units_of(part, kinds)
    if "rank" not in kinds:  # place and score, of all entries
        return entries * (8 if entries <= torch.iinfo(torch.int32).max else 12) + HEADER
    of_left = directions if job.allocator.learns else min(directions, budget.largest_rank(job.format, part))
    factors = 4 * (part.out_features + (part.in_features if decomposer.keeps_right else 0)) * of_left
    if "entry" in kinds:  # right by itself; of entries place, value and score
        return factors + (4 * part.in_features + 8) * directions + 16 * entries + HEADER
    return factors + spectrum_bytes(target)


def spectrum_bytes(target: Target) -> int:
    """The rank units of a matrix alone."""
    (part,) = target.parts
    return 16 * min(part.out_features, part.in_features) + HEADER


def units_of(part: Part, kinds: Sequence[str]) -> tuple[int, int]:
    """About how many directions and entries a candidate has."""
    smaller, larger = sorted((part.out_features, part.in_features))
    if "entry" not in kinds:
        return smaller, 0
    if "rank" not in kinds:
        return 0, part.parameters
    return math.ceil(LOW * smaller), int((1 - GAP * math.sqrt(smaller / larger)) * part.parameters)


def trained_bytes(job: Job, target: Target) -> int:
    """What a training keeps for a target: its state under way, its result, and what the plan has of it."""
    bytes_of: int = job.allocator.trained_bytes(target, *units_of(target.parts[0], job.decomposers[target.name].kinds))
    return bytes_of


def kept_statistics(jobs: Sequence[Job], names: set[str] | None = None) -> Mapping[Any, int]:
    """Statistics that candidates still read after their block is gone: one an input or, of gradients, a weight.

    names: of these targets (default all).
    """
    found: dict[Any, int] = {}
    for job in jobs:
        for target in job.targets:
            if names is None or target.name in names:
                found |= statistics_of(job, target, "keeps")
    return found


def statistics_of(job: Job, target: Target, which: str) -> dict[Any, int]:
    """Bytes of what a target's decomposer `needs` or `keeps`, by place and statistic, each in a file of its own."""
    return {
        (part.module if s.where == "gradient" else part.input, s): _statistic_bytes(s, part) + HEADER
        for part in target.parts
        for s in getattr(job, which)(target)
    }


def _statistic_bytes(statistic: Any, part: Part) -> int:
    """Of its sums; those that start without rows get one for each output, and as many columns if without these too."""
    sums = statistic.start(part.in_features, torch.device("meta")).values()
    return sum((t.numel() or part.out_features * (t.shape[-1] or part.out_features)) * t.element_size() for t in sums)
