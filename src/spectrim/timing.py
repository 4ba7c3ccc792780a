"""How long a run will take: one block is run, decomposed and cut for a moment, and what that took is multiplied."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spectrim.calibrate.collect import BlockStatistics, Wanted
from spectrim.calibrate.streamed import streamed
from spectrim.core import heap
from spectrim.core.plan import Plan, Target
from spectrim.core.progress import silent
from spectrim.core.store import Store
from spectrim.model import apply
from spectrim.model.blocks import Batch
from spectrim.model.checkpoint import Checkpoint
from spectrim.needs import Setting
from spectrim.run import NOTHING, Run, Timings, named, work
from spectrim.strength import TRIALS

BATCHES = 3  # the first warms up, and is not counted
PROBE = 2**25  # bytes that are hashed and written to find how fast that is

Kind = tuple[object, ...]


@dataclass
class _Taken:
    """Seconds: reading a block, a batch through it with its statistics, and by kind of target what each step takes."""

    reading: float = 0.0
    batch: float = 0.0
    decompose: dict[Kind, float] = field(default_factory=dict)
    cut: dict[Kind, float] = field(default_factory=dict)


@heap.small()
def predicted(source: Checkpoint, setting: Setting, plan: Plan | None, device: str) -> dict[str, float | None]:
    """Seconds of the stages, None for what is not known: training, plans tried on the model, gradients.

    The block with most targets is read, run on random tokens, and decomposed, one target of each shape. Allocation from
    shapes or units takes no time worth counting.
    """
    recipe, batch = setting.recipe, min(setting.recipe.calibrate.batch, setting.sequences)
    generator = torch.Generator().manual_seed(recipe.calibrate.seed)
    ids = torch.randint(setting.embedding.shape[0], (BATCHES * batch, setting.length), generator=generator)
    with tempfile.TemporaryDirectory(prefix="spectrim-") as folder:
        on, store = torch.device(device), Store(Path(folder))
        windows = ids if setting.measured else None
        run = Run(
            source, setting.structure, recipe, setting.jobs, windows, on, store, Timings(), silent,
            fingerprint="timed",
        )  # fmt: skip
        taken = _timed(run, setting, plan, ids.split(batch))
        hashing, writing = _speeds(Path(folder))
    return _extrapolated(run, setting, taken, hashing, writing, plan)


def _kind(run: Run, target: Target) -> Kind:
    """Targets of one kind take the same time."""
    shapes = tuple((part.out_features, part.in_features) for part in target.parts)
    return shapes, named(run.decomposers[target.name]), run.formats[target.name], target.name in run.complete


def _timed(run: Run, setting: Setting, plan: Plan | None, ids: Sequence[torch.Tensor]) -> _Taken:
    inside = [[t for t in run.targets if t.blocks[-1] == i] for i in range(run.structure.count)]
    index = max(range(run.structure.count), key=lambda i: len(inside[i]))
    taken = _Taken()
    if not setting.measured or setting.resident:
        if not setting.resident:
            _timed_targets(run, inside[index], NOTHING, plan, taken)
        return taken
    prefix, start = run.structure.block(index), time.perf_counter()
    run.source.load(prefix, run.device)
    run.source.release(prefix)
    taken.reading = time.perf_counter() - start
    of_blocks = tuple(dict.fromkeys(n for job in run.jobs for n in job.allocator.needs))
    wanted = {index: Wanted({t: tuple(run.decomposers[t.name].needs) for t in inside[index]}, of_blocks)}
    marks: list[float] = []
    batches = [Batch(each) for each in ids]
    for i, measured in streamed(
        run.source, run.structure, batches, wanted, run.device, lambda *_: marks.append(time.perf_counter())
    ):
        if i == index:
            taken.batch = (marks[-1] - marks[-len(batches)]) / (len(batches) - 1)
            _timed_targets(run, inside[index], measured, plan, taken)
    return taken


def _timed_targets(
    run: Run, of_block: Sequence[Target], measured: BlockStatistics, plan: Plan | None, taken: _Taken
) -> None:
    """One target of each kind decomposed, stored, read and cut."""
    assert isinstance(run.source, Checkpoint)
    for target in of_block:
        kind = _kind(run, target)
        if kind in taken.decompose:
            continue
        start = time.perf_counter()
        run.decompose(target, measured)
        taken.decompose[kind] = time.perf_counter() - start
        candidate = run.stored(target)
        ratio = next(job.group.ratio for job in run.jobs if target in job.targets)
        start = time.perf_counter()
        choice = candidate.first(int((1 - ratio) * target.parameters))
        if plan is not None and target.name in plan.choices:
            choice = plan.choices[target.name]
        choice = candidate.settle(choice)
        cut = candidate.cut(choice)
        for part in target.parts:
            apply.form(apply.spec_of(choice, target, part), cut[part.module], run.source.stored_dtype)
        taken.cut[kind] = time.perf_counter() - start


def _speeds(folder: Path) -> tuple[float, float]:
    """Seconds a byte, of hashing and of writing to the disk that holds temporary files."""
    content = os.urandom(PROBE)
    start = time.perf_counter()
    hashlib.sha256(content).hexdigest()
    hashed = time.perf_counter()
    with open(folder / "probe", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return (hashed - start) / PROBE, (time.perf_counter() - hashed) / PROBE


def _extrapolated(
    run: Run, setting: Setting, taken: _Taken, hashing: float, writing: float, plan: Plan | None
) -> dict[str, float | None]:
    """Of one block, all blocks; of one batch, all batches; of one target of a kind, all of that kind.

    A second pass towards the dense model runs each stream through a block once, and as far as each step: twice in all.
    """
    count, sequential, later = setting.structure.count, setting.recipe.calibrate.sequential, plan is None
    batches = -(-setting.sequences // min(setting.recipe.calibrate.batch, setting.sequences))
    second = (4 if setting.recipe.calibrate.paired else 2) if sequential else 0
    trials = TRIALS if setting.recipe.calibrate.shrink == "auto" else 0
    first = (1 if later or not sequential else 0) + trials
    last = max((t.blocks[-1] for t in run.targets), default=count - 1) + 1
    if any(job.allocator.needs for job in run.jobs):
        last = count
    calibrate = last * ((first + sequential) * taken.reading + (first + second) * batches * taken.batch)
    passes = 1 + (sequential and later) + trials
    stored = sum(p.numel() for p in run.source.model.parameters()) * setting.stored
    kept = sum(job.budget for job in run.jobs) - sum(t.parameters for t in run.targets)
    trained = any(job.allocator.sees == "model" for job in run.jobs)
    write = _of_all(run, taken.cut) + writing * (stored + kept * setting.stored)
    unknown = setting.measured and setting.resident
    return {
        "fingerprint": hashing * stored,
        "calibrate": None if unknown else calibrate,
        "decompose": None if unknown else passes * _of_all(run, taken.decompose),
        "allocate": None if trained else 0.0,
        "write": None if unknown else write,
    }


def _of_all(run: Run, seconds: Mapping[Kind, float]) -> float:
    """Of all targets; a kind that was not timed by its multiplications, out · in · min(out, in)."""
    costs = {_kind(run, target): work(target) for target in run.targets}
    known = sum(costs[kind] for kind in seconds)
    rate = sum(seconds.values()) / known if known else 0.0
    kinds = [_kind(run, target) for target in run.targets]
    return float(sum(seconds.get(kind, rate * costs[kind]) for kind in kinds))
