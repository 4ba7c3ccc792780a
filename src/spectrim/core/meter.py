"""How far a model's output moves when plans are put into it, measured in memory on calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.core import distributed
from spectrim.core.plan import Choice, Target
from spectrim.core.registry import Live, Measures, Problem

# kl: mean over tokens of KL(dense ‖ changed) of the next-token distributions, nats; hidden: Σ ‖h − h′‖² / Σ ‖h‖² over
# the states that leave the last block; perplexity: of the windows themselves.
Kind = Literal["kl", "hidden", "perplexity"]

CHUNK = 2**24  # logits turned into log-probabilities at a time
ROWS = 2**19  # of them worked on at a time where several are made of each: in pieces that stay in a processor's cache
KEPT = 2**28  # bytes of the dense model's log-probabilities that are not reckoned again for every change


class Meter:
    """Measures one base state of a model and what changes when one target of it does; works only when asked.

    base: choices by target, None for dense. sequences and length: of the calibration windows, those that are run, the
    first ones or the `last` (None: all, whole). Targets are asked for in the order of their blocks: states entering a
    block are run on from those of the block before. Several processes share the windows, and ask for the same.
    """

    def __init__(
        self,
        live: Live,
        kind: Kind,
        base: Mapping[str, Choice | None],
        sequences: int | None,
        length: int | None,
        last: bool = False,
    ) -> None:
        self.live, self.kind, self.base = live, kind, base
        self.sequences, self.length, self.last = sequences, length, last
        self._at, self._states, self._teacher = 0, list[Tensor](), list[Tensor]()
        self._expected: dict[int, Tensor] = {}

    @cached_property
    def batches(self) -> list[Int[Tensor, "batch length"]]:
        """The windows that this process runs: its share of all batches."""
        if not self.last:
            return list(distributed.share(self.live.batches(self.sequences, self.length)))
        return list(distributed.share(last_batches(self.live, self.sequences, self.length)))

    @cached_property
    def built(self) -> dict[str, Mapping[str, Any]]:
        """The modules of the base state, by target."""
        return {name: self.live.built(name, choice) for name, choice in self.base.items() if choice is not None}

    @contextmanager
    def in_base(self, left_out: str | None = None) -> Iterator[None]:
        """The model in its base state, one target left dense; before the first time, the dense model's states."""
        if self.kind != "perplexity" and not self._teacher:
            self._teacher = [self.live.run(ids, self.live.enter(ids), 0, self.live.blocks) for ids in self.batches]
        others = [modules for name, modules in self.built.items() if name != left_out]
        with self.live.swapped({module: made for modules in others for module, made in modules.items()}):
            yield

    def reference(self, index: int) -> Tensor | None:
        """What a batch is compared with: for kl the log-probabilities of the dense model."""
        if self.kind == "perplexity":
            return None
        state = self._teacher[index]
        if self.kind == "hidden":
            return state
        if index in self._expected:
            return self._expected[index]
        found = torch.log_softmax(self.live.logits(self.batches[index], state).float(), -1)
        if sum(each.nbytes for each in self._expected.values()) + found.nbytes <= KEPT:
            self._expected[index] = found
        return found

    @torch.no_grad()
    def of_base(self) -> float:
        """The deviation of the base state."""
        sums, blocks = torch.zeros(2, dtype=torch.float64), self.live.blocks
        with self.in_base():
            for index, ids in enumerate(self.batches):
                state = self.live.run(ids, self.live.enter(ids), 0, blocks)
                sums += compare(self.kind, self.live, ids, state, self.reference(index))
        return total(self.kind, distributed.add_up(sums))

    @torch.no_grad()
    def of_target(self, target: Target, choices: Sequence[Choice | None]) -> list[float]:
        """The deviation with each choice of one target instead of that of the base."""
        if not choices:
            return []
        start, sums = min(target.blocks), torch.zeros(len(choices), 2, dtype=torch.float64)
        states = self._entering(start)
        built = [{} if choice is None else self.live.built(target.name, choice) for choice in choices]
        with self.in_base(target.name):
            for index, (ids, state) in enumerate(zip(self.batches, states, strict=True)):
                reference = self.reference(index)
                for place, modules in enumerate(built):
                    with self.live.swapped(modules):
                        final = self.live.run(ids, state, start, self.live.blocks)
                        sums[place] += compare(self.kind, self.live, ids, final, reference)
        return [total(self.kind, each) for each in distributed.add_up(sums)]

    def _entering(self, block: int) -> list[Float[Tensor, "batch length hidden"]]:
        """States of the base entering a block; only the last asked for are kept."""
        if not self._states or block < self._at:
            self._at, self._states = 0, [self.live.enter(ids) for ids in self.batches]
        with self.in_base():
            for index, ids in enumerate(self.batches):
                self._states[index] = self.live.run(ids, self._states[index], self._at, block)
        self._at = block
        return self._states


def last_batches(live: Live, sequences: int | None, length: int | None) -> list[Int[Tensor, "batch length"]]:
    """The last windows, cut to a length (None: all, whole), in batches."""
    every = live.batches(None, length)
    return every if sequences is None else list(torch.cat(every)[-sequences:].split(len(every[0])))


class DepthFirst:
    """`registry.Measures` on the model in memory: one change after another, each run on to the end."""

    def __init__(self, live: Live, targets: Sequence[Target]) -> None:
        self.live, self.targets = live, targets
        self._of_dense: dict[tuple[int | None, int | None], Meter] = {}

    def deviations(
        self,
        base: Mapping[str, Choice | None],
        changed: Mapping[str, Choice | None],
        trial: int | None,
        length: int | None,
        progress: Callable[[int, int], None],
    ) -> Iterator[tuple[str, float]]:
        """As in `Measures`, in the order of blocks."""
        meter = self._meter(base, trial, length)
        ordered = sorted((t for t in self.targets if t.name in changed), key=lambda t: (min(t.blocks), t.name))
        for done, target in enumerate(ordered, 1):
            yield target.name, meter.of_target(target, [changed[target.name]])[0]
            progress(done, len(ordered))

    def deviation(self, base: Mapping[str, Choice | None], trial: int | None, length: int | None) -> float:
        """As in `Measures`."""
        return self._meter(base, trial, length).of_base()

    def _meter(self, base: Mapping[str, Choice | None], trial: int | None, length: int | None) -> Meter:
        """One for the base state; that of the dense model is kept, with the states that it has."""
        known = None if base else self._of_dense.get((trial, length))
        meter = known or Meter(self.live, "kl", base, trial, length, last=True)
        if not base:
            self._of_dense[trial, length] = meter
        return meter


def measures(problem: Problem) -> Measures:
    """What an allocator measures changes by: what it is given for that, else the model in memory."""
    if problem.measures is not None:
        return problem.measures
    assert problem.live is not None
    return DepthFirst(problem.live, problem.targets)


def compare(
    kind: Kind, live: Live, ids: Int[Tensor, "batch length"], state: Float[Tensor, "batch length hidden"],
    reference: Tensor | None,
) -> Float[Tensor, "2"]:  # fmt: skip
    """What one batch adds to the two sums whose quotient is the deviation; work in float32, sums in float64."""
    if kind == "hidden":
        assert reference is not None
        away = (state.float() - reference.float()).square().sum(dtype=torch.float64)
        return torch.stack([away, reference.float().square().sum(dtype=torch.float64)]).cpu()
    logits = live.logits(ids, state)
    if kind == "kl":
        assert reference is not None
        lost = divergences(reference.flatten(0, -2), logits.flatten(0, -2))
    else:
        predicted = torch.log_softmax(logits.float(), -1)
        lost = -predicted[:, :-1].gather(-1, ids[:, 1:, None].to(predicted.device))
    return torch.tensor([float(lost.sum(dtype=torch.float64)), lost.numel()], dtype=torch.float64)


def divergences(
    expected: Float[Tensor, "tokens vocabulary"], logits: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, "tokens"]:
    """KL(expected ‖ softmax of the logits) of each token, nats, float32; expected: log-probabilities.

    A few tokens at a time, in the same memory: arrays of a whole batch's vocabulary, each taken from the system anew,
    would cost a third of what the predictions do. What comes of a token is the same.
    """
    rows, lost = max(1, ROWS // logits.shape[-1]), torch.empty(len(logits), device=logits.device)
    share, missed = (torch.empty_like(expected[:rows]) for _ in range(2))
    for known, found, of_rows in zip(expected.split(rows), logits.split(rows), lost.split(rows), strict=True):
        away = torch.log_softmax(found.float(), -1, out=missed[: len(known)])
        torch.sub(known, away, out=away)
        torch.sum(away.mul_(torch.exp(known, out=share[: len(known)])), -1, out=of_rows)
    return lost


def total(kind: Kind, sums: Float[Tensor, "2"]) -> float:
    """The deviation from its two sums."""
    quotient = sums[0] / sums[1]
    return float(quotient.exp() if kind == "perplexity" else quotient)


def window_losses(
    logits: Float[Tensor, "n vocabulary"], expected: Float[Tensor, "n vocabulary"], following: Int[Tensor, "next"]
) -> tuple[float, float]:
    """Mean −log p(following), and KL(logits ‖ expected) summed over all positions; float32 terms, float64 sums."""
    step, following = max(1, CHUNK // logits.shape[-1]), following.to(logits.device)
    loss = divergence = 0.0
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        log_p, log_q = (F.log_softmax(each[part].float(), dim=-1) for each in (logits, expected))
        right = following[part, None]
        loss -= float(log_p[: len(right)].gather(1, right).double().sum())
        divergence += float(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum())
    return loss / len(following), divergence
