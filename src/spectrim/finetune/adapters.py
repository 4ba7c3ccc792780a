"""Tuning that keeps the rank: LoRA on the factors themselves (UniRank's second half, `rank_preserving`).

Published (the public notes on UniRank): tuning acts directly on the decomposed weights, so that no second truncation
follows. With L and R frozen, and adapters B (out × q), A (q × in) on each of them, B zero at the start:

    L ← L + (alpha / q) B_L A_L,   R ← R + (alpha / q) B_R A_R

L stays m × r and R stays r × n: rank and parameters do not change, and merging is exact. The pipeline that it replaces,
an adapter beside the pair, has rank r + q when merged, and loses again when it is cut back to r (`retruncating`).

The details are ours: `joint` trains all adapters together, `sequential` those of L first, then merged, those of R (as
the public script of SVD-LLM does). In the pivot form base and mix take the place of R and L. A factor of fewer than q
rows or columns gets as many directions, at the same scale. Dense layers of the blocks get ordinary LoRA. Kept columns
that lie in a pivot's base are not moved. Merged in float32, rounded once.

Needs the model once, and for each factor m × k q (m + k) numbers of adapters, as many of their gradients and twice as
many of AdamW's state, in float32; PEFT does the adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from spectrim.core.finetuner import Finetuner, Session, Wants, finetuner
from spectrim.finetune import factored

LEFT = ("left", "mix")


@finetuner("rank_preserving")
@dataclass(frozen=True)
class RankPreserving(Finetuner):
    """LoRA on both factors, merged into them: rank and parameters stay.

    rank q and alpha: of the adapters, scale alpha / q; dropout: before them; mode: both factors together (joint), or
    first left (mix), then right (base); dense: whether dense layers of the blocks get adapters too.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    mode: Literal["joint", "sequential"] = "joint"
    dense: bool = True
    wants: ClassVar[Wants] = "factors"

    def __post_init__(self) -> None:
        factored.check_adapter(self.rank, self.dropout)

    @property
    def learning_rate(self) -> float:
        """The usual one of LoRA."""
        return 2e-4

    @property
    def stages(self) -> int:
        """Two where one factor follows the other."""
        return 2 if self.mode == "sequential" else 1

    def begin(self, model: Any, stage: int, generator: torch.Generator, dense: Any = None) -> Session:
        """Put the adapters in. Raises ValueError where there is no factor."""
        held = {}
        wanted: dict[str, nn.Module] = {}
        for name, module, factor, linear in factored.factors(model):
            if self.mode == "joint" or (factor in LEFT) == (stage == 0):
                wanted[f"{name}.{factor}"] = linear
                held[f"{name}.{factor}"] = factored.kept_columns(module, factor)
        if not wanted:
            raise ValueError(
                "the model has no factors to put adapters on: every matrix of its layout is dense or empty"
            )
        if self.dense and stage == 0:
            wanted |= factored.dense_layers(model)
        return Adapted(model, self, wanted, held, generator.initial_seed() + stage)


class Adapted(Session):
    """A model with LoRA in it."""

    def __init__(
        self, model: Any, settings: RankPreserving, wanted: dict[str, nn.Module], held: dict[str, int], seed: int
    ) -> None:
        super().__init__(model)
        lora = put_adapters(model, wanted, settings.rank, settings.alpha, settings.dropout, seed)
        self.layers = lora
        for name, count in held.items():
            if count:
                _hold(lora[name].lora_A["default"].weight, count)

    def finish(self) -> Any:
        """Merge every adapter into its weight, and take it out."""
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            factored.add(base.weight, layer.get_delta_weight("default"))
            self.model.set_submodule(name, base)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


def put_adapters(
    model: Any, wanted: dict[str, nn.Module], rank: int, alpha: float, dropout: float, seed: int
) -> dict[str, Any]:
    """PEFT's LoRA layers in the place of these linear layers, by name; they alone are trained."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("tuning by adapters needs PEFT: pip install 'spectrim[finetune]'") from error

    weights: dict[str, Tensor] = {name: layer.get_parameter("weight") for name, layer in wanted.items()}
    small = {name: min(rank, *weight.shape) for name, weight in weights.items() if min(weight.shape) < rank}
    config = LoraConfig(
        r=rank, lora_alpha=alpha,  # type: ignore[arg-type]  # a scale of any size
        lora_dropout=dropout, target_modules=list(wanted), rank_pattern=dict(small),
        alpha_pattern={name: alpha * q / rank for name, q in small.items()},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    return {name: model.get_submodule(name) for name in wanted}


def _hold(weight: nn.Parameter, count: int) -> None:
    """Keep the first columns of an adapter's A at zero: what it adds then leaves these inputs alone."""
    with torch.no_grad():
        weight[:, :count] = 0

    def mask(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:, :count] = 0
        return gradient

    hook: Callable[[Tensor], Tensor] = mask
    weight.register_hook(hook)
