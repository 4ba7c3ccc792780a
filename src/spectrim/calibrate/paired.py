"""Two streams through the model, block by block: the dense one, and one through what has been compressed so far.

Inside a block the targets are met in steps, those that read one input together, in the order in which the block defines
them: q, k and v, then o, then gate and up, then down. For a step both streams run through the block as far as its
modules; the compressed one gives the inputs x′, the dense one the outputs that the modules are to have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectrim.calibrate.collect import BlockStatistics, Collector, Wanted, portion, without_dropout
from spectrim.calibrate.missed import Missed, seen_of
from spectrim.calibrate.replayed import Replayed
from spectrim.calibrate.states import States
from spectrim.calibrate.statistics import Statistic
from spectrim.calibrate.streamed import enter
from spectrim.core import distributed, heap
from spectrim.core.plan import Part, Target
from spectrim.core.progress import Progress, silent
from spectrim.model import blocks
from spectrim.model.blocks import Batch, Call
from spectrim.model.checkpoint import Weights
from spectrim.model.targets import Structure

# Roles whose output is added to the residual stream.
ADDED = ("o", "down")


@dataclass(frozen=True)
class Measured:
    """Of one step: statistics of the compressed stream, and what the dense weights W miss on its inputs x′, float64.

    missed: by module Σ (t − W x′) x′ᵀ, out × in, t what the dense stream says the module's output should be. Where that
    is what W makes of the inputs x there, it is W Σ (x − x′) x′ᵀ; moved: that sum by input, in × in, which the modules
    that read the input share. Differences are small beside what they are of: products of a batch in float32 (float64 in
    a float64 model) lose nothing of them.
    """

    statistics: BlockStatistics
    missed: Mapping[str, Float[Tensor, "out in"]]
    moved: Mapping[str, Float[Tensor, "width width"]]

    def of(self, part: Part, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Σ (t − W x′) x′ᵀ of one matrix, float64; weight: W."""
        if part.module in self.missed:
            return self.missed[part.module]
        moved = self.moved[part.input]
        return weight.to(moved) @ moved


@dataclass(frozen=True)
class Lost:
    """What a compressed model loses, means in nats a token.

    kl: KL(dense ‖ compressed) of next-token distributions, over every place of the windows; excess: of −log p of the
    token that follows, over the dense model's, over the `predictions` places that one follows.
    """

    kl: float
    excess: float
    predictions: int


@dataclass(frozen=True)
class Step:
    """Targets of one block that are compressed at once; `measure` runs both streams, if what it gives is wanted.

    last: of the block's steps.
    """

    block: int
    last: bool
    targets: tuple[Target, ...]
    measure: Callable[[Mapping[Target, tuple[Statistic, ...]]], Measured]


@dataclass
class Paired:
    """Both streams. installed: modules that the compressed one runs through, by name; the caller adds to it.

    Several processes run a share of the batches each, and get the sums of all; statistics: those that will be measured.
    residual: the outputs wanted of `o` and `down` are those that give the dense residual stream, whatever the
    compressed one has lost before them; auto: only in blocks where that is possible. kept: bytes of what parts of
    a block have answered that are kept beside the states, so that its later steps need not run them again.
    ended: the dense stream's states are those at its end, where `lost` wants them; nothing can be measured then.
    """

    weights: Weights
    structure: Structure
    batches: Sequence[Batch]
    device: torch.device
    dense: States
    compressed: States
    residual: bool | Literal["auto"] = True
    progress: Progress = silent
    installed: dict[str, nn.Module] = field(default_factory=dict)
    statistics: Sequence[Statistic] = ()
    tupled: bool = False
    kept: int = 0
    ended: bool = False

    @property
    def own(self) -> dict[int, Batch]:
        """The batches of this process, by their numbers."""
        together = Wanted(block=tuple(self.statistics))
        return {i: self.batches[i] for i in portion(self.batches, [together])}

    def steps(self, inside: Sequence[Sequence[Target]], through: bool = False) -> Iterator[Step]:
        """The steps of each block up to the last that has targets, from the one that both streams' states go on from.

        inside: the targets by block; through: both streams run on to the end of the last block. Raises ValueError where
        a block gives values that are not finite, and for a residual stream that `o` and `down` do not add up to.
        """
        count = len(self.batches)
        last = len(inside) - 1 if through else max(index for index, targets in enumerate(inside) if targets)
        first = self.compressed.first(count, last)
        if self.dense.first(count, first) != first:  # a file of the other stream is damaged
            first = 0
        with without_dropout(self.weights.model):
            calls = enter(self.weights, self.structure, self.own, self.device, None if first else self._enter)
        for index in range(first, last + 1):
            heap.give_back()
            prefix = self.structure.block(index)
            self.weights.load(prefix, self.device)
            if index < last:
                self.weights.prefetch(self.structure.block(index + 1), self.device)
            block = _Block(self, index, prefix, dict(zip(self.own, (call[index] for call in calls), strict=True)))
            block.advanced = self.ended
            if self.residual and inside[index] and self.own:
                block.residual = block.adds_up(needed=self.residual is True)
            if through and index == first and self.own:
                self.tupled = block.answers_tuple()
            steps = steps_of(inside[index])
            for place, step in enumerate(steps, 1):
                goes_on = place == len(steps) and (index < last or through)
                later = [target for others in steps[place:] for target in others]
                yield Step(index, place == len(steps), step, block.measuring(step, later, goes_on))
            if index < last or through:
                block.advance()
            own = {name: module for name, module in self.installed.items() if name.startswith(f"{prefix}.")}
            for name in own:
                del self.installed[name]
            self.weights.release(prefix)
            for states in (self.dense, self.compressed):
                states.finished(index, count)
            self.progress("calibrate", index + 1, last + 1)

    @torch.no_grad()
    def lost(self) -> Lost:
        """What the compressed stream's predictions lose, once both streams ran to the end."""
        model, count = self.weights.model, self.structure.count
        loaded = self.weights.load_outside(self.structure.blocks, self.device)
        head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
        if head is not None:
            self.weights.load(head, self.device)
        sums = torch.zeros(4, dtype=torch.float64)  # KL and its places, excess and its places
        for i, batch in self.own.items():
            states = [stream.get(count, i).to(self.device) for stream in (self.dense, self.compressed)]
            for place, ids in enumerate(batch.ids):  # the vocabulary is wide: one sequence at a time
                known, found = (
                    blocks.finish(
                        model, self.structure, ids[None].to(self.device), state[place : place + 1], self.tupled
                    ).float().log_softmax(-1)
                    for state in states
                )  # fmt: skip
                each = (known.exp() * (known - found)).sum(-1)[0]
                following = ids[1:, None].to(known.device)
                more = (known[0, :-1].gather(-1, following) - found[0, :-1].gather(-1, following))[:, 0]
                if batch.mask is not None:
                    real = batch.mask[place].to(each.device)
                    each, more = each[real], more[real[:-1] & real[1:]]
                for position, values in ((0, each), (2, more)):
                    sums[position] += values.sum(dtype=torch.float64).cpu()
                    sums[position + 1] += len(values)
        self.weights.release_names(loaded)
        if head is not None:
            self.weights.release(head)
        kl, places, excess, predictions = distributed.add_up(sums).tolist()
        return Lost(kl / places, excess / predictions if predictions else float("nan"), int(predictions))

    def _enter(self, batch: int, state: Tensor) -> None:
        """Both streams begin alike."""
        if not self.ended:
            self.dense.put(0, batch, state)
        self.compressed.put(0, batch, state.clone())


def steps_of(targets: Sequence[Target]) -> list[tuple[Target, ...]]:
    """The targets of a block by step."""
    return [tuple(members) for _, members in groupby(targets, lambda t: tuple(part.input for part in t.parts))]


@dataclass
class _Block:
    """One loaded block; residual: whether its `o` and `down` aim at the residual stream."""

    of: Paired
    index: int
    prefix: str
    calls: Mapping[int, Call]
    residual: bool = False
    advanced: bool = False  # the dense stream, with the block's last step

    @cached_property
    def replayed(self) -> Replayed:
        """What need not run again; matrices that are not compressed are in it too."""
        modules = [part.module for target in self.of.structure.of_block(self.index) for part in target.parts]
        return Replayed(self.model, self.prefix, modules, list(self._added().values()), self.of.kept)

    @property
    def model(self) -> nn.Module:
        return self.of.weights.model

    @contextmanager
    def _compressed(self) -> Iterator[None]:
        """The block with its installed modules in it."""
        before = {name: self.model.get_submodule(name) for name in self.of.installed if name.startswith(self.prefix)}
        try:
            for name in before:
                self.model.set_submodule(name, self.of.installed[name])
            yield
        finally:
            for name, module in before.items():
                self.model.set_submodule(name, module)

    def _from(self, states: States, i: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What enters the block, and what runs it."""
        return states.get(self.index, i).to(self.of.device), partial(self._through, i)

    def _through(self, i: int, state: Tensor) -> Tensor:
        return blocks.run(self.model.get_submodule(self.prefix), state, self.calls[i].to(self.of.device))

    def _run(self, states: States, i: int, known: Tensor | None = None) -> Tensor:
        state, run = self._from(states, i)
        return run(state if known is None else known)

    @torch.no_grad()
    def answers_tuple(self) -> bool:
        """What kind of answer the model expects of its blocks."""
        i = min(self.calls)
        call, state = self.calls[i].to(self.of.device), self.of.dense.get(self.index, i).to(self.of.device)
        with without_dropout(self.model):
            return isinstance(self.model.get_submodule(self.prefix)(state, *call.args, **call.kwargs), (tuple, list))

    @torch.no_grad()
    def advance(self) -> None:
        """Both streams through the whole block."""
        with without_dropout(self.model):
            for i in self.of.own:
                if not self.advanced:
                    with self.replayed.run("dense", i, keep=False):
                        self.leave(i, self._run(self.of.dense, i))
                with self._compressed(), self.replayed.run("compressed", i, keep=False):
                    output = self._run(self.of.compressed, i)
                self._refuse(output, i, " as compressed so far")
                self.of.compressed.put(self.index + 1, i, output)
                heap.give_back()

    def leave(self, batch: int, output: Tensor) -> None:
        """The dense stream leaves the block."""
        self._refuse(output, batch, "")
        self.of.dense.put(self.index + 1, batch, output)

    def _refuse(self, output: Tensor, batch: int, which: str) -> None:
        if not torch.isfinite(output).all():
            raise ValueError(
                f"{self.prefix}{which} gives values that are not finite on batch {batch}: calibration stopped"
            )

    def _added(self) -> dict[str, str]:
        """By role, the modules whose outputs are added to the residual stream."""
        return {t.role: t.parts[0].module for t in self.of.structure.of_block(self.index) if t.role in ADDED}

    def _ends(self, parts: Sequence[Part]) -> dict[str, list[str]]:
        """Those of the modules whose output joins the residual stream, and what is added to it before them."""
        added = self._added() if self.residual else {}
        before = {"o": [], "down": [added["o"]]} if added else {}
        return {module: before[role] for role, module in added.items() if module in {part.module for part in parts}}

    @torch.no_grad()
    def adds_up(self, needed: bool) -> bool:
        """Whether the block's output is its input and what `o` and `down` give; ValueError where it is needed so."""
        added = self._added()
        with without_dropout(self.model), seen_of(self.model, added.values()) as seen:
            i = min(self.calls)
            before = self.of.dense.get(self.index, i).to(self.of.device)
            after = self._run(self.of.dense, i, before)
        found = before + sum(seen[module].reshape(before.shape) for module in added.values())
        right = set(added) == set(ADDED) and bool((found - after).norm() <= 1e-2 * (after - before).norm())
        if not right and needed:
            raise ValueError(
                f"{self.prefix}: the outputs of {' and '.join(ADDED)} do not add up to its own, as behind norms: "
                "set calibrate.residual_aware to false or auto"
            )
        return right

    def measuring(
        self, targets: Sequence[Target], later: Sequence[Target], on: bool
    ) -> Callable[[Mapping[Target, tuple[Statistic, ...]]], Measured]:
        """What `Step.measure` is; later: targets of the steps that follow; on: with it the dense stream runs to the
        block's end.
        """
        return lambda wanted: self._measure(targets, later, wanted, on)

    @torch.no_grad()
    def _measure(
        self,
        targets: Sequence[Target],
        later: Sequence[Target],
        wanted: Mapping[Target, tuple[Statistic, ...]],
        on: bool,
    ) -> Measured:
        assert not self.of.ended
        of, structure = self.of, self.of.structure
        asked = Wanted(wanted)
        collector = Collector(self.model, self.prefix, structure.of_block(self.index), asked, of.device)
        read = {module for each in asked.inputs().values() for module in each.values()}
        parts = [part for target in targets for part in target.parts]
        missed = Missed(self.model, parts, self._ends(parts), read, of.device)
        on = on and not self.advanced
        own, others = ([part.module for target in each for part in target.parts] for each in (targets, later))
        ending = self.replayed.ending(own, others)
        with without_dropout(self.model):
            for i, batch in of.own.items():
                with self.replayed.run("dense", i, own, keep=bool(others)) as known:
                    output = missed.dense(*self._from(of.dense, i), on, known, ending)
                if output is not None:
                    self.leave(i, output)
                collector.mask, collector.sequences = batch.mask, len(batch.ids)
                with self._compressed(), collector, self.replayed.run("compressed", i, own, [*own, *others]) as known:
                    missed.compressed(*self._from(of.compressed, i), batch, known)
                collector.handles.clear()
                heap.give_back()
        self.advanced = self.advanced or on
        sums, moved = (
            {name: distributed.add_up(found[name]) for name in sorted(found)} for found in (missed.sums, missed.moved)
        )
        return Measured(collector.result(), sums, moved)
