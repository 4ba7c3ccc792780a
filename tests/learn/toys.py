"""Tiny models in memory with a candidate for each of their matrices: what the tests of training start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectrim.core import budget
from spectrim.core.plan import Candidate, Part, Target, Units
from spectrim.core.registry import Problem
from spectrim.learn.gates import Gates
from spectrim.methods.svd import PlainSVD
from spectrim.model import targets
from spectrim.model.checkpoint import Checkpoint, LiveModel
from spectrim.model.live import Installed
from tests.families import FAMILIES, VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS = torch.randint(1, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))


@dataclass
class Setting:
    """A model, how an allocator sees it, and its matrices with their candidates."""

    model: PreTrainedModel
    live: Installed
    candidates: dict[str, Candidate]
    format: str = "low_rank"

    @property
    def targets(self) -> list[Target]:
        """All matrices."""
        return [candidate.target for candidate in self.candidates.values()]

    def gates(self) -> Gates:
        """Gates at all of them."""
        return Gates(self.live, self.candidates, self.format)

    def problem(self, ratio: float, seed: int = 0, **more: Any) -> Problem:
        """A budget over all of them."""
        allowed, draw = budget.allowed(self.targets, ratio), torch.Generator().manual_seed(seed)
        return Problem(self.targets, allowed, self.format, draw, candidates=self.candidates, live=self.live, **more)

    def state(self) -> dict[str, Tensor]:
        """A copy of all parameters."""
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def logits(self, ids: Tensor = WINDOWS) -> Tensor:
        """Of the model with what is in it."""
        with torch.no_grad():
            return self.live.answer(ids)


def setting(
    family: str = "llama",
    format: str = "low_rank",
    checkpoint: Path | None = None,
    match: Sequence[str] = (),
    **changes: Any,
) -> Setting:
    """A model of a family, or of the directory `checkpoint`; the matrices whose names end as `match` says (all)."""
    if checkpoint is None:
        model = FAMILIES[family].make(**changes)
        source: LiveModel | Checkpoint = LiveModel(model)
    else:
        source = Checkpoint(checkpoint, torch.float32)
        model = source.whole(torch.device("cpu"))
    structure = targets.find(model)
    candidates = {
        target.name: decomposed(target, reader(source, target), format)
        for target in structure.targets
        if not match or target.name.endswith(tuple(match))
    }
    return Setting(model, Installed(model, structure, candidates, WINDOWS, 2), candidates, format)


def reader(source: LiveModel | Checkpoint, target: Target) -> Callable[[], Mapping[str, Tensor]]:
    """Reads a target's matrices when asked, out × in."""

    def read() -> dict[str, Tensor]:
        return {
            part.module: targets.oriented(source.model.get_submodule(part.module), source.read(f"{part.module}.weight"))
            for part in target.parts
        }

    return read


def decomposed(target: Target, weights: Callable[[], Mapping[str, Tensor]], format: str = "low_rank") -> Candidate:
    """By plain SVD, with weights that are read again whenever they are asked for."""
    (part,) = target.parts
    made = PlainSVD().decompose(target, weights(), {part.module: {}})
    return replace(made, weights=weights).priced(format, budget.unit_cost(format, part))


def uniform(count: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> Tensor:
    """Numbers between two bounds."""
    return low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed))


def layer(m: int, n: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    """Random, in float64."""
    torch.manual_seed(seed)
    return nn.Linear(n, m, bias).double()


def sparse_candidate(dense: nn.Linear) -> tuple[Candidate, Tensor, Tensor]:
    """W = L + S with S of five entries, given out of order; L has rank units of its own."""
    m, n = dense.weight.shape
    target = Target("layer", "up", (0,), (Part("layer", m, n, "x", True),))
    entries = torch.tensor([3, m * n - 1, 0, 17, 8], dtype=torch.int32)
    values = torch.tensor([2.0, -1.0, 3.0, 0.5, -4.0], dtype=torch.float64)
    sparse = torch.zeros(m * n, dtype=torch.float64)
    sparse[entries.long()] = values
    low = dense.weight.detach() - sparse.view(m, n)
    u, s, v = torch.linalg.svd(low, full_matrices=False)
    tensors = {"left": u, "right": s[:, None] * v, "entries": entries, "values": values}
    of_ranks = Units("rank", s, None, m + n)
    of_entries = Units("entry", values.abs(), None, 1)
    made = Candidate(target, (of_ranks, of_entries), lambda: tensors, lambda: {"layer": dense.weight.detach()})
    return made, u * s, v
