"""What many changed models lose, with one block in memory at a time: all of them go through it together.

`core.meter` measures depth first: a change is put into the model in memory and run to its end. Here the hidden states
of the dense model, of the base state and of every change so far go through a block one after another before the next
block is read; a change begins in its own block, from the base state's. The same products of the same batches, so the
states are the same bits; the head gives the predictions one sequence at a time, and losses differ by its rounding.

Costs, for N blocks and n changes: n (N + 1) / 2 + 2 N block passes, each block read once; n + 2 states a window, in
memory as far as there is room, else in files. Nothing is known before the end: a killed run begins its round anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectrim.calibrate.collect import without_dropout
from spectrim.calibrate.states import Streams
from spectrim.calibrate.streamed import enter
from spectrim.core import distributed, heap
from spectrim.core.meter import last_batches
from spectrim.core.plan import Choice
from spectrim.model import blocks
from spectrim.model.blocks import Batch, Call
from spectrim.model.checkpoint import Weights
from spectrim.model.live import Installed

Choices = Mapping[str, Choice | None]
Sums = Float[Tensor, "streams 2"]

DENSE, BASE = 0, 1  # the first two streams; without any choice in the base state it is the dense model's own


@dataclass(frozen=True)
class BreadthFirst:
    """`registry.Measures` over a model on disk; live: makes modules of it, and has the windows.

    room: bytes of states in memory, the others are in `folder`. Several processes run a share of the batches each.
    """

    weights: Weights
    live: Installed
    device: torch.device
    folder: Path
    room: int

    def deviations(
        self,
        base: Choices,
        changed: Choices,
        trial: int | None,
        length: int | None,
        progress: Callable[[int, int], None],
    ) -> Iterator[tuple[str, float]]:
        """As in `Measures`, all at the end; progress: in blocks. Raises ValueError where the dense model overflows."""
        losses = self._losses(base, changed, trial, length, progress)
        yield from zip(changed, losses[BASE + 1 :], strict=True)

    def deviation(self, base: Choices, trial: int | None, length: int | None) -> float:
        """As in `Measures`."""
        return self._losses(base, {}, trial, length, lambda done, total: None)[BASE]

    @torch.no_grad()
    def _losses(
        self,
        base: Choices,
        changed: Choices,
        trial: int | None,
        length: int | None,
        progress: Callable[[int, int], None],
    ) -> list[float]:
        """By stream."""
        every = [Batch(ids) for ids in last_batches(self.live, trial, length)]
        own = {i: every[i] for i in distributed.share(range(len(every)))}
        sums = torch.zeros(2 + len(changed), 2, dtype=torch.float64)
        if own:
            with Streams(self.folder, self.room) as streams, without_dropout(self.weights.model):
                sums = _Walk(self, own, base, changed, streams).losses(progress)
        # added up in the order of processes: what comes of one change does not depend on which others there were
        total = sum(distributed.gathered(sums), torch.zeros_like(sums))
        return [float(lost / tokens) for lost, tokens in total]


class _Walk:
    """One way through all blocks; begins: by block, the changes that begin there, each with its stream."""

    def __init__(
        self, of: BreadthFirst, own: Mapping[int, Batch], base: Choices, changed: Choices, streams: Streams
    ) -> None:
        self.of, self.own, self.base, self.changed, self.streams = of, own, base, changed, streams
        self.structure, self.model = of.live.structure, of.weights.model
        self.of_base = BASE if any(choice is not None for choice in base.values()) else DENSE
        self.inside: dict[int, list[str]] = {}
        for name in dict.fromkeys([*base, *changed]):
            self.inside.setdefault(min(self.structure.named(name).blocks), []).append(name)
        self.numbers = {name: number for number, name in enumerate(changed, BASE + 1)}
        self.under_way = [stream for stream in (DENSE, BASE) if stream <= self.of_base]
        self.calls: Sequence[Sequence[Call]] = ()
        self.tupled = False

    def losses(self, progress: Callable[[int, int], None]) -> Sums:
        """By stream the sum of the losses of all tokens, and their number."""
        weights, count = self.of.weights, self.structure.count
        self.calls = enter(weights, self.structure, self.own, self.of.device, self._enter)
        for index in range(count):
            heap.give_back()
            weights.load(self.structure.block(index), self.of.device)
            if index == 0:
                self.tupled = self._answers_tuple()
            self._block(index)
            weights.release(self.structure.block(index))
            progress(index + 1, count)
        return self._predicted()

    def _enter(self, batch: int, state: Tensor) -> None:
        for stream in self.under_way:
            self.streams.put(stream, batch, state.clone())

    def _answers_tuple(self) -> bool:
        """What kind of answer the model expects of its blocks."""
        i, calls = next(zip(self.own, self.calls, strict=True))
        call, state = calls[0].to(self.of.device), self.streams.get(DENSE, i).to(self.of.device)
        answer = self.model.get_submodule(self.structure.block(0))(state, *call.args, **call.kwargs)
        return isinstance(answer, (tuple, list))

    def _block(self, index: int) -> None:
        """Every stream through one block: those that begin in it, while the base state's is still the one entering."""
        live, begun = self.of.live, list[int]()
        inside = self.inside.get(index, [])
        made = {name: live.built(name, choice) for name in inside if (choice := self.base.get(name)) is not None}
        for name in inside:
            if name in self.changed:
                choice = self.changed[name]
                own = {} if choice is None else live.built(name, choice)
                with live.swapped({**_modules(made, but=name), **own}):
                    self._through(index, self.of_base, self.numbers[name])
                begun.append(self.numbers[name])
        for stream in self.under_way:
            with live.swapped({} if stream == DENSE else _modules(made)):
                self._through(index, stream, stream)
        self.under_way += begun

    def _through(self, index: int, source: int, to: int) -> None:
        """All batches of a stream through the block as it is; what leaves it is a stream's."""
        block, device = self.model.get_submodule(self.structure.block(index)), self.of.device
        for i, calls in zip(self.own, self.calls, strict=True):
            output = blocks.run(block, self.streams.get(source, i).to(device), calls[index].to(device))
            if to == DENSE and not torch.isfinite(output).all():
                raise ValueError(
                    f"{self.structure.block(index)} gives values that are not finite on the trial windows: their "
                    "losses cannot be measured"
                )
            self.streams.put(to, i, output)
        heap.give_back()

    def _predicted(self) -> Sums:
        """The predictions of every stream against the dense model's, one sequence at a time."""
        weights, sums = self.of.weights, torch.zeros(BASE + 1 + len(self.changed), 2, dtype=torch.float64)
        loaded = weights.load_outside(self.structure.blocks, self.of.device)
        head = next((n for n, m in self.model.named_modules() if m is self.model.get_output_embeddings()), None)
        if head is not None:
            weights.load(head, self.of.device)
        for i, batch in self.own.items():
            for place in range(len(batch.ids)):
                expected = self._log_probabilities(DENSE, i, place)
                share = expected.exp()
                for stream in self.under_way[1:]:
                    found = self._log_probabilities(stream, i, place)
                    lost = torch.sub(expected, found, out=found).mul_(share).sum(-1)
                    sums[stream] += torch.stack([lost.sum(dtype=torch.float64).cpu(), torch.tensor(lost.numel())])
        weights.release_names(loaded)
        if head is not None:
            weights.release(head)
        if self.of_base == DENSE:
            sums[BASE, 1] = 1  # nothing lost
        return sums

    def _log_probabilities(self, stream: int, batch: int, place: int) -> Float[Tensor, "1 length vocabulary"]:
        state = self.streams.get(stream, batch, place).to(self.of.device)
        ids = self.own[batch].ids[place : place + 1].to(self.of.device)
        return blocks.finish(self.model, self.structure, ids, state, self.tupled).float().log_softmax(-1)


def _modules(made: Mapping[str, Mapping[str, nn.Module]], but: str | None = None) -> dict[str, nn.Module]:
    """Of all targets but one."""
    return {module: built for name, of_one in made.items() if name != but for module, built in of_one.items()}
