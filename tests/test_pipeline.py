"""compress(): what it makes, what it reuses, what it counts, and that it makes the same again."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import spectrim
from spectrim import driving, recipe
from spectrim.calibrate.statistics import Cosine
from spectrim.core import budget, registry
from spectrim.core.plan import Plan
from spectrim.core.registry import Allocator, Problem, allocator
from spectrim.recipe import RecipeError
from tests.conftest import letters, save_model, tree_hash
from tests.families import FAMILIES, LAYERS, VOCABULARY

CALIBRATION = torch.randint(1, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(2))
PROMPT = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
TARGETS = LAYERS * len(FAMILIES["llama"].roles)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(PROMPT).logits


def stored(directory: Path) -> dict[str, Tensor]:
    return {k: t for file in sorted(directory.glob("*.safetensors")) for k, t in load_file(file).items()}


@pytest.mark.parametrize("name", ["default", "asvd", "fwsvd", "svd"])
def test_a_live_model_and_one_on_disk_become_the_same(name: str, llama_dir: Path, tmp_path: Path) -> None:
    live = FAMILIES["llama"].make()
    made = spectrim.compress(live, name, ratio=0.4, text=CALIBRATION)
    written = spectrim.compress(llama_dir, name, ratio=0.4, text=CALIBRATION, out=tmp_path / "out")
    assert made.model is live and made.directory is None
    assert written.model is None and written.directory == tmp_path / "out"
    assert made.plan == written.plan
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert loaded.keys() == live.state_dict().keys()
    for key, tensor in live.state_dict().items():
        torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=0, msg=key)
    assert made.summary["parameters"] == written.summary["parameters"]


def test_a_live_model_takes_text_with_a_tokenizer(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    one, other = FAMILIES["llama"].make(), FAMILIES["llama"].make()
    options: dict[str, Any] = {"ratio": 0.4, "text": str(text_file), "sequences": 4, "length": 24}
    with pytest.raises(ValueError, match="give the tokenizer too"):
        spectrim.compress(one, **options)
    spectrim.compress(one, tokenizer=tokenizer, **options)
    assert float((logits(one) - logits(other)).abs().max()) > 1e-3


def test_neither_out_for_a_live_model_nor_none_for_a_directory(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save it with spectrim\.save"):
        spectrim.compress(FAMILIES["llama"].make(), "svd", out=tmp_path / "out")
    with pytest.raises(ValueError, match="give `out`"):
        spectrim.compress(llama_dir, "svd")


@pytest.mark.parametrize(
    ("name", "format"), [("llama", "plain"), ("llama_tied", "pivot"), ("gpt2", "pivot"), ("mixtral", "plain")]
)
def test_counts_are_those_of_the_saved_tensors(name: str, format: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[name].make(), tmp_path / "dense")
    result = spectrim.compress(directory, "svd", ratio=0.35, format=format, out=tmp_path / "out")
    described = json.loads((tmp_path / "out" / "spectrim.json").read_text())
    assert described == json.loads(json.dumps(result.summary))
    before, after = stored(directory), stored(tmp_path / "out")

    def size(tensors: dict[str, Tensor], *prefixes: str) -> int:
        """Entries of the floating-point tensors, of modules if given: their weights and factors, not their biases."""
        return sum(
            tensor.numel()
            for key, tensor in tensors.items()
            if tensor.is_floating_point()
            and (not prefixes or any(key.startswith(f"{p}.") and key != f"{p}.bias" for p in prefixes))
        )

    names = [target["name"] for target in _targets_of(directory)]
    counts = described["parameters"]
    assert counts["total_before"] == size(before)
    assert counts["total_after"] == size(after)
    assert counts["targets_before"] == size(before, *names)
    assert counts["targets_after"] == size(after, *names) == described["plan"]["spent"]
    assert described["ratio_requested"] == 0.35
    assert described["ratio_actual"] == pytest.approx(1 - size(after, *names) / size(before, *names), abs=1e-12)
    assert described["ratio_of_model"] == pytest.approx(1 - size(after) / size(before), abs=1e-12)
    assert 0.35 <= described["ratio_actual"] < 0.36
    # a live model is counted alike; the embedding that is also the head, once
    live = spectrim.compress(FAMILIES[name].make(), "svd", ratio=0.35, format=format)
    assert live.summary["parameters"] == counts


def _targets_of(directory: Path) -> list[dict[str, Any]]:
    from spectrim.estimate import estimate

    return estimate(directory, recipe.build("svd")).to_json()["targets"]


def test_ratio_nothing_leaves_the_model_as_it_is(llama_dir: Path, tmp_path: Path) -> None:
    result = spectrim.compress(llama_dir, ratio=0.0, text=CALIBRATION, out=tmp_path / "out")
    assert result.plan.choices == {} and result.summary["ratio_actual"] == 0
    before, after = stored(llama_dir), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((llama_dir / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))


def test_two_runs_write_the_same_bytes(llama_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": 0.3, "text": str(text_file), "sequences": 8, "length": 24}
    for name in "ab":
        spectrim.compress(llama_dir, out=tmp_path / name, seed=3, **options)
    one, other = tree_hash(tmp_path / "a", "run.json"), tree_hash(tmp_path / "b", "run.json")
    assert one == other
    assert {"model.safetensors", "config.json", "spectrim.json", "spectrim_model.py", "tokenizer.json"} <= one.keys()
    assert (tmp_path / "a" / "run.json").is_file()
    assert tree_hash(tmp_path / "a.work").keys() == tree_hash(tmp_path / "b.work").keys()


def test_the_seed_reaches_the_windows(llama_dir: Path, text_file: Path, tmp_path: Path) -> None:
    def windows(seed: int) -> dict[str, Any]:
        options: dict[str, Any] = {"text": str(text_file), "sequences": 8, "length": 24, "work": tmp_path / "work"}
        result = spectrim.compress(llama_dir, "whitened", out=tmp_path / "out", seed=seed, overwrite=True, **options)
        assert result.summary["seed"] == seed
        return result.summary["calibration"]

    first, second = windows(0), windows(1)
    assert first["shape"] == second["shape"] == [8, 24]
    assert first["sha256"] != second["sha256"]
    assert windows(0) == first


@pytest.fixture
def seen_windows(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The calibration tokens that reach the driver."""
    seen: list[Tensor] = []
    original = driving.streamed

    def keeping(source: Any, structure: Any, batches: Any, *rest: Any) -> Iterator[Any]:
        seen.append(torch.cat([batch.ids for batch in batches]))
        return original(source, structure, batches, *rest)

    monkeypatch.setattr(driving, "streamed", keeping)
    return seen


def test_several_texts_are_mixed_by_weight(llama_dir: Path, tmp_path: Path, seen_windows: list[Tensor]) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 400)
    text = [f"{tmp_path / 'a.txt'}=3", str(tmp_path / "b.txt")]
    spectrim.compress(llama_dir, "whitened", text=text, sequences=8, length=24, out=tmp_path / "out")
    (windows,) = seen_windows
    assert windows.shape == (8, 24)
    last = Counter(int(row[-1]) for row in windows)
    assert last == {1: 6, 2: 2}


def test_windows_given_as_tokens_are_used_as_they_are(
    llama_dir: Path, tmp_path: Path, seen_windows: list[Tensor]
) -> None:
    result = spectrim.compress(llama_dir, "whitened", text=CALIBRATION, out=tmp_path / "out")
    assert torch.equal(seen_windows[0], CALIBRATION)
    assert result.summary["calibration"]["shape"] == [8, 24]


def test_length_is_by_default_what_the_model_takes_and_never_more(
    llama_dir: Path, tmp_path: Path, text_file: Path, seen_windows: list[Tensor]
) -> None:
    spectrim.compress(llama_dir, "whitened", text=str(text_file), sequences=2, out=tmp_path / "out")
    assert seen_windows[0].shape == (2, 48)
    with pytest.raises(ValueError, match="length 49 exceeds the model's maximum of 48 positions"):
        spectrim.compress(llama_dir, "whitened", text=str(text_file), sequences=2, length=49, out=tmp_path / "other")


def test_what_measures_nothing_needs_no_text(llama_dir: Path, tmp_path: Path, calls: Counter[str]) -> None:
    result = spectrim.compress(llama_dir, "svd", out=tmp_path / "out")
    assert result.summary["calibration"] is None
    assert calls == {"directions": TARGETS}
    with pytest.raises(ValueError, match=r"measures Gram\(\) on calibration text: give --text"):
        spectrim.compress(llama_dir, "whitened", out=tmp_path / "other")


def test_groups_have_their_own_method_format_and_ratio(llama_dir: Path, tmp_path: Path) -> None:
    asked = tmp_path / "two.yaml"
    asked.write_text(
        """
        groups:
          - {match: [q, k, v, o], ratio: 0.5, format: pivot, decompose: {method: svd}, allocate: {method: uniform}}
          - match: "*.mlp.*"
            ratio: 0.25
            decompose: [{method: asvd, match: up}, {method: whitened_svd}]
            allocate: {method: uniform, multiple: 2}
        """
    )
    result = spectrim.compress(llama_dir, str(asked), text=CALIBRATION, out=tmp_path / "out")
    choices = result.plan.choices
    assert len(choices) == TARGETS
    attention = {name: choice for name, choice in choices.items() if "self_attn" in name}
    assert {format for choice in attention.values() for format in choice.formats.values()} == {"pivot"}
    others = [choice for name, choice in choices.items() if ".mlp." in name]
    assert {format for choice in others for format in choice.formats.values()} == {"low_rank"}
    assert {choice.counts["rank"] % 2 for choice in others} == {0}
    counts = result.summary["parameters"]
    attention_dense, ffn_dense = LAYERS * (2 * 32 * 32 + 2 * 16 * 32), LAYERS * 3 * 32 * 48
    assert counts["targets_before"] == attention_dense + ffn_dense
    allowed = 0.5 * attention_dense + 0.75 * ffn_dense
    assert result.plan.budget == allowed
    assert result.summary["ratio_requested"] == pytest.approx(1 - allowed / (attention_dense + ffn_dense))
    assert 0 <= allowed - counts["targets_after"] < 200


def test_a_gradient_anywhere_runs_everything_in_the_resident_driver(
    llama_dir: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    asked = tmp_path / "both.yaml"
    asked.write_text("groups: [{decompose: [{method: fwsvd, match: q}, {method: whitened_svd}]}]")
    spectrim.compress(llama_dir, str(asked), ratio=0.3, text=CALIBRATION, out=tmp_path / "both")
    assert calls["resident"] == 1 and calls["streamed"] == 0
    spectrim.compress(llama_dir, "whitened", ratio=0.3, text=CALIBRATION, out=tmp_path / "whitened")
    both, whitened = stored(tmp_path / "both"), stored(tmp_path / "whitened")
    name = "model.layers.1.mlp.up_proj.right.weight"
    torch.testing.assert_close(both[name], whitened[name], rtol=1e-5, atol=1e-6)


def cosines(model: PreTrainedModel) -> list[float]:
    """Mean cosine between the states before and after each block; what transformers returns, but for the last one."""
    ends: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: ends.append(args[0]))
    with torch.no_grad():
        states = model(CALIBRATION, output_hidden_states=True).hidden_states
    handle.remove()
    states = (*states[:-1], ends[0])
    return [float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in itertools.pairwise(states)]


@dataclass
class _Seen:
    problems: list[Problem]


@pytest.fixture
def by_cosine() -> Iterator[_Seen]:
    """A registered allocator that wants spectra and a statistic of the blocks, and keeps what it was given."""
    seen = _Seen([])

    @allocator("by_cosine")
    @dataclass(frozen=True)
    class ByCosine(Allocator):
        """Even ranks; what it is given is what is tested."""

        grain = 1
        sees: Literal["shapes", "units"] = "units"

        @property
        def needs(self) -> tuple[Any, ...]:
            return (Cosine(),)

        def allocate(self, problem: Problem) -> Plan:
            seen.problems.append(problem)
            ranks = budget.even_ranks(problem.targets, problem.budget, problem.format)
            return budget.rank_plan(problem.targets, ranks, problem.format, problem.budget)

    yield seen
    del registry._allocators["by_cosine"]


@pytest.mark.parametrize("decomposer", ["whitened_svd", "svd"])
def test_an_allocator_of_units_gets_candidates_and_statistics(
    decomposer: str, llama_dir: Path, tmp_path: Path, by_cosine: _Seen, calls: Counter[str]
) -> None:
    asked = tmp_path / "units.yaml"
    asked.write_text(f"groups: [{{decompose: {{method: {decomposer}}}, allocate: {{method: by_cosine}}}}]")

    def at(ratio: float) -> None:
        out = tmp_path / f"{ratio}"
        spectrim.compress(llama_dir, str(asked), ratio=ratio, text=CALIBRATION, out=out, work=tmp_path / "work")

    at(0.3)
    (problem,) = by_cosine.problems
    assert problem.candidates is not None and problem.statistics is not None
    assert set(problem.candidates) == {target.name for target in problem.targets}
    weights = stored(llama_dir)
    for target in problem.targets:
        units = problem.candidates[target.name].rank_units
        shape = (target.parts[0].out_features, target.parts[0].in_features)
        assert units.scores.shape == (min(shape),)
        assert bool((units.scores.diff() <= 0).all())
        if decomposer == "svd":
            exact = torch.linalg.svdvals(weights[f"{target.name}.weight"].double())
            torch.testing.assert_close(units.scores, exact, rtol=1e-6, atol=1e-6)
        else:
            assert units.errors is not None
            torch.testing.assert_close(units.errors, units.scores**2)
    measured = [problem.statistics[index][Cosine()].item() for index in range(LAYERS)]
    assert measured == pytest.approx(cosines(FAMILIES["llama"].make()), rel=1e-5)
    calls.clear()
    at(0.5)
    assert calls == {}
    again = by_cosine.problems[1]
    assert again.budget < problem.budget
    assert again.statistics is not None
    assert [again.statistics[index][Cosine()].item() for index in range(LAYERS)] == measured


def test_the_dtype_of_the_output_can_be_chosen(llama_dir: Path, tmp_path: Path) -> None:
    spectrim.compress(llama_dir, "svd", format="pivot", out=tmp_path / "out", dtype=torch.bfloat16)
    assert {t.dtype for t in stored(tmp_path / "out").values()} == {torch.bfloat16, torch.int32}
    half = save_model(FAMILIES["llama"].make().to(torch.bfloat16), tmp_path / "half")
    spectrim.compress(half, "svd", out=tmp_path / "kept")
    assert {t.dtype for t in stored(tmp_path / "kept").values()} == {torch.bfloat16}


def test_progress_names_the_stages_and_ends_each(llama_dir: Path, tmp_path: Path) -> None:
    last: dict[str, tuple[int, int]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        assert 0 < done <= total and done >= last.get(stage, (0, 0))[0]
        last[stage] = (done, total)

    spectrim.compress(llama_dir, "whitened", text=CALIBRATION, out=tmp_path / "out", progress=progress)
    assert list(last) == ["calibrate", "decompose", "write"]
    assert all(done == total for done, total in last.values())


def test_the_record_of_a_run(llama_dir: Path, tmp_path: Path) -> None:
    result = spectrim.compress(llama_dir, text=CALIBRATION, out=tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts == json.loads(json.dumps(result.run))
    assert {"read", "targets", "text", "calibrate", "decompose", "allocate", "write"} <= facts["timings"].keys()
    assert all(seconds >= 0 for seconds in facts["timings"].values())
    assert facts["peak_rss_bytes"] > 10**7
    summary = json.loads((tmp_path / "out" / "spectrim.json").read_text())
    assert summary["recipe"]["groups"][0]["ratio"] == 0.2
    assert set(summary["versions"]) == {"spectrim", "torch", "transformers", "safetensors"}
    assert Plan.from_json(summary["plan"]) == result.plan


def test_too_few_tokens_are_warned_of(llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spectrim.compress(llama_dir, text=CALIBRATION[:1], out=tmp_path / "out")
    assert "24 calibration tokens for inputs of width 48" in caplog.text


def test_a_dry_run_plans_what_the_run_makes(llama_dir: Path, tmp_path: Path) -> None:
    from spectrim.estimate import estimate

    asked = recipe.build("whitened", {"ratio": 0.3, "format": "pivot"})
    guessed = estimate(llama_dir, asked)
    result = spectrim.compress(llama_dir, asked, text=CALIBRATION, out=tmp_path / "out")
    assert guessed.plan is not None and guessed.plan.choices == result.plan.choices
    assert guessed.totals == result.summary["parameters"]
    written = sum(tensor.numel() * tensor.element_size() for tensor in stored(tmp_path / "out").values())
    assert guessed.disk["output"] == pytest.approx(written, rel=0.1)
    kept = sum(path.stat().st_size for path in (tmp_path / "out.work" / "candidate").iterdir())
    assert guessed.disk["work"] == pytest.approx(kept, rel=0.25)


def test_an_unreachable_ratio_is_found_before_anything_is_read(
    llama_dir: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    with pytest.raises(RecipeError, match=r"the largest possible ratio here is 0\.\d+"):
        spectrim.compress(llama_dir, ratio=0.99, text=CALIBRATION, out=tmp_path / "out")
    assert calls == {} and not list(tmp_path.iterdir())


def test_letters_are_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """What the tests above count on."""
    text = letters(30)
    ids: Callable[[str], list[int]] = lambda part: tokenizer(part)["input_ids"]  # noqa: E731
    assert len(ids(text)) == 31 and ids("ab") == [0, 1, 2]
    assert tokenizer.decode(ids(text)[1:]) == text
