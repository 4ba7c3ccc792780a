"""A recipe met with a model: which targets each group has, who decomposes them, within which budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spectrim import recipe as recipes
from spectrim.core import budget
from spectrim.core.plan import Plan, Target
from spectrim.core.registry import Problem
from spectrim.model.targets import Structure
from spectrim.recipe import Group, Recipe, RecipeError


@dataclass(frozen=True)
class Job:
    """One group of a recipe met with its targets: what is decomposed how, within which budget."""

    group: Group
    targets: tuple[Target, ...]
    decomposers: Mapping[str, Any]
    allocator: Any
    format: str
    budget: int


def plan_jobs(asked: Recipe, structure: Structure) -> list[Job]:
    """The groups of a recipe with their targets, methods and budgets. Raises RecipeError where they do not fit."""
    jobs = []
    for group, members in zip(asked.groups, recipes.grouped(asked, structure.targets), strict=True):
        allocator = asked.allocator(group)
        for statistic in allocator.needs:
            if statistic.where not in ("block", "sublayer"):
                raise RecipeError(
                    f"allocator {group.allocate.method!r} needs {statistic}, measured at the {statistic.where}: "
                    "an allocator is given statistics of blocks and sub-layers only"
                )
        allowed = budget.allowed(members, group.ratio)
        format = budget.RANK_FORMATS[group.format]
        decomposers = asked.decomposers(group, members)
        jobs.append(Job(group, tuple(members), decomposers, allocator, format, allowed))
    return jobs


def allocate_early(job: Job, asked: Recipe) -> Plan | None:
    """The plan of a job whose allocator needs shapes only, before anything heavy; None for the others."""
    return allocate(job, asked) if job.allocator.sees == "shapes" else None


def allocate(job: Job, asked: Recipe, **seen: Any) -> Plan:
    """The plan of a job; `seen` is what its allocator may see beside shapes. Raises RecipeError naming the group."""
    generator = torch.Generator().manual_seed(asked.calibrate.seed)
    try:
        plan: Plan = job.allocator.allocate(Problem(job.targets, job.budget, job.format, generator, **seen))
    except ValueError as error:
        raise RecipeError(f"group {job.group.match!r} at ratio {job.group.ratio}: {error}") from error
    return plan
