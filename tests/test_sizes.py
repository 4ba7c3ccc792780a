"""`--budget`, `--parameters` and `--max-loss`: what comes out, what is said, and that nothing is made twice."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import spectrim
from spectrim import recipe, searching, sizes, towards
from spectrim.cli import app
from spectrim.estimate import estimate
from spectrim.measure.evaluate import parameters
from spectrim.recipe import RecipeError
from tests.conftest import save_model, tree_hash
from tests.families import FAMILIES, VOCABULARY

CALIBRATION = torch.randint(1, VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(2))
MANY = torch.randint(1, VOCABULARY, (60, 40), generator=torch.Generator().manual_seed(5))
HALF = ["calibrate.accept=0.5"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is wide enough for ranks to be fine steps of its size."""
    wider = {"hidden_size": 96, "intermediate_size": 128}
    return save_model(FAMILIES["llama"].make(**wider), tmp_path_factory.mktemp("models") / "wide")


def bytes_of(directory: Path) -> int:
    """Of all files with weights, found with no help of the package."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@pytest.mark.parametrize(("name", "share"), [("svd", 0.9), ("default", 0.7), ("lorap", 0.8), ("magnitude", 0.7)])
def test_the_files_come_out_at_a_budget_of_bytes(name: str, share: float, wide: Path, tmp_path: Path) -> None:
    budget = int(share * bytes_of(wide))
    result = spectrim.compress(wide, name, text=CALIBRATION, out=tmp_path / "out", budget=budget)
    assert 0.995 * budget <= bytes_of(tmp_path / "out") <= budget
    assert result.run["tries"][-1]["bytes"] == bytes_of(tmp_path / "out")
    assert result.summary["size"]["bytes"] == budget
    # an ordinary checkpoint, of the ratio that is said
    again = spectrim.compress(
        wide, name, text=CALIBRATION, out=tmp_path / "again", work=tmp_path / "out.work",
        ratio=result.summary["recipe"]["groups"][0]["ratio"],
    )  # fmt: skip
    assert again.plan.choices == result.plan.choices
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(CALIBRATION[:1]).logits.isfinite().all()


@pytest.mark.parametrize(("dtype", "wanted"), [(torch.bfloat16, "220kB"), (torch.float32, "0.45 MB")])
def test_a_budget_counts_in_the_dtype_that_is_stored(
    dtype: torch.dtype, wanted: str, wide: Path, tmp_path: Path
) -> None:
    spectrim.compress(wide, "default", text=CALIBRATION, out=tmp_path / "out", budget=wanted, dtype=dtype)
    limit = 220_000 if dtype == torch.bfloat16 else 450_000
    assert 0.995 * limit <= bytes_of(tmp_path / "out") <= limit


@pytest.mark.parametrize("name", ["svd", "unirank", "default"])
def test_the_model_comes_out_at_a_number_of_parameters(name: str, wide: Path, tmp_path: Path) -> None:
    wanted = parameters(wide)["total"] * 0.75
    result = spectrim.compress(wide, name, text=CALIBRATION, out=tmp_path / "out", parameters=wanted)
    found = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())
    assert 0.999 * wanted <= found <= wanted and found == parameters(tmp_path / "out")["total"]
    assert result.run["tries"] == [{"ratio": result.summary["ratio_requested"], "parameters": found}]


def test_a_live_model_is_brought_to_a_size_in_memory() -> None:
    for name in ("llama_tied", "gpt2"):
        model = FAMILIES[name].make(**({"n_embd": 96} if name == "gpt2" else {"hidden_size": 96}))
        before = parameters(model)
        limit = int(0.8 * (before["bytes"] + before["index_bytes"]))
        spectrim.compress(model, "default", text=CALIBRATION, budget=limit)
        after = parameters(model)
        assert 0.995 * limit <= after["bytes"] + after["index_bytes"] <= limit


def test_groups_keep_their_proportions(wide: Path, tmp_path: Path) -> None:
    asked = tmp_path / "two.yaml"
    rest = "decompose: {method: svd}, allocate: {method: uniform}"
    asked.write_text(f"groups: [{{match: [q, k, v, o], ratio: 0.1, {rest}}}, {{match: '*.mlp.*', ratio: 0.4, {rest}}}]")
    wanted = parameters(wide)["total"] * 0.8
    result = spectrim.compress(wide, str(asked), out=tmp_path / "out", parameters=wanted)
    attention, ffn = (group["ratio"] for group in result.summary["recipe"]["groups"])
    assert attention == pytest.approx(ffn / 4, abs=1e-6) and attention > 0.05
    assert 0.99 * wanted <= result.summary["parameters"]["total_after"] <= wanted
    assert [group.ratio for group in sizes.scaled(recipe.build("lorap", {"ratio": 0.0}), 0.3).groups] == [0.3, 0.3]


@pytest.mark.parametrize(("option", "name"), [("parameters", "svd"), ("budget", "default")])
def test_too_small_says_the_least_and_the_least_is_reached(
    option: str, name: str, llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"too small: the least that is reachable is [\d,]+ \w+, [\d,]+ of them") as e:
        spectrim.compress(llama_dir, name, text=CALIBRATION, out=tmp_path / "out", **{option: 3000})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()
    least = int(re.search(r"reachable is ([\d,]+)", str(e.value))[1].replace(",", ""))  # type: ignore[index]
    with pytest.raises(RecipeError, match="too small"):
        spectrim.compress(llama_dir, name, text=CALIBRATION, out=tmp_path / "out", **{option: int(least * 0.995)})
    spectrim.compress(llama_dir, name, text=CALIBRATION, out=tmp_path / "out", **{option: least})
    took = sizes.on_disk(tmp_path / "out")
    assert 0.98 * least < getattr(took, "bytes" if option == "budget" else option) <= least


def test_what_cannot_be_is_said(llama_dir: Path, tmp_path: Path) -> None:
    def refused(match: str, **given: Any) -> None:
        with pytest.raises(RecipeError, match=match):
            spectrim.compress(llama_dir, "svd", text=CALIBRATION, out=tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()

    refused("--ratio and --budget each say how small the model is to be: give one", ratio=0.2, budget="1GB")
    refused("--parameters and --max-loss each", parameters=1000, max_loss=0.1)
    refused(r"--budget 1,000,000,000: the model takes [\d,]+ bytes as it is", budget="1GB")
    refused(r"--parameters 20,064: the model takes 20,064 parameters as it is", parameters=20064)
    refused("--budget 'small' is no size: give bytes, or a number with a unit", budget="small")
    for wrong in (0.5, float("nan"), -3.0):
        refused("--parameters .*: give how many", parameters=wrong)
    for wrong in (float("inf"), -0.1):
        refused("--max-loss .*: give nats a token", max_loss=wrong)


# --- losses ---


def nll(model: PreTrainedModel, ids: Tensor) -> float:
    """Mean −log p of the next token."""
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_loss_of_a_plan_is_that_of_the_models(name: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[name].make(), tmp_path / "dense")
    result = spectrim.compress(
        directory, "whitened", 0.4, MANY, tmp_path / "out", measure=True, settings=["calibrate.accept=0.5"]
    )
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loss = result.run["loss"]
    assert loss["windows"] == "accept" and loss["predictions"] == 30 * 39
    more = nll(made, MANY[30:]) - nll(FAMILIES[name].make(), MANY[30:])
    assert loss["excess"] == pytest.approx(more, abs=2e-5) and abs(more) > 1e-3


def lossy(monkeypatch: pytest.MonkeyPatch, limit: float = 1.0) -> list[float]:
    """Losses that are the square of the ratio, and too much to be planned beyond a limit; the ratios planned."""
    seen: list[float] = []

    def lost(run: Any, plan: Any, candidates: Any, windows: Tensor) -> towards.Lost:
        seen.append(run.asked.groups[0].ratio)
        return towards.Lost(0.0, seen[-1] ** 2, 1)

    def planned(run: Any, early: Any) -> Any:
        if run.asked.groups[0].ratio > limit:
            raise RecipeError("ratio too large")
        return original(run, early)

    original = searching.planned
    monkeypatch.setattr(towards, "lost", lost)
    monkeypatch.setattr(searching, "planned", planned)
    return seen


@pytest.mark.parametrize(("allowed", "limit", "best"), [(0.1, 1.0, 0.31), (0.5, 1.0, 0.70), (0.5, 0.4, 0.4)])
def test_the_largest_ratio_within_a_loss_is_found(
    allowed: float, limit: float, best: float, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = lossy(monkeypatch, limit)
    result = spectrim.compress(llama_dir, "unirank", text=MANY, out=tmp_path / "out", max_loss=allowed, settings=HALF)
    assert result.summary["ratio_requested"] == best and len(tried) <= 8
    assert [each["ratio"] for each in result.run["tries"] if "excess" in each] == tried
    assert any("failed" in each for each in result.run["tries"]) == (limit < 1)
    assert result.run["loss"]["excess"] == pytest.approx(best**2)
    assert f"--max-loss {allowed}: ratio {best}" in result.plan.notes[-1]


@pytest.fixture(scope="module")
def own_text() -> Tensor:
    """What the dense model itself says, so that nothing else loses less on it."""
    torch.manual_seed(0)
    start = torch.zeros(60, 1, dtype=torch.int64)
    said = FAMILIES["llama"].make().generate(start, do_sample=True, min_new_tokens=39, max_new_tokens=39)  # type: ignore[operator]
    assert said.shape == (60, 40)
    return said


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [pytest.param("whitened", marks=SLOW), pytest.param("spectrim-onepass", marks=SLOW), "spectrim"]
)
def test_a_loss_is_kept_and_nothing_is_calibrated_or_decomposed_twice(
    name: str, llama_dir: Path, tmp_path: Path, own_text: Tensor, calls: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="spectrim")
    quick = ["groups.0.allocate.trial=2", "groups.0.allocate.rounds=0"] if name != "whitened" else []
    settings = [*quick, "calibrate.accept=0.5", *(["calibrate.mix=0.5"] if name == "spectrim" else [])]
    result = spectrim.compress(llama_dir, name, text=own_text, out=tmp_path / "out", max_loss=0.05, settings=settings)
    tries, chosen = result.run["tries"], result.summary["recipe"]["groups"][0]["ratio"]
    assert len(tries) >= 3, tries
    assert calls["streamed"] + calls["resident"] == 1, "one pass over the dense model for all tries"
    kept = {each["ratio"]: each["excess"] for each in tries}
    assert kept[chosen] <= 0.05 and all(kept[ratio] > 0.05 for ratio in kept if ratio > chosen)
    assert round(chosen + 0.01, 2) in kept
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert nll(made, own_text[30:]) - nll(FAMILIES["llama"].make(), own_text[30:]) == pytest.approx(
        kept[chosen], abs=2e-5
    )
    logged = [line for line in caplog.messages if line.startswith("tried ratio")]
    assert len(logged) == len(tries) and all(
        str(each["ratio"]) in line for each, line in zip(tries, logged, strict=True)
    )
    # the same command again, and one that was killed after its tries, end in the same bytes
    again = spectrim.compress(llama_dir, name, text=own_text, out=tmp_path / "out", max_loss=0.05, settings=settings)
    assert again.summary == result.summary
    spectrim.compress(
        llama_dir, name, text=own_text, out=tmp_path / "b", work=tmp_path / "out.work", max_loss=0.05, settings=settings
    )
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(tmp_path / "b", "run.json")
    assert calls["streamed"] + calls["resident"] == 1


def test_a_killed_search_goes_on(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(out: str) -> None:
        spectrim.compress(llama_dir, "unirank", text=MANY, out=tmp_path / out, max_loss=0.05, settings=HALF)

    run("whole")
    measured, original = 0, towards.lost

    def interrupted(*args: Any) -> towards.Lost:
        nonlocal measured
        measured += 1
        if measured == 3:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(towards, "lost", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("out")
        assert not (tmp_path / "out").exists()
        run("out")
    tries = len(json.loads((tmp_path / "out" / "run.json").read_text())["tries"])
    assert measured == tries + 1, "what was measured before is not measured again"
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(tmp_path / "whole", "run.json")


def test_a_loss_that_cannot_be_kept_writes_nothing(llama_dir: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"text": MANY, "out": tmp_path / "out", "settings": HALF}
    with pytest.raises(
        RecipeError, match=r"the best found is a ratio of 0\.01, which loses \d\S*\. Nothing was written"
    ):
        spectrim.compress(llama_dir, "svd", max_loss=0.0, **given)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match=r"windows of calibrate\.accept|60 windows|1024 tokens"):
        spectrim.compress(llama_dir, "svd", max_loss=0.1, **{**given, "settings": []})


def test_too_little_text_says_how_much_more(llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RecipeError, match=r"has 240: give 195 more sequences of 40 tokens, 255 in all") as found:
        spectrim.compress(llama_dir, "unirank", text=MANY, out=tmp_path / "out", max_loss=0.1)
    assert "calibrate.accept is 0.1" in caplog.text and "--sequences 255" in str(found.value)
    enough = recipe.Calibrate(accept=0.1)
    assert enough.shared_out(255)[2] * 40 >= 1024 > enough.shared_out(254)[2] * 40
    with pytest.raises(ValueError, match=r"measures what the result loses on calibration text: give --text"):
        spectrim.compress(llama_dir, "svd", out=tmp_path / "out", max_loss=0.1)


def test_the_command_line(wide: Path, tmp_path: Path) -> None:
    def call(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    both = call("compress", wide, "--out", tmp_path / "out", "--ratio", "0.2", "--max-loss", "0.1")
    assert both.exit_code == 2 and "--ratio and --max-loss each say" in both.stderr
    for options in (["--budget", "1GB", "--ratios", ".1"], ["--parameters", "5", "--ratio", "0.1"]):
        assert call("compress", wide, "--out", tmp_path / "out", *options).exit_code == 2
    made = call("compress", wide, "--out", tmp_path / "out", "--recipe", "svd", "--budget", "450kB", "--json")
    data = json.loads(made.stdout)
    assert 0.995 * 450_000 <= bytes_of(tmp_path / "out") <= 450_000 and data["run"]["tries"]
    for options in (["--budget", "450kB"], ["--parameters", "115e3"]):
        found = call("plan", wide, "--recipe", "svd", *options, "--json")
        planned = json.loads(found.stdout)
        assert any("planned at ratio 0." in note for note in planned["notes"])
    assert 114_885 <= planned["parameters"]["total_after"] <= 115_000
    assert call("plan", wide, "--budget", "1GB", "--parameters", "5").exit_code == 2


def test_a_plan_by_size_needs_no_weights(wide: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((wide / "config.json").read_bytes())
    asked = recipe.build("default", {}, ["calibrate.length=24"])
    with_files, without = (estimate(each, asked, parameters=115_000) for each in (wide, bare))
    assert with_files.totals == without.totals
    with_files, without = (estimate(each, asked, budget="450kB") for each in (wide, bare))
    assert without.totals["total_after"] == pytest.approx(with_files.totals["total_after"], rel=0.03)
