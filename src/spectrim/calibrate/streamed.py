"""Calibration block by block: one block's weights, the hidden states, and that block's statistics; never the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from spectrim.calibrate.collect import BlockStatistics, Collector, Wanted, portion, without_dropout
from spectrim.calibrate.states import InMemory, States
from spectrim.core import heap
from spectrim.core.progress import Progress, silent
from spectrim.model import blocks
from spectrim.model.blocks import Batch, Call
from spectrim.model.checkpoint import Weights
from spectrim.model.targets import Structure


def streamed(
    weights: Weights,
    structure: Structure,
    batches: Sequence[Batch],
    wanted: Mapping[int, Wanted],
    device: torch.device,
    progress: Progress = silent,
    sequential: bool = False,
    states: States | None = None,
) -> Iterator[tuple[int, BlockStatistics]]:
    """Yield (block index, its statistics) for each block up to the last in `wanted`, while its weights are loaded.

    sequential: the states entering the next block are computed after the yield, with the modules that the caller may
    have swapped into this one; they are taken out again. states: where hidden states are kept (default: in memory); the
    first block is the one that these go on from. Several processes run a share of the batches each, and get the
    statistics of all. Raises ValueError when a block's output is not finite.
    """
    needed = [index for index, of_block in wanted.items() if of_block]
    if not needed:
        return
    states, total = states or InMemory(), max(needed) + 1
    first, own = states.first(len(batches), min(needed)), {i: batches[i] for i in portion(batches, wanted.values())}
    with without_dropout(weights.model):
        calls = enter(weights, structure, own, device, partial(states.put, 0) if first == 0 else None)
    for index in range(first, total):
        prefix = structure.block(index)
        heap.give_back()
        weights.load(prefix, device)
        of_block, last = wanted.get(index, Wanted()), index + 1 == total
        if not last:
            weights.prefetch(structure.block(index + 1), device)
        collector = Collector(weights.model, prefix, structure.of_block(index), of_block, device)
        walk = _Walk(weights.model, index, prefix, own, [call[index] for call in calls], device, states)
        if of_block or not sequential:
            with collector:
                walk.run(collector, replace=not sequential and not last, progress=_offset(progress, index, total))
        before = dict(weights.model.get_submodule(prefix).named_modules())
        yield index, collector.result()
        del collector  # with the statistics of this block, before the next one is read
        if sequential and not last:
            walk.run()
        if sequential:
            _put_back(weights.model, prefix, before)
        weights.release(prefix)
        states.finished(index, len(batches))


@dataclass(frozen=True)
class _Walk:
    """One block and what it is called with, batch by batch, by their numbers."""

    model: nn.Module
    index: int
    prefix: str
    batches: Mapping[int, Batch]
    calls: Sequence[Call]
    device: torch.device
    states: States

    @torch.no_grad()
    def run(self, collector: Collector | None = None, replace: bool = True, progress: Progress = silent) -> None:
        """Run all batches; replace: keep the states leaving the block, which enter the next one.

        Raises ValueError when one is not finite.
        """
        with without_dropout(self.model):
            block = self.model.get_submodule(self.prefix)
            for done, ((i, batch), call) in enumerate(zip(self.batches.items(), self.calls, strict=True), 1):
                if collector is not None:
                    collector.mask, collector.sequences = batch.mask, len(batch.ids)
                output = blocks.run(block, self.states.get(self.index, i).to(self.device), call.to(self.device))
                if not torch.isfinite(output).all():
                    raise ValueError(
                        f"{self.prefix} gives values that are not finite on batch {i}: calibration stopped"
                    )
                if replace:
                    self.states.put(self.index + 1, i, output)
                del output
                # activations below 8 MiB leave holes between the states, which every batch would widen
                heap.give_back()
                progress("calibrate", done, len(self.batches))


def _offset(progress: Progress, index: int, blocks: int) -> Progress:
    """Progress of one of several equal parts, as one of the whole."""
    return lambda stage, done, total: progress(stage, index * total + done, blocks * total)


def _put_back(model: nn.Module, prefix: str, before: Mapping[str, nn.Module]) -> None:
    """The block's own modules again in the place of those swapped in."""
    for name, module in before.items():
        if name and model.get_submodule(f"{prefix}.{name}") is not module:
            model.set_submodule(f"{prefix}.{name}", module)


def enter(
    weights: Weights,
    structure: Structure,
    batches: Mapping[int, Batch],
    device: torch.device,
    keep: Callable[[int, Tensor], None] | None,
) -> list[list[Call]]:
    """The calls of every block, by batch; what is outside the blocks is freed again.

    keep: is given the number of each batch and its state entering block 0.
    """
    loaded = weights.load_outside(structure.blocks, device)
    calls: list[list[Call]] = []
    for i, batch in batches.items():
        moved = Batch(batch.ids.to(device), None if batch.mask is None else batch.mask.to(device))
        state, found = blocks.record(weights.model, structure, moved)
        if not torch.isfinite(state).all():
            raise ValueError("the embedding gives values that are not finite: calibration stopped")
        if keep is not None:
            keep(i, state)
        calls.append(blocks.deduplicated(found, calls[0] if calls else None))
    weights.release_names(loaded)
    return calls
