"""What a run will do and need, before it starts: targets, parameters, ranks; memory, disk and time of each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim import needs, sizes, storage
from spectrim.core import heap
from spectrim.core import plan as plans
from spectrim.core.plan import Plan
from spectrim.jobs import Job, allocate_early, plan_jobs
from spectrim.measure.evaluate import max_positions, parameters
from spectrim.model import blocks, targets
from spectrim.model.checkpoint import Checkpoint, described
from spectrim.model.files import has_weights, resolve
from spectrim.pipeline import compute_dtype
from spectrim.recipe import Recipe
from spectrim.settling import of_a_process, settled
from spectrim.starting import DEFAULT_LENGTH
from spectrim.strength import TRIALS
from spectrim.timing import predicted
from spectrim.towards import TRIED


@dataclass(frozen=True)
class Estimate:
    """A dry run: the structure, the jobs, a plan where shapes are enough, and what each stage needs.

    memory: bytes by cause at the fullest moment of all; stages: the same for each stage, without imports; disk: bytes
    by cause; stage_disk: the most that the work directory and the output hold in a stage; seconds: of each stage, None
    where it is not known, empty where no block was timed.
    """

    structure: targets.Structure
    jobs: Sequence[Job]
    plan: Plan | None
    totals: dict[str, int]
    memory: dict[str, int]
    stages: Mapping[str, Mapping[str, int]]
    disk: dict[str, int]
    stage_disk: Mapping[str, int]
    seconds: Mapping[str, float | None]

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
            "stages": {
                name: {"memory_bytes": dict(causes), "disk_bytes": self.stage_disk[name]}
                | ({"seconds": self.seconds[name]} if self.seconds else {})
                for name, causes in self.stages.items()
            },
            **({"seconds": dict(self.seconds)} if self.seconds else {}),
        }

    def _choice(self, name: str) -> dict[str, Any] | None:
        choice = None if self.plan is None else self.plan.choices.get(name)
        return None if choice is None else {"formats": dict(choice.formats), "counts": dict(choice.counts)}


def estimate(
    model: str | Path,
    recipe: Recipe,
    device: str = "cpu",
    trust_remote_code: bool = False,
    memory: str | int | None = None,
    time: bool = False,
    budget: str | int | None = None,
    parameters: int | float | None = None,
) -> Estimate:
    """Plan a run of `recipe` on `model`; no weight is read, but with `time` those of one block, which is run.

    A directory with a config.json and no weights will do, but for `time`. memory: the limit of the run, budget and
    parameters: its size in place of its ratios, as in `compress`, which may try other ratios beside. Raises like
    `compress` for bad input.
    """
    limit = None if memory is None else needs.parse_size(memory)
    directory = resolve(str(model))
    source = _source(directory, device, trust_remote_code, time)
    structure = blocks.share_inputs(source.model, targets.find(source.model))
    structure = replace(structure, notes=(*structure.notes, *source.notes))
    size = sizes.asked_for(None, budget, parameters, None)
    if size is not None:
        recipe, note = _sized(recipe, size, source, structure)
        structure = replace(structure, notes=(*structure.notes, note))
    setting = needs.Setting(
        source.model, structure, recipe, plan_jobs(recipe, structure), recipe.calibrate.sequences,
        _length(source.model, recipe), source.itemsize,
    )  # fmt: skip
    setting = settled(setting, limit or of_a_process())
    structure, jobs = setting.structure, setting.jobs
    early = [allocate_early(job, recipe) for job in jobs]
    plan = plans.merge([p for p in early if p is not None]) if all(p is not None for p in early) else None
    totals = _totals(source, jobs, plan)
    in_memory = None
    if limit is not None:
        in_memory = needs.room(setting, limit) + 2 * setting.batch_state
    stages = needs.stages(setting, in_memory)
    disk = _disk(setting, plan, totals["total_after"], in_memory)
    seconds = {} if source.checkpoint is None or not time else predicted(source.checkpoint, setting, plan, device)
    fullest = max(stages.values(), key=lambda causes: sum(causes.values()))
    imports = {"imports": heap.peak()}
    return Estimate(
        structure, jobs, plan, totals, imports | fullest, stages, disk, _by_stage(setting, stages, disk), seconds
    )  # fmt: skip


def _totals(source: _Source, jobs: Sequence[Job], plan: Plan | None) -> dict[str, int]:
    """Parameters before and after: those of the plan, or the budgets where it needs what is measured."""
    dense = sum(t.parameters for job in jobs for t in job.targets)
    kept = sum(job.budget for job in jobs) if plan is None else plan.spent
    return {
        "targets_before": dense,
        "targets_after": kept,
        "total_before": source.total,
        "total_after": source.total - dense + kept,
    }


def _sized(recipe: Recipe, size: sizes.Size, source: _Source, structure: targets.Structure) -> tuple[Recipe, str]:
    """The recipe at the first ratio that is tried for a size, and a note on it."""
    if source.checkpoint is None:  # no files: tensors as they would be stored
        of = partial(sizes.taken_in_memory, source.model, structure, dtype=source.stored)
        aim = sizes.Aim(size, recipe, structure, of, source.itemsize)
    else:
        found = sizes.aimed(recipe, size, source.checkpoint, structure, None)
        assert found is not None
        aim = found
    ratio = aim.first() / sizes.GRID
    return sizes.scaled(recipe, ratio), f"{size.option} {size.limit:,}: planned at ratio {ratio}"


@dataclass(frozen=True)
class _Source:
    """A skeleton, parameters of the whole model, the dtype it is stored in; the checkpoint, if it has weights."""

    model: PreTrainedModel
    total: int
    stored: torch.dtype
    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()

    @property
    def itemsize(self) -> int:
        """Bytes of a number as stored."""
        return self.stored.itemsize


def _source(directory: Path, device: str, trust_remote_code: bool, time: bool) -> _Source:
    """What is known of a model without reading its weights. Raises ValueError where `time` needs them."""
    if has_weights(directory):
        checkpoint = Checkpoint(directory, compute_dtype(device), trust_remote_code)
        total = parameters(directory)["total"]
        return _Source(checkpoint.model, total, checkpoint.stored_dtype, checkpoint)
    if time:
        raise ValueError(
            f"{directory} holds no weights: memory and disk follow from its config.json, but for times one block must "
            "be run. Plan without --time, or give a checkpoint of one such block with random weights, as in "
            "docs/large-models.md"
        )
    model, stored = described(directory, compute_dtype(device), trust_remote_code)
    dtype = str(stored).removeprefix("torch.")
    note = f"{directory}: no weights are here; planned from config.json, for weights stored as {dtype}"
    return _Source(model, parameters(model)["total"], stored, notes=(note,))


def _disk(setting: needs.Setting, plan: Plan | None, after: int, in_memory: int | None) -> dict[str, int]:
    """Bytes of the output, and of the work directory: what stays there, and hidden states while blocks are run.

    in_memory: bytes of these in memory, None without a limit.
    """
    disk = {"output": after * setting.stored, "work": work_bytes(setting, plan is None)}
    if setting.measured or any(job.allocator.sees == "model" for job in setting.jobs):
        disk["windows"] = 8 * setting.sequences * setting.length
    if in_memory is not None:
        if setting.measured and not setting.resident:
            disk["hidden_states"] = states_bytes(setting)
        tried = max((trial.states for trial in needs.trials(setting)), default=0)
        disk |= {"changed_models": tried - in_memory} if tried > in_memory else {}
    return disk


def states_bytes(setting: needs.Setting) -> int:
    """Hidden states in files: those entering a block, and those leaving it, where there is a next one."""
    return (1 if setting.structure.count == 1 else 2) * setting.hidden_states


def work_bytes(setting: needs.Setting, later: bool) -> int:
    """Bytes that stay in the work directory: candidates, what they keep, trainings.

    later: some group is allocated after its candidates are made. A second pass makes candidates again, and one towards
    the dense model keeps the matrices that it decomposes in the place of the weights; so does each share that is tried.
    Each strength of shrinking that is tried makes them again. Gradients are always those of the original model.
    """
    jobs, asked = setting.jobs, setting.recipe.calibrate
    second = asked.sequential and (TRIED if asked.target == "mix" and asked.mix == "auto" else 1)
    passes = (later or not asked.sequential) + second
    instead = second * 4 * sum(part.parameters for part in setting.parts()) if asked.paired else 0
    candidates = sum(storage.stored_bytes(job, target) for job in jobs for target in job.targets)
    trained = sum(storage.trained_bytes(job, target) for job in jobs for target in job.targets if job.allocator.learns)
    passes += TRIALS if asked.shrink == "auto" else 0
    kept = storage.kept_statistics(jobs)
    of_the_model = sum(size for (_, statistic), size in kept.items() if statistic.where == "gradient")
    return passes * (candidates + sum(kept.values()) - of_the_model) + of_the_model + instead + trained


def _by_stage(setting: needs.Setting, stages: Mapping[str, Any], disk: Mapping[str, int]) -> dict[str, int]:
    """The most on disk in each stage: calibration and decomposition go block by block, together.

    The last block has no states leaving it; those of the block before have one block's results less beside them.
    """
    work, windows = disk["work"], disk.get("windows", 0)
    inside = work
    if "hidden_states" in disk:
        before_last = work * (setting.structure.count - 1) // setting.structure.count + disk["hidden_states"]
        inside = max(work + setting.hidden_states, before_last)
    tried = work + disk.get("changed_models", 0)
    found = {"calibrate": inside, "decompose": inside, "allocate": tried, "write": work + disk["output"]}
    return {name: found[name] + windows for name in stages}


def _length(model: PreTrainedModel, recipe: Recipe) -> int:
    """Tokens of a calibration window."""
    return recipe.calibrate.length or min(DEFAULT_LENGTH, max_positions(model) or DEFAULT_LENGTH)
