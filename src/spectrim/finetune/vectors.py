"""Tuning by two vectors a matrix, which merge into the factors: Bolaco's post-training (arXiv 2405.10616, `vectors`).

Published: with W′ = B A, a slice B′ of columns of B and the same rows A′ of A, both fixed, and two vectors that train,

    y = (B A + diag(b) B′ diag(d) A′) x = (left + diag(b) left[:, S] diag(d) P) right x,

S the slice and P what selects it from the r directions. b starts at 0 and d at 0.1 (public code), so that the tuned
model starts as the compressed one. The right-hand form shows that the vectors merge into `left`, exactly, and that the
rank stays. Paper: a slice of 256, learning rate 2e-3, batches of 64 rows, two epochs of Alpaca; the public code draws
the slice at random.

In the pivot form, ours: by rows left = [I; mix], and only the rows of the mix are moved, so that the base stays as it
is; by columns left is the base beyond its kept columns, and the mix stays. A pivot by rows of full rank has no mix and
is left alone. The slices `first` and `last` are the strongest and the weakest directions of factors as they are
decomposed; the directions of a pivot have no such order. Sparse values, kept columns and dense layers do not train.
The vectors are float32, and the merge is a sum in float32, rounded once.

Needs rows + slice numbers a matrix (rows of left, or of the mix), their gradients and AdamW's state; a step adds a
product of rows × slice a matrix, whose matrix is a copy for the moment of the product. No dense matrix is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spectrim.core.finetuner import Finetuner, Session, Wants, finetuner
from spectrim.finetune import factored
from spectrim.finetune.parts import PIVOTS, with_rank
from spectrim.model.modules import Format

CHOICES = ("random", "first", "last")
START = 0.1


@finetuner("vectors")
@dataclass(frozen=True)
class Vectors(Finetuner):
    """Trains two vectors a matrix. Rank and parameters stay.

    slice: directions that d scales, at most the rank of each matrix; choice: drawn at random, or the first or last.
    """

    slice: int = 256
    choice: Literal["random", "first", "last"] = "random"
    wants: ClassVar[Wants] = "factors"

    def __post_init__(self) -> None:
        if self.slice < 1:
            raise ValueError(f"slice is {self.slice}: it is a number of directions, at least 1")
        if self.choice not in CHOICES:
            raise ValueError(f"choice is {self.choice!r}: it is one of {', '.join(CHOICES)}")

    @property
    def learning_rate(self) -> float:
        """That of the paper."""
        return 2e-3

    def begin(self, model: Any, stage: int, generator: torch.Generator, dense: Any = None) -> Session:
        """Put the vectors in. Raises ValueError where there is no factor that they could merge into."""
        layers: dict[str, Scaled] = {}
        for name, module in with_rank(model).items():
            factor, count = merges_into(module), int(module.spec()["rank"])
            linear = getattr(module, factor)
            if linear is not None:
                chosen = self._chosen(count, generator) + linear.in_features - count
                layers[f"{name}.{factor}"] = Scaled(linear, chosen)
        if not layers:
            raise ValueError(
                "the vectors have nothing to merge into: every matrix of the model is a pivot of full rank, without "
                "a mix; run `spectrim compress` first, at a higher ratio"
            )
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        return Scaling(model, layers)

    def _chosen(self, rank: int, generator: torch.Generator) -> Int[Tensor, "slice"]:
        """The directions of the slice, ascending."""
        count = min(self.slice, rank)
        if self.choice == "random":
            drawn = torch.randperm(rank, generator=generator, device=generator.device)
            return drawn[:count].sort().values
        first = 0 if self.choice == "first" else rank - count
        return torch.arange(first, first + count)


class Scaling(Session):
    """A model with vectors in it."""

    def __init__(self, model: Any, layers: dict[str, Scaled]) -> None:
        super().__init__(model)
        self.layers = layers

    def state(self) -> Mapping[str, Tensor]:
        """The slices: what was drawn."""
        return {name: layer.chosen for name, layer in self.layers.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back the slices."""
        assert state.keys() == self.layers.keys(), sorted(state.keys() ^ self.layers.keys())
        for name, layer in self.layers.items():
            layer.chosen = state[name].to(layer.chosen)

    def finish(self) -> Any:
        """Merge the vectors into the factors and take them out."""
        for name, layer in self.layers.items():
            factored.add(layer.linear.weight, layer.delta())
            self.model.set_submodule(name, layer.linear)
        return self.model


class Scaled(nn.Module):
    """A factor with two vectors: y = F h + b ⊙ (F[:, S] (d ⊙ h_S)), S the chosen of its inputs."""

    chosen: Tensor

    def __init__(self, linear: nn.Linear, chosen: Int[Tensor, "slice"]) -> None:
        super().__init__()
        self.linear, device = linear, linear.weight.device
        self.register_buffer("chosen", chosen.to(device), persistent=False)
        self.outputs = nn.Parameter(torch.zeros(linear.out_features, dtype=torch.float32, device=device))
        self.inputs = nn.Parameter(torch.full((len(chosen),), START, dtype=torch.float32, device=device))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The factor that the vectors would leave."""
        weight = self.linear.weight
        return (weight + self.delta()).to(weight.dtype)

    def delta(self) -> Float[Tensor, "out in"]:
        """What the vectors add to the factor, float32 or better."""
        weight = self.linear.weight
        part = weight.index_select(1, self.chosen) * self.inputs * self.outputs[:, None]
        return torch.zeros_like(weight, dtype=part.dtype).index_copy(1, self.chosen, part)

    def forward(self, h: Tensor) -> Tensor:
        part = h.index_select(-1, self.chosen) * self.inputs.to(h.dtype)
        part = nn.functional.linear(part, self.linear.weight.index_select(1, self.chosen))
        y: Tensor = self.linear(h)
        return y + part * self.outputs.to(part.dtype)


def merges_into(module: Format) -> str:
    """The factor whose last r inputs are the directions, and which the vectors merge into."""
    if module.spec()["format"] not in PIVOTS:
        return "left"
    return "mix" if module.spec().get("side", "rows") == "rows" else "base"
