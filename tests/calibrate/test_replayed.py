"""Parts of a block that answer from what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.calibrate.replayed import Replayed

STATE = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    """Two matrices, and how often they ran; answers with a tuple, weights included where they are wanted."""

    def __init__(self, weights: int = 0) -> None:
        super().__init__()
        self.first, self.last, self.runs, self.weights = nn.Linear(4, 4), nn.Linear(4, 4), 0, weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self.runs += 1
        return self.last(self.first(x)), torch.zeros(self.weights) if self.weights else None


class Block(nn.Module):
    """A part, called so often, to whose answer the block adds in place; then a matrix."""

    def __init__(self, calls: int = 1, weights: int = 0) -> None:
        super().__init__()
        self.part, self.end, self.calls = Part(weights), nn.Linear(4, 4), calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.part(x)[0].add_(x)
        answer: Tensor = self.end(x)
        return answer


def replayed(block: Block, room: int = 10**6) -> tuple[nn.Module, Replayed]:
    model = nn.ModuleDict({"block": block})
    modules = ["block.part.first", "block.part.last", "block.end"]
    return model, Replayed(model, "block", modules, ["block.part.last"], room)


@torch.no_grad()
def run(block: Block, of: Replayed, batch: int = 0, **asked: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with of.run("dense", batch, **asked) as known:
        return block(STATE + batch), dict(known)


@pytest.mark.parametrize("calls", [1, 2])
@torch.no_grad()
def test_a_part_answers_again_what_it_answered(calls: int) -> None:
    block = Block(calls)
    _, of = replayed(block)
    right = block(STATE)
    first, known = run(block, of)
    assert not known and block.part.runs == 2 * calls
    for _ in range(2):  # what is added to an answer in place is not added to what is kept
        again, known = run(block, of)
        assert torch.equal(first, right) and torch.equal(again, right)
        assert block.part.runs == 2 * calls and set(known) == {"block.part.last"}
    if calls == 1:
        assert torch.equal(known["block.part.last"], block.part(STATE)[0])
    other, _ = run(block, of, batch=1)
    assert torch.equal(other, block(STATE + 1)) and not torch.equal(other, right), "batches are kept apart"
    assert "forward" not in vars(block.part), "nothing stays in the model"


def test_what_must_run_or_will_change_is_not_kept() -> None:
    block = Block()
    _, of = replayed(block)
    run(block, of, changing=["block.part.first"])
    assert not of.held
    run(block, of, keep=False)
    assert not of.held
    run(block, of, changing=["block.end"])
    assert len(of.held) == 1 and block.part.runs == 3
    run(block, of, watched=["block.part.last"])
    assert block.part.runs == 4
    run(block, of, watched=["block.end"])
    assert block.part.runs == 4


def test_the_room_is_kept_and_what_is_much_larger_than_a_state_is_not() -> None:
    block = Block()
    _, of = replayed(block, room=3 * STATE.nbytes)
    for batch in range(5):
        run(block, of, batch)
    # the output of the last matrix is the part's own answer, and is kept once
    assert len(of.held) == 3 and of.room == 0
    block = Block(weights=STATE.numel() * 10)
    _, of = replayed(block)
    run(block, of)
    assert not of.held


def test_parts_to_run_to_their_end() -> None:
    _, of = replayed(Block())
    assert of.ending(["block.part.last"], ["block.end"]) == ["block.part"]
    assert of.ending(["block.part.first"], ["block.part.last", "block.end"]) == []
    assert of.ending(["block.end"], []) == []
    assert replayed(Block(), room=0)[1].ending(["block.part.last"], ["block.end"]) == []
