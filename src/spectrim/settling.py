"""What a recipe leaves open (`auto`) until the sizes of model and memory are known: decided before a run begins."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from spectrim import needs
from spectrim.core import distributed, heap, launch
from spectrim.jobs import Job

logger = logging.getLogger(__name__)


def of_a_process() -> int:
    """Bytes of memory that a process may take: the same in all, the least that a machine has for each of its own."""
    return min(distributed.gathered(heap.of_machine() // launch.of_this_machine()))


def settled(setting: needs.Setting, available: int) -> needs.Setting:
    """With every method's choice between a backward pass and none made by whether that fits into the bytes available.

    Where it does not, a warning names both sizes, and so does a note of the structure, which goes into the plan.
    """
    backwards = replace(setting, jobs=[_with(job, lambda each: each.settled(True)) for job in setting.jobs])
    if backwards.jobs == setting.jobs:  # nothing is left open
        return setting
    # matrices are decomposed beside all statistics
    stages = needs.stages(backwards)
    needed = max(sum(stages[name].values()) for name in ("calibrate", "decompose"))
    if needed <= available:
        return backwards
    note = (
        f"a backward pass takes {needs.shown(needed)} of memory, and a run has {needs.shown(available)}: matrices are "
        "decomposed in the metric of their inputs alone (sided: input)"
    )
    if distributed.first():
        logger.warning(note)
    jobs = [_with(job, lambda each: each.settled(False)) for job in setting.jobs]
    structure = replace(setting.structure, notes=(*setting.structure.notes, note))
    return replace(setting, jobs=jobs, structure=structure)


def _with(job: Job, change: Callable[[Any], Any]) -> Job:
    return replace(job, decomposers={name: change(each) for name, each in job.decomposers.items()})
