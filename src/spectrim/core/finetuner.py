"""What a way of tuning must offer, what it is given while it trains, and the table of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectrim.core.registry import Method, register

# What a checkpoint must be: with factors in its layout, without a layout, or either.
Wants = Literal["factors", "dense", "any"]


@runtime_checkable
class Batch(Protocol):
    """Some rows of one step: how to run the model on them, and what its answer is worth."""

    def answer(self) -> Any:
        """Run the model as it is now: what it returns, with `logits` (batch × length × vocabulary)."""
        ...

    def score(self, answer: Any) -> Float[Tensor, ""]:
        """The loss asked for, of an answer: cross entropy and distillation, a mean over the step's predictions."""
        ...

    def distance(self, first: Any, second: Any) -> Float[Tensor, ""]:
        """Symmetric KL between two answers, nats, a mean over the step's predictions: ½ KL(p‖q) + ½ KL(q‖p)."""
        ...


class Session:
    """A model under tuning. What trains are the parameters of `model` that want gradients, and they alone are saved.

    A step is one move of the optimizer; `step` counts from 0, and `total` is how many there are. What a method changes
    beside parameters (masks, running means) is in `state`, or a resumed run would differ.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def scales(self) -> Mapping[str, float]:
        """What the learning rate is multiplied by, by name of a trained parameter; 1 for those that are left out."""
        return {}

    def before(self, step: int, total: int) -> None:
        """Before the first forward pass of a step."""

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The loss of some rows, which is then gone backwards through."""
        return batch.score(batch.answer())

    def differentiated(self, step: int, total: int) -> None:
        """When a step's gradients are whole, before they are clipped and used."""

    def moved(self, step: int, total: int) -> None:
        """After the optimizer moved the parameters."""

    def state(self) -> Mapping[str, Tensor]:
        """What a killed run needs beside trained parameters, the optimizer's state and random states."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        assert not state, sorted(state)

    def finish(self) -> Any:
        """End the tuning: the model as it is saved, its layout attached, nothing of the session left in it."""
        return self.model


@runtime_checkable
class Finetuner(Protocol):
    """A way of tuning. A frozen dataclass: its fields are its settings. As a base it gives the defaults below."""

    @property
    def wants(self) -> Wants:
        """What it can tune."""
        return "factors"

    @property
    def keeps_rank(self) -> bool:
        """Whether each factor stays of its shape all the time, so that nothing is truncated again."""
        return True

    @property
    def beside(self) -> bool:
        """Whether it needs a second, dense model of the same architecture (`--dense`)."""
        return False

    @property
    def learning_rate(self) -> float:
        """The one that is used where none is given."""
        return 1e-4

    @property
    def stages(self) -> int:
        """How many sessions follow each other; they share the steps evenly."""
        return 1

    def begin(self, model: Any, stage: int, generator: torch.Generator, dense: Any = None) -> Session:
        """Make a loaded model ready to be trained. Raises ValueError where there is nothing that it could train.

        model: a `PreTrainedModel`, all its parameters frozen; stage: from 0; dense: the second model, if `beside`.
        """
        ...


_finetuners: dict[str, type[Any]] = {}


def finetuner(name: str) -> Callable[[Method], Method]:
    """Class decorator: registers a way of tuning. Raises ValueError for a name that is taken."""
    return register(_finetuners, "way of tuning", name)


def finetuners() -> dict[str, type[Any]]:
    """Every registered way of tuning by name: those shipped, and those of the entry-point group `spectrim.finetune`."""
    import spectrim.finetune  # noqa: F401  they register themselves when imported

    for point in entry_points(group="spectrim.finetune"):
        point.load()
    return dict(_finetuners)
