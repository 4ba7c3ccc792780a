"""From candidates to the plan: allocation, with what a learning allocator may see and keep, and settled choices."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from spectrim import strength
from spectrim.calibrate.breadth import BreadthFirst
from spectrim.core import distributed
from spectrim.core import plan as plans
from spectrim.core.plan import Candidate, Plan, Target
from spectrim.core.store import hash_of
from spectrim.driving import Windows, streams_of, text_hash
from spectrim.jobs import Job, allocate
from spectrim.model.checkpoint import Checkpoint
from spectrim.model.live import Installed
from spectrim.run import Run, named
from spectrim.second import second_pass
from spectrim.stored import StoreSlot
from spectrim.towards import pass_towards_dense


def planned(run: Run, early: Sequence[Plan | None]) -> tuple[Plan, dict[str, Candidate]]:
    """The whole plan, and the candidates to cut to it; `early` are the plans made of shapes alone, by job."""
    notes = strength.settle(run)
    ready = [plan for plan in early if plan is not None]
    sequential = run.asked.calibrate.sequential
    # statistics of gradients come from the first pass
    gradients = any(s.where == "gradient" for d in run.decomposers.values() for s in d.needs)
    if sequential and len(ready) == len(early) and not gradients and run.accept is None:
        plan, candidates = _again(run, plans.merge(ready), None)
    else:
        candidates = run.candidates()
        with run.timings.stage("allocate"):
            live = _Lazily(lambda: _live(run, candidates))
            pairs = zip(early, run.jobs, strict=True)
            chosen = [done or _allocated(run, job, candidates, live) for done, job in pairs]
        merged = plans.merge(chosen)
        candidates |= {name: replace(candidates[name], learned=made) for name, made in merged.learned.items()}
        plan = _settled(run, merged, candidates)
        if sequential:
            plan, candidates = _again(run, plan, candidates)
    plan = replace(plan, notes=(*run.structure.notes, *notes, *plan.notes))
    if distributed.together():
        distributed.same({"the plan that they made of the same figures": hash_of(plan.to_json())})
    if distributed.first():
        _keep(run, plan)
    return plan, candidates


def _keep(run: Run, plan: Plan) -> None:
    key = {"recipe": run.asked.model_dump(), "weights": run.fingerprint, "text": run.data}
    run.store.save_json("plan", key, plan.to_json())
    if plan.learned:
        learned = {f"{target}.{name}": t for target, made in plan.learned.items() for name, t in made.items()}
        run.store.save("plan", key, learned)


def _allocated(run: Run, job: Job, candidates: Mapping[str, Candidate], live: _Lazily) -> Plan:
    """The plan of a job; what is not measured on the model is reckoned by the first process for all."""
    if job.allocator.sees == "model":
        return _allocate(run, job, candidates, live)
    return distributed.agreed(lambda: _allocate(run, job, candidates, live))


def _again(run: Run, plan: Plan, first: dict[str, Candidate] | None) -> tuple[Plan, dict[str, Candidate]]:
    return pass_towards_dense(run, plan, first) if run.asked.calibrate.paired else second_pass(run, plan)


def _allocate(run: Run, job: Job, candidates: Mapping[str, Candidate], live: _Lazily) -> Plan:
    """The plan of a job whose allocator reads candidates, statistics of the blocks, or the model itself."""
    measured = {
        index: {
            s: run.store.load("statistics", run.statistic_key(run.structure.block(index), s))["value"]
            for s in job.allocator.needs
        }
        for index in range(run.structure.count)
    }
    own = {target.name: candidates[target.name] for target in job.targets}
    seen: dict[str, Any] = {"candidates": own, "statistics": measured, "itemsize": _itemsize(run, job.targets)}
    if job.allocator.sees == "model":
        upstream = _upstream(run, job)
        seen |= {"remember": _remember(run, upstream), "slot": _slots(run, upstream)}
        windows = _trial_windows(run)
        if run.room is not None and job.allocator.streamed(*windows.shape) is not None:
            skeleton = Installed(run.source.model, run.structure, candidates, windows, run.asked.calibrate.batch)
            seen["measures"] = BreadthFirst(run.source, skeleton, run.device, streams_of(run.store), run.room)
        else:
            seen["live"] = live.get()
    return allocate(job, run.asked, progress=run.progress, **seen)


def _itemsize(run: Run, of: Sequence[Target]) -> int:
    """Bytes of a number as these targets will be stored, the most where they differ."""
    if run.dtype is not None:
        return run.dtype.itemsize
    names = [f"{part.module}.weight" for target in of for part in target.parts]
    if isinstance(run.source, Checkpoint):
        keys = {name: key for key, name in run.source.names.items()}
        return max(run.source.dtype_of(keys[name]).itemsize for name in names)
    return max(run.source.model.get_parameter(name).dtype.itemsize for name in names)


def _trial_windows(run: Run) -> Windows:
    """What allocators run the model on."""
    windows = run.windows if run.select is None else run.select
    assert windows is not None
    return windows


def _live(run: Run, candidates: Mapping[str, Candidate]) -> Installed:
    windows = _trial_windows(run)
    model = run.source.whole(run.device)
    model.eval()
    return Installed(model, run.structure, candidates, windows, run.asked.calibrate.batch)


def _upstream(run: Run, job: Job) -> dict[str, Any]:
    """All that a job's problem comes from but its budget."""
    return {
        "candidates": [
            {**run.key(target), "method": run.decomposers[target.name].first_like}
            for target in sorted(job.targets, key=lambda t: t.name)
        ],
        "text": run.data if run.select is None else text_hash(run.select), "dtype": str(run.source.model.dtype),
        "allocator": named(job.allocator),
    }  # fmt: skip


def _slots(run: Run, upstream: Mapping[str, Any]) -> Callable[..., StoreSlot]:
    return lambda name, fields: StoreSlot(
        run.store, f"{name}-under-way", {**upstream, "fields": json.dumps(fields, sort_keys=True)}
    )


def _remember(run: Run, upstream: Mapping[str, Any]) -> Callable[..., Mapping[str, Tensor]]:
    def remember(
        name: str, fields: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        key = {**upstream, "fields": json.dumps(fields, sort_keys=True)}
        if not distributed.agreed(lambda: run.store.has(name, key)):
            made = make()
            distributed.agreed(lambda: run.store.save(name, key, made))
        return run.store.load(name, key)

    return remember


def _settled(run: Run, plan: Plan, candidates: Mapping[str, Candidate]) -> Plan:
    """The plan with each candidate's best choice of the size that it was given."""
    choices = dict(plan.choices)
    pending = [candidates[n] for n in sorted(choices) if type(candidates[n]).settle is not Candidate.settle]
    if pending:
        with run.timings.stage("settle"):
            for i, (name, choice) in enumerate(run.settle_all(pending, plan.choices, None)):
                choices[name] = choice
                run.progress("settle", i + 1, len(pending))
    return run.recounted(plan, choices)


class _Lazily:
    """A model that is loaded when first asked for, once."""

    def __init__(self, make: Callable[[], Installed]):
        self._make = make
        self._made: Installed | None = None

    def get(self) -> Installed:
        """The model."""
        self._made = self._made or self._make()
        return self._made
