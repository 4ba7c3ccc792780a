"""Hidden states of the calibration batches between two blocks: in memory, or in files as well, so that a run goes on.

In files every state entering a block is there before those entering the block before it go: a run that is killed finds
at least one whole set, and loses a block. Files are mapped, one batch at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.core import distributed
from spectrim.core.store import Store, StoreError

State = Float[Tensor, "batch length hidden"]


@runtime_checkable
class States(Protocol):
    """The states entering a block, by batch, on the CPU; of several processes each has those of its own batches."""

    def first(self, batches: int, latest: int) -> int:
        """The block to start from, `latest` at most: states entering it are there for all `batches`; 0 if for none."""
        ...

    def put(self, block: int, batch: int, state: State) -> None:
        """Take the state of a batch entering a block; that entering the block before it may go."""
        ...

    def get(self, block: int, batch: int) -> State:
        """Give it back, the same bits."""
        ...

    def finished(self, block: int, batches: int) -> None:
        """What was to be made of a block is kept: the states entering it are not wanted again."""
        ...


@dataclass
class InMemory:
    """All in memory, those leaving a block in the place of those entering it: nothing to go on from."""

    held: dict[int, Tensor] = field(default_factory=dict)

    def first(self, batches: int, latest: int) -> int:
        """As in `States`."""
        return 0

    def put(self, block: int, batch: int, state: State) -> None:
        """As in `States`."""
        self.held[batch] = _placed(state, self.held.get(batch))

    def get(self, block: int, batch: int) -> State:
        """As in `States`."""
        return self.held[batch]

    def finished(self, block: int, batches: int) -> None:
        """As in `States`."""


@dataclass
class InFiles:
    """A file a batch in the store; the first ones in memory too, as far as `room` bytes go.

    key: what made the states that enter a block; None for a block of which that is not known yet.
    """

    store: Store
    key: Callable[[int], Mapping[str, Any] | None]
    room: int
    held: dict[int, tuple[int, Tensor]] = field(default_factory=dict)

    def _key(self, block: int, batch: int) -> dict[str, Any]:
        return {**(self.key(block) or {}), "block": block, "batch": batch}

    def _whole(self, block: int, batches: int) -> bool:
        return self.key(block) is not None and all(
            self.store.has("states", self._key(block, batch)) for batch in range(batches)
        )

    def first(self, batches: int, latest: int) -> int:
        """As in `States`; those entering blocks before it go."""
        return distributed.agreed(lambda: self._found(batches, latest))

    def _found(self, batches: int, latest: int) -> int:
        found = next((block for block in range(latest, 0, -1) if self._whole(block, batches)), 0)
        for block in range(found):
            self.remove(block, batches)
        return found

    def put(self, block: int, batch: int, state: State) -> None:
        """As in `States`. Raises StoreError when the disk is full."""
        self.store.save("states", self._key(block, batch), {"state": state})
        others = sum(kept.nbytes for number, (_, kept) in self.held.items() if number != batch)
        known = self.held.pop(batch, (0, None))[1]
        if others + state.nbytes <= self.room:
            self.held[batch] = block, _placed(state, known)

    def get(self, block: int, batch: int) -> State:
        """As in `States`. Raises StoreError for a file that cannot be read."""
        known = self.held.get(batch)
        if known is not None and known[0] == block:
            return known[1]
        # a copy lies where memory made by torch begins: products may round by where their input lies
        return self.store.load("states", self._key(block, batch))["state"].clone()

    def finished(self, block: int, batches: int) -> None:
        """As in `States`; in every process, before they go."""
        distributed.barrier()
        if distributed.first():
            self.remove(block, batches)

    def remove(self, block: int, batches: int) -> None:
        """Remove the states entering a block, as far as they are there."""
        for batch in range(batches if self.key(block) is not None else 0):
            self.store.remove("states", self._key(block, batch))


class Streams:
    """States of many streams, by stream and batch: in memory as far as `room` bytes go, else in files of a folder.

    A context: its files are gone when it is left. None of them is gone on from by another run; `clear` removes those of
    one that was killed.
    """

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room = folder, room
        self.held: dict[tuple[int, int], Tensor] = {}
        self.written: dict[tuple[int, int], tuple[torch.Size, torch.dtype]] = {}
        self._taken = 0

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *exception: object) -> None:
        self.held.clear()
        for stream, batch in self.written:
            with suppress(NotADirectoryError):  # the folder never was one
                self._path(stream, batch).unlink(missing_ok=True)
        with suppress(OSError):  # another process still has files there: the last one to leave removes it
            self.folder.rmdir()

    def _path(self, stream: int, batch: int) -> Path:
        return self.folder / f"{stream}-{batch}"

    def put(self, stream: int, batch: int, state: State) -> None:
        """Take a state, in the place of the one that the stream had. Raises StoreError when the disk is full."""
        key = stream, batch
        known = self.held.get(key)
        if known is None and (key in self.written or self._taken + state.nbytes > self.room):
            self._write(key, state.cpu().contiguous())
            return
        self._taken += 0 if known is not None else state.nbytes
        self.held[key] = _placed(state, known)

    def _write(self, key: tuple[int, int], state: Tensor) -> None:
        path = self._path(*key)
        self.written[key] = state.shape, state.dtype
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            state.view(torch.uint8).numpy().tofile(path)
        except OSError as error:
            raise StoreError(
                f"cannot write {path}: {error}; free some space, give a larger --memory or another directory with "
                "--work, then run again: finished work is kept"
            ) from error

    def get(self, stream: int, batch: int, sequence: int | None = None) -> State:
        """Give a state back, the same bits; sequence: that one alone. Raises StoreError for a file cut short."""
        kept = self.held.get((stream, batch))
        if kept is not None:
            return kept if sequence is None else kept[sequence : sequence + 1].clone()
        shape, dtype = self.written[stream, batch]
        # in memory made by torch: products may round by where their input lies
        found = torch.empty(shape if sequence is None else (1, *shape[1:]), dtype=dtype)
        path = self._path(stream, batch)
        with open(path, "rb") as file:
            file.seek((sequence or 0) * found.nbytes)
            read = file.readinto(found.view(torch.uint8).numpy().data)
        if read != found.nbytes:
            raise StoreError(f"{path} was cut short while it was in use; run again: finished work is kept")
        return found


def clear(folder: Path) -> None:
    """Remove the files that a killed run left of its `Streams`."""
    if folder.is_dir():
        shutil.rmtree(folder)


def _placed(state: State, before: Tensor | None) -> Tensor:
    """The state on the CPU, in the memory of the one before it where it has its shape: new pieces would leave holes."""
    if before is None or before.shape != state.shape or before.dtype != state.dtype:
        return state.cpu().contiguous()
    return before.copy_(state)
