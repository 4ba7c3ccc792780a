"""What a training step learns from: the text, a dense model beside it, or both.

Vocabularies are large, and what becomes of logits on the way to a loss is as large as they are, several times: as
float32, as log-probabilities, as gradients of both. So all of it is done for a few tokens at a time, there and back:
of arrays of the logits' size only those are made that the way back needs. What comes of a token is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spectrim.data.instructions import IGNORED

# Logits worked on at a time: few beside a step's activations, many beside what a call costs; more where there would be
# more pieces than these otherwise.
PIECE, PIECES = 2**19, 64


@dataclass(frozen=True)
class Distillation:
    """Learning from a dense model beside, or instead of, the text.

    weight: of KL(dense ‖ tuned) at that temperature, times temperature²; cross entropy has 1 − weight. hidden: weight
    of ‖h − h_dense‖² / ‖h_dense‖², a mean over blocks and over the positions that count.
    """

    weight: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight of the distillation is {self.weight}: it is in [0, 1]; 1: KL alone")
        if not self.temperature > 0 or not self.hidden >= 0:
            raise ValueError(f"temperature ({self.temperature}) must be above 0, hidden ({self.hidden}) not below")


@dataclass
class Micro:
    """Some rows of a step: a `Batch`. count: predictions of the whole step, of all processes."""

    model: nn.Module
    inputs: Mapping[str, Tensor]
    count: Tensor
    teacher: nn.Module | None
    settings: Distillation

    @property
    def wanted(self) -> Int[Tensor, "batch length"]:
        """The token that each position is to predict, IGNORED where none counts. Logits are not cut: they are large."""
        return nn.functional.pad(self.inputs["labels"][:, 1:], (0, 1), value=IGNORED)

    def answer(self) -> Any:
        """Run the model."""
        return self.model(**self._call(self.teacher is not None and self.settings.hidden > 0))

    def _call(self, hidden: bool) -> dict[str, Any]:
        inputs = {name: self.inputs[name] for name in ("input_ids", "attention_mask")}
        return {**inputs, "use_cache": False, "output_hidden_states": hidden}

    def score(self, answer: Any) -> Float[Tensor, ""]:
        """Cross entropy and distillation, as asked."""
        weight = self.settings.weight if self.teacher is not None else 0.0
        loss = answer.logits.new_zeros((), dtype=torch.float32)
        if weight < 1:
            loss = (1 - weight) * cross_entropy(answer.logits, self.wanted) / self.count
        return loss if self.teacher is None else loss + self._taught(answer, weight)

    def _taught(self, answer: Any, weight: float) -> Float[Tensor, ""]:
        assert self.teacher is not None
        with torch.no_grad():
            dense = self.teacher(**self._call(self.settings.hidden > 0))
        heat, counts = self.settings.temperature, self.wanted != IGNORED
        loss = weight * heat**2 * divergence(dense.logits, answer.logits, counts, heat) / self.count
        if self.settings.hidden:
            pairs = zip(answer.hidden_states[1:], dense.hidden_states[1:], strict=True)
            apart = torch.stack([(_relative(state, taught) * counts).sum() for state, taught in pairs])
            loss = loss + self.settings.hidden * apart.mean() / self.count
        return loss

    def distance(self, first: Any, second: Any) -> Float[Tensor, ""]:
        """½ KL(p‖q) + ½ KL(q‖p)."""
        return 0.5 * symmetric_divergence(first.logits, second.logits, self.wanted != IGNORED) / self.count


def cross_entropy(
    logits: Float[Tensor, "batch length vocabulary"], wanted: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """−log p(wanted), summed over the tokens that are not IGNORED; float32."""
    losses = [
        nn.functional.cross_entropy(found.float(), token, ignore_index=IGNORED, reduction="sum")
        for found, token in _pieces(logits, wanted)
    ]
    return torch.stack(losses).sum()


def divergence(
    dense: Float[Tensor, "batch length vocabulary"],
    logits: Float[Tensor, "batch length vocabulary"],
    counts: Tensor,
    heat: float,
) -> Float[Tensor, ""]:
    """KL(dense ‖ logits) at a temperature, summed over the tokens that count; float32."""
    losses = []
    for taught, found, of_these in _pieces(dense, logits, counts):
        p, q = ((each.float() / heat).log_softmax(-1) for each in (taught, found))
        losses.append(((p.exp() * (p - q)).sum(-1) * of_these).sum())
    return torch.stack(losses).sum()


def symmetric_divergence(
    first: Float[Tensor, "batch length vocabulary"], second: Float[Tensor, "batch length vocabulary"], counts: Tensor
) -> Float[Tensor, ""]:
    """KL(p‖q) + KL(q‖p), summed over the tokens that count; float32."""
    losses = []
    for one, other, of_these in _pieces(first, second, counts):
        p, q = (each.float().log_softmax(-1) for each in (one, other))
        losses.append((((p.exp() - q.exp()) * (p - q)).sum(-1) * of_these).sum())
    return torch.stack(losses).sum()


def _pieces(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few tokens of each of these arrays at a time; the first has the vocabulary for its last axis."""
    batch, length, vocabulary = arrays[0].shape
    rows = max(1, PIECE // vocabulary, math.ceil(batch * length / PIECES))
    return zip(*(array.flatten(0, 1).split(rows) for array in arrays), strict=True)


def _relative(
    state: Float[Tensor, "batch length hidden"], dense: Float[Tensor, "batch length hidden"]
) -> Float[Tensor, "batch length"]:
    """‖h − d‖² / ‖d‖² of each position."""
    gap, size = (state.float() - dense.float()).square().sum(-1), dense.float().square().sum(-1)
    return gap / size.clamp_min(torch.finfo(torch.float32).tiny)
