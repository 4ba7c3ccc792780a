"""Calibration block by block: one block's weights, the hidden states, and that block's statistics; never the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from spectrim.calibrate.collect import BlockStatistics, Collector, Wanted, without_dropout
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
) -> Iterator[tuple[int, BlockStatistics]]:
    """Yield (block index, its statistics) for each block up to the last in `wanted`, while its weights are loaded.

    sequential: the states entering the next block are computed after the yield, with the modules that the caller may
    have swapped into this one; they are taken out again. The hidden states of all batches are held on the CPU.
    Raises ValueError when a block's output is not finite.
    """
    needed = [index for index, of_block in wanted.items() if of_block]
    if not needed:
        return
    with without_dropout(weights.model):
        states, calls = _enter(weights, structure, batches, device)
    total = max(needed) + 1
    for index in range(total):
        prefix = structure.block(index)
        heap.give_back()
        weights.load(prefix, device)
        of_block = wanted.get(index, Wanted())
        collector = Collector(weights.model, prefix, structure.of_block(index), of_block, device)
        walk = _Walk(weights.model, prefix, batches, [call[index] for call in calls], device)
        if of_block or not sequential:
            with collector:
                walk.run(states, collector, replace=not sequential, progress=_offset(progress, index, total))
        before = dict(weights.model.get_submodule(prefix).named_modules())
        yield index, collector.result()
        if sequential and index + 1 < total:
            walk.run(states)
        if sequential:
            _put_back(weights.model, prefix, before)
        weights.release(prefix)


@dataclass(frozen=True)
class _Walk:
    """One block and what it is called with, batch by batch."""

    model: nn.Module
    prefix: str
    batches: Sequence[Batch]
    calls: Sequence[Call]
    device: torch.device

    @torch.no_grad()
    def run(
        self,
        states: list[Tensor],
        collector: Collector | None = None,
        replace: bool = True,
        progress: Progress = silent,
    ) -> None:
        """Run all batches; replace: put the states leaving the block in the place of those entering it, on the CPU.

        Raises ValueError when one is not finite.
        """
        with without_dropout(self.model):
            block = self.model.get_submodule(self.prefix)
            for i, (batch, call) in enumerate(zip(self.batches, self.calls, strict=True)):
                if collector is not None:
                    collector.mask, collector.sequences = batch.mask, len(batch.ids)
                output = blocks.run(block, states[i].to(self.device), _moved(call, self.device))
                if not torch.isfinite(output).all():
                    raise ValueError(
                        f"{self.prefix} gives values that are not finite on batch {i}: calibration stopped"
                    )
                if replace:
                    states[i] = output.cpu()
                progress("calibrate", i + 1, len(self.batches))


def _offset(progress: Progress, index: int, blocks: int) -> Progress:
    """Progress of one of several equal parts, as one of the whole."""
    return lambda stage, done, total: progress(stage, index * total + done, blocks * total)


def _put_back(model: nn.Module, prefix: str, before: Mapping[str, nn.Module]) -> None:
    """The block's own modules again in the place of those swapped in."""
    for name, module in before.items():
        if name and model.get_submodule(f"{prefix}.{name}") is not module:
            model.set_submodule(f"{prefix}.{name}", module)


def _enter(
    weights: Weights, structure: Structure, batches: Sequence[Batch], device: torch.device
) -> tuple[list[Tensor], list[list[Call]]]:
    """The states entering block 0 and the calls of every block, by batch; what is outside the blocks is freed again."""
    loaded = weights.load_outside(structure.blocks, device)
    states: list[Tensor] = []
    calls: list[list[Call]] = []
    for batch in batches:
        moved = Batch(batch.ids.to(device), None if batch.mask is None else batch.mask.to(device))
        state, found = blocks.record(weights.model, structure, moved)
        if not torch.isfinite(state).all():
            raise ValueError("the embedding gives values that are not finite: calibration stopped")
        states.append(state.cpu())
        calls.append(blocks.deduplicated(found, calls[0] if calls else None))
    weights.release_names(loaded)
    return states, calls


def _moved(call: Call, device: torch.device) -> Call:
    def move(leaf: object) -> object:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    return Call(*tree_map(move, (call.args, call.kwargs)))
