"""Mixed-rank tuning: LPAF's third step (Ren and Zhu, arXiv 2306.14152), factors beside the weight they came from.

Published (abstract): the factors are tuned with mixed ranks. What that means was not at hand; this is our reading. At
each step and for each matrix z ~ Bernoulli(p) picks which of the two computes, the pruned weight or its factors:

    y = W_s x + bias  if z = 1,     y = left(right(x)) + bias  if z = 0
    p = start · max(0, 1 − step / (share · steps))
    loss = ½ (task(z) + task(z′)) + consistency · ½ (KL(z ‖ z′) + KL(z′ ‖ z)),     z and z′ two draws

So a pair learns beside exact neighbours first, and all pairs alone once `share` of the steps is over, where p is 0 and
one pass is enough; so it is at consistency 0. The zeros of W_s stay. Draws follow from seed, step, matrix and draw: a
resumed run draws the same, and so does every process and every part of an accumulated step.

W_s comes from the dense model beside (`--dense`): the pruned one; one that was not pruned is mixed as it is. Its
biases, and all else of both models, stay as they are. Any format will do: a module's own forward is the low-rank way.

Costs two forward and backward passes a step while p > 0, with the activations of both. Memory beside the model: what
tuning the factors needs, and 17 bytes a weight of a compressed matrix (float32 W_s, its gradient, AdamW's two numbers,
a byte of mask). From p = 0 on W_s has no gradients and does not move, but it is let go of only at the end, since the
optimizer holds it. Recomputed activations (gradient checkpointing) know one draw alone: only with consistency 0.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectrim.core.finetuner import Batch, Finetuner, Session, Wants, finetuner
from spectrim.finetune import factored
from spectrim.finetune.full import Held, Training
from spectrim.finetune.parts import with_rank
from spectrim.model.modules import Format, is_transposed
from spectrim.model.targets import features, oriented

logger = logging.getLogger(__name__)


@finetuner("mixed_rank")
@dataclass(frozen=True)
class MixedRank(Finetuner):
    """Trains the factors with the dense, pruned weight in their place now and then, ever less often.

    start: the chance of the dense weight at first; share: of the steps, until it is 0; consistency: weight of the
    distance between the answers of two draws, 0 for one pass a step.
    """

    start: float = 0.5
    share: float = 0.5
    consistency: float = 1.0
    wants: ClassVar[Wants] = "factors"

    def __post_init__(self) -> None:
        if not 0 < self.start <= 1:
            raise ValueError(
                f"start is {self.start}: the chance of the dense weight is above 0 (that is `full`), at most 1"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}: of the steps with dense weights, above 0 and at most 1")
        if not 0 <= self.consistency < math.inf:
            raise ValueError(f"consistency is {self.consistency}: it must be 0 (one pass a step) or more")

    @property
    def beside(self) -> bool:
        """The pruned model that the compressed one was made of."""
        return True

    @property
    def learning_rate(self) -> float:
        """That of `full`."""
        return 2e-5

    def chance(self, step: int, total: int) -> float:
        """p of a step."""
        return self.start * max(0.0, 1 - step / (self.share * total))

    def begin(self, model: Any, stage: int, generator: torch.Generator, dense: Any = None) -> Session:
        """Put the dense weights beside the factors and let both train.

        Raises ValueError where there is no factor, and where a module of the layout is no linear layer of that shape in
        the dense model.
        """
        with_rank(model)
        beside = {name: _dense(name, module, dense) for name, module in factored.compressed(model).items()}
        held: Held = []
        for _, module, factor, linear in factored.factors(model):
            count = factored.kept_columns(module, factor)
            if count < linear.in_features:
                linear.weight.requires_grad_(True)
                if count:
                    held.append((linear, linear.weight.detach()[:, :count].clone()))
        mixed = {}
        for name, module in factored.compressed(model).items():
            if "nnz" in module.spec():
                module.get_parameter("values").requires_grad_(True)
            like = next(module.parameters(), next(model.parameters()))
            mixed[name] = Mixed(module, beside[name], like)
            model.set_submodule(name, mixed[name])
        full = sum(bool(layer.mask.all()) for layer in mixed.values())
        if full:
            logger.warning("%d of %d matrices of the dense model have no zeros: it was not pruned", full, len(mixed))
        return Mixing(model, held, mixed, self, generator.initial_seed())


def _dense(name: str, module: Format, dense: Any) -> nn.Module:
    """The layer of the dense model that a module replaced."""
    try:
        layer: nn.Module = dense.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the dense model has no module {name!r}, which the layout names: {error}") from error
    if not isinstance(layer, nn.Linear) and not is_transposed(layer):
        raise ValueError(f"module {name!r} of the dense model is a {type(layer).__name__}, not a linear layer")
    if features(layer) != (module.out_features, module.in_features):
        shape = f"{features(layer)} (out × in), in the compressed one {(module.out_features, module.in_features)}"
        raise ValueError(f"module {name!r} of the dense model is {shape}: they are not of one model")
    return layer


class Mixed(nn.Module):
    """A compressed module and the dense weight beside it; `whole` says which computes."""

    mask: Tensor
    bias: Tensor | None

    def __init__(self, factors: Format, layer: nn.Module, like: Tensor) -> None:
        super().__init__()
        weight = oriented(layer, layer.get_parameter("weight").detach())
        weight = weight.to(like.device, like.dtype, copy=True, memory_format=torch.contiguous_format)
        bias = (
            None if layer.bias is None else layer.get_parameter("bias").detach().to(like.device, like.dtype, copy=True)
        )
        self.factors, self.whole = factors, False
        self.weight = nn.Parameter(weight)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("mask", weight != 0, persistent=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y: Tensor = nn.functional.linear(x, self.weight, self.bias) if self.whole else self.factors(x)
        return y


class Mixing(Training):
    """A model whose matrices are now factors, now dense. Outside of a step it is the factors' model."""

    def __init__(self, model: Any, held: Held, mixed: dict[str, Mixed], settings: MixedRank, seed: int) -> None:
        super().__init__(model, held)
        self.mixed, self.settings, self.seed = mixed, settings, seed
        self.chance, self.draws = 0.0, [[False] * len(mixed)] * 2

    def before(self, step: int, total: int) -> None:
        """Draw for this step, twice."""
        self.chance = self.settings.chance(step, total)
        self.draws = [drawn(self.seed, step, draw, len(self.mixed), self.chance) for draw in (0, 1)]

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Of one draw, or of two and the distance of their answers. ValueError for two with recomputed activations."""
        self._choose(self.draws[0])
        first = batch.answer()
        if self.settings.consistency == 0 or self.chance == 0:
            return batch.score(first)
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise ValueError(
                "consistency needs two passes before going backwards, and gradient checkpointing computes the second "
                "alone again: set method.consistency=0 or train.gradient_checkpointing=false"
            )
        self._choose(self.draws[1])
        second = batch.answer()
        task = (batch.score(first) + batch.score(second)) / 2
        return task + self.settings.consistency * batch.distance(first, second)

    def _choose(self, draw: list[bool]) -> None:
        for layer, whole in zip(self.mixed.values(), draw, strict=True):
            layer.whole = whole

    @torch.no_grad()
    def differentiated(self, step: int, total: int) -> None:
        """Clear the gradients of zeros of W_s, and of what else must stay."""
        super().differentiated(step, total)
        self._choose([False] * len(self.mixed))
        for layer in self.mixed.values():
            if layer.weight.grad is not None:
                layer.weight.grad.masked_fill_(~layer.mask, 0)

    @torch.no_grad()
    def moved(self, step: int, total: int) -> None:
        """Put back what must stay, whatever the optimizer did."""
        super().moved(step, total)
        if self.chance > 0:
            for layer in self.mixed.values():
                layer.weight.masked_fill_(~layer.mask, 0)

    def finish(self) -> Any:
        """The factors alone, in their places."""
        model = super().finish()
        for name, layer in self.mixed.items():
            model.set_submodule(name, layer.factors)
        return model


def drawn(seed: int, step: int, draw: int, modules: int, chance: float) -> list[bool]:
    """z of each module: a function of these numbers alone."""
    digest = hashlib.sha256(f"{seed} {step} {draw}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    found: list[bool] = (torch.rand(modules, generator=generator, dtype=torch.float64) < chance).tolist()
    return found
