"""What the store keeps of candidates, and of a training that is under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from spectrim.core import budget, distributed
from spectrim.core.plan import Candidate, Kind, Units
from spectrim.core.store import Store


def packed(candidate: Candidate, format: str | None) -> dict[str, Tensor]:
    """A candidate's tensors and its units in their order; factors as far as `format` can use them (None: whole)."""
    tensors, target = dict(candidate.tensors()), candidate.target
    for i, units in enumerate(candidate.units):
        if units.kind == "rank" and format is not None:
            largest = budget.largest_rank(format, target.parts[0])
            tensors["left"] = tensors["left"][:, :largest]
            if "right" in tensors:
                tensors["right"] = tensors["right"][:largest]
        tensors[f"units.{i}.{units.kind}.scores"] = units.scores
        tensors[f"units.{i}.{units.kind}.cost"] = torch.as_tensor(units.cost)
        if units.errors is not None:
            tensors[f"units.{i}.{units.kind}.errors"] = units.errors
    return tensors


def unpacked_units(stored: Mapping[str, Tensor]) -> tuple[Units, ...]:
    """Units in their order, of tensors named `units.<place>.<kind>.<what>`."""
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        _, place, kind, what = name.split(".")
        found.setdefault((int(place), kind), {})[what] = tensor
    made = []
    for (_, kind), values in sorted(found.items()):
        cost = values["cost"]
        whole: int | Tensor = int(cost) if cost.ndim == 0 else cost
        made.append(Units(cast(Kind, kind), values["scores"], values.get("errors"), whole))
    return tuple(made)


@dataclass(frozen=True)
class StoreSlot:
    """`core.registry.Slot` in the store; of several processes the first one writes."""

    store: Store
    kind: str
    key: Mapping[str, Any]

    def load(self) -> Mapping[str, Tensor] | None:
        """The state, None where there is none."""
        found = distributed.agreed(lambda: self.store.has(self.kind, self.key))
        if not found:
            return None
        state = self.store.load(self.kind, self.key)
        distributed.barrier()  # it may be replaced or removed from now on
        return state

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state, at once or not at all."""
        if distributed.first():
            self.store.save(self.kind, self.key, state)

    def clear(self) -> None:
        """Remove it: the training is done."""
        if distributed.first():
            self.store.remove(self.kind, self.key)
