"""What a run will do and need, from shapes alone: targets, parameters, ranks, peak memory, disk."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spectrim.core import budget
from spectrim.core import plan as plans
from spectrim.core.plan import Part, Plan, Target
from spectrim.jobs import Job, allocate_early, plan_jobs
from spectrim.measure.evaluate import max_positions, parameters
from spectrim.model import blocks, targets
from spectrim.model.checkpoint import Checkpoint
from spectrim.model.files import resolve
from spectrim.pipeline import DEFAULT_LENGTH, compute_dtype
from spectrim.recipe import Recipe


@dataclass(frozen=True)
class Estimate:
    """A dry run: the structure, the jobs, a plan where shapes are enough, and bytes needed."""

    structure: targets.Structure
    jobs: Sequence[Job]
    plan: Plan | None
    totals: dict[str, int]
    memory: dict[str, int]
    disk: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON data."""
        chosen = [target for job in self.jobs for target in job.targets]
        inside = {part.module for target in chosen for part in target.parts}
        rest = [target for target in self.structure.targets if target.name not in inside]
        rows = [(t, p) for t in (*chosen, *rest) for p in t.parts]
        return {
            "targets": [
                {"name": p.module, "role": t.role, "out": p.out_features, "in": p.in_features}
                | {"choice": self._choice(t.name)}
                for t, p in rows
            ],
            "notes": list(self.structure.notes),
            "parameters": self.totals,
            "peak_memory_bytes": self.memory,
            "disk_bytes": self.disk,
        }

    def _choice(self, name: str) -> dict[str, Any] | None:
        choice = None if self.plan is None else self.plan.choices.get(name)
        return None if choice is None else {"formats": dict(choice.formats), "counts": dict(choice.counts)}


def estimate(model: str | Path, recipe: Recipe, device: str = "cpu", trust_remote_code: bool = False) -> Estimate:
    """Plan a run of `recipe` on `model` without reading a weight. Raises like `compress` for bad input."""
    directory = resolve(str(model))
    checkpoint = Checkpoint(directory, compute_dtype(device), trust_remote_code)
    structure = blocks.share_inputs(checkpoint.model, targets.find(checkpoint.model))
    jobs = plan_jobs(recipe, structure)
    early = [allocate_early(job, recipe) for job in jobs]
    plan = plans.merge([p for p in early if p is not None]) if all(p is not None for p in early) else None
    dense = sum(t.parameters for job in jobs for t in job.targets)
    kept = sum(job.budget for job in jobs) if plan is None else plan.spent
    before = parameters(directory)
    totals = {
        "targets_before": dense,
        "targets_after": kept,
        "total_before": before["total"],
        "total_after": before["total"] - dense + kept,
    }
    disk = {
        "output": int(totals["total_after"] * checkpoint.stored_dtype.itemsize),
        "work": sum(_stored_bytes(job.format, t) for job in jobs for t in job.targets) + _kept_bytes(jobs),
    }
    return Estimate(structure, jobs, plan, totals, _memory(checkpoint, structure, recipe, jobs), disk)


def _stored_bytes(format: str, target: Target) -> int:
    """A candidate in the store: left in float32 as far as the format can use it, two spectra in float64.

    An FFN as a whole has one score and one index a channel.
    """
    if budget.is_ffn(target):
        return 16 * target.channels
    (part,) = target.parts
    smaller = min(part.out_features, part.in_features)
    return 4 * part.out_features * min(smaller, budget.largest_rank(format, part)) + 16 * smaller


def _kept_bytes(jobs: Sequence[Job]) -> int:
    """Statistics that candidates still read after their block is gone, in float64: Grams, one a distinct input."""
    widths = {
        (part.input, statistic): part.in_features
        for job in jobs
        for target in job.targets
        for part in target.parts
        for statistic in job.decomposers[target.name].keeps
    }
    return 8 * sum(width**2 for width in widths.values())


def _memory(
    checkpoint: Checkpoint, structure: targets.Structure, recipe: Recipe, jobs: Sequence[Job]
) -> dict[str, int]:
    """Bytes by cause; their sum is the peak of a streamed run (activations of one batch are the roughest guess)."""
    model = checkpoint.model
    size = model.dtype.itemsize
    block = model.get_submodule(structure.block(0))
    weights = sum(p.numel() for p in block.parameters()) * size
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    length = recipe.calibrate.length or min(DEFAULT_LENGTH, max_positions(model) or DEFAULT_LENGTH)
    batch = min(recipe.calibrate.batch, recipe.calibrate.sequences)
    hidden = embedding.shape[1] * recipe.calibrate.sequences * length * size
    inputs = {p.input: p.in_features for t in structure.of_block(0) for p in t.parts}
    widest = max(p.in_features + p.out_features for t in structure.of_block(0) for p in t.parts)
    factorisation = {"factorisation": max(_workspace(p) for t in structure.of_block(0) for p in t.parts)}
    resident = sum(p.numel() for p in model.parameters()) * size
    if any(job.allocator.sees == "model" for job in jobs):  # the model, and what is put into it
        factorisation |= {"model": 2 * resident}
    if not any(d.needs for job in jobs for d in job.decomposers.values()):
        return factorisation | {"imports": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return factorisation | {
        "imports": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "embedding": embedding.numel() * size,
        "hidden_states": hidden,
        "block_weights": 2 * weights,
        "statistics": sum(8 * width**2 for width in inputs.values()),
        "activations": 4 * batch * length * widest * size,
    }


def _workspace(part: Part) -> int:
    """float64: the weight and its product with the metric, then the matrix, its eigenvectors and LAPACK's own two."""
    smaller = min(part.out_features, part.in_features)
    return 8 * (3 * part.parameters + 5 * smaller**2)
