"""CAP's greedy order against one unit at a time, in parameters and in bytes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectrim import compress
from spectrim.core import budget
from spectrim.core.bytes import entry_bytes, stored_bytes
from spectrim.core.plan import Candidate, Part, Plan, Target, Units
from spectrim.core.registry import Problem
from spectrim.methods.cap import CapGreedy
from spectrim.methods.svd import PlainSVD
from spectrim.model.checkpoint import Checkpoint
from spectrim.model.targets import find
from tests.families import FAMILIES
from tests.methods.mixes import FORMATS, candidate, mixed, random


def group(format: str) -> dict[str, Candidate]:
    """Matrices of different sizes, shapes and energies."""
    shapes = {"a": (12, 20), "b": (20, 12), "c": (16, 16), "d": (10, 10)}
    found: dict[str, Candidate] = {
        name: candidate((i + 1) * mixed(*shape), format, name) for i, (name, shape) in enumerate(shapes.items())
    }
    # several entries of one size, and of two matrices, so that ties occur
    for name in "ad":
        ranks, entries = found[name].units
        rounded = Units("entry", (entries.scores * 2).round() / 2, None, 1)
        found[name] = dataclasses.replace(found[name], units=(ranks, rounded))
    return found


def allocated(found: Mapping[str, Candidate], allowed: int, format: str, itemsize: int = 4, **settings: Any) -> Plan:
    targets = [each.target for each in found.values()]
    problem = Problem(targets, allowed, format, torch.Generator(), found, itemsize=itemsize)
    return CapGreedy(**settings).allocate(problem)


def one_at_a_time(found: Mapping[str, Candidate], allowed: int, itemsize: int = 0) -> dict[str, tuple[int, int] | None]:
    """The same order, unit by unit; plain format, where every direction of a matrix costs the same. itemsize: bytes."""

    def stored(target: Target, rank: int, entries: int) -> int:
        (part,) = target.parts
        if not itemsize:
            return rank * (part.out_features + part.in_features) + entries
        return itemsize * rank * (part.out_features + part.in_features) + entry_bytes(part, entries, itemsize)

    steps, state, closed = [], {name: [0, 0] for name in found}, set()
    for name, each in found.items():
        for kind, units in enumerate(each.units):
            for i, (score, cost) in enumerate(zip(units.scores.tolist(), units.costs.tolist(), strict=True)):
                steps.append((-(score**2) / cost, name, kind, i, cost))
        steps.append((1.0, name, 2, 0, 0))
    left, whole = allowed * (itemsize or 1) - sum(stored(each.target, 0, 0) for each in found.values()), set()
    for _, name, kind, _, _ in sorted(steps):
        target, (rank, entries) = found[name].target, state[name]
        if name in whole or (name, kind) in closed:
            continue
        room = target.parameters * (itemsize or 1) - stored(target, rank, entries)
        cost = stored(target, rank + (kind == 0), entries + (kind == 1)) - stored(target, rank, entries)
        if min(cost, room) > left or (kind == 2 and room > left):
            closed.add((name, kind))
        elif kind == 2 or cost >= room:
            left -= room
            whole.add(name)
        else:
            left -= cost
            state[name][kind] += 1
    return {name: None if name in whole else (counts[0], counts[1]) for name, counts in state.items()}


def test_the_order_is_that_of_one_unit_at_a_time() -> None:
    found, total = group("low_rank"), sum(each.target.parameters for each in group("low_rank").values())
    seen = set()
    for allowed in [*range(0, total, 53), *range(total - 5, total + 1)]:
        plan = allocated(found, allowed, "low_rank")
        got = {
            name: (plan.choices[name].counts["rank"], plan.choices[name].counts["entry"])
            if name in plan.choices
            else None
            for name in found
        }
        assert got == one_at_a_time(found, allowed), allowed
        seen |= {None in got.values(), max(r for r, _ in filter(None, got.values())) > 2 if any(got.values()) else None}
    assert {True, False} <= seen


@pytest.mark.parametrize("itemsize", [2, 4])
def test_in_bytes_too_the_order_is_that_of_one_unit_at_a_time(itemsize: int) -> None:
    found, kinds = wider("low_rank"), set()
    total, least = sum(each.target.parameters for each in found.values()), 400
    for allowed in [*range(least, total, 701), total - 2, total]:
        plan = allocated(found, allowed, "low_rank", itemsize, budget="bytes")
        got = {n: None if n not in plan.choices else tuple(plan.choices[n].counts.values()) for n in found}
        assert got == one_at_a_time(found, allowed, itemsize), allowed
        for name in plan.choices:
            kinds.add(index_of(found[name].target, plan.choices[name].counts["entry"]))
    assert {"csr", "mask"} <= kinds


@FORMATS
@pytest.mark.parametrize("itemsize", [2, 4])
def test_bytes_are_spent_as_far_as_an_entry_goes(format: str, itemsize: int) -> None:
    found = wider(format)
    targets = [each.target for each in found.values()]
    total, sizes, dense = sum(t.parameters for t in targets), [], 0
    for allowed in range(400, total + 1, 907):
        plan = allocated(found, allowed, format, itemsize, budget="bytes")
        stored, index = stored_bytes(targets, plan.choices, itemsize), stored_bytes(targets, plan.choices, 0)
        assert plan.spent * itemsize + index == stored and plan.spent <= plan.budget == allowed
        assert stored <= allowed * itemsize
        assert plan.notes == (
            f"cap_greedy: {stored:,} of {allowed * itemsize:,} bytes allowed, indices included ({itemsize} a number)",
        )
        left = allowed * itemsize - stored
        for target in targets:
            if target.name not in plan.choices:
                dense += 1
                continue
            choice = plan.choices[target.name]
            assert stored_bytes([target], {target.name: choice}, itemsize) < itemsize * target.parameters
            number, most = choice.counts["entry"], len(found[target.name].units[1].scores)
            step = entry_bytes(target.parts[0], number + 1, itemsize) - entry_bytes(target.parts[0], number, itemsize)
            assert number == most or step > left, "an entry would have fitted"
        sizes.append(stored)
    assert all(before <= after for before, after in itertools.pairwise(sizes)) and dense
    assert stored_bytes(targets, allocated(found, total, format, itemsize, budget="bytes").choices, itemsize) == (
        total * itemsize
    )


@functools.cache
def wider(format: str) -> dict[str, Candidate]:
    """A wide matrix beside the others: few of its entries are indexed by CSR, many by a mask."""
    return {**group(format), "e": candidate(mixed(8, 400), format, "e")}


def index_of(target: Target, number: int) -> str:
    """The index that so many entries are stored with."""
    (part,) = target.parts
    return "mask" if 4 * (part.out_features + 1) + 2 * number > part.out_features * -(-part.in_features // 8) else "csr"


@FORMATS
def test_a_budget_of_parameters_does_not_depend_on_bytes(format: str) -> None:
    found = group(format)
    for allowed in range(0, 900, 97):
        plan = allocated(found, allowed, format)
        assert plan == allocated(found, allowed, format, itemsize=2, budget="parameters") and plan.notes == ()


def test_bytes_that_do_not_pay_for_empty_indices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"it leaves 8 bytes, but the indices of matrices that keep nothing need"):
        allocated(group("low_rank"), 4, "low_rank", 2, budget="bytes")


QUICK = [f"groups.0.decompose.{setting}" for setting in ("iterations=8", "tolerance=0.5", "refit=1")]


@pytest.mark.parametrize(
    ("recipe", "format", "dtype", "quick"),
    [
        ("cap-greedy", "low_rank", torch.bfloat16, QUICK), ("cap-greedy", "pivot", torch.float32, QUICK),
        ("magnitude", "low_rank", torch.float32, []),
    ],
)  # fmt: skip
def test_a_saved_model_has_the_bytes_that_are_allowed(
    recipe: str, format: str, dtype: torch.dtype, quick: list[str], tmp_path: Path
) -> None:
    FAMILIES["llama"].make().to(dtype).save_pretrained(tmp_path / "dense")
    settings = ["groups.0.allocate={method: cap_greedy, budget: bytes}", *quick]
    pivot = {"low_rank": "plain", "pivot": "pivot"}[format]
    out = tmp_path / "out"
    made = compress(tmp_path / "dense", recipe, 0.4, out=out, format=pivot, settings=settings)
    state = load_file(out / "model.safetensors")
    before = load_file(tmp_path / "dense" / "model.safetensors")
    targets = find(Checkpoint(tmp_path / "dense").model).targets
    stored = 0
    for target in targets:
        (part,) = target.parts
        prefix = f"{part.module}."
        stored += sum(t.nbytes for key, t in state.items() if key.startswith(prefix) and not key.endswith(".bias"))
    dense = sum(before[f"{t.parts[0].module}.weight"].nbytes for t in targets)
    allowed = budget.allowed(targets, 0.4) * dtype.itemsize
    assert 0.59 * dense < allowed <= 0.6 * dense
    assert allowed - (dtype.itemsize + 2) < stored <= allowed
    assert made.plan.notes[-1].startswith(f"cap_greedy: {stored:,} of {allowed:,} bytes allowed")
    index = sum(t.nbytes for key, t in state.items() if not t.is_floating_point())
    assert index > 0.05 * stored


@FORMATS
def test_the_budget_is_spent_to_the_last_parameter(format: str) -> None:
    found = group(format)
    total = sum(each.target.parameters for each in found.values())
    spent = []
    for allowed in range(0, total + 1, 61):
        plan = allocated(found, allowed, format)
        counted = sum(
            budget.count(plan.choices[name], each.target) if name in plan.choices else each.target.parameters
            for name, each in found.items()
        )
        assert counted == plan.spent <= allowed == plan.budget
        for name, each in found.items():
            if name in plan.choices:
                assert budget.count(plan.choices[name], each.target) < each.target.parameters
                left_over = plan.choices[name].counts["entry"] < len(each.units[1].scores)
                assert plan.spent == allowed or not left_over, "an entry would have fitted"
        spent.append(plan.spent)
    assert all(before <= after for before, after in itertools.pairwise(spent))


def test_relative_values_do_not_depend_on_the_size_of_a_matrix() -> None:
    found = {name: candidate(mixed(20, 24), name=name) for name in "ab"}
    larger: dict[str, Candidate] = {"a": found["a"], "b": candidate(8 * mixed(20, 24), name="b")}
    shares = {relative: allocated(larger, 480, "low_rank", relative=relative).choices for relative in (False, True)}
    assert shares[True]["a"].counts == shares[True]["b"].counts
    assert "b" not in shares[False] or shares[False]["a"].counts["entry"] < shares[False]["b"].counts["entry"]


def test_a_matrix_without_entries_is_refused_by_name() -> None:
    target = Target("layer", "up", (0,), (Part("layer", 8, 8, "x"),))
    svd = PlainSVD().decompose(target, {"layer": random(8, 8)}, {"layer": {}})
    with pytest.raises(ValueError, match=r"layer \(role up\) has no entry units"):
        allocated({"layer": svd}, 30, "low_rank")


def test_a_matrix_that_keeps_nothing_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    found: dict[str, Candidate] = {
        "a": candidate(mixed(12, 12), name="a"),
        "b": candidate(1e-6 * mixed(9, 9), name="b"),
    }
    with caplog.at_level("WARNING"):
        plan = allocated(found, 60, "low_rank")
    assert plan.choices["b"].counts == {"rank": 0, "entry": 0}
    assert "1 matrices keep nothing at all, as b" in caplog.text
