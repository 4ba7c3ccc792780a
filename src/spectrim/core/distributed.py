"""Several processes, launched by torchrun; every function works unchanged in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def together() -> bool:
    """Whether there are other processes to work with."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if together() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if together() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's share of a list: every world-th item, from its own number on."""
    return items[rank() :: world()]


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if together():
        dist.all_reduce(tensor)
    return tensor
