"""First-order pruning while tuning: LPAF's first step (Ren and Zhu, arXiv 2306.14152), a dense model with zeros.

Published (abstract and appendix): unstructured pruning by gradients while a model is tuned leaves matrices that are not
only sparse but of low rank too, so that factors lose little; other ways of pruning do not. The details here follow what
is usual for such pruning, and are ours:

    I = |W · ∂loss/∂W|,     Ī ← smoothing · Ī + (1 − smoothing) · I     at every step
    v(t) = density + (1 − density) (1 − (t − t₀) / (t₁ − t₀))³,   1 before t₀, density from t₁ on

After move t the share v(t) of the weights with the largest Ī stays, the others are set to 0; t counts moves, t₀ is
`warm` and T − t₁ is `cool` of all T of them. From t₁ on the mask is fixed, and what is left trains on. Of equal Ī the
first stays. `frozen`: the gradient of a pruned weight is cleared and it stays pruned, the masks are nested. Else it has
a gradient until t₁, and a value from the optimizer's move to the next cut; I is taken there, of that value, so that it
may come back.

All weights of the linear layers of the blocks train, and are pruned. Needs, beside dense training (weights, gradients,
AdamW's two numbers), Ī in float32 and a mask, 5 bytes a weight, until t₁, 1 byte from there; both are in a checkpoint.
Finding the cut costs two passes over all Ī at each step between t₀ and t₁, and one matrix of int32 at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spectrim.core.finetuner import Finetuner, Session, Wants, finetuner
from spectrim.finetune import factored
from spectrim.finetune.full import norms

logger = logging.getLogger(__name__)

DIGIT = 16  # bits of a key that are counted at once


@finetuner("prune")
@dataclass(frozen=True)
class Prune(Finetuner):
    """Tunes a dense model and sets the weights that matter least to 0.

    density: share of the weights that stays; scope: which are compared, those of the whole model (global) or of each
    matrix; smoothing: share of the old importance in the new; warm, cool: shares of the steps before the first pruning
    and after the last; frozen: what is pruned stays so; bias: biases of the layers train too; norms: those train too.
    """

    density: float = 0.4
    scope: Literal["global", "matrix"] = "global"
    smoothing: float = 0.85
    warm: float = 0.1
    cool: float = 0.3
    frozen: bool = True
    bias: bool = False
    norms: bool = False
    wants: ClassVar[Wants] = "dense"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}: the share of the weights that stays is above 0, at most 1")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}: the share of the old importance is in [0, 1)")
        for name, share in (("warm", self.warm), ("cool", self.cool)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} is {share}: a share of the steps is in [0, 1)")
        if not self.warm + self.cool < 1:
            raise ValueError(f"warm ({self.warm}) and cool ({self.cool}) leave no steps to prune in")

    @property
    def learning_rate(self) -> float:
        """What is usual where every weight trains."""
        return 2e-5

    def last(self, total: int) -> int:
        """t₁: after how many of `total` moves the mask is final; at least 1."""
        return max(1, total - round(self.cool * total))

    def share(self, moves: int, total: int) -> float:
        """v(t), the share of the weights kept after that many of `total` moves."""
        first, last = min(round(self.warm * total), self.last(total) - 1), self.last(total)
        left = 1 - min(1.0, max(0.0, (moves - first) / (last - first)))
        return self.density + (1 - self.density) * left**3

    def begin(self, model: Any, stage: int, generator: torch.Generator, dense: Any = None) -> Session:
        """Let the weights train. Raises ValueError where the blocks have no linear layer."""
        layers = factored.dense_layers(model)
        if not layers:
            raise ValueError("the model's blocks have no linear layers whose weights could be pruned")
        biases = (layer.bias for layer in layers.values() if self.bias and isinstance(layer.bias, nn.Parameter))
        for parameter in chain(
            (layer.get_parameter("weight") for layer in layers.values()), biases, norms(model) if self.norms else ()
        ):
            parameter.requires_grad_(True)
        return Pruning(model, layers, self)


class Pruning(Session):
    """A dense model that becomes sparse."""

    def __init__(self, model: Any, layers: Mapping[str, nn.Module], settings: Prune) -> None:
        super().__init__(model)
        self.layers, self.settings = dict(layers), settings
        shapes = {name: weight.shape for name, weight in self._weights()}
        places = {name: weight.device for name, weight in self._weights()}
        self.importance = {name: torch.zeros(shape, device=places[name]) for name, shape in shapes.items()}
        self.masks = {name: torch.ones(shape, dtype=torch.bool, device=places[name]) for name, shape in shapes.items()}

    @torch.no_grad()
    def differentiated(self, step: int, total: int) -> None:
        """Clear the gradients of what is pruned for good, and take the importance of this step."""
        if self.settings.frozen or not self.importance:
            for name, weight in self._weights():
                if weight.grad is not None:
                    weight.grad.masked_fill_(~self.masks[name], 0)
        if self.settings.frozen and self.importance:
            self._smooth(step)

    def _smooth(self, step: int) -> None:
        """Smooth the importance with that of weights and gradients as they are now."""
        gradients = {name: weight.grad for name, weight in self._weights() if weight.grad is not None}
        if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            # scaled float16 gradients overflow now and then, and the optimizer leaves such a step out
            logger.warning("gradients of step %d are not finite: importance stays as it was", step + 1)
            return
        for name, weight in self._weights():
            mean = self.importance[name].mul_(self.settings.smoothing)
            if name in gradients:
                mean.add_((weight.float() * gradients[name].float()).abs(), alpha=1 - self.settings.smoothing)

    @torch.no_grad()
    def moved(self, step: int, total: int) -> None:
        """Prune to the share of the schedule, and set what is pruned to 0."""
        if self.importance and not self.settings.frozen:
            self._smooth(step)
        if self.importance:
            share = self.settings.share(step + 1, total)
            groups = [[name] for name in self.masks] if self.settings.scope == "matrix" else [list(self.masks)]
            if share < 1:
                for group in groups:
                    self._prune(group, share)
            logger.debug("step %d: %.4f of the weights kept", step + 1, share)
            if step + 1 >= self.settings.last(total):
                self.importance = {}
        self._clear()

    def _prune(self, group: list[str], share: float) -> None:
        """Let the share of a group's weights with the largest importance stay."""
        keep = round(share * sum(self.masks[name].numel() for name in group))
        alive = self.masks if self.settings.frozen else {}

        def keys(name: str) -> Int[Tensor, "_ _"]:
            return ordered(self.importance[name], alive.get(name))

        above, equal = cut(lambda: (keys(name) for name in group), keep)
        for name in group:
            found = keys(name)
            ties = (found == above).flatten()
            first = ties & (ties.cumsum(0) <= equal)
            equal -= int(first.sum())
            self.masks[name] = (found > above) | first.view(found.shape)

    @torch.no_grad()
    def _clear(self) -> None:
        for name, weight in self._weights():
            weight.masked_fill_(~self.masks[name], 0)

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.layers.items():
            yield name, layer.get_parameter("weight")

    def state(self) -> Mapping[str, Tensor]:
        """Masks, and importances until the masks are final."""
        masks = {f"mask.{name}": mask for name, mask in self.masks.items()}
        return masks | {f"importance.{name}": mean for name, mean in self.importance.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        wanted = self.state().keys()
        assert wanted >= state.keys() >= {f"mask.{name}" for name in self.masks}, sorted(wanted ^ state.keys())
        self.masks = {name: state[f"mask.{name}"].to(mask.device) for name, mask in self.masks.items()}
        self.importance = {
            name: state[f"importance.{name}"].to(mean.device)
            for name, mean in self.importance.items()
            if f"importance.{name}" in state
        }

    def finish(self) -> Any:
        """The model itself, frozen, its pruned weights exactly 0."""
        self._clear()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        shares = {name: float(mask.float().mean()) for name, mask in self.masks.items()}
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        logger.info(
            "%d of %d weights kept in %d matrices, from %.3f to %.3f of each",
            kept, sum(mask.numel() for mask in self.masks.values()), len(shares), min(shares.values()),
            max(shares.values()),
        )  # fmt: skip
        return self.model


def ordered(importance: Float[Tensor, "_ _"], alive: Bool[Tensor, "_ _"] | None) -> Int[Tensor, "_ _"]:
    """int32 in the order of importances, which are not negative; 0 for what is not alive, more for all else."""
    keys = importance.view(torch.int32) + 1  # the bits of floats that are not negative rise with them
    return keys if alive is None else keys.mul_(alive)


def cut(keys: Callable[[], Iterator[Int[Tensor, "_ _"]]], keep: int) -> tuple[int, int]:
    """(key, ties): those above the key and so many of those that equal it are `keep` in all. Exact, without a sort.

    Half of the bits are counted at a time, over all tensors, so that no more than one of them is needed at once.
    """
    found, left = 0, keep
    for shift in (DIGIT, 0):
        counts = torch.zeros(2**DIGIT, dtype=torch.int64)
        for key in keys():
            digits = key >> DIGIT if shift else key[key >> DIGIT == found] % 2**DIGIT
            counts += torch.bincount(digits.flatten(), minlength=2**DIGIT).cpu()
        falling = counts.flip(0)
        upto = falling.cumsum(0)
        place = int((upto < left).sum())
        left -= int(upto[place] - falling[place])
        found = (found << DIGIT) + 2**DIGIT - 1 - place
    return min(found, torch.iinfo(torch.int32).max), left
