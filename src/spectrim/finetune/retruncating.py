"""Tuning that truncates twice: an adapter beside the product, then a second SVD back to the rank (`retruncating`).

The pipeline that `rank_preserving` replaces, kept to compare with it. Each low-rank part is multiplied out,
W′ = left · right, frozen, with LoRA beside it, B (out × q) zero at the start and A (q × n) Kaiming:

    y = W′ x + (alpha / q) B A x

What comes out has rank r + q, and is cut back by the plain SVD, which knows nothing of what the training minimised:
that loss is the point of the comparison. LoRAP's scripts (arXiv 2404.09695) instead keep rank r + 8 beside LoRA of
rank 8: `extra = 8`, without loss, but with extra · (out + n) parameters a matrix more in the plain format, and a new
layout. Merged and factored in float64 from the factors as they were, rounded once.

Ours: kept columns and sparse parts stand beside the product and stay as they are, the LoRA reads none of the kept
columns; a pivot stays a pivot, its pivots chosen anew; matrices of rank 0 are left alone; a rank ends at the smaller
side, and above r + q there would be nothing to keep, so `extra` is at most q; dense layers of the blocks get ordinary
LoRA, merged in float32. The adapter is a small layer of our own, which PEFT would not put beside kept columns.

Memory: while it trains the model holds every product as a dense matrix, as large as before compression, beside the
factors; of each adapter q (out + n) numbers, their gradients and AdamW's state, in float32. The second truncation makes
no dense matrix: QR of [left, B] and [right; A], SVD of a core of (r + q) × (r + q).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.core.finetuner import Finetuner, Session, Wants, finetuner
from spectrim.finetune import factored
from spectrim.finetune.parts import PIVOTS, factored_svd, pair, parts_of, put, width, with_rank
from spectrim.model import loading, modules
from spectrim.model.apply import form
from spectrim.model.modules import Format

Factors = dict[str, nn.Module | None]


@finetuner("retruncating")
@dataclass(frozen=True)
class Retruncating(Finetuner):
    """LoRA beside the multiplied-out factors, then a plain SVD back to the rank they had.

    rank q and alpha: of the adapters, scale alpha / q; dropout: before them; extra: ranks to keep beyond the old one,
    at most q, which makes the model larger; dense: whether dense layers of the blocks get adapters too.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    extra: int = 0
    dense: bool = True
    wants: ClassVar[Wants] = "factors"
    keeps_rank: ClassVar[bool] = False

    def __post_init__(self) -> None:
        factored.check_adapter(self.rank, self.dropout)
        if not 0 <= self.extra <= self.rank:
            raise ValueError(f"extra is {self.extra}: it is from 0 to rank, {self.rank}, all that an adapter adds")

    @property
    def learning_rate(self) -> float:
        """The usual one of LoRA."""
        return 2e-4

    def begin(self, model: Any, stage: int, generator: torch.Generator, dense: Any = None) -> Session:
        """Multiply the factors out and put the adapters in. Raises ValueError where there is no factor."""
        found = with_rank(model)
        layers = factored.dense_layers(model) if self.dense else {}
        return Adapted(model, self, found, layers, generator)


class Adapted(Session):
    """A model of dense products with LoRA beside them."""

    model: PreTrainedModel

    def __init__(
        self,
        model: Any,
        settings: Retruncating,
        found: dict[str, Format],
        layers: dict[str, nn.Module],
        generator: torch.Generator,
    ) -> None:
        super().__init__(model)
        self.extra, self.products, self.layers = settings.extra, found, {}
        self.factors: dict[str, Factors] = {}
        self.beside: dict[str, Beside] = {}
        make = (settings.rank, settings.alpha / settings.rank, settings.dropout, generator)
        for name, module in found.items():
            skip = int(module.spec().get("kept", 0)) if module.spec()["format"] in PIVOTS else 0
            self.beside[name] = Beside(_product(module), skip, *make)
            self.factors[name] = _unfold(module, self.beside[name])
        for name, layer in layers.items():
            self.layers[name] = Beside(layer, 0, *make)
            model.set_submodule(name, self.layers[name])

    @torch.no_grad()
    def finish(self) -> Any:
        """Merge every adapter, truncate, and put the factors back: in place at the old rank, else a new layout."""
        for name, layer in self.layers.items():
            layer.merge()
            self.model.set_submodule(name, layer.inner)
        layout = {}
        for name, module in self.products.items():
            for factor, was in self.factors[name].items():
                setattr(module, factor, was)
            layout[name] = self._truncated(name, module)
        if self.extra:
            known = {name: module.spec() for name, module in factored.compressed(self.model).items()}
            loading.attach(self.model, {**known, **layout})
        return self.model

    def _truncated(self, name: str, module: Format) -> dict[str, Any]:
        """Write the best approximation of what a module became, at its rank or at `extra` more; its spec."""
        parts, added, spec = parts_of(module), self.beside[name], module.spec()
        rank = max(spec["rank"], min(spec["rank"] + self.extra, module.out_features, width(module)))
        down, up = added.down.double(), added.scale * added.up.double()
        if spec["format"] in PIVOTS:  # the adapter's outputs, or inputs, are in the order of the pivot
            down, up = (down[:, _places(module)], up) if "kept" in parts else (down, up[_places(module)])
        left = torch.cat([parts["left"].double(), up], dim=1)
        right = torch.cat([parts["right"].double(), down])
        parts |= pair(spec["format"], *factored_svd(left, right, rank))
        if rank == spec["rank"]:
            put(module, parts)
            return spec
        wider, device = {**spec, "rank": rank}, parts["left"].device
        new = modules.build(wider, form(wider, parts, _dtype(module)), module.bias)
        self.model.set_submodule(name, new.to(device).requires_grad_(False).train(module.training))
        return new.spec()


class Beside(nn.Module):
    """A linear layer with LoRA beside it: y = inner(x) + scale · up · down · dropout(x), but for its first inputs.

    skip: inputs at the start that the adapter does not read. down (q × n) and up (out × q) are float32.
    """

    def __init__(
        self, inner: nn.Module, skip: int, rank: int, scale: float, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.inner, self.skip, self.scale, self.dropout = inner, skip, scale, nn.Dropout(dropout)
        self.turned = modules.is_transposed(inner)
        weight = inner.get_parameter("weight")
        rows, size = reversed(weight.shape) if self.turned else weight.shape
        down = torch.empty(rank, size - skip, dtype=torch.float32, device=generator.device)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, dtype=torch.float32, device=weight.device))

    @property
    def weight(self) -> Tensor:
        """The inner weight with what the adapter adds, for code that looks at a layer's weight."""
        weight = self.inner.get_parameter("weight")
        return (weight + self._delta()).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """That of the inner layer."""
        bias: Tensor | None = self.inner.bias  # type: ignore[assignment]
        return bias

    def merge(self) -> None:
        """Add what the adapter adds to the inner weight: in float32, rounded once."""
        factored.add(self.inner.get_parameter("weight"), self._delta())

    def _delta(self) -> Float[Tensor, "_ _"]:
        delta = nn.functional.pad(self.scale * self.up @ self.down, (self.skip, 0))
        return delta.T if self.turned else delta

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        h = nn.functional.linear(self.dropout(x[..., self.skip :]), self.down.to(x.dtype))
        return y + self.scale * nn.functional.linear(h, self.up.to(h.dtype))


def _product(module: Format) -> nn.Linear:
    """The low-rank part of a module as one frozen layer, on what the module hands to its first factor, in its order."""
    parts = parts_of(module)
    product = parts["left"] @ parts["right"]
    if module.spec()["format"] in PIVOTS:
        own = _places(module).argsort()
        product = torch.cat([parts["kept"], product[:, own]], dim=1) if "kept" in parts else product[own]
    layer = nn.utils.skip_init(nn.Linear, product.shape[1], product.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(product.to(_dtype(module)), requires_grad=False)
    return layer


def _unfold(module: Format, beside: Beside) -> Factors:
    """Put a product with its adapter in the place of a module's factors: these, by name.

    The module then does what it always does about kept columns, order, sparse part and bias.
    """
    new: Factors = {"left": beside, "right": nn.Identity()}
    if module.spec()["format"] in PIVOTS:
        new = {"base": beside, "mix": None}
    was: Factors = {name: getattr(module, name) for name in new}
    for name, factor in new.items():
        setattr(module, name, factor)
    return was


def _places(module: Format) -> Int[Tensor, "size"]:
    """Where in the order of a pivot the outputs stand; by columns, the inputs that are not kept."""
    return module.get_buffer("order").long()[int(module.spec().get("kept", 0)) :].argsort()


def _dtype(module: Format) -> torch.dtype:
    """That of the factors."""
    factor = "base" if module.spec()["format"] in PIVOTS else "left"
    return module.get_parameter(f"{factor}.weight").dtype
