"""A recipe met with a model: which targets each group has, who decomposes them, within which budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from spectrim import recipe as recipes
from spectrim.core import budget
from spectrim.core.plan import Plan, Target
from spectrim.core.registry import Problem
from spectrim.model.targets import Structure
from spectrim.recipe import Calibrate, Group, Recipe, RecipeError


@dataclass(frozen=True)
class Job:
    """One group of a recipe met with its targets: what is decomposed how, within which budget."""

    group: Group
    targets: tuple[Target, ...]
    decomposers: Mapping[str, Any]
    allocator: Any
    format: str
    budget: int
    fixed: Mapping[str, int]
    paired: bool = False

    def needs(self, target: Target) -> tuple[Any, ...]:
        """Statistics that a target is decomposed with."""
        return tuple(self.decomposers[target.name].needs)

    def keeps(self, target: Target) -> tuple[Any, ...]:
        """Those that are stored: what its candidate reads again, and gradients where a second pass does."""
        again = [s for s in self.needs(target) if s.where == "gradient"] if self.paired else []
        return tuple(dict.fromkeys([*self.decomposers[target.name].keeps, *again]))


def plan_jobs(asked: Recipe, structure: Structure) -> list[Job]:
    """The groups of a recipe with their targets, methods and budgets. Raises RecipeError where they do not fit."""
    jobs = []
    for group, members in zip(asked.groups, recipes.grouped(asked, structure.targets, structure.ffns), strict=True):
        allocator = asked.allocator(group)
        for statistic in allocator.needs:
            if statistic.where not in ("block", "sublayer"):
                raise RecipeError(
                    f"allocator {group.allocate.method!r} needs {statistic}, measured at the {statistic.where}: "
                    "an allocator is given statistics of blocks and sub-layers only"
                )
        decomposers = asked.decomposers(group, members)
        for target in members:
            _check(decomposers[target.name], target, asked.calibrate)
            reason = allocator.refuses(decomposers[target.name])
            if reason:
                raise RecipeError(f"group {group.match!r}, {target.name}: {reason}")
        if allocator.learns and asked.calibrate.sequential:
            raise RecipeError(
                f"allocator {group.allocate.method!r} trains on the candidates; calibrate.sequential would make them "
                "anew: set it to false"
            )
        fixed = {t.name: _new_biases(t) for t in members if decomposers[t.name].adds_bias}
        allowed, format = budget.allowed(members, group.ratio), budget.RANK_FORMATS[group.format]
        paired = asked.calibrate.paired
        jobs.append(Job(group, tuple(members), decomposers, allocator, format, allowed, fixed, paired))
    return jobs


def _check(decomposer: Any, target: Target, calibrate: Calibrate) -> None:
    """Raise RecipeError for a decomposer that cannot work on a target, or not in a second pass."""
    name = type(decomposer).__name__
    if decomposer.whole != budget.is_ffn(target):
        works = "FFNs as wholes (match: ffn)" if decomposer.whole else "single matrices"
        raise RecipeError(f"{name} works on {works}; {target.name} has the role {target.role!r}")
    gradient = [statistic for statistic in decomposer.needs if statistic.needs_gradient]
    if calibrate.sequential and not calibrate.paired and gradient:
        raise RecipeError(
            f"{name} needs {gradient[0]}, of the whole model: it cannot run with calibrate.sequential, which goes "
            "through the model block by block, but where it aims at the dense model's outputs (calibrate.target: mix)"
        )


def _new_biases(target: Target) -> int:
    return sum(part.out_features for part in target.parts if not part.bias)


def allocate_early(job: Job, asked: Recipe) -> Plan | None:
    """The plan of a job whose allocator needs shapes only, before anything heavy; None for the others, once checked."""
    if job.allocator.sees == "shapes":
        return allocate(job, asked)
    with _named(job):
        job.allocator.check(_problem(job, asked))
    return None


def allocate(job: Job, asked: Recipe, **seen: Any) -> Plan:
    """The plan of a job; `seen` is what its allocator may see beside shapes. Raises RecipeError naming the group."""
    with _named(job):
        plan: Plan = job.allocator.allocate(_problem(job, asked, **seen))
    return plan


def _problem(job: Job, asked: Recipe, **seen: Any) -> Problem:
    generator = torch.Generator().manual_seed(asked.calibrate.seed)
    return Problem(job.targets, job.budget, job.format, generator, fixed=job.fixed, **seen)


@contextmanager
def _named(job: Job) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"group {job.group.match!r} at ratio {job.group.ratio}: {error}") from error
