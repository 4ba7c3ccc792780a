"""One run under way: candidates from the store or made now, the plan, and the second pass where it is asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spectrim.calibrate.collect import BlockStatistics, Wanted
from spectrim.calibrate.resident import resident
from spectrim.calibrate.streamed import streamed
from spectrim.core import budget
from spectrim.core import plan as plans
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target
from spectrim.core.progress import Progress
from spectrim.core.store import Store, hash_of
from spectrim.jobs import Job, allocate
from spectrim.model import targets
from spectrim.model.blocks import Batch
from spectrim.model.checkpoint import Checkpoint, Weights
from spectrim.model.live import Installed
from spectrim.recipe import Recipe
from spectrim.stored import StoreSlot, packed, unpacked_units

logger = logging.getLogger(__name__)

NOTHING = BlockStatistics({}, {}, {})


@dataclass
class Timings:
    """Seconds of each stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Run:
    """What every stage reads, and the stages from calibration to the plan."""

    def __init__(
        self,
        source: Weights,
        structure: targets.Structure,
        asked: Recipe,
        jobs: Sequence[Job],
        windows: Int[Tensor, "sequences length"] | None,
        device: torch.device,
        store: Store,
        timings: Timings,
        progress: Progress,
        dtype: torch.dtype | None = None,
    ):
        self.source, self.structure, self.asked, self.jobs = source, structure, asked, jobs
        self.windows, self.device, self.store = windows, device, store
        self.timings, self.progress, self.dtype = timings, progress, dtype
        with timings.stage("fingerprint"):
            self.fingerprint = source.fingerprint()
        self.data = None if windows is None else hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
        self.decomposers = {name: d for job in jobs for name, d in job.decomposers.items()}
        self.formats = {target.name: job.format for job in jobs for target in job.targets}
        self.targets = [target for job in jobs for target in job.targets]
        self.complete = {target.name for job in jobs if job.allocator.learns for target in job.targets}

    def planned(self, early: Sequence[Plan | None]) -> tuple[Plan, dict[str, Candidate]]:
        """The whole plan, and the candidates to cut to it; `early` are the plans made of shapes alone, by job."""
        ready = [plan for plan in early if plan is not None]
        sequential = self.asked.calibrate.sequential
        if sequential and len(ready) == len(early):
            plan, candidates = self.second_pass(plans.merge(ready))
        else:
            candidates = self.candidates()
            with self.timings.stage("allocate"):
                live = _Lazily(lambda: self._live(candidates))
                pairs = zip(early, self.jobs, strict=True)
                chosen = [done or self._allocate(job, candidates, live) for done, job in pairs]
            merged = plans.merge(chosen)
            candidates |= {name: replace(candidates[name], learned=made) for name, made in merged.learned.items()}
            plan = self._settled(merged, candidates)
            if sequential:
                plan, candidates = self.second_pass(plan)
        plan = replace(plan, notes=(*self.structure.notes, *plan.notes))
        key = {"recipe": self.asked.model_dump(), "weights": self.fingerprint, "text": self.data}
        self.store.save_json("plan", key, plan.to_json())
        if plan.learned:
            named = {f"{target}.{name}": t for target, made in plan.learned.items() for name, t in made.items()}
            self.store.save("plan", key, named)
        return plan, candidates

    def _key(self, target: Target, upstream: str | None = None) -> dict[str, Any]:
        """What made a candidate: not the ratio, nor the allocator, but for the plan of the blocks before it."""
        decomposer = self.decomposers[target.name]
        measured = {"text": self.data, "dtype": str(self.source.model.dtype)} if decomposer.needs else {}
        if upstream is not None and decomposer.needs:
            measured["upstream"] = upstream
        if target.name in self.complete:
            measured["complete"] = "yes"
        return {
            "weights": self.fingerprint, "target": asdict(target), "method": _named(decomposer),
            "format": self.formats[target.name], **measured,
        }  # fmt: skip

    def _statistic_key(self, place: str, statistic: Any, upstream: str | None = None) -> dict[str, Any]:
        after = {} if upstream is None else {"upstream": upstream}
        return {
            "weights": self.fingerprint, "text": self.data, "place": place,
            "statistic": repr(statistic), "dtype": str(self.source.model.dtype), **after,
        }  # fmt: skip

    def candidates(self) -> dict[str, Candidate]:
        """Every target's candidate on the original model, from the store or made now."""
        pending = [t for t in self.targets if not self.store.has("candidate", self._key(t))]
        if pending:
            logger.info("%d of %d decompositions to make", len(pending), len(self.targets))
        of_blocks = tuple(dict.fromkeys(n for job in self.jobs for n in job.allocator.needs))
        wanted = self._wanted(pending, of_blocks)
        total, made = len(pending), 0
        with self.timings.stage("calibrate"):
            for index, measured in self._drive(wanted):
                of_block = wanted.get(index, Wanted())
                for statistic in of_block.block:
                    key = self._statistic_key(self.structure.block(index), statistic)
                    self.store.save("statistics", key, {"value": measured.block[statistic]})
                for target in of_block.targets:
                    made += 1
                    self._decompose(target, measured)
                    self.progress("decompose", made, total)
            for target in pending:
                if not self.decomposers[target.name].needs:
                    made += 1
                    self._decompose(target, NOTHING)
                    self.progress("decompose", made, total)
        self._count_once()
        return {target.name: self._stored(target) for target in self.targets}

    def _count_once(self) -> None:
        """Decomposition runs inside the calibration's loop."""
        if "decompose" in self.timings.seconds:
            self.timings.seconds["calibrate"] -= self.timings.seconds.pop("decompose inside", 0.0)

    def _wanted(self, pending: Sequence[Target], of_blocks: Sequence[Any] = ()) -> dict[int, Wanted]:
        """What to measure in each block: nothing for what the store has."""
        wanted = {}
        for index in range(self.structure.count):
            own = [t for t in pending if t.blocks[-1] == index and self.decomposers[t.name].needs]
            inside = {t: tuple(self.decomposers[t.name].needs) for t in own}
            block = self.structure.block(index)
            missing = tuple(s for s in of_blocks if not self.store.has("statistics", self._statistic_key(block, s)))
            if inside or missing:
                wanted[index] = Wanted(inside, missing)
        return wanted

    def _drive(self, wanted: Mapping[int, Wanted], sequential: bool = False) -> Iterator[tuple[int, BlockStatistics]]:
        if not wanted:
            return iter(())
        assert self.windows is not None
        tokens = self.windows.numel()
        widest = max(p.in_features for t in self.structure.targets for p in t.parts)
        if tokens < widest:
            logger.warning(
                "%d calibration tokens for inputs of width %d: statistics are rank deficient", tokens, widest
            )
        batches = [Batch(ids) for ids in self.windows.split(self.asked.calibrate.batch)]
        if not any(s.needs_gradient for w in wanted.values() for chosen in w.targets.values() for s in chosen):
            return streamed(self.source, self.structure, batches, wanted, self.device, self.progress, sequential)
        model = self.source.whole(self.device)
        return resident(model, self.structure, batches, wanted, self.progress)

    def _decompose(self, target: Target, measured: BlockStatistics, upstream: str | None = None) -> None:
        start = time.perf_counter()
        with self.timings.stage("decompose"):
            decomposer = self.decomposers[target.name]
            weights = {module: w.to(self.device) for module, w in self._weights(target).items()}
            stats = measured.of(target)
            candidate = decomposer.decompose(target, weights, stats)
            for part in target.parts:
                for statistic in decomposer.keeps:
                    key = self._statistic_key(_place(part, statistic), statistic, upstream)
                    if not self.store.has("statistics", key):
                        self.store.save("statistics", key, {"value": stats[part.module][statistic]})
            format = None if target.name in self.complete else self.formats[target.name]
            self.store.save("candidate", self._key(target, upstream), packed(candidate, format))
        seconds = self.timings.seconds
        seconds["decompose inside"] = seconds.get("decompose inside", 0.0) + time.perf_counter() - start

    def _weights(self, target: Target) -> dict[str, Tensor]:
        """The dense matrices of a target, out × in, by module."""
        return {
            part.module: targets.oriented(
                self.source.model.get_submodule(part.module), self.source.read(f"{part.module}.weight")
            )
            for part in target.parts
        }

    def _stored(self, target: Target, upstream: str | None = None) -> Candidate:
        key, decomposer = self._key(target, upstream), self.decomposers[target.name]
        units = unpacked_units(self.store.load("candidate", key, prefix="units."))

        def statistics() -> dict[str, dict[Any, Tensor]]:
            return {
                part.module: {
                    s: self.store.load("statistics", self._statistic_key(_place(part, s), s, upstream))["value"]
                    for s in decomposer.keeps
                }
                for part in target.parts
            }

        candidate: Candidate = decomposer.restore(
            target, units, lambda: self.store.load("candidate", key), lambda: self._weights(target), statistics
        )
        if not any(of_kind.kind == "rank" for of_kind in units):
            return candidate
        format = self.formats[target.name]
        return candidate.priced(format, budget.unit_cost(format, target.parts[0]))

    def _allocate(self, job: Job, candidates: Mapping[str, Candidate], live: _Lazily) -> Plan:
        """The plan of a job whose allocator reads candidates, statistics of the blocks, or the model itself."""
        measured = {
            index: {
                s: self.store.load("statistics", self._statistic_key(self.structure.block(index), s))["value"]
                for s in job.allocator.needs
            }
            for index in range(self.structure.count)
        }
        own = {target.name: candidates[target.name] for target in job.targets}
        seen: dict[str, Any] = {"candidates": own, "statistics": measured, "itemsize": self._itemsize(job.targets)}
        if job.allocator.sees == "model":
            upstream = self._upstream(job)
            seen |= {"live": live.get(), "remember": self._remember(upstream), "slot": self._slots(upstream)}
        return allocate(job, self.asked, progress=self.progress, **seen)

    def _itemsize(self, of: Sequence[Target]) -> int:
        """Bytes of a number as these targets will be stored, the most where they differ."""
        if self.dtype is not None:
            return self.dtype.itemsize
        names = [f"{part.module}.weight" for target in of for part in target.parts]
        if isinstance(self.source, Checkpoint):
            keys = {name: key for key, name in self.source.names.items()}
            return max(self.source.dtype_of(keys[name]).itemsize for name in names)
        return max(self.source.model.get_parameter(name).dtype.itemsize for name in names)

    def _live(self, candidates: Mapping[str, Candidate]) -> Installed:
        assert self.windows is not None
        model = self.source.whole(self.device)
        model.eval()
        return Installed(model, self.structure, candidates, self.windows, self.asked.calibrate.batch)

    def _upstream(self, job: Job) -> dict[str, Any]:
        """All that a job's problem comes from but its budget."""
        return {
            "candidates": [
                {**self._key(target), "method": self.decomposers[target.name].first_like}
                for target in sorted(job.targets, key=lambda t: t.name)
            ],
            "text": self.data, "dtype": str(self.source.model.dtype), "allocator": _named(job.allocator),
        }  # fmt: skip

    def _slots(self, upstream: Mapping[str, Any]) -> Callable[..., StoreSlot]:
        return lambda name, fields: StoreSlot(
            self.store, f"{name}-under-way", {**upstream, "fields": json.dumps(fields, sort_keys=True)}
        )

    def _remember(self, upstream: Mapping[str, Any]) -> Callable[..., Mapping[str, Tensor]]:
        def remember(
            name: str, fields: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
        ) -> Mapping[str, Tensor]:
            key = {**upstream, "fields": json.dumps(fields, sort_keys=True)}
            if not self.store.has(name, key):
                self.store.save(name, key, make())
            return self.store.load(name, key)

        return remember

    def _settled(self, plan: Plan, candidates: Mapping[str, Candidate]) -> Plan:
        """The plan with each candidate's best choice of the size that it was given."""
        choices = dict(plan.choices)
        pending = [name for name in sorted(choices) if type(candidates[name]).settle is not Candidate.settle]
        for i, name in enumerate(pending):
            with self.timings.stage("settle"):
                choices[name] = self._settle(candidates[name], choices[name], None)
            self.progress("settle", i + 1, len(pending))
        return self._recounted(plan, choices)

    def _settle(self, candidate: Candidate, choice: Choice, upstream: str | None) -> Choice:
        if type(candidate).settle is Candidate.settle:
            return choice
        key = {**self._key(candidate.target, upstream), "choice": asdict(choice)}
        if not self.store.has("settled", key, "json"):
            self.store.save_json("settled", key, asdict(candidate.settle(choice)))
        return plans.choice_from_json(self.store.load_json("settled", key))

    def _recounted(self, plan: Plan, choices: Mapping[str, Choice]) -> Plan:
        spent = sum(
            budget.count(choices[t.name], t) if t.name in choices else t.parameters
            for job in self.jobs
            for t in job.targets
        )
        assert spent <= plan.spent, (spent, plan.spent)
        return replace(plan, choices=choices, spent=spent)

    def second_pass(self, plan: Plan) -> tuple[Plan, dict[str, Candidate]]:
        """Each block decomposed at its planned size, from inputs that went through the compressed blocks before it.

        Inside a block all statistics are those of the dense block. What the store has is only run, not made again.
        """
        inside = [
            [t for t in self.targets if t.blocks[-1] == index and t.name in plan.choices]
            for index in range(self.structure.count)
        ]
        chain = _Chain()
        done = 0
        while done < len(inside) and all(
            self.store.has("candidate", self._key(t, chain.upstream)) for t in inside[done]
        ):
            self._take(inside[done], NOTHING, plan, chain)
            done += 1
        pending = {i: {t: tuple(self.decomposers[t.name].needs) for t in inside[i]} for i in range(done, len(inside))}
        wanted = {i: Wanted(of_block) for i, of_block in pending.items() if any(of_block.values())}
        with self.timings.stage("calibrate"):
            for index, measured in self._drive(wanted, sequential=True):
                if index >= done:
                    self._take(inside[index], measured, plan, chain)
                    done = index + 1
                self._install(inside[index], chain)
                self.progress("decompose", index + 1, max(wanted) + 1)
            for of_block in inside[done:]:
                self._take(of_block, NOTHING, plan, chain)
        self._count_once()
        return self._recounted(plan, chain.choices), chain.candidates

    def _take(self, of_block: Sequence[Target], measured: BlockStatistics, plan: Plan, chain: _Chain) -> None:
        """Candidates and choices of one block, and what the next one's keys say of it."""
        made = {}
        for target in of_block:
            key = self._key(target, chain.upstream)
            if not self.store.has("candidate", key):
                self._decompose(target, measured, chain.upstream)
            candidate = chain.candidates[target.name] = self._stored(target, chain.upstream)
            choice = self._settle(candidate, plan.choices[target.name], chain.upstream)
            chain.choices[target.name] = choice
            made[target.name] = [key, asdict(choice)]
        chain.upstream = hash_of({"before": chain.upstream, "made": made})

    def _install(self, of_block: Sequence[Target], chain: _Chain) -> None:
        """Put a block's compressed modules into the loaded block; the driver takes them out again."""
        assert self.windows is not None
        live = Installed(self.source.model, self.structure, chain.candidates, self.windows, 1)
        for target in of_block:
            for name, module in live.built(target.name, chain.choices[target.name]).items():
                self.source.model.set_submodule(name, module)


@dataclass
class _Chain:
    """The second pass so far; upstream: a hash of all blocks before the one at hand."""

    upstream: str = "first"
    candidates: dict[str, Candidate] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)


class _Lazily:
    """A model that is loaded when first asked for, once."""

    def __init__(self, make: Callable[[], Installed]):
        self._make = make
        self._made: Installed | None = None

    def get(self) -> Installed:
        """The model."""
        self._made = self._made or self._make()
        return self._made


def _place(part: Part, statistic: Any) -> str:
    """Where a statistic of a part is taken: at its input, which others may share, or at its weight."""
    return part.module if statistic.where == "gradient" else part.input


def _named(method: Any) -> str:
    """A method with its settings, for keys."""
    return f"{type(method).__module__}.{method!r}"
