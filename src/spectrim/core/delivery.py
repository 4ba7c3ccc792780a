"""Tensors that several processes make and the first one takes, one delivery at a time, in an order that all know.

A process makes its next delivery while the first one is busy with those of others, and holds it until it is taken: so
each of them holds one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from spectrim.core import distributed

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
_GO, _STOP = 1, 0


def in_turn(costs: Sequence[float], world: int) -> list[int]:
    """The process that makes each delivery: in their order, each the one with least to do, the first one last.

    What costs nothing the first one does itself.
    """
    loads, owners = [0.0] * world, []
    for cost in costs:
        owner = min(range(world), key=lambda number: (loads[number], -number)) if cost else 0
        owners.append(owner)
        loads[owner] += cost
    return owners


@dataclass
class Delivery:
    """owners: which process makes each delivery."""

    owners: Sequence[int]
    taken: set[int] = field(default_factory=set)

    def take(self, number: int, shapes: Shapes) -> dict[str, Tensor]:
        """The next delivery of its owner; only the first process takes, in order."""
        owner = self.owners[number]
        self.taken.add(number)
        _tell(owner, _GO)
        if _told_by(owner) == _STOP:
            self.taken |= {place for place, other in enumerate(self.owners) if other == owner}
            raise distributed.Lost("another process failed; its own error says why")
        found = {}
        for name, (dtype, shape) in shapes.items():
            made = torch.empty(shape, dtype=dtype)
            if made.numel():
                raw = made.reshape(-1).view(torch.uint8)
                box = distributed.carried(raw)
                with distributed.connected():
                    dist.recv(box, src=owner)
                raw.copy_(box)
            found[name] = made
        return found

    def serve(self, make: Callable[[int], Mapping[str, Tensor]], shapes: Callable[[int], Shapes]) -> None:
        """Make this process's deliveries and give them to the first one, until they are done or it wants no more.

        Raises ValueError when one has not the shapes that were said.
        """
        for number, owner in enumerate(self.owners):
            if owner != distributed.rank():
                continue
            try:
                made, said = make(number), shapes(number)
                if {name: (t.dtype, tuple(t.shape)) for name, t in made.items()} != dict(said):
                    raise ValueError(f"tensors {sorted(made)} are not of the shapes said before")
            except Exception:
                if _told_by(0) == _GO:
                    _tell(0, _STOP)
                raise
            if _told_by(0) == _STOP:
                return
            _tell(0, _GO)
            for name in said:
                raw = made[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                if raw.numel():
                    with distributed.connected():
                        dist.send(distributed.carried(raw), dst=0)
            del made

    def stop(self) -> None:
        """Tell those that still have deliveries that none is wanted: the first process has failed."""
        left = {owner for number, owner in enumerate(self.owners) if number not in self.taken}
        for owner in sorted(left - {0}):
            _tell(owner, _STOP)


def _tell(process: int, what: int) -> None:
    with distributed.connected():
        dist.send(distributed.carried(torch.tensor([what])), dst=process)


def _told_by(process: int) -> int:
    box = distributed.carried(torch.tensor([_STOP]))
    with distributed.connected():
        dist.recv(box, src=process)
    return int(box)
