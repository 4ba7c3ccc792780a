"""The systems end to end: every family kind through each, budgets on random models, and what bad input says."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectrim
from spectrim.calibrate.statistics import Cosine, SublayerCosine
from spectrim.core import budget
from spectrim.core.plan import Candidate, Part, Plan, Target, Units
from spectrim.core.registry import Problem, allocators
from spectrim.methods.deviation import Deviation, Row
from spectrim.model.live import Installed
from spectrim.recipe import RecipeError
from tests.families import FAMILIES, VOCABULARY

CALIBRATION = torch.randint(1, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(2))
PROMPT = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
# the systems with everything that is run made small
SYSTEMS = {
    "unirank": [],
    "duo-svd": ["groups.0.allocate.sequences=2", "groups.0.allocate.grid=[0.0, 0.5]"],
    "lorap": [],
    "bolaco": [f"groups.0.allocate.{key}" for key in ("evaluations=3", "initial=1", "sequences=2")],
}
# grouped queries, biases, one fused qkv with a fused gate_up, non-gated with Conv1D, multi-query and parallel
KINDS = ("llama", "phi3", "gpt2", "falcon")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


@pytest.mark.parametrize("format", ["plain", "pivot"])
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_family_goes_through(name: str, system: str, format: str, tmp_path: Path) -> None:
    model = FAMILIES[name].make()
    before = sum(p.numel() for p in model.parameters())
    result = spectrim.compress(model, system, 0.3, CALIBRATION, format=format, settings=SYSTEMS[system])
    plan, kept = result.plan, result.summary["parameters"]
    assert plan.choices and plan.spent <= plan.budget
    assert sum(p.numel() for p in model.parameters()) < before - 0.25 * kept["targets_before"]
    # parameters that a plan counts are those that are there; biases that went with their channels are no target's
    assert kept["total_before"] - kept["total_after"] >= kept["targets_before"] - kept["targets_after"]
    compressed = logits(model)
    assert compressed.isfinite().all()
    if getattr(model.config, "quantization_config", None) is None:
        model.save_pretrained(tmp_path / "saved")
    else:
        spectrim.save(model, tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), compressed)


def test_lorap_leaves_v_and_o_three_times_what_q_and_k_have() -> None:
    result = spectrim.compress(FAMILIES["qwen3"].make(), "lorap", 0.5, CALIBRATION)
    kept = dict.fromkeys("qkvo", 0)
    for block in range(2):
        for role in kept:
            name = f"model.layers.{block}.self_attn.{role}_proj"
            module = result.model.get_submodule(name)  # type: ignore[union-attr]
            kept[role] += sum(p.numel() for n, p in module.named_parameters() if n != "bias")
    assert kept["v"] + kept["o"] == pytest.approx(3 * (kept["q"] + kept["k"]), rel=0.15)


# --- budgets on random models ---


def random_problem(seed: int) -> tuple[Problem, torch.Generator]:
    """Targets of random shapes in random blocks, spectra and cosines at random, and a budget between little and all."""
    rng = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=rng))

    format, roles = ("low_rank", "pivot")[number(0, 1)], ("q", "v", "up", "qkv", "other")
    found, candidates, blocks = [], {}, number(1, 2)
    for block in range(blocks):
        for role in roles[: number(2, len(roles))]:
            out, width = number(3, 20), number(3, 20)
            part = Part(f"b.{block}.{role}", out, width, role)
            target = Target(part.module, role, (block,), (part,))
            scores = torch.rand(min(out, width), generator=rng, dtype=torch.float64).sort(descending=True).values
            units = Units("rank", scores, scores.square(), out + width)
            candidate = Candidate(target, (units,), dict, dict)
            candidates[target.name] = candidate.priced(format, budget.unit_cost(format, part))
            found.append(target)
    statistics = {
        block: {Cosine(): torch.rand(1, generator=rng), SublayerCosine(): torch.rand(2, generator=rng)}
        for block in range(blocks)
    }
    allowed = budget.allowed(found, float(torch.rand(1, generator=rng)) * 0.75)
    return Problem(found, allowed, format, rng, candidates, statistics), rng


def within_budget(plan: Plan, problem: Problem) -> bool:
    kept = sum(
        budget.count(plan.choices[t.name], t) if t.name in plan.choices else t.parameters for t in problem.targets
    )
    return plan.spent == kept <= problem.budget == plan.budget


class _Table(Deviation):
    """Deviation with random rows in the place of measured ones."""

    def table(self, problem: Problem, options: Any) -> tuple[dict[str, Row], tuple[str, ...]]:
        rows = {}
        for name, choices in options.items():
            losses = torch.rand(len(choices), generator=problem.generator).sort(descending=True).values
            rows[name] = Row(tuple(choices), tuple(losses.tolist()))
        return rows, ()


@pytest.mark.slow
def test_no_budget_is_exceeded_on_random_models() -> None:
    methods = [kind() for name, kind in sorted(allocators().items()) if kind().sees != "model"]
    methods = [method for method in methods if type(method).__name__ != "CapGreedy"]  # of entries
    methods += [allocators()["unirank"](granularity="sublayer", cost_mode="per_param"), _Table()]
    refused = planned = 0
    for seed in range(200):
        for method in methods:
            problem, _ = random_problem(seed)
            try:
                plan = method.allocate(problem)
            except ValueError as error:
                assert "ratio" in str(error)
                refused += 1
            else:
                planned += 1
                assert within_budget(plan, problem), (seed, method)
    assert planned > 5 * refused


# --- bad input ---


def test_a_group_that_cannot_be_met_is_named_with_its_largest_ratio(tmp_path: Path, llama_dir: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(
        "groups:\n"
        "  - {match: [q, k, v, o], ratio: 0.2, decompose: {method: svd}}\n"
        "  - {match: ffn, ratio: 0.99, decompose: {method: channel_prune}}\n"
    )
    with pytest.raises(
        RecipeError, match=r"group 'ffn' at ratio 0\.99: ratio too large.*largest possible ratio here is 0\.97"
    ):
        spectrim.compress(llama_dir, str(path), text=CALIBRATION, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_deviation_that_is_not_finite_is_left_out_and_noted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = Installed.built

    def breaking(self: Installed, target: str, choice: Any) -> Any:
        made = original(self, target, choice)
        if target.endswith("0.mlp.up_proj") and choice.counts["rank"] < 10:
            next(made[target].parameters()).data.fill_(float("nan"))
        return made

    monkeypatch.setattr(Installed, "built", breaking)
    settings = ["groups.0.allocate.sequences=2", "groups.0.allocate.grid=[0.0, 0.6]"]
    with caplog.at_level(logging.WARNING):
        result = spectrim.compress(FAMILIES["llama"].make(), "duo-svd", 0.3, CALIBRATION, settings=settings)
    (note,) = result.plan.notes
    assert note.startswith("model.layers.0.mlp.up_proj: the deviation at ratio 0.6") and note in caplog.text


@pytest.mark.parametrize("system", ["unirank", "lorap"])
def test_few_tokens_work_and_are_said_once(system: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        spectrim.compress(FAMILIES["llama"].make(), system, 0.3, CALIBRATION[:1, :20])
    assert sum("rank deficient" in record.message for record in caplog.records) == 1


def test_the_search_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'spectrim\[search\]'"):
        spectrim.compress(FAMILIES["llama"].make(), "bolaco", 0.3, CALIBRATION, settings=SYSTEMS["bolaco"])


def test_a_method_that_does_not_fit_its_targets_is_refused(tmp_path: Path) -> None:
    for match, method, message in (
        ("ffn", "svd", r"PlainSVD works on single matrices; model\.layers\.0\.mlp has the role 'ffn'"),
        ("up", "channel_prune", r"ChannelPrune works on FFNs as wholes \(match: ffn\); .*up_proj has the role 'up'"),
    ):
        (tmp_path / "wrong.yaml").write_text(f"groups: [{{match: {match}, decompose: {{method: {method}}}}}]")
        with pytest.raises(RecipeError, match=message):
            spectrim.compress(FAMILIES["llama"].make(), str(tmp_path / "wrong.yaml"), text=CALIBRATION)
