"""Single entries of a matrix in a metric of both its sides: which stay, and what values they then take.

With E = W − S, G of the inputs and B of the outputs, the loss is ½ tr(B E G Eᵀ): entries that are left out move those
that stay, along rows through G and along columns through B. Source: own derivation; which entries stay is iterative
hard thresholding (Blumensath and Davies 2008), with a step of its own for each entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectrim.core.budget import WITH_ENTRIES, rank_cost
from spectrim.core.plan import Candidate, Choice


@dataclass(frozen=True)
class EntryCandidate(Candidate):
    """All entries of one matrix, best first: `entries` of its tensors are their places row · in + column."""

    def first(self, parameters: int) -> Choice:
        """As many entries as there are parameters."""
        return self._of(WITH_ENTRIES[self.format], parameters)

    def settle(self, choice: Choice) -> Choice:
        """A choice of a rank becomes one of as many entries as it has parameters; any other is returned as it is."""
        (part,) = self.target.parts
        format = choice.formats[part.module]
        if format not in WITH_ENTRIES:
            return choice
        return self._of(WITH_ENTRIES[format], rank_cost(format, part, choice.counts["rank"]))

    def _of(self, format: str, parameters: int) -> Choice:
        (part,) = self.target.parts
        return Choice({part.module: format}, {"rank": 0, "entry": max(0, min(parameters, part.parameters))})

    def cut(self, choice: Choice) -> dict[str, dict[str, Tensor]]:
        """`entries` in rising order and their `values`; of a dense choice `weight`.

        Raises ValueError for a choice of ranks: `settle` makes it one of entries.
        """
        (part,) = self.target.parts
        weight = self.weights()[part.module]
        if choice.formats[part.module] == "dense":
            return {part.module: {"weight": weight}}
        if "entry" not in choice.counts or choice.counts["rank"]:
            raise ValueError(f"{part.module} has entries and no rank, but is to be cut to {dict(choice.counts)}")
        places, values = self.kept(weight, choice.counts["entry"])
        return {part.module: {"entries": places, "values": values}}

    def kept(self, weight: Float[Tensor, "out in"], count: int) -> tuple[Int[Tensor, "count"], Float[Tensor, "count"]]:
        """Places and values of so many entries: the best ones, those of the weight."""
        places = self.places(count).to(weight.device)
        return places, weight.flatten()[places]

    def places(self, count: int) -> Int[Tensor, "count"]:
        """The best ones, as they were learned or by score, in rising order."""
        places = self.tensors()["entries"]
        chosen = self.learned["entries"][:count] if "entries" in self.learned else slice(count)
        return places[chosen].long().sort().values


def alone(metric: Float[Tensor, "in in"], output: Float[Tensor, "out out"]) -> Float[Tensor, "out in"]:
    """2 / e² times what the loss rises by when one entry alone is off by e: B_oo G_jj, float64."""
    return output.double().diagonal()[:, None] * metric.double().diagonal()


def best_entries(
    weight: Float[Tensor, "out in"],
    metric: Float[Tensor, "in in"],
    output: Float[Tensor, "out out"],
    count: int,
    turns: int,
    steps: int,
) -> tuple[Int[Tensor, "count"], Float[Tensor, "count"]]:
    """Places row · in + column, rising, and values of `count` entries that lose little together.

    It starts from the entries that would lose most if each alone were left out, with values fitted to each other by
    `steps` of `fitted`. In each of `turns` all entries are then compared by what each is worth beside the others, in
    place for its value, out of place for the value it would take; the best `count` are fitted again. The turn of least
    loss counts. Metrics are symmetric positive semidefinite. A step costs out² · in + out · in² multiplications, in
    float64 for a weight in that, else in float32; memory is eight arrays of the weight's size.
    """
    weight, metric, output = weight.to(_precision(weight)), _scaled(metric, weight), _scaled(output, weight)
    each = alone(metric, output).to(weight.dtype)
    inverse = torch.where(each > 0, 1 / each, 0.0)
    kept = _largest(weight.square() * each, count)
    values = fitted(weight, metric, output, kept, torch.where(kept, weight, 0.0), steps)
    best, least = (kept, values), torch.inf
    for turn in range(turns + 1):
        missed = output @ (weight - values) @ metric
        found = float(((weight - values) * missed).sum(dtype=torch.float64))
        if found < least:
            best, least = (kept, values), found
        if turn == turns:
            break
        after = _largest(torch.where(kept, values, inverse * missed).square() * each, count)
        if bool((after == kept).all()):
            break
        kept, values = after, fitted(weight, metric, output, after, torch.where(after, values, 0.0), steps)
    places = best[0].flatten().nonzero().flatten()
    return places, best[1].flatten()[places]


def fitted(
    weight: Float[Tensor, "out in"],
    metric: Float[Tensor, "in in"],
    output: Float[Tensor, "out out"],
    kept: Bool[Tensor, "out in"],
    start: Float[Tensor, "out in"],
    steps: int,
) -> Float[Tensor, "out in"]:
    """Values at the kept places, 0 elsewhere, of less loss than `start`: so many steps of conjugate gradients.

    Preconditioned by `alone`; in the precision of `best_entries`. The loss does not rise, but for rounding. It ends
    early where nothing is left to gain.
    """
    weight, metric, output = weight.to(_precision(weight)), _scaled(metric, weight), _scaled(output, weight)
    each = torch.where(kept, alone(metric, output).to(weight.dtype), 0.0)
    inverse = torch.where(each > 0, 1 / each, 0.0)
    values, residual = start.to(weight.dtype), (output @ (weight - start) @ metric) * kept
    along = inverse * residual
    gain = first = float((residual * along).sum(dtype=torch.float64))
    for _ in range(steps):
        if not gain > torch.finfo(weight.dtype).eps ** 2 * first:
            break
        seen = (output @ along @ metric) * kept
        step = gain / float((along * seen).sum(dtype=torch.float64))
        values, residual = values + step * along, residual - step * seen
        conditioned = inverse * residual
        after = float((residual * conditioned).sum(dtype=torch.float64))
        along, gain = conditioned + after / gain * along, after
    return values


def _precision(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _scaled(metric: Float[Tensor, "n n"], weight: Tensor) -> Float[Tensor, "n n"]:
    """In the precision of the weight, of diagonal 1 at most: neither loses nor values hang on its size."""
    largest = float(metric.diagonal().max())
    return (metric / largest if largest > 0 else metric).to(_precision(weight))


def _largest(scores: Float[Tensor, "out in"], count: int) -> Bool[Tensor, "out in"]:
    """Where the `count` largest are; of equal ones the first."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[order[:count]] = True
    return kept.view_as(scores)
