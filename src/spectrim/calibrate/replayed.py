"""What the parts of a block have answered, kept by batch, so that a later run of the block need not run them again.

A second pass runs a block once for each of its steps. Between two steps nothing changes that comes before the modules
of the first one, such as the attention once its last matrix is compressed: that part answers what it answered before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

KEPT = 2**29  # bytes of answers that are kept without a limit on memory


@dataclass(frozen=True)
class _Answer:
    """What one call of a part gave, in main memory; added: outputs of modules inside it that are asked for too."""

    value: Any
    added: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum({t.data_ptr(): t.nbytes for t in tree_leaves((self.value, self.added)) if _held(t)}.values())


@dataclass
class Replayed:
    """Parts of one block, a child each that has targets in it.

    modules: the targets'; added: those of them whose outputs `run` gives where they do not run; room: bytes of answers
    that are kept: what does not fit is run again.
    """

    model: nn.Module
    prefix: str
    modules: Sequence[str]
    added: Collection[str] = ()
    room: int = 0
    held: dict[tuple[str, int, str], list[_Answer]] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, set[str]]:
        """The parts, and which of the modules are inside each."""
        names = [f"{self.prefix}.{child}" for child, _ in self.model.get_submodule(self.prefix).named_children()]
        inside = {name: {module for module in self.modules if module.startswith(f"{name}.")} for name in names}
        return {name: found for name, found in inside.items() if found and self.room}

    def ending(self, modules: Collection[str], later: Collection[str]) -> list[str]:
        """The parts that have some of the modules in them and none of the later ones: worth running to their end."""
        return [
            name for name, inside in self.parts.items() if inside & set(modules) and not inside & set(later) and later
        ]

    @contextmanager
    def run(
        self, stream: str, batch: int, watched: Collection[str] = (), changing: Collection[str] = (), keep: bool = True
    ) -> Iterator[dict[str, Tensor]]:
        """While inside, the block answers from what is kept of a stream's batch, and what is new is kept.

        Gives the outputs of the `added` modules that will not run. watched: modules that must run; changing: modules
        that will be others in later runs, so nothing that comes after them is kept; keep: whether anything is.
        """
        known: dict[str, Tensor] = {}
        after: list[str] = []  # those of the changing modules that were come to
        with ExitStack() as stack:
            for name in changing if keep else ():
                hook = self.model.get_submodule(name).register_forward_pre_hook(
                    lambda *_, name=name: after.append(name)
                )
                stack.callback(hook.remove)
            for part, inside in self.parts.items():
                answers = self.held.get((stream, batch, part), [])
                replay = bool(answers) and not inside & set(watched)
                if replay:
                    known |= {name: _copied(t, self._device) for each in answers for name, t in each.added.items()}
                self._replace(stack, (stream, batch, part), replay, lambda: keep and not after)
            yield known

    @property
    def _device(self) -> torch.device:
        return next(self.model.get_submodule(self.prefix).parameters()).device

    def _replace(self, stack: ExitStack, key: tuple[str, int, str], replay: bool, keeps: Callable[[], bool]) -> None:
        """Have a part answer from what is kept, call by call, and keep the answers of further calls."""
        part, seen = self.model.get_submodule(key[2]), dict[str, tuple[Tensor, int]]()
        for name in self.added:
            if name.startswith(f"{key[2]}."):
                hook = self.model.get_submodule(name).register_forward_hook(partial(_note, seen, name))
                stack.callback(hook.remove)
        stack.callback(_restored(part))
        part.forward = partial(self._answer, key, part.forward, count(), replay, keeps, seen)

    def _answer(
        self, key: tuple[str, int, str], original: Callable[..., Any], calls: Iterator[int], replay: bool,
        keeps: Callable[[], bool], seen: dict[str, tuple[Tensor, int]], *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """What the next call of a part gives; the arguments after `seen` are the call's."""
        answers, place = self.held.get(key, []), next(calls)
        if replay and place < len(answers):
            return tree_map(lambda leaf: _copied(leaf, self._device), answers[place].value)
        seen.clear()
        answer = original(*args, **kwargs)
        # an output that something was added to in place is not known any more
        if keeps() and place == len(answers) and all(made._version == then for made, then in seen.values()):
            self._keep(key, answer, {name: made for name, (made, _) in seen.items()})
        return answer

    def _keep(self, key: tuple[str, int, str], answer: Any, seen: dict[str, Tensor]) -> None:
        """Keep an answer as far as there is room; what is much larger than a state, as weights of attention, is not."""
        copies: dict[Any, Tensor] = {}

        def copied(leaf: Any) -> Any:
            # an output that is handed on as it is is kept once
            place = (leaf.data_ptr(), leaf.shape, leaf.stride()) if _held(leaf) else None
            if place is not None and place not in copies:
                copies[place] = _copied(leaf, torch.device("cpu"))
            return leaf if place is None else copies[place]

        sizes = [leaf.nbytes for leaf in tree_leaves(answer) if _held(leaf)]
        if not sizes or sum(sizes) > min(self.room, 2 * min(sizes)):
            return
        made = _Answer(tree_map(copied, answer), {name: copied(tensor) for name, tensor in seen.items()})
        if made.bytes <= self.room:
            self.room -= made.bytes
            self.held.setdefault(key, []).append(made)


def _note(seen: dict[str, tuple[Tensor, int]], name: str, _: nn.Module, __: Any, output: Tensor) -> None:
    seen[name] = (output, output._version)


def _held(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.numel() > 0


def _copied(leaf: Any, device: torch.device) -> Any:
    """A tensor of its own: a block may add to what a part of it gives in place."""
    return leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else leaf


def _restored(part: nn.Module) -> Callable[[], None]:
    """What gives a module the `forward` that it has now."""
    if "forward" not in vars(part):
        return lambda: delattr(part, "forward")
    own = vars(part)["forward"]
    return lambda: setattr(part, "forward", own)
