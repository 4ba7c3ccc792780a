"""Our own recipes' decompositions: low rank, or single entries, in the model's own second-order metric.

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

Single entries (`two_sided_entries`): by what each would lose if it alone were left out, ½ w_oj² B_oo G_jj, in one
currency too. When a matrix is cut, what stays is chosen again and takes new values, of least loss together
(`core/sparse.py`). With B = I the score is Wanda's, compared within the matrix; SparseGPT (arXiv 2301.00774) fits along
rows alone, once, in a fixed order.

Costs, both sides: one backward pass over the whole model; B is out × out in float64 for every matrix, all blocks at
once. Two float64 `eigh` of min(out, in) a matrix, out²·in + out·in² multiplications. Both factors are kept. Of entries:
no factorisation; each cut (turns + 1) · steps + turns times out²·in + out·in² multiplications. B and G of every matrix
are kept in the work directory beside places and scores.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.calibrate.statistics import Gram, OutputFisher, Statistic, Tokens
from spectrim.core.linalg import damped, directions, two_sided
from spectrim.core.plan import Candidate, Kind, Measured, Part, Target, Tensors, Units
from spectrim.core.registry import Decomposer, Statistics, decomposer
from spectrim.core.sparse import EntryCandidate, alone, best_entries, fitted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TwoSided(Decomposer):
    """What both have: the metric. See the file's docstring."""

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
        return (Gram(),) if self.sided == "input" else (Gram(), Tokens(), self.fisher)

    @property
    def fisher(self) -> OutputFisher:
        return OutputFisher(self.every)

    def settled(self, backwards: bool) -> Decomposer:
        """With `sided: auto` decided by whether the model can be run backwards."""
        return self if self.sided != "auto" else replace(self, sided="both" if backwards else "input")

    def output(self, target: Target, found: Statistics) -> Float[Tensor, "out out"]:
        """B, damped. Raises ValueError where the gradients were not finite, naming the target."""
        fisher = found[self.fisher]
        if not bool(fisher.isfinite().all()):
            raise ValueError(f"{target.name}: Fisher information is not finite, its gradients overflowed")
        return damped(fisher, self.damping)


@decomposer("two_sided_svd")
@dataclass(frozen=True)
class TwoSidedSVD(TwoSided):
    """The rank r nearest to W in the metric of its inputs and of the loss at its outputs; see the file's docstring."""

    @property
    def keeps_right(self) -> bool:
        """With a metric of the outputs."""
        return self.sided != "input"

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
        tokens = float(found[Tokens()].clamp_min(1))
        left, right, energies = two_sided(weight, gram, self.output(target, found))
        return left, right, energies / tokens


@decomposer("two_sided_entries")
@dataclass(frozen=True)
class TwoSidedEntries(TwoSided):
    """The entries that lose least together in that metric, with values fitted to it; see the file's docstring.

    turns: how often entries are chosen again when a matrix is cut; steps: of conjugate gradients after each choice.
    """

    turns: int = 1
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in {"turns": self.turns, "steps": self.steps}.items():
            if value < 0:
                raise ValueError(f"{name} is {value}: give 0 or more")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Entries alone."""
        return ("entry",)

    @property
    def keeps(self) -> tuple[Statistic, ...]:
        """The metric: cutting reads it."""
        return tuple(statistic for statistic in self.needs if statistic != Tokens())

    def cutting(self, part: Part) -> int:
        """Eight arrays of its size in float32, and its metrics in that and in float64."""
        return 32 * part.parameters + 12 * (part.in_features**2 + part.out_features**2)

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """Entry units of a single-matrix target, squares of their scores in twice nats a token.

        Raises ValueError where the gradients were not finite, naming the target, and for scores that are not.
        """
        (part,) = target.parts
        weight, found = weights[part.module], stats[part.module]
        kept = {part.module: {statistic: found[statistic] for statistic in self.keeps}}
        tokens = 1.0 if self.sided == "input" else float(found[Tokens()].clamp_min(1))
        energies = weight.double().square() * alone(*self.metrics(target, found)) / tokens
        scores, places = torch.sort(energies.flatten().sqrt(), descending=True, stable=True)
        if not bool(scores.isfinite().all()):
            raise ValueError(f"scores of {part.module} are not finite: its weight or calibration statistics overflowed")
        small = part.parameters <= torch.iinfo(torch.int32).max
        tensors = {"entries": places.to(torch.int32 if small else torch.int64)}
        units = Units("entry", scores.to(torch.promote_types(weight.dtype, torch.float32)), None, 1)
        return self.restore(target, (units,), lambda: tensors, lambda: weights, lambda: kept)

    def metrics(self, target: Target, found: Statistics) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out out"]]:
        """G and B; B = I on one side, and where no gradient came."""
        gram = found[Gram()].double()
        output = None if self.sided == "input" else self.output(target, found).to(gram.device)
        if output is None or not bool(output.any()):
            output = torch.eye(target.parts[0].out_features, dtype=gram.dtype, device=gram.device)
        return gram, output

    def restore(
        self, target: Target, units: tuple[Units, ...], tensors: Tensors, weights: Tensors, statistics: Measured
    ) -> Candidate:
        """The candidate, which fits its values itself."""
        return FittedCandidate(target, units, tensors, weights, statistics=statistics, method=self)


@dataclass(frozen=True)
class FittedCandidate(EntryCandidate):
    """Entries whose values are fitted to each other when they are cut."""

    method: TwoSidedEntries = field(default_factory=TwoSidedEntries)

    def kept(self, weight: Float[Tensor, "out in"], count: int) -> tuple[Int[Tensor, "count"], Float[Tensor, "count"]]:
        """Places and values of so many entries: the best ones found, or the ones that were learned."""
        (part,) = self.target.parts
        metric, output = (m.to(weight.device) for m in self.method.metrics(self.target, self.statistics()[part.module]))
        if "entries" not in self.learned:
            return best_entries(weight, metric, output, count, self.method.turns, self.method.steps)
        places = self.places(count).to(weight.device)
        kept = torch.zeros_like(weight, dtype=torch.bool).flatten().index_fill(0, places, True).view_as(weight)
        start = torch.where(kept, weight, 0.0)
        return places, fitted(weight, metric, output, kept, start, self.method.steps).flatten()[places]
