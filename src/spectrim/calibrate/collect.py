"""Hooks that feed statistics while a block runs, used by both drivers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spectrim.calibrate.statistics import Labels, State, Statistic
from spectrim.core import distributed
from spectrim.core.plan import Target
from spectrim.model.blocks import Batch
from spectrim.model.targets import oriented


@dataclass(frozen=True)
class Wanted:
    """What to measure in one block: by target, and of the block itself."""

    targets: Mapping[Target, tuple[Statistic, ...]] = field(default_factory=dict)
    block: tuple[Statistic, ...] = ()

    def __bool__(self) -> bool:
        return any(self.targets.values()) or bool(self.block)

    def inputs(self) -> dict[str, dict[Statistic, str]]:
        """By input key: each statistic and the module whose input is watched; one a key, however many parts read it."""
        found: dict[str, dict[Statistic, str]] = {}
        for target, statistics in self.targets.items():
            for part in target.parts:
                for statistic in statistics:
                    if statistic.where == "input":
                        found.setdefault(part.input, {}).setdefault(statistic, part.module)
        return found

    def gradients(self) -> dict[str, tuple[Statistic, ...]]:
        """By module: the statistics of gradients, of its weight and of its output."""
        return {
            part.module: chosen
            for target, statistics in self.targets.items()
            for part in target.parts
            if (chosen := tuple(s for s in statistics if s.where == "gradient"))
        }


def portion(batches: Sequence[Batch], wanted: Iterable[Wanted]) -> range:
    """Which batches this process runs: neighbours, so that sequences that a statistic takes as a group stay together.

    Batches are dealt whole: what comes of one does not depend on how many processes there are.
    """
    chosen = (s for of_block in wanted for of_target in (*of_block.targets.values(), of_block.block) for s in of_target)
    size = len(batches[0].ids) if batches else 1
    return distributed.portion(len(batches), math.lcm(size, *(s.together for s in chosen)) // size)


@dataclass(frozen=True)
class BlockStatistics:
    """The statistics of one block: by input key, by module (gradients), and of the block."""

    inputs: Mapping[str, Mapping[Statistic, Tensor]]
    gradients: Mapping[str, Mapping[Statistic, Tensor]]
    block: Mapping[Statistic, Tensor]

    def of(self, target: Target) -> dict[str, dict[Statistic, Tensor]]:
        """What a decomposer of `target` sees, by module."""
        return {
            part.module: {**self.inputs.get(part.input, {}), **self.gradients.get(part.module, {})}
            for part in target.parts
        }


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Collector:
    """Watches one block through hooks; `mask` says which tokens of the running batch are real (None: all).

    `sequences` is the number of them in it, `first` which of all its first one is, `labels` those of the loss that is
    run backwards.

    Raises ValueError for sub-layer statistics of a block whose `o` and `down` outputs do not add up to its own.
    """

    def __init__(self, model: nn.Module, block: str, targets: Iterable[Target], wanted: Wanted, device: torch.device):
        self.model, self.block, self.wanted, self.device = model, block, wanted, device
        self.mask: Tensor | None = None
        self.sequences, self.first = 1, 0
        self.labels: Labels = "text"
        self.targets = list(targets)
        self.states: dict[tuple[str, Statistic], State] = {}
        self.handles: list[RemovableHandle] = []
        # of the running batch, for sub-layers: the state entering the block, and the outputs of `o` and `down`
        self.entered = torch.empty(0)
        self.outputs: dict[str, Tensor] = {}
        self.between_is_read = False

    def __enter__(self) -> Collector:
        for key, statistics in self.wanted.inputs().items():
            for statistic, module in statistics.items():
                self._on_input(key, statistic, module)
        if self.wanted.block:
            if any(s.where == "sublayer" for s in self.wanted.block):
                self._watch_sublayers()
            self.handles.append(self._module(self.block).register_forward_hook(self._on_block, with_kwargs=True))
        for module, chosen in self.wanted.gradients().items():
            self._on_gradient(module, chosen)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def _state(self, key: str, statistic: Statistic, width: int) -> State:
        if (key, statistic) not in self.states:
            self.states[key, statistic] = statistic.start(width, self.device)
        return self.states[key, statistic]

    def _real(self, state: Tensor) -> Float[Tensor, "tokens width"]:
        """The states of real tokens, one a row."""
        rows = state.detach().reshape(-1, state.shape[-1])
        if self.mask is None:
            return rows
        keep = self.mask.reshape(-1)
        if len(keep) != len(rows):
            raise ValueError(f"{self.block}: {len(rows)} states for {len(keep)} tokens; padding cannot be excluded")
        return rows[keep.to(rows.device)]

    def _by_sequence(self, state: Tensor) -> Iterator[Float[Tensor, "tokens width"]]:
        """The states of the real tokens of each sequence of the batch."""
        whole = state.detach().reshape(self.sequences, -1, state.shape[-1])
        for i, rows in enumerate(whole):
            yield rows if self.mask is None else rows[self.mask[i].to(rows.device)]

    def _on_input(self, key: str, statistic: Statistic, module: str) -> None:
        hook = partial(self._seen, key, statistic)
        self.handles.append(self._module(module).register_forward_pre_hook(hook))

    def _seen(self, key: str, statistic: Statistic, _: nn.Module, args: tuple[Any, ...]) -> None:
        width = args[0].shape[-1]
        for rows in self._by_sequence(args[0]) if statistic.by_sequence else [self._real(args[0])]:
            statistic.update(self._state(key, statistic, width), rows)

    def _on_gradient(self, module: str, statistics: tuple[Statistic, ...]) -> None:
        of_weight = [s for s in statistics if s.of == "weight"]
        of_output = [s for s in statistics if s.of == "output"]
        if of_weight:
            parameter = self._module(module).weight
            assert isinstance(parameter, nn.Parameter)
            hook = partial(self._take_gradient, module, of_weight)
            self.handles.append(parameter.register_post_accumulate_grad_hook(hook))
        if of_output:
            watch = partial(self._watch_output, module, of_output)
            self.handles.append(self._module(module).register_forward_hook(watch))

    def _take_gradient(self, module: str, statistics: list[Statistic], weight: Tensor) -> None:
        assert weight.grad is not None
        self._add(module, statistics, oriented(self._module(module), weight.grad))
        weight.grad = None

    def _watch_output(self, module: str, statistics: list[Statistic], _: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(module, statistics, self._real(gradient).T))

    def _add(self, module: str, statistics: list[Statistic], gradient: Tensor) -> None:
        width = next(p.in_features for target in self.targets for p in target.parts if p.module == module)
        for statistic in statistics:
            if statistic.labels == self.labels and self.first % statistic.one_of == 0:
                statistic.update(self._state(module, statistic, width), gradient)

    def _watch_sublayers(self) -> None:
        block = self._module(self.block)
        self.handles.append(block.register_forward_pre_hook(self._enter, with_kwargs=True))
        for module in [m for m in block.modules() if m is not block]:
            self.handles.append(module.register_forward_pre_hook(self._on_read))
        for role in ("o", "down"):
            found = [t.parts[0].module for t in self.targets if t.role == role]
            if len(found) != 1:
                raise ValueError(f"{self.block} has {len(found)} targets of role {role}: its sub-layers are not known")
            self.handles.append(self._module(found[0]).register_forward_hook(self._keep_output(role)))

    def _keep_output(self, role: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self.outputs[role] = output.detach()

        return hook

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entered = (args[0] if args else kwargs["hidden_states"]).detach()
        self.outputs, self.between_is_read = {}, False

    def _on_read(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Note whether a module between `o` and `down` reads the state between: in a parallel block none does."""
        if self.between_is_read or set(self.outputs) != {"o"} or not args or not isinstance(args[0], Tensor):
            return
        if args[0].numel() == self.entered.numel():
            added = self.outputs["o"].reshape(self.entered.shape)
            difference = (args[0].detach().reshape(self.entered.shape) - self.entered - added).norm()
            self.between_is_read = bool(difference <= 1e-2 * added.norm())

    def _on_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = (args[0] if args else kwargs["hidden_states"]).detach()
        after = (output[0] if isinstance(output, (tuple, list)) else output).detach()
        for statistic in self.wanted.block:
            values = [before, after]
            if statistic.where == "sublayer":
                values.insert(1, self._between(before, after))
            rows = [self._real(value) for value in values]
            statistic.update(self._state("", statistic, len(rows) - 1), *rows)

    def _between(self, before: Tensor, after: Tensor) -> Tensor:
        between = before + self.outputs["o"].reshape(before.shape)
        whole = between + self.outputs["down"].reshape(before.shape)
        if (whole - after).norm() > 1e-2 * (after - before).norm() or not self.between_is_read:
            raise ValueError(
                f"{self.block}: its attention and FFN outputs do not add up to its own one after the other; "
                "sub-layer statistics are not defined for post-norm or parallel blocks, use those of the block"
            )
        return between

    def result(self) -> BlockStatistics:
        """Everything measured, by all processes."""
        inputs: dict[str, dict[Statistic, Tensor]] = {}
        gradients: dict[str, dict[Statistic, Tensor]] = {}
        block: dict[Statistic, Tensor] = {}
        for (key, statistic), state in over_processes(self.states, self.device).items():
            value = statistic.result(state)
            if statistic.where == "input":
                inputs.setdefault(key, {})[statistic] = value
            elif statistic.where == "gradient":
                gradients.setdefault(key, {})[statistic] = value
            else:
                block[statistic] = value
        return BlockStatistics(inputs, gradients, block)


States = Mapping[tuple[str, Statistic], State]


def over_processes(states: States, device: torch.device) -> States:
    """The sums of all processes; one that ran nothing, or whose state has no rows yet, adds zeros."""
    if not distributed.together():
        return states
    own = {key: key[1].sums(state) for key, state in states.items()}
    shapes = {key: {name: (t.shape, t.dtype) for name, t in state.items()} for key, state in own.items()}
    found: dict[tuple[str, Statistic], State] = {}
    for of_process in distributed.gathered(shapes):
        for key, of_state in of_process.items():
            for name, (shape, dtype) in of_state.items():
                mine = found.setdefault(key, own.get(key, {})).get(name)
                if mine is None or mine.numel() < shape.numel():
                    assert mine is None or not mine.numel(), (key, name, mine.shape, shape)
                    found[key][name] = torch.zeros(shape, dtype=dtype, device=device)
    for state in found.values():
        for name in sorted(state):
            state[name] = distributed.add_up(state[name].contiguous())
    return found
