"""What is measured of a model on calibration text: sums over tokens, so that they add up over batches and processes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.core.linalg import shrunk

State = dict[str, Tensor]
Where = Literal["input", "block", "sublayer", "gradient"]
Labels = Literal["text", "sampled"]
Towards = Literal["diagonal", "identity"]

STRIP = 256  # rows of a symmetric product that are made at once, from its diagonal on


@dataclass(frozen=True)
class Statistic:
    """One thing measured; `where`: at a linear's input, over a block, over its sub-layers, or on gradients.

    by_sequence: `update` gets one calibration sequence at a time, in their order, not whatever ran at once.
    Of a gradient, which is one sequence's: `of` what, its weight (out × in) or its output (out × tokens), and of which
    loss by its `labels`. text: the token-mean cross-entropy of the text's own next tokens. sampled: the token-sum of
    that of labels drawn from the model's own predictions, at every token. shrinks: whether `shrunk` changes it.
    """

    where: ClassVar[Where]
    by_sequence: ClassVar[bool] = False
    of: ClassVar[Literal["weight", "output"]] = "weight"
    labels: ClassVar[Labels] = "text"
    shrinks: ClassVar[bool] = False

    @property
    def one_of(self) -> int:
        """Of a gradient: it is taken on the first of every so many sequences."""
        return 1

    @property
    def together(self) -> int:
        """How many sequences in a row are measured as one group, which one process runs."""
        return 1

    def sums(self, state: State) -> State:
        """What adds up over processes, each of which ran whole groups; from its total `result` follows."""
        return state

    @property
    def needs_gradient(self) -> bool:
        """Whether the whole model must be loaded and run backwards."""
        return self.where == "gradient"

    def start(self, width: int, device: torch.device) -> State:
        """Empty sums."""
        raise TypeError(f"{type(self).__name__} does not say how it starts")

    def update(self, state: State, *values: Tensor) -> None:
        """Add one batch to `state`."""
        raise TypeError(f"{type(self).__name__} does not say how it is updated")

    def result(self, state: State) -> Tensor:
        """The statistic from its sums; by default the only one."""
        (value,) = state.values()
        return value

    def shrunk(self, value: Tensor, share: float, to: Towards) -> Tensor:
        """A result pulled by a share, from 0 to 1, towards its diagonal, or the identity times its mean."""
        raise TypeError(f"{type(self).__name__} does not say how it shrinks")


@dataclass(frozen=True)
class Gram(Statistic):
    """G = Σ x xᵀ over tokens, in × in, float64: products too, for float32 ones lose directions beside outliers."""

    where = "input"
    shrinks = True

    def shrunk(self, value: Float[Tensor, "in in"], share: float, to: Towards) -> Float[Tensor, "in in"]:
        """(1 − share) · G + share · T, of the same trace."""
        return shrunk(value, share, to)

    def start(self, width: int, device: torch.device) -> State:
        """A zero matrix."""
        return {"gram": torch.zeros(width, width, dtype=torch.float64, device=device)}

    def update(self, state: State, *values: Float[Tensor, "tokens in"]) -> None:
        """Add Σ x xᵀ of a batch."""
        x = values[0].double()
        state["gram"].addmm_(x.T, x)


@dataclass(frozen=True)
class Tokens(Statistic):
    """How many tokens came to an input; one number, float64. With it sums become means."""

    where = "input"

    def start(self, width: int, device: torch.device) -> State:
        """Zero."""
        return {"tokens": torch.zeros(1, dtype=torch.float64, device=device)}

    def update(self, state: State, *values: Float[Tensor, "tokens in"]) -> None:
        """Add those of a batch."""
        state["tokens"] += len(values[0])


@dataclass(frozen=True)
class Norm(Statistic):
    """Σ |x|^power over tokens for each input column, float64."""

    power: Literal[1, 2] = 2
    where = "input"

    def start(self, width: int, device: torch.device) -> State:
        """A zero vector."""
        return {"sum": torch.zeros(width, dtype=torch.float64, device=device)}

    def update(self, state: State, *values: Float[Tensor, "tokens in"]) -> None:
        """Add the columns' sums of a batch."""
        x = values[0].double()
        state["sum"] += x.abs().sum(0) if self.power == 1 else x.square().sum(0)


@dataclass(frozen=True)
class Cosine(Statistic):
    """Mean cosine of the residual stream before and after a block, over tokens; one number.

    Tokens with a state of zeros, which has no direction, are left out.
    """

    where: ClassVar[Where] = "block"

    def start(self, width: int, device: torch.device) -> State:
        """Zero sums; `width` is the number of steps: 1 for a block."""
        return {name: torch.zeros(width, dtype=torch.float64, device=device) for name in ("sum", "tokens")}

    def update(self, state: State, *values: Float[Tensor, "tokens hidden"]) -> None:
        """`values` are the states in order: before, (between,) after."""
        for i, (before, after) in enumerate(pairwise(values)):
            similarity = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            known = (before != 0).any(-1) & (after != 0).any(-1)
            state["sum"][i] += similarity[known].sum()
            state["tokens"][i] += known.sum()

    def result(self, state: State) -> Float[Tensor, "steps"]:
        """Sums over counts."""
        return state["sum"] / state["tokens"]


@dataclass(frozen=True)
class SublayerCosine(Cosine):
    """The same over each sub-layer of a block, attention and FFN: two numbers.

    Only where the outputs of `o` and `down` add up to the block's output (not in post-norm or parallel blocks).
    """

    where = "sublayer"


@dataclass(frozen=True)
class FisherColumns(Statistic):
    """Σ over sequences and outputs of (∂loss/∂W)², for each input column of a weight, float64.

    The loss is the token-mean cross-entropy of one sequence (empirical Fisher, one gradient a sequence).
    Source: FWSVD (arXiv 2207.00112), equation 2; its row is a column of a torch weight.
    """

    where = "gradient"

    def start(self, width: int, device: torch.device) -> State:
        """A zero vector."""
        return {"sum": torch.zeros(width, dtype=torch.float64, device=device)}

    def update(self, state: State, *values: Float[Tensor, "out in"]) -> None:
        """Add one sequence's gradient."""
        state["sum"] += values[0].double().square().sum(0)


@dataclass(frozen=True)
class Fisher(Statistic):
    """Σ over sequences of (∂loss/∂W)² for each entry of a weight, out × in, float32: 4 bytes an entry.

    Squares are taken and added in float64, and the sum is rounded once a sequence, by at most 6e-8 of itself each time.
    Squares below 1e-38 lose digits, those below 1e-45 vanish. The loss is that of `FisherColumns`, whose sums over
    outputs these are before they are summed. Source: FWSVD (arXiv 2207.00112), equation 1.
    """

    where = "gradient"

    def start(self, width: int, device: torch.device) -> State:
        """No rows: how many there are the first gradient says."""
        return {"sum": torch.zeros(0, width, dtype=torch.float32, device=device)}

    def update(self, state: State, *values: Float[Tensor, "out in"]) -> None:
        """Add one sequence's gradient."""
        squares = values[0].double().square()
        if len(state["sum"]) == 0:
            state["sum"] = squares.new_zeros(squares.shape, dtype=torch.float32)
        state["sum"] += squares


@dataclass(frozen=True)
class OutputFisher(Statistic):
    """B = E[g gᵀ] over tokens, out × out, float64; g is the gradient at a linear's output.

    The loss is the negative log-likelihood, summed over tokens, of labels drawn from the model's own predictions. So
    over the draws B is the mean over tokens of the Fisher information matrices at that output, which is the Hessian of
    KL(model ‖ model with its output moved) where nothing is moved; the text's own labels would give neither.
    every: one of so many sequences is run backwards. Products of one sequence are in the gradients' type, sums of them
    in float64: what is drawn is far less certain than the rounding. Of a product half is made, and mirrored at the end.
    Source: K-FAC (Martens and Grosse 2015), section 2, its output factor.
    """

    every: int = 1
    where = "gradient"
    of = "output"
    labels = "sampled"

    @property
    def one_of(self) -> int:
        """As asked."""
        return self.every

    def start(self, width: int, device: torch.device) -> State:
        """No rows: how many outputs there are the first gradient says."""
        empty = {"sum": (0, 0), "tokens": (1,)}
        return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in empty.items()}

    def update(self, state: State, *values: Float[Tensor, "out tokens"]) -> None:
        """Add Σ g gᵀ of one sequence."""
        g = values[0].float() if values[0].dtype in (torch.float16, torch.bfloat16) else values[0]
        if len(state["sum"]) == 0:
            state["sum"] = g.new_zeros((len(g), len(g)), dtype=torch.float64)
        for start in range(0, len(g), STRIP):
            state["sum"][start : start + STRIP, start:] += g[start : start + STRIP] @ g[start:].T
        state["tokens"] += g.shape[1]

    def result(self, state: State) -> Float[Tensor, "out out"]:
        """The mean; what lies left of the strips' squares is what lies above them."""
        mean = state["sum"] / state["tokens"].clamp_min(1)
        for end in range(STRIP, len(mean), STRIP):
            mean[end:, end - STRIP : end] = mean[end - STRIP : end, end:].T
        return mean
