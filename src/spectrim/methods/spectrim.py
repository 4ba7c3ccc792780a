"""Our own recipe's decomposition: low rank in the model's own second-order metric, on both sides of a matrix.

The loss of a model whose matrices move a little, L = KL(dense ‖ compressed) a token, has no gradient at the dense
point, and its Hessian there is the Fisher information F of the predictions. With K-FAC's F ≈ B ⊗ G,

    L ≈ ½ ‖B^½ (W − W′) G^½‖²,      G = E[x xᵀ] of the inputs,      B = E[g gᵀ] of the gradients at the outputs,

and W′ = B^-½ U_r U_rᵀ B^½ W is its optimum at every rank r, U the eigenvectors of B^½ W G Wᵀ B^½: `linalg.two_sided`.
The scores are its singular values σ, in a common currency for all matrices: ½ Σ_{i ≥ r} σ_i² is predicted in nats a
token. Gradients are those of labels that the model draws itself (`OutputFisher`): with the text's own B would be the
empirical Fisher, which the model's errors bias, and L has no first-order term to approximate.

Sources: K-FAC is Martens and Grosse's (2015); SVD in that metric LEMS's (arXiv 2610.32878), from the text's labels and
by Cholesky. Our own decisions: sampled labels, no inverse of G, the damping's form and default, all tokens alike.

- damping: B ← B + damping · mean(eigenvalues of B) · I. A second-order model holds near the dense point; the more is
  removed, the less one should trust small eigenvalues of B.
- every: B is that of one of so many calibration windows, for it costs as much as all else; G is of all of them.
- sided: "input" takes B = I, for models too large for a backward pass. It streams, its scores are then those of
  whitened SVD, and no currency between matrices. "auto" is "both" where the backward pass fits into memory; a run
  decides that before it begins (`settled`), and its results are known by what was decided.

Costs, both sides: one backward pass over the whole model; B is out × out in float64 for every matrix, all blocks at
once. Two float64 `eigh` of min(out, in) a matrix, out²·in + out·in² multiplications. Both factors are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.calibrate.statistics import Gram, OutputFisher, Statistic, Tokens
from spectrim.core.linalg import damped, directions, two_sided
from spectrim.core.plan import Candidate, Target, Units
from spectrim.core.registry import Decomposer, Statistics, decomposer

logger = logging.getLogger(__name__)


@decomposer("two_sided_svd")
@dataclass(frozen=True)
class TwoSidedSVD(Decomposer):
    """The rank r nearest to W in the metric of its inputs and of the loss at its outputs; see the file's docstring."""

    damping: float = 0.3
    every: int = 4
    sided: Literal["auto", "both", "input"] = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise ValueError(
                f"damping is {self.damping}: a share of the mean eigenvalue, 0 or more; 0.3 is the default"
            )
        if self.every < 1:
            raise ValueError(f"every is {self.every}: B is of one of so many windows, 1 or more; 4 is the default")

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The Gram of the inputs; on both sides also the Fisher information at the outputs, and the tokens' number."""
        return (Gram(),) if self.sided == "input" else (Gram(), Tokens(), self._fisher)

    @property
    def keeps_right(self) -> bool:
        """With a metric of the outputs."""
        return self.sided != "input"

    @property
    def _fisher(self) -> OutputFisher:
        return OutputFisher(self.every)

    def settled(self, backwards: bool) -> Decomposer:
        """With `sided: auto` decided by whether the model can be run backwards."""
        return self if self.sided != "auto" else replace(self, sided="both" if backwards else "input")

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """Rank units of a single-matrix target; errors at its output only where the metric is the Gram alone.

        Raises ValueError where the gradients were not finite, naming the target.
        """
        (part,) = target.parts
        weight, found = weights[part.module], stats[part.module]
        gram = found[Gram()]
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        errors = None
        if self.sided == "input":
            left, energies = directions(weight, gram)
            tensors = {"left": left.to(dtype)}
            errors = energies
            logger.info("%s: one-sided, its outputs all count alike (sided: input)", target.name)
        else:
            left, right, energies = self._both(target, weight, gram, found)
            tensors = {"left": left.to(dtype), "right": right.to(dtype)}
        units = Units("rank", energies.sqrt(), errors, part.out_features + part.in_features)
        return Candidate(target, (units,), lambda: tensors, lambda: weights)

    def _both(
        self, target: Target, weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], found: Statistics
    ) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"], Float[Tensor, "k"]]:
        """The factors, and energies in twice nats a token."""
        fisher = found[self._fisher]
        if not bool(fisher.isfinite().all()):
            raise ValueError(f"{target.name}: Fisher information is not finite, its gradients overflowed")
        tokens = float(found[Tokens()].clamp_min(1))
        left, right, energies = two_sided(weight, gram, damped(fisher, self.damping))
        return left, right, energies / tokens
