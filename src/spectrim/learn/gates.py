"""A model whose units can be switched softly: what learned allocation trains.

Every target gets one flat vector of gates g, one number a unit, its kinds one after another. With it it computes

    y = Σ_i g_i · left_i (right_i x) + Σ_e g_e S_e x + bias (+ offset) (+ further directions)

(rank units and entries), or its last matrix reads x_c · g_c (channels of an FFN). All weights are frozen. Gates of 1
are the model itself, which so is its own teacher (`bypass`): no second copy is held. While the gates are in, a target's
factors stand for its dense weight, which is let go where the candidate can read it again, and read again at the end.
Memory: the factors, (out + in)·min(out, in) numbers a matrix: 2 times the weights of a square matrix, 1.4 times those
of one that is 2.75 times as long as wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from spectrim.core import heap, launch
from spectrim.core.plan import Candidate, Plan, Target
from spectrim.core.registry import Decomposer, Trainable
from spectrim.learn.harden import harden
from spectrim.model import modules


class GatedLinear(nn.Module):
    """A linear layer of its candidate's units; `gate` None: all of them, as they are.

    offset (out) is added to the bias, further = (A out × q, B q × in) to the product. With `fold()` the weight is made
    once and used until the gates change: for running many tokens without gradients.
    """

    def __init__(self, candidate: Candidate, dense: nn.Module) -> None:
        super().__init__()
        (part,) = candidate.target.parts
        like, tensors = dense.get_parameter("weight"), candidate.tensors()
        left = tensors["left"].to(like)
        weight = candidate.weights()[part.module]
        right = tensors["right"] if "right" in tensors else tensors["left"].T @ weight.to(tensors["left"])
        self.left, self.right = left.detach(), right.to(like).detach()
        bias = dense.bias
        self.bias = bias.detach() if isinstance(bias, Tensor) else None
        self.entries = tensors["entries"].long().to(like.device) if "entries" in tensors else None
        self.values = tensors["values"].to(like) if "values" in tensors else None
        self.gate: Float[Tensor, "units"] | None = None
        self.offset: Float[Tensor, "out"] | None = None
        self.further: tuple[Float[Tensor, "out q"], Float[Tensor, "q in"]] | None = None
        self._folded: Float[Tensor, "out in"] | None = None

    def _rest(self, gate: Tensor | None) -> Float[Tensor, "out in"]:
        """The sparse part, made full."""
        assert self.entries is not None and self.values is not None
        values = self.values if gate is None else self.values * gate.to(self.values)
        flat = values.new_zeros(len(self.left) * self.right.shape[1])
        return flat.index_put((self.entries,), values).view(len(self.left), -1)

    def _split(self) -> tuple[Tensor | None, Tensor | None]:
        rank = self.left.shape[1]
        return (None, None) if self.gate is None else (self.gate[:rank], self.gate[rank:])

    @torch.no_grad()
    def fold(self) -> None:
        """Make the weight at the gates as they are; afterwards it serves until `unfold`."""
        ranks, entries = self._split()
        left = self.left if ranks is None else self.left * ranks.to(self.left)
        self._folded = left @ self.right
        if self.entries is not None:
            self._folded += self._rest(entries)

    def unfold(self) -> None:
        """Let the folded weight go."""
        self._folded = None

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        ranks, entries = self._split()
        if self._folded is not None:
            y = linear(x, self._folded, self.bias)
        else:
            z = linear(x, self.right)
            y = linear(z if ranks is None else z * ranks.to(z), self.left, self.bias)
            if self.entries is not None:
                y = y + linear(x, self._rest(entries))
        if self.gate is None:  # the teacher
            return y
        if self.further is not None:
            left, right = self.further
            y = y + linear(linear(x, right.to(x)), left.to(x))
        return y if self.offset is None else y + self.offset.to(y)


class GatedChannels(nn.Module):
    """The last matrix of an FFN, reading channels times their gates; the gates are in the units' order."""

    def __init__(self, candidate: Candidate, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.places = candidate.tensors()["order"].argsort()
        self.gate: Float[Tensor, "units"] | None = None

    def fold(self) -> None:
        """Nothing to make beforehand."""

    def unfold(self) -> None:
        """Nothing was made."""

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y: Tensor = self.dense(x if self.gate is None else x * self.gate[self.places].to(x))
        return y


@dataclass(frozen=True)
class Slices:
    """Where the gates of each target lie in the flat vector of all of them."""

    of: Mapping[str, slice]
    total: int

    @staticmethod
    def make(sizes: Mapping[str, int]) -> Slices:
        """One after another, by name."""
        found, start = {}, 0
        for name in sorted(sizes):
            found[name] = slice(start, start + sizes[name])
            start += sizes[name]
        return Slices(found, start)

    def split(self, flat: Float[Tensor, "all"]) -> dict[str, Float[Tensor, "_"]]:
        """The vector of each target."""
        return {name: flat[place] for name, place in self.of.items()}


class Gates:
    """The gates of a model. Use as a context manager: it puts them in, and takes them out again."""

    def __init__(self, live: Trainable, candidates: Mapping[str, Candidate], format: str) -> None:
        self.live, self.candidates, self.format = live, dict(sorted(candidates.items())), format
        self.slices = Slices.make({name: units(c) for name, c in self.candidates.items()})
        self.outputs = Slices.make({name: c.target.parts[-1].out_features for name, c in self.candidates.items()})
        self.modules: dict[str, GatedLinear | GatedChannels] = {}
        self._stack = ExitStack()

    @property
    def dense(self) -> int:
        """Parameters of the dense targets."""
        return sum(c.target.parameters for c in self.candidates.values())

    def __enter__(self) -> Gates:
        try:
            self._stack.enter_context(_frozen(self.live.model))
            for name, candidate in self.candidates.items():
                self._stack.enter_context(self._gated(name, candidate))
                heap.give_back()  # dense weights let go are too small to leave by themselves
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        self.modules.clear()

    @contextmanager
    def _gated(self, name: str, candidate: Candidate) -> Iterator[None]:
        part = candidate.target.parts[-1]
        old = self.live.model.get_submodule(part.module)
        if candidate.units[0].kind == "channel":
            made: GatedLinear | GatedChannels = GatedChannels(candidate, old)
            dense = _nothing()
        else:
            made, dense = GatedLinear(candidate, old), _let_go(candidate, old)
        self.modules[name] = made
        with dense, self.live.swapped({part.module: made}):
            yield

    def set(self, flat: Float[Tensor, "all"] | None, offset: Float[Tensor, "outputs"] | None = None) -> None:
        """Set all gates, and offsets at the outputs; None: no gates, the model itself."""
        gates = {} if flat is None else self.slices.split(flat)
        offsets = {} if offset is None else self.outputs.split(offset)
        for name, module in self.modules.items():
            module.unfold()
            module.gate = gates.get(name)
            if isinstance(module, GatedLinear):
                module.offset = offsets.get(name)

    @contextmanager
    def folded(self, flat: Float[Tensor, "all"]) -> Iterator[None]:
        """The model at gates that need no gradient (sampled ones, say), each weight made once; without offsets."""
        before = {name: (m.gate, m.offset if isinstance(m, GatedLinear) else None) for name, m in self.modules.items()}
        self.set(flat)
        try:
            for module in self.modules.values():
                module.fold()
            yield
        finally:
            for name, module in self.modules.items():
                module.unfold()
                module.gate, offset = before[name]
                if isinstance(module, GatedLinear):
                    module.offset = offset

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """The dense model, to rounding: gates, offsets and further directions are left out. No gradients."""
        before = {name: module.gate for name, module in self.modules.items()}
        try:
            for module in self.modules.values():
                module.gate = None
            with torch.no_grad():
                yield
        finally:
            for name, module in self.modules.items():
                module.gate = before[name]

    def kept_cost(self, flat: Float[Tensor, "all"]) -> Float[Tensor, ""]:
        """Parameters kept at soft gates, differentiable: r(m+n) or, pivot, r(m+n−r) with r = Σ g; costs × g of others.

        Without the step to dense: factors of full rank cost more than the matrix, as plain ones do.
        """
        total = flat.new_zeros(())
        for name, gates in self.slices.split(flat).items():
            for kind, own in by_kind(self.candidates[name], gates).items():
                units_of_kind = next(u for u in self.candidates[name].units if u.kind == kind)
                if kind == "rank":
                    total = total + _rank_cost(self.candidates[name], own.sum(), self.format)
                else:
                    total = total + (units_of_kind.costs.to(own) * own).sum()
        return total

    @torch.no_grad()
    def prices(self, flat: Float[Tensor, "all"]) -> Float[Tensor, "all"]:
        """What each unit costs on average at soft gates: m + n, or m + n − Σ g for pivot; others their cost.

        While factors would cost more than the matrix, a plain direction costs its share of the matrix, mn/min(m, n):
        what all of them together would save.
        """
        found = []
        for name, gates in self.slices.split(flat).items():
            candidate = self.candidates[name]
            for kind, own in by_kind(candidate, gates).items():
                if kind != "rank":
                    found.append(next(u for u in candidate.units if u.kind == kind).costs.to(own))
                    continue
                out_features, in_features = _size(candidate.target)
                price = out_features + in_features - float(own.sum()) * (self.format == "pivot")
                if price * float(own.sum()) >= out_features * in_features:
                    price = out_features * in_features / len(own)
                found.append(torch.full_like(own, price))
        return torch.cat(found)

    def harden(
        self,
        scores: Float[Tensor, "all"],
        budget: int,
        fixed: Mapping[str, int] | None = None,
        least: Mapping[str, int] | None = None,
        reserved: Mapping[str, int] | None = None,
    ) -> Plan:
        """The plan that keeps the units of the largest scores within `budget`; see `harden`."""
        return harden(self.candidates, self.slices.split(scores), self.format, budget, fixed, least, reserved)


def units(candidate: Candidate) -> int:
    """Units of all kinds."""
    return sum(len(of_kind.scores) for of_kind in candidate.units)


def by_kind(candidate: Candidate, values: Float[Tensor, "_"]) -> dict[str, Float[Tensor, "_"]]:
    """A target's vector by the kinds of its units."""
    parts = values.split([len(of_kind.scores) for of_kind in candidate.units])
    return {of_kind.kind: own for of_kind, own in zip(candidate.units, parts, strict=True)}


def _size(target: Target) -> tuple[int, int]:
    (part,) = target.parts
    return part.out_features, part.in_features


def _rank_cost(candidate: Candidate, rank: Tensor, format: str) -> Tensor:
    size = sum(_size(candidate.target))
    return rank * (size - rank) if format == "pivot" else rank * size


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """A model none of whose own parameters gets a gradient."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, learns in before.items():
            parameter.requires_grad_(learns)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _let_go(candidate: Candidate, dense: nn.Module) -> Iterator[None]:
    """A dense layer without its weight, where the candidate can read that again; the same bits come back."""
    (part,) = candidate.target.parts
    weight = dense.get_parameter("weight")
    before, shape = weight.data, weight.shape
    readable = candidate.weights()[part.module]
    if readable.untyped_storage().data_ptr() == before.untyped_storage().data_ptr():
        yield  # a live model: what the candidate reads is this very weight
        return
    like = torch.empty(0, dtype=before.dtype, device=before.device)
    del readable, before
    weight.data = like
    try:
        yield
    finally:
        again = candidate.weights()[part.module].to(like)
        weight.data = again.T.contiguous() if modules.is_transposed(dense) else again
        assert weight.shape == shape


def unscalable(name: str, decomposer: Decomposer) -> str:
    """Why an allocator that scales single directions cannot work on a decomposer's candidates; empty: it can."""
    if decomposer.scalable:
        return ""
    return (
        f"{name} scales single directions of matrices, and {type(decomposer).__name__} has other units or chooses anew "
        "at the cut: take svd, whitened_svd or another decomposer of directions alone"
    )


def check_memory(targets: Sequence[Target], available: int | None = None, itemsize: int = 4) -> None:
    """Raise ValueError where the factors of all targets do not fit into memory; available: bytes (None: the machine's).

    Of several processes on the machine each holds them all, so each has an equal share of it. Beside them a training
    needs the rest of the model and the activations of a batch, which are not counted here.
    """
    sizes = [(p.out_features, p.in_features) for target in targets for p in target.parts]
    needed = itemsize * sum(sum(size) * min(size) for size in sizes)
    if available is None:
        available = heap.of_machine()
    processes = launch.of_this_machine()
    if processes * needed > available:
        each, fewer = (f" for each of {processes} processes", "fewer processes, ") if processes > 1 else ("", "")
        raise ValueError(
            f"training needs the whole model in memory, its factors alone {needed / 1e9:.1f} GB{each}, and this "
            f"machine has {available / 1e9:.1f} GB: use an allocator that does not train (unirank, deviation), "
            f"{fewer}a device with more memory, or a group of fewer matrices"
        )
