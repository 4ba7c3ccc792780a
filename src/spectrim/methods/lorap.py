"""LoRAP: low rank for attention, channel pruning for the FFN (Li, Tang and Zhang, ICML 2024, arXiv 2404.09695).

Attention: `input_weighted_svd` (svd.py), with ranks by `low_rank_degree`: q and k are closer to low rank than v and o,
so that in every block

    parameters(v + o) : parameters(q + k) = a : 1,    a = 3,

FFN: `channel_prune`. Channel c, made by rows of gate and up and read by a column of down, has the score

    s_c = ‖gate_c ⊙ D‖ + ‖up_c ⊙ D‖ + D′_c ‖down_:c‖,    D_j = ‖x_j‖ over the calibration tokens, D′ the same at down;

the best channels stay, and with them the int(protect · f) least important of all f: what goes is the band above these.
Needs column sums of x²; costs one pass over the weights, memory one float64 copy of one of them.

Deviations. Shares are of the true parameter counts and equal within a pair, so that grouped heads and heads wider than
the hidden size are served too; for square matrices ranks are as published, but for rounding (at most 2 more). A matrix
whose share reaches 1 stays dense, and the surplus raises the common factor of all others. An FFN that is to keep fewer
channels than are protected keeps the best. The published settings take statistics block by block on the compressed
model: a key of the recipe (`calibrate.sequential`), not of these methods. How close a matrix is to low rank is not
measured, as in the public code: a is a constant.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.calibrate.statistics import Norm, Statistic
from spectrim.core import budget
from spectrim.core.plan import Candidate, Choice, Measured, Part, Plan, Target, Tensors, Units
from spectrim.core.registry import Allocator, Decomposer, Problem, Sees, Statistics, allocator, decomposer

logger = logging.getLogger(__name__)

PAIRS = (("v", "o"), ("q", "k"))  # the first gets a times the parameters of the second


# --- FFN: channels ---


@dataclass(frozen=True)
class ChannelCandidate(Candidate):
    """What is possible for an FFN; `protected`: how many of its least important channels stay."""

    protected: int = 0

    def order(self, kind: str, count: int) -> Int[Tensor, "count"]:
        """The channels that stay, in their original order: the protected ones, as far as `count` allows more, the best.

        Raises ValueError for units other than channels, and for more than there are.
        """
        best_first = self.tensors()["order"]
        best_first = best_first[self.learned["order"]] if "order" in self.learned else best_first
        if kind != "channel" or not 0 <= count <= len(best_first):
            raise ValueError(f"{self.target.name} has {len(best_first)} units of kind channel, not {count} of {kind}")
        protected = self.protected if count > self.protected else 0
        worst = best_first[len(best_first) - protected :]
        return torch.cat([best_first[: count - protected], worst]).sort().values

    def cut(self, choice: Choice) -> dict[str, dict[str, Tensor]]:
        """`weight` of every module, its values those of the dense one, and `rows` that stay of the makers."""
        kept, weights = self.order("channel", choice.counts["channel"]), self.weights()
        *makers, reader = self.target.parts
        reads = weights[reader.module]
        cut = {reader.module: {"weight": reads.index_select(1, kept.to(reads.device))}}
        for part in makers:
            halves = range(0, part.out_features, self.target.channels)
            rows = torch.cat([kept + start for start in halves])
            makes = weights[part.module]
            cut[part.module] = {"weight": makes.index_select(0, rows.to(makes.device)), "rows": rows}
        return cut

    def priced(self, format: str, cost: int | Int[Tensor, "n"]) -> Candidate:
        """Itself: channels have no rank to be stored in another format."""
        return self


@decomposer("channel_prune")
@dataclass(frozen=True)
class ChannelPrune(Decomposer):
    """Whole channels of an FFN, ranked by the norms of what makes and what reads them.

    protect: share of the channels, the least important ones, that stay too. score: `activation` weighs weights by the
    norm of the input they meet, `weight` does not.
    """

    protect: float = 0.01
    score: Literal["activation", "weight"] = "activation"

    def __post_init__(self) -> None:
        if not 0 <= self.protect < 1:
            raise ValueError(f"protect is {self.protect}: the share of channels that stay though worst is in [0, 1)")

    @property
    def whole(self) -> bool:
        """Yes: channels are cut through all matrices of an FFN."""
        return True

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Column sums of x², or nothing for the norm of the weights alone."""
        return (Norm(power=2),) if self.score == "activation" else ()

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """Channel units of an FFN. Raises ValueError for any other target."""
        *makers, reader = _checked(target)
        width = target.channels
        scores = self._norms(weights[reader.module].T, 1.0)
        if self.score == "activation":
            scores = scores * stats[reader.module][Norm(power=2)].to(scores).sqrt()
        for part in makers:
            squares = stats[part.module][Norm(power=2)] if self.score == "activation" else 1.0
            for half in weights[part.module].split(width):  # gate and up, where one matrix holds both
                scores = scores + self._norms(half, squares)
        ranked = torch.sort(scores, descending=True, stable=True)
        tensors = {"order": ranked.indices}
        units = Units("channel", ranked.values, None, target.parameters // width)
        return self.restore(target, (units,), lambda: tensors, lambda: weights, dict)

    def _norms(self, weight: Float[Tensor, "rows columns"], squares: Float[Tensor, "columns"] | float) -> Tensor:
        """The norm of each row, entries squared weighed."""
        weight = weight.double()
        return (weight.square() * squares).sum(1).sqrt()

    def restore(
        self, target: Target, units: tuple[Units, ...], tensors: Tensors, weights: Tensors, statistics: Measured
    ) -> Candidate:
        """The candidate, with as many channels protected as the settings say."""
        protected = int(self.protect * target.channels)
        return ChannelCandidate(target, units, tensors, weights, "dense", statistics=statistics, protected=protected)


def _checked(target: Target) -> Sequence[Part]:
    """The parts of an FFN: those that make its channels, then the one that reads them."""
    width = target.channels
    makers = [part.out_features for part in target.parts[:-1]]
    if not budget.is_ffn(target) or sum(makers) not in (width, 2 * width) or any(made % width for made in makers):
        raise ValueError(
            f"channel_prune takes an FFN as a whole (role ffn), given {target.name} of role {target.role}: give its "
            "group `match: ffn`, or another decomposer"
        )
    return target.parts


# --- attention: which pair keeps more ---


@allocator("low_rank_degree")
@dataclass(frozen=True)
class LowRankDegree(Allocator):
    """v and o of every block get `a` times the parameters of q and k, at equal shares within a pair.

    All other matrices, a fused qkv with the whole attention of its block among them, get the common share. multiple:
    units are multiples of it.
    """

    a: float = 3.0
    multiple: int = 1
    needs = ()
    sees: ClassVar[Sees] = "shapes"

    def __post_init__(self) -> None:
        if not 0 < self.a < math.inf:
            raise ValueError(
                f"a is {self.a}: parameters of v and o for each one of q and k, above 0; 3 is as published"
            )
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}: ranks can be rounded to multiples of 1, 8, 16, 64, …")

    @property
    def grain(self) -> int:
        """One step of rank."""
        return self.multiple

    def weights(self, targets: Sequence[Target]) -> dict[str, float]:
        """The share of each target, for a mean of 1 over the attention of a block; 1 where a block has no two pairs."""
        found = {target.name: 1.0 for target in targets}
        for blocks in {target.blocks for target in targets}:
            pairs = [[t for t in targets if t.blocks == blocks and t.role in roles] for roles in PAIRS]
            sizes = [sum(target.parameters for target in pair) for pair in pairs]
            if all(sizes):
                for pair, size, part in zip(pairs, sizes, (self.a / (1 + self.a), 1 / (1 + self.a)), strict=True):
                    found |= {target.name: part * sum(sizes) / size for target in pair}
        return found

    def allocate(self, problem: Problem) -> Plan:
        """See `budget.even_ranks`. Raises ValueError when rank 1 everywhere exceeds the budget."""
        units = budget.even_ranks(
            problem.targets,
            problem.budget,
            problem.format,
            self.multiple,
            weights=self.weights(problem.targets),
            fixed=problem.fixed,
        )
        dense = [t.name for t in problem.targets if t.role in PAIRS[0] and units[t.name] is None]
        if dense and problem.budget < problem.dense:
            logger.info(
                "%d matrices of roles v and o stay dense: a = %g leaves them their whole size", len(dense), self.a
            )
        return budget.rank_plan(problem.targets, units, problem.format, problem.budget, problem.fixed)
