"""Weights that are low rank + outliers, and CAP's candidates of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.core import budget
from spectrim.core.plan import Choice, Part, Target
from spectrim.methods.cap import RobustPCA, SparseCandidate

FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])
SHAPES = pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=["wide", "tall", "square"])
WEIGHTINGS = pytest.mark.parametrize("weighting", ["none", "rms"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(m: int, n: int) -> Tensor:
    """A falling spectrum, noise, and some large entries."""
    outliers = torch.rand(m, n, generator=torch.Generator().manual_seed(5)) < 0.05
    return 2 * random(m, 4, seed=1) @ random(4, n, seed=2) + random(m, n) + 6 * random(m, n, seed=3) * outliers


def squares(width: int) -> Tensor:
    return random(width, seed=7).exp()


def candidate(weight: Tensor, format: str = "low_rank", name: str = "layer", **settings: Any) -> SparseCandidate:
    target = Target(name, "up", (0,), (Part(name, *weight.shape, "x"),))
    method = RobustPCA(**settings)
    stats = {statistic: squares(weight.shape[1]) for statistic in method.needs}
    made = method.decompose(target, {name: weight}, {name: stats})
    assert isinstance(made, SparseCandidate)
    priced = made.priced(format, budget.unit_cost(format, target.parts[0]))
    assert isinstance(priced, SparseCandidate)
    return priced


def dense(cut: Mapping[str, Tensor]) -> Tensor:
    """The weight that a cut stands for."""
    product = cut["left"].double() @ cut["right"].double()
    product.view(-1)[cut["entries"]] += cut["values"].double()
    return product


def at(format: str, rank: int, entries: int) -> Choice:
    return Choice({"layer": budget.WITH_ENTRIES[format]}, {"rank": rank, "entry": entries})
