"""Full tuning of a compressed model: the factors themselves are trained (`full`).

No paper: the plain way, against which the others are to be measured. Each factor (left and right, or base and mix)
is a parameter that the optimizer moves; the gradient of y = left · right · x reaches both, so the product never leaves
its rank, and neither parameters nor layout change. Sparse values move, their places do not. Kept columns are columns of
the dense weight and stay bit for bit, unless they are to be trained too: where they are the first columns of a pivot's
base, their gradients are cleared before the norm is taken, and they are put back after each step, because weight decay
moves also what has no gradient.

With `relative` the learning rate of each tensor is a share of its size: that rate times the root mean square of its
trained entries at the start. Adam's step is about as large as the rate whatever the gradient is, so one absolute rate
moves a factor of small entries (a mix) by a larger share than one of large entries (a base); of the share there is one
that serves all.

Needs, beside the model, the gradients of all that trains and twice as many numbers of AdamW's state, and a copy of the
kept columns that lie in a base. A step costs what it costs at any model of this size and layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectrim.core.finetuner import Finetuner, Session, Wants, finetuner
from spectrim.finetune import factored
from spectrim.finetune.parts import decomposed

# base: the kept columns at its start, as they were
Held = list[tuple[nn.Linear, Tensor]]
# The relative learning rate where none is given.
RELATIVE = 3e-3


@finetuner("full")
@dataclass(frozen=True)
class Full(Finetuner):
    """Trains the factors themselves. Rank, places and parameters stay.

    values: sparse values too; kept: kept columns too, else they stay bit for bit; dense: dense layers of the blocks
    too, narrowed ones among them; bias: the biases of all these layers; norms: weights and biases of the norms;
    embeddings: the embeddings and the output head, which stay one tensor where they are one; relative: learning rates
    are shares of the root mean square of each tensor's entries at the start.
    """

    values: bool = True
    kept: bool = False
    dense: bool = True
    bias: bool = False
    norms: bool = False
    embeddings: bool = False
    relative: bool = False
    wants: ClassVar[Wants] = "factors"

    @property
    def learning_rate(self) -> float:
        """A tenth of what is usual for adapters: every number moves by itself; or RELATIVE of a tensor's size."""
        return RELATIVE if self.relative else 2e-5

    def begin(self, model: Any, stage: int, generator: torch.Generator, dense: Any = None) -> Session:
        """Let the factors train. Raises ValueError where there is no factor."""
        decomposed(model)
        held: Held = []
        trained = list(self._trained(model, held))
        if not trained:
            raise ValueError(
                f"nothing is left to train: no matrix of the model has a rank, and {self} leaves out all else; run "
                "`spectrim compress` first, with a method or a ratio that leaves some rank, or train more"
            )
        for parameter in trained:
            parameter.requires_grad_(True)
        return Training(model, held, self.relative)

    def _trained(self, model: Any, held: Held) -> Iterator[nn.Parameter]:
        """Every parameter that trains; what must stay of one goes into `held`."""
        layers: dict[str, nn.Module] = dict(factored.compressed(model))
        for _, module, factor, linear in factored.factors(model):
            count = 0 if self.kept else factored.kept_columns(module, factor)
            if count < linear.in_features:
                yield linear.get_parameter("weight")
                if count:
                    held.append((linear, linear.weight.detach()[:, :count].clone()))
        for module in factored.compressed(model).values():
            if self.values and "nnz" in module.spec():
                yield module.get_parameter("values")
            if self.kept and isinstance(getattr(module, "kept", None), nn.Linear):
                yield module.get_parameter("kept.weight")
        if self.dense:
            layers |= factored.dense_layers(model)
            yield from (layer.get_parameter("weight") for layer in factored.dense_layers(model).values())
        if self.bias:
            yield from (layer.bias for layer in layers.values() if isinstance(layer.bias, nn.Parameter))
        yield from norms(model) if self.norms else ()
        yield from embeddings(model) if self.embeddings else ()


class Training(Session):
    """A model whose own parameters train."""

    def __init__(self, model: Any, held: Held, relative: bool = False) -> None:
        super().__init__(model)
        self.held = held
        self.kinds = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        self._scales = self._sizes() if relative else {}

    def scales(self) -> Mapping[str, float]:
        """Where rates are relative, the size that each tensor had at the start."""
        return self._scales

    @torch.no_grad()
    def _sizes(self) -> dict[str, float]:
        """The root mean square of each tensor's trained entries; of zeros alone, which have no size, the others' mean.

        Raises ValueError where all are zeros.
        """
        fixed = {id(base.weight): columns.shape[1] for base, columns in self.held}
        found = {}
        for name in self.kinds:
            parameter = self.model.get_parameter(name)
            entries = parameter[:, fixed[id(parameter)] :] if id(parameter) in fixed else parameter
            found[name] = float(entries.float().square().mean().sqrt()) if entries.numel() else 0.0
        sized = [size for size in found.values() if size > 0]
        if not sized:
            raise ValueError("all that trains is zero, so no learning rate is a share of it: set method.relative=false")
        return {name: size or sum(sized) / len(sized) for name, size in found.items()}

    @torch.no_grad()
    def differentiated(self, step: int, total: int) -> None:
        """Clear the gradients of what must stay, before they count in the norm that is clipped."""
        for base, columns in self.held:
            if base.weight.grad is not None:
                base.weight.grad[:, : columns.shape[1]] = 0

    @torch.no_grad()
    def moved(self, step: int, total: int) -> None:
        """Put back what must stay: weight decay moves it although its gradient is 0."""
        for base, columns in self.held:
            base.weight[:, : columns.shape[1]] = columns.to(base.weight)

    def finish(self) -> Any:
        """The model itself, frozen again; each parameter in the dtype it had, also where it trained in a wider one."""
        for name, kind in self.kinds.items():
            parameter = self.model.get_parameter(name)
            parameter.requires_grad_(False)
            parameter.grad = None
            if parameter.dtype != kind:
                parameter.data = parameter.data.to(kind)
        return self.model


def norms(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the modules whose `weight` is a vector: the norms, of any kind."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            yield from module.parameters(recurse=False)


def embeddings(model: Any) -> Iterator[nn.Parameter]:
    """The weights of embeddings, those of positions too, and of the output head; a tied one comes twice."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is head:
            yield module.get_parameter("weight")
