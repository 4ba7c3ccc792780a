"""CAP's candidates against direct computation, and its greedy order against one unit at a time."""

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
from torch import Tensor

from spectrim import compress
from spectrim.calibrate.statistics import Norm
from spectrim.core import budget, registry
from spectrim.core.bytes import entry_bytes, stored_bytes
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target, Units
from spectrim.core.registry import Problem
from spectrim.core.rpca import robust_pca
from spectrim.methods.cap import CapGreedy, RobustPCA, SparseCandidate, best_2_of_4
from spectrim.methods.svd import PlainSVD
from spectrim.model.checkpoint import Checkpoint
from spectrim.model.targets import find
from tests.families import FAMILIES

FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])
SHAPES = pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=["wide", "tall", "square"])
WEIGHTINGS = pytest.mark.parametrize("weighting", ["none", "rms"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(m: int, n: int) -> Tensor:
    """A falling spectrum, noise, and some large entries."""
    outliers = torch.rand(m, n, generator=torch.Generator().manual_seed(5)) < 0.05
    return 2 * random(m, 4, seed=1) @ random(4, n, seed=2) + random(m, n) + 6 * random(m, n, seed=3) * outliers


def squares(width: int) -> Tensor:
    return random(width, seed=7).exp()


def candidate(weight: Tensor, format: str = "low_rank", name: str = "layer", **settings: Any) -> SparseCandidate:
    target = Target(name, "up", (0,), (Part(name, *weight.shape, "x"),))
    method = RobustPCA(**settings)
    stats = {statistic: squares(weight.shape[1]) for statistic in method.needs}
    made = method.decompose(target, {name: weight}, {name: stats})
    assert isinstance(made, SparseCandidate)
    priced = made.priced(format, budget.unit_cost(format, target.parts[0]))
    assert isinstance(priced, SparseCandidate)
    return priced


def dense(cut: Mapping[str, Tensor]) -> Tensor:
    """The weight that a cut stands for."""
    product = cut["left"].double() @ cut["right"].double()
    product.view(-1)[cut["entries"]] += cut["values"].double()
    return product


def at(format: str, rank: int, entries: int) -> Choice:
    return Choice({"layer": budget.WITH_ENTRIES[format]}, {"rank": rank, "entry": entries})


# --- the candidate ---


@SHAPES
@WEIGHTINGS
def test_all_units_reproduce_the_weight_to_the_tolerance(shape: tuple[int, int], weighting: Any) -> None:
    weight = mixed(*shape)
    given = candidate(weight, weighting=weighting, refit=0)
    scale = squares(shape[1]).sqrt() if weighting == "rms" else 1.0
    everything = at("low_rank", len(given.units[0].scores), len(given.units[1].scores))
    gap = (weight - dense(given.cut(everything)["layer"])) * scale
    assert gap.norm() <= 1e-4 * (weight * scale).norm()


@SHAPES
@WEIGHTINGS
def test_units_are_those_of_robust_pca(shape: tuple[int, int], weighting: Any) -> None:
    weight = mixed(*shape)
    given, tensors = candidate(weight, weighting=weighting, mode="inexact", penalty=0.8), None
    scale = squares(shape[1]).sqrt() if weighting == "rms" else torch.ones(shape[1], dtype=torch.float64)
    found = robust_pca(weight * scale, 0.8 / max(shape) ** 0.5, "inexact")
    ranks, entries = given.units
    tensors = given.tensors()
    assert [units.kind for units in given.units] == ["rank", "entry"] == list(RobustPCA().kinds)
    assert entries.cost == 1 and ranks.cost == sum(shape) and ranks.errors is entries.errors is None
    torch.testing.assert_close(ranks.scores, torch.linalg.svdvals(found.left @ found.right)[: len(ranks.scores)])
    torch.testing.assert_close(tensors["left"] @ tensors["right"], found.left @ found.right / scale)
    assert tensors["entries"].dtype == torch.int64
    sparse = torch.zeros(shape, dtype=torch.float64)
    sparse.view(-1)[tensors["entries"]] = tensors["values"]
    torch.testing.assert_close(sparse, found.sparse / scale)
    weighted = (sparse * scale).view(-1)[tensors["entries"]].abs()
    torch.testing.assert_close(weighted, entries.scores)
    assert (entries.scores.diff() <= 0).all() and (entries.scores > 0).all()


@SHAPES
@FORMATS
@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.5, 0.8])
def test_the_first_choice_is_the_best_of_all_mixes(shape: tuple[int, int], format: str, share: float) -> None:
    given = candidate(mixed(*shape), format)
    (part,), parameters = given.target.parts, int(share * shape[0] * shape[1])
    choice = given.first(parameters)
    assert choice.formats == {"layer": budget.WITH_ENTRIES[format]}
    cost = budget.count(choice, given.target)
    assert cost == parameters or (choice.counts["entry"] == len(given.units[1].scores) and cost < parameters)
    energies, values = given.units[0].scores.square(), given.units[1].scores.square()
    saved = {}
    for rank in range(len(energies) + 1):
        free = parameters - budget.rank_cost(format, part, rank)
        if free >= 0:
            saved[rank] = float(energies[:rank].sum() + values[:free].sum())
    assert saved[choice.counts["rank"]] == pytest.approx(max(saved.values()), rel=1e-12)


@SHAPES
@FORMATS
def test_a_rank_is_settled_into_a_mix_of_the_same_parameters(shape: tuple[int, int], format: str) -> None:
    given = candidate(mixed(*shape))  # priced by the choice's format, not its own
    (part,) = given.target.parts
    for rank in range(budget.largest_rank(format, part) + 1):
        choice = given.settle(Choice({"layer": format}, {"rank": rank}))
        assert choice.formats == {"layer": budget.WITH_ENTRIES[format]} and set(choice.counts) == {"rank", "entry"}
        wanted = budget.rank_cost(format, part, rank)
        short = wanted - budget.count(choice, given.target)
        assert short == 0 or (short > 0 and choice.counts["entry"] == len(given.units[1].scores))
        assert given.settle(choice) == choice
    whole = Choice({"layer": "dense"}, {})
    assert given.settle(whole) == whole


@SHAPES
@WEIGHTINGS
def test_a_cut_has_its_places_and_refitting_lowers_the_error(shape: tuple[int, int], weighting: Any) -> None:
    weight, errors = mixed(*shape), []
    scale = squares(shape[1]).sqrt() if weighting == "rms" else 1.0
    for alternations in (0, 1, 10):
        given = candidate(weight, weighting=weighting, refit=alternations)
        choice = given.first(weight.numel() // 2)
        cut = given.cut(choice)["layer"]
        assert cut["left"].shape[1] == cut["right"].shape[0] == choice.counts["rank"] > 0
        assert cut["entries"].tolist() == sorted(given.tensors()["entries"][: choice.counts["entry"]].tolist())
        torch.testing.assert_close(cut["left"].norm(dim=0), cut["right"].norm(dim=1))
        errors.append(float(((weight - dense(cut)) * scale).norm()))
        if alternations:
            missed = (weight - dense(cut)).flatten()[cut["entries"]]
            assert missed.abs().max() < 1e-12
    assert errors[2] < errors[1] < 0.95 * errors[0]


def test_without_refitting_the_kept_units_are_as_decomposed() -> None:
    given = candidate(mixed(24, 40), refit=0)
    cut, tensors = given.cut(at("low_rank", 3, 50))["layer"], given.tensors()
    torch.testing.assert_close(cut["left"] @ cut["right"], tensors["left"][:, :3] @ tensors["right"][:3])
    order = tensors["entries"][:50].argsort()
    assert torch.equal(cut["values"], tensors["values"][:50][order])


def test_nothing_at_all_can_be_kept_of_either_kind() -> None:
    given = candidate(mixed(24, 40))
    nothing = given.cut(at("low_rank", 0, 0))["layer"]
    assert not dense(nothing).any() and nothing["left"].shape == (24, 0) and len(nothing["entries"]) == 0
    entries = given.cut(at("low_rank", 0, 30))["layer"]
    kept = given.weights()["layer"].flatten()[entries["entries"]]
    assert torch.equal(entries["values"], kept), "without a low rank beside them, entries are those of the weight"


def test_what_was_learned_says_which_units_are_kept() -> None:
    given = candidate(mixed(24, 40), refit=0)
    order, entries = torch.tensor([2, 0, 3, 1]), torch.tensor([7, 5, 90, 1])
    learned = dataclasses.replace(given, learned={"order": order, "entries": entries})
    cut, tensors = learned.cut(at("low_rank", 2, 3))["layer"], given.tensors()
    torch.testing.assert_close(cut["left"] @ cut["right"], tensors["left"][:, [2, 0]] @ tensors["right"][[2, 0]])
    assert cut["entries"].tolist() == sorted(tensors["entries"][[7, 5, 90]].tolist())
    refitted = dataclasses.replace(learned, refit=3).cut(at("low_rank", 2, 3))["layer"]
    assert torch.equal(refitted["entries"], cut["entries"]) and refitted["left"].shape == (24, 2)


def test_a_dense_choice_and_one_of_ranks_alone_are_cut_as_of_any_candidate() -> None:
    given = candidate(mixed(24, 40))
    assert torch.equal(given.cut(Choice({"layer": "dense"}, {}))["layer"]["weight"], given.weights()["layer"])
    cut, tensors = given.cut(Choice({"layer": "low_rank"}, {"rank": 3}))["layer"], given.tensors()
    torch.testing.assert_close(cut["left"] @ cut["right"], tensors["left"][:, :3] @ tensors["right"][:3])
    assert set(cut) == {"left", "right"}


@pytest.mark.parametrize("width", [16, 17, 18, 19, 3, 1])
def test_2_of_4_neighbours_are_kept(width: int) -> None:
    sizes = random(12, width).abs().round(decimals=1)  # with ties
    kept = best_2_of_4(sizes)
    for row, mask in zip(sizes, kept, strict=True):
        for start in range(0, width, 4):
            group, chosen = row[start : start + 4], mask[start : start + 4]
            count = (len(group) + 1) // 2
            best = sorted(range(len(group)), key=lambda i: (-float(group[i]), i))[:count]
            assert chosen.nonzero().flatten().tolist() == sorted(best)


@WEIGHTINGS
def test_the_pattern_limits_the_sparse_part(weighting: Any) -> None:
    weight = mixed(24, 42)
    plain, limited = (candidate(weight, weighting=weighting, pattern=pattern) for pattern in ("none", "2:4"))
    mask = torch.zeros(24, 44, dtype=torch.int64)
    rows, columns = limited.tensors()["entries"] // 42, limited.tensors()["entries"] % 42
    mask[rows, columns] = 1
    groups = mask.view(24, 11, 4).sum(-1)
    assert groups.max() == 2 and groups[:, -1].max() == 1
    assert set(limited.tensors()["entries"].tolist()) < set(plain.tensors()["entries"].tolist())
    assert torch.equal(limited.units[0].scores, plain.units[0].scores)


def test_inputs_that_are_always_0_do_not_break_the_weighting() -> None:
    weight = mixed(24, 40)
    target = Target("layer", "up", (0,), (Part("layer", 24, 40, "x"),))
    for norms in (squares(40).index_fill(0, torch.tensor([3, 4]), 0.0), torch.zeros(40, dtype=torch.float64)):
        stats = {"layer": {Norm(power=2): norms}}
        given = RobustPCA(weighting="rms").decompose(target, {"layer": weight}, stats)
        made = dense(given.cut(given.first(weight.numel() // 2))["layer"])
        assert made.isfinite().all()
        assert ((weight - made) * norms.sqrt()).norm() <= 0.5 * (weight * norms.sqrt()).norm()


def test_the_weighting_needs_and_keeps_the_norms() -> None:
    assert RobustPCA().needs == RobustPCA().keeps == ()
    assert RobustPCA(weighting="rms").needs == RobustPCA(weighting="rms").keeps == (Norm(power=2),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": 0.0}, "penalty is 0.0"), ({"iterations": 0}, "iterations is 0"), ({"refit": -1}, "refit is -1"),
        ({"tolerance": 1.0}, "tolerance is 1.0"), ({"mode": "fast"}, "'fixed' or 'inexact'"),
        ({"weighting": "gram"}, "'none' or 'rms'"), ({"pattern": "4:8"}, "'none' or '2:4'"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.build("decomposer", registry.decomposers(), "robust_pca", settings)


def test_a_weight_that_is_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match=r"layer: .* not finite"):
        candidate(mixed(8, 8).index_fill(0, torch.tensor([1]), torch.inf))


# --- the greedy order ---


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
