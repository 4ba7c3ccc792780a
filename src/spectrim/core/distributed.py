"""Several processes, launched by torchrun; every function works unchanged in one.

Processes never look at the work directory to find out which way to go: one might see what another has just written, go
another way, and wait for ever. The first one looks, and says (`agreed`).
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spectrim.core import launch

T = TypeVar("T")

# How long a process waits for the others: longer than any matrix takes to be decomposed, or a text to be read. One
# that ends is noticed at once, by its connections, so only one that hangs is waited for so long.
TIMEOUT = timedelta(hours=12)


class Lost(RuntimeError):
    """Another process of this run has ended or hangs; its own error says why."""


# --- which process this is ---


def join(device: torch.device) -> bool:
    """Meet the processes that were started together with this one; whether that was done now. The only place where.

    gloo carries what lies in main memory, nccl what lies on GPUs. Raises ValueError as `own`.
    """
    if together() or launch.processes() == 1:
        return False
    backend = "gloo"
    if device.type == "cuda":
        given = _of_this_machine(device)
        if given.index is not None:  # else it is the one that this process sees first
            torch.cuda.set_device(given)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    if backend == "gloo":  # nccl might wait for a process that has died
        atexit.register(_leave)
    return True


def _leave() -> None:
    """Leave the others before the interpreter goes: threads of gloo that outlive it end the process by SIGABRT."""
    if together():
        dist.destroy_process_group()


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """`join`, and leave the others again when all went well."""
    met = join(device)
    yield
    if met:
        dist.destroy_process_group()


def own(device: torch.device) -> torch.device:
    """The device of this process: for `cuda`, without a number, the GPU that is its own on its machine.

    Raises ValueError where the machine has fewer GPUs than processes.
    """
    return _of_this_machine(device) if together() else device


def _of_this_machine(device: torch.device) -> torch.device:
    number = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or device.index is not None or number is None:
        return device
    count = torch.cuda.device_count()
    if int(number) >= count:
        raise ValueError(
            f"process {number} of this machine has no GPU of its own, {count} are seen: start as many processes as "
            f"there are GPUs (torchrun --nproc-per-node {max(1, count)}), or give --device cuda:0 where each sees its "
            "own alone"
        )
    return torch.device("cuda", int(number))


def together() -> bool:
    """Whether there are other processes to work with."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if together() else 0


def first() -> bool:
    """Whether this is the process that writes what all would write alike, and that shows how far they are."""
    return rank() == 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if together() else 1


# --- shares ---


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's share of a list: every world-th item, from its own number on."""
    return items[rank() :: world()]


def portion(count: int, unit: int = 1) -> range:
    """This process's share of `count` things in a row: neighbours, in whole units (the very last may be short)."""
    units = -(-count // unit)
    start, stop = (-(-units * number // world()) * unit for number in (rank(), rank() + 1))
    return range(min(count, start), min(count, stop))


def deal(costs: Sequence[float], before: Sequence[float]) -> list[int]:
    """The process that does each of several things: the most costly first, each to the one with least to do.

    before: what each process has done so far, which decides between equals.
    """
    loads, owners = [0.0] * len(before), [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(len(loads)), key=lambda number: (loads[number], before[number], number))
        owners[item] = owner
        loads[owner] += costs[item]
    return owners


# --- what they say to each other ---


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place: the same bits in each."""
    if together():
        box = carried(tensor)
        with connected():
            dist.all_reduce(box)
        if box is not tensor:
            tensor.copy_(box)
    return tensor


def carried(tensor: Tensor) -> Tensor:
    """The tensor where the backend can take it: a group that was made for GPUs alone takes nothing in main memory."""
    if tensor.is_cuda or "cpu:" in str(dist.get_backend_config()):
        return tensor if tensor.is_contiguous() else tensor.contiguous()
    return tensor.cuda()


@contextmanager
def connected() -> Iterator[None]:
    """Where processes wait for each other: raises Lost when one is gone."""
    try:
        yield
    except RuntimeError as error:
        # without the place in its source, which comes first, and the advice, which comes after
        reason = re.sub(r"^\[\S+\]\s*", "", str(error).strip()).partition("\n")[0].partition(". ")[0]
        raise Lost(
            f"another process ended or does not answer; look for its own error. Finished work is kept ({reason})"
        ) from error


def barrier() -> None:
    """Wait until all processes have come here."""
    gathered(None)


def gathered(value: T) -> list[T]:
    """What each process gives, in their order; anything small that can be pickled."""
    if not together():
        return [value]
    found: list[T] = [value] * world()
    with connected():
        dist.all_gather_object(found, value)
    return found


def agreed(make: Callable[[], T]) -> T:
    """What the first process makes, in all; where it fails there, the others raise Lost."""
    if not together():
        return make()
    box: list[tuple[T] | None] = [None]
    try:
        if first():
            box = [(make(),)]
    except Exception:
        _from_first(box)
        raise
    _from_first(box)
    (made,) = box
    if made is None:
        raise Lost("the first process failed; its own error says why")
    return made[0]


def _from_first(box: list[tuple[T] | None]) -> None:
    with connected():
        dist.broadcast_object_list(box, src=0)


@contextmanager
def alike() -> Iterator[None]:
    """What every process does by itself: if it fails in one, all end, each with its own error, or else with Lost.

    An error that several have is raised in the first of them alone.
    """
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if said in gathered(said)[: rank()]:
            raise Lost("another process failed in the same way; its own error says why") from error
        raise
    if any(said is not None for said in gathered(None)):
        raise Lost("another process failed; its own error says why")


def same(values: Mapping[str, str]) -> None:
    """Raise ValueError, naming what, where processes were not given the same."""
    every = gathered(dict(values))
    different = [name for name in values if any(each[name] != values[name] for each in every)]
    if different:
        raise ValueError(f"processes of one run differ in {', '.join(different)}: give all of them the same")


def cut_by(
    owner: int | None, make: Callable[[], Mapping[str, Mapping[str, Tensor]]]
) -> Mapping[str, Mapping[str, Tensor]]:
    """What one process makes, tensors by module and name, in all of them, in main memory; owner None: made by each."""
    if owner is None or world() == 1:
        return make()
    made: Mapping[str, Mapping[str, Tensor]] = make() if rank() == owner else {}
    shapes = {module: {name: (t.shape, t.dtype) for name, t in tensors.items()} for module, tensors in made.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for module, tensors in gathered(shapes)[owner].items():
        for name, (shape, dtype) in tensors.items():
            box = carried(made[module][name].cpu() if rank() == owner else torch.empty(shape, dtype=dtype))
            if box.numel():
                with connected():
                    dist.broadcast(box, src=owner)
            found.setdefault(module, {})[name] = box.cpu()
    return found
