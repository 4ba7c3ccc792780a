"""Columns beside a rank: errors, parameters, the search, and the tensors, each against direct computation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.calibrate.statistics import Gram
from spectrim.core import budget
from spectrim.core.linalg import complement
from spectrim.core.plan import Candidate, Choice, Part, Target
from spectrim.methods import duo_svd
from spectrim.methods.duo_svd import ColumnCandidate, ColumnSVD, column_order, search
from spectrim.methods.svd import WhitenedSVD

SHAPES = pytest.mark.parametrize("shape", [(40, 56), (48, 48), (64, 36)], ids=["wide", "square", "tall"])
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])
MODES = pytest.mark.parametrize("mode", ["exact", "compensated"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(width: int, outliers: int = 12, count: int = 200) -> Tensor:
    """Correlated inputs, some of them larger."""
    x = random(count, width, seed=1) + 0.2 * random(count, 3, seed=2) @ random(3, width, seed=3)
    x[:, :outliers] *= 8
    return x


def spiky(m: int, n: int, columns: int = 12) -> Tensor:
    """A weight of falling spectrum, and some columns of their own: more than there are ranks to spend on them."""
    weight = 0.1 * random(m, n) + random(m, 3, seed=4) @ random(3, n, seed=5)
    weight[:, :columns] += random(m, columns, seed=6)
    return weight


def target_of(weight: Tensor) -> Target:
    return Target("layer", "up", (0,), (Part("layer", *weight.shape, "x"),))


def candidate(weight: Tensor, x: Tensor, format: str = "low_rank", **settings: Any) -> Candidate:
    target, gram = target_of(weight), x.double().T @ x.double()
    made = ColumnSVD(**settings).decompose(target, {"layer": weight}, {"layer": {Gram(): gram}})
    return made.priced(format, budget.unit_cost(format, target.parts[0]))


def hybrid(cut: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """The weight that a cut stands for, out × in."""
    product = cut["left"].double() @ cut["right"].double()
    if "columns" not in cut:
        return product
    whole = torch.zeros(shape, dtype=torch.float64)
    whole[:, complement(cut["columns"], shape[1])] = product
    whole[:, cut["columns"]] = cut["kept"].double()
    return whole


def measured(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float((x @ (weight.double() - other).T).square().sum())


def best_of_all(given: ColumnCandidate, format: str, rank: int) -> dict[int, tuple[int, float]]:
    """c and E² of every sacrifice, from singular values over square roots of the metric."""
    weight, gram = given.weights()["layer"].double(), given.statistics()["layer"][Gram()]
    (part,), found = given.target.parts, {}
    order = column_order(weight, given.tensors()["left"][:, :rank].double(), gram)
    free = budget.rank_cost(format, part, rank)
    for lower in range(rank + 1):
        c = (free - budget.rank_cost(format, part, lower)) // (part.out_features - lower)
        rest = complement(order[:c], part.in_features)
        energies, vectors = torch.linalg.eigh(gram[rest][:, rest])
        values = torch.linalg.svdvals(weight[:, rest] @ vectors * energies.clamp_min(0).sqrt())
        found[rank - lower] = (c, float(values[lower:].square().sum()))
    return found


@SHAPES
@FORMATS
def test_columns_are_near_the_best_sacrifice_of_all(shape: tuple[int, int], format: str) -> None:
    weight, x = spiky(*shape), tokens(shape[1])
    given = candidate(weight, x, format, accept=0.0)
    assert isinstance(given, ColumnCandidate)
    for parameters in (weight.numel() // 3, weight.numel() // 2):
        first = given.first(parameters)
        everything = best_of_all(given, format, first.counts["rank"])
        least = min(error for _, error in everything.values())
        settled = given.settle(first)
        if settled.counts.get("column"):
            sacrifice = first.counts["rank"] - settled.counts["rank"]
            assert (settled.counts["column"], pytest.approx(settled.error, rel=1e-6)) == everything[sacrifice]
        assert settled.error is not None and least * (1 - 1e-6) <= settled.error <= 1.02 * least


@SHAPES
@FORMATS
@MODES
def test_an_accepted_choice_is_better_and_never_larger(shape: tuple[int, int], format: str, mode: str) -> None:
    weight, x, took = spiky(*shape), tokens(shape[1]), 0
    given = candidate(weight, x, format, columns=mode)
    for share in (0.15, 0.3, 0.4, 0.7):
        first = given.first(int(share * weight.numel()))
        settled = given.fit(int(share * weight.numel()))
        before = budget.count(first, given.target)
        assert first.error is not None and settled.error is not None
        assert budget.count(settled, given.target) <= before
        c = settled.counts.get("column", 0)
        if c:
            took += 1
            assert settled.error**0.5 < 0.99 * first.error**0.5
            assert before - budget.count(settled, given.target) < shape[0]
            assert settled.counts["rank"] + c <= shape[1]
            assert settled.formats == {"layer": "low_rank_columns" if format == "low_rank" else "pivot"}
            assert settled.keep is not None and settled.keep["column"] == tuple(sorted(set(settled.keep["column"])))
            assert len(settled.keep["column"]) == c
            assert given.settle(settled) == settled
        else:
            assert settled == first
    assert took, "the weight is such that columns pay"


@SHAPES
@FORMATS
@MODES
def test_the_predicted_error_is_the_measured_one(shape: tuple[int, int], format: str, mode: str) -> None:
    weight, x, took = spiky(*shape), tokens(shape[1]), 0
    for inputs in (x, tokens(shape[1], count=20), x.index_fill(1, torch.tensor([0, 20]), 0.0)):
        given = candidate(weight, inputs, format, columns=mode)
        whole = measured(weight, torch.zeros_like(weight), inputs)
        for share in (0.15, 0.4):
            choice = given.fit(int(share * weight.numel()))
            took += "column" in choice.counts
            error = measured(weight, hybrid(given.cut(choice)["layer"], weight.shape), inputs)
            assert choice.error == pytest.approx(error, rel=1e-6, abs=1e-9 * whole)
    assert took


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_columns_are_those_of_the_weight_bit_for_bit(dtype: torch.dtype) -> None:
    weight, x = spiky(40, 56).to(dtype), tokens(56)
    given = candidate(weight, x)
    choice = given.fit(weight.numel() // 2)
    cut = given.cut(choice)["layer"]
    assert choice.keep is not None and cut["columns"].tolist() == list(choice.keep["column"])
    assert torch.equal(cut["kept"].to(dtype), weight[:, cut["columns"]])
    assert torch.equal(cut["kept"].double(), weight[:, cut["columns"]].double())
    c, rank = choice.counts["column"], choice.counts["rank"]
    assert cut["left"].shape == (40, rank) and cut["right"].shape == (rank, 56 - c)
    assert torch.allclose(cut["left"].norm(dim=0), cut["right"].norm(dim=1), rtol=1e-2)
    factored = torch.float64 if dtype == torch.float64 else torch.float32
    assert {tensor.dtype for name, tensor in cut.items() if name != "columns"} == {factored}


def test_no_other_factors_are_better_for_the_same_columns() -> None:
    weight, x = spiky(40, 56), tokens(56)
    given = candidate(weight, x)
    choice = given.fit(weight.numel() // 2)
    cut = given.cut(choice)["layer"]
    rank = choice.counts["rank"]
    assert choice.error is not None
    for seed, size in itertools.product(range(5), (1e-3, 0.1, 1.0)):
        other = dict(cut)
        other["left"] = cut["left"] + size * random(40, rank, seed=10 + seed)
        other["right"] = cut["right"] + size * random(rank, 56 - choice.counts["column"], seed=20 + seed)
        assert measured(weight, hybrid(other, weight.shape), x) > choice.error


@SHAPES
def test_refitted_columns_are_never_worse_and_equal_where_nothing_is_shared(shape: tuple[int, int]) -> None:
    weight, x = spiky(*shape), tokens(shape[1])
    exact = candidate(weight, x).fit(int(0.4 * weight.numel()))
    assert exact.error is not None and exact.counts["column"] > 0
    refitted = candidate(weight, x, columns="compensated")
    found = measured(weight, hybrid(refitted.cut(exact)["layer"], weight.shape), x)
    assert found < 0.999 * exact.error, "inputs are correlated"
    # with the kept inputs orthogonal to the others both are one
    assert exact.keep is not None
    kept = torch.tensor(exact.keep["column"])
    rest, half = complement(kept, shape[1]), len(x) // 2
    x[:half, kept], x[half:, rest] = 0.0, 0.0
    one, other = (candidate(weight, x, columns=mode).cut(exact)["layer"] for mode in ("exact", "compensated"))
    assert torch.allclose(hybrid(one, weight.shape), hybrid(other, weight.shape), atol=1e-8)


def test_planted_columns_are_found() -> None:
    planted = [1, 3, 8, 17, 22, 23, 30, 35, 41, 44, 50, 55]
    weight = random(40, 2) @ random(2, 56, seed=1)
    weight[:, planted] += 5 * random(40, 12, seed=2)
    x = random(300, 56, seed=3)
    x[:, planted] *= 6
    given = candidate(weight, x)
    # of 14 ranks 10 are paid for; giving up 5 to 8 of them pays for at least the 12 columns, and leaves rank 2
    choice = given.settle(given.first(10 * 96))
    assert choice.keep is not None and set(planted) <= set(choice.keep["column"])
    assert choice.error is not None and choice.error < 1e-12 * float(given.rank_units.scores.square().sum())
    exact = candidate(random(40, 8) @ random(8, 56, seed=1), x).fit(10 * 96)
    assert "column" not in exact.counts, "a weight of that rank needs none"


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_columns_alone_are_best_for_an_orthogonal_weight(rank: int) -> None:
    weight = torch.linalg.qr(random(24, 24)).Q
    given = candidate(weight, torch.eye(24, dtype=torch.float64))
    choice = given.settle(given.first(rank * 48))
    assert choice.counts == {"rank": 0, "column": 2 * rank}
    assert choice.error == pytest.approx(24 - 2 * rank)
    cut = given.cut(choice)["layer"]
    assert cut["left"].shape == (24, 0) and cut["right"].shape == (0, 24 - 2 * rank)
    assert measured(weight, hybrid(cut, weight.shape), torch.eye(24).double()) == pytest.approx(24 - 2 * rank)


def test_permuted_inputs_give_permuted_columns() -> None:
    weight, x = spiky(40, 56), tokens(56)
    order = torch.randperm(56, generator=torch.Generator().manual_seed(0))
    one = candidate(weight, x).fit(weight.numel() // 2)
    other = candidate(weight[:, order], x[:, order]).fit(weight.numel() // 2)
    assert one.keep is not None and other.keep is not None
    assert sorted(int(order[j]) for j in other.keep["column"]) == list(one.keep["column"])
    assert other.error == pytest.approx(one.error) and other.counts == one.counts


def test_inputs_that_are_always_0_are_never_kept() -> None:
    weight = torch.linalg.qr(random(24, 24)).Q
    x = torch.eye(24, dtype=torch.float64)
    x[4:] = 0
    choice = candidate(weight, x).fit(5 * 48)
    assert choice.keep is None or set(choice.keep["column"]) <= {0, 1, 2, 3}


# --- the search ---


@pytest.mark.parametrize(("rank", "most"), [(20, 8), (100, 12), (1638, 18)])
def test_the_search_asks_seldom_and_never_twice(rank: int, most: int) -> None:
    for best in (0, 1, rank // 20, rank // 3, rank // 2, rank - 1, rank):
        asked: list[int] = []

        def error(given_up: int, best: int = best, asked: list[int] = asked) -> float:
            asked.append(given_up)
            return 5.0 + abs(given_up - best)

        tried = search(rank, error)
        assert len(asked) == len(set(asked)) and len(set(asked) - {0}) <= most
        assert min(tried.values()) <= (6.0 if tried.keys() - {0, rank, round(0.382 * rank)} else 5.0 + best)


def test_the_search_stops_where_neither_probe_gains_but_looks_at_the_end() -> None:
    def against(rank_end: float) -> Callable[[int], float]:
        return lambda given_up: {0: 1.0, 100: rank_end}.get(given_up, 2.0)

    assert search(100, against(3.0)).keys() == {0, 9, 38, 100}
    assert min(search(100, against(0.5)).items(), key=lambda item: item[1]) == (100, 0.5)


def test_a_matrix_is_evaluated_as_often_as_the_search_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], duo_svd.energies_without
    monkeypatch.setattr(duo_svd, "energies_without", lambda *args: calls.append(1) or original(*args))
    weight, x = spiky(60, 60), tokens(60)
    given = candidate(weight, x)
    given.settle(given.first(20 * 120))
    assert 3 <= len(calls) <= 8
    calls.clear()
    given.settle(Choice({"layer": "low_rank"}, {"rank": 0}))
    low = candidate(random(60, 5) @ random(5, 60, seed=1), x)
    low.settle(low.first(20 * 120))
    assert not calls, "nothing to gain"


# --- as a method ---


def test_the_spectrum_is_that_of_whitened_svd_and_the_gram_is_kept() -> None:
    weight, x = spiky(40, 56).float(), tokens(56)
    stats = {"layer": {Gram(): x.T @ x}}
    made = ColumnSVD().decompose(target_of(weight), {"layer": weight}, stats)
    other = WhitenedSVD().decompose(target_of(weight), {"layer": weight}, stats)
    assert torch.equal(made.rank_units.scores, other.rank_units.scores) and made.first(900) == other.first(900)
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in made.tensors().items())
    plain = made.cut(made.first(900))["layer"]
    assert all(torch.equal(tensor, other.cut(other.first(900))["layer"][name]) for name, tensor in plain.items())
    assert ColumnSVD().needs == ColumnSVD().keeps == (Gram(),)
    assert torch.equal(made.statistics()["layer"][Gram()], stats["layer"][Gram()])


@MODES
def test_a_restored_candidate_settles_and_cuts_alike(mode: str) -> None:
    weight, x = spiky(40, 56), tokens(56)
    method = ColumnSVD(columns=mode, accept=0.05)  # type: ignore[arg-type]
    made = method.decompose(target_of(weight), {"layer": weight}, {"layer": {Gram(): x.T @ x}})
    again = method.restore(made.target, made.units, made.tensors, made.weights, made.statistics)
    assert isinstance(again, ColumnCandidate) and (again.columns, again.accept) == (mode, 0.05)
    choice = made.fit(1100)
    assert again.fit(1100) == choice and "column" in choice.counts
    for name, tensor in made.cut(choice)["layer"].items():
        assert torch.equal(tensor, again.cut(choice)["layer"][name])


def test_a_higher_threshold_takes_columns_less_often() -> None:
    weight, x = spiky(40, 56), tokens(56)
    assert "column" in candidate(weight, x, accept=0.01).fit(1100).counts
    assert "column" not in candidate(weight, x, accept=0.99).fit(1100).counts
    for accept in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="accept is"):
            ColumnSVD(accept=accept)


def test_what_allocators_remember_serves_whitened_svd_too() -> None:
    assert ColumnSVD().first_like == ColumnSVD(columns="compensated").first_like == WhitenedSVD().first_like
