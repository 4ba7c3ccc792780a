"""What dense weights miss on the inputs that a compressed model gives them: sums over one step of a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spectrim.core.plan import Part
from spectrim.model.blocks import Batch

Run = Callable[[Tensor], Tensor]  # a block, from the state that enters it


class _Enough(Exception):
    """Raised in a block when all that a step watches has been seen."""


class _Left:
    """What a run of a block has still to come to; it ends there."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)

    def came_to(self, name: str, *_: object) -> None:
        """As a hook too."""
        self.names.discard(name)
        if not self.names:
            raise _Enough


class Missed:
    """The sums of a step; batch by batch first the dense stream, then the compressed one.

    sums: by module Σ (t − W x′) x′ᵀ, out × in; moved: by input Σ (x − x′) x′ᵀ, in × in, of which W makes the same where
    t = W x. ends: the modules whose output is to repair the residual stream, and the modules whose outputs are added to
    it before; read: modules whose inputs the compressed stream has to come to as well.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[Part], ends: Mapping[str, Sequence[str]], read: Iterable[str],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.model, self.ends, self.read, self.device = model, ends, set(read), device
        self.before = {module for others in ends.values() for module in others}
        # by input, the first of the modules that read it, where sums of the inputs are less work than of outputs
        outputs = Counter[str]()
        for part in parts:
            outputs[part.input] += part.out_features
        moved = {
            part.input: part for part in reversed(parts)
            if part.module not in ends and part.in_features <= 2 * outputs[part.input]
        }  # fmt: skip
        self.readers = {part.module: key for key, part in moved.items()}
        self.moved = {key: self._zeros(part.in_features, part.in_features) for key, part in moved.items()}
        self.sums = {
            part.module: self._zeros(part.out_features, part.in_features)
            for part in parts if part.module in ends or part.input not in moved
        }  # fmt: skip
        self.wanted: dict[str, Tensor] = {}

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def dense(
        self, state: Tensor, run: Run, on: bool, known: Mapping[str, Tensor] = MappingProxyType({}),
        ending: Collection[str] = (),
    ) -> Tensor | None:  # fmt: skip
        """Note what the inputs are and the outputs should be, from the state that enters the block.

        on: run to the block's end, and give what leaves it; known: outputs of modules that do not run; ending: parts of
        the block to whose end it is run at least.
        """
        outputs = {*self.sums, *self.before} - set(known)
        with seen_of(self.model, outputs, self.readers, stop=not on, ending=ending) as seen:
            output = _until_enough(run, state)
        seen |= known
        self.wanted = {name: seen[name] for name in (*self.readers, *self.sums)}
        for name, others in self.ends.items():
            before = sum((seen[other].reshape(state.shape) for other in others), state)
            self.wanted[name] = before + seen[name].reshape(state.shape)
        return output if on else None

    def compressed(
        self, state: Tensor, run: Run, batch: Batch, known: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Add what the batch gives; known: as in `dense`."""
        with seen_of(self.model, self.before - set(known)) as seen, ExitStack() as stack:
            seen |= known
            left = _Left({*self.sums, *self.readers, *self.read})
            for name in {**self.readers, **dict.fromkeys(sorted(self.read))}:
                entering = partial(self._enters, name, left, batch)
                stack.callback(self._module(name).register_forward_pre_hook(entering).remove)
            for name in self.sums:
                leaving = partial(self._leaves, name, left, batch, seen, state)
                stack.callback(self._module(name).register_forward_hook(leaving).remove)
            _until_enough(run, state)

    def _enters(self, name: str, left: _Left, batch: Batch, _: nn.Module, args: tuple[Any, ...]) -> None:
        if name in self.readers:
            _add(self.moved[self.readers[name]], self.wanted.pop(name) - args[0], args[0], batch)
        if name not in self.sums:
            left.came_to(name)

    def _leaves(
        self, name: str, left: _Left, batch: Batch, seen: Mapping[str, Tensor], state: Tensor, _: nn.Module,
        args: tuple[Any, ...], output: Tensor,
    ) -> None:  # fmt: skip
        wanted = self.wanted.pop(name)
        if name in self.ends:
            wanted = wanted - sum((seen[other].reshape(state.shape) for other in self.ends[name]), state)
        _add(self.sums[name], wanted.reshape(output.shape) - output, args[0], batch)
        left.came_to(name)

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)


def _until_enough(run: Run, state: Tensor) -> Tensor | None:
    try:
        return run(state)
    except _Enough:
        return None


def _real(state: Tensor, batch: Batch) -> Float[Tensor, "tokens width"]:
    """The states of real tokens, one a row."""
    rows = state.reshape(-1, state.shape[-1])
    return rows if batch.mask is None else rows[batch.mask.reshape(-1).to(rows.device)]


def _add(total: Float[Tensor, "rows in"], missing: Tensor, inputs: Tensor, batch: Batch) -> None:
    """Add Σ missing · inputsᵀ over the real tokens of a batch."""
    missing, inputs = _real(missing, batch), _real(inputs, batch)
    exact = torch.promote_types(inputs.dtype, torch.float32)
    total += missing.to(exact).T @ inputs.to(exact)


@contextmanager
def seen_of(
    model: nn.Module,
    outputs: Iterable[str],
    inputs: Iterable[str] = (),
    stop: bool = False,
    ending: Collection[str] = (),
) -> Iterator[dict[str, Tensor]]:
    """The outputs, or inputs, of modules as they run, by name; stop: no further than all of them, and the `ending`."""
    seen: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    outputs, inputs = list(outputs), list(inputs)
    left = _Left({*outputs, *inputs, *ending}) if stop else None
    for name in outputs:
        handles.append(model.get_submodule(name).register_forward_hook(partial(_see, seen, left, name)))
    for name in inputs:
        handles.append(model.get_submodule(name).register_forward_pre_hook(partial(_see, seen, left, name)))
    if left is not None:
        handles += [model.get_submodule(name).register_forward_hook(partial(left.came_to, name)) for name in ending]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _see(
    seen: dict[str, Tensor], left: _Left | None, name: str, _: nn.Module, args: tuple[Any, ...],
    output: Tensor | None = None,
) -> None:  # fmt: skip
    value = args[0] if output is None else output
    seen[name] = value.detach().clone()  # a block may add to it in place
    if left is not None:
        left.came_to(name)
