"""Factors made again instead of stored, where disk is short: from the weights and the statistics that they came from.

What a target's factors take in the store is at most 4 · out · rank bytes, a Gram 8 · in²: one Gram serves all that read
one input, so it is the smaller for gate and up always, for q, k and v in pivot form, and a weight alone needs nothing.
For each input the smaller is stored. The spectra are stored in any case.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.core.plan import Target
from spectrim.core.store import StoreError
from spectrim.jobs import Job
from spectrim.needs import shown
from spectrim.storage import kept_statistics, spectrum_bytes, statistics_of, stored_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """What the store is to hold of candidates: the `lean` targets are without their factors; bytes of all of it."""

    lean: frozenset[str]
    bytes: int


def able(job: Job, target: Target) -> bool:
    """Whether a target can go without stored factors: a single matrix whose factors are read once or twice.

    Allocators that run the model read them over and over; sparse parts take long to find, and entries are their scores.
    """
    kinds = job.decomposers[target.name].kinds
    return job.allocator.sees != "model" and len(target.parts) == 1 and "rank" in kinds and "entry" not in kinds


def whole(jobs: Sequence[Job], pending: Sequence[Target] | None = None) -> Layout:
    """Every factor stored. pending: the targets still to be decomposed (default all)."""
    names = None if pending is None else {target.name for target in pending}
    factors = sum(stored_bytes(job, t) for job in jobs for t in job.targets if names is None or t.name in names)
    return Layout(frozenset(), factors + sum(kept_statistics(jobs, names).values()))


def least(jobs: Sequence[Job], pending: Sequence[Target] | None = None) -> Layout:
    """Of each input either the factors that come from it or its statistics, whichever takes less."""
    names = None if pending is None else {target.name for target in pending}
    kept = kept_statistics(jobs, names)
    total, lean = sum(kept.values()), set()
    for needed, members in _by_statistics(jobs, names).items():
        factors = sum(stored_bytes(job, target) for job, target in members)
        if needed is not None:
            job, target = members[0]
            more = sum(size for place, size in statistics_of(job, target, "needs").items() if place not in kept)
            again = more + sum(spectrum_bytes(target) for _, target in members)
            if again < factors:
                lean |= {target.name for _, target in members}
            factors = min(factors, again)
        total += factors
    return Layout(frozenset(lean), total)


def _by_statistics(jobs: Sequence[Job], names: set[str] | None) -> Mapping[Any, list[tuple[Job, Target]]]:
    """Targets by the statistics that they need; those that cannot be lean, under None."""
    found: dict[Any, list[tuple[Job, Target]]] = {}
    for job in jobs:
        for target in job.targets:
            if names is None or target.name in names:
                places = frozenset(statistics_of(job, target, "needs")) if able(job, target) else None
                found.setdefault(places, []).append((job, target))
    return found


def chosen(
    jobs: Sequence[Job], pending: Sequence[Target], others: int, directory: Path, passes: int = 1
) -> frozenset[str]:
    """Targets whose factors are not to be stored, so that the work directory finds room; none where all do.

    passes: how often candidates are made. others: bytes needed on the same disk beside candidates. Raises StoreError,
    before anything heavy, where even the least is too much.
    """
    if not pending:
        return frozenset()
    free = free_bytes(directory)
    wanted = passes * whole(jobs, pending).bytes + others
    if wanted <= free:
        return frozenset()
    layout = least(jobs, pending)
    needed = passes * layout.bytes + others
    if needed > free:
        raise StoreError(
            f"{directory}: {shown(free)} are free, and this run needs {shown(needed)} there even without stored "
            f"factors ({shown(wanted)} with them); free some space or give another directory with --work"
        )
    logger.warning(
        "%s: %s are free, %s would be needed: the factors of %d of %d targets are not stored but made again when they "
        "are cut (%s)", directory, shown(free), shown(wanted), len(layout.lean), len(pending), shown(needed),
    )  # fmt: skip
    return layout.lean


def free_bytes(directory: Path) -> int:
    """Free space of the disk that a directory lies on, or would."""
    return shutil.disk_usage(_existing(directory)).free


def same_disk(one: Path, other: Path) -> bool:
    """Whether two directories, which need not be there yet, lie on one disk."""
    return os.stat(_existing(one)).st_dev == os.stat(_existing(other)).st_dev


def _existing(directory: Path) -> Path:
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
