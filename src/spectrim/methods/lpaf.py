"""Low rank of a pruned weight, weighted by what survived: LPAF's second step (Ren and Zhu, arXiv 2306.14152).

    d_j² = Σ_o I_oj M_oj + eps,     min ‖(W_s − W′) diag(d)‖²   over W′ of rank r,     M = (W_s ≠ 0)

I is the importance of each weight and M its mask: an input counts by its surviving weights alone. W′ = U_r U_rᵀ W_s, U
the eigenvectors of W_s diag(d²) W_sᵀ: `linalg.directions`. An input whose weights are all pruned has no part in it, and
its column of right is 0. The first step is `spectrim finetune --method prune`, the third `--method mixed_rank`.

The abstract and an appendix were at hand: a sparsity-aware SVD after first-order pruning. What I is they do not say; a
later paper (Bolaco's) calls it Fisher-weighted. So `fisher` is the default, and two more are offered:

| weights | I_oj | cost |
| --- | --- | --- |
| fisher | Σ over sequences of (∂loss/∂W_oj)² | a backward pass, 4 bytes a weight while it calibrates |
| taylor | Σ over sequences of abs(W_oj · ∂loss/∂W_oj), what pruning goes by | the same |
| nnz | 1, so that d_j² counts survivors | nothing |

Measured again on the pruned model, not taken over from the pruning: a checkpoint does not hold it. On a model that was
not pruned, `fisher` is FWSVD. eps is 1e-6 of the mean and the ratio of two d is capped, as for FWSVD. One float64
`eigh` of min(out, in) a matrix, out·in² + out²·in multiplications to form it. The factors are dense.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.calibrate.statistics import Fisher, State, Statistic
from spectrim.core.linalg import directions
from spectrim.core.plan import Candidate, Target, Units
from spectrim.core.registry import Decomposer, Statistics, decomposer
from spectrim.core.weighted import floored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GradientSize(Statistic):
    """Σ over sequences of |∂loss/∂W| for each entry of a weight, out × in, float32: 4 bytes an entry.

    Added in float64 and rounded once a sequence. The loss is that of `Fisher`. Times |W| it is the sum of what pruning
    the weight changes in the losses to first order, each without its sign.
    """

    where = "gradient"

    def start(self, width: int, device: torch.device) -> State:
        """No rows: how many there are the first gradient says."""
        return {"sum": torch.zeros(0, width, dtype=torch.float32, device=device)}

    def update(self, state: State, *values: Float[Tensor, "out in"]) -> None:
        """Add one sequence's gradient."""
        sizes = values[0].double().abs()
        if len(state["sum"]) == 0:
            state["sum"] = sizes.new_zeros(sizes.shape, dtype=torch.float32)
        state["sum"] += sizes


@decomposer("sparsity_aware_svd")
@dataclass(frozen=True)
class SparsityAwareSVD(Decomposer):
    """SVD of W_s diag(d), d_j² the importance of the weights of input j that are not 0.

    weights: what importance is; largest_spread: the cap on the ratio of two d.
    """

    weights: Literal["fisher", "taylor", "nnz"] = "fisher"
    largest_spread: float = 1e4

    def __post_init__(self) -> None:
        if not self.largest_spread >= 1:
            raise ValueError(f"largest_spread is {self.largest_spread}: the cap on their ratio cannot be below 1")

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Squared gradients or their sizes, by entry; nothing to count survivors."""
        return {"fisher": (Fisher(),), "taylor": (GradientSize(),), "nnz": ()}[self.weights]

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """Rank units of a single-matrix target: scores are singular values of W_s diag(d).

        Raises ValueError where the gradients were not finite, naming the target.
        """
        (part,) = target.parts
        weight = weights[part.module]
        importance = self._importance(weight, stats[part.module])
        if not bool(importance.isfinite().all()):
            raise ValueError(f"{target.name}: importance is not finite, its gradients overflowed")
        left, energies = directions(weight, metric(weight, importance, self.largest_spread))
        logger.debug("%s: %d of %d weights are not 0", target.name, int((weight != 0).sum()), weight.numel())
        tensors = {"left": left.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)}
        units = Units("rank", energies.sqrt(), None, part.out_features + part.in_features)
        return Candidate(target, (units,), lambda: tensors, lambda: weights)

    def _importance(self, weight: Float[Tensor, "out in"], stats: Statistics) -> Float[Tensor, "out in"]:
        """I, without the mask."""
        if self.weights == "fisher":
            return stats[Fisher()]
        if self.weights == "taylor":
            return weight.abs() * stats[GradientSize()]
        return torch.ones_like(weight, dtype=torch.float32)


def metric(
    weight: Float[Tensor, "out in"], importance: Float[Tensor, "out in"], largest_spread: float
) -> Float[Tensor, "in"]:
    """d² of each input, floored over the inputs that have weights left; 0 for the others, which do not count.

    All equal where no importance survived, as in plain SVD.
    """
    alive = weight != 0
    sums = torch.where(alive, importance, 0).sum(0, dtype=torch.float64)
    found, left = torch.zeros_like(sums), alive.any(0)
    if bool(left.any()):
        largest = sums.max()
        found[left] = floored(sums[left], largest_spread) * torch.where(largest > 0, largest, 1.0)
    return found
