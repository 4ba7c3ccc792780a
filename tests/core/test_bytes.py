"""Bytes that are counted against those of the modules that are built."""

from __future__ import annotations

import pytest
import torch

from spectrim.core import budget
from spectrim.core.bytes import entry_bytes, entry_steps, index_bytes, reached, refuse_too_few, stored_bytes
from spectrim.core.plan import Choice, Part, Plan, Target
from spectrim.model import apply, modules

SHAPES = [(24, 40), (40, 24), (1, 9), (9, 1), (8, 400), (3, 2**15 + 8)]


def target_of(out: int, width: int, bias: bool = False) -> Target:
    return Target("layer", "up", (0,), (Part("layer", out, width, "x", bias),))


def built_bytes(choice: Choice, target: Target, dtype: torch.dtype) -> int:
    """Of the module of a choice, without a bias that the dense one had."""
    (part,) = target.parts
    module = modules.empty(apply.spec_of(choice, target, part), device="meta", dtype=dtype)
    kept = {name: t for name, t in module.state_dict().items() if name != "bias" or not part.bias}
    return sum(t.numel() * t.element_size() for t in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_module(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rank, entries = min(shape) // 2, shape[0] * shape[1]
    choices = [Choice({"layer": "low_rank"}, {"rank": rank}), Choice({"layer": "dense"}, {})]
    choices += [Choice({"layer": "low_rank"}, {"rank": rank}, bias=True)]
    choices += [Choice({"layer": "pivot"}, {"rank": r}) for r in (0, rank)]
    for r in (0, rank):
        for number in (0, 1, entries // 9, entries):
            choices += [Choice({"layer": f}, {"rank": r, "entry": number}) for f in budget.WITH_ENTRIES.values()]
        for columns in (0, min(3, shape[1] - r)):
            counts = {"rank": r, "column": columns}
            choices += [Choice({"layer": "pivot"}, counts)] if r + columns else []
            choices += [Choice({"layer": "low_rank_columns"}, counts)]
    for choice in choices:
        for bias in (False, True):
            target = target_of(*shape, bias)
            counted = stored_bytes([target], {"layer": choice}, dtype.itemsize)
            assert counted == built_bytes(choice, target, dtype), choice
            assert counted == dtype.itemsize * budget.count(choice, target) + index_bytes(choice, target)
    assert stored_bytes([target_of(*shape)], {}, dtype.itemsize) == entries * dtype.itemsize


def test_both_kinds_of_index_are_met() -> None:
    small, large = (
        apply.spec_of(Choice({"layer": "low_rank_sparse"}, {"rank": 0, "entry": n}), target_of(8, 400), part)
        for n in (100, 1600)
        for part in target_of(8, 400).parts
    )
    assert small["index"] == "csr" and large["index"] == "mask"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_add_up_to_the_bytes_of_entries(shape: tuple[int, int]) -> None:
    (part,) = target_of(*shape).parts
    number = min(part.parameters, 3000)
    for itemsize in (2, 4):
        sums = torch.cumsum(entry_steps(part, number, itemsize), 0) + entry_bytes(part, 0, itemsize)
        assert sums.tolist() == [entry_bytes(part, n, itemsize) for n in range(1, number + 1)]
    assert len(entry_steps(part, 0, 2)) == 0


def test_too_few_bytes_are_refused_and_a_note_says_what_was_reached() -> None:
    refuse_too_few(10, 10)
    with pytest.raises(ValueError, match=r"it leaves 9 bytes, but the indices .* need 10"):
        refuse_too_few(10, 9)
    target = target_of(24, 40)
    plan = Plan({"layer": Choice({"layer": "low_rank_sparse"}, {"rank": 1, "entry": 6})}, 110, 70)
    small = Plan({"layer": Choice({"layer": "low_rank_sparse"}, {"rank": 0, "entry": 6})}, 110, 6)
    assert reached("it", small, [target], 2) == "it: 124 of 220 bytes allowed, indices included (2 a number)"
    with pytest.raises(AssertionError):
        reached("it", plan, [target], 2)
