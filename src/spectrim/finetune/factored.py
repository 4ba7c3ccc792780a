"""What ways of tuning share: the compressed modules of a model, their factors, and what must stay as it is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectrim.model.modules import Format


def compressed(model: nn.Module) -> dict[str, Format]:
    """The modules of our formats by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Format)}


def factors(model: nn.Module) -> Iterator[tuple[str, Format, str, nn.Linear]]:
    """Every factor that may be tuned: the module's name, the module, the factor's name in it, the factor.

    `left` and `right`, or `base` and `mix`; kept columns that are a factor of their own are none.
    """
    for name, module in compressed(model).items():
        for factor in ("left", "right", "base", "mix"):
            linear = getattr(module, factor, None)
            if isinstance(linear, nn.Linear):
                yield name, module, factor, linear


def dense_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers of the decoder blocks that are no part of a compressed module, by name; narrowed ones too."""
    inside = tuple(f"{name}." for name in compressed(model))
    blocks = max(
        (child for child in model.named_modules() if isinstance(child[1], nn.ModuleList)),
        key=lambda child: sum(p.numel() for p in child[1].parameters()),
    )[0]
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(f"{blocks}.") and isinstance(module, (nn.Linear, Conv1D)) and not name.startswith(inside)
    }


def kept_columns(module: Format, factor: str) -> int:
    """How many of a factor's first input columns are kept columns of the dense weight: those of a pivot's base."""
    return int(module.spec().get("kept", 0)) if factor == "base" else 0


def check_adapter(rank: int, dropout: float) -> None:
    """Raise ValueError for settings that no LoRA has."""
    if rank < 1:
        raise ValueError(f"rank is {rank}: an adapter has at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: it is in [0, 1)")


@torch.no_grad()
def add(weight: Tensor, delta: Tensor) -> None:
    """weight += delta, the sum in float32 or better, rounded once; in place, so that the memory layout stays."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(weight.to(wide) + delta.to(weight.device, wide))
