"""The model in memory as an allocator sees it: run from any block on, with plans put in and taken out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from spectrim.core import distributed
from spectrim.core.plan import Candidate, Choice, Plan
from spectrim.model import apply, blocks
from spectrim.model.blocks import Batch, Call
from spectrim.model.targets import Structure

# What measures a choice needs only its product: pivots are chosen when the plan is written.
_PLAIN = {"pivot": "low_rank", "pivot_sparse": "low_rank_sparse"}


class Installed:
    """`core.registry.Live` over a loaded model; `windows` are the calibration tokens, `batch` of them run at once."""

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        candidates: Mapping[str, Candidate],
        windows: Int[Tensor, "sequences length"],
        batch: int,
    ):
        self.model, self.structure, self.candidates = model, structure, candidates
        self.windows, self.batch = windows, batch
        self._calls: dict[bytes, list[Call]] = {}
        self._made: dict[str, tuple[Choice, Mapping[str, nn.Module]]] = {}
        self._tupled: bool | None = None  # what kind of answer the blocks give, once one has run

    @property
    def blocks(self) -> int:
        """Their number."""
        return self.structure.count

    def batches(self, sequences: int | None = None, length: int | None = None) -> list[Int[Tensor, "batch length"]]:
        """The first calibration windows, cut to `length`: as many and as long as there are, if fewer or shorter."""
        return list(self.windows[:sequences, :length].split(self.batch))

    @torch.no_grad()
    def enter(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length hidden"]:
        """The hidden state entering the first block."""
        return self._recorded(ids)[0]

    def _recorded(self, ids: Int[Tensor, "batch length"]) -> tuple[Tensor, list[Call]]:
        state, found = blocks.record(self.model, self.structure, Batch(ids.to(self.model.device)))
        known = next(iter(self._calls.values()), None)
        calls = blocks.deduplicated(found, known)
        self._calls[_key(ids)] = calls
        return state, calls

    @torch.no_grad()
    def run(
        self, ids: Int[Tensor, "batch length"], state: Float[Tensor, "batch length hidden"], start: int, stop: int
    ) -> Float[Tensor, "batch length hidden"]:
        """The state entering block `stop` from the one entering block `start`, with what is installed."""
        calls = self._calls.get(_key(ids)) or self._recorded(ids)[1]
        for index in range(start, stop):
            state = blocks.run(self.model.get_submodule(self.structure.block(index)), state, calls[index])
        return state

    @torch.no_grad()
    def logits(
        self, ids: Int[Tensor, "batch length"], state: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """What follows the blocks, from the state leaving the last one."""
        ids = ids.to(self.model.device)
        if self._tupled is None:
            self._tupled = blocks.answers_tuple(self.model, self.structure, ids[:1, :1])
        return blocks.finish(self.model, self.structure, ids, state, self._tupled)

    def answer(
        self, ids: Int[Tensor, "batch length"], recompute: bool = False
    ) -> Float[Tensor, "batch length vocabulary"]:
        """The logits with what is installed, with gradients if they are on.

        recompute: keep only the state entering each block for the way back, and run each block again there.
        """
        known = _key(ids) in self._calls
        state, calls = self._recorded(ids)
        if not known and len(self._calls) > 1:  # batches of a training do not come back: one is kept to share with
            del self._calls[_key(ids)]
        for index in range(self.blocks):
            block = self.model.get_submodule(self.structure.block(index))
            again = recompute and torch.is_grad_enabled()
            state = (
                checkpoint(blocks.run, block, state, calls[index], use_reentrant=False)
                if again
                else blocks.run(block, state, calls[index])
            )
        return blocks.finish(self.model, self.structure, ids.to(self.model.device), state)

    def built(self, target: str, choice: Choice, owner: int | None = None) -> Mapping[str, nn.Module]:
        """The modules that a choice makes of a target, by name; a pivot form as the plain product that it stores.

        owner: the process that cuts them, for all; by default each does for itself.
        """
        plain = {module: _PLAIN.get(format, format) for module, format in choice.formats.items()}
        if choice.counts.get("column"):
            plain = dict.fromkeys(plain, "low_rank_columns")
        cut = distributed.cut_by(owner, lambda: self.candidates[target].cut(choice))
        return apply.built(self.structure.named(target), replace(choice, formats=plain), cut, self.model)

    @contextmanager
    def installed(self, plan: Plan) -> Iterator[None]:
        """The model with a plan in it; afterwards bit for bit as before. It nests.

        The last modules made of each target are kept: plans that differ in one target build that one alone.
        """
        modules: dict[str, nn.Module] = {}
        for target, choice in plan.choices.items():
            known = self._made.get(target)
            if known is None or known[0] != choice:
                known = self._made[target] = (choice, self.built(target, choice))
            modules |= known[1]
        with self.swapped(modules):
            yield

    @contextmanager
    def swapped(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """The model with built modules in it; the ones before come back, the same objects."""
        before = {name: self.model.get_submodule(name) for name in modules}
        try:
            for name, module in modules.items():
                self.model.set_submodule(name, module)
            yield
        finally:
            for name, module in before.items():
                self.model.set_submodule(name, module)


def _key(ids: Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()
