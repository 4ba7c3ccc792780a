"""One run under way: what every stage reads, and candidates, from the store or made now."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spectrim import driving
from spectrim.calibrate.collect import BlockStatistics, Wanted
from spectrim.calibrate.shrinking import Shrinking
from spectrim.calibrate.statistics import Statistic
from spectrim.core import budget, distributed, heap
from spectrim.core import plan as plans
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target
from spectrim.core.progress import Progress
from spectrim.core.store import Store
from spectrim.jobs import Job
from spectrim.model import targets
from spectrim.model.checkpoint import Weights
from spectrim.recipe import Recipe
from spectrim.stored import packed, unpacked_units

logger = logging.getLogger(__name__)

NOTHING = BlockStatistics({}, {}, {})


@dataclass
class Timings:
    """Seconds of each stage, in order, and the peak of resident memory until its end."""

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.peaks[name] = heap.peak()


class Run:
    """What every stage reads, calibration and decomposition."""

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
        fingerprint: str | None = None,
    ):
        self.source, self.structure, self.asked, self.jobs = source, structure, asked, jobs
        self.device, self.store = device, store
        # of statistics; what allocators run the model on and shares are chosen on; what accepts the second pass
        self.windows, self.select, self.accept = driving.shared_out(windows, asked.calibrate)
        self.timings, self.progress, self.dtype = timings, progress, dtype
        with timings.stage("fingerprint"):
            self.fingerprint = source.fingerprint() if fingerprint is None else fingerprint
        # how statistics are handed to decomposers
        shrink = asked.calibrate.shrink
        self.shrinking = Shrinking(0.0 if shrink == "auto" else shrink, asked.calibrate.shrink_to)
        # what of a text, beside the windows, the result is tuned on (None: it is not tuned)
        self.tuned_on: str | None = None
        # hidden states: bytes of them in memory, the rest in files (None: all in memory)
        self.room: int | None = None
        # targets whose factors are not stored
        self.lean: frozenset[str] = frozenset()
        # what each process has had to do so far
        self.loads = [0.0] * distributed.world()
        self.data = driving.text_hash(self.windows)
        self.decomposers = {name: d for job in jobs for name, d in job.decomposers.items()}
        self.kept = {target.name: job.keeps(target) for job in jobs for target in job.targets}
        self.formats = {target.name: job.format for job in jobs for target in job.targets}
        self.targets = [target for job in jobs for target in job.targets]
        self.reread = {target.name for job in jobs if job.allocator.sees == "model" for target in job.targets}
        self.complete = {target.name for job in jobs if job.allocator.learns for target in job.targets}

    def at(self, asked: Recipe, jobs: Sequence[Job]) -> Run:
        """The same run of another recipe, which shares out the windows alike."""
        parts = [each for each in (self.windows, self.select, self.accept) if each is not None]
        other = Run(
            self.source, self.structure, asked, jobs, torch.cat(parts) if parts else None, self.device, self.store,
            self.timings, self.progress, self.dtype, self.fingerprint,
        )  # fmt: skip
        other.tuned_on = self.tuned_on
        return other

    def key(self, target: Target, upstream: str | None = None) -> dict[str, Any]:
        """What made a candidate: not the ratio, nor the allocator, but for the plan of the blocks before it."""
        decomposer = self.decomposers[target.name]
        again = upstream is not None and self.asked.calibrate.paired
        measured = {"text": self.data, "dtype": str(self.source.model.dtype)} if decomposer.needs or again else {}
        if upstream is not None and measured:
            measured["upstream"] = upstream
        if target.name in self.complete:
            measured["complete"] = "yes"
        measured |= self.shrinking.key(decomposer.needs)
        return {
            "weights": self.fingerprint, "target": asdict(target), "method": named(decomposer),
            "format": self.formats[target.name], **measured,
        }  # fmt: skip

    def statistic_key(self, place: str, statistic: Any, upstream: str | None = None) -> dict[str, Any]:
        # gradients are always those of the original model
        after = {} if upstream is None or statistic.where == "gradient" else {"upstream": upstream}
        return {
            "weights": self.fingerprint, "text": self.data, "place": place,
            "statistic": repr(statistic), "dtype": str(self.source.model.dtype), **after,
        }  # fmt: skip

    def has(self, target: Target, upstream: str | None = None) -> bool:
        """Whether the store has a candidate with all that it reads, or its spectrum and what its factors come from."""
        key, decomposer = self.key(target, upstream), self.decomposers[target.name]
        if upstream is not None and self.asked.calibrate.paired and not self.store.has("instead", key):
            return False
        if self.store.has("candidate", key):
            return self._kept(target, self.kept[target.name], upstream)
        if target.name in self.reread or not self.store.has("spectrum", key):
            return False
        return self._kept(target, decomposer.needs, upstream)

    def _kept(self, target: Target, of: Sequence[Any], upstream: str | None) -> bool:
        keys = [self.statistic_key(_place(part, s), s, upstream) for part in target.parts for s in of]
        return all(self.store.has("statistics", key) for key in keys)

    def pending(self) -> list[Target]:
        """Targets that are to be decomposed on the original model."""
        return [target for target in self.targets if not self.has(target)]

    def candidates(self) -> dict[str, Candidate]:
        """Every target's candidate on the original model, from the store or made now."""
        pending, wanted = distributed.agreed(self._to_do)
        if pending:
            logger.info("%d of %d decompositions to make", len(pending), len(self.targets))
        total, made = len(pending), 0
        with self.timings.stage("calibrate"):
            for index, measured in driving.drive(self, wanted):
                of_block = wanted.get(index, Wanted())
                for statistic in of_block.block if distributed.first() else ():
                    key = self.statistic_key(self.structure.block(index), statistic)
                    self.store.save("statistics", key, {"value": measured.block[statistic]})
                for _ in self.decompose_all(list(of_block.targets), measured):
                    made += 1
                    self.progress("decompose", made, total)
                del measured  # not beside those of the next block
            for _ in self.decompose_all([t for t in pending if not self.decomposers[t.name].needs], NOTHING):
                heap.give_back()  # no block is loaded here, before which it is done elsewhere
                made += 1
                self.progress("decompose", made, total)
        distributed.barrier()  # what others have made is read from here on
        self.count_once()
        driving.forget_states(self)
        return {target.name: self.stored(target) for target in self.targets}

    def inside(self, plan: Plan) -> list[list[Target]]:
        """The targets that a plan has choices for, by the block that they end in."""
        chosen = [target for target in self.targets if target.name in plan.choices]
        return [[t for t in chosen if t.blocks[-1] == index] for index in range(self.structure.count)]

    def _to_do(self) -> tuple[list[Target], dict[int, Wanted]]:
        """What the store lacks: targets to decompose, and what to measure in each block."""
        pending = self.pending()
        return pending, self._wanted(pending, tuple(dict.fromkeys(n for job in self.jobs for n in job.allocator.needs)))

    def count_once(self) -> None:
        """Decomposition runs inside the calibration's loop."""
        if "decompose" in self.timings.seconds:
            self.timings.seconds["calibrate"] -= self.timings.seconds.pop("decompose inside", 0.0)

    def _wanted(self, pending: Sequence[Target], of_blocks: Sequence[Any] = ()) -> dict[int, Wanted]:
        """What to measure in each block: nothing for what the store has."""
        wanted = {}
        shared: dict[tuple[Statistic, ...], tuple[Statistic, ...]] = {}  # equal ones once, not once a target
        for index in range(self.structure.count):
            own = [t for t in pending if t.blocks[-1] == index and self.decomposers[t.name].needs]
            needs = {t: tuple(self.decomposers[t.name].needs) for t in own}
            inside = {t: shared.setdefault(each, each) for t, each in needs.items()}
            block = self.structure.block(index)
            missing = tuple(s for s in of_blocks if not self.store.has("statistics", self.statistic_key(block, s)))
            if inside or missing:
                wanted[index] = Wanted(inside, missing)
        return wanted

    def dealt(self, of: Sequence[Target]) -> list[int]:
        """The process that each target of a block is dealt to."""
        owners = distributed.deal([work(target) for target in of], self.loads)
        for target, owner in zip(of, owners, strict=True):
            self.loads[owner] += work(target)
        return owners

    def decompose_all(
        self,
        of_block: Sequence[Target],
        measured: BlockStatistics,
        upstream: str | None = None,
        instead: Callable[[Target], Mapping[str, Tensor]] | None = None,
    ) -> Iterator[Target]:
        """`decompose` targets, those that are dealt to this process; yields each one that it is done with.

        instead: gives, by module, the matrices that are decomposed in the place of a target's own.
        """
        keepers: dict[tuple[str, Any], str] = {}  # of a statistic that several read, one stores it
        for target in of_block:
            keepers = dict.fromkeys(self._keeps(target), target.name) | keepers
        for target, owner in zip(of_block, self.dealt(of_block), strict=True):
            if owner == distributed.rank():
                kept = {place for place, keeper in keepers.items() if keeper == target.name}
                self.decompose(target, measured, upstream, kept, None if instead is None else instead(target))
                if self.room is not None:
                    heap.give_back()  # holes spread over ever more pages from one matrix to the next
            yield target

    def _keeps(self, target: Target) -> dict[tuple[str, Any], Part]:
        """The statistics that are stored with a target, by place, and the part that they are of."""
        decomposer = self.decomposers[target.name]
        chosen = decomposer.needs if target.name in self.lean else self.kept[target.name]
        return {(_place(part, s), s): part for part in target.parts for s in chosen}

    def decompose(
        self,
        target: Target,
        measured: BlockStatistics,
        upstream: str | None = None,
        kept: Collection[tuple[str, Any]] | None = None,
        instead: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make a candidate and store it, with the statistics that it is read with; kept: of these alone.

        instead: by module, matrices that are decomposed in the place of the original ones; stored too.
        """
        start = time.perf_counter()
        with self.timings.stage("decompose"):
            decomposer, lean = self.decomposers[target.name], target.name in self.lean
            if instead is not None:
                self.store.save("instead", self.key(target, upstream), instead)
            weights = {module: w.to(self.device) for module, w in self.weights(target, upstream).items()}
            stats = measured.of(target)
            candidate = decomposer.decompose(target, weights, self.shrinking.of(stats))
            for (place, statistic), part in self._keeps(target).items():
                key = self.statistic_key(place, statistic, upstream)
                if (kept is None or (place, statistic) in kept) and not self.store.has("statistics", key):
                    self.store.save("statistics", key, {"value": stats[part.module][statistic]})
            made = packed(candidate, self._kept_format(target))
            if lean:
                spectrum = {name: t for name, t in made.items() if name.startswith("units.")}
                self.store.save("spectrum", self.key(target, upstream), spectrum)
            else:
                self.store.save("candidate", self.key(target, upstream), made)
        seconds = self.timings.seconds
        seconds["decompose inside"] = seconds.get("decompose inside", 0.0) + time.perf_counter() - start

    def _kept_format(self, target: Target) -> str | None:
        """The format as far as which factors are kept, None where whole."""
        return None if target.name in self.complete else self.formats[target.name]

    def _made_again(self, target: Target, upstream: str | None) -> dict[str, Tensor]:
        """What the store would hold of a candidate."""
        decomposer = self.decomposers[target.name]
        stats = {
            module: {s: value.to(self.device) for s, value in of_part.items()}
            for module, of_part in self._measured(target, decomposer.needs, upstream).items()
        }
        weights = {module: w.to(self.device) for module, w in self.weights(target, upstream).items()}
        made = packed(decomposer.decompose(target, weights, stats), self._kept_format(target))
        return {name: tensor.detach().cpu().contiguous() for name, tensor in made.items()}

    def gradients(self, part: Part, of: Sequence[Any]) -> dict[Any, Tensor]:
        """Stored statistics of gradients at a part."""
        return {s: self.store.load("statistics", self.statistic_key(part.module, s))["value"] for s in of}

    def _measured(self, target: Target, of: Sequence[Any], upstream: str | None) -> dict[str, dict[Any, Tensor]]:
        """Stored statistics of a target, by module, as decomposers are given them."""
        return self.shrinking.of(
            {
                part.module: {
                    s: self.store.load("statistics", self.statistic_key(_place(part, s), s, upstream))["value"]
                    for s in of
                }
                for part in target.parts
            }
        )

    def weights(self, target: Target, upstream: str | None = None) -> dict[str, Tensor]:
        """The dense matrices of a target, out × in, by module, or those decomposed in their place."""
        if upstream is not None and self.asked.calibrate.paired:
            return self.store.load("instead", self.key(target, upstream))
        return {
            part.module: targets.oriented(
                self.source.model.get_submodule(part.module), self.source.read(f"{part.module}.weight")
            )
            for part in target.parts
        }

    def stored(self, target: Target, upstream: str | None = None) -> Candidate:
        """A candidate of the store; its tensors are read, or made again, when asked for."""
        key, decomposer = self.key(target, upstream), self.decomposers[target.name]
        lean = not self.store.has("candidate", key)
        units = unpacked_units(self.store.load("spectrum" if lean else "candidate", key, prefix="units."))
        candidate: Candidate = decomposer.restore(
            target, units,
            lambda: self._made_again(target, upstream) if lean else self.store.load("candidate", key),
            lambda: self.weights(target, upstream),
            lambda: self._measured(target, decomposer.keeps, upstream),
        )  # fmt: skip
        if not any(of_kind.kind == "rank" for of_kind in units):
            return candidate
        format = self.formats[target.name]
        return candidate.priced(format, budget.unit_cost(format, target.parts[0]))

    def settle_all(
        self, candidates: Sequence[Candidate], choices: Mapping[str, Choice], upstream: str | None
    ) -> Iterator[tuple[str, Choice]]:
        """`settle` all, each in the process that it is dealt to; by name of the target."""
        if distributed.world() > 1:
            searched = [c for c in candidates if type(c).settle is not Candidate.settle]
            for candidate, owner in zip(searched, self.dealt([c.target for c in searched]), strict=True):
                if owner == distributed.rank():
                    self.settle(candidate, choices[candidate.target.name], upstream)
            distributed.barrier()
        for candidate in candidates:
            yield candidate.target.name, self.settle(candidate, choices[candidate.target.name], upstream)

    def settle(self, candidate: Candidate, choice: Choice, upstream: str | None) -> Choice:
        """The best choice known of a size, from the store or found now."""
        if type(candidate).settle is Candidate.settle:
            return choice
        key = {**self.key(candidate.target, upstream), "choice": asdict(choice)}
        if not self.store.has("settled", key, "json"):
            self.store.save_json("settled", key, asdict(candidate.settle(choice)))
        return plans.choice_from_json(self.store.load_json("settled", key))

    def recounted(self, plan: Plan, choices: Mapping[str, Choice]) -> Plan:
        """The plan with other choices, none larger."""
        spent = sum(
            budget.count(choices[t.name], t) if t.name in choices else t.parameters
            for job in self.jobs
            for t in job.targets
        )
        assert spent <= plan.spent, (spent, plan.spent)
        return replace(plan, choices=choices, spent=spent)


def _place(part: Part, statistic: Any) -> str:
    """Where a statistic of a part is taken: at its input, which others may share, or at its weight."""
    return part.module if statistic.where == "gradient" else part.input


def work(target: Target) -> float:
    """What factorising a target's matrices costs, up to a factor: out · in · min(out, in)."""
    return float(sum(part.parameters * min(part.out_features, part.in_features) for part in target.parts))


def named(method: Any) -> str:
    """A method with its settings, for keys."""
    return f"{type(method).__module__}.{method!r}"
