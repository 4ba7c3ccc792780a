"""Exchange at the compressed model: what each matrix is worth there, and the plans within reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from spectrim.core import budget
from spectrim.core.exchange import LEAST, NUDGE, Exchange
from spectrim.core.meter import Meter
from spectrim.core.plan import Choice, Plan
from spectrim.core.registry import Problem
from spectrim.methods.measured import MeasuredCurve, _Rounds
from tests.methods.stopping import Remembered
from tests.methods.test_measured import IDS, Trial

WINDOWS = 3


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial()


def started(trial: Trial, ratio: float, **more: Any) -> tuple[Exchange, _Rounds, Plan]:
    """The exchange, what measures whole plans, and the plan of the curves as predicted."""
    asked = trial.problem(ratio, **more)
    method = MeasuredCurve(trial=WINDOWS, length=None, rounds=0, exchange=0)
    rounds = _Rounds(method, asked)
    exchange = Exchange(asked, rounds.ladders, rounds.curves, WINDOWS, None, 0.0)
    return exchange, rounds, MeasuredCurve(scale="none").allocate(asked)


def loss(trial: Trial, plan: Plan) -> float:
    """KL(dense ‖ the model with a plan), a token, by whole runs in float64."""
    windows = IDS[-WINDOWS:]
    with torch.no_grad():
        dense = trial.model(windows).logits.double().log_softmax(-1)
        with trial.live.installed(plan):
            other = trial.model(windows).logits.double().log_softmax(-1)
    return float((dense.exp() * (dense - other)).sum(-1).mean())


def size(exchange: Exchange, name: str, plan: Plan) -> int:
    return int(exchange.ladders[name].costs[exchange.place(name, plan)])


def test_worth_is_what_growing_gains_over_what_it_is_predicted_to(trial: Trial) -> None:
    exchange, rounds, plan = started(trial, 0.3)
    base = loss(trial, plan)
    worth = exchange.worth(plan, rounds.whole(plan))
    assert worth.keys() == trial.candidates.keys()
    checked = 0
    for target in trial.targets:
        ladder, place = exchange.ladders[target.name], exchange.place(target.name, plan)
        other = exchange.nudged(target, place)
        apart = abs(int(ladder.costs[other] - ladder.costs[place]))
        nudge = NUDGE * target.parameters
        assert apart >= nudge and (other > place or int(ladder.costs[-1] - ladder.costs[place]) < nudge)
        choices = {n: c for n, c in plan.choices.items() if n != target.name}
        if other < len(ladder.ranks):
            choices[target.name] = Choice({target.name: "low_rank"}, {"rank": ladder.ranks[other]})
        predicted = ladder.losses(exchange.curves[target.name])
        gained = (base - loss(trial, Plan(choices, 0, 0))) / float(predicted[place] - predicted[other])
        if gained > 0.05:  # less is rounding
            assert worth[target.name] == pytest.approx(gained, rel=0.02), target.name
            checked += 1
        else:
            assert LEAST <= worth[target.name] < 0.1
    assert checked > 5


def test_moved_plans_keep_the_budget_and_the_reach_and_lose_least_as_predicted(trial: Trial) -> None:
    exchange, rounds, plan = started(trial, 0.4)
    worth = exchange.worth(plan, rounds.whole(plan))

    def predicted(of: Plan) -> float:
        return sum(
            worth[name] * float(exchange.ladders[name].losses(exchange.curves[name])[exchange.place(name, of)])
            for name in worth
        )

    before = predicted(plan)
    for reach in (0.1, 0.2):
        moved = exchange.moved(plan, worth, reach)
        assert moved.spent <= exchange.problem.budget and moved.choices != plan.choices
        for target in trial.targets:
            assert abs(size(exchange, target.name, moved) - size(exchange, target.name, plan)) <= (
                reach * target.parameters
            )
        assert predicted(moved) < before
        before = predicted(moved)  # further away there is more to gain, as predicted
    assert exchange.moved(plan, worth, 0.0).choices == plan.choices


def test_each_turn_loses_less_and_the_last_is_what_the_recipe_takes(trial: Trial) -> None:
    asked = trial.problem(0.5)
    plans = [MeasuredCurve(trial=WINDOWS, length=None, rounds=0, exchange=turns).allocate(asked) for turns in (0, 1, 5)]
    losses = [loss(trial, plan) for plan in plans]
    assert losses[2] <= losses[1] * (1 + 1e-6) and losses[1] < losses[0]
    kept = {
        t: budget.count(plans[2].choices[t.name], t) if t.name in plans[2].choices else t.parameters
        for t in trial.targets
    }
    assert plans[2].spent == sum(kept.values()) <= asked.budget


def test_what_was_measured_is_not_measured_again(trial: Trial) -> None:
    memory, method = Remembered(), MeasuredCurve(trial=2, exchange=2)
    first = method.allocate(trial.problem(0.4, remember=memory))
    trial.built.clear()
    assert method.allocate(trial.problem(0.4, remember=memory)) == first and trial.built == []
    seen: list[str] = []
    progress = lambda stage, *_: seen.append(stage)  # noqa: E731
    method.allocate(trial.problem(0.4, progress=progress))
    assert set(seen) == {"measure", "exchange"}


def test_where_growing_breaks_the_model_a_matrix_is_not_cut_further(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, rounds, plan = started(trial, 0.4)
    broken = next(name for name in sorted(plan.choices) if "mlp" in name)
    of_target = Meter.of_target

    def measured(self: Meter, target: Any, choices: Any) -> list[float]:
        return [math.nan] if target.name == broken else of_target(self, target, choices)

    monkeypatch.setattr(Meter, "of_target", measured)
    worth = exchange.worth(plan, rounds.whole(plan))
    assert worth[broken] == math.inf and sum(map(math.isinf, worth.values())) == 1
    for reach in (0.05, 0.2):
        moved = exchange.moved(plan, worth, reach)
        assert size(exchange, broken, moved) >= size(exchange, broken, plan)


def test_a_matrix_that_loses_nothing_is_worth_least() -> None:
    trial = Trial()
    exchange, rounds, plan = started(trial, 0.3)
    name = trial.targets[0].name
    curves: Mapping[str, Any] = {**exchange.curves, name: torch.zeros_like(exchange.curves[name])}
    flat = Exchange(exchange.problem, exchange.ladders, curves, WINDOWS, None, 0.0)
    assert flat.worth(plan, rounds.whole(plan))[name] == LEAST
    assert isinstance(exchange.problem, Problem)
