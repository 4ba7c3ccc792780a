"""Our own recipe: the two-sided decomposition, and the allocation by curves that are each scaled by one measurement."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spectrim
from spectrim.calibrate.collect import Wanted
from spectrim.calibrate.resident import resident
from spectrim.calibrate.statistics import Gram, OutputFisher, Tokens
from spectrim.core import budget, registry
from spectrim.core.linalg import damped, directions, shrunk, two_sided
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target
from spectrim.core.registry import Problem
from spectrim.methods.measured import MeasuredCurve, _Rounds, scaled
from spectrim.methods.spectrim import TwoSidedSVD
from spectrim.model import targets
from spectrim.model.blocks import Batch, share_inputs
from spectrim.model.live import Installed
from tests.families import FAMILIES, VOCABULARY
from tests.methods.stopping import Remembered, StopAtFour

IDS = torch.randint(1, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the decomposition ---


def of_matrix(method: TwoSidedSVD, weight: Tensor, stats: Mapping[Any, Tensor]) -> Candidate:
    part = Part("layer", *weight.shape, "x")
    return method.decompose(Target("layer", "up", (0,), (part,)), {"layer": weight}, {"layer": stats})


def statistics(out: int, width: int) -> dict[Any, Tensor]:
    x, g = random(50, width, seed=1) * random(width, seed=2).exp(), random(50, out, seed=3) * random(out, seed=4).exp()
    return {Gram(): x.T @ x, OutputFisher(): g.T @ g, Tokens(): torch.tensor([50.0])}


@pytest.mark.parametrize("shape", [(8, 14), (14, 8)])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("shrink", [0.0, 0.2])
def test_a_candidate_is_the_optimum_and_its_scores_are_nats(
    shape: tuple[int, int], damping: float, shrink: float
) -> None:
    weight, stats = random(*shape), statistics(*shape)
    candidate = of_matrix(TwoSidedSVD(damping, shrink), weight, stats)
    gram = shrunk(stats[Gram()], shrink, "diagonal")
    left, right, _ = two_sided(weight, gram, damped(stats[OutputFisher()], damping))
    for rank in (0, 3, 8):
        cut = candidate.cut(Choice({"layer": "low_rank"}, {"rank": rank}))["layer"]
        torch.testing.assert_close(cut["left"] @ cut["right"], left[:, :rank] @ right[:rank])
        difference = weight - left[:, :rank] @ right[:rank]
        # E[g gᵀ] and E[x xᵀ], a token
        second_order = (damped(stats[OutputFisher()], damping) / 50 @ difference @ (gram / 50) * difference).sum() / 2
        predicted = candidate.rank_units.scores[rank:].square().sum() / 2
        assert float(predicted) == pytest.approx(float(second_order), rel=1e-6, abs=1e-12)
    assert candidate.rank_units.errors is None


@pytest.mark.parametrize("shape", [(8, 14), (14, 8)])
def test_one_sided_is_whitened_svd_and_says_so(shape: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    weight, stats = random(*shape), statistics(*shape)
    candidate = of_matrix(TwoSidedSVD(sided="input"), weight, stats)
    left, energies = directions(weight, stats[Gram()])
    assert torch.equal(candidate.tensors()["left"], left) and candidate.tensors().keys() == {"left"}
    assert candidate.rank_units.errors is not None and torch.equal(candidate.rank_units.errors, energies)
    assert "layer: one-sided" in caplog.text
    assert TwoSidedSVD(sided="input").needs == (Gram(),) and OutputFisher() in TwoSidedSVD().needs
    shrunken = of_matrix(TwoSidedSVD(sided="input", shrink=1.0, shrink_to="identity"), weight, stats)
    assert shrunken.rank_units.errors is None, "errors in another metric are none at the output"
    torch.testing.assert_close(shrunken.tensors()["left"], directions(weight, None)[0])


def test_gradients_that_overflowed_are_refused() -> None:
    stats = statistics(4, 5)
    stats[OutputFisher()][0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer: Fisher information is not finite"):
        of_matrix(TwoSidedSVD(), random(4, 5), stats)


# --- a small model ---


class Trial:
    """A tiny model whose targets are decomposed on both sides; what is run on it is counted."""

    def __init__(self, format: str = "pivot") -> None:
        self.model, self.format = FAMILIES["llama"].make(), format
        structure = share_inputs(self.model, targets.find(self.model))
        self.targets = list(structure.targets)
        method = TwoSidedSVD()
        wanted = {i: Wanted(dict.fromkeys(structure.of_block(i), method.needs)) for i in range(structure.count)}
        self.candidates: dict[str, Candidate] = {}
        for _, measured in resident(self.model, structure, [Batch(IDS)], wanted):
            for target in self.targets:
                (part,) = target.parts
                if not measured.of(target)[part.module]:
                    continue
                weight = self.model.get_submodule(part.module).weight.detach()
                made = method.decompose(target, {part.module: weight}, measured.of(target))
                self.candidates[target.name] = made.priced(format, budget.unit_cost(format, part))
        self.live = Installed(self.model, structure, self.candidates, IDS, 4)
        self.built: list[tuple[str, int]] = []
        original = self.live.built

        def built(target: str, choice: Choice) -> Mapping[str, Any]:
            self.built.append((target, choice.counts["rank"]))
            return original(target, choice)

        self.live.built = built  # type: ignore[method-assign]

    def problem(self, ratio: float, **more: Any) -> Problem:
        allowed = budget.allowed(self.targets, ratio)
        return Problem(self.targets, allowed, self.format, torch.Generator(), self.candidates, {}, self.live, **more)

    def kl(self, name: str, rank: int, windows: Tensor) -> float:
        """KL(dense ‖ one target at a rank), a token, by whole runs of the model."""
        with torch.no_grad():
            dense = self.model(windows).logits.double().log_softmax(-1)
            choice = Choice({name: "low_rank"}, {"rank": rank})
            with self.live.installed(Plan({name: choice}, 0, 0)):
                other = self.model(windows).logits.double().log_softmax(-1)
        return float((dense.exp() * (dense - other)).sum(-1).mean())


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial()


def curves(trial: Trial) -> dict[str, Tensor]:
    found = {}
    for name, candidate in trial.candidates.items():
        scores = candidate.rank_units.scores
        found[name] = torch.tensor([float(scores[rank:].square().sum()) / 2 for rank in range(len(scores) + 1)])
    return found


@pytest.mark.parametrize("point", ["target", "tenth"])
def test_what_is_measured_is_the_kl_of_a_matrix_alone(trial: Trial, point: Any) -> None:
    method, asked = MeasuredCurve(trial=3, length=10, point=point), trial.problem(0.3)
    rounds = _Rounds(method, asked)
    rounds.measure({target.name: method.trial_rank(asked, target) for target in trial.targets})
    assert rounds.notes == [] and rounds.points.keys() == trial.candidates.keys()
    for target in trial.targets:
        (part,) = target.parts
        m, n = part.out_features, part.in_features
        plain = max(1, (m * n - 1) // (m + n) // 10)
        rank = budget.rank_within("pivot", part, m * n * asked.budget // asked.dense) if point == "target" else plain
        assert method.trial_rank(asked, target) == rank
        expected = trial.kl(target.name, rank, IDS[-3:, :10])
        assert rounds.points[target.name] == {rank: pytest.approx(expected, rel=2e-3)}


def test_curves_go_through_what_was_measured() -> None:
    curve = torch.tensor([64.0, 32, 16, 8, 4, 2, 1, 0.5, 0], dtype=torch.float64)
    assert torch.equal(scaled(curve, {}), curve)
    torch.testing.assert_close(scaled(curve, {4: 8.0}), 2 * curve)
    found = scaled(curve, {6: 1.0, 2: 256.0})
    assert found[6] == pytest.approx(1) and found[2] == pytest.approx(256)
    # the factor goes from 1 to 16 in even steps of its logarithm
    assert found.tolist() == pytest.approx([1024, 512, 256, 64, 16, 4, 1, 0.5, 0])
    # a measurement that would make a lower rank the better one
    found = scaled(curve, {6: 1.0, 5: 0.1})
    assert found.tolist() == pytest.approx([3.2, 1.6, 1, 1, 1, 1, 1, 0.5, 0]) and bool((found.diff() <= 0).all())
    inf = float("inf")
    assert scaled(curve, {3: inf}).tolist() == [inf] * 9
    assert scaled(curve, {3: inf, 5: 4.0}).tolist() == pytest.approx([inf, inf, inf, inf, 8, 4, 2, 1, 0])
    # nothing measurable is not nothing: another round may find more at a lower rank
    assert 0 < float(scaled(curve, {4: 0.0})[4]) < 1e-8
    assert torch.equal(scaled(torch.zeros(4), {}), torch.zeros(4))


def test_planned_ranks_are_measured_and_the_best_plan_on_the_whole_model_is_taken(trial: Trial) -> None:
    def loss(plan: Plan) -> float:
        with torch.no_grad():
            dense = trial.model(IDS[-3:]).logits.double().log_softmax(-1)
            with trial.live.installed(plan):
                other = trial.model(IDS[-3:]).logits.double().log_softmax(-1)
        return float((dense.exp() * (dense - other)).sum(-1).mean())

    found = []
    for ratio in (0.2, 0.4, 0.6):
        asked = trial.problem(ratio)
        by_rounds = [MeasuredCurve(trial=3, rounds=rounds).allocate(asked) for rounds in (0, 1, 3)]
        losses = [loss(plan) for plan in by_rounds]
        assert losses[2] <= losses[1] * (1 + 1e-6) <= losses[0] * (1 + 1e-6), losses
        rounds = _Rounds(MeasuredCurve(trial=3, rounds=1), asked)
        first, plan = by_rounds[0], rounds.best()
        assert plan == by_rounds[1]
        for name, choice in first.choices.items():
            assert choice.counts["rank"] in rounds.points[name]
        found.append(losses[0] - losses[2])
    assert max(found) > 0, "a later round is better somewhere"


@FORMATS
def test_no_plan_has_a_smaller_predicted_loss(format: str) -> None:
    whole = Trial(format)
    some = [target for target in whole.targets if target.role in ("q", "k", "down")][:3]
    whole.targets = some
    asked = whole.problem(0.4)
    method = MeasuredCurve(trial=2, gap=0.0, rounds=0)
    plan = method.allocate(asked)
    rounds = _Rounds(method, asked)
    rounds.measure({target.name: method.trial_rank(asked, target) for target in some})
    scales = {
        name: loss / float(curves(whole)[name][r]) for name, at in rounds.points.items() for r, loss in at.items()
    }
    options = []
    for target in some:
        ladder = method.ladder(asked, target)
        lost = [scales[target.name] * float(curves(whole)[target.name][rank]) for rank in ladder.ranks] + [0.0]
        options.append(list(zip(ladder.costs.tolist(), lost, (*ladder.ranks, None), strict=True)))
    feasible = [each for each in itertools.product(*options) if sum(cost for cost, *_ in each) <= asked.budget]
    least = min(sum(lost for _, lost, _ in each) for each in feasible)
    ranks = [plan.choices[t.name].counts["rank"] if t.name in plan.choices else None for t in some]
    found = sum(next(lost for _, lost, r in each if r == rank) for each, rank in zip(options, ranks, strict=True))
    assert found == pytest.approx(least, rel=1e-6)


def test_without_measuring_the_plan_needs_no_model_and_takes_curves_as_they_are(trial: Trial) -> None:
    method = MeasuredCurve(scale="none", gap=0.0)
    assert method.sees == "units" and MeasuredCurve().sees == "model"
    before = len(trial.built)
    plan = method.allocate(replace(trial.problem(0.3), live=None))
    assert len(trial.built) == before and plan.choices
    # at one price of a parameter no step up is worth more than one that was taken is
    bought, left = [], []
    for target in trial.targets:
        ladder, curve = method.ladder(trial.problem(0.3), target), curves(trial)[target.name]
        lost = torch.tensor([*(float(curve[r]) for r in ladder.ranks), 0.0])
        choice = plan.choices.get(target.name)
        place = len(ladder.ranks) if choice is None else ladder.ranks.index(choice.counts["rank"])
        slope = lambda i, j, lost=lost, ladder=ladder: float((lost[i] - lost[j]) / (ladder.costs[j] - ladder.costs[i]))  # noqa: E731
        bought += [min(slope(i, place) for i in range(place))] if place else []
        left += [max(slope(place, j) for j in range(place + 1, len(lost)))] if place + 1 < len(lost) else []
    assert min(bought) > 0.5 * max(left), "equal but for what whole ranks cost"


def test_measurements_are_remembered_by_matrix_and_rank(trial: Trial) -> None:
    memory, method = Remembered(), MeasuredCurve(trial=2, rounds=0)
    first = method.allocate(trial.problem(0.3, remember=memory))
    assert len(memory.stored) == len(trial.targets)
    trial.built.clear()
    assert method.allocate(trial.problem(0.3, remember=memory)) == first and trial.built == []
    # a ratio so near that most trial ranks are the same
    ranks = [{t.name: method.trial_rank(trial.problem(ratio), t) for t in trial.targets} for ratio in (0.3, 0.31)]
    new = {name for name in ranks[0] if ranks[0][name] != ranks[1][name]}
    method.allocate(trial.problem(0.31, remember=memory))
    assert {name for name, _ in trial.built} == new and len(new) < len(trial.targets)


def test_a_killed_run_goes_on(trial: Trial) -> None:
    memory, method, stop = Remembered(), MeasuredCurve(trial=2, rounds=0), StopAtFour()
    with pytest.raises(KeyboardInterrupt):
        method.allocate(trial.problem(0.3, remember=memory, progress=stop))
    assert stop.seen == [("measure", i, len(trial.targets)) for i in range(1, 5)] and len(memory.stored) == 4
    trial.built.clear()
    plan = method.allocate(trial.problem(0.3, remember=memory))
    assert len(trial.built) == len(trial.targets) - 4
    assert plan == method.allocate(trial.problem(0.3))
    rounds = MeasuredCurve(trial=2, rounds=2)
    whole = rounds.allocate(trial.problem(0.3, remember=memory))
    trial.built.clear()
    assert rounds.allocate(trial.problem(0.3, remember=memory)) == whole and trial.built == []


@FORMATS
@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.7])
def test_the_budget_is_spent(format: str, ratio: float, trial: Trial) -> None:
    trial = trial if format == trial.format else Trial(format)
    asked = trial.problem(ratio)
    plan = MeasuredCurve(trial=1, multiple=1).allocate(asked)
    kept = {t: budget.count(plan.choices[t.name], t) if t.name in plan.choices else t.parameters for t in trial.targets}
    assert plan.spent == sum(kept.values()) <= asked.budget
    step = max(sum((t.parts[0].out_features, t.parts[0].in_features)) for t in trial.targets)
    assert asked.budget - plan.spent < step
    assert MeasuredCurve(trial=1).allocate(replace(asked, targets=trial.targets[::-1])) == plan
    assert Plan.from_json(plan.to_json()) == plan


def test_a_matrix_that_breaks_the_model_stays_dense_and_is_named(
    trial: Trial, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = trial.targets[2].name
    honest = trial.live.built

    def built(target: str, choice: Choice) -> Mapping[str, Any]:
        made = honest(target, choice)
        if target == broken:
            for module in made.values():
                for parameter in module.parameters():
                    parameter.data.fill_(torch.nan)
        return made

    monkeypatch.setattr(trial.live, "built", built)
    plan = MeasuredCurve(trial=1).allocate(trial.problem(0.3))
    assert broken not in plan.choices and len(plan.choices) > 5
    (note,) = plan.notes
    assert broken in note and "stays dense" in note and note in caplog.text
    with pytest.raises(ValueError, match=r"ratio too large.*what stays dense"):
        MeasuredCurve(trial=1).allocate(trial.problem(0.93))


def test_a_matrix_without_energy_is_cut_first_and_one_of_low_rank_is_measured_where_it_loses() -> None:
    trial = Trial()
    zero, low = trial.targets[0], trial.targets[4]
    for target, rank in ((zero, 0), (low, 3)):
        candidate = trial.candidates[target.name]
        units = replace(candidate.units[0], scores=candidate.units[0].scores * (torch.arange(32) < rank))
        trial.candidates[target.name] = replace(candidate, units=(units,))
    asked = trial.problem(0.3)
    trial.built.clear()
    plan = MeasuredCurve(trial=1, rounds=0).allocate(asked)
    assert zero.name not in dict(trial.built) and dict(trial.built)[low.name] == 2
    assert plan.choices[zero.name].counts["rank"] <= 3 and plan.choices[low.name].counts["rank"] <= 6


def test_ranks_of_large_matrices_are_multiples() -> None:
    part = Part("m", 600, 520, "x")
    wide = Part("w", 600, 100, "x")
    both = [Target(each.module, "up", (0,), (each,)) for each in (part, wide)]
    asked = Problem(both, budget.allowed(both, 0.2), "pivot", torch.Generator())
    ladders = [MeasuredCurve().ladder(asked, target) for target in both]
    assert ladders[0].ranks == tuple(range(8, 520, 8)) and ladders[1].ranks == tuple(range(1, 100))
    assert int(ladders[0].costs[-1]) == part.parameters and int(ladders[0].costs[0]) == 8 * (1120 - 8)
    assert MeasuredCurve(least=10).ladder(asked, both[0]).ranks[0] == 16
    assert MeasuredCurve(least=0).ladder(asked, both[1]).ranks[0] == 0
    one_row = Target("r", "up", (0,), (Part("r", 1, 9, "x"),))
    assert MeasuredCurve().ladder(replace(asked, targets=[one_row]), one_row).ranks == ()
    assert MeasuredCurve().grain == 8


def test_ratio_0_and_too_much(trial: Trial) -> None:
    trial.built.clear()
    dense = trial.problem(0.0)
    assert MeasuredCurve().allocate(dense) == Plan({}, dense.budget, dense.budget)
    shapes = replace(trial.problem(0.99), candidates=None, live=None)
    with pytest.raises(ValueError, match=r"ratio too large.*rank 1 everywhere.*largest possible ratio here is 0\.9"):
        MeasuredCurve().check(shapes)
    assert trial.built == []


# --- whole runs ---


@pytest.mark.parametrize("recipe", ["spectrim-onepass", "spectrim-input"])
def test_a_recipe_runs_again_at_another_ratio_with_what_was_measured(
    recipe: str, llama_dir: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    settings = ["groups.0.allocate.trial=2"]
    given: dict[str, Any] = {"text": IDS, "work": tmp_path / "work", "settings": settings}
    first = spectrim.compress(llama_dir, recipe, 0.3, out=tmp_path / "first", **given)
    assert 0.29 < first.summary["ratio_actual"] <= 0.31 and first.summary["recipe"]["groups"][0]["format"] == "pivot"
    assert calls["resident" if recipe == "spectrim-onepass" else "streamed"] == 1 and sum(calls.values()) == 1
    spectrim.compress(llama_dir, recipe, 0.4, out=tmp_path / "second", **given)
    assert sum(calls.values()) == 1, "statistics and decompositions are kept"
    again = spectrim.compress(llama_dir, recipe, 0.3, out=tmp_path / "third", **given)
    assert again.plan == first.plan


def test_sampled_labels_and_both_sides_lose_less_than_one_in_the_metric_itself(llama_dir: Path, tmp_path: Path) -> None:
    """Predicted: at one plan the two-sided optimum is below the one-sided one, matrix by matrix, in its own metric."""
    model = FAMILIES["llama"].make()
    structure = share_inputs(model, targets.find(model))
    method = TwoSidedSVD(damping=0.0)
    wanted = {0: Wanted(dict.fromkeys(structure.of_block(0), method.needs))}
    (measured,) = dict(resident(model, structure, [Batch(IDS)], wanted)).values()
    for target in structure.of_block(0):
        stats = measured.of(target)[target.name]
        weight = model.get_submodule(target.name).weight.detach().double()
        lost = []
        for each in (method, TwoSidedSVD(sided="input")):
            candidate = each.decompose(target, {target.name: weight}, {target.name: stats})
            cut = candidate.cut(Choice({target.name: "low_rank"}, {"rank": 6}))[target.name]
            difference = weight - cut["left"] @ cut["right"]
            lost.append(float((stats[OutputFisher()] @ difference @ stats[Gram()] * difference).sum()))
        assert lost[0] <= lost[1] * (1 + 1e-9)


# --- settings ---


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("two_sided_svd", {"damping": -0.1}, "damping is -0.1"),
        ("two_sided_svd", {"shrink": 1.5}, "shrink is 1.5"),
        ("two_sided_svd", {"shrink_to": "mean"}, "'mean'"),
        ("two_sided_svd", {"sided": "output"}, "'output'"),
        ("measured_curve", {"trial": 0}, "trial is 0"),
        ("measured_curve", {"length": 1}, "length is 1"),
        ("measured_curve", {"multiple": 0}, "multiple is 0"),
        ("measured_curve", {"least": -1}, "least is -1"),
        ("measured_curve", {"gap": 1.0}, "gap is 1.0"),
        ("measured_curve", {"point": "half"}, "'half'"),
        ("measured_curve", {"scale": "guessed"}, "'guessed'"),
    ],
)
def test_settings_out_of_range(kind: str, settings: dict[str, Any], reason: str) -> None:
    table = registry.decomposers() if kind == "two_sided_svd" else registry.allocators()
    with pytest.raises(ValueError, match=reason):
        registry.build("method", table, kind, settings)


def test_other_units_are_refused() -> None:
    for name, kind in registry.decomposers().items():
        refused = MeasuredCurve().refuses(kind())
        assert bool(refused) == (kind().kinds[0] != "rank" or "entry" in kind().kinds), name
