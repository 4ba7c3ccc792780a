"""Calibration block by block: one block's weights, the hidden states, and that block's statistics; never the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from spectrim.calibrate.collect import BlockStatistics, Collector, Wanted, without_dropout
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
) -> Iterator[tuple[int, BlockStatistics]]:
    """Yield (block index, its statistics) for each block in `wanted`, while that block's weights are loaded.

    The hidden states of all batches are held on the CPU; blocks after the last wanted one are not run.
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
        weights.load(prefix, device)
        collector = Collector(weights.model, prefix, structure.of_block(index), wanted.get(index, Wanted()), device)
        with torch.no_grad(), without_dropout(weights.model), collector:
            for i, batch in enumerate(batches):
                collector.mask = batch.mask
                output = blocks.run(
                    weights.model.get_submodule(prefix), states[i].to(device), _moved(calls[i][index], device)
                )
                if not torch.isfinite(output).all():
                    raise ValueError(f"{prefix} gives values that are not finite on batch {i}: calibration stopped")
                states[i] = output.cpu()
                progress("calibrate", index * len(batches) + i + 1, total * len(batches))
        yield index, collector.result()
        weights.release(prefix)


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
