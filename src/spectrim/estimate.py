"""What a run will do and need, from shapes alone: targets, parameters, ranks, peak memory, disk."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

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

# Of robust PCA with its default settings, on Gaussian matrices and on those of the bundled model: directions of L as a
# share of the smaller side (0.53 to 0.61), and entries of S, a share 1 − GAP √(smaller / larger side) of all.
LOW, GAP = 0.57, 0.44
# What a file begins with: the names, types and places of a few tensors.
HEADER = 400


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
        "work": _work(recipe, jobs, sum(p is None for p in early)),
        **_windows(checkpoint, recipe, jobs),
    }
    return Estimate(structure, jobs, plan, totals, _memory(checkpoint, structure, recipe, jobs), disk)


def _work(recipe: Recipe, jobs: Sequence[Job], later: int) -> int:
    """Bytes of the work directory at their most: candidates, what they keep, trainings.

    later: groups that are allocated after their candidates are made. A second pass makes candidates again.
    """
    passes = 1 + (recipe.calibrate.sequential and later > 0)
    candidates = sum(_stored_bytes(job, target) for job in jobs for target in job.targets) + _kept_bytes(jobs)
    trained = sum(_trained_bytes(job, target) for job in jobs for target in job.targets if job.allocator.learns)
    return passes * candidates + trained


def _windows(checkpoint: Checkpoint, recipe: Recipe, jobs: Sequence[Job]) -> dict[str, int]:
    """Bytes of the calibration tokens in the work directory, int64, where anything reads them."""
    measured = any(d.needs for job in jobs for d in [*job.decomposers.values(), job.allocator])
    read = measured or any(job.allocator.sees == "model" for job in jobs)
    return {"windows": 8 * recipe.calibrate.sequences * _length(checkpoint, recipe)} if read else {}


def _length(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Tokens of a calibration window."""
    return recipe.calibrate.length or min(DEFAULT_LENGTH, max_positions(checkpoint.model) or DEFAULT_LENGTH)


def _stored_bytes(job: Job, target: Target) -> int:
    """A candidate in the store: factors in float32, two spectra in float64; entries with their places and scores.

    left goes as far as the format can use it, or, where an allocator learns, as far as there are directions. An FFN as
    a whole has one score and one index a channel. How many entries robust PCA finds is an average over matrices.
    """
    if budget.is_ffn(target):
        return 16 * target.channels + HEADER
    (part,), kinds = target.parts, job.decomposers[target.name].kinds
    directions, entries = _units(part, kinds)
    if "rank" not in kinds:  # place and score, of all entries
        return entries * (8 if entries <= torch.iinfo(torch.int32).max else 12) + HEADER
    of_left = directions if job.allocator.learns else min(directions, budget.largest_rank(job.format, part))
    factors = 4 * part.out_features * of_left
    if "entry" in kinds:  # right by itself; of entries place, value and score
        return factors + (4 * part.in_features + 8) * directions + 16 * entries + HEADER
    return factors + 16 * directions + HEADER


def _units(part: Part, kinds: Sequence[str]) -> tuple[int, int]:
    """About how many directions and entries a candidate has."""
    smaller, larger = sorted((part.out_features, part.in_features))
    if "entry" not in kinds:
        return smaller, 0
    if "rank" not in kinds:
        return 0, part.parameters
    return math.ceil(LOW * smaller), int((1 - GAP * math.sqrt(smaller / larger)) * part.parameters)


def _trained_bytes(job: Job, target: Target) -> int:
    """What a training keeps for a target: its state under way, its result, and what the plan has of it."""
    bytes_of: int = job.allocator.trained_bytes(target, *_units(target.parts[0], job.decomposers[target.name].kinds))
    return bytes_of


def _kept_bytes(jobs: Sequence[Job]) -> int:
    """Statistics that candidates still read after their block is gone: one an input or, of gradients, a weight."""
    found: dict[Any, int] = {}
    for job in jobs:
        for target in job.targets:
            for part in target.parts:
                for statistic in job.decomposers[target.name].keeps:
                    place = part.module if statistic.where == "gradient" else part.input
                    found[place, statistic] = _statistic_bytes(statistic, part) + HEADER
    return sum(found.values())


def _statistic_bytes(statistic: Any, part: Part) -> int:
    """Of its sums; those that start without rows get one for each output."""
    sums = statistic.start(part.in_features, torch.device("meta")).values()
    return sum((t.numel() or part.out_features * part.in_features) * t.element_size() for t in sums)


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
    length = _length(checkpoint, recipe)
    batch = min(recipe.calibrate.batch, recipe.calibrate.sequences)
    hidden = embedding.shape[1] * recipe.calibrate.sequences * length * size
    inputs = {p.input: p.in_features for t in structure.of_block(0) for p in t.parts}
    widest = max(p.in_features + p.out_features for t in structure.of_block(0) for p in t.parts)
    factorisation = {"factorisation": max(_workspace(p) for t in structure.of_block(0) for p in t.parts)}
    resident = sum(p.numel() for p in model.parameters()) * size
    if any(job.allocator.learns for job in jobs):
        factorisation |= {"model": resident, **_training(jobs, model, batch * length)}
    elif any(job.allocator.sees == "model" for job in jobs):  # the model, and what is put into it
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


def _training(jobs: Sequence[Job], model: PreTrainedModel, tokens: int) -> Mapping[str, int]:
    """What a training holds beside the model: factors in the place of matrices, and a batch on its way back.

    Of every matrix its input, output and coordinates in its directions; of the logits about ten arrays: those of both
    models, what the loss makes of them, and gradients. Entries have values and places, and the matrix that they make.
    """
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    size, factors, sides = model.dtype.itemsize, 0, 0
    for job in jobs:
        for target in job.targets if job.allocator.learns else ():
            for part in target.parts:
                m, n = part.out_features, part.in_features
                directions, entries = _units(part, job.decomposers[target.name].kinds)
                factors += size * (m + n) * directions - size * m * n
                factors += (size + 8) * entries + (size * m * n if entries else 0)
                sides += m + n + directions
    return {"factors": max(0, factors), "training": tokens * size * (sides + 10 * embedding.shape[0])}


def _workspace(part: Part) -> int:
    """float64: the weight and its product with the metric, then the matrix, its eigenvectors and LAPACK's own two."""
    smaller = min(part.out_features, part.in_features)
    return 8 * (3 * part.parameters + 5 * smaller**2)
