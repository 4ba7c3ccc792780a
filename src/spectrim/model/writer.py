"""Write safetensors shards a tensor at a time: the header first, then each tensor at its place, as it is made."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from spectrim.core import distributed, heap, lock
from spectrim.core.delivery import Delivery, in_turn
from spectrim.core.store import StoreError
from spectrim.model.files import DTYPES

logger = logging.getLogger(__name__)

NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# In `.NAME.xxxxxxxx.partial`, beside `out` while it is written: the new directory, the one it replaces, and a lock.
_PARTIAL, _NEW, _OLD = ".partial", "new", "old"
_TRIES = 5


@dataclass(frozen=True)
class Item:
    """Tensors that are made together: name → (dtype, shape), known before `make` gives their values."""

    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def bytes(self) -> int:
        """Size of all its tensors."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.shapes.values())


def write_shards(
    directory: Path, items: Sequence[Item], shard_bytes: int, progress: Callable[[int, int], None]
) -> list[Path]:
    """Write `items` as one file or, above `shard_bytes`, as shards with an index. Memory: one item at a time.

    Raises ValueError when an item does not give what it said it would.
    """
    shards = _split(items, shard_bytes)
    total = sum(item.bytes for item in items)
    files, done, weight_map = [], 0, {}
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({key: name for item in shard for key in item.shapes})
        for size in _write_file(directory / name, shard):
            done += size
            progress(done, total)
        files.append(directory / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return files


@contextmanager
def delivered(items: Sequence[Item], costs: Sequence[float]) -> Iterator[list[Item]]:
    """The items, with those of some cost made by several processes; to be written in order, in the first one.

    The other processes make their share here, and are done after.
    """
    if distributed.world() == 1:
        yield list(items)
        return
    delivery = Delivery(in_turn(costs, distributed.world()))
    if not distributed.first():
        delivery.serve(lambda number: items[number].make(), lambda number: items[number].shapes)
        yield []
        return
    try:
        yield [
            item if owner == 0 else Item(item.shapes, partial(delivery.take, number, item.shapes))
            for number, (item, owner) in enumerate(zip(items, delivery.owners, strict=True))
        ]
    except Exception:
        delivery.stop()
        raise


def _split(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        if shards[-1] and filled + item.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.bytes
    return shards


def file_bytes(items: Sequence[Item], shard_bytes: int) -> int:
    """Bytes of the files that `write_shards` makes of them, headers included."""
    return sum(_head(shard)[2] for shard in _split(items, shard_bytes))


def _head(items: Sequence[Item]) -> tuple[bytes, dict[str, int], int]:
    """How a file of these items begins, where each tensor starts in it, and how long it is."""
    shapes = {name: shape for item in items for name, shape in item.shapes.items()}
    # wide dtypes first, so that every tensor starts at a multiple of its element size
    order = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for name in order:
        dtype, shape = shapes[name]
        starts[name] = position
        position += dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], position]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    head = len(encoded).to_bytes(8, "little") + encoded
    return head, {name: len(head) + start for name, start in starts.items()}, len(head) + position


def _write_file(path: Path, items: Sequence[Item]) -> Iterator[int]:
    head, places, size = _head(items)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)
        for item in items:
            _write_item(file, item, {name: places[name] for name in item.shapes})
            if item.bytes >= heap.LARGE:
                heap.give_back()  # what it was made of lies freed
            yield item.bytes
        file.flush()
        os.fsync(file.fileno())


def _write_item(file: BinaryIO, item: Item, places: Mapping[str, int]) -> None:
    """Make an item's tensors and write them; a function, so that none of them lives while the next item is made."""
    made = item.make()
    if {name: (t.dtype, tuple(t.shape)) for name, t in made.items()} != dict(item.shapes):
        raise ValueError(f"{Path(file.name).name}: tensors {sorted(made)} are not of the shapes said before")
    for name, tensor in made.items():
        file.seek(places[name])
        # reshape(-1).view(uint8): the bytes as they lie in memory, for bfloat16 too, which numpy lacks
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def new_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its place when all went well, and vanishes when not.

    Raises ValueError when `out` exists and is not empty, unless `overwrite`: then it is replaced at the very end. For
    a disk that is full or read-only, OSError says what to do. What a killed process leaves, `settle` sees to.
    """
    refuse_filled(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        place = _place(out, stack)
        new, old = place / _NEW, place / _OLD
        new.mkdir()
        with _room(out):
            yield new
        new.chmod(0o755)
        if out.exists():
            out.rename(old)
        new.rename(out)


def _place(out: Path, stack: ExitStack) -> Path:
    """A directory beside `out`, removed with what is in it when the stack ends, and locked until then.

    The lock tells what is being written from what a killed process left, also of another machine.
    """
    for tries in range(_TRIES):
        place = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=_PARTIAL))
        try:
            stack.enter_context(lock.held(place, "--out"))
        except StoreError:  # another run into `out` starts at this moment, took it for a leftover and removes it
            if tries + 1 == _TRIES:
                raise
            continue
        stack.callback(_clear, place, out)
        break
    return place


def _clear(place: Path, out: Path) -> None:
    """Put the directory that was moved away from `out` back unless another is there, and remove all else beside it.

    Where that fails nothing is lost, and the next run tries again.
    """
    try:
        if (place / _OLD).exists() and not out.exists():
            (place / _OLD).rename(out)
        shutil.rmtree(place)
    except OSError as error:
        logger.warning("%s, what was written for %s or replaced by it, cannot be put away: %s", place, out, error)


def settle(out: Path) -> None:
    """Tidy up after killed processes that wrote into `out`: what they had moved away goes back, what they made goes.

    What a living process writes is locked and left alone, and so is all where the file system has no locks.
    """
    own = re.compile(re.escape(f".{out.name}.") + r"[a-z0-9_]{8}" + re.escape(_PARTIAL))
    for place in sorted(out.parent.glob(f".*{_PARTIAL}")):
        if not own.fullmatch(place.name):
            continue
        if not (place / lock.NAME).exists():
            # empty: left, or not locked yet, which makes it again; with something in it: no locks here
            with suppress(OSError):
                place.rmdir()
            continue
        with suppress(StoreError), lock.held(place, "--out") as alone:
            if alone:
                _clear(place, out)


def refuse_filled(out: Path, overwrite: bool) -> None:
    """Raise ValueError if `out` is a file, or holds something and `overwrite` is not set; OSError if it cannot be made.

    That is tried: permissions alone do not tell of a read-only or full disk. What killed runs left is seen to before.
    """
    settle(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a directory")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} is not empty; nothing was changed. Give another --out, or --overwrite to replace it")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=above, prefix=f".{out.name}."))
    except OSError as error:
        reason = f"cannot write {out}: {error.strerror} ({above}); give another directory with --out"
        raise OSError(error.errno, reason) from error


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """A failure to write said in full: the system's own words name no file, and not what is left."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        advice = "free some space or give another --out, then run again: finished work is kept"
        raise OSError(error.errno, f"cannot write {out}: {error.strerror}; {advice}") from error
