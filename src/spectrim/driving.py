"""The calibration of a run: which text, by which driver, and where hidden states lie meanwhile."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from spectrim.calibrate.collect import BlockStatistics, Wanted
from spectrim.calibrate.paired import Paired
from spectrim.calibrate.replayed import KEPT
from spectrim.calibrate.resident import resident
from spectrim.calibrate.states import InFiles, InMemory, clear
from spectrim.calibrate.streamed import streamed
from spectrim.core import distributed
from spectrim.core.progress import Progress
from spectrim.core.store import Store
from spectrim.model.blocks import Batch
from spectrim.model.checkpoint import Weights
from spectrim.model.targets import Structure
from spectrim.recipe import Calibrate, Recipe, RecipeError

logger = logging.getLogger(__name__)

Windows = Int[Tensor, "_ length"]


@runtime_checkable
class Driven(Protocol):
    """What calibration reads of a run (`run.Run`)."""

    source: Weights
    structure: Structure
    asked: Recipe
    windows: Windows | None
    device: torch.device
    store: Store
    room: int | None
    progress: Progress
    fingerprint: str
    data: str | None
    decomposers: dict[str, Any]


def shared_out(windows: Windows | None, calibrate: Calibrate) -> tuple[Windows | None, Windows | None, Windows | None]:
    """The windows of statistics, choices and acceptance. Raises RecipeError where none is left for statistics."""
    if windows is None:
        return None, None, None
    sizes = calibrate.shared_out(len(windows))
    if sizes[0] < 1:
        raise RecipeError(
            f"calibrate.select {calibrate.select} and calibrate.accept {calibrate.accept} leave none of "
            f"{len(windows)} windows for statistics"
        )
    fit, select, accept = windows.split(sizes)
    return fit, select if len(select) else None, accept if len(accept) else None


def text_hash(windows: Windows | None) -> str | None:
    """What tells calibration tokens from others in a key."""
    return None if windows is None else hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


def drive(
    run: Driven,
    wanted: Mapping[int, Wanted],
    sequential: bool = False,
    upstream: Callable[[int], str | None] = lambda block: None,
) -> Iterator[tuple[int, BlockStatistics]]:
    """Blocks with their statistics; upstream: in a second pass, what the states entering a block come from."""
    if not wanted:
        return iter(())
    assert run.windows is not None
    tokens = run.windows.numel()
    widest = max(p.in_features for t in run.structure.targets for p in t.parts)
    if tokens < widest:
        logger.warning("%d calibration tokens for inputs of width %d: statistics are rank deficient", tokens, widest)
    batches = [Batch(ids) for ids in run.windows.split(run.asked.calibrate.batch)]
    if not any(s.needs_gradient for w in wanted.values() for chosen in w.targets.values() for s in chosen):
        states = InMemory() if run.room is None else _files(run, upstream if sequential else None)
        return streamed(run.source, run.structure, batches, wanted, run.device, run.progress, sequential, states)
    model = run.source.whole(run.device)
    return resident(model, run.structure, batches, wanted, run.progress)


def paired(
    run: Driven,
    installed: dict[str, nn.Module],
    upstream: Callable[[int], str | None] | None = None,
    windows: Windows | None = None,
) -> Paired:
    """The dense stream and the compressed one, which runs through the modules of `installed`.

    upstream: what the compressed states entering a block come from, where they are to be found again; windows:
    instead of those of statistics.
    """
    windows = run.windows if windows is None else windows
    assert windows is not None
    asked, files = run.asked.calibrate, upstream is not None and run.room is not None
    batches = [Batch(ids) for ids in windows.split(asked.batch)]
    of_dense, of_compressed = (_files(run, each) if files else InMemory() for each in (None, upstream))
    return Paired(
        run.source, run.structure, batches, run.device, of_dense, of_compressed, asked.residual_aware,
        run.progress, installed, [s for d in run.decomposers.values() for s in d.needs],
        kept=KEPT if run.room is None else 0,
    )  # fmt: skip


def _files(run: Driven, upstream: Callable[[int], str | None] | None) -> InFiles:
    """Hidden states in the store, those of the second pass under what they come from."""
    made = {
        "weights": run.fingerprint, "text": run.data, "dtype": str(run.source.model.dtype),
        "batch": run.asked.calibrate.batch,
    }  # fmt: skip

    def key(block: int) -> dict[str, Any] | None:
        if upstream is None:
            return made
        before = upstream(block)
        return None if before is None else {**made, "upstream": before}

    streams = 2 if run.asked.calibrate.paired else 1
    return InFiles(run.store, key, (run.room or 0) // streams)


def streams_of(store: Store) -> Path:
    """Where states of changed models lie while they are measured."""
    return store.directory / "streams"


def forget_states(run: Driven, upstream: Callable[[int], str | None] | None = None) -> None:
    """Remove hidden states that a run left that was killed at its last block, or while it measured changes."""
    if run.windows is not None:
        batches = len(run.windows.split(run.asked.calibrate.batch))
        distributed.barrier()
        # also those leaving the last block, which the dense stream of a second pass comes to
        for block in range(run.structure.count + 1) if distributed.first() else ():
            _files(run, upstream).remove(block, batches)
        if distributed.first():
            clear(streams_of(run.store))
