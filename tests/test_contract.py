"""What every registered decomposer and allocator keeps to, found through the registry with its default settings."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectrim.calibrate.statistics import Statistic
from spectrim.core import budget, registry
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target
from spectrim.core.registry import Allocator, Decomposer, Problem
from spectrim.model import apply, modules

# of single matrices and ranks alone; those of FFNs, and allocators that try plans on a model, are in
# test_contract_model.py, those with a sparse part in test_contract_entries.py
OF_ENTRIES = {"cap_greedy"}  # allocators that ask for entry units
DECOMPOSERS = {
    name: kind
    for name, kind in registry.decomposers().items()
    if "rank" in kind().kinds and "entry" not in kind().kinds and not kind().whole
}
ALLOCATORS = {
    name: kind for name, kind in registry.allocators().items() if kind().sees != "model" and name not in OF_ENTRIES
}
EACH = pytest.mark.parametrize("name", sorted(DECOMPOSERS))
EACH_ALLOCATOR = pytest.mark.parametrize("name", sorted(ALLOCATORS))
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])
LIMIT = 1e-5  # of float32 work, relative to the largest number


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights() -> dict[str, Tensor]:
    """Matrices of every shape and rank that may come up."""
    return {
        "wide": torch.randn(10, 16, generator=rng()),
        "tall": torch.randn(18, 8, generator=rng()),
        "square": torch.randn(12, 12, generator=rng()),
        "one row": torch.randn(1, 9, generator=rng()),
        "one column": torch.randn(9, 1, generator=rng()),
        "rank 3": torch.randn(10, 3, generator=rng()) @ torch.randn(3, 16, generator=rng(1)),
        "zero": torch.zeros(10, 16),
        "zero rows and columns": torch.randn(10, 16, generator=rng()).index_fill(0, torch.tensor([2]), 0.0)
        * (torch.arange(16) % 4 > 0),
        "bfloat16": torch.randn(10, 16, generator=rng()).bfloat16(),
    }


WEIGHTS = pytest.mark.parametrize("kind", sorted(weights()))


def tokens(width: int, count: int = 64) -> Tensor:
    """Inputs with an outlier channel."""
    x = torch.randn(count, width, generator=rng(7))
    x[:, 0] *= 100
    return x


def inputs_of(kind: str, width: int) -> Tensor:
    """Tokens × width: plenty, fewer than the width, or a channel that is always 0."""
    x = tokens(width, 3 if kind == "few" else 64)
    if kind == "dead channel":
        x[:, -1] = 0
    return x


def measured(statistic: Statistic, x: Tensor, out: int) -> Tensor:
    """A statistic from random values, given in several batches as the drivers do."""
    assert statistic.where in ("input", "gradient"), f"{statistic} is not a statistic of one matrix"
    state = statistic.start(x.shape[1], torch.device("cpu"))
    gradients = [torch.randn(out, x.shape[1], generator=rng(i)) for i in range(3)]
    for values in gradients if statistic.where == "gradient" else x.split(20):
        statistic.update(state, values)
    return statistic.result(state)


def decomposed(name: str, weight: Tensor, inputs: str = "plenty") -> Candidate:
    out, width = weight.shape
    target = Target("layer", "up", (0,), (Part("layer", out, width, "x"),))
    method = DECOMPOSERS[name]()
    stats = {statistic: measured(statistic, inputs_of(inputs, width), out) for statistic in method.needs}
    return method.decompose(target, {"layer": weight}, {"layer": stats})


def at_rank(rank: int, format: str = "low_rank") -> Choice:
    return Choice({"layer": format}, {"rank": rank})


def product(candidate: Candidate, rank: int) -> Tensor:
    cut = candidate.cut(at_rank(rank))["layer"]
    return cut["left"].double() @ cut["right"].double()


def built(candidate: Candidate, choice: Choice, dtype: torch.dtype, bias: Tensor | None) -> modules.Format:
    """The module a model would get."""
    (part,) = candidate.target.parts
    spec = apply.spec_of(choice, candidate.target, dataclasses.replace(part, bias=bias is not None))
    cut = candidate.cut(choice)["layer"]
    given = apply.bias_of(cut, bias)
    return modules.build(spec, apply.form(spec, cut, dtype), given)


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= LIMIT * max(1.0, float(other.abs().max())))


# --- decomposers ---


def test_there_is_something_to_test() -> None:
    assert DECOMPOSERS and ALLOCATORS


@EACH
def test_it_says_whether_right_is_stored(name: str) -> None:
    assert DECOMPOSERS[name]().keeps_right == ("right" in decomposed(name, weights()["wide"]).tensors())


@EACH
def test_a_decomposer_is_one(name: str) -> None:
    method = DECOMPOSERS[name]()
    assert isinstance(method, Decomposer)
    assert all(isinstance(statistic, Statistic) for statistic in method.needs)
    assert hash(method) == hash(DECOMPOSERS[name]()), "its settings are a key"
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen


@EACH
@WEIGHTS
def test_spectrum(name: str, kind: str) -> None:
    candidate = decomposed(name, weights()[kind])
    units = candidate.rank_units
    assert units.scores.shape == (min(weights()[kind].shape),)
    assert units.scores.isfinite().all() and (units.scores >= 0).all()
    assert (units.scores.diff() <= 0).all(), "best first"
    assert units.errors is None or (units.errors >= 0).all()
    assert all(tensor.isfinite().all() for tensor in candidate.tensors().values())


@EACH
@WEIGHTS
def test_all_units_reproduce_the_weight(name: str, kind: str) -> None:
    weight = weights()[kind]
    assert close(product(decomposed(name, weight), min(weight.shape)), weight.double())


@EACH
@pytest.mark.parametrize("shape", [(10, 16), (18, 8), (12, 12)])
@pytest.mark.parametrize("rank", [1, 3])
def test_k_units_reproduce_a_weight_made_of_k(name: str, shape: tuple[int, int], rank: int) -> None:
    out, width = shape
    weight = torch.randn(out, rank, generator=rng(2)) @ torch.randn(rank, width, generator=rng(3))
    assert close(product(decomposed(name, weight), rank), weight.double())


@EACH
@pytest.mark.parametrize("inputs", ["plenty", "few", "dead channel"])
@WEIGHTS
def test_a_predicted_error_is_the_measured_one(name: str, kind: str, inputs: str) -> None:
    weight = weights()[kind].double()
    candidate = decomposed(name, weight, inputs)
    if candidate.rank_units.errors is None:
        assert candidate.first(0).error is None
        return
    x, (out, width) = inputs_of(inputs, weight.shape[1]).double(), weight.shape
    whole, before = float((x @ weight.T).square().sum()), float("inf")
    for rank in range(min(weight.shape) + 1):
        choice = candidate.first(rank * (out + width))
        difference = weight - product(candidate, rank)
        error = float((x @ difference.T).square().sum())
        assert choice.counts["rank"] == rank and choice.error is not None
        assert choice.error == pytest.approx(error, rel=1e-6, abs=1e-9 * whole + 1e-30)
        assert choice.error <= before
        before = choice.error


@EACH
@FORMATS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["wide", "tall", "one row"])
def test_predicted_cost_is_what_is_built(name: str, kind: str, bias: bool, format: str) -> None:
    weight = weights()[kind]
    candidate = decomposed(name, weight)
    (part,), given = candidate.target.parts, torch.randn(len(weight), generator=rng()) if bias else None
    candidate = candidate.priced(format, budget.unit_cost(format, part))
    for rank in range(budget.largest_rank(format, part) + 1):
        cost = candidate.fixed_cost + int(candidate.rank_units.costs[:rank].sum())
        choice = candidate.first(cost)
        assert choice.counts["rank"] == rank
        module = built(candidate, choice, torch.float32, given)
        size = sum(parameter.numel() for parameter in module.parameters())
        own = len(weight) if bias and not choice.bias else 0
        assert size - own == cost == budget.count(choice, candidate.target)


@EACH
@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tall", "rank 3", "zero", "one row"])
def test_a_module_gives_the_product_and_survives_saving(
    name: str, kind: str, dtype: torch.dtype, format: str, tmp_path: Path
) -> None:
    weight, bias = weights()[kind], torch.randn(len(weights()[kind]), generator=rng())
    candidate, x = decomposed(name, weight), torch.randn(5, weight.shape[1], generator=rng())
    for rank in {0, min(weight.shape) // 2}:
        module = built(candidate, at_rank(rank, format), dtype, bias.to(dtype))
        offset = candidate.cut(at_rank(rank, format))["layer"].get("offset", torch.zeros_like(bias))
        assert module.bias is not None, "the bias is kept, and added to"
        assert torch.equal(module.bias, (bias.to(dtype).to(offset) + offset).to(dtype))
        y = module(x.to(dtype))
        exact = x.double() @ product(candidate, rank).T + bias.double() + offset.double()
        limit = 1e-4 if dtype == torch.float32 else 0.1
        assert (y.double() - exact).abs().max() <= limit * max(1.0, float(exact.abs().max()))
        save_file(module.state_dict(), tmp_path / "module.safetensors")
        again = modules.empty(module.spec(), device="meta", dtype=dtype)
        again.load_state_dict(load_file(tmp_path / "module.safetensors"), assign=True)
        assert torch.equal(again(x.to(dtype)), y)


@EACH
@WEIGHTS
def test_the_same_input_gives_the_same_bytes(name: str, kind: str) -> None:
    found = []
    for seed in (0, 1):  # of a generator that no method may read
        torch.manual_seed(seed)
        candidate = decomposed(name, weights()[kind])
        found.append([candidate.rank_units.scores, *candidate.tensors().values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@EACH
def test_the_weight_is_not_changed(name: str) -> None:
    weight = weights()["wide"]
    candidate = decomposed(name, weight)
    candidate.cut(at_rank(3))
    assert torch.equal(weight, weights()["wide"])


# --- allocators ---

SHAPES = [(24, 40), (40, 24), (32, 32), (8, 64), (32, 32), (48, 16)]
RATIOS = (0.0, 0.05, 0.2, 0.35, 0.5, 0.7)


def targets_of_blocks() -> list[Target]:
    """The same six matrices in each of two blocks."""
    roles = ("q", "k", "v", "o", "up", "down")
    return [
        Target(f"b.{block}.{role}", role, (block,), (Part(f"b.{block}.{role}", *shape, f"{block}.{role}"),))
        for block in range(2)
        for role, shape in zip(roles, SHAPES, strict=True)
    ]


def candidates_of(targets: list[Target], format: str) -> dict[str, Candidate]:
    """Candidates with errors at the outputs, of random weights whose size grows from target to target."""
    method, found = DECOMPOSERS["whitened_svd"](), {}
    for i, target in enumerate(sorted(targets, key=lambda t: t.name)):
        (part,) = target.parts
        weight = (1 + i) * torch.randn(part.out_features, part.in_features, generator=rng(i))
        stats = {s: measured(s, tokens(part.in_features), part.out_features) for s in method.needs}
        candidate = method.decompose(target, {part.module: weight}, {part.module: stats})
        found[target.name] = candidate.priced(format, budget.unit_cost(format, part))
    return found


def block_statistics(needs: tuple[Any, ...]) -> dict[int, dict[Any, Tensor]]:
    """What is measured of each block: states before, (between,) and after."""
    found: dict[int, dict[Any, Tensor]] = {0: {}, 1: {}}
    for index, of_block in found.items():
        for statistic in needs:
            assert statistic.where in ("block", "sublayer"), f"{statistic} is not a statistic of a block"
            steps = 2 if statistic.where == "sublayer" else 1
            state = statistic.start(steps, torch.device("cpu"))
            statistic.update(state, *(torch.randn(30, 8, generator=rng(index + i)) for i in range(steps + 1)))
            of_block[statistic] = statistic.result(state)
    return found


def allocated(name: str, targets: list[Target], allowed: int, format: str) -> Plan:
    method = ALLOCATORS[name]()
    seen: dict[str, Any] = {}
    if method.sees == "units":
        seen = {"candidates": candidates_of(targets, format), "statistics": block_statistics(method.needs)}
    return method.allocate(Problem(targets, allowed, format, rng(), **seen))


def spent(plan: Plan, targets: list[Target]) -> int:
    """Counted anew from the choices."""
    return sum(
        budget.count(plan.choices[target.name], target) if target.name in plan.choices else target.parameters
        for target in targets
    )


def largest_unit(targets: list[Target], format: str) -> int:
    costs = [budget.unit_cost(format, target.parts[0]) for target in targets]
    return max(cost if isinstance(cost, int) else int(cost.max()) for cost in costs)


@EACH_ALLOCATOR
def test_an_allocator_is_one(name: str) -> None:
    method = ALLOCATORS[name]()
    assert isinstance(method, Allocator)
    assert method.sees in ("shapes", "units") and method.grain >= 1
    assert all(isinstance(statistic, Statistic) for statistic in method.needs)


@EACH_ALLOCATOR
@FORMATS
def test_the_budget_is_kept_and_used(name: str, format: str) -> None:
    targets = targets_of_blocks()
    for ratio in RATIOS:
        allowed = budget.allowed(targets, ratio)
        plan = allocated(name, targets, allowed, format)
        assert plan.budget == allowed
        assert plan.spent == spent(plan, targets) <= allowed
        grain = ALLOCATORS[name]().grain
        assert len(plan.choices) == 0 or allowed - plan.spent < grain * largest_unit(targets, format)
        assert Plan.from_json(plan.to_json()) == plan


@EACH_ALLOCATOR
@FORMATS
def test_every_choice_is_smaller_than_dense_and_can_be_built(name: str, format: str) -> None:
    targets = targets_of_blocks()
    plan = allocated(name, targets, budget.allowed(targets, 0.3), format)
    assert plan.choices.keys() <= {target.name for target in targets}
    for target in targets:
        if target.name in plan.choices:
            choice, (part,) = plan.choices[target.name], target.parts
            assert budget.count(choice, target) < target.parameters
            spec = apply.spec_of(choice, target, part)
            size = sum(p.numel() for p in modules.empty(spec, device="meta").parameters())
            assert size == budget.count(choice, target)


@EACH_ALLOCATOR
@FORMATS
def test_a_larger_budget_never_keeps_less(name: str, format: str) -> None:
    targets = targets_of_blocks()
    low, high = budget.allowed(targets, 0.7), budget.allowed(targets, 0.0)
    budgets = sorted({*range(low, high, (high - low) // 6), *range(low + 500, low + 504), high})
    kept = [allocated(name, targets, allowed, format).spent for allowed in budgets]
    assert kept == sorted(kept)


@EACH_ALLOCATOR
@FORMATS
def test_the_order_of_targets_does_not_matter(name: str, format: str) -> None:
    targets = targets_of_blocks()
    allowed = budget.allowed(targets, 0.37)
    plan = allocated(name, targets, allowed, format)
    for seed in range(3):
        random.Random(seed).shuffle(targets)
        assert allocated(name, targets, allowed, format) == plan


@EACH_ALLOCATOR
@FORMATS
def test_ratio_0_leaves_the_model_dense(name: str, format: str) -> None:
    targets = targets_of_blocks()
    plan = allocated(name, targets, budget.allowed(targets, 0.0), format)
    assert not plan.choices
    assert plan.spent == plan.budget == sum(target.parameters for target in targets)


@EACH_ALLOCATOR
def test_a_budget_that_is_too_small_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="ratio"):
        allocated(name, targets_of_blocks(), 10, "low_rank")
