"""The allocation by predicted curves, each scaled by what is measured on the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.calibrate.collect import Wanted
from spectrim.calibrate.resident import resident
from spectrim.core import budget, registry
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target
from spectrim.core.registry import Decomposer, Problem
from spectrim.methods.entries import Wanda
from spectrim.methods.measured import APART, MeasuredCurve, _curve, _Rounds, scaled
from spectrim.methods.spectrim import TwoSidedEntries, TwoSidedSVD
from spectrim.model import targets
from spectrim.model.blocks import Batch, share_inputs
from spectrim.model.live import Installed
from tests.families import FAMILIES, VOCABULARY
from tests.methods.stopping import Remembered, StopAtFour

IDS = torch.randint(1, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])


class Trial:
    """A tiny model whose targets are decomposed on both sides; what is run on it is counted."""

    def __init__(self, format: str = "pivot", method: Decomposer | None = None) -> None:
        self.model, self.format = FAMILIES["llama"].make(), format
        structure = share_inputs(self.model, targets.find(self.model))
        self.targets = list(structure.targets)
        method = TwoSidedSVD() if method is None else method
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
        by_rounds = [
            MeasuredCurve(trial=3, length=None, rounds=rounds, exchange=0).allocate(asked) for rounds in (0, 1, 3)
        ]
        losses = [loss(plan) for plan in by_rounds]
        assert losses[2] <= losses[1] * (1 + 1e-6) <= losses[0] * (1 + 1e-6), losses
        rounds = _Rounds(MeasuredCurve(trial=3, length=None, rounds=1, exchange=0), asked)
        first, plan = by_rounds[0], rounds.best()
        assert plan == by_rounds[1]
        for name, choice in first.choices.items():
            rank, curve = choice.counts["rank"], curves(trial)[name]
            near = min(abs(math.log(float(curve[rank]) / float(curve[r]))) for r in rounds.points[name])
            assert near <= math.log(APART) and (near == 0 or rank not in rounds.points[name])
        found.append(losses[0] - losses[2])
    assert max(found) > 0, "a later round is better somewhere"


@FORMATS
def test_no_plan_has_a_smaller_predicted_loss(format: str) -> None:
    whole = Trial(format)
    some = [target for target in whole.targets if target.role in ("q", "k", "down")][:3]
    whole.targets = some
    asked = whole.problem(0.4)
    method = MeasuredCurve(trial=2, gap=0.0, rounds=0, exchange=0)
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
    memory, method = Remembered(), MeasuredCurve(trial=2, rounds=0, exchange=0)
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
    memory, method, stop = Remembered(), MeasuredCurve(trial=2, rounds=0, exchange=0), StopAtFour()
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
    plan = MeasuredCurve(trial=1, rounds=0, exchange=0).allocate(asked)
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


def test_other_units_are_refused() -> None:
    for name, kind in registry.decomposers().items():
        entries, ranks = ("entry" in kind().kinds, "rank" in kind().kinds)
        assert bool(MeasuredCurve().refuses(kind())) == (entries == ranks), name
        assert bool(MeasuredCurve(exchange=2).refuses(kind())) == (entries or not ranks), name


@FORMATS
@pytest.mark.parametrize("method", [Wanda(), TwoSidedEntries()], ids=["wanda", "two_sided_entries"])
def test_of_entries_a_rank_stands_for_as_many_as_it_has_parameters(format: str, method: Any) -> None:
    of = Trial(format, method)
    problem = of.problem(0.3)
    for target in of.targets:
        (part,), scores = target.parts, of.candidates[target.name].units[0].scores.double()
        curve = _curve(problem, target)
        for rank in range(min(part.out_features, part.in_features) + 1):
            count = budget.rank_cost(format, part, rank)
            assert float(curve[rank]) == pytest.approx(float(scores[count:].square().sum()) / 2, rel=1e-6, abs=1e-12)
    plan = MeasuredCurve().allocate(problem)
    assert 0.98 * problem.budget < plan.spent <= problem.budget
    settled = {name: of.candidates[name].settle(choice) for name, choice in plan.choices.items()}
    kinds = {choice.formats[name]: choice.counts["rank"] for name, choice in settled.items()}
    assert kinds == {budget.WITH_ENTRIES[format]: 0}
    losses = [rounds.whole(plan) for rounds in [_Rounds(MeasuredCurve(), problem)]]
    with torch.no_grad(), of.live.installed(Plan(settled, 0, 0)):
        other = of.model(IDS).logits.double().log_softmax(-1)
    with torch.no_grad():
        dense = of.model(IDS).logits.double().log_softmax(-1)
    assert losses == [pytest.approx(float((dense.exp() * (dense - other)).sum(-1).mean()), rel=1e-4)]
